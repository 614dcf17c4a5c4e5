"""Accuracy by class, and which classes are taken for which, over the answers of a domain.

Classes are told apart by name: in few-shot tasks each episode draws its own. Two classes can only be confused
in a task that has both, so a confusion is a share of the images of the true class in those tasks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from amt.evaluation.answers import NONE
from amt.evaluation.runs import Run


class ClassAccuracy(NamedTuple):
    """Of one class in one column.

    Args:
        mean: over the tasks that have the class, in per cent.
        interval: half-width of the normal interval over these tasks, 1.96 standard errors in points; infinite
            for one task.
        tasks: how many tasks have the class; of a test set, how many images.
        images: how many images of the class were classified.
    """

    name: str
    mean: float
    interval: float
    tasks: int
    images: int


class Confusion(NamedTuple):
    """How often images of one class were taken for another.

    Args:
        count: images of class `true` taken for class `other`.
        met: images of class `true` in the tasks that have both classes.
    """

    true: str
    other: str
    count: int
    met: int

    @property
    def share(self) -> float:
        """In per cent."""
        return 100 * self.count / self.met


class Gathered(NamedTuple):
    """All answers of a domain: n images of T tasks, K classes.

    Args:
        names: (K,) of the classes, sorted.
        task, labels: (n,) int64, which task each image belongs to, and its class.
        predicted: by column (n,) int64, `NONE` where there is no answer.
        met: (K, K), how many images of each class there are in tasks that have the other.
    """

    names: tuple[str, ...]
    task: np.ndarray
    labels: np.ndarray
    predicted: dict[str, np.ndarray]
    met: csr_matrix


def gather(run: Run, source: str) -> Gathered | None:
    """The answers of a domain; None if none of its rows has any."""
    rows = [row for row in run.rows.get(source, ()) if "answers" in row]
    if not rows:
        return None
    lists = [class_names(run, row) for row in rows]
    names = tuple(sorted({name for each in set(lists) for name in each}))
    places = {name: k for k, name in enumerate(names)}
    # A last place for None. Rows of a test set share one list of classes.
    by_list = {each: np.array([*(places[name] for name in each), NONE]) for each in set(lists)}
    labels, task = [], []
    predicted: dict[str, list[np.ndarray]] = {column: [] for column in run.columns}
    for number, (row, each) in enumerate(zip(rows, lists, strict=True)):
        found, place = row["answers"], by_list[each]
        labels.append(place[found["labels"]])
        task.append(np.full(len(found["labels"]), number))
        for column, parts in predicted.items():
            parts.append(place[[NONE if k is None else k for k in found["predicted"][column]]])
    joined = np.concatenate(labels)
    met = _met(lists, labels, by_list, len(names))
    columns = {column: np.concatenate(parts) for column, parts in predicted.items()}
    return Gathered(names, np.concatenate(task), joined, columns, met)


def class_names(run: Run, row: Mapping) -> tuple[str, ...]:
    """The names of the classes of a row with answers, by label."""
    return tuple(row["answers"].get("classes") or run.about["class_names"])


def _met(
    lists: Sequence[tuple[str, ...]],
    labels: Sequence[np.ndarray],
    by_list: Mapping[tuple[str, ...], np.ndarray],
    count: int,
) -> csr_matrix:
    kinds = {each: k for k, each in enumerate(by_list)}
    offered = [(kinds[each], place) for each, places in by_list.items() for place in places[:-1]]
    of_kind = np.repeat([kinds[each] for each in lists], [len(each) for each in labels])
    shape = (len(kinds), count)
    has = _counted(*np.array(offered).T, shape=shape)
    has.data[:] = 1
    return csr_matrix(_counted(of_kind, np.concatenate(labels), shape).T @ has)


def _counted(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> csr_matrix:
    """How often each pair comes."""
    return csr_matrix((np.ones(len(rows), np.int64), (rows, columns)), shape)


def by_class(found: Gathered, column: str) -> list[ClassAccuracy]:
    """The accuracy of every class in one column."""
    right = found.predicted[column] == found.labels
    pairs, place = np.unique(found.labels * (found.task.max() + 1) + found.task, return_inverse=True)
    shares = 100 * np.bincount(place, right) / np.bincount(place)
    of_class, images = pairs // (found.task.max() + 1), np.bincount(found.labels, minlength=len(found.names))
    accuracies = []
    for k, name in enumerate(found.names):
        if len(own := shares[of_class == k]) == 0:  # a class that no image belongs to
            continue
        half = 1.96 * own.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else np.inf
        accuracies.append(ClassAccuracy(name, float(own.mean()), float(half), len(own), int(images[k])))
    return accuracies


def confusions(found: Gathered, column: str) -> list[Confusion]:
    """All pairs of classes that met, with how often the first was taken for the second; each class with
    itself among them. Sorted by class, then by predicted class."""
    predicted, size = found.predicted[column], len(found.names)
    seen = predicted != NONE
    taken = _entries(_counted(found.labels[seen], predicted[seen], (size, size)))
    names, met = found.names, sorted(_entries(found.met).items())
    return [Confusion(names[a], names[b], taken.get((a, b), 0), n) for (a, b), n in met if n > 0]


def _entries(matrix: csr_matrix) -> dict[tuple[int, int], int]:
    """By row and column what is not zero."""
    found = matrix.tocoo()
    places = zip(found.row.tolist(), found.col.tolist(), strict=True)
    return dict(zip(places, found.data.tolist(), strict=True))


def most_confused(found: Gathered, column: str, most: int) -> list[Confusion]:
    """Up to `most` pairs of different classes of which the first was most often taken for the second."""
    wrong = [each for each in confusions(found, column) if each.true != each.other and each.count > 0]
    return sorted(wrong, key=lambda each: (-each.count, -each.share, each.true, each.other))[:most]
