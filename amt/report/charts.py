"""What the figures of a report show: points with intervals, in panels, and the same numbers as a table.

Decides what is compared with what, never how it looks: `svg` draws the figures on the page and
`files` on paper, from the same descriptions. Intervals drawn are the bootstrap's; a single episode
has none.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from amt.evaluation.comparison import compare
from amt.evaluation.runs import Run
from amt.evaluation.statistics import Summary, summarise
from amt.report.drawing import (
    Axis,
    Cell,
    Figure,
    HeatMap,
    Panel,
    Point,
    Series,
    Share,
    Style,
    Table,
    axis,
    distinct,
    number,
)

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

    @property
    def style(self) -> Style:
        return distinct(self.place)

    def summary(self, name: str, column: str) -> Summary | None:
        return self.run.summary(name, column)

    def doubt(self, name: str, columns: Iterable[str]) -> str:
        """What makes a number suspect, led by ", suspect: "; empty if nothing does."""
        reasons = dict.fromkeys(reason for c in columns if (reason := self.run.suspect(name, c)))
        return f", suspect: {'; '.join(reasons)}" if reasons else ""

    @property
    def average(self) -> str | None:
        """The name of the average over all its domains; None if it has but one domain."""
        return next(iter(self.run.averages), None) if len(self.run.rows) > 1 else None

    @property
    def whole(self) -> str:
        """What stands for the run in a sentence: its average, or its only domain."""
        return self.average or next(iter(self.run.rows))


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


def attack_of(column: str) -> tuple[str, float] | None:
    """The attack and the epsilon in the name of a column such as pgd20-l2@128; None if it has none."""
    attack, _, epsilon = column.rpartition("@")
    try:
        return (attack, float(epsilon)) if attack else None
    except ValueError:
        return None


def norm_of(attack: str) -> str:
    return "l2" if "l2" in attack.split("-") else "linf"


def figures(shown: Sequence[Shown]) -> list[Figure | HeatMap]:
    """All figures of a report."""
    compared = differences(shown).figure if len(shown) > 1 else None
    found = [scatter(shown), *curves(shown), compared, *heat_maps(shown), seconds(shown)]
    return [figure for figure in found if figure is not None]


# --- the figures -----------------------------------------------------------------------------------------


def scatter(shown: Sequence[Shown]) -> Figure | None:
    """Robust against clean accuracy, a point per domain and run; None if nothing was attacked."""
    robust = robust_columns(shown)
    series, rows = [], []
    for each, column in zip(shown, robust, strict=True):
        points = []
        for domain in each.run.rows:
            clean = each.summary(domain, "clean")
            attacked = column and each.summary(domain, column)
            if clean is None or attacked is None:
                continue
            doubt = each.doubt(domain, ("clean", column))
            says = (
                f"{domain}, {each.label}: clean {spoken(clean)}, {column} {spoken(attacked)}, n = {clean.n}"
            )
            spans = span(clean), span(attacked)
            points.append(Point(clean.mean, attacked.mean, *spans, domain, says + doubt, bool(doubt)))
            names = (Cell(domain + doubt), Cell(each.label), Cell(column))
            rows.append((*names, *numbers(clean, with_n=False), *numbers(attacked)))
        if points:
            series.append(Series(each.label, each.style, tuple(points)))
    if not series:
        return None
    points = [point for one in series for point in one.points]
    name = next(column for column in robust if column)
    alike = len(set(robust)) == 1
    caption = (
        f"One point per domain and run over {row_counts(shown)}; bars: 95% bootstrap intervals. "
        + (f"Robust accuracy is column {name}." if alike else "The runs share no attack: ")
        + ("" if alike else "; ".join(f"{e.label} has {c}" for e, c in zip(shown, robust, strict=True)) + ".")
        + (f" Lines lead from {series[0].name} to the others." if len(series) > 1 else "")
    )
    panel = Panel(
        "",
        "",
        axis(
            "clean accuracy, per cent",
            [v for p in points for v in (p.x_span or (p.x, p.x))],
            (0, 100),
            least=10,
        ),
        axis(
            f"accuracy under {name}, per cent" if alike else "robust accuracy, per cent",
            [v for p in points for v in (p.y_span or (p.y, p.y))],
            (0, 100),
            least=10,
        ),
        tuple(series),
        labelled=True,
    )
    headings = (
        "domain",
        "run",
        "robust column",
        "clean",
        "±",
        "from",
        "to",
        "robust",
        "±",
        "from",
        "to",
        "n",
    )
    return Figure(
        "clean_robust", "Clean and robust accuracy", caption, (panel,), Table(headings, tuple(rows))
    )


def curves(shown: Sequence[Shown]) -> list[Figure]:
    """Accuracy against epsilon, a figure per norm, a panel per domain, a line per run and attack."""
    attacks: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for column in columns(shown):
        if (found := attack_of(column)) is not None:
            attacks.setdefault(norm_of(found[0]), {}).setdefault(found[0], []).append((found[1], column))
    figures = []
    averages = [each.average for each in shown if each.average]
    for norm, by_attack in attacks.items():
        largest = max(epsilon for found in by_attack.values() for epsilon, _ in found)
        ticks = _epsilon_ticks(by_attack.values())
        x = Axis(f"epsilon in 1/255, {NORMS[norm]}", -0.04 * largest, 1.04 * largest, ticks)
        y = Axis("accuracy, per cent", -3, 103, (0, 25, 50, 75, 100))
        panels, rows = [], []
        for name in union([averages, domains(shown)]):
            series, counts = [], []
            for each in shown:
                for k, (attack, found) in enumerate(by_attack.items()):
                    points = _curve(each, name, attack, found, rows)
                    if len(points) > 1 and len(shown) > 1:
                        style = each.style._replace(dash=k)
                        series.append(Series(each.label, style, points, True, attack, each.place))
                    elif len(points) > 1:
                        series.append(Series(attack, distinct(k)._replace(dash=k), points, True))
                if each.summary(name, "clean") is not None:
                    counts.append(each.summary(name, "clean").n)
            if series:
                panels.append(Panel(name, n_note(counts), x, y, tuple(series)))
        if panels:
            caption = (
                f"Accuracy under {', '.join(by_attack)} against the size of the perturbation in the "
                f"{NORMS[norm]} norm, clean at 0; bars: 95% bootstrap intervals, n {units(shown)} as noted."
            )
            headings = ("domain", "run", "attack", "epsilon", "accuracy", "±", "from", "to", "n")
            title = f"Robustness curves, {NORMS[norm]}"
            figures.append(
                Figure(f"curves_{norm}", title, caption, tuple(panels), Table(headings, tuple(rows)))
            )
    return figures


def _curve(
    each: Shown, name: str, attack: str, found: Sequence[tuple[float, str]], rows: list[tuple[Cell, ...]]
) -> tuple[Point, ...]:
    """The points of one line, in the order of epsilon; their numbers are appended to `rows`."""
    points = []
    for epsilon, column in sorted({(0.0, "clean"), *found}):
        summary = each.summary(name, column) if column in each.run.columns else None
        if summary is not None:
            doubt = each.doubt(name, (column,))
            says = f"{name}, {each.label}, {attack}, epsilon {epsilon:g}: {spoken(summary)}, n = {summary.n}"
            points.append(Point(epsilon, summary.mean, None, span(summary), name, says + doubt, bool(doubt)))
            names = (Cell(name + doubt), Cell(each.label), Cell(attack), Cell(f"{epsilon:g}", epsilon))
            rows.append((*names, *numbers(summary)))
    return tuple(points)


def _epsilon_ticks(found: Iterable[Sequence[tuple[float, str]]]) -> tuple[float, ...]:
    """The radii themselves, as far as their labels do not touch."""
    ticks: list[float] = []
    values = sorted({epsilon for each in found for epsilon, _ in each}, reverse=True)
    for epsilon in (values[0], 0.0, *values[1:]):
        if all(abs(epsilon - tick) > 0.12 * values[0] for tick in ticks):
            ticks.append(epsilon)
    return tuple(sorted(ticks))


class Differences(NamedTuple):
    """What distinguishes runs from the first one, on the same episodes.

    Args:
        figure: None if no run could be compared.
        by_run: by label, name and column, the differences.
        refusals: which runs or domains could not be compared, and why.
    """

    figure: Figure | None
    by_run: dict[str, dict[tuple[str, str], Summary]]
    refusals: tuple[str, ...]


def differences(shown: Sequence[Shown]) -> Differences:
    """Paired differences of every other run from the first, where they scored the same episodes."""
    reference = shown[0]
    by_run, concerned = {}, {}
    for each in shown[1:]:
        found = compare(each.run, reference.run)
        by_run[each.label] = found.differences
        for reason in found.refusals:
            concerned.setdefault(reason, []).append(each.label)
    refusals = [
        f"no differences of {', '.join(labels)} from {reference.label}: {reason}"
        for reason, labels in concerned.items()
    ]
    names = union((name for name, _ in found) for found in by_run.values())
    names.sort(key=lambda name: name in reference.run.averages)
    panels, rows = [], []
    for column in reference.run.columns:
        here = {
            (name, label): found[name, column]
            for name in names
            for label, found in by_run.items()
            if (name, column) in found
        }
        doubts = {
            (name, each.label): each.doubt(name, (column,)) or reference.doubt(name, (column,))
            for name in names
            for each in shown[1:]
        }
        rows += [
            (Cell(name + doubts[name, label]), Cell(label), Cell(column), *numbers(summary, signed=True))
            for (name, label), summary in here.items()
        ]
        if here and column in {"clean", *robust_columns(shown)}:
            present = [name for name in names if any((name, label) in here for label in by_run)]
            axis_label = "difference in points"
            panels.append(_rows_panel(column, axis_label, present, here, shown, doubts, zero=True))
    if not panels:
        return Differences(None, by_run, tuple(refusals))
    counts = n_note(summary.n for found in by_run.values() for summary in found.values())
    caption = (
        f"Accuracy minus that of {reference.label} on the same {units(shown)}, in points; "
        f"bars: 95% bootstrap intervals of the paired difference, {counts}. "
        f"Right of zero is better than {reference.label}."
    )
    headings = ("domain", "run", "column", "difference", "±", "from", "to", "n")
    title = f"Differences from {reference.label}"
    figure = Figure("differences", title, caption, tuple(panels), Table(headings, tuple(rows)))
    return Differences(figure, by_run, tuple(refusals))


def seconds(shown: Sequence[Shown]) -> Figure:
    """Seconds per episode or image, by domain and run."""
    unit = units(shown, plural=False)
    found = {
        (domain, each.label): of_values([row["seconds"] for row in rows])
        for each in shown
        for domain, rows in each.run.rows.items()
        if all("seconds" in row for row in rows)
    }
    panel = _rows_panel("", f"seconds per {unit}, attacks included", domains(shown), found, shown, {})
    rows = []
    for (domain, name), summary in found.items():
        texts = (f"{summary.mean:.3g}", *interval_texts(summary, ".2g"))
        values = (summary.mean, summary.interval, summary.low, summary.high)
        rows.append((Cell(domain), Cell(name), *map(Cell, texts, values), Cell(str(summary.n), summary.n)))
    caption = f"Mean seconds per {unit}; bars: 95% bootstrap intervals, {counts_note(found.values())}."
    headings = ("domain", "run", "seconds", "±", "from", "to", "n")
    return Figure("seconds", f"Time per {unit}", caption, (panel,), Table(headings, tuple(rows)))


def _rows_panel(
    title: str,
    x_label: str,
    names: Sequence[str],
    found: Mapping[tuple[str, str], Summary],
    shown: Sequence[Shown],
    doubts: Mapping[tuple[str, str], str],
    zero: bool = False,
) -> Panel:
    """A panel with a line of its own for every domain, on which the runs stand."""
    series = []
    for each in shown:
        points = []
        for k, name in enumerate(names):
            if (s := found.get((name, each.label))) is not None:
                doubt = doubts.get((name, each.label), "")
                says = f"{name}, {each.label}: {spoken(s, '.3g')}, n = {s.n}{doubt}"
                points.append(Point(s.mean, k, span(s), None, name, says, bool(doubt)))
        if points:
            series.append(Series(each.label, each.style, tuple(points), lane=each.place))
    values = [0.0] + [v for one in series for p in one.points for v in (p.x_span or (p.x, p.x))]
    x = axis(x_label, values, least=2 * zero)
    y = Axis("", -0.5, len(names) - 0.5, names=tuple(names))
    return Panel(title, counts_note(found.values()), x, y, tuple(series), zero=zero)


def heat_maps(shown: Sequence[Shown]) -> list[HeatMap]:
    """What was merged, for every run that merged anything."""
    maps = []
    for each in shown:
        rows = {
            domain: [row["coefficients"] for row in found if row.get("coefficients")]
            for domain, found in each.run.rows.items()
        }
        rows = {domain: found for domain, found in rows.items() if found}
        if not rows:
            continue
        count = max(len(shares) for found in rows.values() for shares in found)
        names = adapter_names(each.run.merging, count)
        cells = tuple(
            tuple(_share([shares[p] for shares in found if p < len(shares)]) for p in range(count))
            for found in rows.values()
        )
        table_rows = [
            (
                *(Cell(domain), Cell(name), *numbers(share.summary, with_n=False)),
                *(Cell(f"{value:.1f}", value) for value in share.quartiles),
                Cell(str(share.summary.n), share.summary.n),
            )
            for domain, line in zip(rows, cells, strict=True)
            for name, share in zip(names, line, strict=True)
            if share is not None
        ]
        quartiles = ("least", "lower quartile", "median", "upper quartile", "most")
        maps.append(
            HeatMap(
                f"merging_{each.place + 1}",
                f"Adapters merged by {each.label}",
                "Mean share of every adapter in the merged network, in per cent, ± 1.96 standard errors, "
                f"{counts_note(share.summary for line in cells for share in line if share)}. "
                "The strip below runs from 0 to 100: a line from the least to the most over the episodes, a "
                "box between the quartiles, a tick at the median.",
                tuple(rows),
                names,
                cells,
                Table(("domain", "adapter", "mean", "±", "from", "to", *quartiles, "n"), tuple(table_rows)),
            )
        )
    return maps


def _share(values: Sequence[float]) -> Share | None:
    if not values:
        return None
    quartiles = np.percentile([100 * value for value in values], (0, 25, 50, 75, 100))
    return Share(of_values([100 * value for value in values]), tuple(quartiles.tolist()))


def adapter_names(merging: Mapping[str, Mapping], count: int) -> tuple[str, ...]:
    """The adapters by number, with what they were trained for where that is known and the same throughout."""
    levels = {tuple(how["epsilons"]) for how in merging.values() if isinstance(how.get("epsilons"), list)}
    known = next(iter(levels)) if len(levels) == 1 else ()
    return tuple(f"{p}: ε {known[p]:g}" if p < len(known) else f"adapter {p}" for p in range(count))


# --- numbers and words -----------------------------------------------------------------------------------


def of_values(values: Sequence[float]) -> Summary:
    """Mean and intervals of anything measured per episode, in its own unit."""
    return summarise([{"value": value / 100} for value in values], "value")  # `summarise` gives per cent


def span(summary: Summary) -> tuple[float, float] | None:
    """The ends of the bootstrap interval; None for one episode, which has none."""
    return (summary.low, summary.high) if has_interval(summary) else None


def has_interval(summary: Summary) -> bool:
    return math.isfinite(summary.interval)


def spoken(summary: Summary, digits: str = ".1f") -> str:
    mean, low, high = (number(value, digits) for value in (summary.mean, summary.low, summary.high))
    return f"{mean} [{low}, {high}]" if has_interval(summary) else f"{mean} (no interval)"


def interval_texts(summary: Summary, digits: str = ".1f") -> tuple[str, str, str]:
    """Half-width of the normal interval and ends of the bootstrap's, dashes for a single episode."""
    if not has_interval(summary):
        return ("–", "–", "–")
    return tuple(number(value, digits) for value in (summary.interval, summary.low, summary.high))


def numbers(summary: Summary, with_n: bool = True, signed: bool = False) -> tuple[Cell, ...]:
    """Mean, half-width, both ends and n."""
    mean = number(summary.mean, "+.1f" if signed else ".1f")
    values = (summary.mean, summary.interval, summary.low, summary.high)
    cells = tuple(map(Cell, (mean, *interval_texts(summary)), values))
    return cells + (Cell(str(summary.n), summary.n),) * with_n


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


def counts_note(summaries: Iterable[Summary]) -> str:
    return n_note(summary.n for summary in summaries)
