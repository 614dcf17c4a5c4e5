"""Adversarial meta-tuning: for each episode, for each robustness level, one step on that level's member
of the pool: a LoRA, or a complete network, which makes no difference here.

All P levels of an episode go through the network together: the images of one level after those of the other,
each by that level's weights, so that a pass is a pass whatever P. Nothing crosses from level to level, and
each has its own random start, optimiser and loss scale: the same as one level after the other.

Per episode (AMT, sections 3.2 and 3.3), with K attack steps:

    support features -> prototypes                    1 support forward, graph kept
    clean query logits                                1 query forward, graph kept: target of the attack,
                                                      and clean term of the weight perturbation
    pyramid attack on the query                       K query forwards, each with one input gradient
    move of the singular factors                      1 query forward on the attacked images
    natural + beta * robust loss at the moved factors 2 query forwards
    SGD step on the unmoved factors

So K + 4 query forwards of P levels. Gradients reach the factors through the moved weights (queries) and the
unmoved ones (support). That is the method "adsv"; two baselines take its place in the same loop:

    "querying"    adversarial querying (Goldblum, Fowl and Goldstein 2020, arxiv.org/abs/1910.00982): the
                  loss is that of the attacked queries; the support set is clean, the weights stay in place
    "standard"    plain meta-tuning on clean images; with complete networks this is the meta-training of
                  P>M>F (Hu et al. 2022, arxiv.org/abs/2204.07305)

The loss "features" takes the place of the labels': see `feature_outcome`.

Here is what one episode asks for; amt/training/tuner.py takes the steps. Knows no files and no optimiser.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.constants import constant
from amt.attacks.levels import Perturbation
from amt.attacks.losses import cross_entropy_sum, kl_sum, squared_distance_sum
from amt.attacks.perturb import perturb_weights
from amt.models.head_settings import default_head
from amt.models.heads import Fitted, detached, fit, stacked
from amt.models.network import Network, features, level_features
from amt.models.pool import Pool
from amt.models.weights import Weights
from amt.training.attack import attacked_queries
from amt.training.losses import RobustLoss, robust_loss
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode


class QueryOutcome(NamedTuple):
    """The forward passes of P levels: the losses (P,), and the logits (P, Q, N) of clean and attacked queries
    behind them."""

    loss: RobustLoss
    clean: Tensor
    attacked: Tensor


def query_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor],
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """The dual-perturbation loss of every member on one episode ("adsv"; AMT, sections 3.2 and 3.3), with
    graph to its factors and scale.

    Args:
        pool: P members whose factors and scale require gradients, and their levels, which have grids, scalars
            and steps in common.
        start: the attack's start on the queries of all levels (P Q, 3, H, W), see `started`.
        loss_scale: scales the losses whose gradients steer the two perturbations, so that float16 does not
            flush them to zero: a number, or one for each level (P,).
        head: what classifies the queries, see `TuneSettings`.
    """
    # The support has no part in the move of the weights: there its head is settled.
    heads, weights, settled, still = _fitted_to_support(network, pool, episode, head)
    query = _for_each(pool, episode.query)
    clean = level_features(network, weights, query)
    target = settled(clean).detach()

    def divergence(seen: Tensor, which: slice) -> Tensor:
        return kl_sum(target[:, which], settled(seen))

    images = attacked_queries(network, pool.levels, still, divergence, query, start, loss_scale)
    attacked = level_features(network, weights, images)
    beta = _numbers(pool.levels, "beta", target)
    if _weights_move(pool):
        uphill = robust_loss(settled(clean), settled(attacked), episode.query_labels, beta)
        weights = _moved(network, pool, loss_scale * uphill.total)
        both = level_features(network, weights, torch.cat([query, images], dim=1))
        clean, attacked = both.chunk(2, dim=1)
    clean_logits, attacked_logits = _classified(heads, clean), _classified(heads, attacked)
    loss = robust_loss(clean_logits, attacked_logits, episode.query_labels, beta)
    return QueryOutcome(loss, clean_logits, attacked_logits)


def querying_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor],
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """Adversarial querying: cross-entropy of the attacked queries alone, the support set clean.

    The attack increases the cross-entropy with the true labels, under weights and prototypes as they are.
    Arguments as of `query_outcome`, queries (Q, 3, H, W); the levels' `gamma` and `beta` are not used.
    """
    heads, weights, settled, still = _fitted_to_support(network, pool, episode, head)
    query = _for_each(pool, episode.query)

    def mistakes(seen: Tensor, which: slice) -> Tensor:
        return cross_entropy_sum(settled(seen), episode.query_labels[which])

    images = attacked_queries(network, pool.levels, still, mistakes, query, start, loss_scale)
    attacked = _classified(heads, level_features(network, weights, images))
    with torch.no_grad():
        clean = settled(level_features(network, still, query))  # for the record: nothing is learnt from it
    return QueryOutcome(_cross_entropy_alone(attacked, episode.query_labels), clean, attacked)


def natural_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor] | None = None,
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """Plain meta-tuning: cross-entropy of the clean queries, support and query under the same weights.

    Queries are (Q, 3, H, W). Nothing is attacked, so levels, start and loss_scale are not used.
    """
    images = _for_each(pool, torch.cat([episode.support, episode.query]))
    both = level_features(network, _weights(network, pool), images)
    support, query = both.split([len(episode.support), len(episode.query)], dim=1)
    clean = _classified(_fit(pool, head, support, episode.support_labels), query)
    return QueryOutcome(_cross_entropy_alone(clean, episode.query_labels), clean, clean)


def feature_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor],
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
    *,
    moves: bool = True,
) -> QueryOutcome:
    """Features of attacked queries stay where the pretrained network, `network.weights`, has those of the
    clean ones: unsupervised, FARE (Schlarmann et al. 2024, arxiv.org/abs/2402.12336).

    loss = 1/Q sum_i max_delta ||f(x_i + delta) - f_pretrained(x_i)||^2, which the attack increases as well.
    Arguments as of `query_outcome`, queries (Q, 3, H, W); `beta` is not used, support and head serve the
    record alone. With `moves` the weights move uphill on the same loss, which is ours.
    """
    query = _for_each(pool, episode.query)
    with torch.no_grad():
        anchor = features(network, network.weights, episode.query)
        _, _, settled, still = _fitted_to_support(network, pool, episode, head)
        clean = level_features(network, still, query)

    def away(seen: Tensor, which: slice) -> Tensor:
        return squared_distance_sum(seen, anchor[which])

    images = attacked_queries(network, pool.levels, still, away, query, start, loss_scale)
    weights = _weights(network, pool)
    attacked = level_features(network, weights, images)
    if moves and _weights_move(pool):
        weights = _moved(network, pool, loss_scale * squared_distance_sum(attacked, anchor))
        attacked = level_features(network, weights, images)
    near, far = (squared_distance_sum(each, anchor) / len(anchor) for each in (clean, attacked))
    return QueryOutcome(RobustLoss(far, near, far), settled(clean), settled(attacked.detach()))


OUTCOMES = {"adsv": query_outcome, "querying": querying_outcome, "standard": natural_outcome}


def outcome_of(settings: TuneSettings) -> Callable[..., QueryOutcome]:
    """What a method and a loss make of an episode; arguments as of `query_outcome`."""
    if settings.loss == "features":
        return functools.partial(feature_outcome, moves=settings.method == "adsv")
    return OUTCOMES[settings.method]


def _for_each(pool: Pool, images: Tensor) -> Tensor:
    """The same images (N, 3, H, W) for every member: (P, N, 3, H, W)."""
    return images.expand(len(pool), *images.shape)


def _weights(network: Network, pool: Pool) -> Weights:
    """Weights of all members for `level_features`, with graph to every factor."""
    return network.cast(pool.stack(apart=network.takes_factors))


def _weights_move(pool: Pool) -> bool:
    return any(level.gamma > 0 for level in pool.levels)


def _moved(network: Network, pool: Pool, losses: Tensor) -> Weights:
    """Weights of all members moved uphill on the losses (P,), whose graph is freed."""
    gamma = _numbers(pool.levels, "gamma", pool.scale)
    return _weights(network, pool.with_factors(perturb_weights(losses.sum(), pool.factors, gamma)))


def _numbers(levels: Sequence[Perturbation], name: str, like: Tensor) -> Tensor:
    """One number of every level: (P,), on the device of `like`."""
    return constant(tuple(getattr(level, name) for level in levels), like)


def _fit(pool: Pool, head: str | None, support: Tensor, labels: Tensor) -> list[Fitted]:
    """The head of every member fitted to its support features (P, S, D), with graph; the scale is the one
    that is trained."""
    kind = default_head(head)
    own = zip(support, pool.scale.split(1), pool.bias.split(1), strict=True)
    return [fit(kind, seen, labels, scale=scale, bias=bias) for seen, scale, bias in own]


def _classified(heads: list[Fitted], queries: Tensor) -> Tensor:
    """Logits (P, Q, N) of features (P, Q, D), head by head: their gradients are then those of each alone."""
    return torch.stack([fitted(seen) for fitted, seen in zip(heads, queries, strict=True)])


def _fitted_to_support(
    network: Network, pool: Pool, episode: Episode, head: str | None
) -> tuple[list[Fitted], Weights, Fitted, Weights]:
    """All members fitted to the support set: heads with graph; weights with a graph of their own for the
    queries; and without graph all heads as one, and the weights, for the attack."""
    weights = _weights(network, pool)
    support = level_features(network, weights, _for_each(pool, episode.support))
    heads = _fit(pool, head, support, episode.support_labels)
    settled = stacked([detached(fitted) for fitted in heads])
    if not network.takes_factors:  # the weight perturbation frees the graph of the merged weights
        weights = _weights(network, pool)
    still = network.cast({name: weights[name].detach() for name in pool.shapes})
    return heads, weights, settled, still


def _cross_entropy_alone(logits: Tensor, labels: Tensor) -> RobustLoss:
    loss = cross_entropy_sum(logits, labels) / len(labels)
    return RobustLoss(loss, loss, torch.zeros_like(loss))


def started(
    levels: Sequence[Perturbation], query: Tensor, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """The attack's start on the queries (Q, 3, H, W) at P levels, from a CPU generator for each: (P Q, 3,
    rows, columns) for every grid."""
    shape = torch.empty(query.shape)
    drawn = [
        level.pyramid.start(shape, generator) for level, generator in zip(levels, generators, strict=True)
    ]
    return [torch.cat(grid).to(query) for grid in zip(*drawn, strict=True)]


def drawn_levels(
    levels: Sequence[Perturbation], least: float | None, generators: Sequence[torch.Generator]
) -> Sequence[Perturbation]:
    """The levels with epsilons drawn uniformly from `least` to their own, each by a CPU generator; with None
    as they are, and nothing is drawn."""
    if least is None:
        return levels
    shares = [float(torch.rand((), generator=generator)) for generator in generators]
    return [level.between(least, share) for level, share in zip(levels, shares, strict=True)]
