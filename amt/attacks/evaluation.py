"""The attacks of evaluation: how each finds worst-case images. Their names are in amt/attacks/kinds.py.

Every attack gets functions from images in [0, 1] to logits, and differentiates through them: through
normalisation, merging and prototypes, in float32 and eval mode. It knows no network and no episode. Epsilon
is in 1/255 of the pixel range, in both norms.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.attacks.library import library_attack
from amt.attacks.losses import kl_sum, loss_sum, misclassified
from amt.attacks.perturb import Ball, ascend, filled, input_gradient, pgd

Logits = Callable[[Tensor], Tensor]


class Attacked(NamedTuple):
    """The result of an attack.

    Args:
        images: in [0, 1], within epsilon of the originals: queries (Q, 3, H, W), or support (S, 3, H, W).
        fooled: (Q,) bool, which queries the attacked classifier gets wrong.
        logits: (Q, N) of the queries, which say so.
        variant: what was run, where the episode decides it; empty otherwise.
    """

    images: Tensor
    fooled: Tensor
    logits: Tensor
    variant: str = ""


def attack_queries(
    attack: Attack,
    epsilon: float,
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    n_way: int,
    generators: Sequence[torch.Generator],
    others: Sequence[Logits] = (),
    seed: int = 0,
) -> Attacked:
    """Run any attack but "support" at one radius: its parts in turn, each on the images that withstood those
    before, and each from the same random numbers: several losses break what one of them breaks alone.

    Args:
        epsilon: in 1/255 of the pixel range.
        logits: the network under attack, see `amt.tasks.classifier.Classifier`.
        images, labels: query images that it classifies correctly, (Q, 3, H, W) in [0, 1] and (Q,) int64.
        n_way: number of classes N; with one class no image can be taken for another.
        generators: a CPU generator for each image, so that its random starts do not depend on which others
            are attacked; the library's attacks use none.
        others: the networks that images are made on, for "transfer" only the first.
        seed: in 0..2**31 - 1, decides the random numbers of the library's attacks, the same for every image.

    Raises:
        InputError: more targets than other classes.
        ValueError: "transfer" without another network.

    >>> answers = logits(images).argmax(1)
    >>> draws = [torch.Generator().manual_seed(k) for k in range(len(images))]
    >>> found = attack_queries(Attack("pgd", (8,), steps=2), 8, logits, images, answers, 2, draws)
    >>> bool((found.images - images).abs().max() <= 8 / 255 + 1e-6)
    True
    """
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    if n_way == 1 or len(images) == 0:
        return Attacked(images, fooled, images.new_zeros(len(images), n_way))
    if attack.kind == "transfer" and not others:
        raise ValueError("a transfer attack needs a surrogate, the network that its images are made on")
    others = others[:1] if attack.kind == "transfer" else others
    found, seen = images.clone(), images.new_empty(len(images), 0)
    states = [generator.get_state() for generator in generators]
    for part in attack.parts():
        turns = {"transfer": others, "pgd": (logits,) * part.restarts}.get(part.kind, (logits,))
        for turn, surrogate in enumerate(turns):
            left = (~fooled).nonzero().squeeze(1)
            if len(left) == 0:
                break
            if turn == 0 or part.kind == "transfer":  # a restart goes on from where the last one has drawn
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)
            task = _Task(part, epsilon, logits, images[left], labels[left], n_way)
            own = [generators[k] for k in left.tolist()] if generators else []
            found[left], fooled[left], logits_there = _attacked(task, surrogate, own, seed)
            seen = filled(seen, left, logits_there)
    return Attacked(found, fooled, seen, attack.variant(n_way, len(others)))


class _Task(NamedTuple):
    """What one part of an attack is up to: arguments as of `attack_queries`."""

    attack: Attack
    epsilon: float
    logits: Logits
    images: Tensor
    labels: Tensor
    n_way: int


def _attacked(
    task: _Task, surrogate: Logits, generators: Sequence[torch.Generator], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The images as one part of an attack leaves them, which of them are misclassified, and their logits."""
    kind, ball = task.attack.kind, _ball(task.attack, task.epsilon)
    if kind == "pgd":
        steps = task.attack.budget
        return pgd(task.logits, task.images, task.labels, ball, steps, generators, _objective(task))
    if kind in ("pyramid", "transfer"):
        found = _to_the_end(task._replace(logits=surrogate), generators)
    else:
        found = library_attack(*task, seed)
    with torch.no_grad():
        seen = task.logits(found)
    return found, misclassified(seen, task.labels), seen


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
        query, labels: (Q, 3, H, W) in [0, 1], and (Q,) int64, which the attacker knows.
        generator: a CPU generator for the start.

    >>> attack = Attack("support", (4,), steps=2)
    >>> found = attack_support(attack, 4, fit, images, images, labels, torch.Generator())
    >>> found.fooled.shape
    torch.Size([4])
    """
    ball = _ball(attack, epsilon)
    worst = Attacked(support, torch.zeros_like(labels, dtype=torch.bool), query.new_empty(len(query), 0))

    def look(points: Tensor) -> Tensor:
        nonlocal worst
        logits = fit(points)(query)
        wrong = misclassified(logits, labels)
        if not worst.logits.shape[1] or wrong.sum() > worst.fooled.sum():
            worst = Attacked(points.detach(), wrong, logits.detach())
        return logits

    def loss_at(points: Tensor) -> Tensor | None:
        logits = look(points)
        return None if worst.fooled.all() else F.cross_entropy(logits, labels)

    points = ball.start(support, generator)
    for _ in range(attack.budget):
        direction = input_gradient(loss_at, points)
        if direction is None:
            break
        points = ball.step(points, direction, support)
    if not worst.fooled.all():
        with torch.no_grad():
            look(points)
    return worst


def _ball(attack: Attack, epsilon: float) -> Ball:
    return Ball(attack.norm, epsilon / 255, attack.step_at(epsilon) / 255)


def _to_the_end(task: _Task, generators: Sequence[torch.Generator]) -> Tensor:
    """The training attack of AMT, or PGD; with every image, fooled or not."""
    attack, images, objective = task.attack, task.images, _objective(task)
    everything = torch.arange(len(images), device=images.device)

    def loss_of(moved: Tensor) -> Tensor:
        return objective(task.logits(moved), everything)

    geometry = _ball(attack, task.epsilon)
    if attack.kind == "pyramid":
        geometry = Perturbation(task.epsilon, attack.step_at(task.epsilon)).pyramid
    return ascend(loss_of, images, geometry.start(images, generators), geometry, attack.budget)


def _objective(task: _Task) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss to increase: logits (n, N) of some of the images, and their numbers (n,) -> scalar."""
    labels = task.labels
    (loss,) = task.attack.losses_among(task.n_way)
    if loss == "kl":
        with torch.no_grad():
            clean = task.logits(task.images)
        return lambda moved, which: kl_sum(clean[which], moved)
    return lambda moved, which: loss_sum(loss, moved, labels[which])
