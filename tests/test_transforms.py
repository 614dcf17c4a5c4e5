"""Pictures: decoded as PIL does, transformed as PMF does, and refused when they are no pictures."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from meta_dataset_readers.pictures import FILE_FORMATS, UnreadableImage, decode_image
from meta_dataset_readers.transforms import eval_transform, planes, train_crop, unit_range


def picture(width=40, height=30, mode="RGB", seed=0):
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def train_transform(image, image_size, generator):
    """An image (3, S, S) in [0, 1], as a reader gives it."""
    return unit_range(planes(train_crop(image, image_size, generator)))


def encoded(image, format):
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_png_of_any_mode_becomes_rgb(mode):
    image = picture(mode=mode)
    if mode == "RGBA":
        image.putalpha(255)
    decoded = decode_image(encoded(image, "PNG"))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.array(decoded), np.array(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(format):
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    decoded = np.array(decode_image(encoded(Image.fromarray(grey), format), FILE_FORMATS))
    assert decoded.shape == (32, 32, 3) and (decoded == decoded[..., :1]).all()
    assert np.abs(decoded[..., 0] - grey / 257).max() <= 0.5


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(kind):
    image = Image.fromarray(np.full((8, 8), 7, kind))
    with pytest.raises(UnreadableImage, match="of unknown range, expected 8 or 16 bits"):
        decode_image(encoded(image, "TIFF"), FILE_FORMATS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image = image.convert(mode)
    decoded = np.array(decode_image(encoded(image, "PNG")))
    assert (decoded[:, :4] == 255).all() and (decoded[:, 4:] == 0).all()


@pytest.mark.parametrize("format", ["JPEG", "BMP", "GIF"])
def test_the_other_formats_are_decoded_as_by_pil(format):
    data = encoded(picture(), format)
    assert np.array_equal(np.array(decode_image(data)), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_orientation_tag_is_not_applied():
    image = picture(40, 30)
    image.getexif()[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=image.getexif())
    assert decode_image(stream.getvalue()).size == (40, 30)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "0 bytes cannot be decoded: none of JPEG"),
        (b"some text", "none of JPEG"),
        (encoded(picture(), "TIFF"), "none of JPEG"),
        (encoded(picture(), "JPEG")[:200], "cannot be decoded"),
        (encoded(picture(), "JPEG")[:20], "cannot be decoded"),
        (encoded(picture(300, 2), "PNG"), "300 x 2 pixels, sides of at most 100:1"),
    ],
)
def test_what_is_not_a_whole_picture_is_refused_in_one_line(data, complaint):
    with pytest.raises(UnreadableImage, match=complaint) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [8193, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(UnreadableImage, match=r"pixels|bomb"):
        decode_image(png)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_picture_is_decoded_or_refused_and_nothing_worse(data):
    content = bytearray(encoded(picture(), data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP"]))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnreadableImage):
        assert decode_image(bytes(content)).mode == "RGB"


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (37, 37), (9, 48), (5, 3), (1, 1), (250, 101)])
@pytest.mark.parametrize("image_size", [14, 32, 84])
def test_the_evaluation_transform_is_torchvisions_resize_and_crop(size, image_size):
    image = picture(*size)
    expected = center_crop(resize(image, int(image_size * 256 / 224)), image_size)
    found = eval_transform(image, image_size)
    assert torch.equal(found, pil_to_tensor(expected).float() / 255)
    assert found.shape == (3, image_size, image_size) and found.is_contiguous()


@settings(max_examples=60)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    image_size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_the_training_transform_keeps_shape_and_range_and_follows_its_generator(
    width, height, image_size, seed
):
    image = picture(width, height)
    first, again = (train_transform(image, image_size, np.random.default_rng(seed)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, image_size, image_size) and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1


def test_the_training_transform_leaves_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    train_transform(picture(), 16, np.random.default_rng(0))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_training_crops_are_distributed_as_torchvisions():
    """Mean position and extent of the crop, read off a picture whose colours are its coordinates."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], -1
    )
    image = Image.fromarray(pixels)

    def extents(crops):
        return np.array(
            [[c[0].max() - c[0].min(), c[1].max() - c[1].min(), c[0].mean(), c[1].mean()] for c in crops]
        )

    class NoJitter(np.random.Generator):
        """Draws 1/2 where the transform asks for a colour factor (or for a flip, which then is left out)."""

        def random(self):
            return 0.5

    n = 300
    ours = extents([train_transform(image, 16, NoJitter(np.random.PCG64(i))).numpy() for i in range(n)])
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(16)
    theirs = extents([pil_to_tensor(crop(image)).numpy() / 255 for _ in range(n)])
    error = np.sqrt((ours.var(0) + theirs.var(0)) / n)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()


def test_jitter_and_flip_happen():
    grey = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    levels = [float(train_transform(grey, 4, np.random.default_rng(i)).mean()) for i in range(200)]
    assert min(levels) < 0.27 and max(levels) > 0.52  # 100/255 is 0.39, brightness factors lie in 0.6..1.4
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    brighter_right = [
        bool(t[:, :, -1].mean() > t[:, :, 0].mean())
        for t in (train_transform(Image.fromarray(halves), 8, np.random.default_rng(i)) for i in range(200))
        if t[:, :, -1].mean() != t[:, :, 0].mean()
    ]
    assert 0.3 < np.mean(brighter_right) < 0.7
