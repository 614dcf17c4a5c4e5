"""Whatever lies in the place of a file that came from outside, the answer is one line, at once."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from conftest import fails
from PIL import Image
from toy_runs import write_run

from amt.cli.options.domain_config import read_domain_config
from amt.data.corruptions import open_corrupted
from amt.data.datasets import open_dataset
from amt.evaluation.runs import read_about
from amt.evaluation.writer import Writer
from amt.files import checkpoint, weight_files
from meta_dataset_readers.bscd import open_chestx
from meta_dataset_readers.check import check
from meta_dataset_readers.filelists import open_filelists
from meta_dataset_readers.files import map_array, parse_json, read_bytes, read_json, reading, size_of
from meta_dataset_readers.folders import open_class_folders
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.pictures import read_picture
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.stored_episodes import open_episodes
from meta_dataset_readers.tfrecord import open_records


def pipe(path: Path) -> None:
    os.mkfifo(path)  # which nobody will ever write to


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = {
    pipe: "is a pipe, expected a regular file",
    endless: "is a device, expected a regular file",
    folder: "is a folder, expected a regular file",
    loop: "cannot be (read|listed): Too many levels of symbolic links",
}


def class_folders(root: Path) -> Path:
    """A source of two class folders with a picture each."""
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "white").save(root / name / "0.png")
    return root


def beside(name: str, read):
    """`read` of a folder in which the file `name` is the foreign one."""
    return name, lambda path: read(path.parent)


READERS = {
    "bytes": ("x.bin", lambda path: read_bytes(path, 10)),
    "size": ("x.bin", size_of),
    "JSON": ("x.json", read_json),
    "YAML": ("x.yaml", lambda path: read_domain_config(path, ["a"])),
    "array": ("x.npy", map_array),
    "picture": ("x.png", read_picture),
    "records": ("0.tfrecords", open_records),
    "weights": ("x.pth", weight_files.read),
    "checkpoint": ("x.safetensors", checkpoint.load),
    "specification": beside("dataset_spec.json", load_spec),
    "filelist": beside("base.json", lambda at: open_filelists(at, "cub")),
    "ChestX": beside("Data_Entry_2017.csv", lambda at: (at / "images").mkdir() or open_chestx(at, "ChestX")),
    "splits": beside("splits.json", lambda at: open_class_folders(class_folders(at), "own")),
    "corruptions": beside("labels.npy", lambda at: open_corrupted(at, 10)),
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("what", READERS)
def test_what_is_no_regular_file_is_one_line_at_once(tmp_path, what, make):
    name, read = READERS[what]
    make(tmp_path / name)
    fails(KINDS[make], lambda: read(tmp_path / name))


@pytest.mark.parametrize("make", [pipe, endless], ids=lambda make: make.__name__)
def test_stored_episodes_and_data_sets_do_not_wait_either(tmp_path, make):
    make(tmp_path / "val.h5")
    fails(KINDS[make], lambda: open_episodes(tmp_path / "val.h5", 8))
    (tmp_path / "meta").mkdir()
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        make(tmp_path / "meta" / f"{split}.json")
    fails("train.json: no such file", lambda: open_dataset("food101", tmp_path))


@pytest.mark.parametrize("make", [pipe, endless], ids=lambda make: make.__name__)
def test_check_names_a_record_file_that_is_none(tmp_path, make):
    (tmp_path / "birds").mkdir()
    make(tmp_path / "birds" / "dataset_spec.json")
    report = check(tmp_path, "birds")
    assert len(report.faults) == 1 and KINDS[make] in report.faults[0]
    fails(KINDS[make], lambda: open_source(tmp_path, "birds"))


def test_a_file_is_read_once_and_up_to_its_bound(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"0123456789")
    assert read_bytes(file, 10) == b"0123456789"
    fails("x: 10 bytes, at most 9 are read", lambda: read_bytes(file, 9))
    with reading(file) as opened:
        assert stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
    fails("no such checkpoint", lambda: read_bytes(tmp_path / "y", 9, what="checkpoint"))
    fails("the name holds a NUL", lambda: read_bytes("y\0z", 9))
    fails("cannot be read: File name too long", lambda: read_bytes(tmp_path / ("y" * 300), 9))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_json_is_one_line(tmp_path, text):
    fails("here: not valid JSON: nested too deeply", lambda: parse_json("here", text))
    (tmp_path / "x.json").write_text(text)
    fails("x.json: not valid JSON: nested too deeply", lambda: read_json(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff", "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b"", "Expecting value"),
    ],
)
def test_other_json_is_one_line(text, words):
    fails(words, lambda: parse_json("here", text))


def test_arrays_of_objects_and_cut_arrays_are_refused(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.array([object], dtype=object), allow_pickle=True)
    fails("x.npy: not an array that can be mapped", lambda: map_array(file))
    np.save(file, np.arange(9))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    fails("x.npy: not an array that can be mapped", lambda: map_array(file))
    file.write_bytes(whole + b"x")
    fails("x.npy: .* bytes, expected", lambda: map_array(file))


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_rows_to_be_continued_are_a_regular_file(tmp_path, make):
    """An evaluation reads what it goes on from; a pipe or device would keep it for ever."""
    make(tmp_path / "rows.jsonl")
    fails(KINDS[make], lambda: Writer(tmp_path, {"settings": {}}).__enter__())


@pytest.mark.parametrize("field", ["commit", "started", "arch", "checkpoint", "command"])
@pytest.mark.parametrize("value", [5, 1e999, [1]])
def test_a_run_says_what_it_is_in_texts(tmp_path, field, value):
    run = write_run(tmp_path / "run", **{field: value})
    fails(f"run.json: field '{field}'.*: expected a string", lambda: read_about(run))
