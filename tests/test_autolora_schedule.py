"""AutoLoRa's schedules: rules without state, which repeat every decision of the published code."""

import numpy as np
import pytest
from autolora_golden import INDEX, arrays, below, golden
from hypothesis import given
from hypothesis import strategies as st

from amt.training.schedule import LOWEST_RATE, loss_weights, step_rate, update_batches, verdict, windows

ACCURACIES = st.lists(st.integers(0, 10).map(float), min_size=1, max_size=60)
TRACES = {file: arrays(file) for file in ("lr_traces_low.npz", "lr_traces_high.npz")}


def names(file: str) -> list[str]:
    return sorted({name.split("/")[0] for name in TRACES[file]})


def replayed(accuracies, ends, rate, divide, stop=0.0):
    """Rate and starting weights of every epoch, the condition after it, until the rate is below `stop`."""
    found = {"lr": [], "start_weights_of": [], "condition_after_epoch": []}
    start = 0
    for epoch in range(1, len(accuracies) + 1):
        found["lr"].append(rate_now := verdict(accuracies[: epoch - 1], ends, rate, divide).rate)
        found["start_weights_of"].append(start)
        after = verdict(accuracies[:epoch], ends, rate, divide)
        found["condition_after_epoch"].append(after.condition)
        start = after.best if after.condition else epoch
        if after.rate < stop:
            break
        assert after.rate <= rate_now
    return found


@pytest.mark.parametrize("name", names("lr_traces_low.npz") or [None])
class TestPublishedLow:
    pytestmark = golden

    def test_every_decision_of_a_trace(self, name):
        trace, about = below(f"{name}/", TRACES["lr_traces_low.npz"]), INDEX["lr_traces_low"][name]
        ends = windows(about["mode"], about["epochs"], published=True)
        assert ends == trace["W"].tolist()
        found = replayed(trace["val"].tolist(), ends, trace["lr"][0], about["divide"])
        for field, values in found.items():
            assert np.allclose(values, trace[field], rtol=1e-12), field

    def test_the_best_epoch(self, name):
        trace, about = below(f"{name}/", TRACES["lr_traces_low.npz"]), INDEX["lr_traces_low"][name]
        found = verdict(trace["val"].tolist(), trace["W"].tolist(), 0.1)
        assert found.best == about["best_val_epoch_file"]


@pytest.mark.parametrize("name", names("lr_traces_high.npz") or [None])
class TestPublishedHigh:
    pytestmark = golden

    def test_every_decision_of_a_trace(self, name):
        trace, about = below(f"{name}/", TRACES["lr_traces_high.npz"]), INDEX["lr_traces_high"][name]
        ends = windows("AFF", about["max_epoch"], high_resolution=True)
        found = replayed(trace["val"].tolist(), ends, trace["lr"][0], 2, LOWEST_RATE)
        assert len(found["lr"]) == about["epochs_run"]
        for field, values in found.items():
            assert np.allclose(values, trace[field], rtol=1e-12), field

    def test_the_weights_of_the_loss(self, name):
        trace = below(f"{name}/", TRACES["lr_traces_high.npz"])
        found = [loss_weights(accuracy) for accuracy in trace["train_sa_nat_branch"][: len(trace["lr"])]]
        assert np.allclose([each.natural for each in found], trace["lambda1"], rtol=1e-12)
        assert np.allclose([each.robust for each in found], trace["lambda2"], rtol=1e-12)


class TestPublishedLossWeights:
    pytestmark = golden

    def test_values(self):
        for table in INDEX["lowres"]["lambda_values"]:
            found = [loss_weights(accuracy, table["scale"]) for accuracy in table["sa"]]
            assert np.allclose([each.natural for each in found], table["lambda1"], rtol=1e-12)
            assert np.allclose([each.robust for each in found], table["lambda2"], rtol=1e-12)

    def test_when_they_are_set(self):
        """The published code looks once before the epoch and after every batch of `update_batches`; what is
        found after batch i acts from batch i + 1 on. With fewer than four batches it fails; ours does not."""
        for case in INDEX["lowres"]["lambda_batches"]:
            if case["error"] is not None:
                assert len(update_batches(case["batches"])) == case["batches"]
                continue
            seen = case["accuracies_returned_in_order"]
            after = update_batches(case["batches"])
            assert len(seen) == case["passes_over_train_set"] == 1 + len(after)
            changes = [0, *(batch + 1 for batch in after if batch + 1 < case["batches"])]
            assert changes == case["batches_at_which_lambda_changes"]
            found = [loss_weights(accuracy).natural for accuracy in seen[: len(changes)]]
            assert np.allclose(found, case["lambda1"], rtol=1e-12)


@given(ACCURACIES, st.sampled_from(["SLF", "ALF", "AFF"]), st.booleans())
def test_a_history_decides_alone(accuracies, mode, high):
    """Epoch by epoch or all at once, from any number of epochs: rates are halvings of the first, the best is
    the first maximum, and a reduction comes at the end of a window only."""
    ends = windows(mode, len(accuracies), high)
    rate = 0.1
    for epoch in range(1, len(accuracies) + 1):
        found = verdict(accuracies[:epoch], ends, 0.1)
        assert found.best == 1 + int(np.argmax(accuracies[:epoch]))
        assert found.rate == (rate / 2 if found.condition else rate)
        assert not found.condition or epoch - 1 in ends[1:]
        rate = found.rate


@pytest.mark.parametrize("epochs", [0, 1, 2, 3])
def test_trainings_too_short_for_a_window_keep_their_rate(epochs):
    """The published code fails on fewer than four epochs."""
    for mode in ("SLF", "AFF"):
        before_the_last = [0.5] * (epochs - 1)
        assert verdict(before_the_last, windows(mode, epochs), 0.1).rate == 0.1


def test_windows_of_other_lengths_keep_their_proportions():
    assert windows("AFF", 50) == [0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50]
    assert windows("AFF", 100) == [2 * end for end in windows("AFF", 50)]
    assert windows("AFF", 10) == [0, 3, 5, 7, 9]
    assert windows("AFF", 10, published=True) == windows("AFF", 50)


@pytest.mark.parametrize("n_batches", range(1, 40))
def test_every_epoch_sets_the_weights_of_the_loss_from_its_first_batch_on(n_batches):
    after = list(update_batches(n_batches))
    assert after[0] == 0 and after[-1] < n_batches
    assert len(after) >= min(n_batches, 4)


def test_the_ordinary_schedule():
    """Divided by ten after epochs 30 and 50."""
    assert [step_rate(0.1, epoch, (30, 50)) for epoch in (1, 30, 31, 50, 51)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )
