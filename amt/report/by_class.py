"""What a report says about classes: the accuracy of each, and which are taken for which.

A few classes become a matrix, many a table of the pairs that are most often confused. Files beside the run
hold everything (`answer_files`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from amt.evaluation.classes import Gathered, by_class, confusions, gather, most_confused
from amt.report.shown import Shown, domains, telling
from amt.report.tables import MISSING, Cell, Table, counted, rounded

MOST_CLASSES = 30  # in a matrix, and in a table of classes
MOST_PAIRS = 15
CELLS = 40_000  # of all matrices of a page


class Square(NamedTuple):
    """A cell of a matrix.

    Args:
        text: the share in per cent, empty for none.
        share: in per cent, of the images of the true class in tasks that have both classes.
        says: the same in words.
        right: whether it is on the diagonal.
    """

    text: str
    share: float
    says: str
    right: bool


class Matrix(NamedTuple):
    """Rows are true classes, columns what they were taken for."""

    title: str
    names: tuple[str, ...]
    rows: tuple[tuple[Square | None, ...], ...]


class Domain(NamedTuple):
    """What is shown of one domain.

    Args:
        classes: the accuracy of each class by run, or of the least accurate ones.
        hidden: how many classes the table leaves out.
        matrices: by run and column; none where there are too many classes.
        pairs: the pairs of classes most often confused, where there is no matrix.
    """

    name: str
    classes: Table
    hidden: int
    matrices: list[Matrix]
    pairs: Table | None


def by_domain(shown: Sequence[Shown]) -> list[Domain]:
    """All domains with answers, in order."""
    found = []
    for name in domains(shown):
        gathered = [(each, got) for each in shown if (got := gather(each.run, name)) is not None]
        if gathered:
            found.append(_domain(name, gathered, ["clean", *telling(shown)], _most_classes(shown)))
    return found


def _most_classes(shown: Sequence[Shown]) -> int:
    matrices = len(domains(shown)) * len(shown) * 2
    return min(MOST_CLASSES, math.isqrt(CELLS // matrices))


def _domain(name: str, found: Sequence[tuple[Shown, Gathered]], columns: Sequence[str], most: int) -> Domain:
    several = len(found) > 1
    many = max(len(gathered.names) for _, gathered in found) > most
    classes, hidden = _classes(found, columns, several)
    if many:
        return Domain(name, classes, hidden, [], _pairs(found, columns, several))
    matrices = [
        _matrix(f"{column}{': ' + each.label if several else ''}", gathered, column)
        for column in columns
        for each, gathered in found
    ]
    return Domain(name, classes, hidden, matrices, None)


def _classes(
    found: Sequence[tuple[Shown, Gathered]], columns: Sequence[str], several: bool
) -> tuple[Table, int]:
    unit = found[0][0].run.unit
    accuracies = [
        (each, {column: {a.name: a for a in by_class(gathered, column)} for column in columns})
        for each, gathered in found
    ]
    lowest: dict[str, float] = {}
    for _, by_column in accuracies:
        for name, accuracy in by_column[columns[0]].items():
            lowest[name] = min(lowest.get(name, 100.0), accuracy.mean)
    names = sorted(lowest)
    if len(names) > MOST_CLASSES:
        names = sorted(sorted(names, key=lowest.__getitem__)[:MOST_PAIRS])
    rows = []
    for name in names:
        for each, by_column in accuracies:
            if (first := by_column[columns[0]].get(name)) is None:
                continue
            cells = [by_column[column].get(name) for column in columns]
            told = [MISSING if a is None else rounded(a.mean, _half(a.interval)) for a in cells]
            names_of_row = (Cell(name), *([Cell(each.label)] if several else []))
            rows.append((*names_of_row, *told, counted(first.tasks), counted(first.images)))
    tasks = "episodes" if unit == "episode" else "n"
    heads = ("class", *(["run"] if several else []), *columns, tasks, "images")
    return Table(heads, rows), len(lowest) - len(names)


def _half(interval: float) -> str:
    """Nothing for a single task, which has no interval."""
    return f" ±{interval:.1f}" if math.isfinite(interval) else ""


def _matrix(title: str, gathered: Gathered, column: str) -> Matrix:
    places = {name: k for k, name in enumerate(gathered.names)}
    rows: list[list[Square | None]] = [[None] * len(places) for _ in places]
    for each in confusions(gathered, column):
        told = f"{each.true} taken for {each.other}: {each.count} of {each.met} images"
        text = f"{each.share:.0f}" if each.count else ""
        square = Square(text, each.share, told, each.true == each.other)
        rows[places[each.true]][places[each.other]] = square
    return Matrix(title, gathered.names, tuple(map(tuple, rows)))


def _pairs(found: Sequence[tuple[Shown, Gathered]], columns: Sequence[str], several: bool) -> Table:
    rows = []
    for column in columns:
        for each, gathered in found:
            for pair in most_confused(gathered, column, MOST_PAIRS):
                names = (Cell(pair.true), Cell(pair.other), *([Cell(each.label)] if several else []))
                numbers = (rounded(pair.share), counted(pair.count), counted(pair.met))
                rows.append((*names, Cell(column), *numbers))
    heads = ("class", "taken for", *(["run"] if several else []), "column", "per cent", "images", "of")
    return Table(heads, rows)
