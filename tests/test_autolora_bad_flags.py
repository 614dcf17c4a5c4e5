"""What `main.py autolora` says to bad input: one line, exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
from commands import about
from safetensors.torch import load_file, save_file
from toy_autolora_runs import assert_refused, command

pytestmark = pytest.mark.usefixtures("one_thread")

# --- bad input -------------------------------------------------------------------------------------------


@pytest.fixture
def broken_data(cifar, tmp_path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(cifar.data, folder)
    return folder


def test_an_incomplete_data_set_is_told_by_its_file(cifar, broken_data, tmp_path):
    missing = broken_data / "cifar-10-batches-py" / "data_batch_3"
    missing.unlink()
    assert_refused(command(*cifar.flags(tmp_path / "out", "--data", broken_data)), str(missing))
    ended = command(*cifar.flags(tmp_path / "out", "--data", tmp_path / "nowhere"))
    assert_refused(ended, str(tmp_path / "nowhere"), "CIFAR-10")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture_is_told_by_its_first_tensors(cifar, tmp_path):
    ended = command(*cifar.flags(tmp_path / "out", "--arch", "resnet18"))
    assert_refused(ended, str(cifar.weights), "--arch resnet18", "layer1.1.conv1.weight", "conv1.weight")
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
def test_a_damaged_state_is_refused_and_left_as_it_is(cifar, tuned, tmp_path, how):
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    file = out / "AFF" / "last.safetensors"
    corrupt(file, how)
    before = file.read_bytes()
    assert_refused(command(*cifar.flags(out, "--gradient_similarity", 2)), str(file))
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
def test_a_run_is_not_continued_with_other_settings(cifar, tuned, more, words):
    last, run = tuned / "AFF" / "last.safetensors", tuned / "AFF" / "run.json"
    before = last.read_bytes()
    assert_refused(command(*cifar.flags(tuned, "--gradient_similarity", 2, *more)), str(run), *words)
    assert last.read_bytes() == before


def test_a_run_is_not_continued_from_another_file(cifar, tuned, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 0 * tensor for name, tensor in load_file(cifar.weights).items()}, other)
    flags = cifar.flags(tuned, "--gradient_similarity", 2, "--checkpoint", other)
    if other.read_bytes() == cifar.weights.read_bytes():  # the same file under another name is the same start
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
def test_bad_flags_are_told_in_one_line_before_anything_is_written(cifar, tmp_path, more, words):
    assert_refused(command(*cifar.flags(tmp_path / "out", *more)), *words)
    assert not (tmp_path / "out").exists()


def test_a_start_has_to_be_named(cifar, tmp_path):
    flags = [flag for flag in cifar.flags(tmp_path / "out") if flag not in ("--checkpoint", cifar.weights)]
    assert_refused(command(*flags), "--checkpoint is missing", "--no_pretrain")
    assert_refused(command(*cifar.flags(tmp_path / "out", "--no_pretrain")), "--checkpoint", "--no_pretrain")


def test_a_file_with_numbers_that_are_none_is_refused(cifar, tmp_path):
    weights = load_file(cifar.weights)
    weights["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "spoilt.safetensors")
    ended = command(*cifar.flags(tmp_path / "out", "--checkpoint", tmp_path / "spoilt.safetensors"))
    assert_refused(ended, "spoilt.safetensors", "layer2.0.conv1.weight", "not finite")


# --- what a reviewer found -------------------------------------------------------------------------------


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


def test_another_architecture_in_the_same_output_is_named(cifar, tuned):
    flags = cifar.flags(tuned, "--gradient_similarity", 2)
    where = flags.index("--checkpoint")
    ended = command(*flags[:where], *flags[where + 2 :], "--arch", "timm:resnet10t", "--no_pretrain")
    assert_refused(ended, "begun with arch", "resnet_mini")
