"""Pools of adapters: low-rank factors over one residual, or complete networks, as plain data.

    W       =   W_res   +   sum_p  c_p      B_p        A_p            per adapted layer; sum_p c_p = 1
    (out, in)  (out, in)           ()   (out/g, r)   (r, in)          per group of output rows

    A    (P, g, r, in)       P members, rank r, g groups: 3 for a fused qkv, else 1
    B    (P, g, out/g, r)
    B A  (g, out/g, in), viewed in the shape of W: (out, in), or (out, in, kh, kw) for a convolution

All members of a `LoRAPool` share W_res, so a merge is exact whatever the members; a `LoRANormPool` has their
LayerNorms beside. A `FullPool` has complete networks as members, sum_p c_p W_p: every weight is a factor.
Knows no training and no file.

LoRA: Hu et al. 2021, arxiv.org/abs/2106.09685. Start from the leading singular triplets: Meng et al. 2024,
arxiv.org/abs/2404.02948, and eq. 5 of the AMT paper. Full meta-training: Hu et al. 2022 (P>M>F),
arxiv.org/abs/2204.07305.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.models.weights import Merged, Trim, Weights, trim_singular_values

VIT_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
GATED_LAYERS = ("mlp.fc1_g", "mlp.fc1_x")  # of EVA's, in place of mlp.fc1


def low_rank(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """B A of A (g, r, in) and B (g, out/g, r) in the shape of `weight`, (out, in) or (out, in, kh, kw),
    which the product fills in the order of memory."""
    return (B @ A).reshape(weight.shape)


def plus_low_rank(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W + B_p A_p of P members in one product: A (P, g, r, in) and B (P, g, out/g, r) -> (P, ...) over the
    shape of `weight`."""
    members, groups = A.shape[:2]
    blocks = weight.reshape(groups, len(weight) // groups, -1)
    blocks = blocks.expand(members, -1, -1, -1).flatten(0, 1)
    return torch.baddbmm(blocks, B.flatten(0, 1), A.flatten(0, 1)).view(members, *weight.shape)


def adapted_layers(weights: Weights, layers: Sequence[str] = (*VIT_LAYERS, *GATED_LAYERS)) -> list[str]:
    """Names of the weights that get an adapter: those of layers whose name ends as listed."""
    endings = tuple(f"{layer}.weight" for layer in layers)
    return [name for name in weights if name.endswith(endings)]


def norm_weights(weights: Weights) -> list[str]:
    """Names of the weights and biases (D,) of normalisation layers, called norm, norm1 and so on."""
    return [name for name, each in weights.items() if each.ndim == 1 and "norm" in f".{name}".split(".")[-2]]


def factor_groups(name: str) -> int:
    """The number g of groups of output rows of the weight called `name`: one each for queries, keys and
    values."""
    return 3 if name.endswith("qkv.weight") else 1


def split_principal(weight: Tensor, rank: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into its leading singular triplets and the rest.

    Per group of output rows W = U S V^T:  A = sqrt(S_r) V_r^T,  B = U_r sqrt(S_r),  W_res = W - B A.
    The signs of A's rows and B's columns are arbitrary together; B A is not.

    Args:
        weight: (out, in) or a convolution's (out, in, kh, kw).
        rank: r, at most min(out / groups, in * kh * kw).
        groups: number of equal blocks of rows to split separately.

    Returns:
        W_res like `weight`, A (groups, r, in), B (groups, out / groups, r).

    Raises:
        ValueError: the rank exceeds the matrix.
    """
    blocks = weight.reshape(groups, weight.shape[0] // groups, -1)
    if not 0 < rank <= min(blocks.shape[1:]):
        raise ValueError(f"rank {rank} does not fit a {blocks.shape[1]} x {blocks.shape[2]} matrix")
    U, S, Vh = torch.linalg.svd(blocks, full_matrices=False)
    root = S[:, :rank].sqrt()
    A = root[:, :, None] * Vh[:, :rank]
    B = U[:, :, :rank] * root[:, None]
    return weight - low_rank(A, B, weight), A, B


class Pool:
    """P members of one architecture, each with the classifier head it was trained with; immutable.

    The common part of all kinds: training, merging and evaluation use nothing else.

    Attributes:
        tune: the value of --tune that trains this kind.
        scale, bias: (P,) the head's logit scale and bias.
        levels: the P robustness levels the members were (or are to be) trained for.
        rank: of the low-rank factors, or None where there are none.
        residual: what members of low rank are added to; empty where there are none.
        shapes: names and shapes of the complete weights that `merge` gives.
        adapted: names of the weights in which members differ.
        factors: all that is trained but the head: tensors with a leading P by name, in an order fixed by
            names, as sums over factors depend on it.
    """

    tune: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]  # all kinds are dataclasses
    scale: Tensor
    bias: Tensor
    levels: tuple[Perturbation, ...]
    rank: int | None
    residual: Weights
    shapes: dict[str, tuple[int, ...]]
    adapted: frozenset[str]
    factors: dict[str, Tensor]

    def with_factors(self, factors: dict[str, Tensor]) -> Self:
        """The same pool with other factors (P, ...), of the names and shapes of `factors`."""
        raise NotImplementedError

    def stack(self, apart: bool = False) -> Weights:
        """Complete weights of every member at once, by name: (P, ...) where members differ, without the P
        where they are shared. A gradient reaches every factor.

        Args:
            apart: merged weights have no graph, and beside them are the factors that the gradient reaches,
                `<layer>.lora_A` and `<layer>.lora_B`: far less work, for networks that take them so, see
                `Network.takes_factors`.
        """
        raise NotImplementedError

    def _mixture(self, shares: dict[int, float]) -> Weights:
        """Complete weights of some members in these shares, which sum to 1."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, member: int) -> Self:
        """Member `member` alone: a pool of size one that shares its tensors.

        Raises:
            IndexError: there is no such member.
        """
        if not 0 <= member < len(self):
            raise IndexError(f"member {member} of a pool of {len(self)}")
        part = slice(member, member + 1)
        chosen = self.with_factors({name: factor[part] for name, factor in self.factors.items()})
        head = {"scale": self.scale[part], "bias": self.bias[part], "levels": self.levels[part]}
        return dataclasses.replace(chosen, **head)

    def to(self, device: torch.device | str) -> Self:
        """The same pool with every tensor on `device`."""

        def moved(value):
            if isinstance(value, dict):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return dataclasses.replace(self, **{name: moved(value) for name, value in vars(self).items()})

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

    def merged(self, coefficients: Sequence[float], trims: Sequence[Trim] = ()) -> Merged:
        """`merge`, trimmed, and `head` in one; errors as of `merge`."""
        return Merged(trim_singular_values(self.merge(coefficients), trims), *self.head(coefficients))

    @staticmethod
    def concat(pools: Sequence["Pool"]) -> "Pool":
        """One pool of all members of `pools`, in order.

        Raises:
            ValueError: they are of different kinds, ranks, layers or architectures, or of LoRAs with
                different residuals (beyond the rounding of a float32 SVD).
        """
        first = pools[0]
        for pool in pools[1:]:
            _check_joins(first, pool)
        found = [pool.factors for pool in pools]
        head = {
            "scale": torch.cat([pool.scale for pool in pools]),
            "bias": torch.cat([pool.bias for pool in pools]),
            "levels": tuple(level for pool in pools for level in pool.levels),
        }
        joined = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        return dataclasses.replace(first.with_factors(joined), **head)


def _nearly_equal(one: Tensor | None, two: Tensor | None) -> bool:
    """Whether two residuals, of any shape, are equal up to the rounding of a float32 SVD."""
    if one is None or two is None:
        return one is two
    return one is two or (one.shape == two.shape and torch.allclose(one, two, rtol=1e-4, atol=1e-5))


def _check_joins(first: Pool, other: Pool) -> None:
    if other.tune != first.tune:
        raise ValueError(f"one was trained with --tune {first.tune}, another with {other.tune}")
    if other.rank != first.rank:
        raise ValueError(f"the LoRAs of one have rank {first.rank}, those of another rank {other.rank}")
    for name in first.residual.keys() | other.residual.keys():
        if not _nearly_equal(first.residual.get(name), other.residual.get(name)):
            raise ValueError(f"residuals differ at {name}: not adapters of one pretrained network")
    for name in sorted(first.shapes.keys() | other.shapes.keys()):
        if first.shapes.get(name) != other.shapes.get(name):
            raise ValueError(f"weights differ in shape at {name}: not of one architecture")
    if other.adapted != first.adapted:
        raise ValueError("the pools differ in the layers they adapt")


@dataclasses.dataclass(frozen=True)
class LoRAPool(Pool):
    """P low-rank adapters over one shared residual.

    Args:
        residual: every weight of the network by name; adapted ones hold W_res.
        A, B: factors by the name of the weight they adapt; shapes as in the module's docstring.
        scale, bias, levels: see `Pool`.

    >>> len(LoRAPool.concat([pool, pool])), sorted(pool.merge([0.25, 0.75])) == sorted(pool.shapes)
    (4, True)
    """

    residual: Weights
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: Tensor
    bias: Tensor
    levels: tuple[Perturbation, ...]

    tune = "lora"

    @property
    def rank(self) -> int:
        return next(iter(self.A.values())).shape[2]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.residual.items()}

    @property
    def adapted(self) -> frozenset[str]:
        return frozenset(self.A)

    @property
    def factors(self) -> dict[str, Tensor]:
        """All low-rank factors in one dictionary: `<weight>.lora_A` (P, g, r, in) and `<weight>.lora_B`
        (P, g, out/g, r)."""
        named = {}
        for name in sorted(self.A):
            named[f"{name}.lora_A"] = self.A[name]
            named[f"{name}.lora_B"] = self.B[name]
        return named

    def with_factors(self, factors: dict[str, Tensor]) -> "LoRAPool":
        """The same pool with other factors (P, ...), of the names and shapes of `factors`."""
        return dataclasses.replace(
            self,
            A={name: factors[f"{name}.lora_A"] for name in self.A},
            B={name: factors[f"{name}.lora_B"] for name in self.B},
        )

    def stack(self, apart: bool = False) -> Weights:
        """Complete weights of every member, see `Pool`: adapted ones are (P, ...)."""
        if not apart:
            return self.residual | self._adapted()
        with torch.no_grad():
            found = self.residual | self._adapted()
        for part, factors in (("lora_A", self.A), ("lora_B", self.B)):
            found |= {name.removesuffix("weight") + part: factor for name, factor in factors.items()}
        return found

    def _adapted(self) -> Weights:
        """The adapted weights of every member, (P, ...)."""
        return {name: plus_low_rank(self.residual[name], self.A[name], self.B[name]) for name in self.A}

    def _mixture(self, shares: dict[int, float]) -> Weights:
        """W_res + sum_p c_p B_p A_p, each sum as one product of rank k r for k members."""

        def mixed(name: str) -> Tensor:
            wide_A = torch.cat([self.A[name][p] for p in shares], dim=1)
            wide_B = torch.cat([share * self.B[name][p] for p, share in shares.items()], dim=2)
            return plus_low_rank(self.residual[name], wide_A[None], wide_B[None])[0]

        return self.residual | {name: mixed(name) for name in self.A}


@dataclasses.dataclass(frozen=True)
class LoRANormPool(LoRAPool):
    """A `LoRAPool` whose members have weights and biases of the LayerNorms of their own, which are trained
    and merged like complete weights; `residual` has the pretrained ones.

    Args:
        norms: (P, D) by name, see `norm_weights`.
    """

    norms: dict[str, Tensor]

    tune = "lora+norm"

    @property
    def adapted(self) -> frozenset[str]:
        return frozenset((*self.A, *self.norms))

    @property
    def factors(self) -> dict[str, Tensor]:
        """The low-rank factors, see `LoRAPool`, and the LayerNorms (P, D) by their own names."""
        return super().factors | dict(sorted(self.norms.items()))

    def with_factors(self, factors: dict[str, Tensor]) -> "LoRANormPool":
        """The same pool with other factors and LayerNorms (P, ...), of the names and shapes of `factors`."""
        loras, norms = super().with_factors(factors), {name: factors[name] for name in self.norms}
        return dataclasses.replace(self, A=loras.A, B=loras.B, norms=norms)

    def stack(self, apart: bool = False) -> Weights:
        """Complete weights of every member, see `Pool`: adapted ones and LayerNorms are (P, ...)."""
        return super().stack(apart) | self.norms

    def _mixture(self, shares: dict[int, float]) -> Weights:
        return super()._mixture(shares) | _mixed(self.norms, shares)


@dataclasses.dataclass(frozen=True)
class FullPool(Pool):
    """P complete sets of weights of one network, which full meta-tuning trains. Every weight is a factor.

    Args:
        weights: every weight by name, (P, ...) over its own shape: position table, class token, norms and
            biases too.
        scale, bias, levels: see `Pool`.
    """

    weights: dict[str, Tensor]
    scale: Tensor
    bias: Tensor
    levels: tuple[Perturbation, ...]

    tune = "full"
    rank = None

    @property
    def residual(self) -> Weights:
        return {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape[1:]) for name, weight in self.weights.items()}

    @property
    def adapted(self) -> frozenset[str]:
        return frozenset(self.weights)

    @property
    def factors(self) -> dict[str, Tensor]:
        """All weights (P, ...) by their own names."""
        return dict(sorted(self.weights.items()))

    def with_factors(self, factors: dict[str, Tensor]) -> "FullPool":
        """The same pool with other weights (P, ...), of the names and shapes of `factors`."""
        return dataclasses.replace(self, weights={name: factors[name] for name in self.weights})

    def stack(self, apart: bool = False) -> Weights:
        """Complete weights of every member, see `Pool`: all are (P, ...), and are the factors."""
        return self.weights

    def _mixture(self, shares: dict[int, float]) -> Weights:
        """sum_p c_p W_p as W_k + sum_p c_p (W_p - W_k), k the first member with c_k != 0: so a single member,
        and a pool whose members are still equal, come out bit for bit."""
        return _mixed(self.weights, shares)


def _mixed(weights: dict[str, Tensor], shares: dict[int, float]) -> Weights:
    """Weights (P, ...) of members with these shares as one, see `FullPool._mixture`."""
    first, *others = shares

    def mixed(weight: Tensor) -> Tensor:
        base = weight[first]
        return base + sum(shares[p] * (weight[p] - base) for p in others) if others else base

    return {name: mixed(weight) for name, weight in weights.items()}


def principal_pool(
    weights: Weights,
    rank: int,
    levels: Sequence[Perturbation],
    layers: Sequence[str] = VIT_LAYERS,
    norms: bool = False,
) -> LoRAPool:
    """An untrained pool: every adapter starts at the leading singular triplets of the pretrained weights.

    Args:
        weights: all pretrained weights by name.
        rank: r of every adapter.
        levels: one robustness level per adapter.
        layers: endings of the names of the layers to adapt.
        norms: whether members have LayerNorms of their own, see `LoRANormPool`.

    >>> principal_pool(network.weights, rank=4, levels=[Perturbation(8, 2)]).rank
    4
    """
    residual, A, B = dict(weights), {}, {}
    for name in adapted_layers(weights, layers):
        residual[name], one_A, one_B = split_principal(weights[name], rank, factor_groups(name))
        A[name] = one_A.repeat(len(levels), 1, 1, 1)
        B[name] = one_B.repeat(len(levels), 1, 1, 1)
    parts = (residual, A, B, *_untrained_head(weights, len(levels)), tuple(levels))
    copies = {name: torch.stack([weights[name]] * len(levels)) for name in norm_weights(weights)}
    return LoRANormPool(*parts, copies) if norms else LoRAPool(*parts)


def pretrained_pool(weights: Weights, levels: Sequence[Perturbation]) -> FullPool:
    """An untrained pool: every member is the pretrained network.

    Args:
        weights: all pretrained weights by name.
        levels: one robustness level per member.
    """
    copies = {name: torch.stack([weight] * len(levels)) for name, weight in weights.items()}
    return FullPool(copies, *_untrained_head(weights, len(levels)), tuple(levels))


def _untrained_head(weights: Weights, members: int) -> tuple[Tensor, Tensor]:
    """Logit scales and biases that training starts from (Hu et al. 2022): (P,) of 10, (P,) of 0."""
    like = next(iter(weights.values()))
    return like.new_full((members,), 10.0), like.new_zeros(members)
