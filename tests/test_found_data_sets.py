"""Ordinary data sets as archives and tools unpack them."""

import numpy as np
import pytest
from conftest import fails, write_classes, write_picture
from scipy.io import savemat

from amt.data.datasets import open_dataset

BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")
NAMES = np.array(["Alpha", "Beta"], dtype=object)[None, :]


def table(rows, fields):
    found = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            found[0, i][field] = value
    return found


def kaggle_cars(folder, inner=""):
    """Pictures by split, and lists of both forms."""
    everything = []
    for split in ("train", "test"):
        rows = [(1, 1, 9, 9, 1 + i % 2, f"{i:05d}.jpg") for i in range(4)]
        for row in rows:
            write_picture(folder / f"cars_{split}" / inner.format(split) / row[-1], row[4])
            number = len(everything) + 1
            everything.append((f"car_ims/{number:06d}.jpg", *row[:5], int(split == "test")))
        at = folder / "devkit" / "cars_train_annos.mat"
        at.parent.mkdir(exist_ok=True)
        at = at if split == "train" else folder / "cars_test_annos_withlabels.mat"
        savemat(at, {"annotations": table(rows, (*BOX, "fname"))})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": NAMES})
    annotations = table(everything, ("relative_im_path", *BOX, "test"))
    savemat(folder / "cars_annos.mat", {"annotations": annotations, "class_names": NAMES})


def split_folders(train, valid, test):
    def make(folder):
        for name in (train, valid, test):
            write_classes(folder / name, cat=2, dog=2)

    return make


# Data set, how it lies there, numbers of pictures for training, testing and validation.
FOUND = {
    "cars, both lists": ("cars", kaggle_cars, (4, 4, None)),
    "cars, one folder too many": ("cars", lambda at: kaggle_cars(at, "cars_{}"), (4, 4, None)),
    "cars, wrapped": ("cars", lambda at: kaggle_cars(at / "archive"), (4, 4, None)),
    "val/": ("imagefolder", split_folders("train", "val", "test"), (4, 4, 4)),
    "valid/": ("imagefolder", split_folders("train", "valid", "test"), (4, 4, 4)),
    "Validation/": ("imagefolder", split_folders("Train", "Validation", "Test"), (4, 4, 4)),
    "wrapped": ("imagefolder", lambda at: split_folders("train", "val", "test")(at / "x"), (4, 4, 4)),
    "wrapped classes": ("imagefolder", lambda at: write_classes(at / "x", cat=5, dog=5), (8, 2, None)),
}


@pytest.mark.parametrize(("name", "make", "sizes"), FOUND.values(), ids=FOUND)
def test_a_data_set_is_read_by_what_is_there(name, make, sizes, tmp_path):
    make(tmp_path / "data")
    found = open_dataset(name, tmp_path / "data")
    held_out = None if found.validation is None else len(found.validation)
    assert (len(found.train), len(found.test), held_out) == sizes


PACKED = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "dtd": "dtd-r1.0.1.tar.gz",
    "cub": "CUB_200_2011.tgz",
    "cars": "stanford_cars.zip",
}


@pytest.mark.parametrize(("name", "archive"), PACKED.items(), ids=PACKED)
def test_an_archive_is_told_to_be_unpacked(name, archive, tmp_path):
    (tmp_path / archive).write_bytes(b"")
    how = "unzip" if archive.endswith("zip") else "tar"
    fails(f"{archive} is still packed: {how} ", lambda: open_dataset(name, tmp_path))
