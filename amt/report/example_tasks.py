"""The tasks that a report shows: support images, some queries, and what each run made of them.

Runs that scored the same episode share a block. Images have a budget, which is spent round by round.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from amt.evaluation.runs import Sample
from amt.report.pictures import amplify, data_uri
from amt.report.shown import Shown, domains

SAMPLE_SIDE = 128  # pixels; larger samples are shown smaller
SUPPORT_SIDE = 64  # the same of support images, of which there are more
SAMPLE_BUDGET = 2_000_000  # characters of images in a page
MOST_IMAGES = 4  # queries of one episode
MOST_SUPPORT = 3  # support images of one class


class Trio(NamedTuple):
    """One image of a sample: as it was, what was done to it, and the result, as data URIs.

    Args:
        factor: of amplification; None where nothing was done.
        label, before, after: names of its class, and of the classes predicted for clean and attacked.
    """

    clean: str
    perturbation: str
    attacked: str
    factor: float | None
    label: str
    before: str
    after: str


class SupportClass(NamedTuple):
    """A class of a task: its name, how many support images it has, the first of them as data URIs."""

    name: str
    shots: int
    images: list[str]


class Attempt(NamedTuple):
    """What one run made of a task, under one attack."""

    label: str
    column: str
    trios: list[Trio]


class Task(NamedTuple):
    """One episode.

    Args:
        where: its domain and number.
        question: what had to be done.
        support: its classes; none of a test set, or of an older sample.
        attempts: a run each.
    """

    where: str
    question: str
    support: list[SupportClass]
    attempts: list[Attempt]


def example_tasks(shown: Sequence[Shown]) -> dict | None:
    """The first images of every sample episode, round by round until the budget is spent.

    Returns:
        tasks: the episodes.
        count, total: how many queries are shown, and how many were kept with the runs.
        shrunk: whether some have more than `SAMPLE_SIDE` pixels.
    """
    found = _grouped(shown)
    purse = _Purse()
    trios: list[list[list[Trio]]] = [[[] for _ in each] for each in found]
    for k in range(MOST_IMAGES):
        for lists, each in zip(trios, found, strict=True):
            for taken, (_, sample) in zip(lists, each, strict=True):
                if k < len(sample.clean) and purse.open:
                    taken.append(purse.paid(trio(sample, k)))
    supports = [_support(each[0][1], purse) for each in found]
    tasks = [
        _task(each, lists, support)
        for each, lists, support in zip(found, trios, supports, strict=True)
        if any(lists)
    ]
    if not tasks:
        return None
    samples = [sample for each in found for _, sample in each]
    return {
        "tasks": tasks,
        "count": sum(len(taken) for lists in trios for taken in lists),
        "total": sum(len(sample.clean) for sample in samples),
        "shrunk": any(max(sample.clean.shape[1:3]) > SAMPLE_SIDE for sample in samples),
    }


class _Purse:
    """How much of the budget is left."""

    def __init__(self):
        self.left = SAMPLE_BUDGET

    @property
    def open(self) -> bool:
        return self.left > 0

    def paid(self, trio: Trio) -> Trio:
        self.left -= sum(map(len, trio[:3]))
        return trio

    def affords(self, uri: str) -> bool:
        self.left -= len(uri)
        return self.left > 0


def _grouped(shown: Sequence[Shown]) -> list[list[tuple[Shown, Sample]]]:
    """The samples of all runs, those of one episode together."""
    order = {domain: k for k, domain in enumerate(domains(shown))}
    groups: dict[tuple, list[tuple[Shown, Sample]]] = {}
    for each in shown:
        unseen = each.run.about.get("shots") == 0  # one image of each class was drawn, and not looked at
        for sample in each.run.samples():
            sample = sample._replace(**Sample._field_defaults) if unseen else sample
            key = (sample.source, sample.index, unseen, sample.class_names, sample.clean.tobytes())
            groups.setdefault(key, []).append((each, sample))
    keys = sorted(groups, key=lambda key: (order.get(key[0], len(order)), key[1], groups[key][0][0].place))
    return [groups[key] for key in keys]


def _task(
    found: Sequence[tuple[Shown, Sample]], lists: Sequence[list[Trio]], support: list[SupportClass]
) -> Task:
    each, sample = found[0]
    where = sample.source + f", episode {sample.index}" * (each.run.unit == "episode")
    attempts = [
        Attempt(run.label, taken_from.column, taken)
        for (run, taken_from), taken in zip(found, lists, strict=True)
        if taken
    ]
    return Task(where, _question(sample), support, attempts)


def _question(sample: Sample) -> str:
    if len(sample.shots) == 0:
        return f"Which of {len(sample.class_names)} classes is it?"
    shots = sorted(set(sample.shots.tolist()))
    number = f"{shots[0]}" if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"
    images = f"{number} labelled image{'s' * (shots[-1] != 1)}"
    return f"Given {images} of each of these {len(sample.shots)} classes, which of them is a new image?"


def _support(sample: Sample, purse: _Purse) -> list[SupportClass]:
    return [
        SupportClass(name, int(shots), list(_pictures(sample, label, purse)))
        for label, (name, shots) in enumerate(zip(sample.class_names, sample.shots, strict=False))
        if label in sample.support_labels
    ]


def _pictures(sample: Sample, label: int, purse: _Purse) -> Iterator[str]:
    for k in np.flatnonzero(sample.support_labels == label)[:MOST_SUPPORT]:
        uri = data_uri(sample.support[k], SUPPORT_SIDE, Image.Resampling.LANCZOS)
        if purse.affords(uri):
            yield uri


def trio(sample: Sample, k: int) -> Trio:
    clean, attacked = (
        data_uri(images[k], SAMPLE_SIDE, Image.Resampling.LANCZOS)
        for images in (sample.clean, sample.attacked)
    )
    # An average of neighbours would show a smaller perturbation than there is: every value stays one of it.
    pixels, factor = amplify(sample.perturbation[k])
    shown = data_uri(pixels, SAMPLE_SIDE, Image.Resampling.NEAREST)
    labels = (sample.labels, sample.predicted_clean, sample.predicted_attacked)
    return Trio(clean, shown, attacked, factor, *(sample.class_names[each[k]] for each in labels))
