"""Tables and pictures of results, and TensorBoard's view of a run."""

import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import DOMAINS, write_run

from amt.evaluation import runs
from amt.evaluation.statistics import Summary
from amt.report.figures import accuracy_picture, mixing_picture
from amt.report.tables import table
from amt.report.tensorboard import write_events
from meta_dataset_readers.errors import InputError

COLUMNS = ["clean", "pgd20@8"]
ROWS = [
    ("signs", [Summary(81.24, 2.46, 60, 78.7, 83.6), Summary(5, 1.05, 60, 4, 6.1)]),
    ("average", [Summary(75.06, 1.5, 180, 73.5, 76.5), Summary(4.98, 0.6, 180, 4.4, 5.6)]),
]


def test_a_table_lines_up_and_is_rounded_to_a_tenth():
    lines = table(COLUMNS, ROWS).splitlines()
    assert [line.split() for line in lines] == [
        ["clean", "pgd20@8", "n"],
        ["signs", "81.2", "+-", "2.5", "5.0", "+-", "1.1", "60"],
        ["average", "75.1", "+-", "1.5", "5.0", "+-", "0.6", "180"],
    ]
    assert len({len(line) for line in lines}) == 1
    for column, cell in zip(COLUMNS, ("81.2 +- 2.5", "5.0 +- 1.1"), strict=True):
        assert lines[0].index(column) + len(column) == lines[1].index(cell) + len(cell)


def test_a_table_says_what_was_not_measured():
    lines = table(
        COLUMNS, [("signs", [None, Summary(5, 1, 60, 4, 6)]), ("digits", [None, None])]
    ).splitlines()
    assert lines[1].split() == ["signs", "-", "5.0", "+-", "1.0", "60"]
    assert lines[2].split() == ["digits", "-", "-", "0"]


def test_a_single_episode_has_no_interval_in_the_table():
    assert "100.0 +- n/a" in table(["clean"], [("signs", [Summary(100, math.inf, 1, 100, 100)])])


def test_a_suspect_result_has_a_question_mark_and_a_reason_below():
    lines = table(COLUMNS, ROWS, [[None, "the loss does not rise"], [None, "signs: the loss does not rise"]])
    first, *_, second, third = lines.splitlines()
    assert first.split() == ["clean", "pgd20@8", "n"]
    assert "5.0 +- 1.1?" in lines and "81.2 +- 2.5 " in lines
    assert second == "suspect: signs pgd20@8: the loss does not rise"
    assert third == "suspect: average pgd20@8: signs: the loss does not rise"


def colours(path) -> int:
    """Number of different colours in a PNG, which is read to its end."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(image.convert("RGB").getcolors(1 << 24))


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [("one", [Summary(100, math.inf, 1, 100, 100)] * 2)]])
def test_accuracies_become_a_picture(tmp_path, rows, recwarn):
    accuracy_picture(tmp_path / "new" / "accuracy.png", COLUMNS, rows)
    assert colours(tmp_path / "new" / "accuracy.png") > 10
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["accuracy.png"]
    assert not recwarn.list


def test_the_bars_show_the_numbers(tmp_path, monkeypatch):
    """The heights drawn are the means, domain by domain."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.bar", lambda self, x, height, *_, **options: drawn.append((x, height, options))
    )
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda self, **_: None)
    accuracy_picture(tmp_path / "accuracy.png", COLUMNS, ROWS)
    assert [height for _, height, _ in drawn] == [[81.24, 75.06], [5, 4.98]]
    assert [options["yerr"] for _, _, options in drawn] == [[2.46, 1.5], [1.05, 0.6]]
    assert [options["label"] for _, _, options in drawn] == COLUMNS


def test_mixing_curves_become_a_picture(tmp_path, recwarn):
    points = [
        (share, Summary(80 * share, 3, 60, 80 * share - 3, 80 * share + 3)) for share in (0.0, 0.5, 1.0)
    ]
    curves = {"signs": {"clean": points, "pgd20@8": points}, "digits": {"clean": points}}
    mixing_picture(tmp_path / "mixing.png", curves)
    assert colours(tmp_path / "mixing.png") > 10
    mixing_picture(tmp_path / "one.png", {"signs": {"clean": points}})
    assert colours(tmp_path / "one.png") > 10
    assert not recwarn.list


def test_a_picture_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"accuracy\.png: cannot be written"):
        accuracy_picture(tmp_path / "file" / "accuracy.png", COLUMNS, ROWS)


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_gets_scalars_images_and_an_hparams_row(tmp_path):
    run = runs.load(write_run(tmp_path / "run", samples=2))
    write_events(run, tmp_path / "board")
    found = events(tmp_path / "board")
    for name in (*DOMAINS, "average"):
        for column in run.columns:
            (event,) = found.Scalars(f"{column}/{name}")
            assert event.value == pytest.approx(run.summary(name, column).mean, rel=1e-6)
    assert set(found.Tags()["images"]) == {f"{name}/pgd20@8" for name in DOMAINS}
    (image,) = found.Images("digits/pgd20@8")
    assert (image.width, image.height) == (3 * 32, 2 * 32)
    (row,) = hparams(found)
    assert row["routing"] == "amt" and row["top_k"] == 2 and row["trim"] == "[]" and row["arch"] == "vit_mini"
    (metric,) = found.Scalars("hparam/average/union")
    assert metric.value == pytest.approx(run.summary("average", "union").mean, rel=1e-6)


def hparams(found: EventAccumulator) -> list[dict]:
    """The settings of the hparams rows."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    rows = []
    for tag, content in found.summary_metadata.items():
        if tag == "_hparams_/session_start_info":
            data = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
            values = data.session_start_info.hparams.items()
            rows.append({name: getattr(value, value.WhichOneof("kind")) for name, value in values})
    return rows


def test_a_board_is_written_anew_and_leaves_other_events_alone(tmp_path):
    """A run that was resumed writes its board again: the numbers do not double."""
    run = runs.load(write_run(tmp_path / "run", samples=1))
    board = tmp_path / "board"
    write_events(run, board)
    (board / "events.out.tfevents.1.other").write_bytes(b"")
    write_events(run, board)
    assert len(list(board.iterdir())) == 2
    (board / "events.out.tfevents.1.other").unlink()
    assert len(events(board).Scalars("clean/digits")) == 1


def test_a_board_of_one_domain_and_no_samples(tmp_path):
    run = runs.load(write_run(tmp_path / "run", domains=("digits",), episodes=1, samples=0, attacks=()))
    write_events(run, tmp_path / "board")
    found = events(tmp_path / "board")
    assert found.Tags()["images"] == [] and np.isfinite(found.Scalars("clean/digits")[0].value)


def test_a_board_that_cannot_be_written_is_said_in_one_line(tmp_path):
    run = runs.load(write_run(tmp_path / "run", episodes=1, samples=0))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"board: cannot be written to"):
        write_events(run, tmp_path / "file" / "board")
