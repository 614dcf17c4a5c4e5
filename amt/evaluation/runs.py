"""Run directories: the results of an evaluation, as `writer` writes them, read and summarised.

    RUN/run.json       what was asked for, written first
    RUN/merging.json   by domain, how its merging was decided, before its first episode
    RUN/rows.jsonl     a line per episode, appended and synchronised with the disk; of part I of N processes
                       rows.IofN.jsonl
    RUN/samples/       a few episodes' images, clean and attacked, as .npz
    RUN/results.json   the summary, written when every episode is there; beside it tables of all answers, see
                       report/answer_files.py

A test set that is classified as a whole is a run like any other: its unit is the image, so there is a row for
each, whose accuracies are 0 or 1; and perhaps there is

    RUN/corruptions.json   by common corruption, the accuracy at severities 1 to 5

Knows rows, not how they are computed.
"""

import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from amt.attacks.kinds import Attack
from amt.evaluation.answers import check_answers
from amt.evaluation.noted import About, Accuracies, Corruptions, Merging, Row
from amt.evaluation.samples import Sample, read_samples
from amt.evaluation.sanity import Finding, judge
from amt.evaluation.statistics import Summary, chance, over_seeds, summarise, with_averages
from meta_dataset_readers.errors import InputError, damaged
from meta_dataset_readers.files import parse_json, read_bytes, read_json
from meta_dataset_readers.json_fields import conform
from meta_dataset_readers.settings import with_tuples

FORMAT = 1
_ROWS_LARGEST = 2**30  # bytes of a file of rows; a million rows are half of that

UNITS = ("episode", "image")


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run directory.

    Args:
        folder: where.
        about: run.json, with what results.json adds once the run is complete.
        merging: merging.json, by domain.
        rows: by domain the rows of its episodes, in their order; domains without any are left out.
        corruptions: by common corruption, the accuracy in [0, 1] at each severity.
        parts: the runs of the training seeds that a row joins, see `seeds`; none: this is one run.
    """

    folder: Path
    about: dict
    merging: dict
    rows: dict[str, list[dict]]
    corruptions: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    parts: "tuple[Run, ...]" = ()

    @property
    def seeds(self) -> "tuple[Run, ...]":
        """The runs of its training seeds: itself, where it is one run."""
        return self.parts or (self,)

    @property
    def same_episodes(self) -> bool:
        """Whether all its seeds had the same episodes or images."""
        return self.unit == UNITS[1] or len({each.about["seed"] for each in self.seeds}) == 1

    @property
    def unit(self) -> str:
        """The unit of a row, one of `UNITS`."""
        return self.about.get("unit", UNITS[0])

    @property
    def columns(self) -> tuple[str, ...]:
        """The accuracies of a row, in the order of tables."""
        return tuple(self.about["columns"])

    @property
    def sources(self) -> tuple[str, ...]:
        """The domains that have results."""
        return tuple(self.rows)

    @property
    def averages(self) -> dict[str, tuple[str, ...]]:
        """The domains behind each average, of those that have results."""
        found = {
            name: tuple(source for source in members if source in self.rows)
            for name, members in self.about["averages"].items()
        }
        return {name: members for name, members in found.items() if members}

    @property
    def average(self) -> str | None:
        """The name of the average over all its domains; None if it has only one domain."""
        return next(iter(self.averages), None) if len(self.rows) > 1 else None

    @property
    def whole(self) -> str:
        """What stands for it in a sentence: its average, or its only domain."""
        return self.average or next(iter(self.rows))

    @functools.cached_property
    def summaries(self) -> dict[tuple[str, str], Summary]:
        """The summary of every domain and average, by its name and the column."""
        if self.parts:
            return self._over_seeds()
        found = {}
        for column in self.columns:
            by_source = {source: summarise(rows, column) for source, rows in self.rows.items()}
            summaries = with_averages(by_source, self.averages)
            found |= {(name, column): summary for name, summary in summaries.items()}
        return found

    def _over_seeds(self) -> dict[tuple[str, str], Summary]:
        names = {source: (source,) for source in self.sources} | self.averages
        rows = {
            source: common_rows([each.rows[source] for each in self.parts], self.same_episodes)
            for source in self.sources
        }
        return {
            (name, column): over_seeds(
                [
                    {s: [100 * row[column] for row in rows[s][k]] for s in members}
                    for k in range(len(self.parts))
                ],
                self.same_episodes,
            )
            for name, members in names.items()
            for column in self.columns
        }

    def chance(self, name: str) -> float:
        """The accuracy of guessing in a domain or an average, in per cent."""
        members = self.averages.get(name, (name,))
        return statistics.fmean(chance(self.rows[source]) for source in members)

    def summary(self, name: str, column: str) -> Summary | None:
        """The summary of a domain or an average; None where there is no result."""
        return self.summaries.get((name, column))

    @functools.cached_property
    def findings(self) -> list[Finding]:
        """All suspect results."""
        attacks = [attack_from(values) for values in self.about["attacks"]]
        return [finding for rows in self.rows.values() for finding in judge(rows, attacks)]

    def suspect(self, name: str, column: str) -> str | None:
        """Why the result of a domain or an average is suspect; None if it is not."""
        members = self.averages.get(name, (name,))
        reasons = [
            f.reason if f.source == name else f"{f.source}: {f.reason}"
            for f in self.findings
            if f.source in members and f.column == column
        ]
        return "; ".join(reasons) or None

    @property
    def every_row(self) -> list[dict]:
        """The rows of all domains."""
        return [row for rows in self.rows.values() for row in rows]

    @property
    def stamps(self) -> tuple[str, ...]:
        """Warnings to print beside every result, where settings were chosen on scored data."""
        return tuple(dict.fromkeys(about["stamp"] for about in self.merging.values() if "stamp" in about))

    @property
    def variants(self) -> dict[str, tuple[str, ...]]:
        """By column the attacks run under its name, where the number of classes decides that."""
        found: dict[str, dict[str, None]] = {}
        for row in self.every_row:
            for column, variant in row.get("variants", {}).items():
                found.setdefault(column, {})[variant] = None
        return {column: tuple(variants) for column, variants in found.items()}

    @property
    def checked(self) -> int:
        """The number of images that the attacks were checked on."""
        return sum(row["checks"]["images"] for row in self.every_row if "checks" in row)

    @property
    def complete(self) -> bool:
        """Whether every episode asked for has its row, and every corruption its accuracies."""
        rows = all(len(self.rows.get(s, ())) == self.about["episodes"] for s in self.about["sources"])
        return rows and all(name in self.corruptions for name in self.about.get("corruptions", ()))

    def left(self, source: str, numbers: Iterable[int]) -> list[int]:
        """The numbers of episodes or images of a domain that have no row yet."""
        done = {row["index"] for row in self.rows.get(source, ())}
        return [number for number in numbers if number not in done]

    def samples(self) -> list[Sample]:
        """The images that were kept, in the order of domains and episodes.

        Raises:
            InputError: a file is damaged.
        """
        order = {source: k for k, source in enumerate(self.about["sources"])}
        found = read_samples(self.seeds[0].folder)
        return sorted(found, key=lambda sample: (order.get(sample.source, len(order)), sample.index))


def common_rows(seeds: Sequence[Sequence[dict]], same_episodes: bool) -> list[list[dict]]:
    """The rows of a domain of each seed; where all have the same episodes, those that all have finished, in
    their order."""
    if not same_episodes:
        return [list(rows) for rows in seeds]
    shared = set.intersection(*({row["index"] for row in rows} for rows in seeds))
    kept = [[row for row in rows if row["index"] in shared] for rows in seeds]
    return [sorted(rows, key=operator.itemgetter("index")) for rows in kept]


def load(folder: Path) -> Run:
    """Read a run directory, complete or not.

    Raises:
        InputError: there is none, it has no rows yet, or a file is damaged.
    """
    run = peek(folder)
    if not run.rows:
        raise InputError(f"{folder}: no results yet: no {run.unit} is finished")
    return run


def peek(folder: Path) -> Run:
    """Read a run directory as `load` does; it may have no row yet."""
    about = read_about(folder)
    if (folder / "results.json").exists():
        path = folder / "results.json"
        about = conform(str(path), conform(str(path), read_json(path), dict) | about, About)
    merging = read_merging(folder)
    rows: dict[str, dict[int, dict]] = {source: {} for source in about["sources"]}
    for path in sorted(folder.glob("rows*.jsonl")):
        for row in _read_rows(path, about["columns"], about.get("class_names", ())):
            if row["source"] in rows and row["index"] < about["episodes"]:
                rows[row["source"]].setdefault(row["index"], row)
    kept = {source: [each[i] for i in sorted(each)] for source, each in rows.items() if each}
    return Run(folder, about, merging, kept, read_corruptions(folder))


def summarise_run(run: Run, more: Mapping) -> dict:
    """The content of results.json: run.json, `more`, summaries by domain and average, what is suspect."""
    names = [*run.sources, *run.averages]
    return {
        **run.about,
        **more,
        "merging": run.merging,
        "summary": {
            name: {column: _plain(found) for column in run.columns if (found := run.summary(name, column))}
            for name in names
        },
        "variants": run.variants,
        "suspect": [list(finding) for finding in run.findings],
        **({"corruption_summary": corruption_summary(run.corruptions)} if run.corruptions else {}),
    }


def corruption_summary(corruptions: Mapping[str, Sequence[float]]) -> dict:
    """Mean accuracy over common corruptions in per cent: by severity, and over all, as papers report."""
    by_severity = [100 * sum(each) / len(each) for each in zip(*corruptions.values(), strict=True)]
    return {"by_severity": by_severity, "mean": sum(by_severity) / len(by_severity)}


def _plain(summary: Summary) -> dict:
    """A summary in JSON, which has no infinity: null stands for the interval of a single episode."""
    return {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in summary._asdict().items()
    }


def attack_from(values: Mapping) -> Attack:
    """The attack behind an entry of run.json's "attacks"."""
    return Attack(**with_tuples(values))


def read_about(folder: Path) -> dict:
    """The content of run.json. Raises InputError if there is none, or it is damaged."""
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(f"{folder}: no run directory: it has no run.json")
    about = conform(str(path), read_json(path), About)
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: format is {about.get('format')!r}, expected {FORMAT}")
    if about.get("unit", UNITS[0]) not in UNITS:
        raise InputError(f"{path}: unit is {about['unit']!r}, expected one of {', '.join(UNITS)}")
    check_columns(path, about)
    return about


def check_columns(path: Path, about: Mapping) -> None:
    """Raise an `InputError` unless the columns that a file names are those of its attacks, and clean."""
    kinds = (TypeError, ValueError)
    for number, values in enumerate(about["attacks"]):
        with damaged(f"{path}: field 'attacks.{number}': expected an attack", kinds, said=str):
            needed = attack_from(values).columns
        for column in ("clean", *needed):
            if column not in about["columns"]:
                raise InputError(f"{path}: field 'columns': expected {column} among them")
    if "clean" not in about["columns"]:
        raise InputError(f"{path}: field 'columns': expected clean among them")


def read_merging(folder: Path) -> dict[str, dict]:
    """By domain how its merging was decided; empty before the first one was.

    Raises:
        InputError: merging.json is damaged.
    """
    path = folder / "merging.json"
    return conform(str(path), read_json(path), dict[str, Merging]) if path.exists() else {}


def read_corruptions(folder: Path) -> dict[str, list[float]]:
    """By common corruption, the accuracy in [0, 1] at each severity; empty before the first one is done.

    Raises:
        InputError: corruptions.json is damaged.
    """
    path = folder / "corruptions.json"
    return conform(str(path), read_json(path), Corruptions) if path.exists() else {}


def _read_rows(path: Path, columns: Sequence[str], class_names: Sequence[str]) -> Iterator[dict]:
    """The complete lines of a file of rows."""
    lines = read_bytes(path, _ROWS_LARGEST).split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        row = conform(where, parse_json(where, line), Row)
        conform(where, {column: row.get(column) for column in columns}, Accuracies)
        check_answers(where, row, columns, class_names)
        yield row
