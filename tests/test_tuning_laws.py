"""Laws of meta-tuning: mixed precision, determinism, resuming, rates, losses that are no numbers."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_pools import (
    LEVELS,
    RANK,
    assert_goes_on_exactly,
    assert_identical,
    few,
    make_episode,
    make_network,
    outcome_of,
    quick,
    tensors,
    trainable,
)

from amt.attacks.levels import Perturbation
from amt.attacks.perturb import ascend
from amt.models.network import Network
from amt.models.pool import Pool, principal_pool
from amt.training import attack
from amt.training.optimiser import NonFiniteLoss
from amt.training.records import NO_STEPS, StepRecord
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner, learning_rate

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

    monkeypatch.setattr(attack, "ascend", watched)
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


def trained(network: Network, pool: Pool, settings: TuneSettings, episodes: int) -> Tuner:
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
    plan = quick(epsilon_warmup=3, clip_grad=1.0)
    assert_goes_on_exactly(make_network(autocast=dtype), pool, plan, tmp_path, done, total=5)


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
    overflowed = StepRecord(math.nan, math.inf, 0.2, 0.2, 0.2, 0.01, 5, 0.1)
    assert learning.plus(overflowed) == learning


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
