"""Several runs as the training seeds of one row of a table.

A row joins runs of networks that were trained alike from other seeds. What is read from it is what is read
from any run, but its intervals know that there were several seeds (`statistics.over_seeds`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from amt.evaluation.comparison import in_words
from amt.evaluation.runs import Run, common_rows, load
from meta_dataset_readers.errors import InputError

ONE_SEED = "one training seed: the interval knows the episodes, not what another training would give"
_EQUAL = ("split", "sampling", "attacks", "columns", "sources")


def read_row(word: str) -> Run:
    """The run or the row that a word of a command line names: RUN, RUN,RUN,... or NAME=RUN,RUN,...

    Raises:
        InputError: a folder holds no run, or the runs cannot be one row.
    """
    name, folders = named(word)
    found = [load(folder) for folder in folders]
    return found[0] if len(found) == 1 and not name else joined(found, name or folders[0].name)


def named(word: str) -> tuple[str, list[Path]]:
    """The name in such a word, or "", and the folders. Raises InputError if there is no folder."""
    whole = Path(word).expanduser()
    if whole.exists() or not {"=", ","} & set(word):
        return "", [whole]
    name, _, folders = word.rpartition("=")
    found = [Path(folder).expanduser() for folder in folders.split(",") if folder]
    if not found:
        raise InputError(f"{word}: expected RUN, or NAME=RUN,RUN,... with a run for each training seed")
    return name, found


def joined(parts: Sequence[Run], name: str) -> Run:
    """The runs of several training seeds as one row called `name`.

    Raises:
        InputError: they differ in more than their seed, two are the same run, or the name is no name.
    """
    if not name or "/" in name or not name.isprintable():
        raise InputError(f"{name!r}: expected a name for the row, printable and without /")
    first = parts[0]
    for run in parts[1:]:
        for field in _EQUAL:
            ours, theirs = (about.get(field) for about in (run.about, first.about))
            if ours != theirs:
                told = (
                    f"its {field} differ"
                    if field in ("attacks", "columns")
                    else (f"its {field} is {in_words(ours)}, not {in_words(theirs)}")
                )
                raise InputError(f"{run.folder}: is no other seed of {first.folder}: {told}")
        if run.unit != first.unit:
            raise InputError(f"{run.folder}: is no other seed of {first.folder}: its rows are {run.unit}s")
    places = [run.folder.resolve() for run in parts]
    if len(set(places)) < len(places):
        raise InputError(f"{name}: names the same run twice")
    seeds = [run.about["seed"] for run in parts]
    if 1 < len(set(seeds)) < len(seeds):
        raise InputError(f"{name}: expected runs of one --seed or of different ones, found {in_words(seeds)}")
    if any(run.rows.keys() != first.rows.keys() for run in parts):
        raise InputError(f"{name}: its runs have not finished the same domains")
    about = first.about | {
        "seed": ", ".join(map(str, dict.fromkeys(seeds))),
        "episodes": sum(run.about["episodes"] for run in parts),
    }
    for total in ("episode_seconds", "skipped_records"):
        if all(total in run.about for run in parts):
            about[total] = sum(run.about[total] for run in parts)
    rows = {source: [row for run in parts for row in run.rows[source]] for source in first.rows}
    merging = {
        f"{source}, seed {run.about['seed']}" if len(parts) > 1 else source: how
        for run in parts
        for source, how in run.merging.items()
    }
    row = dataclasses.replace(
        first, folder=Path(name), about=about, rows=rows, merging=merging, parts=tuple(parts)
    )
    for source in row.sources:
        if not all(common_rows([run.rows[source] for run in parts], row.same_episodes)):
            raise InputError(f"{name}: no {row.unit} of {source} is finished by all of its runs")
    return row
