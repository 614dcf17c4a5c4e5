"""Worst-case moves of inputs and of weights: one ascent for all attacks, in two geometries.

    points  ->  gradient of the loss at them  ->  a step, projected  ->  points  ...

    Ball        points are images, within epsilon of the given ones: evaluation, AutoLoRa
    Pyramid     points are perturbations, one per grid, added to the images: AMT's meta-training

`ascend` goes on to the last step with every image; `pgd` leaves out those that are fooled. Sees only loss
functions and tensors: no model, no episode. An attack never builds a parameter gradient, since all it asks
autograd for is the gradient with respect to the points.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.constants import constant
from amt.attacks.losses import misclassified

Generators = torch.Generator | Sequence[torch.Generator]

# A power of two: exact in float32, and in float16 it keeps small gradients from being flushed to zero.
LOSS_SCALE = 2.0**10
PATIENCE = 4  # steps of `pgd` on a GPU from one count of the images that are left to the next


def input_gradient(loss_of: Callable[[Any], Tensor | None], points: Any) -> Any:
    """d loss / d points, and no other gradient, whether or not gradients are enabled.

    Args:
        loss_of: points -> scalar; None ends the attack.
        points: a tensor of any shape, or a list of tensors.

    Returns:
        Gradients in the form of `points`; None if the loss is None.
    """
    single = isinstance(points, Tensor)
    leaves = [each.detach().requires_grad_() for each in ([points] if single else points)]
    with torch.enable_grad():
        loss = loss_of(leaves[0] if single else leaves)
    if loss is None:
        return None
    found = torch.autograd.grad(loss, leaves)
    return found[0] if single else list(found)


def ascend(
    loss_of: Callable[[Tensor], Tensor],
    images: Tensor,
    points: Any,
    geometry: "Ball | Pyramid",
    steps: int,
    loss_scale: float = LOSS_SCALE,
    compiled: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None,
) -> Tensor:
    """Projected gradient ascent that goes on to the last step with every image.

    Args:
        loss_of: attacked images (n, 3, H, W) -> scalar to be increased, summed over the images.
        images: (n, 3, H, W) in [0, 1], clean.
        points: where to start, for a ball perhaps outside of the valid range; see `Ball.start`,
            `Pyramid.start`.
        loss_scale: multiplies the loss before its gradient is taken, so that float16 does not flush it to
            zero; a power of two, so that it changes no step otherwise.
        compiled: makes one program of a step, points -> points; None leaves it as it is.

    Returns:
        Attacked images (n, 3, H, W) in [0, 1], without graph.
    """

    def scaled_loss(at: Any) -> Tensor:
        return loss_scale * loss_of(geometry.apply(at, images))

    def step(at: Any) -> Any:
        return geometry.step(at, input_gradient(scaled_loss, at), images)

    one_step = step if compiled is None else compiled(step)
    for _ in range(steps):
        points = one_step(points)
    return geometry.apply(points, images).detach()


@dataclasses.dataclass(frozen=True)
class Ball:
    """The images within epsilon of given ones, in the valid range: the threat model of evaluation.

    Args:
        norm: "linf" or "l2", over all values of one image.
        epsilon: radius in pixel units, where black is 0 and white is 1.
        step_size: of ascent, in pixel units.
    """

    norm: str
    epsilon: float
    step_size: float

    def start(self, images: Tensor, generator: Generators) -> Tensor:
        """A uniformly random point of each image's ball, clipped to the valid range: (n, 3, H, W) in [0, 1].
        CPU generators, one for all images or one for each."""
        if self.norm == "linf":
            noise = uniform_noise(images.shape, generator)
        else:
            direction = _drawn(torch.randn, images.shape, generator)
            uniform = _drawn(torch.rand, (len(images), 1, 1, 1), generator)
            noise = direction * (uniform ** (1 / images[0].numel()) / _length(direction))
        return self.project(images + noise.to(images) * self.epsilon, images)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """Project `points` to the valid part of the balls around `images`; all (n, 3, H, W)."""
        if self.norm == "linf":
            lower, upper = (images - self.epsilon).clamp(min=0), (images + self.epsilon).clamp(max=1)
            return torch.minimum(torch.maximum(points, lower), upper)
        move = points - images
        # Clipping to the valid range moves every value towards the image, so it stays within the ball.
        return (images + move * (self.epsilon / _length(move)).clamp(max=1)).clamp(0, 1)

    def apply(self, points: Tensor, images: Tensor) -> Tensor:
        """The points (n, 3, H, W) as they are: they are images."""
        return points

    def step(self, points: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Move `points` by `step_size` in the direction of steepest ascent in this norm, and project them;
        all tensors are (n, 3, H, W)."""
        direction = gradient.sign() if self.norm == "linf" else gradient / _length(gradient)
        return self.project(points + self.step_size * direction, images)


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """The perturbations of AMT's meta-training (section 3.2): grids of values, added to an image in turn.

    Grid l holds one value per channel and cell of a `grids[l]` x `grids[l]` grid (0: one cell per pixel),
    bounded by epsilon and multiplied by `scalars[l]`; the image is clipped after each. Points are a list of
    tensors (n, 3, rows, columns), one per grid.

    Args:
        epsilon: bound of every value.
        step_size: of signed ascent.
        grids, scalars: as above; the default is ordinary PGD, clipped inside of the graph.
        noise: of the start, "zero", "random1" (uniform within epsilon) or "random2" (0.001 times a standard
            normal).

    Units are pixels from 0 to 1. Epsilon and step size may be tensors that broadcast over (n, 3, H, W).
    """

    epsilon: Tensor | float
    step_size: Tensor | float
    grids: tuple[int, ...] = (0,)
    scalars: tuple[float, ...] = (1.0,)
    noise: str = "random1"

    def start(self, images: Tensor, generator: Generators) -> list[Tensor]:
        """Starting perturbations of images (n, 3, H, W), one (n, 3, rows, columns) per grid. CPU generators,
        one for all images or one for each."""
        n, channels, height, width = images.shape
        deltas = []
        for cells in self.grids:
            shape = (n, channels, cells or height, cells or width)
            if self.noise == "zero":
                delta = torch.zeros(shape)
            elif self.noise == "random1":
                delta = uniform_noise(shape, generator) * self.epsilon
            else:
                delta = gaussian_noise(shape, generator)
            deltas.append(delta.to(images))
        return deltas

    def apply(self, points: Sequence[Tensor], images: Tensor) -> Tensor:
        """Add each grid's perturbation (n, 3, rows, columns) to images (n, 3, H, W) in turn, and clip to the
        valid range after every one."""
        size = images.shape[-2:]
        for delta, scalar in zip(points, self.scalars, strict=True):
            move = scalar * delta
            if move.shape[-2:] != size:
                move = F.interpolate(move, size=size, mode="nearest")
            images = self.clip(move + images)
        return images

    def clip(self, images: Tensor) -> Tensor:
        """Clip images (n, 3, H, W) to the valid range; a value exactly at a limit passes half its gradient,
        as published."""
        black, white = constant(0.0, images), constant(1.0, images)
        return torch.maximum(torch.minimum(images, white), black)

    @classmethod
    def joined(cls, pyramids: Sequence["Pyramid"], images: Tensor) -> "Pyramid":
        """One pyramid for images (P n, 3, H, W), of which each of P pyramids has n, one after the other.

        They may differ in epsilon and step size, and in the noise of the start, which is theirs to draw.
        """
        n = len(images) // len(pyramids)

        def column(values: list[Any]) -> Tensor:
            found = torch.stack(values) if isinstance(values[0], Tensor) else constant(tuple(values), images)
            found = found.to(images).view(len(values), 1, -1, 1, 1)
            return found.expand(-1, n, -1, -1, -1).flatten(0, 1)

        epsilon = column([each.epsilon for each in pyramids])
        return dataclasses.replace(
            pyramids[0], epsilon=epsilon, step_size=column([each.step_size for each in pyramids])
        )

    def step(self, points: Sequence[Tensor], gradient: Sequence[Tensor], images: Tensor) -> list[Tensor]:
        """One signed step of every grid (n, 3, rows, columns) at once, clamped to epsilon; the images are not
        used."""
        epsilon: Any = self.epsilon  # torch declares limits that are both numbers or both tensors, no union
        return [
            (delta + self.step_size * slope.sign()).clamp(-epsilon, epsilon)
            for delta, slope in zip(points, gradient, strict=True)
        ]


def uniform_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """Uniform in [-1, 1): (n, ...) float32 on the CPU."""
    return 2 * _drawn(torch.rand, shape, generator) - 1


def gaussian_noise(shape: Sequence[int], generator: Generators) -> Tensor:
    """0.001 times a standard normal, TRADES's start: (n, ...) float32 on the CPU, in pixel units."""
    return 0.001 * _drawn(torch.randn, shape, generator)


def _drawn(draw: Callable[..., Tensor], shape: Sequence[int], generator: Generators) -> Tensor:
    """Random numbers of a shape (n, ...), image by image where each has a generator of its own."""
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator)
    return torch.stack([draw(shape[1:], generator=each) for each in generator])


def _length(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def filled(logits: Tensor, which: Tensor, found: Tensor) -> Tensor:
    """Logits (Q, N), those of the images `which` (n,) replaced by `found` (n, N); (Q, 0) has none yet."""
    logits = logits if logits.shape[1] else found.new_empty(len(logits), found.shape[1])
    logits[which] = found
    return logits


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    steps: int,
    generator: Generators,
    loss_of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projected gradient ascent from a random start (Madry et al. 2018), the attack of evaluation.

    An image is left as it is as soon as it is misclassified, at any of the steps + 1 points: at least as
    strong as an attack judged at its last point, and cheaper, as such an image goes through the network no
    more, on the CPU from the next step on, else within `PATIENCE` steps.

    Args:
        logits_of: (n, 3, H, W) in [0, 1] -> (n, N), differentiable; called on subsets of the images.
        images, labels: (Q, 3, H, W) in [0, 1], and (Q,) int64 in 0..N-1.
        ball: the images allowed; with epsilon 0 the clean ones alone.
        generator: as of `Ball.start`.
        loss_of: logits (n, N) of some of the images, and their numbers (n,) int64 -> scalar to be increased,
            summed over the images; None for the cross-entropy.

    Returns:
        Attacked images (Q, 3, H, W) in [0, 1] within the ball, whether each is misclassified (Q,) bool, and
        the logits (Q, N) that say so, without graph.

    >>> ball = Ball("linf", epsilon=8 / 255, step_size=2 / 255)
    >>> attacked, fooled, found = pgd(logits, images, labels, ball, 2, torch.Generator())
    >>> attacked.shape == images.shape
    True
    """
    attacked = ball.start(images, generator)
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    active = torch.arange(len(images), device=images.device)  # the images that are still worked on
    rest: Tensor | None = active  # which of these go on; None where that is not looked up
    # A device must have done all its work before it can tell how many images are left.
    patience = 1 if images.device.type == "cpu" else PATIENCE
    numbers = itertools.count(1)
    seen = images.new_empty(len(images), 0)

    def look(points: Tensor) -> Tensor:
        nonlocal seen
        logits = logits_of(points)
        before, found = fooled[active], logits.detach()
        if seen.shape[1]:  # the logits that fooled stay, whatever other images share the pass
            found = torch.where(before.unsqueeze(1), seen[active], found)
        seen = filled(seen, active, found)
        fooled[active] = before | misclassified(logits, labels[active])
        return logits

    def loss_at(points: Tensor) -> Tensor | None:
        nonlocal rest
        logits = look(points)
        rest = None if next(numbers) % patience else (~fooled[active]).nonzero().squeeze(1)
        if rest is not None and len(rest) == 0:
            return None
        if loss_of is None:
            return LOSS_SCALE * F.cross_entropy(logits, labels[active], reduction="sum")
        return LOSS_SCALE * loss_of(logits, active)

    points = attacked
    for _ in range(steps):
        direction = input_gradient(loss_at, points)
        if direction is None:
            break
        if rest is not None:
            active, points, direction = active[rest], points[rest], direction[rest]
        moved = ball.step(points, direction, images[active])
        if rest is None:
            moved = torch.where(fooled[active].view(-1, 1, 1, 1), points, moved)
        attacked[active] = points = moved
    if rest is None or len(rest):
        with torch.no_grad():
            look(points)
    return attacked, fooled, seen


def perturb_weights(loss: Tensor, factors: dict[str, Tensor], radius: Tensor | float) -> dict[str, Tensor]:
    """Move every factor of P members uphill on `loss` by `radius` times its own Frobenius norm (method of
    AMT, ADSV).

    w' = w + radius * ||w|| / ||g|| * g with g = d loss / d w; the move itself carries no graph, so the
    gradient with respect to w' is the gradient with respect to w. What multiplies a member's loss cancels.

    Args:
        loss: scalar, the sum of the members' losses; its graph, which reaches every factor, is freed.
        factors: tensors (P, ...) that require gradients, by name.
        radius: the paper's gamma, of every member or (P,).
    """
    gradients = torch.autograd.grad(loss, list(factors.values()))
    return {
        name: factor
        + _of_rows(radius * (_norms(factor.detach()) / (_norms(gradient) + 1e-20)), gradient) * gradient
        for (name, factor), gradient in zip(factors.items(), gradients, strict=True)
    }


def _norms(rows: Tensor) -> Tensor:
    """(P, ...) -> (P,)."""
    return rows.flatten(1).norm(dim=1)


def _of_rows(numbers: Tensor, rows: Tensor) -> Tensor:
    """Numbers (P,) in a shape that broadcasts over rows (P, ...)."""
    return numbers.view(-1, *[1] * (rows.ndim - 1))
