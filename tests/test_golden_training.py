"""The step of training, by the recorded numbers."""

import dataclasses

import torch
from amt_golden import (
    NormalisedLevel,
    arrays,
    as_published,
    assert_close,
    floor_of,
    golden,
    level_of,
    normalised,
    params,
)
from torch import Tensor
from toy_pools import trainable

from amt.attacks.perturb import ascend
from amt.models.network import level_features
from amt.models.pool import Pool
from amt.training import attack, meta_tune
from amt.training.losses import robust_loss
from amt.training.meta_tune import query_outcome
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode

pytestmark = golden


@dataclasses.dataclass(frozen=True)
class Step:
    """One recorded training step: its episode in normalised units, and what was recorded of it."""

    data: dict[str, Tensor]
    settings: dict
    episode: Episode

    @property
    def level(self) -> NormalisedLevel:
        return level_of(self.settings, gamma=self.settings["gamma"])

    def injected(self, pool: Pool) -> tuple[Pool, Episode, list[Tensor]]:
        """The pool at a level without steps, the episode, and a start that gives the recorded images."""
        still = dataclasses.replace(self.level, steps=0, grids=(0,), scalars=(1.0,))
        start = [self.data["x_adv"] - self.episode.query]
        return dataclasses.replace(pool, levels=(still,)), self.episode, start


def steps() -> list[Step]:
    everything = arrays("f_step.npz")
    count = len({name.split("/")[0] for name in everything})
    found = []
    for number in range(count):
        prefix = f"step{number}/"
        data = {
            name.removeprefix(prefix): tensor
            for name, tensor in everything.items()
            if name.startswith(prefix)
        }
        episode = Episode(normalised(data["sx_u8"]), data["sy"], normalised(data["x_u8"]), data["y"])
        found.append(Step(data, params("f_step.npz", f"step{number}/loss"), episode))
    return found


def pool_before(number: int, all_steps: list[Step], start: Pool) -> Pool:
    """The recorded weights that step `number` began with."""
    if number == 0:
        return start
    after = all_steps[number - 1].data
    names = as_published(start.factors)
    factors = {
        name: after[f"w_after/{published}"].reshape(factor.shape)
        for (name, factor), published in zip(start.factors.items(), names, strict=True)
    }
    return dataclasses.replace(start.with_factors(factors), scale=after["w_after/scale_cls"])


def assert_gradients(pool: Pool, data: dict[str, Tensor], kind: str, number: int) -> int:
    gradients = as_published({name: factor.grad for name, factor in pool.factors.items()})
    gradients["scale_cls"] = pool.scale.grad
    recorded = [name for name in gradients if f"{kind}/{name}" in data]
    for name in recorded:
        floor = floor_of("f_step.npz", f"step{number}/{kind}/{name}")
        assert_close(gradients[name], data[f"{kind}/{name}"], 1e-5, f"{kind} {name}", floor)
    return len(recorded)


def test_loss_of_recorded_logits():
    """Both parts and their sum, the divergence taken from the clean to the attacked logits."""
    for step in steps():
        beta = step.settings["beta"]
        loss = robust_loss(
            step.data["logits_clean"], step.data["logits_adv"], step.episode.query_labels, beta
        )
        assert_close(loss.total, step.data["loss"], 2e-6)
        assert_close(loss.natural, step.data["loss_natural"], 2e-6)
        assert_close(loss.robust, step.data["loss_robust"], 2e-6)


def test_training_step(single):
    """Logits, loss and gradients of every step, from its recorded weights and attacked images."""
    all_steps = steps()
    assert all_steps
    for number, step in enumerate(all_steps):
        pool = trainable(pool_before(number, all_steps, single.pool))
        outcome = query_outcome(single.raw, *step.injected(pool))
        assert_close(outcome.clean[0], step.data["logits_clean"], 1e-5, f"step {number}")
        assert_close(outcome.attacked[0], step.data["logits_adv"], 1e-5, f"step {number}")
        for part in ("natural", "robust"):
            assert_close(getattr(outcome.loss, part)[0], step.data[f"loss_{part}"], 1e-5, f"step {number}")
        assert_close(outcome.loss.total[0], step.data["loss"], 1e-5, f"step {number}")
        outcome.loss.total.sum().backward()
        assert assert_gradients(pool, step.data, "grad", number) == len(pool.factors) + 1


def test_training_step_split_at_the_support(single, monkeypatch):
    """Query branch alone and support branch alone: the support is seen by the weights before their move."""
    all_steps = steps()
    compared = 0
    for number, step in enumerate(all_steps):
        pool = trainable(pool_before(number, all_steps, single.pool))
        seen = []

        def cut_at_support(network, weights, images, step=step, seen=seen):
            out = level_features(network, weights, images)
            if torch.equal(images[0], step.episode.support):
                seen.append(out.detach().requires_grad_())
                return seen[-1]
            return out

        with monkeypatch.context() as patch:
            patch.setattr(meta_tune, "level_features", cut_at_support)
            outcome = query_outcome(single.raw, *step.injected(pool))
        outcome.loss.total.sum().backward()
        assert len(seen) == 1
        assert_close(seen[0][0], step.data["supp_f"], 3e-6, f"step {number}")
        assert_close(seen[0].grad[0], step.data["grad_supp_f"], 2e-5, f"step {number}")
        compared += assert_gradients(pool, step.data, "grad_query_only", number)
    assert compared > 0


def test_attack_inside_the_training_step(single, monkeypatch):
    """Where the whole start was recorded, the step attacks its queries as recorded."""
    compared = 0
    all_steps = steps()
    for number, step in enumerate(all_steps):
        start = [step.data.get(f"delta0_L{grid}") for grid in range(len(step.level.grids))]
        if any(delta is None for delta in start):
            continue
        pool = trainable(pool_before(number, all_steps, single.pool))
        attacks = []

        def watched(*args, attacks=attacks, **keywords):
            attacks.append(ascend(*args, **keywords))
            return attacks[-1]

        with monkeypatch.context() as patch:
            patch.setattr(attack, "ascend", watched)
            pool = dataclasses.replace(pool, levels=(step.level,))
            outcome = query_outcome(single.raw, pool, step.episode, start)
        different = (attacks[0] - step.data["x_adv"]).abs() > 1e-4
        assert different.float().mean() < 0.05, f"step {number}"
        assert_close(outcome.loss.total[0], step.data["loss"], 0.05, f"step {number}")
        compared += 1
    assert compared > 0


def test_optimiser_with_momentum(single, monkeypatch):
    """All steps in one run of the tuner, momentum carried over; the moved weights are only ever stood at.

    The published step adds gamma * diff before it and subtracts it after, which costs an ulp each time.
    """
    all_steps = steps()
    waiting = iter(all_steps)

    def injected(network, pool, _episode, _start, loss_scale, _head):
        return query_outcome(network, *next(waiting).injected(pool), loss_scale)

    monkeypatch.setitem(meta_tune.OUTCOMES, "adsv", injected)
    first = all_steps[0].settings
    settings = TuneSettings(
        epochs=2,
        episodes_per_epoch=len(all_steps),
        lr=first["lr"],
        momentum=first["momentum"],
        warmup_epochs=0,
    )
    tuner = Tuner(single.raw, single.pool, settings)
    for step in all_steps:
        tuner.step(step.episode)
        pool = tuner.pool
        found = as_published(pool.factors) | {"scale_cls": pool.scale, "bias": pool.bias}
        recorded = [name for name in found if f"w_after/{name}" in step.data]
        assert len(recorded) >= len(pool.factors) + 1
        for name in recorded:
            expected = step.data[f"w_after/{name}"]
            if expected.any() or found[name].any():
                assert_close(found[name], expected, 3e-6, name)
                before = as_published(single.pool.factors).get(name)
                if before is not None:
                    # What the steps changed, as far as float32 holds it beside the weight.
                    rest = 5e-7 * float(expected.norm() / (expected - before).norm())
                    assert_close(found[name] - before, expected - before, 2e-5 + rest, name)
