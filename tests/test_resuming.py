"""Runs of main.py that stop and go on: the same bits in the end, and what is not continued."""

import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from commands import ROOT, Ended, about, same_tensors, start, stopped_in_step
from safetensors import safe_open
from toy_training import assert_refused, command, error_line, scalars, signal_after

from amt.files import checkpoint
from amt.files.run_directory import RunDirectory
from amt.training.keeper import Keeper
from amt.training.tuner import Tuner
from meta_dataset_readers.reader import EpisodeReader


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
    running = start(
        ROOT / "main.py", *world.train(tmp_path / "stopped", *flags, "--num_workers", 1), cwd=tmp_path
    )
    out = stopped_in_step(running, 1000)
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
    """Killed before its first checkpoint a run leaves its run.json alone; then it is killed after a step."""
    flags = world.train(tmp_path / "run", "--save_every_minutes", 1e-9)
    last = tmp_path / "run" / "last.safetensors"
    last.parent.mkdir()
    shutil.copy(trained[1] / "run.json", last.parent)
    running = start(ROOT / "main.py", *flags, cwd=tmp_path)
    while running.poll() is None and not (last.exists() and episodes_done(last) >= 2):
        time.sleep(0.005)
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
    ended = command(
        "main",
        *world.train(
            tmp_path, "--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0, "--statistics_episodes", 0
        ),
    )
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
        ("settings", None, ["settings", "expected an object"]),
        ("history", {}, ["history", "expected a list"]),
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


def last_line(ended: Ended) -> str:
    return ended.out.splitlines()[-1]
