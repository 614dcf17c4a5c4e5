"""The merged network of one task, which every format but the published one holds, and its description."""

import dataclasses
import json
from collections.abc import Sequence

import torch

from amt.files.checkpoint import provenance
from amt.files.digests import serialise
from amt.models.head_settings import TEXT, Head
from amt.models.heads import Cosine, Fitted, Linear, WithTexts
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.vit import resize_positions
from amt.models.weights import Coefficients, Weights, trim_singular_values
from meta_dataset_readers.errors import InputError

HEAD_FILES = ("prototypes.safetensors", "head.safetensors")
METADATA = "amt_export"  # the field that describes an exported file, as JSON
SELF_CONTAINED = ("onnx", "torch")  # formats that normalise pixels themselves, and classify


def check_kind(pool: Pool, to: str, where: str = "the pool") -> None:
    """Raise an `InputError`, which begins with `where`, if this kind of pool has no place in the format."""
    if to in ("peft", "published") and pool.rank is None:
        raise InputError(
            f"{where} holds complete networks, and --to {to} takes LoRAs only; expected timm, onnx or torch"
        )


def check_single(head: Head) -> None:
    """Raise an `InputError` for a head that mixes two networks: an export has one."""
    if head.other not in (None, TEXT):
        raise InputError(
            "--head mix: two networks do not go into one export; export each with its own head, or save the "
            "task: amt predict --save"
        )


@dataclasses.dataclass(frozen=True)
class MergedNetwork:
    """The network of one task; `merged_network` makes it, and `amt.few_shot.task.fit` adds the task.

    Args:
        network: on the CPU; its image size is the one the export is made for.
        weights: complete weights by timm's names, the position table as pretrained.
        coefficients: one per adapter of the pool, summing to 1.
        trims: what was trimmed after merging.
        scale, bias: of the logits scale * (cosine + bias).
        classes, head: the task's N names, and what classifies the features of its images; or () and None for
            a network without a task.
    """

    network: Network
    weights: Weights
    coefficients: Coefficients
    trims: tuple[Trim, ...]
    scale: float
    bias: float
    classes: tuple[str, ...] = ()
    head: Fitted | None = None

    @property
    def own(self) -> Cosine | Linear | None:
        """The head, without the texts that it may mix in."""
        return self.head.own if isinstance(self.head, WithTexts) else self.head

    @property
    def linear(self) -> Linear | None:
        """The head if it is linear in the features."""
        return self.head if isinstance(self.head, Linear) else None


def merged_network(
    network: Network, pool: Pool, coefficients: Sequence[float], trims: Sequence[Trim] = ()
) -> MergedNetwork:
    """The pool merged and trimmed as evaluation does it, without a task. Of the network only the structure is
    used, not the weights. Raises ValueError as `Pool.merge`."""
    network = dataclasses.replace(network, autocast=None)
    weights = trim_singular_values(pool.merge(coefficients), trims)
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    scale, bias = (float(number) for number in pool.head(coefficients))
    shares = tuple(float(c) for c in coefficients)
    return MergedNetwork(network, weights, shares, tuple(trims), scale, bias)


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
    network, own = merged.network, merged.own
    cosine = own if isinstance(own, Cosine) else merged  # where the scale and bias of cosines are from
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
        "scale": float(cosine.scale),
        "bias": float(cosine.bias),
        "classes": list(merged.classes),
        **({"head": type(own).__name__.lower()} if own is not None else {}),
        **({"texts_scale": float(merged.head.texts.scale)} if isinstance(merged.head, WithTexts) else {}),
        **provenance(),
    }


def as_metadata(about: dict) -> dict[str, str]:
    return {METADATA: json.dumps(about)}


def head_files(merged: MergedNetwork, about: dict) -> dict[str, bytes]:
    """The file of the task's classifier, by its name; none without a task. Class names are in its header.

    By cosine it is prototypes.safetensors with `prototypes` (N, D), `scale` (1,), `bias` (1,), if centred
    `origin` (D,); linear head.safetensors with `weight` (N, D) and `bias` (N,); with texts mixed in also
    `texts` (N, D) and `texts_scale` (1,).
    """
    own = merged.own
    if own is None:
        return {}
    if isinstance(own, Linear):
        name, tensors = "head.safetensors", dict(vars(own))
    else:
        name, tensors = "prototypes.safetensors", {"prototypes": own.centres}
        tensors |= {key: torch.tensor([about[key]]) for key in ("scale", "bias")}
        tensors |= {"origin": own.origin} if own.origin is not None else {}
    if isinstance(merged.head, WithTexts):
        tensors |= {"texts": merged.head.texts.centres, "texts_scale": torch.tensor([about["texts_scale"]])}
    held = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return {name: serialise(held, as_metadata(about))}
