"""The check of sources: what is sound is called so, all damage is seen and named, and none hides the next."""

import concurrent.futures
import json
import os
import pickle
import re
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import BENCHMARKS, flat_spec, jpeg, write_classes, write_spec
from PIL import Image

import meta_dataset_readers.check as checking
import meta_dataset_readers.convert as conversion
from meta_dataset_readers.check import check
from meta_dataset_readers.convert import convert
from meta_dataset_readers.domains import DOMAINS, Domain
from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError, exit_on_bad_input
from meta_dataset_readers.layouts import open_source, sources
from meta_dataset_readers.spec import DatasetSpec, load_spec
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records

needs_samples = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no sample data in {BENCHMARKS}")


def command(monkeypatch, capsys, *arguments):
    """Run the command in this process: its exit code, and its lines on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments), "--jobs", "1"])
    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(checking.main)
    said = capsys.readouterr()
    return ended.value.code or 0, said.out.splitlines(), said.err.splitlines()


# --- damage ----------------------------------------------------------------------------------------------


def offset(path: Path, record: int) -> int:
    return int(open_records(path).offsets[record])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def replace_payload(path: Path, record: int, payload: bytes) -> None:
    file = open_records(path)
    payloads = [file.read(index) for index in range(len(file))]
    write_records(path, payloads[:record] + [payload] + payloads[record + 1 :])


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - n_bytes)


# What is done to the file of one class of 8 pictures; the line that must say so, after the path of the file;
# whether files, headers and counts alone show it.
DAMAGES = {
    "missing": (lambda path: path.unlink(), "missing", True),
    "empty": (lambda path: path.write_bytes(b""), "0 images of class . .* claims 8: 8 missing", True),
    "short": (lambda path: cut(path, path.stat().st_size - offset(path, 6)), "6 images .*: 2 missing", True),
    "long": (lambda path: append(path, path.read_bytes()), "16 images .* claims 8: 8 too many", True),
    "cut": (
        lambda path: cut(path, 3),
        "record 7 at byte .* left in the file; sound records before it: 7",
        True,
    ),
    "cut header": (
        lambda path: append(path, b"12345"),
        "record 8 .* ends after 5 of 12 header bytes; .*: 8",
        True,
    ),
    "garbage": (
        lambda path: append(path, bytes(64)),
        "record 8 .* checksum of the record's length; .*: 8",
        True,
    ),
    "length": (
        lambda path: flip(path, offset(path, 2)),
        "record 2 .* checksum of the record's length; .*: 2",
        True,
    ),
    "payload": (
        lambda path: flip(path, offset(path, 3) + 50),
        "record 3 .*: wrong checksum of the payload",
        False,
    ),
    "no Example": (lambda path: replace_payload(path, 1, b"\xff"), "record 1 at byte", False),
    "no picture": (
        lambda path: replace_payload(path, 4, encode_example(b"text", int(path.stem))),
        "record 4 .* cannot be decoded",
        False,
    ),
    "half a picture": (
        lambda path: replace_payload(path, 5, encode_example(jpeg(1, 1)[:-300], int(path.stem))),
        "record 5 .* cannot be decoded",
        False,
    ),
    "label": (
        lambda path: replace_payload(path, 7, encode_example(jpeg(1, 1), 77)),
        "record 7 .*: label 77 in the file of class",
        False,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_with_its_place(tiny_source, name):
    """File, record and byte, once, and nothing else; the fast look does not see what only decoding shows."""
    path = tiny_source() / "4.tfrecords"
    damage, line, seen_fast = DAMAGES[name]
    damage(path)
    report = check(path.parents[1], "tiny")
    assert len(report.faults) == 1
    assert re.match(re.escape(f"{path}: ") + line, report.faults[0])
    fast = check(path.parents[1], "tiny", fast=True)
    assert bool(fast.faults) == seen_fast
    for found in fast.faults:
        assert re.match(re.escape(f"{path}: ") + line.split("; ")[0], found)


def test_no_damage_hides_the_next(tiny_source):
    """All of them at once, one to a class: a line for each."""
    directory = tiny_source("bilevel")
    for class_id, (damage, _, _) in enumerate(DAMAGES.values()):
        damage(directory / f"{class_id}.tfrecords")
    report = check(directory.parent, "tiny")
    assert len(report.faults) == len(DAMAGES)
    faults = {re.match(r".*/(\d+)\.tfrecords: (.*)", line)[1]: line for line in report.faults}
    for class_id, (_, line, _) in enumerate(DAMAGES.values()):
        assert re.search(line, faults[str(class_id)])


def test_records_before_a_break_are_examined_as_far_as_they_are_sound(tiny_source):
    path = tiny_source() / "2.tfrecords"
    flip(path, offset(path, 1) + 30)
    cut(path, 1)
    (fault,) = check(path.parents[1], "tiny").faults
    assert "record 7 at byte" in fault and fault.endswith("sound records before it: 1")


def test_a_specification_that_is_wrong_is_a_fault(tiny_source, monkeypatch, capsys):
    directory = tiny_source()
    (directory / "dataset_spec.json").write_text("{}")
    code, said, _ = command(monkeypatch, capsys, directory.parent)
    assert code == 1
    assert said == ["tiny: 1 fault", f"  {directory}/dataset_spec.json: field '__class__' is missing"]
    (directory / "dataset_spec.json").unlink()
    code, said, _ = command(monkeypatch, capsys, directory.parent)
    assert code == 1 and said[0] == "tiny: 1 fault", "a source of record files alone must not pass unseen"


def test_a_class_without_pictures_is_a_fault(tmp_path):
    """Whatever the specification says: no episode can use it."""
    directory = write_spec(tmp_path / "odd", flat_spec("odd", (1, 0, 0), [0]))
    (directory / "0.tfrecords").write_bytes(b"")
    assert check(tmp_path, "odd").faults == [f"{directory}/0.tfrecords: no image of class 0 ('class 0')"]


# --- what is sound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_a_sound_source_is_one_line(tiny_source, monkeypatch, capsys, kind):
    directory = tiny_source(kind, n_images=3)
    n_classes = len(load_spec(directory).images_per_class)
    code, said, errors = command(monkeypatch, capsys, directory.parent, "tiny")
    counts = f"{n_classes} classes, {3 * n_classes} images, record files"
    assert (code, said, errors) == (0, [f"tiny: complete and readable: {counts}"], [])
    code, said, _ = command(monkeypatch, capsys, directory.parent, "--fast")
    assert (code, said) == (0, [f"tiny: complete by files and counts, no picture read: {counts}"])


def test_checking_changes_nothing(tiny_source):
    directory = tiny_source()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in directory.iterdir()}
    check(directory.parent, "tiny")
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in directory.iterdir()} == before


def test_a_packed_source_is_checked_like_any_other(tiny_source, tmp_path):
    """Sound, then with a damaged record, then with one split cut short and the offsets of another gone."""
    directory = tiny_source()
    list(convert({"tiny": open_source(directory.parent, "tiny")}, tmp_path / "out"))
    packed = tmp_path / "out" / "tiny"
    report = check(tmp_path / "out", "tiny")
    assert (report.faults, report.contents) == ([], "11 classes, 88 images, packed")

    where = offset(packed / "TRAIN.tfrecords", 9)
    flip(packed / "TRAIN.tfrecords", where + 9)
    (fault,) = check(tmp_path / "out", "tiny").faults
    assert fault.startswith(f"{packed}/TRAIN.tfrecords: record 9 at byte {where}: wrong length or")
    assert not check(tmp_path / "out", "tiny", fast=True).faults

    cut(packed / "TRAIN.tfrecords", 100)
    (packed / "TEST.offsets.npy").unlink()
    missing, short = check(tmp_path / "out", "tiny").faults
    assert missing == f"{packed}/TEST.offsets.npy: missing"
    assert short.startswith(f"{packed}/TRAIN.tfrecords: ") and short.endswith("sound records before it: 9")


# --- notes -----------------------------------------------------------------------------------------------


def test_other_sizes_than_the_published_ones_are_a_note(tiny_source, monkeypatch):
    """No fault: a subset may be meant. Classes first; images where the classes agree."""
    directory = tiny_source()
    for domain, note in (
        (
            Domain("", (70, 15, 15), 10_000, "", ""),
            "published source has 70/15/15 classes in .*, this has 6/0/5",
        ),
        (Domain("", (6, 0, 5), 10_000, "", ""), "published source has 10000 images, this has 88"),
        (Domain("", (6, 0, 5), 88, "", ""), None),
        (Domain("", (6, 0, 5), None, "", ""), None),
    ):
        monkeypatch.setitem(DOMAINS, "tiny", domain)
        report = check(directory.parent, "tiny")
        assert not report.faults and len(report.notes) == (note is not None)
        assert not note or re.search(note, report.notes[0])


def test_another_name_and_files_of_no_class_are_notes(tiny_source, tmp_path):
    directory = tiny_source()
    shutil.copy(directory / "0.tfrecords", directory / "11.tfrecords")
    directory.rename(tmp_path / "renamed")
    report = check(tmp_path, "renamed")
    assert not report.faults
    assert report.notes[0].endswith("dataset_spec.json says that the source is called 'tiny'")
    assert report.notes[1] == "1 files belong to no class, the first is 11.tfrecords"


# --- the command -----------------------------------------------------------------------------------------


def test_many_faults_are_capped_unless_all_are_asked_for(tiny_source, monkeypatch, capsys):
    directory = tiny_source(n_images=4)
    for class_id in range(11):
        path = directory / f"{class_id}.tfrecords"
        write_records(path, [encode_example(jpeg(class_id, record), 99) for record in range(4)])
    _, said, _ = command(monkeypatch, capsys, directory.parent)
    assert said[0] == "tiny: 44 faults" and len(said) == 22
    assert said[-1] == "  and 24 more (--all shows them)"
    code, said, _ = command(monkeypatch, capsys, directory.parent, "--all")
    assert code == 1 and len(said) == 45 and "label 99 in the file of class 10" in said[-1]


def test_all_sources_are_checked_and_one_bad_one_decides(tiny_source, tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        tiny_source(name=name, n_images=1)
    (tmp_path / "b" / "3.tfrecords").unlink()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "0.tfrecords").touch()
    code, said, _ = command(monkeypatch, capsys, tmp_path)
    assert code == 1 and [line.split(":")[0] for line in said if line[0] != " "] == ["a", "b", "c"]
    code, said, _ = command(monkeypatch, capsys, tmp_path, "c", "a", "c")
    assert code == 0 and [line.split(":")[0] for line in said] == ["c", "a"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["{data}", "tinny"], "no source 'tinny'; did you mean 'tiny'?"),
        (["{data}", ""], "no source ''"),
        (["{data}/tiny"], "no source below it"),
        (["{data}", "--jobs", "0"], "--jobs: expected a positive integer, got '0'"),
        ([], "required: DATA_PATH"),
        (["{data}", "--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(tiny_source, monkeypatch, capsys, arguments, line):
    root = tiny_source(n_images=1).parent
    code, said, errors = command(monkeypatch, capsys, *(argument.format(data=root) for argument in arguments))
    assert (code, said, len(errors)) == (2, [], 1) and line in errors[0]


# --- other processes -------------------------------------------------------------------------------------


def test_processes_find_what_one_finds(tiny_source, monkeypatch):
    """In the same order, for any size of batch. The pool here is of threads; what it is sent is the same."""
    directory = tiny_source("bilevel")
    for class_id, (damage, _, _) in enumerate(DAMAGES.values()):
        damage(directory / f"{class_id}.tfrecords")
    expected = check(directory.parent, "tiny")
    monkeypatch.setattr(checking, "_WORTH_PROCESSES", 0)
    for size in (1, 3, 20, 1000):
        monkeypatch.setattr(checking, "_BATCH", size)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            assert check(directory.parent, "tiny", pool=pool) == expected


def test_what_a_process_is_sent_is_small_and_complete(tiny_source):
    """A name, not what the store has learnt of its files; and what comes back can be sent as well."""
    directory = tiny_source(n_images=2)
    flip(directory / "1.tfrecords", offset(directory / "1.tfrecords", 1) + 40)
    address, batch = (str(directory.parent), "tiny", None), [(0, range(2)), (1, range(2))]
    sent = pickle.dumps((checking._examine_there, address, batch))
    assert len(sent) < 500
    examine, *arguments = pickle.loads(sent)
    number, lines, _ = pickle.loads(pickle.dumps(examine(*arguments)))
    assert number == 4 and lines == check(directory.parent, "tiny").faults != []


def test_a_process_that_dies_is_one_line(tiny_source, monkeypatch):
    class Dead(concurrent.futures.ThreadPoolExecutor):
        def map(self, *_arguments):
            raise BrokenProcessPool

    monkeypatch.setattr(checking, "_WORTH_PROCESSES", 0)
    with Dead() as pool, pytest.raises(InputError, match="tiny: a process died while it decoded pictures"):
        check(tiny_source(n_images=1).parent, "tiny", pool=pool)


# --- other layouts -----------------------------------------------------------------------------------------


class ListedStore(ImageStore):
    """A layout that lists files: three of each class, of which some are not there."""

    def __init__(self, absent):
        self.absent = absent

    def count(self, class_id):
        return 3

    def image(self, class_id, index):
        file = f"{class_id}/{index}.jpg"
        if file in self.absent:
            raise DamagedRecord(f"{file}: no such file")
        return Image.fromarray(np.zeros((2, 2, 3), np.uint8))

    def origin(self, class_id, index):
        return ImageOrigin(f"listed/{class_id}/{index}.jpg", 0)

    def place(self, class_id):
        return Path(str(class_id))

    def missing(self, class_ids):
        return [file for file in self.absent if int(file[0]) in class_ids]


def test_a_folder_of_class_folders_is_checked_too(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "mine", cat=2, dog=1)
    code, said, _ = command(monkeypatch, capsys, tmp_path)
    verdict, note = said
    assert (code, verdict) == (0, "mine: complete and readable: 2 classes, 3 images, class folders")
    assert note.startswith("  note: its files have no checksums")
    (tmp_path / "mine" / "cat" / "1.png").write_bytes(b"text")
    code, said, _ = command(monkeypatch, capsys, tmp_path)
    assert code == 1 and f"{tmp_path}/mine/cat/1.png: " in said[1]


def test_filelists_of_another_machine_are_told_where_their_images_are(tmp_path, monkeypatch, capsys):
    """--image_prefix, with dashes as well, for both commands; from a path that no search would find."""
    write_classes(tmp_path / "elsewhere", cat=2)
    images = [f"/their/disk/cat/{index}.png" for index in range(2)]
    content = {"label_names": ["cat"], "image_names": images, "image_labels": [0, 0]}
    (tmp_path / "data" / "cub").mkdir(parents=True)
    (tmp_path / "data" / "cub" / "base.json").write_text(json.dumps(content))
    for part in ("val", "novel"):
        empty = {"label_names": ["cat"], "image_names": [], "image_labels": []}
        (tmp_path / "data" / "cub" / f"{part}.json").write_text(json.dumps(empty))
    assert command(monkeypatch, capsys, tmp_path / "data")[0] == 1
    prefix = ("--image-prefix", "/their/disk", tmp_path / "elsewhere")
    code, said, _ = command(monkeypatch, capsys, tmp_path / "data", "cub", *prefix)
    assert code == 0 and said[0] == "cub: complete and readable: 1 classes, 2 images, filelists"
    monkeypatch.setattr(
        sys, "argv", ["convert", *map(str, (tmp_path / "data", "cub", "--out", tmp_path / "out", *prefix))]
    )
    conversion.main()
    assert check(tmp_path / "out", "cub").contents == "1 classes, 2 images, packed"


def test_a_listed_file_that_is_missing_is_said_once(tmp_path, monkeypatch):
    spec = DatasetSpec(
        "listed", tmp_path, {"TRAIN": range(2), "VALID": range(0), "TEST": range(0)}, (3, 3), "ab"
    )
    source = Source(spec, ListedStore(("0/2.jpg", "1/0.jpg")))
    monkeypatch.setattr(checking, "open_source", lambda *_address: source)
    expected = [f"{tmp_path}/{file}: missing" for file in source.store.absent]
    assert check(tmp_path, "listed").faults == expected == check(tmp_path, "listed", fast=True).faults


# --- the sample data -------------------------------------------------------------------------------------


@pytest.mark.benchmark_data
@needs_samples
def test_every_broken_sample_is_seen_and_the_intact_one_is_sound():
    """Damage to one class is told by its file, damage to the specification by the specification."""
    cases = json.loads((BENCHMARKS / "broken" / "NOTES.json").read_text())
    assert "intact" in cases
    for name, note in cases.items():
        report = check(BENCHMARKS / "broken", name)
        assert bool(report.faults) == (name != "intact"), (name, note)
        of_class = re.match(r"class (\d+)(?:, record (\d+))?:", note)
        if of_class:
            file = BENCHMARKS / "broken" / name / f"{of_class[1]}.tfrecords"
            assert all(line.startswith(f"{file}: ") for line in report.faults), note
            assert not of_class[2] or f"record {of_class[2]} at byte" in report.faults[0]


@pytest.mark.benchmark_data
@needs_samples
def test_real_sources_are_sound_and_pack_to_sound_ones(tmp_path):
    """Also each picture and specification after packing. A specification without files is no source."""
    records = BENCHMARKS / "records"
    complete = [name for name in sources(records) if any((records / name).glob("*.tfrecords"))]
    assert complete
    for name in complete:
        assert check(records, name).faults == []
        original = open_source(records, name)
        list(convert({name: original}, tmp_path))
        copy = open_source(tmp_path, name)
        assert copy.spec.images_per_class == original.spec.images_per_class
        assert copy.spec.groups == original.spec.groups
        for class_id, count in enumerate(copy.spec.images_per_class):
            for index in range(count):
                assert copy.store.encoded(class_id, index) == original.store.encoded(class_id, index)
        assert check(tmp_path, name).faults == []


@pytest.mark.benchmark_data
@needs_samples
def test_broken_hdf5_samples_are_seen_and_the_intact_one_is_sound(tmp_path):
    """Each takes the place of the class it is labelled as, which should have what the intact one has."""
    files = {file.stem: file for file in (BENCHMARKS / "broken_h5").glob("*.h5")}
    with h5py.File(files["intact"]) as intact:
        class_id, n_images = int(intact["0"]["label"][0]), len(intact)
    for stem, file in files.items():
        directory = tmp_path / stem
        write_spec(directory, flat_spec(stem, (class_id + 1, 0, 0), [n_images] * (class_id + 1)))
        place = Path(shutil.copy(file, directory / f"{class_id}.h5"))
        faults = [line for line in check(tmp_path, stem).faults if line.startswith(f"{place}: ")]
        assert bool(faults) == (stem != "intact"), faults
