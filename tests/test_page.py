"""The report page without a browser: what it says, that it says nothing else, and `python -m amt report`."""

import base64
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import numpy as np
import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_runs import ATTACKS, DOMAINS, write_run

from amt.attacks.kinds import Attack
from amt.cli import report
from amt.evaluation import runs
from amt.evaluation.statistics import paired_difference
from amt.report import charts, figures
from amt.report.document import ENVIRONMENT, SAMPLE_SIDE, page
from amt.report.pictures import amplify, data_uri
from amt.report.shown import label, robust_columns

EVIL = "<script>alert('x')</script>\"'&amp;"


class Reader(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.hidden = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.text += data + "\n"


@pytest.fixture
def load(tmp_path):
    """`load(name, **how)` writes a run (see `write_run`) and reads it."""
    return lambda name="run", **how: runs.load(write_run(tmp_path / name, **{"samples": 0, **how}))


# --- markup ----------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A parser knows no carriage return or null."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")


@given(st.text())
def test_text_and_attributes_come_out_of_a_parser_as_they_went_in(text):
    written = ENVIRONMENT.from_string('<p><b title="{{ text }}">{{ text }}</b></p>').render(text=text)
    reader = Reader(written)
    assert [tag for tag, _ in reader.tags] == ["p", "b"]
    assert plain(reader.tags[1][1]["title"]) == plain(text)
    inner = ENVIRONMENT.from_string("{{ text }}").render(text=text)
    assert written == f'<p><b title="{inner}">{inner}</b></p>' and not set("<>\"'") & set(inner)


@hypothesis.settings(max_examples=10)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_drawing_says_any_name_and_is_nothing_but_a_drawing(name):
    """Text is cut where there is no room for it; what appears under the pointer is the whole name."""
    point = charts.Point(1, 0, None, None, name, name, suspect=True)
    series = charts.Series(name, charts.distinct(0), (point,))
    panel = charts.Panel(name, name, charts.Axis(name), charts.Axis("", names=(name,)), (series,))
    (written,) = figures.drawings(charts.Figure("slug", name, "", (panel,), None))
    reader = Reader(written)
    known = {"svg", "g", "defs", "path", "use", "text", "title"}
    assert {tag for tag, _ in reader.tags} <= known
    assert not re.findall(r"url\(|@import|https?://|xmlns", re.sub('>[^<]*<|"[^"]*"', "", written))
    titles = re.findall("<title>(.*?)</title>", written, re.DOTALL)
    assert len(titles) == 4  # the panel's name, that of its row, the point and its hollow marker
    assert {plain(html.unescape(title)) for title in titles} == {plain(name)}
    assert figures.short(name) in html.unescape(written)


# --- what the page says ----------------------------------------------------------------------------------


def test_every_number_has_its_interval_and_its_n(load):
    run = load()
    reader = Reader(page([run]))
    for name in (*DOMAINS, "average"):
        for column in run.columns:
            found = run.summary(name, column)
            assert (
                f"{found.mean:.1f}\n ±{found.interval:.1f}\n[{found.low:.1f}, {found.high:.1f}]"
                in reader.text
            )
    assert "\n20\n" in reader.text and "\n60\n" in reader.text


def test_the_page_says_what_was_run(load):
    reader = Reader(page([load("pool"), load("other", seed=0, strength=0.2, adapters=())]))
    for said in (
        *("test_meta_dataset.py --resume runs/mini/best.safetensors --output_dir pool", "0f3bad0c1d2e"),
        *("python 3.11.9, torch 2.15.0", "vit_mini", "amt, beta 1 and gamma 0.6 as given", "89.2 s"),
        "pgd20: L∞, epsilon 2 4 8 of 255; steps 20, restarts 1, loss ce",
        "square500: L∞, epsilon 4 8 of 255; queries 500",
        "20 per domain, 5 ways, 25 support images, 50 query images",
        *("square500@8 ran as square, 500 queries", "none, the pretrained network", "731 MB"),
    ):
        assert said in reader.text, said


def test_the_first_line_says_what_it_comes_to(load):
    pool, weak, same = load("pool"), load("weak", strength=0.1), load("same")
    clean, union = weak.summary("average", "clean"), pool.summary("average", "union")
    told = f"{union.mean:.1f}% ±{union.interval:.1f}"
    assert f" and {told} of attacked ones (union), over 3 domains, 20 episodes each." in page([pool])
    text = page([pool, weak])
    assert (
        f"On clean images the highest accuracy is that of weak, {clean.mean:.1f}% ±{clean.interval:.1f}."
        in text
    )
    assert f"Under union the highest accuracy is that of pool, {told}." in text
    assert f"Under union the highest accuracy is that of pool and same, {told}." in page([pool, weak, same])
    assert f"Under union all reach {told}." in page([pool, same])


def test_a_page_asks_the_network_for_nothing_and_runs_no_script_but_its_own(load):
    reader = Reader(page([load(samples=2)]))
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith(("data:image/png;base64,", "#"))
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert not re.findall(r"url\(|@import|https?://", page([load("other")]))
    (policy,) = [a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:") and "unsafe-eval" not in policy


def test_names_from_files_are_text_and_nothing_else(tmp_path):
    """A class, a domain, a command or a reason may hold markup."""
    folder = write_run(
        tmp_path / "run",
        domains=("safe", "other"),
        classes=(EVIL, "b", "c", "d", "e"),
        stamp=EVIL,
        command=EVIL,
        commit=EVIL,
        arch=EVIL,
        versions={EVIL: EVIL},
        sampling={EVIL: EVIL},
        settings={EVIL: EVIL},
        averages={EVIL: ["safe", "other"]},
    )
    for file in (
        folder / "rows.jsonl",
        folder / "run.json",
        folder / "merging.json",
        folder / "results.json",
    ):
        file.write_text(file.read_text().replace('"other"', json.dumps(EVIL + "domain")))
    run = dataclasses.replace(runs.load(folder), folder=Path(EVIL))
    reader = Reader(page([run, dataclasses.replace(run, folder=Path("b"))]))
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert reader.text.count("alert") > 20 and EVIL + "domain" in reader.text
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]


def test_settings_chosen_on_test_episodes_are_stamped(load):
    text = "chosen on labelled test episodes (published protocol)"
    reader = Reader(page([load(), load("published", stamp=text, strength=0.7)]))
    assert reader.text.count(f"published: {text} (mini_signs, mini_textures, digits)") == 2  # top and table
    assert [a for _, a in reader.tags if a.get("class") == "stamp"]
    assert "stamp" not in {a.get("class") for _, a in Reader(page([load("honest")])).tags}


def test_a_suspect_result_is_marked_and_listed(load):
    run = load(suspect=["digits"])
    reader = Reader(page([run]))
    reason = "7 of 9 broken images withstand a larger radius"
    concerned = [finding.column for finding in run.findings]
    assert reader.text.count(f"\nsuspect: {reason}\n") == len(concerned) > 3
    # The average is, too, and shown once more at the top.
    assert reader.text.count(f"\nsuspect: digits: {reason}\n") == len(concerned) + 1
    assert f"run, digits: {reason} ({', '.join(concerned)})" in reader.text
    assert "suspect" not in {a.get("class") for _, a in Reader(page([load("fine")])).tags}


def test_suspect_points_are_hollow(load):
    (panel,) = charts.scatter(label([load(suspect=["digits"])])).panels
    assert {p.name: p.suspect for p in panel.series[0].points} == {
        "mini_signs": False,
        "mini_textures": False,
        "digits": True,
    }
    found = charts.scatter(label([load("again", suspect=["digits"])]))
    for drawing in map(ElementTree.fromstring, figures.drawings(found)):
        groups = {g.get("class"): list(g.iter("use")) for g in drawing.iter("g") if g.get("class")}
        assert [point.find("title").text for point in groups["series"]] == [
            p.says for p in panel_points(found)
        ]
        (hollow,) = groups["hollow"]
        assert "fill: var(--page); stroke: var(--c0)" in hollow.get("style")
        assert hollow.find("title").text.startswith("digits, again: clean ")
        assert "fill: var(--c0)" in groups["series"][0].get("style")


def panel_points(figure: charts.Figure) -> list[charts.Point]:
    return [point for panel in figure.panels for one in panel.series for point in one.points]


def test_a_single_episode_has_no_interval_anywhere(load):
    run = load(episodes=1)
    shown = label([run, load("other", episodes=1, strength=0.2)])
    for figure in (*charts.figures(shown),):
        if isinstance(figure, charts.Figure):
            points = panel_points(figure)
            assert points and not [p for p in points if p.x_span or p.y_span]
    reader = Reader(page([run]))
    assert "n = 1" in reader.text and "(no interval)" in reader.text and "inf" not in reader.text


def test_an_unfinished_run_is_shown_and_said_to_be(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:25]))
    reader = Reader(page([runs.load(folder)]))
    notice = "run is unfinished: of 20 episodes per domain it has mini_signs 20, mini_textures 5, digits 0."
    assert notice in reader.text


def test_runs_of_other_columns_and_domains_show_what_each_has(load):
    one = load("one", attacks=(Attack("pgd", (8,)),), domains=("mini_signs", "digits"))
    two = load("two", attacks=(Attack("square", (8,), queries=100),), domains=("digits", "fungi"))
    reader = Reader(page([one, two]))
    assert reader.text.count("\n–\n") == 4 + 2  # two runs of two domains and an average lack a column each
    assert "they do not all cover the same domains and attacks" in reader.text
    assert "“average” covers other domains by run" in reader.text
    assert robust_columns(label([one, two])) == ["pgd20@8", "square100@8"]
    clean = load("clean", attacks=())
    assert charts.scatter(label([clean])) is None and not charts.curves(label([clean]))
    assert "Robustness curves" not in page([clean])


def test_the_strictest_column_that_runs_share_stands_for_robustness(load):
    full, part = load("full"), load("part", attacks=ATTACKS[:2])
    assert robust_columns(label([full])) == ["union"]
    # The unions are over other attacks.
    assert robust_columns(label([full, part])) == ["square500@8"] * 2


def test_folders_of_one_name_are_told_apart(load):
    a, b, c = load("x/a/mini"), load("x/b/mini"), load("x/b/other")
    assert [each.label for each in label([a, b, c])] == ["a/mini", "b/mini", "other"]
    assert [each.label for each in label([a, c])] == ["mini", "other"]


# --- figures ---------------------------------------------------------------------------------------------


def test_every_point_of_a_figure_is_in_its_table(load):
    shown = label([load("pool"), load("uniform", strength=0.3)])
    for figure in charts.figures(shown):
        assert re.search(r"n = |episodes", figure.caption), figure.slug
        assert "n" in figure.table.columns
        assert all(len(row) == len(figure.table.columns) for row in figure.table.rows)
        if isinstance(figure, charts.HeatMap):
            count = sum(share is not None for line in figure.cells for share in line)
        else:
            count = sum(len(one.points) for panel in figure.panels for one in panel.series)
        # All columns' differences are in the table, two are drawn.
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
    assert [(name, dash) for name, _, dash in charts.legend(figure.panels)] == [
        *(("a", None), ("b", None)),
        *(("pgd20", 0), ("square500", 1), ("union", 2)),
    ]


def test_differences_are_paired_and_from_the_first_run(load):
    first, second = load("first"), load("second", strength=0.3)
    found = charts.differences(label([first, second]))
    expected = paired_difference(second.rows["digits"], first.rows["digits"], "union")
    assert found.by_run["second"]["digits", "union"] == expected
    assert expected.interval < first.summary("digits", "union").interval  # episodes' luck is shared
    assert [panel.title for panel in found.figure.panels] == ["clean", "union"]
    assert "points from first" in page([first, second])


def test_a_difference_of_suspect_results_is_suspect(load):
    """Whichever of the two runs it is that the checks doubt."""
    doubted, other = load("doubted", suspect=["digits"]), load("other", strength=0.3)
    for pair in ((doubted, other), (other, doubted)):
        figure = charts.differences(label(pair)).figure
        marked = {
            (panel.title, p.name) for panel in figure.panels for p in panel.series[0].points if p.suspect
        }
        assert marked == {("union", "digits"), ("union", "average")}
        cells = [row[0].text for row in figure.table.rows]
        assert sum("suspect: " in text for text in cells) == 2 * len(doubted.findings)


def test_a_dozen_runs_look_different_each(load):
    styles = [charts.distinct(k) for k in range(12)]
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
    left, right = figures.limits(charts.Axis("", least=least), [low, low + reach])
    assert left < low and right > low + reach
    assert right - left <= 1.081 * max(reach, least, 0.2 * abs(low), 0.2)
    value = min(max(low, 0), 100)
    left, right = figures.limits(charts.Axis("", 0, 100, least=25), [value])
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


# --- samples ---------------------------------------------------------------------------------------------


@given(st.floats(0.01, 255), st.integers(0, 10))
def test_an_amplified_perturbation_spans_the_range(largest, seed):
    values = np.random.default_rng(seed).uniform(-largest, largest, (5, 4, 3))
    values[2, 1, 0] = largest * (-1) ** seed
    pixels, factor = amplify(values)
    assert pixels[2, 1, 0] == (255 if seed % 2 == 0 else 0)
    np.testing.assert_allclose(pixels, 127.5 + factor * values, atol=0.51)


def test_no_perturbation_is_grey_and_has_no_factor():
    pixels, factor = amplify(np.array([[[0, np.nan, np.inf]]], np.float16))
    assert (pixels == 128).all() and factor is None


def test_a_sample_shows_its_images_its_factor_and_its_predictions(load):
    run = load(samples=2)
    text = page([run])
    reader = Reader(text)
    images = [a["src"] for tag, a in reader.tags if tag == "img"]
    assert len(images) == 3 * 2 * len(DOMAINS)
    assert reader.text.count("amplified ×15.9") == 2 * len(DOMAINS)  # 127.5 / 8
    assert "6 of the 6 images kept with the runs" in reader.text
    assert reader.text.count("✗") == len(DOMAINS) and "mini_signs, episode 0, pgd20@8" in reader.text
    (sample, *_) = run.samples()
    assert decoded(images[0]).tolist() == sample.clean[0].tolist()
    assert decoded(images[2]).tolist() == sample.attacked[0].tolist()


def decoded(uri: str) -> np.ndarray:

    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image)


def test_large_samples_are_reduced_and_a_perturbation_keeps_its_values():
    values = np.random.default_rng(0).integers(0, 2, (300, 200, 3)).astype(np.uint8) * 255
    reduced = decoded(data_uri(values, SAMPLE_SIDE, Image.Resampling.NEAREST))
    assert reduced.shape == (128, 85, 3) and set(reduced.flat) == {0, 255}


def test_images_have_a_budget_shared_by_all_episodes(load, monkeypatch):
    monkeypatch.setattr("amt.report.document.SAMPLE_BUDGET", 1)
    reader = Reader(page([load(samples=4)]))
    assert "1 of the 12 images kept with the runs" in reader.text
    assert sum(tag == "img" for tag, _ in reader.tags) == 3


def test_a_damaged_sample_is_said_in_one_line(load):
    run = load(samples=1)
    (run.folder / "samples" / "digits-0.npz").write_bytes(b"PK")
    fails(r"digits-0\.npz", lambda: page([run]))


def test_the_page_does_not_grow_with_the_episodes(load):
    few, many = (len(page([load(f"{n}", episodes=n)])) for n in (20, 120))
    assert abs(many - few) < 0.03 * few < 5000


def test_the_same_runs_give_the_same_page(load):
    run = load(samples=1)
    assert page([run]) == page([runs.load(run.folder)])


# --- files and the command -------------------------------------------------------------------------------


def test_the_figures_become_png_and_pdf(load, tmp_path, recwarn):
    """Dollar signs and underscores in names are no mathematics; text in a PDF stays text."""
    how = {"domains": ("a$b$",), "attacks": ATTACKS[:1], "suspect": ["a$b$"]}
    found = charts.figures(label([load("pool", **how), load("$uni_form", adapters=(), **how)]))
    written = figures.write(found, tmp_path / "new" / "figures")
    names = ["clean_robust", "curves_linf", "differences", "merging_1", "seconds"]
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
