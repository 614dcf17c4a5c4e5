"""Runs under the labels that a report gives them, and how their numbers are put into words."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from amt.evaluation.chance import is_below_chance
from amt.evaluation.runs import Run
from amt.evaluation.statistics import Summary, summarise
from amt.report.tables import Cell, counted, number

NORMS = {"linf": "L∞", "l2": "L2"}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A run under the label that it has in the report.

    Args:
        label: unlike that of every other run shown.
        place: its number among them, from 0.
    """

    label: str
    place: int
    run: Run

    def doubt(self, name: str, columns: Iterable[str]) -> str:
        """What makes a number suspect, led by ", suspect: "; empty if nothing does."""
        reasons = dict.fromkeys(reason for c in columns if (reason := self.run.suspect(name, c)))
        return f", suspect: {'; '.join(reasons)}" if reasons else ""


def label(runs: Sequence[Run]) -> list[Shown]:
    """The runs under the names of their folders, with as many parents as tell them apart."""
    paths = [run.folder.absolute().parts for run in runs]
    while len(paths) > 1 and min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]  # what all have in common tells nothing
    names = [path[-1] for path in paths]
    for depth in range(2, max(map(len, paths)) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path[-depth:]) if name in twice else name
            for name, path in zip(names, paths, strict=True)
        ]
    return [Shown(name, k, run) for k, (name, run) in enumerate(zip(names, runs, strict=True))]


def union(lists: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order in which they first appear."""
    return list(dict.fromkeys(name for each in lists for name in each))


def domains(shown: Sequence[Shown]) -> list[str]:
    return union(each.run.rows for each in shown)


def averages_and_domains(shown: Sequence[Shown]) -> list[str]:
    return union([(each.run.average for each in shown if each.run.average), domains(shown)])


def columns(shown: Sequence[Shown]) -> list[str]:
    return union(each.run.columns for each in shown)


def robust_columns(shown: Sequence[Shown]) -> list[str | None]:
    """The column that stands for robust accuracy, by run: the strictest one that all of them have.

    That is the union of all attacks where the runs faced the same ones, and the last column they share where
    not. Runs that share none are represented by the last column that each has; None is clean only.
    """
    shared = [
        c for c in shown[0].run.columns if all(c in each.run.columns for each in shown) and c != "clean"
    ]
    if len({each.run.columns for each in shown}) > 1:  # a union over other attacks is another quantity
        shared = [column for column in shared if not column.startswith("union")]
    if shared:
        return [shared[-1]] * len(shown)
    return [next((c for c in reversed(each.run.columns) if c != "clean"), None) for each in shown]


def curve_columns(shown: Sequence[Shown]) -> list[str]:
    """The columns of one robustness curve that all runs have: clean, then the attack that stands for robust
    accuracy at every epsilon, and the worst case over everything if that is what stands for it.

    Clean alone where the runs share no attack.
    """
    robust = robust_columns(shown)
    if len(set(robust)) > 1 or robust[0] is None:
        return ["clean"]
    shared = [c for c in shown[0].run.columns if all(c in each.run.columns for each in shown)]
    family = (attack_of(robust[0]) or (robust[0], 0))[0]
    at = {c: parts[1] for c in shared if (parts := attack_of(c)) is not None and parts[0] == family}
    found = sorted(at, key=at.__getitem__)
    return ["clean", *found, *([robust[0]] if robust[0] not in found else [])]


def telling(shown: Sequence[Shown]) -> list[str]:
    """Of the curve the attacked column that tells most: the last one where a run is above chance, since
    beyond it nothing is to be told apart; the first where none is. Empty without one."""
    _, *attacked = curve_columns(shown)
    above = [c for c in attacked if any(not is_below_chance(e.run, e.run.whole, c) for e in shown)]
    return (above or attacked[:1])[-1:]


def attack_of(column: str) -> tuple[str, float] | None:
    """The attack and the epsilon in the name of a column such as pgd20-l2@128; None if it has none."""
    attack, _, epsilon = column.rpartition("@")
    try:
        return (attack, float(epsilon)) if attack else None
    except ValueError:
        return None


def norm_of(attack: str) -> str:
    return "l2" if "l2" in attack.split("-") else "linf"


def chances(shown: Sequence[Shown], name: str) -> tuple[float, ...]:
    """The accuracy of guessing in a domain or an average, where the runs agree in it."""
    found = {round(each.run.chance(name), 6) for each in shown if each.run.summary(name, "clean") is not None}
    return tuple(found) if len(found) == 1 else ()


# --- numbers and words -----------------------------------------------------------------------------------


def of_values(values: Sequence[float]) -> Summary:
    """Mean and intervals of anything measured per episode, in its own unit."""
    return summarise([{"value": value / 100} for value in values], "value")  # `summarise` gives per cent


def span(summary: Summary) -> tuple[float, float] | None:
    """The ends of the bootstrap interval; None for one episode, which has none."""
    return (summary.low, summary.high) if has_interval(summary) else None


def has_interval(summary: Summary) -> bool:
    return math.isfinite(summary.interval)


def half(summary: Summary) -> str:
    return f"±{summary.interval:.1f}" if has_interval(summary) else "(no interval)"


def spoken(summary: Summary, digits: str = ".1f") -> str:
    mean, low, high = (number(value, digits) for value in (summary.mean, summary.low, summary.high))
    return f"{mean} [{low}, {high}]" if has_interval(summary) else f"{mean} (no interval)"


def numbers(summary: Summary, of_mean: str = ".1f", of_rest: str = ".1f") -> tuple[Cell, ...]:
    """Mean, half-width of the normal interval, ends of the bootstrap's, and n; dashes for one episode."""
    rest = (summary.interval, summary.low, summary.high)
    texts = [number(value, of_rest) if has_interval(summary) else "–" for value in rest]
    mean = Cell(number(summary.mean, of_mean), summary.mean)
    return (mean, *map(Cell, texts, rest), counted(summary.n))


def units(shown: Sequence[Shown], plural: bool = True) -> str:
    """What the rows of the runs are about, in words."""
    return " or ".join(unit + "s" * plural for unit in union([each.run.unit] for each in shown))


def row_counts(shown: Sequence[Shown]) -> str:
    """How many episodes or images every domain has, in words."""
    counts = {len(rows) for each in shown for rows in each.run.rows.values()}
    words = f"{between(counts)} {units(shown, plural=counts != {1})}"
    return words + " each" * any(each.run.unit == "episode" for each in shown)


def n_note(counts: Iterable[int]) -> str:
    return f"n = {between(counts)}"


def between(counts: Iterable[int]) -> str:
    """For example "5", or "5 to 12"."""
    counts = set(counts)
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
