"""Every layout on disk is recognised by what it holds, and gives episodes like any other."""

import json

import h5py
import numpy as np
import pytest
from conftest import fails, flat_spec, write_classes, write_picture, write_spec

from meta_dataset_readers.domains import DOMAINS
from meta_dataset_readers.layouts import open_source, sources
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader

TWO_WAY = EpisodeSampling(num_ways=2, num_support=1, num_query=1, min_ways=2, min_examples_in_class=2)
STALE = "/elsewhere/cars/source"


def class_folders(root):
    return write_classes(root / "mine", cat=3, dog=3)


def split_folders(root):
    write_classes(root / "Mini-ImageNet" / "train", ant=3, bee=3)
    return write_classes(root / "Mini-ImageNet" / "test", cat=3, dog=3).parent


def crop_disease(root):
    return write_classes(root / "CropDiseases" / "dataset" / "train", rust=3, scab=3).parents[1]


def eurosat(root):
    return write_classes(root / "EuroSAT" / "2750", River=3, SeaLake=3).parent


def isic(root):
    directory = root / "ISIC"
    rows = [f"p{i},{int(i < 3)}.0,{int(i >= 3)}.0" for i in range(6)]
    for i in range(6):
        write_picture(directory / "ISIC2018_Task3_Training_Input" / f"p{i}.jpg", i)
    truth = directory / "ISIC2018_Task3_Training_GroundTruth"
    truth.mkdir()
    (truth / f"{truth.name}.csv").write_text("\n".join(["image,MEL,NV", *rows]))
    return directory


def chestx(root):
    directory = root / "ChestX"
    rows = [f"p{i}.png,{'Mass' if i < 3 else 'Nodule'},x" for i in range(6)]
    for i in range(6):
        write_picture(directory / "images" / f"p{i}.png", i)
    (directory / "Data_Entry_2017.csv").write_text(
        "\n".join(["Image Index,Finding Labels,Follow-up #", *rows])
    )
    return directory


def filelists(root):
    directory = root / "cars"
    names = ["a", "b", "c", "d"]
    for name, labels in {"base": [0, 2], "val": [1], "novel": [3, 3, 3]}.items():
        images = [f"{STALE}/{names[label]}/{name}{i}.png" for i, label in enumerate(labels)]
        for image in images:
            write_picture(directory / "source" / image.removeprefix(f"{STALE}/"), len(image))
        content = {"label_names": names, "image_names": images, "image_labels": labels}
        directory.mkdir(exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def hdf5(root):
    directory = write_spec(root / "fungi", flat_spec("fungi", (0, 0, 2), [3, 3]))
    for class_id in range(2):
        with h5py.File(directory / f"{class_id}.h5", "w") as file:
            for i in range(3):
                group = file.create_group(str(i))
                group["image"] = np.full((8, 8, 3), 40 * class_id + i, np.uint8)
                group["label"] = np.array([class_id], np.int32)
    return directory


@pytest.mark.parametrize(
    ("write", "name", "layout"),
    [
        (class_folders, "mine", "class folders"),
        (split_folders, "mini_imagenet", "split folders"),
        (crop_disease, "CropDisease", "BSCD-FSL download"),
        (eurosat, "EuroSAT", "BSCD-FSL download"),
        (isic, "ISIC", "BSCD-FSL download"),
        (chestx, "ChestX", "BSCD-FSL download"),
        (filelists, "car", "filelists"),
        (hdf5, "fungi", "HDF5 files"),
    ],
)
def test_a_directory_is_recognised_found_by_its_published_name_and_read(tmp_path, write, name, layout):
    write(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("no source")
    assert sources(tmp_path) == {name: layout}
    store = open_source(tmp_path, name).store
    if layout == "filelists":  # its TEST split has a single class here
        assert store.read(3, 2).shape == (9, 12, 3)
        return
    episode = EpisodeReader(tmp_path, name, "TEST", TWO_WAY, 16, n_episodes=1)[0]
    assert episode.support.shape == (2, 3, 16, 16) and episode.query_labels.tolist() == [0, 1]
    assert episode.source == name
    files = {origin.file for origin in (*episode.support_origin, *episode.query_origin)}
    assert all(file.startswith(f"{name}/") for file in files)


def test_record_files_are_preferred_to_those_converted_from_them(tiny_source):
    directory = tiny_source()
    (directory / "0.h5").write_bytes(b"a conversion beside them")
    assert sources(directory.parent) == {"tiny": "record files"}


def test_a_stale_prefix_can_be_given(tmp_path):
    filelists(tmp_path)
    (tmp_path / "cars" / "source").rename(tmp_path / "pictures")
    assert open_source(tmp_path, "car", (STALE, str(tmp_path / "pictures"))).store.count(0) == 1
    fails("no end of this path leads to a file", lambda: open_source(tmp_path, "car"))


def test_what_is_no_source_is_refused_in_one_line(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "empty").mkdir()
    fails("no source 'min' in it; did you mean 'mine'", lambda: open_source(tmp_path, "min"))
    fails("no known layout", lambda: open_source(tmp_path, "empty"))
    fails("no such directory", lambda: open_source(tmp_path / "none", "mine"))
    fails("the data path is empty", lambda: open_source("", "mine"))
    fails(r"no source '\.\./mine'", lambda: open_source(tmp_path / "empty", "../mine"))


def test_what_is_not_yet_a_source_or_none_at_all_is_said_to_be_so(tmp_path):
    for name, mark in (("half", "unfinished.jsonl"), ("dump", "images_per_class.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text("{}")
    assert sources(tmp_path) == {"dump": "dumped episodes", "half": "unfinished copy"}
    fails("run `convert` again", lambda: open_source(tmp_path, "half"))
    fails("episodes, not a source", lambda: open_source(tmp_path, "dump"))


def test_the_table_knows_every_published_domain():
    meta_dataset = {
        *("ilsvrc_2012", "omniglot", "aircraft", "cu_birds", "dtd", "quickdraw", "fungi", "vgg_flower"),
        *("traffic_sign", "mscoco", "ilsvrc_2012_v2"),
    }
    bscd, fine = {"CropDisease", "EuroSAT", "ISIC", "ChestX"}, {"cub", "car", "plantae", "places"}
    assert meta_dataset | bscd | fine <= DOMAINS.keys()
    assert all(sum(domain.classes) >= 7 and domain.protocol and domain.licence for domain in DOMAINS.values())
