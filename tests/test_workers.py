"""A process that prepares data and dies, or cannot send it: one line with the way out, and no hang."""

import os
import resource
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from meta_dataset_readers import loader
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.loader import OrderedLoader


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Torch looks every 5 seconds whether a worker is alive; here ten times as often."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


class Items(Dataset):
    """Tensors; at item 3 something happens in the worker."""

    def __init__(self, happens):
        self.happens = happens

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3:
            self.happens()
        return torch.full((100,), index)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bus_error() -> None:
    """What a full /dev/shm does to whoever writes there."""
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGBUS)


def ended() -> None:
    os._exit(7)


def full() -> None:
    """From here on nothing fits into shared memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def out_of_memory() -> None:
    raise MemoryError


def unreadable() -> None:
    raise OSError(5, "Input/output error", "picture.jpg")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (killed, ["ended by SIGKILL", "--num_workers 0", "/dev/shm"]),
        (bus_error, ["ended by SIGBUS", "--num_workers 0", "/dev/shm"]),
        (ended, ["exit code 7", "--num_workers 0"]),
        (full, ["does not fit into shared memory", "--num_workers 0", "/dev/shm"]),
        (out_of_memory, ["too little memory", "--num_workers 0"]),
    ],
)
def test_a_worker_that_fails_is_one_line_with_the_way_out(happens, words, keep):
    began, seen = time.monotonic(), []
    with pytest.raises(InputError) as caught:
        for item in OrderedLoader(Items(happens), 2, keep_workers=keep):
            seen.append(int(item[0]))
    assert seen == list(range(len(seen))) and 3 not in seen
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    assert time.monotonic() - began < 60
    assert not loader.multiprocessing.active_children()


def test_what_the_system_says_of_a_file_arrives_whole():
    with pytest.raises(OSError) as caught:
        list(OrderedLoader(Items(unreadable), 1))
    assert (caught.value.errno, caught.value.filename) == (5, "picture.jpg")


def test_workers_that_are_kept_serve_the_next_iteration_and_a_loader_that_was_left_starts_new_ones():
    kept = OrderedLoader(Items(lambda: None), 1, keep_workers=True)
    for _ in range(2):
        assert [int(item[0]) for item in kept] == list(range(6))
    for item in kept:
        if int(item[0]) == 2:
            break
    del item
    assert [int(item[0]) for item in kept] == list(range(6))
