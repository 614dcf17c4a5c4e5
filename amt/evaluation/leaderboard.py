"""A row of a leaderboard as one small JSON file: what was measured, on what, and what it was tuned on.

    results/NAME.json    written by `python -m amt row`, read by `python -m amt report`

A file holds the number of right answers of every episode, so that rows are compared in pairs; no picture, no
coefficient. It is read as a run of one or several training seeds (`seeds.joined`). What it says is not
believed: shapes, ranges and sizes are checked.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from amt.evaluation.noted import NotedAttack, Seed
from amt.evaluation.runs import Run, check_columns
from amt.evaluation.seeds import joined
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.files import parse_json, read_bytes
from meta_dataset_readers.json_fields import conform

PROTOCOL = 1  # of how episodes are drawn, attacked and counted; rows of different ones are not compared
LARGEST = 2**24  # bytes of a file

Text = Annotated[str, Field(max_length=2000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Size = Annotated[int, Field(ge=1, le=10**6)]
Right = Annotated[int, Field(ge=0, le=10**6)]
Sizes = Size | Annotated[list[Size], Field(max_length=10**6)]
Images = Right | Annotated[list[Right], Field(max_length=10**6)]
Names = Annotated[list[Name], Field(min_length=1, max_length=200)]


class _Domain(TypedDict):
    """Episodes of a domain: an integer where all have the same."""

    index: Annotated[list[Right], Field(min_length=1, max_length=10**6)]
    ways: Sizes
    support: Images
    queries: Sizes
    right: dict[str, list[Right]]


class _Seed(TypedDict):
    seed: Seed
    checkpoint: Text | None
    command: Text
    commit: NotRequired[Text | None]
    domains: dict[Name, _Domain]


class _File(TypedDict):
    protocol: int
    name: Name
    arch: Text
    split: Text
    sampling: dict
    attacks: list[NotedAttack]
    columns: Names
    sources: Names
    averages: dict[str, list[str]]
    tuned_on: Text
    candidates: Size
    stamps: Annotated[list[Text], Field(max_length=100)]
    suspect: Annotated[list[Annotated[list[Text], Field(min_length=3, max_length=3)]], Field(max_length=1000)]
    seeds: Annotated[list[_Seed], Field(min_length=1, max_length=1000)]


def content(run: Run, name: str, tuned_on: str = "", candidates: int = 1) -> dict:
    """What a file says about a finished run or row.

    Args:
        tuned_on: what settings of training were chosen on; what a run's own selection looked at is added.
        candidates: how many trainings there were to choose from; a selection's candidates multiply them.

    Raises:
        InputError: the run is unfinished, or has no episodes.
    """
    if run.unit != "episode":
        raise InputError(f"{run.folder}: a leaderboard is of few-shot episodes, its rows are {run.unit}s")
    for part in run.seeds:
        if not part.complete:
            raise InputError(f"{part.folder}: is unfinished; the command that began it continues it")
    notes = [how for part in run.seeds for how in part.merging.values()]
    chosen = dict.fromkeys(str(how["tuned_on"]) for how in notes if "tuned_on" in how)
    offered = max((len(how.get("candidates", ())) for how in notes), default=0)
    about = run.seeds[0].about
    return {
        "protocol": PROTOCOL,
        "name": name,
        **{field: about.get(field) for field in ("arch", "split", "sampling", "attacks", "columns")},
        "sources": list(run.sources),
        "averages": {key: list(members) for key, members in run.averages.items()},
        "tuned_on": "; ".join(filter(None, (tuned_on, *chosen))) or "nothing",
        "candidates": candidates * max(offered, 1),
        "stamps": list(run.stamps),
        "suspect": [list(finding) for finding in run.findings],
        "seeds": [_seed(part) for part in run.seeds],
    }


def _seed(part: Run) -> dict:
    about = part.about
    checkpoint = about.get("settings", {}).get("checkpoint")
    return {
        "seed": about["seed"],
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "command": str(about.get("command", ""))[:2000],
        "commit": about.get("commit"),
        "domains": {source: _domain(rows, part.columns) for source, rows in part.rows.items()},
    }


def _domain(rows: Sequence[Mapping], columns: Sequence[str]) -> dict:
    sizes = {name: [row[name] for row in rows] for name in ("ways", "support", "queries")}
    return {
        "index": [row["index"] for row in rows],
        **{name: found[0] if len(set(found)) == 1 else found for name, found in sizes.items()},
        "right": {column: [round(row[column] * row["queries"]) for row in rows] for column in columns},
    }


def dump(found: Mapping) -> str:
    """The text of a file, short and the same for the same content."""
    return json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n"


def read(path: Path) -> Run:
    """The row that a file holds; `about` has "tuned_on", "candidates", "stamps" and "suspect" as well.

    Raises:
        InputError: there is none, it is too large, or anything in it is not what a row says.
    """
    return parse(path, read_bytes(path, LARGEST))


def parse(path: Path, text: str | bytes) -> Run:
    """The row that the text of the file `path` stands for, as `read` returns it.

    Raises:
        InputError: the text is no row, or one of another protocol.
    """
    found = conform(str(path), parse_json(str(path), text), _File)
    if found["protocol"] != PROTOCOL:
        raise InputError(f"{path}: its protocol is {found['protocol']}, expected {PROTOCOL}")
    check_columns(path, found)
    for name, members in found["averages"].items():
        if not members or not set(members) <= set(found["sources"]):
            raise InputError(f"{path}: field 'averages.{name}': expected domains of the row")
    parts = [_part(path, found, number) for number in range(len(found["seeds"]))]
    row = joined(parts, found["name"].replace("/", "-"))
    more = {field: found[field] for field in ("tuned_on", "candidates", "stamps", "suspect")}
    row.about.update(more)
    return row


def _part(path: Path, found: Mapping, number: int) -> Run:
    """One training seed as a run."""
    seed = found["seeds"][number]
    where = f"{path}: seed {seed['seed']}"
    if set(seed["domains"]) != set(found["sources"]):
        raise InputError(f"{where}: field 'domains': expected {', '.join(found['sources'])}")
    domains = {source: seed["domains"][source] for source in found["sources"]}
    rows = {
        source: _rows(f"{where}: {source}", source, each, found["columns"])
        for source, each in domains.items()
    }
    about = {
        **{name: found[name] for name in ("arch", "split", "sampling", "attacks", "columns", "sources")},
        **{name: seed.get(name) for name in ("seed", "checkpoint", "command", "commit")},
        "averages": found["averages"],
        "episodes": max(len(each) for each in rows.values()),
        "settings": {},
        "deployments": {source: {} for source in rows},
    }
    stamp = {"stamp": "; ".join(found["stamps"])} if found["stamps"] else {}
    how = {"how": f"tuned on {found['tuned_on']}, {found['candidates']} candidates", **stamp}
    folder = path.with_suffix("") / f"{number + 1} of {len(found['seeds'])}, seed {seed['seed']}"
    return Run(folder, about, dict.fromkeys(rows, how), rows)


def _rows(where: str, source: str, domain: Mapping, columns: Sequence[str]) -> list[dict]:
    count = len(domain["index"])
    if len(set(domain["index"])) < count:
        raise InputError(f"{where}: field 'index': an episode is there twice")
    lists = {name: domain[name] for name in ("ways", "support", "queries")}
    lists = {name: each if isinstance(each, list) else [each] * count for name, each in lists.items()}
    for name, values in (lists | {column: domain["right"].get(column, []) for column in columns}).items():
        if len(values) != count:
            raise InputError(f"{where}: {name!r} has {len(values)} values, expected {count}, one an episode")
    rows = []
    for k, index in enumerate(domain["index"]):
        queries = lists["queries"][k]
        right = {column: domain["right"][column][k] for column in columns}
        if max(right.values()) > queries:
            raise InputError(f"{where}: episode {index} has more right answers than {queries} queries")
        accuracies = {column: value / queries for column, value in right.items()}
        sizes = {name: values[k] for name, values in lists.items()}
        rows.append({"source": source, "index": index, **sizes, **accuracies, "coefficients": []})
    return rows


def setting(run: Run) -> str:
    """What has to be equal for rows to be ranked among each other, in plain text."""
    about = run.seeds[0].about
    fields = [about.get(name) for name in ("split", "sampling", "attacks", "columns", "sources")]
    return json.dumps(fields, sort_keys=True)


def score(run: Run) -> float:
    """What rows are ranked by: the mean of clean accuracy and the mean accuracy under attack, in per cent."""
    clean, *attacked = (run.summary(run.whole, column) for column in sorted(run.columns, key="clean".__ne__))
    means = [found.mean for found in attacked if found is not None]
    top = clean.mean if clean is not None else 0.0
    return (top + statistics.fmean(means)) / 2 if means else top
