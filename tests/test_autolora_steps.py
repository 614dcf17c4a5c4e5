"""Laws of AutoLoRa's steps and epochs, on small random networks."""

import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_autolora import (
    KINDS,
    METHODS,
    RANK,
    SHORT,
    SIDE,
    changed,
    chosen,
    copies,
    data,
    is_statistic,
    network,
    tuner_of,
)

from amt.cli.fine_tune import contents, fine_tune, restore
from amt.data.labelled import ArrayImages
from amt.data.loading import batches, transforms
from amt.files.signals import Interrupted
from amt.models.branch import new_factors
from amt.models.network import logits
from amt.models.weights import stream
from amt.training.autolora import FineTuner
from amt.training.autolora_settings import Adversary
from amt.training.keeper import Keeper
from amt.training.optimiser import NonFiniteLoss
from amt.training.schedule import loss_weights

pytestmark = pytest.mark.usefixtures("one_thread")

# --- steps -----------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n_batches", [1, 2, 3])
def test_every_method_takes_batches_of_any_size_in_epochs_of_any_length(kind, name, n_batches):
    """A transformer has no BatchNorm, so that no method has a second set of it; the published code fails
    with fewer than four batches or epochs."""
    tuner = tuner_of(chosen(**METHODS[name]), kind, n_batches)
    assert (not tuner.student.norms) == (kind == "vit" or name in ("SLF", "ALF", "autolora", "vanilla"))

    def training(_epoch: int, first: int):
        return [(*data(size), torch.arange(size)) for size in (4, 3, 1)[-n_batches:][first:]]

    records = run(tuner, training=training)
    assert len(records) == 2 * n_batches and tuner.finished and len(tuner.history) == 2
    assert all(math.isfinite(record["training/total"]) for record in records)
    assert all(tensor.isfinite().all() for tensor in tuner.student.tensors.values())
    assert tuner.best.tensors.keys() == tuner.student.tensors.keys()


def passes_of(step) -> list[bool]:
    """Whether each pass through the network that `step()` takes is in training mode."""
    seen = []
    hook = network().module.register_forward_hook(lambda module, *_: seen.append(module.training))
    try:
        step()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_takes_one_pass_per_attack_step_and_two_more(steps):
    """Only the very first batch has one more, for want of an accuracy to weigh its loss by."""
    tuner = tuner_of(chosen(adversary=Adversary(steps=steps)))
    expected = [False] * steps + [True, True]
    assert passes_of(lambda: tuner.step(*data())) == [False, *expected]
    for _ in range(2):
        assert passes_of(lambda: tuner.step(*data())) == expected


@pytest.mark.parametrize("n_batches", [1, 2, 3, 4, 7, 8, 10])
def test_running_weights_are_those_of_the_batches_as_they_come(n_batches):
    """By hand: from the accuracy of the natural thread on the latest quarter of an epoch, at the batches that
    the published code looks at; at first, of the very first batch before it is trained on."""
    tuner = tuner_of(chosen(), n_batches=n_batches)
    images, labels = data(6)
    with torch.no_grad():
        guesses = logits(tuner.network, tuner.natural(), images).argmax(1)
    expected = float((guesses == labels).double().mean())
    quarter = max(n_batches // 4, 1)
    rights = []
    for epoch in range(2):
        for batch in range(n_batches):
            size = 6 if not rights else 2 + (epoch + batch) % 4
            record = tuner.step(*data(size, seed=0 if not rights else 10 * epoch + batch))
            assert (record.lambda1, record.lambda2) == pytest.approx(loss_weights(expected))
            assert record.lambda1 == pytest.approx(1 - record.lambda2 / 6)
            rights.append((round(record.clean_accuracy * size), size))
            if batch % quarter == 0:
                latest = rights[-quarter:]
                expected = sum(right for right, _ in latest) / sum(count for _, count in latest)
        tuner.end_epoch(50, 40)


@pytest.mark.parametrize("n_batches", [1, 2, 3, 5, 8, 40])
def test_whole_passes_are_as_many_as_published(n_batches):
    """1 + ceil(n / floor(n / 4)); with fewer than four batches, one after each."""
    tuner = tuner_of(chosen(whole_passes=True), n_batches=n_batches)
    given_out = []

    def look(weights: dict[str, Tensor]) -> float:
        given_out.append(len(given_out) / 100)
        return given_out[-1]

    tuner.training_accuracy = look
    tuner._attacked = lambda images, labels: images  # the attack plays no part in it
    quarter = max(n_batches // 4, 1)
    current = 0.0
    for batch in range(n_batches):
        record = tuner.step(*data(2))
        assert record.lambda1 == 1 - current
        if batch % quarter == 0:
            current = given_out[-1]
    assert len(given_out) == 1 + math.ceil(n_batches / quarter)


@pytest.mark.parametrize("whole", [False, True])
def test_at_high_resolution_the_weights_are_set_once_an_epoch(whole):
    tuner = tuner_of(chosen(high_resolution=True, whole_passes=whole), n_batches=3)
    for _ in range(2):
        found = {tuner.step(*data(5, seed))[5:8] for seed in range(3)}
        assert len(found) == 1
        tuner.end_epoch(50, 40)


@KINDS
def test_a_loss_that_is_no_number_changes_no_parameter(kind):
    tuner = tuner_of(chosen(), kind)
    before = copies(tuner.student.tensors)
    images, labels = data()
    with pytest.raises(NonFiniteLoss, match="epoch 1, batch 1, learning rate"):
        tuner.step(images * math.nan, labels)
    assert all(is_statistic(name) for name in changed(before, tuner.student.tensors))


@pytest.mark.parametrize("stop_after", [None, 1])
def test_weights_that_a_step_has_spoilt_never_reach_a_file(stop_after):
    """Its loss was a number: no epoch has ended, nor is the run stopped as if it could go on."""
    tuner = tuner_of(chosen(lr=1e38, weight_decay=1e3), n_batches=1)
    keeper = Quiet(stop_after)
    with pytest.raises(NonFiniteLoss, match="no longer finite at epoch 1, batch 1, learning rate"):
        run(tuner, keeper=keeper, training=lambda _epoch, first: [(*data(), torch.arange(8))][first:])
    (record,) = keeper.records
    assert math.isfinite(record["training/total"]) and not keeper.saved


# --- epochs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [False, True])
def test_the_best_epoch_comes_back_whole_and_the_momentum_stays(dual):
    """Every tensor: parameters, statistics, counters, factors; what the optimiser remembers is not among
    them."""
    tuner = tuner_of(chosen(epochs=50, high_resolution=True, dual_norms=dual), n_batches=1)
    accuracies = [10.0, 30.0, 20.0, 20.0, 20.0]
    for epoch, robust in enumerate(accuracies, 1):
        tuner.step(*data(5, epoch))
        if epoch == 2:
            best = copies(tuner.student.tensors)
        momentum = copies({n: t for n, t in tuner.state()[0].items() if n.startswith("momentum/")})
        note = tuner.end_epoch(robust, robust)
        assert (note["condition"], note["best"]) == ((1, 2) if epoch == 5 else (0, min(epoch, 2)))
        if epoch in (3, 4):
            assert len(changed(best, tuner.student.tensors)) > len(network().parameters)
    assert changed(best, tuner.student.tensors) == set()
    state = tuner.state()[0]
    assert momentum and not changed(momentum, {name: state[name] for name in momentum})
    assert tuner.rate == 0.05 / 2
    tuner.step(*data(5))
    assert changed(best, tuner.best.tensors) == set()  # a copy: training goes on without it


EPOCHS, BATCHES = 3, 3
RUNS = {
    "running": chosen(epochs=EPOCHS, divide=3.0),
    "whole passes": chosen(epochs=EPOCHS, whole_passes=True),
    "published": chosen(epochs=EPOCHS, published=True, whole_passes=True, dual_norms=True),
    "high": chosen(epochs=6, high_resolution=True),  # the best epoch comes back after the fifth
    "dual": chosen(epochs=EPOCHS, dual_norms=True),
    "twins": chosen(epochs=EPOCHS, method="twins", auto_lr=False, milestones=(1, 2)),
    "ALF": chosen(epochs=EPOCHS, **METHODS["ALF"]),
}


def training(epoch: int, first: int):
    """Three batches of an epoch's own, the last one short."""
    return [(*data(size, seed=10 * epoch + b), torch.arange(size)) for b, size in enumerate((4, 4, 1))][
        first:
    ]


class Quiet:
    """A keeper that remembers what the loop tells it, and stops it once so many steps are done."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.records: list[dict[str, float]] = []
        self.saved: list[str] = []

    @property
    def interrupted(self) -> bool:
        return len(self.records) == self.stop_after

    def watch(self, items):
        for item in items:
            if self.interrupted:
                return
            yield item

    def whole(self, items):
        if self.interrupted:
            raise Interrupted
        return items

    def passes(self, _module):
        return contextlib.nullcontext()

    def log_step(self, _step: int, scalars: dict[str, float], _brief: str) -> None:
        self.records.append({name: value for name, value in scalars.items() if name != "training/seconds"})

    def is_due(self) -> bool:
        return False

    def save_best(self, *_content) -> None:
        self.saved.append("best")

    def save_last(self, *_content) -> None:
        self.saved.append("last")

    def begin(self, *_) -> None: ...

    def log(self, *_) -> None: ...

    def say(self, *_) -> None: ...


def run(
    tuner: FineTuner, stop_after: int | None = None, keeper: Quiet | None = None, training=training
) -> list[dict[str, float]]:
    """Go on with a run, perhaps until so many steps are done; what was shown of them, without their times."""
    keeper = keeper or Quiet(stop_after)
    images, labels = data(6, seed=99)
    held_out = [(images, labels, torch.arange(6))]
    fine_tune(keeper, tuner, training, held_out, SHORT, {})
    return keeper.records


def sent(tuner: FineTuner) -> tuple[dict[str, Tensor], dict]:
    """A state as it comes back from a file."""
    tensors, numbers = tuner.state()
    return copies(tensors), json.loads(json.dumps(numbers))


def assert_same_state(one: FineTuner, other: FineTuner) -> None:
    (tensors, numbers), (others, other_numbers) = sent(one), sent(other)
    assert numbers == other_numbers
    assert changed(tensors, others) == set()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(name):
    whole = tuner_of(RUNS[name], n_batches=BATCHES)
    records = run(whole)
    assert len(records) == RUNS[name].epochs * BATCHES and whole.finished
    assert name != "high" or whole.history[4]["condition"]
    for stop in range(1, len(records) + 1):
        first = tuner_of(RUNS[name], n_batches=BATCHES)
        begun = run(first, stop)
        second = tuner_of(RUNS[name], n_batches=BATCHES)
        second.restore(*sent(first))
        assert [*begun, *run(second)] == records, stop
        assert_same_state(second, whole)
        assert changed(second.best.tensors, whole.best.tensors) == set()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
@settings(max_examples=8)
def test_a_run_may_be_stopped_any_number_of_times(stops):
    how = dataclasses.replace(RUNS["running"], adversary=Adversary(steps=1))
    whole = tuner_of(how, n_batches=BATCHES)
    records = run(whole)
    tuner, found = tuner_of(how, n_batches=BATCHES), []
    for stop in (*stops, None):
        found += run(tuner, stop)
        later = tuner_of(how, n_batches=BATCHES)
        later.restore(*sent(tuner))
        tuner = later
    assert found == records
    assert_same_state(tuner, whole)


def test_the_files_of_a_run_hold_all_that_it_is_continued_from(tmp_path):
    how = RUNS["running"]
    protocol = json.loads(json.dumps(dataclasses.asdict(how)))
    whole = tuner_of(how, n_batches=BATCHES)
    run(whole)
    for stop in (2, 2, 3, None):
        tuner = tuner_of(how, n_batches=BATCHES)
        with Keeper(tmp_path, "a fine-tuning", protocol) as kept:
            if kept.last.exists():
                restore(tuner, kept.last, protocol)
            run(tuner, stop)
            kept.begin("AFF", "batch", EPOCHS * BATCHES, tuner.steps)
            kept.save_last(*contents({"format": 1, "protocol": protocol}, tuner))
    assert_same_state(tuner, whole)


def test_the_number_of_workers_and_the_moment_do_not_matter():
    """Real batches, shuffled and augmented; torch's global generator plays no part."""
    rng = np.random.default_rng(0)
    part = ArrayImages(rng.integers(0, 256, (11, SIDE, SIDE, 3), dtype=np.uint8), np.arange(11) % 3, "noise")
    augmented, plain = transforms(SIDE, False)

    def ended(workers: int, seed: int) -> dict[str, Tensor]:
        torch.rand(workers + 1)
        how = chosen(seed=seed)
        tuner = tuner_of(how, n_batches=3)

        def training(epoch: int, first: int):
            return batches(
                part, augmented, 4, seed=seed, epoch=epoch, shuffle=True, workers=workers, start=first
            )

        held_out = batches(part, plain, 5, seed=0, workers=workers)
        fine_tune(Quiet(), tuner, training, held_out, SHORT, {})
        return sent(tuner)[0]

    alone = ended(0, seed=1)
    assert changed(alone, ended(2, seed=1)) == set()
    assert "weights/conv1.weight" in changed(alone, ended(0, seed=2))


def test_a_branch_starts_as_a_function_of_the_seed():
    net = network()
    one, same, other = (new_factors(net, net.adapted(), RANK, stream(seed)) for seed in (1, 1, 2))
    assert changed(one, same) == set()
    assert changed(one, other) == {name for name in one if name.endswith("lora_A")}
    assert not any(one[name].any() for name in one if name.endswith("lora_B"))


def test_trades_moves_away_from_the_prediction_that_its_loss_is_about():
    """With two BatchNorm sets clean images have their own, in the attack as in the loss."""
    tuner = tuner_of(chosen(method="vanilla", dual_norms=True))
    student, (images, labels) = tuner.student, data()
    moved = []
    for shift in (0, 0.5):
        norms = {n: norm.detach() + shift * n.endswith(".bias") for n, norm in student.norms.items()}
        other = FineTuner(tuner.network, dataclasses.replace(student, norms=norms), tuner.settings, 1)
        moved.append(other._attacked(images, labels))
    assert not torch.equal(*moved)
