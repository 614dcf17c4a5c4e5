"""The AutoLoRa demo at toy size: it makes what it says, goes on where it was, and shows what was chosen."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from amt.cli import autolora
from amt.evaluation import runs
from amt.files.checkpoint import HEADER
from meta_dataset_readers.mini.sources import build
from studies import autolora_demo
from studies.autolora_demo import (
    CHOICES,
    COLUMNS,
    MORE_ROWS,
    ROWS,
    Demo,
    Finished,
    demonstrate,
    markdown,
    write_folders,
)

ROW = "AutoLoRa"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    root = tmp_path_factory.mktemp("a demo")  # with a space, as a user's folder may have one
    return Demo(
        root / "data",
        root / "out",
        surfaces=(4, 1),
        digits=(6, 2),
        seeds=(1, 2),
        rows={ROW: ROWS[ROW]},
        more="--epochs 2 --batch_size 8 --num_steps_train 1",
    )


def test_the_demo_runs_and_a_second_time_shows_what_is_there(demo, capfd, monkeypatch):
    """In two processes; the table, the page and the books of every command. Then no process is started, and
    the table is the same."""
    demonstrate(demo)
    first = capfd.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", None)
        demonstrate(demo)
    again = capfd.readouterr().out
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table and table == [line for line in again.splitlines() if line.startswith("|")]
    assert f"{ROW}, seed 1: rate 0.1" in first and f"{ROW}, seed 2: " in first and "lambda2" in first
    assert "autolora_seed1/AFF/test" in (demo.out / "report.html").read_text()
    assert {path.name for path in (demo.data / "digits" / "train").iterdir()} == set(build("digits").classes)
    for name in ("pretrained", "autolora_seed1", "autolora_seed2"):
        about = runs.load(demo.out / name / "AFF" / "test").about
        assert about["command"].startswith("main.py autolora --dataset imagefolder ")
        assert "validation" in (demo.out / f"{name}.log").read_text()
    started = json.loads((demo.out / "autolora_seed1" / "AFF" / "last.json").read_text())
    assert started["protocol"]["start"] is not None and started["protocol"]["seed"] == 1


def test_a_stopped_command_ends_the_demo_with_its_code(demo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(autolora, "main", lambda words: 130)
    with pytest.raises(SystemExit) as ended:
        dataclasses.replace(demo, out=tmp_path).pretrain()
    assert ended.value.code == 130 and "the same command continues" in capsys.readouterr().err


def test_what_was_written_in_part_is_written_again(tmp_path):
    """And gives the same pictures: small ones, of which none is in both splits."""
    source = build("digits")
    (tmp_path / ".partial-digits" / "train").mkdir(parents=True)
    write_folders(tmp_path / "digits", source, 16, 3, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    write_folders(tmp_path / "again", source, 16, 3, 2)
    files = sorted(path.relative_to(tmp_path / "digits") for path in tmp_path.glob("digits/*/*/*.png"))
    assert len(files) == 10 * 5
    pixels = {file: np.asarray(Image.open(tmp_path / "digits" / file)) for file in files}
    assert all(image.shape == (16, 16, 3) for image in pixels.values())
    assert len({image.tobytes() for image in pixels.values()}) == len(pixels)
    for file, image in pixels.items():
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / "again" / file)))


def finished(folder, accuracies, history) -> Finished:
    """A fine-tuning of which only its history is on the disk."""
    folder.mkdir()
    save_file({}, folder / "last.safetensors", {HEADER: json.dumps({"history": history})})
    return type("Known", (Finished,), {"accuracies": lambda self: accuracies})(folder)


def test_the_table_says_what_was_measured_and_chosen(tmp_path):
    """Means with the spread over seeds; learning rates and lambdas as they are in the history."""
    scheduled = [
        {"epoch": 1, "lr": 0.1, "lambda1": 0.9, "lambda2": 0.6, "best": 1},
        {"epoch": 2, "lr": 0.1, "lambda1": 0.5, "lambda2": 3.0, "best": 2},
        {"epoch": 3, "lr": 0.05, "lambda1": 0.1, "lambda2": 5.4, "best": 2},
    ]
    fixed = [{"epoch": 1, "lr": 0.1, "best": 1}, {"epoch": 2, "lr": 0.01, "best": 2}]
    ours = [
        finished(tmp_path / str(seed), {"standard": 80.0 + seed, COLUMNS[1]: 50.0}, scheduled)
        for seed in (1, 2, 3)
    ]
    theirs = finished(tmp_path / "theirs", {"standard": 70.0, COLUMNS[1]: 40.0}, fixed)
    assert markdown({"ours": ours, "theirs": [theirs]}).splitlines()[2:] == [
        "| ours | 82.0 ± 1.0 | 50.0 ± 0.0 | 0.1 to 0.05 | 0.9 to 0.1 | 0.6 to 5.4 | 3 | 3 |",
        "| theirs | 70.0 | 40.0 | 0.1 to 0.01 | 1 | 6 | 2 | 1 |",
    ]
    assert ours[0].chosen() == (
        "rate 0.1, 0.05 from epoch 3; weights of epoch 2 of 3; lambda1 0.90 to 0.10; lambda2 0.60 to 5.40"
    )
    assert theirs.chosen() == "rate 0.1, 0.01 from epoch 2; weights of epoch 2 of 2"


def test_a_rate_is_chosen_on_the_validation_part_for_every_seed(tmp_path):
    """Not on the test pictures; AutoLoRa's rate and the authors' own settings are among the candidates."""
    ((choice, rows),) = CHOICES.items()
    assert set(rows) <= ROWS.keys() | MORE_ROWS.keys() and {"TWINS", "TWINS at 0.003"} <= set(rows)
    assert (
        "--lr 0.003" in MORE_ROWS["TWINS at 0.003"] and "--decreasing_lr 30,50" in MORE_ROWS["TWINS at 0.003"]
    )
    demo = Demo(tmp_path / "data", tmp_path / "out", seeds=(1, 2), rows=dict.fromkeys(rows, ""))
    best = {1: rows[2], 2: rows[0]}
    for row in rows:
        for seed in demo.seeds:
            folder = demo.finished(autolora_demo.name_of(row, seed)).folder
            folder.parent.mkdir(parents=True)
            robust = 30.0 + 5 * (best[seed] == row)
            notes = [{"epoch": 1, "lr": 0.1, "robust": robust, "best": 1}, {"robust": 10.0}]
            finished(folder, {}, notes)
    chosen = demo.found()[choice]
    assert [each.folder.parent.name for each in chosen] == [
        autolora_demo.name_of(best[seed], seed) for seed in demo.seeds
    ]
