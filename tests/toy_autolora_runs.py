"""Runs of `main.py autolora` at toy size, on a CIFAR-10 of a few pictures."""

import json
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from commands import Ended, called
from conftest import single_thread
from safetensors.torch import save_file

from amt.cli import autolora
from amt.models.network import build_classifier

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry")


def command(*flags) -> Ended:
    """`main.py autolora` in this process."""
    return called(lambda: autolora.main([str(flag) for flag in flags]), sys.argv)


def pictures(n: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Noise on the colour of the class: (n, 32, 32, 3) uint8, and labels."""
    labels = [k % len(CLASSES) for k in range(n)]
    colours = np.random.default_rng(0).integers(60, 196, (len(CLASSES), 3))
    noise = np.random.default_rng(seed).integers(-60, 60, (n, 32, 32, 3))
    return (colours[labels][:, None, None] + noise).astype(np.uint8), labels


def write_cifar(folder: Path) -> Path:
    """Five times ten pictures to train on, and twenty to test on; the root above CIFAR's own folder."""
    own = folder / "cifar-10-batches-py"
    own.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = pictures(20 if name == "test_batch" else 10, seed)
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        (own / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}, 2))
    (own / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}, 2))
    return folder


class World(NamedTuple):
    """Data, and the file of a random network without classifier."""

    data: Path
    weights: Path

    def flags(self, out: Path, *more) -> list:
        """Of a run of two epochs of three batches; later flags win."""
        return [
            *("--dataset", "cifar10", "--data", self.data),
            *("--arch", "resnet_mini", "--checkpoint", self.weights),
            *("--output", out, "--epochs", 2, "--batch_size", 16, "--val", 0.2, "--num_workers", 0),
            *("--num_steps_train", 2, "--num_steps_test", 2, "--device", "cpu", "--lr", 0.05, *more),
        ]


@pytest.fixture(scope="session")
def cifar(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    weights = build_classifier("resnet_mini", 10, 32).start(3)
    save_file({n: t for n, t in weights.items() if not n.startswith("fc.")}, folder / "start.safetensors")
    return World(write_cifar(folder / "data"), folder / "start.safetensors")


@pytest.fixture(scope="session")
def tuned(cifar, tmp_path_factory) -> Path:
    """The folder of an ordinary run, with the gradients' similarity."""
    out = tmp_path_factory.mktemp("tuned")
    with single_thread():
        ended = command(*cifar.flags(out, "--gradient_similarity", 2))
    assert ended.code == 0, ended.err
    return out


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [row | {"seconds": 0, "fit_seconds": 0} for row in found]


def assert_refused(ended: Ended, *words: str) -> None:
    """Exit code 2 and one line on stderr, with these words."""
    assert ended.code == 2, ended
    lines = [line for line in ended.err.splitlines() if "batch/s" not in line and "?batch" not in line]
    *before, last = [line for line in lines if line.strip()]
    assert last.startswith("error: ") and "Traceback" not in ended.err
    assert not before or all("note:" in line for line in before)
    for word in words:
        assert word in last, f"{word!r} is not in {last!r}"
