"""The one guard of a directory that a run writes: training, AutoLoRa, evaluation.

    RUN/run.json   the kind of run and its settings, written before anything else
    RUN/.lock      held while a process writes the directory

The same settings continue what is there, other settings are refused, and `--overwrite` starts anew. Settings
are compared under the lock, so two runs that start together cannot both take the directory.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict

from amt.files.locks import Lock
from amt.models import precision
from meta_dataset_readers.errors import InputError, damaged, say, strerror
from meta_dataset_readers.files import LARGEST_LIST, parse_json, read_bytes, replace_file
from meta_dataset_readers.json_fields import conform

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
_MUTEX_FILE = ".settings.lock"
_FLAGS = {"autocast": "--precision"}  # of settings that files have always called otherwise

Renew = Callable[[Path, dict, dict], dict]


class _About(TypedDict):
    """What all runs say."""

    settings: dict
    kind: NotRequired[str]
    threads: NotRequired[Annotated[list[Annotated[int, Field(ge=1, le=10**6)]], Field(max_length=100)]]
    arithmetic: NotRequired[Annotated[list[dict[str, str | bool]], Field(max_length=100)]]


class RunDirectory:
    """A directory while this process writes it; use it as a context manager.

    Args:
        folder: created if missing.
        about: the content of run.json: `kind` (none for an evaluation), `settings`, and what else describes
            the run. Added are `threads`, the numbers of CPU threads it ran with, and `arithmetic`, what
            `precision.in_use` said then.
        results: patterns of what the run writes here. Where there is any of it and neither run.json nor a
            file of `resumable`, the directory is somebody else's.
        flag: that names the directory, for messages.
        overwrite: remove what a run of this kind has written, run.json included, and start anew.
        part: the file of this part of the run, whose other parts may write at the same time; None: no parts.
        renew: (run.json, its content, `about`) -> the new content, or an error where the two do not go
            together; by default the settings must be the same, and run.json stays as it is.
        older: settings that older versions' run.json does not name, as they were.
        resumable: names of files that older versions wrote without a run.json and that can be continued.

    Raises:
        InputError: on entering: another process writes here, the directory holds another run, or it cannot be
            written to; what is there stays as it was.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping,
        *,
        results: Sequence[str],
        flag: str = "--output_dir",
        overwrite: bool = False,
        part: str | None = None,
        renew: Renew | None = None,
        resumable: Sequence[str] = (),
        older: Mapping = MappingProxyType({}),
    ):
        self.folder, self.flag = folder, flag
        machine = {"threads": [torch.get_num_threads()], "arithmetic": [precision.in_use()]}
        self._about = json.loads(json.dumps({**about, **machine}))
        self._results, self._resumable, self._older = results, resumable, older
        self._overwrite, self._part = overwrite, part
        self._renew = renew or self._unchanged

    def __enter__(self) -> "RunDirectory":
        with damaged(f"{self.folder}: cannot be written", OSError, strerror):
            self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            if self._part is None or self._overwrite:
                lock = held.enter_context(Lock(self.folder / LOCK_FILE))
                self._clean()
            if self._part is not None:
                if self._overwrite:
                    lock.release()
                held.enter_context(Lock(self.folder / LOCK_FILE, shared=True))
            with self.alone():
                about = self._agreed()
                if self._part is not None:
                    held.enter_context(Lock(self.folder / self._part))
                self._settled = about
                if (self.folder / RUN_FILE).exists() or not self._is_older():
                    self.confirm()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_exception) -> None:
        self._held.close()

    def alone(self) -> contextlib.AbstractContextManager:
        """A context in which no other part of the run writes the files that all parts share."""
        if self._part is None:
            return contextlib.nullcontext()
        return Lock(self.folder / _MUTEX_FILE, wait=True)

    def _clean(self) -> None:
        """Remove what dead processes have left, and the run itself where it is to start anew."""
        self._remove(".*.part")
        if self._overwrite:
            self._remove_run()

    def _agreed(self) -> dict:
        """The content of run.json from now on, where what is there may be continued."""
        path = self.folder / RUN_FILE
        if path.exists():
            earlier = self._read(path)
            return self._renew(path, earlier, self._about) | self._machine(path, earlier)
        self._refuse_foreign()
        return self._about

    def _machine(self, path: Path, earlier: Mapping) -> dict[str, list]:
        """The fields of all that the run ran with so far, of which older versions noted none; what is new is
        said, since sums may differ."""
        known = {name: earlier.get(name, []) for name in ("threads", "arithmetic")}
        threads, (now,) = known["threads"], self._about["threads"]
        if threads and now not in threads:
            ran = " and ".join(map(str, threads))
            _goes_on(path, f"with {ran} CPU threads", f"with {now}", f"--threads {threads[-1]}")
        repeats = [each.get("deterministic") for each in known["arithmetic"]]
        now = self._about["arithmetic"][0]["deterministic"]
        if repeats and now not in repeats:
            how = ("without", "with") if now else ("with", "without")
            before = "the command without it" if now else "--deterministic"
            _goes_on(path, f"{how[0]} --deterministic", f"{how[1]} it", before)
        return {name: [*ran, *(x for x in self._about[name] if x not in ran)] for name, ran in known.items()}

    def confirm(self) -> None:
        """Write run.json. Of a run of an older version, which has none, the settings are known by a file of
        `resumable` alone: call this once they were found to be the same."""
        text, path = json.dumps(self._settled, indent=1) + "\n", self.folder / RUN_FILE
        if not path.exists() or path.read_text() != text:
            replace_file(path, text)

    def _read(self, path: Path) -> dict:
        where = f"{path}: damaged, no settings of a run can be read"
        found = conform(where, parse_json(where, read_bytes(path, LARGEST_LIST)), _About)
        before, now = (about.get("kind", "an evaluation") for about in (found, self._about))
        if before != now:
            raise InputError(f"{path}: this directory holds {before}, not {now}; name another {self.flag}")
        return found

    def _unchanged(self, path: Path, earlier: dict, asked: dict) -> dict:
        before = {**self._older, **earlier["settings"]}
        check_same(path, settings_pairs(before, asked["settings"]), self.flag)
        return earlier

    def _is_older(self) -> bool:
        return any((self.folder / name).exists() for name in self._resumable)

    def _refuse_foreign(self) -> None:
        if self._is_older():
            return
        for pattern in self._results:
            for path in sorted(self.folder.glob(pattern)):
                if not path.is_dir():
                    raise InputError(
                        f"{self.folder}: has {path.relative_to(self.folder)} but no {RUN_FILE}; "
                        f"name an empty {self.flag}"
                    )

    def _remove_run(self) -> None:
        path = self.folder / RUN_FILE
        if path.exists():
            self._read(path)  # a run of another kind stays
        else:
            self._refuse_foreign()
        for pattern in (*self._results, RUN_FILE):
            self._remove(pattern)

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            with damaged(f"{path}: cannot be removed", OSError, strerror):
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                else:
                    path.unlink(missing_ok=True)


def _goes_on(path: Path, ran: str, now: str, before: str) -> None:
    say(
        f"note: {path}: this run ran {ran} so far, and goes on {now}: sums may be rounded differently; "
        f"{before} goes on as before",
        file=sys.stderr,
    )


def settings_pairs(found: Mapping, asked: Mapping) -> list[tuple[str, object, object]]:
    """Every setting by its name, in the order of `asked`: as it was, and as it is asked for."""
    names = dict.fromkeys((*asked, *sorted(found)))
    return [(name, found.get(name), asked.get(name)) for name in names]


def check_same(path: Path, pairs: Iterable[tuple[str, object, object]], flag: str = "--output_dir") -> None:
    """Raise an `InputError` that names the first difference between a run's settings, which are from `path`,
    and those asked for: of name, earlier and asked value, plain JSON values."""
    for name, before, now in pairs:
        if before != now:
            said = f"{name} ({_FLAGS[name]})" if name in _FLAGS else name
            raise InputError(
                f"{path}: this run was begun with {said} {json.dumps(before)}, not {json.dumps(now)}; "
                f"name another {flag}, use the same settings to continue, or --overwrite to start anew"
            )
