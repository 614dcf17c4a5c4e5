"""The page of a report: its markup, what it says, and its samples."""

import base64
import dataclasses
import html
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import numpy as np
import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from page_reader import Reader
from PIL import Image
from toy_runs import ATTACKS, DOMAINS, write_run

from amt.attacks.kinds import Attack
from amt.evaluation import runs
from amt.report import charts, figures, panels
from amt.report.document import ENVIRONMENT, page
from amt.report.example_tasks import SAMPLE_SIDE
from amt.report.pictures import amplify, data_uri
from amt.report.shown import label, robust_columns

EVIL = "<script>alert('x')</script>\"'&amp;"


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
@hypothesis.example("00000@GUW" + "\x1f" * 9 + "｡00%˯")  # letters wider than most: no room for the axes
@hypothesis.example("W" * 24)
@hypothesis.example("\U0001242b" * 24)  # not in the font
def test_a_drawing_says_any_name_and_is_nothing_but_a_drawing(name):
    """Text is cut where there is no room for it; what appears under the pointer is the whole name."""
    point = panels.Point(1, 0, None, None, name, name, suspect=True)
    series = panels.Series(name, panels.distinct(0), (point,))
    panel = panels.Panel(name, name, panels.Axis(name), panels.Axis("", names=(name,)), (series,))
    (written,) = figures.drawings(panels.Figure("slug", name, "", (panel,), None))
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


def panel_points(figure: panels.Figure) -> list[panels.Point]:
    return [point for panel in figure.panels for one in panel.series for point in one.points]


def test_a_single_episode_has_no_interval_anywhere(load):
    run = load(episodes=1)
    shown = label([run, load("other", episodes=1, strength=0.2)])
    for figure in (*charts.figures(shown),):
        if isinstance(figure, panels.Figure):
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
    assert "They do not all cover the same domains and attacks" in reader.text
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
    assert reader.text.count("✗") == len(DOMAINS) and {"mini_signs, episode 0", "pgd20@8"} <= set(
        reader.text.split("\n")
    )
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
    monkeypatch.setattr("amt.report.example_tasks.SAMPLE_BUDGET", 1)
    reader = Reader(page([load(samples=4)]))
    assert "1 of the 12 images kept with the runs" in reader.text
    assert sum(tag == "img" for tag, _ in reader.tags) == 3


def test_a_damaged_sample_is_said_in_one_line(load):
    run = load(samples=1)
    (run.folder / "samples" / "digits-0.npz").write_bytes(b"PK")
    fails(r"digits-0\.npz", lambda: page([run]))


def test_the_page_does_not_grow_with_the_episodes(load):
    few, many = (len(page([load(f"{n}", episodes=n)])) for n in (20, 120))
    assert abs(many - few) < 0.03 * few and few < 250_000


def test_the_same_runs_give_the_same_page(load):
    run = load(samples=1)
    assert page([run]) == page([runs.load(run.folder)])
