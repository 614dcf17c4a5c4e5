"""Files that are written whole or not at all, and by what a file is known again."""

import hashlib
import os
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

    Raises:
        InputError: the place cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise InputError(f"{path}: cannot be written ({error})") from error
