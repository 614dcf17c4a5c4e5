"""The attacks of evaluation: how each finds worst-case images. Their names are in amt/attacks/kinds.py.

Every attack gets functions from images in [0, 1] to logits, and differentiates through them: through
normalisation, merging and prototypes, in float32 and eval mode. It knows no network and no episode. Epsilon
is in 1/255 of the pixel range, in both norms.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.attacks.library import library_attack
from amt.attacks.losses import dlr, kl_sum
from amt.attacks.perturb import Ball, ascend, end_of_ascent, input_gradient, pgd

Logits = Callable[[Tensor], Tensor]


class Attacked(NamedTuple):
    """The result of an attack.

    Args:
        images: in [0, 1], within epsilon of the originals: queries (Q, 3, H, W), or support (S, 3, H, W).
        fooled: (Q,) bool, which queries the attacked classifier gets wrong.
        variant: what was run, where the episode decides it; empty otherwise.
    """

    images: Tensor
    fooled: Tensor
    variant: str = ""


def attack_queries(
    attack: Attack,
    epsilon: float,
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    n_way: int,
    generators: Sequence[torch.Generator],
    surrogate: Logits | None = None,
    seed: int = 0,
) -> Attacked:
    """Run any attack but "support" at one radius.

    Args:
        epsilon: in 1/255 of the pixel range.
        logits: the network under attack, see `amt.tasks.classifier.Classifier`.
        images, labels: query images that it classifies correctly, (Q, 3, H, W) in [0, 1] and (Q,) int64.
        n_way: number of classes N; with one class no image can be taken for another.
        generators: a CPU generator for each image, so that its random starts do not depend on which others
            are attacked.
        surrogate: for "transfer", the network that the images are made on.
        seed: in 0..2**31 - 1, decides the random numbers of the library's attacks: the same for every image,
            so that they do not depend on the others either.

    Raises:
        InputError: more targets than other classes.
        ValueError: "transfer" without a surrogate.

    >>> answers = logits(images).argmax(1)
    >>> draws = [torch.Generator().manual_seed(k) for k in range(len(images))]
    >>> found = attack_queries(Attack("pgd", (8,), steps=2), 8, logits, images, answers, 2, draws)
    >>> bool((found.images - images).abs().max() <= 8 / 255 + 1e-6)
    True
    """
    if n_way == 1 or len(images) == 0:
        return Attacked(images, torch.zeros_like(labels, dtype=torch.bool))
    variant = attack.loss_among(n_way)[1]
    if attack.kind == "pgd":
        return Attacked(*_pgd(attack, epsilon, logits, images, labels, n_way, generators), variant)
    if attack.kind in ("pyramid", "transfer"):
        other = surrogate if attack.kind == "transfer" else logits
        if other is None:
            raise ValueError("a transfer attack needs a surrogate, the network that its images are made on")
        found = _to_the_end(attack, epsilon, other, images, labels, n_way, generators)
    else:
        found, variant = library_attack(attack, epsilon, logits, images, labels, n_way, seed)
    with torch.no_grad():
        return Attacked(found, logits(found).argmax(1) != labels, variant)


def attack_support(
    attack: Attack,
    epsilon: float,
    fit: Callable[[Tensor], Logits],
    support: Tensor,
    query: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> Attacked:
    """Move the support images so that as many queries as possible are misclassified, all by one move.

    Every step routes and merges anew; its gradient goes through the prototypes, with the coefficients held
    fixed. The most harmful of all points counts.

    Args:
        epsilon: in 1/255 of the pixel range.
        fit: support images (S, 3, H, W) -> the logits function of the whole pipeline.
        support, query: (S, 3, H, W) and (Q, 3, H, W) in [0, 1].
        labels: (Q,) int64 of the queries, which the attacker knows.
        generator: a CPU generator for the start.

    >>> attack = Attack("support", (4,), steps=2)
    >>> found = attack_support(attack, 4, fit, images, images, labels, torch.Generator())
    >>> found.fooled.shape
    torch.Size([4])
    """
    ball = _ball(attack, epsilon)
    worst = Attacked(support, torch.zeros_like(labels, dtype=torch.bool))

    def look(points: Tensor) -> Tensor:
        nonlocal worst
        logits = fit(points)(query)
        wrong = logits.argmax(1) != labels
        if wrong.sum() > worst.fooled.sum():
            worst = Attacked(points.detach(), wrong)
        return logits

    def loss_at(points: Tensor) -> Tensor | None:
        logits = look(points)
        return None if worst.fooled.all() else F.cross_entropy(logits, labels)

    start, move = ball.start(support, generator), partial(ball.step, images=support)
    points = end_of_ascent(start, partial(input_gradient, loss_at), move, attack.budget)
    if not worst.fooled.all():
        with torch.no_grad():
            look(points)
    return worst


def _ball(attack: Attack, epsilon: float) -> Ball:
    return Ball(attack.norm, epsilon / 255, attack.step_at(epsilon) / 255)


def _pgd(
    attack: Attack,
    epsilon: float,
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    n_way: int,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """PGD, restarted from another point for the images that withstood."""
    found, fooled = images.clone(), torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(attack.restarts):
        left = (~fooled).nonzero().squeeze(1)
        if len(left) == 0:
            break
        own = [generators[k] for k in left.tolist()]
        loss_of = _objective(attack, logits, images[left], labels[left], n_way)
        ball = _ball(attack, epsilon)
        found[left], fooled[left] = pgd(logits, images[left], labels[left], ball, attack.budget, own, loss_of)
    return found, fooled


def _to_the_end(
    attack: Attack,
    epsilon: float,
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    n_way: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The training attack of AMT, or PGD; with every image, fooled or not."""
    objective = _objective(attack, logits, images, labels, n_way)
    everything = torch.arange(len(images), device=images.device)

    def loss_of(moved: Tensor) -> Tensor:
        return objective(logits(moved), everything)

    if attack.kind == "pyramid":
        pyramid = Perturbation(epsilon, attack.step_at(epsilon)).pyramid
        return ascend(loss_of, images, pyramid.start(images, generators), pyramid, attack.budget)
    ball = _ball(attack, epsilon)
    return ascend(loss_of, images, ball.start(images, generators), ball, attack.budget)


def _objective(
    attack: Attack, logits: Logits, images: Tensor, labels: Tensor, n_way: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss to increase: logits (n, N) of some of the images, and their numbers (n,) -> scalar."""
    loss, _ = attack.loss_among(n_way)
    if loss == "kl":
        with torch.no_grad():
            clean = logits(images)
        return lambda moved, which: kl_sum(clean[which], moved)
    if loss == "dlr":
        return lambda moved, which: dlr(moved, labels[which]).sum()
    return lambda moved, which: F.cross_entropy(moved, labels[which], reduction="sum")
