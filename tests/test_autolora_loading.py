"""Transforms of pictures, and batches of them with any number of workers."""

import os
import signal

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from toy_labelled import noise

from amt.data.labelled import ArrayImages
from amt.data.loading import batches, transforms
from meta_dataset_readers.transforms import unit_range

# --- transforms ------------------------------------------------------------------------------------------


def photo(width, height, seed=0):
    small = noise(6, 8, 3, seed=seed)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(500, 375), (333, 501), (224, 224), (40, 61)])
def test_test_transforms_are_torchvisions(size):
    """Published: Resize and ToTensor at low resolution; Resize 256, CenterCrop 224, ToTensor at high."""
    t = torchvision.transforms
    image = photo(*size)
    low = t.Compose([t.Resize((32, 32)), t.ToTensor()])
    high = t.Compose([t.Resize(256), t.CenterCrop(224), t.ToTensor()])
    assert torch.equal(unit_range(transforms(32, False)[1](image, generator())), low(image))
    assert torch.equal(unit_range(transforms(224, True)[1](image, generator())), high(image))


def test_low_resolution_training_is_a_padded_crop_and_a_flip():
    """Every one of 9 x 9 crops of the picture with a black border of 4, flipped or not, and nothing else."""
    image = photo(32, 32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1)
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 32, left : left + 32]
            crops[crop.tobytes()], crops[crop[:, :, ::-1].tobytes()] = (top, left, 0), (top, left, 1)
    train = transforms(32, False)[0]
    seen = [crops[train(image, generator(s)).tobytes()] for s in range(400)]
    for values, most in zip(zip(*seen, strict=True), (8, 8, 1), strict=True):
        assert set(values) == set(range(most + 1))
    assert 150 < sum(flip for _, _, flip in seen) < 250


@pytest.mark.parametrize("size", [(500, 375), (60, 2000), (256, 256)])
def test_high_resolution_training_crops_are_torchvisions(size):
    """Areas and shapes are distributed as torchvision's: means of many draws, on a picture of gradients."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8))
    t = torchvision.transforms
    theirs = t.Compose([t.Resize(256), t.RandomResizedCrop(224), t.RandomHorizontalFlip(), t.ToTensor()])
    ours = transforms(224, True)[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        n = 60
        a = torch.stack([spread(theirs(image)) for _ in range(n)])
    b = torch.stack([spread(unit_range(ours(image, generator(s)))) for s in range(n)])
    error = ((a.var(0) + b.var(0)) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() <= 4 * error + 1e-6).all()


def spread(image):
    """The left and upper edge of a crop, and its extent in both directions, as a gradient tells them."""
    assert image.shape == (3, 224, 224)
    across, down = image[0, 112], image[1, :, 112]
    return torch.stack([across.min(), down.min(), across.max() - across.min(), down.max() - down.min()])


@pytest.mark.parametrize("image_size, high", [(32, False), (96, False), (224, True), (64, True)])
def test_transforms_draw_from_their_generator_alone(image_size, high):
    state = torch.get_rng_state()
    for transform in transforms(image_size, high):
        first, again = (transform(photo(70, 50), generator(5)) for _ in range(2))
        assert (first == again).all()
        assert first.shape == (3, image_size, image_size) and first.dtype == np.uint8
    assert torch.equal(state, torch.get_rng_state())


# --- batches ---------------------------------------------------------------------------------------------


def in_memory(n=23):
    return ArrayImages(noise(n, 32, 32, 3), [i % 4 for i in range(n)], "memory")


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_an_epoch_is_every_picture_once():
    every = batches(in_memory(), transforms(32, False)[1], 5, seed=0, shuffle=True)
    assert len(every) == 5
    images, labels, indices = map(torch.cat, zip(*every, strict=True))
    assert [len(batch[0]) for batch in every] == [5, 5, 5, 5, 3]
    assert sorted(indices.tolist()) == list(range(23)) != indices.tolist()
    assert (labels == indices % 4).all() and labels.dtype == indices.dtype == torch.int64
    pixels = torch.from_numpy(in_memory().pixels)[indices].permute(0, 3, 1, 2)
    assert torch.equal(images, pixels / 255) and images.is_contiguous()


def test_workers_change_nothing():
    """The batches of 0 and of 2 processes are equal, augmented and shuffled; the global generator stays."""
    state = torch.get_rng_state()
    train = transforms(32, False)[0]
    alone, together = (
        batches(in_memory(), train, 4, seed=1, epoch=2, shuffle=True, workers=workers) for workers in (0, 2)
    )
    assert same(alone, together)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("start", range(7))
def test_a_start_gives_the_rest_of_the_same_epoch(start):
    def epoch(start):
        return batches(in_memory(), transforms(32, False)[0], 4, seed=3, epoch=1, shuffle=True, start=start)

    assert len(epoch(start)) == max(0, 6 - start)
    assert same(epoch(start), list(epoch(0))[start:])


def test_epochs_and_seeds_differ_and_repeat():
    def epoch(seed, number, shuffle=True):
        return batches(in_memory(), transforms(32, False)[0], 23, seed=seed, epoch=number, shuffle=shuffle)

    assert same(epoch(0, 0), epoch(0, 0))
    for other in (epoch(0, 1), epoch(1, 0)):
        assert next(iter(other))[2].tolist() != next(iter(epoch(0, 0)))[2].tolist()
    assert next(iter(epoch(0, 0, False)))[2].tolist() == list(range(23))


def test_augmentation_belongs_to_the_picture():
    """What is drawn for picture i depends on (seed, epoch, i), not on its place in the epoch or the batch."""

    def by_index(**options):
        every = batches(in_memory(), transforms(32, False)[0], **options)
        return {
            int(i): image for images, _, indices in every for i, image in zip(indices, images, strict=True)
        }

    first = by_index(batch_size=4, seed=0, shuffle=True)
    other = by_index(batch_size=7, seed=0)
    assert all(torch.equal(first[i], other[i]) for i in range(23))
    assert any(
        not torch.equal(first[i], image) for i, image in by_index(batch_size=4, seed=0, epoch=1).items()
    )


def test_workers_leave_signals_to_their_parent():
    """Ctrl-C reaches the whole process group: the batch that its parent wants to finish with still comes."""
    parent = os.getpid()

    def interrupted(image, _generator):
        for number in (signal.SIGINT, signal.SIGTERM):
            if os.getpid() != parent:
                os.kill(os.getpid(), number)
        return np.zeros((3, 1, 1), np.uint8)

    assert len(list(batches(in_memory(), interrupted, 4, seed=0, workers=1))) == 6
