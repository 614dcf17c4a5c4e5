"""Commands as tests run them: in this process, or in one of their own as a user starts them.

A process of its own costs seconds of imports, so only what needs one gets one; elsewhere a command is called
through `exit_on_bad_input`, as the last line of its script does, with the same flags and the same ending.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from meta_dataset_readers.errors import exit_on_bad_input

ROOT = Path(__file__).resolve().parent.parent

# Before the words of a program: its data set takes its time after the second episode.
SLOW = """
import runpy, sys, time
from meta_dataset_readers import reader
raw = reader.EpisodeReader.raw
def slow(self, index):
    if index == 2:
        time.sleep(10_000)
    return raw(self, index)
reader.EpisodeReader.raw = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def called(main: Callable[[], object], argv: Sequence) -> Ended:
    """The command of this main, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(word) for word in argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_on_bad_input(main)
    except SystemExit as ended:
        return Ended(ended.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("it did not exit")


def start(*words, cwd: Path) -> subprocess.Popen:
    """A Python process as a user starts it, elsewhere than in the project's folder."""
    threads = str(torch.get_num_threads())  # sums depend on them
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def stopped_in_step(running: subprocess.Popen, total: int) -> bytes:
    """What a training of `total` steps prints that SIGTERM stops in one of them, as soon as one is done. The
    signal reaches its workers too, as `timeout` and batch systems send it."""
    shown = b""
    while not re.search(rb" [1-9]\d*/%d " % total, shown):
        more = os.read(running.stderr.fileno(), 4096)
        assert more, f"ended before the first step: {shown.decode()}"
        shown += more
    os.killpg(running.pid, signal.SIGTERM)
    out, err = running.communicate()
    assert running.returncode == 128 + signal.SIGTERM, err.decode()
    assert b"Traceback" not in err and b"error" not in err
    return out


def process(*words, cwd: Path) -> Ended:
    """Start a Python process and wait for its end."""
    running = start(*words, cwd=cwd)
    out, err = running.communicate()
    return Ended(running.returncode, out.decode(), err.decode())


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit by bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def about(file: Path) -> dict:
    """The readable half of a checkpoint."""
    return json.loads(file.with_suffix(".json").read_text())
