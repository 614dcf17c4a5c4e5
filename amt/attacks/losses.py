"""Losses of logits that attacks increase and robust training decreases, besides torch's cross-entropy.

Knows no network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_sum(clean: Tensor, attacked: Tensor) -> Tensor:
    """sum_i KL(softmax(clean_i) || softmax(attacked_i)), the divergence of TRADES (Zhang et al. 2019): logits
    (..., n, N), gradient flows into both -> sums over the n images (...), >= 0."""
    divergence = F.kl_div(
        F.log_softmax(attacked, -1), F.log_softmax(clean, -1), reduction="none", log_target=True
    )
    return divergence.sum((-2, -1))


def squared_distance_sum(features: Tensor, anchor: Tensor) -> Tensor:
    """sum_i ||f_i - a_i||^2, not divided by D (Schlarmann et al. 2024, FARE): features (..., n, D), and
    where each belongs (n, D) -> sums over the n images (...), >= 0."""
    return (features - anchor).square().sum((-2, -1))


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (..., n, N), float, with labels (n,) int64 in 0..N-1: sums over the n images
    (...)."""
    rows = logits.flatten(0, -2)
    each = F.cross_entropy(rows, labels.expand(*logits.shape[:-1]).flatten(), reduction="none")
    return each.view(logits.shape[:-1]).sum(-1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the nearest wrong class leads, max_{i != y} z_i - z_y (Carlini & Wagner 2017): logits
    (n, N) with N >= 2, labels (n,) -> (n,), negative while an image is classified correctly."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6), -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)):
    logits (n, N) with N >= 3, labels (n,) -> (n,), negative while an image is classified correctly."""
    largest = logits.topk(3, dim=1).values
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + 1e-12)


def loss_sum(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """A loss by its name in `--attack pgd loss=...`, "ce", "dlr" or "margin": logits (n, N), labels (n,) ->
    a scalar, the sum over the n images."""
    if name == "ce":
        return F.cross_entropy(logits, labels, reduction="sum")
    return {"dlr": dlr, "margin": margin}[name](logits, labels).sum()


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images (n,) bool are not classified as `labels` (n,) int64 by logits (n, N); a prediction from
    logits that are not all numbers is wrong, whatever it is."""
    return (logits.argmax(1) != labels) | logits.isnan().any(1)
