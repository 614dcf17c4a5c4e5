"""The merged network of one task, which every format but the published one holds, and its description."""

import dataclasses
import json
from collections.abc import Sequence

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from amt.files.checkpoint import provenance
from amt.models.heads import prototypes
from amt.models.network import Network, features, resize_positions
from amt.models.pool import LoRAPool, Pool
from amt.models.trim import Trim
from amt.models.weights import Coefficients, Weights, trim_singular_values
from meta_dataset_readers.errors import InputError

METADATA = "amt_export"  # the field that describes an exported file, as JSON
SELF_CONTAINED = ("onnx", "torch")  # formats that normalise pixels themselves, and classify


def check_kind(pool: Pool, to: str, where: str = "the pool") -> None:
    """Raise an `InputError`, which begins with `where`, if this kind of pool has no place in the format."""
    if to in ("peft", "published") and not isinstance(pool, LoRAPool):
        raise InputError(
            f"{where} holds complete networks, and --to {to} takes LoRAs only; expected timm, onnx or torch"
        )


@dataclasses.dataclass(frozen=True)
class Support:
    """The labelled images of one task.

    Args:
        images: (S, 3, H, W) float32 in [0, 1].
        labels: (S,) int64 in 0..N-1.
        classes: the N names.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MergedNetwork:
    """The network of one task; `merged_network` makes it.

    Args:
        network: on the CPU; its image size is the one the export is made for.
        weights: complete weights by timm's names, the position table as pretrained.
        coefficients: one per adapter of the pool, summing to 1.
        trims: what was trimmed after merging.
        scale, bias: of the logits scale * (cosine + bias).
        classes, prototypes: the task's N names, and (N, D) mean features of its support images; or () and
            None for a network without a task.
    """

    network: Network
    weights: Weights
    coefficients: Coefficients
    trims: tuple[Trim, ...]
    scale: float
    bias: float
    classes: tuple[str, ...] = ()
    prototypes: Tensor | None = None


def merged_network(
    network: Network,
    pool: Pool,
    coefficients: Sequence[float],
    trims: Sequence[Trim] = (),
    support: Support | None = None,
) -> MergedNetwork:
    """The pool merged and trimmed as evaluation does it, with the prototypes of `support` if there is one.

    Args:
        network: the network of the pool; only its structure is used, not its weights.

    Raises:
        ValueError: another number of coefficients than adapters, or a sum other than 1.
    """
    network = dataclasses.replace(network, autocast=None)
    weights = trim_singular_values(pool.merge(coefficients), trims)
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    scale, bias = (float(number) for number in pool.head(coefficients))
    classes, centres = (), None
    if support is not None:
        classes = support.classes
        with torch.no_grad():
            centres = prototypes(features(network, weights, support.images), support.labels)
    shares = tuple(float(c) for c in coefficients)
    return MergedNetwork(network, weights, shares, tuple(trims), scale, bias, classes, centres)


def at_image_size(network: Network, weights: Weights) -> Weights:
    """The weights with the position table that `features` would use, so that nothing is left to resize."""
    if network.module.dynamic_img_size:
        return weights
    grid = network.image_size // network.patch_size
    return weights | {"pos_embed": resize_positions(weights["pos_embed"], (grid, grid))}


def whole_patches(network: Network) -> int:
    """The image side that the network sees of the side that pictures have."""
    return network.image_size - network.image_size % network.patch_size


def describe(merged: MergedNetwork, to: str) -> dict:
    """What somebody needs to use the export, as plain JSON values; `amt_export` in its metadata."""
    network = merged.network
    return {
        "format": to,
        "arch": network.arch,
        "input": "RGB in [0, 1]" if to in SELF_CONTAINED else "normalised: (RGB in [0, 1] - mean) / std",
        "image_size": network.image_size,
        "mean": list(network.mean),
        "std": list(network.std),
        "features": network.module.num_features,
        "coefficients": list(merged.coefficients),
        "trims": [dataclasses.asdict(trim) for trim in merged.trims],
        "scale": merged.scale,
        "bias": merged.bias,
        "classes": list(merged.classes),
        **provenance(),
    }


def as_metadata(about: dict) -> dict[str, str]:
    return {METADATA: json.dumps(about)}


def prototypes_file(merged: MergedNetwork, about: dict) -> bytes:
    """The task's classifier: `prototypes` (N, D), `scale` (1,) and `bias` (1,), class names in the header."""
    tensors = {
        "prototypes": merged.prototypes.contiguous(),
        "scale": torch.tensor([merged.scale]),
        "bias": torch.tensor([merged.bias]),
    }
    return serialise(tensors, metadata=as_metadata(about))
