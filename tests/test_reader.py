"""Episodes from files: pure, disjoint, honest about damage."""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_a_byte, flat_spec, jpeg, readable, write_spec
from hypothesis import given, settings
from hypothesis import strategies as st

import meta_dataset_readers
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.pictures import decode_image
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader
from meta_dataset_readers.tfrecord import DamagedRecord, encode_example, open_records, write_records
from meta_dataset_readers.transforms import eval_transform

SMALL = EpisodeSampling(num_ways=5, num_support=2, num_query=3)


def reader(directory, sampling=SMALL, split="TRAIN", image_size=14, n_episodes=4, **options):
    return EpisodeReader(
        directory.parent, directory.name, split, sampling, image_size, n_episodes=n_episodes, **options
    )


def same(a, b):
    return all(
        torch.equal(getattr(a, field), getattr(b, field))
        for field in ("support", "support_labels", "query", "query_labels")
    ) and (a.class_ids, a.support_origin, a.query_origin, a.index) == (
        b.class_ids,
        b.support_origin,
        b.query_origin,
        b.index,
    )


def rewrite(directory, class_id, change):
    """Replace the payloads of a class file by what `change` makes of their list."""
    file = open_records(directory / f"{class_id}.tfrecords")
    write_records(file.path, change([file.read(index) for index in range(len(file))]))


# --- what an episode is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
@pytest.mark.parametrize("sampling", [SMALL, EpisodeSampling()])
def test_an_episode_holds_the_images_it_says_it_holds(tiny_source, kind, sampling):
    directory = tiny_source(kind)
    for episode in (reader(directory, sampling)[index] for index in range(4)):
        assert episode.source == "tiny"
        ways = len(episode.class_ids)
        assert episode.support_labels.dtype == torch.int64
        assert sorted(set(episode.support_labels.tolist())) == list(range(ways)) and episode.n_way == ways
        for images, labels, origins in (
            (episode.support, episode.support_labels, episode.support_origin),
            (episode.query, episode.query_labels, episode.query_origin),
        ):
            assert images.shape == (len(labels), 3, 14, 14) and len(labels) == len(origins)
            assert labels.tolist() == sorted(labels.tolist())
            for image, label, origin in zip(images, labels, origins, strict=True):
                class_id = episode.class_ids[label]
                assert origin.file == f"tiny/{class_id}.tfrecords"
                expected = eval_transform(decode_image(jpeg(class_id, origin.record)), 14)
                assert torch.equal(image, expected)
        assert not set(episode.support_origin) & set(episode.query_origin)
        everything = episode.support_origin + episode.query_origin
        assert len(set(everything)) == len(everything)


def test_class_names_are_given_and_for_a_graph_they_are_words(tiny_source):
    assert reader(tiny_source("dag", "d"))[0].class_names[0].startswith("words of ")
    flat = reader(tiny_source("flat", "f"))[0]
    assert flat.class_names == tuple(f"class {i}" for i in flat.class_ids)


def test_every_image_of_a_class_can_be_used_up(tiny_source):
    sampling = EpisodeSampling(num_ways=5, num_support=3, num_query=5)
    episode = reader(tiny_source(n_images=8), sampling)[0]
    first = [o.record for o in episode.support_origin[:3] + episode.query_origin[:5]]
    assert sorted(first) == list(range(8))


def test_every_image_is_equally_likely_in_support_and_query(tiny_source):
    drawn = reader(
        tiny_source(n_images=8), EpisodeSampling(num_ways=5, num_support=2, num_query=2), n_episodes=200
    )
    episodes = [drawn[i] for i in range(200)]
    for origins in ("support_origin", "query_origin"):
        records = [o.record for e in episodes for o in getattr(e, origins)]
        counts = np.bincount(records, minlength=8)
        assert (abs(counts - 250) < 5 * np.sqrt(250)).all()


def test_a_description_can_be_kept_for_several_episodes_with_fresh_images(tiny_source):
    directory = tiny_source(n_images=20)
    kept = EpisodeSampling(num_ways=3, num_support=2, num_query=3, episode_description_switch_frequency=3)
    drawn = reader(directory, kept, n_episodes=6)
    described = [drawn.describe(i) for i in range(6)]
    assert described[0] == described[1] == described[2] != described[3] == described[4] == described[5]
    assert len({drawn[i].support_origin for i in range(3)}) == 3
    every = dataclasses.replace(kept, episode_description_switch_frequency=1)
    assert same(drawn[3], reader(directory, every, n_episodes=6)[3])


def test_an_episode_without_queries_is_legal(tiny_source):
    episode = reader(tiny_source(), EpisodeSampling(num_ways=5, num_support=2, num_query=0))[0]
    assert episode.query.shape == (0, 3, 14, 14) and episode.query_labels.shape == (0,)


def test_records_beyond_the_specification_are_not_drawn(tiny_source):
    directory = tiny_source(n_images=5)
    for class_id in range(6):
        rewrite(directory, class_id, lambda payloads: payloads + [b"never read"] * 20)
    with pytest.raises(InputError, match=r"25 images of class .*claims 5"):
        reader(directory)[0]
    drawn = reader(directory, skip_bad_records=True)
    assert all(o.record < 5 for i in range(4) for o in drawn[i].support_origin + drawn[i].query_origin)


# --- purity ----------------------------------------------------------------------------------------------


def test_an_episode_depends_on_seed_source_split_and_index(tiny_source):
    directory, other = tiny_source(), tiny_source(name="other")
    drawn = reader(directory)
    base = drawn[1]
    assert same(base, reader(directory)[1])
    assert drawn[1].support_origin == base.support_origin  # also after other episodes
    records = [o.record for o in base.support_origin]
    for changed in (
        drawn[2],
        reader(directory, seed=1)[1],
        reader(other)[1],
        reader(directory, split="TEST")[1],
    ):
        assert (changed.class_ids, [o.record for o in changed.support_origin]) != (base.class_ids, records)


def test_the_number_of_episodes_does_not_matter(tiny_source):
    directory = tiny_source()
    assert same(reader(directory, n_episodes=2)[1], reader(directory, n_episodes=100)[1])


def test_augmentation_changes_support_and_query_pixels_and_nothing_else(tiny_source):
    directory = tiny_source()
    plain, augmented = reader(directory)[0], reader(directory, augment=True)[0]
    assert (plain.support_origin, plain.query_origin) == (augmented.support_origin, augmented.query_origin)
    assert not torch.equal(plain.support, augmented.support) and not torch.equal(plain.query, augmented.query)
    assert same(augmented, reader(directory, augment=True)[0])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_do_not_change_the_episodes(tiny_source, num_workers):
    drawn = reader(tiny_source(), augment=True)
    expected = [drawn[i] for i in range(4)]
    loader = episode_loader(drawn, num_workers)
    for _ in range(2):
        assert all(same(a, b) for a, b in zip(loader, expected, strict=True))


def test_another_process_draws_the_same_episodes(tiny_source):
    """With another hash seed, so nothing may rest on Python's hash(); the reader travels pickled."""
    drawn = reader(tiny_source(), augment=True)
    script = (
        "import pickle, sys\n"
        "episode = pickle.load(sys.stdin.buffer)[3]\n"
        "sys.stdout.buffer.write(episode.support.numpy().tobytes())\n"
    )
    package = Path(meta_dataset_readers.__file__).parents[1]
    output = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(drawn),
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(package)},
        capture_output=True,
        check=True,
    ).stdout
    assert output == drawn[3].support.numpy().tobytes()


def test_the_loader_leaves_torchs_generator_alone(tiny_source):
    state = torch.get_rng_state()
    list(episode_loader(reader(tiny_source()), 1))
    assert torch.equal(state, torch.get_rng_state())


def test_the_length_bounds_the_index(tiny_source):
    drawn = reader(tiny_source())
    assert len(drawn) == 4
    for index in (-1, 4):
        with pytest.raises(IndexError):
            drawn[index]


# --- opening ---------------------------------------------------------------------------------------------


def test_opening_reads_no_record(tiny_source):
    directory = tiny_source()
    for file in directory.glob("*.tfrecords"):
        file.write_bytes(b"this is not a record")
    drawn = reader(directory)
    with pytest.raises(InputError, match="record 0 at byte 0"):
        drawn[0]


def test_no_file_stays_open(tiny_source):
    drawn = reader(tiny_source())
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc")
    for index in range(4):
        drawn[index]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"root": ""}, "data path is empty"),
        ({"root": None}, "data path is empty"),
        ({"root": "/no/such/path"}, "/no/such/path: no such directory"),
        ({"source": "tinny"}, "no source 'tinny'.*did you mean 'tiny'"),
        ({"source": "../tiny"}, "no source '../tiny'"),
        ({"source": "pictures"}, "pictures: no known layout.*dataset_spec.json"),
        ({"split": "TRAINING"}, "split 'TRAINING' is unknown; did you mean 'TRAIN'"),
        ({"split": "VALID"}, "split VALID has no classes; splits with classes: TRAIN, TEST"),
        ({"sampling": EpisodeSampling(num_ways=9)}, "6 classes, 9-way"),
        ({"sampling": EpisodeSampling(num_ways=5, num_support=5, num_query=15)}, "fewer than the 20 images"),
        ({"image_size": 0}, "image_size is 0"),
        ({"n_episodes": -1}, "n_episodes is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_is_not_there_is_refused_when_opening(tiny_source, change, complaint):
    directory = tiny_source()
    (directory.parent / "pictures").mkdir()
    arguments = {
        "root": directory.parent,
        "source": "tiny",
        "split": "TRAIN",
        "sampling": SMALL,
        "image_size": 14,
        "n_episodes": 1,
    }
    with pytest.raises(InputError, match=complaint) as caught:
        EpisodeReader(**arguments | change)
    assert "\n" not in str(caught.value)


def test_missing_record_files_are_counted_when_opening(tiny_source):
    directory = tiny_source()
    (directory / "3.tfrecords").unlink()
    with pytest.raises(InputError, match=r"1 of the 6 files of TRAIN are missing, the first is 3.tfrecords"):
        reader(directory)
    reader(directory, split="TEST")


# --- damage ----------------------------------------------------------------------------------------------


def wrong_checksum(directory, class_id, record):
    file = open_records(directory / f"{class_id}.tfrecords")
    data = bytearray(file.path.read_bytes())
    data[int(file.offsets[record]) + 20] ^= 0x10
    file.path.write_bytes(data)


def wrong_label(directory, class_id, record):
    def change(payloads):
        payloads[record] = encode_example(jpeg(class_id, record), class_id + 1)
        return payloads

    rewrite(directory, class_id, change)


def no_picture(directory, class_id, record):
    def change(payloads):
        payloads[record] = encode_example(b"no picture", class_id)
        return payloads

    rewrite(directory, class_id, change)


def no_protobuf(directory, class_id, record):
    rewrite(directory, class_id, lambda payloads: payloads[:record] + [b"\x0c"] + payloads[record + 1 :])


DAMAGES = [
    (wrong_checksum, "wrong checksum of the payload"),
    (wrong_label, "label . in the file of class"),
    (no_picture, "cannot be decoded"),
    (no_protobuf, "not a protobuf message"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
def test_a_damaged_record_is_named_and_can_be_passed_over(tiny_source, damage, complaint):
    directory = tiny_source()
    intact = reader(directory)[0]
    victim = intact.support_origin[0]
    class_id = intact.class_ids[0]
    damage(directory, class_id, victim.record)
    with pytest.raises(
        DamagedRecord, match=f"/{victim.file}: record {victim.record} at byte .*{complaint}"
    ) as caught:
        reader(directory)[0]
    assert "\n" not in str(caught.value)

    episode = reader(directory, skip_bad_records=True)[0]
    assert episode.skipped == (str(caught.value),)
    assert victim not in episode.support_origin + episode.query_origin
    assert episode.support_labels.tolist() == intact.support_labels.tolist()
    assert episode.query_labels.tolist() == intact.query_labels.tolist()
    assert not set(episode.support_origin) & set(episode.query_origin)


def test_skipping_changes_nothing_where_nothing_is_damaged(tiny_source):
    directory = tiny_source()
    strict, lenient = reader(directory)[0], reader(directory, skip_bad_records=True)[0]
    assert same(strict, lenient) and lenient.skipped == ()


def test_a_class_that_runs_out_of_sound_records_is_an_error(tiny_source):
    directory = tiny_source(n_images=6)
    class_id = reader(directory)[0].class_ids[0]
    for record in range(2):
        no_picture(directory, class_id, record)
    with pytest.raises(InputError, match=f"4 readable images of class {class_id}, an episode needs 5"):
        reader(directory, skip_bad_records=True)[0]


def test_a_file_with_fewer_records_than_specified_is_an_error_unless_skipping(tiny_source):
    directory = tiny_source()
    class_id = reader(directory)[0].class_ids[0]
    rewrite(directory, class_id, lambda payloads: payloads[:-1])
    with pytest.raises(InputError, match=r"7 images of class .*claims 8"):
        reader(directory)[0]
    episode = reader(directory, skip_bad_records=True)[0]
    assert "7 images" in episode.skipped[0]
    assert all(o.record < 7 for o in episode.support_origin[:2] + episode.query_origin[:3])


def test_a_truncated_file_is_an_error_even_when_skipping(tiny_source):
    directory = tiny_source()
    path = directory / f"{reader(directory)[0].class_ids[0]}.tfrecords"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="record 7 at byte"):
        reader(directory, skip_bad_records=True)[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_the_same_single_line(tiny_source, num_workers):
    directory = tiny_source()
    for file in directory.glob("*.tfrecords"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"0 images of class .*claims 8") as caught:
        list(episode_loader(reader(directory), num_workers))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


# --- several sources -------------------------------------------------------------------------------------


def test_a_mixture_draws_sources_evenly_and_purely(tiny_source):
    sampling = EpisodeSampling(num_ways=1, num_support=1, num_query=0)
    names = ("a", "b", "c")
    readers = [reader(tiny_source(name=name), sampling, n_episodes=1) for name in names]
    mixture = SourceMixture(readers, n_episodes=150, seed=3)
    episodes = [mixture[i] for i in range(150)]
    counts = [sum(e.source == name for e in episodes) for name in names]
    assert all(30 < count < 70 for count in counts)
    longer, reseeded = SourceMixture(readers, 200, seed=3), SourceMixture(readers, 150, seed=4)
    assert all(same(episodes[i], longer[i]) for i in range(150))
    assert [e.source for e in episodes] != [reseeded[i].source for i in range(150)]
    assert same(episodes[7], readers[names.index(episodes[7].source)].episode(7))
    with pytest.raises(IndexError):
        mixture[150]
    with pytest.raises(InputError, match="at least one source"):
        SourceMixture([], 1)


def test_workers_mix_sources_as_one_process_does(tiny_source):
    mixture = SourceMixture([reader(tiny_source(name=name)) for name in ("a", "b")], n_episodes=4)
    assert all(same(a, mixture[i]) for i, a in enumerate(episode_loader(mixture, 1)))


# --- any damage at all -----------------------------------------------------------------------------------


@settings(max_examples=80)
@given(data=st.data())
def test_no_changed_byte_of_a_record_file_gives_a_wrong_picture(tmp_path_factory, data):
    """One byte is changed, or the end cut off: the record is refused, all others are as they were."""
    directory = tmp_path_factory.mktemp("data") / "tiny"
    write_spec(directory, flat_spec("tiny", (0, 0, 2), [3, 3]))
    for class_id in range(2):
        payloads = [encode_example(jpeg(class_id, record), class_id) for record in range(3)]
        write_records(directory / f"{class_id}.tfrecords", payloads)
    sound = readable(directory)
    assert len(sound) == 6
    file = directory / "1.tfrecords"
    change_a_byte(file, data.draw)
    found = readable(directory)
    assert found.items() < sound.items() and all((0, index) in found for index in range(3))
