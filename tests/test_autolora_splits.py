"""Which pictures are for training, validation and test."""

import numpy as np
import pytest
from conftest import fails, write_classes
from toy_labelled import origins, write_cifar, write_folders

from amt.data.datasets import open_dataset
from amt.data.labelled import ArrayImages, choose_per_class
from amt.data.loading import batches, open_splits, transforms


def write_caltech(root, place="caltech101/101_ObjectCategories", **images):
    return write_classes(root / place, **images)


def of_classes(*sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return ArrayImages(np.zeros((len(labels), 2, 2, 3), np.uint8), labels, "memory")


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.99])
def test_validation_is_a_part_of_every_class(tmp_path, share):
    """At least one of two pictures or more, never all; nothing of the test set; disjoint from training."""
    write_classes(tmp_path / "train", a=1, b=2, c=3, d=25)
    write_classes(tmp_path / "test", a=1, b=1, c=1, d=1)
    splits = open_splits("imagefolder", tmp_path, validation=share)
    counts = np.bincount(splits.validation.labels, minlength=4).tolist()
    assert counts == [0, *(min(max(1, round(share * n)), n - 1) for n in (2, 3, 25))]
    paths = origins(splits.train, splits.validation, splits.test)
    assert len(set(paths)) == len(paths) == 35
    assert len(splits.test) == 4 and all("/test/" in path for path in origins(splits.test))


def test_the_split_is_a_function_of_the_seed(tmp_path):
    write_cifar(tmp_path, n=40)
    first, again, other = (open_splits("cifar10", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert origins(first.validation) == origins(again.validation) != origins(other.validation)
    assert origins(first.test) == origins(other.test)
    assert np.bincount(other.validation.labels).tolist() == [2] * 10
    assert not set(origins(first.train)) & set(origins(first.validation))


def test_no_validation(tmp_path):
    write_folders(tmp_path, val={"cat": 1})
    splits = open_splits("imagefolder", tmp_path, validation=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7, 0, 3)
    assert list(batches(splits.validation, transforms(8, False)[1], 2, seed=0)) == []
    for share in (1, -0.1, float("nan")):
        fails("expected a share", lambda: open_splits("imagefolder", tmp_path, validation=share))  # noqa: B023


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_of_validation_pictures_is_used(tmp_path, name):
    write_folders(tmp_path, **{name: {"dog": 2}})
    splits = open_splits("imagefolder", tmp_path)
    assert len(splits.train) == 7 and splits.validation.labels.tolist() == [1, 1]


def test_folders_that_do_not_match(tmp_path):
    write_classes(tmp_path / "train", cat=2, dog=1)
    fails("test: no such folder", lambda: open_dataset("imagefolder", tmp_path))
    write_classes(tmp_path / "test", cat=1, dgo=1)
    fails("test: unknown class 'dgo', did you mean 'dog'", lambda: open_dataset("imagefolder", tmp_path))
    (tmp_path / "test" / "dgo").rename(tmp_path / "test" / "dog")
    (tmp_path / "train" / "empty").mkdir()
    fails("train/empty: no picture", lambda: open_dataset("imagefolder", tmp_path))


@pytest.mark.parametrize(
    "name, most, place",
    [
        ("caltech101", 60, "caltech101/101_ObjectCategories"),
        ("caltech256", 150, "caltech256/256_ObjectCategories"),
        ("caltech256", 150, "256_ObjectCategories"),
    ],
)
def test_caltech_is_split_class_by_class(tmp_path, name, most, place):
    """Defect 14: most classes are smaller than the published count of training pictures."""
    sizes = {"a.two": 2, "b.few": 9, "c.some": 75, "d.many": 200}
    for class_name, n in sizes.items():
        folder = tmp_path / place / class_name
        folder.mkdir(parents=True)
        for i in range(n):
            (folder / f"{i:04d}.jpg").touch()
    (tmp_path / place / "b.few" / "RENAME2").touch()  # as in the archive
    if name == "caltech101":
        write_classes(tmp_path / place, BACKGROUND_Google=2)
    first = open_dataset(name, tmp_path)
    assert first.class_names == tuple(sizes)
    train = np.bincount(first.train.labels).tolist()
    assert train == [min(most, 4 * n // 5) for n in sizes.values()]
    assert np.bincount(first.test.labels).tolist() == [
        n - t for n, t in zip(sizes.values(), train, strict=True)
    ]
    paths = origins(first.train, first.test)
    assert len(set(paths)) == len(paths) == sum(sizes.values())
    splits = open_splits(name, tmp_path)
    paths = origins(splits.train, splits.validation, splits.test)
    assert len(set(paths)) == len(paths) == sum(sizes.values())


def test_a_class_that_cannot_be_split(tmp_path):
    write_caltech(tmp_path, ant=1, bee=3)
    fails("ant: 1 pictures of the class, expected 2", lambda: open_dataset("caltech101", tmp_path))


def test_class_folders_alone_are_split(tmp_path):
    write_classes(tmp_path, cat=10, dog=2)
    opened = open_dataset("imagefolder", tmp_path)
    assert np.bincount(opened.train.labels).tolist() == [8, 1]
    assert np.bincount(opened.test.labels).tolist() == [2, 1]


def test_the_choice_in_a_class_does_not_depend_on_other_classes():
    few, _ = choose_per_class(of_classes(10).labels, lambda n: 4, (0,))
    more, others = choose_per_class(of_classes(10, 7, 1).labels, lambda n: min(4, n), (0,))
    assert more[:4].tolist() == few.tolist()
    assert sorted([*more, *others]) == list(range(18))
