"""Items of a data set in order, prepared ahead by other processes: episodes, and batches of pictures.

Does not know what an item is.
"""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from meta_dataset_readers.errors import InputError


class OrderedLoader(DataLoader):
    """Iterate over `dataset` in order; `num_workers` processes prepare its items (0: this one does).

    An InputError in a worker arrives as the same InputError, without the worker's traceback. Torch's global
    generator is left alone (a DataLoader draws from it by default, which would make runs depend on resuming).
    With `keep_workers` the processes wait for the next iteration.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, *, keep_workers: bool = False):
        super().__init__(
            _Sendable(dataset),
            batch_size=None,
            generator=torch.Generator(),
            num_workers=num_workers,
            persistent_workers=keep_workers and num_workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
        )

    def __iter__(self) -> Iterator[Any]:
        iterator = super().__iter__()
        for item in iterator:
            if isinstance(item, InputError):
                break
            yield item
        else:
            return
        del iterator  # both stop the workers: left to the garbage collector, they linger for seconds
        self._iterator = None
        raise item


class _Sendable(Dataset):
    """A data set whose InputErrors are items: torch wraps one that a worker raises in a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C, `timeout` and batch systems signal the whole process group; a worker that died of it would
    take the item with it that its parent still wants to finish and save."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
