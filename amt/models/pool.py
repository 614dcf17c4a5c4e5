"""What training, merging, evaluation and checkpoints know of a pool: P networks that become one.

    merge(c) -> complete weights       linear in whatever the members are made of, for c that sums to 1

`LoRAPool` (amt/models/lora.py) has low-rank adapters over a shared residual as members, `FullPool`
(amt/models/full_pool.py) complete sets of weights. Nothing else asks which, but what can only be said of
one of them: a published format, say. Knows no training and no files.
"""

import abc
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.models.weights import Weights


class Pool(abc.ABC):
    """P members of one architecture, each with the classifier head it was trained with; immutable.

    Attributes:
        tune: the value of main.py's --tune that trains this kind.
        scale, bias: (P,) the head's logit scale and bias.
        levels: the P robustness levels the members were (or are to be) trained for.
    """

    tune: ClassVar[str]
    scale: Tensor
    bias: Tensor
    levels: tuple[Perturbation, ...]

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, member: int) -> Self:
        """Member `member` alone: a pool of size one that shares its tensors."""
        if not 0 <= member < len(self):
            raise IndexError(f"member {member} of a pool of {len(self)}")
        return self._part(slice(member, member + 1))

    @property
    @abc.abstractmethod
    def rank(self) -> int | None:
        """Of the low-rank factors, or None where there are none."""

    @property
    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the complete weights that `merge` gives."""

    @property
    @abc.abstractmethod
    def adapted(self) -> frozenset[str]:
        """Names of the weights in which members differ."""

    @property
    @abc.abstractmethod
    def factors(self) -> dict[str, Tensor]:
        """All that is trained but the head: tensors with a leading P by name, in an order fixed by names."""

    @abc.abstractmethod
    def with_factors(self, factors: dict[str, Tensor]) -> Self:
        """The same pool with other factors, named as in `factors`."""

    @abc.abstractmethod
    def to(self, device) -> Self:
        """The same pool with every tensor on `device`."""

    def merge(self, coefficients: Sequence[float]) -> Weights:
        """Complete weights; a gradient reaches every factor of a member whose coefficient is not 0.

        Args:
            coefficients: P numbers that sum to 1: only then does an untrained pool give back the
                pretrained network.

        Raises:
            ValueError: another number of coefficients, or a sum other than 1.
        """
        coefficients = [float(c) for c in coefficients]
        if len(coefficients) != len(self):
            raise ValueError(f"{len(coefficients)} coefficients for a pool of {len(self)}")
        if not abs(sum(coefficients) - 1) <= 1e-4:  # so that NaN is refused as well
            raise ValueError(f"coefficients sum to {sum(coefficients):.6g}, expected 1")
        return self._mixture({p: c for p, c in enumerate(coefficients) if c != 0})

    def head(self, coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The merged head: logit scale and bias, two scalars."""
        shares = self.scale.new_tensor([float(c) for c in coefficients])
        return shares @ self.scale, shares @ self.bias

    @staticmethod
    def concat(pools: Sequence["Pool"]) -> "Pool":
        """One pool of all members of `pools`, in order.

        Raises:
            ValueError: they are of different kinds, or do not belong together; see the kinds.
        """
        first = pools[0]
        for pool in pools[1:]:
            if pool.tune != first.tune:
                raise ValueError(f"one was trained with --tune {first.tune}, another with {pool.tune}")
        return first._joined(pools)

    @abc.abstractmethod
    def _part(self, members: slice) -> Self: ...

    @abc.abstractmethod
    def _mixture(self, shares: dict[int, float]) -> Weights: ...

    @abc.abstractmethod
    def _joined(self, pools: Sequence[Self]) -> Self: ...


def untrained_head(like: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Logit scales and biases that training starts from (Hu et al. 2022): (P,) of 10, (P,) of 0."""
    return like.new_full((members,), 10.0), like.new_zeros(members)


def joined_heads(pools: Sequence[Pool]) -> dict:
    """`scale`, `bias` and `levels` of all pools, one after another."""
    return {
        "scale": torch.cat([pool.scale for pool in pools]),
        "bias": torch.cat([pool.bias for pool in pools]),
        "levels": tuple(level for pool in pools for level in pool.levels),
    }
