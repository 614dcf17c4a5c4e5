"""Photos of three classes in real files, and a pool on the mini network: what people hand over."""

from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from conftest import moved_apart
from PIL import Image

from amt.attacks.levels import Perturbation
from amt.files import checkpoint
from amt.files.pretrained import load_network
from amt.models.pool import Pool, principal_pool

COLOURS = {"cat": (200, 80, 60), "dog": (60, 90, 200), "fox": (60, 200, 90)}
LEVELS = (Perturbation(8, 2, steps=2), Perturbation(0.1, 0.025, steps=2))


def photo(name: str, number: int, width: int = 52, height: int = 40) -> Image.Image:
    """A noisy picture of the class's colour, unlike every other."""
    noise = np.random.default_rng([ord(name[0]), number]).normal(0, 30, (height, width, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def write_photos(
    folder: Path, names: tuple[str, ...], count: int, ending: str = "png", first: int = 0
) -> Path:
    """`count` photos of each class in a folder per class."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            photo(name, number).save(folder / name / f"{number}.{ending}")
    return folder


def toy_pool() -> Pool:
    """Two adapters of the shipped mini network, moved a little."""
    return moved_apart(principal_pool(load_network("vit_mini").weights, 2, LEVELS), 0.01)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder with support/ (four cats, four dogs), new/ (1.png, 2.png) and vit_mini_pool.safetensors."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "support", ("cat", "dog"), 4)
    (folder / "new").mkdir()
    photo("cat", 10).save(folder / "new" / "1.png")
    photo("dog", 10).save(folder / "new" / "2.png")
    found = checkpoint.Checkpoint(toy_pool(), {"arch": "vit_mini"})
    checkpoint.save(folder / "vit_mini_pool.safetensors", found)
    return folder


@pytest.fixture
def box(photos, tmp_path_factory, monkeypatch) -> Path:
    """The pool is in the box, under the name vit_mini_pool, beside the weights it was trained from."""
    folder = tmp_path_factory.mktemp("box")
    for file in (photos / "vit_mini_pool.safetensors", ROOT / "checkpoints" / "vit_mini.safetensors"):
        (folder / file.name).symlink_to(file)
    monkeypatch.setattr("amt.files.shipped.BOX", folder)
    return photos
