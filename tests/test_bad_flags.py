"""What the two commands say to bad input: one line, exit code 2, and nothing done."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from commands import Ended
from safetensors.torch import save_file
from toy_training import World, assert_refused, command, error_line

from amt.attacks.levels import Perturbation
from amt.files import checkpoint
from amt.models.architectures import ARCHS, build_network
from amt.models.pool import principal_pool
from meta_dataset_readers.tfrecord import open_records

# --- bad input -------------------------------------------------------------------------------------------


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
