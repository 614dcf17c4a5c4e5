"""The 15 common corruptions at 5 severities (Hendrycks and Dietterich, ICLR 2019), and their mean accuracies.

For CIFAR they are files, CIFAR-10-C and CIFAR-100-C; for other test sets they are made picture by picture by
a library that is an optional extra. Knows corrupted test sets; does not know networks.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from amt.data.labelled import ArrayImages, Labelled
from amt.data.loading import picture_seed, transforms
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.files import map_array

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = 5
LIBRARY = "imagecorruptions-imaug"  # as pip knows it

_SMALLEST = 32  # pixels a side, of pictures that the library corrupts
_SEEDED = ("impulse_noise", "glass_blur")  # draw from generators of their own, which take a seed

Corrupted = dict[str, list[Labelled]]  # five test sets for each corruption, severity 1 first


# --- CIFAR-10-C and CIFAR-100-C --------------------------------------------------------------------------


def open_corrupted(folder: Path, n_classes: int) -> Corrupted:
    """CIFAR-10-C or CIFAR-100-C: `folder` holds NAME.npy for each of the 15 corruptions, and labels.npy.

    A file is uint8, (5 n, 32, 32, 3), the n test pictures at severity 1, then 2, to 5; labels are (5 n,).
    Files are mapped into memory, not read.

    Raises InputError for the first file that is missing or of another shape or type, and for a label that is
    not in 0..n_classes-1.
    """
    labels_file = folder / "labels.npy"
    labels = _mapped(labels_file)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or len(labels) % SEVERITIES:
        expected = f"integers, as many as {SEVERITIES} times the test pictures"
        raise InputError(f"{labels_file}: {labels.dtype} {labels.shape}, expected {expected}")
    outside = labels[(labels < 0) | (labels >= n_classes)]
    if len(outside):
        raise InputError(f"{labels_file}: label {outside[0]}, expected 0 to {n_classes - 1}")
    return {name: _by_severity(folder / f"{name}.npy", np.asarray(labels)) for name in CORRUPTIONS}


def _by_severity(file: Path, labels: np.ndarray) -> list[Labelled]:
    pixels = _mapped(file)
    if pixels.shape != (len(labels), 32, 32, 3) or pixels.dtype != np.uint8:
        expected = f"uint8 {(len(labels), 32, 32, 3)}"
        raise InputError(f"{file}: {pixels.dtype} {pixels.shape}, expected {expected}")
    parts = zip(np.split(pixels, SEVERITIES), np.split(labels, SEVERITIES), strict=True)
    return [ArrayImages(*part, f"{file}, severity {severity}") for severity, part in enumerate(parts, 1)]


def _mapped(file: Path) -> np.ndarray:
    expected = "expected it in the folder that CIFAR-10-C or CIFAR-100-C unpacks to"
    origin = "get them from https://zenodo.org/records/2535967 and https://zenodo.org/records/3555552"
    return map_array(file, what=f"file, {expected}; {origin}")


# --- made by a library -----------------------------------------------------------------------------------


def corrupted(part: Labelled, image_size: int, high_resolution: bool, seed: int = 0) -> Corrupted:
    """The pictures of `part` as the test transform of `data.transforms` shows them, corrupted when asked for.

    They have `image_size` x `image_size` pixels already: read them with `transforms(image_size, False)[1]`.
    Picture i is a function of (seed, corruption, severity, i).

    Raises InputError where the library is not installed, and for an `image_size` below 32.
    """
    if image_size < _SMALLEST:
        raise InputError(
            f"image size {image_size}: corruptions are made of {_SMALLEST} pixels or more a side"
        )
    _library()
    return {
        name: [
            _CorruptedImages(part, name, severity, image_size, high_resolution, seed)
            for severity in range(1, SEVERITIES + 1)
        ]
        for name in CORRUPTIONS
    }


class _CorruptedImages(Labelled):
    def __init__(
        self, clean: Labelled, name: str, severity: int, image_size: int, high_resolution: bool, seed: int
    ):
        self.clean, self.labels = clean, clean.labels
        self.name, self.severity, self.seed = name, severity, seed
        self._view = transforms(image_size, high_resolution)[1]

    def image(self, index: int) -> Image.Image:
        pixels = self._view(self.clean.image(index), torch.Generator()).transpose(1, 2, 0)
        seed = picture_seed(self.seed, CORRUPTIONS.index(self.name), self.severity, index) % 2**32
        arguments = {"seed": seed} if self.name in _SEEDED else {}
        with _numpy_seeded(seed):
            # The library refuses arrays with gaps.
            made = _library().corrupt(
                np.ascontiguousarray(pixels), self.severity, corruption_name=self.name, **arguments
            )
        return Image.fromarray(made)

    def origin(self, index: int) -> str:
        return f"{self.clean.origin(index)}, {self.name} {self.severity}"


def _library():
    try:
        import imagecorruptions
    except ImportError as error:
        hint = f"pip install {LIBRARY}"
        raise InputError(f"corruptions need the package {LIBRARY} ({error}): {hint}") from error
    return imagecorruptions


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, from which the library draws; afterwards it is as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
