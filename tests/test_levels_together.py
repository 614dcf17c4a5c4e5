"""All levels of an episode go through the network together: the result is that of one after the other, at a
fraction of the work for a device. Counted on a pretended one, see pretended_device.py."""

import dataclasses
import signal

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from pretended_device import Seen, on_device, pretended
from torch import Tensor
from toy_pools import LEVELS, RANK, make_episode, quick, tensors
from toy_training import command, signal_after

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation, together
from amt.attacks.perturb import Ball, Pyramid, ascend, pgd
from amt.evaluation.evaluate import measure
from amt.models.architectures import Arch
from amt.models.heads import cosine_logits
from amt.models.network import Network, level_features
from amt.models.pool import (
    Pool,
    adapted_layers,
    factor_groups,
    pretrained_pool,
    principal_pool,
)
from amt.tasks.classifier import merged_predictor
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from amt.training import meta_tune
from amt.training.meta_tune import started
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")

ALIKE = tuple(Perturbation(e, e / 4, steps=2, grids=(2, 4, 0)) for e in (8, 6, 0.1))


def pool_of(network: Network, tune: str, levels=ALIKE) -> Pool:
    if tune == "full":
        return moved_apart(pretrained_pool(network.weights, levels))
    return moved_apart(principal_pool(network.weights, RANK, levels))


def trained(network: Network, pool: Pool, settings: TuneSettings, at_once: int | None = None) -> Tuner:
    tuner = Tuner(network, pool, settings, at_once)
    for k in range(2):
        tuner.step(make_episode(k))
    return tuner


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal up to rounding."""
    return [
        name for name in expected if not torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    ]


# The same result


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    ("method", "head"), [("adsv", None), ("adsv", "lda"), ("querying", "ridge"), ("standard", "centred")]
)
def test_together_is_one_after_the_other(network, tune, method, head):
    """Members and momentum after two episodes; two levels that change places are told."""
    settings = quick(method=method, head=head, clip_grad=1.0, lr=1e-3, epsilon_warmup=3)
    pool = pool_of(network, tune)
    alone = trained(network, pool, settings, at_once=1)
    for at_once in (2, None):
        found = trained(network, pool, settings, at_once)
        assert differing(tensors(found.pool), tensors(alone.pool)) == []
        assert differing(found.state()[0], alone.state()[0]) == []
        assert found.state()[1]["scalers"] == alone.state()[1]["scalers"]
    swapped = Pool.concat([found.pool[p] for p in (1, 0, 2)])
    assert differing(tensors(swapped), tensors(alone.pool))


def test_a_level_sees_what_it_sees_in_any_company(network):
    """Its random start goes by its number in the pool; levels of other grids, steps or without a move of the
    weights train in passes of their own."""
    longer = dataclasses.replace(ALIKE[0], steps=3)
    coarse = dataclasses.replace(ALIKE[0], grids=(0,), scalars=(1.0,), start="random1")
    levels = (ALIKE[0], longer, coarse, LEVELS[2], ALIKE[1])
    assert together(levels, 9) == [(0, 4), (1,), (2,), (3,)]
    assert together(ALIKE * 2, 4) == [(0, 1, 2, 3), (4, 5)]
    settings, pool = quick(lr=1e-3), pool_of(network, "lora", levels)
    alone = trained(network, pool, settings, at_once=1)
    assert differing(tensors(trained(network, pool, settings).pool), tensors(alone.pool)) == []
    assert [record.total > 0 for record in alone.step(make_episode(7))] == [True] * 5


def test_a_run_goes_on_with_another_number_of_levels_at_once(network):
    settings, pool = quick(lr=1e-3), pool_of(network, "lora")
    first = trained(network, pool, settings, at_once=1)
    again = Tuner(network, first.pool, settings)
    again.restore(*first.state())
    first.step(make_episode(2))
    again.step(make_episode(2))
    assert differing(tensors(again.pool), tensors(first.pool)) == []


def test_main_trains_as_many_levels_at_once_as_it_is_told(world, tmp_path, monkeypatch):
    """Where memory is short; the same run may go on with another number."""
    passes = []
    seen = meta_tune.query_outcome
    monkeypatch.setitem(
        meta_tune.OUTCOMES, "adsv", lambda *given: (passes.append(len(given[1])), seen(*given))[1]
    )
    short = ("--epochs", 1, "--nEpisode", 2, "--nValEpisode", 0, "--statistics_episodes", 0)
    with monkeypatch.context() as patch:
        signal_after(patch, 1, signal.SIGTERM)
        assert command("main", *world.train(tmp_path, *short, "--levels_at_once", 1)).code == 143
    assert command("main", *world.train(tmp_path, *short)).code == 0
    assert passes == [1, 1, 2]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_features_of_levels_are_those_of_each_member(network, tune):
    """At the size of the position table and at another, where it is resized; any other network takes a pass
    for each level."""
    pool = pool_of(network, tune)
    passes = []
    for side in (16, 24):
        images = torch.rand(3, 4, 3, side, side, generator=torch.Generator().manual_seed(side))
        expected = [level_features(network, pool[p].stack(), images[p : p + 1])[0] for p in range(3)]
        handle = network.module.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
        found = level_features(network, pool.stack(), images)
        handle.remove()
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert passes == [12, 12]


def test_one_pyramid_for_all_levels_bounds_each_by_its_own(network):
    images = torch.full((6, 3, 8, 8), 0.5)
    levels = (Perturbation(8, 8, grids=(0,), scalars=(1.0,)), Perturbation(2, 2, grids=(0,), scalars=(1.0,)))
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    start = started(levels, images[:3], generators)
    assert [delta.shape for delta in start] == [(6, 3, 8, 8)]
    joined = Pyramid.joined([level.pyramid for level in levels], images)
    moved = ascend(lambda x: x.sum(), images, start, joined, 3) - 0.5
    for part, epsilon in zip(moved.chunk(2), (8, 2), strict=True):
        assert torch.allclose(part, torch.full_like(part, epsilon / 255), atol=1e-7)


# The work


# Half as deep as ViT-S/16: its blocks are alike, and no number of kernels depends on the width.
DEEP = Arch(patch_size=16, dim=96, depth=6, heads=6, pretrained_size=32, image_size=32)


def in_a_step(network: Network, pool: Pool, steps: int) -> Seen:
    """What a step of training with so many attack steps takes, once constants are on the device."""
    levels = tuple(dataclasses.replace(level, steps=steps) for level in pool.levels)
    tuner = Tuner(on_device(network), on_device(dataclasses.replace(pool, levels=levels)), quick())
    episode = on_device(patterned_episode(0, n_way=2, shots=1, queries=1, side=network.image_size))
    with pretended() as seen:
        tuner.step(episode)
        first = dataclasses.replace(seen)
        tuner.step(episode)
    return Seen(*(both - one for both, one in zip(vars(seen).values(), vars(first).values(), strict=True)))


def small_loras(network: Network, levels) -> Pool:
    """LoRAs of rank 1 without a singular value decomposition."""
    A, B = {}, {}
    for name in adapted_layers(network.weights):
        (out, inside), groups = network.weights[name].shape, factor_groups(name)
        A[name] = torch.full((len(levels), groups, 1, inside), 0.01)
        B[name] = torch.full((len(levels), groups, out // groups, 1), 0.01)
    scale = torch.full((len(levels),), 10.0)
    return Pool(network.weights, A, B, scale, 0 * scale, levels)


def test_an_attack_step_of_four_levels_takes_a_third_of_the_kernels():
    network = random_backbone(DEEP, scale=0.02)
    levels = tuple(Perturbation(e, e / 4) for e in (8, 6, 0.1, 0.01))

    def of_an_attack_step(pool: Pool) -> int:
        more, fewer = (in_a_step(network, pool, steps).kernels for steps in (2, 1))
        return more - fewer

    four, one = (of_an_attack_step(small_loras(network, some)) for some in (levels, levels[:1]))
    assert 200 < four <= 0.35 * 4 * one, (four, one)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("levels", [1, 3])
def test_an_episode_waits_for_the_device_a_few_times_only(network, tune, levels):
    """Whatever the number of attack steps: once for all numbers, and for the number of classes at each level.
    What is sent are the starts, one for each grid."""
    pool = pool_of(network, tune, ALIKE[:levels])
    for steps in (1, 4):
        seen = in_a_step(network, pool, steps)
        assert (seen.reads, seen.copies) == (1 + levels, 3) and seen.kernels > 100


@pytest.mark.parametrize("steps", [4, 8])
def test_pgd_counts_what_is_left_every_few_steps_only(steps):
    """On a device; what it finds is what it finds on the CPU, where it counts at every step."""
    generator = torch.Generator().manual_seed(0)
    images, centres = torch.rand(6, 3, 8, 8, generator=generator), torch.randn(3, 192, generator=generator)

    def found(move=lambda value: value):
        held, seen = move(centres), []

        def logits_of(points: Tensor) -> Tensor:
            seen.append(len(points))
            return cosine_logits(points.flatten(1) - 0.5, held)

        labels = move(cosine_logits(images.flatten(1) - 0.5, centres).argmax(1))
        draws = torch.Generator().manual_seed(1)
        return pgd(logits_of, move(images), labels, Ball("linf", 8 / 255, 0.5 / 255), steps, draws), seen

    (attacked, fooled, logits), each_step = found()
    with pretended() as seen:
        (there, fooled_there, logits_there), now_and_then = found(on_device)
    assert 0 < fooled.sum() < 6
    assert torch.equal(there.held, attacked) and torch.equal(fooled_there.held, fooled)
    assert torch.allclose(logits_there.held, logits, atol=1e-6)
    assert seen.reads == steps // 4
    assert sum(each_step) < sum(now_and_then) < 6 * (steps + 1)


def test_an_episode_of_evaluation_waits_for_the_device_a_few_times_only(network):
    """Routed over three adapters: a read for the classes that each is fitted to, ten more, and three numbers
    sent for the augmentation; seven reads and four lists for the temperature of probabilities; under PGD
    fourteen more, and one for every fourth of its steps."""
    pool = pool_of(network, "lora")
    episode = make_episode(0)

    def counted(attacks: list[Attack]) -> tuple[int, int]:
        there, parts = on_device(network), on_device(pool)
        predict = merged_predictor(there, parts, lambda *given: route(there, parts, *given, Routing()))
        with pretended() as seen:
            measure(predict, on_device(episode), attacks)
            once = dataclasses.replace(seen)
            predict = merged_predictor(there, parts, lambda *given: route(there, parts, *given, Routing()))
            measure(predict, on_device(episode), attacks)
        return seen.reads - once.reads, seen.copies - once.copies

    assert counted([]) == (20, 8)
    for steps in (20, 40):
        assert counted([Attack("pgd", (1e-3,), steps=steps)]) == (28 + steps // 4, 9)


def test_the_pretended_device_refuses_to_mix():
    with pretended(), pytest.raises(RuntimeError, match="mixes"):
        on_device(torch.ones(2)) + torch.ones(2)
