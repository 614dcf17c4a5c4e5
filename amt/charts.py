"""What the figures of a report show: points with intervals, in panels, and the same numbers as a table.

Decides what is compared with what, never how it looks: `chart_svg` draws the figures on the page and
`chart_files` on paper, from the same descriptions. Intervals drawn are the bootstrap's; a single episode
has none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from amt.runs import Run
from amt.statistics import Summary, average_summary, paired_difference, summarise

NORMS = {"linf": "L∞", "l2": "L2"}


class Cell(NamedTuple):
    """What stands in a table, and what it is sorted by if that is a number."""

    text: str
    value: float | None = None


class Table(NamedTuple):
    """Rows of cells under their headings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Style(NamedTuple):
    """What tells a series from the others: it has a colour, a marker and a dash pattern, by number."""

    colour: int = 0
    marker: int = 0
    dash: int = 0


class Point(NamedTuple):
    """A measured value.

    Args:
        x_span, y_span: the ends of its intervals, None where it has none.
        name: of the domain.
        says: everything about it, in words.
        suspect: whether an automatic check doubts it.
    """

    x: float
    y: float
    x_span: tuple[float, float] | None
    y_span: tuple[float, float] | None
    name: str
    says: str
    suspect: bool = False


class Series(NamedTuple):
    """Points of one run, or of one run under one attack; `joined` by a line or not.

    Args:
        name: the run; where there is but one, the attack.
        attack: where both runs and attacks differ; colour and marker are then the run's, dashes its own.
    """

    name: str
    style: Style
    points: tuple[Point, ...]
    joined: bool = False
    attack: str = ""


class Axis(NamedTuple):
    """A linear axis. With `names` the places 0, 1, ... are those, from the top, and it has no ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...] = ()
    names: tuple[str, ...] = ()


class Panel(NamedTuple):
    """One pair of axes.

    Args:
        note: how many episodes.
        labelled: whether points carry their names, and lines lead from the first of a name to the others.
        zero: whether there is a rule where nothing differs.
    """

    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    labelled: bool = False
    zero: bool = False


class Figure(NamedTuple):
    """A figure of one or several panels; `slug` names its files, `caption` says n and the intervals."""

    slug: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    table: Table


class Share(NamedTuple):
    """How much one adapter was merged into the tasks of one domain, in per cent."""

    summary: Summary
    quartiles: tuple[float, float, float, float, float]  # least, lower, median, upper, most


class HeatMap(NamedTuple):
    """Shares by domain and adapter, for one run; a cell without shares is None."""

    slug: str
    title: str
    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Share | None, ...], ...]
    table: Table


class Shown:
    """A run under the label that it has in the report.

    Args:
        label: unlike that of every other run shown.
        place: its number among them, from 0.
    """

    def __init__(self, label: str, place: int, run: Run):
        self.label = label
        self.place = place
        self.run = run

    @property
    def style(self) -> Style:
        return Style(self.place, self.place, 0)

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
        f"One point per domain and run over {episode_counts(shown)}; bars: 95% bootstrap intervals. "
        + (f"Robust accuracy is column {name}." if alike else "The runs share no attack: ")
        + ("" if alike else "; ".join(f"{e.label} has {c}" for e, c in zip(shown, robust, strict=True)) + ".")
        + (f" Lines lead from {series[0].name} to the others." if len(series) > 1 else "")
    )
    panel = Panel(
        "",
        "",
        _axis("clean accuracy, per cent", [v for p in points for v in (p.x_span or (p.x, p.x))], (0, 100)),
        _axis(
            f"accuracy under {name}, per cent" if alike else "robust accuracy, per cent",
            [v for p in points for v in (p.y_span or (p.y, p.y))],
            (0, 100),
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
        x = Axis(f"epsilon in 1/255, {NORMS[norm]}", 0, largest, _epsilon_ticks(by_attack.values()))
        y = Axis("accuracy, per cent", 0, 100, (0, 25, 50, 75, 100))
        panels, rows = [], []
        for name in union([averages, domains(shown)]):
            series, counts = [], []
            for each in shown:
                for k, (attack, found) in enumerate(by_attack.items()):
                    points = _curve(each, name, attack, found, rows)
                    if len(points) > 1 and len(shown) > 1:
                        series.append(Series(each.label, each.style._replace(dash=k), points, True, attack))
                    elif len(points) > 1:
                        series.append(Series(attack, Style(k, k, k), points, True))
                if each.summary(name, "clean") is not None:
                    counts.append(each.summary(name, "clean").n)
            if series:
                panels.append(Panel(name, n_note(counts), x, y, tuple(series)))
        if panels:
            caption = (
                f"Accuracy against the size of the perturbation in the {NORMS[norm]} norm, clean at 0; "
                "bars: 95% bootstrap intervals, n episodes as noted."
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
    """What distinguishes runs from the first one, on the same episodes; `refusals` name those that differ."""

    figure: Figure | None
    refusals: tuple[str, ...]
    averages: tuple[tuple[str, str, Summary], ...]  # (run, column, over all domains shared)


def differences(shown: Sequence[Shown]) -> Differences:
    """Paired differences of every other run from the first, where they scored the same episodes."""
    reference, refusals, averages = shown[0], [], []
    found: dict[tuple[str, str, str], Summary] = {}  # by column, domain, run
    over_all: dict[tuple[str, str, str], Summary] = {}
    for each in shown[1:]:
        if (reason := other_episodes(each.run.about, reference.run.about)) is not None:
            refusals.append(f"{each.label} cannot be paired with {reference.label}: {reason}")
            continue
        pairs = {
            domain: same_episodes(each.run.rows.get(domain, ()), reference.run.rows.get(domain, ()))
            for domain in domains([reference, each])
        }
        for domain in [domain for domain, pair in pairs.items() if pair is None]:
            refusals.append(f"{each.label} and {reference.label} share no episode of {domain}")
            del pairs[domain]
        for column in [c for c in reference.run.columns if c in each.run.columns and pairs]:
            by_domain = {domain: paired_difference(*pair, column) for domain, pair in pairs.items()}
            found |= {(column, domain, each.label): summary for domain, summary in by_domain.items()}
            overall = average_summary(list(by_domain.values()))
            averages.append((each.label, column, overall))
            if len(by_domain) > 1:
                over_all[column, f"average of {len(by_domain)}", each.label] = overall
    if not found:
        return Differences(None, tuple(refusals), ())
    found |= over_all
    names = union([domains(shown), (name for _, name, _ in over_all)])
    panels = []
    for column in union([["clean"], (c for c in robust_columns(shown) if c)]):
        here = {key[1:]: summary for key, summary in found.items() if key[0] == column}
        present = [name for name in names if any(name == domain for domain, _ in here)]
        if present:
            panels.append(_rows_panel(column, "difference in points", present, here, shown, zero=True))
    rows = [
        (Cell(domain), Cell(name), Cell(column), *numbers(summary, signed=True))
        for (column, domain, name), summary in found.items()
    ]
    caption = (
        f"Accuracy minus that of {reference.label} on the same episodes, in points; "
        f"bars: 95% bootstrap intervals of the paired difference, {counts_note(found.values())}. "
        f"Right of zero is better than {reference.label}."
    )
    headings = ("domain", "run", "column", "difference", "±", "from", "to", "n")
    title = f"Differences from {reference.label}"
    figure = Figure("differences", title, caption, tuple(panels), Table(headings, tuple(rows)))
    return Differences(figure, tuple(refusals), tuple(averages))


def other_episodes(ours: Mapping, theirs: Mapping) -> str | None:
    """Why two runs did not draw the same episodes; None if they did."""
    for name in ("seed", "split", "sampling"):
        if ours.get(name) != theirs.get(name):
            return f"its {name} is {in_words(ours.get(name))}, not {in_words(theirs.get(name))}"
    return None


def in_words(value: object) -> str:
    """A setting in a sentence."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def same_episodes(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> tuple[list, list] | None:
    """The rows of the episodes that both runs finished; None if there is none, or the shapes differ."""
    by_index = {row["index"]: row for row in theirs}
    pairs = [(row, by_index[row["index"]]) for row in ours if row["index"] in by_index]
    shape = ("ways", "support", "queries")
    if not pairs or any(a.get(name) != b.get(name) for a, b in pairs for name in shape):
        return None
    return [a for a, _ in pairs], [b for _, b in pairs]


def seconds(shown: Sequence[Shown]) -> Figure:
    """Seconds per episode, by domain and run."""
    found = {
        (domain, each.label): of_values([row["seconds"] for row in rows])
        for each in shown
        for domain, rows in each.run.rows.items()
        if all("seconds" in row for row in rows)
    }
    panel = _rows_panel("", "seconds per episode, attacks included", domains(shown), found, shown)
    rows = []
    for (domain, name), summary in found.items():
        texts = (f"{summary.mean:.3g}", *interval_texts(summary, ".2g"))
        values = (summary.mean, summary.interval, summary.low, summary.high)
        rows.append((Cell(domain), Cell(name), *map(Cell, texts, values), Cell(str(summary.n), summary.n)))
    caption = f"Mean seconds per episode; bars: 95% bootstrap intervals, {counts_note(found.values())}."
    headings = ("domain", "run", "seconds", "±", "from", "to", "n")
    return Figure("seconds", "Time per episode", caption, (panel,), Table(headings, tuple(rows)))


def _rows_panel(
    title: str,
    x_label: str,
    names: Sequence[str],
    found: Mapping[tuple[str, str], Summary],
    shown: Sequence[Shown],
    zero: bool = False,
) -> Panel:
    """A panel with a line of its own for every domain, on which the runs stand."""
    series = []
    for each in shown:
        points = [
            Point(s.mean, k, span(s), None, name, f"{name}, {each.label}: {spoken(s, '.3g')}, n = {s.n}")
            for k, name in enumerate(names)
            if (s := found.get((name, each.label))) is not None
        ]
        if points:
            series.append(Series(each.label, each.style, tuple(points)))
    values = [0.0] + [v for one in series for p in one.points for v in (p.x_span or (p.x, p.x))]
    x = _axis(x_label, values)
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
    if not has_interval(summary):
        return f"{summary.mean:{digits}} (no interval)"
    return f"{summary.mean:{digits}} [{summary.low:{digits}}, {summary.high:{digits}}]"


def interval_texts(summary: Summary, digits: str = ".1f") -> tuple[str, str, str]:
    """Half-width of the normal interval and ends of the bootstrap's, dashes for a single episode."""
    if not has_interval(summary):
        return ("–", "–", "–")
    return tuple(f"{value:{digits}}" for value in (summary.interval, summary.low, summary.high))


def numbers(summary: Summary, with_n: bool = True, signed: bool = False) -> tuple[Cell, ...]:
    """Mean, half-width, both ends and n."""
    mean = f"{summary.mean:+.1f}" if signed else f"{summary.mean:.1f}"
    values = (summary.mean, summary.interval, summary.low, summary.high)
    cells = tuple(map(Cell, (mean, *interval_texts(summary)), values))
    return cells + (Cell(str(summary.n), summary.n),) * with_n


def episode_counts(shown: Sequence[Shown]) -> str:
    return episodes({len(rows) for each in shown for rows in each.run.rows.values()}) + " each"


def episodes(counts: Iterable[int]) -> str:
    least, most = min(counts := set(counts)), max(counts)
    return f"{least} episode{'s' * (least != 1)}" if least == most else f"{least} to {most} episodes"


def n_note(counts: Iterable[int]) -> str:
    counts = set(counts)
    return f"n = {min(counts)}" if len(counts) == 1 else f"n = {min(counts)} to {max(counts)}"


def counts_note(summaries: Iterable[Summary]) -> str:
    return n_note(summary.n for summary in summaries)


def tick_values(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Round numbers from `low` to `high` at most, about `count` of them."""
    if high <= low:
        return (low,)
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(k * step, 10) for k in range(first, last + 1))


def number(value: float) -> str:
    """For the tick of an axis."""
    return f"{value:g}".replace("-", "−")


def legend(figure: Figure) -> list[tuple[str, Style | None, int | None]]:
    """What needs to be told apart: (name, style of the marker, dash pattern), runs before attacks.

    A run under several attacks has a marker and its attacks a dash pattern; elsewhere a line has both.
    """
    series = [one for panel in figure.panels for one in panel.series]
    found: dict[str, tuple[str, Style | None, int | None]] = {}
    for one in series:
        both = one.joined and not one.attack
        found.setdefault("run " + one.name, (one.name, one.style, one.style.dash if both else None))
    for one in series:
        if one.attack:
            found.setdefault("attack " + one.attack, (one.attack, None, one.style.dash))
    return list(found.values()) if len(found) > 1 else []


def links(panel: Panel) -> list[tuple[Point, Point]]:
    """From the first point of every name to its others."""
    return [(points[0], other) for points in by_name(panel).values() for other in points[1:]]


def along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """A line as a chain of small obstacles for labels."""
    return [
        (x - 1, y - 1, x + 1, y + 1)
        for x, y in zip(np.linspace(start[0], end[0], 25), np.linspace(start[1], end[1], 25), strict=True)
    ]


def dodge(place: int, count: int, step: float, most: float) -> float:
    """How far aside series `place` of `count` stands, so that intervals at one place do not hide each other."""
    return (place - (count - 1) / 2) * min(step, most / count)


def _axis(label: str, values: Sequence[float], limits: tuple[float, float] = (-math.inf, math.inf)) -> Axis:
    """An axis with room for the values, ending at ticks, within the limits."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = max(limits[0], low - 1), min(limits[1], high + 1)
    first, second, *_ = tick_values(low, low + 2 * (high - low), 10)
    step = second - first
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    low, high = max(limits[0], low), min(limits[1], high)
    return Axis(label, low, high, tick_values(low, high, 5))


def by_name(panel: Panel) -> dict[str, list[Point]]:
    """The points of a panel by domain, in the order of its series."""
    found: dict[str, list[Point]] = {}
    for point in (point for series in panel.series for point in series.points):
        found.setdefault(point.name, []).append(point)
    return found


Box = tuple[float, float, float, float]  # left, top, right, bottom


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    room: Box,
    obstacles: Sequence[Box],
    gap: float,
) -> list[Box]:
    """Boxes for labels beside their anchors, within `room`, off each other and off obstacles where possible.

    Greedy, nearest places first; all in one unit of length, y downwards or upwards alike.
    """
    placed: list[Box] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        candidates = []
        for distance in (gap, 2 * gap, 3.5 * gap, 5 * gap):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
                cx = x + dx * (distance + width / 2)
                cy = y + dy * (distance + height / 2) * (1 if dx == 0 else 0.8)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = box[0] < room[0] or box[1] < room[1] or box[2] > room[2] or box[3] > room[3]
                hits = 10 * sum(_overlap(box, other) for other in placed)
                hits += sum(_overlap(box, other) for other in obstacles)
                candidates.append((1e9 * outside + hits + 0.1 * distance, len(candidates), box))
        placed.append(min(candidates)[2])
    return placed


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
