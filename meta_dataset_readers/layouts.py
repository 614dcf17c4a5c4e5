"""Which layout the directory of a source has, and so who opens it.

A layout is recognised by what lies in the directory, never by the source's name; the name only helps to find
the directory. Opens no picture.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from meta_dataset_readers import bscd
from meta_dataset_readers.domains import DOMAINS
from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.filelists import FILELISTS, open_filelists
from meta_dataset_readers.files import (
    check_utf8,
    folder_names,
    leads_nowhere,
    listing,
    split_folders,
    still_packed,
)
from meta_dataset_readers.folders import open_class_folders, open_split_folders
from meta_dataset_readers.hdf5 import open_hdf5
from meta_dataset_readers.packed import INDEX_FILE, JOURNAL_FILE, open_packed
from meta_dataset_readers.pictures import picture_names
from meta_dataset_readers.spec import SPEC_FILE
from meta_dataset_readers.store import Source, open_records

_MOST_WRAPPED = 3  # folders with nothing but another folder in them, as archives and their tools make them
_NO_SOURCES = ("__MACOSX", "lost+found")  # what archives of a Mac and file systems add
_LOOKED_INTO = 20  # class folders, to see whether they are some


class Layout(NamedTuple):
    """A way of laying a source out on disk: its name, how it is recognised, and who opens it."""

    name: str
    lies_in: Callable[[Path], bool]
    open: Callable[[Path, str], Source]


def open_source(root: str | Path, name: str, image_prefix: tuple[str, str] | None = None) -> Source:
    """The source `name` below the data path `root`, in whatever layout; no picture is read.

    Its directory is called `name`, or what its archive unpacks to (`domains.Domain.directories`).
    Folders with nothing but another folder in them are passed through.
    `image_prefix` = (old, new) is for lists of image files that were written on another machine, see
    `filelists.open_filelists`.

    Raises InputError for a path or a source that is not there, and whatever its layout finds wrong.
    """
    directory, layout = layout_of(_directory(_data_path(root), name))
    if layout.open is open_filelists:
        return open_filelists(directory, name, image_prefix)
    return layout.open(directory, name)


def sources(root: str | Path) -> dict[str, str]:
    """The sources below the data path `root`, sorted: name -> name of its layout. None is opened.

    A directory with record files but no specification is one too: a broken one, which must not pass unseen.
    So is one that cannot be listed, a link that leads nowhere, and one of a published name without anything.
    Raises InputError for a path that is not there or cannot be listed.
    """
    published = {directory: name for name, domain in DOMAINS.items() for directory in domain.directories}
    found = {}
    for directory in _entries(_data_path(root)):
        name = published.get(directory.name, directory.name)
        try:
            found[name] = layout_of(directory)[1].name
        except _NoLayout:
            if name in DOMAINS:
                found[name] = "no known layout"
        except InputError:
            found[name] = "not readable"
    return dict(sorted(found.items()))


def without_layout(root: str | Path) -> list[str]:
    """The directories below the data path `root` that are no sources, sorted. Raises as `sources`."""
    published = {directory for domain in DOMAINS.values() for directory in domain.directories}
    known = sources(root).keys() | published
    return [directory.name for directory in _entries(_data_path(root)) if directory.name not in known]


def as_source(root: str | Path) -> str:
    """What to type where `root` is itself a source, led by "; "; empty where it is none."""
    path = Path(os.path.abspath(root))
    try:
        place, layout = layout_of(path)
        folders = folder_names(path)[:_LOOKED_INTO]
        shows_pictures = any(picture_names(path / folder) for folder in folders)
    except InputError:
        return ""
    if place != path or (layout.open is open_class_folders and not shows_pictures):
        return ""
    parent, name = shlex.quote(str(path.parent)), shlex.quote(path.name)
    is_one = f"it is itself a source ({layout.name})"
    return f"; {is_one}: give {parent} as the data path and {name} as the source"


class _NoLayout(InputError):
    """A directory that no layout lies in."""


def _entries(root: Path) -> list[Path]:
    """What may be sources: folders, and links that lead nowhere."""
    names = listing(root, lambda entry: leads_nowhere(entry) or entry.is_dir(), any_name=True)
    return [root / name for name in names if name not in _NO_SOURCES]


def layout_of(directory: Path) -> tuple[Path, Layout]:
    """The layout of a source, and the folder it lies in: `directory`, or one that is wrapped in it."""
    check_utf8(directory.parent, [directory.name])
    layout = _lying_in(directory)
    for _ in range(_MOST_WRAPPED):
        inner = [name for name in folder_names(directory) if name not in _NO_SOURCES]
        if len(inner) != 1 or (layout is not None and layout.open is not open_class_folders):
            break
        wrapped = _lying_in(directory / inner[0])
        if wrapped is None or picture_names(directory / inner[0]):  # a class, perhaps of its own subfolders
            break
        directory, layout = directory / inner[0], wrapped
    if layout is not None:
        return directory, layout
    raise _NoLayout(
        f"{directory}: no known layout; expected {SPEC_FILE} with record files, lists of image files, or a "
        "folder of image files for each class"
    )


def _lying_in(directory: Path) -> Layout | None:
    folder_names(directory)  # patterns find nothing where nothing can be listed
    return next((layout for layout in LAYOUTS if layout.lies_in(directory)), None)


def _data_path(root: str | Path) -> Path:
    if not root:
        raise InputError("the data path is empty, expected a directory with one directory per source")
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such directory, expected a data path with one directory per source")
    return Path(root)


def _directory(root: Path, name: str) -> Path:
    other_names = DOMAINS[name].directories if name in DOMAINS else ()
    for candidate in (name, *other_names):
        # A name is one part of a path: it cannot lead out of the data path.
        if candidate == Path(candidate).name and (root / candidate).is_dir():
            return root / candidate
    hint = still_packed(root, name, *other_names) or as_source(root)
    raise InputError(f"{root}: no source {name!r} in it; {nearest(name, sources(root))}{hint}")


def _holds(*patterns: str) -> Callable[[Path], bool]:
    return lambda directory: any(next(directory.glob(pattern), None) for pattern in patterns)


def _no_source(what: str) -> Callable[[Path, str], Source]:
    def refuse(directory: Path, _name: str) -> Source:
        raise InputError(f"{directory}: {what}")

    return refuse


# In the order they are tried: a packed source keeps its specification, one may have record files beside
# those of PMF (and record files have checksums), and any directory could be one of class folders.
LAYOUTS = (
    Layout("unfinished copy", _holds(JOURNAL_FILE), _no_source("an unfinished copy; run `convert` again")),
    Layout(
        "dumped episodes",
        _holds("images_per_class.json"),
        _no_source("episodes, not a source; `stored_episodes.open_episodes` reads them"),
    ),
    Layout("packed", _holds(INDEX_FILE), open_packed),
    Layout("record files", _holds("*.tfrecords"), open_records),
    Layout("HDF5 files", _holds("[0-9]*.h5"), open_hdf5),
    Layout("record files", _holds(SPEC_FILE, "dataset_spec.pkl"), open_records),
    *(Layout("BSCD-FSL download", _holds(mark), opener) for mark, opener in bscd.LAYOUTS.items()),
    Layout("filelists", _holds(*FILELISTS.values()), open_filelists),
    Layout("split folders", lambda directory: bool(split_folders(directory)), open_split_folders),
    Layout("class folders", _holds("[!.]*/"), open_class_folders),
)
