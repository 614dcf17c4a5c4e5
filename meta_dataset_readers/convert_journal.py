"""The journal of an unfinished copy (see `convert`): what a run that was killed leaves to the next one."""

import json
import os
from pathlib import Path
from typing import Any

from meta_dataset_readers import files
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.packed import SplitFile


class Journal:
    """What has been decided about an unfinished copy, a line of JSON each, the first saying what is copied.

    A line is on disk before anything that follows from it. Raises InputError where the first line is not
    `plan`, where the file is no journal, and where records were left out and that is no longer wanted.
    """

    def __init__(self, path: Path, plan: dict[str, Any], skip_bad_records: bool):
        self._path, self._skip_bad_records = path, skip_bad_records
        self.left_out: dict[tuple[int, int], str] = {}  # (class id, index): why
        self.finished: dict[str, tuple[SplitFile, tuple[int, ...]]] = {}  # split: (file, checksums by class)
        lines = self._whole_lines()
        if not lines:
            self._append(plan)
            return
        try:
            begun, *decided = (json.loads(line) for line in lines)
            for entry in decided:
                if "left_out" in entry:
                    self.left_out[entry["class"], entry["image"]] = entry["left_out"]
                else:
                    self.finished[entry["split"]] = (SplitFile(**entry["file"]), tuple(entry["checksums"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not readable; delete {path.parent} to start anew") from error
        if begun != plan:
            found = "was begun from another source, or this one has changed since"
            raise InputError(f"{path}: the copy {found}; delete {path.parent} to start anew")
        if self.left_out and not skip_bad_records:
            raise InputError(next(iter(self.left_out.values())))

    def leave_out(self, class_id: int, index: int, error: DamagedRecord) -> None:
        """Enter a damaged record, or raise the error where none may be left out."""
        if not self._skip_bad_records:
            raise error
        self._append({"left_out": str(error), "class": class_id, "image": index})
        self.left_out[class_id, index] = str(error)

    def finish(self, split: str, file: SplitFile, checksums: tuple[int, ...]) -> None:
        self._append({"split": split, "file": file._asdict(), "checksums": checksums})
        self.finished[split] = (file, checksums)

    def _whole_lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        os.truncate(self._path, len(whole))  # the line that was being written when the run was killed
        return whole.splitlines()

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            files.to_disk(file)
