"""The two commands, from the flags to the files they leave, and what they say to bad input.

A process of one's own costs seconds of imports, so only what needs one gets one; elsewhere a command is
called through `exit_on_bad_input`, as its last line does, with the same flags and the same ending.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import flat_spec, write_spec
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from amt.attacks.levels import Perturbation
from amt.cli import options
from amt.evaluation import runs
from amt.files import checkpoint
from amt.files.run_directory import RunDirectory
from amt.models.architectures import ARCHS, build_network
from amt.models.pool import principal_pool
from amt.training.keeper import Keeper
from amt.training.meta_tune import Tuner
from meta_dataset_readers.errors import exit_on_bad_input
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, SourceMixture
from meta_dataset_readers.stored_episodes import open_episodes
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("8", "0.1")
FIVE_WAY = ("--num_ways", "5", "--num_support", "1", "--num_query", "1")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(script: str, *flags) -> Ended:
    """Run a script of the project with these flags, in this process."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{script}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_on_bad_input(module.main)
    except SystemExit as ended:
        return Ended(ended.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv


def start(script: str, *flags, cwd: Path) -> subprocess.Popen:
    """The same in a process of its own, as a user starts it, elsewhere than in the project's folder."""
    threads = str(torch.get_num_threads())  # sums depend on them
    return subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py", *map(str, flags)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        start_new_session=True,
    )


def process(script: str, *flags, cwd: Path) -> Ended:
    """Start a script and wait for its end."""
    running = start(script, *flags, cwd=cwd)
    out, err = running.communicate()
    return Ended(running.returncode, out.decode(), err.decode())


# --- a small world ---------------------------------------------------------------------------------------


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
            *("--pyramid_scalars", 1, *flags),
        ]

    def test(self, out: Path, *flags) -> list:
        """Flags of test_meta_dataset.py for two episodes of `tiny`."""
        return [
            *("--arch", "vit_mini_amt_merge", "--pretrained_checkpoint", self.weights),
            *("--data_path", self.data, "--test_sources", "tiny", "--output_dir", out, "--num_workers", 0),
            *(*FIVE_WAY, "--nTestEpisode", 2, "--epsilon", 2, 8, "--attack_iters", 2, *flags),
        ]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> tuple[Ended, Path]:
    """An uninterrupted run of main.py in a process of its own: how it ended, and its folder."""
    out = tmp_path_factory.mktemp("trained")
    return process("main", *world.train(out), cwd=tmp_path_factory.mktemp("elsewhere")), out


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit by bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def about(file: Path) -> dict:
    """The readable half of a checkpoint."""
    return json.loads(file.with_suffix(".json").read_text())


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: values by step, by name; a step shown twice would fail."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    shown = {name: board.Scalars(name) for name in board.Tags()["scalars"]}
    assert all(len({event.step for event in events}) == len(events) for events in shown.values())
    return {name: {event.step: event.value for event in events} for name, events in shown.items()}


# --- training --------------------------------------------------------------------------------------------


def test_a_run_leaves_its_checkpoints_and_says_where(trained):
    ended, out = trained
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"done: {out / 'last.safetensors'}"
    assert "error" not in ended.err and "Warning" not in ended.err
    assert {path.name for path in out.iterdir()} == {
        *("last.safetensors", "last.json", "best.safetensors", "best.json", "tensorboard"),
        *("run.json", ".lock"),
    }


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_says_how_it_came_about(world, trained, name):
    _, out = trained
    file = out / f"{name}.safetensors"
    told = about(file)
    assert told["command"].startswith("main.py --arch vit_mini_amt") and str(world.data) in told["command"]
    assert {"python", "torch", "timm", "numpy"} <= told["versions"].keys()
    assert told["arch"] == "vit_mini"
    assert told["settings"]["epochs"] == 2 and told["settings"]["seed"] == 0
    assert [level["epsilon"] for level in told["levels"]] == [8.0, 0.1]
    assert all(level["steps"] == 2 for level in told["levels"])
    for number, note in enumerate(told["history"], start=1):
        assert (note["epoch"], note["episodes"]) == (number, 2 * number)
        assert [set(level) for level in note["validation"]] == [{"clean", "robust"}] * 2
    saved = checkpoint.load(file)
    assert bool(saved.momentum) == (name == "last") == ("tuner" in told)


def test_best_is_the_epoch_that_validates_best(trained):
    _, out = trained
    scores = [note["score"] for note in about(out / "last.safetensors")["history"]]
    assert len(scores) == 2
    assert len(about(out / "best.safetensors")["history"]) == 1 + scores.index(max(scores))


def test_training_moves_every_adapter_its_own_way(trained):
    """They started alike."""
    factors = checkpoint.load(trained[1] / "last.safetensors").pool.factors
    assert all(not torch.equal(factor[0], factor[1]) for factor in factors.values())


def test_tensorboard_shows_every_level(trained):
    shown = scalars(trained[1])
    per_step = ("total", "natural", "robust", "clean_accuracy", "robust_accuracy", "lr", "seconds_per_step")
    for level in (0, 1):
        for name in per_step:
            assert set(shown[f"level{level}/{name}"]) == {1, 2, 3, 4}
        for name in ("validation_clean", "validation_robust"):
            assert set(shown[f"level{level}/{name}"]) == {2, 4}
    rates = shown["level0/lr"]
    assert rates[1] == rates[2] > rates[3] == rates[4] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_seed_gives_the_same_weights_with_any_number_of_workers(world, trained, tmp_path, workers):
    """Another process, another number of workers: the same bits, momentum included."""
    ended = command("main", *world.train(tmp_path / "run", "--num_workers", workers))
    assert ended.code == 0, ended.err
    for name in ("last", "best"):
        assert same_tensors(tmp_path / "run" / f"{name}.safetensors", trained[1] / f"{name}.safetensors")


def test_another_seed_gives_other_weights(world, trained, tmp_path):
    command("main", *world.train(tmp_path, "--seed", 1, "--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0))
    assert not same_tensors(tmp_path / "last.safetensors", trained[1] / "last.safetensors")


@pytest.mark.parametrize(
    ("flags", "scores", "precision"),
    [
        (("--pgd_method", "standard"), {"clean"}, "None"),
        (("--bf16",), {"clean", "robust"}, "torch.bfloat16"),
        (("--fp16",), {"clean", "robust"}, "torch.float16"),
    ],
)
def test_other_ways_to_train(world, tmp_path, flags, scores, precision):
    short = ("--epochs", 1, "--nEpisode", 1, "--epsilon", 8, "--nValEpisode", 1)
    ended = command("main", *world.train(tmp_path, *short, *flags))
    assert ended.code == 0, ended.err
    told = about(tmp_path / "last.safetensors")
    assert set(told["history"][0]["validation"][0]) == scores
    assert told["protocol"]["autocast"] == precision
    checkpoint.load(tmp_path / "last.safetensors")  # refuses what is not finite


def test_without_validation_the_last_epoch_is_the_best(world, tmp_path):
    """And a source without a VALID split can be trained on."""
    flags = ("--base_sources", "no_valid", "--nValEpisode", 0, "--nEpisode", 1)
    ended = command("main", *world.train(tmp_path, *flags))
    assert ended.code == 0, ended.err
    last, best = load_file(tmp_path / "last.safetensors"), load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(last[name], best[name]) for name in best)


def test_several_sources_are_mixed(world, tmp_path):
    flags = ("--base_sources", "tiny", "no_valid", "--val_sources", "tiny", "--epochs", 1, "--nEpisode", 1)
    ended = command("main", *world.train(tmp_path, *flags))
    assert ended.code == 0, ended.err
    assert about(tmp_path / "last.safetensors")["tuner"]["episodes_done"] == 2


def test_a_collapse_is_said_and_noted(world, tmp_path):
    """A network whose features are all zero stays at ln(5) with no divergence."""
    dead = tmp_path / "dead.safetensors"
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(world.weights).items()}, dead)
    flags = ("--pretrained_checkpoint", dead, "--epochs", 1, "--epsilon", 8)
    ended = command("main", *world.train(tmp_path / "run", *flags))
    assert ended.code == 0, ended.err
    assert "warning: level 0 has collapsed: its loss stayed at ln(ways) = 1.609" in ended.out
    assert about(tmp_path / "run" / "last.safetensors")["history"][0]["collapsed"] == [0]


@pytest.mark.parametrize(("per_epoch", "kept"), [(1, True), (4, False)])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(world, tmp_path, per_epoch, kept):
    explosive = ("--lr", "1e30", "--clip_grad", "1e30", "--nValEpisode", 0, "--nEpisode", per_epoch)
    ended = command("main", *world.train(tmp_path, *explosive))
    assert ended.code == 2
    message = error_line(ended)
    assert re.search(r"loss is (nan|inf) at episode 1, level 0 \(epsilon 8/255\)", message)
    last = tmp_path / "last.safetensors"
    assert last.exists() == kept and (f"the last good state is kept in {last}" in message) == kept
    if kept:
        checkpoint.load(last)  # refuses what is not finite


# --- stopping and resuming -------------------------------------------------------------------------------


def signal_after(patch: pytest.MonkeyPatch, steps: int, number: int) -> None:
    """Arrange that a command is sent a signal as soon as so many steps are done."""
    log_step = Keeper.log_step

    def noisy(self, step, *arguments):
        log_step(self, step, *arguments)
        if step == steps:
            signal.raise_signal(number)

    patch.setattr(Keeper, "log_step", noisy)


@pytest.mark.parametrize(
    ("steps", "number", "workers", "named"),
    [
        (1, signal.SIGTERM, 0, False),
        (3, signal.SIGINT, 1, True),
        (2, signal.SIGHUP, 1, False),
        (4, signal.SIGTERM, 0, False),
    ],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    world, trained, tmp_path, monkeypatch, steps, number, workers, named
):
    """Stopped in the middle of the first or the second epoch, or before the validation of one; whether its
    file is named or not."""
    flags = world.train(tmp_path, "--num_workers", workers)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signal_after(monkeypatch, steps, number)
    stopped = command("main", *flags)
    assert stopped.code == 128 + number
    assert last_line(stopped) == f"stopped after {steps} of 4 episodes; the same command continues"
    assert about(tmp_path / "last.safetensors")["finished"] is False
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    resumed = command("main", *flags, *(["--resume", tmp_path / "last.safetensors"] if named else []))
    assert resumed.code == 0, resumed.err
    for name in ("last", "best"):
        assert same_tensors(tmp_path / f"{name}.safetensors", trained[1] / f"{name}.safetensors")
        here, there = about(tmp_path / f"{name}.safetensors"), about(trained[1] / f"{name}.safetensors")
        assert here["history"] == there["history"] and here["settings"] == there["settings"]
    here, there = scalars(tmp_path), scalars(trained[1])
    assert here.keys() == there.keys()
    assert all(here[name] == there[name] for name in here if not name.endswith("seconds_per_step"))


def test_a_real_process_is_stopped_by_sigterm_and_goes_on_exactly(world, tmp_path, monkeypatch):
    """Whenever the signal arrives, and although it reaches the workers too, as `timeout` and batch systems
    send it: the file then continues as a run that never stopped."""
    flags = ("--nEpisode", 500, "--nValEpisode", 0, "--epsilon", 8)
    running = start("main", *world.train(tmp_path / "stopped", *flags, "--num_workers", 1), cwd=tmp_path)
    shown = b""
    while not re.search(rb" [1-9]\d*/1000 ", shown):
        more = os.read(running.stderr.fileno(), 4096)
        assert more, f"ended before the first step: {shown.decode()}"
        shown += more
    os.killpg(running.pid, signal.SIGTERM)
    out, err = running.communicate()
    assert running.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in err and b"error" not in err
    said = re.fullmatch(r"stopped after (\d+) of 1000 episodes; the same command continues\n", out.decode())
    assert said
    steps, last = int(said[1]), tmp_path / "stopped" / "last.safetensors"
    assert about(last)["tuner"]["episodes_done"] == steps

    signal_after(monkeypatch, steps + 2, signal.SIGTERM)
    command("main", *world.train(tmp_path / "resumed", *flags, "--resume", last))
    command("main", *world.train(tmp_path / "straight", *flags))
    assert about(tmp_path / "straight" / "last.safetensors")["tuner"]["episodes_done"] == steps + 2
    assert same_tensors(tmp_path / "resumed" / "last.safetensors", tmp_path / "straight" / "last.safetensors")


def test_a_killed_run_loses_minutes_and_ends_with_the_same_bits(world, trained, tmp_path):
    """SIGKILL at any moment: before the first checkpoint, within an epoch, in a validation, while writing."""
    flags = world.train(tmp_path / "run", "--save_every_minutes", 1e-9)
    last = tmp_path / "run" / "last.safetensors"
    for steps in (0, 1, 2, 3):
        running = start("main", *flags, cwd=tmp_path)
        while running.poll() is None and not (last.exists() and episodes_done(last) >= steps):
            time.sleep(0.005)
            if steps == 0 and (tmp_path / "run" / "run.json").exists():
                break
        running.kill()
        running.communicate()
    ended = command("main", *flags)
    assert ended.code == 0, ended.err
    for name in ("last", "best"):
        assert same_tensors(last.with_stem(name), trained[1] / f"{name}.safetensors")
        assert about(last.with_stem(name))["history"] == about(trained[1] / f"{name}.safetensors")["history"]
    assert not [path for path in (tmp_path / "run").rglob("*.part")]


def episodes_done(file: Path) -> int:
    with safe_open(file, "np") as opened:
        return json.loads(opened.metadata()["amt"])["tuner"]["episodes_done"]


def test_checkpoints_within_an_epoch_come_as_often_as_they_are_asked_for(world, tmp_path, monkeypatch):
    written = []
    save_last = Keeper.save_last
    monkeypatch.setattr(
        Keeper, "save_last", lambda self, *content: (written.append(1), save_last(self, *content))
    )
    short = ("--epochs", 1, "--nEpisode", 3, "--epsilon", 8, "--nValEpisode", 0)
    for minutes, expected in ((0, 1), (600, 1), (1e-9, 4)):
        written.clear()
        command("main", *world.train(tmp_path / str(minutes), *short, "--save_every_minutes", minutes))
        assert len(written) == expected, minutes


def test_the_same_command_on_a_finished_run_trains_nothing(world, trained, tmp_path):
    """A pool was lost that way. `--overwrite` starts anew, and a note of one's own survives even that."""
    out = tmp_path / "run"
    shutil.copytree(trained[1], out)
    (out / "notes.md").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for resume in ([], ["--resume", out / "last.safetensors"]):
        ended = command("main", *world.train(out), *resume)
        assert ended.code == 0 and last_line(ended).startswith(f"done already: {out / 'last.safetensors'}")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    refused = command("main", *world.train(out, "--seed", 1))
    assert refused.code == 2 and f"{out / 'run.json'}: this run was begun with seed 0, not 1" in refused.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    ended = command("main", *world.train(out, "--seed", 1, "--overwrite", "--nValEpisode", 0))
    assert ended.code == 0 and last_line(ended) == f"done: {out / 'last.safetensors'}"
    assert about(out / "last.safetensors")["settings"]["seed"] == 1
    assert (out / "notes.md").read_text() == "mine" and len(list((out / "tensorboard").iterdir())) == 1


def test_a_run_of_an_older_version_continues_and_stays_when_it_is_finished(world, stopped, trained, tmp_path):
    """It has no run.json, and its state no sums of the epoch."""
    for source, words in ((stopped, "done: "), (trained[1] / "last.safetensors", "done already: ")):
        out = tmp_path / words[:5].strip(": ") / str(len(words))
        out.mkdir(parents=True)
        saved = checkpoint.load(source)
        saved.about["tuner"].pop("seen")
        checkpoint.save(out / "last.safetensors", saved)
        flags = world.train(out, "--nValEpisode", 0)
        refused = command("main", *flags, "--lr", 1)
        assert refused.code == 2 and f"{out / 'last.safetensors'}: this run was begun with lr" in refused.err
        ended = command("main", *flags)
        assert ended.code == 0 and last_line(ended).startswith(words), ended


def test_a_run_that_began_from_another_directory_goes_on_from_its_own(world, stopped, trained, tmp_path):
    """With `--resume` as without it: the state that is further on is that of the same run."""
    flags = world.train(tmp_path, "--nValEpisode", 0, "--resume", stopped)
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 3, signal.SIGTERM)
        assert command("main", *flags).code == 143
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = Tuner.step
        patch.setattr(Tuner, "step", lambda self, episode: (steps.append(1), step(self, episode))[1])
        assert command("main", *flags).code == 0
    assert len(steps) == 1
    assert same_tensors(tmp_path / "last.safetensors", trained[1] / "last.safetensors")


def test_two_runs_do_not_share_a_directory(world, tmp_path):
    with RunDirectory(tmp_path, {"kind": "a meta-tuning", "settings": {}}, results=[]):
        ended = command("main", *world.train(tmp_path))
    assert ended.code == 2 and "another process is writing here" in error_line(ended)


def test_what_would_overwrite_its_own_start_is_refused(world, stopped):
    flags = world.train(stopped.parent, "--nValEpisode", 0, "--resume", stopped, "--overwrite")
    ended = command("main", *flags)
    assert ended.code == 2 and "--overwrite would remove" in error_line(ended) and stopped.exists()


def test_a_signal_during_the_last_step_does_not_ask_to_continue(world, tmp_path, monkeypatch):
    signal_after(monkeypatch, 1, signal.SIGINT)
    ended = command("main", *world.train(tmp_path, "--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0))
    assert ended.code == 0 and last_line(ended) == f"done: {tmp_path / 'last.safetensors'}"


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> Path:
    """The last.safetensors of a run that was stopped after its first episode."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 1, signal.SIGTERM)
        command("main", *world.train(out, "--nValEpisode", 0))
    return out / "last.safetensors"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", 0.001), ["lr 0.005", "0.001"]),
        (("--epochs", 3), ["epochs 2", "3"]),
        (("--seed", 1), ["seed 0", "1"]),
        (("--epsilon", 8, 4), ["levels", "0.1", "4"]),
        (("--rank", 4), ["rank 8", "4"]),
        (("--num_support", 2), ["num_support 1", "2"]),
        (("--image_size", 28), ["image_size 32", "28"]),
        (("--base_sources", "no_valid"), ["base_sources", "tiny", "no_valid"]),
        (("--bf16",), ["autocast", "bfloat16"]),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(world, stopped, tmp_path, flags, words):
    flags = world.train(tmp_path / "out", "--nValEpisode", 0, "--resume", stopped, *flags)
    assert_refused(command("main", *flags), tmp_path / "out", str(stopped), *words)


@pytest.mark.parametrize(
    ("name", "words"), [("best", ["optimiser", "last.safetensors"]), ("last", ["finished"])]
)
def test_what_cannot_be_continued_is_not_resumed(world, trained, tmp_path, name, words):
    flags = world.train(tmp_path / "out", "--resume", trained[1] / f"{name}.safetensors")
    assert_refused(command("main", *flags), tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("settings", None, ["settings", "dict"]),
        ("history", {}, ["history", "list"]),
        ("tuner", {}, ["damaged optimiser state", "episodes_done"]),
        ("tuner", {"episodes_done": 1, "scalers": []}, ["damaged optimiser state"]),
    ],
)
def test_a_tampered_header_is_an_error_not_a_crash(world, stopped, tmp_path, field, value, words):
    saved = checkpoint.load(stopped)
    tampered = tmp_path / "tampered.safetensors"
    checkpoint.save(tampered, dataclasses.replace(saved, about=saved.about | {field: value}))
    flags = world.train(tmp_path / "out", "--nValEpisode", 0, "--resume", tampered)
    assert_refused(command("main", *flags), tmp_path / "out", str(tampered), *words)


def test_ctrl_c_before_there_is_anything_to_save_ends_without_a_traceback(world, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(EpisodeReader, "raw", interrupted)
    for ended in (
        command("main", *world.train(tmp_path / "a")),
        command("test_meta_dataset", *world.test(tmp_path / "b", "--num_workers", 0)),
    ):
        assert ended.code == 130 and ended.err.endswith("interrupted\n")


# --- evaluation ------------------------------------------------------------------------------------------


def evaluated(world: World, trained: tuple[Ended, Path], out: Path, *flags) -> tuple[Ended, dict]:
    """How test_meta_dataset.py ended on the trained pool, and its results.json with the rows."""
    ended = command(
        "test_meta_dataset", *world.test(out, "--resume", trained[1] / "last.safetensors", *flags)
    )
    assert ended.code == 0, ended.err
    return ended, strict_json(out / "results.json") | {"rows": runs.load(out).rows}


def strict_json(file: Path) -> dict:
    """JSON as the rest of the world reads it: without NaN and Infinity."""

    def refuse(constant: str):
        raise ValueError(f"{file} holds {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


def test_evaluation_end_to_end_in_a_process_of_its_own(world, trained, tmp_path):
    """The table is printed, and results.json and the picture hold what the table came from."""
    resume = trained[1] / "best.safetensors"
    flags = world.test(tmp_path / "out", "--resume", resume, "--num_workers", 1, "--seed", 3)
    ended = process("test_meta_dataset", *flags, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "error" not in ended.err and "Warning" not in ended.err
    results = strict_json(tmp_path / "out" / "results.json")
    assert results["peak_memory_mb"] > 0 and results["episode_seconds"] > 0 and results["suspect"] == []

    assert results["command"].startswith("test_meta_dataset.py ") and str(resume) in results["command"]
    assert results["seed"] == 3 and results["split"] == "TEST" and results["checkpoint"] == str(resume)
    assert results["merging"]["tiny"]["how"] == "amt, beta 1 and gamma 0.6 as given"
    assert [attack["epsilons"] for attack in results["attacks"]] == [[2.0, 8.0]]
    columns = ("clean", "pgd2@2", "pgd2@8")
    rows = runs.load(tmp_path / "out").rows["tiny"]
    assert [row["index"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["ways"], row["support"], row["queries"]) == (5, 5, 5)
        assert len(row["coefficients"]) == 2 and math.isclose(sum(row["coefficients"]), 1)
        assert 1 >= row["clean"] >= row["pgd2@2"] >= row["pgd2@8"] >= 0
    for column in columns:
        a, b = (100 * row[column] for row in rows)
        found = results["summary"]["tiny"][column]
        assert math.isclose(found["mean"], (a + b) / 2) and found["n"] == 2
        assert math.isclose(found["interval"], 1.96 * abs(a - b) / 2)
        assert results["summary"]["average"][column] == found

    head, table, average = ended.out.splitlines()[1:4]
    assert head.split() == [*columns, "n"]
    summary = [results["summary"]["tiny"][column] for column in columns]
    cells = " ".join(f"{s['mean']:.1f} +- {s['interval']:.1f}" for s in summary)
    assert " ".join(table.split()) == f"tiny {cells} 2" and " ".join(average.split()) == f"average {cells} 2"
    with Image.open(tmp_path / "out" / "accuracy.png") as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_the_evaluated_episodes_can_be_written_out_and_validated_on(world, trained, tmp_path):
    """In Meta-Dataset's format, with where every image came from; they come back as they were."""
    evaluated(world, trained, tmp_path / "out", "--dump", tmp_path / "dump")
    stored = open_episodes(tmp_path / "dump" / "tiny", 32)
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
    read = EpisodeReader(world.data, "tiny", "TEST", sampling, 32, n_episodes=2)
    assert len(stored) == 2
    for back, episode in zip(stored, read, strict=True):
        assert torch.equal(back.query, episode.query) and back.query_origin == episode.query_origin
    flags = ("--val_episodes", tmp_path / "dump" / "tiny", "--epochs", 1)
    ended = command("main", *world.train(tmp_path / "run", *flags))
    assert ended.code == 0, ended.err
    assert len(about(tmp_path / "run" / "last.safetensors")["history"][0]["validation"]) == 2


def test_evaluation_is_repeatable(world, trained, tmp_path):
    """Whatever the number of workers: the same rows but for the time they took."""
    found = []
    for workers in (0, 1):
        _, results = evaluated(world, trained, tmp_path / str(workers), "--num_workers", workers)
        found.append([row | {"seconds": None, "fit_seconds": None} for row in results["rows"]["tiny"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "coefficients", "how"),
    [
        (("--specified_expert", 1), [0, 1], "fixed coefficients 0, 1"),
        (("--specified_expert", 0, 1), [0.5, 0.5], "fixed coefficients 0.5, 0.5"),
        (("--coefficients", 0.25, 0.75), [0.25, 0.75], "fixed coefficients 0.25, 0.75"),
        (("--routing", "uniform"), [0.5, 0.5], "fixed coefficients 0.5, 0.5"),
        (("--trim", "qkv:-1:0.5", "--routing", "uniform"), [0.5, 0.5], "; trimmed qkv:-1:0.5 as given"),
        (("--route_epsilon", 4), None, "amt, beta 1 and gamma 0.6, route_epsilon 4 as given"),
        (("--blend_beta", 10, "--blend_gamma", 0.4), None, "amt, beta 10 and gamma 0.4 as given"),
    ],
)
def test_the_flags_decide_the_merging_and_the_results_say_so(
    world, trained, tmp_path, flags, coefficients, how
):
    ended, results = evaluated(world, trained, tmp_path, *flags, "--nTestEpisode", 1)
    (row,) = results["rows"]["tiny"]
    assert math.isclose(sum(row["coefficients"]), 1)
    assert coefficients is None or row["coefficients"] == coefficients
    merging = results["merging"]["tiny"]
    assert how in merging["how"] and merging["how"] in ended.out
    assert merging["epsilons"] == [8.0, 0.1]


def test_settings_are_selected_on_the_valid_split_alone(world, trained, tmp_path, monkeypatch):
    read = []
    draw = EpisodeReader.raw

    def noted(self, index):
        read.append((self.source, self.split))
        return draw(self, index)

    monkeypatch.setattr(EpisodeReader, "raw", noted)
    flags = ("--select_on", "tiny", "--nSelectEpisode", 2, "--trim_candidates", "fc1:0:0.5", "--epsilon", 8)
    _, results = evaluated(world, trained, tmp_path, *flags)
    assert read[-2:] == [("tiny", "TEST")] * 2 and set(read[:-2]) == {("tiny", "VALID")}
    merging = results["merging"]["tiny"]
    assert "chosen on 2 VALID episodes of tiny" in merging["how"]
    scores = dict(merging["candidates"])
    chosen = f"beta {merging['routing']['beta']:g}, gamma {merging['routing']['gamma']:g}"
    grid = {name: score for name, score in scores.items() if name.startswith("beta")}
    assert len(grid) == 28 and grid[chosen] == max(grid.values())
    assert bool(merging["trims"]) == (scores["trim fc1:0:0.5"] > grid[chosen])


def test_without_a_checkpoint_the_pretrained_network_is_measured(world, tmp_path):
    ended = command("test_meta_dataset", *world.test(tmp_path, "--epsilon"))
    assert ended.code == 0, ended.err
    results = strict_json(tmp_path / "results.json")
    assert results["checkpoint"] is None and results["attacks"] == []
    assert results["merging"] == {"tiny": {"how": "none, the pretrained network"}}
    assert all(row["coefficients"] == [] and "clean" in row for row in runs.load(tmp_path).rows["tiny"])


def test_a_single_episode_has_no_interval_and_the_results_are_still_json(world, tmp_path):
    ended = command("test_meta_dataset", *world.test(tmp_path, "--nTestEpisode", 1))
    assert ended.code == 0, ended.err
    summary = strict_json(tmp_path / "results.json")["summary"]
    assert {entry["interval"] for columns in summary.values() for entry in columns.values()} == {None}


def test_several_domains_are_averaged(world, tmp_path):
    ended = command("test_meta_dataset", *world.test(tmp_path, "--test_sources", "tiny", "no_valid"))
    assert ended.code == 0, ended.err
    results = strict_json(tmp_path / "results.json")
    one, other = (results["summary"][name]["clean"] for name in ("tiny", "no_valid"))
    average = results["summary"]["average"]["clean"]
    assert math.isclose(average["mean"], (one["mean"] + other["mean"]) / 2) and average["n"] == 4


def test_a_failed_evaluation_leaves_the_results_of_an_earlier_one(world, trained, tmp_path):
    evaluated(world, trained, tmp_path, "--nTestEpisode", 1)
    before = (tmp_path / "results.json").read_bytes()
    flags = world.test(tmp_path, "--test_sources", "damaged", "--resume", trained[1] / "last.safetensors")
    assert command("test_meta_dataset", *flags).code == 2
    assert (tmp_path / "results.json").read_bytes() == before


# --- bad input -------------------------------------------------------------------------------------------


def last_line(ended: Ended) -> str:
    return ended.out.splitlines()[-1]


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


@pytest.fixture(scope="module")
def files(world, trained, tmp_path_factory) -> dict[str, Path]:
    """Files that are no checkpoints of vit_mini, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("files")
    small = build_network(dataclasses.replace(ARCHS["vit_mini"], dim=24))
    weights = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    save_file(weights, folder / "other_weights")
    pool = principal_pool(weights, 2, (Perturbation(8, 2),))
    checkpoint.save(folder / "other_pool.safetensors", checkpoint.Checkpoint(pool, {"arch": "small"}))
    (folder / "html").write_text("<!DOCTYPE html><html><body>404: not found</body></html>")
    (folder / "empty").write_bytes(b"")
    for name, whole in (
        ("truncated_weights", world.weights),
        ("truncated_pool", trained[1] / "best.safetensors"),
    ):
        (folder / name).write_bytes(whole.read_bytes()[:-1000])
    (folder / "folder").mkdir()
    (folder / "unknown_flag.args").write_text("--epochs 1\n--learning_speed 3\n")
    (folder / "unclosed.args").write_text('--arch "vit_mini\n')
    names = {path.stem: path for path in folder.iterdir() if path.suffix != ".json"}
    return names | {"weights": world.weights, "missing": folder / "missing"}


BOTH = ("main", "test_meta_dataset")


def refused(world: World, script: str, out: Path, *flags) -> Ended:
    usual = world.train(out) if script == "main" else world.test(out)
    return command(script, *usual, *flags)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--arch", "vit_mni_amt"), ["vit_mni", "did you mean 'vit_mini'"]),
        (("--epsilon", "-1"), ["--epsilon", "-1"]),
        (("--epsilon", "8", "nan"), ["--epsilon", "nan"]),
        (("--num_ways", "7"), ["tiny", "7"]),
        (("--num_support", "12"), ["tiny", "the 13 images", "with 12"]),
        (("--num_query", "12"), ["tiny", "the 13 images", "with 12"]),
        (("--image_size", "3"), ["--image_size is 3", "4"]),
        (("--device", "abacus"), ["--device 'abacus'"]),
        (("--no_such_flag",), ["--no_such_flag"]),
    ],
)
def test_bad_values_are_refused(world, tmp_path, script, flags, words):
    assert_refused(refused(world, script, tmp_path / "out", *flags), tmp_path / "out", *words)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere", ["nowhere", "no such directory"]),
        ("", ["--data_path", "empty"]),
        (".", ["no source 'tiny'"]),
    ],
)
def test_a_data_path_without_sources_is_refused(world, tmp_path, script, place, words):
    (tmp_path / "here").mkdir()
    path = place and tmp_path / "here" / place
    ended = refused(world, script, tmp_path / "out", "--data_path", path)
    assert_refused(ended, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("main", ("--base_sources", "tinny"), ["'tinny'", "did you mean 'tiny'"]),
        ("main", ("--val_sources", "tinny"), ["'tinny'", "did you mean 'tiny'"]),
        ("test_meta_dataset", ("--test_sources", "tinny"), ["'tinny'", "did you mean 'tiny'"]),
        ("main", ("--base_sources", "no_valid"), ["no_valid", "VALID has no classes", "TRAIN, TEST"]),
        (
            "test_meta_dataset",
            ("--test_sources", "no_valid", "--split", "VALID"),
            ["no_valid", "VALID has no classes", "TRAIN, TEST"],
        ),
        ("main", ("--rank", 1000), ["--rank is 1000"]),
    ],
)
def test_what_a_source_or_a_network_cannot_give_is_refused(world, tmp_path, script, flags, words):
    assert_refused(refused(world, script, tmp_path / "out", *flags), tmp_path / "out", *words)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["no such weights file"]),
        ("folder", ["is a folder, expected a regular file"]),
        ("html", ["a web page, not weights"]),
        ("empty", ["the file is empty"]),
        ("truncated_weights", ["truncated or damaged"]),
        ("other_weights", ["has shape", "expected"]),
        ("other_pool", ["tensor"]),
    ],
)
def test_a_file_without_the_backbones_weights_is_refused(world, files, tmp_path, script, name, words):
    ended = refused(world, script, tmp_path / "out", "--pretrained_checkpoint", files[name])
    assert_refused(ended, tmp_path / "out", str(files[name]), *words)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["no such checkpoint"]),
        ("folder", ["is a folder, expected a regular file"]),
        ("html", ["a web page, not weights"]),
        ("empty", ["the file is empty"]),
        ("truncated_pool", ["truncated or damaged"]),
        ("weights", ["not a pool"]),
        ("other_pool", ["tensor", "--arch vit_mini"]),
    ],
)
def test_a_file_without_a_pool_for_this_network_is_refused(world, files, tmp_path, script, name, words):
    ended = refused(world, script, tmp_path / "out", "--resume", files[name])
    assert_refused(ended, tmp_path / "out", str(files[name]), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--specified_expert", 2), ["--specified_expert 2", "0 to 1"]),
        (("--coefficients", 1), ["--coefficients has 1 values", "2 adapters"]),
        (("--trim", "qvk:-1:0.5"), ["--trim qvk:-1", "qkv"]),
        (("--trim", "qkv:9:0.5"), ["--trim qkv:9"]),
        (("--trim", "norm1:-1:0.5"), ["--trim norm1:-1"]),
        (("--select_on", "tinny"), ["'tinny'", "did you mean 'tiny'"]),
        (("--select_on", "no_valid"), ["VALID has no classes"]),
    ],
)
def test_merging_that_the_pool_does_not_know_is_refused(world, trained, tmp_path, flags, words):
    resume = ("--resume", trained[1] / "last.safetensors")
    ended = refused(world, "test_meta_dataset", tmp_path / "out", *resume, *flags)
    assert_refused(ended, tmp_path / "out", *words)


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["missing"]),
        ("unknown_flag", ["--learning_speed"]),
        ("unclosed", ['--arch "vit_mini']),
    ],
)
def test_a_faulty_recipe_is_refused(world, files, tmp_path, script, name, words):
    ended = refused(world, script, tmp_path / "out", f"@{files[name]}")
    assert_refused(ended, tmp_path / "out", *words)


@pytest.mark.parametrize("script", BOTH)
def test_an_output_that_cannot_be_written_is_refused(world, tmp_path, script):
    (tmp_path / "file").write_text("mine")
    ended = refused(world, script, tmp_path / "file" / "out")
    assert_refused(ended, tmp_path / "file" / "out", "--output_dir", str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", BOTH)
def test_a_gpu_that_is_not_there_is_refused(world, tmp_path, script):
    ended = refused(world, script, tmp_path / "out", "--device", "cuda")
    assert_refused(ended, tmp_path / "out", "--device 'cuda'")


def test_a_process_ends_with_code_2_and_one_line(world, tmp_path):
    """What the tests above see from within, once from outside."""
    ended = process("main", *world.train(tmp_path / "out", "--base-sources", "tinny"), cwd=tmp_path)
    assert_refused(ended, tmp_path / "out", "'tinny'", "did you mean 'tiny'")


# --- damaged records -------------------------------------------------------------------------------------

DAMAGED = ("--nValEpisode", 0, "--base_sources", "damaged")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("main", (*DAMAGED, "--num_workers", 0)),
        ("main", (*DAMAGED, "--num_workers", 1)),
        ("main", ("--val_sources", "damaged")),
        ("test_meta_dataset", ("--test_sources", "damaged", "--num_workers", 0)),
        ("test_meta_dataset", ("--test_sources", "damaged", "--num_workers", 1)),
    ],
)
def test_a_damaged_record_stops_the_command_and_is_named(world, tmp_path, script, flags):
    ended = refused(world, script, tmp_path / "out", *flags)
    assert ended.code == 2 and "Traceback" not in ended.err
    said = re.match(r"error: (.+\.tfrecords): record (\d+) at byte (\d+): ", error_line(ended))
    file, record, begin = Path(said[1]), int(said[2]), int(said[3])
    assert file.parent == world.data / "damaged" and record == 1
    assert begin == open_records(file).offsets[1]
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/results.json"))


def test_training_passes_over_damaged_records_and_counts_them(world, tmp_path):
    flags = ("--base_sources", "damaged", "--skip_bad_records")
    ended = command("main", *world.train(tmp_path, *flags))
    assert ended.code == 0, ended.err

    def reader(split: str, n: int) -> EpisodeReader:
        sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
        options = {"n_episodes": n, "skip_bad_records": True}
        return EpisodeReader(world.data, "damaged", split, sampling, 32, **options)

    episodes = [*SourceMixture([reader("TRAIN", 4)], 4), *reader("VALID", 2)]
    expected = len({line for episode in episodes for line in episode.skipped})  # validated on twice
    assert expected > 0 and f"{expected} damaged records were passed over" in ended.out


def test_evaluation_passes_over_damaged_records_and_counts_them(world, tmp_path):
    flags = ("--test_sources", "damaged", "--skip-bad-records")
    ended = command("test_meta_dataset", *world.test(tmp_path, *flags))
    assert ended.code == 0, ended.err
    skipped = strict_json(tmp_path / "results.json")["skipped_records"]
    assert skipped > 0 and f"{skipped} damaged records were passed over" in ended.out


# --- recipes ---------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes").glob("*.args"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_shipped_recipe_is_understood(recipe, tmp_path):
    """As flags of main.py or of test_meta_dataset.py, with nothing to add but where the output goes."""
    flags = [f"@{recipe}", "--output_dir", str(tmp_path)]
    if "training" in recipe.read_text().partition("\n")[0].lower():
        args = options.training_parser().parse(flags)
        options.check_training(args)
        assert options.tune_settings(args) and options.levels(args)
    else:
        args = options.testing_parser().parse(flags)
        options.check_testing(args)
        assert options.attacks(args) and options.routing(args)
    assert options.sampling(args).images_needed > 0
