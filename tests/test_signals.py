"""A signal ends every program, in every phase, within seconds, with its exit code and without a traceback."""

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, SLOW, Ended, start
from toy_training import command

from amt.cli import train
from amt.files.signals import Interrupted, Interrupts
from meta_dataset_readers.endings import Ended as EndedBySignal
from meta_dataset_readers.endings import held, raised

SECONDS = 20  # on a loaded machine; the phases below would last for hours


def wait_for_rows(file: Path, count: int) -> None:
    """What a progress bar shows of quick episodes depends on how quick they are; what is kept does not."""
    end = time.monotonic() + 3 * SECONDS
    while not file.is_file() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"{file} has fewer than {count} rows"
        time.sleep(0.05)


def read_until(running: subprocess.Popen, pattern: bytes) -> None:
    shown = b""
    while not re.search(pattern, shown):
        if not select.select([running.stderr], [], [], 3 * SECONDS)[0]:
            os.killpg(running.pid, signal.SIGKILL)
        more = os.read(running.stderr.fileno(), 4096)
        assert more, f"ended before {pattern!r}: {shown.decode()}"
        shown += more


@contextlib.contextmanager
def signalled(number: int, pattern: str) -> Iterator[None]:
    """Send this process a signal as soon as a command shows `pattern`; the context fails if none was sent."""
    sent, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if isinstance(sys.stderr, io.StringIO) and re.search(pattern, sys.stderr.getvalue()):
                sent.append(time.monotonic())
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert sent and time.monotonic() - sent[0] < SECONDS


HOURS = ("--attack", "square", "queries=100000000", "--epsilon", 0.001, "--probe_episodes", 0)
OF_NONE = "0 of 2 episodes are done; the same command continues"


def test_a_signal_ends_an_attack(world, tmp_path):
    with signalled(signal.SIGTERM, r"tiny:\s+0%"):
        ended = command("test_meta_dataset", *world.test(tmp_path / "out", *HOURS))
    assert_stopped(ended, signal.SIGTERM, OF_NONE)


def test_a_signal_ends_a_selection(world, tmp_path):
    pool = tmp_path / "pool"
    assert command("main", *world.train(pool, "--epochs", 1, "--nEpisode", 1)).code == 0
    choice = ("--resume", pool / "last.safetensors", "--select_on", "tiny", "--nSelectEpisode", 100_000)
    with signalled(signal.SIGINT, r"choosing on tiny[^/]* [1-9]"):
        ended = command("test_meta_dataset", *world.test(tmp_path / "out", *choice))
    assert_stopped(ended, signal.SIGINT, OF_NONE)


def test_a_signal_ends_a_validation(world, tmp_path, monkeypatch):
    sent, validate = [], train.validate

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGHUP)

    def validated(*args, **settings):
        threading.Timer(0.2, send).start()
        return validate(*args, **settings)

    monkeypatch.setattr(train, "validate", validated)
    ended = command("main", *world.train(tmp_path / "out", "--nValEpisode", 100_000))
    assert time.monotonic() - sent[0] < SECONDS
    assert_stopped(ended, signal.SIGHUP, "stopped after 2 of 4 episodes; the same command continues")


def test_a_signal_ends_the_wait_for_data(world, tmp_path):
    """In processes of their own: the whole group is signalled, as batch systems do it."""
    flags = world.test(tmp_path / "out", "--num_workers", 1, "--nTestEpisode", 4, "--epsilon")
    running = start("-c", SLOW, ROOT / "test_meta_dataset.py", *flags, cwd=tmp_path)
    wait_for_rows(tmp_path / "out" / "rows.jsonl", 2)
    began = time.monotonic()
    os.killpg(running.pid, signal.SIGTERM)
    out, err = running.communicate()
    assert time.monotonic() - began < SECONDS
    said = "2 of 4 episodes are done; the same command continues"
    assert_stopped(Ended(running.returncode, out.decode(), err.decode()), signal.SIGTERM, said)


def assert_stopped(ended: Ended, number: int, said: str) -> None:
    assert ended.code == 128 + number, ended.err
    assert "Traceback" not in ended.err and "error" not in ended.err, ended.err
    assert ended.out.splitlines()[-1] == said


PROGRAMS = [
    ["main.py"],
    ["main.py", "autolora"],
    ["test_meta_dataset.py"],
    ["-m", "amt", "report"],
    ["-m", "amt", "export"],
    ["-m", "meta_dataset_readers.check"],
    ["-m", "meta_dataset_readers.convert"],
    ["-m", "meta_dataset_readers.mini"],
    ["-m", "meta_dataset_readers.split"],
]

# Sends this process Ctrl-C as soon as the import of a module begins.
AT_AN_IMPORT = """
import os, runpy, signal, sys
wanted, words = sys.argv[1], sys.argv[2:]
def interrupt(event, about):
    if event == "import" and about[0] == wanted:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
sys.argv = words[1:] if words[0] == "-m" else words
if words[0] == "-m":
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(words[0], run_name="__main__")
"""


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_ctrl_c_while_a_program_starts_ends_it_without_a_traceback(world, tmp_path, program):
    """At the import of argparse, which is among the first, and of the largest library that it needs."""
    sources = {"main.py": world.train(tmp_path / "out"), "test_meta_dataset.py": world.test(tmp_path / "out")}
    flags = {"convert": [world.data, "tiny", "--out", tmp_path / "packed"], "split": [world.data / "tiny"]}
    words = sources.get(program[0], flags.get(program[-1].rpartition(".")[2], [world.data]))
    if program[-1].endswith("mini"):
        words = ["--out", tmp_path / "mini"]
    for module in ("argparse", "numpy" if "meta_dataset_readers" in program[-1] else "torch"):
        if program[-1] == "autolora" and module == "torch":
            words = ["--output", tmp_path / "out", "--no_pretrain"]
        script = [ROOT / program[0]] if program[0].endswith(".py") else program[:1]
        ended = subprocess.run(
            [sys.executable, "-c", AT_AN_IMPORT, module, *map(str, [*script, *program[1:], *words])],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=60,
        )
        assert (ended.returncode, ended.stderr) == (130, "interrupted\n"), module


def test_ctrl_c_at_any_moment_ends_a_program_without_a_traceback(world, tmp_path):
    """From when its own first line has run; what Python does before that is Python's."""
    begun = AT_AN_IMPORT.replace("os.kill(os.getpid(), signal.SIGINT)", 'sys.stderr.write("begun\\n")')
    for delay in (0.0, 0.2, 0.6, 1.5):
        words = ("argparse", ROOT / "test_meta_dataset.py", *world.test(tmp_path / str(delay)))
        running = start("-c", begun, *words, cwd=tmp_path)
        read_until(running, rb"begun\n")
        time.sleep(delay)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate()
        assert running.returncode in (0, 130) and b"Traceback" not in err, (delay, err.decode())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_exception_while_a_command_works(number):
    before = signal.getsignal(number)
    with pytest.raises(EndedBySignal) as caught, raised():
        signal.raise_signal(number)
    assert caught.value.number == number and signal.getsignal(number) is before


def test_a_signal_waits_until_processes_are_started():
    """Also where another thread, as torch has some, is the one that it reaches."""
    over, done = threading.Event(), []
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        with pytest.raises(EndedBySignal) as caught, raised(), held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append(1)
    finally:
        over.set()
        thread.join()
    assert done and caught.value.number == signal.SIGTERM


def test_passes_through_a_network_are_where_a_signal_is_seen():
    """Between the steps of an attack; outside of the context they run on."""
    layer = torch.nn.Linear(1, 1)
    with Interrupts() as interrupts:
        with interrupts.passes(layer):
            layer(torch.ones(1))
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Interrupted):
                layer(torch.ones(1))
        layer(torch.ones(1))
