"""Values out of JSON that are not believed: keys and types are checked, and a fault names file and field.

`conform` checks a whole file against a declared shape, `Fields` takes entries one by one where what is
expected depends on others. Does not know what any file means.
"""

import functools
import re
from typing import Any

from meta_dataset_readers.errors import InputError, nearest

MOST = 2**53  # of a count: whatever is larger is no number of anything on a disk

_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}

_UNION = re.compile(r"^\[key\]$|^list\[.*\]$|^constrained-")  # pydantic's names of a part of a type

_EXPECTED = {  # pydantic's words, in ours
    f"Input should be a valid {theirs}": ours
    for theirs, ours in (
        ("dictionary", "an object"),
        ("list", "a list"),
        ("string", "a string"),
        ("integer", "an integer"),
        ("number", "a number"),
        ("boolean", "a boolean"),
    )
}


class Fields:
    """A JSON object whose entries are checked as they are taken; `where` names it in messages."""

    def __init__(self, where: str, value: Any):
        self.where = where
        self._value: dict[str, Any] = typed(where, value, dict)

    def get(self, key: str, kind: type) -> Any:
        """The entry `key`, which must be there and of this type; so with all below."""
        if key not in self._value:
            raise InputError(f"{self.where}: field {key!r} is missing")
        return typed(f"{self.where}: field {key!r}", self._value[key], kind)

    def object(self, key: str) -> "Fields":
        """The object `key`."""
        return Fields(f"{self.where}: field {key!r}", self.get(key, dict))

    def count(self, key: str) -> int:
        """The integer `key`, at least 0."""
        if isinstance(self._value.get(key), dict):
            raise InputError(f"{self.where}: field {key!r}: images counted by pool are not supported")
        value = self.get(key, int)
        if not 0 <= value <= MOST:
            raise InputError(f"{self.where}: field {key!r}: expected a count, found {_brief(value)}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """The list of strings `key`."""
        where = f"{self.where}: field {key!r}"
        return tuple(typed(where, entry, str) for entry in self.get(key, list))

    def expect_keys(self, keys) -> None:
        """Raise InputError if there are other keys than these."""
        unknown = self._value.keys() - set(keys)
        if unknown:
            raise InputError(f"{self.where}: unknown key {min(unknown)!r}; {nearest(min(unknown), keys)}")

    def counts(self, keys) -> tuple[int, ...]:
        """The integers of these keys, and there must be no other."""
        self.expect_keys(keys)
        return tuple(self.count(key) for key in keys)

    def by_id(self, size: int, kind: type) -> tuple:
        """The values of the keys "0".."size-1", which must be all the keys there are."""
        if len(self._value) != size:
            raise InputError(f"{self.where}: {len(self._value)} entries, {size} expected from the splits")
        take = self.count if kind is int else lambda key: self.get(key, kind)
        return tuple(take(str(number)) for number in range(size))


def typed(where: str, value: Any, kind: type) -> Any:
    """`value` if it is of this type (dict, list, str or int; a boolean is no int), else an InputError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "a boolean" if isinstance(value, bool) else _JSON_NAMES.get(type(value), type(value).__name__)
        raise InputError(f"{where}: expected {_JSON_NAMES[kind]}, found {found}")
    return value


def conform(where: str, value: Any, shape: Any) -> Any:
    """`value` as it is, if it has the `shape`: a type as pydantic knows it, such as a TypedDict.

    Nothing is converted: "5" is no number, a boolean no integer. Raises InputError for the first fault, which
    names field, what was expected and what was found; `where` begins it.
    """
    from pydantic import ValidationError  # here: whoever reads a list does not wait for it

    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        names = [str(name) for name in fault["loc"] if not _UNION.search(str(name))]
        field = f"{where}: field {'.'.join(names)!r}" if names else where
        if fault["type"] == "missing":
            raise InputError(f"{field} is missing") from None
        expected = _EXPECTED.get(fault["msg"], fault["msg"].removeprefix("Input should be "))
        raise InputError(f"{field}: expected {expected[:120]}, found {_brief(fault['input'])}") from None
    return value


@functools.cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _brief(value: Any) -> str:
    """A value for a message: its kind where it is none of a few letters."""
    if isinstance(value, dict | list):
        return f"{_JSON_NAMES[type(value)]} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    return repr(value)[:80]
