"""A list of digests of the files of sources, for layouts whose files carry no checksums of their own.

The list is what `sha256sum` writes and verifies: by line a digest, and a file's path below the data path.
Does not know layouts.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from meta_dataset_readers.errors import InputError, printable, say
from meta_dataset_readers.files import LARGEST_LIST, read_bytes, reading, replace_file

Sums = dict[str, str]  # by path below the data path: SHA-256 in hexadecimal

_LINE = re.compile(rb"(\\?)([0-9a-f]{64}) [ *](.+)")
_MOST = 64 * LARGEST_LIST  # bytes of a list; ImageNet's has 100 million


class SumsFile:
    """The list in `file`, being made where there is none, else compared with the files below `root`.

    Raises InputError for a file that is no such list.
    """

    def __init__(self, file: Path, root: Path, jobs: int):
        self._file, self._root, self._jobs = file, root, jobs
        self._is_new = not os.path.lexists(file)
        self._listed: Sums = {} if self._is_new else _read(file)
        self._found: Sums = {}

    def faults(self, directory: Path) -> list[str]:
        """What differs in the directory of a source."""
        folder = directory.relative_to(self._root).parts[0]
        found = _digests(self._root, folder, self._jobs)
        found.pop(os.path.relpath(self._file, self._root), None)
        self._found |= found
        if self._is_new:
            return []
        listed = {
            name: self._listed.pop(name) for name in list(self._listed) if Path(name).parts[0] == folder
        }
        return list(_differences(listed, found))

    def finish(self, sound: bool, everything: bool) -> bool:
        """Write a new list if all is sound; of an old one say what was never met. False for a fault."""
        if not self._is_new:
            lost = self._listed if everything else {}
            for folder in dict.fromkeys(Path(name).parts[0] for name in lost):
                say(f"{folder}: 1 fault", f"  {folder}: is missing, {self._file} has files of it")
            return not lost
        if sound:
            replace_file(self._file, (_line(name, digest) for name, digest in self._found.items()))
            say(f"wrote {self._file}: digests of {len(self._found)} files")
        else:
            say(f"{self._file} is not written: it is for sources without faults")
        return True


def _digests(root: Path, folder: str, jobs: int) -> Sums:
    """The digests of all files below `folder` of the data path `root`, without hidden ones.

    Shows a progress bar if stderr is a terminal. Raises InputError for what cannot be read.
    """
    files = sorted(_files(root, folder))
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda file: _digest(root / file), files)
        title = f"{printable(folder)}: digests"
        shown = tqdm(found, title, total=len(files), unit="file", leave=False, disable=None)
        return dict(zip(files, shown, strict=True))


def _read(file: Path) -> Sums:
    """A list as `SumsFile` or `sha256sum` wrote it. Raises InputError, naming the line, for another file."""
    found: Sums = {}
    for number, line in enumerate(read_bytes(file, _MOST).splitlines(), 1):
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise InputError(f"{file}: line {number}: expected a SHA-256 digest, two spaces and a path")
        name = _unescaped(parts[3]) if parts[1] else parts[3]
        found[os.fsdecode(name)] = parts[2].decode()
    return found


def _differences(listed: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """A line for each file that is not as it was listed."""
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            yield f"{name}: is missing, the list of digests has it"
        elif name not in listed:
            yield f"{name}: is new, the list of digests has it not"
        elif listed[name] != found[name]:
            yield f"{name}: has changed since its digest was listed"


def _files(root: Path, folder: str) -> Iterator[str]:
    """The paths below `root` of the files in `folder`; links are followed, but not in a circle."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    seen = set()
    for place, folders, names in os.walk(root / folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.relpath(os.path.join(place, n), root) for n in names if not n.startswith("."))


def _digest(path: Path) -> str:
    with reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(name: str, digest: str) -> bytes:
    path = os.fsencode(name)
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != path else b"") + digest.encode() + b"  " + escaped + b"\n"


def _unescaped(path: bytes) -> bytes:
    letters = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}
    return re.sub(rb"\\[\\nr]", lambda found: letters[found[0]], path)
