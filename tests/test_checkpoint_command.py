"""The commands that describe and convert checkpoints, and assemble pools from them."""

import datetime
import hashlib
from pathlib import Path

import pytest
import torch
from conftest import random_backbone
from safetensors.torch import load_file
from test_network import write_official
from toy_published import ARCH, as_published, pool_file, same, trained, training_file

from amt.attacks.levels import Perturbation
from amt.cli import checkpoint as describing
from amt.cli import pool as pooling
from amt.files import checkpoint, published
from amt.files.checkpoint import Checkpoint
from amt.files.published import POOL_EPSILONS
from amt.models.pool import principal_pool
from meta_dataset_readers.errors import InputError


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH)


def described(path: Path, capsys) -> dict[str, str]:
    assert describing.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:12].strip(): line[13:] for line in lines}


def test_describing_pools(network, tmp_path, capsys):
    """Kind, sizes, levels, numbers, type and digests of ours, a published pool and a published training."""
    pool = trained(network, 4)
    path = pool_file(tmp_path / "pool.pth", pool)
    told = described(path, capsys)
    assert "published pool" in told["kind"] and told["container"] == "torch"
    assert "dim 24, depth 2, patch 4" in told["arch"] and told["adapters"] == "4 of rank 3 on 8 layers"
    assert told["levels"] == "8, 6, 0.1, 0.01 (of 255), from the paper"
    state = as_published(pool)
    numbers = sum(tensor.numel() for tensor in state.values())
    assert told["tensors"] == f"{len(state)}, {numbers:,} numbers, float32"
    data = path.read_bytes()
    assert told["sha256"] == hashlib.sha256(data).hexdigest()
    assert told["git blob"] == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert "released" not in told

    told = described(training_file(tmp_path / "a.pth", pool[0]), capsys)
    assert "published training" in told["kind"] and told["epoch"] == "4"
    assert told["levels"] == "6 (of 255), from the arguments"
    assert told["arch"].startswith("dino_small_patch16, it says; ")

    checkpoint.save(tmp_path / "ours.safetensors", Checkpoint(pool, {"arch": "tiny"}))
    told = described(tmp_path / "ours.safetensors", capsys)
    assert told["kind"] == "our pool of LoRAs" and told["arch"].startswith("tiny, it says")
    checkpoint.save(tmp_path / "ours.safetensors", Checkpoint(pool, {"tuner": {}, "finished": False}))
    assert "--resume continues" in described(tmp_path / "ours.safetensors", capsys)["kind"]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("plain", "plain state dict"),
        ("dino_full", "the teacher of a DINO or iBOT checkpoint"),
        ("student_only", "the student"),
        ("deit", "as 'model', as DeiT does"),
        ("ibot", "'state_dict'"),
        ("safetensors", "plain state dict"),
    ],
)
def test_describing_backbones(network, form, words, tmp_path, capsys):
    told = described(write_official(tmp_path / "weights", form, network.weights), capsys)
    assert "weights of a vision transformer" in told["kind"] and words in told["kind"]
    assert told["tensors"].startswith(f"{len(network.weights)}, ")
    assert ("left out" in told) == (form != "plain")


def test_the_authors_files_are_known_by_their_git_names(network, tmp_path, capsys, monkeypatch):
    assert set(published.RELEASED) == {
        "83189d70dc0216988af4d8ce88febf1edc81ecf3",
        "f2a2e34b12da6836bc91bbd89ddff5aac23fae55",
    }
    path = pool_file(tmp_path / "pool.pth", trained(network, 4))
    monkeypatch.setitem(published.RELEASED, published.git_blob_id(path), "5-way 9-shot (x.pth)")
    assert described(path, capsys)["released"] == "bit for bit the authors' 5-way 9-shot (x.pth)"


def test_git_agrees_about_the_name_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"what is up, doc?")
    assert published.git_blob_id(tmp_path / "file") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_converting_needs_trust_only_where_a_file_could_run_code(network, tmp_path, capsys):
    """What is written holds the same numbers and needs no trust any more."""
    pool, out = trained(network, 1), tmp_path / "out.safetensors"
    path = training_file(tmp_path / "a.pth", pool, begun=datetime.date(2024, 5, 1))
    with pytest.raises(InputError, match=r"datetime.*--trust"):
        describing.main([str(path), "--convert", str(out)])
    assert describing.main([str(path), "--convert", str(out), "--trust"]) == 0
    assert same(checkpoint.load(out).pool, pool)
    assert [level.epsilon for level in checkpoint.load(out).pool.levels] == [6.0]
    capsys.readouterr()
    assert described(out, capsys)["kind"] == "our pool of LoRAs"

    torch.save({"model": network.module}, tmp_path / "whole.pth")
    assert describing.main([str(tmp_path / "whole.pth"), "--convert", str(out), "--trust"]) == 0
    weights = load_file(out)
    assert weights.keys() == network.weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in network.weights.items())

    torch.save(network.weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert describing.main([str(tmp_path / "old.pth"), "--convert", str(out), "--trust"]) == 0
    write_official(tmp_path / "dino.pth", "dino_full", network.weights)
    assert describing.main([str(tmp_path / "dino.pth"), "--convert", str(out)]) == 0
    assert all(torch.equal(load_file(out)[name], weight) for name, weight in network.weights.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trust"], "--trust is for --convert"),
        (["--convert", "out.pth"], "ends in .safetensors"),
        (["--convert", "out.safetensors"], r"python -m amt pool .*pool.pth --epsilon E0 E1 --out"),
    ],
)
def test_conversions_that_are_refused(network, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool_file(tmp_path / "pool.pth", trained(network, 2))
    with pytest.raises(InputError, match=words):
        describing.main([str(tmp_path / "pool.pth"), *flags])
    assert not list(tmp_path.glob("out*"))


def test_single_loras_assemble_into_a_pool(network, tmp_path, capsys):
    """Ours and published ones mixed, in order, with the levels that the files say or the ones given."""
    pool, out = trained(network, 4), tmp_path / "pool.safetensors"
    files = []
    for p in range(4):
        files.append(tmp_path / f"{p}.file")
        if p % 2:
            checkpoint.save(files[p].with_suffix(".safetensors"), Checkpoint(pool[p], {"arch": "tiny"}))
            files[p] = files[p].with_suffix(".safetensors")
        else:
            training_file(files[p], pool[p], epsilon=p + 1)
    assert pooling.main([*map(str, files), "--out", str(out)]) == 0
    assert "4 LoRAs of rank 3, epsilon 1, 4, 3, 2 (of 255)" in capsys.readouterr().out
    found = checkpoint.load(out)
    assert same(found.pool, pool)
    assert [each["kind"] for each in found.about["assembled_from"]] == ["training", "ours"] * 2
    assert pooling.main([*map(str, files), "--out", str(out), "--epsilon", "8", "6", "0.1", "0.01"]) == 0
    levels = checkpoint.load(out).pool.levels
    assert [(level.epsilon, level.step_size) for level in levels] == [(e, e / 4) for e in POOL_EPSILONS]


def test_a_published_pool_is_given_its_levels(network, tmp_path):
    pool, out = trained(network, 2), tmp_path / "pool.safetensors"
    path = pool_file(tmp_path / "pool.pth", pool)
    with pytest.raises(InputError, match="does not say the levels"):
        pooling.main([str(path), "--out", str(out)])
    assert pooling.main([str(path), "--out", str(out), "--epsilon", "4", "0"]) == 0
    assert same(checkpoint.load(out).pool, pool)
    assert [level.epsilon for level in checkpoint.load(out).pool.levels] == [4.0, 0.0]


def test_loras_that_do_not_belong_together_are_refused(network, tmp_path):
    """The line names both files, and the tensor or the ranks."""
    out = tmp_path / "pool.safetensors"
    one = training_file(tmp_path / "one.pth", trained(network, 1))
    other = random_backbone(ARCH, seed=5)
    two = training_file(tmp_path / "two.pth", trained(other, 1))
    rank = principal_pool(network.weights, 2, (Perturbation(8, 2),))
    three = training_file(tmp_path / "three.pth", rank)
    for files, words in (
        ((one, two), ["one.pth", "two.pth", "residuals differ at "]),
        ((one, three), ["three.pth", "rank 2", "one.pth", "3"]),
    ):
        with pytest.raises(InputError) as refused:
            pooling.main([*map(str, files), "--out", str(out)])
        assert all(word in str(refused.value) for word in words)
    with pytest.raises(InputError, match="--epsilon has 2 values, the files hold 1 LoRAs"):
        pooling.main([str(one), "--out", str(out), "--epsilon", "8", "6"])
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        pooling.main([str(one), "--out", str(tmp_path / "pool.pth")])
    assert not out.exists()
