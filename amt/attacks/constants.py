"""Numbers as tensors on a device, sent once: every copy to a device waits for all that it has yet to do."""

import functools

import torch
from torch import Tensor


def constant(numbers: float | tuple[float, ...], like: Tensor) -> Tensor:
    """A number () or numbers (n,) of the type and on the device of `like`; to be read, never written.

    >>> constant((0.5, 2.0), torch.zeros(3))
    tensor([0.5000, 2.0000])
    """
    make = _made.__wrapped__ if torch.compiler.is_compiling() else _made  # a traced tensor must not be kept
    return make(numbers, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _made(numbers: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)
