"""Pictures in HDF5 files: PMF's layout, and how any HDF5 file of foreign origin is read.

Hu et al., "Pushing the Limits of Simple Pipelines for Few-Shot Learning" (CVPR 2022). Their converter writes
one file per class, with groups "0".."N-1" that hold the decoded picture `image` and its `label`, in an order
of its own: group k is not record k of the class's record file. The files have no checksums, so a changed
pixel goes unnoticed; everything else is checked before it is believed. Does not know episodes.
"""

import collections
import contextlib
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from h5py.h5d import DatasetID
from h5py.h5g import GroupID
from PIL import Image

from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.files import size_of
from meta_dataset_readers.hdf5_guard import MalformedHdf5, check_object, check_root
from meta_dataset_readers.pictures import UnreadableImage, check_size
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.store import ImageStore, Source

# An episode reads one class after the other, so a few are enough; a mixture has as many for each source.
_MOST_OPEN = 4
_DEFLATE = h5py.h5z.FILTER_DEFLATE
_FILTERS = {h5py.h5z.FILTER_SHUFFLE, _DEFLATE}  # those of gzip; others cannot be made safe from outside
_SMALL_CHUNK = 2**20  # bytes; a chunk may exceed the data of a dataset that was made to grow, but not by more


# --- PMF's layout ----------------------------------------------------------------------------------------


def open_hdf5(directory: Path, name: str) -> Source:
    """The source whose `dataset_spec.json` and `<class id>.h5` files lie in `directory`; no file is opened.

    Raises InputError as `load_spec`.
    """
    return Source(load_spec(directory), Hdf5Store(directory, name))


class Hdf5Store(ImageStore):
    """PMF's layout: `<class id>.h5`, with the groups "0".."N-1".

    Each has `image`, uint8 (H, W, 3), RGB, and may have `label`, one integer, which is then the class id.
    Both lie in the file itself, in one piece or in chunks, as they are or compressed by gzip.
    """

    def __init__(self, directory: Path, name: str):
        self._directory, self._name = directory, name
        self._files = Hdf5Files(_MOST_OPEN)
        self._counts: dict[int, int] = {}  # listing quickdraw's groups takes a third of a second a class

    def __reduce__(self):
        return Hdf5Store, (self._directory, self._name)

    def count(self, class_id: int) -> int:
        if class_id not in self._counts:
            self._counts[class_id] = count_records(self._files.open(self.place(class_id)))
        return self._counts[class_id]

    def image(self, class_id: int, index: int) -> Image.Image:
        path = self.place(class_id)
        if not 0 <= index < self.count(class_id):
            raise IndexError(f"{path}: record {index} of {self.count(class_id)}")
        file = self._files.open(path)
        with blamed_on(f"{path}: record {index}"):
            record = group_in(file.id, str(index))
            if has_member(record, "label"):
                _check_label(record, class_id)
            dataset = dataset_in(record, "image", np.uint8, ("height", "width", 3))
            check_size(width=dataset.shape[1], height=dataset.shape[0])
            return Image.fromarray(read_whole(dataset))

    def origin(self, class_id: int, index: int) -> ImageOrigin:
        return ImageOrigin(f"{self._name}/{self.place(class_id).name}", index)

    def place(self, class_id: int) -> Path:
        return self._directory / f"{class_id}.h5"


def _check_label(record: GroupID, class_id: int) -> None:
    label = read_whole(dataset_in(record, "label", np.integer, (1,), ())).item()
    if label != class_id:
        raise MalformedHdf5(f"label {label} in the file of class {class_id}")


# --- foreign HDF5 files ----------------------------------------------------------------------------------


class Hdf5Files:
    """Opens HDF5 files for reading and keeps the last few open, `most_open` >= 1 of them.

    Open files belong to the process that opened them: they are neither pickled nor used after a fork.
    """

    def __init__(self, most_open: int):
        self._most_open = most_open
        self._process = os.getpid()
        self._files: collections.OrderedDict[Path, h5py.File] = collections.OrderedDict()

    def __reduce__(self):
        return Hdf5Files, (self._most_open,)

    def open(self, path: Path) -> h5py.File:
        """The file at `path`. Raises InputError for one that is absent or not HDF5, or was cut off."""
        if self._process != os.getpid():
            self._files.clear()
            self._process = os.getpid()
        if path not in self._files:
            while len(self._files) >= self._most_open:
                self._files.popitem(last=False)  # closed with the last object of it that is still in use
            self._files[path] = _open(path)
        self._files.move_to_end(path)
        return self._files[path]


def _open(path: Path) -> h5py.File:
    try:
        if size_of(path) == 0:
            raise InputError(f"{path}: the file is empty, expected HDF5")
        check_root(path)
        try:
            return _open_locked(path, None)
        except OSError:  # network file systems may refuse locks
            return _open_locked(path, False)
    except InputError:
        raise
    except MalformedHdf5 as error:
        raise InputError(f"{path}: cannot be opened as HDF5: {error}") from error
    except Exception as error:  # whatever libhdf5 makes of foreign bytes
        raise InputError(f"{path}: cannot be opened as HDF5: {_reason(error)}") from error


def _open_locked(path: Path, locking: bool | None) -> h5py.File:
    return h5py.File(path, "r", locking=locking, rdcc_nbytes=0)  # nothing is read twice: no cache of chunks


def count_records(file: h5py.File) -> int:
    """N, where the members of `file` are "0".."N-1". Raises InputError naming the first that is missing."""
    try:
        names = list(file)
    except Exception as error:  # as above
        raise InputError(f"{file.filename}: its records cannot be listed: {_reason(error)}") from error
    present = frozenset(names)
    for index in range(len(names)):
        if str(index) not in present:
            found = f"{len(names)} records, but no {str(index)!r}"
            raise InputError(f"{file.filename}: {found}; expected '0' to '{len(names) - 1}'")
    return len(names)


@contextlib.contextmanager
def blamed_on(where: str) -> Iterator[None]:
    """Whatever HDF5 data are found to be wrong with becomes a DamagedRecord that begins with `where`."""
    try:
        yield
    except (MalformedHdf5, UnreadableImage) as error:
        raise DamagedRecord(f"{where}: {error}") from error
    except Exception as error:  # libhdf5 reports damage as OSError, RuntimeError, KeyError, ValueError, ...
        raise DamagedRecord(f"{where}: cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What h5py puts in brackets: "Unable to synchronously open file (file signature not found)"."""
    text = " ".join(str(error).split())
    bracketed = re.search(r"\((.+)\)", text)
    return bracketed[1] if bracketed else text or type(error).__name__


# From here on h5py's lower level: its upper one takes four times as long, and shows less of what it does.


def has_member(group: GroupID, name: str) -> bool:
    """Whether `group` has a member of this name, wherever it may lead."""
    return group.links.exists(name.encode())


def group_in(parent: GroupID, name: str) -> GroupID:
    """The member `name` of `parent`, which must be a group. Raises MalformedHdf5 otherwise."""
    return _member(parent, name, GroupID, "group")


def dataset_in(
    group: GroupID, name: str, kind: type[np.generic], *shapes: tuple[int | str, ...]
) -> DatasetID:
    """The member `name` of `group`: a dataset of this kind and one of these shapes (a word is any length).

    Raises MalformedHdf5 otherwise, and if its values lie in another file; none of them is read.
    """
    dataset = _member(group, name, DatasetID, "dataset")
    properties = dataset.get_create_plist()
    # Before asking for the shape: that of a virtual dataset may be looked up in the other file.
    if properties.get_layout() == h5py.h5d.VIRTUAL or properties.get_external_count():
        raise MalformedHdf5(f"dataset {name!r} keeps its values in other files, which are not read")
    found = dataset.shape  # None for a dataset without any extent
    fits = found is not None and any(_fits(found, shape) for shape in shapes)
    if not fits or not np.issubdtype(dataset.dtype, kind):
        wanted = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        raise MalformedHdf5(f"dataset {name!r} is {dataset.dtype} {found}, expected {kind.__name__} {wanted}")
    return dataset


def _fits(found: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    if len(found) != len(shape):
        return False
    return all(isinstance(want, str) or have == want for have, want in zip(found, shape, strict=True))


def _member(parent: GroupID, name: str, kind: type, kind_name: str) -> GroupID | DatasetID:
    if not has_member(parent, name):
        raise MalformedHdf5(f"no {kind_name} {name!r}")
    # Looked at before it is followed: a link may lead into any file of this machine, or nowhere for ever.
    link = parent.links.get_info(name.encode())
    if link.type != h5py.h5l.TYPE_HARD:
        raise MalformedHdf5(f"{name!r} is a link to somewhere else, expected a {kind_name}")
    check_object(h5py.h5f.get_name(parent), link.u)
    member = h5py.h5o.open(parent, name.encode())
    if not isinstance(member, kind):
        raise MalformedHdf5(f"{name!r} is no {kind_name}")
    return member


def size_in_bytes(dataset: DatasetID) -> int:
    """What the values of `dataset` take in memory."""
    return math.prod(dataset.shape) * dataset.dtype.itemsize


def read_whole(dataset: DatasetID) -> np.ndarray:
    """All values of `dataset`, whose shape the caller has checked to be no larger than it will bear.

    The values must really be there, where HDF5 would make up zeros. Raises MalformedHdf5 if they are not, or
    are compressed in another way than by gzip, and whatever h5py raises.
    """
    n_bytes, file_size = size_in_bytes(dataset), os.path.getsize(h5py.h5f.get_name(dataset))
    if n_bytes and dataset.get_create_plist().get_layout() == h5py.h5d.CHUNKED:
        _check_chunks(dataset, n_bytes, file_size)
    elif n_bytes:
        stored, offset = dataset.get_storage_size(), dataset.get_offset() or 0
        if stored < n_bytes or offset + n_bytes > file_size:
            raise MalformedHdf5(f"dataset {_name(dataset)} takes {n_bytes} bytes, which are not in the file")
    values = np.empty(dataset.shape, dataset.dtype)
    if n_bytes:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def _check_chunks(dataset: DatasetID, n_bytes: int, file_size: int) -> None:
    """Make sure that every chunk is there and, when inflated, as long as a chunk must be.

    HDF5 takes an absent chunk for zeros, inflates one for as long as its stream goes on, and has been seen to
    crash on one that is too short.
    """
    filters = _known_filters(dataset)
    chunk_shape = dataset.get_create_plist().get_chunk()
    chunk_bytes = math.prod(chunk_shape) * dataset.dtype.itemsize
    if chunk_bytes > max(n_bytes, _SMALL_CHUNK):
        raise MalformedHdf5(f"dataset {_name(dataset)} of {n_bytes} bytes has chunks of {chunk_bytes}")
    chunks = []
    dataset.chunk_iter(chunks.append)
    expected = math.prod(-(-length // side) for length, side in zip(dataset.shape, chunk_shape, strict=True))
    inside = all(chunk.byte_offset + chunk.size <= file_size for chunk in chunks)
    if len(chunks) != expected or not inside:
        raise MalformedHdf5(f"dataset {_name(dataset)} has {expected} chunks, which are not all in the file")
    for chunk in chunks:
        found = chunk.size
        if _DEFLATE in filters and not chunk.filter_mask >> filters.index(_DEFLATE) & 1:
            _, packed = dataset.read_direct_chunk(chunk.chunk_offset)
            found = len(zlib.decompressobj().decompress(packed, chunk_bytes + 1))
        if found != chunk_bytes:
            wrong = f"more than {chunk_bytes}" if found > chunk_bytes else f"{found} of {chunk_bytes}"
            raise MalformedHdf5(f"dataset {_name(dataset)}: a chunk holds {wrong} bytes")


def _known_filters(dataset: DatasetID) -> list[int]:
    """The filters that chunks pass, in their order, each known and used once."""
    properties = dataset.get_create_plist()
    filters = [properties.get_filter(position)[0] for position in range(properties.get_nfilters())]
    if len(set(filters)) < len(filters) or not set(filters) <= _FILTERS:
        remedy = "only gzip is read; h5repack -f GZIP=4 changes that"
        raise MalformedHdf5(f"dataset {_name(dataset)} is stored by HDF5's filters {filters}, {remedy}")
    return filters


def _name(dataset: DatasetID) -> str:
    return repr(h5py.h5i.get_name(dataset).decode().rpartition("/")[2])
