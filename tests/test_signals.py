"""A signal ends every program, in every phase, within seconds, with its exit code and without a traceback."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, start

from amt.files.signals import Interrupted, Interrupts
from meta_dataset_readers.endings import Ended, held, raised

SECONDS = 20  # on a loaded machine; the phases below would last for hours

# A data set that takes its time after the second episode.
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


@pytest.mark.parametrize(
    ("phase", "number", "said"),
    [
        ("attack", signal.SIGTERM, "0 of 2 episodes are done; the same command continues"),
        ("selection", signal.SIGINT, "0 of 2 episodes are done; the same command continues"),
        ("validation", signal.SIGHUP, "stopped after 2 of 4 episodes; the same command continues"),
        ("waiting", signal.SIGTERM, "2 of 4 episodes are done; the same command continues"),
    ],
)
def test_a_signal_ends_each_phase(world, trained, tmp_path, phase, number, said):
    """The whole group is signalled, as batch systems do it."""
    resume, out = ("--resume", trained[1] / "last.safetensors"), tmp_path / "out"
    evaluation = ROOT / "test_meta_dataset.py"
    if phase == "attack":
        hours = ("--attack", "square", "queries=100000000", "--epsilon", 0.001, "--probe_episodes", 0)
        words, pattern = [evaluation, *world.test(out, *resume, *hours)], rb"tiny:\s+0%"
    elif phase == "selection":
        hours = ("--select_on", "tiny", "--nSelectEpisode", 100_000)
        words, pattern = [evaluation, *world.test(out, *resume, *hours)], rb"choosing on tiny[^/]* [1-9]"
    elif phase == "validation":
        words, pattern = [ROOT / "main.py", *world.train(out, "--nValEpisode", 100_000)], rb" 2/4 "
    else:
        one = ("--num_workers", 1, "--nTestEpisode", 4, "--epsilon")
        words, pattern = ["-c", SLOW, evaluation, *world.test(out, *resume, *one)], b""
    running = start(*words, cwd=tmp_path)
    read_until(running, pattern or rb"tiny:\s+0%")
    if phase == "waiting":
        wait_for_rows(out / "rows.jsonl", 2)
    time.sleep(0.2)
    began = time.monotonic()
    os.killpg(running.pid, number)
    out, err = running.communicate()
    assert time.monotonic() - began < SECONDS
    assert running.returncode == 128 + number, err.decode()
    assert b"Traceback" not in err and b"error" not in err, err.decode()
    assert out.decode().splitlines()[-1] == said


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
    with pytest.raises(Ended) as caught, raised():
        signal.raise_signal(number)
    assert caught.value.number == number and signal.getsignal(number) is before


def test_a_signal_waits_until_processes_are_started():
    done = []
    with pytest.raises(Ended), raised(), held():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(1)
    assert done


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
