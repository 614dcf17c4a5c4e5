"""Small sources to pack, and what is in them."""

from pathlib import Path

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
