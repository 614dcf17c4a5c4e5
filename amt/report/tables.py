"""Tables of results: the cells of those on the page, and those for a terminal."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from amt.evaluation.chance import MARK
from amt.evaluation.runs import corruption_summary
from amt.evaluation.statistics import Summary

TABLE_COLUMNS = 8  # in one table, so that it fits a wide terminal


class Cell(NamedTuple):
    """What stands in a table of the page.

    Args:
        value: what the cell is sorted by, if that is a number.
        half, ends: the interval around it.
        note: small print beside a name.
        doubt: why it is not to be believed.
        missing: whether there is no result; such a cell is sorted to the end.
        run: named below the text where the column of runs has no room.
    """

    text: str
    value: float | None = None
    half: str = ""
    ends: str = ""
    note: str = ""
    doubt: str | None = None
    missing: bool = False
    run: str = ""


MISSING = Cell("–", missing=True)


def counted(n: int) -> Cell:
    return Cell(str(n), n)


def rounded(value: float, half: str = "") -> Cell:
    """A number to one digit."""
    return Cell(f"{value:.1f}", value, half)


class Table(NamedTuple):
    """Rows of cells under their headings, and rows of averages `below`, which are sorted by themselves."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    below: Sequence[Sequence[Cell]] = ()

    def is_text(self, k: int) -> bool:
        """Whether column k holds names, not numbers."""
        return all(row[k].value is None and not row[k].missing for row in self.rows)


def number(value: float, digits: str = "g") -> str:
    """A number with a minus sign, not a hyphen."""
    return f"{value:{digits}}".replace("-", "−")


def table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Summary | None]]],
    suspects: Sequence[Sequence[str | None]] = (),
    low: Sequence[Sequence[bool]] = (),
) -> str:
    """A plain-text table of `mean +- interval` per domain and column, with the number of episodes; of many
    columns, several tables.

    Args:
        suspects: like `rows`, why a result is not to be believed; it gets a question mark, and a line below
            the table says why.
        low: like `rows`, whether a result is not above chance; it gets a `MARK`.
    """
    width = max(len(name) for name, _ in rows)
    cell = max(14, *(len(column) for column in columns))
    reasons: dict[tuple[str, str], list[str]] = {}
    blocks = []
    for first in range(0, len(columns), TABLE_COLUMNS):
        block = range(first, min(first + TABLE_COLUMNS, len(columns)))
        lines = [" ".join([" " * width, *(columns[j].rjust(cell) for j in block), "       n"])]
        for k, (name, summaries) in enumerate(rows):
            cells = []
            for j in block:
                reason = suspects[k][j] if suspects else None
                if reason:
                    reasons.setdefault((name, reason), []).append(columns[j])
                marks = f"{MARK if low and low[k][j] else ''}{'?' if reason else ''}"
                text = "-" if summaries[j] is None else f"{summaries[j]}{marks}"
                cells.append(text.rjust(cell))
            n = next((s.n for s in summaries if s is not None), 0)
            lines.append(" ".join([name.ljust(width), *cells, f"{n:8d}"]))
        blocks.append("\n".join(lines))
    doubts = [f"suspect: {name} {', '.join(named)}: {why}" for (name, why), named in reasons.items()]
    return "\n".join(["\n\n".join(blocks), *doubts])


def corruption_rows(corruptions: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Accuracies in per cent at each severity and their mean, by corruption; the last row, "mean", is that
    over all corruptions.

    Args:
        corruptions: by name the accuracy in [0, 1] at each severity.
    """
    rows = {name: [100 * each for each in values] for name, values in corruptions.items()}
    rows["mean"] = corruption_summary(corruptions)["by_severity"]
    return {name: [*values, sum(values) / len(values)] for name, values in rows.items()}


def corruption_table(corruptions: Mapping[str, Sequence[float]]) -> str:
    """`corruption_rows` as plain text."""
    rows = corruption_rows(corruptions)
    width = max(map(len, rows))
    severities = range(1, len(rows["mean"]))
    head = " ".join([" " * width, *(f"{severity:6d}" for severity in severities), "  mean"])
    body = [" ".join([name.ljust(width), *(f"{c:6.1f}" for c in each)]) for name, each in rows.items()]
    return "\n".join([head, *body])
