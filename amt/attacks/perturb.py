"""Worst-case moves of inputs and of weights.

Sees only loss functions and tensors: no model, no episode. An attack never builds a parameter gradient,
since all it asks autograd for is the gradient with respect to the perturbation.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.settings import Perturbation

Generators = torch.Generator | Sequence[torch.Generator]

# A power of two: exact in float32, and in float16 it keeps small gradients from being flushed to zero.
_PGD_LOSS_SCALE = 2.0**10


@dataclasses.dataclass(frozen=True)
class ValueSpace:
    """The units images are in: the values of black and white, and of one whole pixel range.

    Numbers, or tensors that broadcast over (N, 3, H, W). Only comparisons with attacks that were run on
    normalised images need another space than `PIXELS`.
    """

    lower: Tensor | float = 0.0
    upper: Tensor | float = 1.0
    unit: Tensor | float = 1.0

    def clip(self, images: Tensor) -> Tensor:
        """Clip to the valid range; a value exactly at a limit passes half its gradient, as published."""
        upper = torch.as_tensor(self.upper, dtype=images.dtype, device=images.device)
        lower = torch.as_tensor(self.lower, dtype=images.dtype, device=images.device)
        return torch.maximum(torch.minimum(images, upper), lower)


PIXELS = ValueSpace()


def pyramid_start(
    images: Tensor, level: Perturbation, generator: torch.Generator, space: ValueSpace = PIXELS
) -> list[Tensor]:
    """Starting perturbations, one (N, 3, rows, columns) per grid, drawn on the CPU from `generator`."""
    n, channels, height, width = images.shape
    epsilon = level.epsilon / 255 * space.unit
    deltas = []
    for cells in level.grids:
        shape = (n, channels, cells or height, cells or width)
        if level.start == "zero":
            delta = torch.zeros(shape)
        elif level.start == "random1":
            delta = (2 * torch.rand(shape, generator=generator) - 1) * epsilon
        else:
            delta = 0.001 * torch.randn(shape, generator=generator)
        deltas.append(delta.to(images))
    return deltas


def apply_pyramid(
    images: Tensor, deltas: Sequence[Tensor], scalars: Sequence[float], space: ValueSpace = PIXELS
) -> Tensor:
    """Add each level's perturbation in turn, clipping to the valid range after every level."""
    size = images.shape[-2:]
    for delta, scalar in zip(deltas, scalars, strict=True):
        move = scalar * delta
        if move.shape[-2:] != size:
            move = F.interpolate(move, size=size, mode="nearest")
        images = space.clip(move + images)
    return images


def pyramid_step(
    loss_of: Callable[[Tensor], Tensor],
    images: Tensor,
    deltas: Sequence[Tensor],
    level: Perturbation,
    space: ValueSpace = PIXELS,
    loss_scale: float = 1.0,
) -> list[Tensor]:
    """One signed ascent step on every level at once, from a single backward pass."""
    epsilon, step = level.epsilon / 255 * space.unit, level.step_size / 255 * space.unit
    deltas = [delta.detach().requires_grad_() for delta in deltas]
    loss = loss_of(apply_pyramid(images, deltas, level.scalars, space))
    gradients = torch.autograd.grad(loss * loss_scale, deltas)
    return [
        (delta.detach() + step * gradient.sign()).clamp(-epsilon, epsilon)
        for delta, gradient in zip(deltas, gradients, strict=True)
    ]


def pyramid_attack(
    loss_of: Callable[[Tensor], Tensor],
    images: Tensor,
    deltas: Sequence[Tensor],
    level: Perturbation,
    space: ValueSpace = PIXELS,
    loss_scale: float = 1.0,
) -> Tensor:
    """The training attack of AMT: `level.steps` steps of projected ascent on a pyramid of perturbations.

    Args:
        loss_of: attacked images -> scalar to be increased, summed over the images.
        images: (N, 3, H, W) clean images in `space`.
        deltas: where to start, see `pyramid_start`.
        level: the bound, steps and pyramid.
        space: the units of `images`.
        loss_scale: multiplies the loss before its gradient is taken, so that float16 does not flush it to
            zero; the steps depend on the gradient's sign only.

    Returns:
        The attacked images (N, 3, H, W), without graph.
    """
    for _ in range(level.steps):
        deltas = pyramid_step(loss_of, images, deltas, level, space, loss_scale)
    return apply_pyramid(images, deltas, level.scalars, space).detach()


@dataclasses.dataclass(frozen=True)
class Ball:
    """The images within epsilon of given ones, in the valid range: the threat model of evaluation.

    Args:
        norm: "linf" or "l2", over all values of one image.
        epsilon: radius in pixel units, where black is 0 and white is 1.
    """

    norm: str
    epsilon: float

    def start(self, images: Tensor, generator: Generators) -> Tensor:
        """A uniformly random point of each image's ball, clipped to the valid range."""
        if self.norm == "linf":
            noise = 2 * _drawn(torch.rand, images.shape, generator) - 1
        else:
            direction = _drawn(torch.randn, images.shape, generator)
            uniform = _drawn(torch.rand, (len(images), 1, 1, 1), generator)
            noise = direction * (uniform ** (1 / images[0].numel()) / _length(direction))
        return self.project(images + noise.to(images) * self.epsilon, images)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """The valid points of the balls around `images` that are next to `points`."""
        if self.norm == "linf":
            lower, upper = (images - self.epsilon).clamp(min=0), (images + self.epsilon).clamp(max=1)
            return torch.minimum(torch.maximum(points, lower), upper)
        move = points - images
        # Clipping to the valid range moves every value towards the image, so it stays within the ball.
        return (images + move * (self.epsilon / _length(move)).clamp(max=1)).clamp(0, 1)

    def step(self, points: Tensor, gradient: Tensor, size: float, images: Tensor) -> Tensor:
        """`points` moved by `size` in the direction of steepest ascent in this norm, and projected."""
        direction = gradient.sign() if self.norm == "linf" else gradient / _length(gradient)
        return self.project(points + size * direction, images)


def _drawn(draw: Callable[..., Tensor], shape: Sequence[int], generator: Generators) -> Tensor:
    """Random numbers of a shape (n, ...), image by image where each has a generator of its own."""
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator)
    return torch.stack([draw(shape[1:], generator=each) for each in generator])


def _length(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def ascend(
    loss_of: Callable[[Tensor], Tensor],
    images: Tensor,
    points: Tensor,
    ball: Ball,
    step_size: float,
    steps: int,
) -> Tensor:
    """Projected gradient ascent that goes on to the last step with every image: the attack of training, and
    of images that are to fool another network.

    Args:
        loss_of: moved images (n, 3, H, W) -> scalar to be increased, summed over the images.
        images: (n, 3, H, W) in [0, 1], the centres of the ball.
        points: where to start; may lie outside of the valid range, as the first gradient is taken there.
        step_size: in pixel units, where black is 0 and white is 1.
        steps: gradients taken, which is all that this costs.

    Returns:
        (n, 3, H, W) in the ball and in [0, 1], without graph.
    """
    for _ in range(steps):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(points) * _PGD_LOSS_SCALE, points)
        points = ball.step(points.detach(), gradient, step_size, images)
    return points


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    generator: Generators,
    norm: str = "linf",
    loss_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent from a random start (Madry et al. 2018), the attack of evaluation.

    Stops working on an image as soon as it is misclassified, at any of the steps + 1 points looked at. That
    makes the attack at least as strong as judging the last point only, and far cheaper on networks that
    break easily.

    Args:
        logits_of: (n, 3, H, W) in [0, 1] -> (n, N), differentiable; called on subsets of the images.
        images: (Q, 3, H, W) in [0, 1].
        labels: (Q,) int64.
        epsilon, step_size: in 1/255 of the pixel range; epsilon 0 returns the images.
        steps: number of gradient steps.
        generator: CPU generators for the start, one for all images or one for each.
        norm: "linf" or "l2", of the perturbation of one image.
        loss_of: logits (n, N) of some of the images, and which they are (n,) int64 -> (n,), what is to be
            increased; None for the cross-entropy.

    Returns:
        Attacked images (Q, 3, H, W) in [0, 1] within epsilon, and whether each is misclassified (Q,) bool.
    """
    ball, step_size = Ball(norm, epsilon / 255), step_size / 255
    attacked = ball.start(images, generator)
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    active = torch.arange(len(images), device=images.device)
    for step in range(steps + 1):
        if len(active) == 0:
            break
        points = attacked[active].requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            logits = logits_of(points)
        wrong = logits.argmax(1) != labels[active]
        fooled[active] = wrong
        if step == steps:
            break
        if wrong.all():
            break
        if loss_of is None:
            loss = F.cross_entropy(logits, labels[active], reduction="sum")
        else:
            loss = loss_of(logits, active).sum()
        (gradient,) = torch.autograd.grad(loss * _PGD_LOSS_SCALE, points)
        active = active[~wrong]
        attacked[active] = ball.step(attacked[active], gradient[~wrong], step_size, images[active])
    return attacked, fooled


def perturb_weights(
    loss: Tensor, factors: dict[str, Tensor], radius: float, loss_scale: float = 1.0
) -> dict[str, Tensor]:
    """Move every factor uphill on `loss` by `radius` times its own Frobenius norm (method of AMT, ADSV).

    w' = w + radius * ||w|| / ||g|| * g with g = d loss / d w; the move itself carries no graph, so the
    gradient with respect to w' is the gradient with respect to w.

    Args:
        loss: scalar whose graph reaches every factor; its graph is freed.
        factors: named tensors that require gradients.
        radius: relative size of the move (the paper's gamma).
        loss_scale: see `pyramid_attack`; it cancels.
    """
    gradients = torch.autograd.grad(loss * loss_scale, list(factors.values()))
    return {
        name: factor + radius * (factor.detach().norm() / (gradient.norm() + 1e-20)) * gradient
        for (name, factor), gradient in zip(factors.items(), gradients, strict=True)
    }
