"""Pools of LoRAs with LayerNorms of their own: the laws of a pool, training, files, exports, the commands."""

import dataclasses
import signal
from pathlib import Path

import pytest
import timm
import torch
from commands import about, same_tensors
from conftest import fails, moved_apart
from safetensors.torch import load_file
from toy_export import assert_same, images
from toy_pools import (
    LEVELS,
    RANK,
    assert_goes_on_exactly,
    assert_identical,
    make_episode,
    quick,
    rewritten,
    tensors,
    trainable,
)
from toy_training import command, signal_after

from amt.attacks.levels import Perturbation
from amt.cli import checkpoint as describing
from amt.cli import pool as pooling
from amt.files import checkpoint, export
from amt.files.checkpoint import Checkpoint
from amt.files.export import merged_network
from amt.files.published import pool_from_published
from amt.models.network import features
from amt.models.pool import Pool, norm_weights, principal_pool
from amt.training.tuner import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")

FLAT = tuple(Perturbation(e, e / 4, steps=2, gamma=0.0, grids=(0,), scalars=(1.0,)) for e in (8, 4))
NAMES = {
    f"{layer}.{part}"
    for layer in ("norm", *(f"blocks.{b}.norm{n}" for b in (0, 1) for n in (1, 2)))
    for part in ("weight", "bias")
}


@pytest.fixture(scope="module")
def untrained(network) -> Pool:
    return principal_pool(network.weights, RANK, LEVELS, norms=True)


@pytest.fixture(scope="module")
def pool(untrained) -> Pool:
    """Three members that differ in factors, norms and heads."""
    return dataclasses.replace(moved_apart(untrained), scale=torch.tensor([9.0, 10, 11]))


# The laws of its norms; those of every pool are in test_pool_laws


def test_every_norm_is_a_members_own(network, untrained):
    assert set(norm_weights(network.weights)) == NAMES == untrained.whole.keys()
    assert untrained.tune == "lora+norm" and untrained.rank == RANK
    assert untrained.shapes == {name: tuple(weight.shape) for name, weight in network.weights.items()}


def test_merging_averages_the_norms_and_adds_the_factors(network, pool):
    """The LoRAs merge as they do without norms of their own."""
    shares = (0.2, 0.3, 0.5)
    merged, loras = pool.merge(shares), principal_pool(network.weights, RANK, LEVELS)
    loras = loras.with_factors(pool.factors)
    for name, weight in loras.merge(shares).items():
        wanted = sum(c * pool.whole[name][p] for p, c in enumerate(shares)) if name in NAMES else weight
        torch.testing.assert_close(merged[name], wanted)
    assert all(torch.equal(pool.stack()[name], pool.whole[name]) for name in NAMES)
    leaf = trainable(pool)
    features(network, leaf.merge(shares), make_episode(0).query).square().sum().backward()
    assert all(factor.grad[p].abs().sum() > 0 for factor in leaf.factors.values() for p in range(3))


# Training


@pytest.mark.parametrize("variant", [{}, {"loss": "features"}, {"method": "querying", "head": "ridge"}])
def test_while_its_norms_rest_it_is_a_pool_of_loras(network, variant):
    """The first step of the LoRAs, as the norms are where they were; every norm makes one of its own."""
    steps = []
    for norms in (False, True):
        pool = moved_apart(principal_pool(network.weights, RANK, FLAT))
        if norms:
            own = principal_pool(network.weights, RANK, FLAT, norms=True)
            pool = own.with_factors(own.factors | pool.factors)
        tuner = Tuner(network, pool, quick(lr=1e-3, **variant))
        steps.append((tuner.step(make_episode(0)), tensors(tuner.pool), pool))
    (told, loras, _), (also_told, both, before) = steps
    for one, other in zip(told, also_told, strict=True):
        assert other.total == pytest.approx(one.total, rel=1e-4)
    for name, factor in loras.items():
        torch.testing.assert_close(both[name], factor, rtol=1e-4, atol=1e-6)
    for name in NAMES:
        assert all(not torch.equal(both[name][p], before.whole[name][p]) for p in range(2)), name
    assert not torch.equal(network.weights["norm.bias"], both["norm.bias"][0])


def test_levels_together_are_those_alone_and_resume_exactly(network, pool, tmp_path):
    """Under the move of the weights, which norms take part in."""
    settings = quick(lr=1e-3, clip_grad=1.0)
    whole, alone = Tuner(network, pool, settings), Tuner(network, pool, settings, at_once=1)
    for k in range(3):
        whole.step(make_episode(k))
        alone.step(make_episode(k))
    for name, factor in tensors(whole.pool).items():
        torch.testing.assert_close(tensors(alone.pool)[name], factor, rtol=1e-4, atol=1e-5)
    assert_goes_on_exactly(network, pool, settings, tmp_path, total=3)


# Files


@pytest.fixture
def file(pool, tmp_path) -> Path:
    checkpoint.save(tmp_path / "norms.safetensors", Checkpoint(pool, {"arch": "tiny"}))
    return tmp_path / "norms.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, h: h.update(tune="lora"), "factors do not belong"),
        (lambda t, h: h.update(tune="full"), "no complete weights"),
        (
            lambda t, h: t.update({"factors/norm.bias": torch.zeros(2, 24)}),
            r"norm\.bias.*\(2, 24\).*\(3, 24\)",
        ),
        (lambda t, h: t.update({"factors/norm.bias": torch.zeros(3)}), r"norm\.bias.*\(3,\).*\(3, 24\)"),
        (
            lambda t, h: t.update({"factors/blocks.0.attn.proj.weight": torch.zeros(3, 24, 24)}),
            "factors do not belong",
        ),
        (lambda t, h: t.update({"factors/other.bias": torch.zeros(3, 24)}), "factors do not belong"),
    ],
)
def test_a_damaged_file_is_one_clear_line(file, change, words):
    fails(words, lambda: checkpoint.load(rewritten(file, change)))


def test_it_is_described_and_assembled(network, pool, file, tmp_path, capsys):
    assert describing.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "our pool of LoRAs and LayerNorms" in said and f"3 of rank {RANK} on 8 layers" in said
    one, out = tmp_path / "one.safetensors", tmp_path / "more.safetensors"
    checkpoint.save(one, Checkpoint(pool[1], {"arch": "tiny"}))
    assert pooling.main([str(one), str(file), "--out", str(out), "--epsilon", "1", "2", "4", "8"]) == 0
    assert f"4 LoRAs of rank {RANK} with LayerNorms, epsilon 1, 2, 4, 8" in capsys.readouterr().out
    joined = checkpoint.load(out).pool
    assert_identical(tensors(joined[2]), tensors(pool[1]))
    loras = tmp_path / "loras.safetensors"
    checkpoint.save(loras, Checkpoint(principal_pool(network.weights, RANK, LEVELS), {"arch": "tiny"}))
    words = [str(file), str(loras), "--out", str(out)]
    fails(r"--tune lora\+norm, another with lora", lambda: pooling.main(words))


# Exports


@pytest.mark.parametrize("shares", [(0.0, 1.0, 0.0), (0.2, 0.3, 0.5)])
def test_peft_holds_the_merged_norms(network, pool, tmp_path, shares):
    """The real library, on timm's network with the untouched pretrained weights."""
    from peft import PeftModel

    merged = merged_network(network, pool, shares)
    export.save(tmp_path / "adapter", "peft", merged, pool)
    call = export.timm_call(network, network.image_size)
    plain = timm.create_model(call.name, **call.options)
    plain.load_state_dict(network.weights)
    found = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    seen = images(side=network.image_size)
    with torch.no_grad():
        wanted = features(network, merged.weights, seen)
        assert_same(found(network.normalise(seen)), wanted)
        assert_same(found.merge_and_unload()(network.normalise(seen)), wanted)


def test_timm_holds_them_and_the_published_layout_those_of_one(network, pool, tmp_path):
    merged = merged_network(network, pool, (0.2, 0.3, 0.5))
    export.save(tmp_path / "net.safetensors", "timm", merged)
    assert_same(load_file(tmp_path / "net.safetensors")["norm.bias"], merged.weights["norm.bias"])
    fails("LayerNorms of its own.*--adapter", lambda: export.published_state(pool))
    again = pool_from_published(export.published_state(pool, 1), (LEVELS[1],))
    assert again.tune == "lora"
    assert_identical(again.merge([1.0]), pool[1].merge([1.0]))


# The commands


def test_main_trains_it_and_it_is_tested(world, tmp_path):
    """Stopped and continued to the same bits, then evaluated: routed, trimmed, by a head with statistics."""
    short = ("--tune", "lora+norm", "--epochs", 1, "--nEpisode", 2, "--nValEpisode", 1, "--attack_iters", 1)
    for out, stops in (("whole", False), ("parts", True)):
        words = world.train(tmp_path / out, *short)
        with pytest.MonkeyPatch.context() as patch:
            if stops:
                signal_after(patch, 1, signal.SIGTERM)
                assert command("main", *words).code == 143
        ended = command("main", *words)
        assert ended.code == 0, ended.err
    last = tmp_path / "parts" / "last.safetensors"
    assert same_tensors(tmp_path / "whole" / "last.safetensors", last)
    found = checkpoint.load(last)
    assert found.pool.tune == "lora+norm" and found.statistics is not None
    assert about(last)["tune"] == "lora+norm"
    refused = command("main", *world.train(tmp_path / "parts", *short, "--tune", "lora"))
    assert refused.code == 2 and 'tune "lora+norm", not "lora"' in refused.err
    dry = command("main", *world.train(tmp_path / "dry", *short, "--dry_run"))
    assert dry.code == 0 and "would meta-tune 2 LoRAs" in dry.out
    few = ("--nTestEpisode", 1, "--probe_episodes", 0)
    flags = ("--resume", last, "--epsilon", 8, "--attack_iters", 1, *few)
    for more in (("--routing", "amt", "--trim", "qkv:0:0.5"), ("--head", "robust-lda")):
        ended = command("test_meta_dataset", *world.test(tmp_path / more[1], *flags, *more))
        assert ended.code == 0, ended.err


def test_norms_are_known_by_their_names():
    weights = {"a.weight": torch.eye(3), "cls": torch.ones(3), "fc_norm.bias": torch.ones(3)}
    assert norm_weights(weights) == ["fc_norm.bias"]
