"""What a figure consists of, and how its parts find their places; for a page and for paper alike.

Knows no run and no renderer: `charts` makes figures of runs, `svg` and `files` draw them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from amt.evaluation.statistics import Summary

Box = tuple[float, float, float, float]  # left, top, right, bottom

COLOURS, MARKERS, DASHES = 6, 6, 5  # how many there are


class Cell(NamedTuple):
    """What stands in a table, and what it is sorted by if that is a number."""

    text: str
    value: float | None = None


class Table(NamedTuple):
    """Rows of cells under their headings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Style(NamedTuple):
    """What tells a series from the others: it has a colour, a marker and a dash pattern, by number.

    The numbers are counted modulo `COLOURS`, `MARKERS` and `DASHES`.
    """

    colour: int
    marker: int
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
        lane: series of other lanes stand side by side, so that their intervals do not hide each other.
    """

    name: str
    style: Style
    points: tuple[Point, ...]
    joined: bool = False
    attack: str = ""
    lane: int = 0


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


def distinct(k: int) -> Style:
    """A style unlike that of any other k below 36."""
    return Style(k, k + k // COLOURS)


def by_name(panel: Panel) -> dict[str, list[Point]]:
    """The points of a panel by domain, in the order of its series."""
    found: dict[str, list[Point]] = {}
    for point in (point for series in panel.series for point in series.points):
        found.setdefault(point.name, []).append(point)
    return found


def links(panel: Panel) -> list[tuple[Point, Point]]:
    """From the first point of every name to its others."""
    return [(points[0], other) for points in by_name(panel).values() for other in points[1:]]


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


def asides(panel: Panel, step: float, most: float) -> list[float]:
    """How far every series stands aside of its values: `step` per lane, all lanes within `most`."""
    lanes = sorted({series.lane for series in panel.series})
    step = min(step, most / len(lanes))
    return [(lanes.index(series.lane) - (len(lanes) - 1) / 2) * step for series in panel.series]


def axis(
    label: str, values: Sequence[float], limits: tuple[float, float] = (-math.inf, math.inf), least: float = 0
) -> Axis:
    """An axis with room for the values and a reach of at least `least`, a little beyond round numbers."""
    low, high = min(values), max(values)
    least = least or 1.0 * (low == high)
    if high - low < least:
        middle = min(max((low + high) / 2, limits[0] + least / 2), limits[1] - least / 2)
        low, high = middle - least / 2, middle + least / 2
    step = np.diff(tick_values(low, low + 2 * (high - low), 10)[:2]).item()
    low = max(limits[0], math.floor(low / step + 1e-9) * step)
    high = min(limits[1], math.ceil(high / step - 1e-9) * step)
    margin = 0.03 * (high - low)  # a marker at an end of the range keeps off the frame
    return Axis(label, low - margin, high + margin, tick_values(low, high, 5))


def tick_values(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Round numbers from `low` to `high` at most, about `count` of them."""
    if high <= low:
        return (low,)
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(k * step, 10) for k in range(first, last + 1))


def number(value: float, digits: str = "g") -> str:
    """A number with a minus sign, not a hyphen."""
    return f"{value:{digits}}".replace("-", "−")


def along(start: tuple[float, float], end: tuple[float, float]) -> list[Box]:
    """A line as a chain of small obstacles for labels."""
    return [
        (x - 1, y - 1, x + 1, y + 1)
        for x, y in zip(np.linspace(start[0], end[0], 25), np.linspace(start[1], end[1], 25), strict=True)
    ]


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
