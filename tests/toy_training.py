"""Runs of main.py and test_meta_dataset.py at toy size, on three small sources and random weights."""

import importlib.util
import io
import json
import re
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from commands import ROOT, Ended, called
from conftest import flat_spec, write_spec
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amt.models.architectures import ARCHS, build_network
from amt.training.keeper import Keeper
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records

LEVELS = ("8", "0.1")
FIVE_WAY = ("--num_ways", "5", "--num_support", "1", "--num_query", "1")


def command(script: str, *flags) -> Ended:
    """Run a script of the project with these flags, in this process."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return called(module.main, [f"{script}.py", *flags])


def picture(class_id: int, record: int) -> bytes:
    """A noisy patch of the class's colour, which resembles the others' a little."""
    colour = np.random.default_rng(class_id).normal(128, 25, 3)
    noise = np.random.default_rng([class_id, record]).normal(0, 40, (20, 24, 3))
    encoded = io.BytesIO()
    Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(encoded, "JPEG")
    return encoded.getvalue()


def write_source(directory: Path, splits: tuple[int, int, int], n_images: int) -> Path:
    n_classes = sum(splits)
    write_spec(directory, flat_spec(directory.name, splits, [n_images] * n_classes))
    for class_id in range(n_classes):
        payloads = [encode_example(picture(class_id, record), class_id) for record in range(n_images)]
        write_records(directory / f"{class_id}.tfrecords", payloads)
    return directory


def flip_a_byte(file: Path, record: int) -> int:
    """Damage one record of a class; the byte at which the record begins."""
    begin = int(open_records(file).offsets[record])
    content = bytearray(file.read_bytes())
    content[begin + 100] ^= 0xFF
    file.write_bytes(content)
    return begin


class World(NamedTuple):
    """The sources `tiny`, `damaged` (record 1 of every class) and `no_valid`, and random weights."""

    data: Path
    weights: Path

    def train(self, out: Path, *flags) -> list:
        """Flags of main.py for a run of two epochs of two episodes; later flags win."""
        return [
            *("--arch", "vit_mini_amt", "--pretrained_checkpoint", self.weights, "--data_path", self.data),
            *("--base_sources", "tiny", "--output_dir", out, "--num_workers", 0, *FIVE_WAY),
            *("--epochs", 2, "--nEpisode", 2, "--nValEpisode", 2, "--epsilon", *LEVELS, "--attack_iters", 2),
            *("--lr", 0.005, "--clip_grad", 1, "--warmup_epochs", 0, "--pyramid_grids", 0),
            *("--pyramid_scalars", 1, "--statistics_episodes", 1, *flags),
        ]

    def test(self, out: Path, *flags) -> list:
        """Flags of test_meta_dataset.py for two episodes of `tiny`."""
        return [
            *("--arch", "vit_mini_amt_merge", "--pretrained_checkpoint", self.weights),
            *("--data_path", self.data, "--test_sources", "tiny", "--output_dir", out, "--num_workers", 0),
            *(*FIVE_WAY, "--nTestEpisode", 2, "--epsilon", 2, 8, "--attack_iters", 2, *flags),
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    data = tmp_path_factory.mktemp("data")
    write_source(data / "tiny", (6, 5, 5), 12)
    write_source(data / "no_valid", (6, 0, 5), 3)
    for file in write_source(data / "damaged", (5, 5, 5), 3).glob("*.tfrecords"):
        flip_a_byte(file, 1)
    weights = tmp_path_factory.mktemp("weights") / "vit_mini.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build_network(ARCHS["vit_mini"]).state_dict(), weights)
    return World(data, weights)


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory) -> tuple[Ended, Path]:
    """An uninterrupted run of main.py: how it ended, and its folder."""
    out = tmp_path_factory.mktemp("trained")
    return command("main", *world.train(out)), out


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: values by step, by name; a step shown twice would fail."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    shown = {name: board.Scalars(name) for name in board.Tags()["scalars"]}
    assert all(len({event.step for event in events}) == len(events) for events in shown.values())
    return {name: {event.step: event.value for event in events} for name, events in shown.items()}


def error_line(ended: Ended) -> str:
    """The one line on stderr that is not a progress bar's, which is the error."""
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line.strip() and "episode" not in line]
    errors = re.findall(r"^error: .+$", ended.err, re.MULTILINE)
    assert len(errors) == 1, ended.err
    assert lines in ([], errors), ended.err
    return errors[0]


def assert_refused(ended: Ended, out: Path, *words: str) -> None:
    """Exit code 2, one line and nothing but that line, and no work done."""
    assert ended.code == 2
    assert ended.out == "" and not out.exists()
    assert re.fullmatch(r"error: [^\r\n]+\n", ended.err), ended.err
    missing = [word for word in words if word not in ended.err]
    assert not missing, f"{missing} not in {ended.err}"


def signal_after(patch: pytest.MonkeyPatch, steps: int, number: int) -> None:
    """Arrange that a command is sent a signal as soon as so many steps are done."""
    log_step = Keeper.log_step

    def noisy(self, step, *arguments):
        log_step(self, step, *arguments)
        if step == steps:
            signal.raise_signal(number)

    patch.setattr(Keeper, "log_step", noisy)


def strict_json(file: Path) -> dict:
    """JSON as the rest of the world reads it: without NaN and Infinity."""

    def refuse(constant: str):
        raise ValueError(f"{file} holds {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)
