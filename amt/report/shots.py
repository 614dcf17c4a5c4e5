"""Accuracy against the number of shots, of runs that `--shots` has made: the way papers on CLIP show it."""

from collections.abc import Sequence

from amt.report.charts import CHANCE, INTERVAL, PER_CENT, epsilon_ticks
from amt.report.panels import Axis, Figure, Panel, Point, Series, distinct
from amt.report.shown import (
    Shown,
    chances,
    columns,
    domains,
    n_note,
    numbers,
    span,
    spoken,
    union,
    units,
)
from amt.report.tables import Cell, Table


def curves(shown: Sequence[Shown]) -> list[Figure]:
    """A figure with a panel per domain and a line per column; none, unless every run notes its own number of
    shots."""
    by_shots = {each.run.about.get("shots"): each for each in shown}
    if None in by_shots or len(shown) < 2 or len(by_shots) < len(shown):
        return []
    runs = [by_shots[number] for number in sorted(by_shots)]
    names = union([(each.average for each in runs if each.average), domains(runs)])
    x = Axis("shots", 0, max(by_shots), max(by_shots), epsilon_ticks(map(float, by_shots)))
    panels, rows = [], []
    for name in names:
        series = [s for k, column in enumerate(columns(runs)) if (s := _line(runs, name, column, k, rows))]
        counts = [found.n for each in runs if (found := each.summary(name, "clean")) is not None]
        y = Axis(*PER_CENT, rules=chances(runs, name), rule_name="chance")
        panels.append(Panel(name, n_note(counts), x, y, tuple(series)))
    caption = (
        "Accuracy against the number of labelled images of a class; at 0 texts alone classify. Bars: 95% "
        f"bootstrap intervals, n {units(shown)} as noted. {CHANCE}"
    )
    table = Table(("domain", "shots", "column", "accuracy", *INTERVAL, "n"), rows)
    return [Figure("shots", "Accuracy by shots", caption, tuple(panels), table)]


def _line(
    runs: Sequence[Shown], name: str, column: str, place: int, rows: list[tuple[Cell, ...]]
) -> Series | None:
    """One column of one domain; the numbers of its points are appended to `rows`."""
    points = []
    for each in runs:
        shots = each.run.about["shots"]
        if (summary := each.summary(name, column)) is None:
            continue
        doubt = each.doubt(name, (column,))
        says = f"{name}, {shots} shots, {column}: {spoken(summary)}, n = {summary.n}{doubt}"
        points.append(Point(shots, summary.mean, None, span(summary), name, says, bool(doubt)))
        rows.append((Cell(name + doubt), Cell(str(shots), shots), Cell(column), *numbers(summary)))
    return Series(column, distinct(place), tuple(points), True, lane=place) if points else None
