"""Checkpoints of the published code: pools and trainings are read exactly."""

import re

import numpy as np
import pytest
import torch
from conftest import moved_apart, random_backbone
from safetensors.torch import save_file
from toy_published import ARCH, as_published, pool_file, same, trained, training_file
from toy_training import command

from amt.attacks.levels import Perturbation
from amt.cli import options
from amt.evaluation import runs
from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.files.pretrained import load_network
from amt.files.published import POOL_EPSILONS, pool_from_published, published_shapes
from amt.models.network import features
from amt.models.pool import principal_pool
from amt.training.keeper import check_resumable
from meta_dataset_readers.errors import InputError


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH)


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
