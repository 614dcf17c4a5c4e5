"""Where files of others keep a network's tensors, and what they put before the names.

    containers   {"model": {"teacher": {...}}, "epoch": 3}   dictionaries in dictionaries, of `CONTAINERS`
    roles        momentum_encoder.blocks.0.norm1.weight      several networks in one dictionary, of `ROLES`
    prefixes     module.backbone.conv1.weight                `PREFIXES`, in any nesting, are taken off
    wrappers     blocks.0._orig_mod.norm1.weight             `WRAPPERS`, at any place, are taken out
    chunks       blocks.2.7.norm1.weight                     DINOv2 trains its blocks in chunks
    copies       attacker.model.conv1.weight                 left out where the tensor is there a second time
    towers       visual.transformer.resblocks.0.ln_1.weight  CLIP and its kin, in timm's names; see `towers`

Every network has a key: its containers and roles, such as `state_dict.base_encoder`. All readers of foreign
weights go through here. Knows no network: a reader may pass the names and shapes it expects. Such names are
never shortened, and of several networks one that has them is taken.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from amt.files import towers
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, printable

# In the order they are taken in. Averages of weights and teachers come before what they are made of: they are
# what is published. Of two BatchNorm sets the dual file has both.
CONTAINERS = (
    *("state_dict_dual", "state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema"),
    *("teacher", "student", "state_dict", "model_state_dict", "model_state", "model"),
    *("module", "net", "network", "backbone", "encoder", "weights", "params"),
    *("vision_encoder_state_dict", "vision_encoder", "vision_model", "image_encoder", "visual"),
)

# The networks that one dictionary may hold, in the order they are taken in: of MoCo and BYOL the one that is
# trained by gradients, as its authors do.
ROLES = (
    *("ema_model", "model_ema", "ema", "teacher", "student", "base_encoder", "encoder_q", "online_encoder"),
    *("online_model", "momentum_encoder", "encoder_k", "target_encoder"),
)

# Of data-parallel training, of Lightning, of wrappers that normalise, of networks with a head of their own.
PREFIXES = ("module", "model", "backbone", "encoder", "net", "network")

SECOND = "1"  # a prefix too where torch.nn.Sequential holds a normalisation and then the network
_NORMALISED = re.compile(r"(?<![^.])0\._?mean$")

# Of torch.compile, FSDP and activation checkpoints.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

COPIES = ("attacker.model.",)  # the robustness library saves its network twice

COUNTERS = ("n_averaged", "num_updates", "initted", "step")  # of AveragedModel and other averages

_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")
_CHUNK = re.compile(r"blocks\.\d+\.(\d+\.(?:norm|attn|mlp|ls)\d?\.)")

Shapes = Mapping[str, tuple[int, ...]]


class StateDict(NamedTuple):
    """A network's tensors as a file keeps them.

    Args:
        weights: by names without prefixes.
        container: its key, "" if the file itself has the tensors.
        others: keys of other networks in the file, which were not taken.
        copies: how many tensors were left out because they were there a second time.
        counters: how many tensors were left out that only count.
        beside: how many tensors were left out that are beside several networks, and in none of them.
        texts: how many tensors were left out that are a text tower's.
        width: of the projection to the space that images and texts share, which is the layer `head`; 0: none.
    """

    weights: Weights
    container: str
    others: tuple[str, ...]
    copies: int
    counters: int = 0
    beside: int = 0
    texts: int = 0
    width: int = 0

    def notes(self) -> list[str]:
        """What was chosen and what was left out, a text for each; none where there was nothing to choose."""
        found = []
        if self.others:
            others = ", ".join(repr(printable(key)) for key in self.others)
            found.append(f"took {self.container!r} (--weights_key takes another network, of {others})")
        counts = {"second copies": self.copies, "counters": self.counters}
        counts |= {"tensors beside the networks": self.beside, "tensors of texts": self.texts}
        return found + [f"{number} {what} left out" for what, number in counts.items() if number]


class _Entry(NamedTuple):
    """A tensor of a network: its name without prefixes, the name in the file, itself."""

    name: str
    full: str
    tensor: Tensor


class _Network(NamedTuple):
    entries: list[_Entry]
    beside: int


_NONE: Shapes = MappingProxyType({})


def states(data: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """Every dictionary of tensors in a file's contents by its key, "" for the file itself, in order."""
    return dict(_states(data, "", set()))


def _states(data: Mapping[str, Any], key: str, seen: set[int]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    seen.add(id(data))  # a pickle can hold a dictionary many times, and in itself
    for name in CONTAINERS:
        within = data.get(name)
        if isinstance(within, Mapping) and id(within) not in seen:
            yield from _states(within, _joined(key, name), seen)
    if _is_state(data):
        yield key, data


def unwrap(path: Path, data: Mapping[str, Any], known: Shapes = _NONE, key: str | None = None) -> StateDict:
    """The network in a file's contents, which `weight_files.read` found.

    Args:
        known: shapes by name of the network to be filled; such names are kept as they are, though they may
            begin like a prefix.
        key: of the network to take, where there are several; its last part will do.

    Raises:
        InputError: there are no tensors by name, none under this key, or two of them have one name without
            their prefixes.
    """
    found = {
        name: network for at, state in states(data).items() for name, network in _by_role(at, state, known)
    }
    if not found:
        shown = ", ".join(repr(printable(str(key))) for key in list(data)[:5]) or "nothing"
        raise InputError(
            f"{path}: holds {shown}, expected tensors by name, or a dictionary of such as one of "
            f"{', '.join(CONTAINERS)}"
        )
    taken = _first_fit(found, known) if key is None else _asked_for(path, found, key)
    entries = found[taken].entries
    numbers = [entry for entry in entries if entry.name in known or not _is_counter(entry.name, entry.tensor)]
    weights, copies = _without_copies(path, numbers)
    others = tuple(name for name in found if name != taken)
    tower = towers.in_timms_names(path, weights, known)
    counters = len(entries) - len(numbers)
    rest = (found[taken].beside, tower.texts, tower.width)
    return StateDict(tower.weights, taken, others, copies, counters, *rest)


def without_wrappers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict whose own prefixes mean something: only `WRAPPERS`, a `module.` before names and counters
    are taken off. It stays as it is where two names would become one."""
    names = {full: re.sub(r"^(module\.)+", "", _WRAPPED.sub("", full)) for full in state}
    if len(set(names.values())) < len(names):
        return state
    return {names[full]: tensor for full, tensor in state.items() if not _is_counter(names[full], tensor)}


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _by_role(key: str, state: Mapping[str, Tensor], known: Shapes) -> Iterator[tuple[str, _Network]]:
    """The networks in one dictionary, each with its key, in the order to be taken in."""
    groups: dict[str, list[_Entry]] = {}
    prefixes = (*PREFIXES, *([SECOND] if any(map(_NORMALISED.search, state)) else []))
    for full, tensor in state.items():
        role, name = _parted(full, known, prefixes)
        groups.setdefault(role, []).append(_Entry(name, full, tensor))
    roles = sorted((role for role in groups if role), key=lambda role: ROLES.index(role.partition(".")[0]))
    rest = groups.get("", [])
    names = {role: {entry.name for entry in entries} for role, entries in groups.items()}
    expected = known.keys() or set().union(*(names[role] for role in roles))
    most = max((len(names[role] & expected) for role in roles), default=0)
    if rest and 2 * len(names[""] & expected) >= most:  # a network as well
        yield from ((_joined(key, role), _Network(groups[role], 0)) for role in roles)
        yield key, _Network(rest, 0)
    elif len(roles) == 1:
        yield _joined(key, roles[0]), _Network(groups[roles[0]] + rest, 0)
    else:
        yield from ((_joined(key, role), _Network(groups[role], len(rest))) for role in roles)


def _parted(full: str, known: Shapes, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """The role that a name begins with, "" if with none, and the name without prefixes."""
    name, role = _WRAPPED.sub("", full), ""
    while name not in known:
        copy = next((copy for copy in COPIES if name.startswith(copy)), None)
        first, dot, after = (copy, ".", name.removeprefix(copy)) if copy else name.partition(".")
        if not dot or not (copy or first in prefixes or first in ROLES):
            break
        role, name = _joined(role, first if first in ROLES else ""), after
    return role, name if name in known else _CHUNK.sub(r"blocks.\1", name)


def _first_fit(found: Mapping[str, _Network], known: Shapes) -> str:
    """The first network with at least half as many of the `known` matrices as any has; where all have other
    names, with half as many of such shapes.

    Vectors do not count: a file with two sets of BatchNorm has other names for them.
    """
    matrices = {
        key: [(entry.name, tuple(entry.tensor.shape)) for entry in network.entries if entry.tensor.ndim >= 2]
        for key, network in found.items()
    }
    numbers = {key: len(known.items() & set(each)) for key, each in matrices.items()}
    if not any(numbers.values()):
        shapes = set(known.values())
        numbers = {key: sum(shape in shapes for _, shape in each) for key, each in matrices.items()}
    return next(key for key, number in numbers.items() if 2 * number >= max(numbers.values()))


def _asked_for(path: Path, found: Mapping[str, _Network], key: str) -> str:
    matching = [key] if key in found else [name for name in found if key and name.endswith(f".{key}")]
    if len(matching) == 1:
        return matching[0]
    if found.keys() == {""}:
        raise InputError(f"--weights_key {key!r}: {path} holds one network, which has no key; leave it out")
    there = ", ".join(repr(printable(name)) for name in found)
    many = "there are several of" if matching else "there is no"
    raise InputError(f"--weights_key {key!r}: {many} this name in {path}, expected one of {there}")


def _without_copies(path: Path, entries: list[_Entry]) -> tuple[Weights, int]:
    """Tensors by name, each once, and how many were left out for that."""
    kept: dict[str, _Entry] = {}
    copies = 0
    for entry in sorted(entries, key=lambda entry: _is_copy(entry.full)):  # what is there once is no copy
        earlier = kept.setdefault(entry.name, entry)
        if earlier is entry:
            continue
        if not _is_copy(entry.full) and not _are_equal(earlier.tensor, entry.tensor):
            raise InputError(
                f"{path}: holds tensor {printable(entry.name)} under two names, "
                f"{printable(earlier.full)!r} and {printable(entry.full)!r}"
            )
        copies += 1
    return {name: entry.tensor for name, entry in kept.items()}, copies


def _are_equal(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and towers.is_whole(one, other) and torch.equal(one, other)


def _is_copy(name: str) -> bool:
    return any(copy in name for copy in COPIES)


def _is_counter(name: str, tensor: Tensor) -> bool:
    return name in COUNTERS and tensor.numel() == 1


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether `value` is a dictionary of named tensors and nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )
