"""What a figure consists of: points with intervals, in series, on the axes of panels, beside a table.

Knows no runs and no drawing: `charts` makes figures of runs, `figures` draws them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from amt.evaluation.statistics import Summary
from amt.report.tables import Table

COLOURS = 6  # how many `figures` has


class Style(NamedTuple):
    """What tells a series from the others, by numbers that `figures` counts modulo what it has."""

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
        name: the run; where there is only one, the attack.
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
    """A linear axis, as long as its points need.

    Args:
        low, high: no point lies beyond.
        least: the shortest length.
        ticks: where it has them; by default at round numbers.
        names: of the places 0, 1, ... from the top, instead of ticks.
        rules: values with a line across the panel; always in sight.
        rule_name: what the lines are called, beside them.
    """

    label: str
    low: float = -math.inf
    high: float = math.inf
    least: float = 0
    ticks: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    rules: tuple[float, ...] = ()
    rule_name: str = ""


class Panel(NamedTuple):
    """One pair of axes.

    Args:
        note: how many episodes.
        labelled: whether points carry their names, and lines lead from the first of a name to the others.
        large: whether it is drawn larger than those in a grid.
    """

    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    labelled: bool = False
    large: bool = False


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


def links(panel: Panel) -> list[tuple[Point, Point]]:
    """From the first point of every name to its others."""
    found: dict[str, list[Point]] = {}
    for point in (point for series in panel.series for point in series.points):
        found.setdefault(point.name, []).append(point)
    return [(points[0], other) for points in found.values() for other in points[1:]]


def legend(panels: Sequence[Panel]) -> list[tuple[str, Style | None, int | None]]:
    """What needs to be told apart: (name, style of the marker, dash pattern), runs before attacks.

    A run under several attacks has a marker and its attacks a dash pattern; elsewhere a line has both.
    """
    series = [one for panel in panels for one in panel.series]
    found: dict[tuple[str, str], tuple[str, Style | None, int | None]] = {}
    for one in series:
        dash = one.style.dash if one.joined and not one.attack else None
        found.setdefault(("run", one.name), (one.name, one.style, dash))
    for one in series:
        if one.attack:
            found.setdefault(("attack", one.attack), (one.attack, None, one.style.dash))
    return list(found.values()) if len(found) > 1 else []
