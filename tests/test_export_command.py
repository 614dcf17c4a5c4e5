"""The command `python -m amt export`: what it writes, and the faults it says in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_backbone
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from toy_export import TINY, assert_same, follow_readme, images, pool_of

from amt.attacks.levels import Perturbation
from amt.cli import export as command
from amt.evaluation.evaluate import merged_predictor
from amt.few_shot import pictures
from amt.files import checkpoint, export
from amt.files.checkpoint import Checkpoint
from amt.files.pretrained import load_network
from amt.files.shipped import as_pool
from amt.models.heads import cosine_logits
from amt.models.network import Network
from amt.models.pool import Pool
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(TINY)


@pytest.fixture(scope="module")
def pool(network) -> Pool:
    return pool_of(network)


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """A pool of the network that the project ships."""
    pool = pool_of(load_network("vit_mini"))
    path = tmp_path_factory.mktemp("mini") / "pool.safetensors"
    checkpoint.save(path, Checkpoint(pool, {"arch": "vit_mini"}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A support set of three classes in folders, two pictures each, and a file that is none."""
    root = tmp_path_factory.mktemp("support")
    for label, name in enumerate(("apple", "bear", "café")):
        (root / name).mkdir()
        for index in range(2):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    (root / "notes.txt").write_text("not a class")
    return root


def run(*flags: str | Path) -> int:
    return command.main([str(flag) for flag in flags])


def complaint(*flags: str | Path) -> str:
    """The one line that the command refuses the flags with."""
    with pytest.raises(InputError) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_support_set_decides_as_the_evaluation_does(mini, folder, tmp_path, monkeypatch, capsys):
    """Same coefficients, same logits as test_meta_dataset.py computes for an episode of these images."""
    out = tmp_path / "net.safetensors"
    assert run(mini, "--to", "timm", "--support", folder, "--out", out, "--seed", 3, "--aug-prob", 1) == 0
    assert str(out) in capsys.readouterr().out
    network, saved = load_network("vit_mini"), checkpoint.load(mini)
    files, names = pictures.in_class_folders(folder)
    assert names.tolist() == ["apple", "apple", "bear", "bear", "café", "café"]
    support, labels = pictures.images(files, network.image_size), torch.arange(6) // 2
    seen = images(4, 32)
    episode = Episode(support, labels, seen, torch.zeros(4, dtype=torch.int64))

    def choose(support, labels, generator):
        routing = Routing(augment_probability=1)
        return route(network, saved.pool, support, labels, generator, routing)

    ours = merged_predictor(network, saved.pool, choose, seed=3)(episode)
    readme = out.with_name("net.safetensors.README.txt").read_text()
    theirs = follow_readme(readme, tmp_path, monkeypatch, images=network.normalise(seen))["features"]
    task_file = out.with_name("net.safetensors.prototypes.safetensors")
    head = load_file(task_file)
    with torch.no_grad():
        assert_same(cosine_logits(theirs, head["prototypes"], head["scale"], head["bias"]), ours.logits(seen))
    with safe_open(task_file, "pt") as opened:
        about = json.loads(opened.metadata()[export.METADATA])
    assert about["coefficients"] == list(ours.coefficients) and about["classes"] == ["apple", "bear", "café"]


def test_prototypes_of_an_earlier_export_do_not_stay_behind(mini, folder, tmp_path):
    out, beside = tmp_path / "net.safetensors", tmp_path / "net.safetensors.prototypes.safetensors"
    run(mini, "--to", "timm", "--adapter", 1, "--support", folder, "--out", out)
    assert beside.is_file()
    run(mini, "--to", "timm", "--adapter", 1, "--out", out)
    assert not beside.exists()


def test_every_other_format_from_the_command(mini, tmp_path):
    """Also at another image size, and what was trimmed."""
    run(mini, "--to", "peft", "--adapter", 0, "--image_size", 40, "--out", tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "positions.safetensors")["pos_embed"].shape == (1, 101, 96)
    run(mini, "--to", "published", "--out", tmp_path / "pool.pth")
    assert len(checkpoint.load(tmp_path / "pool.pth").pool) == 3
    out = tmp_path / "net.safetensors"
    run(mini, "--to", "timm", "--coefficients", 0.5, 0.5, 0, "--trim", "fc1:0:0.5", "--out", out)
    fc1 = load_file(out)["blocks.0.mlp.fc1.weight"]
    assert torch.linalg.matrix_rank(fc1, rtol=1e-4) == min(fc1.shape) // 2
    assert "trimmed       fc1:0:0.5" in out.with_name(f"{out.name}.README.txt").read_text()


@pytest.mark.parametrize(("share", "warned"), [(0.5, True), (0.9, False)])
def test_a_merge_that_is_half_near_clean_is_warned_of(share, warned, tmp_path, capsys):
    """One for 8/255 beside one for 0.1/255, which dilutes it; with little of that one nothing is said."""
    levels = (Perturbation(8.0, step_size=2.0, steps=2), Perturbation(0.1, step_size=0.1, steps=2))
    pool = pool_of(load_network("vit_mini"), levels)
    checkpoint.save(tmp_path / "pool.safetensors", Checkpoint(pool, {"arch": "vit_mini"}))
    shares, out = (share, 1 - share), tmp_path / "net.safetensors"
    assert run(tmp_path / "pool.safetensors", "--to", "timm", "--coefficients", *shares, "--out", out) == 0
    assert out.is_file()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == warned
    begins = "warning: 50% of the weight is on adapters for at most 0.1/255"
    ends = "--adapter 0 takes that one alone"  # as this command calls it
    assert not warned or (warnings[0].startswith(begins) and warnings[0].endswith(ends))


def test_a_published_training_is_one_network(mini, tmp_path):
    """Of a single LoRA nothing needs to be chosen, and the file alone is enough."""
    run(mini, "--to", "published", "--adapter", 1, "--out", tmp_path / "one.pth")
    run(tmp_path / "one.pth", "--to", "timm", "--arch", "vit_mini_amt", "--out", tmp_path / "one.safetensors")
    run(mini, "--to", "timm", "--adapter", 1, "--out", tmp_path / "same.safetensors")
    found, same = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "same"))
    assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to timm", "choose by --adapter P, --coefficients C ..., or --support FOLDER"),
        ("--to timm --adapter 3", "--adapter 3: POOL holds adapters 0 to 2"),
        ("--to timm --adapter 1 --coefficients 1 0 0", "exclude each other"),
        ("--to timm --coefficients 1 0", "--coefficients has 2 values, POOL holds 3 adapters"),
        ("--to timm --coefficients 1 1 0", "--coefficients sum to 2, expected 1"),
        ("--to timm --coefficients nan 0 0", "expected a number of at least 0"),
        ("--to timm --adapter 0 --arch dino_small_patch16", "but --arch dino_small_patch16 has it"),
        ("--to timm --adapter 0 --image_size 3", "expected at least a patch of 4 px"),
        ("--to timm --adapter 0 --trim nothing:-1:0.5", "no such layer with adapters"),
        ("--to peft --adapter 0 --trim fc1:-1:0.5", "--trim does not go with --to peft"),
        ("--to published --coefficients 1 0 0", "--coefficients does not go with --to published"),
        ("--to timm --support NOWHERE", "NOWHERE: cannot be listed"),
        ("--to keras --adapter 0", "invalid choice: 'keras'"),
    ],
)
def test_faults_are_one_line(flags, message, mini, tmp_path):
    words = flags.replace("NOWHERE", str(tmp_path / "nowhere")).split()
    found = complaint(mini, *words, "--out", tmp_path / ("adapter" if "peft" in words else "net.safetensors"))
    assert message in found.replace(str(mini), "POOL").replace(str(tmp_path / "nowhere"), "NOWHERE")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_one_line(mini, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a folder" in complaint(mini, "--to", "onnx", "--adapter", 0, "--out", tmp_path)
    for to in ("peft", "timm"):
        assert "a new or an empty folder" in complaint(mini, "--to", to, "--adapter", 0, "--out", tmp_path)
    for to, name in (("timm", "a.safetensors"), ("peft", "a"), ("published", "a.pth")):
        place = tmp_path / "file" / name
        assert "cannot be written" in complaint(mini, "--to", to, "--adapter", 0, "--out", place)
    for to, ending in (("timm", ".safetensors"), ("torch", ".pt2")):
        place = tmp_path / "net.pth"
        assert f"ends in {ending}" in complaint(mini, "--to", to, "--adapter", 0, "--out", place)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_support_folder_that_is_no_support_set_is_one_line(mini, folder, tmp_path, monkeypatch):
    def refused(place: Path) -> str:
        return complaint(mini, "--to", "timm", "--support", place, "--out", tmp_path / "net.safetensors")

    (tmp_path / "images" / "empty").mkdir(parents=True)
    assert "no picture in this class folder" in refused(tmp_path / "images")
    (tmp_path / "images" / "empty" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "one class, 'empty'; a classifier needs 2" in refused(tmp_path / "images")
    shutil.copytree(folder / "apple", tmp_path / "images" / "later")
    assert "cannot be decoded" in refused(tmp_path / "images")
    assert "give the folder above" in refused(folder / "apple")
    monkeypatch.setattr(pictures, "MOST_SUPPORT", 5)
    assert "6 images, a support set has 5 at most" in refused(folder)


def test_a_pool_without_an_architecture_needs_one(pool, tmp_path):
    export.save_published(tmp_path / "amt.pth", pool)
    found = complaint(
        tmp_path / "amt.pth", "--to", "timm", "--adapter", 0, "--out", tmp_path / "net.safetensors"
    )
    assert "does not say its architecture; name it by --arch" in found


def test_a_pool_in_the_box_is_named_without_its_place(pool, tmp_path, monkeypatch):
    """Wherever a flag takes a checkpoint; a file of that name wins."""
    box = tmp_path / "box"
    monkeypatch.setattr("amt.files.shipped.BOX", box)
    checkpoint.save(box / "mine.safetensors", Checkpoint(pool, {"arch": "tiny"}))
    assert as_pool("mine") == box / "mine.safetensors"
    assert as_pool("yours") == Path("yours") and as_pool("a/mine") == Path("a/mine")
    monkeypatch.chdir(tmp_path)
    Path("mine").touch()
    assert as_pool("mine") == Path("mine")
