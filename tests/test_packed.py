"""Packed sources: what is packed is what was there, and damage to it is named."""

import io
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPLITS, change_a_byte, jpeg, readable
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_packed import (
    contents,
    memory_is_enough,
    opened,
    pack,
    packed,
    packed_once,
    pictures,
    source,
    write_source,
)

import meta_dataset_readers.convert as conversion
from meta_dataset_readers.convert import convert
from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.packed import open_packed
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.spec import SPEC_FILE, DatasetSpec, load_spec
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.tfrecord import open_records

__all__ = ["memory_is_enough", "packed", "packed_once", "source"]  # fixtures, found by their names


def png(class_id: int, record: int) -> bytes:
    encoded = io.BytesIO()
    noise = np.random.default_rng([7, class_id, record]).integers(0, 256, (9, 11), dtype=np.uint8)
    Image.fromarray(noise).save(encoded, "PNG")
    return encoded.getvalue()


# --- what is packed is what was there ----------------------------------------------------------------------


@settings(max_examples=25)
@given(
    splits=st.tuples(*[st.integers(0, 2)] * 3),
    counts=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    picture=st.sampled_from([jpeg, png]),
)
def test_any_small_source_packs_and_reads_back_equal(splits, counts, picture):
    """Bytes, pixels, counts, specification, order; also from a pickled store and by a scan of the framing."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_source(Path(folder, "data", "any"), splits, counts[: sum(splits)], picture)
        original, packed = opened(directory), pack(directory, Path(folder, "out")).directory
        copy = open_packed(packed, "any")
        assert copy.spec.images_per_class == original.spec.images_per_class
        assert copy.spec.split_classes == original.spec.split_classes
        assert (packed / "dataset_spec.json").read_bytes() == (directory / "dataset_spec.json").read_bytes()
        assert pictures(copy) == pictures(original)
        store = pickle.loads(pickle.dumps(copy.store))
        for split in SPLITS:
            classes = copy.spec.classes(split)
            scanned = open_records(packed / f"{split}.tfrecords") if classes else []
            labels = [scanned.read_example(record)[1] for record in range(len(scanned))]
            assert labels == [class_id for class_id in classes for _ in range(counts[class_id])]
            for class_id in classes:
                for index in range(counts[class_id]):
                    assert np.array_equal(store.read(class_id, index), original.store.read(class_id, index))
                    assert picture(class_id, index) == store.encoded(class_id, index)


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_hierarchies_keep_their_specification(tiny_source, tmp_path, kind):
    directory = tiny_source(kind, n_images=2)
    packed = pack(directory, tmp_path / "out").directory
    spec, copy = load_spec(directory), open_packed(packed, "tiny").spec
    assert (copy.ontology, copy.groups, copy.class_names) == (spec.ontology, spec.groups, spec.class_names)
    assert (packed / "dataset_spec.json").read_bytes() == (directory / "dataset_spec.json").read_bytes()


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_episodes_are_those_of_the_original(tiny_source, tmp_path, kind):
    """To the bit; only the origin of the images tells the difference."""
    directory = tiny_source(kind)
    pack(directory, tmp_path / "out")
    roots, sampling = (directory.parent, tmp_path / "out"), EpisodeSampling(max_num_query=2)
    one, other = (EpisodeReader(root, "tiny", "TEST", sampling, 16, n_episodes=3) for root in roots)
    for index in range(3):
        assert torch.equal(one[index].support, other[index].support)
        assert torch.equal(one[index].query, other[index].query)
        assert one[index].class_ids == other[index].class_ids
        assert {origin.file for origin in other[index].query_origin} == {"tiny/TEST.tfrecords"}


class PixelStore(ImageStore):
    """A layout without encoded pictures: arrays by class."""

    def __init__(self, arrays):
        self.arrays = arrays

    def count(self, class_id):
        return len(self.arrays[class_id])

    def image(self, class_id, index):
        return Image.fromarray(self.arrays[class_id][index])

    def origin(self, class_id, index):
        return ImageOrigin("pixels/array", index)

    def place(self, class_id):
        return Path("pixels")

    def missing(self, class_ids):
        return []


def pixel_source(directory: Path) -> Source:
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = [[rng.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(n)] for n in (2, 3)]
    splits = {"TRAIN": range(0), "VALID": range(0, 1), "TEST": range(1, 2)}
    spec = DatasetSpec("pixels", directory, splits, (2, 3), ("a/b", "ü"), told_by="pixels.npy")
    return Source(spec, PixelStore(arrays), "square")


def test_a_layout_without_picture_files_or_specification_is_packed_without_loss(tmp_path):
    """PNG keeps the pixels; a flat specification is made from the classes; the resize rule is kept."""
    original = pixel_source(tmp_path / "data" / "pixels")
    list(convert({"pixels": original}, tmp_path / "out"))
    copy = open_packed(tmp_path / "out" / "pixels", "pixels")
    assert copy.resize == "square"
    here = {"directory": tmp_path / "out" / "pixels", "told_by": SPEC_FILE}
    assert copy.spec == DatasetSpec(**vars(original.spec) | here)
    for class_id, arrays in enumerate(original.store.arrays):
        assert copy.store.count(class_id) == len(arrays)
        for index, array in enumerate(arrays):
            assert np.array_equal(copy.store.read(class_id, index), array)


def test_origin_and_place_name_the_packed_file(packed):
    store = open_packed(packed, "birds").store
    assert store.origin(1, 0) == ImageOrigin("birds/TRAIN.tfrecords", 3)
    assert store.origin(3, 2) == ImageOrigin("birds/TEST.tfrecords", 2)
    assert store.place(2) == packed / "VALID.tfrecords"
    with pytest.raises(IndexError):
        store.image(0, 3)
    with pytest.raises(IndexError):
        store.image(0, -1)


def test_the_originals_are_not_touched(source, tmp_path):
    before = contents(source)
    times = {file: file.stat().st_mtime_ns for file in [source, *source.iterdir()]}
    pack(source, tmp_path / "out")
    assert contents(source) == before
    assert {file: file.stat().st_mtime_ns for file in [source, *source.iterdir()]} == times


def test_the_index_says_where_it_came_from_and_what_it_holds(packed, source):
    index = json.loads((packed / "packed.json").read_text())
    assert (index["format"], index["source"], index["origin"]) == (1, "birds", str(source.resolve()))
    assert index["images_per_class"] == {"0": 3, "1": 4, "2": 1, "3": 3}
    for split, records in (("TRAIN", 7), ("VALID", 1), ("TEST", 3)):
        assert index["splits"][split]["records"] == records
        assert index["splits"][split]["bytes"] == (packed / f"{split}.tfrecords").stat().st_size
    assert not list(packed.glob("unfinished*")) and not list(packed.glob(".*.part"))


# --- damage to a packed source -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_no_changed_byte_gives_a_wrong_picture(packed_once, data):
    """One byte of any file is changed, or its end cut off: pictures are right or refused, in one line."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(shutil.copytree(packed_once, Path(folder, "birds")))
        sound = readable(directory)
        file = directory / data.draw(st.sampled_from(sorted(contents(directory))))
        change_a_byte(file, data.draw)
        try:
            found = readable(directory)
        except InputError as error:
            assert str(directory) in str(error) and "\n" not in str(error)
        else:
            assert found.items() <= sound.items()
            if file.suffix == ".tfrecords":
                assert found != sound


def edit_index(directory: Path, change) -> None:
    index = json.loads((directory / "packed.json").read_text())
    change(index)
    (directory / "packed.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=2), "field 'format': found 2, expected 1"),
        (lambda index: index.pop("format"), "field 'format' is missing"),
        (lambda index: index.update(resize="longer"), "field 'resize': 'longer' is unknown"),
        (lambda index: index["images_per_class"].update({"0": 9}), "9 images of class 0, .* claims 3"),
        (lambda index: index["images_per_class"].pop("0"), "3 entries, 4 expected"),
        (lambda index: index["splits"].pop("VALID"), "field 'VALID' is missing"),
        (lambda index: index["splits"]["TEST"].update(records=4), "4 records in TEST, its classes have 3"),
        (lambda index: index["splits"]["TEST"].update(bytes="many"), "field 'bytes': expected an integer"),
        (lambda index: index["splits"].update(EXTRA={}), "unknown key 'EXTRA'"),
        (lambda index: index["offsets_crc32c"].update({"1": -1}), "expected a count, found -1"),
    ],
)
def test_an_index_at_odds_with_itself_is_refused_at_opening(packed, change, message):
    edit_index(packed, change)
    with pytest.raises(InputError, match=rf"packed\.json: .*{message}"):
        open_packed(packed, "birds")


def test_damage_is_named_and_does_not_reach_further(packed):
    """A damaged record leaves its neighbours, wrong offsets leave other classes, a cut file other splits."""
    train = packed / "TRAIN.tfrecords"
    data = bytearray(train.read_bytes())
    offsets = open_records(train).offsets
    data[int(offsets[1])] ^= 1  # the length of record 1
    data[int(offsets[5]) + 40] ^= 1  # the payload of record 5
    train.write_bytes(data)
    store = open_packed(packed, "birds").store
    with pytest.raises(
        DamagedRecord, match=rf"TRAIN\.tfrecords: record 1 at byte {offsets[1]}: wrong length"
    ):
        store.image(0, 1)
    with pytest.raises(DamagedRecord, match=rf"record 5 at byte {offsets[5]}: wrong checksum of the payload"):
        store.image(1, 2)
    store.image(0, 0), store.image(0, 2), store.image(1, 3)

    moved = np.load(packed / "TRAIN.offsets.npy")
    moved[1] += 1
    np.save(packed / "TRAIN.offsets.npy", moved)
    store = open_packed(packed, "birds").store
    with pytest.raises(InputError, match=r"TRAIN\.offsets\.npy: the offsets of class 0 are not those"):
        store.count(0)
    store.image(1, 0)

    os.truncate(train, train.stat().st_size - 1)
    store = open_packed(packed, "birds").store
    with pytest.raises(InputError, match=r"TRAIN\.tfrecords: .* the file is not complete"):
        store.image(1, 0)
    store.image(3, 0)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([Bomb()], dtype=object),
        np.arange(8, dtype=np.int64),
        np.arange(9, dtype=np.uint64),
        np.zeros((8, 1), dtype=np.uint64),
        np.zeros(8, dtype=np.uint64),
    ],
    ids=["pickle", "signed", "long", "two axes", "zeros"],
)
def test_offsets_that_are_something_else_are_refused(packed, tmp_path, monkeypatch, offsets):
    monkeypatch.chdir(tmp_path)
    np.save(packed / "TRAIN.offsets.npy", offsets, allow_pickle=True)
    with pytest.raises(InputError, match=r"TRAIN\.offsets\.npy: "):
        open_packed(packed, "birds").store.count(0)
    assert not Path("exploded").exists()


def test_forged_offsets_cannot_ask_for_more_than_the_file(packed):
    """Checksums of an index can be forged; that offsets rise and stay within the file cannot."""
    offsets = np.load(packed / "TRAIN.offsets.npy")
    offsets[1:7] = [2**63, 5, 2**64 - 1, 0, 7, 1]
    np.save(packed / "TRAIN.offsets.npy", offsets)
    checksums = conversion.class_checksums(offsets, (3, 4))
    edit_index(packed, lambda index: index["offsets_crc32c"].update({"0": checksums[0], "1": checksums[1]}))
    store = open_packed(packed, "birds").store
    for class_id in (0, 1):
        with pytest.raises(InputError, match=rf"the offsets of class {class_id} are not those"):
            store.count(class_id)


def test_opening_looks_at_no_record_and_says_what_is_missing(packed):
    (packed / "VALID.tfrecords").unlink()
    (packed / "TEST.offsets.npy").unlink()
    store = open_packed(packed, "birds").store
    assert store.missing([0, 1]) == []
    assert store.missing([0, 2, 3]) == ["VALID.tfrecords", "TEST.offsets.npy"]
    for class_id, name in ((2, "VALID.tfrecords"), (3, "TEST.offsets.npy")):
        with pytest.raises(InputError, match=rf"{name}: no such file"):
            store.count(class_id)
