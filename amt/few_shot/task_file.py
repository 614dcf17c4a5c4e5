"""Tasks on disk: one safetensors file that answers without the pool and without the support set.

Its tensors are `weights/NAME`, `prototypes`, `scale` and `bias`; the header's field `amt` is one JSON text
with classes, image size, coefficients and provenance, repeated in the .json beside it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from typing_extensions import TypedDict

from amt.evaluation.noted import Count, Level, NotedTrim, Share
from amt.few_shot.pools import network_of
from amt.few_shot.task import Label, Task
from amt.files import checkpoint, weight_files
from amt.files.export.merged import MergedNetwork
from amt.models.heads import Cosine
from amt.models.network import Network
from amt.models.trim import Trim
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.files import parse_json, size_of
from meta_dataset_readers.json_fields import conform

FORMAT = 1
KIND = "task"
LARGEST_SIDE = 4096  # px, as of --image_size


class _About(TypedDict):
    """What the header of a task says, as far as it is used."""

    format: int
    kind: str
    arch: str
    image_size: int
    classes: list[Label]
    shots: list[Count]
    coefficients: list[Share]
    epsilons: list[Level]
    trims: list[NotedTrim]


def save(path: Path, task: Task) -> None:
    """Write a task as `path`, and a readable .json of it beside it, each replaced atomically.

    Raises:
        InputError: the name has another ending than .safetensors, or the place cannot be written to.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a name that ends in .safetensors")
    merged = task.merged
    assert merged.prototypes is not None
    tensors = {f"weights/{name}": tensor for name, tensor in merged.weights.items()}
    tensors |= {"prototypes": merged.prototypes}
    tensors |= {"scale": torch.tensor([merged.scale]), "bias": torch.tensor([merged.bias])}
    about = {
        "format": FORMAT,
        "kind": KIND,
        "arch": merged.network.arch,
        "image_size": merged.network.image_size,
        "classes": list(task.classes),
        "shots": list(task.shots),
        "coefficients": list(merged.coefficients),
        "epsilons": list(task.epsilons),
        "trims": [dataclasses.asdict(trim) for trim in merged.trims],
        **task.about,
        **checkpoint.provenance(),
    }
    checkpoint.write(path, tensors, about)


def is_task(path: Path) -> bool:
    """Whether a file's header says that it is a task; of what cannot be read that way it does not."""
    size_of(path, what="pool")
    try:
        with safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get(checkpoint.HEADER)
        return text is not None and parse_json(str(path), text).get("kind") == KIND
    except Exception:  # whatever is raised over foreign bytes; reading them in earnest says what is wrong
        return False


def load(path: Path) -> Task:
    """Read a task written by `save`, on the CPU.

    Raises:
        InputError: the file is missing or damaged, or holds something else.
    """
    content = weight_files.read(path, "task")
    where = f"{path}: damaged header field {checkpoint.HEADER!r}"
    text = content.header.get(checkpoint.HEADER)
    found = None if text is None else parse_json(where, text)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise InputError(f"{path}: holds no task; expected a file of FewShotClassifier.save")
    if found.get("format") != FORMAT:
        raise InputError(f"{where}: format {found.get('format')!r}, expected {FORMAT}")
    about = conform(where, found, _About)
    n_classes = len(about["classes"])
    if n_classes < 2 or len(about["shots"]) != n_classes:
        raise InputError(f"{where}: {n_classes} classes, {len(about['shots'])} numbers of shots")
    if len(set(map(str, about["classes"]))) < n_classes:
        raise InputError(f"{where}: two classes have one name")
    if about["epsilons"] and len(about["epsilons"]) != len(about["coefficients"]):
        n_levels = len(about["epsilons"])
        raise InputError(f"{where}: {len(about['coefficients'])} coefficients, {n_levels} epsilons")
    if not 1 <= about["image_size"] <= LARGEST_SIDE:
        raise InputError(f"{where}: image_size {about['image_size']}, expected 1 to {LARGEST_SIDE}")
    network = network_of(path, dict(about), None, about["image_size"])
    shapes: dict[str, tuple[int, ...]] = {
        f"weights/{name}": tuple(tensor.shape) for name, tensor in network.weights.items()
    }
    module: Any = network.module
    shapes |= {"prototypes": (n_classes, module.num_features), "scale": (1,), "bias": (1,)}
    tensors = weight_files.check_fit(path, content.data, shapes)
    return Task(
        _merged(about, network, tensors),
        tuple(about["classes"]),
        tuple(about["shots"]),
        tuple(about["epsilons"]),
        {name: value for name, value in found.items() if name not in _About.__annotations__},
    )


def _merged(about: _About, network: Network, tensors: dict[str, Tensor]) -> MergedNetwork:
    return MergedNetwork(
        network,
        {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")},
        tuple(about["coefficients"]),
        tuple(Trim(**trim) for trim in about["trims"]),
        float(tensors["scale"]),
        float(tensors["bias"]),
        tuple(map(str, about["classes"])),
        Cosine(tensors["prototypes"], float(tensors["scale"]), float(tensors["bias"])),
    )
