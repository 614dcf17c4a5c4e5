"""Pickles and files of weights, put together piece by piece."""

import io
import pickle
import struct
import zipfile

import numpy as np
import torch

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
MARK, TUPLE, REDUCE, BUILD, EMPTY, NONE, STOP = b"(", b"t", b"R", b"b", b")", b"N", b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(dotted: str) -> bytes:
    return b"c" + "\n".join(dotted.rsplit(".", 1)).encode() + b"\n"


def row(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def numbers(*values: int) -> bytes:
    return row(*map(number, values))


def call(dotted: str, *arguments: bytes) -> bytes:
    return name(dotted) + row(*arguments) + REDUCE


def dictionary(*items: bytes) -> bytes:
    return b"}" + MARK + b"".join(items) + b"u"


def reference(count: int = 4, key: str = "0", kind: str = "Float", old: bool = True) -> bytes:
    items = text("storage"), name(f"torch.{kind}Storage"), text(key), text("cpu"), number(count)
    return row(*items, *[NONE] * old) + b"Q"


def tensor(
    storage: bytes, sizes: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), offset: int = 0
) -> bytes:
    hooks = name("collections.OrderedDict") + EMPTY + REDUCE
    places = number(offset), numbers(*sizes), numbers(*strides), b"\x89", hooks
    return call("torch._utils._rebuild_tensor_v2", storage, *places)


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + STOP


def holding(value: bytes) -> bytes:
    return whole(dictionary(text("a"), value))


INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
FOUR = struct.pack("<q", 4) + np.arange(4, dtype="<f4").tobytes()
SOUND = holding(tensor(reference()))


def old_file(
    saved: bytes = SOUND,
    keys: bytes = pickle.dumps(["0"], 2),
    storages: bytes = FOUR,
    version: bytes = pickle.dumps(1001, 2),
    info: bytes = pickle.dumps(INFO, 2),
) -> bytes:
    return MAGIC + version + info + saved + keys + storages


def zip_file(saved: bytes) -> bytes:
    """The same in the format of today, in which references have no sixth part."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, stream)
    target = io.BytesIO()
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            data = source.read(entry)
            archive.writestr(entry.filename, saved if entry.filename.endswith("data.pkl") else data)
    return target.getvalue()
