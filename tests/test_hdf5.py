"""Sources in HDF5: pictures, files that stay open, and files by PMF's own converter."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import BENCHMARKS, flat_spec, write_spec
from PIL import Image
from toy_hdf5 import CLASS_ID, pixels, replace, store_of, write_class

from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.hdf5 import Hdf5Store, open_hdf5
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, episode_loader


def write_source(root, n_classes, n_images):
    directory = write_spec(root / "tiny", flat_spec("tiny", (n_classes, 0, 0), [n_images] * n_classes))
    for class_id in range(n_classes):
        write_class(directory / f"{class_id}.h5", class_id, n_images)
    return directory


@pytest.fixture
def class_file(tmp_path):
    return write_class(tmp_path / f"{CLASS_ID}.h5")


# --- what is there ---------------------------------------------------------------------------------------


def test_pictures_are_read_back_in_any_order(class_file):
    """Also beyond the tenth: HDF5 lists the groups as 0, 1, 10, 11, 2."""
    store = store_of(class_file)
    assert store.count(CLASS_ID) == 12
    for index in (11, 2, 10, 0):
        image = store.image(CLASS_ID, index)
        assert image.mode == "RGB" and image.size == (7, 6)
        np.testing.assert_array_equal(store.read(CLASS_ID, index), pixels(CLASS_ID, index))
        encoded = Image.open(io.BytesIO(store.encoded(CLASS_ID, index)))
        np.testing.assert_array_equal(np.asarray(encoded), pixels(CLASS_ID, index))
        assert store.origin(CLASS_ID, index) == ImageOrigin(f"tiny/{CLASS_ID}.h5", index)
    for index in (-1, 12):
        with pytest.raises(IndexError):
            store.image(CLASS_ID, index)


def test_opening_a_source_opens_no_class_file(tmp_path):
    """There is none to open, and `missing` says so."""
    source = open_hdf5(write_spec(tmp_path / "tiny", flat_spec("tiny", (2, 0, 1), [1, 2, 3])), "tiny")
    assert source.spec.images_per_class == (1, 2, 3) and source.resize == "shorter"
    write_class(tmp_path / "tiny" / "1.h5", 1, 2)
    assert source.store.missing(range(3)) == ["0.h5", "2.h5"]
    assert source.store.place(1) == tmp_path / "tiny" / "1.h5"


@pytest.mark.parametrize(
    "storage",
    [
        {"chunks": (4, 4, 3)},
        {"compression": "gzip"},
        {"chunks": (5, 7, 1), "compression": "gzip", "shuffle": True},
        {"chunks": (32, 32, 3), "maxshape": (None, None, 3), "compression": "gzip"},
    ],
)
def test_chunks_and_gzip_make_no_difference(tmp_path, storage):
    """PMF writes neither, but h5repack does, and a file of pixels is five times the size of its JPEGs."""
    store = store_of(write_class(tmp_path / f"{CLASS_ID}.h5", n_images=2, **storage))
    for index in range(2):
        np.testing.assert_array_equal(store.read(CLASS_ID, index), pixels(CLASS_ID, index))


def test_id_and_label_may_be_absent_and_a_label_may_be_a_scalar(class_file):
    with h5py.File(class_file, "r+") as file:
        del file["0/id"], file["0/label"]
        replace(file["1"], "label", np.int64(CLASS_ID))
    store = store_of(class_file)
    for index in (0, 1):
        np.testing.assert_array_equal(store.read(CLASS_ID, index), pixels(CLASS_ID, index))


# --- open files ------------------------------------------------------------------------------------------


def open_class_files():
    """The class files that this process has open, by their descriptors."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except OSError:  # the descriptor of the listing itself
            continue
    return [target for target in found if target.endswith(".h5")]


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to count open files in")


@needs_proc
def test_few_files_stay_open_however_many_classes_are_read(tmp_path):
    source = open_hdf5(write_source(tmp_path, 20, 2), "tiny")
    for class_id in [*range(20), *range(20)]:
        np.testing.assert_array_equal(source.store.read(class_id, 1), pixels(class_id, 1))
        assert len(open_class_files()) <= 4


@needs_proc
def test_damaged_files_are_not_left_open(tmp_path):
    for class_id in range(20):
        path = write_class(tmp_path / f"{class_id}.h5", class_id, 2)
        with h5py.File(path, "r+") as file:
            del file["1/image"]
        if class_id % 2:
            path.write_bytes(path.read_bytes()[:-100])
    store = Hdf5Store(tmp_path, "tiny")
    for class_id in range(20):
        with pytest.raises(InputError):
            store.image(class_id, 1)
        assert len(open_class_files()) <= 4


def _read_in_child(store, answers):
    inherited = len(open_class_files())
    images = [store.read(class_id, 0) for class_id in range(3)]
    answers.put((inherited, images, len(open_class_files())))


@needs_proc
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_forked_process_opens_its_own_files(tmp_path):
    store = open_hdf5(write_source(tmp_path, 3, 1), "tiny").store
    for class_id in range(3):
        store.read(class_id, 0)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(store, answers))
    child.start()
    inherited, images, held = answers.get()
    child.join()
    assert inherited == held == 3, "those of the parent are closed, its own opened"
    for class_id in range(3):
        np.testing.assert_array_equal(images[class_id], pixels(class_id, 0))
        np.testing.assert_array_equal(store.read(class_id, 0), pixels(class_id, 0))


def test_a_store_in_use_can_be_pickled(class_file):
    store = store_of(class_file)
    store.read(CLASS_ID, 0)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read(CLASS_ID, 3), pixels(CLASS_ID, 3))


def test_episodes_are_the_same_with_workers(tmp_path):
    """The parent has read before: what it holds open must not reach the workers."""
    write_source(tmp_path, 6, 4)
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=2)
    reader = EpisodeReader(tmp_path, "tiny", "TRAIN", sampling, 8, n_episodes=4)
    alone = [reader[index] for index in range(4)]
    for one, other in zip(alone, episode_loader(reader, num_workers=2), strict=True):
        assert one.support.equal(other.support) and one.query.equal(other.query)
        assert one.query_origin == other.query_origin


# --- files by PMF's own converter ------------------------------------------------------------------------


samples = pytest.mark.skipif(not (BENCHMARKS / "h5").is_dir(), reason="no h5 in AMT_BENCHMARK_DATA")


@pytest.mark.benchmark_data
@samples
def test_every_picture_of_the_sample_files_is_what_its_converter_wrote():
    expected = json.loads((BENCHMARKS / "expect" / "h5_bscd_fwt.json").read_text())
    for name, classes in expected["h5_class_files"]["sources"].items():
        source = open_hdf5(BENCHMARKS / "h5" / name, name)
        assert not source.store.missing(int(class_id) for class_id in classes)
        for class_id, records in classes.items():
            assert source.store.count(int(class_id)) == len(records)
            assert source.spec.images_per_class[int(class_id)] == len(records)
            for index, (_, shape, _, digest, *_) in enumerate(records):
                image = source.store.read(int(class_id), index)
                assert list(image.shape) == shape
                assert hashlib.sha256(image.tobytes()).hexdigest().startswith(digest)


@pytest.mark.benchmark_data
@pytest.mark.skipif(not (BENCHMARKS / "broken_h5").is_dir(), reason="no broken_h5 in AMT_BENCHMARK_DATA")
@pytest.mark.parametrize("file", sorted((BENCHMARKS / "broken_h5").glob("*.h5")), ids=lambda file: file.stem)
def test_the_damage_of_the_sample_files_is_seen(file, tmp_path):
    """Sound is the intact file, and of the others each record whose image has the right type and shape."""
    account = json.loads((BENCHMARKS / "expect" / "broken_h5.json").read_text())[file.name]
    with h5py.File(file.with_name("intact.h5")) as intact:
        class_id = int(intact["0/label"][0])
    store = Hdf5Store(tmp_path, "tiny")
    shutil.copy(file, store.place(class_id))
    if not isinstance(account, dict) or set(account) != {str(index) for index in range(len(account))}:
        with pytest.raises(InputError, match=re.escape(str(store.place(class_id)))):
            store.count(class_id)
        return
    assert store.count(class_id) == len(account)
    with h5py.File(file) as opened:
        images = [opened[str(index)].get("image") for index in range(len(account))]
        sound = [image is not None and (image.dtype, image.shape[2:]) == (np.uint8, (3,)) for image in images]
    for index in range(len(account)):
        if sound[index]:
            store.image(class_id, index)
        else:
            with pytest.raises(DamagedRecord, match=f"record {index}: .*'image'"):
                store.image(class_id, index)
    assert all(sound) == (file.stem == "intact")
