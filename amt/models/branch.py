"""What AutoLoRa trains: one plain network, a low-rank branch beside it, and perhaps a second BatchNorm set.

    adversarial thread    W                      the deployed network; the branch is not seen
    natural thread        W + B A / r            W and its BatchNorm parameters without gradient

    A    (r k, C_in k)           a convolution C_out x C_in/g x k x k with g groups; a linear layer is k = 1
    B    (C_out/g k, r k)        A ~ N(0, 1), B = 0: at first the two threads are one
    B A  entry by entry in the order of memory in the shape of W

(Xu et al. 2024, section 4.1.) The gradient reaches W from the adversarial thread alone, A and B from the
natural one, the classifier from both. Knows no loss and no attack.
"""

import dataclasses

import torch
from torch import Tensor

from amt.models.classifiers import Network
from amt.models.lora import low_rank
from amt.models.weights import Weights


@dataclasses.dataclass(frozen=True)
class Student:
    """All tensors of a fine-tuning; those that are trained are leaves.

    Args:
        weights: the complete state dict that is deployed; its running statistics are written to.
        factors: `<weight>.lora_A` and `<weight>.lora_B`; empty without a branch.
        norms: a second set of BatchNorm parameters and statistics, named as in `weights`; empty without.
    """

    weights: Weights
    factors: Weights = dataclasses.field(default_factory=dict)
    norms: Weights = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> Weights:
        """Everything under one name each, in a fixed order: `weights/NAME`, `factors/NAME`, `norms/NAME`."""
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
        rooms: dict[str, Weights] = {field.name: {} for field in dataclasses.fields(cls)}
        for name, tensor in tensors.items():
            room, _, rest = name.partition("/")
            rooms[room][rest] = tensor
        return cls(**rooms)


def factor_shapes(network: Network, name: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B for the weight called `name`."""
    layer = network.module.get_submodule(name.removesuffix(".weight"))
    out, inside, *kernel = layer.weight.shape
    groups, (rows, columns) = getattr(layer, "groups", 1), kernel or (1, 1)
    return (rank * rows, inside * groups * columns), (out // groups * rows, rank * rows)


def new_factors(
    network: Network, names: tuple[str, ...], rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The branch as it starts, for the weights called `names`: float32 on the CPU."""
    factors = {}
    for name in names:
        shape_A, shape_B = factor_shapes(network, name, rank)
        factors[f"{name}.lora_A"] = torch.randn(shape_A, generator=generator)
        factors[f"{name}.lora_B"] = torch.zeros(shape_B)
    return factors


def natural_weights(network: Network, student: Student, rank: int) -> Weights:
    """The weights of the natural thread: gradients reach the factors and the classifier only.

    With a second BatchNorm set the thread has that one, without gradient; otherwise it shares the network's,
    whose running statistics it updates in turn.
    """
    own = f"{network.classifier}."
    fixed = {
        name: weight if name.startswith(own) else weight.detach() for name, weight in student.weights.items()
    }
    fixed |= {name: norm.detach() for name, norm in student.norms.items()}
    factors = student.factors
    adapted = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
    return fixed | {
        name: fixed[name] + low_rank(factors[f"{name}.lora_A"], factors[f"{name}.lora_B"], fixed[name]) / rank
        for name in adapted
    }
