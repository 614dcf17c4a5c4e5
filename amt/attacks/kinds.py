"""The attacks of evaluation by name: how to read `--attack pgd steps=50 loss=dlr`, and how results name it.

Attacks of several losses, such as `pgd loss=ce+dlr`, and `strong` consist of parts (`Attack.parts`), each
tried on the images that withstood those before. amt/attacks/evaluation.py runs them. Plain values: importable
without torch. Epsilon is in 1/255 of the pixel range, in both norms.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from meta_dataset_readers.errors import InputError, blaming, nearest
from meta_dataset_readers.settings import Number, positive_int

NORMS = ("linf", "l2")
DLR_WAYS = 3  # with fewer classes there is no third-largest logit to divide by: the margin takes its place
TARGETED_DLR_WAYS = 4  # its denominator takes the mean of the third and the fourth
WORST_CASE = "ce+dlr"  # what one of these losses cannot find for its own reasons, the other may
STANDARD_TARGETS = 9  # of the targeted attacks of AutoAttack


class Kind(NamedTuple):
    """The options of one kind of attack.

    Args:
        options: besides norm and epsilon, with their defaults on a command line.
        losses: the supported ones, or several of them joined by "+".
        norms: the supported ones.
    """

    options: Mapping[str, Any]
    losses: tuple[str, ...] = ("ce",)
    norms: tuple[str, ...] = NORMS


_PGD_LOSSES = ("ce", "kl", "dlr", "margin")
KINDS = {
    "pgd": Kind({"steps": 20, "restarts": 1, "step_size": None, "loss": WORST_CASE}, _PGD_LOSSES),
    "apgd": Kind({"steps": 100, "restarts": 1, "loss": WORST_CASE}, ("ce", "dlr")),
    "autoattack": Kind({"targets": None}),
    "fab": Kind({"steps": 100, "targets": None}),
    "square": Kind({"queries": 5000}),
    "strong": Kind({"steps": 100, "restarts": 2, "queries": 5000}),
    "pyramid": Kind({"steps": 10, "step_size": None}, norms=("linf",)),
    "transfer": Kind({"steps": 20, "step_size": None, "loss": "ce"}, _PGD_LOSSES),
    "support": Kind({"steps": 20, "step_size": None}),
}
PGD_KINDS = ("pgd", "transfer", "support")
WHITE_BOX = ("pgd", "apgd", "autoattack", "fab", "strong")
TARGETED = ("autoattack", "fab")
BLACK_BOX = ("square", "transfer")
ON_OTHERS = ("transfer", "strong")  # make images on other networks


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack at one or several radii.

    Args:
        kind: one of `KINDS`. "pgd": projected gradient ascent; "apgd": AutoPGD; "autoattack": APGD-CE,
            targeted APGD-DLR, targeted FAB and Square in turn; "fab": targeted FAB, which looks for the
            nearest image of another class; "square": black box, scores only; "strong": APGD on both losses,
            PGD-20 on other networks, targeted FAB and Square in turn; "pyramid": the training attack of AMT;
            "transfer": PGD on another network; "support": PGD on the support images, so on routing
            and prototypes, for all queries at once.
        epsilons: increasing radii in 1/255 of the pixel range.
        norm: "linf" or "l2".
        steps, restarts: of gradient ascent.
        step_size: in 1/255; None for a quarter of each epsilon.
        loss: the loss to increase: "ce", "kl" (from the clean prediction), "margin" (of the nearest wrong
            logit over the right one) or "dlr" (difference of logits ratio; the margin for episodes of 2
            ways). Of several, joined by "+", each is tried in turn. The record of an old run does not name
            it, and means "ce"; a command line's default is that of `KINDS`.
        queries: of Square.
        targets: classes that the targeted attacks try, at most N - 1; None for min(9, N - 1).

    Raises:
        ValueError: an option is outside of its range.

    >>> Attack("pgd", epsilons=(2, 8), restarts=5).columns
    ('pgd20x5@2', 'pgd20x5@8')
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
        kind = KINDS[self.kind]
        for name, default in kind.options.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.norm not in kind.norms:
            raise ValueError(f"{self.kind} has norm {self.norm!r}, expected {' or '.join(kind.norms)}")
        losses = self.loss.split("+")
        if not set(losses) <= set(kind.losses) or len(set(losses)) < len(losses):
            several = ", or several such as ce+dlr" if len(kind.losses) > 1 else ""
            raise ValueError(
                f"{self.kind} has loss {self.loss!r}, expected one of {', '.join(kind.losses)}{several}"
            )
        self._check_epsilons()

    def _check_epsilons(self) -> None:
        radii = ",".join(f"{epsilon:g}" for epsilon in self.epsilons) or "no value"
        if not all(math.isfinite(e) and e > 0 for e in self.epsilons) or not self.epsilons:
            raise ValueError(f"{self.kind} has epsilon {radii}, expected positive numbers")
        if any(a >= b for a, b in itertools.pairwise(self.epsilons)):
            raise ValueError(f"{self.kind} has epsilon {radii}, expected increasing values")

    def column(self, epsilon: float) -> str:
        """The column of results at one radius, for example `pgd20@8` or `apgd100-dlr-l2@128`."""
        return f"{self.name}@{epsilon:g}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of results, one for each radius."""
        return tuple(self.column(epsilon) for epsilon in self.epsilons)

    @property
    def name(self) -> str:
        """The attack without its radius: kind, strength, and what differs from the defaults."""
        strength = "" if self.kind == "autoattack" else self.budget
        kind = f"{self.kind}-pgd" if self.kind in ("transfer", "support") else self.kind
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        loss = f"-{self.loss}" if self.loss != "ce" or self.kind == "apgd" else ""
        step = f"-step{self.step_size:g}" if self.step_size is not None else ""
        targets = f"-t{self.targets}" if self.targets is not None else ""
        fewer = self.kind == "strong" and self.queries != KINDS["strong"].options["queries"]
        queries = f"-q{self.queries}" if fewer else ""
        norm = "" if self.norm == "linf" else f"-{self.norm}"
        return f"{kind}{strength}{restarts}{loss}{step}{targets}{queries}{norm}"

    @property
    def budget(self) -> int:
        """The steps of its gradient ascent, for Square its queries. Raises ValueError for AutoAttack, whose
        parts have budgets of their own."""
        budget = self.queries if self.kind == "square" else self.steps
        if budget is None:
            raise ValueError(f"{self.kind} has no number of steps")
        return budget

    def step_at(self, epsilon: float) -> float:
        """The step size at one radius, in 1/255."""
        return epsilon / 4 if self.step_size is None else self.step_size

    def losses_among(self, n_way: int) -> tuple[str, ...]:
        """The losses for N ways: with fewer than 3 the margin takes the place of DLR."""
        few = n_way < DLR_WAYS
        return tuple(
            dict.fromkeys("margin" if few and each == "dlr" else each for each in self.loss.split("+"))
        )

    def parts(self) -> "tuple[Attack, ...]":
        """The attacks of one loss that this one consists of, in the order in which they are tried, each on
        the images that withstood those before: the cheap ones first."""
        if self.kind != "strong":
            return tuple(dataclasses.replace(self, loss=loss) for loss in self.loss.split("+"))
        alike = {"epsilons": self.epsilons, "norm": self.norm}
        climb = {"steps": self.steps, "restarts": self.restarts}
        return (
            *Attack("apgd", loss=WORST_CASE, **climb, **alike).parts(),
            Attack("transfer", **alike),
            Attack("fab", steps=self.steps, **alike),
            Attack("square", queries=self.queries, **alike),
        )

    def variant(self, n_way: int, n_others: int = 0) -> str:
        """What is run among N ways where the name does not tell, with other networks to make images on; empty
        where it does."""
        if self.kind == "autoattack":
            parts, targets = autoattack_parts(n_way, self.targets)
            return ", ".join(f"{part} x{targets}" if part.endswith("-t") else part for part in parts)
        if self.kind == "fab":
            return f"fab-t x{target_count('fab', n_way, self.targets)}"
        if self.kind == "strong":
            losses = [f"apgd-{loss}" for loss in Attack("apgd", (1,), loss=WORST_CASE).losses_among(n_way)]
            others = [f"transfer x{n_others}"] if n_others else []
            return ", ".join([*losses, *others, f"fab-t x{target_count('fab', n_way)}", "square"])
        found = "+".join(self.losses_among(n_way))
        return "" if found == self.loss else f"{found}, having {n_way} ways"


def on_queries(attacks: Iterable[Attack], norm: str) -> list[Attack]:
    """The attacks of one norm on query images, not on the support."""
    return [attack for attack in attacks if attack.norm == norm and attack.kind != "support"]


def autoattack_parts(n_way: int, targets: int | None = None) -> tuple[list[str], int]:
    """AutoAttack's standard parts as far as N ways allow them (below 4 there is no targeted DLR loss), and
    how many targets they try. Raises InputError for more targets than other classes."""
    parts = ["apgd-ce", *(["apgd-t"] if n_way >= TARGETED_DLR_WAYS else []), "fab-t", "square"]
    return parts, target_count("autoattack", n_way, targets)


def target_count(kind: str, n_way: int, targets: int | None = None) -> int:
    """How many classes a targeted attack tries among N. Raises InputError for more than there are others."""
    if targets is not None and targets > n_way - 1:
        raise InputError(
            f"--attack {kind} targets={targets}: an episode of {n_way} ways has {n_way - 1} other classes"
        )
    return min(STANDARD_TARGETS, n_way - 1) if targets is None else targets


def parse_attack(words: Sequence[str], **defaults) -> Attack:
    """The attack that words such as `pgd steps=50 norm=l2 epsilon=64,128` describe.

    Args:
        defaults: options for words to override, before those of `KINDS`; those that the kind does not have
            are left out.

    Raises:
        InputError: unknown attack, unknown option, or a value outside of its range.

    >>> parse_attack(["apgd", "loss=dlr"], epsilon=[8.0]).name
    'apgd100-dlr'
    """
    kind, *options = words
    if kind not in KINDS:
        raise InputError(f"--attack {kind}: {nearest(kind, KINDS)}")
    known = ("norm", "epsilon", *KINDS[kind].options)
    given = {}
    for option in options:
        name, equals, text = option.partition("=")
        if name not in known or not equals:
            raise InputError(f"--attack {kind} {option}: expected {', '.join(f'{n}=...' for n in known)}")
        with blaming(f"--attack {kind} {option}", argparse.ArgumentTypeError):
            given[name] = _READ[name](text)
    settings = {name: value for name, value in defaults.items() if name in known} | given
    settings = {**KINDS[kind].options, **settings}
    epsilons = settings.pop("epsilon")
    with blaming(f"--attack {' '.join(words)}"):
        return Attack(kind, tuple(epsilons), **settings)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(Number()(part) for part in text.split(","))


# How the value of an option is read. `Attack` checks what several options have to agree on.
_READ: dict[str, Callable[[str], Any]] = {
    "norm": str,
    "epsilon": _numbers,
    "steps": positive_int,
    "restarts": positive_int,
    "step_size": Number(above=0),
    "loss": str,
    "queries": positive_int,
    "targets": positive_int,
}
