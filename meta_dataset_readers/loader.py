"""Items of a data set in order, prepared ahead by other processes: episodes, and batches of pictures.

Does not know what an item is.
"""

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from meta_dataset_readers.endings import ENDING, held
from meta_dataset_readers.errors import InputError

_DYING = 5  # seconds between the last of a process that is heard of and its end, at most
_AHEAD = 2  # items that each process prepares ahead, if all together are at most so many:
_ALL_AHEAD = 8
_WAY_OUT = "use --num_workers 0, or make /dev/shm larger (docker run --shm-size)"


class OrderedLoader(DataLoader):
    """Iterate over `dataset` in order; `num_workers` processes prepare its items (0: this one does).

    An InputError in a worker arrives as the same InputError, without the worker's traceback; so does what the
    system says about a file. Torch's global generator is left alone (a DataLoader draws from it by default,
    which would make runs depend on resuming). With `keep_workers` the processes wait for the next iteration.
    At most 8 items are prepared ahead, or one by each process.

    Raises:
        InputError: while iterating, a worker has died, or could not send what it prepared.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, *, keep_workers: bool = False):
        super().__init__(
            _Sendable(dataset) if num_workers else dataset,
            batch_size=None,
            generator=torch.Generator(),
            num_workers=num_workers,
            prefetch_factor=max(1, min(_AHEAD, _ALL_AHEAD // num_workers)) if num_workers else None,
            persistent_workers=keep_workers and num_workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
        )
        self._processes: set[BaseProcess] = set()

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            yield from super().__iter__()
            return
        iterator = self._started()
        try:
            while (item := self._received(iterator)) is not _END:
                yield item
        except BaseException:
            self._stop(iterator)
            raise

    def _started(self) -> Iterator[bytes | Exception]:
        before = set(multiprocessing.active_children())
        with held():
            try:
                iterator = super().__iter__()
            except OSError as error:  # locks live in /dev/shm as well
                raise InputError(f"--num_workers {self.num_workers}: {error.strerror}; {_WAY_OUT}") from error
        self._processes = set(multiprocessing.active_children()) - before or self._processes
        if threading.current_thread() is threading.main_thread():
            # Torch has a dead worker raise an error wherever this process is; here the wait for data does.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return iterator

    def _received(self, iterator: Iterator[bytes | Exception]) -> Any:
        """The next item; `_END` after the last."""
        try:
            item = next(iterator, _END)
            found = pickle.loads(item) if isinstance(item, bytes) else item
        except (RuntimeError, OSError, EOFError) as error:
            ended = wait([each.sentinel for each in self._processes], timeout=_DYING)
            for each in self._processes:  # its files close a moment before there is an exit code
                each.join(_DYING if each.sentinel in ended else 0)
            dead = [each.exitcode for each in self._processes if each.exitcode]
            if not dead:
                raise
            raise InputError(f"--num_workers {self.num_workers}: {_told(dead[0])}; {_WAY_OUT}") from error
        if isinstance(found, Exception):
            raise found
        return found

    def _stop(self, iterator: Any) -> None:
        """End the workers at once. Left to themselves they finish what they are at, and where one has died
        with a lock in its hand the others wait for it for ever."""
        iterator._workers_done_event.set()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(1)  # seconds; a disk that does not answer may hold it longer
        self._iterator = None


_END = object()


class _Sendable(Dataset):
    """A data set whose items are ready to be sent, so that a full /dev/shm is noticed here: where torch puts
    them into shared memory, an error is printed and the item is lost. InputErrors are items, too: torch wraps
    those that a worker raises in a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> bytes | Exception:
        try:
            item = self.dataset[index]
        except (InputError, OSError) as error:
            return error
        except MemoryError:
            return InputError(f"--num_workers: too little memory to prepare an item; {_WAY_OUT}")
        try:
            return bytes(ForkingPickler.dumps(item))
        except (RuntimeError, OSError) as error:
            line = str(error).strip().partition("\n")[0]
            return InputError(f"--num_workers: an item does not fit into shared memory ({line}); {_WAY_OUT}")


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C, `timeout` and batch systems signal the whole process group; a worker that died of it would
    take the item with it that its parent still wants to finish and save."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def _told(exit_code: int) -> str:
    if exit_code > 0:
        return f"a process that prepares data ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"a process that prepares data was ended by {name}, perhaps for want of memory"
