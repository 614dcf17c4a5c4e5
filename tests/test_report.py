"""Tables and pictures of results."""

import math

import pytest
from PIL import Image

from amt.evaluate import Summary
from amt.report import accuracy_picture, mixing_picture, table
from meta_dataset_readers.errors import InputError

COLUMNS = ["clean", "pgd20@8"]
ROWS = [
    ("signs", [Summary(81.24, 2.46, 60), Summary(5, 1.05, 60)]),
    ("average", [Summary(75.06, 1.5, 180), Summary(4.98, 0.6, 180)]),
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
    lines = table(COLUMNS, [("signs", [None, Summary(5, 1, 60)]), ("digits", [None, None])]).splitlines()
    assert lines[1].split() == ["signs", "-", "5.0", "+-", "1.0", "60"]
    assert lines[2].split() == ["digits", "-", "-", "0"]


def test_a_single_episode_has_an_infinite_interval_in_the_table():
    assert "100.0 +- inf" in table(["clean"], [("signs", [Summary(100, math.inf, 1)])])


def colours(path) -> int:
    """Number of different colours in a PNG, which is read to its end."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(image.convert("RGB").getcolors(1 << 24))


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [("one", [Summary(100, math.inf, 1)] * 2)]])
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
    points = [(share, Summary(80 * share, 3, 60)) for share in (0.0, 0.5, 1.0)]
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
