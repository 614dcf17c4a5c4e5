"""Weights by name, trimming of their singular values, and seeded random generators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from amt.models.trim import Trim

Weights = dict[str, Tensor]
Coefficients = tuple[float, ...]  # one share per member of a pool


def stream(*key: int) -> torch.Generator:
    """A CPU generator that depends on the numbers of `key` alone."""
    mixed = 0
    for number in key:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def truncate(weight: Tensor, keep: float) -> Tensor:
    """The best approximation of a matrix (out, in) by its int(min(out, in) * keep) largest singular triplets,
    at least one."""
    count = max(int(min(weight.shape) * keep), 1)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return (U[:, :count] * S[:count]) @ Vh[:count]


def trim_singular_values(weights: Weights, trims: Sequence[Trim]) -> Weights:
    """Weights with the small singular values of the selected layers removed. Every trim starts from the given
    weights, so where two select one layer the later one counts."""
    return weights | {
        name: truncate(weights[name], trim.keep) for trim in trims for name in weights if trim.selects(name)
    }
