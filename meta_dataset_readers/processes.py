"""Work shared out to other processes, started anew: forking a program that already runs threads can hang."""

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from meta_dataset_readers.endings import held
from meta_dataset_readers.errors import InputError


@contextlib.contextmanager
def processes(jobs: int) -> Iterator[Executor | None]:
    """`jobs` processes for `mapped`, started at the first use; None stands for this one, which does it all.

    What they are at is finished in the end, unless an error or a signal ends the context: then so are they.
    """
    if jobs == 1:
        yield None
        return
    before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def mapped(
    pool: Executor | None, function: Callable[[Any], Any], items: Iterable, died: str
) -> Iterator[Any]:
    """`function` of every item, in order, by the processes of `pool`, or here for None.

    Raises:
        InputError: a process died; `died` is the message.
    """
    if pool is None:
        yield from map(function, items)
        return
    try:
        with held():  # processes are started here; Ctrl-C reaches all of a group, and is for this one
            found = pool.map(function, items)
        yield from found
    except BrokenProcessPool as error:
        raise InputError(died) from error
