"""`main.py autolora` from the flags to the files it leaves, on a CIFAR-10 of a few pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from commands import about, process
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from toy_autolora_runs import CLASSES, assert_refused, command, pictures, rows

from amt.cli import fine_tune
from amt.cli.options import autolora as options
from amt.data.corruptions import CORRUPTIONS
from amt.files.robust_weights import Pretrained
from amt.models.network import build_classifier, logits

pytestmark = pytest.mark.usefixtures("one_thread")


def accuracies(folder: Path) -> dict[str, float]:
    (columns,) = json.loads((folder / "results.json").read_text())["summary"].values()
    return {name: found["mean"] for name, found in columns.items()}


# --- from end to end -------------------------------------------------------------------------------------


def test_all_modes(cifar, tmp_path):
    """Each mode leaves its best classifier and a run directory; at the end there is a mean over modes."""
    ended = command(*cifar.flags(tmp_path / "run", "--mode", "ALL", "--epochs", 1))
    assert ended.code == 0, ended.err
    found = {}
    for mode in ("SLF", "ALF", "AFF"):
        folder = tmp_path / "run" / mode
        assert about(folder / "best.safetensors")["protocol"]["mode"] == mode
        assert about(folder / "last.safetensors")["finished"]
        assert len(rows(folder / "test")) == 20
        found[mode] = accuracies(folder / "test")
        assert set(found[mode]) >= {"clean", "pgd2-ce+dlr@8"}
    for column in found["AFF"]:
        (line,) = [line for line in ended.out.splitlines() if line.startswith(f"{column}: ")]
        mean = sum(found[mode][column] for mode in found) / 3
        assert f"{mean:.2f} on average" in line
        assert all(f"{mode} {found[mode][column]:.2f}" in line for mode in found)
    start = load_file(cifar.weights)
    for mode in ("SLF", "ALF"):  # they have trained the classifier alone
        best = load_file(tmp_path / "run" / mode / "best.safetensors")
        assert all(torch.equal(best[name], tensor) for name, tensor in start.items())
        assert best["fc.weight"].any()


def test_as_a_command_of_the_package_it_tests_a_classifier_that_was_kept(cifar, tuned, tmp_path):
    """`python -m amt autolora --eval_only` on best.safetensors finds, image by image, what the run found."""
    best = tuned / "AFF" / "best.safetensors"
    flags = cifar.flags(tmp_path / "again", "--checkpoint", best, "--eval_only")
    ended = process("-m", "amt", "autolora", *flags, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert rows(tmp_path / "again" / "test") == rows(tuned / "AFF" / "test")
    assert accuracies(tmp_path / "again" / "test") == accuracies(tuned / "AFF" / "test")
    assert json.loads((tmp_path / "again" / "test" / "run.json").read_text())["checkpoint"] == str(best)
    assert not list((tmp_path / "again").rglob("*.safetensors"))


def test_what_a_run_says_of_itself(cifar, tuned):
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


def test_a_kept_classifier_is_torchvisions_resnet(cifar, tmp_path):
    """With the stem for small images: it loads strictly, and gives our logits on normalised images."""
    flags = cifar.flags(tmp_path, "--arch", "resnet18", "--resize", 16, "--mode", "SLF", "--epochs", 1)
    flags = [flag for flag in flags if flag not in ("--checkpoint", cifar.weights)]
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
def test_a_classifier_that_takes_pixels_as_they_are_is_tested_as_it_was_trained(cifar, tmp_path, said):
    """AdvCL's networks do not normalise, and the file remembers it."""
    ended = command(*cifar.flags(tmp_path / "run", "--epochs", 1, "--pretraining", "AdvCL"))
    assert ended.code == 0, ended.err
    best = tmp_path / "run" / "AFF" / "best.safetensors"
    assert about(best)["mean"] == [0, 0, 0] and about(best)["std"] == [1, 1, 1]
    ended = command(*cifar.flags(tmp_path / "again", "--checkpoint", best, "--eval_only", *said))
    assert ended.code == 0, ended.err
    assert rows(tmp_path / "again" / "test") == rows(tmp_path / "run" / "AFF" / "test")


@pytest.mark.parametrize("more", [("--method", "vanilla"), ("--method", "twins"), ("--dualBN", 1)])
def test_baselines_and_two_batchnorm_sets_leave_a_plain_classifier(cifar, tmp_path, more):
    ended = command(*cifar.flags(tmp_path, *more, "--epochs", 1))
    assert ended.code == 0, ended.err
    best = load_file(tmp_path / "AFF" / "best.safetensors")
    assert best.keys() == build_classifier("resnet_mini", 10, 32).names
    found = about(tmp_path / "AFF" / "best.safetensors")["protocol"]
    assert found["auto_lr"] == found["auto_weights"] == ("--method" not in more)


def test_common_corruptions_from_cifar10_c(cifar, tuned, tmp_path):
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
    ended = command(*cifar.flags(tmp_path / "out", *flags))
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
    assert_refused(command(*cifar.flags(tmp_path / "other", *flags)), str(folder / "snow.npy"))


# --- what a reviewer found -------------------------------------------------------------------------------


def test_small_pictures_go_whole_into_a_network_for_large_ones(cifar, tmp_path, monkeypatch):
    """CIFAR with a transformer is enlarged inside the network: nothing is cut off before."""
    seen = []
    unfinished = SimpleNamespace(complete=False)

    def test(_network, _weights, tested, *_folder, **_more):
        seen.append(tested.transform)
        return unfinished, 0

    monkeypatch.setattr(fine_tune, "test", test)
    monkeypatch.setattr(fine_tune, "open_network", lambda args, network: (network, untrained(network)))
    flags = cifar.flags(tmp_path, "--arch", "timm:vit_tiny_patch16_224", "--eval_only")
    ended = command(*flags)
    assert ended.code == 0, ended.err
    framed = np.zeros((32, 32, 3), np.uint8)
    framed[[0, -1]], framed[:, [0, -1]] = 255, 255
    found = seen[0](Image.fromarray(framed), torch.Generator())
    assert np.array_equal(found, framed.transpose(2, 0, 1))


def untrained(network):
    return Pretrained(network.start(0), {}, True, True, "random", None)


def test_a_head_of_another_data_set_is_not_kept(cifar, tmp_path):
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
