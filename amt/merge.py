"""Test-time merging: which adapters a new task gets, decided from its support set alone.

The published rule scores every adapter by how compact it makes the support classes and how far apart:

    intra_p = mean_c mean_{i in c} cos(i, prototype_c)
    inter_p = mean_c mean_{i in c} 1/(N-1) sum_{c' != c} cos(i, prototype_c')
    u_p     = exp(beta * (gamma * intra_p - (1 - gamma) * inter_p) - beta)

and shares the weight among the top k adapters in proportion to u (AMT, section 3.4). No query image and no
query label can be seen from here: `route` is not given any.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.backbone import Backbone, features
from amt.lora import LoRAPool
from amt.perturb import Perturbation, pyramid_attack, pyramid_start
from amt.protonet import cosine_logits, prototypes

Coefficients = tuple[float, ...]

VIEWS = ("augmented", "attacked")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How support scores become merging coefficients.

    Args:
        beta, gamma: sharpness and balance, as in the module's docstring (the published blend_beta and
            blend_gamma).
        top_k: how many adapters share the weight.
        view: what is compared with the prototypes: "augmented" support images, as published, or "attacked"
            ones, a variant of ours that scores robust compactness.
        augment_probability: chance that the augmented view is augmented at all; 0 compares the support
            with itself.
        attack: for the attacked view, how the support is attacked.
    """

    beta: float = 1.0
    gamma: float = 0.6
    top_k: int = 2
    view: str = "augmented"
    augment_probability: float = 0.9
    attack: Perturbation = Perturbation(8, 2, steps=5, grids=(0,), scalars=(1.0,), start="random1")  # noqa: RUF009


def route(
    backbone: Backbone,
    pool: LoRAPool,
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    routing: Routing,
) -> Coefficients:
    """Merging coefficients of a task, one per adapter, summing to 1.

    Args:
        support: (S, 3, H, W) in [0, 1].
        labels: (S,) int64 in 0..N-1.
        generator: a CPU generator for the augmentation or the attack's start.
    """
    intra, inter = compactness(support_cosines(backbone, pool, support, labels, generator, routing), labels)
    return blend(intra, inter, routing)


def support_cosines(
    backbone: Backbone,
    pool: LoRAPool,
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    routing: Routing,
) -> Tensor:
    """(P, S, N) cosines, for every adapter alone, of the support's views with the support's prototypes."""
    backbone = dataclasses.replace(backbone, autocast=None)  # scores differ in the third digit: keep float32
    n_way = int(labels.max()) + 1
    augmented = support
    if routing.view == "augmented" and torch.rand((), generator=generator) < routing.augment_probability:
        augmented = backbone.denormalise(augment(backbone.normalise(support), generator))
    cosines = []
    for p in range(len(pool)):
        adapter = pool[p]
        weights = adapter.merge((1.0,))
        with torch.no_grad():
            plain = features(backbone, weights, support)
            centres = prototypes(plain, labels, n_way)
        if routing.view == "attacked":

            def loss_of(images: Tensor, weights=weights, centres=centres, scale=adapter.scale) -> Tensor:
                logits = cosine_logits(features(backbone, weights, images), centres, scale)
                return F.cross_entropy(logits, labels, reduction="sum")

            start = pyramid_start(support, routing.attack, generator)
            view = pyramid_attack(loss_of, support, start, routing.attack)
        else:
            view = augmented
        with torch.no_grad():
            seen = plain if view is support else features(backbone, weights, view)
            cosines.append(cosine_logits(seen, centres))
    return torch.stack(cosines)


def compactness(cosines: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class-balanced intra- and inter-class cosines: (P, S, N) and (S,) int64 -> (P,), (P,)."""
    n_way = cosines.shape[-1]
    member = F.one_hot(labels, n_way).to(cosines.dtype)
    share = (member / member.sum(0)).sum(1) / n_way  # weight of an image: its class counts as one of N
    own = (cosines * member).sum(-1)
    others = (cosines.sum(-1) - own) / max(n_way - 1, 1)
    return own @ share, others @ share


def blend(intra: Tensor, inter: Tensor, routing: Routing) -> Coefficients:
    """Coefficients from the scores (P,), (P,): exponential weights of the top k, normalised."""
    score = (routing.gamma * intra - (1 - routing.gamma) * inter).double()
    # Of equal scores (one shot, gamma 1) the first count; topk would leave that open.
    values, order = (each[: routing.top_k] for each in score.sort(descending=True, stable=True))
    # exp(beta * score - beta) over its sum is a softmax, which does not underflow at a large beta.
    shares = torch.zeros_like(score).scatter(0, order, (routing.beta * values).softmax(0))
    return tuple(shares.tolist())


def uniform(pool: LoRAPool) -> Coefficients:
    """The same share for every adapter."""
    return average_of(pool, range(len(pool)))


def average_of(pool: LoRAPool, adapters) -> Coefficients:
    """The plain average of some adapters, by their numbers."""
    chosen = set(adapters)
    return tuple(1 / len(chosen) if p in chosen else 0.0 for p in range(len(pool)))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """The published differentiable augmentation of normalised images (N, 3, H, W); nothing is clamped.

    The batch is flipped as a whole half of the time; then brightness +-0.5, saturation x U[0, 2], contrast
    x U[0.5, 1.5] and a translation of up to an eighth of the side, filled with zeros, image by image.
    """
    n, _, height, width = images.shape

    def uniform_numbers() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator).to(images)

    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(3)
    images = images + uniform_numbers() - 0.5
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * uniform_numbers()) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (uniform_numbers() + 0.5) + mean
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
