"""Damaged and hostile HDF5 files: one line names the file or the record, and its neighbours are sound."""

import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_hdf5 import CLASS_ID, SHAPE, damaged, pixels, replace, store_of, write_class

from meta_dataset_readers.errors import DamagedRecord, InputError


@pytest.fixture
def class_file(tmp_path):
    return write_class(tmp_path / f"{CLASS_ID}.h5")


def fails_as_a_whole(path, match):
    """Whatever is asked of the file, one line names it."""
    store = store_of(path)
    for call in (store.count, lambda class_id: store.image(class_id, 0)):
        with pytest.raises(InputError, match=match) as error:
            call(CLASS_ID)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        assert not isinstance(error.value, DamagedRecord)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>" * 100, "cannot be opened as HDF5: file signature not found"),
        (b"\x89HDF\r\n\x1a\n", "cannot be opened as HDF5: "),
        (b"\x89HDF\r\n\x1a\n" + b"\xff" * 500, "cannot be opened as HDF5: "),
    ],
)
def test_other_files_are_refused(class_file, data, match):
    class_file.write_bytes(data)
    fails_as_a_whole(class_file, match)


def test_a_file_that_was_cut_off_is_refused(class_file):
    whole = class_file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100):
        class_file.write_bytes(whole[:length])
        fails_as_a_whole(class_file, "truncated")


def test_what_is_no_file_is_refused(class_file):
    class_file.unlink()
    fails_as_a_whole(class_file, "no such file")
    class_file.mkdir()
    fails_as_a_whole(class_file, "is a folder, expected a regular file")
    class_file.rmdir()
    os.mkfifo(class_file)  # which nobody will ever write to
    fails_as_a_whole(class_file, "is a pipe, expected a regular file")


def heaps(path):
    """Where the local heaps of the groups in a file begin, the root's first, and what the file holds."""
    data = bytearray(path.read_bytes())
    return [found.start() for found in re.finditer(b"HEAP", data)], data


def make_endless(data, heap):
    """The first free block of the heap becomes its own successor: one byte of difference."""
    _, free, address = struct.unpack_from("<QQQ", data, heap + 8)
    assert struct.unpack_from("<Q", data, address + free) == (1,), "the last one"
    struct.pack_into("<Q", data, address + free, free)


def test_a_file_that_libhdf5_would_never_finish_opening_is_refused(class_file):
    places, data = heaps(class_file)
    make_endless(data, places[0])
    class_file.write_bytes(data)
    fails_as_a_whole(class_file, "the local heap at byte .* has an endless list of free space")


def test_a_record_that_libhdf5_would_never_finish_opening_is_named(class_file):
    places, data = heaps(class_file)
    make_endless(data, places[2])
    class_file.write_bytes(data)
    store = store_of(class_file)
    with pytest.raises(DamagedRecord, match=f"{class_file}: record 1: the local heap at byte {places[2]}"):
        store.image(CLASS_ID, 1)
    np.testing.assert_array_equal(store.read(CLASS_ID, 0), pixels(CLASS_ID, 0))


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (8, 9, "superblock of version 9"),
        (13, 4, r"offsets and lengths of \(4, 8\) bytes, 8 are read"),
        (48, 96, "one part of a file in several parts"),  # its length would be taken from what is no length
    ],
)
def test_another_kind_of_hdf5_file_is_refused(class_file, at, value, match):
    data = bytearray(class_file.read_bytes())
    data[at] = value
    class_file.write_bytes(data)
    fails_as_a_whole(class_file, f"cannot be opened as HDF5: {match}")


@pytest.mark.parametrize("version", ["v108", "v110", "latest"])
def test_files_in_the_later_formats_are_read(tmp_path, version):
    """PMF's are in the first one, as h5py still writes it."""
    path = tmp_path / f"{CLASS_ID}.h5"
    with h5py.File(path, "w", libver=version) as file:
        for index in range(20):
            file[f"{index}/image"] = pixels(CLASS_ID, index)
            file[f"{index}"].attrs["note"] = "x" * 1000
    store = store_of(path)
    assert store.count(CLASS_ID) == 20
    np.testing.assert_array_equal(store.read(CLASS_ID, 19), pixels(CLASS_ID, 19))


def test_attributes_do_not_matter(class_file):
    """They make object headers go on in further blocks."""
    with h5py.File(class_file, "r+") as file:
        for name in ("/", "0", "0/image"):
            for number in range(50):
                file[name].attrs[f"note {number}"] = "x" * 500
    np.testing.assert_array_equal(store_of(class_file).read(CLASS_ID, 0), pixels(CLASS_ID, 0))


def test_an_endless_list_is_found_behind_attributes(class_file):
    with h5py.File(class_file, "r+") as file:
        for number in range(50):
            file["11"].attrs[f"note {number}"] = "x" * 500
    places, data = heaps(class_file)
    make_endless(data, places[-1])
    class_file.write_bytes(data)
    with pytest.raises(DamagedRecord, match="record 11: the local heap"):
        store_of(class_file).image(CLASS_ID, 11)


def test_a_file_may_be_open_elsewhere_in_the_process(class_file):
    for locking in (None, False):
        with h5py.File(class_file, "r", locking=locking):
            np.testing.assert_array_equal(store_of(class_file).read(CLASS_ID, 0), pixels(CLASS_ID, 0))


@pytest.mark.parametrize(("name", "missing"), [("3", "3"), ("0", "0"), ("11", "11")])
def test_a_gap_in_the_records_is_named(class_file, name, missing):
    with h5py.File(class_file, "r+") as file:
        file.move(name, "12")
    fails_as_a_whole(class_file, f"12 records, but no '{missing}'; expected '0' to '11'")


def test_a_member_that_is_no_record_is_seen(class_file):
    with h5py.File(class_file, "r+") as file:
        file.create_group("readme")
    fails_as_a_whole(class_file, "13 records, but no '12'")


def unallocated(shape, dtype=np.uint8, **options):
    def write(record):
        del record["image"]
        record.create_dataset("image", shape, dtype, **options)

    return write


def image_of(value, **options):
    return lambda record: replace(record, "image", value, **options)


def label_of(value):
    return lambda record: replace(record, "label", value)


def link_to(link, name="image"):
    def write(record):
        outside = Path(record.file.filename).with_name("outside.h5")
        shutil.copy(record.file.filename, outside)
        del record[name]
        record[name] = link(str(outside), f"/1/{name}")

    return write


def without(name):
    def write(record):
        del record[name]

    return write


def stored_elsewhere(record):
    outside = Path(record.file.filename).with_name("outside.raw")
    outside.write_bytes(bytes(np.prod(SHAPE)))
    del record["image"]
    record.create_dataset("image", SHAPE, np.uint8, external=[(str(outside), 0, h5py.h5f.UNLIMITED)])


def virtual(record):
    outside = Path(record.file.filename).with_name("outside.h5")
    write_class(outside)
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[...] = h5py.VirtualSource(str(outside), "0/image", SHAPE)
    del record["image"]
    record.create_virtual_dataset("image", layout)


def chunk_of(data):
    """One chunk whose compressed stream is `data`, whatever its length."""

    def write(record):
        dataset = unallocated(SHAPE, chunks=SHAPE, compression="gzip")(record) or record["image"]
        dataset.id.write_direct_chunk((0, 0, 0), data)

    return write


def group_as_image(record):
    del record["image"]
    record.create_group("image")


N_BYTES = int(np.prod(SHAPE))

DAMAGE = {
    "no image": (without("image"), "no dataset 'image'"),
    "float": (image_of(np.zeros(SHAPE, np.float32)), r"'image' is float32 \(6, 7, 3\), expected uint8"),
    "16 bit": (image_of(np.zeros(SHAPE, np.uint16)), r"'image' is uint16"),
    "signed": (image_of(np.zeros(SHAPE, np.int8)), r"'image' is int8"),
    "text": (image_of("a picture"), r"'image' is object \(\), expected uint8"),
    "nothing": (image_of(h5py.Empty("u1")), r"'image' is uint8 None, expected"),
    "grey": (image_of(np.zeros((6, 7), np.uint8)), r"'image' is uint8 \(6, 7\), expected .*width, 3\)"),
    "alpha": (image_of(np.zeros((6, 7, 4), np.uint8)), r"'image' is uint8 \(6, 7, 4\)"),
    "no pixels": (unallocated((0, 7, 3)), "an image of 7 x 0 pixels"),
    "enormous": (unallocated((10**6, 10**6, 3)), "an image of 1000000 x 1000000 pixels"),
    "beyond counting": (
        unallocated((2**40, 2**20, 3), chunks=(1, 1, 3)),
        "an image of 1048576 x 1099511627776",
    ),
    "elongated": (unallocated((1, 101, 3)), "sides of at most 100:1"),
    "never written": (unallocated(SHAPE), "takes 126 bytes, which are not in the file"),
    "chunks never written": (unallocated(SHAPE, chunks=(3, 7, 3)), "2 chunks, which are not all in the file"),
    "gzip bomb": (chunk_of(zlib.compress(bytes(2**22))), f"a chunk holds more than {N_BYTES} bytes"),
    "short gzip": (chunk_of(zlib.compress(bytes(5))), f"a chunk holds 5 of {N_BYTES} bytes"),
    "no gzip": (chunk_of(b"no gzip"), "cannot be read: "),
    "huge chunks": (
        unallocated(SHAPE, chunks=(2**12, 2**12, 3), maxshape=(None, None, 3)),
        "of 126 bytes has chunks of 50331648",
    ),
    "LZF": (image_of(pixels(0, 0), compression="lzf"), "only gzip is read"),
    "checksum filter": (image_of(pixels(0, 0), fletcher32=True), "only gzip is read"),
    "external link": (link_to(h5py.ExternalLink), "'image' is a link to somewhere else"),
    "soft link": (link_to(lambda _, path: h5py.SoftLink(path)), "'image' is a link to somewhere else"),
    "raw file": (stored_elsewhere, "keeps its values in other files"),
    "virtual": (virtual, "keeps its values in other files"),
    "group": (group_as_image, "'image' is no dataset"),
    "wrong label": (label_of(np.array([CLASS_ID + 1], np.int32)), "label 3 in the file of class 2"),
    "two labels": (
        label_of(np.array([CLASS_ID] * 2)),
        r"'label' is int64 \(2,\), expected integer \(1\) or \(\)",
    ),
    "fractional label": (label_of(np.array([2.0])), "'label' is float64"),
    "linked label": (link_to(h5py.ExternalLink, "label"), "'label' is a link to somewhere else"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_named_and_its_neighbours_are_sound(class_file, case):
    damage, match = DAMAGE[case]
    with h5py.File(class_file, "r+") as file:
        damage(file["1"])
    store = store_of(class_file)
    assert store.count(CLASS_ID) == 12
    with pytest.raises(DamagedRecord, match=match) as error:
        store.image(CLASS_ID, 1)
    assert re.match(rf"{re.escape(str(class_file))}: record 1: [^\n]+$", str(error.value))
    np.testing.assert_array_equal(store.read(CLASS_ID, 2), pixels(CLASS_ID, 2))


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (lambda file: h5py.ExternalLink("outside.h5", "/0"), "'1' is a link to somewhere else"),
        (lambda file: h5py.SoftLink("/0"), "'1' is a link to somewhere else"),
        (lambda file: np.zeros(SHAPE, np.uint8), "'1' is no group"),
    ],
)
def test_a_record_must_be_a_group_of_this_very_file(class_file, record, match):
    write_class(class_file.with_name("outside.h5"))
    with h5py.File(class_file, "r+") as file:
        del file["1"]
        file["1"] = record(file)
    with pytest.raises(DamagedRecord, match=f"record 1: {match}"):
        store_of(class_file).image(CLASS_ID, 1)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A valid file, and its bytes."""
    path = write_class(tmp_path_factory.mktemp("small") / f"{CLASS_ID}.h5", n_images=2)
    return path, path.read_bytes()


@settings(max_examples=60)
@given(choice=st.data())
def test_whatever_the_bytes_a_picture_or_one_line_comes_out(small_file, choice):
    path, data = small_file
    path.unlink(missing_ok=True)  # the last example may still have it open
    path.write_bytes(choice.draw(damaged(data)))
    store = store_of(path)
    try:
        for index in range(min(store.count(CLASS_ID), 3)):
            try:
                assert store.image(CLASS_ID, index).mode == "RGB"
            except DamagedRecord as error:
                assert str(error).startswith(f"{path}: record {index}: ") and "\n" not in str(error)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
