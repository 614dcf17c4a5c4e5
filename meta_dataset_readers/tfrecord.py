"""TFRecord files of `tf.train.Example`: written, and read record by record without TensorFlow.

Knows the framing (length, masked CRC32C, payload, masked CRC32C) and as much protobuf as an `image` and
a `label` need. Every length is checked against what is really there before it is believed. Does not know
what a class, an episode or a picture is.

A file is scanned once for where its records begin (payloads are passed over, not read) and opened anew
for each read, so no number of classes can exhaust the open files of a process.
"""

import collections
import dataclasses
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.files import reading, replace_file

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the 8 length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
_LENGTH = struct.Struct("<Q")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types; groups (3, 4) are refused
_BYTES_LIST, _INT64_LIST = 1, 3  # the field of a Feature that holds its values
_LONGEST_VARINT = 10


def masked_crc(data: bytes) -> int:
    """The CRC32C (Castagnoli) of `data`, rotated and offset as the TFRecord format asks, in 0..2^32-1."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# --- writing ---------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # negative numbers travel as their two's complement
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _map_entry(key: bytes, kind: int, values: bytes) -> bytes:
    return _message(1, _message(1, key) + _message(2, _message(kind, values)))


def encode_example(image: bytes, label: int) -> bytes:
    """A serialised `tf.train.Example` of an encoded picture and its int64 label (absolute class id)."""
    if not -(2**63) <= label < 2**63:
        raise ValueError(f"label {label} does not fit an int64")
    label_entry = _map_entry(b"label", _INT64_LIST, _message(1, _varint(label)))
    image_entry = _map_entry(b"image", _BYTES_LIST, _message(1, image))
    return _message(1, label_entry + image_entry)


def frame(payload: bytes) -> bytes:
    """`payload` as a record: length, its checksum, the payload, its checksum."""
    return _header(len(payload)) + payload + _FOOTER.pack(masked_crc(payload))


def _header(length: int) -> bytes:
    packed = _LENGTH.pack(length)
    return packed + _FOOTER.pack(masked_crc(packed))


def write_records(path: str | os.PathLike, payloads: Iterable[bytes]) -> None:
    """Write `payloads`, one record each, to `path`: the whole file appears at once or not at all."""
    replace_file(Path(path), map(frame, payloads))


# --- reading records -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class RecordFile:
    """Where the records of one file begin; holds no open file, so it can be pickled and cached freely."""

    path: Path
    offsets: np.ndarray  # (records + 1,) unsigned, in bytes; the last entry is the size of the file

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def where(self, index: int) -> str:
        """`file: record i at byte b`, the beginning of every message about that record."""
        return _where(self.path, index, self.offsets[index])

    def read(self, index: int) -> bytes:
        """The payload of record `index` (0-based), its length and checksums verified.

        Raises DamagedRecord for a wrong one, InputError for a file that cannot be opened.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        with reading(self.path, buffering=0) as file:
            file.seek(start)
            record = file.read(end - start)
        if len(record) != end - start:
            raise DamagedRecord(f"{self.where(index)}: the file has shrunk since it was opened")
        header, payload = record[: _HEADER.size], record[_HEADER.size : -_FOOTER.size]
        if header != _header(len(payload)):
            raise DamagedRecord(f"{self.where(index)}: wrong length or wrong checksum of the length")
        if record[-_FOOTER.size :] != _FOOTER.pack(masked_crc(payload)):
            raise DamagedRecord(f"{self.where(index)}: wrong checksum of the payload")
        return payload

    def read_example(self, index: int) -> tuple[bytes, int]:
        """The encoded picture and the label of record `index`. Raises as `read`, and DamagedRecord for a
        payload that is not an Example with exactly one `image` and one `label`."""
        try:
            return decode_example(self.read(index))
        except MalformedExample as error:
            raise DamagedRecord(f"{self.where(index)}: {error}") from error


def open_records(path: str | os.PathLike) -> RecordFile:
    """Find the records of the file at `path` by their framing; no payload is read.

    Raises InputError, naming the record and its byte offset, for a wrong checksum of a length, a length
    beyond the end of the file, or a file that ends within a record; and for a file that cannot be opened.
    (TensorFlow takes a file ending within a header for complete; here it is truncated.)
    """
    path = Path(path)
    with reading(path, buffering=0) as file:
        offsets = np.fromiter(_record_offsets(path, file), dtype=np.uint64)
    return RecordFile(path, offsets.astype(np.min_scalar_type(offsets[-1])))


def sound_records(file: BinaryIO) -> Iterator[bytes]:
    """The payloads of the records of `file`, from where it stands to its end or to the first record that is
    incomplete or has a wrong checksum, whichever comes first."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    while left >= _HEADER.size + _FOOTER.size:
        header = file.read(_HEADER.size)
        length = int.from_bytes(header[: _LENGTH.size], "little")
        if header != _header(length) or length > left - _HEADER.size - _FOOTER.size:
            return
        payload, footer = file.read(length), file.read(_FOOTER.size)
        if footer != _FOOTER.pack(masked_crc(payload)):
            return
        yield payload
        left -= _HEADER.size + length + _FOOTER.size


class RecordFileCache:
    """`open_records` with a memory: keeps the offsets of the files used last, within a budget of bytes.

    All of quickdraw's 50 million records would take 200 MB; the least recently used files are forgotten.
    """

    def __init__(self, budget: int = 128 * 2**20):
        self._budget, self._bytes = budget, 0
        self._files: collections.OrderedDict[Path, RecordFile] = collections.OrderedDict()

    def open(self, path: Path) -> RecordFile:
        """The records of the file at `path`, scanned now or remembered. Raises as `open_records`."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = open_records(path)
            self._bytes += file.offsets.nbytes
            while len(self._files) > 1 and self._bytes > self._budget:
                _, forgotten = self._files.popitem(last=False)
                self._bytes -= forgotten.offsets.nbytes
        else:
            self._files.move_to_end(path)
        return file


def _record_offsets(path: Path, file: BinaryIO) -> Iterator[int]:
    """Where each record begins, and the size of the file. A buffer would read much more than the headers."""
    size = os.fstat(file.fileno()).st_size
    offset = record = 0
    while offset < size:
        yield offset
        file.seek(offset)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            fault = f"the file ends after {len(header)} of {_HEADER.size} header bytes"
            raise InputError(f"{_where(path, record, offset)}: {fault}")
        length, crc = _HEADER.unpack(header)
        if crc != masked_crc(header[: _LENGTH.size]):
            raise InputError(f"{_where(path, record, offset)}: wrong checksum of the record's length")
        left = size - offset - _HEADER.size - _FOOTER.size
        if length > left:
            fault = f"claims a payload of {length} bytes, {max(left, 0)} are left in the file"
            raise InputError(f"{_where(path, record, offset)}: {fault}")
        offset += _HEADER.size + length + _FOOTER.size
        record += 1
    yield size


def _where(path: Path, record: int, offset: int) -> str:
    return f"{path}: record {record} at byte {offset}"


# --- reading an Example ----------------------------------------------------------------------------------


class MalformedExample(ValueError):
    """The bytes are not an Example as Meta-Dataset writes it; the message says what is wrong."""


def decode_example(payload: bytes) -> tuple[bytes, int]:
    """The encoded picture and the label of a serialised `tf.train.Example`.

    `image` must hold exactly one bytes value and `label` exactly one int64 (packed or not); other
    features are ignored. Raises MalformedExample for anything else, whatever the bytes.
    """
    features: dict[bytes, memoryview] = {}
    # Views all the way down: the picture, which lies six messages deep, is copied once.
    for example_field in _submessages(memoryview(payload), 1):
        for entry in _submessages(example_field, 1):
            key = b"".join(_submessages(entry, 1))
            if key in (b"image", b"label"):
                if key in features:
                    raise MalformedExample(f"feature {key.decode()!r} occurs twice")
                features[key] = _merged(_submessages(entry, 2))
    for key in (b"image", b"label"):
        if key not in features:
            raise MalformedExample(f"no feature {key.decode()!r}")
    return _one_image(features[b"image"]), _one_label(features[b"label"])


def _one_image(feature: memoryview) -> bytes:
    values = list(_submessages(_values(feature, "image", _BYTES_LIST, "bytes"), 1))
    if len(values) != 1:
        raise MalformedExample(f"feature 'image' holds {len(values)} values, expected 1")
    return bytes(values[0])


def _one_label(feature: memoryview) -> int:
    values: list[int] = []
    for field, wire, value in _fields(_values(feature, "label", _INT64_LIST, "int64")):
        if field != 1:
            continue
        if wire == _VARINT:
            values.append(value)
        elif wire == _BYTES:
            values.extend(_packed_varints(value))
        else:
            raise MalformedExample(f"an int64 value has wire type {wire}")
    if len(values) != 1:
        raise MalformedExample(f"feature 'label' holds {len(values)} values, expected 1")
    return values[0] - 2**64 if values[0] >= 2**63 else values[0]


def _values(feature: memoryview, name: str, kind: int, kind_name: str) -> memoryview:
    """The value list of a Feature, which must be of one kind only."""
    kinds = {field for field, _, _ in _fields(feature)}
    if kinds != {kind}:
        raise MalformedExample(f"feature {name!r} is not a list of {kind_name}")
    return _merged(_submessages(feature, kind))


def _merged(messages: Iterable[memoryview]) -> memoryview:
    """Several parts of one message as one: protobuf merges them by concatenation."""
    parts = list(messages)
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def _submessages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The contents of every length-delimited field `wanted`, in order."""
    for field, wire, value in _fields(message):
        if field == wanted:
            if wire != _BYTES:
                raise MalformedExample(f"field {field} has wire type {wire}, expected {_BYTES}")
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """Every field of a protobuf message as (number, wire type, value); fixed-width values stay bytes."""
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        field, wire = tag >> 3, tag & 7
        if field == 0 or field >= 1 << 29:
            raise MalformedExample(f"not a protobuf message (field number {field})")
        if wire == _VARINT:
            value, position = _read_varint(message, position)
            yield field, wire, value
            continue
        if wire == _BYTES:
            length, position = _read_varint(message, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise MalformedExample(f"not a protobuf message (wire type {wire})")
        if length > len(message) - position:
            raise MalformedExample(f"a field claims {length} bytes, {len(message) - position} are left")
        yield field, wire, message[position : position + length]
        position += length


def _packed_varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _read_varint(data, position)
        yield value


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    if position < len(data) and data[position] < 0x80:  # one byte, as nearly all are
        return data[position], position + 1
    value = 0
    for index, byte in enumerate(data[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >= 2**64:
                raise MalformedExample("a varint exceeds 64 bits")
            return value, position + index + 1
    raise MalformedExample("a varint does not end")
