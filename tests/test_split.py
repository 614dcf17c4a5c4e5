"""The program that divides classes of one's own among TRAIN, VALID and TEST."""

import sys

import pytest
from conftest import write_classes

import meta_dataset_readers.split as splitting
from meta_dataset_readers.errors import exit_on_bad_input
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.split import divide

EVEN = {"TRAIN": 0.6, "VALID": 0.2, "TEST": 0.2}

# Number of classes, ways, shares: the classes of TRAIN, VALID and TEST.
DIVIDED = {
    "by the shares": (100, 5, EVEN, (60, 20, 20)),
    "enough for all": (15, 5, EVEN, (5, 5, 5)),
    "shares give way": (20, 5, EVEN, (10, 5, 5)),
    "too few for VALID": (12, 5, EVEN, (5, 2, 5)),
    "too few for TRAIN": (7, 5, EVEN, (2, 0, 5)),
    "no validation": (10, 5, {"TRAIN": 1, "VALID": 0, "TEST": 1}, (5, 0, 5)),
    "test only": (4, 5, {"TRAIN": 0, "VALID": 0, "TEST": 1}, (0, 0, 4)),
}


@pytest.mark.parametrize(("n", "ways", "shares", "sizes"), DIVIDED.values(), ids=DIVIDED)
def test_every_class_goes_to_one_split(n, ways, shares, sizes):
    classes = [f"c{i:03d}" for i in range(n)]
    divided = divide(classes, shares, ways, seed=1)
    assert tuple(len(divided[split]) for split in ("TRAIN", "VALID", "TEST")) == sizes
    assert sorted(name for names in divided.values() for name in names) == classes
    assert divided == divide(classes, shares, ways, seed=1)


def test_the_seed_decides():
    classes = [f"c{i}" for i in range(30)]
    assert divide(classes, EVEN, 5, 0) != divide(classes, EVEN, 5, 1)


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["split", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(splitting.main)
    said = capsys.readouterr()
    return ended.value.code or 0, said.out + said.err


def test_the_source_is_then_read_by_its_splits(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "own", **{f"c{i}": 2 for i in range(8)})
    code, said = run(monkeypatch, capsys, tmp_path / "own", "--ways", "2")
    assert code == 0 and "4 TRAIN, 2 VALID, 2 TEST" in said
    spec = open_source(tmp_path, "own").spec
    assert [len(spec.classes(split)) for split in ("TRAIN", "VALID", "TEST")] == [4, 2, 2]
    before = (tmp_path / "own" / "splits.json").read_bytes()
    code, said = run(monkeypatch, capsys, tmp_path / "own", "--seed", "3")
    assert code == 2 and "--overwrite" in said
    code, said = run(monkeypatch, capsys, tmp_path / "own", "--seed", "3", "--overwrite")
    assert code == 0 and "VALID has too few classes for episodes of 5 ways" in said
    assert (tmp_path / "own" / "splits.json").read_bytes() != before


REFUSED = {
    "no folder": (["nowhere"], "nowhere: cannot be listed"),
    "no shares": (["own", "--train", "0", "--valid", "0", "--test", "0"], "expected a share above 0"),
    "one way": (["own", "--ways", "1"], "expected an integer of at least 2"),
    "divided already": (["splits"], "its classes are divided already: split folders"),
    "empty class": (["empty"], "empty/a: no picture in this class folder"),
}


@pytest.mark.parametrize(("arguments", "complaint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_divided_is_refused(arguments, complaint, tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "own", a=1, b=1)
    write_classes(tmp_path / "empty", a=0, b=1)
    write_classes(tmp_path / "splits" / "train", a=1)
    monkeypatch.chdir(tmp_path)
    code, said = run(monkeypatch, capsys, *arguments)
    assert code == 2 and complaint in said and said.count("\n") == 1
