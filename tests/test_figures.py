"""The figures of a report, their tables, their files, and the command that writes them."""

import re

import numpy as np
import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from page_reader import Reader
from PIL import Image
from toy_runs import ATTACKS, DOMAINS, write_run

from amt.cli import report
from amt.evaluation import runs
from amt.evaluation.statistics import paired_difference
from amt.report import charts, figures, panels
from amt.report.document import page
from amt.report.shown import label


@pytest.fixture
def load(tmp_path):
    """`load(name, **how)` writes a run (see `write_run`) and reads it."""
    return lambda name="run", **how: runs.load(write_run(tmp_path / name, **{"samples": 0, **how}))


# --- figures ---------------------------------------------------------------------------------------------


def test_every_point_of_a_figure_is_in_its_table(load):
    shown = label([load("pool"), load("uniform", strength=0.3)])
    for figure in charts.figures(shown):
        assert re.search(r"n = |episodes", figure.caption), figure.slug
        assert "n" in figure.table.columns
        assert all(len(row) == len(figure.table.columns) for row in figure.table.rows)
        if isinstance(figure, panels.HeatMap):
            count = sum(share is not None for line in figure.cells for share in line)
        else:
            count = sum(len(one.points) for panel in figure.panels for one in panel.series)
        # All columns' differences are in the table, those of the curve are drawn.
        assert len(figure.table.rows) >= count > 0


def test_curves_start_clean_and_hold_every_radius(load):
    run = load()
    linf, l2 = charts.curves(label([run]))
    assert [panel.title for panel in linf.panels] == ["average", *DOMAINS]
    for figure, attack, radii in ((linf, "pgd20", (2, 4, 8)), (l2, "pgd20-l2", (64, 128))):
        (line,) = [one for one in figure.panels[1].series if one.name == attack]
        assert [point.x for point in line.points] == [0, *radii]
        expected = [run.summary("mini_signs", c).mean for c in ("clean", *(f"{attack}@{e}" for e in radii))]
        assert [point.y for point in line.points] == expected
    assert {one.name for one in linf.panels[0].series} == {"pgd20", "square500", "union"}


def test_runs_differ_by_marker_and_attacks_by_dashes(load):
    (figure, _) = charts.curves(label([load("a"), load("b", strength=0.3)]))
    styles = {(one.name, one.attack): one.style for one in figure.panels[0].series}
    assert len(set(styles.values())) == len(styles) == 6
    assert {name: len({s.marker for (n, _), s in styles.items() if n == name}) for name in "ab"} == {
        "a": 1,
        "b": 1,
    }
    assert [(name, dash) for name, _, dash in panels.legend(figure.panels)] == [
        *(("a", None), ("b", None)),
        *(("pgd20", 0), ("square500", 1), ("union", 2)),
    ]


def test_differences_are_paired_and_from_the_first_run(load):
    first, second = load("first"), load("second", strength=0.3)
    found = charts.differences(label([first, second]))
    expected = paired_difference(second.rows["digits"], first.rows["digits"], "union")
    assert found.by_run["second"]["digits", "union"] == expected
    assert expected.interval < first.summary("digits", "union").interval  # episodes' luck is shared
    curve = ["clean", "union@2", "union@4", "union@8", "union"]
    assert sorted(panel.title for panel in found.figure.panels) == sorted(curve)
    axes = {panel.x for panel in found.figure.panels}
    assert len(axes) == 1 and axes.pop().low < 0  # all on one scale, zero in the middle
    assert "points from first" in page([first, second])


def test_a_difference_of_suspect_results_is_suspect(load):
    """Whichever of the two runs it is that the checks doubt."""
    doubted, other = load("doubted", suspect=["digits"]), load("other", strength=0.3)
    for pair in ((doubted, other), (other, doubted)):
        figure = charts.differences(label(pair)).figure
        marked = {
            (panel.title, p.name) for panel in figure.panels for p in panel.series[0].points if p.suspect
        }
        assert {name for _, name in marked} == {"digits", "average"} and ("union", "digits") in marked
        cells = [row[0].text for row in figure.table.rows]
        assert sum("suspect: " in text for text in cells) == 2 * len(doubted.findings)


def test_a_dozen_runs_look_different_each(load):
    styles = [panels.distinct(k) for k in range(12)]
    looks = {(s.colour % len(figures.COLOURS), s.marker % len(figures.MARKERS)) for s in styles}
    assert len(looks) == 12


def test_runs_of_other_episodes_are_not_paired(load):
    found = charts.differences(label([load("a"), load("b", seed=1)]))
    assert found.figure is None and found.refusals == ("no differences of b from a: its seed is 1, not 0",)
    reader = Reader(page([load("c"), load("d", seed=1)]))
    assert (
        "No differences of d from c: its seed is 1, not 0." in reader.text
        and "points from" not in reader.text
    )


def test_the_heat_map_shows_means_and_quartiles(load):
    run = load()
    (heat,) = charts.heat_maps(label([run, load("pretrained", adapters=())]))
    shares = 100 * np.array([row["coefficients"] for row in run.rows["digits"]])
    line = heat.cells[heat.rows.index("digits")]
    np.testing.assert_allclose([share.summary.mean for share in line], shares.mean(0))
    np.testing.assert_allclose(
        [share.quartiles for share in line], np.percentile(shares, (0, 25, 50, 75, 100), 0).T
    )
    assert heat.columns == ("0: ε 8", "1: ε 6", "2: ε 0.1", "3: ε 0.01")


def test_adapters_of_unknown_levels_have_numbers():
    assert charts.adapter_names({"a": {"epsilons": "unknown"}}, 2) == ("adapter 0", "adapter 1")
    assert charts.adapter_names({"a": {"epsilons": [8, 1]}, "b": {"epsilons": [4, 1]}}, 1) == ("adapter 0",)
    assert charts.adapter_names({"a": {"epsilons": [8]}, "b": {"epsilons": [8]}}, 2) == (
        "0: ε 8",
        "adapter 1",
    )


@given(st.floats(-1e3, 1e3), st.just(0.0) | st.floats(1e-6, 1e3), st.floats(0, 20))
def test_an_axis_holds_its_points_and_little_else(low, reach, least):
    """Its ends are the points' but for a margin; it is never shorter than asked, nor beyond its limits."""
    left, right = figures.limits(panels.Axis("", least=least), [low, low + reach])
    assert left < low and right > low + reach
    assert right - left <= 1.081 * max(reach, least, 0.2 * abs(low), 0.2)
    value = min(max(low, 0), 100)
    left, right = figures.limits(panels.Axis("", 0, 100, least=25), [value])
    assert -1 <= left < value < right <= 101 and right - left == pytest.approx(27)


def test_labels_stay_inside_apart_and_near(load):
    """Of the two drawings of the scatter, by what matplotlib measures."""
    figure = charts.scatter(label([load("a"), load("b", strength=0.2)]))
    for size in (figures.WIDE, figures.NARROW):
        drawing = figures.compose(figure.panels, 1, size)
        (axes,) = drawing.axes
        drawing.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert {text.get_text() for text in axes.texts} == set(DOMAINS)
        room = axes.get_window_extent().padded(1)
        assert all(room.contains(*corner) for box in boxes for corner in box.corners())
        assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


# --- files and the command -------------------------------------------------------------------------------


def test_the_figures_become_png_and_pdf(load, tmp_path, recwarn):
    """Dollar signs and underscores in names are no mathematics; text in a PDF stays text."""
    how = {"domains": ("a$b$",), "attacks": ATTACKS[:1], "suspect": ["a$b$"]}
    found = charts.figures(label([load("pool", **how), load("$uni_form", adapters=(), **how)]))
    written = figures.write(found, tmp_path / "new" / "figures")
    names = ["clean_robust", "curve_linf", "differences", "merging_1", "seconds"]
    assert [path.name for path in written] == [f"{n}.{kind}" for n in names for kind in ("png", "pdf")]
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert len(image.convert("RGB").getcolors(1 << 24)) > 10
        else:
            assert path.read_bytes().startswith(b"%PDF") and b"/CIDFontType2" in path.read_bytes()
    assert not [warning for warning in recwarn.list if "amt" in str(warning.filename)]


def test_the_same_runs_give_the_same_files(load, tmp_path):
    figure = charts.seconds(label([load()]))
    (_, a), (_, b) = (figures.write([figure], tmp_path / name) for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_the_command_writes_the_page_and_the_figures(tmp_path, capsys):
    write_run(tmp_path / "a", domains=("digits",), attacks=ATTACKS[:1], samples=1, adapters=())
    out, figures = tmp_path / "new" / "page.html", tmp_path / "figures"
    assert report.main([str(tmp_path / "a"), "--out", str(out), "--figures", str(figures)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in out.parent.iterdir()) == ["page.html"]
    assert len(list(figures.glob("*.pdf"))) == 3  # scatter, curves, seconds
    assert f"wrote {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{run}", "--out", "{tmp}/page.txt"], r"page\.txt: expected a name that ends in \.html"),
        (["{run}", "--out", "{tmp}/folder.html"], r"folder\.html: is a folder"),
        (["{run}", "--out", "{tmp}/file/page.html"], r"--out .*file: cannot be written to"),
        (["{run}", "--out", "{tmp}/page.html", "--figures", "{tmp}/file"], r"--figures .*file: cannot be"),
        (["{run}", "{tmp}/./run", "--out", "{tmp}/page.html"], "is the same run as"),
        (["{tmp}/nothing", "--out", "{tmp}/page.html"], r"nothing: no run directory"),
        (["{run}", "{tmp}/empty", "--out", "{tmp}/page.html"], r"empty: no results yet"),
        (["--out", "{tmp}/page.html"], "RUN"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_overwritten(tmp_path, flags, message, monkeypatch):
    run = write_run(tmp_path / "run", episodes=2, samples=0)
    empty = write_run(tmp_path / "empty", episodes=2, samples=0, finished=False)
    (empty / "rows.jsonl").write_text("")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "page.html").write_text("before")
    monkeypatch.setattr("amt.evaluation.runs.judge", lambda *_: pytest.fail("long work before the check"))
    fails(message, lambda: report.main([flag.format(run=run, tmp=tmp_path) for flag in flags]))
    assert (tmp_path / "page.html").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty",
        "file",
        "folder.html",
        "page.html",
        "run",
    ]
