"""The judges of `make torture` can fail: each kind of end is told from the others."""

import random
import re
from pathlib import Path

import pytest
import torture_fuzz
import torture_kills
from commands import ROOT

from meta_dataset_readers.errors import InputError


def raising(error: Exception):
    def read(_folder: Path) -> object:
        raise error

    return read


def hanging(_folder: Path) -> object:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "end"),
    [
        (lambda _: 5, "harmless"),
        (lambda _: 6, "silently used"),
        (raising(InputError("x: damaged")), "refused"),
        (raising(InputError("x: damaged\nand more")), "crashed"),
        (raising(KeyError("x")), "crashed"),
        (hanging, "hung"),
    ],
)
def test_every_end_is_told(tmp_path, monkeypatch, read, end):
    monkeypatch.setattr(torture_fuzz, "PATIENCE", 1)
    assert torture_fuzz.outcome(read, tmp_path, 5) == end


def test_damages_are_damages_and_can_be_repeated():
    content = bytes(range(200))
    made = [torture_fuzz.damaged(content, random.Random(seed)) for seed in range(50)]
    assert made == [torture_fuzz.damaged(content, random.Random(seed)) for seed in range(50)]
    assert content not in made and {len(one) == 200 for one in made} == {True, False}


@pytest.mark.parametrize("name", torture_fuzz.FORMATS)
def test_every_format_is_tried(name):
    ends = list(torture_fuzz.run_cases(name, 0, 4, seed=1))
    assert len(ends) == 4 and set(ends) <= set(torture_fuzz.ENDS) - {"crashed", "hung"}
    assert "silently used" not in ends or not torture_fuzz.FORMATS[name].checked


def test_progress_lines_and_rows_are_read(tmp_path):
    (tmp_path / "log").write_text(
        "train:  25%|##  | 3/12 [00:01<00:02]\rtrain: 50%|#| 6/12 [00:02]\n1/2 not\n"
    )
    assert torture_kills.shown(tmp_path / "log") == [3, 6]
    (tmp_path / "rows.jsonl").write_text('{"clean": 1, "seconds": 3}\n{"clean": 0, "seconds": 4}\n')
    assert torture_kills.rows(tmp_path / "rows.jsonl") == [{"clean": 1}, {"clean": 0}]


def test_the_target_calls_it():
    recipe = re.search(r"^torture:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and recipe[1] == "$(PY) tests/torture.py --kills $(KILLS) --fuzz $(FUZZ)"
