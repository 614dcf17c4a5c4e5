"""Laws of the pool: merging, joining, reconstruction and trimming, on a small random vision transformer."""

import dataclasses
import math

import pytest
import torch
from commands import about
from conftest import moved_apart, random_backbone
from hypothesis import given
from hypothesis import strategies as st
from toy_pools import ARCH, LEVELS, RANK, assert_identical, few, outcome_of, tensors, trainable

from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.models.network import features
from amt.models.pool import Pool, pretrained_pool, principal_pool, split_principal
from amt.models.trim import Trim
from amt.models.weights import trim_singular_values

# Laws of every kind


STARTS = {
    "lora": lambda weights: principal_pool(weights, RANK, LEVELS),
    "lora+norm": lambda weights: principal_pool(weights, RANK, LEVELS, norms=True),
    "full": lambda weights: pretrained_pool(weights, LEVELS),
}


@pytest.fixture(scope="module", params=STARTS)
def start(request, network) -> Pool:
    """A pool that is untrained."""
    return STARTS[request.param](network.weights)


@pytest.fixture(scope="module")
def any_pool(start) -> Pool:
    """Members that differ in everything that is theirs, and in their heads."""
    heads = {"scale": torch.tensor([9.0, 10, 11]), "bias": torch.tensor([0.0, 0.1, 0.2])}
    return dataclasses.replace(moved_apart(start), **heads)


@few
@given(st.lists(st.floats(-2, 2), min_size=len(LEVELS) - 1, max_size=len(LEVELS) - 1))
def test_an_untrained_pool_is_the_pretrained_network(network, start, episode, free):
    """For any coefficients that sum to 1; bit for bit where members have complete weights."""
    weights = start.merge([*free, 1 - sum(free)])
    assert all(torch.equal(weights[name], network.weights[name]) for name in start.whole)
    assert (start.scale == 10).all() and (start.bias == 0).all()
    expected = features(network, network.weights, episode.query)
    found = features(network, weights, episode.query)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "coefficients",
    [
        (0.5, 0.5, 0.2),
        (0.0, 0.0, 0.0),
        (0.5, 0.5),
        (0.25,) * 4,
        (),
        (math.nan, 0.5, 0.5),
        (math.inf, 0.0, 0.0),
    ],
)
def test_merge_refuses_other_sums_and_counts(any_pool, coefficients):
    with pytest.raises(ValueError, match="coefficients"):
        any_pool.merge(coefficients)


def test_a_one_hot_merge_is_that_member_exactly(any_pool):
    for p in range(len(any_pool)):
        one_hot = [float(q == p) for q in range(len(any_pool))]
        alone, merged = any_pool[p].merge([1.0]), any_pool.merge(one_hot)
        assert_identical(merged, alone)
        assert all(torch.equal(merged[name], each[p]) for name, each in any_pool.whole.items())
        assert [float(part) for part in any_pool.head(one_hot)] == [any_pool.scale[p], any_pool.bias[p]]
        assert [float(part) for part in any_pool[p].head([1.0])] == [any_pool.scale[p], any_pool.bias[p]]
    assert not torch.equal(
        any_pool[0].merge([1.0])["blocks.0.attn.qkv.weight"], alone["blocks.0.attn.qkv.weight"]
    )


def test_concat_and_indexing_are_inverse(any_pool):
    again = Pool.concat([any_pool[p] for p in range(len(any_pool))])
    assert type(again) is type(any_pool) and again.levels == any_pool.levels
    assert_identical(tensors(again), tensors(any_pool))
    assert_identical(tensors(any_pool.to("cpu")), tensors(any_pool))
    for p in range(len(any_pool)):
        assert_identical(tensors(again[p]), tensors(any_pool[p]))
        assert again[p].levels == (any_pool.levels[p],)
    for out_of_range in (-1, len(any_pool)):
        with pytest.raises(IndexError):
            any_pool[out_of_range]


def test_a_merged_pool_can_be_trimmed(any_pool):
    """What is not selected is the very same tensor."""
    merged = any_pool.merge([0.5, 0.5, 0])
    trimmed = trim_singular_values(merged, [Trim("qkv", 0, 0.5)])
    assert torch.linalg.matrix_rank(trimmed.pop("blocks.0.attn.qkv.weight")) == 12
    assert all(weight is merged[name] for name, weight in trimmed.items())


def test_a_pool_comes_back_from_its_file(any_pool, network, tmp_path):
    file = tmp_path / "pool.safetensors"
    checkpoint.save(file, Checkpoint(any_pool, {"arch": "tiny"}))
    saved = checkpoint.load(file)
    assert type(saved.pool) is type(any_pool) and saved.pool.levels == any_pool.levels
    assert_identical(tensors(saved.pool), tensors(any_pool))
    assert_identical(saved.pool.residual, any_pool.residual)
    assert saved.about == {"arch": "tiny"} and about(file)["tune"] == any_pool.tune
    checkpoint.check_architecture(file, saved.pool, network.weights, "tiny")


# Of LoRAs


def test_gradients_reach_every_factor(network, pool, episode):
    """Of a merge, and of the training loss."""
    merged = trainable(pool)
    features(network, merged.merge([0.2, 0.3, 0.5]), episode.query).square().sum().backward()
    for name, factor in merged.factors.items():
        for p in range(len(pool)):
            assert factor.grad[p].abs().sum() > 0, (name, p)
    single = trainable(pool[0])
    outcome_of(network, single, episode, LEVELS[0]).loss.total.backward()
    for name, parameter in tensors(single).items():
        if name != "bias":
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "arch",
    [
        ARCH,
        dataclasses.replace(ARCH, dim=32),
        dataclasses.replace(ARCH, depth=1),
        dataclasses.replace(ARCH, depth=3),
    ],
    ids=["other weights", "other width", "fewer blocks", "more blocks"],
)
def test_concat_refuses_another_residual(pool, arch):
    other = principal_pool(random_backbone(arch, 7).weights, RANK, LEVELS[:1])
    with pytest.raises(ValueError, match="residual"):
        Pool.concat([pool, other])


@few
@given(
    out=st.integers(1, 6),
    into=st.integers(1, 4),
    kernel=st.integers(1, 3),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_convolution_splits_and_reconstructs(out, into, kernel, seed, data):
    """A 4-D weight is a matrix (out, in * kh * kw); the parts add up, and B A has the leading triplets."""
    weight = torch.randn(out, into, kernel, kernel, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(1, min(out, into * kernel**2)))
    residual, A, B = split_principal(weight, rank)
    assert A.shape == (1, rank, into * kernel**2) and B.shape == (1, out, rank)
    assert torch.allclose(residual + (B @ A).reshape(weight.shape), weight, atol=1e-6)
    values = torch.linalg.svdvals(weight.reshape(out, -1))
    rest = torch.linalg.svdvals(residual.reshape(out, -1))[: len(values) - rank]
    assert torch.allclose(rest, values[rank:], atol=1e-5)
    with pytest.raises(ValueError, match="rank"):
        split_principal(weight, min(out, into * kernel**2) + 1)


def test_a_pool_may_adapt_convolutions(network, episode):
    conv = principal_pool(network.weights, 2, LEVELS[:1], layers=("patch_embed.proj", "mlp.fc1"))
    assert "patch_embed.proj.weight" in conv.A
    for name, weight in conv.merge([1.0]).items():
        assert torch.allclose(weight, network.weights[name], atol=1e-5)


def test_trimming_with_all_kept_is_the_identity(pool):
    weights = pool.merge([0.5, 0.25, 0.25])
    for name, weight in trim_singular_values(weights, [Trim("qkv", -1, 1.0), Trim("fc2", 0, 1.0)]).items():
        assert torch.allclose(weight, weights[name], atol=1e-5)


@few
@given(
    layer=st.sampled_from(["qkv", "proj", "fc1", "fc2", "attn.qkv"]),
    block=st.integers(-1, 1),
    keep=st.floats(0.05, 1.0),
)
def test_trimming_leaves_the_rank_asked_for(pool, layer, block, keep):
    """Of the selected layers; every other weight is the very same tensor."""
    weights = pool.merge([0.5, 0.25, 0.25])
    trimmed = trim_singular_values(weights, [Trim(layer, block, keep)])
    changed = 0
    for name, weight in trimmed.items():
        if name.startswith(f"blocks.{block if block >= 0 else ''}") and name.endswith(f"{layer}.weight"):
            values = torch.linalg.svdvals(weight)
            assert int((values > 1e-5 * torch.linalg.svdvals(weights[name])[0]).sum()) == int(ARCH.dim * keep)
            changed += 1
        else:
            assert weight is weights[name]
    assert changed == (ARCH.depth if block == -1 else 1)
