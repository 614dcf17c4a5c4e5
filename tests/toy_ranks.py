"""Commands of several ranks at toy size: processes as torchrun starts them, forked from one that has imported
torch already, as each would need seconds for that."""

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

PATIENCE = 120  # seconds until a test gives up; all of them take a few
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["amt.cli.train", "amt.cli.fine_tune", "toy_ranks"])


class Running:
    """The ranks of one command.

    Args:
        words: of every rank's command line after `main.py`.
        place: a folder for what they print.
        before: by rank what it does before it starts.
        environment: of all of them, besides what torchrun sets.
    """

    def __init__(
        self,
        words: Sequence[Sequence],
        place: Path,
        before: dict[int, Callable[[], None]] | None = None,
        environment: dict[str, str] | None = None,
    ):
        place.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        common |= {"WORLD_SIZE": str(len(words)), "LOCAL_WORLD_SIZE": str(len(words)), **(environment or {})}
        self._files = [(place / f"out{rank}", place / f"err{rank}") for rank in range(len(words))]
        self.processes = []
        for rank, own in enumerate(words):
            variables = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = (list(map(str, own)), variables, self._files[rank], (before or {}).get(rank))
            self.processes.append(_CONTEXT.Process(target=_rank, args=given))
        for process in self.processes:
            process.start()

    def shows(self, rank: int, text: str) -> None:
        """Wait until a rank has printed `text`."""
        end = time.monotonic() + PATIENCE
        while not any(file.exists() and text in file.read_text() for file in self._files[rank]):
            assert time.monotonic() < end and self.processes[rank].is_alive(), self.ended()
            time.sleep(0.02)

    def ended(self) -> list[Ended]:
        """How they ended, by rank."""
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()
            process.join()
        printed = [[file.read_text() if file.exists() else "" for file in pair] for pair in self._files]
        return [Ended(each.exitcode, *pair) for each, pair in zip(self.processes, printed, strict=True)]


def ranks(words: Sequence, world: int, place: Path, **more) -> list[Ended]:
    """So many ranks of one command, to their end."""
    return Running([words] * world, place, **more).ended()


def _rank(words: list[str], variables: dict[str, str], files: Sequence[Path], before) -> None:
    os.environ.update(variables)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    if before:
        before()
    sys.argv = ["main.py", *words]
    spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exit_on_bad_input(module.main)
