"""The two kinds of damage in an HDF5 file that libhdf5 must not be shown.

A group of the classic format keeps the names of its members in a local heap, and the heap a list of what is
free in it. Where this list leads back to itself, libhdf5 (seen in 1.14.4 and 2.0.0) follows it for ever and
takes more memory at every step: one changed byte is enough. So the list is walked here first. And it believes
a length in what the driver of a file in several parts has to say, which a file of one part never has. All
else that is wrong with a file libhdf5 was seen to report by itself.

Knows the file format just as far as it takes to find these two.
"""

import os
import struct
from collections.abc import Iterator
from io import FileIO

SIGNATURE = b"\x89HDF\r\n\x1a\n"

_LONGEST_SUPERBLOCK = 128
_WIDTHS = {0: 13, 1: 13, 2: 9, 3: 9}  # superblock version -> where it has the widths of offsets and lengths
_CLASSIC = {0: 48, 1: 52}  # classic superblock version -> where it has what _ROOT describes
_ROOT = struct.Struct("<Q8xQI12xQ")  # addresses of driver and header, kind of the entry, address of the heap
_ROOT_HEADER = 36  # where later superblocks have the address of the root group's object header
_NOWHERE = 2**64 - 1
_CACHED = 1  # the kind of an entry that repeats the address of the group's heap

_HEADER = struct.Struct("<BxHII4x")  # of an object: version, messages, references, bytes in its first block
_MESSAGE = struct.Struct("<HHB3x")  # kind, bytes, flags
_CONTINUATION, _SYMBOL_TABLE, _EXTERNAL_FILES = 0x10, 0x11, 0x07
_HEAP = struct.Struct("<4s4xQQQ")  # signature, bytes of data, offset of the first free block, address of data
_PAIR = struct.Struct("<QQ")
_NO_BLOCK = 1
_LARGEST_BLOCK, _MOST_BLOCKS = 2**20, 100  # of an object header; real ones have a thousandth of it


class MalformedHdf5(ValueError):
    """What the file holds is not what it should; the message says what is wrong."""


def check_root(path: str | os.PathLike) -> None:
    """Raises MalformedHdf5 if the file at `path` could not be opened in reasonable time and space, or if it
    does not begin as HDF5 files of one part do that count in 64 bit; OSError if it cannot be read."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(_LONGEST_SUPERBLOCK).ljust(_LONGEST_SUPERBLOCK, b"\0")
        if not head.startswith(SIGNATURE):
            raise MalformedHdf5("file signature not found")
        version = head[len(SIGNATURE)]
        if version not in _WIDTHS:
            raise MalformedHdf5(f"superblock of version {version}")
        widths = tuple(head[_WIDTHS[version] :][:2])
        if widths != (8, 8):
            raise MalformedHdf5(f"offsets and lengths of {widths} bytes, 8 are read")
        if version not in _CLASSIC:
            _check_object(file, int.from_bytes(head[_ROOT_HEADER:][:8], "little"))
            return
        driver, header, kind, heap = _ROOT.unpack_from(head, _CLASSIC[version])
        if driver != _NOWHERE:
            raise MalformedHdf5("one part of a file in several parts, which are not read")
        if kind == _CACHED:
            _check_heap(file, heap)
        _check_object(file, header)


def check_object(path: str | bytes | os.PathLike, address: int) -> None:
    """Raises MalformedHdf5 if opening the object whose header is at `address` would never end; OSError if
    the file cannot be read."""
    with open(path, "rb", buffering=0) as file:
        _check_object(file, address)


def _check_object(file: FileIO, address: int) -> None:
    for kind, content in _messages(file, address):
        if kind in (_SYMBOL_TABLE, _EXTERNAL_FILES) and len(content) >= _PAIR.size:
            _check_heap(file, _PAIR.unpack_from(content)[1])


def _messages(file: FileIO, address: int) -> Iterator[tuple[int, bytes]]:
    """Kind and content of what an object header of version 1 consists of; nothing of a later one, which has
    a checksum."""
    header = _read(file, address, _HEADER.size)
    if len(header) < _HEADER.size or header[0] != 1:
        return
    blocks = [(address + _HEADER.size, _HEADER.unpack(header)[3])]
    for begin, size in blocks:  # grows while it is walked
        if size > _LARGEST_BLOCK or len(blocks) > _MOST_BLOCKS:
            raise MalformedHdf5(f"the object header at byte {address} goes on and on")
        block = _read(file, begin, size)
        position = 0
        while position + _MESSAGE.size <= len(block):
            kind, length, _ = _MESSAGE.unpack_from(block, position)
            position += _MESSAGE.size
            content = block[position : position + length]
            position += length
            if kind == _CONTINUATION and len(content) >= _PAIR.size:
                blocks.append(_PAIR.unpack_from(content))
            yield kind, content


def _check_heap(file: FileIO, address: int) -> None:
    header = _read(file, address, _HEAP.size)
    if len(header) < _HEAP.size or not header.startswith(b"HEAP"):
        return
    _, size, free, data = _HEAP.unpack(header)
    seen = set()
    while free != _NO_BLOCK and free < size:
        if free in seen:
            raise MalformedHdf5(f"the local heap at byte {address} has an endless list of free space")
        seen.add(free)
        block = _read(file, data + free, _PAIR.size)
        if len(block) < _PAIR.size:
            return
        free = _PAIR.unpack(block)[0]


def _read(file: FileIO, address: int, size: int) -> bytes:
    """Up to `size` bytes, as many as the file has there."""
    if address >= os.fstat(file.fileno()).st_size:  # also where it is too large to be sought
        return b""
    file.seek(address)
    return file.read(size)
