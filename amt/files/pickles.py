"""What a pickle would do, found out without doing any of it.

Pickles are only parsed here, by pickletools. `names` lists what one asks for; `rehearse` goes through it step
by step, with stand-ins for everything it would make, and passes only what files of torch.save consist of.
Another reader may then read it for good. Knows no files and makes no tensors.
"""

import pickletools
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO

from meta_dataset_readers.errors import first_line

# Bytes of a number in a storage of each type.
_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
_BYTES |= {"Char": 1, "Byte": 1, "Bool": 1}
_STORAGES = {f"torch.{kind}Storage": size for kind, size in _BYTES.items()}

# Types of numbers, by name; each is a value and nothing is called.
_DTYPES = {
    f"torch.{name}"
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}

# Paths, which are read as texts; the first are names as Python 3.13 writes them.
PATHS = {
    f"{module}.{kind}"
    for module in ("pathlib._local", "pathlib")
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}

_SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_TEXTS = {"_codecs.encode", "builtins.bytes"}  # what makes bytes in protocol 2

# All that a pickle may ask for. numpy's numbers and arrays, devices and paths are there because training code
# keeps them in its arguments and records; a Counter, because torch's MultiStepLR keeps its milestones in one.
HARMLESS = {
    "collections.OrderedDict",
    "collections.Counter",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
    "builtins.set",
    *_SCALARS,
    *_ARRAYS,
    *_TEXTS,
    *_DTYPES,
    *PATHS,
    *_STORAGES,
}


class Damaged(ValueError):
    """A pickle that is cut short, contradicts itself or claims more than there is."""


class Foreign(ValueError):
    """A step that no file of torch.save needs; the message names it."""


@dataclass(frozen=True)
class Storage:
    """Where a pickle says that the numbers of some tensors are.

    Args:
        count: of the numbers.
        size: of one number, in bytes.
    """

    key: str
    count: int
    size: int


@dataclass(frozen=True)
class _Name:
    """Stands in for a class or function."""

    name: str


@dataclass(frozen=True, eq=False)
class _Made:
    """Stands in for what a call of `by` would give."""

    by: str


def names(stream: BinaryIO) -> set[str]:
    """All classes and functions that the next pickle of a stream asks for, dotted, as this Python calls them.

    They are for telling what a file is. Names can also be put together while a pickle runs (STACK_GLOBAL), in
    ways that no listing follows: here such a name is a guess, and `rehearse` lets none pass. Raises Damaged
    if the stream holds no whole pickle."""
    found: set[str] = set()
    texts: list[str] = []  # STACK_GLOBAL takes the last two texts, as pickles are usually written
    memo: dict[int, str] = {}
    try:
        for operation, argument, _ in pickletools.genops(stream):
            match operation.name:
                case "GLOBAL" | "INST":
                    found.add(_dotted(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    found.add(_dotted(*(["?", "?"] + texts)[-2:]))
                case "EXT1" | "EXT2" | "EXT4":
                    found.add(f"extension {argument}")
                case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                    memo[len(memo) if argument is None else argument] = texts[-1] if texts else "?"
                case "GET" | "BINGET" | "LONG_BINGET":
                    texts.append(memo.get(argument, "?"))
                case _ if isinstance(argument, str):
                    texts.append(argument)
    except Exception as error:  # whatever a damaged stream leads the parser to
        raise Damaged(first_line(error)) from error
    return found


def _dotted(module: str, name: str) -> str:
    """Pickles of protocol 2 use Python 2's modules."""
    return f"{ {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module) }.{name}"


def rehearse(stream: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Go through the next pickle of a stream.

    Returns:
        What the pickle would make: texts, numbers, tuples, lists and dictionaries as they are, stand-ins for
        all else. And the storages that it refers to, by key; no number in them has been compared with
        anything yet.

    Raises:
        Foreign: it has instructions that torch's own careful reader does not know, asks for a name that is
            not in `HARMLESS`, or uses one in a way that torch.save never does.
        Damaged: the stream holds no whole pickle, two storages share a key, or a tensor reaches beyond its
            storage.
    """
    rehearsal = _Rehearsal()
    try:
        for operation, argument, place in pickletools.genops(stream):
            rehearsal.step(operation.name, argument, place)
        return rehearsal.stack.pop(), rehearsal.storages
    except (Foreign, Damaged):
        raise
    except Exception as error:  # the parser's, or an empty stack, or a key that cannot be one
        raise Damaged(first_line(error)) from error


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DICTIONARIES = {"dict", "collections.OrderedDict", "collections.Counter"}
_METHODS = {*dir(OrderedDict), *dir(Counter)}
_OPERANDS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}


class _Rehearsal:
    """A machine for pickles that makes stand-ins."""

    def __init__(self):
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._outer: list[list[Any]] = []  # stacks below a mark
        self._memo: dict[int, Any] = {}
        self._spent = 0

    def step(self, code: str, argument: Any, place: int) -> None:
        stack = self.stack
        match code:
            case "PROTO" | "STOP":
                pass
            case _ if code in _VALUES:
                stack.append(_VALUES[code])
            case _ if code in _OPERANDS:
                stack.append(argument)
            case "SHORT_BINSTRING":  # Python 2's text
                stack.append(argument.encode("latin-1").decode())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self._outer.append(stack)
                self.stack = []
            case "TUPLE":
                items = tuple(self._since_mark())
                self.stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(code[-1]))]
                stack.append(tuple(reversed(items)))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._since_mark())
            case "GLOBAL":
                stack.append(_Name(_dotted(*argument.split(" ", 1))))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                self._spend(arguments, place)
                stack.append(_call(called, arguments))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                if (kind, arguments) != (_Name("argparse.Namespace"), ()):
                    raise Foreign(f"a new object of {_shown(kind)}")
                stack.append(_Made("argparse.Namespace"))
            case "BUILD":
                state = stack.pop()
                self._spend((state,), place)
                _check_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise Foreign(f"the instruction {code}")

    def _spend(self, given: tuple, place: int) -> None:
        """Raise once calls were given more than the pickle is long so far: what they are given they copy, and
        one text of a megabyte could be given a million times."""
        parts = (given, *(each for each in given if isinstance(each, str | tuple | list | dict)))
        self._spent += sum(len(each) for each in parts)
        if self._spent > place:
            raise Foreign("copies of the same thing without end")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._outer.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Foreign(f"an item in {_shown(self.stack[-1])}")
        self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict | _Made) or _shown(target) not in _DICTIONARIES:
            raise Foreign(f"an item in {_shown(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            if isinstance(target, dict):
                target[key] = value

    def _storage(self, reference: Any) -> Storage:
        match reference:
            case ("storage", _Name(kind), str(key), str(), int(count)) if kind in _STORAGES:
                pass
            case ("storage", _Name(kind), str(key), str(), int(count), None) if kind in _STORAGES:
                pass  # as before torch 1.6
            case _:
                raise Foreign("a reference to something else than a storage")
        storage = Storage(key, count, _STORAGES[kind])
        if count < 0 or self.storages.setdefault(key, storage) != storage:
            raise Damaged(f"its storage {key!r} is claimed twice, or with {count} numbers")
        return storage


def _call(called: Any, arguments: Any) -> _Made:
    """What stands for the result of a call, if it is one that torch.save writes.

    A harmless name is not harmless with any argument: the likes of Counter go through whatever they get, and
    a tensor of 4 bytes can have 2**40 rows; some encodings double what they are given.
    """
    if not isinstance(called, _Name) or not _is_usual(called.name, arguments):
        raise Foreign(f"an unusual call of {_shown(called)}")
    return _Made(called.name)


def _is_usual(name: str, arguments: tuple) -> bool:
    match name, arguments:
        case "torch._utils._rebuild_tensor_v2", (Storage(), int(), tuple(), tuple(), *_):
            _check_extent(*arguments[:4])
            return True
        case "torch._utils._rebuild_parameter", (_Made("torch._utils._rebuild_tensor_v2"), *_):
            return True
        case "torch.Size", (tuple(sizes),):
            return _are_whole(sizes)
        case "collections.OrderedDict", (list(items),):  # Python 2's
            return all(isinstance(item, list | tuple) and len(item) == 2 for item in items)
        case "collections.Counter", (dict(),):
            return True
        case "collections.OrderedDict" | "collections.Counter", ():
            return True
        case "_codecs.encode", (str(), "latin1"):
            return True
        case "builtins.bytes", ():  # no bytes at all
            return True
        case "builtins.set", (list(items),):
            return all(item is None or isinstance(item, str | int | float) for item in items)
        case "torch.device", (str(),) | (str(), int()):
            return True
        case _ if name in PATHS:
            return all(isinstance(part, str) for part in arguments)
    return _is_usual_of_numpy(name, arguments)


def _is_usual_of_numpy(name: str, arguments: tuple) -> bool:
    match name, arguments:
        case "numpy.dtype", (str(), *_):
            return True
        case _, (_Made("numpy.dtype"), _Made(made)) if name in _SCALARS:
            return made in _TEXTS
        case _, (_Name("numpy.ndarray"), (0,), _Made(made)) if name in _ARRAYS:
            return made in _TEXTS
    return False


def _check_state(target: Any, state: Any) -> None:
    """Raise unless `state` may be given to an object: it must not hide a dictionary's methods."""
    match target, state:
        case _Made("numpy.dtype"), _:
            return
        case _Made(array), (int(), tuple(sizes), _Made("numpy.dtype"), bool(), _Made(made)):
            if array in _ARRAYS and _are_whole(sizes) and made in _TEXTS:  # objects would be in a list
                return
        case _Made("argparse.Namespace"), dict():
            return
        case _Made("collections.OrderedDict" | "collections.Counter"), dict():
            if not state.keys() & _METHODS:
                return
    raise Foreign(f"an unusual state of {_shown(target)}")


def _check_extent(storage: Storage, offset: int, sizes: tuple, strides: tuple) -> None:
    """Raise unless a tensor of these sizes lies within its storage."""
    if not _are_whole((offset, *sizes, *strides)) or len(sizes) != len(strides):
        raise Damaged("a tensor with sizes that are none")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= storage.count:
        raise Damaged(f"a tensor needs {last + 1} numbers of a storage that has {storage.count}")


def _check_key(key: Any) -> None:
    """Raise if it could take for ever to look `key` up, as with tuples of tuples of tuples."""
    if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
        raise Foreign("a nested tuple as a key")


def _are_whole(numbers: tuple) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _shown(thing: Any) -> str:
    match thing:
        case _Name(name) | _Made(name):
            return name
    return type(thing).__name__
