"""What the figures of a report show: points with intervals, in panels, and the same numbers as a table.

Decides what is compared with what, in terms of `panels`; `figures` draws it. Intervals are the bootstrap's;
one episode has none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from amt.evaluation.chance import is_below_chance
from amt.evaluation.comparison import compare
from amt.evaluation.statistics import Summary
from amt.report.panels import Axis, Figure, HeatMap, Panel, Point, Series, Share, distinct
from amt.report.shown import (
    NORMS,
    Shown,
    attack_of,
    averages_and_domains,
    chances,
    columns,
    curve_columns,
    domains,
    n_note,
    norm_of,
    numbers,
    of_values,
    robust_columns,
    row_counts,
    span,
    spoken,
    telling,
    union,
    units,
)
from amt.report.tables import Cell, Table, rounded

INTERVAL = ("±", "from", "to")
CHANCE = "Dashed: chance, the accuracy of guessing."
PER_CENT = ("accuracy, per cent", 0, 100, 100, (0, 25, 50, 75, 100))  # of every accuracy: honest, and alike


def figures(shown: Sequence[Shown]) -> list[Figure | HeatMap]:
    """All figures of a report."""
    compared = differences(shown).figure if len(shown) > 1 else None
    found = [scatter(shown), hero(shown), *curves(shown), compared, *heat_maps(shown), seconds(shown)]
    return [figure for figure in found if figure is not None]


def scatter(shown: Sequence[Shown]) -> Figure | None:
    """Robust against clean accuracy, a point per domain and run; None if nothing was attacked."""
    robust = telling(shown) * len(shown) or robust_columns(shown)
    series, rows = [], []
    for each, column in zip(shown, robust, strict=True):
        if column is None:
            continue
        points = []
        for domain in each.run.rows:
            clean, attacked = (each.run.summaries[domain, name] for name in ("clean", column))
            doubt = each.doubt(domain, ("clean", column))
            told = f"clean {spoken(clean)}, {column} {spoken(attacked)}, n = {clean.n}"
            says = f"{domain}, {each.label}: {told}{doubt}"
            spans = span(clean), span(attacked)
            points.append(Point(clean.mean, attacked.mean, *spans, domain, says, bool(doubt)))
            names = (Cell(domain + doubt), Cell(each.label), Cell(column))
            rows.append((*names, *numbers(clean)[:-1], *numbers(attacked)))
        series.append(Series(each.label, distinct(each.place), tuple(points)))
    if not series:
        return None
    first = next(filter(None, robust))
    if len(set(robust)) == 1:
        under, which = f"accuracy under {first}", f"Robust accuracy is column {first}{_why(shown, first)}."
    else:
        own = "; ".join(f"{e.label} has {c}" for e, c in zip(shown, robust, strict=True))
        under, which = "robust accuracy", f"The runs share no attack: {own}."
    caption = f"One point per domain and run over {row_counts(shown)}; bars: 95% bootstrap intervals. {which}"
    if len(series) > 1:
        caption += f" Lines lead from {series[0].name} to the others."
    rules = [round(each.run.chance(name), 6) for each in shown for name in each.run.rows]
    rules = tuple(dict.fromkeys(rules)) if len(set(rules)) == 1 else ()
    caption += f" {CHANCE}" * bool(rules)
    x, y = (Axis(f"{name}, per cent", *PER_CENT[1:], rules=rules) for name in ("clean accuracy", under))
    panel = Panel("", "", x, y, tuple(series), labelled=True)
    table = Table(("domain", "run", "robust column", "clean", *INTERVAL, "robust", *INTERVAL, "n"), rows)
    return Figure("clean_robust", "Clean and robust accuracy", caption, (panel,), table)


def _why(shown: Sequence[Shown], column: str) -> str:
    """Why a column stands for robust accuracy, where others attack more."""
    if column == curve_columns(shown)[-1]:
        return ""
    above = any(not is_below_chance(each.run, each.run.whole, column) for each in shown)
    return ", the last at which a run is above chance" if above else ", the weakest; no run is above chance"


def hero(shown: Sequence[Shown]) -> Figure | None:
    """The curve of the headline, large: what stands for each run, a line per run; None without a curve."""
    columns = [parts for column in curve_columns(shown) if (parts := attack_of(column)) is not None]
    names = {each.run.whole for each in shown}
    if not columns or len(names) > 1:
        return None
    attack, name = columns[0][0], names.pop()
    norm = norm_of(attack)
    found = _curves(shown, norm, {attack: attacks_by_norm(shown)[norm][attack]}, [name])
    if found is None:
        return None
    title = "Accuracy as the attack grows"
    (panel,) = found.panels
    return found._replace(slug=f"curve_{norm}", title=title, panels=(panel._replace(large=True),))


def curves(shown: Sequence[Shown]) -> list[Figure]:
    """Accuracy against epsilon, a figure per norm, a panel per domain, a line per run and attack; what `hero`
    shows is left out."""
    found, large = [], hero(shown)
    for norm, attacks in attacks_by_norm(shown).items():
        names = averages_and_domains(shown)
        if large is not None and large.slug == f"curve_{norm}" and len(attacks) == 1:
            names.remove(large.panels[0].title)
        if names and (figure := _curves(shown, norm, attacks, names)) is not None:
            found.append(figure)
    return found


def _curves(
    shown: Sequence[Shown], norm: str, attacks: Mapping[str, Mapping[float, str]], names: Sequence[str]
) -> Figure | None:
    radii = [epsilon for radii in attacks.values() for epsilon in radii]
    x = Axis(f"epsilon in 1/255, {NORMS[norm]}", 0, max(radii), max(radii), epsilon_ticks(radii))
    rows: list[tuple[Cell, ...]] = []
    panels = curve_panels(shown, names, x, lambda name: _lines(shown, name, attacks, rows))
    if not panels:
        return None
    caption = (
        f"Accuracy under {', '.join(attacks)} against the size of the perturbation in the {NORMS[norm]} "
        f"norm, clean at 0; bars: 95% bootstrap intervals, n {units(shown)} as noted. {CHANCE}"
    )
    table = Table(("domain", "run", "attack", "epsilon", "accuracy", *INTERVAL, "n"), rows)
    return Figure(f"curves_{norm}", f"Robustness curves, {NORMS[norm]}", caption, panels, table)


def curve_panels(
    shown: Sequence[Shown], names: Sequence[str], x: Axis, lines: Callable[[str], Sequence[Series]]
) -> tuple[Panel, ...]:
    """A panel for each of the `names` that have lines: accuracy against `x`, with n and chance."""
    panels = []
    for name in names:
        if series := lines(name):
            counts = [clean.n for each in shown if (clean := each.run.summary(name, "clean")) is not None]
            y = Axis(*PER_CENT, rules=chances(shown, name), rule_name="chance")
            panels.append(Panel(name, n_note(counts), x, y, tuple(series)))
    return tuple(panels)


def measured(
    each: Shown, name: str, column: str, x: float, where: str, names: tuple[Cell, ...]
) -> tuple[Point, tuple[Cell, ...]] | None:
    """An accuracy as a point at `x`, which says `where` that is, and as the row of a table that begins with
    `names`; None where there is none."""
    if (summary := each.run.summary(name, column)) is None:
        return None
    doubt = each.doubt(name, (column,))
    says = f"{name}, {where}: {spoken(summary)}, n = {summary.n}{doubt}"
    point = Point(x, summary.mean, None, span(summary), name, says, bool(doubt))
    return point, (Cell(name + doubt), *names, *numbers(summary))


def attacks_by_norm(shown: Sequence[Shown]) -> dict[str, dict[str, dict[float, str]]]:
    """By norm and attack, the column of every epsilon."""
    found: dict[str, dict[str, dict[float, str]]] = {}
    for column in columns(shown):
        if (parts := attack_of(column)) is not None:
            attack, epsilon = parts
            found.setdefault(norm_of(attack), {}).setdefault(attack, {})[epsilon] = column
    return found


def _lines(
    shown: Sequence[Shown],
    name: str,
    attacks: Mapping[str, Mapping[float, str]],
    rows: list[tuple[Cell, ...]],
) -> list[Series]:
    """The lines of one panel; the numbers of their points are appended to `rows`."""
    series = []
    for each in shown:
        for k, (attack, radii) in enumerate(attacks.items()):
            points = []
            for epsilon, column in sorted({0.0: "clean", **radii}.items()):
                where = f"{each.label}, {attack}, epsilon {epsilon:g}"
                names = (Cell(each.label), Cell(attack), Cell(f"{epsilon:g}", epsilon))
                if found := measured(each, name, column, epsilon, where, names):
                    points.append(found[0])
                    rows.append(found[1])
            if len(points) > 1 and len(shown) > 1:
                style = distinct(each.place)._replace(dash=k)
                series.append(Series(each.label, style, tuple(points), True, attack, each.place))
            elif len(points) > 1:
                series.append(Series(attack, distinct(k)._replace(dash=k), tuple(points), True))
    return series


def epsilon_ticks(radii: Iterable[float]) -> tuple[float, ...]:
    """The radii themselves, without those whose labels would touch."""
    values, ticks = sorted(set(radii), reverse=True), []
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
    by_run, refusals = _compared(shown)
    names = union((name for name, _ in found) for found in by_run.values())
    names.sort(key=lambda name: name in reference.run.averages)
    panels, rows = [], []
    drawn = {"clean", *robust_columns(shown), *curve_columns(shown)}
    reach = _reach(found[key] for found in by_run.values() for key in found if key[1] in drawn)
    x = Axis("difference in points", -reach, reach, 2 * reach, rules=(0,))
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
            (Cell(name + doubts[name, label]), Cell(label), Cell(column), *numbers(summary, "+.1f"))
            for (name, label), summary in here.items()
        ]
        if here and column in drawn:
            panels.append(_rows_panel(column, x, names, here, shown, doubts))
    if not panels:
        return Differences(None, by_run, refusals)
    counts = n_note(summary.n for found in by_run.values() for summary in found.values())
    caption = (
        f"Accuracy minus that of {reference.label} on the same {units(shown)}, in points; "
        f"bars: 95% bootstrap intervals of the paired difference, {counts}. "
        f"Right of zero is better than {reference.label}."
    )
    table = Table(("domain", "run", "column", "difference", *INTERVAL, "n"), rows)
    title = f"Differences from {reference.label}"
    return Differences(Figure("differences", title, caption, tuple(panels), table), by_run, refusals)


def _reach(summaries: Iterable[Summary]) -> float:
    """How far differences go from zero on either side, in tens of points: the same scale for all."""
    ends = [abs(end) for summary in summaries for end in (summary.mean, summary.low, summary.high)]
    return 10 * max(1, -(-max(ends, default=0) // 10))


def _compared(shown: Sequence[Shown]) -> tuple[dict[str, dict[tuple[str, str], Summary]], tuple[str, ...]]:
    """By label the differences from the first run; and the refusals, each once with the runs it concerns."""
    reference = shown[0]
    by_run, concerned = {}, {}
    for each in shown[1:]:
        found = compare(each.run, reference.run)
        by_run[each.label] = found.differences
        for reason in found.refusals:
            concerned.setdefault(reason, []).append(each.label)
    return by_run, tuple(
        f"no differences of {', '.join(labels)} from {reference.label}: {reason}"
        for reason, labels in concerned.items()
    )


def seconds(shown: Sequence[Shown]) -> Figure:
    """Seconds per episode or image, by domain and run."""
    unit = units(shown, plural=False)
    found = {
        (domain, each.label): of_values([row["seconds"] for row in rows])
        for each in shown
        for domain, rows in each.run.rows.items()
    }
    axis = Axis(f"seconds per {unit}, attacks included", rules=(0,))
    panel = _rows_panel("", axis, domains(shown), found, shown, {})
    rows = [
        (Cell(domain), Cell(name), *numbers(summary, ".3g", ".2g"))
        for (domain, name), summary in found.items()
    ]
    caption = f"Mean seconds per {unit}; bars: 95% bootstrap intervals, {panel.note}."
    table = Table(("domain", "run", "seconds", *INTERVAL, "n"), rows)
    return Figure("seconds", f"Time per {unit}", caption, (panel,), table)


def _rows_panel(
    title: str,
    x: Axis,
    names: Sequence[str],
    found: Mapping[tuple[str, str], Summary],
    shown: Sequence[Shown],
    doubts: Mapping[tuple[str, str], str],
) -> Panel:
    """A panel with a line of its own for every domain, on which the runs stand."""
    names = [name for name in names if any((name, each.label) in found for each in shown)]
    series = []
    for each in shown:
        points = []
        for k, name in enumerate(names):
            if (s := found.get((name, each.label))) is not None:
                doubt = doubts.get((name, each.label), "")
                says = f"{name}, {each.label}: {spoken(s, '.3g')}, n = {s.n}{doubt}"
                points.append(Point(s.mean, k, span(s), None, name, says, bool(doubt)))
        if points:
            series.append(Series(each.label, distinct(each.place), tuple(points), lane=each.place))
    note = n_note(summary.n for summary in found.values())
    return Panel(title, note, x, Axis("", names=tuple(names)), tuple(series))


def heat_maps(shown: Sequence[Shown]) -> list[HeatMap]:
    """What was merged, for every run that merged anything."""
    return [found for each in shown if (found := _merged_by(each)) is not None]


def _merged_by(each: Shown) -> HeatMap | None:
    rows = {
        domain: coefficients
        for domain, found in each.run.rows.items()
        if (coefficients := [row["coefficients"] for row in found if row.get("coefficients")])
    }
    if not rows:
        return None
    count = max(len(shares) for found in rows.values() for shares in found)
    names = adapter_names(each.run.merging, count)
    cells = tuple(
        tuple(_share([shares[p] for shares in found if p < len(shares)]) for p in range(count))
        for found in rows.values()
    )
    shares = [
        (domain, name, share)
        for domain, line in zip(rows, cells, strict=True)
        for name, share in zip(names, line, strict=True)
        if share is not None
    ]
    caption = (
        "What the network that answers is made of: adapters are merged anew for every task, and a bar shows "
        "the mean share of each, in per cent, which add up to 100. An adapter is told by its number and the "
        f"epsilon, in 1/255, that it was trained for. {n_note(share.summary.n for *_, share in shares)} "
        "tasks a bar; how far tasks differ is in the numbers."
    )
    title = f"Adapters merged by {each.label}"
    table = _shares_table(shares)
    return HeatMap(f"merging_{each.place + 1}", title, caption, tuple(rows), names, cells, table)


def _shares_table(shares: Iterable[tuple[str, str, Share]]) -> Table:
    rows = []
    for domain, name, share in shares:
        *mean, n = numbers(share.summary)
        rows.append((Cell(domain), Cell(name), *mean, *map(rounded, share.quartiles), n))
    quartiles = ("least", "lower quartile", "median", "upper quartile", "most")
    return Table(("domain", "adapter", "mean", *INTERVAL, *quartiles, "n"), rows)


def _share(values: Sequence[float]) -> Share | None:
    if not values:
        return None
    values = [100 * value for value in values]
    return Share(of_values(values), tuple(np.percentile(values, (0, 25, 50, 75, 100)).tolist()))


def adapter_names(merging: Mapping[str, Mapping], count: int) -> tuple[str, ...]:
    """The adapters by number, with what they were trained for where that is known and the same throughout."""
    levels = {tuple(how["epsilons"]) for how in merging.values() if isinstance(how.get("epsilons"), list)}
    known = next(iter(levels)) if len(levels) == 1 else ()
    return tuple(f"{p}: ε {known[p]:g}" if p < len(known) else f"adapter {p}" for p in range(count))
