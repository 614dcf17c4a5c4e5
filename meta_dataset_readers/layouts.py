"""Which layout the directory of a source has, and so who opens it.

The layout is recognised by what lies in the directory, never by the source's name.
"""

from pathlib import Path

from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.spec import SPEC_FILE, load_spec
from meta_dataset_readers.store import RecordStore, Source


def open_source(root: str | Path, name: str) -> Source:
    """The source `name` below the data path `root`; no picture is read.

    Raises InputError for a path or a source that is not there, and whatever its layout finds wrong.
    """
    directory = _directory(root, name)
    return Source(load_spec(directory), RecordStore(directory, name))


def _directory(root: str | Path, name: str) -> Path:
    if not root:
        raise InputError("the data path is empty, expected a directory with one directory per source")
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such directory, expected a data path with one directory per source")
    sources = [file.parent.name for file in root.glob(f"*/{SPEC_FILE}")]
    if name not in sources:
        raise InputError(f"{root}: no source {name!r} with a {SPEC_FILE}; {nearest(name, sources)}")
    return root / name
