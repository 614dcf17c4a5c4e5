"""What everything is computed on: weights by name, and random numbers as an argument."""

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Coefficients = tuple[float, ...]  # one share per member of a pool


def stream(*key: int) -> torch.Generator:
    """A CPU generator that depends on the numbers of `key` and on nothing else."""
    mixed = 0
    for number in key:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)
