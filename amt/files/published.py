"""Checkpoints of the published AMT code, read into our pool.

Two layouts, both with the learnt head `scale_cls` (1,) and `bias` (1,), for a ViT of dim D:

    training   backbone.<weight>          one LoRA per layer, lora_A and lora_B; beside it under other keys
                                          optimiser, epoch, ... and the arguments of the run
    pool       backbone.model.<weight>    K LoRAs per layer, lora_A.k and lora_B.k; nothing else in the file

    attn.qkv             A (3 r, D)       B (3 D, r), the three blocks of rows belonging to q, k and v
    proj, fc1, fc2       A (r, in)        B (out, r)

In both, the weight of an adapted layer is the residual W_res. (Code: xyang583/AMT at ca4b819.)
"""

import argparse
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amt.attacks.levels import POOL_EPSILONS, Perturbation
from amt.files import state_dicts, weight_files
from amt.models.architectures import ARCHS
from amt.models.pool import VIT_LAYERS, Pool, factor_groups
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, damaged

# What git calls the two files that the authors released (the SHA-1 of a header and the file).
RELEASED = {
    "83189d70dc0216988af4d8ce88febf1edc81ecf3": "5-way 1-shot (metadataset_imagenet_advmetatuned_5w1s.pth)",
    "f2a2e34b12da6836bc91bbd89ddff5aac23fae55": "5-way 5-shot (metadataset_imagenet_advmetatuned_5w5s.pth)",
}

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\d+))?")


def find_state(data: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
    """The published state dict in a file's contents, or None if there is none: see `weight_files.read`."""
    found = state_dicts.states(data)
    order = sorted(found, key=lambda key: key not in ("model", ""))  # where the published code keeps it
    states = (state_dicts.without_wrappers(found[key]) for key in order)
    return next((state for state in states if any(map(_FACTOR.fullmatch, state))), None)


def read_pool(path: Path, data: Mapping[str, Any]) -> tuple[Pool, dict]:
    """The pool in a published checkpoint, and what is known about it.

    A training's level is in its arguments. A pool's levels are in no file: four LoRAs get those of the
    paper; of any other number epsilon 0 is recorded, and `about` says that they are unknown.

    Args:
        data: the contents of a file in which `find_state` finds something.

    Returns:
        The pool on the CPU, and `about`: `published` ("pool" or "training"), `levels_from` ("the paper",
        "the arguments" or "nowhere"), `notes` (one line each), and of a training what it says of `arguments`,
        `arch` and `epoch`.

    Raises:
        InputError: a tensor is missing, unexpected or misshapen (all are listed), or not finite; or a
            training's arguments describe no level.
    """
    found = find_state(data)
    kind = "pool" if _is_pool(found) else "training"
    shapes = published_shapes(**_sizes(path, found))
    copies = {name: _original(name) for name in found if _original(name) in shapes and name not in shapes}
    state = weight_files.check_fit(path, {n: t for n, t in found.items() if n not in copies}, shapes)
    saved = {name: found[name] for name in copies}
    saved = weight_files.check_fit(path, saved, {name: shapes[copies[name]] for name in copies})
    for name, tensor in saved.items():
        if not torch.equal(tensor, state[copies[name]]):
            raise InputError(f"{path}: {name} differs from {copies[name]}, the model was saved in mid-merge")

    arguments = _plain(vars(data["args"])) if isinstance(data.get("args"), argparse.Namespace) else {}
    levels, source = _levels(path, kind, len(_adapters(state)) or 1, arguments)
    about: dict[str, Any] = {"published": kind, "levels_from": source, "notes": []}
    if copies:
        about["notes"].append(
            f"{len(copies)} tensors *.ori_weight are left out: copies that a used model keeps"
        )
    if source == "nowhere":
        about["notes"].append("the levels are not in the file; epsilon 0 stands for them")
    if kind == "training":
        about |= {"arguments": arguments}
        if arguments.get("pgd_method") == "standard":
            about["notes"].append(
                "trained with --pgd_method standard: without an adversary, whatever the epsilon"
            )
        if (arch := re.sub("_amt$", "", str(arguments.get("arch")))) in ARCHS:
            about["arch"] = arch
        if isinstance(data.get("epoch"), int):
            about["epoch"] = data["epoch"]
    return pool_from_published(state, levels), about


def pool_from_published(state: Mapping[str, Tensor], levels: tuple[Perturbation, ...]) -> Pool:
    """A pool from a state dict of the published code: one LoRA (`backbone.`) or several (`backbone.model.`).

    Published factors are (g * r, in) and (out, r); ours carry the groups g as an axis. The one head is every
    adapter's. The tensors are complete (`read_pool` checks what comes from a file). Raises ValueError for
    another number of LoRAs than of levels."""
    prefix = "backbone.model." if _is_pool(state) else "backbone."
    residual: Weights = {}
    factors: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = _FACTOR.fullmatch(name.removeprefix(prefix))
        if match:
            key = f"{match['layer']}.weight", match["side"]
            factors.setdefault(key, {})[int(match["adapter"] or 0)] = tensor
        elif name.startswith(prefix):
            residual[name.removeprefix(prefix)] = tensor
    A, B = {}, {}
    for (name, side), found in factors.items():
        if sorted(found) != list(range(len(levels))):
            raise ValueError(f"{name} has LoRAs {sorted(found)}, expected {len(levels)} of them")
        stacked = torch.stack([found[p] for p in range(len(levels))])
        groups = factor_groups(name)
        (A if side == "A" else B)[name] = stacked.reshape(len(levels), groups, -1, stacked.shape[-1])
    scale, bias = (state[name].reshape(1).repeat(len(levels)) for name in ("scale_cls", "bias"))
    return Pool(residual, A, B, scale, bias, levels)


def published_shapes(
    patch: int, dim: int, depth: int, hidden: int, tokens: int, rank: int, adapters: int | None
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint by name, in the published order. `hidden` is the width of the
    ViT's MLPs, `tokens` the length of its position table, `adapters` how many LoRAs of this rank a pool
    holds, None for a training checkpoint."""
    prefix = "backbone." if adapters is None else "backbone.model."
    numbers = [""] if adapters is None else [f".{k}" for k in range(adapters)]
    layers = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (hidden, dim),
        "mlp.fc2": (dim, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "bias": (1,),
        "scale_cls": (1,),
        f"{prefix}cls_token": (1, 1, dim),
        f"{prefix}pos_embed": (1, tokens, dim),
        f"{prefix}patch_embed.proj.weight": (dim, 3, patch, patch),
        f"{prefix}patch_embed.proj.bias": (dim,),
    }
    for block in (f"{prefix}blocks.{i}." for i in range(depth)):
        for norm, some in (("norm1", VIT_LAYERS[:2]), ("norm2", VIT_LAYERS[2:])):
            shapes |= {f"{block}{norm}.weight": (dim,), f"{block}{norm}.bias": (dim,)}
            for layer in some:
                out, width = layers[layer]
                groups = 3 if layer == "attn.qkv" else 1
                shapes |= {f"{block}{layer}.weight": (out, width), f"{block}{layer}.bias": (out,)}
                shapes |= {f"{block}{layer}.lora_A{k}": (groups * rank, width) for k in numbers}
                shapes |= {f"{block}{layer}.lora_B{k}": (out, rank) for k in numbers}
    return shapes | {f"{prefix}norm.weight": (dim,), f"{prefix}norm.bias": (dim,)}


def git_blob_id(path: Path) -> str:
    """The name that git gives to the contents of `path`."""
    begun = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


def _is_pool(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("backbone.model.") for name in state)


def _original(name: str) -> str:
    """What a tensor is a copy of: by a slip of the published code, a pool that has been run saves its adapted
    weights a second time."""
    return name.replace(".ori_weight", ".weight")


def _adapters(state: Mapping[str, Tensor]) -> set[int]:
    """The numbers of the LoRAs in a state dict; empty for the single one of a training."""
    return {int(k[1]) for name in state if (k := re.search(r"\.lora_[AB]\.(\d{1,4})$", name))}


def _sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The arguments of `published_shapes`, from a few of the tensors."""
    pool = _is_pool(state)
    prefix = "backbone.model." if pool else "backbone."

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if prefix + name not in state:
            raise InputError(f"{path}: lacks tensor {prefix}{name}")
        found = tuple(state[prefix + name].shape)
        if len(found) != axes:
            raise InputError(f"{path}: tensor {prefix}{name} has shape {found}, expected {axes} axes")
        return found

    blocks = [int(i[1]) for name in state if (i := re.match(r".*?blocks\.(\d{1,4})\.", name))]
    depth, adapters = 1 + max(blocks, default=0), 1 + max(_adapters(state), default=0)
    if depth * adapters > len(state):
        raise InputError(
            f"{path}: has tensors of block {depth - 1} and LoRA {adapters - 1}, but {len(state)} in all"
        )
    dim, _, patch, _ = shape("patch_embed.proj.weight", 4)
    return {
        "patch": patch,
        "dim": dim,
        "depth": depth,
        "hidden": shape("blocks.0.mlp.fc1.weight", 2)[0],
        "tokens": shape("pos_embed", 3)[1],
        "rank": shape(f"blocks.0.attn.proj.lora_A{'.0' if pool else ''}", 2)[0],
        "adapters": adapters if pool else None,
    }


def _levels(
    path: Path, kind: str, adapters: int, arguments: dict[str, Any]
) -> tuple[tuple[Perturbation, ...], str]:
    """The levels of a published checkpoint's LoRAs, and where they come from (see `read_pool`)."""
    if kind == "pool" and adapters == len(POOL_EPSILONS):
        return tuple(Perturbation(epsilon, epsilon / 4) for epsilon in POOL_EPSILONS), "the paper"
    if kind == "pool" or arguments.get("epsilon") is None:
        return (Perturbation(0.0, 0.0),) * adapters, "nowhere"
    names = {"attack_iters": "steps", "awp_gamma": "gamma", "beta": "beta", "delta_init": "start"}
    given = {ours: arguments[name] for name, ours in names.items() if arguments.get(name) is not None}
    if given.get("start") == "random":  # the published default, which the published code does not know
        given["start"] = "random2"
    fault = f"{path}: the arguments of its training describe no level"
    with damaged(fault, (TypeError, ValueError, OverflowError), said=str):
        epsilon = float(arguments["epsilon"])
        step = epsilon / 4 if arguments.get("alpha") is None else float(arguments["alpha"])
        return (Perturbation(epsilon, step, **given),), "the arguments"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that JSON can hold: finite numbers, texts, and lists of them."""

    def simple(value: object) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        return value is None or isinstance(value, str | int | bool)

    return {
        str(name): list(value) if isinstance(value, list | tuple) else value
        for name, value in values.items()
        if simple(value) or (isinstance(value, list | tuple) and all(map(simple, value)))
    }
