"""Laws of attacks and routing on a small random vision transformer: balls, starts, what they see and cost."""

import copy
import dataclasses
import functools
import inspect

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from toy_pools import LEVELS, assert_identical, few, make_episode, quick, tensors

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.attacks.perturb import Ball, ascend, pgd
from amt.evaluation.evaluate import evaluate
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features
from amt.models.trim import Trim
from amt.tasks.classifier import merged_predictor
from amt.tasks.merge import blend, route
from amt.tasks.settings import Routing
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode


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
    attacked, *_ = pgd(
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
    attacked, fooled, _ = pgd(
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
    assert sum(call.n for call in training) == sum(level.steps for level in LEVELS) * len(episode.query)
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
