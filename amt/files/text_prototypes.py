"""Embeddings of class names by the text tower of a CLIP, as a .npz file keeps them: `--text_prototypes`.

    names       (C,) texts          every class once, as the data sets call it; case and _ - do not matter
    embeddings  (C, E) numbers      of one text, or the mean of several, of any length but zero

docs/how-to/text-prototypes.md has a script that writes such a file.
"""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amt.files import npz
from meta_dataset_readers.errors import InputError, damaged, printable

LARGEST = 2**28  # bytes; 22,000 classes of 1,280 numbers are half of it


@dataclasses.dataclass(frozen=True)
class TextPrototypes:
    """Classes and their embeddings.

    Args:
        file: where they are from.
        names: C, as the file has them, different when `plain`.
        embeddings: (C, E) float32, finite, the largest number of each between 1 and 2, as it is their
            direction that is compared.
    """

    file: Path
    names: tuple[str, ...]
    embeddings: Tensor

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """The row of each class, by `plain` name."""
        return {plain(name): row for row, name in enumerate(self.names)}

    @property
    def width(self) -> int:
        """E."""
        return self.embeddings.shape[1]

    def of(self, names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """The embeddings of these N classes, in order: (N, E) float32. Raises InputError as `check`."""
        self.check(names)
        return self.embeddings[[self.rows[plain(name)] for name in names]].to(device)

    def check(self, names: Iterable[str], where: str = "") -> None:
        """Raise an `InputError`, which says `where` the classes are from, unless all of them are there."""
        missing = [name for name in names if plain(name) not in self.rows]
        if missing:
            shown = ", ".join(repr(printable(name)) for name in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(
                f"--text_prototypes {self.file}: has no text for {shown}{more}{where}; expected every class "
                "to have one"
            )

    def check_apart(self, names: Iterable[str]) -> None:
        """Raise an `InputError` where two of these classes have one text, which cannot tell them apart."""
        seen: dict[str, str] = {}
        for name in names:
            twin = seen.setdefault(plain(name), name)
            if twin != name:
                both = " and ".join(repr(printable(each)) for each in (twin, name))
                raise InputError(
                    f"--text_prototypes {self.file}: {both} have one text; expected a text for each class"
                )


def check_width(texts: TextPrototypes | None, what: str, dim: int) -> None:
    """Raise an `InputError` unless there are texts, as `what` needs, of as many numbers as `dim` features."""
    if texts is None:
        raise InputError(f"{what}: needs --text_prototypes FILE.npz of amt test, amt predict or amt export")
    if texts.width != dim:
        raise InputError(
            f"--text_prototypes {texts.file}: embeddings of {texts.width} numbers, the network has {dim} "
            "features; expected as many: the texts of the same CLIP, and an image tower with its projection"
        )


def plain(name: str) -> str:
    """A class name without what writers differ in: case, how accents are encoded, and what stands between
    words."""
    name = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", name).casefold())
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def read(path: Path) -> TextPrototypes:
    """The text prototypes in a file. Raises InputError if there is no such file, or it is damaged, too large,
    or something else."""
    where = f"--text_prototypes {path}"
    with damaged(f"{where}: no .npz file of arrays"):
        found = npz.read(path, LARGEST, what="file of text prototypes")
    if not {"names", "embeddings"} <= found.keys():
        shown = ", ".join(map(printable, list(found)[:5])) or "nothing"
        raise InputError(f"{where}: holds {shown}, expected the arrays names and embeddings")
    names, numbers = found["names"], found["embeddings"]
    if names.ndim != 1 or names.dtype.kind != "U" or numbers.ndim != 2 or numbers.dtype.kind != "f":
        kinds = " and ".join(f"{each.dtype}{list(each.shape)}" for each in (names, numbers))
        raise InputError(f"{where}: holds {kinds}, expected texts [C] and floating-point numbers [C, E]")
    if len(names) != len(numbers) or not numbers.size:
        raise InputError(f"{where}: {len(names)} names and embeddings of shape {list(numbers.shape)}")
    with damaged(f"{where}: the names are no texts", (SystemError, ValueError)):
        classes = tuple(names.tolist())  # whose numbers may be no characters
        "".join(classes).encode()  # cards and exports are UTF-8
    if len({plain(name) for name in classes}) < len(classes):
        raise InputError(f"{where}: two of its {len(classes)} classes have one name")
    embeddings, usable = _scaled(numbers)
    if not usable.all():
        name = printable(classes[int(usable.argmin())])
        raise InputError(f"{where}: the embedding of {name!r} is zero or not finite")
    return TextPrototypes(path, classes, torch.from_numpy(embeddings))


def given(path: str | os.PathLike | None) -> TextPrototypes | None:
    """Those of a file, where one is named. Raises as `read`."""
    return None if path is None else read(Path(path))


def _scaled(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (C, E) float32, each times the power of two for which its length neither overflows nor vanishes,
    and which of them (C,) have a direction."""
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers that are refused
        rows = numbers.astype(np.promote_types(numbers.dtype, np.float32))
        largest, exponents = np.frexp(np.abs(rows).max(axis=1))
        scaled = np.ldexp(rows, 1 - exponents[:, None]).astype(np.float32)
    return scaled, np.isfinite(rows).all(axis=1) & (largest > 0)
