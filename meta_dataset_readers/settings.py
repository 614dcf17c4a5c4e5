"""Settings that are written once: a dataclass field carries type, default, range and help; its flag follows.

    @dataclasses.dataclass(frozen=True)
    class Training:
        epochs: int = setting(30, "length of the run", least=1, most=10**6)
        gamma: float = setting(0.005, "radius of the weight perturbation", flag="awp_gamma", least=0)

    add_flags(parser, Training)        # --epochs, --awp_gamma
    from_args(Training, args)          # Training(epochs=args.epochs, gamma=args.awp_gamma)

Also the kinds of values that flags have: `positive_int`, `nonnegative`, `fraction`, `as_path` and so on.
Knows no flag by name and opens no file.
"""

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ARGPARSE = ("help", "nargs", "choices", "metavar")  # what a field passes on as it is


# --- kinds of values -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number between bounds; called with a text it reads one, as argparse's `type`.

    Args:
        kind: int or float.
        least, most: the bounds; None for none.
        above: a bound that is itself not allowed.
    """

    kind: type[int] | type[float] = float
    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __call__(self, text: str) -> int | float:
        """The number. Raises ArgumentTypeError, saying what was expected and what was found."""
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or value not in self:
            raise argparse.ArgumentTypeError(f"expected {self.describe(value)}, got {text!r}")
        return value

    def __contains__(self, value: object) -> bool:
        """Whether a value, of Python or of YAML, is such a number."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.above is not None and value <= self.above:
            return False
        return (self.least is None or value >= self.least) and not self._too_large(value)

    def describe(self, value: object = None) -> str:
        """What is expected, in words; the upper bound only where `value` exceeds it."""
        bound = f" of at most {self.most}" if self._too_large(value) else ""
        if self.kind is int:
            words = {None: "an integer", 0: "a nonnegative integer", 1: "a positive integer"}
            return words.get(self.least, f"an integer of at least {self.least}") + bound
        if (self.least, self.most) == (0, 1):
            return "a number from 0 to 1"
        if self.above is not None:
            return ("a positive number" if self.above == 0 else f"a number above {self.above:g}") + bound
        return ("a number" if self.least is None else f"a number of at least {self.least:g}") + bound

    def _too_large(self, value: object) -> bool:
        return self.most is not None and isinstance(value, int | float) and value > self.most


positive_int = Number(int, least=1)
nonnegative_int = Number(int, least=0)
nonnegative = Number(float, least=0)
fraction = Number(float, least=0, most=1)


def as_path(text: str) -> Path:
    """A path, in which ~ is the home folder; an empty one is what a shell makes of a variable not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''; the path is empty")
    return Path(os.path.expanduser(text))


# --- fields and their flags ------------------------------------------------------------------------------


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, flag: str = "", aliases: str = "", **more: Any
) -> Any:
    """A dataclass field that knows its flag.

    Args:
        flag: the flag's name, in underscores; empty for the field's own.
        aliases: other spellings, such as "--alpha -a".
        more: `least`, `most`, `above` as of `Number`; `read`, which takes a text; `nargs`, `choices` and
            `metavar` as of argparse.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "flag": flag, "aliases": aliases, **more}
    )


def add_flags(
    group: argparse._ActionsContainer,
    cls: type,
    *names: str,
    unset: tuple[str, ...] = (),
    several: tuple[str, ...] = (),
) -> None:
    """Add the flags of a dataclass to a parser or a group.

    Args:
        names: these fields only; none: all that have a help text and no flag in the parser yet.
        unset: fields whose flag is None if it is not given, as something else decides then.
        several: the same of fields whose flag takes one or more values.
    """
    for field in dataclasses.fields(cls):
        taken = f"--{flag_of(field)}" in group._option_string_actions
        if field.metadata.get("help") and (field.name in names or not (names or taken)):
            flags = [f"--{flag_of(field)}", *field.metadata["aliases"].split()]
            decided_later = field.name in (*unset, *several)
            group.add_argument(*flags, **_argument(cls, field, decided_later, field.name in several))


def from_args(cls: type, args: argparse.Namespace, **own: Any) -> Any:
    """An instance of the dataclass from parsed flags; `own` fields come before them, and of a flag that is
    None or not in `args` the field's default stays."""
    given = {field.name: getattr(args, flag_of(field), None) for field in dataclasses.fields(cls)}
    given = {name: value for name, value in given.items() if value is not None}
    return cls(**with_tuples(given) | own)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields with tuples, where JSON or a command line has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def flag_of(field: dataclasses.Field) -> str:
    """The name of a field's flag, in underscores."""
    return field.metadata.get("flag") or field.name


def reader(cls: type, name: str) -> Any:
    """What reads one value of a field from a text: a `Number`, or another of argparse's types."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    bounds = {key: field.metadata[key] for key in ("least", "most", "above") if key in field.metadata}
    kind, _ = _kind(cls, name)
    if "read" in field.metadata:
        return field.metadata["read"]
    if kind in (int, float):
        return Number(kind, **bounds)
    return as_path if kind is Path else str


def _argument(cls: type, field: dataclasses.Field, decided_later: bool, several: bool) -> dict[str, Any]:
    """The keyword arguments of argparse."""
    kind, is_tuple = _kind(cls, field.name)
    found = {key: field.metadata[key] for key in _ARGPARSE if key in field.metadata}
    if kind is bool:
        return found | {"action": "store_true"}
    if is_tuple or several:
        found = {"nargs": "+"} | found
    default = None if decided_later or field.default is dataclasses.MISSING else field.default
    found["default"] = list(default) if isinstance(default, tuple) else default
    return found | {"type": reader(cls, field.name)}


def _kind(cls: type, name: str) -> tuple[type, bool]:
    """The type of a field's single value, and whether it holds a tuple of them: float and True of
    `tuple[float, ...] | None`."""
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
