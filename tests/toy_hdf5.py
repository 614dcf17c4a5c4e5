"""Small class files in HDF5."""

import functools

import h5py
import numpy as np
from hypothesis import strategies as st

from meta_dataset_readers.hdf5 import Hdf5Store

CLASS_ID = 2
SHAPE = (6, 7, 3)


def pixels(class_id, index, shape=SHAPE):
    return np.random.default_rng([class_id, index]).integers(0, 256, shape, dtype=np.uint8)


def write_class(path, class_id=CLASS_ID, n_images=12, **storage):
    """A class file as PMF's converter writes it, or with the datasets stored in another way."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with h5py.File(path, "w") as file:
        for index in range(n_images):
            group = file.create_group(str(index))
            group.create_dataset("id", data=1000 * index)
            group.create_dataset("image", data=pixels(class_id, index), **storage)
            group.create_dataset("label", data=np.array([class_id], np.int32))
    return path


def store_of(path):
    return Hdf5Store(path.parent, "tiny")


def replace(record, name, value, **options):
    del record[name]
    return record.create_dataset(name, data=value, **options)


@functools.lru_cache
def places(data):
    """Where the bytes of a file mean something: most are padding."""
    return [at for at in range(len(data)) if any(data[max(at - 3, 0) : at + 4])]


@st.composite
def damaged(draw, data):
    """The bytes of a file, some of them changed at one to three places."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(places(data)))
        new = draw(
            st.sampled_from([b"\0", b"\xff", b"\0" * 8, b"\xff" * 8]) | st.binary(min_size=1, max_size=8)
        )
        changed[at : at + len(new)] = new
    return bytes(changed)
