"""A pool of LoRAs as plain data, and the arithmetic that turns it into weights.

    W    =  W_res  +  sum_p c_p  B_p A_p          per adapted layer, for coefficients c that sum to 1

    A    (P, g, r, in)       P adapters, rank r, g groups of output rows: 3 for a fused qkv, else 1
    B    (P, g, out/g, r)
    B A  (g, out/g, in), viewed in the shape of W: (out, in), or (out, in, kh, kw) for a convolution

All adapters share one residual W_res, so a merge is exact whatever the adapters. (LoRA: Hu et al. 2021;
the start from the leading singular triplets: Meng et al. 2024, and eq. 5 of the AMT paper.)
Knows no training and no files.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from amt.attacks.settings import Perturbation
from amt.models.pool import Pool, joined_heads, untrained_head
from amt.models.trim import Trim
from amt.models.weights import Weights

VIT_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclasses.dataclass(frozen=True)
class LoRAPool(Pool):
    """P low-rank adapters over one shared residual, with the classifier head each was trained with.

    Args:
        residual: every weight of the network by name; adapted ones hold W_res.
        A, B: factors by the name of the weight they adapt; shapes as in the module's docstring.
        scale, bias: (P,) the head's logit scale and bias.
        levels: the P robustness levels the adapters were (or are to be) trained for.
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
        """All low-rank factors in one flat dictionary, `<weight>.lora_A` and `<weight>.lora_B`."""
        named = {}
        for name in sorted(self.A):  # one order, whoever built the pool: sums over factors depend on it
            named[f"{name}.lora_A"] = self.A[name]
            named[f"{name}.lora_B"] = self.B[name]
        return named

    def with_factors(self, factors: dict[str, Tensor]) -> "LoRAPool":
        return dataclasses.replace(
            self,
            A={name: factors[f"{name}.lora_A"] for name in self.A},
            B={name: factors[f"{name}.lora_B"] for name in self.B},
        )

    def to(self, device) -> "LoRAPool":
        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return dataclasses.replace(
            self,
            residual=move(self.residual),
            A=move(self.A),
            B=move(self.B),
            scale=self.scale.to(device),
            bias=self.bias.to(device),
        )

    def _part(self, members: slice) -> "LoRAPool":
        return dataclasses.replace(
            self,
            A={name: factor[members] for name, factor in self.A.items()},
            B={name: factor[members] for name, factor in self.B.items()},
            scale=self.scale[members],
            bias=self.bias[members],
            levels=self.levels[members],
        )

    def _mixture(self, shares: dict[int, float]) -> Weights:
        """W_res + sum_p c_p B_p A_p."""
        return self.residual | {
            name: weight + low_rank(*_joined_ranks(self.A[name], self.B[name], shares), weight)
            for name, weight in self.residual.items()
            if name in self.A
        }

    def _joined(self, pools: Sequence["LoRAPool"]) -> "LoRAPool":
        """Raises a ValueError unless they share one residual (to float32 rounding of its SVD), the rank and
        the layers they adapt."""
        for pool in pools[1:]:
            if pool.rank != self.rank:
                raise ValueError(f"the LoRAs of one have rank {self.rank}, those of another rank {pool.rank}")
            for name in self.residual.keys() | pool.residual.keys():
                mine, other = self.residual.get(name), pool.residual.get(name)
                if mine is not other and not _equal_up_to_rounding(mine, other):
                    raise ValueError(f"residuals differ at {name}: not adapters of one pretrained network")
            if pool.A.keys() != self.A.keys():
                raise ValueError("the pools differ in the layers they adapt")
        return dataclasses.replace(
            self,
            A={name: torch.cat([pool.A[name] for pool in pools]) for name in self.A},
            B={name: torch.cat([pool.B[name] for pool in pools]) for name in self.B},
            **joined_heads(pools),
        )


def _equal_up_to_rounding(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _joined_ranks(A: Tensor, B: Tensor, shares: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Factors of rank k r whose product is sum_p c_p B_p A_p over the k adapters of `shares`."""
    wide_A = torch.cat([A[p] for p in shares], dim=1)
    wide_B = torch.cat([share * B[p] for p, share in shares.items()], dim=2)
    return wide_A, wide_B


def low_rank(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """B A, entry by entry in the order of memory, in the shape of `weight`: whatever the factors' own shapes,
    of a linear layer or of a convolution."""
    return (B @ A).reshape(weight.shape)


def adapted_layers(weights: Weights, layers: Sequence[str] = VIT_LAYERS) -> list[str]:
    """Names of the weights that get an adapter: those of layers whose name ends as listed."""
    endings = tuple(f"{layer}.weight" for layer in layers)
    return [name for name in weights if name.endswith(endings)]


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


def principal_pool(
    weights: Weights, rank: int, levels: Sequence[Perturbation], layers: Sequence[str] = VIT_LAYERS
) -> LoRAPool:
    """An untrained pool: every adapter starts at the leading singular triplets of the pretrained weights.

    Args:
        weights: all pretrained weights by name.
        rank: r of every adapter.
        levels: one robustness level per adapter.
        layers: endings of the names of the layers to adapt.
    """
    residual, A, B = dict(weights), {}, {}
    for name in adapted_layers(weights, layers):
        groups = 3 if name.endswith("qkv.weight") else 1
        residual[name], one_A, one_B = split_principal(weights[name], rank, groups)
        A[name] = one_A.repeat(len(levels), 1, 1, 1)
        B[name] = one_B.repeat(len(levels), 1, 1, 1)
    scale, bias = untrained_head(next(iter(weights.values())), len(levels))
    return LoRAPool(residual, A, B, scale, bias, tuple(levels))


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
