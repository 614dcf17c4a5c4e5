"""Small sources to pack, what is in them, and fixtures of them."""

import os
from pathlib import Path

import pytest
from conftest import flat_spec, jpeg, write_spec

from meta_dataset_readers.convert import convert
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.store import RecordStore, Source
from meta_dataset_readers.tfrecord import encode_example, write_records


def write_source(directory: Path, splits, images, picture=jpeg) -> Path:
    """A flat source in Meta-Dataset's layout; `picture(class_id, record)` gives the bytes of its pictures."""
    write_spec(directory, flat_spec(directory.name, splits, images))
    for class_id, n in enumerate(images):
        payloads = (encode_example(picture(class_id, record), class_id) for record in range(n))
        write_records(directory / f"{class_id}.tfrecords", payloads)
    return directory


def opened(directory: Path, store=RecordStore) -> Source:
    return Source(load_spec(directory), store(directory, directory.name))


def pack(directory: Path, out: Path, **options):
    """Convert one source; its packed directory and what was said about it."""
    ((name, packed),) = convert({directory.name: opened(directory)}, out, **options)
    assert (name, packed.directory) == (directory.name, out / name)
    return packed


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def pictures(source: Source) -> list[list[bytes]]:
    """The encoded pictures of every class."""
    n_classes = len(source.spec.images_per_class)
    return [
        [source.store.encoded(class_id, index) for index in range(source.store.count(class_id))]
        for class_id in range(n_classes)
    ]


@pytest.fixture
def source(tmp_path):
    """A source of three splits, one class with a single picture."""
    return write_source(tmp_path / "data" / "birds", (2, 1, 1), [3, 4, 1, 3])


@pytest.fixture
def packed(source, tmp_path):
    return pack(source, tmp_path / "out").directory


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return pack(write_source(folder / "data" / "birds", (2, 1, 1), [3, 4, 1, 3]), folder / "out").directory


@pytest.fixture(scope="module", autouse=True)
def memory_is_enough():
    """SIGKILL leaves what was flushed, also what is not on disk yet, and waiting for the disk takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield
