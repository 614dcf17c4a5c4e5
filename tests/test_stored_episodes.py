"""Episodes stored by other programs: PMF's validation episodes and lists of images; the form of a file."""

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
from conftest import BENCHMARKS, assert_same_episode, by_pil, fails, write_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_hdf5 import damaged

from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.reader import episode_loader
from meta_dataset_readers.stored_episodes import open_episodes

MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
SIZE = 8

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
    assert_same_episode(before, open_episodes(normalised_file, SIZE)[1])


def test_episodes_in_use_can_be_pickled_and_read_by_workers(normalised_file):
    episodes = open_episodes(normalised_file, SIZE)
    alone = [episodes[index] for index in range(3)]
    assert_same_episode(alone[2], pickle.loads(pickle.dumps(episodes))[2])
    for one, other in zip(alone, episode_loader(episodes, num_workers=2), strict=True):
        assert_same_episode(one, other)


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
    assert_same_episode(second, pickle.loads(pickle.dumps(episodes))[1])


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
    """A valid HDF5 file, and its bytes."""
    path = write_normalised(tmp_path_factory.mktemp("small") / "val.h5", 2)
    return path, path.read_bytes()


@settings(max_examples=60)
@given(choice=st.data())
def test_whatever_the_bytes_an_episode_or_one_line_comes_out(small_file, choice):
    path, data = small_file
    path.unlink(missing_ok=True)  # the last example may still have it open
    path.write_bytes(choice.draw(damaged(data)))
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
