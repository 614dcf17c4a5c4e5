"""What a classifier answers to every image, clean and under every attack: in tensors, and in a row of a run.

A row's "answers" hold, image by image, the true class, and by column the predicted class and its probability.
An answer is right exactly where the column counts the image as right: of an image that an attack broke it is
the class that the image was taken for then, also at every larger radius.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

NONE = -1  # the class of an image whose logits are not all numbers


class Answers(NamedTuple):
    """Of Q images, under one attack or none.

    Args:
        predicted: (Q,) int64 in 0..N-1, or `NONE`.
        probability: (Q,) float, of the predicted class; NaN where there is none.
    """

    predicted: Tensor
    probability: Tensor


def answered(logits: Tensor, labels: Tensor, right: Tensor, temperature: float = 1.0) -> Answers:
    """The answers behind logits (Q, N), of which `right` (Q,) bool says which count as right. Probabilities
    are the softmax of logits divided by `temperature`.

    Another batch can move a logit by its last bit. So an image that counts as broken has the most likely of
    the other classes, and one that counts as right has its own.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> answered(logits, torch.tensor([0, 2]), torch.tensor([True, False])).predicted.tolist()
    [0, 0]
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    predicted = torch.where(right, labels, others.argmax(1))
    probability = (logits / temperature).softmax(1).gather(1, predicted[:, None]).squeeze(1)
    without = logits.isnan().any(1)
    return Answers(predicted.masked_fill(without, NONE), probability.masked_fill(without, torch.nan))


def replaced(earlier: Answers, which: Tensor, found: Answers) -> Answers:
    """`earlier` with the answers to the images `which` (n,) int64 replaced by those `found`."""
    both = (earlier.predicted.clone(), earlier.probability.clone())
    for values, new in zip(both, found, strict=True):
        values[which] = new
    return Answers(*both)


def first_wrong(correct: Sequence[Tensor], answers: Sequence[Answers]) -> Answers:
    """The answers of a worst case over several columns: image by image the first one that is wrong.

    Args:
        correct: by column, which images (Q,) bool are right.
        answers: by column.
    """
    found, right = answers[0], correct[0]
    for column, here in zip(answers[1:], correct[1:], strict=True):
        found = replaced(found, which := (right & ~here).nonzero().squeeze(1), _some(column, which))
        right = right & here
    return found


def _some(answers: Answers, which: Tensor) -> Answers:
    return Answers(*(each[which] for each in answers))


def row_answers(episode: Episode, by_column: Mapping[str, Answers]) -> dict:
    """The "answers" of an episode's row, see `noted.NotedAnswers`."""
    origin = {}
    if episode.query_origin:
        origin["files"] = [each.file for each in episode.query_origin]
        origin["records"] = [each.record for each in episode.query_origin]
    return {
        "classes": list(episode.names),
        "labels": episode.query_labels.tolist(),
        **_lists(by_column),
        **origin,
    }


def image_answers(k: int, label: int, by_column: Mapping[str, Answers], origin: str) -> dict:
    """The "answers" of the row of image k of a test set, whose class names are those of run.json."""
    which = torch.tensor([k])
    lists = _lists({column: _some(each, which) for column, each in by_column.items()})
    return {"labels": [label], **lists, "files": [origin]}


def _lists(by_column: Mapping[str, Answers]) -> dict[str, dict[str, list]]:
    predicted, probability = {}, {}
    for column, found in by_column.items():
        classes = found.predicted.tolist()
        predicted[column] = [None if label == NONE else label for label in classes]
        probability[column] = [
            None if label == NONE else round(value, 3)
            for label, value in zip(classes, found.probability.tolist(), strict=True)
        ]
    return {"predicted": predicted, "probability": probability}


def check_answers(where: str, row: Mapping, columns: Sequence[str], class_names: Sequence[str]) -> None:
    """Raise an `InputError` unless a row's answers fit each other, its columns and the names of classes.

    Args:
        row: of the declared shape; it may have no answers.
        class_names: those of run.json, for rows without.
    """
    if (found := row.get("answers")) is None:
        return
    n, classes = len(found["labels"]), len(found.get("classes", class_names))
    lists = {name: found[name] for name in ("files", "records") if name in found}
    for name in ("predicted", "probability"):
        lists |= {f"{name}.{column}": found[name].get(column, ()) for column in columns}
    for name, values in lists.items():
        if len(values) != n:
            raise InputError(f"{where}: field 'answers.{name}': expected {n} values, found {len(values)}")
    labels = [found["labels"], *(found["predicted"][column] for column in columns)]
    highest = max((label for each in labels for label in each if label is not None), default=0)
    if highest >= classes or n != row["queries"]:
        raise InputError(
            f"{where}: field 'answers': expected {row['queries']} images of {classes} classes, found {n} "
            f"images and label {highest}"
        )
