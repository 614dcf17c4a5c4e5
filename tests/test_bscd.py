"""The four BSCD-FSL sources: the published classes, the right pictures, and no label made up."""

import hashlib
import json

import numpy as np
import pytest
from conftest import BENCHMARKS, by_pil, fails, picture, write_classes, write_picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from meta_dataset_readers.bscd import (
    CHESTX_FINDINGS,
    CHESTX_IMAGES,
    CHESTX_LABELS,
    CROP_DISEASE_IMAGES,
    EUROSAT_IMAGES,
    ISIC_IMAGES,
    ISIC_LABELS,
    LAYOUTS,
    open_chestx,
    open_crop_disease,
    open_eurosat,
    open_isic,
)
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.pictures import decode_image
from meta_dataset_readers.transforms import eval_transform

ISIC_HEADER = "image,MEL,NV,BCC"
CHESTX_HEADER = "Image Index,Finding Labels,Follow-up #,OriginalImage[Width,Height],"


def write_isic(directory, rows, header=ISIC_HEADER):
    (directory / ISIC_IMAGES).mkdir(parents=True, exist_ok=True)
    (directory / ISIC_LABELS).parent.mkdir(exist_ok=True)
    (directory / ISIC_LABELS).write_text("\n".join([header, *rows, ""]))
    return directory


def write_chestx(directory, rows):
    (directory / CHESTX_IMAGES).mkdir(parents=True, exist_ok=True)
    (directory / CHESTX_LABELS).write_text("\n".join([CHESTX_HEADER, *rows, ""]))
    return directory


def files(source):
    """Names of the picture files of every class."""
    return [
        [
            source.store.origin(class_id, index).file.rpartition("/")[2]
            for index in range(source.store.count(class_id))
        ]
        for class_id in range(len(source.spec.class_names))
    ]


def openers(directory):
    """Who would open the directory, going by what lies in it."""
    return {opener for marker, opener in LAYOUTS.items() if (directory / marker).exists()}


def only_test(source):
    return [len(source.spec.classes(split)) for split in ("TRAIN", "VALID")] == [0, 0]


# --- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opener", "folder"), [(open_crop_disease, CROP_DISEASE_IMAGES), (open_eurosat, EUROSAT_IMAGES)]
)
def test_the_classes_are_the_folders_of_the_published_part(tmp_path, opener, folder):
    directory = tmp_path / "source"
    write_classes(directory / folder, Rust=2, Healthy=3)
    write_classes(directory / "dataset" / "test", Unused=1)
    source = opener(directory, "source")
    assert source.spec.class_names == ("Healthy", "Rust") and source.spec.images_per_class == (3, 2)
    assert only_test(source) and source.resize == "square"
    assert source.store.origin(1, 0).file == f"source/{folder}/Rust/0.png"
    assert np.array_equal(source.store.read(0, 2), np.asarray(picture(2)))
    fails(rf"nowhere/{folder}: cannot be listed", lambda: opener(tmp_path / "nowhere", "x"))


# --- ISIC --------------------------------------------------------------------------------------------------


def test_isic_labels_a_picture_by_the_column_of_its_one(tmp_path):
    rows = ["b,0.0,1.0,0.0", "a,0,1,0", "", "c,1.0,0.0,0.0"]
    directory = write_isic(tmp_path / "ISIC", rows)
    for seed, name in enumerate("abc"):
        write_picture(directory / ISIC_IMAGES / f"{name}.jpg", seed)
    (directory / ISIC_IMAGES / "LICENSE.txt").touch()
    source = open_isic(directory, "ISIC")
    assert source.spec.class_names == ("MEL", "NV", "BCC")
    assert files(source) == [["c.jpg"], ["b.jpg", "a.jpg"], []]  # in the order of the list
    assert only_test(source) and source.resize == "square"
    assert np.array_equal(source.store.read(1, 0), by_pil(directory / ISIC_IMAGES / "b.jpg"))
    (directory / ISIC_IMAGES / "a.jpg").unlink()
    assert open_isic(directory, "ISIC").store.missing(range(3)) == [f"{ISIC_IMAGES}/a.jpg"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("a,0,0,0", r"line 3: expected a single 1 and 2 times 0, found '0,0,0'"),
        ("a,1,0,1", r"line 3: expected a single 1 .*, found '1,0,1'"),
        ("a,0.5,0.5,0", "line 3: expected a single 1"),
        ("a,nan,1,0", "line 3: expected a single 1"),
        ("a,yes,0,0", "line 3: expected a single 1"),
        ("a,1,0", "line 3: expected a single 1 .*, found '1,0'"),
        ("a,1,0,0,0", "line 3: expected a single 1"),
        ("a", "line 3: expected a single 1"),
        ("../outside,1,0,0", r"line 3: expected the name of a picture, found '\.\./outside\.jpg'"),
        ("/etc/passwd,1,0,0", "line 3: expected the name of a picture"),
        ("known,1,0,0", r"line 3: 'known\.jpg' is already in line 2"),
        ('"a,1,0,0', "line 3: not valid CSV"),
        ("x" * 200_000, "line 3: not valid CSV"),
    ],
)
def test_an_isic_row_that_names_no_one_class_is_refused(tmp_path, row, complaint):
    """The published loader makes class 0 of a row of zeros, without a word."""
    directory = write_isic(tmp_path / "ISIC", ["known,0,0,1", row])
    error = fails(complaint, lambda: open_isic(directory, "ISIC"))
    assert str(error).startswith(f"{directory / ISIC_LABELS}: ") and len(str(error)) < 1000


def test_an_isic_list_without_header_rows_or_folder_is_refused(tmp_path):
    directory = write_isic(tmp_path / "ISIC", ["a,0,1,0"], header="b,0,1,0")
    fails(r"line 1: expected 'image' and the classes, found 'b,0,1,0'", lambda: open_isic(directory, "ISIC"))
    fails("no picture of any class", lambda: open_isic(write_isic(directory, []), "ISIC"))
    (directory / ISIC_LABELS).write_text("\n\n")
    fails("empty, expected a header", lambda: open_isic(directory, "ISIC"))
    write_isic(directory, ["a,0,1,0"])
    (directory / ISIC_IMAGES).rmdir()
    assert openers(directory) == {open_isic}
    fails(rf"{ISIC_IMAGES}: no such folder", lambda: open_isic(directory, "ISIC"))
    (directory / ISIC_LABELS).unlink()
    assert openers(directory) == set()
    (directory / ISIC_IMAGES).mkdir()
    assert openers(directory) == {open_isic}
    fails(r"GroundTruth\.csv: no such file", lambda: open_isic(directory, "ISIC"))


@given(st.binary(max_size=60) | st.text(alphabet='a1,0."\n\r\0', max_size=60).map(str.encode))
def test_any_list_opens_or_is_refused(tmp_path_factory, content):
    directory = write_isic(tmp_path_factory.mktemp("source") / "ISIC", [])
    (directory / ISIC_LABELS).write_bytes(ISIC_HEADER.encode() + b"\nx,1,0,0\n" + content)
    try:
        source = open_isic(directory, "ISIC")
    except InputError as error:
        assert str(error).startswith(str(directory)) and "\n" not in str(error)
    else:
        assert files(source)[0][0] == "x.jpg"


# --- ChestX ------------------------------------------------------------------------------------------------


def test_chestx_keeps_pictures_with_one_finding_out_of_seven(tmp_path):
    rows = [
        "0.png,No Finding,0,1,1,",
        "1.png,Mass,0,1,1,",
        "2.png,Mass|Nodule,0,1,1,",
        "3.png,Atelectasis,0,1,1,",
        "4.png,Pneumonia,0,1,1,",
        "5.png,Hernia|Mass,0,1,1,",
        "6.png,Mass,0,1,1,",
        '7.png,"Effusion",0,1,1,',
        "8.png,Pleural_Thickening,0,1,1,",
        "9.png,Pneumothorax",
    ]
    directory = write_chestx(tmp_path / "ChestX", rows)
    write_picture(directory / CHESTX_IMAGES / "1.png")
    source = open_chestx(directory, "ChestX")
    assert source.spec.class_names == CHESTX_FINDINGS
    assert files(source) == [["3.png"], [], ["7.png"], [], ["1.png", "6.png"], [], ["9.png"]]
    assert only_test(source) and source.resize == "square"
    assert source.store.missing([4]) == [f"{CHESTX_IMAGES}/6.png"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "RGB"])
def test_chestx_pictures_are_resized_in_their_own_mode_before_they_become_rgb(tmp_path, mode):
    directory = write_chestx(tmp_path / "ChestX", ["0.png,Nodule,"])
    if mode == "I;16":
        original = Image.fromarray(np.random.default_rng(0).integers(0, 300, (30, 20), dtype=np.uint16))
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8)
        original = Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3]).convert(mode)
    original.save(directory / CHESTX_IMAGES / "0.png")
    with Image.open(directory / CHESTX_IMAGES / "0.png") as image:
        assert image.mode == mode
        expected = np.asarray(image.resize((256, 256)).convert("RGB"))
        other_order = np.asarray(image.convert("RGB").resize((256, 256)))
    store = open_chestx(directory, "ChestX").store
    assert np.array_equal(store.read(5, 0), expected)
    if mode in ("P", "RGBA", "1"):
        assert not np.array_equal(expected, other_order)  # so the order is worth a test
    assert np.array_equal(np.asarray(decode_image(store.encoded(5, 0))), expected)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("alone.png", r"line 2: expected a picture and its findings, found 'alone\.png'"),
        ("../0.png,Mass", "line 2: expected the name of a picture"),
        ('"a\nb.png",Mass', r"line 3: expected the name of a picture, found 'a\\nb\.png'"),
        ("..,Mass", "line 2: expected the name of a picture"),
        (",Mass", "line 2: expected the name of a picture, found ''"),
        ("0.png,No Finding", "no picture of any class in it"),
    ],
)
def test_a_faulty_chestx_row_is_named_by_file_and_line(tmp_path, row, complaint):
    directory = write_chestx(tmp_path / "ChestX", [row])
    error = fails(complaint, lambda: open_chestx(directory, "ChestX"))
    assert str(error).startswith(f"{directory / CHESTX_LABELS}: ")


def test_chestx_without_its_folder_of_pictures_is_told(tmp_path):
    directory = write_chestx(tmp_path / "ChestX", ["0.png,Mass"])
    (directory / CHESTX_IMAGES).rename(directory / "pictures")
    fails(r"ChestX/images: no such folder, expected all pictures", lambda: open_chestx(directory, "ChestX"))


# --- the layouts as the published loaders read them --------------------------------------------------------

MEAN, STD = np.array([[[[0.485]], [[0.456]], [[0.406]]], [[[0.229]], [[0.224]], [[0.225]]]])


@pytest.mark.benchmark_data
@pytest.mark.skipif(not (BENCHMARKS / "bscd").is_dir(), reason="no bscd in AMT_BENCHMARK_DATA")
@pytest.mark.parametrize(
    ("domain", "opener"),
    [
        ("CropDisease", open_crop_disease),
        ("EuroSAT", open_eurosat),
        ("ISIC", open_isic),
        ("ChestX", open_chestx),
    ],
)
def test_the_sample_holds_what_the_published_loaders_found_in_it(domain, opener):
    """Every picture, its label and pixels, and the numbers of the first picture after the transform."""
    expected = json.loads((BENCHMARKS / "expect" / "h5_bscd_fwt.json").read_text())["bscd"][domain]
    (directory,) = (path for path in (BENCHMARKS / "bscd").iterdir() if openers(path) == {opener})
    source = opener(directory, directory.name)
    spec, store = source.spec, source.store
    assert list(spec.class_names) == expected.get("classes", list(spec.class_names))
    assert (
        list(spec.images_per_class) == expected["counts"]
        and sum(spec.images_per_class) == expected["num_images"]
    )
    assert only_test(source) and store.missing(spec.classes("TEST")) == []

    of_class = [[] for _ in spec.class_names]
    for item, label in expected["items"]:
        of_class[label].append(item)
    for class_id, items in enumerate(of_class):
        assert store.count(class_id) == len(items)
        for index, item in enumerate(items):
            file = directory.parent / store.origin(class_id, index).file
            assert item in (file.name, file.stem, f"{file.parent.name}/{file.name}")
            with Image.open(file) as image:
                resized = image.resize((256, 256)) if domain == "ChestX" else image
                assert np.array_equal(store.read(class_id, index), np.asarray(resized.convert("RGB")))

    first = store.image(expected["first_item"]["label"], 0)
    assert list(first.size) == expected["first_item"]["size_wh"]
    assert hashlib.sha256(np.asarray(first).tobytes()).hexdigest()[:16] == expected["first_item"]["sha16"]
    numbers = expected["first_item_transformed_32"]
    transformed = (eval_transform(first, 32, source.resize).numpy() - MEAN) / STD
    assert list(transformed.shape) == numbers["shape"]
    assert transformed.mean() == pytest.approx(numbers["mean"], abs=1e-5)
    assert transformed.std(ddof=1) == pytest.approx(numbers["std"], abs=1e-5)
    for at in (0, 16):
        assert transformed[:, at, at] == pytest.approx(numbers[f"px_{at}_{at}"], abs=1e-5)
