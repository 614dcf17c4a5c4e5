"""How the features of a task are classified, as settings: `--head robust-lda support=0.3 attack=0.3`.

amt/models/heads.py fits them. Plain values: importable without torch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meta_dataset_readers.errors import InputError, blaming, nearest

MIX = "mix"
PRETRAINED = "pretrained"
RECOMMENDED = "robust-lda"  # for pools whose file has the statistics
TEXT = "text"  # in place of a second network: the texts of --text_prototypes
ON_SUPPORT = "support"  # in place of a share: chosen by leave-one-out on every task's support set
LEAST_IDENTITY = 0.01  # of the sum of all shares: below it float32 features make no sound inverse

_LDA = {"support": 0.5, "identity": 0.5}
_ROBUST = {"support": 0.3, "source": 0.0, "attack": 0.3, "identity": 0.4, "views": 0.15}
KINDS: dict[str, Mapping[str, float]] = {
    "prototypes": {},
    "centred": {},
    "lda": _LDA,
    "ridge": {"penalty": 1.0},
    "robust-lda": _ROBUST,
}
COSINE = ("prototypes", "centred")
COVARIANCE = ("lda", "robust-lda")
TRAINED = ("prototypes", "centred", "lda", "ridge")  # those that meta-training can use: no statistics needed
_MIXING: dict[str, Any] = {"of": "robust-lda", "share": 0.8, "other": PRETRAINED}


@dataclasses.dataclass(frozen=True)
class Head:
    """One way to classify features.

    Args:
        kind: one of `KINDS`. "prototypes": cosine to the class means, as published; "centred": the same
            without the support's mean; "lda": linear discriminant by the support's within-class covariance,
            shrunken; "ridge": least squares in closed form; "robust-lda": linear discriminant by a mixture of
            covariances, among them the second moment of the displacement under attack.
        support, source, attack, identity: shares of the covariances in their mixture; only ratios count.
        views: share of the covariance over augmented views of the support, where it has one image per class.
        penalty: of ridge, relative to the mean squared length of the centred features.
        other: "pretrained", or the number of a pool's member, whose logits are mixed in, or "text": the same
            network's by the cosine to the texts of the classes; None: no mixing.
        share: of the first network's logits in that mixture, "support": chosen for every task. 0 with texts
            is zero-shot classification, which does not look at the support set.

    Raises:
        ValueError: a value is outside of its range.
    """

    kind: str = "prototypes"
    support: float = 0.0
    source: float = 0.0
    attack: float = 0.0
    identity: float = 0.0
    views: float = 0.0
    penalty: float = 0.0
    other: str | int | None = None
    share: float | str = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no head {self.kind!r}; {nearest(self.kind, KINDS)}")
        if self.share == ON_SUPPORT and self.other != TEXT:
            raise ValueError(f"share={ON_SUPPORT} is for other={TEXT}")
        shares = [] if isinstance(self.share, str) else [("share", self.share)]
        for name, value in [*((name, getattr(self, name)) for name in (*_ROBUST, "penalty")), *shares]:
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value:g}, expected a nonnegative number")
        if isinstance(self.share, str) and self.share != ON_SUPPORT:
            raise ValueError(f"share is {self.share!r}, expected a number or {ON_SUPPORT}")
        if not isinstance(self.share, str) and self.share > 1:
            raise ValueError(f"share is {self.share:g}, expected a number from 0 to 1")
        if self.kind == "ridge" and self.penalty <= 0:
            raise ValueError(f"penalty is {self.penalty:g}, expected a positive number")
        if self.kind in COVARIANCE:
            everything = sum(getattr(self, name) for name in _ROBUST)
            if self.identity < LEAST_IDENTITY * everything or everything == 0:
                raise ValueError(
                    f"identity is {self.identity:g} of {everything:g}, expected at least "
                    f"{LEAST_IDENTITY:.0%} of the sum of the shares"
                )

    @property
    def name(self) -> str:
        """The words that describe it, as given to --head."""
        words = [f"{name}={getattr(self, name):g}" for name in KINDS[self.kind]]
        if self.other is None:
            return " ".join([self.kind, *words])
        share = self.share if isinstance(self.share, str) else f"{self.share:g}"
        return " ".join([MIX, f"of={self.kind}", f"share={share}", f"other={self.other}", *words])

    @property
    def zero_shot(self) -> bool:
        """Whether it classifies by texts alone."""
        return self.other == TEXT and self.share == 0

    @property
    def needs_statistics(self) -> bool:
        """Whether it needs covariances that were measured after meta-training."""
        return self.source > 0 or self.attack > 0

    @property
    def one_shot_note(self) -> str:
        """What it does without where no class has two support images; empty if it needs no two."""
        if self.kind not in COVARIANCE or self.support == 0:
            return ""
        instead = "the covariance over augmented views" if self.views > 0 else "nothing in its place"
        return f"where no class has two support images there is no covariance of the support: {instead}"


ZERO_SHOT = Head(other=TEXT, share=0.0)
WITH_TEXTS = Head(other=TEXT, share=ON_SUPPORT)  # the default where there are texts


def default_head(kind: str | None) -> Head:
    """The head of this kind, None for prototypes, with its default options. Raises ValueError for an unknown
    kind."""
    if kind is None:
        return Head()
    options: dict[str, Any] = dict(KINDS.get(kind, {}))
    return Head(kind, **options)


def parse_head(words: Sequence[str]) -> Head:
    """The head that words such as `robust-lda support=0.3 attack=0.3` describe.

    Raises:
        InputError: unknown head, unknown option, or a value outside of its range.
    """
    name, *options = words
    if name == TEXT:
        if options:
            raise InputError(f"--head {TEXT} {options[0]}: expected no option")
        return ZERO_SHOT
    if name != MIX and name not in KINDS:
        raise InputError(f"--head {name}: {nearest(name, (*KINDS, MIX, TEXT))}")
    mixing = _MIXING if name == MIX else {}
    given = dict(_option(name, option) for option in options)
    kind = given.pop("of", mixing.get("of", name)) if name == MIX else name
    if kind not in KINDS:
        raise InputError(f"--head {name} of={kind}: {nearest(kind, KINDS)}")
    known = {**{key: value for key, value in mixing.items() if key != "of"}, **KINDS[kind]}
    if unknown := [key for key in given if key not in known]:
        listed = ", ".join(f"{key}=..." for key in [*(["of"] if mixing else []), *known]) or "no option"
        raise InputError(f"--head {name} {unknown[0]}={given[unknown[0]]}: expected {listed}")
    with blaming(f"--head {' '.join(words)}"):
        values = {key: _READ.get(key, _number)(key, text) for key, text in given.items()}
        return Head(kind, **{**known, **values})


def _option(name: str, option: str) -> tuple[str, str]:
    key, equals, text = option.partition("=")
    if not equals:
        raise InputError(f"--head {name} {option}: expected OPTION=VALUE")
    return key, text


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key} is {text!r}, expected a number") from None


def _network(key: str, text: str) -> str | int:
    if text not in (PRETRAINED, TEXT) and not text.isdecimal():
        raise ValueError(f"{key} is {text!r}, expected {PRETRAINED}, {TEXT} or the number of an adapter")
    return int(text) if text.isdecimal() else text


def _share(key: str, text: str) -> float | str:
    return text if text == ON_SUPPORT else _number(key, text)


_READ: dict[str, Callable[[str, str], Any]] = {"other": _network, "share": _share}
