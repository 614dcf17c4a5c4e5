"""Weights by name, their trimming, and random numbers as an argument."""

import dataclasses
from collections.abc import Sequence

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


@dataclasses.dataclass(frozen=True)
class Trim:
    """Which weights lose their smallest singular values.

    Args:
        layer: ending of the layer's name, such as "qkv", "proj", "fc1" or "attn.qkv".
        block: index of the transformer block, or -1 for all.
        keep: fraction of singular values kept, in (0, 1]; at least one value stays.
    """

    layer: str
    block: int
    keep: float

    def selects(self, name: str) -> bool:
        """Whether the weight called `name`, e.g. `blocks.3.attn.qkv.weight`, is trimmed."""
        block = "blocks." if self.block == -1 else f"blocks.{self.block}."
        return name.startswith(block) and name.endswith(f"{self.layer}.weight")


def truncate(weight: Tensor, keep: float) -> Tensor:
    """Best approximation of a matrix (out, in) by its int(min(out, in) * keep) largest singular triplets."""
    count = max(int(min(weight.shape) * keep), 1)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return (U[:, :count] * S[:count]) @ Vh[:count]


def trim_singular_values(weights: Weights, trims: Sequence[Trim]) -> Weights:
    """Weights with the small singular values of the selected layers removed; every trim starts from the
    weight that came in, so where two select one layer the later one counts."""
    return weights | {
        name: truncate(weights[name], trim.keep) for trim in trims for name in weights if trim.selects(name)
    }
