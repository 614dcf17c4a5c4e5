"""Pictures with labels, by random access, and choosing some of each class.

Does not know data sets, transforms or batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from meta_dataset_readers.pictures import Prepare, read_picture


class Labelled(ABC):
    """Pictures with labels: one split, or a part of one, by random access.

    `labels` are int64, (n,), on the CPU. Can be pickled and used from any process; files are opened by the
    one that asks for a picture.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Picture `index` in 0..n-1, in mode RGB. Raises InputError, naming the file, for one at fault."""

    @abstractmethod
    def origin(self, index: int) -> str:
        """Where the picture comes from: different for different pictures."""


class ArrayImages(Labelled):
    """Pictures that are rows of one array, uint8, (n, H, W, 3), perhaps mapped; `name` is for `origin`."""

    def __init__(self, pixels: np.ndarray, labels: Iterable[int], name: str):
        self.pixels, self.labels, self.name = pixels, int64(labels), name

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index]))

    def origin(self, index: int) -> str:
        return f"{self.name}, picture {index}"


class FileImages(Labelled):
    """Pictures that are files; `files` are relative to `root`, with "/" between their parts, and `prepare` as
    in `pictures.decode_image`."""

    def __init__(
        self, root: Path, files: Sequence[str], labels: Iterable[int], prepare: Prepare | None = None
    ):
        self.root, self.files, self.labels, self.prepare = root, tuple(files), int64(labels), prepare

    def image(self, index: int) -> Image.Image:
        return read_picture(self.root / self.files[index], self.prepare)

    def origin(self, index: int) -> str:
        return str(self.root / self.files[index])


class Chosen(Labelled):
    """The pictures of `whole` at these indices, in this order."""

    def __init__(self, whole: Labelled, indices: np.ndarray):
        self.whole, self.indices = whole, np.asarray(indices, np.int64)
        self.labels = whole.labels[torch.from_numpy(self.indices)]

    def image(self, index: int) -> Image.Image:
        return self.whole.image(int(self.indices[index]))

    def origin(self, index: int) -> str:
        return self.whole.origin(int(self.indices[index]))


def int64(labels: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.array(list(labels), np.int64))


def choose_per_class(
    labels: Tensor, how_many: Callable[[int], int], key: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Splits indices into (chosen, others), both ascending: `how_many(n)` of the n pictures of each class,
    which depend on `key` (integers >= 0), the class and its size, not on other classes."""
    numbers = labels.numpy()
    chosen = np.zeros(len(numbers), bool)
    for label in np.unique(numbers):
        members = np.flatnonzero(numbers == label)
        shuffled = np.random.default_rng([*key, int(label)]).permutation(members)
        chosen[shuffled[: how_many(len(members))]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
