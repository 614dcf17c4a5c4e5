"""The attack on an episode's queries, at all levels together."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.attacks.perturb import Pyramid, ascend
from amt.models.network import Network, level_features
from amt.models.weights import Weights


def attacked_queries(
    network: Network,
    levels: Sequence[Perturbation],
    weights: Weights,
    loss_of: Callable[[Tensor, slice], Tensor],
    query: Tensor,
    start: Sequence[Tensor],
    loss_scale: Tensor | float,
) -> Tensor:
    """Queries (P, Q, 3, H, W), each moved within its level's bounds to raise the loss of its features, at
    most `network.micro_batch` of a level at once.

    Args:
        levels: P, with grids, scalars and steps in common.
        weights: of the P networks, without graph, see `level_features`.
        loss_of: features (P, n, D), and which of the Q they are -> losses (P,), summed over the n.
        query: in [0, 1], of every level.
        start: for each grid (P Q, 3, rows, columns), see `meta_tune.started`.
        loss_scale: of the losses, a number or (P,).
    """
    count = query.shape[1]
    # One program of an attack step, after a pass of the network has gone.
    compiled = None if network.compiler is None else partial(network.compiler, repeated=True)
    grids = [delta.unflatten(0, query.shape[:2]) for delta in start]

    def part(which: slice) -> Tensor:
        some = query[:, which]
        images, deltas = some.flatten(0, 1), [grid[:, which].flatten(0, 1) for grid in grids]
        pyramid = Pyramid.joined([level.pyramid for level in levels], images)

        def loss_at(moved: Tensor) -> Tensor:
            seen = level_features(network, weights, moved.view(some.shape))
            return (loss_scale * loss_of(seen, which)).sum()

        steps = levels[0].steps
        found = ascend(loss_at, images, deltas, pyramid, steps, loss_scale=1.0, compiled=compiled)
        return found.view(some.shape)

    at_once = network.micro_batch or count
    found = [part(slice(first, first + at_once)) for first in range(0, count, at_once)]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]
