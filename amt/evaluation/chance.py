"""What a classifier scores that gives every query one and the same class: 1/N at every epsilon.

A robust accuracy that is not above it shows nothing, however far above that of another method it is.
"""

from collections.abc import Sequence

from amt.evaluation.runs import Run

MARK = "<"
ROUNDING = 1e-9  # points: a constant classifier is at chance, give or take float64


def is_below_chance(run: Run, name: str, column: str) -> bool:
    """Whether an accuracy of a domain or an average is not above chance."""
    summary = run.summary(name, column)
    return summary is not None and summary.mean <= run.chance(name) + ROUNDING


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
                f"{MARK} {name} {', '.join(low)}: not above chance ({run.chance(name):.1f}): a constant "
                "classifier scores that at every epsilon"
            )
    return notes
