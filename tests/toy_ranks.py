"""Ranks at toy size: processes as torchrun starts them, forked from one that has imported torch already, as
each would need seconds for that."""

import functools
import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from commands import ROOT, Ended

from meta_dataset_readers.errors import exit_on_bad_input

PATIENCE = 240  # seconds until a test gives up; all of them take a few
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["amt.cli.train", "amt.cli.fine_tune", "amt.cli.test", "toy_ranks"])

Work = Callable[[], object]


class Running:
    """Ranks at work.

    Args:
        work: what each of them does; can be pickled, see `program`.
        place: a folder for what they print.
        world: how many are said to be there, if not so many.
    """

    def __init__(self, work: Sequence[Work], place: Path, world: int | None = None):
        place.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = str(world or len(work))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size}
        self._files = [(place / f"out{rank}", place / f"err{rank}") for rank in range(len(work))]
        self.processes = []
        for rank, own in enumerate(work):
            variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size}
            process = _CONTEXT.Process(target=_rank, args=(own, variables, self._files[rank]))
            process.start()
            self.processes.append(process)

    def ended(self) -> list[Ended]:
        """How they ended, by rank."""
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()
            process.join()
        printed = [[file.read_text() if file.exists() else "" for file in pair] for pair in self._files]
        return [Ended(each.exitcode or 0, *pair) for each, pair in zip(self.processes, printed, strict=True)]


def together(work: Work, world: int, place: Path) -> list[Ended]:
    """So many ranks that do the same, to their end."""
    return Running([work] * world, place).ended()


def program(*words) -> Work:
    """main.py with these words on its command line."""
    return functools.partial(_program, [str(word) for word in words])


def signalled(work: Work, step: int, number: int, of: int | None = None) -> Work:
    """The same work, in which a rank (None: all) sends itself a signal when so many episodes are done."""
    return functools.partial(_signalled, work, step, number, of)


def _program(words: list[str]) -> None:
    sys.argv = ["main.py", *words]
    spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exit_on_bad_input(module.main)


def _signalled(work: Work, step: int, number: int, of: int | None) -> None:
    from amt.training.keeper import Keeper

    log_step = Keeper.log_step

    def noisy(self, done, *rest):
        log_step(self, done, *rest)
        if done == step and of in (None, int(os.environ["RANK"])):
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    Keeper.log_step = noisy
    work()


def _rank(work: Work, variables: dict[str, str], files: Sequence[Path]) -> None:
    os.environ.update(variables)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work()
