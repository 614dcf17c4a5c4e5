"""Checkpoints of the published code and any other file from elsewhere: what they hold is read exactly, what
is wrong with them is said in one line, and nothing in them is ever run. Every bad file here is a real one."""

import argparse
import dataclasses
import hashlib
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moved_apart, random_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_network import write_official
from torch import Tensor
from toy_training import command

from amt.attacks.levels import Perturbation
from amt.cli import checkpoint as describing
from amt.cli import options
from amt.cli import pool as pooling
from amt.evaluation import runs
from amt.files import checkpoint, published
from amt.files.checkpoint import Checkpoint
from amt.files.pretrained import load_network
from amt.files.published import POOL_EPSILONS, pool_from_published, published_shapes
from amt.models.architectures import Arch
from amt.models.network import features
from amt.models.pool import LoRAPool, principal_pool
from amt.training.keeper import check_resumable
from meta_dataset_readers.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=16, mlp_ratio=2.0)
SIZES = {"patch": 4, "dim": 24, "depth": 2, "hidden": 48, "tokens": 17}
RANK = 3


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH)


def trained(network, adapters: int) -> LoRAPool:
    """A pool whose LoRAs have moved apart, with a head of their own kind."""
    levels = tuple(Perturbation(8.0 / (p + 1), 2.0 / (p + 1)) for p in range(adapters))
    pool = moved_apart(principal_pool(network.weights, RANK, levels))
    return dataclasses.replace(pool, scale=torch.full((adapters,), 9.5), bias=torch.full((adapters,), 0.25))


def as_published(pool: LoRAPool, single: bool = False) -> dict[str, Tensor]:
    """The state dict the published code would save of `pool`; of a training if it is `single`."""
    prefix = "backbone." if single else "backbone.model."
    state = {"bias": pool.bias[:1], "scale_cls": pool.scale[:1]}
    state |= {prefix + name: weight for name, weight in pool.residual.items()}
    for name in pool.A:
        layer = prefix + name.removesuffix(".weight")
        for p in range(len(pool)):
            k = "" if single else f".{p}"
            state[f"{layer}.lora_A{k}"] = pool.A[name][p].flatten(0, 1)
            state[f"{layer}.lora_B{k}"] = pool.B[name][p].flatten(0, 1)
    return {name: tensor.clone() for name, tensor in state.items()}


def training_file(path: Path, pool: LoRAPool, **arguments) -> Path:
    """A training checkpoint as the published main.py writes it, numpy's numbers in its arguments included."""
    usual = {
        "arch": "dino_small_patch16_amt",
        "epsilon": 6,
        "alpha": 1.5,
        "attack_iters": 7,
        "beta": 5.0,
        "delta_init": "random",
        "pgd_method": "adsv",
        "min_log_weight": np.log(0.5),
        "base_sources": ["ilsvrc_2012"],
        "opt_betas": None,
    }
    content = {
        "model": as_published(pool, single=True),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [0.01], "t_initial": 2, "warmup_steps": [0.1]},
        "epoch": 4,
        "model_ema": None,
        "args": argparse.Namespace(**(usual | arguments)),
        "scalar": {},
    }
    torch.save(content, path)
    return path


def pool_file(path: Path, pool: LoRAPool) -> Path:
    torch.save({"model": as_published(pool)}, path)
    return path


def same(one: LoRAPool, other: LoRAPool) -> bool:
    """Whether two pools hold the same numbers, bit for bit."""

    def tensors(pool: LoRAPool) -> dict[str, Tensor]:
        return pool.residual | pool.factors | {"head/scale": pool.scale, "head/bias": pool.bias}

    mine, others = tensors(one), tensors(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


# published pools and trainings


@pytest.mark.parametrize("adapters", [1, 2, 4, 5])
@pytest.mark.parametrize("bare", [False, True])
def test_pools_of_any_size_are_read_exactly(network, adapters, bare, tmp_path):
    """Under the key `model`, or bare as safetensors; the levels of four are the paper's, others unknown."""
    pool, path = trained(network, adapters), tmp_path / "pool.pth"
    if bare:
        save_file(as_published(pool), path)
    else:
        pool_file(path, pool)
    found = checkpoint.load(path)
    assert same(found.pool, pool)
    assert found.about["published"] == "pool"
    epsilons = POOL_EPSILONS if adapters == 4 else (0.0,) * adapters
    assert tuple(level.epsilon for level in found.pool.levels) == epsilons
    assert found.about["levels_from"] == ("the paper" if adapters == 4 else "nowhere")
    assert any("levels are not in the file" in note for note in found.about["notes"]) == (adapters != 4)


def test_a_training_is_read_with_its_level(network, tmp_path):
    pool = trained(network, 1)
    found = checkpoint.load(training_file(tmp_path / "checkpoint.pth", pool))
    assert same(found.pool, pool)
    expected = Perturbation(epsilon=6.0, step_size=1.5, steps=7, beta=5.0, start="random2")
    assert found.pool.levels == (expected,)
    assert found.about["arch"] == "dino_small_patch16" and found.about["epoch"] == 4
    assert found.about["arguments"]["min_log_weight"] == pytest.approx(np.log(0.5))
    assert found.about["notes"] == []


def test_an_unattacked_training_says_so_and_one_without_arguments_has_no_level(network, tmp_path):
    pool = trained(network, 1)
    found = checkpoint.load(training_file(tmp_path / "a.pth", pool, pgd_method="standard"))
    assert any("without an adversary" in note for note in found.about["notes"])
    torch.save({"model": as_published(pool, single=True)}, tmp_path / "b.pth")
    found = checkpoint.load(tmp_path / "b.pth")
    assert found.about["levels_from"] == "nowhere" and same(found.pool, pool)


@pytest.mark.parametrize("epsilon", ["eight", -1, float("nan"), 10**400, [8, 6]])
def test_arguments_that_describe_no_level_are_refused(network, epsilon, tmp_path):
    path = training_file(tmp_path / "a.pth", trained(network, 1), epsilon=epsilon, arch="other")
    if isinstance(epsilon, float):  # not finite: as good as not said
        assert checkpoint.load(path).about["levels_from"] == "nowhere"
        return
    with pytest.raises(InputError, match="describe no level"):
        checkpoint.load(path)


def test_merging_is_what_the_layout_means(network, tmp_path):
    """The published reading of the factors, block by block of a fused qkv, gives the same weights."""
    pool = trained(network, 4)
    state = as_published(pool)
    found = checkpoint.load(pool_file(tmp_path / "pool.pth", pool)).pool
    coefficients = (0.2, 0.0, 0.5, 0.3)
    merged = found.merge(coefficients)
    for name in pool.A:
        layer = f"backbone.model.{name.removesuffix('.weight')}"
        weight = state[f"{layer}.weight"].clone()
        groups = 3 if name.endswith("qkv.weight") else 1
        for p, share in enumerate(coefficients):
            A, B = state[f"{layer}.lora_A.{p}"], state[f"{layer}.lora_B.{p}"]
            parts = (weight.chunk(groups), B.chunk(groups), A.chunk(groups))
            for rows, block_B, block_A in zip(*parts, strict=True):
                rows += share * block_B @ block_A
        assert torch.allclose(merged[name], weight, atol=1e-6), name


def test_copies_of_weights_in_a_used_model_are_noted_and_left_out(network, tmp_path):
    pool, path = trained(network, 2), tmp_path / "pool.pth"
    state = as_published(pool)
    copies = {
        f"{name[:-6]}ori_weight": weight.clone() for name, weight in state.items() if "qkv.weight" in name
    }
    torch.save({"model": state | copies}, path)
    found = checkpoint.load(path)
    assert same(found.pool, pool)
    assert any("2 tensors *.ori_weight" in note for note in found.about["notes"])
    next(iter(copies.values())).add_(1)
    torch.save({"model": state | copies}, path)
    with pytest.raises(InputError, match=r"ori_weight differs from .*qkv.weight.*mid-merge"):
        checkpoint.load(path)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, k: s.pop(k("blocks.1.attn.proj.lora_B", "1")), ["lacks", "blocks.1.attn.proj.lora_B"]),
        (lambda s, k: s.pop("scale_cls"), ["lacks tensor scale_cls"]),
        (lambda s, k: s.pop(k("patch_embed.proj.weight")), ["lacks", "patch_embed.proj.weight"]),
        (lambda s, k: s.pop(k("blocks.0.mlp.fc1.weight")), ["lacks", "blocks.0.mlp.fc1.weight"]),
        (lambda s, k: s.update({"head.weight": torch.ones(2)}), ["unexpected", "head.weight"]),
        (lambda s, k: s.update({"a\n\x1b[31m": torch.ones(2)}), ["unexpected", r"a\n\x1b[31m"]),
        (lambda s, k: s.update({k("blocks.0.ori_weight"): torch.ones(2)}), ["unexpected", "ori_weight"]),
        (lambda s, k: s.update({k("blocks.7.norm1.bias"): torch.ones(24)}), ["lacks", "blocks.2", "more"]),
        (lambda s, k: s.update({k("blocks.999.x"): torch.ones(24)}), ["block 999", "in all"]),
        (
            lambda s, k: s.update({k("blocks.0.attn.qkv.lora_A", "0"): torch.ones(4, 24)}),
            ["blocks.0.attn.qkv.lora_A", "has shape (4, 24), expected (9, 24)"],
        ),
        (lambda s, k: s.update({"scale_cls": torch.tensor(1.0)}), ["scale_cls has shape ()", "(1,)"]),
        (lambda s, k: s.update({k("norm.bias"): torch.ones(24).double()}), ["norm.bias is float64"]),
        (lambda s, k: s.update({k("norm.bias"): torch.full((24,), torch.nan)}), ["norm.bias", "not finite"]),
        (lambda s, k: s.update({k("norm.bias"): torch.ones(1).expand(24)}), ["norm.bias claims 24 numbers"]),
        (
            lambda s, k: s.update({k("pos_embed"): torch.ones(17, 24)}),
            ["pos_embed has shape (17, 24)", "3 axes"],
        ),
    ],
)
def test_every_tensor_of_a_pool_is_accounted_for(network, single, change, words, tmp_path):
    """Missing, unexpected and misshapen tensors are listed; so is what is no finite float32."""
    pool = trained(network, 1 if single else 2)
    state = as_published(pool, single)

    def key(name: str, adapter: str = "") -> str:
        if single:
            return f"backbone.{name}"
        return f"backbone.model.{name}{'.' * bool(adapter)}{adapter}"

    change(state, key)
    torch.save({"model": state}, tmp_path / "pool.pth")
    with pytest.raises(InputError) as refused:
        checkpoint.load(tmp_path / "pool.pth")
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in [str(tmp_path / "pool.pth"), *words])


def test_the_tables_of_tensors_have_the_published_sizes():
    """Counts and sums for ViT-S, as they are known of the published layouts."""
    small = {"patch": 16, "dim": 384, "depth": 12, "hidden": 1536, "tokens": 197, "rank": 8}
    for adapters, tensors, numbers in ((None, 248, 22_329_218), (4, 536, 24_319_874)):
        shapes = published_shapes(**small, adapters=adapters)
        assert len(shapes) == tensors
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == numbers


def test_the_default_levels_are_those_of_training():
    training = ["--data_path", "d", "--base_sources", "a", "--output_dir", "o"]
    levels = options.levels(options.training_parser().parse(training))
    read = tuple(Perturbation(epsilon, epsilon / 4) for epsilon in POOL_EPSILONS)
    assert levels == read


def test_factors_without_a_level_each_are_an_error(network):
    with pytest.raises(ValueError, match="expected 3 of them"):
        pool_from_published(as_published(trained(network, 2)), (Perturbation(8, 2),) * 3)


def test_a_published_training_is_not_continued(network, tmp_path):
    """Its optimiser could be read, its random streams could not: main.py --resume says so in a line."""
    file = training_file(tmp_path / "a.pth", trained(network, 1))
    with pytest.raises(InputError, match="published code, whose training cannot be continued exactly"):
        check_resumable(file, checkpoint.load(file))


# files from elsewhere


class Runs:
    """Unpickled carelessly, this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Legacy:
    """A class of somebody's code, inside a checkpoint."""


def zipped(path: Path, change) -> None:
    """Rewrite a torch file's entries: `change(name, data) -> data`."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def larger(name: str, data: bytes) -> bytes:
    """The pickle of a tensor of 4 numbers, claiming 2**37 of them."""
    return data.replace(b"K\x04\x85q", b"\x8a\x05\0\0\0\0\x20\x85q") if name.endswith("data.pkl") else data


def longer(name: str, data: bytes) -> bytes:
    """The pickle of a storage of 4 numbers, claiming 200 of them."""
    place = data.rfind(b"K\x04", 0, data.find(b"tq\x07Q"))
    return data[:place] + b"K\xc8" + data[place + 2 :] if name.endswith("data.pkl") else data


def bad_files(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Files of every bad kind, and what must be said of each."""
    whole = io.BytesIO()
    torch.save({"model": {"norm.bias": torch.arange(4.0)}}, whole)
    data = whole.getvalue()
    numbers = data.index(torch.arange(4.0).numpy().tobytes())
    convert = "--convert OUT.safetensors --trust"
    files: dict[str, tuple[bytes, list[str]]] = {
        "empty": (b"", ["empty"]),
        "byte": (b"\x80", ["damaged pickle"]),
        "html": (b"<!DOCTYPE html>\n<html>not found</html>", ["starts with '<!DOCTYPE html', a web page"]),
        "xml": (b"\n <?xml version='1.0'?><Error/>", ["starts with '<?xml version=", "a web page"]),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", ["a Git LFS pointer"]),
        "text": (b"see the README", ["starts with 'see the README'", "expected a safetensors or torch file"]),
        "cut_short": (data[:-30], ["truncated or damaged torch file"]),
        "cut_early": (data[:100], ["truncated or damaged torch file"]),
        "flipped": (data[:numbers] + b"\x55" + data[numbers + 1 :], ["damaged", "checksum", "data/0"]),
        "bare_pickle": (pickle.dumps(Runs(folder / "ran")), ["a bare pickle", "mkdir", convert]),
        "bare_pickle_2": (pickle.dumps(Runs(folder / "ran"), 2), ["a bare pickle", "mkdir", convert]),
        "cut_pickle": (pickle.dumps(Runs(folder / "ran"))[:-5], ["truncated or damaged pickle"]),
        "safetensors_cut": (_safetensors()[:-2], ["truncated or damaged safetensors"]),
        "safetensors_cut_early": (_safetensors()[:20], ["truncated or damaged safetensors"]),
        "safetensors_huge": (
            _safetensors()
            .replace(b'"shape":[4]', b'"shape":[4000000000000]')
            .replace(len(_header()).to_bytes(8, "little"), (len(_header()) + 12).to_bytes(8, "little")),
            ["truncated or damaged safetensors"],
        ),
    }
    found = {}
    for name, (content, words) in files.items():
        (folder / f"{name}.pth").write_bytes(content)
        found[name] = folder / f"{name}.pth", words
    for name, content, words in (
        ("runs", {"model": Runs(folder / "ran")}, ["mkdir", convert]),
        ("foreign", {"model": Legacy()}, ["test_published.Legacy", convert]),
        ("path", {"out": Path("x")}, ["pathlib", convert]),
        ("network", torch.nn.Linear(1, 1), ["torch.nn.modules.linear.Linear", convert]),
        ("list", [torch.ones(1)], ["holds a list", "dictionary"]),
        ("nothing", {}, ["LoRAs"]),
    ):
        torch.save(content, folder / f"{name}.pth")
        found[name] = folder / f"{name}.pth", words
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"a": Runs(folder / "ran")}, folder / "old_runs.pth", **old)
    found["old_runs"] = folder / "old_runs.pth", ["old format (before version 1.6)", "mkdir", convert]
    torch.save({"a": Runs(folder / "ran")}, folder / "runs_4.pth", pickle_protocol=4)
    found["runs_4"] = folder / "runs_4.pth", ["mkdir", convert]
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), folder / "script.pth")
    found["script"] = folder / "script.pth", ["a TorchScript program"]
    for name, change, words in (
        ("huge", larger, ["damaged torch file"]),
        ("long", longer, ["damaged torch file"]),
    ):
        torch.save({"model": {"norm.bias": torch.arange(4.0)}}, folder / f"{name}.pth")
        before = (folder / f"{name}.pth").read_bytes()
        zipped(folder / f"{name}.pth", change)
        assert (folder / f"{name}.pth").read_bytes() != before
        found[name] = folder / f"{name}.pth", words
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(10_000_000))
    found["bomb"] = folder / "bomb.pth", ["is compressed"]
    with zipfile.ZipFile(folder / "twice.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/DATA.PKL", pickle.dumps(Runs(folder / "ran"), 2))
    found["twice"] = folder / "twice.pth", ["without a data.pkl"]
    with zipfile.ZipFile(folder / "photos.pth", "w") as archive:
        archive.writestr("photos/1.jpg", b"")
    found["photos"] = folder / "photos.pth", ["without a data.pkl"]
    found["missing"] = folder / "missing.pth", ["no such"]
    found["folder"] = folder, ["is a folder, expected a regular file"]
    return found


def _safetensors() -> bytes:
    stream = io.BytesIO()
    header = _header()
    stream.write(len(header).to_bytes(8, "little") + header + torch.ones(4).numpy().tobytes())
    return stream.getvalue()


def _header() -> bytes:
    return b'{"norm.bias":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    return bad_files(tmp_path_factory.mktemp("bad"))


BAD = (
    *(
        "empty",
        "byte",
        "html",
        "xml",
        "lfs",
        "text",
        "cut_short",
        "cut_early",
        "flipped",
        "missing",
        "folder",
    ),
    *("bare_pickle", "bare_pickle_2", "cut_pickle", "runs", "runs_4", "old_runs", "foreign", "path"),
    *("network", "list", "nothing", "script", "huge", "long", "bomb", "twice", "photos"),
    *("safetensors_cut", "safetensors_cut_early", "safetensors_huge"),
)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_bad_files_are_refused_in_one_line_and_run_nothing(bad, name):
    """By the reader of checkpoints, of backbones, and of the command that describes files alike."""
    path, words = bad[name]
    for use in (
        checkpoint.load,
        lambda file: load_network("vit_mini", file),
        lambda file: describing.main([str(file)]),
    ):
        with pytest.raises(InputError) as refused:
            use(path)
        message = str(refused.value)
        assert "\n" not in message and str(path) in message
        assert name == "nothing" or all(word in message for word in words), message
    assert not (path.parent / "ran").exists()


def test_every_bad_file_is_tested(bad):
    assert bad.keys() == set(BAD)


def test_a_name_says_nothing_about_a_files_kind(network, tmp_path):
    """safetensors called .pth, and a torch file called .safetensors."""
    pool = trained(network, 1)
    torch.save({"model": as_published(pool)}, tmp_path / "a.safetensors")
    save_file(as_published(pool), tmp_path / "b.pth")
    assert same(checkpoint.load(tmp_path / "a.safetensors").pool, checkpoint.load(tmp_path / "b.pth").pool)


@settings(max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["torch", "pickle", "safetensors"]))
def test_no_damage_ends_otherwise_than_in_a_line(data, kind, tmp_path_factory):
    """Any cut and any changed bytes: the file is refused, or still read; there is no other error.

    Of kind "pickle" only the pickle inside is damaged, and the archive around it is sound.
    """
    path = tmp_path_factory.getbasetemp() / "damaged"
    state = as_published(_small(), single=True)

    def damaged(content: bytes) -> bytes:
        content = bytearray(content)
        for _ in range(data.draw(st.integers(0, 3), label="changes")):
            # Many of the changes are to hit the beginning, which describes the rest.
            place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 2000), label="place")
            content[place % len(content)] = data.draw(st.integers(0, 255), label="byte")
        return bytes(content[: data.draw(st.just(None) | st.integers(0, len(content)), label="length")])

    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "args": argparse.Namespace(epsilon=np.float64(8))}, path)
    if kind == "pickle":
        zipped(path, lambda name, entry: damaged(entry) if name.endswith("data.pkl") else entry)
    else:
        path.write_bytes(damaged(path.read_bytes()))
    try:
        checkpoint.load(path)
    except InputError as error:
        assert "\n" not in str(error)


def _small() -> LoRAPool:
    arch = dataclasses.replace(ARCH, dim=6, depth=1, pretrained_size=4)
    return principal_pool(random_backbone(arch).weights, 1, (Perturbation(8, 2),))


# the commands


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
    path = training_file(tmp_path / "a.pth", pool, arch=Path("dino_small_patch16_amt"))
    with pytest.raises(InputError, match=r"pathlib.*--trust"):
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


def test_the_command_is_started_by_python_m_amt(bad):
    """Exit code 2 and one line for what is no checkpoint."""
    words = [sys.executable, "-m", "amt", "checkpoint", str(bad["html"][0])]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert re.fullmatch(r"error: .*web page.*\n", ended.stderr)


def test_a_published_pool_is_evaluated_by_the_usual_command(tiny_source, tmp_path):
    """--resume FILE.pth: the same rows as with the same pool in our format; main.py refuses it in a line."""
    weights = load_network("vit_mini").weights
    levels = tuple(Perturbation(epsilon, epsilon / 4) for epsilon in POOL_EPSILONS)
    pool = moved_apart(principal_pool(weights, 2, levels))
    checkpoint.save(tmp_path / "ours.safetensors", Checkpoint(pool, {"arch": "vit_mini"}))
    theirs = pool_file(tmp_path / "pool.pth", pool)
    directory = tiny_source()
    common = ("--data_path", directory.parent, "--num_workers", 0, "--num_ways", 3)
    common += ("--num_support", 2, "--num_query", 2)
    rows = []
    for file in (tmp_path / "ours.safetensors", theirs):
        ended = command(
            *("test_meta_dataset", *common, "--arch", "vit_mini_amt_merge", "--resume", file),
            *("--test_sources", directory.name, "--nTestEpisode", 2, "--epsilon"),
            *("--output_dir", tmp_path / file.stem),
        )
        assert ended.code == 0, ended.err
        found = runs.load(tmp_path / file.stem).rows[directory.name]
        rows.append([row | {"seconds": None, "fit_seconds": None} for row in found])
    assert rows[0] == rows[1]
    ended = command(
        *("main", *common, "--arch", "vit_mini_amt", "--resume", theirs, "--rank", 2),
        *("--base_sources", directory.name, "--nValEpisode", 0, "--output_dir", tmp_path / "out"),
    )
    assert ended.code == 2 and re.match("error: .*published code", ended.err.splitlines()[-1])


def test_features_of_a_published_pool_are_those_of_ours(network, tmp_path):
    pool = trained(network, 4)
    found = checkpoint.load(pool_file(tmp_path / "pool.pth", pool)).pool
    images = torch.rand(2, 3, 16, 16)
    coefficients = (0.25, 0.25, 0.5, 0.0)
    expected = features(network, pool.merge(coefficients), images)
    assert torch.equal(features(network, found.merge(coefficients), images), expected)
    assert torch.equal(torch.stack(found.head(coefficients)), torch.stack(pool.head(coefficients)))
