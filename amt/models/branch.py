"""AutoLoRa's branch: low-rank factors beside the weights of one network, its `Student`, as plain data.

    adversarial thread    W                 the deployed network; the branch is not seen
    natural thread        W + B A / r       W and its BatchNorm parameters without gradient

    A    (r k, C_in k)        a convolution C_out x C_in/g x k x k with g groups; a linear layer is k = 1
    B    (C_out/g k, r k)     A ~ N(0, 1), B = 0: at first the two threads are one

The gradient reaches W from the adversarial thread alone, A and B from the natural one, the classifier from
both. Knows no training and no file. Xu et al. 2024 (AutoLoRa), section 4.1, arxiv.org/abs/2310.01818.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from amt.models.network import Network
from amt.models.pool import low_rank
from amt.models.weights import Weights


@dataclasses.dataclass(frozen=True)
class Student:
    """All tensors of a fine-tuning; the trained ones are leaves.

    Args:
        weights: the complete state dict that is deployed; training writes to its running statistics.
        factors: `<weight>.lora_A` and `<weight>.lora_B`; empty without a branch.
        norms: a second set of BatchNorm parameters and statistics, named as in `weights`; empty without.
    """

    weights: Weights
    factors: Weights = dataclasses.field(default_factory=dict)
    norms: Weights = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> Weights:
        """All tensors by name, in a fixed order: `weights/NAME`, `factors/NAME`, `norms/NAME`."""
        return {
            f"{field.name}/{name}": tensor
            for field in dataclasses.fields(self)
            for name, tensor in sorted(getattr(self, field.name).items())
        }

    def copy(self) -> "Student":
        """The same values in tensors of its own, without gradients."""
        return Student.of_tensors({name: tensor.detach().clone() for name, tensor in self.tensors.items()})

    @classmethod
    def of_tensors(cls, tensors: Weights) -> "Student":
        """The inverse of `tensors`."""
        parts: dict[str, Weights] = {field.name: {} for field in dataclasses.fields(cls)}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        return cls(**parts)


def factor_shapes(network: Network, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B for the weight called `name`."""
    layer: Any = network.module.get_submodule(name.removesuffix(".weight"))
    out, inside, *kernel = layer.weight.shape
    groups, (rows, columns) = getattr(layer, "groups", 1), kernel or (1, 1)
    return (rank * rows, inside * groups * columns), (out // groups * rows, rank * rows)


def new_factors(
    network: Network, names: tuple[str, ...], rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The untrained branch for the weights called `names`, float32 on the CPU: A (r k, C_in k) standard
    normal, B (C_out/g k, r k) zero."""
    factors = {}
    for name in names:
        shape_A, shape_B = factor_shapes(network, name, rank)
        factors[f"{name}.lora_A"] = torch.randn(shape_A, generator=generator)
        factors[f"{name}.lora_B"] = torch.zeros(shape_B)
    return factors


def natural_weights(network: Network, student: Student, rank: int) -> Weights:
    """The weights of the natural thread: gradients reach the factors and the classifier only. It uses the
    second BatchNorm set if there is one, otherwise the network's, whose running statistics it updates."""
    fixed = {
        name: weight if network.is_head(name) else weight.detach() for name, weight in student.weights.items()
    }
    fixed |= {name: norm.detach() for name, norm in student.norms.items()}
    factors = student.factors
    adapted = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
    return fixed | {
        name: fixed[name] + low_rank(factors[f"{name}.lora_A"], factors[f"{name}.lora_B"], fixed[name]) / rank
        for name in adapted
    }
