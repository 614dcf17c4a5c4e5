"""Runs of `main.py autolora` that stop and go on, or whose loss is no number: no bit is lost."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from commands import ROOT, about, same_tensors, start, stopped_in_step
from safetensors.torch import load_file
from torch import Tensor
from toy_autolora_runs import command, rows

from amt.evaluation import recording
from amt.evaluation import test_set as testing
from amt.training import accuracy
from amt.training.autolora import FineTuner

pytestmark = pytest.mark.usefixtures("one_thread")


def is_finite(file: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(file).values())


# --- stopping and going on -------------------------------------------------------------------------------


def signal_after(monkeypatch, steps: int) -> None:
    """Have SIGTERM arrive in the middle of that many steps, or of one that is never taken."""
    taken, step = [], FineTuner.step

    def noisy(self: FineTuner, images: Tensor, labels: Tensor):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, images, labels)

    monkeypatch.setattr(FineTuner, "step", noisy)


@pytest.mark.parametrize("steps", [1, 3, 5, 6])
def test_a_run_that_was_stopped_is_finished_by_the_same_command(cifar, tuned, tmp_path, monkeypatch, steps):
    """In the middle of an epoch, in its last step, or in the very last: no test is begun then; and in the end
    both files and every row are those of a run that was not stopped."""
    flags = cifar.flags(tmp_path, "--gradient_similarity", 2)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_after(patch, steps)
        ended = command(*flags)
    assert ended.code == 128 + signal.SIGTERM and "the same command continues" in ended.out
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "AFF" / "test").exists()
    ended = command(*flags)
    assert ended.code == 0 and "goes on after" in ended.out
    assert_same_run(tmp_path / "AFF", tuned / "AFF")


def test_a_process_that_sigterm_stops_goes_on_to_the_same_bits(cifar, tmp_path, monkeypatch):
    """Whenever the signal comes, and although it reaches the workers too, as `timeout` and batch systems send
    it: two steps later the state is that of a run that was never stopped."""

    def flags(name: str) -> list:
        return cifar.flags(tmp_path / name, "--epochs", 100, "--num_workers", 1)

    running = start(ROOT / "main.py", "autolora", *flags("stopped"), cwd=tmp_path)
    out = stopped_in_step(running, 300)
    said = re.search(rb"stopped after (\d+) epochs and (\d+) batches; the same command continues", out)
    steps = 3 * int(said[1]) + int(said[2])

    for name, left in (("stopped", 2), ("straight", steps + 2)):
        with monkeypatch.context() as patch:
            signal_after(patch, left)
            assert command(*flags(name)).code == 128 + signal.SIGTERM
    files = [tmp_path / name / "AFF" / "last.safetensors" for name in ("stopped", "straight")]
    assert same_tensors(*files)
    assert about(files[0])["tuner"] == about(files[1])["tuner"]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("best", "last"):
        assert same_tensors(one / f"{name}.safetensors", other / f"{name}.safetensors"), name
        here, there = about(one / f"{name}.safetensors"), about(other / f"{name}.safetensors")
        assert here["history"] == there["history"]
    assert rows(one / "test") == rows(other / "test")


def test_a_finished_run_is_not_trained_again(cifar, tuned, tmp_path, monkeypatch):
    """The same command finds everything done, and only what is missing is done: here the test."""
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    shutil.rmtree(out / "AFF" / "test")
    monkeypatch.setattr(FineTuner, "step", None)
    ended = command(*cifar.flags(out, "--gradient_similarity", 2))
    assert ended.code == 0, ended.err
    assert_same_run(out / "AFF", tuned / "AFF")


def test_a_signal_while_testing_stops_the_run_there(cifar, tuned, tmp_path, monkeypatch):
    """No mode after it is begun; the same command goes on with the test."""
    measured = recording.measure

    def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return measured(*arguments, **named)

    monkeypatch.setattr(recording, "measure", interrupted)
    monkeypatch.setattr(testing, "PROBED", 8)
    flags = cifar.flags(tmp_path, "--mode", "ALL", "--epochs", 1, "--test_batch_size", 8)
    ended = command(*flags)
    assert ended.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["SLF"]
    monkeypatch.undo()
    assert command(*flags, "--mode", "SLF").code == 0
    assert len(rows(tmp_path / "SLF" / "test")) == 20


# --- a loss that is no number ----------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_last_good_state(
    cifar, tuned, tmp_path, monkeypatch
):
    """The message says so, and without what spoilt it the same command ends as an undisturbed one."""
    step = FineTuner.step

    def spoilt(self: FineTuner, images: Tensor, labels: Tensor):
        return step(self, images * (float("nan") if self.epoch == 1 and self.batch == 1 else 1.0), labels)

    flags = cifar.flags(tmp_path, "--gradient_similarity", 2)
    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "step", spoilt)
        ended = command(*flags)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert "epoch 2, batch 2" in ended.err and "last good state is kept" in ended.err
    last = tmp_path / "AFF" / "last.safetensors"
    assert about(last)["tuner"]["epoch"] == 1 and is_finite(last)
    assert command(*flags).code == 0
    assert_same_run(tmp_path / "AFF", tuned / "AFF")


@pytest.mark.parametrize("batch_size", [16, 64])
def test_a_rate_far_too_high_leaves_no_file_that_holds_no_numbers(cifar, tmp_path, batch_size):
    """Also where an epoch is a single batch, whose loss is a number and whose step spoils the weights."""
    ended = command(
        *cifar.flags(
            tmp_path, "--lr", 1000, "--weight_decay", 1000, "--epochs", 3, "--batch_size", batch_size
        )
    )
    assert ended.code == 2, ended
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ") and "learning rate 1000" in last and "Traceback" not in ended.err
    assert all(is_finite(file) for file in (tmp_path / "AFF").glob("*.safetensors"))


# --- what a reviewer found -------------------------------------------------------------------------------


def test_a_signal_during_validation_stops_before_the_epoch_is_noted(cifar, tmp_path, monkeypatch):
    """What was trained is saved, and the same command goes on with the validation."""
    whole = tmp_path / "whole"
    assert command(*cifar.flags(whole)).code == 0
    wanted, pgd = [True], accuracy.pgd

    def interrupted(*args, **settings):
        if wanted:
            wanted.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        return pgd(*args, **settings)

    monkeypatch.setattr(accuracy, "pgd", interrupted)
    flags = cifar.flags(tmp_path / "cut", "--test_batch_size", 4)
    ended = command(*flags)
    assert ended.code == 143 and "0 epochs and 3 batches" in ended.out
    assert command(*flags).code == 0
    for name in ("best", "last"):
        files = [folder / "AFF" / f"{name}.safetensors" for folder in (whole, tmp_path / "cut")]
        assert same_tensors(*files), name
