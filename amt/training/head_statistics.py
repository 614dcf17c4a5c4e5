"""What a head may know besides the support, measured once after meta-training: two covariances for every
member of a pool and for the pretrained network.

    source    within-class covariance of clean features, pooled over the classes of all episodes
    attack    second moment of f(x + delta) - f(x), where delta comes from PGD on the queries, 10 steps
              within 8/255, against the prototypes of the support

Episodes are of TRAIN classes of the meta-training source. Sums are in float64 and every image has a random
start of its own, so the result depends on no batch size. Knows no file.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.perturb import Ball, ascend
from amt.models.heads import Cosine, PoolStatistics, Statistics, index_in_class, prototypes, within_class
from amt.models.network import CHUNK, Network, features, fixed_features
from amt.models.pool import Pool
from amt.models.weights import Merged, stream
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

EPSILON, STEPS = 8 / 255, 10  # of the attack
MOST = 100  # queries of an episode that are attacked, classes in turn

Networks = Sequence[Callable[[], Merged]]


def measure_statistics(
    network: Network, pool: Pool, pretrained: Merged, episodes: Iterable[Episode], seed: int
) -> PoolStatistics:
    """The statistics of every member of a pool and of the pretrained network, float32 on the CPU.

    Args:
        network: the structure, in float32; pool and episodes are on its device.
        pretrained: the weights that the pool was tuned from, see `classifier.pretrained`.
        episodes: of TRAIN classes; gone through once.
        seed: decides, with an episode's place, the attack's random starts.

    Raises InputError as `covariances`.
    """
    members = [functools.cache(functools.partial(pool[p].merged, (1.0,))) for p in range(len(pool))]
    *own, plain = covariances(network, [*members, lambda: pretrained], episodes, seed)
    source, attack = (torch.stack(matrices) for matrices in zip(*own, strict=True))
    return PoolStatistics(source, attack, plain)


def covariances(
    network: Network, networks: Networks, episodes: Iterable[Episode], seed: int
) -> list[Statistics]:
    """Two covariances for each of `networks`, (D, D) float32 on the CPU. Arguments as of
    `measure_statistics`. Raises InputError if there is no episode, too few images for a covariance, or one
    that is not finite."""
    nothing = torch.zeros((), dtype=torch.float64, device=network.device)
    sums = [[nothing, nothing] for _ in networks]
    freedom = moved = 0
    for number, episode in enumerate(episodes):
        images = torch.cat([episode.support, episode.query])
        labels = torch.cat([episode.support_labels, episode.query_labels])
        which = _some(episode.query_labels, episode.n_way)
        for k, merged in enumerate(networks):
            found = fixed_features(network, merged().weights, images)
            sums[k][0] = sums[k][0] + within_class(found.double(), labels)
            moves = displacement(network, merged(), episode, found, which, (seed, number)).double()
            sums[k][1] = sums[k][1] + moves.T @ moves
        freedom += len(labels) - episode.n_way
        moved += len(which)
    if freedom < 1:
        raise InputError("no statistics for the heads without TRAIN episodes of several images per class")
    found = [
        Statistics(*(_plain(each / n) for each, n in zip(pair, (freedom, moved), strict=True)))
        for pair in sums
    ]
    if not all(matrix.isfinite().all() for each in found for matrix in each):
        raise InputError("no statistics for the heads of a network whose features are not finite or huge")
    return found


def displacement(
    network: Network, merged: Merged, episode: Episode, found: Tensor, which: Tensor, key: tuple[int, int]
) -> Tensor:
    """Feature of the attacked image minus feature of the clean one: (n, D) for n queries of an episode.

    Args:
        found: (S + Q, D), clean features of support and query.
        which: (n,) int64, the queries that are attacked.
        key: decides the random starts, with a query's number.
    """
    weights, scale, bias = merged
    n_support = len(episode.support)
    head = Cosine(prototypes(found[:n_support], episode.support_labels), scale, bias)
    ball, moves = Ball("linf", EPSILON, EPSILON / 4), []
    for part in which.split(CHUNK):
        images, labels = episode.query[part], episode.query_labels[part]

        def loss_of(moved: Tensor, labels=labels) -> Tensor:
            return F.cross_entropy(head(features(network, weights, moved)), labels, reduction="sum")

        start = ball.start(images, [stream(*key, 6, number) for number in part.tolist()])
        attacked = ascend(loss_of, images, start, ball, STEPS)
        moves.append(fixed_features(network, weights, attacked) - found[n_support + part])
    return torch.cat(moves)


def _some(labels: Tensor, n_way: int) -> Tensor:
    """The numbers of at most `MOST` queries, classes in turn, increasing: (n,) int64."""
    return (index_in_class(labels) * n_way + labels).argsort()[:MOST].sort().values


def _plain(matrix: Tensor) -> Tensor:
    return ((matrix + matrix.T) / 2).float().cpu()
