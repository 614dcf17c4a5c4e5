"""TFRecord files of `tf.train.Example`: written, and read record by record without TensorFlow.

Knows the framing (length, masked CRC32C, payload, masked CRC32C) and the protobuf message of an `image`
and a `label`. Every length is checked against what is really there before it is believed. Does not know
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
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.files import reading, replace_file

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the 8 length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
_LENGTH = struct.Struct("<Q")

_EXAMPLE = """
name: "example.proto"
syntax: "proto3"
message_type {
  name: "Example"
  field { name: "features" number: 1 type_name: "Features" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: "Entry" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 type: TYPE_BYTES }
  field { name: "value" number: 2 type_name: "Feature" }
}
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type_name: "BytesList" }
  field { name: "float_list" number: 2 type_name: "FloatList" }
  field { name: "int64_list" number: 3 type_name: "Int64List" }
}
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
"""
_pool = descriptor_pool.DescriptorPool()  # not protobuf's own, where TensorFlow keeps its Example
_pool.AddSerializedFile(text_format.Parse(_EXAMPLE, FileDescriptorProto()).SerializeToString())
_Example: Any = GetMessageClass(_pool.FindMessageTypeByName("Example"))


def masked_crc(data: bytes) -> int:
    """The CRC32C (Castagnoli) of `data`, rotated and offset as the TFRecord format asks, in 0..2^32-1."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# --- writing ---------------------------------------------------------------------------------------------


def encode_example(image: bytes, label: int) -> bytes:
    """A serialised `tf.train.Example` of an encoded picture and its label (absolute class id).

    Raises ValueError for a label that does not fit an int64.
    """
    entries = [
        {"key": b"label", "value": {"int64_list": {"value": [label]}}},
        {"key": b"image", "value": {"bytes_list": {"value": [image]}}},
    ]
    return _Example(features={"feature": entries}).SerializeToString()


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
    try:
        entries = _Example.FromString(payload).features.feature
    except DecodeError as error:
        raise MalformedExample("not a protobuf message") from error
    return _only_value(entries, "image", "bytes"), _only_value(entries, "label", "int64")


def _only_value(entries: Iterable[Any], name: str, kind: str) -> Any:
    found = [entry.value for entry in entries if entry.key == name.encode()]
    if len(found) != 1:
        fault = f"feature {name!r} occurs {len(found)} times" if found else f"no feature {name!r}"
        raise MalformedExample(fault)
    if [field.name for field, _ in found[0].ListFields()] != [f"{kind}_list"]:
        raise MalformedExample(f"feature {name!r} is not a list of {kind}")
    values = getattr(found[0], f"{kind}_list").value
    if len(values) != 1:
        raise MalformedExample(f"feature {name!r} holds {len(values)} values, expected 1")
    return values[0]
