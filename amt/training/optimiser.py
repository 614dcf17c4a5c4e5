"""The state of SGD by names of parameters, and checks for values that are not finite; for every tuner.

Knows no method and no files.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from amt.models.weights import Weights


class NonFiniteLoss(ArithmeticError):
    """The loss or a weight became NaN or infinite; the message says where in the run."""


def check_loss(loss: float, where: str) -> None:
    """Raise `NonFiniteLoss` unless a loss is finite."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"loss is {loss} at {where}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `NonFiniteLoss` if a tensor, of any shape, is not finite after the last step, whose loss may
    still have been."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteLoss(f"{name} is no longer finite at {where}")


def momentum(optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> Weights:
    """The momentum buffers of SGD by the names of their parameters, which have any shape; none before a
    parameter's first step."""
    held = {name: optimiser.state.get(each, {}).get("momentum_buffer") for name, each in parameters.items()}
    return {name: buffer for name, buffer in held.items() if buffer is not None}


def restore_momentum(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    """Continue from what `momentum` gave, tensors of any shape; the buffers are copied. Raises KeyError for a
    buffer of no parameter, ValueError for one of another shape than its own."""
    for name, buffer in buffers.items():
        parameter = parameters[name]
        if buffer.shape != parameter.shape:
            raise ValueError(f"momentum of {name} has shape {tuple(buffer.shape)}")
        optimiser.state[parameter] = {"momentum_buffer": buffer.to(parameter.device, copy=True)}
