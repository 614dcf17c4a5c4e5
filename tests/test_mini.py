"""Mini-Meta-Dataset: the real layout, the same bytes for the same settings, and no half-written source."""

import dataclasses
import io
import itertools
import json
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from PIL import Image, ImageFilter

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.mini import (
    SOURCE_NAMES,
    Settings,
    glyphs,
    make_mini,
    object_attributes,
    objects,
    write,
)
from meta_dataset_readers.mini import __main__ as command
from meta_dataset_readers.mini.canvas import LARGEST_SIDE, SMALLEST_SIDE
from meta_dataset_readers.mini.digits import COUNTS, digit_images
from meta_dataset_readers.mini.shapes import SHAPES
from meta_dataset_readers.mini.sources import SPLITS, build
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.tfrecord import open_records

TINY = Settings(seed=3, objects_per_class=2)


def shortened(name: str, objects_per_class: int):
    """The real source with two images per class: every class is drawn, in a fraction of the time."""
    source = build(name, objects_per_class)
    return dataclasses.replace(source, counts=(2,) * len(source.counts))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """All six sources with two images per class."""
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "build", shortened)
        patch.setattr(write, "_build_once", shortened)
        make_mini(out, settings=TINY)
    return out


@pytest.fixture(scope="module")
def objects_spec() -> dict:
    return build("mini_objects").spec()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# --- layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCE_NAMES)
def test_files_and_records_are_those_the_spec_counts(tiny, name):
    """Our own reader accepts the spec; each class has its file, its number of records and its label."""
    spec = load_spec(tiny / name)
    ids = range(len(spec.images_per_class))
    assert spec.name == name
    assert {f.name for f in (tiny / name).iterdir()} == {
        "dataset_spec.json",
        *(f"{k}.tfrecords" for k in ids),
    }
    for class_id in ids:
        records = open_records(tiny / name / f"{class_id}.tfrecords")
        assert len(records) == spec.images_per_class[class_id]
        assert {records.read_example(k)[1] for k in range(len(records))} == {class_id}


@pytest.mark.parametrize("name", SOURCE_NAMES)
def test_every_image_is_an_rgb_jpeg_of_about_64_pixels_and_differs(tiny, name):
    """Pictures decode, have varied sizes within the promised range, and no two of a class are the same."""
    sizes = set()
    for file in sorted((tiny / name).glob("*.tfrecords")):
        records = open_records(file)
        encoded = [records.read_example(k)[0] for k in range(len(records))]
        assert len(set(encoded)) == len(encoded)
        for data in encoded:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert np.ptp(np.asarray(image).astype(int)) > 20, f"{file}: nothing to be seen"
                sizes.add(image.size)
    assert all(SMALLEST_SIDE <= side <= LARGEST_SIDE for size in sizes for side in size)
    assert len(sizes) > 10


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("mini_objects", (84, 20, 20)),
        ("mini_glyphs", (92, 36, 91)),
        ("mini_textures", (10, 5, 10)),
        ("mini_sketches", (10, 5, 13)),
        ("mini_signs", (0, 0, 28)),
        ("digits", (0, 0, 10)),
    ],
)
def test_classes_per_split(tiny, name, classes):
    """The sizes the documentation states; every split that is not empty is large enough for 5 ways."""
    spec = load_spec(tiny / name)
    assert tuple(len(spec.classes(split)) for split in SPLITS) == classes
    assert all(count == 0 or count >= 5 for count in classes)


def test_specs_have_the_fields_of_the_real_ones():
    """Field for field the three kinds of specification that Meta-Dataset writes."""
    common = {"name", "images_per_class", "class_names", "path", "file_pattern", "__class__"}
    flat, bilevel = (
        {"classes_per_split"},
        {"superclasses_per_split", "classes_per_superclass", "superclass_names"},
    )
    extra = {"mini_objects": {"split_subgraphs"}, "mini_glyphs": bilevel}
    for name in SOURCE_NAMES:
        assert set(build(name).spec()) == common | extra.get(name, flat)


def test_default_classes_are_large_enough_for_evaluation():
    """30 images or more per class (5 shots and 15 queries leave room), 20 for glyphs as in omniglot."""
    for name in SOURCE_NAMES:
        assert min(build(name).counts) >= (20 if name == "mini_glyphs" else 30)


# --- the graph of mini_objects ---------------------------------------------------------------------------


def test_graph_links_are_mutual_and_stay_inside_their_split(objects_spec):
    """Nodes are sorted and belong to one split; every child names its parent and every parent its child."""
    seen = set()
    for nodes in objects_spec["split_subgraphs"].values():
        by_id = {node["wn_id"]: node for node in nodes}
        assert list(by_id) == sorted(by_id) and len(by_id) == len(nodes)
        assert not seen & set(by_id)
        seen |= set(by_id)
        for node in nodes:
            assert node["children_ids"] == sorted(set(node["children_ids"]))
            assert node["parents_ids"] == sorted(set(node["parents_ids"]))
            assert all(node["wn_id"] in by_id[child]["parents_ids"] for child in node["children_ids"])
            assert all(node["wn_id"] in by_id[parent]["children_ids"] for parent in node["parents_ids"])
        assert sum(not node["parents_ids"] for node in nodes) == 1, "one root"


def test_leaves_are_the_classes_in_order_and_have_two_parents(objects_spec):
    """Class ids follow the sorted wn_ids of each split's leaves; shape and texture are both above a leaf."""
    leaves = [n for split in SPLITS for n in objects_spec["split_subgraphs"][split] if not n["children_ids"]]
    assert objects_spec["class_names"] == {str(k): leaf["wn_id"] for k, leaf in enumerate(leaves)}
    assert all(len(leaf["parents_ids"]) == 2 for leaf in leaves)
    assert len({leaf["words"] for leaf in leaves}) == len(leaves)


def test_every_node_counts_the_images_of_the_leaves_below_it(objects_spec):
    """images_per_class covers inner nodes too, a leaf with several paths to a node counted once."""
    for split, nodes in objects_spec["split_subgraphs"].items():
        by_id = {node["wn_id"]: node for node in nodes}

        def leaves(wn_id, by_id=by_id):
            children = by_id[wn_id]["children_ids"]
            return {wn_id}.union(*map(leaves, children)) - ({wn_id} if children else set())

        counts = objects_spec["images_per_class"][split]
        assert set(counts) == set(by_id)
        assert all(count == sum(counts[leaf] for leaf in leaves(wn_id)) for wn_id, count in counts.items())


def test_some_nodes_of_every_split_can_make_episodes(tiny):
    """Sampling along the graph needs nodes above five leaves or more, of both kinds."""
    spec = load_spec(tiny / "mini_objects")
    for split in SPLITS:
        assert sum(len(group.class_ids) >= 5 for group in spec.groups[split]) >= 5


def test_words_of_a_class_give_its_attributes(objects_spec):
    """A pretraining script can recover shape, texture and palette of every class."""
    graphs = objects_spec["split_subgraphs"].values()
    found = [object_attributes(n["words"]) for graph in graphs for n in graph if not n["children_ids"]]
    shapes, textures, palettes = map(set, zip(*found, strict=True))
    assert (shapes, textures, palettes) == (set(SHAPES), set(objects.TEXTURES), set(objects.PALETTES))
    with pytest.raises(ValueError, match="rounds"):
        object_attributes("rounds")


# --- what the classes show -------------------------------------------------------------------------------


def test_glyph_classes_are_distinct_letterforms():
    """Within a split no two characters look alike, even blurred, and each has at least two typefaces."""

    def look(character: str) -> np.ndarray:
        image = Image.fromarray((glyphs.glyph("DejaVuSans", character) * 255).astype(np.uint8))
        small = np.asarray(image.filter(ImageFilter.GaussianBlur(7)).resize((40, 40)), float).ravel()
        small -= small.mean()
        return small / np.linalg.norm(small)

    for scripts in glyphs.SCRIPTS.values():
        characters = "".join(scripts.values())
        assert len(set(characters)) == len(characters)
        looks = np.stack([look(character) for character in characters])
        likeness = looks @ looks.T - np.eye(len(looks))
        worst = np.unravel_index(likeness.argmax(), likeness.shape)
        assert likeness.max() < 0.93, [unicodedata.name(characters[k]) for k in worst]
        assert all(len(glyphs.faces(character)) >= 2 for character in characters)


def test_digits_are_all_of_scikit_learns_in_order():
    """No real image is lost, and enlarging keeps its content: averaged down, it is the original."""
    source = build("digits")
    assert tuple(map(len, digit_images())) == COUNTS == source.counts
    for number, image in enumerate(itertools.islice(source.images(7, seed=0), 5)):
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float).ravel()
        likeness = np.corrcoef([small, *(original.ravel() for original in digit_images()[7])])[0, 1:]
        assert likeness.argmax() == number


# --- reproducible ----------------------------------------------------------------------------------------


def test_seed_source_and_class_decide_the_images():
    """Another seed gives other pictures; more images of a class begin with the same ones."""

    def first(count: int, seed: int) -> list[bytes]:
        return [image.tobytes() for image in build("mini_objects", count).images(17, seed)]

    assert first(3, seed=0) == first(5, seed=0)[:3]
    assert first(3, seed=0) != first(3, seed=1)


# --- files that are there already ------------------------------------------------------------------------


def test_a_complete_set_is_left_alone_and_a_damaged_source_made_again(tmp_path):
    """The second call draws nothing; a lost file or another setting has the source rewritten."""

    def make(seed: int = 0) -> bool:
        return make_mini(tmp_path, settings=Settings(seed, 1), sources=["mini_objects"])[0].fresh

    assert make()
    file = tmp_path / "mini_objects" / "3.tfrecords"
    before = file.read_bytes()
    assert not make()
    file.unlink()
    assert make() and file.read_bytes() == before
    assert make(seed=1) and file.read_bytes() != before
    assert not list(tmp_path.glob(".partial-*"))


def test_sources_can_be_added_later(tmp_path, monkeypatch):
    """Each source is complete by itself: asking for more keeps what is there."""
    monkeypatch.setattr(write, "build", shortened)
    monkeypatch.setattr(write, "_build_once", shortened)
    make_mini(tmp_path, settings=TINY, sources=["digits"])
    both = make_mini(tmp_path, settings=TINY, sources=["digits", "mini_signs"])
    assert [source.fresh for source in both] == [False, True]


def test_a_failure_half_way_leaves_nothing_that_passes_for_complete(tmp_path, monkeypatch):
    """An error while a class is drawn: no specification, no source directory, and the next call succeeds."""

    def failing(name, settings, directory, class_id, original=write._write_class):
        if class_id == 5:
            raise OSError("disk full")
        return original(name, settings, directory, class_id)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_class", failing)
        with pytest.raises(OSError, match="disk full"):
            make_mini(tmp_path, settings=Settings(0, 1), sources=["mini_objects"])
    assert [file.name for file in tmp_path.rglob("*")] == ["mini.json"]
    assert make_mini(tmp_path, settings=Settings(0, 1), sources=["mini_objects"])[0].fresh


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_leaves_no_specification(tmp_path):
    """SIGKILL in the middle of a source: what remains lies in a hidden directory without a specification."""
    command = [sys.executable, "-m", "meta_dataset_readers.mini", "--out", tmp_path]
    flags = ["--sources", "mini_objects", "--workers", "1", "--objects_per_class", "300"]
    process = subprocess.Popen([*command, *flags], cwd=ROOT)
    try:
        while process.poll() is None and not list(tmp_path.glob(".partial-*/mini_objects/0.tfrecords")):
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.rglob("dataset_spec.json"))
    assert make_mini(tmp_path, settings=Settings(0, 1), sources=["mini_objects"])[0].fresh


def test_foreign_directories_are_refused_unless_forced(tmp_path):
    """Somebody's files are never mixed with ours by mistake, and are kept even when forced."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        make_mini(tmp_path, settings=Settings(0, 1), sources=["mini_objects"])
    make_mini(tmp_path, settings=Settings(0, 1), sources=["mini_objects"], force=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert (tmp_path / "mini_objects" / "dataset_spec.json").is_file()


# --- the command -----------------------------------------------------------------------------------------


def test_command_writes_the_same_bytes_whatever_the_processes(tmp_path, monkeypatch, capsys):
    """The documented command with two fresh processes writes byte for byte what is drawn in this one;
    asked again it says that nothing is to be done, and can add contact sheets."""
    options = ["--sources", "mini_objects", "--objects_per_class", "1", "--seed", "5", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", ["mini", "--out", str(tmp_path / "a"), *options])
    command.main()
    assert "124 classes" in capsys.readouterr().out
    make_mini(tmp_path / "b", settings=Settings(5, 1), sources=["mini_objects"])
    assert contents(tmp_path / "a" / "mini_objects") == contents(tmp_path / "b" / "mini_objects")
    assert (tmp_path / "a" / "mini.json").read_bytes() == (tmp_path / "b" / "mini.json").read_bytes()

    sys.argv.append("--contact_sheets")
    command.main()
    assert "already holds this set, complete" in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "contact_sheets" / "mini_objects.png") as sheet:
        assert sheet.height >= 124 * SMALLEST_SIDE


def test_command_reports_bad_input_in_one_line_with_exit_code_2(tmp_path):
    """A misspelt source, in a process of its own: one line with the nearest name, nothing written."""
    options = ["--out", tmp_path / "new", "--sources", "mini_glyph"]
    whole = [sys.executable, "-m", "meta_dataset_readers.mini", *options]
    result = subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 2 and "did you mean 'mini_glyphs'?" in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"settings": Settings(seed=-1)}, "--seed: -1"),
        ({"settings": Settings(objects_per_class=0)}, "--objects_per_class: 0"),
        ({"workers": 0}, "--workers: 0"),
        ({"sources": ["digit"]}, "did you mean 'digits'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, wrong, names):
    """The message names the option and the value."""
    with pytest.raises(InputError, match=names):
        make_mini(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"sources": 3}', '{"sources": {"digits": 1}}', "<html>"])
def test_a_manifest_that_is_not_ours_is_refused(tmp_path, text):
    """A foreign or damaged mini.json is named, not trusted."""
    (tmp_path / "mini.json").write_text(text)
    with pytest.raises(InputError, match=r"mini\.json: not a manifest"):
        make_mini(tmp_path, sources=["digits"])


def test_out_that_is_a_file_is_refused(tmp_path):
    """One line, not a traceback from mkdir."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a directory"):
        make_mini(tmp_path / "file", sources=["digits"])


def test_the_manifest_names_the_settings_of_each_source(tiny):
    """Enough to make the same set again, and to see that two sets are the same."""
    sources = json.loads((tiny / "mini.json").read_text())["sources"]
    assert set(sources) == set(SOURCE_NAMES)
    assert sources["mini_objects"]["settings"] == {"generator_version": 1, "seed": 3, "objects_per_class": 2}
    assert all(len(entry["sha256"]) == 64 for entry in sources.values())
