"""A small random vision transformer, pools on it, and an episode."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from hypothesis import settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.models.architectures import Arch
from amt.models.network import Network
from amt.models.pool import Pool, principal_pool
from amt.training.meta_tune import query_outcome
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode

few = settings(max_examples=20, deadline=None)

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=16, mlp_ratio=2.0)
RANK = 3
LEVELS = (
    Perturbation(8, 2, steps=2, gamma=0.01, grids=(2, 4, 0)),
    Perturbation(6, 1.5, steps=2, gamma=0.005, grids=(2, 4, 0), start="random1"),
    Perturbation(0.1, 0.025, steps=2, gamma=0.0, grids=(2, 4, 0)),
)

make_network = functools.partial(random_backbone, ARCH)
make_episode = functools.partial(patterned_episode, side=16)


@pytest.fixture(scope="session")
def network() -> Network:
    return make_network()


@pytest.fixture(scope="session")
def untrained(network) -> Pool:
    return principal_pool(network.weights, RANK, LEVELS)


@pytest.fixture(scope="session")
def pool(untrained) -> Pool:
    return moved_apart(untrained)


@pytest.fixture(scope="session")
def episode() -> Episode:
    return make_episode(0)


def tensors(pool: Pool) -> dict[str, Tensor]:
    return pool.factors | {"scale": pool.scale, "bias": pool.bias}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def trainable(pool: Pool) -> Pool:
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in pool.factors.items()}
    return dataclasses.replace(pool.with_factors(factors), scale=pool.scale.clone().requires_grad_())


def quick(**changes) -> TuneSettings:
    return TuneSettings(**{"epochs": 4, "episodes_per_epoch": 2, "lr": 0.05, "warmup_epochs": 0} | changes)


def assert_goes_on_exactly(
    network: Network, pool: Pool, plan: TuneSettings, folder: Path, done: int = 2, total: int = 4
) -> None:
    """A run that goes on from its file after `done` episodes ends with the bits of one that never stopped:
    weights, momentum, numbers."""
    whole, first = Tuner(network, pool, plan), Tuner(network, pool, plan)
    for k in range(total):
        whole.step(make_episode(k))
        if k < done:
            first.step(make_episode(k))
    momentum, numbers = first.state()
    file = folder / "run.safetensors"
    checkpoint.save(file, Checkpoint(first.pool, {"tuner": numbers}, momentum))
    found = checkpoint.load(file)
    resumed = Tuner(network, found.pool, plan)
    resumed.restore(found.momentum, found.about["tuner"])
    assert resumed.episodes_done == done
    for k in range(done, total):
        resumed.step(make_episode(k))
    assert_identical(tensors(resumed.pool), tensors(whole.pool))
    assert_identical(resumed.state()[0], whole.state()[0])
    assert resumed.state()[1] == whole.state()[1]


def outcome_of(network: Network, pool: Pool, episode: Episode, level: Perturbation, **keywords):
    start = level.pyramid.start(episode.query, torch.Generator().manual_seed(3))
    return query_outcome(network, dataclasses.replace(pool, levels=(level,)), episode, start, **keywords)


def rewritten(file: Path, change) -> Path:
    """The file with its tensors and header changed by `change(tensors, header)`."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["amt"])
    tensors = load_file(file)
    change(tensors, header)
    save_file(tensors, file, {"amt": json.dumps(header)})
    return file
