"""Images reach a device as the bytes they are, and with the bits they have on the CPU; a device that waits
for them is told of."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_episode
from pretended_device import CUDA, OnDevice, pretended
from toy_training import command

from amt.data.labelled import ArrayImages
from amt.data.loading import batches, transforms
from meta_dataset_readers import cores
from meta_dataset_readers.cores import default_workers
from meta_dataset_readers.feeding import Feed, Waiting
from meta_dataset_readers.loader import OrderedLoader
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, episode_loader
from meta_dataset_readers.transforms import unit_range

EVERY = np.arange(256, dtype=np.uint8).reshape(4, 64)


# The way to the device


def test_every_grey_level_has_its_bits_on_the_device():
    """Where a multiplication by 1/255, a GPU's division, would not give them."""
    expected = unit_range(EVERY)
    with pretended() as seen:
        feed = Feed(CUDA)
        found = [feed.images(torch.from_numpy(EVERY)) for _ in range(3)]
    assert all(torch.equal(each.held, expected) and each.held.dtype == torch.float32 for each in found)
    assert (seen.sent, seen.copies, seen.reads) == (3 * 256 + 1024, 1, 0)  # the table travels once
    assert not torch.equal(torch.from_numpy(EVERY) * np.float32(1 / 255), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_are_no_bytes_travel_as_they_are(dtype):
    images = torch.rand(2, 3, 4, 4, dtype=dtype)
    with pretended() as seen:
        found = Feed(CUDA).images(images)
    assert torch.equal(found.held, images) and (seen.copies, seen.sent) == (0, images.nbytes)
    assert Feed().images(images) is images


def moved_back(episode):
    """The episode with its tensors on the CPU, which were all on the device."""
    tensors = {name: each for name, each in vars(episode).items() if isinstance(each, torch.Tensor)}
    assert all(isinstance(each, OnDevice) for each in tensors.values())
    return type(episode)(**vars(episode) | {name: each.held for name, each in tensors.items()})


@pytest.mark.parametrize("workers", [0, 2])
def test_an_episode_is_the_same_on_a_device(tiny_source, workers):
    """Whatever the number of workers; augmented images are bytes, too."""
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
    reader = EpisodeReader(tiny_source().parent, "tiny", "TRAIN", sampling, 16, n_episodes=3, augment=True)
    with pretended() as seen:
        found = list(episode_loader(reader, workers, CUDA))
    for number, episode in enumerate(found):
        assert_same_episode(moved_back(episode), reader[number])
    images, labels = 10 * 3 * 16 * 16, 10 * 8
    assert (seen.sent, seen.copies) == (3 * (images + labels) + 1024, 1)


def test_a_batch_is_the_same_on_a_device():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    part = ArrayImages(pixels, torch.arange(6), "memory")
    drawn = {"transform": transforms(8, False)[0], "batch_size": 4, "seed": 1, "shuffle": True}
    with pretended():
        found = list(batches(part, **drawn, device=CUDA))
    for (images, labels, numbers), expected in zip(found, batches(part, **drawn), strict=True):
        assert torch.equal(images.held, expected[0]) and torch.equal(labels.held, expected[1])
        assert torch.equal(numbers, expected[2])  # those tell generators apart, on the CPU


def test_float_episodes_go_to_a_device_too(tiny_source):
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
    reader = EpisodeReader(tiny_source().parent, "tiny", "TRAIN", sampling, 16, n_episodes=2)
    episodes = [reader[0], reader[1]]
    with pretended():
        found = list(episode_loader(episodes, 0, CUDA))
    for one, other in zip(found, episodes, strict=True):
        assert_same_episode(moved_back(one), other)


# How many processes


@pytest.mark.parametrize(
    ("usable", "beside", "workers"),
    [(1, None, 1), (2, None, 1), (4, None, 3), (64, None, 8), (16, "4", 3), (2, "8", 1), (4, "many", 3)],
)
def test_the_machine_says_how_many_processes_read(usable, beside, workers, monkeypatch):
    monkeypatch.setattr(cores, "available_cores", lambda: usable)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if beside is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert default_workers() == workers


@pytest.mark.parametrize(("workers", "ahead"), [(1, 2), (2, 4), (4, 8), (5, 5), (8, 8), (16, 16)])
def test_few_episodes_lie_in_memory_whatever_the_number_of_workers(workers, ahead):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of processes beyond the cores
        loader = OrderedLoader(range(100), workers)
    assert loader.num_workers * loader.prefetch_factor == ahead


# Waiting


def waited(waits: list[float], works: list[float]) -> tuple[Waiting, list[str]]:
    """A `Waiting` after items that took `waits` to come and `works` to be done, in seconds, and its lines."""
    now, lines = 0.0, []

    def items():
        nonlocal now
        for seconds in waits:
            now += seconds
            yield None

    waiting = Waiting(lambda: now)
    for _, seconds in zip(waiting.timed(items()), works, strict=True):
        now += seconds
        lines.append(waiting.warning())
    return waiting, [line for line in lines if line]


@pytest.mark.parametrize(
    ("waits", "works", "share"),
    [([], [], 0), ([1], [3], 0.25), ([0.0] * 9, [2.0] * 9, 0), ([30] * 30, [10] * 30, 0.75)],
)
def test_the_share_of_waiting(waits, works, share):
    assert waited(waits, works)[0].share == pytest.approx(share)


def test_the_last_minute_counts():
    """A slow start is forgotten, and waits that begin later are seen."""
    assert waited([600] + [0] * 600, [1] * 601)[0].share < 0.01
    assert waited([0] * 600 + [9] * 30, [1] * 630)[0].share > 0.8


def test_a_starved_device_is_said_once():
    waiting, lines = waited([6] * 40, [4] * 40)
    assert len(lines) == 1 and "60% waiting for data" in lines[0] and "--num_workers" in lines[0]
    assert waiting.shown == "60% waiting for data"


@pytest.mark.parametrize(("waits", "works"), [([6] * 3, [4] * 3), ([1] * 400, [9] * 400)])
def test_a_short_run_and_a_few_waits_are_not_worth_a_line(waits, works):
    assert waited(waits, works)[1] == []


def test_what_ends_the_work_ends_the_timing():
    closed = []

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    for number in Waiting().timed(items()):
        if number == 2:
            break
    assert closed == [True]


@pytest.mark.parametrize("program", ["main", "test_meta_dataset"])
def test_the_progress_line_shows_the_waiting(world, tmp_path: Path, program):
    short = ("--epochs", 1, "--nEpisode", 2, "--nValEpisode", 0, "--statistics_episodes", 0)
    flags = world.train(tmp_path, *short) if program == "main" else world.test(tmp_path, "--epsilon")
    ended = command(program, *flags)
    assert ended.code == 0 and "% waiting for data" in ended.err
