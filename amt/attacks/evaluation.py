"""The attacks of evaluation: what `--attack` names, and how each finds worst-case images.

Every attack is handed functions from images in [0, 1] to logits, and differentiates through them: through
normalisation, merging and prototypes, in float32 and eval mode. It knows no network and no episode. APGD,
AutoAttack (Croce & Hein 2020), FAB (Croce & Hein 2020b) and Square Attack (Andriushchenko et al. 2020) are
those of pyautoattack; PGD is amt/attacks/perturb.py's. Epsilon is in 1/255 of the pixel range, in both norms.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor
from torch.overrides import TorchFunctionMode

from amt.attacks.perturb import Ball, Perturbation, ascend, pgd, pyramid_attack, pyramid_start
from meta_dataset_readers.errors import InputError, nearest

Logits = Callable[[Tensor], Tensor]

NORMS = ("linf", "l2")
LOSSES = {"pgd": ("ce", "kl", "dlr"), "apgd": ("ce", "dlr"), "transfer": ("ce", "kl", "dlr")}
DLR_WAYS = 4  # with fewer classes there is no third-largest logit besides the right and the nearest wrong one
STANDARD_TARGETS = 9  # of the targeted attacks of AutoAttack

# By kind of attack the options it takes besides norm and epsilon, with their defaults.
KINDS: dict[str, dict] = {
    "pgd": {"steps": 20, "restarts": 1, "step_size": None, "loss": "ce"},
    "apgd": {"steps": 100, "restarts": 1, "loss": "ce"},
    "autoattack": {"targets": None},
    "fab": {"steps": 100, "targets": None},
    "square": {"queries": 5000},
    "pyramid": {"steps": 10, "step_size": None},
    "transfer": {"steps": 20, "step_size": None, "loss": "ce"},
    "support": {"steps": 20, "step_size": None},
}
PGD_KINDS = ("pgd", "transfer", "support")
WHITE_BOX = ("pgd", "apgd", "autoattack", "fab")
TARGETED = ("autoattack", "fab")
BLACK_BOX = ("square", "transfer")


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack at one or several radii; raises ValueError for options that make no sense.

    Args:
        kind: one of `KINDS`. "pgd": projected gradient ascent; "apgd": AutoPGD; "autoattack": APGD-CE,
            targeted APGD-DLR, targeted FAB and Square in turn; "fab": targeted FAB, which looks for the
            nearest image of another class; "square": black box, scores only; "pyramid": the training attack
            of AMT; "transfer": PGD on another network; "support": PGD on the support images, so on routing
            and prototypes, for all queries at once.
        epsilons: increasing radii in 1/255 of the pixel range.
        norm: "linf" or "l2".
        steps, restarts: of gradient ascent.
        step_size: in 1/255; None for a quarter of each epsilon.
        loss: what is increased: "ce", "kl" (from the clean prediction) or "dlr" (difference of logits
            ratio; "ce" for episodes of fewer than 4 ways).
        queries: of Square.
        targets: classes that the targeted attacks try, at most N - 1; None for min(9, N - 1).
    """

    kind: str
    epsilons: tuple[float, ...]
    norm: str = "linf"
    steps: int | None = None
    restarts: int = 1
    step_size: float | None = None
    loss: str = "ce"
    queries: int | None = None
    targets: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no attack {self.kind!r}; {nearest(self.kind, KINDS)}")
        for name, default in KINDS[self.kind].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.norm not in NORMS or (self.kind == "pyramid" and self.norm != "linf"):
            raise ValueError(f"{self.kind} has norm {self.norm!r}, expected {self._norms()}")
        if self.loss not in LOSSES.get(self.kind, ("ce",)):
            known = ", ".join(LOSSES.get(self.kind, ("ce",)))
            raise ValueError(f"{self.kind} has loss {self.loss!r}, expected one of {known}")
        if not all(math.isfinite(e) and e > 0 for e in self.epsilons) or not self.epsilons:
            raise ValueError(f"{self.kind} has epsilon {_listed(self.epsilons)}, expected positive numbers")
        if any(a >= b for a, b in itertools.pairwise(self.epsilons)):
            raise ValueError(f"{self.kind} has epsilon {_listed(self.epsilons)}, expected increasing values")

    def _norms(self) -> str:
        return "linf" if self.kind == "pyramid" else " or ".join(NORMS)

    def column(self, epsilon: float) -> str:
        """What results at one radius are called, for example `pgd20@8` or `apgd100-dlr-l2@128`."""
        return f"{self.name}@{epsilon:g}"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.column(epsilon) for epsilon in self.epsilons)

    @property
    def name(self) -> str:
        """The attack without its radius: kind, strength, and whatever differs from the usual."""
        strength = {"autoattack": "", "square": self.queries}.get(self.kind, self.steps)
        kind = f"{self.kind}-pgd" if self.kind in ("transfer", "support") else self.kind
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        loss = f"-{self.loss}" if self.loss != "ce" or self.kind == "apgd" else ""
        step = f"-step{self.step_size:g}" if self.step_size is not None else ""
        targets = f"-t{self.targets}" if self.targets is not None else ""
        norm = "" if self.norm == "linf" else f"-{self.norm}"
        return f"{kind}{strength}{restarts}{loss}{step}{targets}{norm}"

    def step_at(self, epsilon: float) -> float:
        """The step size at one radius, in 1/255."""
        return epsilon / 4 if self.step_size is None else self.step_size


def on_queries(attacks: Iterable[Attack], norm: str) -> list[Attack]:
    """Those of one norm that move query images, not the support's."""
    return [attack for attack in attacks if attack.norm == norm and attack.kind != "support"]


def parse_attack(words: Sequence[str], **defaults) -> Attack:
    """The attack that words such as `pgd steps=50 norm=l2 epsilon=64,128` describe.

    Args:
        defaults: options that the words need not name; those that the kind does not have are left out.

    Raises:
        InputError: unknown attack, unknown option, or a value that makes no sense.
    """
    kind, *options = words
    if kind not in KINDS:
        raise InputError(f"--attack {kind}: {nearest(kind, KINDS)}")
    known = {"norm": str, "epsilon": _epsilons, **{name: _READ[name] for name in KINDS[kind]}}
    given = {}
    for option in options:
        name, equals, text = option.partition("=")
        if name not in known or not equals:
            raise InputError(f"--attack {kind} {option}: expected {', '.join(f'{n}=...' for n in known)}")
        try:
            given[name] = known[name](text)
        except ValueError as error:
            raise InputError(f"--attack {kind} {option}: {error}") from error
    settings = {name: value for name, value in defaults.items() if name in known} | given
    epsilons = settings.pop("epsilon")
    try:
        return Attack(kind, tuple(epsilons), **settings)
    except ValueError as error:
        raise InputError(f"--attack {' '.join(words)}: {error}") from error


def _epsilons(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _radius(text: str) -> float:
    if not math.isfinite(float(text)) or float(text) <= 0:
        raise ValueError(f"{text!r} is no positive number")
    return float(text)


_READ = {
    "steps": _count,
    "restarts": _count,
    "queries": _count,
    "targets": _count,
    "step_size": _radius,
    "loss": str,
}


def _listed(epsilons: Sequence[float]) -> str:
    return ",".join(f"{epsilon:g}" for epsilon in epsilons) or "no value"


class Attacked(NamedTuple):
    """What an attack found.

    Args:
        images: in [0, 1], within epsilon of the originals: queries (Q, 3, H, W), or the support's.
        fooled: (Q,) bool, which queries the attacked classifier gets wrong on them.
        variant: what was run, where the episode decides it; empty otherwise.
    """

    images: Tensor
    fooled: Tensor
    variant: str = ""


def attack_queries(
    attack: Attack,
    epsilon: float,
    logits: Logits,
    images: Tensor,
    labels: Tensor,
    n_way: int,
    generators: Sequence[torch.Generator],
    surrogate: Logits | None = None,
    seed: int = 0,
) -> Attacked:
    """Run any attack but "support" at one radius.

    Args:
        epsilon: in 1/255 of the pixel range.
        logits: the network under attack, see `amt.tasks.classifier.Classifier`.
        images, labels: query images that it classifies correctly, (Q, 3, H, W) in [0, 1] and (Q,) int64.
        n_way: number of classes N; with one class no image can be taken for another.
        generators: a CPU generator for each image, so that its random starts do not depend on which others
            are attacked.
        surrogate: for "transfer", the network that the images are made on.
        seed: in 0..2**31 - 1, decides what the attacks of the library draw, which is the same for every
            image, and so does not depend on the others either.
    """
    if n_way == 1 or len(images) == 0:
        return Attacked(images, torch.zeros_like(labels, dtype=torch.bool))
    if attack.kind == "pgd":
        return _pgd(attack, epsilon, logits, images, labels, n_way, generators)
    if attack.kind == "pyramid":
        return _pyramid(attack, epsilon, logits, images, labels, generators)
    if attack.kind == "transfer":
        loss_of = _objective(attack, surrogate, images, labels, n_way)
        everything = torch.arange(len(images), device=images.device)
        ball = Ball(attack.norm, epsilon / 255)
        found = ascend(
            lambda moved: loss_of(surrogate(moved), everything).sum(),
            images,
            ball.start(images, generators),
            ball,
            attack.step_at(epsilon) / 255,
            attack.steps,
        )
        return Attacked(found, _wrong(logits, found, labels), _loss_of(attack, n_way)[1])
    # The library draws from torch's global generator, which is put back as it was.
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _SameForEveryImage() as same:
        library = _LIBRARY[attack.kind]
        found, variant = library(attack, epsilon, same.spared(logits), images, labels, n_way, seed)
    return Attacked(found, _wrong(logits, found, labels), variant)


def attack_support(
    attack: Attack,
    epsilon: float,
    fit: Callable[[Tensor], Logits],
    support: Tensor,
    query: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> Attacked:
    """Move the support images so that as many queries as possible are misclassified, all by one move.

    Every step routes and merges anew; its gradient is that of the prototypes, the coefficients being taken
    as they are. Of all points seen, the most harmful counts.

    Args:
        fit: support images (S, 3, H, W) -> the logits function that the whole pipeline makes of them.
        labels: (Q,) int64 of the queries, which the attacker knows.
    """
    ball, step = Ball(attack.norm, epsilon / 255), attack.step_at(epsilon) / 255
    points = ball.start(support, generator)
    worst, worst_wrong = support, torch.zeros_like(labels, dtype=torch.bool)
    for k in range(attack.steps + 1):
        points = points.detach().requires_grad_()
        logits = fit(points)(query)
        wrong = logits.argmax(1) != labels
        if wrong.sum() > worst_wrong.sum():
            worst, worst_wrong = points.detach(), wrong
        if k < attack.steps and not wrong.all():
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), points)
            points = ball.step(points.detach(), gradient, step, support)
    return Attacked(worst, worst_wrong)


def _pgd(attack, epsilon, logits, images, labels, n_way, generators) -> Attacked:
    """PGD, again from another start for the images that withstood."""
    found, fooled = images.clone(), torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(attack.restarts):
        left = (~fooled).nonzero().squeeze(1)
        if len(left) == 0:
            break
        own = [generators[k] for k in left.tolist()]
        found[left], fooled[left] = pgd(
            logits,
            images[left],
            labels[left],
            epsilon=epsilon,
            step_size=attack.step_at(epsilon),
            steps=attack.steps,
            generator=own,
            norm=attack.norm,
            loss_of=_objective(attack, logits, images[left], labels[left], n_way),
        )
    return Attacked(found, fooled, _loss_of(attack, n_way)[1])


def _loss_of(attack: Attack, n_way: int) -> tuple[str, str]:
    """The loss that N ways allow, and how to name it where it is another than asked for."""
    if attack.loss == "dlr" and n_way < DLR_WAYS:
        return "ce", f"ce, having {n_way} ways"
    return attack.loss, ""


def _objective(
    attack: Attack, logits: Logits, images: Tensor, labels: Tensor, n_way: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """What the attack increases: logits (n, N) of some of the images, and which they are (n,) -> (n,)."""
    loss, _ = _loss_of(attack, n_way)
    if loss == "kl":
        with torch.no_grad():
            clean = logits(images).log_softmax(1)
        return lambda moved, which: F.kl_div(
            moved.log_softmax(1), clean[which], reduction="none", log_target=True
        ).sum(1)
    if loss == "dlr":
        return lambda moved, which: dlr(moved, labels[which])
    return lambda moved, which: F.cross_entropy(moved, labels[which], reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6), -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)).

    Args:
        logits: (n, N) with N >= 3.
        labels: (n,) int64.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    largest = logits.topk(3, dim=1).values
    return (others - own) / (largest[:, 0] - largest[:, 2] + 1e-12)


def _pyramid(attack, epsilon, logits, images, labels, generators) -> Attacked:
    level = Perturbation(epsilon, attack.step_at(epsilon), attack.steps)
    starts = [pyramid_start(images[k : k + 1], level, each) for k, each in enumerate(generators)]
    start = [torch.cat(grids) for grids in zip(*starts, strict=True)]
    found = pyramid_attack(
        lambda moved: F.cross_entropy(logits(moved), labels, reduction="sum"), images, start, level
    )
    return Attacked(found, _wrong(logits, found, labels))


def _wrong(logits: Logits, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return logits(images).argmax(1) != labels


class _SameForEveryImage(TorchFunctionMode):
    """While active, random numbers for n images (n, C, H, W) are those for one of them, n times.

    The library draws for all images that are left at once, so what it tried on one would otherwise depend on
    which of the others had fallen, and on the size of the batch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.rand, torch.randn) and isinstance(args[0], tuple | list) and len(args[0]) == 4:
            return function(args[0][1:], **(kwargs or {})).expand(args[0])
        return function(*args, **(kwargs or {}))

    def spared(self, logits: Logits) -> Logits:
        """The same network, on whose many functions no time is lost with looking for random numbers."""

        def call(images: Tensor) -> Tensor:
            self.__exit__(None, None, None)
            try:
                return logits(images)
            finally:
                self.__enter__()

        return call


_LIBRARY_NORM = {"linf": "Linf", "l2": "L2"}


def _apgd(attack, epsilon, logits, images, labels, n_way, seed) -> tuple[Tensor, str]:
    loss, variant = _loss_of(attack, n_way)
    runner = APGDAttack(
        logits,
        n_iter=attack.steps,
        norm=_LIBRARY_NORM[attack.norm],
        n_restarts=attack.restarts,
        eps=epsilon / 255,
        seed=seed,
        loss=loss,
        device=images.device,
    )
    return runner.perturb(images, labels), variant


def _square(attack, epsilon, logits, images, labels, n_way, seed) -> tuple[Tensor, str]:
    runner = SquareAttack(
        lambda moved: logits(moved).clone(),  # which the library overwrites
        norm=_LIBRARY_NORM[attack.norm],
        n_queries=attack.queries,
        eps=epsilon / 255,
        seed=seed,
        device=images.device,
    )
    return runner.perturb(images, labels), ""


def autoattack_parts(n_way: int, targets: int | None = None) -> tuple[list[str], int]:
    """AutoAttack's standard parts as far as N ways allow them, and how many targets they try.

    Below 4 ways the targeted DLR loss does not exist.

    Raises:
        InputError: more targets than other classes.
    """
    parts = ["apgd-ce", *(["apgd-t"] if n_way >= DLR_WAYS else []), "fab-t", "square"]
    return parts, target_count("autoattack", n_way, targets)


def target_count(kind: str, n_way: int, targets: int | None = None) -> int:
    """How many classes a targeted attack tries among N.

    Raises:
        InputError: more than there are other classes.
    """
    if targets is not None and targets > n_way - 1:
        raise InputError(
            f"--attack {kind} targets={targets}: an episode of {n_way} ways has {n_way - 1} other classes"
        )
    return min(STANDARD_TARGETS, n_way - 1) if targets is None else targets


def _autoattack(attack, epsilon, logits, images, labels, n_way, seed) -> tuple[Tensor, str]:
    parts, targets = autoattack_parts(n_way, attack.targets)
    # Its warnings are about what the caller's own checks look at, and would tear the progress bar.
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    runner = AutoAttack(
        lambda moved: logits(moved).clone(),
        norm=_LIBRARY_NORM[attack.norm],
        eps=epsilon / 255,
        seed=seed,
        device=images.device,
        version="custom",
        attacks=parts,
    )
    runner.apgd.n_restarts = runner.fab.n_restarts = 1
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = targets
    found, _ = runner.run_standard_evaluation(images, labels, batch_size=len(images))
    named = [f"{part} x{targets}" if part.endswith("-t") else part for part in parts]
    return found, ", ".join(named)


def _fab(attack, epsilon, logits, images, labels, n_way, seed) -> tuple[Tensor, str]:
    targets = target_count("fab", n_way, attack.targets)
    runner = FABAttack_PT(
        logits,
        n_iter=attack.steps,
        norm=_LIBRARY_NORM[attack.norm],
        eps=epsilon / 255,
        seed=seed,
        targeted=True,
        n_target_classes=targets,
        device=images.device,
    )
    return runner.perturb(images, labels), f"fab-t x{targets}"


_LIBRARY = {"apgd": _apgd, "square": _square, "autoattack": _autoattack, "fab": _fab}
