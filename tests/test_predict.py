"""The command predict: own pictures in, classes and verdicts out; faults are one line each."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Ended, called, process
from PIL import Image
from test_foreign_files import KINDS, endless, loop, pipe
from test_lazy_imports import HEAVY, loaded
from toy_photos import photo, write_photos

from amt.__main__ import main as amt
from amt.few_shot.classifier import FewShotClassifier

pytestmark = pytest.mark.usefixtures("one_thread", "box")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


IRREGULAR = {make: KINDS[make] for make in (pipe, endless, loop)} | {dangling: "no such file"}
QUICK = ("--attack", "pgd", "steps=3", "--device", "cpu")


def predict(*flags) -> Ended:
    return called(amt, ["amt", "predict", *flags])


def answers(photos: Path, *flags) -> list[str]:
    """The lines about images, of a command that ends well."""
    ended = predict("vit_mini_pool", "--support", photos / "support", *flags, *QUICK)
    assert ended.code == 0, ended.err
    return [line for line in ended.out.splitlines() if "next" in line]


def test_a_process_answers_files_and_folders(photos, tmp_path):
    """As a user starts it: JPEG and PNG, a folder of images, answers on stdout and in a CSV."""
    photo("dog", 20, 90, 70).save(tmp_path / "large.jpg")
    pool, out = photos / "vit_mini_pool.safetensors", tmp_path / "answers.csv"
    words = [pool, "--support", photos / "support", photos / "new", "large.jpg", "--out", out]
    ended = process("-m", "amt", "predict", *words, "--epsilon", 0.01, 255, *QUICK, cwd=tmp_path)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "classes, and how many examples: cat (4), dog (4)"
    assert re.fullmatch(r"adapters merged: 0\.\d+ for 8/255, 0\.\d+ for 0\.1/255", lines[1])
    assert re.fullmatch(r"large\.jpg: dog \d+\.\d%, next cat \d+\.\d%; stands up to 0\.01/255", lines[-2])
    assert lines[-1] == f"wrote {out}"
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["class"] for row in rows] == ["cat", "dog", "dog"]
    assert [Path(row["image"]).name for row in rows] == ["1.png", "2.png", "large.jpg"]
    for row in rows:
        assert float(row["p(cat)"]) + float(row["p(dog)"]) == pytest.approx(1)
        assert row["next_class"] != row["class"] and float(row["stands_up_to"]) == 0.01
        assert row["adapters"] == lines[1].partition(": ")[2]


def test_answers_are_those_of_the_library(photos, tmp_path):
    out = tmp_path / "answers.json"
    answers(photos, photos / "new", "--epsilon", 1, 2, 4, "--out", out, "--seed", 3, "--blend_beta", 5)
    found = json.loads(out.read_text())
    clf = FewShotClassifier("vit_mini_pool", seed=3, beta=5).fit(photos / "support")
    shown = [list(each["probabilities"].values()) for each in found["answers"]]
    np.testing.assert_allclose(shown, clf.predict_proba(photos / "new"), rtol=1e-5)
    assert [each["class"] for each in found["answers"]] == clf.predict(photos / "new").tolist()
    until = clf.robustness(photos / "new", (1, 2, 4), attack="pgd steps=3").tolist()
    assert [each["stands_up_to"] for each in found["answers"]] == until
    assert found["coefficients"] == clf.coefficients_.tolist() and found["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("epsilon", "ending"),
    [
        ((0.01,), "; stands up to 0.01/255, the largest tried"),
        ((255,), "; falls at 255/255"),
        ((), "%"),
        ((0,), "%"),
    ],
)
def test_verdicts_in_words(photos, epsilon, ending):
    (line,) = answers(photos, photos / "new" / "1.png", "--epsilon", *epsilon)
    assert line.endswith(ending)


def test_a_saved_task_answers_without_support(photos, tmp_path):
    task = tmp_path / "task.safetensors"
    with_support = answers(photos, photos / "new", "--save", task)
    ended = predict(task, photos / "new", *QUICK)
    assert [line for line in ended.out.splitlines() if "next" in line] == with_support
    alone = predict(
        "vit_mini_pool", "--support", photos / "support", "--save_task", tmp_path / "two.safetensors"
    )
    assert alone.code == 0 and (tmp_path / "two.json").exists()


def test_unreadable_pictures_are_a_line_each_and_the_others_go_on(photos, tmp_path):
    """What is said of the sound ones does not depend on them."""
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGBA", (20, 20)).save(tmp_path / "b.png")
    photo("cat", 1).save(tmp_path / "whole.jpg")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    for name in ("1.png", "2.png"):
        shutil.copy(photos / "new" / name, tmp_path / f"z{name}")
    ended = predict("vit_mini_pool", "--support", photos / "support", tmp_path, "--epsilon", *QUICK)
    assert ended.code == 1
    errors = ended.err.splitlines()
    assert [re.match(r"error: .*/(\w\.\w+): ", line)[1] for line in errors[:3]] == ["a.png", "b.png", "c.jpg"]
    assert errors[3:] == ["3 of 6 images could not be read"]
    assert [line.split()[1] for line in ended.out.splitlines() if "next" in line] == ["cat", "cat", "dog"]


@pytest.mark.parametrize("make", IRREGULAR, ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_passed_over(photos, tmp_path, make):
    """Among pictures it is told like an unreadable one; in the support it ends the command."""
    shutil.copytree(photos / "new", tmp_path / "new")
    make(tmp_path / "new" / "a.png")
    ended = predict("vit_mini_pool", "--support", photos / "support", tmp_path / "new", "--epsilon", *QUICK)
    assert ended.code == 1 and len([line for line in ended.out.splitlines() if "next" in line]) == 2
    assert re.search(rf"a\.png: {IRREGULAR[make]}\n1 of 3 images could not be read", ended.err), ended.err
    shutil.copytree(photos / "support", tmp_path / "support")
    make(tmp_path / "support" / "cat" / "9.png")
    ended = predict("vit_mini_pool", "--support", tmp_path / "support", photos / "new", *QUICK)
    assert ended.code == 2 and re.search(rf"^error: .*9\.png: {IRREGULAR[make]}\n$", ended.err), ended.err


def test_one_example_works_and_is_said(photos, tmp_path):
    support = write_photos(tmp_path / "few", ("cat", "dog"), 1)
    photo("cat", 5, 300, 200).save(support / "cat" / "of another size.jpg")
    ended = predict("vit_mini_pool", "--support", support, photos / "new", "--epsilon", *QUICK)
    assert ended.code == 0
    assert "note: one example only of dog; more make better answers" in ended.out
    assert [line.split()[1] for line in ended.out.splitlines() if "next" in line] == ["cat", "dog"]


def test_names_have_no_power_over_the_terminal(photos, tmp_path):
    support = tmp_path / "names"
    shutil.copytree(photos / "support", support)
    (support / "cat").rename(support / "c\x1b[31mat")
    shutil.copy(photos / "new" / "1.png", tmp_path / "i\x1b[2J.png")
    ended = predict("vit_mini_pool", "--support", support, tmp_path / "i\x1b[2J.png", "--epsilon", *QUICK)
    assert ended.code == 0 and "\x1b" not in ended.out + ended.err
    assert r"i\x1b[2J.png: c\x1b[31mat" in ended.out


@pytest.fixture
def faulty(photos, tmp_path, monkeypatch) -> Path:
    """A folder in which everything is that the faults below need."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos / "support", tmp_path / "support")
    shutil.copytree(photos / "new", tmp_path / "new")
    shutil.copytree(photos / "support", tmp_path / "deep" / "one")
    shutil.copytree(photos / "support" / "cat", tmp_path / "single" / "cat")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    shutil.copytree(photos / "support", tmp_path / "damaged", dirs_exist_ok=True)
    (tmp_path / "damaged" / "cat" / "0.png").write_bytes(b"no picture")
    shutil.copytree(photos / "support", tmp_path / "clear")
    Image.new("RGBA", (9, 9)).save(tmp_path / "clear" / "cat" / "0.png")
    (tmp_path / "page.safetensors").write_text("<html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    content = (photos / "vit_mini_pool.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    return tmp_path


FAULTS = {
    "no such pool": (("vit_mini_poll", "new"), "did you mean 'vit_mini_pool'"),
    "no such file": (("no/pool.safetensors", "new"), "no such file or folder"),
    "a page for a pool": (("page.safetensors", "--support", "support", "new"), "page.safetensors"),
    "an empty file": (("empty.safetensors", "new"), "empty.safetensors: the file is empty"),
    "a page without support": (("page.safetensors", "new"), "page.safetensors"),
    "half a pool": (("half.safetensors", "new"), "half.safetensors: truncated or damaged"),
    "no support": (
        ("vit_mini_pool", "new"),
        "give --support FOLDER with one folder of image files per class",
    ),
    "support not there": (("vit_mini_pool", "--support", "nowhere", "new"), "nowhere"),
    "support a class": (("vit_mini_pool", "--support", "support/cat", "new"), "give the folder above: "),
    "support too high": (("vit_mini_pool", "--support", "deep", "new"), "but folders with pictures"),
    "support empty": (("vit_mini_pool", "--support", "empty", "new"), "no folder in it"),
    "one class": (("vit_mini_pool", "--support", "single", "new"), "--support single: one class, 'cat'"),
    "damaged support": (("vit_mini_pool", "--support", "damaged", "new"), "cat/0.png: the image of 10 bytes"),
    "alpha-only support": (("vit_mini_pool", "--support", "clear", "new"), "cat/0.png: it is transparent"),
    "no images": (("vit_mini_pool", "--support", "support"), "no IMAGES"),
    "empty folder": (("vit_mini_pool", "--support", "support", "empty"), "empty: no picture in it"),
    "classes as images": (("vit_mini_pool", "--support", "support", "support"), "such as 'cat'"),
    "another ending": (("vit_mini_pool", "--support", "support", "new", "--out", "a.txt"), ".csv or .json"),
    "no place": (("vit_mini_pool", "--support", "support", "new", "--save", "new.pt"), ".safetensors"),
    "decreasing": (("vit_mini_pool", "--support", "support", "new", "--epsilon", 4, 2), "increasing"),
    "no attack": (("vit_mini_pool", "--support", "support", "new", "--attack", "pdg"), "pgd"),
    "of the support": (
        ("vit_mini_pool", "--support", "support", "new", "--attack", "support"),
        "single image",
    ),
    "two betas": (("vit_mini_pool", "--support", "support", "new", "--blend_beta", 1, 2), "2 values"),
    "no device": (("vit_mini_pool", "--support", "support", "new", "--device", "cuda:77"), "cuda:77"),
    "shares": (("vit_mini_pool", "--support", "support", "new", "--coefficients", 1, 1), "coefficients"),
    "share too many": (
        ("vit_mini_pool", "--support", "support", "new", "--coefficients", 1, 0, 0),
        "--coefficients has 3 values",
    ),
    "trimmed nothing": (
        ("vit_mini_pool", "--support", "support", "new", "--trim", "nonsense:-1:0.5"),
        "--trim nonsense:-1:0.5: no such layer",
    ),
    "too small": (("vit_mini_pool", "--support", "support", "new", "--image_size", 2), "at least a patch"),
}


@pytest.mark.parametrize(("flags", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line(faulty, flags, message):
    before = set(os.listdir(faulty))
    ended = predict(*flags)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", ended.err) and message in ended.err, ended.err
    assert set(os.listdir(faulty)) == before


def test_a_picture_alone_that_cannot_be_read_is_bad_input(faulty):
    ended = predict("vit_mini_pool", "--support", "support", "damaged/cat/0.png", "nowhere.png", *QUICK)
    assert ended.code == 2
    assert ended.err.count("error: ") == 2 and "nowhere.png: no such file" in ended.err


@pytest.mark.parametrize(
    "flags", [["--help"], ["pool", "--epsilon", "much"], ["pool"], ["pool", "x", "--out", "a.txt"]]
)
def test_help_and_mistyped_flags_do_not_wait_for_torch(flags):
    ending = "except SystemExit: pass"
    run = "runpy.run_module('amt', run_name='__main__')"
    found = loaded(f"import runpy\nsys.argv = {['amt', 'predict', *flags]!r}\ntry: {run}\n{ending}")
    assert not found & HEAVY


def test_a_saved_task_takes_no_support(photos, tmp_path):
    task = tmp_path / "task.safetensors"
    answers(photos, photos / "new", "--epsilon", "--save", task)
    ended = predict(task, "--support", photos / "support", photos / "new")
    assert ended.code == 2 and "is a saved task" in ended.err
