"""The attack on an episode's queries, at all levels together."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.attacks.perturb import Pyramid, ascend
from amt.models.compiled import Compiler


def attacked_queries(
    levels: Sequence[Perturbation],
    loss_of: Callable[[Tensor, slice], Tensor],
    query: Tensor,
    start: Sequence[Tensor],
    most: int | None = None,
    compiler: Compiler | None = None,
) -> Tensor:
    """Queries (P, Q, 3, H, W), each moved within its level's bounds to raise the loss.

    Args:
        levels: P, with grids, scalars and steps in common.
        loss_of: images (P, n, 3, H, W), and which of the Q they are -> scalar, summed over levels and images.
        query: in [0, 1], of every level.
        start: for each grid (P Q, 3, rows, columns), see `meta_tune.started`.
        most: queries of a level that are attacked at once; None for all.
        compiler: makes one program of an attack step, after a pass of the network has gone; None for none.
    """
    count = query.shape[1]
    compiled = None if compiler is None else partial(compiler, repeated=True)
    grids = [delta.unflatten(0, query.shape[:2]) for delta in start]

    def part(which: slice) -> Tensor:
        some = query[:, which]
        images, deltas = some.flatten(0, 1), [grid[:, which].flatten(0, 1) for grid in grids]
        pyramid = Pyramid.joined([level.pyramid for level in levels], images)

        def loss_at(moved: Tensor) -> Tensor:
            return loss_of(moved.view(some.shape), which)

        steps = levels[0].steps
        found = ascend(loss_at, images, deltas, pyramid, steps, loss_scale=1.0, compiled=compiled)
        return found.view(some.shape)

    at_once = most or count
    found = [part(slice(first, first + at_once)) for first in range(0, count, at_once)]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]
