"""What training code keeps beside its weights: numbers, arrays, types, devices and paths are read in both of
torch's formats, nothing of numpy's or pathlib's is called, and what only looks like them is refused."""

import argparse
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails
from pickles_by_hand import (
    BUILD,
    EMPTY,
    MARK,
    NONE,
    REDUCE,
    call,
    holding,
    name,
    number,
    numbers,
    old_file,
    row,
    text,
    zip_file,
)

from amt.data import numpy_pickles
from amt.files import weight_files

ARRAYS = {
    "vector": np.arange(3.0),
    "matrix": np.arange(6, dtype=np.int16).reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "of no axis": np.array(5.0),
    "empty": np.zeros((0, 4), np.float32),
    "big-endian": np.arange(3, dtype=">i4"),
    "booleans": np.array([True, False]),
    "complex": np.array([1j, 2], np.complex64),
    "texts": np.array(["a", "bcd", "ä"]),
}

OTHERS = {
    "float64": (np.float64(1.5), 1.5),
    "float32": (np.float32(1.5), 1.5),
    "float16": (np.float16(1.5), 1.5),
    "int64": (np.int64(-3), -3),
    "uint8": (np.uint8(200), 200),
    "bool": (np.bool_(True), True),
    "text": (np.str_("abc"), "abc"),
    "cuda": (torch.device("cuda", 1), torch.device("cuda", 1)),
    "cpu": (torch.device("cpu"), torch.device("cpu")),
    "dtype": (torch.bfloat16, torch.bfloat16),
    "bytes": (b"abc", b"abc"),
    "no bytes": (b"", b""),
    "set": ({1, "a", None}, {1, "a", None}),
    "path": (pathlib.PurePosixPath("/data/x.png"), "/data/x.png"),
    "relative path": (Path("runs") / "a", "runs/a"),
    "Windows path": (pathlib.PureWindowsPath("data\\x"), "data/x"),
}


@pytest.fixture(params=["zip", "old"])
def reread(request, tmp_path):
    """What is read of a file that holds this value beside weights."""

    def read(value: object):
        file = tmp_path / "x.pth"
        torch.save(
            {"a": torch.ones(2), "x": value}, file, _use_new_zipfile_serialization=request.param == "zip"
        )
        return weight_files.read(file).data["x"]

    return read


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_of_numpy_are_read(reread, what):
    found = reread(ARRAYS[what])
    assert type(found) is numpy_pickles.NumpyArray
    np.testing.assert_array_equal(found.array, ARRAYS[what], strict=True)


@pytest.mark.parametrize("what", OTHERS)
def test_other_harmless_values_are_read(reread, what):
    saved, expected = OTHERS[what]
    found = reread(saved)
    assert type(found) is type(expected) and found == expected


def test_arguments_of_a_training_are_read(reread):
    saved = argparse.Namespace(
        out=Path("runs"), lr=np.float64(0.1), history=np.zeros(2), device=torch.device("cpu")
    )
    found = reread({"args": saved, "dtypes": [torch.float16, torch.int64]})
    assert (found["args"].out, found["args"].lr) == ("runs", 0.1)
    assert found["dtypes"] == [torch.float16, torch.int64]


# What only looks like numpy's


def encoded(data: bytes) -> bytes:
    return call("_codecs.encode", text(data.decode("latin1")), text("latin1"))


def kind(code: str = "f8", order: str = "<") -> bytes:
    made = call("numpy.dtype", text(code), b"\x89", b"\x88")
    return made + row(number(3), text(order), NONE, NONE, NONE, number(-1), number(-1), number(0)) + BUILD


def array(
    state: bytes | None = None,
    sizes: tuple[int, ...] = (2,),
    what: bytes | None = None,
    cls: str = "numpy.ndarray",
    first: tuple[int, ...] = (0,),
) -> bytes:
    what = kind() if what is None else what
    data = encoded(bytes(16)) if state is None else state
    made = call("numpy.core.multiarray._reconstruct", name(cls), numbers(*first), encoded(b"b"))
    return made + row(number(1), numbers(*sizes), what, b"\x89", data) + BUILD


FOREIGN = {
    "objects": (array(b"]" + MARK + text("a") + b"e"), "unusual state of numpy"),
    "another class": (array(cls="torch.Size"), "unusual call of numpy.core.multiarray._reconstruct"),
    "sizes at first": (array(first=(2**40,)), "unusual call of numpy.core.multiarray._reconstruct"),
    "negative sizes": (array(sizes=(-1,)), "unusual state of numpy"),
    "too many": (array(sizes=(2**40,)), "damaged torch file"),
    "too few": (array(sizes=(1,)), "damaged torch file"),
    "type of objects": (array(what=kind("O8")), "damaged torch file .*numpy's type 'O8'"),
    "type of records": (array(what=kind("V8")), "damaged torch file .*numpy's type 'V8'"),
    "type of times": (array(what=kind("M8")), "damaged torch file .*numpy's type 'M8'"),
    "type in words": (array(what=kind("f8,(9999,9999)f8")), "damaged torch file .*numpy's type"),
    "no state": (
        call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), numbers(0), encoded(b"b"))
        + NONE
        + BUILD,
        "unusual state of numpy",
    ),
    "scalar of a list": (call("numpy.core.multiarray.scalar", kind(), b"]"), "unusual call of numpy"),
    "long text": (
        call("numpy.core.multiarray.scalar", kind("U999999"), encoded(b"a")),
        "damaged torch file .*more than 99 letters",
    ),
    "device in a list": (name("torch.device") + row(b"]") + REDUCE, "unusual call of torch.device"),
    "unknown device": (call("torch.device", text("a b\x1b")), "damaged torch file"),
    "type that is called": (name("torch.float32") + EMPTY + REDUCE, "unusual call of torch.float32"),
    "path of numbers": (call("pathlib.PosixPath", number(5)), "unusual call of pathlib.PosixPath"),
    "set of sets": (call("builtins.set", b"]" + MARK + b"]" + b"e"), "unusual call of builtins.set"),
    "set of tuples": (
        call("builtins.set", b"]" + MARK + row(text("a")) + b"e"),
        "unusual call of builtins.set",
    ),
    "bytes of a number": (call("builtins.bytes", number(2**40)), "unusual call of builtins.bytes"),
    "eval": (call("builtins.eval", text("1")), "asks for builtins.eval"),
    "numpy's loader": (call("numpy.load", text("x")), "asks for numpy.load"),
    "a tuple": (
        name("numpy.ndarray") + row(number(2**40)) + REDUCE,
        "unusual call of numpy.ndarray",
    ),
}


def old_without_tensors(content: bytes) -> bytes:
    return old_file(content, keys=b"\x80\x02].", storages=b"")


@pytest.mark.parametrize("wrap", [old_without_tensors, zip_file])
@pytest.mark.parametrize("what", FOREIGN)
def test_what_only_looks_harmless_is_refused(tmp_path, what, wrap):
    value, words = FOREIGN[what]
    (tmp_path / "x.pth").write_bytes(wrap(holding(value)))
    error = fails(words, lambda: weight_files.read(tmp_path / "x.pth"))
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("wrap", [old_without_tensors, zip_file])
def test_an_array_by_hand_is_read(tmp_path, wrap):
    """The refusals above are of what differs from this."""
    (tmp_path / "x.pth").write_bytes(wrap(holding(array())))
    np.testing.assert_array_equal(weight_files.read(tmp_path / "x.pth").data["a"].array, np.zeros(2))
