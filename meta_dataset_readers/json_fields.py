"""Values out of JSON that are not believed: keys and types are checked, and a fault names file and field.

Does not know what any file means.
"""

from typing import Any

from meta_dataset_readers.errors import InputError, nearest

_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


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
        if value < 0:
            raise InputError(f"{self.where}: field {key!r}: expected a count, found {value}")
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
