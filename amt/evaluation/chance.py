"""What a classifier scores that gives every query one and the same class: 1/N at every epsilon.

A robust accuracy that is not above it shows nothing, however far above that of another method it is.
"""

from collections.abc import Mapping, Sequence

from amt.evaluation.runs import Run

MARK = "<"
ROUNDING = 1e-9  # points: a constant classifier is at chance, give or take float64


def chance(rows: Sequence[Mapping]) -> float:
    """The mean of 1/N over the rows of a domain, in per cent.

    Args:
        rows: with the number of classes N under "ways"; one at least.
    """
    return 100 * sum(1 / row["ways"] for row in rows) / len(rows)


def chance_of(run: Run, name: str) -> float | None:
    """Chance in per cent for a domain, or for an average over domains, each of which counts alike; None where
    there is no result."""
    members = [source for source in run.averages.get(name, (name,)) if source in run.rows]
    found = [chance(run.rows[source]) for source in members]
    return sum(found) / len(found) if found else None


def is_below_chance(run: Run, name: str, column: str) -> bool:
    """Whether an accuracy of a domain or an average is not above chance."""
    summary, level = run.summary(name, column), chance_of(run, name)
    return summary is not None and level is not None and summary.mean <= level + ROUNDING


def chance_notes(run: Run, columns: Sequence[str] | None = None) -> list[str]:
    """A line for each domain or average with an accuracy that is not above chance, after `MARK`.

    Args:
        columns: those to look at; None for all.
    """
    notes = []
    for name in [*run.sources, *run.averages]:
        low = [column for column in columns or run.columns if is_below_chance(run, name, column)]
        if low:
            notes.append(
                f"{MARK} {name} {', '.join(low)}: not above chance ({chance_of(run, name):.1f}): a constant "
                "classifier scores that at every epsilon"
            )
    return notes
