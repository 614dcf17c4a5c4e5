"""Corrupted test sets: the files of CIFAR-10-C, those a library makes, and the means that are reported."""

import sys

import numpy as np
import pytest
import torch
from conftest import fails
from PIL import Image

from amt.data.corruptions import CORRUPTIONS, corrupted, open_corrupted
from amt.data.labelled import ArrayImages
from amt.data.loading import batches, transforms

try:
    import imagecorruptions  # noqa: F401
except ImportError as error:  # it is not there, or OpenCV misses a library of the system
    reason = f"pip install imagecorruptions-imaug: {error}"
else:
    reason = ""
needs_library = pytest.mark.skipif(bool(reason), reason=reason)


def write_cifar_c(folder, n=4, dtype=np.uint8):
    """Row r of corruption c holds the colour (c, r, severity)."""
    folder.mkdir(parents=True, exist_ok=True)
    for c, name in enumerate(CORRUPTIONS):
        pixels = np.empty((5 * n, 32, 32, 3), np.uint8)
        pixels[:] = [[[(c, r, r // n + 1)]] for r in range(5 * n)]
        np.save(folder / f"{name}.npy", pixels)
    np.save(folder / "labels.npy", np.tile(np.arange(n), 5).astype(dtype))
    return folder


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_severities_are_consecutive_rows(tmp_path, dtype):
    opened = open_corrupted(write_cifar_c(tmp_path, dtype=dtype), 10)
    assert tuple(opened) == CORRUPTIONS and len(CORRUPTIONS) == 15
    for c, parts in enumerate(opened.values()):
        assert len(parts) == 5
        for severity, part in enumerate(parts, 1):
            assert part.labels.tolist() == [0, 1, 2, 3] and part.labels.dtype == torch.int64
            assert part.image(2).getpixel((0, 0)) == (c, 4 * (severity - 1) + 2, severity)
    images, labels, _ = next(iter(batches(opened["fog"][0], transforms(32, False)[1], 4, seed=0)))
    assert images.shape == (4, 3, 32, 32) and labels.tolist() == [0, 1, 2, 3]


def test_files_are_mapped_not_read(tmp_path):
    part = open_corrupted(write_cifar_c(tmp_path), 10)["snow"][4]
    assert isinstance(part.pixels, np.memmap)


def test_the_first_missing_file_is_named(tmp_path):
    write_cifar_c(tmp_path)
    for name in ("labels", "gaussian_noise", "jpeg_compression"):
        (tmp_path / f"{name}.npy").rename(tmp_path / "aside")
        fails(f"{name}.npy: no such file.*https://", lambda: open_corrupted(tmp_path, 10))
        (tmp_path / "aside").rename(tmp_path / f"{name}.npy")


FAULTS = {
    "labels": [
        np.arange(7),
        np.zeros((5, 4), int),
        np.zeros(20),
        np.full(20, 10),
        np.full(20, -1),
        np.arange(0),
    ],
    "fog": [
        np.zeros((15, 32, 32, 3), np.uint8),
        np.zeros((20, 3, 32, 32), np.uint8),
        np.zeros((20, 32, 32, 3), np.float32),
        np.array([None] * 20, object),
    ],
}


@pytest.mark.parametrize("name, number", [(name, i) for name in FAULTS for i in range(len(FAULTS[name]))])
def test_shapes_types_and_labels_are_checked(tmp_path, name, number):
    """Arrays of Python objects, which are pickles, are refused unread."""
    write_cifar_c(tmp_path)
    np.save(tmp_path / f"{name}.npy", FAULTS[name][number], allow_pickle=True)
    fails(f"{name}.npy: ", lambda: open_corrupted(tmp_path, 10))


@pytest.mark.parametrize("keep", [0, 5, 50, 1000])
def test_truncated_files(tmp_path, keep):
    file = write_cifar_c(tmp_path) / "frost.npy"
    file.write_bytes(file.read_bytes()[:keep])
    fails("frost.npy: not an array that can be mapped", lambda: open_corrupted(tmp_path, 10))


# --- made by the library ---------------------------------------------------------------------------------


def photos(side=40, n=2):
    small = np.random.default_rng(0).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    pixels = [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in small]
    return ArrayImages(np.stack([np.asarray(image) for image in pixels]), range(n), "memory")


@needs_library
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_seed_severity_and_picture(name):
    """All of them, the random ones too, in any order; numpy's global generator is left alone."""
    state = np.random.get_state()[1].tolist()
    (low, high), other = ([corrupted(photos(), 32, False, seed)[name][s] for s in (0, 4)] for seed in (0, 1))
    first = [np.asarray(part.image(1)) for part in (low, high)]
    low.image(0)
    assert all(
        (np.asarray(part.image(1)) == before).all() for part, before in zip((low, high), first, strict=True)
    )
    clean = transforms(32, False)[1](photos().image(1), torch.Generator()).transpose(1, 2, 0).astype(float)
    changes = [np.abs(pixels - clean).mean() for pixels in first]
    assert first[0].shape == (32, 32, 3) and low.labels.tolist() == [0, 1]
    assert changes[0] > 0 and changes[0] < changes[1]
    random = name.split("_")[-1] == "noise" or name in ("glass_blur", "motion_blur", "snow", "frost", "fog")
    assert (np.asarray(other[0].image(1)) != first[0]).any() == (random or name == "elastic_transform")
    assert np.random.get_state()[1].tolist() == state


@needs_library
def test_corrupted_pictures_have_the_networks_size_and_workers_agree():
    """Corrupted after the test transform, as ImageNet-C was; equal in every process."""
    part = corrupted(photos(90), 64, True, seed=3)["glass_blur"][1]
    assert part.image(0).size == (64, 64) and part.origin(0) != photos().origin(0)
    view = transforms(64, False)[1]
    (alone, *_), (together, *_) = (
        next(iter(batches(part, view, 2, seed=0, workers=workers))) for workers in (0, 1)
    )
    assert alone.shape == (2, 3, 64, 64) and torch.equal(alone, together)


def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    fails("pip install imagecorruptions-imaug", lambda: corrupted(photos(), 32, False))


def test_pictures_too_small_to_corrupt():
    fails("image size 28: .* 32 pixels", lambda: corrupted(photos(), 28, False))
