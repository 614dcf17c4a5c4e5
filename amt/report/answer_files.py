"""The answers of a run as tables for other programs: one line an image, a class, or a pair of classes.

    RUN/answers.csv     every image: its class, and by column what it was taken for, and how likely that was
    RUN/classes.csv     accuracy by class and column
    RUN/confusion.csv   how often a class was taken for another, by column

They hold nothing that the rows do not hold. Names that are not UTF-8 are escaped.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from amt.evaluation.classes import Gathered, by_class, class_names, confusions, gather
from amt.evaluation.runs import Run
from meta_dataset_readers.files import replace_file

NAMES = ("answers.csv", "classes.csv", "confusion.csv")


def write_answers(run: Run) -> list[Path]:
    """Write the tables into the run's folder; the paths, none for a run whose rows have no answers.

    Raises:
        InputError: the folder cannot be written to.
    """
    if not any("answers" in row for row in run.every_row):
        return []
    paths = [run.folder / name for name in NAMES]
    for path, lines in zip(paths, (_answers(run), _classes(run), _confusion(run)), strict=True):
        replace_file(path, _encoded(lines))
    return paths


def _encoded(lines: Iterable[Sequence]) -> Iterator[bytes]:
    for line in lines:
        text = io.StringIO(newline="")
        csv.writer(text).writerow(line)
        yield text.getvalue().encode("utf-8", "backslashreplace")


def _answers(run: Run) -> Iterator[Sequence]:
    columns = [name for column in run.columns for name in (column, f"p({column})")]
    of_episodes = run.unit == "episode"  # a row of a test set is one image
    yield ["domain", run.unit, *["query"] * of_episodes, "file", "record", "class", *columns]
    for row in run.every_row:
        if (found := row.get("answers")) is None:
            continue
        names = class_names(run, row)
        blank = [""] * len(found["labels"])
        files, records = found.get("files", blank), found.get("records", blank)
        for k, label in enumerate(found["labels"]):
            query = [k] * of_episodes
            where = (row["source"], row["index"], *query, files[k], records[k], names[label])
            said = [
                value
                for column in run.columns
                for value in (_name(names, found["predicted"][column][k]), found["probability"][column][k])
            ]
            yield (*where, *said)


def _name(names: Sequence[str], label: int | None) -> str:
    """The class of an answer; empty where the logits were not all numbers."""
    return "" if label is None else names[label]


def _each(run: Run) -> Iterator[tuple[str, str, Gathered]]:
    """Every domain with answers, column by column."""
    for source in run.sources:
        if (found := gather(run, source)) is not None:
            yield from ((source, column, found) for column in run.columns)


def _classes(run: Run) -> Iterator[Sequence]:
    yield ["domain", "column", "class", "accuracy", "half_width", f"{run.unit}s", "images"]
    for source, column, found in _each(run):
        for each in by_class(found, column):
            half = f"{each.interval:.3f}" if math.isfinite(each.interval) else ""
            yield source, column, each.name, f"{each.mean:.3f}", half, each.tasks, each.images


def _confusion(run: Run) -> Iterator[Sequence]:
    yield ["domain", "column", "class", "taken_for", "images", "of"]
    for source, column, found in _each(run):
        for each in confusions(found, column):
            if each.count:
                yield source, column, each.true, each.other, each.count, each.met
