"""The kill part of `make torture`: programs at toy size, killed at random moments and run again until done.

A run is started, killed (SIGKILL) after a random part of the time that an uninterrupted one takes, and the
same command started again in the same directory, and so on. A run that comes to its end is compared with the
uninterrupted one, bit for bit, and the next begins in a new directory.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from commands import ROOT, same_tensors
from safetensors.torch import save_file
from toy_autolora_runs import World as AutoLoraWorld
from toy_autolora_runs import write_cifar
from toy_training import World, write_source

from amt.models.architectures import ARCHS, build_network
from amt.models.network import build_classifier

TIMES = {"seconds", "fit_seconds"}  # fields of rows that no two runs share


class Program(NamedTuple):
    """A program at toy size.

    Args:
        words: (output directory) -> the command line after `python`.
        same: (a directory, another) -> whether the results are equal.
        phase: (directory) -> the phase that a run is in, told by its files.
    """

    words: Callable[[Path], list]
    same: Callable[[Path, Path], bool]
    phase: Callable[[Path], str]


def rows(file: Path) -> list[dict]:
    found = map(json.loads, file.read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def same_weights(one: Path, other: Path) -> bool:
    return all(same_tensors(one / name, other / name) for name in ("last.safetensors", "best.safetensors"))


def training_phase(folder: Path) -> str:
    stages = {
        "best.safetensors": "after an epoch",
        "last.safetensors": "in an epoch",
        "run.json": "first steps",
    }
    return next((phase for name, phase in stages.items() if (folder / name).exists()), "start-up")


def testing_phase(folder: Path) -> str:
    stages = {"results.json": "report", "rows.jsonl": "episodes", "run.json": "first episode"}
    return next((phase for name, phase in stages.items() if (folder / name).exists()), "start-up")


def autolora_phase(folder: Path) -> str:
    test = testing_phase(folder / "AFF" / "test")
    return training_phase(folder / "AFF") if test == "start-up" else "testing"


def programs(place: Path) -> dict[str, Program]:
    """The three programs, and what they read below `place`."""
    write_source(place / "data" / "tiny", (6, 5, 5), 12)
    torch.manual_seed(0)
    save_file(build_network(ARCHS["vit_mini"]).state_dict(), place / "vit.safetensors")
    world = World(place / "data", place / "vit.safetensors")
    start = build_classifier("resnet_mini", 10, 32).start(3)
    save_file({n: t for n, t in start.items() if not n.startswith("fc.")}, place / "resnet.safetensors")
    cifar = AutoLoraWorld(write_cifar(place / "cifar"), place / "resnet.safetensors")
    often = ("--save_every_minutes", 0.002, "--threads", 1)
    training = ("--epochs", 4, "--nEpisode", 6, *often)
    testing = ("--nTestEpisode", 12, "--threads", 1)
    return {
        "main.py": Program(
            lambda out: [ROOT / "main.py", *world.train(out, *training)], same_weights, training_phase
        ),
        "main.py autolora": Program(
            lambda out: [ROOT / "main.py", "autolora", *cifar.flags(out, "--epochs", 4, *often)],
            lambda one, other: (
                same_weights(one / "AFF", other / "AFF")
                and rows(one / "AFF" / "test" / "rows.jsonl") == rows(other / "AFF" / "test" / "rows.jsonl")
            ),
            autolora_phase,
        ),
        "test_meta_dataset.py": Program(
            lambda out: [ROOT / "test_meta_dataset.py", *world.test(out, *testing)],
            lambda one, other: rows(one / "rows.jsonl") == rows(other / "rows.jsonl"),
            testing_phase,
        ),
    }


class Killed(NamedTuple):
    """What became of the kills of one program."""

    kills: int
    phases: Counter[str]
    compared: int
    equal: int
    lost: int  # steps or episodes that were shown as done and had to be done again, at most
    seconds: float  # of an uninterrupted run


def attempt(words: list, log: Path, seconds: float | None) -> int | None:
    """Run a command for so long (None: to its end); its exit code, None if it was killed."""
    with log.open("wb") as file:
        running = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            return running.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            return None


def shown(log: Path) -> list[int]:
    """The counts of the progress lines, in order: 3 of `3/24`."""
    return [int(done) for done in re.findall(r"\b(\d+)/\d+ \[", log.read_text(errors="replace"))]


def torture(program: Program, place: Path, kills: int, draw: random.Random) -> Killed:
    """Kill a program so many times."""
    place.mkdir()
    log, reference = place / "log", place / "reference"
    begun = time.monotonic()
    if attempt(program.words(reference), log, None) != 0:
        raise RuntimeError(f"the uninterrupted run failed:\n{log.read_text(errors='replace')[-2000:]}")
    seconds = time.monotonic() - begun
    phases, done, compared, equal, lost, run = Counter[str](), 0, 0, 0, 0, 0
    before = 0  # the count that was shown when the run was killed
    while True:
        out = place / f"run{run}"
        code = attempt(program.words(out), log, draw.uniform(0.1, 1.0) * seconds if done < kills else None)
        counts = shown(log)
        if before and counts:
            lost = max(lost, before - counts[0])
        before = max(counts, default=before)
        if code is None:
            done += 1
            phases[program.phase(out)] += 1
            continue
        compared += 1
        if code != 0:
            print(f"  exit code {code}: {log.read_text(errors='replace')[-500:]}", file=sys.stderr)
        equal += code == 0 and program.same(reference, out)
        run, before = run + 1, 0
        if done >= kills:
            return Killed(done, phases, compared, equal, lost, seconds)


def main(place: Path, kills: int, seed: int) -> bool:
    """Kill all programs and print a table; whether all results were equal."""
    print(f"{'program':22}{'run':>7}{'kills':>7}{'runs':>6}{'equal':>7}{'lost at most':>14}   kills by phase")
    kept = True
    for name, program in programs(place).items():
        found = torture(program, place / name.replace(" ", "_"), kills, random.Random(f"{seed} {name}"))
        phases = ", ".join(f"{phase} {number}" for phase, number in found.phases.most_common())
        print(
            f"{name:22}{found.seconds:6.1f}s{found.kills:7}{found.compared:6}{found.equal:7}{found.lost:14}"
            f"   {phases}",
            flush=True,
        )
        kept &= found.compared == found.equal
    return kept
