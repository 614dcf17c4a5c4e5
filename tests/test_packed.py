"""The packed layout and the command that makes it: nothing is lost, whatever interrupts it; no damage to a
packed source is taken for data."""

import collections
import contextlib
import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPLITS, flat_spec, jpeg, write_classes, write_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import meta_dataset_readers.convert as conversion
from meta_dataset_readers import files
from meta_dataset_readers.convert import convert
from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError, exit_on_bad_input
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.packed import open_packed
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.spec import DatasetSpec, load_spec
from meta_dataset_readers.store import ImageStore, RecordStore, Source
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records

ROOT = Path(__file__).resolve().parent.parent


def png(class_id: int, record: int) -> bytes:
    encoded = io.BytesIO()
    noise = np.random.default_rng([7, class_id, record]).integers(0, 256, (9, 11), dtype=np.uint8)
    Image.fromarray(noise).save(encoded, "PNG")
    return encoded.getvalue()


def write_source(directory: Path, splits, images, picture=jpeg) -> Path:
    """A flat source in Meta-Dataset's layout; `picture(class_id, record)` gives the bytes of its pictures."""
    write_spec(directory, flat_spec(directory.name, splits, images))
    for class_id, n in enumerate(images):
        payloads = (encode_example(picture(class_id, record), class_id) for record in range(n))
        write_records(directory / f"{class_id}.tfrecords", payloads)
    return directory


def opened(directory: Path, store=RecordStore) -> Source:
    return Source(load_spec(directory), store(directory, directory.name))


def pack(directory: Path, out: Path, **options):
    """Convert one source; its packed directory and what was said about it."""
    ((name, packed),) = convert({directory.name: opened(directory)}, out, **options)
    assert (name, packed.directory) == (directory.name, out / name)
    return packed


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def pictures(source: Source) -> list[list[bytes]]:
    """The encoded pictures of every class."""
    n_classes = len(source.spec.images_per_class)
    return [
        [source.store.encoded(class_id, index) for index in range(source.store.count(class_id))]
        for class_id in range(n_classes)
    ]


@pytest.fixture
def source(tmp_path):
    """A source of three splits, one class with a single picture."""
    return write_source(tmp_path / "data" / "birds", (2, 1, 1), [3, 4, 1, 3])


@pytest.fixture
def packed(source, tmp_path):
    return pack(source, tmp_path / "out").directory


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return pack(write_source(folder / "data" / "birds", (2, 1, 1), [3, 4, 1, 3]), folder / "out").directory


@pytest.fixture(scope="module", autouse=True)
def memory_is_enough():
    """SIGKILL leaves what was flushed, also what is not on disk yet, and waiting for the disk takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        yield


# --- what is packed is what was there ----------------------------------------------------------------------


@settings(max_examples=25)
@given(
    splits=st.tuples(*[st.integers(0, 2)] * 3),
    counts=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    picture=st.sampled_from([jpeg, png]),
)
def test_any_small_source_packs_and_reads_back_equal(splits, counts, picture):
    """Bytes, pixels, counts, specification, order; also from a pickled store and by a scan of the framing."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_source(Path(folder, "data", "any"), splits, counts[: sum(splits)], picture)
        original, packed = opened(directory), pack(directory, Path(folder, "out")).directory
        copy = open_packed(packed, "any")
        assert copy.spec.images_per_class == original.spec.images_per_class
        assert copy.spec.split_classes == original.spec.split_classes
        assert (packed / "dataset_spec.json").read_bytes() == (directory / "dataset_spec.json").read_bytes()
        assert pictures(copy) == pictures(original)
        store = pickle.loads(pickle.dumps(copy.store))
        for split in SPLITS:
            classes = copy.spec.classes(split)
            scanned = open_records(packed / f"{split}.tfrecords") if classes else []
            labels = [scanned.read_example(record)[1] for record in range(len(scanned))]
            assert labels == [class_id for class_id in classes for _ in range(counts[class_id])]
            for class_id in classes:
                for index in range(counts[class_id]):
                    assert np.array_equal(store.read(class_id, index), original.store.read(class_id, index))
                    assert picture(class_id, index) == store.encoded(class_id, index)


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_hierarchies_keep_their_specification(tiny_source, tmp_path, kind):
    directory = tiny_source(kind, n_images=2)
    packed = pack(directory, tmp_path / "out").directory
    spec, copy = load_spec(directory), open_packed(packed, "tiny").spec
    assert (copy.ontology, copy.groups, copy.class_names) == (spec.ontology, spec.groups, spec.class_names)
    assert (packed / "dataset_spec.json").read_bytes() == (directory / "dataset_spec.json").read_bytes()


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_episodes_are_those_of_the_original(tiny_source, tmp_path, kind):
    """To the bit; only the origin of the images tells the difference."""
    directory = tiny_source(kind)
    pack(directory, tmp_path / "out")
    roots, sampling = (directory.parent, tmp_path / "out"), EpisodeSampling(max_num_query=2)
    one, other = (EpisodeReader(root, "tiny", "TEST", sampling, 16, n_episodes=3) for root in roots)
    for index in range(3):
        assert torch.equal(one[index].support, other[index].support)
        assert torch.equal(one[index].query, other[index].query)
        assert one[index].class_ids == other[index].class_ids
        assert {origin.file for origin in other[index].query_origin} == {"tiny/TEST.tfrecords"}


class PixelStore(ImageStore):
    """A layout without encoded pictures: arrays by class."""

    def __init__(self, arrays):
        self.arrays = arrays

    def count(self, class_id):
        return len(self.arrays[class_id])

    def image(self, class_id, index):
        return Image.fromarray(self.arrays[class_id][index])

    def origin(self, class_id, index):
        return ImageOrigin("pixels/array", index)

    def place(self, class_id):
        return Path("pixels")

    def missing(self, class_ids):
        return []


def pixel_source(directory: Path) -> Source:
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = [[rng.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(n)] for n in (2, 3)]
    splits = {"TRAIN": range(0), "VALID": range(0, 1), "TEST": range(1, 2)}
    return Source(
        DatasetSpec("pixels", directory, splits, (2, 3), ("a/b", "ü")), PixelStore(arrays), "square"
    )


def test_a_layout_without_picture_files_or_specification_is_packed_without_loss(tmp_path):
    """PNG keeps the pixels; a flat specification is made from the classes; the resize rule is kept."""
    original = pixel_source(tmp_path / "data" / "pixels")
    list(convert({"pixels": original}, tmp_path / "out"))
    copy = open_packed(tmp_path / "out" / "pixels", "pixels")
    assert copy.resize == "square"
    assert copy.spec == DatasetSpec(**vars(original.spec) | {"directory": tmp_path / "out" / "pixels"})
    for class_id, arrays in enumerate(original.store.arrays):
        assert copy.store.count(class_id) == len(arrays)
        for index, array in enumerate(arrays):
            assert np.array_equal(copy.store.read(class_id, index), array)


def test_origin_and_place_name_the_packed_file(packed):
    store = open_packed(packed, "birds").store
    assert store.origin(1, 0) == ImageOrigin("birds/TRAIN.tfrecords", 3)
    assert store.origin(3, 2) == ImageOrigin("birds/TEST.tfrecords", 2)
    assert store.place(2) == packed / "VALID.tfrecords"
    with pytest.raises(IndexError):
        store.image(0, 3)
    with pytest.raises(IndexError):
        store.image(0, -1)


def test_the_originals_are_not_touched(source, tmp_path):
    before = contents(source)
    times = {file: file.stat().st_mtime_ns for file in [source, *source.iterdir()]}
    pack(source, tmp_path / "out")
    assert contents(source) == before
    assert {file: file.stat().st_mtime_ns for file in [source, *source.iterdir()]} == times


def test_the_index_says_where_it_came_from_and_what_it_holds(packed, source):
    index = json.loads((packed / "packed.json").read_text())
    assert (index["format"], index["source"], index["origin"]) == (1, "birds", str(source.resolve()))
    assert index["images_per_class"] == {"0": 3, "1": 4, "2": 1, "3": 3}
    for split, records in (("TRAIN", 7), ("VALID", 1), ("TEST", 3)):
        assert index["splits"][split]["records"] == records
        assert index["splits"][split]["bytes"] == (packed / f"{split}.tfrecords").stat().st_size
    assert not list(packed.glob("unfinished*")) and not list(packed.glob(".*.part"))


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


# --- damage to a packed source -----------------------------------------------------------------------------


def read_all(directory: Path) -> dict[tuple[int, int], bytes]:
    """What can be read of the pictures; damage is passed over."""
    source = open_packed(directory, "birds")
    found = {}
    for class_id, count in enumerate(source.spec.images_per_class):
        for index in range(count):
            with contextlib.suppress(InputError):
                found[class_id, index] = source.store.encoded(class_id, index)
    return found


@settings(max_examples=60)
@given(data=st.data())
def test_no_changed_byte_gives_a_wrong_picture(packed_once, data):
    """One byte of any file is changed, or its end cut off: pictures are right or refused, in one line."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(shutil.copytree(packed_once, Path(folder, "birds")))
        sound = read_all(directory)
        file = directory / data.draw(st.sampled_from(sorted(contents(directory))))
        content = bytearray(file.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[position] ^= data.draw(st.integers(1, 255))
        else:
            del content[position:]
        file.write_bytes(content)
        try:
            found = read_all(directory)
        except InputError as error:
            assert str(directory) in str(error) and "\n" not in str(error)
        else:
            assert found.items() <= sound.items()
            if file.suffix == ".tfrecords":
                assert found != sound


def edit_index(directory: Path, change) -> None:
    index = json.loads((directory / "packed.json").read_text())
    change(index)
    (directory / "packed.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=2), "field 'format': found 2, expected 1"),
        (lambda index: index.pop("format"), "field 'format' is missing"),
        (lambda index: index.update(resize="longer"), "field 'resize': 'longer' is unknown"),
        (lambda index: index["images_per_class"].update({"0": 9}), "9 images of class 0, .* claims 3"),
        (lambda index: index["images_per_class"].pop("0"), "3 entries, 4 expected"),
        (lambda index: index["splits"].pop("VALID"), "field 'VALID' is missing"),
        (lambda index: index["splits"]["TEST"].update(records=4), "4 records in TEST, its classes have 3"),
        (lambda index: index["splits"]["TEST"].update(bytes="many"), "field 'bytes': expected an integer"),
        (lambda index: index["splits"].update(EXTRA={}), "unknown key 'EXTRA'"),
        (lambda index: index["offsets_crc32c"].update({"1": -1}), "expected a count, found -1"),
    ],
)
def test_an_index_at_odds_with_itself_is_refused_at_opening(packed, change, message):
    edit_index(packed, change)
    with pytest.raises(InputError, match=rf"packed\.json: .*{message}"):
        open_packed(packed, "birds")


def test_damage_is_named_and_does_not_reach_further(packed):
    """A damaged record leaves its neighbours, wrong offsets leave other classes, a cut file other splits."""
    train = packed / "TRAIN.tfrecords"
    data = bytearray(train.read_bytes())
    offsets = open_records(train).offsets
    data[int(offsets[1])] ^= 1  # the length of record 1
    data[int(offsets[5]) + 40] ^= 1  # the payload of record 5
    train.write_bytes(data)
    store = open_packed(packed, "birds").store
    with pytest.raises(
        DamagedRecord, match=rf"TRAIN\.tfrecords: record 1 at byte {offsets[1]}: wrong length"
    ):
        store.image(0, 1)
    with pytest.raises(DamagedRecord, match=rf"record 5 at byte {offsets[5]}: wrong checksum of the payload"):
        store.image(1, 2)
    store.image(0, 0), store.image(0, 2), store.image(1, 3)

    moved = np.load(packed / "TRAIN.offsets.npy")
    moved[1] += 1
    np.save(packed / "TRAIN.offsets.npy", moved)
    store = open_packed(packed, "birds").store
    with pytest.raises(InputError, match=r"TRAIN\.offsets\.npy: the offsets of class 0 are not those"):
        store.count(0)
    store.image(1, 0)

    os.truncate(train, train.stat().st_size - 1)
    store = open_packed(packed, "birds").store
    with pytest.raises(InputError, match=r"TRAIN\.tfrecords: .* the file is not complete"):
        store.image(1, 0)
    store.image(3, 0)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([Bomb()], dtype=object),
        np.arange(8, dtype=np.int64),
        np.arange(9, dtype=np.uint64),
        np.zeros((8, 1), dtype=np.uint64),
        np.zeros(8, dtype=np.uint64),
    ],
    ids=["pickle", "signed", "long", "two axes", "zeros"],
)
def test_offsets_that_are_something_else_are_refused(packed, tmp_path, monkeypatch, offsets):
    monkeypatch.chdir(tmp_path)
    np.save(packed / "TRAIN.offsets.npy", offsets, allow_pickle=True)
    with pytest.raises(InputError, match=r"TRAIN\.offsets\.npy: "):
        open_packed(packed, "birds").store.count(0)
    assert not Path("exploded").exists()


def test_forged_offsets_cannot_ask_for_more_than_the_file(packed):
    """Checksums of an index can be forged; that offsets rise and stay within the file cannot."""
    offsets = np.load(packed / "TRAIN.offsets.npy")
    offsets[1:7] = [2**63, 5, 2**64 - 1, 0, 7, 1]
    np.save(packed / "TRAIN.offsets.npy", offsets)
    checksums = conversion.class_checksums(offsets, (3, 4))
    edit_index(packed, lambda index: index["offsets_crc32c"].update({"0": checksums[0], "1": checksums[1]}))
    store = open_packed(packed, "birds").store
    for class_id in (0, 1):
        with pytest.raises(InputError, match=rf"the offsets of class {class_id} are not those"):
            store.count(class_id)


def test_opening_looks_at_no_record_and_says_what_is_missing(packed):
    (packed / "VALID.tfrecords").unlink()
    (packed / "TEST.offsets.npy").unlink()
    store = open_packed(packed, "birds").store
    assert store.missing([0, 1]) == []
    assert store.missing([0, 2, 3]) == ["VALID.tfrecords", "TEST.offsets.npy"]
    for class_id, name in ((2, "VALID.tfrecords"), (3, "TEST.offsets.npy")):
        with pytest.raises(InputError, match=rf"{name}: no such file"):
            store.count(class_id)
