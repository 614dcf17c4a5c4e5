"""The oracle: what the best coefficients of every task would reach, chosen by its query labels.

It is no method, since nobody has the labels. It says how much there is to gain by routing: a router that does
not come near it does not read the task, and where the oracle is no better than one fixed merge there is
nothing to read.
"""

import itertools
from collections.abc import Mapping, Sequence

from amt.models.weights import Coefficients
from meta_dataset_readers.errors import InputError

STAMP = (
    "oracle: the coefficients of every task and column were chosen by its query labels; no method, an upper "
    "bound of what routing can gain"
)
MOST = 2000  # mixtures of one task


def simplex_grid(members: int, parts: int) -> tuple[Coefficients, ...]:
    """All shares of `members` that are multiples of 1 / parts and sum to 1, the single members among them.

    Raises:
        InputError: there are too many.
    """
    found = []
    for bars in itertools.combinations(range(parts + members - 1), members - 1):
        ends = (-1, *bars, parts + members - 1)
        found.append(tuple((b - a - 1) / parts for a, b in itertools.pairwise(ends)))
        if len(found) > MOST:
            raise InputError(
                f"--routing oracle --oracle_parts {parts}: more than {MOST} mixtures of {members} adapters"
            )
    return tuple(found)


def best_row(rows: Sequence[Mapping], columns: Sequence[str]) -> dict:
    """The row of an episode with the best accuracy of every column over the mixtures.

    Args:
        rows: of `measure`, one for each mixture.
        columns: the accuracies. Each has its own best mixture; the coefficients are those of the first best
            clean one.
    """
    best = max(rows, key=lambda row: row["clean"])
    seconds = {name: round(sum(row[name] for row in rows), 4) for name in ("fit_seconds", "seconds")}
    by_column = {column: max(rows, key=lambda row, column=column: row[column]) for column in columns}
    answers = best["answers"] | {
        name: {column: row["answers"][name][column] for column, row in by_column.items()}
        for name in ("predicted", "probability")
    }
    accuracies = {column: row[column] for column, row in by_column.items()}
    return {**best, **accuracies, **seconds, "answers": answers}
