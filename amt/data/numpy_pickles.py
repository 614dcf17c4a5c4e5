"""Stand-ins for the functions by which pickles make numpy's types, numbers and arrays.

numpy's own do whatever a pickle's bytes lead them to; these take numbers and texts out of bytes of the right
length, and nothing else. Knows no files.
"""

import re
from typing import Literal

import numpy as np

_CODE = re.compile(r"[fiu][1248]|b1|c8|c16|[US]\d{1,6}")


class NumpyType:
    """numpy.dtype: remembers the code of a type, such as f8, and its order of bytes."""

    def __init__(self, code: str, *_):
        if _CODE.fullmatch(code) is None:
            raise ValueError(f"numpy's type {code[:20]!r}")
        self.code = code
        self._order: Literal["|", "<", ">"] = "|"

    def __setstate__(self, state: tuple) -> None:
        self._order = ">" if state[1] == ">" else "<"

    def numbers(self, data: bytes | str) -> np.ndarray:
        """The numbers or texts in `data`, in a row; Python 2's bytes are a text."""
        data = data.encode("latin-1") if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(self.code).newbyteorder(self._order))


class NumpyArray:
    """numpy.ndarray: `array` holds what a pickle says of it."""

    def __init__(self, *_):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, sizes, kind, by_columns, data = state
        self.array = kind.numbers(data).reshape(sizes, order="F" if by_columns else "C")


def scalar(kind: NumpyType, data: bytes | str) -> float | int | bool | complex | str | bytes:
    """A single number, or a short text, as Python's own; a long text could be asked for without end."""
    if re.fullmatch(r"[US]\d{3,}", kind.code):
        raise ValueError("a text of numpy's with more than 99 letters")
    return kind.numbers(data).item()


STAND_INS = [
    (NumpyType, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((NumpyArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
