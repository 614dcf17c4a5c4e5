"""Tasks on disk: one safetensors file that answers without the pool and without the support set.

    weights/NAME, scale, bias                  the merged network, scale and bias of its cosines (1,)
    prototypes; origin                         of a head by cosine: (N, D), and (D,) where it is centred
    head/weight, head/bias                     of any other: (N, D) and (N,)
    texts/prototypes, texts/scale, texts/bias  of the texts of the classes, where their logits are added
    factor; second/...                         of a mixture: what the logits are multiplied by, (1,), and the
                                               same for the second network

The header's field `amt` is one JSON text with classes, image size, coefficients, head and provenance, which
the .json beside it repeats.
"""

import dataclasses
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import safe_open
from typing_extensions import TypedDict

from amt.evaluation.noted import Count, Level, NotedTrim, Share, Temperature
from amt.few_shot.pools import head_of, network_of
from amt.few_shot.task import Label, Task
from amt.files import checkpoint, weight_files
from amt.files.export.merged import MergedNetwork
from amt.models.head_settings import COSINE, TEXT, Head
from amt.models.heads import Cosine, Fitted, Linear, WithTexts
from amt.models.network import Network
from amt.models.trim import Trim
from amt.models.weights import Weights
from amt.tasks.classifier import Voice
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
    head: NotRequired[str]  # older files have prototypes and do not say so
    temperature: NotRequired[Temperature]  # 1 in older files


def save(path: Path, task: Task) -> None:
    """Write a task as `path`, and a readable .json of it beside it, each replaced atomically.

    Raises:
        InputError: the name has another ending than .safetensors, or the place cannot be written to.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a name that ends in .safetensors")
    checkpoint.write(path, *packed(task))


def packed(task: Task) -> tuple[Weights, dict[str, Any]]:
    """The tensors and the text of a task's file."""
    merged, (own, *others) = task.merged, task.voices
    tensors = {"scale": torch.tensor([merged.scale]), "bias": torch.tensor([merged.bias])} | _tensors(own)
    for other in others:  # whose tensors may be those of the first, which the format does not take twice
        tensors |= {f"second/{name}": tensor.clone() for name, tensor in _tensors(other).items()}
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
        "head": task.head.name,
        "temperature": task.temperature,
        **task.about,
        **checkpoint.provenance(),
    }
    return tensors, about


def _tensors(voice: Voice) -> Weights:
    """A network with its head, by the names of the module's docstring."""
    found = {f"weights/{name}": tensor for name, tensor in voice.weights.items()} | _of_head(voice.head)
    return found if voice.factor is None else found | {"factor": voice.factor.reshape(1)}


def _of_head(head: Fitted) -> Weights:
    if isinstance(head, WithTexts):
        return _of_head(head.own) | {f"texts/{name}": tensor for name, tensor in _of_head(head.texts).items()}
    if isinstance(head, Linear):
        return {"head/weight": head.weight, "head/bias": head.bias}
    found = {name: torch.tensor([float(getattr(head, name))]) for name in ("scale", "bias")}
    return {"prototypes": head.centres, **found, **({} if head.origin is None else {"origin": head.origin})}


def _shapes(network: Network, head: Head, n_classes: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of `_tensors`, without the second network's."""
    module: Any = network.module
    dim = module.num_features
    found = {f"weights/{name}": tuple(tensor.shape) for name, tensor in network.weights.items()}
    cosine = {"prototypes": (n_classes, dim), "scale": (1,), "bias": (1,)}
    if head.zero_shot:
        return found | cosine
    if head.kind in COSINE:
        found |= cosine | ({"origin": (dim,)} if head.kind != Head.kind else {})
    else:
        found |= {"head/weight": (n_classes, dim), "head/bias": (n_classes,)}
    if head.other == TEXT:
        return found | {f"texts/{name}": shape for name, shape in cosine.items()}
    return found if head.other is None else found | {"factor": (1,)}


def _voice(tensors: Weights, prefix: str) -> Voice:
    """The inverse of `_tensors`, of the tensors whose names begin with `prefix`."""
    held = _under(prefix, tensors)
    weights = _under("weights/", held)
    head = Linear(held["head/weight"], held["head/bias"]) if "head/weight" in held else _cosine(held)
    if "texts/prototypes" in held:
        head = WithTexts(head, _cosine(_under("texts/", held)))
    return Voice(weights, head, held["factor"][0] if "factor" in held else None)


def _under(prefix: str, tensors: Weights) -> Weights:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _cosine(held: Weights) -> Cosine:
    return Cosine(held["prototypes"], float(held["scale"]), float(held["bias"]), held.get("origin"))


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
    head = head_of(where, about)
    network = network_of(path, dict(about), None, about["image_size"])
    shapes = _shapes(network, head, n_classes)
    mixes = head.other not in (None, TEXT)
    if mixes:
        shapes |= {f"second/{name}": shape for name, shape in shapes.items()}
    tensors = weight_files.check_fit(path, content.data, shapes | {"scale": (1,), "bias": (1,)})
    voices = tuple(_voice(tensors, prefix) for prefix in ("", "second/")[: 1 + mixes])
    return Task(
        _merged(about, network, tensors, voices[0]),
        voices,
        tuple(about["classes"]),
        tuple(about["shots"]),
        tuple(about["epsilons"]),
        {name: value for name, value in found.items() if name not in _About.__annotations__},
        head,
        about.get("temperature", 1.0),
    )


def _merged(about: _About, network: Network, tensors: Weights, own: Voice) -> MergedNetwork:
    return MergedNetwork(
        network,
        own.weights,
        tuple(about["coefficients"]),
        tuple(Trim(**trim) for trim in about["trims"]),
        float(tensors["scale"]),
        float(tensors["bias"]),
        tuple(map(str, about["classes"])),
        own.head,
    )
