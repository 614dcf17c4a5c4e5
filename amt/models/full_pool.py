"""A pool of complete networks: what full meta-tuning trains, where LoRAs would be trained otherwise.

    W  =  W_k + sum_p c_p (W_p - W_k)        per weight, k the first member with c_k != 0

which is sum_p c_p W_p for coefficients c that sum to 1, written so that a single member, and a pool whose
members are still equal, come out bit for bit. Every weight is a factor: position table, class token, norms
and biases too, as in the ProtoNet meta-training of P>M>F (Hu et al. 2022, arxiv.org/abs/2204.07305). Knows
no training and no files.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.models.pool import Pool, joined_heads, untrained_head
from amt.models.weights import Weights


@dataclasses.dataclass(frozen=True)
class FullPool(Pool):
    """P complete sets of weights of one network, with the classifier head each was trained with.

    Args:
        weights: every weight by name, (P, ...) over its own shape.
        scale, bias: (P,) the head's logit scale and bias.
        levels: the P robustness levels the networks were (or are to be) trained for.
    """

    weights: dict[str, Tensor]
    scale: Tensor
    bias: Tensor
    levels: tuple[Perturbation, ...]

    tune = "full"

    @property
    def rank(self) -> None:
        return None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape[1:]) for name, weight in self.weights.items()}

    @property
    def adapted(self) -> frozenset[str]:
        return frozenset(self.weights)

    @property
    def factors(self) -> dict[str, Tensor]:
        """All weights, by their own names."""
        return dict(sorted(self.weights.items()))

    def with_factors(self, factors: dict[str, Tensor]) -> "FullPool":
        return dataclasses.replace(self, weights={name: factors[name] for name in self.weights})

    def to(self, device) -> "FullPool":
        return dataclasses.replace(
            self,
            weights={name: weight.to(device) for name, weight in self.weights.items()},
            scale=self.scale.to(device),
            bias=self.bias.to(device),
        )

    def _part(self, members: slice) -> "FullPool":
        return FullPool(
            {name: weight[members] for name, weight in self.weights.items()},
            self.scale[members],
            self.bias[members],
            self.levels[members],
        )

    def _mixture(self, shares: dict[int, float]) -> Weights:
        first, *others = shares

        def mixed(weight: Tensor) -> Tensor:
            base = weight[first]
            return base + sum(shares[p] * (weight[p] - base) for p in others) if others else base

        return {name: mixed(weight) for name, weight in self.weights.items()}

    def _joined(self, pools: Sequence["FullPool"]) -> "FullPool":
        """Raises a ValueError unless their weights have the same names and shapes."""
        for pool in pools[1:]:
            for name in sorted(self.shapes.keys() | pool.shapes.keys()):
                if self.shapes.get(name) != pool.shapes.get(name):
                    raise ValueError(f"weights differ in shape at {name}: not of one architecture")
        return FullPool(
            {name: torch.cat([pool.weights[name] for pool in pools]) for name in self.weights},
            **joined_heads(pools),
        )


def pretrained_pool(weights: Weights, levels: Sequence[Perturbation]) -> FullPool:
    """An untrained pool: every member is the pretrained network.

    Args:
        weights: all pretrained weights by name.
        levels: one robustness level per member.
    """
    scale, bias = untrained_head(next(iter(weights.values())), len(levels))
    copies = {name: torch.stack([weight] * len(levels)) for name, weight in weights.items()}
    return FullPool(copies, scale, bias, tuple(levels))
