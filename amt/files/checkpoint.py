"""Checkpoints on disk: our own format; those of the published code are read through amt/files/published.py.

Ours is a single safetensors file, replaced atomically, whose header carries one JSON text: how the pool was
tuned, arch, levels, settings, command, versions, seed, scores; and a digest of this text and of each tensor.
The same JSON is written beside it for people to read. Knows no model definitions.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from amt.attacks.levels import Perturbation
from amt.files import published, weight_files
from amt.files.digests import serialise
from amt.files.version import commit
from amt.models.architectures import base_arch, stated
from amt.models.heads import PoolStatistics
from amt.models.pool import Pool, norm_weights
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, blaming, damaged, printable
from meta_dataset_readers.files import folder_to_disk, parse_json, read_json, replace_file
from meta_dataset_readers.json_fields import MOST, conform
from meta_dataset_readers.settings import with_tuples

FORMAT = 1
HEADER = "amt"  # the field of a safetensors header that makes a file ours

Levels = tuple[Perturbation, ...]
Count = Annotated[int, Field(ge=0, le=MOST)]
_Number = Annotated[float, Field(ge=-MOST, le=MOST)]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A pool with what is known about it.

    Args:
        pool: on the CPU.
        about: arch, settings, command, versions, seed, scores, ...: plain JSON values.
        momentum: the optimisers' buffers of an unfinished training, else empty.
        statistics: of the members' features, for heads that need them; None: not measured.
    """

    pool: Pool
    about: dict
    momentum: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    statistics: PoolStatistics | None = None


def provenance() -> dict:
    """Command, commit and versions, for whoever wants to reproduce a file."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": version("timm"),
            "numpy": numpy.__version__,
        },
    }


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as `write` does."""
    write(path, *packed(checkpoint))


def packed(checkpoint: Checkpoint) -> tuple[Weights, dict]:
    """The tensors and the text of a checkpoint's file."""
    pool = checkpoint.pool
    tensors = {f"factors/{name}": tensor for name, tensor in pool.factors.items()}
    tensors |= {f"residual/{name}": tensor for name, tensor in pool.residual.items()}
    tensors |= {"head/scale": pool.scale, "head/bias": pool.bias}
    tensors |= {f"momentum/{name}": tensor for name, tensor in checkpoint.momentum.items()}
    if checkpoint.statistics is not None:
        tensors |= {f"statistics/{name}": each for name, each in checkpoint.statistics.tensors.items()}
    about = {
        "format": FORMAT,
        "tune": pool.tune,
        "levels": [dataclasses.asdict(level) for level in pool.levels],
        **checkpoint.about,
    }
    return tensors, about


def write(path: Path, tensors: Weights, about: dict) -> None:
    """Write tensors as `path` (ending in .safetensors) with `about` and digests in its header, and a readable
    .json of `about` beside it, each replaced atomically. Raises InputError if the place cannot be written to;
    what was there stays as it was."""
    replace_described(path, content(tensors, about), json.dumps(about, indent=1) + "\n")


def content(tensors: Weights, about: dict) -> bytes:
    """The bytes of such a file."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return serialise(held, {HEADER: json.dumps(about, indent=1)})


def replace_described(path: Path, content: bytes, text: str) -> None:
    """Replace `path`, and the .json beside it that describes it, each in one step. The earlier description is
    out of the way before `path` changes, so a .json that is there always describes the file beside it. Raises
    InputError as `replace_file`; what was there stays as it was."""
    readable = path.with_suffix(".json")
    aside = readable.with_name(f".{readable.name}.part")

    def parts() -> Iterator[bytes]:
        yield content
        if readable.exists():
            os.replace(readable, aside)
            folder_to_disk(path.parent)

    try:
        replace_file(path, parts())
    except InputError:
        with contextlib.suppress(OSError):
            os.replace(aside, readable)
        raise
    replace_file(readable, text)
    aside.unlink(missing_ok=True)


def contradicted(path: Path, content: weight_files.Content) -> bool:
    """Whether a .json beside `path` says something else than the header, or nothing that can be read."""
    readable = path.with_suffix(".json")
    if HEADER not in content.header or not readable.exists():
        return False
    try:
        return read_json(readable) != parse_json(str(path), content.header[HEADER])
    except InputError:
        return True


def load(path: Path) -> Checkpoint:
    """Read a checkpoint written by `save`, or one of the published code (see `published.read_pool`). Raises
    InputError for a file that is missing, is no checkpoint, or whose tensors do not form a pool."""
    return parse(path, weight_files.read(path, "checkpoint"))


def parse(path: Path, content: weight_files.Content) -> Checkpoint:
    """The checkpoint in a file's contents; `path` is for errors, see `load`."""
    if HEADER in content.header:
        return _parse_own(path, content.data, content.header[HEADER])
    if published.find_state(content.data) is None:
        raise InputError(
            f"{path}: holds no LoRAs, so it is not a pool; weights of a backbone are named by "
            "--pretrained_checkpoint"
        )
    return Checkpoint(*published.read_pool(path, content.data))


class _About(TypedDict, total=False):
    """The fields of our headers that are read."""

    kind: str
    arch: str | None
    epoch: int | None
    notes: list[str] | str
    levels: list[dict]
    tune: str
    protocol: dict
    settings: dict
    history: list["_Note"]
    tuner: "_Tuner"
    published: str
    levels_from: str
    finished: bool


class _Tuner(TypedDict, total=False):
    """The state of meta-tuning, and of fine-tuning."""

    episodes_done: Count
    scalers: list[dict[str, _Number]]
    seen: list[Annotated[list[_Number], Field(max_length=4)]]
    epoch: Count
    batch: Count
    accuracy: float | None
    history: list["_Note"]


class _Note(TypedDict, total=False):
    """What is read of an epoch that is over: of meta-tuning, and of fine-tuning."""

    score: _Number
    robust: _Number
    clean: _Number


def parse_header(path: Path, text: str) -> dict:
    """The JSON in our field of a file's header. Raises InputError for what is none, or of another shape."""
    where = f"{path}: damaged header field {HEADER!r}"
    return conform(where, parse_json(where, text), _About)


def _parse_own(path: Path, tensors: dict[str, Tensor], text: str) -> Checkpoint:
    about = parse_header(path, text)
    fault = f"{path}: damaged header field {HEADER!r}"
    with damaged(fault, (ValueError, KeyError, TypeError, AttributeError), said=repr):
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}, expected {FORMAT}")
        if "kind" in about:
            maker = "FewShotClassifier.save" if about["kind"] == "task" else "`main.py autolora`"
            raise InputError(f"{path}: holds a {about['kind']} of {maker}, expected a pool")
        levels = tuple(Perturbation(**with_tuples(level)) for level in about.pop("levels"))
        about.pop("format")
        tune = about.pop("tune", "lora")  # older files hold LoRAs and do not say so
        if not levels or tune not in ("lora", "lora+norm", "full"):
            raise ValueError(f"{len(levels)} levels, tuned {tune!r}")
    groups = _grouped(path, tensors)
    for name in ("scale", "bias"):
        if name not in groups["head"] or tuple(groups["head"][name].shape) != (len(levels),):
            raise InputError(f"{path}: tensor head/{name} is missing or not of shape ({len(levels)},)")
    pool = _pool(path, tune, groups, levels)
    return Checkpoint(pool, about, groups["momentum"], _statistics(path, groups["statistics"], len(pool)))


def _statistics(path: Path, tensors: Weights, members: int) -> PoolStatistics | None:
    with blaming(f"{path}: damaged statistics"):
        return PoolStatistics.of_tensors(tensors, members) if tensors else None


def _grouped(path: Path, tensors: Weights) -> dict[str, Weights]:
    """Tensors by the word before the first "/" of their names, all of them finite floating-point numbers."""
    groups: dict[str, Weights] = {
        name: {} for name in ("residual", "factors", "head", "momentum", "statistics")
    }
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        if group not in groups:
            raise InputError(f"{path}: unexpected tensor {printable(name)}")
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, expected a floating-point type")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds values that are not finite")
        groups[group][rest] = tensor
    return groups


def _pool(path: Path, tune: str, groups: dict[str, Weights], levels: Levels) -> Pool:
    residual, factors, head = (groups[name] for name in ("residual", "factors", "head"))
    adapted = [name for name in residual if f"{name}.lora_A" in factors]
    own = {"lora": (), "lora+norm": norm_weights(residual), "full": factors}[tune]
    whole = {name: factors[name] for name in own if name in factors}
    if tune == "full" and (residual or not factors):
        raise InputError(f"{path}: holds no complete weights, which are expected as factors/NAME alone")
    if len(factors) != 2 * len(adapted) + len(whole) or not (adapted or tune == "full"):
        raise InputError(f"{path}: the factors do not belong to the weights beside them")
    A = {name: factors[f"{name}.lora_A"] for name in adapted}
    B = {name: factors.get(f"{name}.lora_B") for name in adapted}
    for name in adapted:
        check_factors(path, name, residual[name], A[name], B[name], len(levels))
    for name, weight in whole.items():
        expected = (len(levels), *(residual[name].shape if residual else weight.shape[1:]))
        if tuple(weight.shape) != expected:
            raise InputError(
                f"{path}: tensor factors/{name} has shape {tuple(weight.shape)}, expected {expected}, "
                f"one weight for each of {len(levels)} levels"
            )
    return Pool(residual, A, B, head["scale"], head["bias"], levels, whole)


def check_factors(path: Path, name: str, weight: Tensor, A: Tensor, B: Tensor | None, adapters: int) -> None:
    """Raise an `InputError` unless A (P, g, r, in) and B (P, g, out/g, r) adapt `weight`."""
    if weight.ndim >= 2 and A.ndim == 4 and B is not None and B.ndim == 4:
        groups, rank = A.shape[1:3]
        inputs = weight[0].numel()
        expected = (adapters, groups, rank, inputs), (adapters, groups, len(weight) // max(groups, 1), rank)
        if (tuple(A.shape), tuple(B.shape)) == expected and groups * B.shape[2] == len(weight):
            return
    shapes = tuple(A.shape), None if B is None else tuple(B.shape)
    raise InputError(
        f"{path}: factors of {name} have shapes {shapes[0]} and {shapes[1]}, "
        f"which do not adapt a weight of shape {tuple(weight.shape)} for {adapters} levels"
    )


def check_architecture(path: Path, pool: Pool, weights: Weights, arch: str) -> None:
    """Raise an `InputError` unless the pool merges to the names and shapes of the backbone's weights."""
    shapes = pool.shapes
    for name in sorted(weights.keys() | shapes.keys()):
        found = shapes.get(name, "absent")
        expected = tuple(weights[name].shape) if name in weights else "absent"
        if found != expected:
            raise InputError(f"{path}: tensor {name} is {found}, but --arch {arch} has it {expected}")


def arch_of(
    path: Path, about: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], given: str | None = None
) -> str:
    """The architecture of weights of these shapes, which is given or named by the file they come from. Raises
    InputError if nothing says which it is."""
    arch = given or about.get("arch")
    if not isinstance(arch, str):
        raise InputError(f"{path}: does not say its architecture; name it by --arch")
    return stated(base_arch(arch), shapes)


def require_levels(path: Path, found: Checkpoint) -> None:
    """Raise an `InputError` if nobody knows what the LoRAs of a published pool were trained for."""
    if found.about.get("levels_from") == "nowhere":
        values = " ".join(f"E{p}" for p in range(len(found.pool)))
        raise InputError(
            f"{path}: does not say the levels of its LoRAs; give them, one for each: "
            f"python -m amt pool {shlex.quote(str(path))} --epsilon {values} --out POOL.safetensors"
        )
