"""From a picture to a tensor in [0, 1]: the published transforms, without normalisation.

Hu et al., "Pushing the Limits of Simple Pipelines for Few-Shot Learning" (CVPR 2022). Randomness is an
argument. Does not know records, classes or episodes.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from meta_dataset_readers.pictures import RECORD_FORMATS, as_published, opened_image

CROP_AREA = (0.08, 1.0)  # of the picture
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10
_JITTER = 0.4
_JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # in this order

_REDUCTIONS = (8, 4, 2)  # that libjpeg can decode at: 8 makes one pixel of a block

_Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def eval_transform(image: Image.Image, image_size: int, resize: str = "shorter") -> Tensor:
    """The centre of `image`, first resized a little larger than `image_size` by the rule `resize`.

    Returns a float32 tensor (3, image_size, image_size) in [0, 1].
    """
    return unit_range(planes(eval_crop(image, image_size, resize)))


def eval_crop(image: Image.Image, image_size: int, resize: str = "shorter") -> Image.Image:
    """`eval_transform` as a picture."""
    resized = image.resize(RESIZES[resize](*image.size, image_size), Image.Resampling.BILINEAR)
    return resized.crop(_centre(*resized.size, image_size))


def _centre(width: int, height: int, image_size: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) in the middle."""
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return left, top, left + image_size, top + image_size


def _shorter_side(width: int, height: int, image_size: int) -> tuple[int, int]:
    shorter = image_size * 256 // 224
    if height < width:
        return shorter * width // height, shorter
    return shorter, shorter * height // width


def _square(_width: int, _height: int, image_size: int) -> tuple[int, int]:
    return (int(image_size * 1.15),) * 2


def _exact(_width: int, _height: int, image_size: int) -> tuple[int, int]:
    return image_size, image_size


# How evaluation resizes before it crops the centre: PMF's way, the shorter side to 256/224 of the image size;
# that of BSCD-FSL and the fine-grained sets, both sides to 1.15 of it, whatever the aspect ratio; and PMF's
# for CIFAR-FS and mini-ImageNet, to the very image size, which leaves nothing to crop.
RESIZES = {"shorter": _shorter_side, "square": _square, "exact": _exact}


def train_crop(image: Image.Image, image_size: int, rng: np.random.Generator) -> Image.Image:
    """A random resized crop of `image`, colours jittered by up to 40 %, flipped with probability 1/2."""
    crop = image.crop(_random_box(image.width, image.height, rng))
    return _recoloured(crop.resize((image_size, image_size), Image.Resampling.BILINEAR), rng)


def _recoloured(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Jittered in colour, and perhaps flipped."""
    for enhance in _JITTERED:
        image = enhance(image).enhance(1 + _JITTER * (2 * rng.random() - 1))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of torchvision's RandomResizedCrop, drawn from `rng`."""
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return widest_box(width, height)


def widest_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred box of a shape that a crop may have, of a picture too elongated for another."""
    w = max(1, min(width, round(height * CROP_RATIO[1])))
    h = max(1, min(height, round(width / CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def reduced_eval_crop(data: bytes, image_size: int, resize: str = "shorter") -> Image.Image:
    """About `eval_crop(decode_image(data), ...)`, sooner: see `_reduced`. Raises UnreadableImage."""

    def region(width: int, height: int) -> _Box:
        wide, high = RESIZES[resize](width, height, image_size)
        left, top, right, bottom = _centre(wide, high, image_size)
        return left * width / wide, top * height / high, right * width / wide, bottom * height / high

    return _reduced(data, region, image_size)


def reduced_train_crop(data: bytes, image_size: int, rng: np.random.Generator) -> Image.Image:
    """About `train_crop(decode_image(data), ...)`, sooner: see `_reduced`. Raises UnreadableImage."""
    return _recoloured(_reduced(data, lambda width, height: _random_box(width, height, rng), image_size), rng)


def _reduced(data: bytes, region: Callable[[int, int], _Box], image_size: int) -> Image.Image:
    """The region of a picture that `region(width, height)` names, resized to `image_size` x `image_size`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its scale if the region still has that many pixels in both
    directions: libjpeg then leaves out the finest cosines of each block. Photographs change by 1 to 3 grey
    levels of 255 on average, one pixel in a hundred by 5 to 20, white noise by 6 and 20. At full scale a
    value changes by 1 now and then; but resizing looks beyond the edge of a random crop, which it otherwise
    does not.
    """
    with opened_image(data, RECORD_FORMATS) as image:
        width, height = image.size
        left, top, right, bottom = region(width, height)
        at_most = min(right - left, bottom - top) / image_size
        reduction = next((k for k in _REDUCTIONS if k <= at_most), 1)
        if image.draft(None, (width // reduction, height // reduction)) is None:  # not a JPEG
            reduction = 1
        picture = as_published(image)
    box = (left / reduction, top / reduction, right / reduction, bottom / reduction)
    return picture.resize((image_size, image_size), Image.Resampling.BILINEAR, box)


def planes(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB picture: uint8, (3, H, W), a view."""
    return np.asarray(image).transpose(2, 0, 1)


def unit_range(pixels: np.ndarray) -> Tensor:
    """uint8 pixels of any shape as a new, contiguous float32 tensor in [0, 1]."""
    return torch.from_numpy(np.divide(pixels, 255, dtype=np.float32, order="C"))
