"""The filelists of FWT: base.json, val.json and novel.json (CUB, Cars, Places, Plantae, mini-ImageNet).

Tseng et al., "Cross-Domain Few-Shot Classification via Learned Feature-Wise Transformation" (ICLR 2020).
Knows that the paths in them are those of their author's machine, and that labels count through all three.
Opening a source reads the lists and opens no picture.
"""

import itertools
import os
from pathlib import Path
from typing import NamedTuple

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.files import is_windows, path_parts, read_json
from meta_dataset_readers.folders import ClassFiles, flat_source
from meta_dataset_readers.json_fields import Fields
from meta_dataset_readers.store import Source

FILELISTS = {"TRAIN": "base.json", "VALID": "val.json", "TEST": "novel.json"}

UNDIVIDED = f"{', '.join(FILELISTS.values())} list the same pictures, so all of them are TEST"

_LONGEST_PATH = 4096  # characters, as file systems have it
_TRIES = 100  # pictures that are looked for until one is found: the first may be missing


def open_filelists(directory: Path, name: str, prefix: tuple[str, str] | None = None) -> Source:
    """The source whose three filelists lie in `directory`: base is TRAIN, val is VALID, novel is TEST.

    The classes of a split are the labels that occur in its list, ascending; pictures keep the list's order.
    `prefix` = (old, new) says that what the lists call `old` is here the directory `new`, relative to
    `directory` or anywhere. Without it the pictures lie below `directory`: from the first one as many leading
    parts of the path are dropped as it takes to find the file there, and as many from all others.

    Raises InputError, naming file and field, for lists that are missing, no such thing or of unequal length,
    a label without a name, a path that leads outside or does not begin with `old`, a picture listed twice, a
    class in two splits, and if no picture can be found. Single pictures that are not there are `missing`.
    Three lists of the same content separate nothing: all of it is TEST, so that none of it is trained on.
    """
    lists = {split: _read_list(directory / file) for split, file in FILELISTS.items()}
    undivided = len({found[1:] for found in lists.values()}) == 1
    if undivided:
        lists = {"TEST": lists["TEST"]}
    root = directory
    if prefix is None:
        n_stale = _count_stale_parts(directory, lists)
    else:
        root, stale = directory / prefix[1], path_parts(prefix[0])
        _check_prefix(lists, stale)
        n_stale = len(stale)
    if not root.is_dir():
        raise InputError(f"{root}: no such directory, expected the pictures of {name}")
    seen: dict[str, str] = {}
    classes = {split: _classes(found, n_stale, seen) for split, found in lists.items()}
    told = {"told_by": FILELISTS["TEST"], "advice": UNDIVIDED} if undivided else {}
    return flat_source(directory, name, classes, resize="square", root=root, **told)


class _Filelist(NamedTuple):
    file: Path
    label_names: tuple[str, ...]  # of all classes of the source
    image_names: tuple[str, ...]
    images: tuple[tuple[str, ...], ...]  # the parts of these paths
    labels: tuple[int, ...]  # of each image, an index into `label_names`

    def where(self, index: int) -> str:
        """Image `index` for a message."""
        return f"{self.file}: field 'image_names'[{index}]: {self.image_names[index]!r:.200}"


def _read_list(file: Path) -> _Filelist:
    fields = Fields(str(file), read_json(file))
    label_names, image_names = fields.strings("label_names"), fields.strings("image_names")
    labels = fields.get("image_labels", list)
    if len(labels) != len(image_names):
        found = f"{len(labels)} labels, but 'image_names' has {len(image_names)} images"
        raise InputError(f"{file}: field 'image_labels': {found}")
    for index, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(label_names):
            expected = f"expected an index into the {len(label_names)} 'label_names'"
            raise InputError(f"{file}: field 'image_labels'[{index}]: {expected}, found {label!r:.80}")
    for index, image in enumerate(image_names):
        parts = path_parts(image)
        if not parts or ".." in parts or not image.isprintable() or len(image) > _LONGEST_PATH:
            where = f"{file}: field 'image_names'[{index}]"
            raise InputError(f"{where}: expected a path that does not lead outside, found {image!r:.200}")
    return _Filelist(file, label_names, image_names, tuple(map(path_parts, image_names)), tuple(labels))


def _count_stale_parts(directory: Path, lists: dict[str, _Filelist]) -> int:
    """How many leading parts of the paths are of another machine."""
    images = itertools.chain.from_iterable(found.images for found in lists.values())
    tried = list(itertools.islice(images, _TRIES))
    for image in tried:
        for n_stale in range(len(image)):
            if os.path.isfile(directory.joinpath(*image[n_stale:])):
                return n_stale
    if tried:
        first = next(found for found in lists.values() if found.images)
        raise InputError(f"{first.where(0)}: no end of this path leads to a file in {directory}")
    return 0


def _check_prefix(lists: dict[str, _Filelist], stale: tuple[str, ...]) -> None:
    for found in lists.values():
        for index, image in enumerate(found.images):
            if image[: len(stale)] != stale and not _begins_alike(found.image_names[index], image, stale):
                raise InputError(f"{found.where(index)} does not begin with {'/'.join(stale)!r}")


def _begins_alike(name: str, image: tuple[str, ...], stale: tuple[str, ...]) -> bool:
    """Windows does not tell D: from d:, nor Birds from birds."""
    same = [part.lower() for part in image[: len(stale)]] == [part.lower() for part in stale]
    return same and is_windows(name)


def _classes(found: _Filelist, n_stale: int, seen: dict[str, str]) -> list[ClassFiles]:
    """The classes of one list; `seen` says where each picture was listed, and is added to."""
    by_label: dict[int, list[str]] = {label: [] for label in sorted(set(found.labels))}
    for index, (image, label) in enumerate(zip(found.images, found.labels, strict=True)):
        path = "/".join(image[n_stale:])
        if not path:
            raise InputError(f"{found.where(index)}: {n_stale} parts are dropped from all, none is left")
        if path in seen:
            raise InputError(f"{found.where(index)} is listed twice, before as {seen[path]}")
        seen[path] = f"{found.file.name}[{index}]"
        by_label[label].append(path)
    return [ClassFiles(found.label_names[label], tuple(files)) for label, files in by_label.items()]
