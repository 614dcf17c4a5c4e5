"""Writes the run directory of an evaluation (see `runs`): as results come, resumed, shared out.

Knows rows, not how they are computed.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from amt.evaluation.runs import FORMAT, read_about, read_corruptions, read_merging
from amt.evaluation.samples import Sample, write_sample
from amt.files.run_directory import RunDirectory, check_same, settings_pairs
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.files import replace_file, size_of, to_disk

WROTE = (
    *("rows*.jsonl", "results.json", "merging.json", "corruptions.json", "samples/*.npz", "samples"),
    *("answers.csv", "classes.csv", "confusion.csv"),
    *("tensorboard/events.out.tfevents.*.evaluation", "tensorboard"),
)


class Writer:
    """Writes a run directory: a new one, or an unfinished one of the same settings and the same code.

    Use it as a context manager.

    Args:
        folder: created if missing.
        about: the content of run.json; its settings and commit decide whether the run may be continued.
        part: (i, n) for part i of n processes that share the directory.
        overwrite: start anew, whatever is there.
        flag: the flag that names the directory, for messages.

    Raises:
        InputError: on entering: the directory holds a run of other settings or another commit, another
            process writes this part of it, or it cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping,
        part: tuple[int, int] = (0, 1),
        overwrite: bool = False,
        flag: str = "--output_dir",
    ):
        i, n = part
        if overwrite and n > 1:
            raise InputError(f"--overwrite: {folder} is shared by {n} parts; remove what is there instead")
        self.folder = folder
        self._path = folder / ("rows.jsonl" if n == 1 else f"rows.{i}of{n}.jsonl")
        self._flag = flag
        self._directory = RunDirectory(
            folder,
            {"format": FORMAT, **about},
            results=WROTE,
            flag=flag,
            overwrite=overwrite,
            part=self._path.name,
            renew=self._renewed,
        )

    def __enter__(self) -> "Writer":
        if os.path.lexists(self._path):
            size_of(self._path)  # a pipe would be waited for, a device read for ever
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._directory)
            self._file = opened.enter_context(open(self._path, "a+b"))
            # A line without its end was cut short by a crash; its episode is done again.
            self._file.seek(0)
            content = self._file.read()
            self._file.truncate(content.rfind(b"\n") + 1)
            self._opened = opened.pop_all()
        return self

    def _renewed(self, path: Path, _earlier: dict, asked: dict) -> dict:
        """The run.json for more episodes or domains: nothing that decides a row has changed."""
        earlier = read_about(self.folder)
        check_same(path, _pairs(earlier, asked), self._flag)
        if earlier.get("commit") != asked.get("commit"):
            raise InputError(
                f"{path}: this run was begun with commit {earlier.get('commit')}, the code is now "
                f"{asked.get('commit')}; name another {self._flag}, go back to that commit to continue, or "
                "--overwrite to start anew"
            )
        # Keep the decisions of domains that are not evaluated this time: their rows stay, too.
        return asked | {"deployments": earlier["deployments"] | asked["deployments"]}

    def append(self, *rows: Mapping) -> None:
        """Add rows; when this returns they are on the disk."""
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        to_disk(self._file)

    def __exit__(self, *_exception) -> None:
        self._opened.close()

    def note_merging(self, source: str, about: Mapping) -> None:
        """Note how a domain's merging was decided."""
        path = self.folder / "merging.json"
        with self._directory.alone():  # the other parts add their domains to the same file
            text = json.dumps(read_merging(self.folder) | {source: about}, indent=1)
            replace_file(path, text + "\n")

    def note_corruption(self, name: str, accuracies: Sequence[float]) -> None:
        """Note the accuracies in [0, 1] under one common corruption, by severity."""
        text = json.dumps(read_corruptions(self.folder) | {name: list(accuracies)}, indent=1)
        replace_file(self.folder / "corruptions.json", text + "\n")

    def keep(self, sample: Sample) -> None:
        """Keep some images."""
        write_sample(self.folder, sample)


def _pairs(found: Mapping, asked: Mapping) -> list[tuple[str, object, object]]:
    """The settings that two runs must share. Domains may differ, but those in both must be deployed alike."""
    pairs = settings_pairs(found["settings"], asked["settings"])
    for source in sorted(found["deployments"].keys() & asked["deployments"].keys()):
        deployed = settings_pairs(found["deployments"][source], asked["deployments"][source])
        pairs += [(f"{name} of {source}", before, now) for name, before, now in deployed]
    return pairs
