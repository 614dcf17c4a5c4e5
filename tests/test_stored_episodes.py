"""Episodes in files: each form is read back as it was meant, what was dumped comes back unchanged, and no
damage is taken for an episode."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import BENCHMARKS, by_pil, fails, flat_spec, jpeg, write_picture, write_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from meta_dataset_readers import dump
from meta_dataset_readers.convert import convert
from meta_dataset_readers.dump import dump_episode
from meta_dataset_readers.episode import Episode, ImageOrigin
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.pictures import decode_image
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, episode_loader
from meta_dataset_readers.stored_episodes import open_episodes
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records
from meta_dataset_readers.transforms import eval_transform

MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
SIZE = 8


def assert_same(one: Episode, other: Episode):
    """Every field, tensors bit by bit."""
    for field in dataclasses.fields(Episode):
        left, right = getattr(one, field.name), getattr(other, field.name)
        same = left.equal(right) if isinstance(left, torch.Tensor) else left == right
        assert same, (field.name, left, right)


# --- PMF's validation episodes ---------------------------------------------------------------------------


def grey_levels(episode, part, n_images):
    rng = np.random.default_rng([episode, part])
    return rng.integers(0, 256, (n_images, 3, SIZE, SIZE), dtype=np.uint8)


def normalised(pixels):
    return (pixels.astype(np.float32) / 255 - MEAN) / STD


SUPPORT_LABELS, QUERY_LABELS = [2, 2, 0, 1, 1], [2, 0, 1]


def write_normalised(path, n_episodes=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for index in range(n_episodes):
            group = file.create_group(str(index))
            group["sx"] = normalised(grey_levels(index, 0, 5))
            group["sy"] = np.array(SUPPORT_LABELS)
            group["x"] = normalised(grey_levels(index, 1, 3))
            group["y"] = np.array(QUERY_LABELS)
    return path


@pytest.fixture
def normalised_file(tmp_path):
    return write_normalised(tmp_path / "fungi" / f"val_ep3_img{SIZE}.h5")


def test_normalisation_is_undone_and_labels_stay_in_their_order(normalised_file):
    """Also white and black, which float32 puts beyond 1 and 0."""
    episodes = open_episodes(normalised_file, SIZE)
    assert len(episodes) == 3, "the number comes from the file, not from its name"
    for index in range(3):
        episode = episodes[index]
        for images, part, count in ((episode.support, 0, 5), (episode.query, 1, 3)):
            pixels = torch.from_numpy(grey_levels(index, part, count))
            assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
            assert (images * 255 - pixels).abs().max() < 1e-4
        assert episode.support_labels.tolist() == SUPPORT_LABELS
        assert episode.query_labels.tolist() == QUERY_LABELS
        assert (episode.source, episode.index, episode.n_way) == ("fungi", index, 3)
        place = f"fungi/val_ep3_img{SIZE}.h5/{index}"
        assert episode.support_origin[4] == ImageOrigin(f"{place}/sx", 4)
        assert episode.query_origin == tuple(ImageOrigin(f"{place}/x", image) for image in range(3))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            episodes[index]


def test_the_number_of_episodes_is_that_of_the_file(tmp_path):
    """Eleven, in the order 0, 1, 2 where HDF5 lists 0, 1, 10."""
    episodes = open_episodes(write_normalised(tmp_path / "val_ep120.h5", 11), SIZE)
    assert len(episodes) == 11
    assert (episodes[2].support * 255 - torch.from_numpy(grey_levels(2, 0, 5))).abs().max() < 1e-4


def test_another_byte_order_and_narrow_labels_make_no_difference(normalised_file):
    before = open_episodes(normalised_file, SIZE)[1]
    with h5py.File(normalised_file, "r+") as file:
        for name, dtype in (("sx", ">f4"), ("sy", "u1"), ("x", ">f4"), ("y", "i2")):
            values = file["1"][name][()].astype(dtype)
            del file["1"][name]
            file["1"].create_dataset(name, data=values, compression="gzip")
    assert_same(before, open_episodes(normalised_file, SIZE)[1])


def test_episodes_in_use_can_be_pickled_and_read_by_workers(normalised_file):
    episodes = open_episodes(normalised_file, SIZE)
    alone = [episodes[index] for index in range(3)]
    assert_same(alone[2], pickle.loads(pickle.dumps(episodes))[2])
    for one, other in zip(alone, episode_loader(episodes, num_workers=2), strict=True):
        assert_same(one, other)


def test_episodes_of_another_size_are_refused_when_they_are_opened(normalised_file):
    match = f"{normalised_file}: images of 8 x 8 pixels are stored, image_size asks for 84 x 84"
    fails(match, lambda: open_episodes(normalised_file, 84))


def changed(name, index=(), value=None, dtype=None):
    """The dataset `name` with another value at `index`, or of another type."""

    def change(group):
        values = group[name][()].astype(dtype or group[name].dtype)
        if value is not None:
            values[index] = value
        del group[name]
        group[name] = values

    return change


def other(name, values):
    def change(group):
        del group[name]
        if values is not None:
            group[name] = values

    return change


NORMALISED_DAMAGE = {
    "no support": (other("sx", None), "no dataset 'sx'"),
    "no labels": (other("y", None), "no dataset 'y'"),
    "bytes": (changed("sx", dtype=np.uint8), "'sx' is uint8"),
    "double": (changed("x", dtype=np.float64), "'x' is float64"),
    "fractional labels": (changed("sy", dtype=np.float32), "'sy' is float32"),
    "flat": (other("x", np.zeros((3, 3 * SIZE * SIZE), np.float32)), r"'x' is float32 \(3, 192\)"),
    "grey": (other("sx", np.zeros((5, 1, SIZE, SIZE), np.float32)), r"expected float32 \(images, 3, 8, 8\)"),
    "too few labels": (other("sy", np.array([0, 1, 2])), r"'sy' is int64 \(3,\), expected integer \(5\)"),
    "negative label": (changed("sy", 2, -1), r"'sy' has the labels \[-1, 1, 2\]"),
    "gap in labels": (changed("sy", slice(3, 5), 3), r"'sy' has the labels \[0, 2, 3\]"),
    "unknown query": (changed("y", 0, 3), "'y' has labels beyond those of 'sy', which end at 2"),
    "not a number": (changed("sx", (1, 2, 3, 4), np.nan), r"'sx' holds nan at \[1, 2, 3, 4\]"),
    "infinite": (changed("x", (0, 0, 0, 0), np.inf), r"'x' holds inf at \[0, 0, 0, 0\]"),
    "too bright": (changed("x", (2, 1, 0, 0), 3), r"'x' holds 1.128 at \[2, 1, 0, 0\]"),
    "too dark": (changed("sx", (2, 1, 0, 0), -3), r"'sx' holds -0.216 at"),
}


@pytest.mark.parametrize("case", NORMALISED_DAMAGE)
def test_a_damaged_normalised_episode_is_named_and_its_neighbours_are_sound(normalised_file, case):
    change, match = NORMALISED_DAMAGE[case]
    with h5py.File(normalised_file, "r+") as file:
        change(file["1"])
    episodes = open_episodes(normalised_file, SIZE)
    fails(f"{normalised_file}: episode 1: .*{match}", lambda: episodes[1])
    assert len(episodes[2].support) == 5


def test_episodes_without_support_or_far_too_large_are_refused(normalised_file):
    with h5py.File(normalised_file, "r+") as file:
        other("sx", np.zeros((0, 3, SIZE, SIZE), np.float32))(file["0"])
        other("sy", np.zeros(0, np.int64))(file["0"])
        del file["1/sx"]
        file["1"].create_dataset("sx", (2**40, 3, SIZE, SIZE), np.float32, chunks=(1, 3, SIZE, SIZE))
    episodes = open_episodes(normalised_file, SIZE)
    fails(r"episode 0: 'sy' has the labels \[\]", lambda: episodes[0])
    fails("episode 1: 'sx' claims 1099511627776 images, at most", lambda: episodes[1])


def test_an_episode_without_query_images_is_an_episode(normalised_file):
    with h5py.File(normalised_file, "r+") as file:
        other("x", np.zeros((0, 3, SIZE, SIZE), np.float32))(file["0"])
        other("y", np.zeros(0, np.int64))(file["0"])
    episode = open_episodes(normalised_file, SIZE)[0]
    assert episode.query.shape == (0, 3, SIZE, SIZE) and len(episode.query_labels) == 0


def test_hdf5_files_without_episodes_are_refused(normalised_file, tmp_path):
    with h5py.File(normalised_file, "r+") as file:
        file.move("1", "3")
    fails("3 records, but no '1'", lambda: open_episodes(normalised_file, SIZE))
    nothing, pictures = tmp_path / "nothing.h5", tmp_path / "pictures.h5"
    h5py.File(nothing, "w").close()
    fails(f"{nothing}: no episode in this file", lambda: open_episodes(nothing, SIZE))
    with h5py.File(pictures, "w") as file:
        file["0/image"] = np.zeros((SIZE, SIZE, 3), np.uint8)
    fails(f"{pictures}: episode 0: no dataset 'sx'", lambda: open_episodes(pictures, SIZE))


# --- Meta-Dataset's dumped episodes ----------------------------------------------------------------------


def write_part(folder, name, labels):
    write_records(
        folder / name, (encode_example(jpeg(abs(label), k), label) for k, label in enumerate(labels))
    )
    return {str(label): labels.count(label) for label in sorted(set(labels))}


@pytest.fixture
def dumped_folder(tmp_path):
    """Episodes 0 and 10, as Meta-Dataset writes them."""
    folder = tmp_path / "dumped"
    folder.mkdir()
    parts = {
        "episode-0010-train.tfrecords": [0, 1],
        "episode-0010-test.tfrecords": [0, 0, 1, 1],
        "episode-0000-train.tfrecords": [1, 1, 0, 2],
        "episode-0000-test.tfrecords": [1, 0, 2],
    }
    counts = {name: write_part(folder, name, labels) for name, labels in parts.items()}
    (folder / "images_per_class.json").write_text(json.dumps(counts, indent=2))
    return folder


def test_dumped_episodes_are_read_in_the_order_of_their_numbers(dumped_folder):
    episodes = open_episodes(dumped_folder, SIZE)
    assert len(episodes) == 2
    first, second = episodes[0], episodes[1]
    assert first.support_labels.tolist() == [1, 1, 0, 2] and first.query_labels.tolist() == [1, 0, 2]
    assert second.support_labels.tolist() == [0, 1] and second.query_labels.tolist() == [0, 0, 1, 1]
    assert (first.source, first.index, second.index) == ("dumped", 0, 10)
    assert second.query_origin[3] == ImageOrigin("dumped/episode-0010-test.tfrecords", 3)
    for record, label in enumerate(first.support_labels.tolist()):
        expected = eval_transform(decode_image(jpeg(label, record)), SIZE)
        assert first.support[record].equal(expected)


def with_counts(**counts):
    """Change the list; None takes a file off it."""

    def change(folder):
        file = folder / "images_per_class.json"
        listed = json.loads(file.read_text()) | {
            f"episode-0010-{part}.tfrecords": of_part for part, of_part in counts.items()
        }
        file.write_text(
            json.dumps({name: of_part for name, of_part in listed.items() if of_part is not None})
        )

    return change


def listed_as(text):
    return lambda folder: (folder / "images_per_class.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (listed_as("{"), "images_per_class.json: not valid JSON"),
        (listed_as("[]"), "images_per_class.json: expected an object, found a list"),
        (listed_as('{"../../secret-train.tfrecords": {"0": 1}}'), "secret-train.tfrecords': unknown name"),
        (listed_as('{"episode-0000-train.tfrecords": [1]}'), "expected an object, found a list"),
        (with_counts(train={"0": 1, "1": "1"}), "field '1': expected an integer, found a string"),
        (with_counts(train={"0": 1, "2": 1}), "field '1' is missing"),
        (with_counts(train={"0": 1, "1": -1}), "field '1': expected a count"),
        (with_counts(train=None), "images_per_class.json: field 'episode-0010-train.tfrecords' is missing"),
        (with_counts(train={}), "'episode-0010-train.tfrecords': expected an image of each of the classes"),
        (with_counts(train={"0": 2, "1": 0}), "expected an image of each of the classes"),
        (with_counts(test={"0": 4}), "expected an image of each of the classes"),
        (lambda folder: (folder / "episode-0000-test.tfrecords").unlink(), "test.tfrecords: no such file"),
    ],
)
def test_a_list_of_dumped_episodes_must_be_whole(dumped_folder, change, match):
    change(dumped_folder)
    error = fails(match, lambda: open_episodes(dumped_folder, SIZE))
    assert str(error).startswith(str(dumped_folder))


def rewritten(labels):
    return lambda folder: write_part(folder, "episode-0010-test.tfrecords", labels)


def cut_off(folder):
    file = folder / "episode-0010-test.tfrecords"
    file.write_bytes(file.read_bytes()[:-1])


def flipped_byte(folder):
    file = folder / "episode-0010-test.tfrecords"
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)


def no_picture(folder):
    write_records(folder / "episode-0010-test.tfrecords", [encode_example(b"GIF", k // 2) for k in range(4)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_counts(test={"0": 2, "1": 3}), "4 records, images_per_class.json lists 5"),
        (with_counts(test={"0": 1, "1": 3}), "2 images of label 0, images_per_class.json lists 1"),
        (rewritten([0, 0, 1, 2]), "record 3 at byte .*: label 2, expected 0 to 1"),
        (rewritten([0, 0, 1, -1]), "record 3 at byte .*: label -1, expected 0 to 1"),
        (cut_off, "record 3 at byte "),
        (flipped_byte, "record 3 at byte .*: wrong checksum"),
        (no_picture, "record 0 at byte 0: the image of 3 bytes cannot be decoded"),
    ],
)
def test_a_damaged_dumped_episode_is_named_and_its_neighbours_are_sound(dumped_folder, change, match):
    change(dumped_folder)
    episodes = open_episodes(dumped_folder, SIZE)
    error = fails(match, lambda: episodes[1])
    assert str(error).startswith(str(dumped_folder / "episode-0010-test.tfrecords"))
    assert len(episodes[0].support) == 4


# --- the way out -----------------------------------------------------------------------------------------

SAMPLING = EpisodeSampling(num_ways=5, num_query=2)


@pytest.fixture
def reader(tiny_source):
    directory = tiny_source()
    return EpisodeReader(directory.parent, "tiny", "TRAIN", SAMPLING, SIZE, n_episodes=9, seed=3)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_dumped_comes_back_unchanged(reader, tmp_path):
    """Images, labels, classes and where every image came from."""
    for number in (0, 1, 12):
        dump_episode(tmp_path / "out", number, reader.episode(number), reader)
    episodes = open_episodes(tmp_path / "out", SIZE)
    assert len(episodes) == 3
    for position, number in enumerate((0, 1, 12)):
        assert_same(episodes[position], reader.episode(number))


def test_the_files_are_those_of_meta_dataset_with_the_original_bytes(reader, tmp_path):
    episode = reader[4]
    dump_episode(tmp_path / "out", 4, episode, reader)
    parts = {"train": (episode.support_labels, episode.support_origin)}
    parts["test"] = (episode.query_labels, episode.query_origin)
    names = [f"episode-0004-{part}.tfrecords" for part in parts]
    assert sorted(content(tmp_path / "out")) == sorted(["episode-0004.json", "images_per_class.json", *names])
    counts = json.loads((tmp_path / "out" / "images_per_class.json").read_text())
    assert list(counts) == names
    for name, (labels, origins) in zip(names, parts.values(), strict=True):
        assert counts[name] == {str(label): labels.tolist().count(label) for label in range(5)}
        file = open_records(tmp_path / "out" / name)
        for record, (label, origin) in enumerate(zip(labels.tolist(), origins, strict=True)):
            bytes_of_origin = jpeg(episode.class_ids[label], origin.record)
            assert file.read_example(record) == (bytes_of_origin, label)
    about = json.loads((tmp_path / "out" / "episode-0004.json").read_text())
    assert (about["source"], about["split"], about["seed"], about["index"]) == ("tiny", "TRAIN", 3, 4)
    assert about["class_ids"] == list(episode.class_ids)
    assert about["class_names"] == [f"class {class_id}" for class_id in episode.class_ids]
    assert about["query_origin"][0] == dataclasses.asdict(episode.query_origin[0])


def test_an_episode_without_query_images_can_be_dumped(tiny_source, tmp_path):
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=0)
    reader = EpisodeReader(tiny_source().parent, "tiny", "TRAIN", sampling, SIZE, n_episodes=1)
    dump_episode(tmp_path / "out", 0, reader[0], reader)
    assert_same(open_episodes(tmp_path / "out", SIZE)[0], reader[0])


def hdf5_source(root):
    """Has pixels but no picture files: they are dumped as PNG."""
    directory = write_spec(root / "tiny", flat_spec("tiny", (5, 0, 0), [6] * 5))
    for class_id in range(5):
        with h5py.File(directory / f"{class_id}.h5", "w") as file:
            for index in range(6):
                pixels = np.random.default_rng([class_id, index]).integers(0, 256, (9, 12, 3), dtype=np.uint8)
                file[f"{index}/image"] = pixels


def filelist_source(root):
    """Has another evaluation transform, and single files of which some are no JPEG or PNG."""
    names = [f"class {label}" for label in range(10)]
    for split, file in enumerate(("base", "val", "novel")):
        labels = [label for label in range(10) for _ in range(6) if (label < 5, False, label >= 5)[split]]
        images = [f"images/{label}/{k}.{('png', 'ppm', 'jpg')[k % 3]}" for k, label in enumerate(labels)]
        for k, image in enumerate(images):
            write_picture(root / "tiny" / image, k)
        lists = {"label_names": names, "image_names": images, "image_labels": labels}
        (root / "tiny" / f"{file}.json").parent.mkdir(exist_ok=True, parents=True)
        (root / "tiny" / f"{file}.json").write_text(json.dumps(lists))


def packed_source(root):
    """Keeps the classes of a split in one file: a record's number is not the image's index."""
    hdf5_source(root / "original")
    list(convert({"tiny": open_source(root / "original", "tiny")}, root))


@pytest.mark.parametrize("write", [hdf5_source, filelist_source, packed_source])
def test_episodes_of_every_layout_come_back_unchanged(tmp_path, write):
    write(tmp_path)
    sampling = EpisodeSampling(num_ways=5, num_support=2, num_query=2)
    reader = EpisodeReader(tmp_path, "tiny", "TRAIN", sampling, SIZE, n_episodes=2)
    for index in range(2):
        dump_episode(tmp_path / "out", index, reader[index], reader)
        assert_same(open_episodes(tmp_path / "out", SIZE)[index], reader[index])


def test_another_episode_is_never_overwritten(reader, tmp_path):
    out = tmp_path / "out"
    dump_episode(out, 0, reader[0], reader)
    before = content(out)
    dump_episode(out, 0, reader[0], reader)
    assert content(out) == before, "the same episode may be written again"
    fails("episode-0000.json: describes another episode", lambda: dump_episode(out, 0, reader[1], reader))
    assert content(out) == before


@pytest.mark.parametrize("listed", [True, False])
def test_an_episode_of_meta_dataset_is_never_overwritten(reader, dumped_folder, listed):
    if not listed:
        (dumped_folder / "images_per_class.json").unlink()
    before = content(dumped_folder)
    match = "episode-0010-train.tfrecords: belongs to another episode"
    fails(match, lambda: dump_episode(dumped_folder, 10, reader[0], reader))
    assert content(dumped_folder) == before


def test_dumping_beside_other_episodes_leaves_them_alone(reader, dumped_folder):
    before, listed = content(dumped_folder), json.loads((dumped_folder / "images_per_class.json").read_text())
    dump_episode(dumped_folder, 3, reader[0], reader)
    after = content(dumped_folder)
    assert all(after[name] == before[name] for name in before if name != "images_per_class.json")
    assert json.loads(after["images_per_class.json"]).items() >= listed.items()
    episodes = open_episodes(dumped_folder, SIZE)
    assert [episodes[position].index for position in range(3)] == [0, 0, 10], (
        "episode 0 of the reader is third"
    )
    assert_same(episodes[1], reader[0])


def test_an_interrupted_dump_is_no_episode_until_it_is_completed(reader, tmp_path, monkeypatch):
    out = tmp_path / "out"
    dump_episode(out, 0, reader[0], reader)

    def interrupted(path, payloads):
        if path.name == "episode-0001-test.tfrecords":
            raise KeyboardInterrupt
        write_records(path, payloads)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dump, "write_records", interrupted)
        dump_episode(out, 1, reader[1], reader)
    assert len(open_episodes(out, SIZE)) == 1
    fails("describes another episode", lambda: dump_episode(out, 1, reader[2], reader))
    dump_episode(out, 1, reader[1], reader)
    assert_same(open_episodes(out, SIZE)[1], reader[1])


def test_a_folder_that_cannot_be_written_is_named(reader, tmp_path):
    (tmp_path / "out").write_text("in the way")
    fails(
        f"{tmp_path}/out: episode 0 cannot be written",
        lambda: dump_episode(tmp_path / "out", 0, reader[0], reader),
    )


def test_an_episode_of_another_reader_is_not_dumped_under_the_name_of_this_one(reader, tmp_path):
    foreign = dataclasses.replace(reader[0], source="elsewhere")
    with pytest.raises(ValueError, match="elsewhere"):
        dump_episode(tmp_path / "out", 0, foreign, reader)
    moved = dataclasses.replace(reader[0], support_origin=reader[0].support_origin[::-1])
    with pytest.raises(ValueError, match="is not a picture of class"):
        dump_episode(tmp_path / "out", 0, moved, reader)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("resize", "nearest", "field 'resize': unknown rule 'nearest'"),
        ("index", -1, "field 'index': expected a count, found -1"),
        ("source", 1, "field 'source': expected a string, found an integer"),
        ("class_ids", [0, 1], "field 'class_ids': 2 entries, images_per_class.json lists 5"),
        ("class_ids", ["a"] * 5, "field 'class_ids': expected an integer, found a string"),
        ("query_origin", [], "field 'query_origin': 0 entries, images_per_class.json lists 10"),
        (
            "support_origin",
            [{"file": 1, "record": 0}],
            r"'support_origin'\[0\]: field 'file': expected a string",
        ),
    ],
)
def test_a_description_must_fit_its_episode(reader, tmp_path, field, value, match):
    out = tmp_path / "out"
    dump_episode(out, 0, reader[0], reader)
    file = out / "episode-0000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    fails(f"{file}: .*{match}", lambda: open_episodes(out, SIZE)[0])


# --- PMF's lists of image files --------------------------------------------------------------------------


@pytest.fixture
def listed_file(tmp_path):
    """Two episodes of 2 and 3 ways whose classes have different numbers of images."""
    for seed, image in enumerate(
        ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png", "emu/a.png", "emu/b.png")
    ):
        write_picture(tmp_path / "cifar-fs" / "val" / image, seed)
    file = tmp_path / "cifar-fs" / "val1000Episode_5_way_1_shot.json"
    episodes = [
        {"Support": [["dog/a.png"], ["cat/b.png"]], "Query": [["dog/b.png"], ["cat/a.png"]]},
        {
            "Support": [["emu/b.png"], ["cat/a.png", "cat/b.png"], ["dog/b.png"]],
            "Query": [["emu/a.png"], [], ["dog/a.png"]],
        },
    ]
    file.write_text(json.dumps(episodes))
    return file


def test_listed_episodes_are_resized_as_a_whole_and_labelled_by_position(listed_file):
    episodes = open_episodes(listed_file, SIZE)
    assert len(episodes) == 2
    first, second = episodes[0], episodes[1]
    assert first.support_labels.tolist() == first.query_labels.tolist() == [0, 1]
    assert second.support_labels.tolist() == [0, 1, 1, 2] and second.query_labels.tolist() == [0, 2]
    assert (first.source, second.index) == ("cifar-fs", 1)
    images = [origin.file for origin in second.support_origin]
    assert images == [
        f"cifar-fs/val/{image}" for image in ("emu/b.png", "cat/a.png", "cat/b.png", "dog/b.png")
    ]
    for pixels, image in zip(second.support, images, strict=True):
        whole = Image.fromarray(by_pil(listed_file.parent.parent / image)).resize(
            (SIZE, SIZE), Image.BILINEAR
        )
        assert (pixels * 255).round().equal(torch.tensor(np.asarray(whole)).permute(2, 0, 1).float())
    assert_same(second, pickle.loads(pickle.dumps(episodes))[1])


SOUND = [["cat/a.png"]]


@pytest.mark.parametrize(
    ("episodes", "match"),
    [
        ([], "no episode in this file"),
        ([[]], "episode 0: expected an object, found a list"),
        ([{"Support": SOUND}], "episode 0: field 'Query' is missing"),
        ([{"Support": SOUND, "Query": SOUND, "Base": SOUND}], "episode 0: unknown key 'Base'"),
        ([{"Support": SOUND, "Query": "cat/a.png"}], "field 'Query': expected a list, found a string"),
        (
            [{"Support": SOUND, "Query": ["cat/a.png"]}],
            r"field 'Query'\[0\]: expected a list, found a string",
        ),
        ([{"Support": SOUND, "Query": [[1]]}], r"field 'Query'\[0\]: expected a string, found an integer"),
        ([{"Support": SOUND, "Query": SOUND * 2}], "1 classes in 'Support', 2 in 'Query'"),
        ([{"Support": [], "Query": []}], "0 classes in 'Support'"),
        ([{"Support": [[]], "Query": SOUND}], "a support image of each"),
        (
            [{"Support": SOUND, "Query": [["../val/cat/a.png"]]}],
            "does not lead outside, found '../val/cat/a.png'",
        ),
        ([{"Support": SOUND, "Query": [["cat/../../a.png"]]}], "does not lead outside"),
        ([{"Support": SOUND, "Query": [["/etc/passwd"]]}], "does not lead outside"),
        ([{"Support": SOUND, "Query": [["..\\a.png"]]}], "does not lead outside"),
        ([{"Support": SOUND, "Query": [[""]]}], "does not lead outside"),
        ([{"Support": SOUND, "Query": [["cat/\0"]]}], "does not lead outside"),
        ([{"Support": SOUND, "Query": [["\ud800/a.png"]]}], "does not lead outside"),
        (
            [{"Support": SOUND, "Query": [["cat/z.png"]]}],
            "1 of the 2 images listed are missing .* 'cat/z.png'",
        ),
        ([{"Support": SOUND, "Query": [["cat/" + "z" * 5000]]}], "1 of the 2 images listed are missing"),
    ],
)
def test_a_list_of_images_must_be_whole_and_stay_inside(listed_file, episodes, match):
    listed_file.write_text(json.dumps(episodes))
    error = fails(match, lambda: open_episodes(listed_file, SIZE))
    assert str(error).startswith(str(listed_file)) and len(str(error)) < 1000


def test_a_listed_image_that_is_none_is_named(listed_file):
    image = listed_file.parent / "val" / "dog" / "b.png"
    image.write_bytes(b"<html>")
    episodes = open_episodes(listed_file, SIZE)
    fails(f"{image}: ", lambda: episodes[0])


# --- which form it is ------------------------------------------------------------------------------------


def test_the_form_shows_in_the_content_and_not_in_the_name(normalised_file, listed_file, tmp_path):
    for file, count in ((normalised_file, 3), (listed_file, 2)):
        renamed = shutil.copy(file, file.with_name("episodes.bin"))
        assert len(open_episodes(str(renamed), SIZE)) == count


def test_anything_else_is_refused(tmp_path, normalised_file):
    page = tmp_path / "val_ep120_img128.h5"
    page.write_text("<html>404 Not Found</html>")
    fails(f"{page}: neither HDF5 nor a JSON list", lambda: open_episodes(page, SIZE))
    fails(f"{tmp_path}: no images_per_class.json", lambda: open_episodes(tmp_path, SIZE))
    fails(f"{tmp_path}/absent: no such file", lambda: open_episodes(tmp_path / "absent", SIZE))
    fails("image_size is 0", lambda: open_episodes(normalised_file, 0))
    page.write_text("[{]")
    fails(f"{page}: not valid JSON", lambda: open_episodes(page, SIZE))
    page.write_bytes(normalised_file.read_bytes()[:-1])
    fails(f"{page}: cannot be opened as HDF5: truncated", lambda: open_episodes(page, SIZE))
    page.unlink()
    os.mkfifo(page)  # which nobody will ever write to
    fails(f"{page}: is a pipe, expected a regular file", lambda: open_episodes(page, SIZE))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """The bytes of a valid HDF5 file, and where they mean something: most are padding."""
    path = write_normalised(tmp_path_factory.mktemp("small") / "val.h5", 2)
    data = path.read_bytes()
    return path, data, [at for at in range(len(data)) if any(data[max(at - 3, 0) : at + 4])]


@settings(max_examples=60)
@given(choice=st.data())
def test_whatever_the_bytes_an_episode_or_one_line_comes_out(small_file, choice):
    path, data, places = small_file
    mutated = bytearray(data)
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.sampled_from(places))
        new = choice.draw(
            st.sampled_from([b"\0", b"\xff", b"\0" * 8, b"\xff" * 8]) | st.binary(min_size=1, max_size=8)
        )
        mutated[at : at + len(new)] = new
    path.unlink(missing_ok=True)  # the last example may still have it open
    path.write_bytes(mutated)
    try:
        episodes = open_episodes(path, SIZE)
        for index in range(min(len(episodes), 3)):
            episode = episodes[index]
            assert episode.support.min() >= 0 and episode.support.max() <= 1
            assert len(episode.support) == len(episode.support_labels)
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


# --- files by the published programs ---------------------------------------------------------------------

EXPECTED = BENCHMARKS / "expect" / "h5_bscd_fwt.json"


def needs(name):
    return pytest.mark.skipif(not (BENCHMARKS / name).is_dir(), reason=f"no {name} in AMT_BENCHMARK_DATA")


@pytest.mark.benchmark_data
@needs("h5")
def test_validation_episodes_by_pmf_are_read():
    """Shapes and labels as expected; normalised again they are the stored values, whose hashes are known."""
    for name, expected in json.loads(EXPECTED.read_text())["val_episodes"].items():
        path = BENCHMARKS / "h5" / name
        size = expected[0]["sx"]["shape"][-1]
        episodes = open_episodes(path, size)
        assert len(episodes) == len(expected)
        with h5py.File(path) as file:
            for index, wanted in enumerate(expected):
                episode = episodes[index]
                assert episode.support_labels.tolist() == wanted["sy_values"]
                assert episode.query_labels.tolist() == wanted["y_values"]
                for images, key in ((episode.support, "sx"), (episode.query, "x")):
                    stored = file[f"{index}/{key}"][()]
                    assert list(images.shape) == wanted[key]["shape"]
                    assert hashlib.sha256(stored.tobytes()).hexdigest().startswith(wanted[key]["sha16"])
                    assert np.abs((images.numpy() - MEAN) / STD - stored).max() < 1e-5
                    levels = images * 255
                    assert (levels - levels.round()).abs().max() < 1e-3, "they were grey levels once"


@pytest.mark.benchmark_data
@needs("dumped")
def test_episodes_dumped_by_meta_dataset_are_read():
    for folder in sorted((BENCHMARKS / "dumped").iterdir()):
        counts = json.loads((folder / "images_per_class.json").read_text())
        episodes = open_episodes(folder, 84)
        assert 2 * len(episodes) == len(counts)
        for episode in (episodes[position] for position in range(len(episodes))):
            for part, labels in (("train", episode.support_labels), ("test", episode.query_labels)):
                listed = counts[f"episode-{episode.index:04d}-{part}.tfrecords"]
                assert listed == {str(label): labels.tolist().count(label) for label in set(labels.tolist())}


@pytest.mark.benchmark_data
@needs("pmf_folders")
def test_the_episodes_that_pmf_lists_are_read():
    """The reference has the mean of the first episode's support in [0, 1]."""
    for key, expected in json.loads(EXPECTED.read_text())["pmf_folders"].items():
        name, shots = re.fullmatch(r"(.+)/(\d+)shot", key).groups()
        path = BENCHMARKS / "pmf_folders" / name / f"val1000Episode_5_way_{shots}_shot.json"
        episodes = open_episodes(path, expected["support"][-1])
        episode = episodes[0]
        assert len(episodes) == expected["n"]
        assert list(episode.support.shape) == expected["support"]
        assert list(episode.query.shape) == expected["query"]
        assert episode.support_labels.tolist() == expected["support_labels"]
        assert episode.query_labels.tolist() == expected["query_labels"]
        assert abs(float(episode.support.double().mean()) - expected["support_mean"]) < 1e-6
