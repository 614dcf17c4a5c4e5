"""The programs of the project as `gpu_check.py` runs them: at toy size, in processes of their own.

Knows which flags make a run short, and nothing of what is checked.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from amt.models.architectures import ARCHS, build_network

ROOT = Path(__file__).resolve().parents[1]
OVER = "not run to its end: the time is over"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the checks run, and on what.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        folder: for everything that is written.
        data, source: where episodes are read, TRAIN and TEST.
        arch, image_size: of the timed step.
        steps: of its attack.
        queries: of each of its five classes.
        end: by `time.monotonic`.
    """

    device: str
    folder: Path
    data: Path
    source: str
    arch: str = "dino_small_patch16"
    image_size: int = 128
    steps: int = 10
    queries: int = 10
    end: float = float("inf")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def run(place: Place, script: str, *words: object) -> str:
    """Run a program of the project to its end; what went wrong, in words."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    left = place.end - time.monotonic()
    if left <= 0:
        return OVER
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=min(left, 3600), cwd=place.folder
        )
    except subprocess.TimeoutExpired:
        return OVER
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"exit code {done.returncode}: {last}" if done.returncode else ""


def weights(place: Place) -> Path:
    """A file of random weights of vit_mini."""
    file = place.folder / "vit_mini.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        save_file(build_network(ARCHS["vit_mini"]).state_dict(), file)
    return file


def common(place: Place, out: str, device: str) -> list[object]:
    """The flags of both programs."""
    return [
        *("--data_path", place.data, "--output_dir", place.folder / out, "--device", device),
        *("--pretrained_checkpoint", weights(place), "--num_ways", 5, "--num_support", 1, "--num_query", 1),
        *("--num_workers", 0, "--threads", 1),
    ]


def training(place: Place, out: str, device: str, episodes: int = 2) -> list[object]:
    """The flags of a short training of four levels."""
    return [
        *(*common(place, out, device), "--arch", "vit_mini_amt", "--base_sources", place.source),
        *("--epochs", 1, "--warmup_epochs", 0, "--nEpisode", episodes, "--nValEpisode", 0),
        *("--statistics_episodes", 0, "--attack_iters", 2),
    ]


def testing(place: Place, out: str, device: str, attacks: Sequence[str]) -> list[object]:
    """The flags of a short evaluation of that pool."""
    named = [word for attack in attacks for word in ("--attack", *attack.split())]
    return [
        *(*common(place, out, device), "--arch", "vit_mini_amt_merge", "--test_sources", place.source),
        *("--resume", place.folder / "trained" / "last.safetensors", "--nTestEpisode", 2),
        *("--probe_episodes", 0, "--samples", 0, "--epsilon", 8, *named),
    ]


def rows(place: Place, out: str) -> list[dict]:
    lines = (place.folder / out / "rows.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda row: row["index"])


def stop(place: Place, script: str, *words: object) -> str:
    """Start a program and send it SIGTERM as soon as a step is done; what went wrong, in words."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
        assert running.stderr is not None
        shown = b""
        while not re.search(rb" [1-9]\d*/\d+ ", shown):
            more = os.read(running.stderr.fileno(), 4096)
            if not more or time.monotonic() > place.end:
                running.kill()
                return "it ended before the signal" if not more else OVER
            shown += more
        running.terminate()
        running.communicate()
    return "" if running.returncode == 143 else f"exit code {running.returncode} after SIGTERM, expected 143"
