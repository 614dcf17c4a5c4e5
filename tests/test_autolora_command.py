"""`main.py autolora` from the flags to the files it leaves, on a CIFAR-10 of a few pictures: stopping and
going on, published command lines, and what it says to bad input.

A process of one's own costs seconds of imports, so only what needs one gets one.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from amt.cli import autolora, fine_tune
from amt.cli.options import autolora as options
from amt.data.corruptions import CORRUPTIONS
from amt.evaluation import recording
from amt.evaluation import test_set as testing
from amt.files.robust_weights import Pretrained
from amt.models.network import build_classifier, logits
from amt.training import autolora as tune
from amt.training.autolora import FineTuner
from amt.training.objectives import Adversary
from meta_dataset_readers.errors import exit_on_bad_input

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry")


pytestmark = pytest.mark.usefixtures("one_thread")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*flags) -> Ended:
    """The command in this process, with the ending of a script."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        exit_on_bad_input(lambda: autolora.main([str(flag) for flag in flags]))
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


def start(*words, cwd: Path) -> subprocess.Popen:
    """A Python process as a user starts it, elsewhere than in the project's folder."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def process(*words, cwd: Path) -> Ended:
    running = start(*words, cwd=cwd)
    out, err = running.communicate()
    return Ended(running.returncode, out.decode(), err.decode())


# --- a small world ---------------------------------------------------------------------------------------


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
            *(
                "--dataset",
                "cifar10",
                "--data",
                self.data,
                "--arch",
                "resnet_mini",
                "--checkpoint",
                self.weights,
            ),
            *("--output", out, "--epochs", 2, "--batch_size", 16, "--val", 0.2, "--num_workers", 0),
            *("--num_steps_train", 2, "--num_steps_test", 2, "--device", "cpu", "--lr", 0.05, *more),
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    weights = build_classifier("resnet_mini", 10, 32).start(3)
    save_file({n: t for n, t in weights.items() if not n.startswith("fc.")}, folder / "start.safetensors")
    return World(write_cifar(folder / "data"), folder / "start.safetensors")


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory) -> Path:
    """The folder of an ordinary run, with the gradients' similarity."""
    out = tmp_path_factory.mktemp("tuned")
    ended = command(*world.flags(out, "--gradient_similarity", 2))
    assert ended.code == 0, ended.err
    return out


def about(file: Path) -> dict:
    return json.loads(file.with_suffix(".json").read_text())


def accuracies(folder: Path) -> dict[str, float]:
    (columns,) = json.loads((folder / "results.json").read_text())["summary"].values()
    return {name: found["mean"] for name, found in columns.items()}


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [row | {"seconds": 0, "fit_seconds": 0} for row in found]


def same_tensors(one: Path, other: Path) -> bool:
    found, expected = load_file(one), load_file(other)
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def is_finite(file: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(file).values())


def assert_refused(ended: Ended, *words: str) -> None:
    """Exit code 2 and one line on stderr, with these words."""
    assert ended.code == 2, ended
    lines = [line for line in ended.err.splitlines() if "batch/s" not in line and "?batch" not in line]
    *before, last = [line for line in lines if line.strip()]
    assert last.startswith("error: ") and "Traceback" not in ended.err
    assert not before or all("note:" in line for line in before)
    for word in words:
        assert word in last, f"{word!r} is not in {last!r}"


# --- from end to end -------------------------------------------------------------------------------------


def test_all_modes_in_a_process_of_its_own(world, tmp_path):
    """Each mode leaves its best classifier and a run directory; at the end there is a mean over modes."""
    flags = world.flags(tmp_path / "run", "--mode", "ALL", "--epochs", 1)
    ended = process(ROOT / "main.py", "autolora", *flags, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    found = {}
    for mode in ("SLF", "ALF", "AFF"):
        folder = tmp_path / "run" / mode
        assert about(folder / "best.safetensors")["protocol"]["mode"] == mode
        assert about(folder / "last.safetensors")["finished"]
        assert len(rows(folder / "test")) == 20
        found[mode] = accuracies(folder / "test")
        assert set(found[mode]) >= {"clean", "pgd2@8"}
    for column in found["AFF"]:
        (line,) = [line for line in ended.out.splitlines() if line.startswith(f"{column}: ")]
        mean = sum(found[mode][column] for mode in found) / 3
        assert f"{mean:.2f} on average" in line
        assert all(f"{mode} {found[mode][column]:.2f}" in line for mode in found)
    start = load_file(world.weights)
    for mode in ("SLF", "ALF"):  # they have trained the classifier alone
        best = load_file(tmp_path / "run" / mode / "best.safetensors")
        assert all(torch.equal(best[name], tensor) for name, tensor in start.items())
        assert best["fc.weight"].any()


def test_as_a_command_of_the_package_it_tests_a_classifier_that_was_kept(world, tuned, tmp_path):
    """`python -m amt autolora --eval_only` on best.safetensors finds, image by image, what the run found."""
    best = tuned / "AFF" / "best.safetensors"
    flags = world.flags(tmp_path / "again", "--checkpoint", best, "--eval_only")
    ended = process("-m", "amt", "autolora", *flags, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert rows(tmp_path / "again" / "test") == rows(tuned / "AFF" / "test")
    assert accuracies(tmp_path / "again" / "test") == accuracies(tuned / "AFF" / "test")
    assert json.loads((tmp_path / "again" / "test" / "run.json").read_text())["checkpoint"] == str(best)
    assert not list((tmp_path / "again").rglob("*.safetensors"))


def test_what_a_run_says_of_itself(world, tuned):
    last = about(tuned / "AFF" / "last.safetensors")
    assert last["arch"] == "resnet_mini" and last["class_names"] == list(CLASSES)
    assert last["protocol"]["dataset"] == "cifar10" and last["protocol"]["method"] == "autolora"
    assert [note["epoch"] for note in last["history"]] == [1, 2]
    assert all({"lr", "clean", "robust", "lambda1", "lambda2"} <= note.keys() for note in last["history"])
    assert last["commit"] and last["versions"]["torch"] == torch.__version__
    best = about(tuned / "AFF" / "best.safetensors")
    epoch = last["history"][-1]["best"]
    assert best["history"] == last["history"][:epoch]


def test_similarity_losses_and_accuracies_are_scalars_of_tensorboard(tuned):
    """Of every second batch; of every layer but the classifier."""
    board = EventAccumulator(str(tuned / "AFF" / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    names = board.Tags()["scalars"]
    similarities = [name for name in names if name.startswith("gradient_similarity/")]
    layers = {name.removeprefix("gradient_similarity/") for name in similarities}
    assert {"conv1", "bn1", "layer3.0.conv2", "layer2.0.downsample.0"} <= layers and "fc" not in layers
    for name in similarities:
        found = [event.value for event in board.Scalars(name)]
        assert [event.step for event in board.Scalars(name)] == [1, 3, 4, 6]
        assert all(np.isnan(value) or -1.001 <= value <= 1.001 for value in found)
    assert len(board.Scalars("training/lambda1")) == 6
    assert [event.step for event in board.Scalars("validation/robust")] == [3, 6]


def test_a_kept_classifier_is_torchvisions_resnet(world, tmp_path):
    """With the stem for small images: it loads strictly, and gives our logits on normalised images."""
    flags = world.flags(tmp_path, "--arch", "resnet18", "--resize", 16, "--mode", "SLF", "--epochs", 1)
    flags = [flag for flag in flags if flag not in ("--checkpoint", world.weights)]
    ended = command(*flags, "--no_pretrain", "--num_steps_test", 1, "--attack", "pgd", "steps=1")
    assert ended.code == 0, ended.err
    best = load_file(tmp_path / "SLF" / "best.safetensors")
    module = torchvision.models.resnet18(num_classes=10)
    module.conv1, module.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    module.load_state_dict(best, strict=True)
    network = build_classifier("resnet18", 10, 16)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    with torch.no_grad():
        expected = module.eval()((images - mean) / std)
        torch.testing.assert_close(logits(network, best, images), expected)


@pytest.mark.parametrize("said", [("--pretraining", "AdvCL"), ()])
def test_a_classifier_that_takes_pixels_as_they_are_is_tested_as_it_was_trained(world, tmp_path, said):
    """AdvCL's networks do not normalise, and the file remembers it."""
    ended = command(*world.flags(tmp_path / "run", "--epochs", 1, "--pretraining", "AdvCL"))
    assert ended.code == 0, ended.err
    best = tmp_path / "run" / "AFF" / "best.safetensors"
    assert about(best)["mean"] == [0, 0, 0] and about(best)["std"] == [1, 1, 1]
    ended = command(*world.flags(tmp_path / "again", "--checkpoint", best, "--eval_only", *said))
    assert ended.code == 0, ended.err
    assert rows(tmp_path / "again" / "test") == rows(tmp_path / "run" / "AFF" / "test")


@pytest.mark.parametrize("more", [("--method", "vanilla"), ("--method", "twins"), ("--dualBN", 1)])
def test_baselines_and_two_batchnorm_sets_leave_a_plain_classifier(world, tmp_path, more):
    ended = command(*world.flags(tmp_path, *more, "--epochs", 1))
    assert ended.code == 0, ended.err
    best = load_file(tmp_path / "AFF" / "best.safetensors")
    assert best.keys() == build_classifier("resnet_mini", 10, 32).names
    found = about(tmp_path / "AFF" / "best.safetensors")["protocol"]
    assert found["auto_lr"] == found["auto_weights"] == ("--method" not in more)


def test_common_corruptions_from_cifar10_c(world, tuned, tmp_path):
    """Accuracies by corruption and severity are those of the classifier on the files' pictures."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    labels = np.tile(np.arange(4), 5)
    np.save(folder / "labels.npy", labels)
    for seed, name in enumerate(CORRUPTIONS):
        pixels = np.concatenate(
            [pictures(4, 100 * seed + severity)[0] // severity for severity in range(1, 6)]
        )
        np.save(folder / f"{name}.npy", pixels)
    best = tuned / "AFF" / "best.safetensors"
    flags = ("--checkpoint", best, "--eval_only", "--eval_OOD", "--corruptions", folder)
    ended = command(*world.flags(tmp_path / "out", *flags))
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "out" / "test" / "corruptions.json").read_text())
    network, weights = build_classifier("resnet_mini", 10, 32), load_file(best)
    assert set(CORRUPTIONS) <= set(found)
    for name in CORRUPTIONS:
        pixels = torch.from_numpy(np.load(folder / f"{name}.npy")).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            right = logits(network, weights, pixels).argmax(1) == torch.from_numpy(labels)
        assert found[name] == pytest.approx(right.view(5, 4).double().mean(1).tolist())
    (folder / "snow.npy").unlink()
    assert_refused(command(*world.flags(tmp_path / "other", *flags)), str(folder / "snow.npy"))


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
def test_a_run_that_was_stopped_is_finished_by_the_same_command(world, tuned, tmp_path, monkeypatch, steps):
    """In the middle of an epoch, in its last step, or in the very last: no test is begun then; and in the end
    both files and every row are those of a run that was not stopped."""
    flags = world.flags(tmp_path, "--gradient_similarity", 2)
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


def test_a_process_that_sigterm_stops_goes_on_to_the_same_bits(world, tmp_path, monkeypatch):
    """Whenever the signal comes, and although it reaches the workers too, as `timeout` and batch systems send
    it: two steps later the state is that of a run that was never stopped."""

    def flags(name: str) -> list:
        return world.flags(tmp_path / name, "--epochs", 100, "--num_workers", 1)

    running = start(ROOT / "main.py", "autolora", *flags("stopped"), cwd=tmp_path)
    shown = b""
    while not re.search(rb" [1-9]\d*/300 ", shown):
        more = os.read(running.stderr.fileno(), 4096)
        assert more, f"ended before the first step: {shown.decode()}"
        shown += more
    os.killpg(running.pid, signal.SIGTERM)
    out, err = running.communicate()
    assert running.returncode == 128 + signal.SIGTERM, err.decode()
    assert b"Traceback" not in err and b"error" not in err
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


def test_a_finished_run_is_not_trained_again(world, tuned, tmp_path, monkeypatch):
    """The same command finds everything done, and only what is missing is done: here the test."""
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    shutil.rmtree(out / "AFF" / "test")
    monkeypatch.setattr(FineTuner, "step", None)
    ended = command(*world.flags(out, "--gradient_similarity", 2))
    assert ended.code == 0, ended.err
    assert_same_run(out / "AFF", tuned / "AFF")


def test_a_signal_while_testing_stops_the_run_there(world, tuned, tmp_path, monkeypatch):
    """No mode after it is begun; the same command goes on with the test."""
    measured = recording.measure

    def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return measured(*arguments, **named)

    monkeypatch.setattr(recording, "measure", interrupted)
    monkeypatch.setattr(testing, "PROBED", 8)
    flags = world.flags(tmp_path, "--mode", "ALL", "--epochs", 1, "--test_batch_size", 8)
    ended = command(*flags)
    assert ended.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["SLF"]
    monkeypatch.undo()
    assert command(*flags, "--mode", "SLF").code == 0
    assert len(rows(tmp_path / "SLF" / "test")) == 20


# --- a loss that is no number ----------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_its_last_good_state(
    world, tuned, tmp_path, monkeypatch
):
    """The message says so, and without what spoilt it the same command ends as an undisturbed one."""
    step = FineTuner.step

    def spoilt(self: FineTuner, images: Tensor, labels: Tensor):
        return step(self, images * (float("nan") if self.epoch == 1 and self.batch == 1 else 1.0), labels)

    flags = world.flags(tmp_path, "--gradient_similarity", 2)
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
def test_a_rate_far_too_high_leaves_no_file_that_holds_no_numbers(world, tmp_path, batch_size):
    """Also where an epoch is a single batch, whose loss is a number and whose step spoils the weights."""
    ended = command(*world.flags(tmp_path, "--lr", 1e38, "--epochs", 3, "--batch_size", batch_size))
    assert ended.code == 2, ended
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ") and "learning rate 1e+38" in last and "Traceback" not in ended.err
    assert all(is_finite(file) for file in (tmp_path / "AFF").glob("*.safetensors"))


# --- bad input -------------------------------------------------------------------------------------------


@pytest.fixture
def broken_data(world, tmp_path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(world.data, folder)
    return folder


def test_an_incomplete_data_set_is_told_by_its_file(world, broken_data, tmp_path):
    missing = broken_data / "cifar-10-batches-py" / "data_batch_3"
    missing.unlink()
    assert_refused(command(*world.flags(tmp_path / "out", "--data", broken_data)), str(missing))
    ended = command(*world.flags(tmp_path / "out", "--data", tmp_path / "nowhere"))
    assert_refused(ended, str(tmp_path / "nowhere"), "CIFAR-10")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture_is_told_by_its_first_tensors(world, tmp_path):
    ended = command(*world.flags(tmp_path / "out", "--arch", "resnet18"))
    assert_refused(ended, str(world.weights), "--arch resnet18", "layer1.1.conv1.weight", "conv1.weight")
    assert not (tmp_path / "out").exists()


def corrupt(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif how == "no state":
        save_file(load_file(file), file)
    elif how == "a classifier":
        shutil.copy(file.with_name("best.safetensors"), file)
    else:
        tensors = load_file(file)
        removed = tensors.pop("weights/conv1.weight")
        if how == "another shape":
            tensors["weights/conv1.weight"] = removed[:1].clone()
        if how == "no momentum's parameter":
            tensors |= {"weights/conv1.weight": removed, "momentum/weights/nothing": removed.clone()}
        header = json.dumps(about(file))
        save_file(tensors, file, metadata={"amt": header})


@pytest.mark.parametrize(
    "how",
    ["cut short", "no state", "a classifier", "a tensor less", "another shape", "no momentum's parameter"],
)
def test_a_damaged_state_is_refused_and_left_as_it_is(world, tuned, tmp_path, how):
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    file = out / "AFF" / "last.safetensors"
    corrupt(file, how)
    before = file.read_bytes()
    assert_refused(command(*world.flags(out, "--gradient_similarity", 2)), str(file))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--lr", 0.01), ["lr 0.05", "0.01"]),
        (("--epochs", 3), ["epochs 2", "3"]),
        (("--seed", 2), ["seed 1", "2"]),
        (("--val", 0.3), ["val 0.2", "0.3"]),
        (("--epsilon", 4), ["adversary", "8.0", "4.0"]),
        (("--method", "vanilla"), ["auto_lr true", "false"]),
        (("--num_steps_test", 3), ["validation_steps 2", "3"]),
        (("--whole_passes",), ["whole_passes false", "true"]),
    ],
)
def test_a_run_is_not_continued_with_other_settings(world, tuned, more, words):
    last, run = tuned / "AFF" / "last.safetensors", tuned / "AFF" / "run.json"
    before = last.read_bytes()
    assert_refused(command(*world.flags(tuned, "--gradient_similarity", 2, *more)), str(run), *words)
    assert last.read_bytes() == before


def test_a_run_is_not_continued_from_another_file(world, tuned, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 0 * tensor for name, tensor in load_file(world.weights).items()}, other)
    flags = world.flags(tuned, "--gradient_similarity", 2, "--checkpoint", other)
    if other.read_bytes() == world.weights.read_bytes():  # the same file under another name is the same start
        assert command(*flags).code == 0
    weights = load_file(other)
    weights["conv1.weight"] = 2 * weights["conv1.weight"]
    save_file(weights, other)
    assert_refused(command(*flags), "start")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--num_classes", 5), ["label 9", "0 to 4"]),
        (("--val", 0), ["--val", "0"]),
        (("--val", 0.9), ["--val", "0.5"]),
        (("--checkpoint", "nothing.pt"), ["nothing.pt", "no such checkpoint"]),
        (("--eval_only",), ["classifier"]),
        (("--dataset", "cifar11"), ["cifar11", "cifar10"]),
        (("--arch", "resnet19"), ["resnet19"]),
        (("--pretraining", "DynACLL"), ["--pretraining", "DynACL"]),
        (("--dualBN", 1, "--arch", "deit_tiny"), ["deit_tiny"]),
        (("--attack", "nonsense"), ["nonsense"]),
        (("--attack", "transfer"), ["transfer"]),
        (("--attack", "pgd", "--attack", "pgd"), ["--attack"]),
        (("--r_nat", 0), ["--r_nat"]),
        (("--device", "cuda:99"), ["cuda:99"]),
        (("--corruptions", "somewhere"), ["--corruptions", "--eval_OOD"]),
        (("--epochs", 0), ["--epochs"]),
        (("--divide", 1), ["--divide"]),
        (("--lr", "nan"), ["--lr"]),
        (("--decreasing_lr", "20,15"), ["--decreasing_lr"]),
        (("--nonsense", 1), ["--nonsense"]),
    ],
)
def test_bad_flags_are_told_in_one_line_before_anything_is_written(world, tmp_path, more, words):
    assert_refused(command(*world.flags(tmp_path / "out", *more)), *words)
    assert not (tmp_path / "out").exists()


def test_a_start_has_to_be_named(world, tmp_path):
    flags = [flag for flag in world.flags(tmp_path / "out") if flag not in ("--checkpoint", world.weights)]
    assert_refused(command(*flags), "--checkpoint is missing", "--no_pretrain")
    assert_refused(command(*world.flags(tmp_path / "out", "--no_pretrain")), "--checkpoint", "--no_pretrain")


def test_a_file_with_numbers_that_are_none_is_refused(world, tmp_path):
    weights = load_file(world.weights)
    weights["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "spoilt.safetensors")
    ended = command(*world.flags(tmp_path / "out", "--checkpoint", tmp_path / "spoilt.safetensors"))
    assert_refused(ended, "spoilt.safetensors", "layer2.0.conv1.weight", "not finite")


# --- published command lines -----------------------------------------------------------------------------


def parsed(line: str, mode: str = "AFF"):
    """The flags, and the settings of a mode."""
    args = options.parse(line.split())
    return args, options.settings(args, mode)


def test_the_published_low_resolution_command():
    """Of run_autolora.sh: 50 epochs of the automatic schedule from 0.1, PGD-20 and AutoAttack."""
    line = (
        "--experiment E --dataset stl10 --pretraining DynACL_RCS --model r18 --checkpoint F --mode ALL "
        "--eval-AA --autolora --gpu 0"
    )
    args, found = parsed(line)
    assert args.output == Path("checkpoints/E") and args.checkpoint == Path("F")
    assert (args.dataset, args.resize, args.arch, args.device) == ("stl10", 32, "r18", "cuda:0")
    assert options.modes(args) == ("SLF", "ALF", "AFF")
    assert (found.method, found.epochs, found.lr, found.rank, found.scale) == ("autolora", 50, 0.1, 8, 6)
    assert found.auto_lr and found.auto_weights and not found.high_resolution and not found.dual_norms
    assert (found.momentum, found.weight_decay, found.batch_size, found.divide) == (0.9, 2e-4, 128, 2)
    assert found.adversary == Adversary(8, 2, 10, "gaussian", "linf")
    assert parsed(line, "ALF")[1].adversary.start == "uniform"
    assert [parsed(line, mode)[1].batch_size for mode in ("SLF", "ALF")] == [128, 128]
    pgd, auto = options.attacks(args)
    assert (pgd.kind, pgd.steps, pgd.epsilons) == ("pgd", 20, (8.0,))
    assert (auto.kind, auto.epsilons) == ("autoattack", (8.0,))


LOW = (
    "--experiment E --model r34 --checkpoint F --dualBN 1 --data D --dataset cifar100 --resize 96 "
    "--batch-size 64 --test-batch-size 32 --epochs 7 --weight-decay 0.001 --lr 0.02 --momentum 0.8 "
    "--decreasing_lr 3,5 --epsilon 0.0156862745 --step-size 0.00392156863 --num-steps-train 5 "
    "--num-steps-test 6 --eval-AA --eval-OOD --pretraining A-InfoNCE --mode AFF --autolora --r_nat 4 "
    "--val 0.05 --scale 3 --autoLR 1 --divide 10 --seed 11 --test_frequency 2 --gpu 1"
)


def test_every_flag_of_the_published_low_resolution_parser_has_its_meaning(capsys):
    args, found = parsed(LOW)
    assert (args.arch, args.data, args.dataset, args.resize) == ("r34", Path("D"), "cifar100", 96)
    assert (found.batch_size, args.test_batch_size, found.epochs) == (64, 32, 7)
    assert (found.weight_decay, found.lr, found.momentum, found.milestones) == (0.001, 0.02, 0.8, (3, 5))
    assert found.adversary.epsilon == pytest.approx(4) and found.adversary.step_size == pytest.approx(1)
    assert (found.adversary.steps, options.examiner(args).steps) == (5, 6)
    assert args.pretraining == "A-InfoNCE" and options.modes(args) == ("AFF",)
    assert found.dual_norms and args.eval_OOD and len(options.attacks(args)) == 2
    assert (found.rank, args.val, found.scale, found.divide, found.seed) == (4, 0.05, 3, 10, 11)
    assert found.auto_lr and args.device == "cuda:1"
    assert "--test_frequency has no effect" in capsys.readouterr().err
    assert parsed(f"{LOW} --wd 0.5")[1].weight_decay == 0.5
    only = parsed(LOW.replace("--autolora", "--eval-only"))[0]
    assert only.eval_only


HIGH = "--adv_train --model_root R --dataset dtd --num_classes 57 --model_arch resnet18 --model-path F"


def test_the_published_high_resolution_command(capsys):
    args, found = parsed(HIGH)
    assert (args.output, args.checkpoint, args.num_classes) == (Path("R"), Path("F"), 57)
    assert (args.dataset, args.arch, args.resize) == ("dtd", "resnet18", 224)
    assert found.high_resolution and found.auto_lr and found.auto_weights
    assert (found.epochs, found.lr, found.weight_decay, found.batch_size) == (60, 0.01, 1e-4, 128)
    assert found.adversary == Adversary(8, 2, 10, "uniform_valid", "linf")
    assert options.examiner(args).steps == 10 and options.inside(args) is None
    assert "--adv_train has no effect" in capsys.readouterr().err


EVERY_HIGH = (
    f"{HIGH} --todo train --data_root D --data_name CIFAR10 --log_root L --load_checkpoint C --affix a "
    "-e 0.0157 --beta_unlabel 1.0 -a 0.00392 -k 7 -b 32 -m_e 9 -lr 0.02 -m 0.8 -w 0.001 -g 2 "
    "--n_eval_step 100 --n_checkpoint_step 4000 --n_store_image_step 4000 -p l2 --occupy --save_all "
    "--r_nat 4 --val 0.05 --seed 3"
)
LONG = {
    "-e": "--epsilon",
    "-a": "--alpha",
    "-k": "--k",
    "-b": "--batch_size",
    "-m_e": "--max_epoch",
    "-lr": "--learning_rate",
    "-m": "--momentum",
    "-w": "--weight_decay",
    "-g": "--gpu",
    "-p": "--perturbation_type",
}


@pytest.mark.parametrize("long", [False, True])
def test_every_flag_of_the_published_high_resolution_parser_has_its_meaning(long):
    words = [LONG.get(word, word) if long else word for word in EVERY_HIGH.split()]
    args, found = parsed(" ".join(words))
    assert args.data == Path("D") and args.checkpoint == Path("F")
    assert found.adversary.epsilon == pytest.approx(4, abs=0.01)
    assert found.adversary.step_size == pytest.approx(1, abs=0.01)
    assert (found.adversary.steps, found.adversary.norm) == (7, "l2")
    assert (found.batch_size, found.epochs, found.lr, found.momentum) == (32, 9, 0.02, 0.8)
    assert (found.weight_decay, found.rank, args.val, found.seed) == (0.001, 4, 0.05, 3)
    assert args.device == "cuda:2" and not args.eval_only


def test_the_published_high_resolution_script_tests_what_load_checkpoint_names():
    """With --todo test; the file that training started from then plays no part."""
    args, _ = parsed(f"{HIGH} --todo test --load_checkpoint C")
    assert args.eval_only and args.checkpoint == Path("C")


@pytest.mark.parametrize(
    ("dataset", "size", "enlarged"), [("cifar-10", 32, 224), ("cifar100", 32, 224), ("cub", 224, None)]
)
def test_the_published_high_resolution_script_attacks_cifar_at_its_own_size(dataset, size, enlarged):
    args, found = parsed(
        f"--adv_train --model_root R --dataset {dataset} --model_arch resnet50 --model-path F"
    )
    assert (args.resize, options.inside(args)) == (size, enlarged)
    assert found.high_resolution and found.epochs == 60


@pytest.mark.parametrize("method", ["vanilla", "twins"])
def test_baselines_have_either_schedule_where_it_is_asked_for(method):
    base = f"--data D --output O --checkpoint F --method {method}"
    for flags, expected in (
        ("", (False, False)),
        ("--autoLR 1", (True, False)),
        ("--auto_scalars 1", (False, True)),
        ("--autoLR 1 --auto_scalars 1", (True, True)),
    ):
        found = parsed(f"{base} {flags}")[1]
        assert (found.auto_lr, found.auto_weights) == expected, flags
    assert parsed(base)[1].milestones == (15, 20) and parsed(base)[1].epochs == 25


def test_a_head_may_be_wider_than_the_classes(world, tmp_path):
    ended = command(*world.flags(tmp_path, "--num_classes", 12, "--mode", "SLF", "--epochs", 1))
    assert ended.code == 0, ended.err
    assert load_file(tmp_path / "SLF" / "best.safetensors")["fc.weight"].shape[0] == 12


# --- what a reviewer found -------------------------------------------------------------------------------


def test_small_pictures_go_whole_into_a_network_for_large_ones(world, tmp_path, monkeypatch):
    """CIFAR with a transformer is enlarged inside the network: nothing is cut off before."""
    seen = []
    unfinished = SimpleNamespace(complete=False)

    def test(_network, _weights, tested, *_folder, **_more):
        seen.append(tested.transform)
        return unfinished, 0

    monkeypatch.setattr(fine_tune, "test", test)
    monkeypatch.setattr(fine_tune, "open_network", lambda args, network: (network, untrained(network)))
    flags = world.flags(tmp_path, "--arch", "timm:vit_tiny_patch16_224", "--eval_only")
    ended = command(*flags)
    assert ended.code == 0, ended.err
    framed = np.zeros((32, 32, 3), np.uint8)
    framed[[0, -1]], framed[:, [0, -1]] = 255, 255
    found = seen[0](Image.fromarray(framed), torch.Generator())
    assert torch.equal(found, torch.from_numpy(framed).permute(2, 0, 1) / 255)


def untrained(network):
    return Pretrained(network.start(0), {}, True, True, "random", None)


def test_a_head_of_another_data_set_is_not_kept(world, tmp_path):
    """Of a complete file the classifier is made anew for training, and kept for testing alone."""
    network = build_classifier("resnet_mini", 10, 32)
    full = network.start(5)
    save_file(full, tmp_path / "full.safetensors")
    for more, kept in (((), False), (("--eval_only",), True)):
        args = options.parse(
            [
                "--arch",
                "resnet_mini",
                "--checkpoint",
                str(tmp_path / "full.safetensors"),
                "--output",
                "x",
                *more,
            ]
        )
        _, found = fine_tune.open_network(args, network)
        assert torch.equal(found.weights["fc.weight"], full["fc.weight"]) == kept
        assert kept or not found.weights["fc.weight"].any()


@pytest.mark.parametrize(
    "flags, epsilon, step",
    [
        ("", 8, 2),
        ("--epsilon 0.0314 --step_size 0.00784", 8, 2),
        ("--epsilon 0.0157 --step_size 0.00784", 4, 2),
        ("--epsilon 1 --step_size 0.25", 1, 0.25),
        ("-p l2 --epsilon 128 --step_size 15", 128, 15),
    ],
)
def test_training_validation_and_test_have_one_epsilon_and_one_step(flags, epsilon, step):
    args = options.parse(["--checkpoint", "f", "--output", "o", *flags.split()])
    for adversary in (options.settings(args, "AFF").adversary, options.examiner(args)):
        assert (adversary.epsilon, adversary.step_size) == (epsilon, step)
    (attack,) = options.attacks(args)
    assert attack.epsilons == (epsilon,) and attack.step_at(epsilon) == step


@pytest.mark.parametrize(
    "flags, word",
    [
        ("-p l2 --epsilon 0.5", "ambiguous"),
        ("--epsilon 0 --eval_AA", "--eval_AA"),
        ("--seed 99999999999999999999", "--seed"),
    ],
)
def test_flags_that_used_to_end_in_a_traceback(flags, word):
    assert_refused(command("--checkpoint", "f", "--output", "o", *flags.split()), word)


def test_another_architecture_in_the_same_output_is_named(world, tuned):
    flags = world.flags(tuned, "--gradient_similarity", 2)
    where = flags.index("--checkpoint")
    ended = command(*flags[:where], *flags[where + 2 :], "--arch", "timm:resnet10t", "--no_pretrain")
    assert_refused(ended, "begun with arch", "resnet_mini")


def test_the_mode_of_the_published_script():
    for flags, mode in (
        ("--output o", "AFF"),
        ("--experiment e", "ALL"),
        ("--experiment e --mode SLF", "SLF"),
    ):
        assert options.parse(["--checkpoint", "f", *flags.split()]).mode == mode


def test_a_signal_during_validation_stops_before_the_epoch_is_noted(world, tmp_path, monkeypatch):
    """What was trained is saved, and the same command goes on with the validation."""
    whole = tmp_path / "whole"
    assert command(*world.flags(whole)).code == 0
    wanted, pgd = [True], tune.pgd

    def interrupted(*args, **settings):
        if wanted:
            wanted.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        return pgd(*args, **settings)

    monkeypatch.setattr(tune, "pgd", interrupted)
    flags = world.flags(tmp_path / "cut", "--test_batch_size", 4)
    ended = command(*flags)
    assert ended.code == 143 and "0 epochs and 3 batches" in ended.out
    assert command(*flags).code == 0
    for name in ("best", "last"):
        files = [folder / "AFF" / f"{name}.safetensors" for folder in (whole, tmp_path / "cut")]
        assert same_tensors(*files), name
