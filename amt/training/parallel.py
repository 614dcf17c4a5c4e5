"""One batch over several ranks: each takes a part of it through the network, and all know the whole outcome.

    images (n, ...) -> this rank's rows -> module -> logits of its rows -> logits (n, K) of all ranks

The logits are gathered, so loss, accuracy and whatever follows from them is computed on the whole batch by
every rank alike, and a gradient that a rank finds is its rows' part of the whole one: `Ranks.added` adds them
up. A gradient for the images is gathered too, so an attack moves all of them everywhere. BatchNorm normalises
by the statistics of the whole batch, as torch's SyncBatchNorm does it on GPUs alone.

So ranks hold the same state, which is that of one process up to rounding. Knows no loss and no optimiser.
"""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from amt.files.ranks import Ranks
from amt.models.network import Network


def shared(network: Network, ranks: Ranks) -> Network:
    """The network of all ranks together: it takes and gives whole batches, of any size."""
    if ranks.world == 1:
        return network
    module = copy.deepcopy(network.module)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.forward = _WholeBatch(part.forward, ranks)
    inner: Any = module.forward

    def forward(images: Tensor) -> Tensor:
        found: Any = _Whole.apply(inner(_Rows.apply(images, ranks)), ranks, len(images))
        return found

    module.forward = forward
    return dataclasses.replace(network, module=module)


def _rows(n: int, rank: int, world: int) -> slice:
    """Which of n images are a rank's: neighbours, as many as any other rank has, or one fewer."""
    return slice(rank * n // world, (rank + 1) * n // world)


def _gathered(part: Tensor, n: int, ranks: Ranks) -> Tensor:
    """Every rank's rows (m, ...), of n in all: (n, ...)."""
    owned = [len(range(n)[_rows(n, rank, ranks.world)]) for rank in range(ranks.world)]
    padded = part.new_zeros(max(owned), *part.shape[1:])
    padded[: len(part)] = part
    found = ranks.each([padded])
    return torch.cat([each[:size] for (each,), size in zip(found, owned, strict=True) if each is not None])


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, ranks: Ranks) -> Tensor:
        ctx.n, ctx.ranks = len(images), ranks
        return images[_rows(len(images), ranks.rank, ranks.world)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradients[0], ctx.n, ctx.ranks), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, n: int) -> Tensor:
        ctx.n, ctx.ranks = n, ranks
        return _gathered(part, n, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][_rows(ctx.n, ctx.ranks.rank, ctx.ranks.world)], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.total(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(gradients[0]), None


class _WholeBatch(TorchFunctionMode):
    """A BatchNorm layer's forward pass, in which the batch is that of all ranks."""

    def __init__(self, forward: Any, ranks: Ranks):
        super().__init__()
        self._forward, self._ranks = forward, ranks

    def __call__(self, input: Tensor) -> Tensor:
        with self:
            return self._forward(input)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.batch_norm or not kwargs["training"]:
            return function(*args, **kwargs or {})
        return self._normalised(*args, **kwargs)

    def _normalised(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """What F.batch_norm gives for this rank's rows (m, C, ...) of the whole batch."""
        del training
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        number = x.new_full((1,), x.numel() / x.shape[1])  # nothing that is sent to a GPU
        sums, count = self._summed(torch.cat([x.sum(dims), number])).split([x.shape[1], 1])
        mean = sums / count
        centred = x - mean.view(shape)
        var = self._summed(centred.square().sum(dims)) / count
        with torch.no_grad():
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.detach(), momentum)
                running_var.lerp_(var.detach() * count / (count - 1), momentum)
        found = centred * (var + eps).rsqrt().view(shape)
        if weight is not None:
            found = found * weight.view(shape)
        return found if bias is None else found + bias.view(shape)

    def _summed(self, tensor: Tensor) -> Tensor:
        found: Any = _Sum.apply(tensor, self._ranks)
        return found
