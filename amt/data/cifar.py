"""CIFAR-10 and CIFAR-100 in both forms they are distributed in: pickles of Python 2, and binary records.

A pickle can run any code while it is read. These are read without the classes they name: stand-ins take
their place, and a pickle that asks for anything else is refused.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amt.data.list_files import as_integers, as_texts, read_lines
from amt.data.numpy_pickles import STAND_INS, NumpyArray, NumpyType
from meta_dataset_readers.errors import InputError, damaged
from meta_dataset_readers.files import read_bytes

_LARGEST_BATCH = 2**30  # bytes; the longest of the real files has 160 million


class Form(NamedTuple):
    """One form in which CIFAR is distributed: its folder and files, and how they are read."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    read_names: Callable[[Path], list[str]]
    read_batch: Callable[[Path], tuple[np.ndarray, list[int]]]  # pixels (n, 3072), labels

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, self.names)


def _pickled_names(key: str) -> Callable[[Path], list[str]]:
    return lambda file: as_texts(file, _listed(file, _unpickled(file), key))


def _pickled_batch(key: str) -> Callable[[Path], tuple[np.ndarray, list[int]]]:
    def read(file: Path) -> tuple[np.ndarray, list[int]]:
        content = _unpickled(file)
        pixels = content.get("data")
        if not isinstance(pixels, np.ndarray):
            raise InputError(f"{file}: no array 'data', expected the pictures")
        return pixels, as_integers(file, _listed(file, content, key))

    return read


def _listed(file: Path, content: dict, key: str) -> list:
    values = content.get(key)
    if not isinstance(values, list) and not (isinstance(values, np.ndarray) and values.ndim):
        raise InputError(f"{file}: no list {key!r}")
    return list(values)


def _binary_batch(label_bytes: int) -> Callable[[Path], tuple[np.ndarray, list[int]]]:
    """Records of a few labels, of which the last is the finest, and 3072 bytes of pixels."""

    def read(file: Path) -> tuple[np.ndarray, list[int]]:
        data, record = read_bytes(file, _LARGEST_BATCH), label_bytes + 3072
        if not data or len(data) % record:
            raise InputError(f"{file}: {len(data)} bytes, expected a multiple of {record}")
        records = np.frombuffer(data, np.uint8).reshape(-1, record)
        return records[:, label_bytes:], records[:, label_bytes - 1].tolist()

    return read


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary in a pickle of texts, numbers, lists and arrays."""
    with damaged(f"{file}: damaged pickle"):
        content = _CifarUnpickler(file).load()
        if not isinstance(content, dict):
            raise InputError(f"{file}: holds a {type(content).__name__}, expected a dictionary")
        # Keys are bytes where Python 3 has rewritten a pickle of Python 2.
        content = {key.decode("latin-1") if isinstance(key, bytes) else key: content[key] for key in content}
        return {
            key: value.array if isinstance(value, NumpyArray) else value for key, value in content.items()
        }


class _CifarUnpickler(pickle._Unpickler):
    """Reads CIFAR's pickles and nothing else: for the classes they name it has stand-ins, not numpy's own.

    Of Python's two unpicklers the one written in Python: the other makes room for any number a memo is given.
    """

    def __init__(self, file: Path):
        self._file = file
        content = io.BytesIO(read_bytes(file, _LARGEST_BATCH))
        super().__init__(content, encoding="latin-1")  # as Python 2 wrote them

    def find_class(self, module: str, name: str) -> object:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            asked = f"{module}.{name}".encode("unicode_escape").decode()[:200]
            reason = "a dictionary of arrays needs no such thing, and reading it could run any code"
            raise InputError(f"{self._file}: the pickle asks for {asked}: {reason}") from None


def _pickled_from_buffer(data: bytes, kind: NumpyType, shape: tuple, order: str) -> NumpyArray:
    array = NumpyArray()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _pickled_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes written as {encoding!r}")
    return text.encode("latin-1")


_STAND_INS = {
    **{name: stand_in for stand_in, name in STAND_INS},
    "numpy.core.numeric._frombuffer": _pickled_from_buffer,
    "numpy._core.numeric._frombuffer": _pickled_from_buffer,
    "_codecs.encode": _pickled_bytes,
}


def _pickles(folder: str, train: tuple[str, ...], test: str, names: str, kind: str) -> Form:
    files = folder, train, (test,), names
    return Form(*files, _pickled_names(f"{kind}label_names"), _pickled_batch(f"{kind}labels"))


def _binaries(folder: str, train: tuple[str, ...], test: str, names: str, label_bytes: int) -> Form:
    return Form(folder, train, (test,), names, read_lines, _binary_batch(label_bytes))


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARIES = tuple(f"{name}.bin" for name in _BATCHES)
CIFAR10 = (
    _pickles("cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", ""),
    _binaries("cifar-10-batches-bin", _BINARIES, "test_batch.bin", "batches.meta.txt", 1),
)
CIFAR100 = (
    _pickles("cifar-100-python", ("train",), "test", "meta", "fine_"),
    _binaries("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
)
