"""Attack and loss of a training step: AutoLoRa, and the methods it is compared with.

    SLF          cross-entropy of clean images, only the classifier is trained (standard linear fine-tuning)
    ALF          the same on attacked images (adversarial linear fine-tuning)
    AFF          everything is trained (adversarial full fine-tuning), by one of
      autolora     l1 CE(nat) + (1 - l1) CE(adv) + l2 KL(nat || adv), nat being through the low-rank branch
      vanilla      CE(nat) + l2 KL(nat || adv), both through the network: TRADES (Zhang et al. 2019)
      twins        the same on two halves of the batch, one normalised by the pre-training's statistics
                   (Liu et al. 2023)

The attack is always on the network that is deployed, in eval mode, and builds no parameter gradient. The loss
and the ascent are those of meta-tuning. Knows no optimiser, no schedule and no data.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.losses import kl_sum
from amt.attacks.perturb import ascend
from amt.models.branch import Student
from amt.models.network import Network, logits
from amt.models.weights import Weights
from amt.training.autolora_settings import Adversary
from amt.training.losses import RobustLoss, robust_loss
from amt.training.schedule import LossWeights


class Outcome(NamedTuple):
    """One batch: the loss, and the logits (n, K) of clean and attacked images behind it.

    For the linear modes `attacked` is the same tensor as `clean`.
    """

    loss: RobustLoss
    clean: Tensor
    attacked: Tensor


def attack(
    network: Network,
    weights: Weights,
    images: Tensor,
    labels: Tensor,
    adversary: Adversary,
    generator: torch.Generator,
    away_from: Weights | None = None,
) -> Tensor:
    """Training images (n, 3, S, S) in [0, 1] moved to raise the cross-entropy of the network in eval mode,
    or the KL divergence from the prediction that weights `away_from` make of the images as they are."""
    weights = _detached(weights)
    if away_from is not None:
        with torch.no_grad():
            clean = logits(network, _detached(away_from), images)

    def loss_of(moved: Tensor) -> Tensor:
        found = logits(network, weights, moved)
        if away_from is not None:
            return kl_sum(clean, found)
        return F.cross_entropy(found, labels, reduction="sum")

    return ascend(loss_of, images, adversary.begin(images, generator), adversary.ball, adversary.steps)


def _detached(weights: Weights) -> Weights:
    return {name: weight.detach() for name, weight in weights.items()}


def two_threads(
    network: Network,
    natural: Weights,
    weights: Weights,
    images: Tensor,
    attacked: Tensor,
    labels: Tensor,
    weighing: LossWeights,
) -> Outcome:
    """The loss of AutoLoRa (eq. 6) and of TRADES: first clean images through the natural thread, then
    attacked ones through the deployed network, in train mode. A BatchNorm set that they share has its running
    statistics updated twice.

    Args:
        natural: of AutoLoRa the `natural_weights`; of TRADES the network's, with the second BatchNorm set, if
            there is one.
        weights: of the deployed network.
        images, attacked: (n, 3, S, S) float in [0, 1].
        labels: (n,) int64 in 0..K-1.
    """
    clean = logits(network, natural, images, training=True)
    moved = logits(network, weights, attacked, training=True)
    return Outcome(robust_loss(clean, moved, labels, weighing.robust, weighing.natural), clean, moved)


def twins(
    network: Network,
    student: Student,
    images: Tensor,
    attacked: Tensor,
    labels: Tensor,
    weighing: LossWeights,
    share: float,
) -> Outcome:
    """TRADES on two halves of the batch: the first through the frozen network, whose BatchNorm normalises by
    the statistics it was pre-trained with (its second set, with parameters of its own), the second through
    the adaptive one, which is deployed. A batch of one image is the adaptive network's.

    Arguments as of `two_threads`, images (n, 3, S, S); `share` is the weight of the frozen half's loss, the
    authors' lambda; the other half has 1.
    """
    half = len(images) // 2
    frozen, adaptive = student.weights | student.norms, student.weights
    halves = ((slice(None, half), frozen, False, share), (slice(half, None), adaptive, True, 1.0))
    losses, clean, moved = [], [], []
    for part, weights, training, weight in halves:
        if len(labels[part]) == 0:
            continue
        # The attacked half first, as the authors have it: the running statistics lean to the later one.
        moved.append(logits(network, weights, attacked[part], training=training))
        clean.append(logits(network, weights, images[part], training=training))
        # The authors divide a half's divergence by the size of the whole batch.
        beta = weighing.robust * len(labels[part]) / len(labels)
        found = robust_loss(clean[-1], moved[-1], labels[part], beta, weighing.natural)
        losses.append([weight * term for term in found])
    total, natural, robust = (functools.reduce(torch.add, terms) for terms in zip(*losses, strict=True))
    return Outcome(RobustLoss(total, natural, robust), torch.cat(clean), torch.cat(moved))


def linear(network: Network, student: Student, images: Tensor, labels: Tensor) -> Outcome:
    """Cross-entropy of images (n, 3, S, S) with labels (n,) in eval mode: BatchNorm stays as it is."""
    found = logits(network, student.weights, images)
    loss = F.cross_entropy(found, labels)
    return Outcome(RobustLoss(loss, loss, torch.zeros_like(loss)), found, found)


def objective_gradients(
    network: Network,
    student: Student,
    images: Tensor,
    attacked: Tensor,
    labels: Tensor,
    weighing: LossWeights,
) -> tuple[Weights, Weights]:
    """Gradients of the natural and of the adversarial objective, CE(nat) and (1 - l1) CE(adv) +
    l2 KL(nat || adv), for the deployed network in eval mode without its classifier, by name. Arguments as of
    `two_threads`, images (n, 3, S, S)."""
    own = f"{network.classifier}."
    shared = {name: student.weights[name] for name in network.parameters if not name.startswith(own)}
    shared = {name: weight.detach().requires_grad_() for name, weight in shared.items()}
    weights = _detached(student.weights) | shared
    clean, moved = logits(network, weights, images), logits(network, weights, attacked)
    natural = F.cross_entropy(clean, labels)
    whole = robust_loss(clean, moved, labels, weighing.robust, weighing.natural)
    adversarial = whole.total - weighing.natural * natural

    def gradients(loss: Tensor) -> Weights:
        found = torch.autograd.grad(loss, list(shared.values()), retain_graph=True)
        return dict(zip(shared, found, strict=True))

    return gradients(natural), gradients(adversarial)
