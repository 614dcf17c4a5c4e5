"""Episodes that lie in files, as map-style data sets of `Episode`.

Three published forms: PMF's fixed validation episodes (HDF5, already normalised), Meta-Dataset's dumped
episodes (record files), and PMF's lists of image files for CIFAR-FS and mini-ImageNet (JSON). All they say is
believed only as far as the files bear it out. `dump` writes the second form. Does not draw episodes.
"""

import collections
import contextlib
import itertools
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from h5py.h5g import GroupID
from torch import Tensor
from torch.utils.data import Dataset

from meta_dataset_readers.episode import Episode, ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError, nearest
from meta_dataset_readers.files import SPLIT_FOLDERS, path_parts, read_json, reading
from meta_dataset_readers.folders import FileStore
from meta_dataset_readers.hdf5 import (
    Hdf5Files,
    blamed_on,
    count_records,
    dataset_in,
    group_in,
    read_whole,
    size_in_bytes,
)
from meta_dataset_readers.hdf5_guard import SIGNATURE, MalformedHdf5
from meta_dataset_readers.json_fields import Fields, typed
from meta_dataset_readers.pictures import as_published, decoded
from meta_dataset_readers.tfrecord import open_records
from meta_dataset_readers.transforms import RESIZES, eval_transform

COUNTS_FILE = "images_per_class.json"

# The normalisation inside PMF's files; everywhere else in this package pictures are in [0, 1].
_MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
_STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
_ROUNDING = 1e-3  # a quarter of a grey level; what float32 leaves is a thousandth of it
_MOST_BYTES = 2 * 2**30  # of the support or query images of one episode; 500 of 384 x 384 take half of it

# What no file name has; the backslash because it separates folders on some machines.
_NO_FILE_NAME = re.compile("[\\\\\0\ud800-\udfff]")

_SUPPORT, _QUERY = "train", "test"  # in the file names of dumped episodes
_RECORDS = re.compile(rf"(episode-[0-9]{{4,}})-({_SUPPORT}|{_QUERY})\.tfrecords")


def open_episodes(path: str | Path, image_size: int) -> "StoredEpisodes":
    """The episodes stored at `path`, with images of `image_size` x `image_size` pixels.

    Which of the three forms it is shows in the content: an HDF5 file, a directory with
    `images_per_class.json`, or a JSON file. Opening reads no image. Raises InputError for anything else, for
    whatever is wrong with the form found, and for HDF5 episodes stored in another size.
    """
    path = Path(path)
    if image_size < 1:
        raise InputError(f"image_size is {image_size}, expected at least 1")
    if path.is_dir():
        if not (path / COUNTS_FILE).is_file():
            raise InputError(f"{path}: no {COUNTS_FILE} in this directory, expected dumped episodes")
        return DumpedEpisodes(path, image_size)
    with reading(path, what="file or directory, expected stored episodes") as file:
        head = file.read(64)
    if head.startswith(SIGNATURE):
        return NormalisedEpisodes(path, image_size)
    if head.lstrip().startswith(b"["):
        return ListedEpisodes(path, image_size)
    raise InputError(f"{path}: neither HDF5 nor a JSON list, expected stored episodes")


class StoredEpisodes(Dataset):
    """`n_episodes` episodes in the order of their files; can be pickled, holds no images."""

    def __init__(self, n_episodes: int):
        self.n_episodes = n_episodes

    def __len__(self) -> int:
        return self.n_episodes

    def __getitem__(self, index: int) -> Episode:
        """Episode `index` in 0..n_episodes-1. Raises InputError, naming file and place, for damage."""
        if not 0 <= index < self.n_episodes:
            raise IndexError(f"episode {index} of {self.n_episodes}")
        return self._episode(index)

    @abstractmethod
    def _episode(self, index: int) -> Episode: ...


# --- PMF's validation episodes ---------------------------------------------------------------------------


class NormalisedEpisodes(StoredEpisodes):
    """PMF's `val_ep{N}_img{S}.h5` and `val_ep{N}_img{S}_5w1s.h5`: groups "0".."N-1", one for each episode.

    `sx` and `x` are the support and query images, float32 (n, 3, S, S), through the evaluation transform and
    normalised by ImageNet's mean and deviation, which is undone here; `sy` and `y` are their labels,
    integers (n,). Labels come grouped, but the groups in no order; they are kept as they are. The file does
    not say which classes and images these are: an image's origin is its place in `sx` or `x`.
    """

    def __init__(self, path: Path, image_size: int):
        self._path, self._image_size = path, image_size
        self._files = Hdf5Files(most_open=1)
        super().__init__(count_records(self._files.open(path)))
        if not self.n_episodes:
            raise InputError(f"{path}: no episode in this file")
        with self._record(0) as record:
            stored = dataset_in(record, "sx", np.float32, ("images", 3, "height", "width")).shape[2:]
        if stored != (image_size, image_size):
            found = f"images of {stored[0]} x {stored[1]} pixels"
            raise InputError(f"{path}: {found} are stored, image_size asks for {image_size} x {image_size}")

    def _episode(self, index: int) -> Episode:
        with self._record(index) as record:
            support, support_labels = self._images(record, "sx", "sy")
            query, query_labels = self._images(record, "x", "y")
            classes = np.unique(support_labels)
            if not np.array_equal(classes, np.arange(max(len(classes), 1))):
                raise MalformedHdf5(f"'sy' has the labels [{_brief(classes)}], expected 0 to the ways - 1")
            if not np.isin(query_labels, classes).all():
                raise MalformedHdf5(f"'y' has labels beyond those of 'sy', which end at {classes[-1]}")
        source = self._path.absolute().parent.name
        place = f"{source}/{self._path.name}/{index}"
        return Episode(
            support=support,
            support_labels=_labels(support_labels),
            query=query,
            query_labels=_labels(query_labels),
            source=source,
            index=index,
            support_origin=tuple(ImageOrigin(f"{place}/sx", image) for image in range(len(support))),
            query_origin=tuple(ImageOrigin(f"{place}/x", image) for image in range(len(query))),
        )

    @contextlib.contextmanager
    def _record(self, index: int) -> Iterator[GroupID]:
        file = self._files.open(self._path)
        with blamed_on(f"{self._path}: episode {index}"):
            yield group_in(file.id, str(index))

    def _images(self, record: GroupID, images: str, labels: str) -> tuple[Tensor, np.ndarray]:
        """Images (n, 3, S, S) in [0, 1] and labels (n,)."""
        size = self._image_size
        dataset = dataset_in(record, images, np.float32, ("images", 3, size, size))
        n_images = dataset.shape[0]
        if size_in_bytes(dataset) > _MOST_BYTES:
            raise MalformedHdf5(f"{images!r} claims {n_images} images, at most {_MOST_BYTES} bytes are read")
        label_values = read_whole(dataset_in(record, labels, np.integer, (n_images,)))
        with np.errstate(invalid="ignore"):  # a NaN is reported below
            pixels = read_whole(dataset) * _STD + _MEAN
        inside = (pixels >= -_ROUNDING) & (pixels <= 1 + _ROUNDING)  # False for NaN as well
        if not inside.all():
            at = np.argwhere(~inside)[0].tolist()
            found = f"{images!r} holds {pixels[tuple(at)]:.4g} at {at} when the normalisation is undone"
            raise MalformedHdf5(f"{found}, expected 0 to 1")
        return torch.from_numpy(pixels.clip(0, 1, out=pixels)), label_values


# --- Meta-Dataset's dumped episodes ----------------------------------------------------------------------


class DumpedEpisodes(StoredEpisodes):
    """Meta-Dataset's dumped episodes: those that `images_per_class.json` in `folder` lists, by number.

    Support and query of episode n lie in `episode-%04d-train.tfrecords` and `episode-%04d-test.tfrecords`,
    with labels 0..ways-1 whose counts the list gives. Images go through the evaluation transform. Where
    `dump_episode` wrote them, `episode-%04d.json` tells source, index, classes and origins; otherwise the
    source is the folder's name, the index the number, and an image's origin its record.
    """

    def __init__(self, folder: Path, image_size: int):
        self._folder, self._image_size = folder, image_size
        self._counts = read_counts(folder)
        stems = {found[1] for name in self._counts if (found := _RECORDS.fullmatch(name))}
        self._stems = sorted(stems, key=lambda stem: (_number(stem), stem))
        super().__init__(len(self._stems))
        for stem in self._stems:
            for name in record_files(stem):
                if name not in self._counts:
                    raise InputError(f"{folder / COUNTS_FILE}: field {name!r} is missing")
                if not (folder / name).is_file():
                    raise InputError(f"{folder / name}: no such file, {COUNTS_FILE} lists it")
            support, query = (self._counts[name] for name in record_files(stem))
            if not support or 0 in support or len(query) not in (0, len(support)):
                where = f"{folder / COUNTS_FILE}: field '{stem}-{_SUPPORT}.tfrecords'"
                raise InputError(f"{where}: expected an image of each of the classes that its queries have")

    def _episode(self, index: int) -> Episode:
        stem = self._stems[index]
        support_file, query_file = record_files(stem)
        resize, described = self._describe(stem)
        support, support_labels = self._images(support_file, resize)
        query, query_labels = self._images(query_file, resize)
        return Episode(
            support=support,
            support_labels=_labels(support_labels),
            query=query,
            query_labels=_labels(query_labels),
            **described,
        )

    def _images(self, name: str, resize: str) -> tuple[Tensor, list[int]]:
        """Images (n, 3, S, S) and labels (n,) of one file, in its order."""
        counts, file = self._counts[name], open_records(self._folder / name)
        if len(file) != sum(counts):
            raise InputError(f"{file.path}: {len(file)} records, {COUNTS_FILE} lists {sum(counts)}")
        images, labels = [], []
        for record in range(len(file)):
            data, label = file.read_example(record)
            if not 0 <= label < len(counts):
                raise DamagedRecord(f"{file.where(record)}: label {label}, expected 0 to {len(counts) - 1}")
            image = decoded(data, file.where(record), prepare=as_published)
            images.append(eval_transform(image, self._image_size, resize))
            labels.append(label)
        there = collections.Counter(labels)
        for label, count in enumerate(counts):
            if there[label] != count:
                found = f"{there[label]} images of label {label}"
                raise InputError(f"{file.path}: {found}, {COUNTS_FILE} lists {count}")
        return _stack(images, self._image_size), labels

    def _describe(self, stem: str) -> tuple[str, dict[str, Any]]:
        """How the images of an episode were resized, and what `Episode` tells besides tensors."""
        support_file, query_file = record_files(stem)
        n_support, n_query = sum(self._counts[support_file]), sum(self._counts[query_file])
        description = self._folder / f"{stem}.json"
        if os.path.lexists(description):
            return _read_description(description, n_support, n_query, len(self._counts[support_file]))
        source = self._folder.absolute().name
        return "shorter", {
            "source": source,
            "index": _number(stem),
            "support_origin": tuple(ImageOrigin(f"{source}/{support_file}", i) for i in range(n_support)),
            "query_origin": tuple(ImageOrigin(f"{source}/{query_file}", i) for i in range(n_query)),
        }


def _read_description(file: Path, n_support: int, n_query: int, ways: int) -> tuple[str, dict[str, Any]]:
    given = Fields(str(file), read_json(file))
    resize = given.get("resize", str)
    if resize not in RESIZES:
        raise InputError(f"{file}: field 'resize': unknown rule {resize!r}; {nearest(resize, RESIZES)}")
    ids = given.get("class_ids", list)
    described = {
        "source": given.get("source", str),
        "index": given.count("index"),
        "class_ids": tuple(typed(f"{file}: field 'class_ids'", class_id, int) for class_id in ids),
        "class_names": given.strings("class_names"),
        "support_origin": _origins(given, "support_origin"),
        "query_origin": _origins(given, "query_origin"),
        "skipped": given.strings("skipped"),
    }
    sizes = {"class_ids": ways, "class_names": ways, "support_origin": n_support, "query_origin": n_query}
    for field, size in sizes.items():
        if len(described[field]) != size:
            found = f"{len(described[field])} entries"
            raise InputError(f"{file}: field {field!r}: {found}, {COUNTS_FILE} lists {size}")
    return resize, described


def _origins(given: Fields, field: str) -> tuple[ImageOrigin, ...]:
    entries = [
        Fields(f"{given.where}: field {field!r}[{index}]", entry)
        for index, entry in enumerate(given.get(field, list))
    ]
    return tuple(ImageOrigin(entry.get("file", str), entry.count("record")) for entry in entries)


def read_counts(folder: Path) -> dict[str, tuple[int, ...]]:
    """The images of label 0, 1, ... in each record file of `folder`, by the file's name."""
    file = folder / COUNTS_FILE
    given = typed(str(file), read_json(file), dict)
    counts = {}
    for name, by_label in given.items():
        where = f"{file}: field {name!r:.80}"
        if not _RECORDS.fullmatch(name):
            expected = f"expected record files such as {record_files('episode-0000')[0]}"
            raise InputError(f"{where}: unknown name, {expected}")
        labels = typed(where, by_label, dict)
        counts[name] = Fields(where, labels).by_id(len(labels), int)
    return counts


def record_files(stem: str) -> tuple[str, str]:
    """The names of the files with support and query."""
    return f"{stem}-{_SUPPORT}.tfrecords", f"{stem}-{_QUERY}.tfrecords"


def _number(stem: str) -> int:
    return int(stem.removeprefix("episode-"))


# --- PMF's lists of image files --------------------------------------------------------------------------


class ListedEpisodes(StoredEpisodes):
    """PMF's `val1000Episode_5_way_{1,5}_shot.json` of CIFAR-FS and mini-ImageNet.

    A list of {"Support": [[path, ...], ...], "Query": [[path, ...], ...]} with one list of paths for each
    class, whose position is the label; paths are relative to the folder val/ beside the file. Images are
    resized to the image size, whatever their shape, as PMF does for these two.
    """

    def __init__(self, path: Path, image_size: int):
        self._path, self._image_size = path, image_size
        entries = typed(str(path), read_json(path), list)
        self._episodes = [_read_listed(f"{path}: episode {i}", entry) for i, entry in enumerate(entries)]
        super().__init__(len(self._episodes))
        if not self._episodes:
            raise InputError(f"{path}: no episode in this file")
        folders = [name for name in SPLIT_FOLDERS["VALID"] if (path.parent / name).is_dir()]
        folder = folders[0] if folders else SPLIT_FOLDERS["VALID"][0]
        self._name = f"{path.absolute().parent.name}/{folder}"
        parts = itertools.chain.from_iterable(self._episodes)
        images = {image for part in parts for paths in part for image in paths}
        self._images = {image: position for position, image in enumerate(sorted(images))}
        self._store = FileStore(path.parent / folder, self._name, [tuple(self._images)])
        missing = self._store.missing([0])
        if missing:
            found = f"{len(missing)} of the {len(images)} images listed are missing"
            raise InputError(f"{path}: {found} in {path.parent / folder}, the first is {missing[0]!r:.200}")

    def _episode(self, index: int) -> Episode:
        (support, support_labels), (query, query_labels) = map(_labelled, self._episodes[index])
        return Episode(
            support=self._read(support),
            support_labels=_labels(support_labels),
            query=self._read(query),
            query_labels=_labels(query_labels),
            source=self._path.absolute().parent.name,
            index=index,
            support_origin=self._origins(support),
            query_origin=self._origins(query),
        )

    def _read(self, images: Sequence[str]) -> Tensor:
        found = [self._store.image(0, self._images[image]) for image in images]
        return _stack([eval_transform(image, self._image_size, "exact") for image in found], self._image_size)

    def _origins(self, images: Sequence[str]) -> tuple[ImageOrigin, ...]:
        return tuple(ImageOrigin(f"{self._name}/{image}", 0) for image in images)


_Paths = tuple[tuple[str, ...], ...]  # by label


def _read_listed(where: str, entry) -> tuple[_Paths, _Paths]:
    given = Fields(where, entry)
    given.expect_keys(("Support", "Query"))
    support, query = (
        tuple(
            _paths(f"{where}: field {field!r}[{label}]", paths)
            for label, paths in enumerate(given.get(field, list))
        )
        for field in ("Support", "Query")
    )
    if len(support) != len(query) or not support or not all(support):
        found = f"{len(support)} classes in 'Support', {len(query)} in 'Query'"
        raise InputError(f"{where}: {found}, expected the same number and a support image of each")
    return support, query


def _paths(where: str, given) -> tuple[str, ...]:
    paths = tuple(typed(where, path, str) for path in typed(where, given, list))
    found = tuple("/".join(path_parts(path)) for path in paths)
    for path, relative in zip(paths, found, strict=True):
        inside = relative and not path.startswith(("/", "\\")) and ".." not in relative.split("/")
        if not inside or _NO_FILE_NAME.search(relative):
            expected = f"expected a path below {SPLIT_FOLDERS['VALID'][0]}/ that does not lead outside"
            raise InputError(f"{where}: {expected}, found {path!r:.200}")
    return found


def _labelled(by_label: _Paths) -> tuple[list[str], list[int]]:
    pairs = [(path, label) for label, paths in enumerate(by_label) for path in paths]
    return [path for path, _ in pairs], [label for _, label in pairs]


# --- shared ----------------------------------------------------------------------------------------------


def _stack(images: Sequence[Tensor], image_size: int) -> Tensor:
    return torch.stack(list(images)) if images else torch.empty(0, 3, image_size, image_size)


def _labels(values: Sequence[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))


def _brief(values: np.ndarray) -> str:
    shown = ", ".join(map(str, values[:10]))
    return f"{shown}, ..." if len(values) > 10 else shown
