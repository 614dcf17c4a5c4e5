"""The leave-one-out loss of networks on a support set: each image against the prototypes of the others.

With f_i the feature of support image i of class y_i, which has n_i images, the image is classified against

    (sum of the class's features - f_i) / (n_i - 1)     in its own class,
    the prototype as it is                              in every other.

The only image of a class stands for the class, and an augmented view of it is classified. The loss is the
cross-entropy, not the error rate: 25 images make steps of 4 per cent, within which most networks worth
comparing tie. Every class counts the same, as in a query set. Uses no query; knows no pool.
"""

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.perturb import Ball, input_gradient
from amt.models.heads import cosine_logits, index_in_class, prototypes
from amt.models.network import CHUNK, Network, features, fixed_features
from amt.models.weights import Merged
from amt.tasks.merge import augment

# Of larger support sets about 100 images are attacked, at least one of each class: more would say little, and
# each costs as much as a query image.
ATTACKED = 100
STEPS = 3  # of that attack, each of epsilon / 2


@dataclasses.dataclass(frozen=True)
class Trial:
    """One comparison of networks on a support set; `new_trial` makes it.

    Args:
        support, labels: (S, 3, H, W) in [0, 1], and (S,) int64 in 0..N-1.
        which: (n,) int64, the numbers of the support images that are classified.
        held_out: (n, 3, H, W), these images, or views of them.
        alone: (n,) bool, which of them are the only image of their class, and so replaced by a view.
        start: (n, 3, H, W), where their attack starts; None: they are not attacked.
        epsilon: bound of the attack in 1/255 of the pixel range.
    """

    support: Tensor
    labels: Tensor
    which: Tensor
    held_out: Tensor
    alone: Tensor
    start: Tensor | None = None
    epsilon: float = 0.0

    @property
    def points(self) -> int:
        """How many times each image is classified: once, or at the start and after every step."""
        return 1 if self.start is None else STEPS + 1


def new_trial(
    network: Network, support: Tensor, labels: Tensor, epsilon: float, generator: torch.Generator
) -> Trial:
    """The same held-out images of a support set (S, 3, H, W), (S,), and the same start of their attack within
    epsilon / 255, for all networks; at 0 they are not attacked. A CPU generator draws augmentation and
    start."""
    which = torch.arange(len(labels), device=labels.device)
    if epsilon > 0:
        n_way = int(labels.max()) + 1
        which = which[index_in_class(labels) < max(ATTACKED // n_way, 1)]
    images, alone = support[which], (labels.bincount()[labels] == 1)[which]
    if alone.any():
        views = network.denormalise(augment(network.normalise(images[alone]), generator))
        images[alone] = views.clamp(0, 1)  # valid images, as they are attacked
    if epsilon == 0:
        return Trial(support, labels, which, images, alone)
    start = _ball(epsilon).start(images, generator)
    return Trial(support, labels, which, images, alone, start, epsilon)


def _ball(epsilon: float) -> Ball:
    return Ball("linf", epsilon / 255, epsilon / 255 / 2)


def lowest_loss(
    network: Network, networks: Sequence[Callable[[], Merged]], trial: Trial
) -> tuple[int, float]:
    """The number of the network with the least leave-one-out loss, the first of equals, and that loss: the
    mean cross-entropy of the held-out images, each at the worst point of its attack that was seen.

    The loss at the worst points seen can only grow, so the network with the least loss so far is always
    attacked next, and the others are attacked no further once it is done. Each of `networks` is called
    whenever it is needed, so that not all have to be in memory.
    """
    running = [_losses(network, merged, trial) for merged in networks]
    queue = [(0.0, k, 0) for k in range(len(networks))]
    while True:
        loss, k, points = heapq.heappop(queue)
        if points == trial.points:
            return k, loss
        heapq.heappush(queue, (next(running[k]), k, points + 1))


def leave_one_out_logits(
    views: Tensor,
    support: Tensor,
    labels: Tensor,
    which: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Logits (n, N) of held-out images: for their own class without them, for the others as they are.

    Args:
        views: (n, D) features of the held-out images, whose numbers are `which` (n,).
        support, labels: (S, D) features of all support images, and (S,) int64 in 0..N-1.
        scale, bias: of the logits, see `cosine_logits`.
    """
    centres, own = prototypes(support, labels), labels[which]
    count, image = labels.bincount()[own][:, None], support[which]
    rest = torch.where(count > 1, (count * centres[own] - image) / (count - 1).clamp(min=1), image)
    against_rest = scale * (F.cosine_similarity(views, rest, eps=1e-12) + bias)
    against_all = cosine_logits(views, centres, scale, bias)
    return torch.where(F.one_hot(own, len(centres)).bool(), against_rest[:, None], against_all)


def _losses(network: Network, merged: Callable[[], Merged], trial: Trial) -> Iterator[float]:
    """The loss after each of the `trial.points`, never decreasing. Between them it holds no weights."""
    network = dataclasses.replace(network, autocast=None)  # as for routing
    plain = fixed_features(network, merged().weights, trial.support)
    share = _shares(trial.labels[trial.which])

    def errors(views: Tensor, which: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
        logits = leave_one_out_logits(views, plain, trial.labels, which, scale, bias)
        found = F.cross_entropy(logits, trial.labels[which], reduction="none")
        return found.nan_to_num(torch.inf, torch.inf)  # a network without numbers is not the best

    if trial.start is None:
        weights, scale, bias = merged()
        views = plain[trial.which]
        if trial.alone.any():
            views[trial.alone] = fixed_features(network, weights, trial.held_out[trial.alone])
        yield float(share @ errors(views, trial.which, scale, bias))
        return
    worst, ball = torch.zeros_like(share), _ball(trial.epsilon)

    def moved(points: Tensor, last: bool) -> Tensor:
        """The points after a step, the last ones as they are; errors are remembered where they are the
        largest so far."""
        nonlocal worst
        weights, scale, bias = merged()
        found, slopes = [], []

        def loss_at(at: Tensor, which: Tensor) -> Tensor:
            error = errors(features(network, weights, at), which, scale, bias)
            found.append(error.detach())
            return error.sum()

        for at, which in zip(points.split(CHUNK), trial.which.split(CHUNK), strict=True):
            if last:
                with torch.no_grad():
                    loss_at(at, which)
            else:
                slopes.append(input_gradient(partial(loss_at, which=which), at))
        worst = torch.maximum(worst, torch.cat(found))
        return points if last else ball.step(points, torch.cat(slopes), trial.held_out)

    points = trial.start
    for number in range(1, trial.points + 1):
        points = moved(points, last=number == trial.points)
        yield float(share @ worst)


def _shares(labels: Tensor) -> Tensor:
    """(n,) weights of images, of sum 1, that count every class the same."""
    counts = labels.bincount()
    return 1 / ((counts > 0).sum() * counts[labels])
