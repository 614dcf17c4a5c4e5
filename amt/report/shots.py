"""Accuracy against the number of shots, of runs that `--shots` has made: the way papers on CLIP show it."""

from collections.abc import Sequence

from amt.report.charts import CHANCE, INTERVAL, curve_panels, epsilon_ticks, measured
from amt.report.panels import Axis, Figure, Series, distinct
from amt.report.shown import Shown, averages_and_domains, columns, units
from amt.report.tables import Cell, Table, counted


def curves(shown: Sequence[Shown]) -> list[Figure]:
    """A figure with a panel per domain and a line per column; none, unless every run notes its own number of
    shots."""
    by_shots: dict[int, Shown] = {e.run.about["shots"]: e for e in shown if "shots" in e.run.about}
    if len(shown) < 2 or len(by_shots) < len(shown):
        return []
    runs = [by_shots[number] for number in sorted(by_shots)]
    x = Axis("shots", 0, max(by_shots), max(by_shots), epsilon_ticks(map(float, by_shots)))
    rows: list[tuple[Cell, ...]] = []

    def lines(name: str) -> list[Series]:
        found = (_line(runs, name, column, k, rows) for k, column in enumerate(columns(runs)))
        return [line for line in found if line is not None]

    panels = curve_panels(runs, averages_and_domains(runs), x, lines)
    caption = (
        "Accuracy against the number of labelled images of a class; at 0 texts alone classify. Bars: 95% "
        f"bootstrap intervals, n {units(shown)} as noted. {CHANCE}"
    )
    table = Table(("domain", "shots", "column", "accuracy", *INTERVAL, "n"), rows)
    return [Figure("shots", "Accuracy by shots", caption, panels, table)]


def _line(
    runs: Sequence[Shown], name: str, column: str, place: int, rows: list[tuple[Cell, ...]]
) -> Series | None:
    """One column of one domain; the numbers of its points are appended to `rows`."""
    points = []
    for each in runs:
        shots = each.run.about["shots"]
        names = (counted(shots), Cell(column))
        if found := measured(each, name, column, shots, f"{shots} shots, {column}", names):
            points.append(found[0])
            rows.append(found[1])
    return Series(column, distinct(place), tuple(points), True, lane=place) if points else None
