"""When the learning rate falls, when the best weights come back, and how the terms of the loss are weighed.

Pure rules of AutoLoRa (Xu et al. 2024): accuracies in, decisions out. A decision follows from the whole
history alone, so nothing has to be kept between epochs, and a resumed run decides as an uninterrupted one.
Knows no network, no loss and no data.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

RISES = 0.75  # of the epochs of a window that have to bring a better accuracy, the paper's rho
LINEAR_WINDOW = 4  # epochs
LOWEST_RATE = 1e-5  # below it training on high resolutions ends

# Ends of the windows when everything is fine-tuned, for 50 epochs: long ones first, as in APGD.
FULL_WINDOWS = (0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50)
FULL_EPOCHS = 50
SHORTEST_WINDOW = 2


class LossWeights(NamedTuple):
    """Weights of the terms of the loss (eq. 7): lambda_1 of the natural cross-entropy, where the adversarial
    one has 1 - lambda_1, and lambda_2 of the KL divergence."""

    natural: float
    robust: float


def loss_weights(accuracy: float, scale: float = 6.0) -> LossWeights:
    """The weights for an accuracy in [0, 1] of the natural branch on the training data; `scale` is the
    largest lambda_2."""
    return LossWeights(1 - accuracy, scale * accuracy)


def update_batches(n_batches: int) -> range:
    """The batches of an epoch after which the weights of the loss are updated: the first, and then one in
    every quarter of the epoch; every batch of an epoch of fewer than eight."""
    return range(0, n_batches, max(n_batches // 4, 1))


def windows(mode: str, epochs: int, high_resolution: bool = False, published: bool = False) -> list[int]:
    """The epochs 0 = W_0 < W_1 < ... that windows of the learning-rate schedule end at.

    Linear modes and high resolutions look back every four epochs. When everything is fine-tuned at a low
    resolution the windows shrink from 16 epochs to 2 over 50 epochs, and in proportion over another number;
    the published code keeps those of 50 epochs.
    """
    if mode != "AFF" or high_resolution:
        return list(range(0, epochs + 1, LINEAR_WINDOW))
    if published or epochs == FULL_EPOCHS:
        return list(FULL_WINDOWS)
    ends = [0]
    for end in (round(end * epochs / FULL_EPOCHS) for end in FULL_WINDOWS):
        if end >= ends[-1] + SHORTEST_WINDOW:
            ends.append(end)
    return ends


class Verdict(NamedTuple):
    """The schedule's decision after the validation accuracies of all epochs so far.

    Args:
        rate: of the next epoch.
        condition: why the rate was just reduced and the best weights come back: 1, the accuracy rose in
            fewer than 75% of the window's epochs; 2, the window brought no new best; 0, no reduction.
        best: the first of the epochs (from 1) with the highest accuracy; 0 before the first.
    """

    rate: float
    condition: int
    best: int


def verdict(accuracies: Sequence[float], windows: Sequence[int], rate: float, divide: float = 2.0) -> Verdict:
    """Apply the schedule to a history (method section 4.2 of the paper).

    A window (W_w, W_w+1] is judged after epoch W_w+1 + 1. The rises counted are those of epochs
    W_w + 2 ... W_w+1 + 1, each over the one before it.

    Args:
        accuracies: robust validation accuracy after epochs 1, 2, ...; ties are no improvement.
        windows: see `windows`; empty or (0,) never reduces the rate, which starts as `rate`.
    """
    starts = {end + 1: (start, end) for start, end in itertools.pairwise(windows)}
    best, best_at_last_look, condition = 0, None, 0
    for epoch, accuracy in enumerate(accuracies, 1):
        if best == 0 or accuracy > accuracies[best - 1]:
            best = epoch
        condition = 0
        if epoch not in starts:
            continue
        start, end = starts[epoch]
        rises = sum(accuracies[j + 1] > accuracies[j] for j in range(start, end))
        if rises < RISES * (end - start):
            condition = 1
        elif best == best_at_last_look:
            condition = 2
        best_at_last_look = best
        if condition:
            rate /= divide
    return Verdict(rate, condition, best)


def step_rate(rate: float, epoch: int, milestones: Sequence[int]) -> float:
    """The ordinary schedule: `rate` divided by ten after each of the milestones, for epochs from 1."""
    return rate * 0.1 ** sum(epoch > milestone for milestone in milestones)
