"""Test-time merging: choose the adapters for a new task from its support set alone.

The published rule scores every adapter by how compact and how far apart the support classes are:

    intra_p = mean_c mean_{i in c} cos(i, prototype_c)
    inter_p = mean_c mean_{i in c} 1/(N-1) sum_{c' != c} cos(i, prototype_c')
    u_p     = exp(beta * (gamma * intra_p - (1 - gamma) * inter_p) - beta)

and shares the weight among the top k adapters in proportion to u (AMT, section 3.4). There i is a clean
support image, augmented. Ours attacks it instead, and so scores an adapter under attack. `route` is given no
query image and no query label.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.perturb import Pyramid, ascend
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import CHUNK, Network, features, fixed_features
from amt.models.pool import Pool
from amt.models.weights import Coefficients, Weights
from amt.tasks.settings import AUGMENTATIONS, Routing
from meta_dataset_readers.errors import InputError

Members = Callable[[int], Weights]  # the complete weights of a pool's member, by its number


def route(
    network: Network,
    pool: Pool,
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    routing: Routing,
    members: Members | None = None,
) -> Coefficients:
    """Merging coefficients of a task, one per adapter, summing to 1.

    Args:
        support, labels: (S, 3, H, W) in [0, 1], and (S,) int64 in 0..N-1.
        generator: a CPU generator for the augmentation or the attack's start; left as it was.
        members: `kept_members(pool)` to route many tasks.

    >>> shares = route(network, pool, images, labels, torch.Generator(), Routing())
    >>> len(shares), round(sum(shares), 6)
    (2, 1.0)
    """
    (coefficients,) = route_each(network, pool, support, labels, generator, [routing], members)
    return coefficients


def route_each(
    network: Network,
    pool: Pool,
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    routings: Sequence[Routing],
    members: Members | None = None,
) -> list[Coefficients]:
    """The coefficients of `route` for each of `routings`; what they have in common is computed once. Support
    is (S, 3, H, W), labels (S,)."""
    by_view = {routing.view: routing for routing in routings}
    views = list(by_view.values())
    cosines = support_cosines(network, pool, support, labels, generator, views, members)
    scores = {view: compactness(found, labels) for view, found in zip(by_view, cosines, strict=True)}
    return [blend(*scores[routing.view], routing) for routing in routings]


def support_cosines(
    network: Network,
    pool: Pool,
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    routings: Sequence[Routing],
    members: Members | None = None,
) -> list[Tensor]:
    """For each of `routings` the cosines (P, S, N) of the support's views with the support's prototypes, for
    every adapter alone. The prototypes are computed once. Arguments as of `route`.
    """
    network = dataclasses.replace(network, autocast=None)  # scores differ in the third digit: keep float32
    # Each view draws what it would draw alone.
    generators = [generator.clone_state() for _ in routings]
    augmented = [
        _augmented(network, support, draws, routing)
        for routing, draws in zip(routings, generators, strict=True)
    ]
    cosines: list[list[Tensor]] = [[] for _ in routings]
    for p in range(len(pool)):
        weights = _alone(pool, p) if members is None else members(p)
        plain = fixed_features(network, weights, support)
        centres = prototypes(plain, labels)

        def logits_of(images: Tensor, weights=weights, centres=centres, scale=pool.scale[p]) -> Tensor:
            return cosine_logits(features(network, weights, images), centres, scale)

        for k, routing in enumerate(routings):
            view = augmented[k]
            if routing.epsilon > 0:
                view = _attacked(logits_of, support, labels, routing, generators[k])
            seen = plain if view is support else fixed_features(network, weights, view)
            cosines[k].append(cosine_logits(seen, centres))
    return [torch.stack(found) for found in cosines]


def kept_members(pool: Pool) -> Members:
    """A function that merges each member once, which saves a fifth of the time of routing with one image per
    class, and takes the memory of P networks."""
    return functools.cache(functools.partial(_alone, pool))


def _alone(pool: Pool, p: int) -> Weights:
    return pool[p].merge((1.0,))


def _augmented(network: Network, support: Tensor, generator: torch.Generator, routing: Routing) -> Tensor:
    """The published view of the support: augmented, or sometimes the support itself."""
    if routing.epsilon > 0 or torch.rand((), generator=generator) >= routing.augment_probability:
        return support
    return network.denormalise(augment(network.normalise(support), generator))


def _attacked(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    routing: Routing,
    generator: torch.Generator,
) -> Tensor:
    """Images within routing.epsilon that increase the cross-entropy with their labels."""
    grid = Pyramid(routing.epsilon / 255, routing.epsilon / 255 / 4)
    (start,) = grid.start(images, generator)
    found = []
    for part, own, begin in zip(images.split(CHUNK), labels.split(CHUNK), start.split(CHUNK), strict=True):

        def loss_of(moved: Tensor, own=own) -> Tensor:
            return F.cross_entropy(logits_of(moved), own, reduction="sum")

        found.append(ascend(loss_of, part, [begin], grid, routing.steps))
    return torch.cat(found)


def compactness(cosines: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class-balanced intra- and inter-class cosines: (P, S, N) and (S,) int64 -> (P,), (P,)."""
    n_way = cosines.shape[-1]
    member = F.one_hot(labels, n_way).to(cosines.dtype)
    share = (member / member.sum(0)).sum(1) / n_way  # weight of an image: its class counts as one of N
    own = (cosines * member).sum(-1)
    others = (cosines.sum(-1) - own) / max(n_way - 1, 1)
    return own @ share, others @ share


def blend(intra: Tensor, inter: Tensor, routing: Routing) -> Coefficients:
    """Coefficients from the scores (P,), (P,): exponential weights of the top k, normalised. Raises an
    `InputError` if a score is not finite."""
    # A few numbers: one read of the device serves the check and what they become.
    scores = (routing.gamma * intra - (1 - routing.gamma) * inter).double().tolist()
    if broken := [p for p, value in enumerate(scores) if not math.isfinite(value)]:
        raise InputError(f"adapter {broken[0]}: its features are not finite; --coefficients can leave it out")
    score = torch.tensor(scores, dtype=torch.float64)
    # Of equal scores (one shot, gamma 1) the first count; topk does not define an order.
    values, order = (each[: routing.top_k] for each in score.sort(descending=True, stable=True))
    # exp(beta * score - beta) over its sum is a softmax, which does not underflow at a large beta.
    shares = torch.zeros_like(score).scatter(0, order, (routing.beta * values).softmax(0))
    return tuple(shares.tolist())


def uniform(pool: Pool) -> Coefficients:
    """The same share for every adapter."""
    return average_of(pool, range(len(pool)))


def average_of(pool: Pool, adapters: Iterable[int]) -> Coefficients:
    """Coefficients of the plain average of some adapters, by their numbers."""
    chosen = set(adapters)
    return tuple(1 / len(chosen) if p in chosen else 0.0 for p in range(len(pool)))


def soup(pool: Pool) -> Pool:
    """A pool of one member whose factors, scale and bias are the means over all members.

    For LoRAs that is W_res + mean(B) mean(A), which differs from their uniform merge; for complete sets of
    weights the two agree.
    """
    means = {name: factor.mean(0, keepdim=True) for name, factor in pool.factors.items()}
    return dataclasses.replace(
        pool[0].with_factors(means), scale=pool.scale.mean()[None], bias=pool.bias.mean()[None]
    )


def augment(images: Tensor, generator: torch.Generator, kinds: Sequence[str] = AUGMENTATIONS) -> Tensor:
    """The published differentiable augmentation of normalised images (N, 3, H, W); nothing is clamped.

    The batch is flipped as a whole half of the time. Then image by image, for each of `kinds`: "color",
    brightness +-0.5, saturation x U[0, 2] and contrast x U[0.5, 1.5]; "translation" of up to an eighth of the
    side, filled with zeros.
    """
    n, _, height, width = images.shape

    def uniform_numbers() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator).to(images)

    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(3)
    if "color" in kinds:
        images = images + uniform_numbers() - 0.5
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * (2 * uniform_numbers()) + grey
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (uniform_numbers() + 0.5) + mean
    if "translation" not in kinds:
        return images
    reach_y, reach_x = int(height / 8 + 0.5), int(width / 8 + 0.5)
    shift_y = torch.randint(-reach_y, reach_y + 1, (n,), generator=generator).tolist()
    shift_x = torch.randint(-reach_x, reach_x + 1, (n,), generator=generator).tolist()
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y))
    return torch.stack(
        [
            image[:, reach_y + y : reach_y + y + height, reach_x + x : reach_x + x + width]
            for image, y, x in zip(padded, shift_y, shift_x, strict=True)
        ]
    )
