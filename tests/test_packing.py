"""The packing of a source: bad records, interruptions, where the copy may go, and the command."""

import collections
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from commands import ROOT
from conftest import jpeg, write_classes
from hypothesis import given, settings
from hypothesis import strategies as st
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
from meta_dataset_readers import files
from meta_dataset_readers.convert import convert
from meta_dataset_readers.errors import DamagedRecord, InputError, exit_on_bad_input
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.packed import open_packed
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.store import RecordStore
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records

__all__ = ["memory_is_enough", "packed", "packed_once", "source"]  # fixtures, found by their names


# --- bad records -----------------------------------------------------------------------------------------


def spoil(directory: Path, class_id: int, record: int, how: str) -> None:
    """Damage one record: its `checksum`, its `picture`, or its `label`."""
    path = directory / f"{class_id}.tfrecords"
    file = open_records(path)
    if how == "checksum":
        data = bytearray(path.read_bytes())
        data[int(file.offsets[record]) + 40] ^= 1
        path.write_bytes(data)
        return
    payloads = [file.read(index) for index in range(len(file))]
    picture = b"no picture" if how == "picture" else jpeg(class_id, record)
    payloads[record] = encode_example(picture, class_id + (how == "label"))
    write_records(path, payloads)


@pytest.mark.parametrize("how", ["checksum", "picture", "label"])
def test_a_bad_record_stops_with_one_line_that_names_it(source, tmp_path, how):
    spoil(source, 1, 2, how)
    where = rf"1\.tfrecords: record 2 at byte {open_records(source / '1.tfrecords').offsets[2]}: "
    with pytest.raises(DamagedRecord, match=where):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out" / "birds" / "packed.json").exists()


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_bad_records_can_be_left_out_and_are_counted(tiny_source, tmp_path, kind):
    """The rest keeps its order; specification and index have the true counts, of inner nodes as well."""
    directory = tiny_source(kind, n_images=4)
    for record, how in ((0, "label"), (3, "picture")):
        spoil(directory, 3, record, how)
    packed = pack(directory, tmp_path / "out", skip_bad_records=True)
    assert packed.images == sum(load_spec(directory).images_per_class) - 2
    assert len(packed.notes) == 2 and all("3.tfrecords: record" in note for note in packed.notes)
    copy, original = open_packed(packed.directory, "tiny"), opened(directory)
    counts = [4 - 2 * (class_id == 3) for class_id in range(len(original.spec.images_per_class))]
    assert copy.spec.images_per_class == tuple(counts)
    assert copy.spec.groups == original.spec.groups
    assert pictures(copy)[3] == [original.store.encoded(3, index) for index in (1, 2)]
    assert json.loads((packed.directory / "packed.json").read_text())["left_out"]["3"] == 2
    if kind == "dag":
        node_counts = json.loads((packed.directory / "dataset_spec.json").read_text())["images_per_class"]
        assert node_counts["TRAIN"]["n0"] == 4 * 9 - 2


@pytest.mark.parametrize("there", [2, 6])
def test_a_wrong_count_is_an_error_or_corrected(source, tmp_path, there):
    payloads = [encode_example(jpeg(1, record), 1) for record in range(there)]
    write_records(source / "1.tfrecords", payloads)
    with pytest.raises(InputError, match=rf"1\.tfrecords: {there} images of class 1 .* claims 4"):
        pack(source, tmp_path / "out")
    packed = pack(source, tmp_path / "out", skip_bad_records=True)
    assert open_packed(packed.directory, "birds").spec.images_per_class == (3, there, 1, 3)
    assert len(packed.notes) == 1 and "count corrected" in packed.notes[0]


def test_a_run_that_stopped_at_a_bad_record_can_go_on_without_it(source, tmp_path):
    """The same bytes as if it had been left out from the beginning; not silently the other way round."""
    spoil(source, 1, 2, "picture")
    pack(source, tmp_path / "straight", skip_bad_records=True)
    with pytest.raises(DamagedRecord):
        pack(source, tmp_path / "out")
    with killed_at(tmp_path / "out", source, event=6, skip_bad_records=True):
        with pytest.raises(InputError, match="record 2"):
            pack(source, tmp_path / "out")
        pack(source, tmp_path / "out", skip_bad_records=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_missing_picture_of_a_list_can_be_left_out(tmp_path):
    directory = write_classes(tmp_path / "data" / "mine", cat=2, dog=3)
    sources = {"mine": open_source(directory.parent, "mine")}
    (directory / "dog" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1 files are missing, the first is dog/1\.png"):
        list(convert(sources, tmp_path / "out"))
    ((_, packed),) = convert(sources, tmp_path / "out", skip_bad_records=True)
    assert open_packed(packed.directory, "mine").spec.images_per_class == (2, 2)
    assert len(packed.notes) == 1 and "dog/1.png: no such file" in packed.notes[0]


def test_class_folders_that_a_file_divides_are_packed_with_a_specification_of_their_own(tmp_path):
    directory = write_classes(tmp_path / "data" / "mine", ant=2, cat=2, dog=3)
    (directory / "splits.json").write_text('{"TRAIN": ["dog"], "TEST": ["ant"]}')
    ((_, found),) = convert({"mine": open_source(directory.parent, "mine")}, tmp_path / "out")
    spec = open_packed(found.directory, "mine").spec
    assert spec.class_names == ("dog", "ant") and spec.images_per_class == (3, 2)
    assert [len(spec.classes(split)) for split in ("TRAIN", "VALID", "TEST")] == [1, 0, 1]


def test_a_broken_file_is_no_bad_record(source, tmp_path):
    """Nobody can say how much would be left out."""
    with (source / "3.tfrecords").open("ab") as file:
        file.write(b"garbage")
    with pytest.raises(InputError, match=r"3\.tfrecords: record 3 at byte"):
        pack(source, tmp_path / "out", skip_bad_records=True)
    (source / "3.tfrecords").unlink()
    with pytest.raises(InputError, match=r"1 files are missing, the first is 3\.tfrecords"):
        pack(source, tmp_path / "out")
    with pytest.raises(InputError, match=r"3\.tfrecords: no such file"):
        pack(source, tmp_path / "out", skip_bad_records=True)
    assert not (tmp_path / "out").exists()


# --- interrupted -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def killed_at(out: Path, source: Path, event: int, **options):
    """Packs in a process that sends itself SIGKILL at its `event`-th record, flush or renaming."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            events = iter(range(event, -1, -1))

            def deadly(function):
                def call(*arguments):
                    if next(events) == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments)

                return call

            conversion.encode_example = deadly(conversion.encode_example)
            files.to_disk = deadly(files.to_disk)
            os.replace = deadly(os.replace)
            pack(source, out, **options)
        os._exit(0)
    yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@needs_fork
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(source, tmp_path):
    """SIGKILL before every single record, flush and renaming of a run, until one comes through."""
    pack(source, tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    for event in range(100):
        out = tmp_path / f"out {event}"
        with killed_at(out, source, event) as code:
            if code == 0:
                break
            assert code == -signal.SIGKILL
            complete = (out / "birds" / "packed.json").exists()
            assert not complete or contents(out) == expected
            assert pack(source, out).fresh
            assert contents(out) == expected
    assert 11 + 10 < event < 40  # 11 records; a journal line, three files, offsets, specification, index


@needs_fork
def test_killed_twice_it_goes_on_from_where_it_was(source, tmp_path, monkeypatch):
    """A finished split is not packed again, and of an unfinished one no record that is whole."""
    pack(source, tmp_path / "straight")
    with killed_at(tmp_path / "out", source, event=17):
        pass
    assert len((tmp_path / "out" / "birds" / "unfinished.jsonl").read_text().splitlines()) == 3
    written, encode = [], conversion.encode_example

    def watched(picture, label):
        written.append(label)
        return encode(picture, label)

    monkeypatch.setattr(conversion, "encode_example", watched)
    pack(source, tmp_path / "out")
    assert set(written) == {3}
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_is_left_of_an_unfinished_file_is_used_or_replaced(packed_once, data):
    """Cut anywhere, with any tail and any byte changed: whole records are kept, and the end is the same."""
    expected = contents(packed_once)
    source = packed_once.parent.parent / "data" / "birds"
    plan = {"format": 1, "source": "birds", "origin": str(source.resolve()), "resize": "shorter"}
    journal = json.dumps(plan | {"images": [3, 4, 1, 3]}) + "\n"
    torn = data.draw(st.sampled_from(["", '{"split": "TR']))
    left = bytearray(expected["TRAIN.tfrecords"])
    left[data.draw(st.integers(0, len(left) - 1))] ^= data.draw(st.integers(0, 255))
    left = bytes(left[: data.draw(st.integers(0, len(left)))]) + data.draw(st.binary(max_size=30))
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Path(folder, "birds")
        unfinished.mkdir()
        (unfinished / "unfinished.jsonl").write_text(journal + torn)
        (unfinished / "TRAIN.tfrecords").write_bytes(left)
        assert contents(pack(source, Path(folder)).directory) == expected


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_the_command_is_killed_and_resumed(tmp_path):
    """The real command in a process of its own, killed as soon as records are on disk."""
    picture = jpeg(0, 0)
    source = write_source(tmp_path / "data" / "birds", (1, 0, 1), [1200, 2], lambda *_: picture)
    command = [sys.executable, "-m", "meta_dataset_readers.convert", source.parent, "birds"]
    process = subprocess.Popen([*command, "--out", tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE)
    records = tmp_path / "out" / "birds" / "TRAIN.tfrecords"
    try:
        while process.poll() is None and not (records.exists() and records.stat().st_size):
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (records.parent / "packed.json").exists()
    pack(source, tmp_path / "out")
    pack(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_full_disk_is_one_line_and_can_be_resumed(source, tmp_path, monkeypatch):
    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left on device; the same"):
        patch.setattr(files, "to_disk", full)
        pack(source, tmp_path / "out")
    assert pack(source, tmp_path / "out").fresh


def test_a_disk_that_does_not_keep_what_was_written_is_noticed(source, tmp_path, monkeypatch):
    """A byte changes between writing and reading back: no index; the next run repairs it."""
    pack(source, tmp_path / "straight")
    read_back = conversion._read_back

    def spoilt(path, *arguments):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        return read_back(path, *arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match="does not read back as it was written"),
    ):
        patch.setattr(conversion, "_read_back", spoilt)
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out" / "birds" / "packed.json").exists()
    pack(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_complete_source_is_left_alone(source, packed, tmp_path, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in packed.iterdir()}
    (source / "0.tfrecords").unlink()  # not even looked at
    monkeypatch.setattr(RecordStore, "encoded", None)
    again = pack(source, tmp_path / "out")
    assert not again.fresh and (again.classes, again.images) == (4, 11)
    assert {file: file.stat().st_mtime_ns for file in packed.iterdir()} == before


def test_a_source_that_changed_meanwhile_is_not_mixed(source, tmp_path):
    spoil(source, 3, 0, "picture")
    with pytest.raises(DamagedRecord):
        pack(source, tmp_path / "out")
    write_source(source, (2, 1, 1), [3, 4, 2, 3])
    with pytest.raises(
        InputError, match=r"unfinished\.jsonl: the copy was begun from another source, or this"
    ):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize("journal", ["not JSON\n", "{}\n", "[]\n[]\n", '{}\n{"left_out": "x"}\n', "\xff\n"])
def test_a_journal_of_somebody_else_is_refused(source, tmp_path, journal):
    (tmp_path / "out" / "birds").mkdir(parents=True)
    (tmp_path / "out" / "birds" / "unfinished.jsonl").write_bytes(journal.encode("latin-1"))
    with pytest.raises(InputError, match=r"unfinished\.jsonl: .* to start anew"):
        pack(source, tmp_path / "out")


# --- where it may go ---------------------------------------------------------------------------------------


def test_the_copy_may_not_lie_in_a_source_or_in_the_way(source, tmp_path):
    for out in (source, source / "deeper", source.parent, source.parent.parent / "data" / ".." / "data"):
        with pytest.raises(InputError, match=r"--out: .* lies inside the source"):
            pack(source, out)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(InputError, match="lies inside the source"):
        pack(source, tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        pack(source, tmp_path / "loop")
    (tmp_path / "full" / "birds").mkdir(parents=True)
    (tmp_path / "full" / "birds" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds 'thesis\.tex' and is no packed source"):
        pack(source, tmp_path / "full")
    with pytest.raises(InputError, match="cannot be used as a directory"):
        pack(source, source.parent.parent / "full" / "birds" / "thesis.tex")
    assert sorted(file.name for file in source.iterdir()) == [
        *(f"{i}.tfrecords" for i in range(4)),
        "dataset_spec.json",
    ]


def test_too_little_room_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    """What the copy takes is known within a few per cent; what lies there already counts as room."""
    size = sum(file.stat().st_size for file in pack(source, tmp_path / "straight").directory.iterdir())
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage(10**9, 0, size // 2))
    with pytest.raises(InputError, match=r"--out: .* MB are free, about .* MB are needed"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: usage(10**9, 0, size))
    pack(source, tmp_path / "out")


def command(monkeypatch, capsys, *arguments):
    """Run the command here: its exit code and what it says."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(conversion.main)
    return ended.value.code or 0, capsys.readouterr()


def test_the_command_says_what_it_did(source, tmp_path, monkeypatch, capsys):
    spoil(source, 0, 0, "picture")
    options = [source.parent, "birds", "--out", tmp_path / "out"]
    code, said = command(monkeypatch, capsys, *options)
    assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
    code, said = command(monkeypatch, capsys, *options, "--skip-bad-records")
    assert code == 0 and "birds: packed and verified: 4 classes, 10 images" in said.out
    assert "birds: left out: " in said.err
    code, said = command(monkeypatch, capsys, *options)
    assert code == 0 and "birds: already complete, left alone: 4 classes, 10 images" in said.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere", "birds", "--out", "out"], "nowhere: no such directory"),
        (["{data}", "bird", "--out", "out"], "did you mean 'birds'?"),
        (["{data}", "birds"], "required: --out"),
        (["{data}", "birds", "--out", "out", "--skip"], ""),
        (["{data}", "birds", "--out", "out", "--force"], "unrecognized arguments: --force"),
    ],
)
def test_a_wrong_command_line_is_one_line(source, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(data=source.parent) for argument in arguments]
    code, said = command(monkeypatch, capsys, *arguments)
    if line:
        assert code == 2 and line in said.err and said.err.count("\n") == 1
