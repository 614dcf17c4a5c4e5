"""Files that are written whole or not at all, and by what a file is known again."""

import contextlib
import errno
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

from meta_dataset_readers.errors import InputError


def digest(path: Path | None) -> str | None:
    """SHA-256 of a file, as text; None where none is named."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(part)` on a file beside `path`, then put it in its place in one step.

    Both the file and its folder are on the disk when this returns, so a power cut leaves the old file or the
    new one. Parts that dead processes of this machine left of `path` are removed.

    Raises:
        InputError: the place cannot be written to, or the disk is full; what was there stays as it was.
    """
    here = platform.node().replace(".", "-")
    part = path.with_name(f".{path.name}.{here}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_parts(path, here)
        write(part)
        _synchronise(part)
        os.replace(part, path)
        _synchronise(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def replace_described(path: Path, content: bytes, text: str) -> None:
    """Replace `path`, and the .json beside it that describes it, each in one step.

    The earlier description is out of the way before `path` changes, so whatever happens in between, a .json
    that is there describes the file beside it.

    Raises:
        InputError: as `replace_file`; what was there stays as it was.
    """
    readable = path.with_suffix(".json")
    aside = readable.with_name(f".{readable.name}.part")

    def write(part: Path) -> None:
        part.write_bytes(content)
        if readable.exists():
            os.replace(readable, aside)
            _synchronise(path.parent)

    try:
        replace_file(path, write)
    except InputError:
        with contextlib.suppress(OSError):
            os.replace(aside, readable)
        raise
    replace_file(readable, lambda part: part.write_text(text))
    aside.unlink(missing_ok=True)


def _remove_dead_parts(path: Path, here: str) -> None:
    prefix = f".{path.name}.{here}."
    for part in path.parent.iterdir():
        pid = part.name.removeprefix(prefix).removesuffix(".part")
        if part.name == f"{prefix}{pid}.part" and pid.isdecimal() and not _is_alive(int(pid)):
            part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _synchronise(path: Path) -> None:
    """Have the disk hold a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some file systems say of folders
            raise
    finally:
        os.close(descriptor)
