"""FWT's filelists: stale paths found again, labels that count through three files, nothing from outside."""

import json

import numpy as np
import pytest
from conftest import BENCHMARKS, by_pil, fails, picture, write_picture
from hypothesis import given
from hypothesis import strategies as st

from meta_dataset_readers import check
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.filelists import FILELISTS, UNDIVIDED, open_filelists
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.sampling import check_sampling
from meta_dataset_readers.spec import SPLITS

STALE = "/home/author/fwt/birds"
NAMES = ["ant", "bee", "cat", "dog", "eel", "fly", "gnu", "hen"]


def filelist(labels, names=NAMES, stale=STALE, below="source/images"):
    """A list with one picture <class>/<position>.png for each of `labels`."""
    images = [f"{stale}/{below}/{names[label]}/{index}.png" for index, label in enumerate(labels)]
    return {"label_names": names, "image_names": images, "image_labels": labels}


def write_lists(directory, base, val, novel):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("base", base), ("val", val), ("novel", novel)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def write_pictures(root, *lists, stale=STALE):
    """The pictures of the lists below `root`, the number of each from its name."""
    for content in lists:
        for image in content["image_names"]:
            file = root / image.removeprefix(f"{stale}/")
            write_picture(file, int(file.stem))


@pytest.fixture
def lists():
    """Seven classes: base 0, 2, 4, 6, val 5 and 1, novel 7 and 3."""
    return [filelist([0, 0, 4, 2, 2, 6]), filelist([5, 1, 5]), filelist([7, 3])]


@pytest.fixture
def birds(tmp_path, lists):
    directory = write_lists(tmp_path / "birds", *lists)
    write_pictures(directory, *lists)
    return directory


def one_list_changed(directory, lists, change):
    """The directory with novel.json after `change`, which gets its content."""
    change(lists[2])
    return write_lists(directory, *lists)


# --- what is read ------------------------------------------------------------------------------------------


def test_global_labels_become_consecutive_classes_of_three_splits(birds):
    source = open_filelists(birds, "birds")
    assert source.spec.class_names == ("ant", "cat", "eel", "gnu", "bee", "fly", "dog", "hen")
    assert source.spec.images_per_class == (2, 2, 1, 1, 1, 2, 1, 1)
    assert [tuple(source.spec.classes(split)) for split in SPLITS] == [(0, 1, 2, 3), (4, 5), (6, 7)]
    assert source.resize == "square" and source.spec.ontology is None
    assert source.store.missing(range(8)) == []
    assert source.store.origin(1, 1).file == "birds/source/images/cat/4.png"
    assert source.store.place(1) == birds / "source" / "images" / "cat"
    assert np.array_equal(source.store.read(1, 1), np.asarray(picture(4)))


def test_labels_that_begin_anew_in_every_list_are_its_own(tmp_path):
    """As FWT writes mini-ImageNet: each list has its own names."""
    lists = [filelist([0, 1], ["a", "b"]), filelist([0], ["c"]), filelist([1, 0], ["d", "e"])]
    write_pictures(tmp_path / "mini", *lists)
    spec = open_filelists(write_lists(tmp_path / "mini", *lists), "mini").spec
    assert spec.class_names == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize("lost", ["/home/author/fwt", STALE, f"{STALE}/source"])
def test_pictures_are_found_by_the_longest_end_of_their_path(tmp_path, lists, lost):
    """Whatever part of the author's tree was copied into the source's directory."""
    directory = write_lists(tmp_path / "mine", *lists)
    write_pictures(directory, *lists, stale=lost)
    write_picture(directory / "ant" / "0.png", 99)  # a shorter end of the first path
    source = open_filelists(directory, "mine")
    assert source.store.missing(range(8)) == []
    assert np.array_equal(source.store.read(0, 0), np.asarray(picture(0)))


def test_a_first_picture_that_is_missing_does_not_hide_the_others(birds):
    (birds / "source" / "images" / "ant" / "0.png").unlink()
    source = open_filelists(birds, "birds")
    assert source.store.missing(source.spec.classes("TRAIN")) == ["source/images/ant/0.png"]
    assert source.store.missing(source.spec.classes("TEST")) == []
    with pytest.raises(DamagedRecord, match=r"birds/source/images/ant/0\.png: no such file"):
        source.store.image(0, 0)


def test_a_prefix_says_where_the_pictures_are(tmp_path, lists):
    directory = write_lists(tmp_path / "birds", *lists)
    write_pictures(tmp_path / "disk", *lists)
    write_pictures(directory / "here", *lists)
    elsewhere = open_filelists(directory, "birds", (f"{STALE}/", str(tmp_path / "disk")))
    assert elsewhere.store.missing(range(8)) == []
    assert elsewhere.store.place(0) == tmp_path / "disk" / "source" / "images" / "ant"
    inside = open_filelists(directory, "birds", (f"{STALE}/source", "here/source"))
    assert inside.store.missing(range(8)) == []
    assert inside.store.origin(0, 0).file == "birds/images/ant/0.png"
    nowhere = open_filelists(directory, "birds", ("/home/author", "here"))
    assert len(nowhere.store.missing(range(8))) == 11


@pytest.mark.parametrize("old", ["/home/other", "/home/author/fwt/bird"])
def test_a_prefix_that_is_not_the_lists_is_refused(birds, old):
    complaint = rf"base\.json: field 'image_names'\[0\]: '{STALE}/source/.* does not begin with"
    fails(complaint, lambda: open_filelists(birds, "birds", (old, ".")))
    fails("birds/absent: no such directory", lambda: open_filelists(birds, "birds", (STALE, "absent")))


def test_opening_reads_no_picture(tmp_path, lists):
    directory = write_lists(tmp_path / "birds", *lists)
    for content in lists:
        for image in content["image_names"]:
            file = directory / image.removeprefix(f"{STALE}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    assert sum(open_filelists(directory, "birds").spec.images_per_class) == 11


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        "/../secret.png",
        "../../etc/passwd.png",
        f"{STALE}/source/../../x.png",
        "",
        "/",
        ".",
        "a\0b",
        "a\nb",
        "x/" * 3000,
    ],
)
def test_a_path_that_leads_outside_or_nowhere_is_refused(birds, lists, image):
    def change(content):
        content["image_names"][1] = image

    complaint = r"novel\.json: field 'image_names'\[1\]: expected a path that does not lead outside"
    error = fails(complaint, lambda: open_filelists(one_list_changed(birds, lists, change), "birds"))
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("image_labels", [7], r"field 'image_labels': 1 labels, but 'image_names' has 2 images"),
        ("image_labels", [7, 8], r"field 'image_labels'\[1\]: expected an index into the 8 .*, found 8"),
        ("image_labels", [-1, 3], r"field 'image_labels'\[0\]: .*, found -1"),
        ("image_labels", [7, True], r"field 'image_labels'\[1\]: .*, found True"),
        ("image_labels", [7, "3"], r"field 'image_labels'\[1\]: .*, found '3'"),
        ("image_labels", {"0": 7}, r"field 'image_labels': expected a list, found an object"),
        ("image_names", "all", r"field 'image_names': expected a list, found a string"),
        ("image_names", [1, 2], r"field 'image_names': expected a string, found an integer"),
        ("label_names", [], r"field 'image_labels'\[0\]: expected an index into the 0"),
        ("label_names", None, r"field 'label_names': expected a list"),
        ("image_names", ["/x/1.png", "/x/1.png"], r"'image_names'\[0\]: '/x/1\.png': 4 parts are dropped"),
        (
            "image_names",
            ["/a/b/c/d/x/y.png", "/0/0/0/0/x/y.png"],
            r"\[1\]: .* is listed twice, before as novel",
        ),
        ("image_labels", [0, 3], r"class 'ant' is in both TRAIN and TEST"),
    ],
)
def test_a_faulty_list_is_named_with_its_field(birds, lists, field, value, complaint):
    def change(content):
        content[field] = value

    error = fails(complaint, lambda: open_filelists(one_list_changed(birds, lists, change), "birds"))
    assert str(error).startswith(str(birds))


def test_a_missing_field_file_or_source_of_pictures_is_named(tmp_path, birds, lists):
    alone = write_lists(tmp_path / "alone", *lists)
    complaint = rf"base\.json: field 'image_names'\[0\]: '{STALE}.*: no end of this path leads to a file in"
    fails(complaint, lambda: open_filelists(alone, "alone"))
    empty = write_lists(tmp_path / "empty", filelist([]), filelist([]), filelist([]))
    fails("empty: no split has a picture", lambda: open_filelists(empty, "empty"))
    del lists[0]["label_names"]
    fails(
        r"base\.json: field 'label_names' is missing", lambda: open_filelists(write_lists(birds, *lists), "x")
    )
    (birds / "base.json").write_text("{")
    fails(r"base\.json: not valid JSON", lambda: open_filelists(birds, "birds"))
    (birds / "base.json").unlink()
    fails(r"base\.json: no such file", lambda: open_filelists(birds, "birds"))


@given(
    st.fixed_dictionaries(
        {
            "label_names": st.lists(st.text(max_size=3), max_size=3),
            "image_names": st.lists(st.text(alphabet="./\\a\0é", max_size=8), max_size=3),
            "image_labels": st.lists(st.integers(-1, 3) | st.floats() | st.none(), max_size=3),
        }
    ),
    st.none() | st.tuples(st.text(alphabet="/.a", max_size=3), st.sampled_from(["", ".", "a"])),
)
def test_any_list_opens_below_its_directory_or_is_refused(tmp_path_factory, content, prefix):
    directory = tmp_path_factory.mktemp("source") / "own"
    write_lists(directory, filelist([], []), filelist([], []), content)
    write_picture(directory / "a" / "a", format="PNG")
    try:
        source = open_filelists(directory, "own", prefix)
    except InputError as error:
        assert str(error).startswith(str(directory)) and "\n" not in str(error)
    else:
        for class_id in source.spec.classes("TEST"):
            for index in range(source.store.count(class_id)):
                assert ".." not in source.store.origin(class_id, index).file.split("/")


def test_lists_that_are_all_the_same_are_only_tested_on(tmp_path, monkeypatch, capsys):
    """Such as someone writes for an evaluation: nobody may train on what is tested, so nothing is TRAIN."""
    same = filelist([0, 2, 2, 5])
    write_pictures(write_lists(tmp_path / "birds", same, same, same), same)
    source = open_filelists(tmp_path / "birds", "birds")
    assert [len(source.spec.classes(split)) for split in SPLITS] == [0, 0, 3]
    assert source.spec.images_per_class == (1, 2, 1)
    with pytest.raises(InputError, match=f"TRAIN has no classes.*{UNDIVIDED}"):
        check_sampling(source.spec, "TRAIN", EpisodeSampling())
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path)])
    assert check.main() == 0
    assert f"note: {UNDIVIDED}" in capsys.readouterr().out


# --- lists as the published scripts write them -------------------------------------------------------------


@pytest.mark.benchmark_data
@pytest.mark.skipif(not (BENCHMARKS / "fwt").is_dir(), reason="no fwt in AMT_BENCHMARK_DATA")
def test_every_class_and_picture_of_the_sample_lists_is_there():
    expected = json.loads((BENCHMARKS / "expect" / "h5_bscd_fwt.json").read_text())["fwt"]
    assert set(expected) == {path.name for path in (BENCHMARKS / "fwt").iterdir() if path.is_dir()}
    for name, of_split in expected.items():
        directory = BENCHMARKS / "fwt" / name
        source = open_filelists(directory, name)
        spec, store = source.spec, source.store
        for split, file in FILELISTS.items():
            numbers, ids = of_split[file.removesuffix(".json")], spec.classes(split)
            content = json.loads((directory / file).read_text())
            names = content["label_names"]
            assert len(names) == numbers["num_label_names"]
            assert [spec.class_names[i] for i in ids] == [names[label] for label in numbers["label_ids"]]
            assert [spec.images_per_class[i] for i in ids] == list(numbers["counts"].values())
            assert sum(spec.images_per_class[i] for i in ids) == numbers["num_images"]
            assert store.missing(ids) == []
            listed = list(zip(content["image_names"], content["image_labels"], strict=True))
            for class_id, label in zip(ids, numbers["label_ids"], strict=True):
                stale = [image for image, its_label in listed if its_label == label]
                assert store.count(class_id) == len(stale)
                for index, image in enumerate(stale):
                    origin = store.origin(class_id, index).file
                    assert image.endswith(f"/{origin}")
                    assert np.array_equal(store.read(class_id, index), by_pil(directory.parent / origin))
