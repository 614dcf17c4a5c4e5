"""What the tests of exports share: a small pool whose adapters differ, and the README's own lines run."""

import dataclasses
from pathlib import Path

import torch
from conftest import moved_apart

from amt.attacks.levels import Perturbation
from amt.files.export import MergedNetwork
from amt.models.architectures import Arch
from amt.models.head_settings import Head
from amt.models.heads import PoolStatistics
from amt.models.network import Network
from amt.models.pool import Pool, principal_pool
from amt.models.weights import Merged
from amt.tasks.classifier import fitted_voices
from meta_dataset_readers.episode import Episode

# Shown images are larger than pretrained ones, so that the position table has to be resized; the rank is
# not the same for all layers of an adapter, as qkv has three groups.
TINY = Arch(
    patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=24, mlp_ratio=2.0, std=(0.3,) * 3
)
SIDE = TINY.image_size
LEVELS = tuple(Perturbation(epsilon, epsilon / 4) for epsilon in (8.0, 4.0, 1.0))


def pool_of(network: Network, levels: tuple[Perturbation, ...] = LEVELS, rank: int = 2) -> Pool:
    """A pool whose adapters, heads included, all differ."""
    pool = moved_apart(principal_pool(network.weights, rank, levels))
    numbers = torch.arange(len(levels))
    return dataclasses.replace(pool, scale=10.0 + numbers, bias=0.1 * numbers)


def with_task(
    merged: MergedNetwork,
    episode: Episode,
    classes: tuple[str, ...] = ("one", "two", "three, too"),
    head: Head | None = None,
    statistics: PoolStatistics | None = None,
) -> MergedNetwork:
    """The same with a head fitted to an episode's support."""
    plain = Merged(merged.weights, merged.scale, merged.bias)
    support, labels, shares = episode.support, episode.support_labels, merged.coefficients
    ((voice,), _) = fitted_voices(merged.network, plain, support, labels, shares, head or Head(), statistics)
    return dataclasses.replace(merged, classes=classes, head=voice.head)


def images(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative Frobenius distance."""
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def follow_readme(text: str, place: Path, monkeypatch, **names):
    """The variables after running the README's own lines in the folder `place`."""
    monkeypatch.chdir(place)
    lines = text.partition("Load it:\n")[2].partition("Classify:")[0].splitlines()
    variables = dict(names)
    with torch.no_grad():
        exec("\n".join(line.strip() for line in lines).replace("(...)", "(pretrained)"), variables)
    return variables
