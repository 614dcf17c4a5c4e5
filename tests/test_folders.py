"""Pictures in files of their own: folders of class folders, and what a store of files promises."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from conftest import BENCHMARKS, by_pil, fails, picture, write_classes, write_picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.folders import FileStore, open_class_folders, open_split_folders
from meta_dataset_readers.pictures import UnreadableImage, decode_image
from meta_dataset_readers.spec import SPLITS
from meta_dataset_readers.transforms import eval_transform

# --- a domain of one's own ---------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_a_test_domain_in_sorted_order(tmp_path):
    source = open_class_folders(write_classes(tmp_path / "mine", zebra=2, ant=3, Bee=1), "mine")
    assert source.spec.name == "mine"
    assert source.spec.class_names == ("Bee", "ant", "zebra")  # as Python and the published loaders sort
    assert source.spec.images_per_class == (1, 3, 2)
    assert [list(source.spec.classes(split)) for split in SPLITS] == [[], [], [0, 1, 2]]
    assert source.spec.ontology is None and source.resize == "shorter"
    assert [source.store.count(class_id) for class_id in range(3)] == [1, 3, 2]
    assert source.store.origin(2, 1).file == "mine/zebra/1.png" and source.store.origin(2, 1).record == 1
    assert source.store.place(1) == tmp_path / "mine" / "ant"


def test_only_files_with_a_known_ending_count_whatever_its_case(tmp_path):
    names = ["b.JPG", "a.jpeg", "c.Png", "d.ppm", "e.bmp", "f.pgm", "g.tif", "h.TIFF", "i.webp"]
    for seed, name in enumerate(names):
        mode = "L" if name.endswith(".pgm") else "RGB"
        write_picture(tmp_path / "own" / "only" / name, seed, mode)
    folder = tmp_path / "own" / "only"
    for name in ("notes.txt", ".hidden.jpg", "Thumbs.db", "j.gif", "jpg"):
        (folder / name).write_bytes(b"not a picture")
    (folder / "looks_like.jpg").mkdir()
    (tmp_path / "own" / ".git").mkdir()
    (tmp_path / "own" / "read.me.jpg").write_bytes(b"beside the class folders")
    store = open_class_folders(tmp_path / "own", "own").store
    assert [store.origin(0, i).file for i in range(store.count(0))] == [
        f"own/only/{n}" for n in sorted(names)
    ]
    for index, name in enumerate(sorted(names)):
        assert np.array_equal(store.read(0, index), by_pil(folder / name)), name


def test_opening_reads_no_picture(tmp_path):
    folder = tmp_path / "own" / "empty"
    folder.mkdir(parents=True)
    (folder / "0.jpg").touch()
    source = open_class_folders(tmp_path / "own", "own")
    assert source.store.count(0) == 1 and source.store.missing([0]) == []
    with pytest.raises(DamagedRecord, match=r"empty/0\.jpg: the image of 0 bytes cannot be decoded"):
        source.store.image(0, 0)


def test_splits_json_says_which_classes_are_for_what(tmp_path):
    directory = write_classes(tmp_path / "own", a=1, b=2, c=3, d=4, unused=0)
    (directory / "splits.json").write_text(json.dumps({"TEST": ["b"], "TRAIN": ["d", "a"]}))
    spec = open_class_folders(directory, "own").spec
    assert spec.class_names == ("a", "d", "b") and spec.images_per_class == (1, 4, 2)
    assert [list(spec.classes(split)) for split in SPLITS] == [[0, 1], [], [2]]


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [
        (
            {"TEST": ["cta"]},
            r"splits\.json: field 'TEST': there is no class folder 'cta'; did you mean 'cat'",
        ),
        ({"TEST": ["../own/cat"]}, r"field 'TEST': there is no class folder"),
        ({"TEST": ["cat", "cat"]}, r"field 'TEST': 'cat' is already in TEST"),
        ({"TRAIN": ["cat"], "TEST": ["cat"]}, r"field 'TEST': 'cat' is already in TRAIN"),
        ({"test": ["cat"]}, r"splits\.json: unknown key 'test'"),
        ({"TEST": "cat"}, r"field 'TEST': expected a list, found a string"),
        ({"TEST": [3]}, r"field 'TEST': expected a string, found an integer"),
        ({"TEST": None}, r"field 'TEST': expected a list"),
        (["cat"], r"splits\.json: expected an object, found a list"),
        ({}, r"own: no split has a picture"),
    ],
)
def test_a_faulty_splits_json_is_named_with_its_field(tmp_path, splits, complaint):
    directory = write_classes(tmp_path / "own", cat=1, dog=1)
    (directory / "splits.json").write_text(json.dumps(splits))
    fails(complaint, lambda: open_class_folders(directory, "own"))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"TEST": ["cat"], "TEST": ["dog"]}'])
def test_a_splits_json_that_is_not_json_is_named(tmp_path, text):
    directory = write_classes(tmp_path / "own", cat=1, dog=1)
    (directory / "splits.json").write_bytes(text)
    fails(r"splits\.json: not valid JSON", lambda: open_class_folders(directory, "own"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["cat", "dog"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(SPLITS) | st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_json_opens_or_is_refused(tmp_path_factory, splits):
    directory = tmp_path_factory.mktemp("source") / "own"
    write_classes(directory, cat=1, dog=1)
    (directory / "splits.json").write_text(json.dumps(splits))
    try:
        spec = open_class_folders(directory, "own").spec
    except InputError as error:
        assert str(directory) in str(error) and "\n" not in str(error)
    else:
        assert sorted(spec.class_names) == sorted(folder for split in splits.values() for folder in split)


def test_what_is_no_folder_of_class_folders_is_refused(tmp_path):
    fails(r"nowhere: cannot be listed: No such file", lambda: open_class_folders(tmp_path / "nowhere", "x"))
    (tmp_path / "file").touch()
    fails(r"file: cannot be listed: Not a directory", lambda: open_class_folders(tmp_path / "file", "x"))
    (tmp_path / "flat").mkdir()
    write_picture(tmp_path / "flat" / "0.png")
    fails(r"flat: no folder in it, expected one folder", lambda: open_class_folders(tmp_path / "flat", "x"))
    write_classes(tmp_path / "own", cat=1, dog=0)
    fails(r"own/dog: no picture in this class folder", lambda: open_class_folders(tmp_path / "own", "x"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list every directory")
def test_a_class_folder_that_may_not_be_listed_is_named(tmp_path):
    directory = write_classes(tmp_path / "own", cat=1, dog=1)
    (directory / "dog").chmod(0)
    fails(r"own/dog: cannot be listed: Permission denied", lambda: open_class_folders(directory, "own"))
    (directory / "dog").chmod(0o700)


def test_links_that_the_user_made_are_followed(tmp_path):
    elsewhere = write_classes(tmp_path / "large_disk", cat=2)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cat").symlink_to(elsewhere / "cat")
    (tmp_path / "own" / "gone").symlink_to(elsewhere / "gone")
    source = open_class_folders(tmp_path / "own", "own")
    assert source.spec.class_names == ("cat",) and source.store.read(0, 1).shape == (9, 12, 3)


# --- train, val and test -----------------------------------------------------------------------------------


def test_split_folders_become_splits_with_ids_that_go_on(tmp_path):
    write_classes(tmp_path / "few" / "test", y=1, x=2)
    write_classes(tmp_path / "few" / "train", b=3, c=4, a=5)
    write_classes(tmp_path / "few" / "val", m=6)
    (tmp_path / "few" / "val1000Episode_5_way_1_shot.json").write_text("[]")
    source = open_split_folders(tmp_path / "few", "few")
    assert source.spec.class_names == ("a", "b", "c", "m", "x", "y")
    assert source.spec.images_per_class == (5, 3, 4, 6, 2, 1) and source.resize == "exact"
    assert [tuple(source.spec.classes(split)) for split in SPLITS] == [(0, 1, 2), (3,), (4, 5)]
    assert source.store.origin(3, 5).file == "few/val/m/5.png"
    assert np.array_equal(source.store.read(4, 1), np.asarray(picture(1)))


def test_a_split_folder_may_be_absent_but_not_all(tmp_path):
    write_classes(tmp_path / "few" / "test", x=2)
    spec = open_split_folders(tmp_path / "few", "few").spec
    assert [len(spec.classes(split)) for split in SPLITS] == [0, 0, 1]
    write_classes(tmp_path / "none", x=2)
    fails("none: none of the folders train, val, test", lambda: open_split_folders(tmp_path / "none", "none"))


def test_the_same_class_in_two_splits_is_refused(tmp_path):
    """Ordinary data sets repeat their classes in train/ and test/; few-shot learning must not."""
    write_classes(tmp_path / "few" / "train", cat=1, dog=1)
    write_classes(tmp_path / "few" / "test", cat=1)
    fails("few: class 'cat' is in both TRAIN and TEST", lambda: open_split_folders(tmp_path / "few", "few"))


# --- what a store of files promises ------------------------------------------------------------------------


def store_of(file, **options):
    return FileStore(file.parent, "own", ((file.name,),), **options)


@pytest.mark.parametrize(
    ("format", "mode", "as_it_is"),
    [
        ("JPEG", "RGB", True),
        ("JPEG", "L", True),
        ("JPEG", "CMYK", True),
        ("PNG", "P", True),
        ("BMP", "RGB", True),
        ("PPM", "L", False),
        ("TIFF", "RGB", False),
        ("WEBP", "RGB", False),
    ],
)
def test_encoded_decodes_as_a_record_to_what_the_store_reads(tmp_path, format, mode, as_it_is):
    """Its bytes may end up in records, whose decoder takes fewer formats; the file's ending says nothing."""
    store = store_of(write_picture(tmp_path / "0.jpg", 5, mode, format))
    data = store.encoded(0, 0)
    assert (data == (tmp_path / "0.jpg").read_bytes()) == as_it_is
    assert np.array_equal(np.asarray(decode_image(data)), store.read(0, 0))
    assert np.array_equal(store.read(0, 0), by_pil(tmp_path / "0.jpg"))


def test_a_prepared_picture_is_encoded_as_prepared(tmp_path):
    def turn(image):
        assert image.mode == "L"  # its own mode
        return image.transpose(Image.Transpose.ROTATE_90)

    store = store_of(write_picture(tmp_path / "0.png", 5, "L"), prepare=turn)
    assert store.image(0, 0).mode == "RGB" and store.read(0, 0).shape == (12, 9, 3)
    assert np.array_equal(np.asarray(decode_image(store.encoded(0, 0))), store.read(0, 0))


def test_records_take_no_format_beyond_meta_datasets():
    stream = io.BytesIO()
    picture(0).save(stream, "WEBP")
    with pytest.raises(UnreadableImage, match="none of JPEG, PNG, BMP, GIF"):
        decode_image(stream.getvalue())


def test_every_absent_file_is_missing_and_is_told_when_read(tmp_path):
    for name in ("a/0.png", "a/2.png", "top.png"):
        write_picture(tmp_path / name)
    (tmp_path / "a" / "3.png").mkdir()
    files = (("a/0.png", "a/1.png"), ("a/2.png", "a/3.png"), ("b/0.png", "top.png"), ())
    store = FileStore(tmp_path, "own", files)
    assert store.missing(range(4)) == ["a/1.png", "a/3.png", "b/0.png"] and store.missing([]) == []
    assert store.missing([1]) == ["a/3.png"]
    assert store.place(3) == tmp_path
    absent, folder = "no such file", "is a folder, expected a regular file"
    for class_id, index, wrong in ((0, 1, absent), (1, 1, folder), (2, 0, absent)):
        for read in (store.image, store.encoded):
            error = fails(rf"(1|3|0)\.png: {wrong}", lambda read=read, at=(class_id, index): read(*at))
            assert isinstance(error, DamagedRecord)


def test_a_damaged_picture_is_named_by_its_path(tmp_path):
    file = write_picture(tmp_path / "own" / "cat" / "0.png")
    file.write_bytes(file.read_bytes()[:60])
    error = fails(r"own/cat/0\.png: the image of 60 bytes", lambda: store_of(file).image(0, 0))
    assert isinstance(error, DamagedRecord)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("header", [b"P6 60000 60000 255\n", b"P6 9000 9000 255\n"])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, header):
    (tmp_path / "0.ppm").write_bytes(header)
    fails(r"0\.ppm: .*pixels", lambda: store_of(tmp_path / "0.ppm").image(0, 0))


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path):
    with (tmp_path / "0.png").open("wb") as sparse:
        sparse.truncate(2**40)
    fails(r"0\.png: 1099511627776 bytes, at most", lambda: store_of(tmp_path / "0.png").image(0, 0))


@pytest.mark.filterwarnings("ignore")  # PIL says what it thinks of damaged headers
@given(st.data())
def test_a_mutated_picture_is_read_or_refused_never_worse(tmp_path_factory, data):
    format = data.draw(st.sampled_from(["PPM", "TIFF", "WEBP", "BMP"]))
    file = write_picture(tmp_path_factory.mktemp("mutated") / "0.png", 1, format=format)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert store_of(file).read(0, 0).dtype == np.uint8
    except DamagedRecord as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)


def test_a_store_crosses_processes_and_keeps_no_file_open(tmp_path):
    source = open_class_folders(write_classes(tmp_path / "own", cat=2, dog=3), "own")
    store = pickle.loads(pickle.dumps(source.store))
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    images = [store.image(1, index) for index in range(3)]
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    assert len(before) == len(after) and [image.mode for image in images] == ["RGB"] * 3


# --- folders as the published loaders read them ------------------------------------------------------------


@pytest.mark.benchmark_data
@pytest.mark.skipif(not (BENCHMARKS / "pmf_folders").is_dir(), reason="no pmf_folders in AMT_BENCHMARK_DATA")
def test_every_folder_of_the_sample_is_a_class_and_every_picture_is_pils():
    for directory in sorted((BENCHMARKS / "pmf_folders").iterdir()):
        source = open_split_folders(directory, directory.name)
        found = {}
        for split, folder in (("TRAIN", "train"), ("VALID", "val"), ("TEST", "test")):
            names = [source.spec.class_names[class_id] for class_id in source.spec.classes(split)]
            assert names == sorted(path.name for path in (directory / folder).iterdir())
            assert not source.store.missing(source.spec.classes(split))
            for class_id in source.spec.classes(split):
                for index in range(source.store.count(class_id)):
                    origin = directory.parent / source.store.origin(class_id, index).file
                    assert np.array_equal(source.store.read(class_id, index), by_pil(origin))
                    found[origin] = split
        assert set(found) == {path for path in directory.glob("*/*/*") if not path.name.startswith(".")}


@pytest.mark.benchmark_data
@pytest.mark.skipif(not (BENCHMARKS / "pmf_folders").is_dir(), reason="no pmf_folders in AMT_BENCHMARK_DATA")
def test_the_pictures_of_pmfs_validation_episodes_have_its_mean():
    """The reference mean is that of the first episode's support, resized to squares and in [0, 1]."""
    expected = json.loads((BENCHMARKS / "expect" / "h5_bscd_fwt.json").read_text())["pmf_folders"]
    for key, episodes in expected.items():
        name, shots = key.split("/")
        directory = BENCHMARKS / "pmf_folders" / name
        source = open_split_folders(directory, name)
        where = {
            source.store.origin(class_id, index).file: (class_id, index)
            for class_id in source.spec.classes("VALID")
            for index in range(source.store.count(class_id))
        }
        listed = json.loads(
            (directory / f"val1000Episode_5_way_{shots.removesuffix('shot')}_shot.json").read_text()
        )
        assert len(listed) == episodes["n"]
        files = [f"{name}/val/{file}" for files in listed[0]["Support"] for file in files]
        images = [source.store.image(*where[file]) for file in files]
        support = [eval_transform(image, episodes["support"][-1], source.resize).numpy() for image in images]
        assert len(support) == episodes["support"][0]
        assert np.mean(support) == pytest.approx(episodes["support_mean"], abs=1e-6)


def test_own_pictures_are_turned_as_their_exif_says(tmp_path):
    """And only those: published layouts are read as the published loaders read them."""
    path = tmp_path / "own" / "ant" / "0.jpg"
    path.parent.mkdir(parents=True)
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    image.save(path, exif=exif)
    store = open_class_folders(tmp_path / "own", "own").store
    found = np.array(store.image(0, 0))
    assert found.shape == (16, 8, 3) and found[:6].max() < 20 and found[-6:].min() > 235
    assert np.array_equal(np.array(decode_image(store.encoded(0, 0))), found)
    assert FileStore(tmp_path / "own", "own", [("ant/0.jpg",)]).image(0, 0).size == (16, 8)
