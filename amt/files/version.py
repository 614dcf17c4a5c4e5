"""What a result has to say so that it can be produced again: which code ran, and on which files."""

import functools
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("amt", "meta_dataset_readers", "main.py", "test_meta_dataset.py")


def digest(path: Path | None) -> str | None:
    """SHA-256 of a file in hexadecimal; None where none is named."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def commit() -> str:
    """The commit of the code, with a digest of the sources where they differ from it: `0f3bad0c1d2e` or
    `0f3bad0c1d2e+5a61b0c2`; outside a repository `sources-` and the digest."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return f"sources-{_sources_digest()}"
    changed = _git("status", "--porcelain", "--", *SOURCES)
    return f"{head}+{_sources_digest()}" if changed else head


def _git(*arguments: str) -> str | None:
    """The output of git; None without git or a repository of this project."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _sources_digest() -> str:
    """Eight hexadecimal digits that change with any source file."""
    found = hashlib.sha256()
    for place in SOURCES:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:8]
