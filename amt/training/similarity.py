"""The cosine between the gradients of the natural and the adversarial objective, layer by layer.

AutoLoRa (Xu et al. 2024) measures the conflict of the two objectives on a shared feature extractor by the
cosine between their gradients, as Yu et al. 2020 (gradient surgery, arxiv.org/abs/2001.06782) do for tasks:
at -1 they pull against each other, at 0 they have nothing to do with each other, at 1 they agree.
Two dictionaries of gradients in, numbers out; knows no network and no loss.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Parameters of one layer: the last part of their names.
_PARAMETERS = ("weight", "bias")


def gradient_similarity(natural: Mapping[str, Tensor], adversarial: Mapping[str, Tensor]) -> dict[str, float]:
    """The cosine between the gradients of two objectives, tensors of any shape by the names of parameters.

    All parameters of a layer, such as its weight and bias, make up one vector. A layer on which a gradient is
    exactly zero has no direction, and NaN for its cosine. Raises ValueError if the names or the shapes
    differ."""
    if natural.keys() != adversarial.keys():
        raise ValueError(f"gradients of other parameters: {sorted(natural.keys() ^ adversarial.keys())[:3]}")
    layers: dict[str, list[str]] = {}
    for name, gradient in natural.items():
        if gradient.shape != adversarial[name].shape:
            shapes = f"{tuple(gradient.shape)} and {tuple(adversarial[name].shape)}"
            raise ValueError(f"gradients of {name} have the shapes {shapes}")
        layer, _, last = name.rpartition(".")
        layers.setdefault(layer if last in _PARAMETERS else name, []).append(name)
    return {
        layer: _cosine(*(_flat(each, names) for each in (natural, adversarial)))
        for layer, names in layers.items()
    }


def _flat(gradients: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradients[name].detach().flatten().double() for name in names])


def _cosine(one: Tensor, other: Tensor) -> float:
    """The cosine of unit vectors, as products of small gradients would vanish."""
    lengths = one.norm(), other.norm()
    return float((one / lengths[0]) @ (other / lengths[1]))
