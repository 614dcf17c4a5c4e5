"""The small files in which data sets say what their pictures are: text and MATLAB, read as untrusted.

Whatever is wrong with one is an InputError that names it. Does not know what is in them.
"""

import io
from collections.abc import Iterable, Sized
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from meta_dataset_readers.errors import InputError, damaged
from meta_dataset_readers.files import LARGEST_LIST, read_bytes


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without blank ones."""
    try:
        text = read_bytes(file, LARGEST_LIST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: no text ({error.reason} at byte {error.start})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The lines of a text file, each "FIRST REST"."""
    pairs = []
    for number, line in enumerate(read_lines(file), 1):
        first, *rest = line.split(None, 1)
        if not rest:
            raise InputError(f"{file}: line {number} is {first[:60]!r}, expected two words or more")
        pairs.append((first, rest[0]))
    return pairs


def read_matlab(file: Path, variable: str) -> np.ndarray:
    """A variable of a MATLAB file, with one dimension."""
    with damaged(f"{file}: damaged MATLAB file"):
        found = loadmat(io.BytesIO(read_bytes(file, LARGEST_LIST)), squeeze_me=True)
    if variable not in found:
        raise InputError(f"{file}: no variable {variable!r}, expected a list of that name")
    return np.atleast_1d(found[variable])


def matlab_field(file: Path, table: np.ndarray, field: str) -> list:
    """A field of all rows of a MATLAB structure."""
    if field not in (table.dtype.names or ()):
        raise InputError(f"{file}: its annotations have no field {field!r}")
    return [row[field] for row in table]


def as_texts(file: Path, values: Iterable) -> list[str]:
    values = list(values)
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{file}: {str(value)[:60]!r} in place of a text")
    return values


def as_integers(file: Path, values: Iterable) -> list[int]:
    values = list(values)
    for value in values:
        if not isinstance(value, int | float | np.integer | np.floating) or not float(value).is_integer():
            raise InputError(f"{file}: {str(value)[:60]!r} in place of an integer")
    return [int(value) for value in values]


def labels_from_zero(file: Path, labels: Iterable[int], n_classes: int, first: int = 1) -> list[int]:
    """Labels that count from `first`, counted from 0. Raises InputError for one out of range."""
    labels = list(labels)
    for index, label in enumerate(labels):
        if not first <= label < first + n_classes:
            expected = f"{first} to {first + n_classes - 1}"
            raise InputError(f"{file}: label {label} of picture {index}, expected {expected}")
    return [label - first for label in labels]


def check_same_length(file: Path, **lists: Sized) -> None:
    if len({len(entries) for entries in lists.values()}) > 1:
        found = ", ".join(f"{len(entries)} {name}" for name, entries in lists.items())
        raise InputError(f"{file}: {found}, expected as many of each")
