"""Where files of others keep a network's tensors, and what they put before the names.

    container    {"state_dict": {...}, "epoch": 3}    the first of `CONTAINERS` that is there, or the file
    prefixes     module.backbone.conv1.weight         those of `PREFIXES`, in any nesting, are taken off
    copies       attacker.model.conv1.weight          left out where the tensor is there without `COPIES`

All readers of foreign weights go through here. Knows no network: a reader may pass the names it expects,
which are then never shortened.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor

from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, printable

# In the order they are taken in. Of DINO's and iBOT's two networks the teacher is published; of two BatchNorm
# sets the dual file has both.
CONTAINERS = ("state_dict_dual", "teacher", "student", "state_dict", "model")

# Of data-parallel training, of wrappers that normalise, of networks with a head of their own.
PREFIXES = ("module.", "model.", "backbone.")

COPIES = ("attacker.model.",)  # the robustness library saves its network twice


class StateDict(NamedTuple):
    """A network's tensors as a file keeps them.

    Args:
        weights: by names without prefixes.
        container: the key they were under, "" if the file itself has them.
        others: keys of other networks in the file, which were not taken.
        copies: how many tensors were left out because they were there a second time.
    """

    weights: Weights
    container: str
    others: tuple[str, ...]
    copies: int


def networks(data: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """Every network in a file's contents by its container, "" for the file itself; the one to take first."""
    found = {key: data.get(key) for key in CONTAINERS} | {"": data}
    return {key: value for key, value in found.items() if _is_state(value)}


def unwrap(path: Path, data: Mapping[str, Any], known: Collection[str] = ()) -> StateDict:
    """The network in a file's contents.

    Args:
        path: for errors.
        data: what `weight_files.read` found.
        known: names to keep as they are, though they may begin like a prefix.

    Raises:
        InputError: there are no tensors by name, or two of them have one name without their prefixes.
    """
    found = networks(data)
    if not found:
        shown = ", ".join(repr(printable(str(key))) for key in list(data)[:5]) or "nothing"
        raise InputError(
            f"{path}: holds {shown}, expected tensors by name, or a dictionary of such as one of "
            f"{', '.join(CONTAINERS)}"
        )
    (container, state), *others = found.items()
    weights: Weights = {}
    origin: dict[str, str] = {}
    copies = 0
    for full in sorted(state, key=_is_copy):  # a tensor that is there once is no copy
        name = without_prefixes(full, known)
        if name not in origin:
            origin[name], weights[name] = full, state[full]
        elif _is_copy(full):
            copies += 1
        else:
            raise InputError(
                f"{path}: holds tensor {printable(name)} under two names, {printable(origin[name])!r} and "
                f"{printable(full)!r}"
            )
    return StateDict(weights, container, tuple(key for key, _ in others), copies)


def without_prefixes(name: str, known: Collection[str] = ()) -> str:
    """`name` without `PREFIXES` and `COPIES`, as far as it is none of `known`."""
    prefixes = PREFIXES + COPIES
    while name not in known and name.startswith(prefixes):
        name = name.removeprefix(next(prefix for prefix in prefixes if name.startswith(prefix)))
    return name


def _is_copy(name: str) -> bool:
    return any(copy in name for copy in COPIES)


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether `value` is a dictionary of named tensors and nothing else."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )
