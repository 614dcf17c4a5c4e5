"""The packed layout: the pictures of a split in one file, and an index that makes opening it instant.

    <source>/TRAIN.tfrecords     the Examples of the split, class after class, in the order of the original
             TRAIN.offsets.npy   where each record begins, then the size of the file: uint64, records + 1
             dataset_spec.json   as in every other layout of Meta-Dataset
             packed.json         the index, written last: where it is, the source is complete

and the same for VALID and TEST where they have classes. Any tool that reads TFRecords reads these.

Knows how packed files are read, and what is believed of an index: nothing that the files do not bear out.
Opening reads two JSON files. The size of a record file and the header of its offsets are checked when the
first picture of the split is asked for, the offsets of a class with the first picture of that class, and a
record (its checksums, label and picture) whenever it is read. Does not know how packed files are made, see
`convert`.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from PIL import Image

from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError, nearest
from meta_dataset_readers.files import exists, listing, map_array, read_json, size_of
from meta_dataset_readers.json_fields import Fields
from meta_dataset_readers.pictures import as_published, decoded
from meta_dataset_readers.spec import SPLITS, DatasetSpec, load_spec
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.tfrecord import RecordFile
from meta_dataset_readers.transforms import RESIZES

FORMAT = 1  # raised whenever files of the old format would be misread
INDEX_FILE = "packed.json"
JOURNAL_FILE = "unfinished.jsonl"  # what `convert` has decided so far, until the index is written
OFFSETS_DTYPE = np.dtype("<u8")


def record_file(directory: Path, split: str) -> Path:
    """The file with the pictures of `split`."""
    return directory / f"{split}.tfrecords"


def offsets_file(directory: Path, split: str) -> Path:
    """The file that says where the records of `split` begin."""
    return directory / f"{split}.offsets.npy"


# --- the index -------------------------------------------------------------------------------------------


class SplitFile(NamedTuple):
    """What the record file of one split holds; `sha256` is that of the whole file, in hexadecimal."""

    records: int
    bytes: int
    sha256: str


class Index(NamedTuple):
    """`packed.json`."""

    source: str  # its name when it was packed
    origin: str  # the directory it was packed from
    resize: str  # see `transforms.RESIZES`
    images_per_class: tuple[int, ...]  # by class id
    offsets_crc32c: tuple[int, ...]  # by class id: of the offsets of its records and of their end
    splits: dict[str, SplitFile]  # of those that have classes
    left_out: tuple[int, ...]  # by class id: how many records of the original were damaged

    def json(self) -> dict[str, Any]:
        """The index as it is written."""
        return {
            "format": FORMAT,
            "source": self.source,
            "origin": self.origin,
            "resize": self.resize,
            "splits": {split: entry._asdict() for split, entry in self.splits.items()},
            "images_per_class": dict(enumerate(self.images_per_class)),
            "offsets_crc32c": dict(enumerate(self.offsets_crc32c)),
            "left_out": dict(enumerate(self.left_out)),
        }


def class_checksums(offsets: np.ndarray, images_per_class: Iterable[int]) -> tuple[int, ...]:
    """The CRC32C of the offsets of every class, for `Index.offsets_crc32c`.

    `offsets` are those of a split, (records + 1,) uint64; `images_per_class` those of its classes, in order.
    """
    bounds = itertools.pairwise(itertools.accumulate(images_per_class, initial=0))
    return tuple(_checksum(offsets[first : end + 1]) for first, end in bounds)


def _checksum(offsets: np.ndarray) -> int:
    # By class, so that a reader checks what it uses and an index of 400 MB need not be read to be trusted.
    return google_crc32c.value(offsets.astype(OFFSETS_DTYPE).tobytes())


def _load_index(directory: Path, spec: DatasetSpec) -> Index:
    file = directory / INDEX_FILE
    index = Fields(str(file), read_json(file))
    version = index.count("format")
    if version != FORMAT:
        raise InputError(f"{file}: field 'format': found {version}, expected {FORMAT}; pack the source again")
    resize = index.get("resize", str)
    if resize not in RESIZES:
        raise InputError(f"{file}: field 'resize': {resize!r} is unknown; {nearest(resize, RESIZES)}")
    images = index.object("images_per_class").by_id(len(spec.images_per_class), int)
    for class_id, (packed, claimed) in enumerate(zip(images, spec.images_per_class, strict=True)):
        if packed != claimed:
            found = f"{packed} images of class {class_id}, {spec.file} claims {claimed}"
            raise InputError(f"{file}: field 'images_per_class': {found}")
    splits = index.object("splits")
    with_classes = [split for split in SPLITS if spec.classes(split)]
    splits.expect_keys(with_classes)
    files = {split: _split_file(splits.object(split)) for split in with_classes}
    for split, entry in files.items():
        expected = sum(images[class_id] for class_id in spec.classes(split))
        if entry.records != expected:
            found = f"{entry.records} records in {split}, its classes have {expected}"
            raise InputError(f"{file}: field 'splits': {found}")
    return Index(
        source=index.get("source", str),
        origin=index.get("origin", str),
        resize=resize,
        images_per_class=images,
        offsets_crc32c=index.object("offsets_crc32c").by_id(len(images), int),
        splits=files,
        left_out=index.object("left_out").by_id(len(images), int),
    )


def _split_file(entry: Fields) -> SplitFile:
    return SplitFile(entry.count("records"), entry.count("bytes"), entry.get("sha256", str))


# --- reading ---------------------------------------------------------------------------------------------


class PackedStore(ImageStore):
    """The pictures of a packed source. Holds at most one mapping of offsets per split, none when pickled."""

    has_checksums = True

    def __init__(self, directory: Path, name: str, spec: DatasetSpec, index: Index):
        self._directory, self._name, self._index = directory, name, index
        self._split: list[str] = []  # by class id
        self._first: list[int] = []  # by class id: the number of its first record in the file of its split
        for split in SPLITS:
            counts = [index.images_per_class[class_id] for class_id in spec.classes(split)]
            self._split += [split] * len(counts)
            self._first += itertools.accumulate(counts[:-1], initial=0) if counts else ()
        self._forget()

    def _forget(self) -> None:
        self._files: dict[str, RecordFile] = {}  # by split, once its sizes are known to be right
        self._trusted: set[int] = set()  # class ids whose offsets are known to be right

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_files", "_trusted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def count(self, class_id: int) -> int:
        self._records(class_id)
        return self._index.images_per_class[class_id]

    def image(self, class_id: int, index: int) -> Image.Image:
        data = self.encoded(class_id, index)
        where = self._records(class_id).where(self._first[class_id] + index)
        return decoded(data, where, prepare=as_published)

    def encoded(self, class_id: int, index: int) -> bytes:
        if not 0 <= index < self._index.images_per_class[class_id]:
            raise IndexError(f"image {index} of {self._index.images_per_class[class_id]} in class {class_id}")
        records, number = self._records(class_id), self._first[class_id] + index
        data, label = records.read_example(number)
        if label != class_id:
            raise DamagedRecord(f"{records.where(number)}: label {label} among those of class {class_id}")
        return data

    def origin(self, class_id: int, index: int) -> ImageOrigin:
        return ImageOrigin(f"{self._name}/{self.place(class_id).name}", self._first[class_id] + index)

    def place(self, class_id: int) -> Path:
        return record_file(self._directory, self._split[class_id])

    def missing(self, class_ids: Iterable[int]) -> list[str]:
        needed = {
            file.name: None
            for split in dict.fromkeys(self._split[class_id] for class_id in class_ids)
            for file in (record_file(self._directory, split), offsets_file(self._directory, split))
        }
        present = listing(self._directory, exists)
        return [name for name in needed if name not in present]

    def _records(self, class_id: int) -> RecordFile:
        """The file that holds the class, when its size and the offsets of the class are right."""
        split = self._split[class_id]
        if split not in self._files:
            self._files[split] = _open_split(self._directory, split, self._index.splits[split])
        file = self._files[split]
        if class_id not in self._trusted:
            first = self._first[class_id]
            offsets = file.offsets[first : first + self._index.images_per_class[class_id] + 1]
            rising = (offsets[1:] > offsets[:-1]).all() and offsets[-1] <= file.offsets[-1]
            if not rising or _checksum(offsets) != self._index.offsets_crc32c[class_id]:
                found = f"the offsets of class {class_id} are not those {INDEX_FILE} was written for"
                raise InputError(f"{offsets_file(self._directory, split)}: {found}; pack the source again")
            self._trusted.add(class_id)
        return file


def open_packed(directory: str | Path, name: str) -> Source:
    """The packed source in `directory`; `name` is the source's, for the origin of its pictures.

    Raises InputError, naming file and field, for an index or a specification that is missing, of another
    format, or at odds with the other. Whether the files are as the index says is told by whoever reads them,
    see the module.
    """
    directory = Path(directory)
    spec = load_spec(directory)
    index = _load_index(directory, spec)
    return Source(spec, PackedStore(directory, name, spec, index), index.resize)


def _open_split(directory: Path, split: str, entry: SplitFile) -> RecordFile:
    path = record_file(directory, split)
    size = size_of(path)
    if size != entry.bytes:
        raise InputError(f"{path}: {size} bytes, {INDEX_FILE} says {entry.bytes}: the file is not complete")
    offsets = _map_offsets(offsets_file(directory, split), entry.records)
    if offsets[0] != 0 or offsets[-1] != size:
        found = f"records from byte {offsets[0]} to {offsets[-1]}"
        raise InputError(f"{offsets_file(directory, split)}: {found}, expected from 0 to {size}")
    return RecordFile(path, offsets)


def _map_offsets(path: Path, records: int) -> np.ndarray:
    offsets = map_array(path)
    if (offsets.dtype, offsets.shape) != (OFFSETS_DTYPE, (records + 1,)):
        raise InputError(f"{path}: not an array of {records + 1} offsets")
    return np.asarray(offsets)  # the same mapping, without memmap's slow indexing
