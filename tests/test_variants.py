"""Variants of the training recipe by their laws: features in place of labels, epsilons drawn anew."""

import dataclasses
import json
import signal

import pytest
import torch
from commands import about, same_tensors
from conftest import moved_apart
from safetensors.torch import load_file, save_file
from toy_pools import (
    RANK,
    assert_goes_on_exactly,
    assert_identical,
    make_episode,
    make_network,
    quick,
    tensors,
    trainable,
)
from toy_training import command, signal_after

from amt.attacks.levels import Perturbation
from amt.cli import options
from amt.models.network import Network, features
from amt.models.pool import Pool, pretrained_pool, principal_pool
from amt.training import attack, meta_tune
from amt.training.meta_tune import feature_outcome, started
from amt.training.tuner import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")

ALONG = Perturbation(8, 2, steps=2, gamma=0.01, grids=(0,), scalars=(1.0,), start="random1")
NOWHERE = dataclasses.replace(ALONG, epsilon=0.0, step_size=0.0)


def start_of(network: Network, tune: str, *levels: Perturbation) -> Pool:
    if tune == "full":
        return pretrained_pool(network.weights, levels)
    return principal_pool(network.weights, RANK, levels, norms=tune == "lora+norm")


def outcome_of(network: Network, pool: Pool, episode, moves: bool = False):
    start = started(pool.levels, episode.query, [torch.Generator().manual_seed(p) for p in range(len(pool))])
    return feature_outcome(network, pool, episode, start, moves=moves)


def trained(network: Network, pool: Pool, episodes=(0, 1), **settings) -> Tuner:
    tuner = Tuner(network, pool, quick(**settings))
    for k in episodes:
        tuner.step(make_episode(k))
    return tuner


# Nothing moves


@pytest.mark.parametrize("tune", ["lora", "lora+norm", "full"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"head": "ridge"},
        {"loss": "features", "head": "lda"},
        {"loss": "features", "method": "querying"},
        {"epsilon_from": 0.0},
    ],
)
def test_at_zero_learning_rate_nothing_moves(network, tune, variant):
    pool = moved_apart(start_of(network, tune, ALONG, NOWHERE))
    found = trained(network, pool, lr=0.0, warmup_lr=0.0, min_lr=0.0, **variant)
    assert_identical(tensors(found.pool), tensors(pool))


# Features


@pytest.mark.parametrize("tune", ["lora", "lora+norm", "full"])
def test_features_at_epsilon_zero_are_no_loss_at_the_start(network, episode, tune):
    """Up to the rounding of the singular value decomposition; the same pool has one at epsilon 8."""
    pool = trainable(start_of(network, tune, NOWHERE, ALONG))
    loss = outcome_of(network, pool, episode).loss
    length = features(network, network.weights, episode.query).square().sum(1).mean()
    assert loss.total[0] <= 1e-9 * length and loss.natural.max() <= 1e-9 * length
    assert loss.total[1] > 1e-3 * length and torch.equal(loss.total, loss.robust)


def test_the_loss_is_the_distance_from_the_pretrained_features(network, episode, monkeypatch):
    """Of the attacked queries, which lie within epsilon, where it is larger than at their start."""
    seen = []
    ascend = attack.ascend

    def watched(loss_of, images, points, geometry, steps, **keywords):
        seen.append(
            (geometry.apply(points, images), images, ascend(loss_of, images, points, geometry, steps))
        )
        return seen[0][-1]

    monkeypatch.setattr(attack, "ascend", watched)
    pool = trainable(moved_apart(start_of(network, "lora", ALONG)))
    outcome = outcome_of(network, pool, episode)
    begun, clean, images = seen[0]
    assert (images - clean).abs().max() <= 8 / 255 + 1e-6

    def distance(moved):
        away = features(network, pool[0].merge((1.0,)), moved) - features(
            network, network.weights, episode.query
        )
        return away.square().sum(1).mean()

    with torch.no_grad():
        assert outcome.loss.total.item() == pytest.approx(distance(images).item(), rel=1e-4)
        assert outcome.loss.natural.item() == pytest.approx(distance(episode.query).item(), rel=1e-4)
    assert distance(images) > distance(begun)


def test_labels_teach_nothing(network, episode):
    """Queries that change their labels leave every gradient as it is; accuracies are another matter."""
    turned = dataclasses.replace(episode, query_labels=episode.query_labels.roll(1))
    gradients = []
    for each in (episode, turned):
        pool = trainable(moved_apart(start_of(network, "lora", ALONG)))
        outcome_of(network, pool, each, moves=True).loss.total.sum().backward()
        gradients.append({name: factor.grad for name, factor in pool.factors.items()})
        assert pool.scale.grad is None and all(g.abs().sum() > 0 for g in gradients[-1].values())
    assert_identical(*gradients)


def test_weights_move_uphill_with_adsv_alone(network, episode):
    pool = trainable(moved_apart(start_of(network, "lora", ALONG)))
    still, moved = (outcome_of(network, pool, episode, moves).loss.total for moves in (False, True))
    assert moved > still
    flat = dataclasses.replace(pool, levels=(dataclasses.replace(ALONG, gamma=0.0),))
    assert torch.equal(outcome_of(network, flat, episode, moves=True).loss.total, still)
    records = [
        Tuner(network, pool, quick(loss="features", method=method)).step(episode)[0].total
        for method in ("adsv", "querying")
    ]
    assert records[0] > records[1]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_training_brings_attacked_features_home(network, tune):
    """On the episode that it is trained on; levels that train together are those that train alone."""
    pool = start_of(network, tune, ALONG, dataclasses.replace(ALONG, epsilon=4.0, step_size=1.0))
    settings = quick(loss="features", method="querying", clip_grad=1.0, epochs=20)
    together, alone = Tuner(network, pool, settings), Tuner(network, pool, settings, at_once=1)
    first = together.step(make_episode(0))
    alone.step(make_episode(0))
    for name, factor in tensors(together.pool).items():
        torch.testing.assert_close(factor, tensors(alone.pool)[name], rtol=1e-4, atol=1e-6)
    for _ in range(16):
        last = together.step(make_episode(0))
    assert all(after.total < 0.8 * before.total for before, after in zip(first, last, strict=True))
    assert together.collapsed() == {}


# Epsilons drawn anew


def test_epsilons_are_drawn_between_two(network, monkeypatch):
    """Anew for every episode and level, the same for the same seed; 0 stays, and so does the warm-up."""
    seen = []
    outcome = meta_tune.query_outcome

    def watched(network, pool, *given):
        seen.append([(level.epsilon, level.step_size) for level in pool.levels])
        return outcome(network, pool, *given)

    monkeypatch.setitem(meta_tune.OUTCOMES, "adsv", watched)
    levels = (ALONG, dataclasses.replace(ALONG, epsilon=6.0, step_size=3.0), NOWHERE)
    pool = start_of(network, "lora", *levels)
    trained(network, pool, range(8), epsilon_from=2.0)
    first, second, zero = zip(*seen, strict=True)
    for drawn, level in ((first, ALONG), (second, levels[1])):
        assert len(set(drawn)) == 8 and all(2 <= epsilon <= level.epsilon for epsilon, _ in drawn)
        ratio = level.step_size / level.epsilon
        assert all(step == pytest.approx(ratio * epsilon) for epsilon, step in drawn)
    assert set(zero) == {(0.0, 0.0)} and first[0][0] / 8 != second[0][0] / 6
    once = [row[:2] for row in seen]
    seen.clear()
    trained(network, pool[0], range(8), epsilon_from=2.0, epsilon_warmup=2)
    assert seen[0][0][0] == once[0][0][0] / 2 and [row[0] for row in seen[1:]] == [row[0] for row in once[1:]]


def test_a_level_may_be_drawn_up_to_its_own_epsilon():
    assert ALONG.between(2.0, 0.0).epsilon == 2.0 and ALONG.between(2.0, 1.0) == ALONG
    assert NOWHERE.between(0.0, 0.3) == NOWHERE


@pytest.mark.parametrize("variant", [{"epsilon_from": 0.0}, {"loss": "features"}])
def test_a_resumed_variant_equals_an_uninterrupted_one(pool, tmp_path, variant):
    assert_goes_on_exactly(make_network(), pool, quick(**variant), tmp_path)


# The command


def settings_of(*flags: str):
    words = ["--data_path", "d", "--base_sources", "a", "--output_dir", "out", "--arch", "vit_mini_amt"]
    args = options.training_parser().parse([*words, *flags])
    options.check_training(args)
    return options.tune_settings(args), options.levels(args)


def test_the_features_are_attacked_as_their_authors_do_unless_told_otherwise():
    settings, (level,) = settings_of("--loss", "features")
    assert (settings.method, settings.loss, level.epsilon) == ("querying", "features", 8)
    assert (level.grids, level.start, level.gamma) == ((0,), "random1", 0)
    settings, levels = settings_of("--loss", "features", "--pgd_method", "adsv")
    assert (settings.method, len(levels), levels[0].gamma) == ("adsv", 4, 0.005)
    assert settings_of("--loss", "features", "--tune", "full")[0].method == "querying"
    assert settings_of()[0].loss is None and settings_of()[0].epsilon_from is None


@pytest.mark.parametrize("flags", [("--loss", "features"), ("--epsilon_from", 0)])
def test_a_stopped_run_of_a_variant_ends_with_the_same_bits(world, tmp_path, flags):
    short = ("--epochs", 1, "--nEpisode", 2, "--nValEpisode", 1, "--attack_iters", 1, *flags)
    for out, stops in (("whole", False), ("parts", True)):
        words = world.train(tmp_path / out, *short)
        with pytest.MonkeyPatch.context() as patch:
            if stops:
                signal_after(patch, 1, signal.SIGTERM)
                assert command("main", *words).code == 143
        assert command("main", *words).code == 0
    assert same_tensors(tmp_path / "whole" / "last.safetensors", tmp_path / "parts" / "last.safetensors")
    assert same_tensors(tmp_path / "whole" / "best.safetensors", tmp_path / "parts" / "best.safetensors")


def test_a_run_by_features_goes_on_with_the_features_it_began_with(world, tmp_path):
    """Those of the pretrained network, which another file of weights would change."""
    words = world.train(tmp_path / "run", "--loss", "features", "--nValEpisode", 0, "--attack_iters", 1)
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 1, signal.SIGTERM)
        assert command("main", *words).code == 143
    last = tmp_path / "run" / "last.safetensors"
    others = {name: tensor + 0.1 for name, tensor in load_file(world.weights).items()}
    save_file(others, tmp_path / "others.safetensors")
    ended = command("main", *words, "--pretrained_checkpoint", tmp_path / "others.safetensors")
    assert (
        ended.code == 2 and f"features_of {json.dumps(about(last)['protocol']['features_of'])}" in ended.err
    )
    assert command("main", *words).code == 0
