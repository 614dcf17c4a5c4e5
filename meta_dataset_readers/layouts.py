"""Which layout the directory of a source has, and so who opens it.

A layout is recognised by what lies in the directory, never by the source's name; the name only helps to find
the directory. Opens no picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from meta_dataset_readers import bscd
from meta_dataset_readers.domains import DOMAINS
from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.filelists import FILELISTS, open_filelists
from meta_dataset_readers.folders import SPLIT_FOLDERS, open_class_folders, open_split_folders
from meta_dataset_readers.hdf5 import open_hdf5
from meta_dataset_readers.packed import INDEX_FILE, JOURNAL_FILE, open_packed
from meta_dataset_readers.spec import SPEC_FILE
from meta_dataset_readers.store import Source, open_records


class Layout(NamedTuple):
    """A way of laying a source out on disk: its name, how it is recognised, and who opens it."""

    name: str
    lies_in: Callable[[Path], bool]
    open: Callable[[Path, str], Source]


def open_source(root: str | Path, name: str, image_prefix: tuple[str, str] | None = None) -> Source:
    """The source `name` below the data path `root`, in whatever layout; no picture is read.

    Its directory is called `name`, or what its archive unpacks to (`domains.Domain.directories`).
    `image_prefix` = (old, new) is for lists of image files that were written on another machine, see
    `filelists.open_filelists`.

    Raises InputError for a path or a source that is not there, and whatever its layout finds wrong.
    """
    directory = _directory(_data_path(root), name)
    layout = _layout_of(directory)
    if layout.open is open_filelists:
        return open_filelists(directory, name, image_prefix)
    return layout.open(directory, name)


def sources(root: str | Path) -> dict[str, str]:
    """The sources below the data path `root`, sorted: name -> name of its layout. None is opened.

    A directory with record files but no specification is one too: a broken one, which must not pass unseen.
    Raises InputError for a path that is not there.
    """
    published = {directory: name for name, domain in DOMAINS.items() for directory in domain.directories}
    found = {}
    for directory in _data_path(root).iterdir():
        if directory.is_dir() and not directory.name.startswith("."):
            layout = next((layout for layout in LAYOUTS if layout.lies_in(directory)), None)
            if layout is not None:
                found[published.get(directory.name, directory.name)] = layout.name
    return dict(sorted(found.items()))


def _layout_of(directory: Path) -> Layout:
    for layout in LAYOUTS:
        if layout.lies_in(directory):
            return layout
    raise InputError(
        f"{directory}: no known layout; expected {SPEC_FILE} with record files, lists of image files, or a "
        "folder of image files for each class"
    )


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
    raise InputError(f"{root}: no source {name!r} in it; {nearest(name, sources(root))}")


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
    Layout(
        "split folders", _holds(*(f"{folder}/*/" for folder in SPLIT_FOLDERS.values())), open_split_folders
    ),
    Layout("class folders", _holds("[!.]*/"), open_class_folders),
)
