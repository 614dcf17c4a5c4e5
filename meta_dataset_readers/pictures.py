"""From bytes or a file to an RGB picture.

Knows which encodings are read, and that a picture of foreign origin may claim any size. As in every
published loader, the EXIF orientation is not applied, except by `upright`. Does not know classes, transforms
or tensors.
"""

import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from meta_dataset_readers.errors import DamagedRecord
from meta_dataset_readers.files import is_no_folder, listing, read_bytes

RECORD_FORMATS = ("JPEG", "PNG", "BMP", "GIF")  # what Meta-Dataset's own decoder takes
FILE_FORMATS = (*RECORD_FORMATS, "PPM", "TIFF", "WEBP")  # what a single image file may hold as well
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # in either case

_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose pictures of more than 8 bits PIL scales to 16
_MOST_PIXELS = 64 * 2**20  # of a picture before resizing; the largest real ones have about 20 million
_MOST_ELONGATED = 100  # longer side / shorter side: resizing the shorter side must not make the longer huge
_LARGEST_FILE = 256 * 2**20  # bytes; the largest picture that is decoded has 192 MiB of uncompressed RGB

Prepare = Callable[[Image.Image], Image.Image]  # of a protocol that changes a picture in its own mode


class UnreadableImage(ValueError):
    """The bytes are not a picture we read; the message says why in one line."""


def decode_image(
    data: bytes, formats: tuple[str, ...] = RECORD_FORMATS, prepare: Prepare | None = None
) -> Image.Image:
    """The RGB picture encoded in `data` in one of `formats` (PIL's names), see `as_rgb`.

    Of several frames it is the first. `prepare` is for a protocol that changes the picture in its own mode,
    before PIL converts it to RGB.

    Raises UnreadableImage for other formats, damaged or truncated data, and pictures so large or elongated
    that decoding or resizing them would exhaust the memory; their size is read before their pixels.
    """
    with opened_image(data, formats) as image:
        if prepare is None:
            return as_rgb(image)
        prepared = prepare(image)
        return prepared if prepared.mode == "RGB" else prepared.convert("RGB")


@contextlib.contextmanager
def opened_image(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """The picture encoded in `data`, its size checked, to be decoded within the context: whatever goes wrong
    until its end is an UnreadableImage."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            check_size(*image.size)
            yield image
    except UnreadableImage:
        raise
    except Exception as error:  # whatever a codec raises on foreign bytes, from OSError to SyntaxError
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"none of {', '.join(formats)}"
        raise UnreadableImage(f"the image of {len(data)} bytes cannot be decoded: {reason}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB with 8 bits: 16-bit grey is scaled, what is transparent shows white.

    Opaque pictures of 8 bits are converted as PIL does. Raises UnreadableImage for pixels without a known
    range (32-bit integers, floating point), of which PIL would make white.
    """
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        grey = np.asarray(image.convert("I")).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
        raise UnreadableImage(f"its pixels are {kind} of unknown range, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # PIL would copy a picture that is in RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def as_published(image: Image.Image) -> Image.Image:
    """A picture as RGB the way published loaders of records convert it: by PIL alone, whose 16-bit grey is
    clipped and whose transparency is dropped."""
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The picture as RGB, turned as its EXIF orientation says: published loaders do not look at that, so this
    is for one's own pictures."""
    return as_rgb(ImageOps.exif_transpose(image) if is_turned(image) else image)


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF orientation says that the picture is to be turned before it is shown."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # whatever damaged EXIF data raise: the picture may be sound
        return False


def check_size(width: int, height: int) -> None:
    """Raises UnreadableImage for a picture without pixels, or one too large or too elongated to resize."""
    if width < 1 or height < 1 or width * height > _MOST_PIXELS:
        raise UnreadableImage(f"an image of {width} x {height} pixels, 1 to {_MOST_PIXELS} are read")
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        found = f"an image of {width} x {height} pixels"
        raise UnreadableImage(f"{found}, sides of at most {_MOST_ELONGATED}:1 are read")


def picture_names(directory: Path) -> list[str]:
    """The image files in `directory` by their endings, sorted, without hidden ones; pipes, devices and links
    that lead nowhere are among them, and `read_picture` says what is wrong with each.

    Raises InputError if it cannot be listed.
    """
    return listing(directory, lambda entry: entry.name.lower().endswith(EXTENSIONS) and is_no_folder(entry))


def other_endings(directory: Path) -> Counter[str]:
    """The files in `directory` that `picture_names` leaves out, counted by their endings in lower case.

    Raises InputError if it cannot be listed.
    """
    left_out = listing(directory, is_no_folder, any_name=True)
    endings = (os.path.splitext(name.lower())[1] or "no ending" for name in left_out)
    return Counter(ending for ending in endings if ending not in EXTENSIONS)


def picture_bytes(path: Path) -> bytes:
    """What the image file `path` holds. Raises DamagedRecord: its neighbours may be sound."""
    return read_bytes(path, _LARGEST_FILE, DamagedRecord)


def read_picture(path: Path, prepare: Prepare | None = None) -> Image.Image:
    """The RGB picture in the image file `path`. Raises DamagedRecord, naming it."""
    return decoded(picture_bytes(path), str(path), FILE_FORMATS, prepare)


def decoded(
    data: bytes, where: str, formats: tuple[str, ...] = RECORD_FORMATS, prepare: Prepare | None = None
) -> Image.Image:
    """`decode_image`, raising a DamagedRecord that begins with `where` for any other content."""
    try:
        return decode_image(data, formats, prepare)
    except UnreadableImage as error:
        raise DamagedRecord(f"{where}: {error}") from error
