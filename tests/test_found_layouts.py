"""Layouts as archives and tools unpack them, and how `check` names what it cannot read or leaves out."""

import json
import os
import sys

import numpy as np
import pytest
from conftest import fails, flat_spec, jpeg, write_classes, write_picture, write_spec
from PIL import Image

import meta_dataset_readers.check as checking
from meta_dataset_readers.bscd import CHESTX_FINDINGS
from meta_dataset_readers.errors import exit_on_bad_input
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.tfrecord import encode_example, write_records


def check(monkeypatch, capsys, *arguments):
    """The exit code of the command, and its lines."""
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments), "--jobs", "1"])
    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(checking.main)
    said = capsys.readouterr()
    return ended.value.code or 0, (said.out + said.err).splitlines()


def splits_named(train, valid, test):
    def make(root):
        for folder, classes in ((train, "ab"), (valid, "cd"), (test, "ef")):
            write_classes(root / "own" / folder, **dict.fromkeys(classes, 2))
        return "own", (2, 2, 2), "split folders"

    return make


def eurosat(root):
    write_classes(root / "EuroSAT" / "EuroSAT_RGB", River=2, Forest=2)
    return "EuroSAT", (0, 0, 2), "BSCD-FSL download"


def chestx(place, labels="Data_Entry_2017.csv"):
    def make(root):
        rows = ["Image Index,Finding Labels"]
        for n, finding in enumerate(CHESTX_FINDINGS):
            write_picture(root / "ChestX" / place.format(n + 1) / f"{n}.png", n)
            rows.append(f"{n}.png,{finding}")
        (root / "ChestX" / labels).write_text("\n".join(rows))
        return "ChestX", (0, 0, 7), "BSCD-FSL download"

    return make


def isic(root):
    outer = "ISIC2018_Task3_Training_Input"
    for n in range(2):
        write_picture(root / "ISIC" / outer / outer / f"p{n}.jpg", n)
    (root / "ISIC" / "ISIC2018_Task3_Training_GroundTruth.csv").write_text("image,A,B\np0,1,0\np1,0,1\n")
    return "ISIC", (0, 0, 2), "BSCD-FSL download"


def wrapped_classes(root):
    write_classes(root / "birds" / "birds" / "images", wren=2, crow=2)
    (root / "birds" / "__MACOSX").mkdir()
    return "birds", (0, 0, 2), "class folders"


def wrapped_records(root):
    directory = write_spec(root / "dtd" / "dtd", flat_spec("dtd", (1, 0, 1), [2, 2]))
    for class_id in range(2):
        payloads = (encode_example(jpeg(class_id, n), class_id) for n in range(2))
        write_records(directory / f"{class_id}.tfrecords", payloads)
    return "dtd", (1, 0, 1), "record files"


FOUND = {
    "valid/": splits_named("train", "valid", "test"),
    "validation/": splits_named("train", "validation", "test"),
    "Train/": splits_named("Train", "Val", "Test"),
    "EuroSAT_RGB": eurosat,
    "ChestX of Kaggle": chestx("images_{:03d}/images"),
    "ChestX in parts": chestx("images_{:03d}"),
    "ChestX in one folder too many": chestx("images/images"),
    "ChestX of 2020": chestx("images", "Data_Entry_2017_v2020.csv"),
    "ISIC in one folder too many": isic,
    "wrapped class folders": wrapped_classes,
    "wrapped record files": wrapped_records,
}


@pytest.mark.parametrize("make", FOUND.values(), ids=FOUND)
def test_a_layout_is_taken_by_what_is_there(make, tmp_path, monkeypatch, capsys):
    name, classes, layout = make(tmp_path)
    source = open_source(tmp_path, name)
    assert tuple(len(source.spec.classes(split)) for split in ("TRAIN", "VALID", "TEST")) == classes
    code, said = check(monkeypatch, capsys, tmp_path)
    assert code == 0 and said[0].startswith(f"{name}: complete") and said[0].endswith(layout)


def test_a_split_in_two_folders_is_refused(tmp_path):
    splits_named("train", "val", "test")(tmp_path)
    write_classes(tmp_path / "own" / "valid", x=1)
    fails("both val/ and valid/ hold classes", lambda: open_source(tmp_path, "own"))


def test_a_source_in_place_of_the_folder_of_sources_is_told(tmp_path, monkeypatch, capsys):
    for name, make in (("mine", lambda at: write_classes(at, cat=2, dog=2)), ("own", None)):
        if make:
            make(tmp_path / name)
        else:
            splits_named("train", "val", "test")(tmp_path)
        code, said = check(monkeypatch, capsys, tmp_path / name)
        assert code == 2 and f"give {tmp_path} as the data path and {name} as the source" in said[0]
        fails(f"as the data path and {name}", lambda name=name: open_source(tmp_path / name, "birds"))


def test_an_archive_is_told_to_be_unpacked(tmp_path):
    (tmp_path / "dtd.tar").write_bytes(b"")
    fails(r"dtd\.tar is still packed: tar -C .* -xf", lambda: open_source(tmp_path, "dtd"))


def test_missing_splits_are_called_by_their_name(tmp_path):
    write_classes(tmp_path / "own", **dict.fromkeys("abcdef", 4))

    def read():
        how = EpisodeSampling(num_ways=2, num_support=1, num_query=1, min_ways=2)
        EpisodeReader(tmp_path, "own", "TRAIN", how, 8, n_episodes=1)

    fails(r"own/splits\.json: split TRAIN has no classes.*readers\.split \S*own writes one", read)


# --- what cannot be read -----------------------------------------------------------------------------------


def link_nowhere(root):
    (root / "gone").symlink_to(root / "nowhere")


def loop(root):
    (root / "gone").symlink_to(root / "gone")


def published_but_empty(root):
    (root / "dtd").mkdir()


def not_utf8(root):
    os.makedirs(os.fsencode(root) + b"/birds/caf\xe9")


def class_link(root):
    write_classes(root / "birds", wren=2)
    (root / "birds" / "crow").symlink_to(root / "nowhere")


def picture_link(root):
    write_classes(root / "birds", wren=2)
    (root / "birds" / "wren" / "9.png").symlink_to("nowhere.png")


def picture_pipe(root):
    write_classes(root / "birds", wren=2)
    os.mkfifo(root / "birds" / "wren" / "9.png")


UNREADABLE = {
    "link that leads nowhere": (link_nowhere, "gone: 1 fault"),
    "link to itself": (loop, "gone: 1 fault"),
    "published name without files": (published_but_empty, "dtd: 1 fault"),
    "name that is not UTF-8": (not_utf8, r"caf\xe9: the name is not UTF-8"),
    "class that leads nowhere": (class_link, "crow: a link that leads nowhere"),
    "picture that leads nowhere": (picture_link, "9.png: a link that leads nowhere"),
    "picture that is a pipe": (picture_pipe, "9.png: is a pipe, expected a regular file"),
}


@pytest.mark.parametrize(("make", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_no_all_clear_where_one_of_two_sources_cannot_be_read(make, said, tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "zoo", cat=2, dog=2)
    make(tmp_path)
    code, lines = check(monkeypatch, capsys, tmp_path)
    assert code == 1
    assert sum(said in line for line in lines) == 1 and any(
        line.startswith("zoo: complete") for line in lines
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_all_clear_where_a_source_may_not_be_listed(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "zoo", cat=2, dog=2)
    write_classes(tmp_path / "closed", cat=2).chmod(0)
    code, lines = check(monkeypatch, capsys, tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert code == 1 and any("Permission denied" in line for line in lines)


def test_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "zoo", cat=2, dog=2)
    for name in ("a.gif", "b.GIF", "c.jfif", "notes"):
        (tmp_path / "zoo" / "cat" / name).write_bytes(b"")
    for tone in (0, 255):
        Image.fromarray(np.full((9, 9, 3), tone, np.uint8)).save(tmp_path / "zoo" / "dog" / f"c{tone}.png")
    (tmp_path / "other").mkdir()
    code, lines = check(monkeypatch, capsys, tmp_path)
    text = "\n".join(lines)
    assert code == 0
    assert "4 files are left out because of their endings: 2 .gif, 1 .jfif, 1 no ending" in text
    assert "2 pictures are constant, all pixels alike, the first is zoo/dog/c0.png" in text
    assert "other: passed over, in no known layout" in text


# --- lists of another system -------------------------------------------------------------------------------

PREFIXES = {
    "of Windows": ("D:\\data\\birds\\images\\{}.png", "D:\\data\\birds\\images"),
    "in other case": ("D:\\Data\\birds\\images\\{}.png", "d:\\data\\birds\\images"),
    "with slashes": ("D:/data/birds/images/{}.png", "D:\\data\\birds\\images\\"),
    "of a share": ("\\\\server\\birds\\{}.png", "\\\\server\\birds"),
    "relative": ("birds\\{}.png", "birds"),
    "of Unix": ("/data/birds/{}.png", "/data/birds/"),
}


@pytest.mark.parametrize(("path", "prefix"), PREFIXES.values(), ids=PREFIXES)
def test_paths_of_windows_are_understood(path, prefix, tmp_path):
    for number, file in enumerate(("base", "val", "novel")):
        write_picture(tmp_path / "cub" / "images" / f"{number}.png", number)
        names = [path.format(number)]
        listed = {"label_names": list("abc"), "image_names": names, "image_labels": [number]}
        (tmp_path / "cub" / f"{file}.json").write_text(json.dumps(listed))
    source = open_source(tmp_path, "cub", (prefix, "images"))
    assert not source.store.missing(range(3))
    (tmp_path / "cub" / "images").rename(tmp_path / "cub" / "birds")
    if "birds" in path and "images" not in path:
        assert not open_source(tmp_path, "cub").store.missing(range(3))


# --- digests -----------------------------------------------------------------------------------------------


def rewrite(root):
    write_picture(root / "zoo" / "cat" / "0.png", 77)


def remove(root):
    (root / "zoo" / "cat" / "0.png").unlink()


def add(root):
    write_picture(root / "zoo" / "cat" / "5.png", 5)


def lose_a_source(root):
    (root / "own").rename(root / ".own")


CHANGES = {
    "changed": (rewrite, "zoo/cat/0.png: has changed"),
    "missing": (remove, "zoo/cat/0.png: is missing"),
    "new": (add, "zoo/cat/5.png: is new"),
    "lost": (lose_a_source, "own: is missing"),
}


@pytest.mark.parametrize(("change", "line"), CHANGES.values(), ids=CHANGES)
def test_digests_are_written_and_tell_what_changed(change, line, tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "data" / "zoo", cat=2, dog=2)
    write_classes(tmp_path / "data" / "own", **{"a\\b": 2})
    where = (tmp_path / "data", "--sums", tmp_path / "sums")
    code, said = check(monkeypatch, capsys, *where)
    assert code == 0 and said[-1] == f"wrote {tmp_path / 'sums'}: digests of 6 files"
    assert check(monkeypatch, capsys, *where)[0] == 0
    change(tmp_path / "data")
    code, said = check(monkeypatch, capsys, *where)
    assert code == 1 and any(line in each for each in said)


def test_no_digests_of_a_source_at_fault_and_no_other_file_for_a_list(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "data" / "zoo", cat=2)
    (tmp_path / "data" / "zoo" / "cat" / "0.png").write_bytes(b"broken")
    code, said = check(monkeypatch, capsys, tmp_path / "data", "--sums", tmp_path / "sums")
    assert code == 1 and "is not written" in said[-1] and not (tmp_path / "sums").exists()
    (tmp_path / "sums").write_text("hello\n")
    code, said = check(monkeypatch, capsys, tmp_path / "data", "--sums", tmp_path / "sums")
    assert code == 2 and "line 1: expected a SHA-256 digest" in said[0]
