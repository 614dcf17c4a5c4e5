"""Laws of weights, attacks, routing, training and checkpoints, on small random vision transformers."""

import copy
import dataclasses
import functools
import inspect
import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.attacks.perturb import Ball, ascend, pgd
from amt.evaluation.evaluate import evaluate
from amt.files import checkpoint as checkpoints
from amt.files.checkpoint import Checkpoint
from amt.models.architectures import Arch
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features
from amt.models.pool import LoRAPool, principal_pool, split_principal
from amt.models.trim import Trim
from amt.models.weights import trim_singular_values
from amt.tasks.classifier import merged_predictor
from amt.tasks.merge import blend, route
from amt.tasks.settings import Routing
from amt.training import meta_tune
from amt.training.meta_tune import NO_STEPS, StepRecord, Tuner, learning_rate, query_outcome
from amt.training.optimiser import NonFiniteLoss
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

few = settings(max_examples=20, deadline=None)

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=16, mlp_ratio=2.0)
RANK = 3
LEVELS = (
    Perturbation(8, 2, steps=2, gamma=0.01, grids=(2, 4, 0)),
    Perturbation(6, 1.5, steps=2, gamma=0.005, grids=(2, 4, 0), start="random1"),
    Perturbation(0.1, 0.025, steps=2, gamma=0.0, grids=(2, 4, 0)),
)


make_network = functools.partial(random_backbone, ARCH)
make_episode = functools.partial(patterned_episode, side=16)


@pytest.fixture(scope="module")
def network() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def untrained(network) -> LoRAPool:
    return principal_pool(network.weights, RANK, LEVELS)


@pytest.fixture(scope="module")
def pool(untrained) -> LoRAPool:
    return moved_apart(untrained)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return make_episode(0)


@pytest.fixture
def calls(network):
    """What every forward of the network was given, in order."""
    seen = []

    def look(network, args):
        (images,) = args
        weights = list(network.parameters())
        seen.append(
            Call(
                n=len(images),
                input_gradient=images.requires_grad,
                weight_gradient=any(w.requires_grad for w in weights),
                graph=torch.is_grad_enabled(),
                training=any(module.training for module in network.modules()),
            )
        )

    handle = network.module.register_forward_pre_hook(look)
    yield seen
    handle.remove()


@dataclasses.dataclass(frozen=True)
class Call:
    n: int
    input_gradient: bool
    weight_gradient: bool
    graph: bool
    training: bool


def tensors(pool: LoRAPool) -> dict[str, Tensor]:
    return pool.factors | {"scale": pool.scale, "bias": pool.bias}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def trainable(pool: LoRAPool) -> LoRAPool:
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in pool.factors.items()}
    return dataclasses.replace(pool.with_factors(factors), scale=pool.scale.clone().requires_grad_())


def quick(**changes) -> TuneSettings:
    return TuneSettings(**{"epochs": 4, "episodes_per_epoch": 2, "lr": 0.05, "warmup_epochs": 0} | changes)


def outcome_of(network: Network, pool: LoRAPool, episode: Episode, level: Perturbation, **keywords):
    start = level.pyramid.start(episode.query, torch.Generator().manual_seed(3))
    return query_outcome(network, pool, episode, level, start, **keywords)


# The pool


@few
@given(st.lists(st.floats(-2, 2), min_size=len(LEVELS) - 1, max_size=len(LEVELS) - 1))
def test_an_untrained_pool_is_the_pretrained_network(network, untrained, episode, free):
    """For any coefficients that sum to 1."""
    weights = untrained.merge([*free, 1 - sum(free)])
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
def test_merge_refuses_other_sums_and_counts(pool, coefficients):
    with pytest.raises(ValueError, match="coefficients"):
        pool.merge(coefficients)


def test_a_one_hot_merge_is_that_adapter_exactly(pool):
    for p in range(len(pool)):
        one_hot = [float(q == p) for q in range(len(pool))]
        alone = pool[p].merge([1.0])
        assert_identical(pool.merge(one_hot), alone)
        assert torch.equal(pool.head(one_hot)[0], pool[p].head([1.0])[0])
    assert not torch.equal(
        pool[0].merge([1.0])["blocks.0.attn.qkv.weight"], alone["blocks.0.attn.qkv.weight"]
    )


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


def test_concat_and_indexing_are_inverse(pool):
    again = LoRAPool.concat([pool[p] for p in range(len(pool))])
    assert_identical(tensors(again), tensors(pool))
    assert again.levels == pool.levels
    for p in range(len(pool)):
        assert_identical(tensors(again[p]), tensors(pool[p]))
        assert again[p].levels == (pool.levels[p],)
    for out_of_range in (-1, len(pool)):
        with pytest.raises(IndexError):
            pool[out_of_range]


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
        LoRAPool.concat([pool, other])


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


# Attacks


def classifier(network: Network, weights: dict[str, Tensor], episode: Episode):
    with torch.no_grad():
        centres = prototypes(features(network, weights, episode.support), episode.support_labels)
    return lambda images: cosine_logits(features(network, weights, images), centres, 10.0)


def climb(logits_of, labels: Tensor):
    return lambda images: torch.nn.functional.cross_entropy(logits_of(images), labels, reduction="sum")


@pytest.mark.parametrize("start", ["zero", "random1", "random2"])
def test_epsilon_zero_is_the_clean_image(network, pool, episode, start):
    logits_of = classifier(network, pool.merge([1.0, 0.0, 0.0]), episode)
    level = Perturbation(0, 0, steps=2, grids=(2, 4, 0), start=start)
    deltas = level.pyramid.start(episode.query, torch.Generator().manual_seed(0))
    loss_of = climb(logits_of, episode.query_labels)
    attacked = ascend(loss_of, episode.query, deltas, level.pyramid, level.steps)
    assert torch.equal(attacked, episode.query)
    attacked, _ = pgd(
        logits_of,
        episode.query,
        episode.query_labels,
        Ball("linf", 0, 2 / 255),
        steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(attacked, episode.query)


def test_where_attacks_start():
    """The same at every grid: nowhere, anywhere within epsilon, or close by."""
    images = torch.zeros(64, 3, 16, 16)
    for start in ("zero", "random1", "random2"):
        level = Perturbation(51, 2, grids=(2, 4, 0), start=start)
        deltas = level.pyramid.start(images, torch.Generator().manual_seed(0))
        assert [delta.shape for delta in deltas] == [(64, 3, 2, 2), (64, 3, 4, 4), (64, 3, 16, 16)]
        for delta in deltas:
            spread = {"zero": 0, "random1": 0.2 / 3**0.5, "random2": 0.001}[start]
            assert float(delta.std()) == pytest.approx(spread, rel=0.05)
            assert start != "random1" or 0.19 < float(delta.abs().max()) <= 0.2
        again = level.pyramid.start(images, torch.Generator().manual_seed(0))
        assert all(torch.equal(one, other) for one, other in zip(deltas, again, strict=True))


def in_ball(attacked: Tensor, images: Tensor, epsilon: float) -> bool:
    inside = bool(((attacked >= 0) & (attacked <= 1)).all())
    return inside and float((attacked - images).abs().max()) <= epsilon / 255 + 2e-7


@few
@given(epsilon=st.floats(0, 40), share=st.floats(0.05, 2), steps=st.integers(0, 3), seed=st.integers(0, 9))
def test_pgd_stays_in_the_ball_and_in_range(network, pool, epsilon, share, steps, seed):
    episode = make_episode(seed)
    logits_of = classifier(network, pool.merge([1.0, 0.0, 0.0]), episode)
    clean = episode.query.clone()
    attacked, fooled = pgd(
        logits_of,
        episode.query,
        episode.query_labels,
        Ball("linf", epsilon / 255, share * epsilon / 255),
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(episode.query, clean)
    assert in_ball(attacked, clean, epsilon)
    with torch.no_grad():
        assert torch.equal(fooled, logits_of(attacked).argmax(1) != episode.query_labels)


@few
@given(
    epsilon=st.floats(0, 40),
    share=st.floats(0.05, 2),
    steps=st.integers(1, 3),
    start=st.sampled_from(["zero", "random1", "random2"]),
    seed=st.integers(0, 9),
)
def test_the_fine_level_alone_stays_in_the_ball(network, pool, epsilon, share, steps, start, seed):
    """So epsilon means the same to both attacks."""
    episode = make_episode(seed)
    level = Perturbation(epsilon, share * epsilon, steps=steps, grids=(0,), scalars=(1.0,), start=start)
    logits_of = classifier(network, pool.merge([1.0, 0.0, 0.0]), episode)
    deltas = level.pyramid.start(episode.query, torch.Generator().manual_seed(seed))
    loss_of = climb(logits_of, episode.query_labels)
    attacked = ascend(loss_of, episode.query, deltas, level.pyramid, level.steps)
    assert in_ball(attacked, episode.query, epsilon)
    whole = dataclasses.replace(level, grids=(2, 4, 0), scalars=(20.0, 10.0, 1.0))
    deltas = whole.pyramid.start(episode.query, torch.Generator().manual_seed(seed))
    attacked = ascend(loss_of, episode.query, deltas, whole.pyramid, whole.steps)
    assert in_ball(attacked, episode.query, 255)


def test_attacks_raise_the_loss(network, pool, episode):
    logits_of = classifier(network, pool.merge([1.0, 0.0, 0.0]), episode)
    loss_of = climb(logits_of, episode.query_labels)
    level = Perturbation(8, 2, steps=4, grids=(0,), scalars=(1.0,), start="zero")
    deltas = level.pyramid.start(episode.query, torch.Generator())
    attacked = ascend(loss_of, episode.query, deltas, level.pyramid, level.steps)
    assert loss_of(attacked) > loss_of(episode.query) + 0.1


def test_attacks_see_no_parameter_gradient_and_run_in_eval_mode(network, pool, episode, calls):
    """In training, in routing and in evaluation."""
    tuner = Tuner(network, pool, quick())
    tuner.step(episode)
    training = [call for call in calls if call.input_gradient]
    assert len(training) == sum(level.steps for level in LEVELS)
    routing = Routing(epsilon=8)
    choose = functools.partial(route, network, pool, routing=routing)
    list(evaluate(merged_predictor(network, pool, choose), [episode], [Attack("pgd", (8,), steps=3)]))
    attacks = [call for call in calls if call.input_gradient]
    assert len(attacks) > len(training)
    assert not any(call.weight_gradient for call in attacks)
    assert not any(call.training for call in calls)
    assert not any(call.weight_gradient for call in calls[len(calls) - len(attacks) + len(training) :])


# What is never touched


def test_the_backbone_stays_as_it_is(network, pool, episode):
    """Through training, attacks, routing and evaluation, to the bit."""
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    residual = {name: tensor.clone() for name, tensor in pool.residual.items()}
    tuner = Tuner(network, pool, quick())
    for k in range(2):
        tuner.step(make_episode(k))
    for epsilon in (0, 8):
        choose = functools.partial(route, network, pool, routing=Routing(epsilon=epsilon))
        predict = merged_predictor(network, pool, choose, [Trim("qkv", -1, 0.5)])
        list(evaluate(predict, [episode], [Attack("pgd", (8,), steps=2)]))
    assert_identical(network.module.state_dict(), before)
    assert_identical(pool.residual, residual)
    assert_identical(tuner.pool.residual, residual)
    assert all(p.grad is None and not p.requires_grad for p in network.module.parameters())


def test_the_tuner_gives_out_copies(network, pool, episode):
    """Neither the pool it was given nor one it gave out changes with its next step."""
    given_pool = {name: tensor.clone() for name, tensor in tensors(pool).items()}
    tuner = Tuner(network, pool[0], quick())
    tuner.step(episode)
    handed = tuner.pool
    kept = {name: tensor.clone() for name, tensor in tensors(handed).items()}
    tuner.step(episode)
    assert_identical(tensors(handed), kept)
    assert_identical(tensors(pool), given_pool)
    assert not torch.equal(tuner.pool.scale, handed.scale)


# Routing


def test_routing_is_shown_the_support_only(network, pool, episode):
    assert list(inspect.signature(route).parameters) == [
        "network",
        "pool",
        "support",
        "labels",
        "generator",
        "routing",
        "members",
    ]
    choose = functools.partial(route, network, pool, routing=Routing())
    predict = merged_predictor(network, pool, choose)
    other = make_episode(5)
    swapped = dataclasses.replace(
        episode, query=other.query, query_labels=1 - other.query_labels.clamp(max=1)
    )
    assert predict(episode).coefficients == predict(swapped).coefficients


@few
@example(scores=[(0.0, 0.0)] * 4, beta=0.0, gamma=0.0, top_k=1)
@given(
    scores=st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=6),
    beta=st.floats(0, 200),
    gamma=st.floats(0, 1),
    top_k=st.integers(1, 7),
)
def test_coefficients_are_shares_of_at_most_top_k(scores, beta, gamma, top_k):
    """Whatever the scores and however sharp: never negative, of sum 1, for the best adapters."""
    intra, inter = torch.tensor(scores).T
    found = blend(intra, inter, Routing(beta=beta, gamma=gamma, top_k=top_k))
    assert len(found) == len(scores)
    assert all(share >= 0 for share in found)
    assert sum(found) == pytest.approx(1, abs=1e-6)
    assert 1 <= sum(share > 0 for share in found) <= top_k
    best = int((gamma * intra - (1 - gamma) * inter).argmax())
    assert found[best] >= 0.999 * max(found)  # scores that differ by rounding may change places


@pytest.mark.parametrize("epsilon", [0, 8])
def test_routing_is_a_function_of_its_generator(network, pool, episode, epsilon):
    def routed(seed: int) -> tuple[float, ...]:
        return route(
            network,
            pool,
            episode.support,
            episode.support_labels,
            torch.Generator().manual_seed(seed),
            Routing(epsilon=epsilon, beta=5),
        )

    torch.manual_seed(0)
    first = routed(1)
    torch.manual_seed(1)
    assert routed(1) == first
    assert any(routed(seed) != first for seed in range(2, 6))
    assert sum(first) == pytest.approx(1) and min(first) >= 0 and sum(c > 0 for c in first) <= 2


# Cost


@pytest.mark.parametrize("gamma, rest", [(0.01, 4), (0.0, 2)])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_training_step_costs(network, pool, calls, monkeypatch, gamma, rest, steps):
    """One support forward, K + 4 query forwards (K + 2 without weight perturbation), K input gradients."""
    episode = make_episode(0, shots=3, queries=2)
    n_support, n_query = len(episode.support), len(episode.query)
    gradients = []
    autograd = torch.autograd.grad

    def counted(outputs, inputs, *args, **keywords):
        gradients.append([tensor.shape for tensor in inputs])
        return autograd(outputs, inputs, *args, **keywords)

    backwards = []
    backward = Tensor.backward

    def counted_backward(tensor, *args, **keywords):
        backwards.append(tensor.shape)
        return backward(tensor, *args, **keywords)

    def refuse(*args, **keywords):
        raise AssertionError("something was deep-copied")

    level = Perturbation(8, 2, steps=steps, gamma=gamma, grids=(2, 0), scalars=(20.0, 1.0))
    single = dataclasses.replace(pool[0], levels=(level,))
    tuner = Tuner(network, single, quick())
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        patch.setattr(Tensor, "backward", counted_backward)
        patch.setattr(copy, "deepcopy", refuse)
        tuner.step(episode)
    support = [call for call in calls if call.n == n_support]
    query = [call for call in calls if call.n != n_support]
    assert n_support not in (n_query, 2 * n_query)
    assert len(support) == 1
    assert sum(call.n for call in query) == (steps + rest) * n_query
    assert sum(call.input_gradient for call in query) == steps
    factors = [factor.shape for factor in single.factors.values()]
    weight_gradients = [shapes for shapes in gradients if shapes == factors]
    assert len(weight_gradients) == (1 if gamma else 0)
    assert len(gradients) - len(weight_gradients) == steps
    assert all(shapes[0][0] == n_query for shapes in gradients if shapes != factors)
    assert len(backwards) == 1


def test_routing_and_evaluation_copy_nothing(network, pool, episode, monkeypatch):
    def refuse(*args, **keywords):
        raise AssertionError("something was deep-copied")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    choose = functools.partial(route, network, pool, routing=Routing())
    assert list(evaluate(merged_predictor(network, pool, choose), [episode], [Attack("pgd", (8,), steps=1)]))


# Mixed precision


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_mixed_precision_agrees_with_float32(pool, episode, dtype, tolerance):
    """Losses from the same attacked images, within the rounding of 8 or 11 bits through the network."""
    level = dataclasses.replace(LEVELS[0], steps=0)
    expected = outcome_of(make_network(), trainable(pool[0]), episode, level).loss
    found = outcome_of(make_network(autocast=dtype), trainable(pool[0]), episode, level).loss
    assert found.total.dtype == torch.float32
    assert float(found.natural.detach()) == pytest.approx(float(expected.natural.detach()), rel=tolerance)
    attacked = outcome_of(make_network(), trainable(pool[0]), episode, LEVELS[0]).loss
    half = outcome_of(make_network(autocast=dtype), trainable(pool[0]), episode, LEVELS[0], loss_scale=256.0)
    assert float(half.loss.total.detach()) == pytest.approx(float(attacked.total.detach()), rel=5 * tolerance)


@pytest.mark.parametrize("loss_scale, moves", [(2.0**14, True), (1.0, False)])
def test_the_attack_moves_in_float16(pool, episode, monkeypatch, loss_scale, moves):
    """By the loss scale: float16 alone flushes the small gradients of a flat head to zero."""
    moved = []

    def watched(loss_of, images, *args, **keywords):
        attacked = ascend(loss_of, images, *args, **keywords)
        moved.append(float(((attacked - images).abs() > 0.9 / 255).float().mean()))
        return attacked

    monkeypatch.setattr(meta_tune, "ascend", watched)
    level = Perturbation(4, 2, steps=1, grids=(0,), scalars=(1.0,), start="random2")
    flat = trainable(dataclasses.replace(pool[0], scale=torch.full((1,), 0.01)))
    half = make_network(autocast=torch.float16)
    outcome_of(half, flat, episode, level, loss_scale=loss_scale)
    assert (moved[0] > 0.5) is moves, moved


def test_training_in_float16_takes_steps(pool, episode):
    """Overflow at a large loss scale skips a step; after a few the factors move and stay finite."""
    tuner = Tuner(make_network(autocast=torch.float16), pool[0], quick())
    for _ in range(8):
        tuner.step(episode)
    after = tuner.pool
    assert all(torch.isfinite(tensor).all() for tensor in tensors(after).values())
    assert any(not torch.equal(after.factors[name], pool[0].factors[name]) for name in after.factors)


# Training


def trained(network: Network, pool: LoRAPool, settings: TuneSettings, episodes: int) -> Tuner:
    tuner = Tuner(network, pool, settings)
    for k in range(episodes):
        tuner.step(make_episode(k))
    return tuner


def test_training_is_deterministic(network, pool):
    torch.manual_seed(0)
    first = trained(network, pool, quick(), 3)
    torch.manual_seed(1)
    assert_identical(tensors(trained(network, pool, quick(), 3).pool), tensors(first.pool))
    other = trained(network, pool, quick(seed=1), 3)
    assert any(
        not torch.equal(tensor, other.pool.factors[name]) for name, tensor in first.pool.factors.items()
    )


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "float16"])
def test_a_resumed_run_equals_an_uninterrupted_one(pool, tmp_path, done, dtype):
    """Through the disk, to the bit, momentum and loss scale included."""
    network, total = make_network(autocast=dtype), 5
    plan = quick(epsilon_warmup=3, clip_grad=1.0)
    whole = trained(network, pool, plan, total)
    first = trained(network, pool, plan, done)
    momentum, numbers = first.state()
    path = tmp_path / "run.safetensors"
    checkpoints.save(path, Checkpoint(first.pool, {"tuner": numbers}, momentum))
    found = checkpoints.load(path)
    resumed = Tuner(network, found.pool, plan)
    resumed.restore(found.momentum, found.about["tuner"])
    assert resumed.episodes_done == done
    records = [resumed.step(make_episode(k)) for k in range(done, total)]
    assert_identical(tensors(resumed.pool), tensors(whole.pool))
    assert_identical(resumed.state()[0], whole.state()[0])
    assert resumed.state()[1] == whole.state()[1]
    assert len(records) == total - done


def test_a_loss_that_is_no_number_stops_the_run(network, pool, episode):
    """Before the factors of its level are touched."""
    tuner = Tuner(network, pool[0], quick())
    tuner.step(episode)
    before = {name: tensor.clone() for name, tensor in tensors(tuner.pool).items()}
    broken = dataclasses.replace(episode, query=episode.query * math.nan)
    with pytest.raises(NonFiniteLoss, match="episode 1, level 0"):
        tuner.step(broken)
    assert_identical(tensors(tuner.pool), before)
    assert tuner.episodes_done == 1


def test_collapse_is_noticed(network, episode):
    constant = make_network()
    constant.module.norm.weight.zero_()
    constant.module.norm.bias.fill_(1.0)
    level = dataclasses.replace(LEVELS[0], gamma=0.01)
    for tried, expected in ((constant, True), (network, False)):
        tuner = Tuner(tried, principal_pool(tried.weights, RANK, (level,)), quick(lr=1e-6))
        assert tuner.collapsed() == {}
        for _ in range(2):
            tuner.step(episode)
        assert bool(tuner.collapsed()) is expected
    assert not NO_STEPS.collapsed(robust=True)
    learning = NO_STEPS.plus(StepRecord(2.0, math.log(5), 0.2, 0.2, 0.2, 0.01, 5, 0.1))
    assert learning.collapsed(robust=True) is False
    assert learning.collapsed(robust=False) is True


@few
@given(
    epochs=st.integers(2, 100),
    warmup=st.integers(0, 8),
    lr=st.floats(1e-5, 1.0),
    floor=st.floats(0, 1e-6),
    data=st.data(),
)
def test_the_learning_rate_follows_its_formula(epochs, warmup, lr, floor, data):
    """Linear from the warm-up rate, then a cosine over all epochs, not over those that are left."""
    epoch = data.draw(st.integers(0, epochs - 1))
    plan = quick(epochs=epochs, warmup_epochs=warmup, lr=lr, warmup_lr=1e-6, min_lr=floor)
    if epoch < warmup:
        expected = 1e-6 + epoch * (lr - 1e-6) / warmup
    else:
        expected = floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * epoch / epochs))
    assert learning_rate(plan, epoch) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_each_step_uses_the_rate_of_its_epoch(network, pool):
    plan = quick(warmup_epochs=2, episodes_per_epoch=2)
    tuner = Tuner(network, pool[2], plan)
    rates = [tuner.step(make_episode(k))[0].lr for k in range(8)]
    assert rates == [learning_rate(plan, k // 2) for k in range(8)]
    assert tuner.finished


# Checkpoints


@pytest.fixture
def saved(tmp_path, pool):
    path = tmp_path / "pool.safetensors"
    checkpoints.save(path, Checkpoint(pool, {"arch": "tiny", "seed": 3}, {"0.scale": torch.ones(1)}))
    return path


def rewritten(path: Path, header=None, **changes: Tensor | None) -> None:
    """Write the file again with another header, or with tensors changed or (None) left out.

    The header is a text, all metadata as a dictionary, or a function of what was there.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        contents = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    contents = {name: tensor for name, tensor in (contents | changes).items() if tensor is not None}
    if callable(header):
        metadata = {"amt": json.dumps(header(json.loads(metadata["amt"])))}
    elif isinstance(header, str):
        metadata = {"amt": header}
    elif header is not None:
        metadata = header
    save_file(contents, path, metadata=metadata)


def test_a_checkpoint_gives_back_what_was_saved(saved, pool):
    found = checkpoints.load(saved)
    assert_identical(tensors(found.pool), tensors(pool))
    assert_identical(found.pool.residual, pool.residual)
    assert found.pool.levels == pool.levels
    assert found.about == {"arch": "tiny", "seed": 3}
    assert_identical(found.momentum, {"0.scale": torch.ones(1)})
    assert json.loads(saved.with_suffix(".json").read_text())["arch"] == "tiny"


def test_one_adapter_of_a_pool_can_be_saved(tmp_path, pool):
    path = tmp_path / "deep" / "er" / "one.safetensors"
    checkpoints.save(path, Checkpoint(pool[1], {}))
    assert_identical(tensors(checkpoints.load(path).pool), tensors(pool[1]))


def assert_one_line(path, *words: str) -> None:
    with pytest.raises(InputError) as raised:
        checkpoints.load(path)
    text = str(raised.value)
    assert str(path) in text and "\n" not in text
    for word in words:
        assert word in text


def test_a_missing_checkpoint_is_said_in_one_line(tmp_path):
    assert_one_line(tmp_path / "none.safetensors", "no such")
    assert_one_line(tmp_path, "is a folder, expected a regular file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n" * 20,
        b"\x00" * 64,
        b"\x80\x02}q.",
    ],
    ids=["empty", "one byte", "html", "zeros", "pickle"],
)
def test_a_file_of_another_kind_is_said_in_one_line(tmp_path, content):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    assert_one_line(path, "safetensors")


@few
@given(share=st.floats(0, 0.999))
def test_a_truncated_checkpoint_is_said_in_one_line(pool, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "pool.safetensors"
    checkpoints.save(path, Checkpoint(pool, {}))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_one_line(path, "safetensors")


def level_with(**changes):
    def change(about: dict) -> dict:
        return about | {"levels": [about["levels"][0] | changes, *about["levels"][1:]]}

    return change


@pytest.mark.parametrize(
    "header",
    [
        {"other": "{}"},
        "no json",
        "[]",
        "{}",
        lambda about: about | {"format": 99},
        lambda about: {key: value for key, value in about.items() if key != "levels"},
        lambda about: about | {"levels": 3},
        lambda about: about | {"levels": [1, 2, 3]},
        lambda about: about | {"levels": about["levels"][:2]},
        level_with(nonsense=1),
        level_with(epsilon="eight"),
        level_with(steps=None),
        level_with(grids=[4, "x", 0]),
    ],
    ids=[
        "other field",
        "no json",
        "list",
        "empty",
        "format",
        "no levels",
        "levels 3",
        "levels of numbers",
        "too few levels",
        "unknown setting",
        "epsilon in words",
        "no steps",
        "grids in words",
    ],
)
def test_a_wrong_header_is_said_in_one_line(saved, header):
    rewritten(saved, header)
    assert_one_line(saved)


QKV = "factors/blocks.0.attn.qkv.weight.lora_"


@pytest.mark.parametrize(
    "changes",
    [
        {QKV + "A": None},
        {QKV + "B": None},
        {QKV + "A": torch.ones(3, 3, RANK, ARCH.dim + 1)},
        {QKV + "A": torch.ones(3, 3, RANK + 1, ARCH.dim)},
        {QKV + "A": torch.ones(2, 3, RANK, ARCH.dim)},
        {QKV + "A": torch.ones(RANK, ARCH.dim)},
        {QKV + "B": torch.ones(3, 2, ARCH.dim, RANK)},
        {"residual/blocks.0.attn.qkv.weight": None},
        {"residual/blocks.0.attn.qkv.weight": torch.ones(5, 5)},
        {"residual/blocks.0.attn.qkv.weight": torch.tensor(1.0)},
        {"head/scale": None},
        {"head/scale": torch.ones(2)},
        {"head/bias": torch.ones(3, 1)},
        {"stray": torch.ones(1)},
        {"factors/blocks.9.attn.qkv.weight.lora_A": torch.ones(3, 3, RANK, ARCH.dim)},
    ],
    ids=lambda changes: ", ".join(
        f"{k}: {None if v is None else tuple(v.shape)}" for k, v in changes.items()
    ),
)
def test_tensors_that_form_no_pool_are_said_in_one_line(saved, changes):
    rewritten(saved, **changes)
    assert_one_line(saved)


@pytest.mark.parametrize("name", [QKV + "A", "residual/cls_token", "head/scale", "momentum/0.scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_said_in_one_line(saved, pool, name, value):
    room, _, rest = name.partition("/")
    tensor = {"head": pool.scale, "momentum": torch.ones(1)}.get(room)
    tensor = (pool.factors | pool.residual)[rest] if tensor is None else tensor
    broken = tensor.clone()
    broken.view(-1)[0] = value
    rewritten(saved, **{name: broken})
    assert_one_line(saved, name, "finite")


def disk_full_half_way(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def no_replacing(source, target) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "owner, name, broken", [(Path, "write_bytes", disk_full_half_way), (os, "replace", no_replacing)]
)
def test_a_failed_write_leaves_the_old_file(saved, pool, monkeypatch, owner, name, broken):
    """And nothing beside it."""
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(InputError, match="No space left"):
        checkpoints.save(saved, Checkpoint(moved_apart(pool, 9), {}))
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_place_that_cannot_hold_files_is_said_in_one_line(saved, pool):
    with pytest.raises(InputError, match="cannot be written"):
        checkpoints.save(saved / "below.safetensors", Checkpoint(pool, {}))
