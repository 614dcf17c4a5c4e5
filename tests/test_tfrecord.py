"""The record files: what is written is read back, and no damage is taken for data."""

import struct

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.tfrecord import (
    DamagedRecord,
    MalformedExample,
    RecordFileCache,
    decode_example,
    encode_example,
    masked_crc,
    open_records,
    write_records,
)

PAYLOADS = [b"first payload", b"", b"third"]


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "0.tfrecords"
    write_records(path, PAYLOADS)
    return path


def read_all(path):
    file = open_records(path)
    return [file.read(index) for index in range(len(file))]


def damage(path, position, change=0x01):
    data = bytearray(path.read_bytes())
    data[position] ^= change
    path.write_bytes(data)


def test_records_are_read_back_in_any_order(records):
    file = open_records(records)
    assert len(file) == 3
    assert [file.read(index) for index in (2, 0, 1)] == [PAYLOADS[2], PAYLOADS[0], PAYLOADS[1]]
    with pytest.raises(IndexError):
        file.read(3)
    with pytest.raises(IndexError):
        file.read(-1)


def test_the_bytes_on_disk_are_those_of_the_published_format(records):
    """A bit-by-bit CRC and struct, written down from the format's description, agree with the writer."""

    def crc32c(data):
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 0xFFFFFFFF
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32

    expected = b""
    for payload in PAYLOADS:
        length = struct.pack("<Q", len(payload))
        expected += length + struct.pack("<I", crc32c(length)) + payload + struct.pack("<I", crc32c(payload))
    assert records.read_bytes() == expected


def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(records):
    def interrupted():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(records, interrupted())
    assert read_all(records) == PAYLOADS
    assert list(records.parent.iterdir()) == [records]


@pytest.mark.parametrize("position", range(12))
def test_a_changed_header_byte_is_found_when_the_file_is_opened(records, position):
    second = 12 + len(PAYLOADS[0]) + 4
    damage(records, second + position)
    with pytest.raises(
        InputError, match=f"{records}: record 1 at byte {second}: .*checksum of the record's length"
    ):
        open_records(records)


@pytest.mark.parametrize("position", range(12, 12 + len(PAYLOADS[0]) + 4))
def test_a_changed_payload_or_checksum_byte_is_found_when_the_record_is_read(records, position):
    damage(records, position)
    file = open_records(records)
    with pytest.raises(DamagedRecord, match=f"{records}: record 0 at byte 0: wrong checksum of the payload"):
        file.read(0)
    assert file.read(2) == PAYLOADS[2]


def test_a_file_cut_anywhere_but_between_records_is_refused(records):
    """Also within a header, where TensorFlow silently takes the file for complete."""
    data = records.read_bytes()
    boundaries = {int(offset): index for index, offset in enumerate(open_records(records).offsets)}
    for end in range(len(data)):
        records.write_bytes(data[:end])
        if end in boundaries:
            assert read_all(records) == PAYLOADS[: boundaries[end]]
        else:
            with pytest.raises(InputError, match=r"record . at byte"):
                open_records(records)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 10])
def test_a_length_beyond_the_file_is_not_believed(tmp_path, length):
    header = struct.pack("<Q", length)
    path = tmp_path / "0.tfrecords"
    path.write_bytes(header + struct.pack("<I", masked_crc(header)) + b"12345678" + b"\0" * 4)
    with pytest.raises(InputError, match=f"claims a payload of {length} bytes, 8 are left"):
        open_records(path)


def test_zero_bytes_after_the_last_record_are_refused(records):
    records.write_bytes(records.read_bytes() + b"\0" * 64)
    with pytest.raises(InputError, match="record 3 at byte"):
        open_records(records)


def test_a_file_that_shrinks_after_opening_is_noticed(records):
    file = open_records(records)
    records.write_bytes(records.read_bytes()[:-1])
    with pytest.raises(DamagedRecord, match="shrunk"):
        file.read(2)


def test_missing_and_unreadable_files_are_named(tmp_path):
    for path in (tmp_path / "none.tfrecords", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_records(path)


def test_the_cache_forgets_the_file_used_longest_ago(tmp_path):
    paths = [tmp_path / f"{index}.tfrecords" for index in range(3)]
    for path in paths:
        write_records(path, PAYLOADS)
    cache = RecordFileCache(budget=2 * open_records(paths[0]).offsets.nbytes)
    first, second = cache.open(paths[0]), cache.open(paths[1])
    assert cache.open(paths[0]) is first
    cache.open(paths[2])
    assert cache.open(paths[0]) is first
    assert cache.open(paths[1]) is not second


# --- Examples --------------------------------------------------------------------------------------------


def field(number, wire, content):
    return bytes([number << 3 | wire]) + content


def message(number, content):
    assert len(content) < 128
    return field(number, 2, bytes([len(content)]) + content)


def entry(key, feature):
    return message(1, message(1, key) + message(2, feature))


IMAGE = entry(b"image", message(1, message(1, b"img")))
LABEL = entry(b"label", message(3, message(1, b"\x07")))


@given(image=st.binary(max_size=300), label=st.integers(-(2**63), 2**63 - 1))
def test_an_example_comes_back_whatever_its_content(image, label):
    assert decode_example(encode_example(image, label)) == (image, label)


def test_a_label_beyond_int64_is_not_written():
    with pytest.raises(ValueError, match="out of range"):
        encode_example(b"", 2**63)


@pytest.mark.parametrize(
    "features",
    [
        LABEL + IMAGE,
        IMAGE + LABEL,
        IMAGE + entry(b"label", message(3, field(1, 0, b"\x07"))),  # not packed
        IMAGE + LABEL + entry(b"id", message(2, message(1, b"\0" * 4))),  # a feature we do not know
        IMAGE + LABEL + field(9, 0, b"\x01") + field(9, 1, b"12345678") + field(9, 5, b"1234"),
    ],
)
def test_every_legal_encoding_is_understood(features):
    assert decode_example(message(1, features)) == (b"img", 7)


@pytest.mark.parametrize(
    ("features", "complaint"),
    [
        (LABEL, "no feature 'image'"),
        (IMAGE, "no feature 'label'"),
        (IMAGE + IMAGE + LABEL, "occurs 2 times"),
        (LABEL + entry(b"image", message(1, message(1, b"a") + message(1, b"b"))), "2 values"),
        (LABEL + entry(b"image", message(1, b"")), "0 values"),
        (LABEL + entry(b"image", message(3, message(1, b"\x07"))), "not a list of bytes"),
        (LABEL + entry(b"image", b""), "not a list of bytes"),
        (IMAGE + entry(b"label", message(1, message(1, b"7"))), "not a list of int64"),
        (IMAGE + entry(b"label", message(3, message(1, b"\x07\x08"))), "2 values"),
        (IMAGE + entry(b"label", message(3, message(1, b""))), "0 values"),
        (IMAGE + entry(b"label", message(3, message(1, b"\x87"))), "not a protobuf message"),
        (IMAGE + entry(b"label", message(3, field(1, 5, b"1234"))), "0 values"),
        (IMAGE + LABEL + field(9, 3, b""), "not a protobuf message"),
        (IMAGE + LABEL + field(0, 0, b"\0"), "not a protobuf message"),
        (IMAGE + LABEL + field(9, 2, b"\x7f"), "not a protobuf message"),
    ],
)
def test_an_example_without_exactly_one_image_and_label_is_refused(features, complaint):
    with pytest.raises(MalformedExample, match=complaint):
        decode_example(message(1, features))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_nothing_worse(payload):
    with pytest.raises(MalformedExample):
        decode_example(payload)


@given(st.data())
def test_a_damaged_example_is_decoded_or_refused_and_nothing_worse(data):
    payload = bytearray(encode_example(b"some image", 300))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, label = decode_example(bytes(payload[: data.draw(st.integers(0, len(payload)))]))
    except MalformedExample:
        return
    assert isinstance(image, bytes) and isinstance(label, int)


def test_a_malformed_example_is_located(tmp_path):
    path = tmp_path / "0.tfrecords"
    write_records(path, [encode_example(b"", 0), b"\x0c"])
    with pytest.raises(DamagedRecord, match=f"{path}: record 1 at byte [0-9]+: not a protobuf message"):
        open_records(path).read_example(1)


def test_the_checksum_is_the_masked_castagnoli_polynomial():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the polynomial's published check value
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
