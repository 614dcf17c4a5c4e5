"""Arrays out of NumPy's .npz archives that others wrote: nothing is unpickled, and nothing unpacks to more
than a bound."""

import io
import zipfile
from pathlib import Path

import numpy as np

from meta_dataset_readers.errors import printable
from meta_dataset_readers.files import read_bytes


def read(path: Path, most: int, *, what: str = "file") -> dict[str, np.ndarray]:
    """Every array of an archive by its name, of any shape and dtype but Python objects. File and arrays may
    have `most` bytes; a missing file is called `what`.

    Raises:
        InputError: there is no such file, or it is larger.
        ValueError, or whatever numpy and zipfile raise: it is damaged or something else.
    """
    content = read_bytes(path, most, what=what)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > most:
        raise ValueError(f"unpacks to {unpacked} bytes, at most {most} are read")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        found = {name: file[name] for name in file}
    foreign = next((name for name, each in found.items() if not isinstance(each, np.ndarray)), None)
    if foreign is not None:
        raise ValueError(f"{printable(foreign)} is no array")
    return found
