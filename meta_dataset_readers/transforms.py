"""From the bytes of a picture to a tensor in [0, 1]: the published transforms, without normalisation.

Hu et al., "Pushing the Limits of Simple Pipelines for Few-Shot Learning" (CVPR 2022). Randomness is an
argument. Does not know records, classes or episodes. As in every published loader, the EXIF orientation
is not applied.
"""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

_FORMATS = ("JPEG", "PNG", "BMP", "GIF")  # what Meta-Dataset's own decoder takes
_MOST_PIXELS = 64 * 2**20  # of a picture before resizing; the largest real ones have about 20 million
_MOST_ELONGATED = 100  # longer side / shorter side: resizing the shorter side must not make the longer huge

_CROP_AREA = (0.08, 1.0)  # of the picture
_CROP_RATIO = (3 / 4, 4 / 3)  # width / height
_CROP_TRIES = 10
_JITTER = 0.4
_JITTERED = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # in this order


class UnreadableImage(ValueError):
    """The bytes are not a picture we read; the message says why in one line."""


def decode_image(data: bytes) -> Image.Image:
    """The RGB picture encoded in `data` (JPEG, PNG, BMP, or the first frame of a GIF), identical to PIL's.

    Raises UnreadableImage for other formats, damaged or truncated data, and pictures so large or elongated
    that decoding or resizing them would exhaust the memory; their size is read before their pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            return image.convert("RGB")
    except UnreadableImage:
        raise
    except Exception as error:  # whatever a codec raises on foreign bytes, from OSError to SyntaxError
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"none of {', '.join(_FORMATS)}"
        raise UnreadableImage(f"the image of {len(data)} bytes cannot be decoded: {reason}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise UnreadableImage(f"an image of {width} x {height} pixels, at most {_MOST_PIXELS} are read")
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        found = f"an image of {width} x {height} pixels"
        raise UnreadableImage(f"{found}, sides of at most {_MOST_ELONGATED}:1 are read")


def eval_transform(image: Image.Image, image_size: int, resize: str = "shorter") -> Tensor:
    """The centre of `image`, first resized a little larger than `image_size` by the rule `resize`.

    Returns a float32 tensor (3, image_size, image_size) in [0, 1].
    """
    scale_to = RESIZES[resize](*image.size, image_size)
    resized = image.resize(scale_to, Image.Resampling.BILINEAR)
    left, top = round((resized.width - image_size) / 2), round((resized.height - image_size) / 2)
    return _to_tensor(resized.crop((left, top, left + image_size, top + image_size)))


def _shorter_side(width: int, height: int, image_size: int) -> tuple[int, int]:
    shorter = image_size * 256 // 224
    if height < width:
        return shorter * width // height, shorter
    return shorter, shorter * height // width


def _square(_width: int, _height: int, image_size: int) -> tuple[int, int]:
    return (int(image_size * 1.15),) * 2


# How evaluation resizes before it crops the centre: PMF's way, the shorter side to 256/224 of the image size,
# and that of BSCD-FSL and the fine-grained sets, both sides to 1.15 of it, whatever the aspect ratio.
RESIZES = {"shorter": _shorter_side, "square": _square}


def train_transform(image: Image.Image, image_size: int, rng: np.random.Generator) -> Tensor:
    """A random resized crop of `image`, colours jittered by up to 40 %, flipped with probability 1/2.

    Returns a float32 tensor (3, image_size, image_size) in [0, 1].
    """
    crop = image.crop(_random_box(image.width, image.height, rng))
    image = crop.resize((image_size, image_size), Image.Resampling.BILINEAR)
    for enhance in _JITTERED:
        image = enhance(image).enhance(1 + _JITTER * (2 * rng.random() - 1))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_tensor(image)


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of torchvision's RandomResizedCrop, drawn from `rng`."""
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*_CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    # Too elongated for any such crop: the largest centred box of an admissible shape.
    w = max(1, min(width, round(height * _CROP_RATIO[1])))
    h = max(1, min(height, round(width / _CROP_RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) uint8, a copy: PIL's own memory is read-only
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div(255)
