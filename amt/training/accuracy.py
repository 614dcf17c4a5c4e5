"""Accuracies of a classifier, clean and under attack: what weighs AutoLoRa's loss, and validates its epochs.

Knows no optimiser and no schedule.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.losses import misclassified
from amt.attacks.perturb import pgd
from amt.models.network import Network, logits
from amt.models.weights import Weights, stream
from amt.training.autolora_settings import Adversary

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # images, labels, numbers of the images


class Accuracy(NamedTuple):
    """Accuracies of one network on one set of images, in per cent."""

    clean: float
    robust: float


def accuracy(network: Network, weights: Weights, batches: Batches) -> float:
    """The share of images that are classified correctly, in [0, 1], in eval mode, on the weights' device.
    Batches are images (n, 3, S, S) float in [0, 1], labels (n,) int64, numbers of the images (n,)."""
    device = next(iter(weights.values())).device
    right = count = 0
    with torch.no_grad():
        for images, labels, _ in batches:
            found = logits(network, weights, images.to(device))
            right += int((~misclassified(found, labels.to(device))).sum())
            count += len(labels)
    return right / max(count, 1)


def validate(
    network: Network, weights: Weights, batches: Batches, adversary: Adversary, seed: int
) -> Accuracy:
    """Clean accuracy, and robust accuracy under PGD from a uniform start, which the seed decides with the
    number of an image: the same in every epoch. Other arguments as of `accuracy`."""
    weights = {name: weight.detach() for name, weight in weights.items()}
    device = next(iter(weights.values())).device

    def logits_of(images: Tensor) -> Tensor:
        return logits(network, weights, images)

    right = standing = count = 0
    for images, labels, indices in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.no_grad():
            correct = (~misclassified(logits_of(images), labels)).nonzero().squeeze(1)
        right, count = right + len(correct), count + len(labels)
        if len(correct) == 0:
            continue
        _, fooled, _ = pgd(
            logits_of,
            images[correct],
            labels[correct],
            adversary.ball,
            adversary.steps,
            [stream(seed, 2, index) for index in indices[correct.cpu()].tolist()],
        )
        standing += int((~fooled).sum())
    return Accuracy(100 * right / max(count, 1), 100 * standing / max(count, 1))
