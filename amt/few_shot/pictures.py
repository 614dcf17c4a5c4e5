"""From whatever somebody has to images of one size: folders, files, PIL pictures, arrays and tensors.

Pictures are resized and cropped as evaluation does it for folders of one's own: the shorter side to 256/224
of the image size, then the centre. Floating-point images that have the image size already are taken as they
are, as those of an episode are. Knows no network.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from meta_dataset_readers.errors import InputError, blaming
from meta_dataset_readers.files import folder_names
from meta_dataset_readers.folders import class_files, class_folders
from meta_dataset_readers.pictures import (
    UnreadableImage,
    check_size,
    picture_names,
    read_picture,
    upright,
)
from meta_dataset_readers.transforms import eval_crop, eval_transform

MOST_SUPPORT = 2000  # images; Meta-Dataset's largest support sets have 500, and all are held at once

_EXPECTED = (
    "expected a folder, paths, PIL pictures, uint8 arrays (N, H, W, 3), or floating-point images in [0, 1]"
)
_CHANNELS = (1, 3, 4)


def listed(x: Any) -> list[Any]:
    """The single images of `x`, none of them read.

    Args:
        x: a folder of image files, a path, a PIL picture, an array or tensor of one image or of N, or any
            sequence of these.

    Raises:
        InputError: a folder without pictures, a table, or something else that holds no images.
    """
    if isinstance(x, str | Path):
        return _in_folder(Path(x)) if Path(x).is_dir() else [Path(x)]
    if isinstance(x, Image.Image):
        return [x]
    if isinstance(x, Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OUS"):
        return _split(x)
    if not isinstance(x, Iterable) or isinstance(x, bytes | dict):
        raise InputError(f"{_EXPECTED}, got {_named(x)}")
    return [Path(each) if isinstance(each, str) else each for each in x]


def _in_folder(folder: Path) -> list[Path]:
    names = picture_names(folder)
    if not names:
        inner = folder_names(folder)
        seen = f"but {len(inner)} folders, such as {inner[0]!r}" if inner else "expected image files"
        raise InputError(f"{folder}: no picture in it, {seen}")
    return [folder / name for name in names]


def _split(x: Tensor | np.ndarray) -> list[Any]:
    shape = tuple(x.shape)
    if len(shape) == 4:
        return list(x)
    if len(shape) == 3 and (shape[0] in _CHANNELS or shape[-1] in _CHANNELS):
        return [x]
    raise InputError(f"{_EXPECTED}, got {_named(x)}; grey pictures need an axis of channels, (N, H, W, 1)")


def _named(x: object) -> str:
    shape = tuple(getattr(x, "shape", ()))
    return f"{type(x).__name__} of shape {shape}" if shape else f"a {type(x).__name__}"


def images(items: Sequence[Any], image_size: int) -> Tensor:
    """The images of `listed`: (N, 3, S, S) float32 in [0, 1], on the CPU.

    Raises:
        InputError: one cannot be read; the message names it, a file by its path and others by their number.
    """
    if not items:
        raise InputError("no images: found array with 0 sample(s), expected 1 or more")
    return torch.stack([image(item, image_size, f"image {n}") for n, item in enumerate(items)])


def batches(items: Sequence[Any], image_size: int, size: int) -> Iterator[Tensor]:
    """The same in parts of at most `size` images (n, 3, S, S), each read when it is its turn."""
    for begin in range(0, len(items), size):
        yield images(items[begin : begin + size], image_size)


def image(item: Any, image_size: int, where: str = "image") -> Tensor:
    """One image of `listed`: (3, S, S) float32 in [0, 1].

    Args:
        where: begins the message about an image that is in no file.

    Raises:
        InputError: it cannot be read, or it shows nothing.
    """
    if isinstance(item, str | Path):
        return eval_transform(read_picture(Path(item), visible), image_size)
    with blaming(where, (UnreadableImage, OSError)):
        if isinstance(item, Image.Image):
            check_size(*item.size)
            return eval_transform(visible(item), image_size)
        return _of_pixels(_channels_last(item), image_size)


def visible(picture: Image.Image) -> Image.Image:
    """`upright`, which shows white where a picture is transparent. Raises UnreadableImage if that leaves
    nothing to see."""
    found = upright(picture)
    if picture.has_transparency_data and not np.ptp(np.asarray(found), (0, 1)).any():
        raise UnreadableImage("it is transparent, and nothing of it is seen on white")
    return found


def _channels_last(item: Any) -> np.ndarray:
    """Pixels (H, W, C) of one image of an array or tensor, whose channels come first or last."""
    if not isinstance(item, np.ndarray | Tensor):
        raise UnreadableImage(f"{_EXPECTED}, got {_named(item)}")
    shape, first = tuple(item.shape), isinstance(item, Tensor)
    pixels = item.detach().cpu().numpy() if isinstance(item, Tensor) else item
    if len(shape) == 3:
        for axis in (0, -1) if first else (-1, 0):
            if shape[axis] in _CHANNELS:
                found = np.moveaxis(pixels, axis, -1)
                check_size(found.shape[1], found.shape[0])
                return found
    raise UnreadableImage(f"expected an image (H, W, 3) or (3, H, W), got {_named(item)}")


def _of_pixels(pixels: np.ndarray, image_size: int) -> Tensor:
    """An image (H, W, C) of an array, as a picture would be prepared."""
    channels = pixels.shape[-1]
    if pixels.dtype == np.uint8:
        squeezed = np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)
        return eval_transform(visible(Image.fromarray(squeezed)), image_size)
    if pixels.dtype.kind != "f":
        raise UnreadableImage(f"values are {pixels.dtype}, expected uint8, or floating-point in [0, 1]")
    if channels == 4:
        raise UnreadableImage("4 channels of floating-point numbers, expected 1 or 3")
    if not np.isfinite(pixels).all():
        raise UnreadableImage("holds NaN or infinity, expected numbers in [0, 1]")
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        raise UnreadableImage(f"values from {low:.4g} to {high:.4g}, expected [0, 1]")
    planes = np.moveaxis(pixels.astype(np.float32), -1, 0)
    if planes.shape[1:] != (image_size, image_size):
        planes = np.stack([np.asarray(eval_crop(Image.fromarray(plane), image_size)) for plane in planes])
        planes = planes.clip(0, 1)  # rounding may leave the range
    found = torch.from_numpy(np.ascontiguousarray(planes))
    return found.expand(3, -1, -1).contiguous() if channels == 1 else found


def labelled(x: Any, y: Any = None) -> tuple[list[Any], np.ndarray]:
    """The single images of `x`, none of them read, with a label for each.

    Args:
        x: as of `listed`; without `y` a folder of class folders, whose names are the labels.
        y: N labels: texts or numbers.

    Raises:
        InputError: no labels, or another number of them than images.
    """
    if y is None:
        if not (isinstance(x, str | Path) and Path(x).is_dir()):
            raise InputError(
                "requires y to be passed, but the target y is None; expected labels, or as X a folder of "
                "class folders"
            )
        return in_class_folders(Path(x))
    items, labels = listed(x), np.asarray(y)
    if labels.ndim != 1 or len(labels) != len(items):
        raise InputError(f"{len(items)} images with labels of shape {labels.shape}, expected ({len(items)},)")
    return items, labels


def in_class_folders(folder: Path) -> tuple[list[Any], np.ndarray]:
    """The image files in one folder per class, by sorted name, and the names of their classes.

    Raises:
        InputError: there is no class folder, or one without a picture; what was probably meant is named.
    """
    if folder.is_dir() and not folder_names(folder) and picture_names(folder):
        above = folder.absolute().parent
        raise InputError(
            f"{folder}: holds pictures, expected one folder of image files per class; "
            f"if it is one of the classes, give the folder above: {above}"
        )
    classes = [class_files(folder, name) for name in class_folders(folder)]
    files: list[Any] = [folder / file for each in classes for file in each.files]
    return files, np.array([each.name for each in classes for _ in each.files])
