"""Episodes dumped as Meta-Dataset dumps them: read, damaged, and written by us."""

import dataclasses
import json

import h5py
import numpy as np
import pytest
from conftest import assert_same_episode, fails, flat_spec, jpeg, write_picture, write_spec

from meta_dataset_readers import dump
from meta_dataset_readers.convert import convert
from meta_dataset_readers.dump import dump_episode
from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.pictures import decode_image
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.stored_episodes import open_episodes
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records
from meta_dataset_readers.transforms import eval_transform

SIZE = 8

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
        assert_same_episode(episodes[position], reader.episode(number))


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
    assert_same_episode(open_episodes(tmp_path / "out", SIZE)[0], reader[0])


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
        assert_same_episode(open_episodes(tmp_path / "out", SIZE)[index], reader[index])


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
    assert_same_episode(episodes[1], reader[0])


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
    assert_same_episode(open_episodes(out, SIZE)[1], reader[1])


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
