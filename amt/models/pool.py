"""Pools of adapters: low-rank factors over one residual, or complete networks, as plain data.

    W       =   W_res   +   sum_p  c_p      B_p        A_p            per adapted layer; sum_p c_p = 1
    (out, in)  (out, in)           ()   (out/g, r)   (r, in)          per group of output rows

    A    (P, g, r, in)       P members, rank r, g groups: 3 for a fused qkv, else 1
    B    (P, g, out/g, r)
    B A  (g, out/g, in), viewed in the shape of W: (out, in), or (out, in, kh, kw) for a convolution

LoRAs share W_res, so a merge is exact whatever the members. Weights that a member has whole are averaged,
sum_p c_p W_p: its LayerNorms beside LoRAs (`--tune lora+norm`), or all of a complete network (`--tune full`).
Knows no training and no file.

LoRA: Hu et al. 2021, arxiv.org/abs/2106.09685. Start from the leading singular triplets: Meng et al. 2024,
arxiv.org/abs/2404.02948, and eq. 5 of the AMT paper. Full meta-training: Hu et al. 2022 (P>M>F),
arxiv.org/abs/2204.07305.
"""

import dataclasses
from collections.abc import Sequence

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
    """Split a weight (out, in), or a convolution's (out, in, kh, kw), into its leading singular triplets and
    the rest: W_res like `weight`, A (groups, r, in), B (groups, out / groups, r).

    Per group of output rows W = U S V^T:  A = sqrt(S_r) V_r^T,  B = U_r sqrt(S_r),  W_res = W - B A. The
    signs of A's rows and B's columns are arbitrary together; B A is not. Raises ValueError if the rank
    exceeds min(out / groups, in * kh * kw)."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, -1)
    if not 0 < rank <= min(blocks.shape[1:]):
        raise ValueError(f"rank {rank} does not fit a {blocks.shape[1]} x {blocks.shape[2]} matrix")
    U, S, Vh = torch.linalg.svd(blocks, full_matrices=False)
    root = S[:, :rank].sqrt()
    A = root[:, :, None] * Vh[:, :rank]
    B = U[:, :, :rank] * root[:, None]
    return weight - low_rank(A, B, weight), A, B


@dataclasses.dataclass(frozen=True)
class Pool:
    """P members of one architecture, each with the classifier head it was trained with; immutable.

    Args:
        residual: the weights that members share, by name; adapted ones hold W_res, and those of LayerNorms
            that members have of their own the pretrained ones. Empty where members share nothing.
        A, B: low-rank factors by the name of the weight they adapt; shapes as in the module's docstring.
        scale, bias: (P,) the head's logit scale and bias.
        levels: the P robustness levels the members were (or are to be) trained for.
        whole: weights that every member has of its own, (P, ...) over their own shape, by name.

    >>> len(Pool.concat([pool, pool])), sorted(pool.merge([0.25, 0.75])) == sorted(pool.shapes)
    (4, True)
    """

    residual: Weights
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    scale: Tensor
    bias: Tensor
    levels: tuple[Perturbation, ...]
    whole: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def tune(self) -> str:
        """The value of --tune that trains such a pool."""
        if not self.A:
            return "full"
        return "lora+norm" if self.whole else "lora"

    @property
    def rank(self) -> int | None:
        """Of the low-rank factors; None where there are none."""
        return next((A.shape[2] for A in self.A.values()), None)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the complete weights that `merge` gives."""
        shared = {name: tuple(weight.shape) for name, weight in self.residual.items()}
        return shared | {name: tuple(weight.shape[1:]) for name, weight in self.whole.items()}

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the weights in which members differ."""
        return frozenset((*self.A, *self.whole))

    @property
    def factors(self) -> dict[str, Tensor]:
        """All that is trained but the head, (P, ...): `<weight>.lora_A`, `<weight>.lora_B` and whole weights
        by their own names, in an order fixed by names, as sums over factors depend on it."""
        named = {}
        for name in sorted(self.A):
            named[f"{name}.lora_A"] = self.A[name]
            named[f"{name}.lora_B"] = self.B[name]
        return named | dict(sorted(self.whole.items()))

    def with_factors(self, factors: dict[str, Tensor]) -> "Pool":
        """The same pool with other factors (P, ...), of the names and shapes of `factors`."""
        return dataclasses.replace(
            self,
            A={name: factors[f"{name}.lora_A"] for name in self.A},
            B={name: factors[f"{name}.lora_B"] for name in self.B},
            whole={name: factors[name] for name in self.whole},
        )

    def stack(self, apart: bool = False) -> Weights:
        """Complete weights of every member at once, by name: (P, ...) where members differ, without the P
        where they are shared. A gradient reaches every factor.

        Args:
            apart: merged weights have no graph, and beside them are the factors that the gradient reaches,
                `<layer>.lora_A` and `<layer>.lora_B`: far less work, for networks that take them so, see
                `Network.takes_factors`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not apart):
            merged = {name: plus_low_rank(self.residual[name], self.A[name], self.B[name]) for name in self.A}
        found = self.residual | merged | self.whole
        if apart:
            for part, factors in (("lora_A", self.A), ("lora_B", self.B)):
                found |= {name.removesuffix("weight") + part: factor for name, factor in factors.items()}
        return found

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, member: int) -> "Pool":
        """Member `member` alone: a pool of size one that shares its tensors. Raises IndexError if there is
        no such member."""
        if not 0 <= member < len(self):
            raise IndexError(f"member {member} of a pool of {len(self)}")
        part = slice(member, member + 1)
        chosen = self.with_factors({name: factor[part] for name, factor in self.factors.items()})
        head = {"scale": self.scale[part], "bias": self.bias[part], "levels": self.levels[part]}
        return dataclasses.replace(chosen, **head)

    def to(self, device: torch.device | str) -> "Pool":
        """The same pool with every tensor on `device`."""

        def moved(value):
            if isinstance(value, dict):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return dataclasses.replace(self, **{name: moved(value) for name, value in vars(self).items()})

    def merge(self, coefficients: Sequence[float]) -> Weights:
        """Complete weights; a gradient reaches every factor of a member whose coefficient is not 0. The P
        coefficients sum to 1, as only then does an untrained pool give back the pretrained network. Raises
        ValueError for another number of coefficients, or a sum other than 1."""
        coefficients = [float(c) for c in coefficients]
        if len(coefficients) != len(self):
            raise ValueError(f"{len(coefficients)} coefficients for a pool of {len(self)}")
        if not abs(sum(coefficients) - 1) <= 1e-4:  # so that NaN is refused as well
            raise ValueError(f"coefficients sum to {sum(coefficients):.6g}, expected 1")
        shares = {p: c for p, c in enumerate(coefficients) if c != 0}
        low = {name: self._plus_low_rank(name, shares) for name in self.A}
        return self.residual | low | {name: _mean(weight, shares) for name, weight in self.whole.items()}

    def _plus_low_rank(self, name: str, shares: dict[int, float]) -> Tensor:
        """W_res + sum_p c_p B_p A_p, the sum as one product of rank k r for k members."""
        wide_A = torch.cat([self.A[name][p] for p in shares], dim=1)
        wide_B = torch.cat([share * self.B[name][p] for p, share in shares.items()], dim=2)
        return plus_low_rank(self.residual[name], wide_A[None], wide_B[None])[0]

    def head(self, coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The merged head: logit scale and bias, two scalars."""
        shares = self.scale.new_tensor([float(c) for c in coefficients])
        return shares @ self.scale, shares @ self.bias

    def merged(self, coefficients: Sequence[float], trims: Sequence[Trim] = ()) -> Merged:
        """`merge`, trimmed, and `head` in one; errors as of `merge`."""
        return Merged(trim_singular_values(self.merge(coefficients), trims), *self.head(coefficients))

    @staticmethod
    def concat(pools: Sequence["Pool"]) -> "Pool":
        """One pool of all members of `pools`, in order. Raises ValueError if they are of different kinds,
        ranks, layers or architectures, or of LoRAs with different residuals (beyond the rounding of a float32
        SVD)."""
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


def _mean(weight: Tensor, shares: dict[int, float]) -> Tensor:
    """sum_p c_p W_p of a weight (P, ...) as W_k + sum_p c_p (W_p - W_k), k the first member with c_k != 0: so
    a single member, and a pool whose members are still equal, come out bit for bit."""
    first, *others = shares
    base = weight[first]
    return base + sum(shares[p] * (weight[p] - base) for p in others) if others else base


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


def principal_pool(
    weights: Weights,
    rank: int,
    levels: Sequence[Perturbation],
    layers: Sequence[str] = VIT_LAYERS,
    norms: bool = False,
) -> Pool:
    """An untrained pool: every adapter starts at the leading singular triplets of the pretrained weights.

    Args:
        levels: one robustness level per adapter.
        layers: endings of the names of the layers to adapt.
        norms: whether members have LayerNorms of their own.

    >>> principal_pool(network.weights, rank=4, levels=[Perturbation(8, 2)]).rank
    4
    """
    residual, A, B = dict(weights), {}, {}
    for name in adapted_layers(weights, layers):
        residual[name], one_A, one_B = split_principal(weights[name], rank, factor_groups(name))
        A[name] = one_A.repeat(len(levels), 1, 1, 1)
        B[name] = one_B.repeat(len(levels), 1, 1, 1)
    own = norm_weights(weights) if norms else []
    copies = {name: torch.stack([weights[name]] * len(levels)) for name in own}
    return Pool(residual, A, B, *_untrained_head(weights, len(levels)), tuple(levels), copies)


def pretrained_pool(weights: Weights, levels: Sequence[Perturbation]) -> Pool:
    """An untrained pool: every member is the pretrained network, with a robustness level of its own."""
    copies = {name: torch.stack([weight] * len(levels)) for name, weight in weights.items()}
    return Pool({}, {}, {}, *_untrained_head(weights, len(levels)), tuple(levels), copies)


def _untrained_head(weights: Weights, members: int) -> tuple[Tensor, Tensor]:
    """Logit scales and biases that training starts from (Hu et al. 2022): (P,) of 10, (P,) of 0."""
    like = next(iter(weights.values()))
    return like.new_full((members,), 10.0), like.new_zeros(members)
