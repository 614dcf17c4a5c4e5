"""Training, validation and test splits of a data set, and batches of them.

The published code let training or test pictures choose the learning rate, the restored weights and the
reported epoch. Here validation is a part of the training set that is not trained on, and the test set is
nothing else's. Knows splits, the published transforms and the order of batches; does not know networks or
attacks, and does not normalise. Files on disk are known to `datasets`.

What is random is a function of (seed, epoch, picture): not of the number of workers, nor of what was read
before.
"""

import dataclasses
import functools
import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from amt.data.datasets import known, open_dataset
from amt.data.labelled import Chosen, Labelled, choose_per_class
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.feeding import Feed
from meta_dataset_readers.loader import OrderedLoader
from meta_dataset_readers.transforms import CROP_AREA, CROP_RATIO, CROP_TRIES, planes, widest_box

Transform = Callable[[Image.Image, torch.Generator], np.ndarray]

_PADDING = 4  # pixels on each side, of which a random crop takes none to all; the same at every size

_VALIDATION = 1  # sets the choice of validation pictures apart from other choices by the same seed


# --- splits ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Splits:
    """A data set: pictures to train on, to choose by, and to report. No picture is in two of them."""

    name: str
    class_names: tuple[str, ...]
    train: Labelled
    validation: Labelled
    test: Labelled


def open_splits(name: str, folder: Path, validation: float = 0.1, seed: int = 0) -> Splits:
    """The data set `name` in `folder`, see `datasets.open_dataset`; no picture is decoded.

    `validation` is the share of each class of the training set that is set aside, rounded: at least one
    picture of a class of two or more, never the last one. 0 sets nothing aside; a folder with pictures for
    validation of its own gives these instead, for any other share. `seed` chooses them; what is tested on is
    the same for every seed.

    Raises InputError as `open_dataset`, and for a share outside [0, 1).
    """
    if not 0 <= validation < 1:
        raise InputError(f"validation {validation}: expected a share of the training set, 0 <= share < 1")
    opened = open_dataset(name, folder)
    train, held_out = opened.train, opened.validation
    if validation == 0:
        held_out = Chosen(train, np.empty(0, np.int64))
    elif held_out is None:

        def share(n: int) -> int:
            return min(max(1, round(validation * n)), n - 1)

        chosen, others = choose_per_class(train.labels, share, (seed, _VALIDATION))
        train, held_out = Chosen(train, others), Chosen(train, chosen)
    name = known(name).name
    return Splits(
        folder.resolve().name if name == "imagefolder" else name,
        opened.class_names,
        train,
        held_out,
        opened.test,
    )


# --- transforms ------------------------------------------------------------------------------------------


def transforms(image_size: int, high_resolution: bool) -> tuple[Transform, Transform]:
    """The published (training, test) transforms: RGB pictures of any size to uint8 (3, S, S), a quarter of
    the size of numbers to send from process to process.

    Low resolution: resized to S x S; for training a random crop of that, padded by 4 black pixels on each
    side, and a flip. High resolution: the shorter side to 256/224 S; for training a random resized crop and
    a flip, for the test the centre. Resizing is bilinear with antialiasing, as torchvision's on pictures.
    The generator is the only source of randomness; tests draw nothing from it.
    """
    views = (_random_resized_crop, _centre_crop) if high_resolution else (_padded_crop, _resized_pixels)
    train, test = (functools.partial(view, image_size) for view in views)
    return train, test


def _resized_pixels(size: int, image: Image.Image, _generator: torch.Generator) -> np.ndarray:
    return planes(_resized(image, size, size))


def _padded_crop(size: int, image: Image.Image, generator: torch.Generator) -> np.ndarray:
    padded = np.zeros((3, size + 2 * _PADDING, size + 2 * _PADDING), np.uint8)
    padded[:, _PADDING:-_PADDING, _PADDING:-_PADDING] = planes(_resized(image, size, size))
    top, left, flip = _integers(generator, 2 * _PADDING + 1, 2 * _PADDING + 1, 2)
    crop = padded[:, top : top + size, left : left + size]
    return crop[:, :, ::-1] if flip else crop


def _centre_crop(size: int, image: Image.Image, _generator: torch.Generator) -> np.ndarray:
    image = _shorter_side_resized(image, size)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return planes(image.crop((left, top, left + size, top + size)))


def _random_resized_crop(size: int, image: Image.Image, generator: torch.Generator) -> np.ndarray:
    image = _shorter_side_resized(image, size)
    crop = planes(
        image.crop(_random_box(image.width, image.height, generator)).resize((size, size), _BILINEAR)
    )
    return crop[:, :, ::-1] if _integers(generator, 2)[0] else crop


_BILINEAR = Image.Resampling.BILINEAR


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), _BILINEAR)


def _shorter_side_resized(image: Image.Image, size: int) -> Image.Image:
    shorter = round(256 * size / 224)
    if image.height < image.width:
        return _resized(image, shorter * image.width // image.height, shorter)
    return _resized(image, shorter, shorter * image.height // image.width)


def _random_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of torchvision's RandomResizedCrop."""
    areas = torch.empty(CROP_TRIES).uniform_(*CROP_AREA, generator=generator) * (width * height)
    ratios = torch.empty(CROP_TRIES).uniform_(*map(np.log, CROP_RATIO), generator=generator).exp()
    wide, high = (areas * ratios).sqrt().round().int(), (areas / ratios).sqrt().round().int()
    for w, h in zip(wide.tolist(), high.tolist(), strict=True):
        if 0 < w <= width and 0 < h <= height:
            left, top = _integers(generator, width - w + 1, height - h + 1)
            return left, top, left + w, top + h
    return widest_box(width, height)


def _integers(generator: torch.Generator, *bounds: int) -> list[int]:
    """For each bound an integer in 0..bound-1."""
    draws = torch.rand(len(bounds), dtype=torch.float64, generator=generator).tolist()
    return [int(draw * bound) for draw, bound in zip(draws, bounds, strict=True)]


# --- batches ---------------------------------------------------------------------------------------------


def batches(
    part: Labelled,
    transform: Transform,
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> "Batches":
    """All pictures of `part` once: an iterable of (images, labels, indices), as often as it is asked for.

    Images are float32 (n, 3, S, S) in [0, 1], labels and indices (into `part`) int64 (n,). The order, if
    `shuffle`, is a function of (seed, epoch), what `transform` draws for picture i of (seed, epoch, i).
    `start` batches at the beginning are left out: those that a run to be resumed has seen. The last batch may
    be short. `len()` is the number of batches from `start` on. With `workers` processes (0: this one)
    batches are prepared ahead; torch's global generator is left alone. Images and labels come on `device`.

    Raises InputError while iterating for a picture at fault.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(part)) if shuffle else np.arange(len(part))
    return Batches(_Source(part, transform, batch_size, (seed, epoch), order), start, workers, Feed(device))


class Batches:
    """See `batches`."""

    def __init__(self, source: "_Source", start: int, workers: int, feed: Feed):
        self._source, self._start, self._workers, self._feed = source, start, workers, feed

    def __len__(self) -> int:
        return max(0, len(self._source) - self._start)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        left = Subset(self._source, range(self._start, self._start + len(self)))
        for images, labels, indices in OrderedLoader(left, self._workers):
            yield self._feed.images(images), self._feed.send(labels), indices


@dataclasses.dataclass(frozen=True)
class _Source(Dataset):
    """Batches by number; pixels stay uint8, since shared memory is dear."""

    part: Labelled
    transform: Transform
    batch_size: int
    key: tuple[int, int]  # seed, epoch
    order: np.ndarray

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        indices = torch.from_numpy(self.order[batch * self.batch_size : (batch + 1) * self.batch_size])
        generator = torch.Generator()
        images = [
            self.transform(self.part.image(index), generator.manual_seed(picture_seed(*self.key, index)))
            for index in indices.tolist()
        ]
        return torch.from_numpy(np.stack(images)), self.part.labels[indices], indices


def picture_seed(*key: int) -> int:
    """A seed in 0..2^63-1 for what is random about a picture, by a key of integers >= 0. A digest, and not
    the cheaper mixture of `models.weights.stream`, as pictures are many: neighbours must have unrelated
    seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
