"""The robustness levels of meta-training. Plain numbers: importable without torch."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meta_dataset_readers.settings import setting

if TYPE_CHECKING:
    from amt.attacks.perturb import Pyramid

STARTS = ("zero", "random1", "random2")
# The levels of the paper's four LoRAs, in 1/255 of the pixel range.
POOL_EPSILONS = (8.0, 6.0, 0.1, 0.01)
_MOST = 10**6  # of every number of a level


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """One robustness level of meta-training: how far inputs and weights move, and the weight of their loss.
    The flags' help says the rest.

    The input moves on a pyramid of grids (AMT, section 3.2), see `amt.attacks.perturb.Pyramid`.
    `grids=(0,)`, `scalars=(1.0,)` is ordinary PGD.

    Args:
        epsilon: bound in 1/255 of the pixel range, >= 0. It bounds every grid's values before they are
            multiplied by the grid's scalar, so it bounds a pixel's move only where the one scalar is 1.
        step_size: in the same unit.
        gamma: of the weight perturbation, relative to each factor's norm; 0 leaves weights alone.
        start: "zero", "random1" (uniform within epsilon) or "random2" (0.001 times a standard normal).
            From "zero" the KL gradient is exactly zero, so that attack may never leave the clean image.

    Raises:
        ValueError: a number is outside of its range.

    >>> Perturbation(epsilon=8, step_size=2, gamma=0).steps
    10
    """

    epsilon: float
    step_size: float = setting(
        help="step size in 1/255 (default: a quarter of each epsilon)", flag="alpha", least=0, most=10**6
    )
    steps: int = setting(10, "steps K of the training attack", flag="attack_iters", least=1, most=10**6)
    gamma: float = setting(
        0.005, "relative radius of the weight perturbation (ours)", flag="awp_gamma", least=0, most=1000
    )
    beta: float = setting(6.0, "weight of the robust term", least=0, most=10**6)
    grids: tuple[int, ...] = setting(
        (4, 8, 0),
        "cells per side of each level, 0 for one per pixel (default: 4 8 0; with querying 0)",
        flag="pyramid_grids",
        least=0,
        most=4096,
    )
    scalars: tuple[float, ...] = setting(
        (20.0, 10.0, 1.0),
        "what each level is multiplied by (default: 20 10 1; with querying 1)",
        flag="pyramid_scalars",
        least=0,
        most=10**6,
    )
    start: str = setting(
        "random2",
        "start of the attack; random is random2; zero is degenerate, its first gradient vanishes (ours) "
        "(default: random2; with querying random1)",
        flag="delta_init",
        choices=(*STARTS, "random"),
    )

    def __post_init__(self) -> None:
        numbers = (self.epsilon, self.step_size, self.gamma, self.beta, *self.scalars)
        counts = (self.steps, *self.grids)
        if not all(isinstance(n, int | float) and 0 <= n <= _MOST for n in numbers):
            raise ValueError(f"a level needs numbers from 0 to {_MOST}, found {numbers}")
        if not all(isinstance(n, int) and 0 <= n <= _MOST for n in counts) or len(self.grids) != len(
            self.scalars
        ):
            raise ValueError(f"a level needs whole steps and as many grids as scalars, found {self}")
        if self.start not in STARTS:
            raise ValueError(f"start is {self.start!r}, expected one of {', '.join(STARTS)}")

    @property
    def pyramid(self) -> "Pyramid":
        """The perturbations of the input, in pixel units."""
        from amt.attacks.perturb import Pyramid

        return Pyramid(self.epsilon / 255, self.step_size / 255, self.grids, self.scalars, self.start)

    def scaled(self, factor: float) -> "Perturbation":
        """The same level with epsilon and step size multiplied by `factor`."""
        return dataclasses.replace(self, epsilon=self.epsilon * factor, step_size=self.step_size * factor)

    def between(self, least: float, share: float) -> "Perturbation":
        """The same level with its epsilon replaced by least + share (epsilon - least), the step size in
        proportion; epsilon 0 stays."""
        return self.scaled(share + (1 - share) * least / self.epsilon) if self.epsilon else self


def together(levels: Sequence[Perturbation], most: int) -> list[tuple[int, ...]]:
    """Which levels go through the network together, by their numbers: at most so many, which have attack
    steps, grids and scalars in common, and either all move the weights or none does.

    >>> together([Perturbation(8, 2), Perturbation(6, 2, steps=3), Perturbation(1, 1)], 4)
    [(0, 2), (1,)]
    """
    alike: dict[tuple, list[int]] = {}
    for p, level in enumerate(levels):
        alike.setdefault((level.steps, level.grids, level.scalars, level.gamma > 0), []).append(p)
    return [
        tuple(numbers[first : first + most])
        for numbers in alike.values()
        for first in range(0, len(numbers), most)
    ]
