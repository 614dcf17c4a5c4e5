"""A folder that holds a data set: what is missing in it, and lists of its pictures that are not believed.

Does not know any data set.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from amt.data.labelled import FileImages, Labelled
from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.files import folder_names, missing_files, path_parts, still_packed
from meta_dataset_readers.pictures import Prepare


class Opened(NamedTuple):
    """A data set on disk. `validation` is there only where the disk itself sets pictures aside for it."""

    train: Labelled
    test: Labelled
    class_names: tuple[str, ...]
    validation: Labelled | None = None


@dataclasses.dataclass(frozen=True)
class Known:
    """One data set that is known by name, which messages call by its title.

    Args:
        n_classes: how many classes it has as it is distributed; 0 where the folder tells.
        image_size: the side in pixels that it is read at by default.
        open: the data set in a folder.
        aliases: other names, see `known`.
        home: where to get it.
        prepare: of pictures that are files, see `pictures.decode_image`.
        archives: in which it is distributed, by their names without endings.
    """

    name: str
    title: str
    n_classes: int
    image_size: int
    open: Callable[["DatasetFolder"], Opened]
    aliases: tuple[str, ...] = ()
    home: str = ""
    prepare: Prepare | None = None
    archives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DatasetFolder:
    """A folder that is to hold (a part of) a data set."""

    folder: Path
    entry: Known

    def holds(self, where: str, files: Iterable[str]) -> bool:
        return any((self.folder / where / file).exists() for file in files)

    def at(self, wheres: Sequence[str], files: Sequence[str]) -> "DatasetFolder":
        """The first of the subfolders `wheres` with any of `files`; the first of all if there is none, so
        that what is missing is told as it should lie."""
        where = next((where for where in wheres if self.holds(where, files)), None)
        if where is None:  # perhaps one folder further in, as some tools unpack archives
            inner = (name for name in folder_names(self.folder) if name not in wheres)
            below = (f"{name}/{where}" for name in inner for where in wheres)
            where = next((where for where in below if self.holds(where, files)), wheres[0])
        return dataclasses.replace(self, folder=self.folder / where)

    def file(self, name: str, what: str, *others: str) -> Path:
        """The file of that name, or of one of the `others`. Raises InputError where there is none."""
        for found in (self.folder / other for other in (name, *others)):
            if found.is_file():
                return found
        raise self._missing(self.folder / name, "file", what)

    def subfolder(self, name: str, what: str) -> Path:
        if not (self.folder / name).is_dir():
            raise self._missing(self.folder / name, "folder", what)
        return self.folder / name

    def _missing(self, path: Path, kind: str, what: str) -> InputError:
        # An archive may lie where the folder is to be, under its name or another of the data set.
        names = {path.parent.name, *self.entry.archives}
        places = dict.fromkeys((path.parent, path.parent.parent, path.parent.parent.parent))
        hint = next(filter(None, (still_packed(place, *names) for place in places)), "")
        home = hint or f"; get it from {self.entry.home}"
        return InputError(f"{path}: no such {kind}, expected {what} of {self.entry.title}{home}")

    def pictures(
        self,
        root: Path,
        class_names: Sequence[str],
        train: Sequence["Entry"],
        test: Sequence["Entry"],
        validation: Sequence["Entry"] | None = None,
    ) -> Opened:
        """The data set whose pictures are these files below `root`. Raises InputError for a path that leaves
        the root, a file that is listed twice or not there, and a split without pictures."""
        listed: dict[str, Path] = {}
        for entry in (*train, *test, *(validation or ())):
            parts = path_parts(entry.file)
            file = "/".join(parts)
            if not parts or entry.file.startswith(("/", "\\")) or ".." in parts:
                raise InputError(f"{entry.said_by}: {entry.file!r} is no path below {root}")
            if file in listed:
                where = entry.said_by if entry.said_by == listed[file] else f"{listed[file]}, {entry.said_by}"
                raise InputError(f"{where}: {file} is listed twice, expected every picture in one place")
            listed[file] = entry.said_by
        for file in missing_files(root, list(listed)):
            raise self._missing(root / file, "file", f"a picture that {listed[file].name} lists")
        for split, entries in (("training", train), ("test", test)):
            if not entries:
                raise InputError(f"{self.folder}: no {split} picture of {self.entry.title}")
        held_out = None if validation is None else self._images(root, validation)
        return Opened(self._images(root, train), self._images(root, test), tuple(class_names), held_out)

    def _images(self, root: Path, entries: Sequence["Entry"]) -> FileImages:
        files, labels = [entry.file for entry in entries], [entry.label for entry in entries]
        return FileImages(root, files, labels, self.entry.prepare)


class Entry(NamedTuple):
    """One picture of a list: its path below the root of all, its label from 0, and the list (or folder)."""

    file: str
    label: int
    said_by: Path


def class_label(file: Path, labels: dict[str, int], name: str) -> int:
    """The label of the class `name`. Raises InputError for an unknown one; `file` names it."""
    if name not in labels:
        raise InputError(f"{file}: unknown class {name!r}, {nearest(name, labels)}")
    return labels[name]


def class_names_by_folder(*splits: Sequence[Entry]) -> list[str]:
    """The folder of each class, by label, of data sets that number their classes. Raises InputError for a
    class in two folders: its labels and its paths disagree."""
    folders: dict[int, str] = {}
    for entry in (entry for split in splits for entry in split):
        folder = "/".join(path_parts(entry.file)[-2:-1])
        if folders.setdefault(entry.label, folder) != folder:
            both = f"both {folders[entry.label]!r} and {folder!r}"
            raise InputError(f"{entry.said_by}: label {entry.label + 1} is in {both}")
    return [folders.get(label, f"class {label + 1}") for label in range(max(folders, default=-1) + 1)]
