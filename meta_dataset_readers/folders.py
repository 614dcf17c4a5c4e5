"""Sources whose pictures are single image files, and the two kinds of them that are nothing but folders.

Knows how a picture is found in a file of its own, and folders of class folders: a domain of one's own, or
below train/, val/ and test/ (CIFAR-FS, mini-ImageNet). Benchmarks with lists of their own are read by `bscd`
and `filelists`, which hand their classes to `flat_source`. Does not know episodes.

Opening a source lists directories and opens no picture. A symbolic link is the user's own arrangement and is
followed; a path written in a file is believed only if it stays below the directory it belongs to.
"""

import io
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.files import folder_names, missing_files, read_json, split_folders
from meta_dataset_readers.json_fields import Fields, typed
from meta_dataset_readers.pictures import (
    EXTENSIONS,
    RECORD_FORMATS,
    Prepare,
    is_turned,
    other_endings,
    picture_bytes,
    picture_names,
    read_picture,
    upright,
)
from meta_dataset_readers.spec import SPLITS, DatasetSpec
from meta_dataset_readers.store import ImageStore, Source

_LOOKED_INTO = 20  # folders, to see what somebody has meant
_PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # opaque ones that PIL alone converts as is meant

SPLITS_FILE = "splits.json"


class FileStore(ImageStore):
    """Pictures in a file each, of which none is kept open.

    `files` are those of each class id, relative to `root` and with "/" between their parts; `name` is the
    source's, for `origin`. `prepare` is applied to a picture in its own mode, before it becomes RGB.
    A file that is absent or unreadable is a damaged record: its neighbours may be sound.
    """

    def __init__(
        self, root: Path, name: str, files: Sequence[tuple[str, ...]], prepare: Prepare | None = None
    ):
        self._root, self._name, self._files, self._prepare = root, name, tuple(files), prepare

    def count(self, class_id: int) -> int:
        return len(self._files[class_id])

    def image(self, class_id: int, index: int) -> Image.Image:
        return read_picture(self._path(class_id, index), self._prepare)

    def encoded(self, class_id: int, index: int) -> bytes:
        data = picture_bytes(self._path(class_id, index))
        # Where these bytes end up in a record, the decoder of records must find the same picture in them.
        if self._prepare in (None, upright) and _is_record(data, self._prepare):
            return data
        return super().encoded(class_id, index)

    def origin(self, class_id: int, index: int) -> ImageOrigin:
        return ImageOrigin(f"{self._name}/{self._files[class_id][index]}", index)

    def place(self, class_id: int) -> Path:
        """The directory of the class's first picture, or the root if it has none."""
        return self._path(class_id, 0).parent if self._files[class_id] else self._root

    def missing(self, class_ids: Iterable[int]) -> list[str]:
        return missing_files(self._root, [file for class_id in class_ids for file in self._files[class_id]])

    def _path(self, class_id: int, index: int) -> Path:
        return self._root / self._files[class_id][index]


class ClassFiles(NamedTuple):
    """One class: its name, and its pictures relative to the root of the store."""

    name: str
    files: tuple[str, ...]


def flat_source(
    directory: Path,
    name: str,
    classes: Mapping[str, Sequence[ClassFiles]],
    *,
    resize: str,
    root: Path | None = None,
    prepare: Prepare | None = None,
    told_by: str = "",
    advice: str = "",
) -> Source:
    """The source of these classes by split, without hierarchy; ids count through TRAIN, VALID and TEST.

    Files are relative to `root`, by default the source's `directory`; `resize` is a rule of
    `transforms.RESIZES`, `prepare` as in `FileStore`, `told_by` and `advice` as in `DatasetSpec`. Raises
    InputError if there is no picture at all, or the same class in two splits, which few-shot learning must
    not have.
    """
    table: list[ClassFiles] = []
    split_classes: dict[str, range] = {}
    home: dict[str, str] = {}
    for split in SPLITS:
        first = len(table)
        table += classes.get(split, ())
        split_classes[split] = range(first, len(table))
        for found in table[first:]:
            if home.setdefault(found.name, split) != split:
                where = f"both {home[found.name]} and {split}"
                raise InputError(f"{directory}: class {found.name!r} is in {where}")
    if not any(found.files for found in table):
        raise InputError(f"{directory}: no split has a picture")
    spec = DatasetSpec(
        name=name,
        directory=directory,
        split_classes=split_classes,
        images_per_class=tuple(len(found.files) for found in table),
        class_names=tuple(found.name for found in table),
        told_by=told_by,
        advice=advice,
    )
    store = FileStore(root or directory, name, [found.files for found in table], prepare)
    return Source(spec, store, resize)


def open_class_folders(directory: Path, name: str) -> Source:
    """A domain of one's own: any directory with one folder of image files per class.

    Classes and pictures go by sorted name; hidden names and other files are passed over, folders inside a
    class folder are not searched. Pictures are turned as their EXIF orientation says. All classes are TEST
    unless `splits.json` beside them names those of TRAIN, VALID and TEST, in lists under these keys, any of
    which may be left out: a class in no list is not used.

    Raises InputError, naming file and field, for lists that are no such thing, name an unknown class or one
    class twice, for a class without a picture, and for a directory without classes or that cannot be read.
    """
    folders = class_folders(directory)
    splits, advice = {"TEST": folders}, ""
    if os.path.lexists(directory / SPLITS_FILE):
        splits = _read_splits(directory / SPLITS_FILE, folders)
    else:
        command = f"python -m meta_dataset_readers.split {shlex.quote(str(directory))}"
        advice = f"without {SPLITS_FILE}, which is not there, all classes are TEST; {command} writes one"
    return flat_source(
        directory,
        name,
        {split: [class_files(directory, folder) for folder in splits[split]] for split in splits},
        resize="shorter",
        prepare=upright,
        told_by=SPLITS_FILE,
        advice=advice,
    )


def open_split_folders(directory: Path, name: str) -> Source:
    """Folders train/, val/ and test/ of class folders, see `files.SPLIT_FOLDERS`; a split whose folder is not
    there has no classes.

    Evaluation resizes as PMF does for CIFAR-FS and mini-ImageNet: to the very image size.
    Raises InputError as `open_class_folders`, and if none of the three is there.
    """
    splits = split_folders(directory)
    if not splits:
        raise InputError(f"{directory}: none of the folders train, val, test is there")
    return flat_source(
        directory,
        name,
        {split: classes_below(directory, folder) for split, folder in splits.items()},
        resize="exact",
    )


def classes_below(root: Path, folder: str) -> list[ClassFiles]:
    """The classes whose folders lie in `folder` of `root`, by sorted name. Raises InputError without any."""
    return [class_files(root, f"{folder}/{name}") for name in class_folders(root / folder)]


def class_folders(directory: Path) -> list[str]:
    """The names of the folders in `directory`, sorted, without hidden ones. Raises InputError without any."""
    folders = folder_names(directory)
    if not folders:
        raise InputError(f"{directory}: no folder in it, expected one folder of image files per class")
    return folders


def class_files(root: Path, folder: str) -> ClassFiles:
    """The class whose image files lie in `folder` of `root`, sorted. Raises InputError without any."""
    images = picture_names(root / folder)
    if not images:
        raise InputError(f"{root / folder}: no picture in this class folder, {_instead(root / folder)}")
    return ClassFiles(folder.rpartition("/")[2], tuple(f"{folder}/{image}" for image in images))


def _instead(folder: Path) -> str:
    """What was expected in a class folder without pictures, and what is there instead."""
    expected = f"expected files that end in {', '.join(EXTENSIONS)}"
    inner = folder_names(folder)
    if any(picture_names(folder / name) for name in inner[:_LOOKED_INTO]):
        return f"but folders with pictures; if they are the classes, give {folder} as the source, or drop it"
    return expected + "".join(f"; {n} end in {ending}" for ending, n in other_endings(folder).most_common(3))


def _read_splits(file: Path, folders: Sequence[str]) -> dict[str, list[str]]:
    """The class folders of each split, sorted."""
    given = typed(str(file), read_json(file), dict)
    lists = Fields(str(file), {split: [] for split in SPLITS} | given)
    lists.expect_keys(SPLITS)
    known, home = frozenset(folders), {}
    for split in SPLITS:
        where = f"{file}: field {split!r}"
        for folder in lists.strings(split):
            if folder not in known:
                raise InputError(f"{where}: there is no class folder {folder!r}; {nearest(folder, folders)}")
            if folder in home:
                raise InputError(f"{where}: {folder!r} is already in {home[folder]}")
            home[folder] = split
    return {split: sorted(folder for folder in home if home[folder] == split) for split in SPLITS}


def _is_record(data: bytes, prepare: Prepare | None) -> bool:
    """Whether the decoder of records finds the same picture in `data`, going by its header."""
    try:
        with Image.open(io.BytesIO(data), formats=RECORD_FORMATS) as image:
            plain = image.mode in _PLAIN_MODES and not image.has_transparency_data
            return plain and (prepare is None or not is_turned(image))
    except Exception:  # of whatever kind: decoding it in earnest says what is wrong
        return False
