"""Rows of a leaderboard as one ranked page, and the clean-robust plane.

Ranks what can be compared: rows of the same sampling, attacks and domains. What every row was tuned on, and
among how many candidates, stands beside it.
"""

import itertools
from collections.abc import Sequence

from amt.evaluation import leaderboard
from amt.evaluation.comparison import compare, in_words
from amt.evaluation.runs import Run
from amt.report.charts import CHANCE, INTERVAL, Axis, Figure, Panel, Point, Series, distinct
from amt.report.document import accuracy, below_chance, rendered, results
from amt.report.shown import Shown, chances, half, label, numbers, span, spoken
from amt.report.tables import MISSING, Cell, Table, counted, number, rounded


def ranked_page(rows: Sequence[Run]) -> str:
    """The rows of a leaderboard, best first, with their differences from the first of the same setting.

    Args:
        rows: as `leaderboard.read` gives them.
    """
    settings: dict[str, list[Run]] = {}
    for run in sorted(rows, key=leaderboard.score, reverse=True):
        settings.setdefault(leaderboard.setting(run), []).append(run)
    shown = label([run for runs in settings.values() for run in runs])
    labelled = iter(shown)
    groups = [list(itertools.islice(labelled, len(runs))) for runs in settings.values()]
    return rendered(
        shown,
        lead=f"{len(rows)} rows, ranked by the mean of clean accuracy and the mean accuracy under attack.",
        rankings=[(setting_words(group[0].run), ranking(group), plane(group)) for group in groups],
        results=results(shown),
        below_chance=below_chance(shown),
    )


def setting_words(run: Run) -> str:
    """What the rows of one ranking have in common."""
    known = run.seeds[0].about
    return f"{known['split']}; {in_words(known['sampling'])}; {', '.join(run.columns[1:]) or 'clean only'}"


def ranking(shown: Sequence[Shown]) -> Table:
    """The rows of one setting: their averages with intervals that know the seeds, each seed's mean, paired
    differences from the first, and what each was tuned on among how many candidates."""
    first, rows = shown[0], []
    for place, each in enumerate(shown, 1):
        differences = compare(each.run, first.run).differences if place > 1 else {}
        cells = [Cell(each.label), counted(place)]
        for column in each.run.columns:
            found = each.run.summary(each.run.whole, column)
            by_seed = " ".join(
                f"{s.mean:.1f}" for run in each.run.seeds if (s := run.summary(each.run.whole, column))
            )
            versus = differences.get((each.run.whole, column))
            cells += [
                accuracy(each, each.run.whole, column, found)._replace(ends=f"seeds: {by_seed}"),
                Cell(f"{number(versus.mean, '+.1f')}", versus.mean, f" {half(versus)}")
                if versus
                else MISSING,
            ]
        known = each.run.about
        doubtful = ", ".join(dict.fromkeys(f"{f[0]} {f[1]}" for f in known.get("suspect", ())))
        marks = "; ".join([*known.get("stamps", ()), *([f"suspect: {doubtful}"] if doubtful else [])])
        cells += [counted(len(each.run.seeds)), counted(known["candidates"])]
        rows.append((*cells, Cell(known["tuned_on"]), Cell(marks or "none")))
    heads = [head for column in first.run.columns for head in (column, f"from {first.label}")]
    return Table(("row", "place", *heads, "seeds", "candidates", "tuned on", "stamps"), rows)


def plane(shown: Sequence[Shown], joined: Sequence[str] = ()) -> Figure | None:
    """The clean-robust plane: a point per row, its averages over domains and over the columns under attack;
    None if nothing was attacked.

    Args:
        joined: labels of the rows that are settings of one knob, joined by a line in this order; beside it
            stands their last word, in which they differ.
    """
    points, rows = {}, []
    for each in shown:
        clean = each.run.summary(each.run.whole, "clean")
        robust = [
            found for c in each.run.columns if c != "clean" and (found := each.run.summary(each.run.whole, c))
        ]
        if clean is None or not robust:
            continue
        mean = sum(found.mean for found in robust) / len(robust)
        says = f"{each.label}: clean {spoken(clean)}, mean under attack {mean:.1f}, n = {clean.n}"
        said = each.label.rpartition(" ")[2] if each.label in joined else each.label
        points[each.label] = Point(clean.mean, mean, span(clean), None, said, says)
        rows.append((Cell(each.label), *numbers(clean)[:-1], rounded(mean), counted(clean.n)))
    if not points:
        return None
    alone = [name for name in points if name not in joined]
    series = [Series(name, distinct(k), (points[name],)) for k, name in enumerate(alone)]
    if knob := tuple(points[name] for name in joined if name in points):
        name = joined[0].rpartition(" ")[0] or "the knob"
        series.append(Series(name, distinct(len(alone)), knob, joined=True))
    rules = chances(shown, shown[0].run.whole)
    x, y = (
        Axis(f"{name}, per cent", 0, 100, 20, rules=rules)  # as long as its points need: rows are compared
        for name in ("clean accuracy", "mean accuracy under attack")
    )
    under = ", ".join(column for column in shown[0].run.columns if column != "clean")
    caption = (
        f"One point per row, averages over domains; under attack the mean over {under}; bars: 95% bootstrap "
        f"intervals. {CHANCE}"
    )
    table = Table(("row", "clean", *INTERVAL, "under attack", "n"), rows)
    panel = Panel("", "", x, y, tuple(series), labelled=True)
    return Figure("plane", "Clean and robust accuracy", caption, (panel,), table)
