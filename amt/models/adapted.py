"""Linear layers of one network or of P side by side, and the same with adapters in training.

With W = W_res + B A merged, y = x W^T + b takes one product. Autograd would give W a gradient of its size,
dy^T x, as much work as the layer itself, to multiply it by A and B. The factors' own gradients need far less:

    dA = (dy B)^T x        dB = dy^T (x A^T)        (n, out) (out, r), then (r, n) (n, in); and the like

Knows no network.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows (..., in) through a layer (out, in), (out,); or through those of P networks, (P, out, in) and
    (out,) or (P, out), which have the rows in equal parts, one after the other -> (..., out)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(len(weight), -1, x.shape[-1])
    return torch.baddbmm(bias.unsqueeze(-2), rows, weight.mT).view(*x.shape[:-1], -1)


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`linear` (..., in) -> (..., out) of a weight and bias without graph, whose gradient reaches x and the
    factors that are merged in the weight: A (g, r, in) and B (g, out/g, r), or (P, g, ...) of P networks."""
    return _Adapted.apply(x, weight, bias, A, B)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.type = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(low), weight.to(low), bias.to(low)
        ctx.save_for_backward(x, weight, A, B)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        members, groups = weight.shape[:-2], A.shape[-3]
        rows, slopes = (each.reshape(*members, -1, each.shape[-1]) for each in (x, slope))
        slope_of_x = (slopes @ weight).view(x.shape).to(ctx.type) if ctx.needs_input_grad[0] else None
        wide_A, wide_B = A.flatten(-3, -2).to(x.dtype), _wide(B).to(x.dtype)
        (out, inside), width = weight.shape[-2:], wide_A.shape[-2]
        if 2 * width * (out + inside) < out * inside:
            slope_of_A = (slopes @ wide_B).mT @ rows
            slope_of_B = slopes.mT @ (rows @ wide_A.mT)
        else:  # at a high rank the gradient of the weight is the shorter way
            slope_of_weight = slopes.mT @ rows
            slope_of_A, slope_of_B = wide_B.mT @ slope_of_weight, slope_of_weight @ wide_A.mT
        slope_of_A = slope_of_A.view(A.shape).to(A.dtype)
        return slope_of_x, None, None, slope_of_A, _narrow(slope_of_B, groups).to(B.dtype)


def _wide(B: Tensor) -> Tensor:
    """Groups (..., g, out/g, r) on the diagonal of one matrix (..., out, g r)."""
    if B.shape[-3] == 1:
        return B.squeeze(-3)
    return torch.diag_embed(B.movedim(-3, -1), dim1=-4, dim2=-2).flatten(-4, -3).flatten(-2)


def _narrow(wide: Tensor, groups: int) -> Tensor:
    """The inverse of `_wide`: the groups on the diagonal, (..., g, out/g, r)."""
    blocks = wide.unflatten(-1, (groups, -1)).unflatten(-3, (groups, -1))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
