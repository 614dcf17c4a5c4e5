"""Data sets as they lie on disk. Every file is written here, in the format its data set is distributed in;
a few small pictures of each."""

import codecs
import json
import os
import pickle

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import by_pil, fails, write_picture
from toy_labelled import noise, origins, write_cifar, write_folders

from amt.data.datasets import DATASETS, known, open_dataset
from amt.data.loading import batches, open_splits, transforms

# --- the formats -----------------------------------------------------------------------------------------


def write_cifar_binary(root, n_classes=10, n=12):
    ten = n_classes == 10
    folder = root / ("cifar-10-batches-bin" if ten else "cifar-100-binary")
    folder.mkdir(parents=True)
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    for b, name in enumerate([*train, "test_batch.bin" if ten else "test.bin"]):
        labels = np.arange(n, dtype=np.uint8)[:, None] % n_classes
        heads = labels if ten else np.hstack([np.zeros_like(labels), labels])
        (folder / name).write_bytes(np.hstack([heads, noise(n, 3072, seed=b)]).tobytes())
    names = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
    names.write_text("".join(f"class {i}\n" for i in range(n_classes)) + "\n")
    return folder


def write_stl10(root, n=(7, 4)):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split, count, seed in zip(("train", "test"), n, (0, 1), strict=True):
        noise(count, 3, 96, 96, seed=seed).tofile(folder / f"{split}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")
    return folder


def write_dtd(root, place="dtd/dtd"):
    folder = root / place
    (folder / "labels").mkdir(parents=True)
    for split, number in (("train", 0), ("val", 1), ("test", 2)):
        paths = [f"{name}/{name}_{number:04d}.jpg" for name in ("zigzagged", "banded")]
        for seed, path in enumerate(paths):
            write_picture(folder / "images" / path, 10 * number + seed)
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(paths) + "\n")
    return folder


def cells(values):
    """A MATLAB cell array of one column."""
    column = np.empty((len(values), 1), object)
    column[:, 0] = values
    return column


def write_dogs(root, labels=(1, 2, 2), lists="lists"):
    folder = root
    breeds = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    for split, number in (("train", 1), ("test", 2)):
        files = [
            f"{breeds[min(label, 2) - 1]}/{min(label, 2)}_{number}{i}.jpg" for i, label in enumerate(labels)
        ]
        for seed, file in enumerate(files):
            write_picture(folder / "Images" / file, 10 * number + seed)
        (folder / lists).mkdir(parents=True, exist_ok=True)
        content = {"file_list": cells(files), "labels": np.array(labels, np.uint8)[:, None]}
        scipy.io.savemat(folder / lists / f"{split}_list.mat", content)
    return folder


def write_cub(root):
    folder = root / "CUB_200_2011"
    rows = [("001.Black_footed_Albatross", 1, 1), ("001.Black_footed_Albatross", 1, 0)]
    rows += [("002.Laysan_Albatross", 2, 0), ("002.Laysan_Albatross", 2, 1), ("002.Laysan_Albatross", 2, 1)]
    lists = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number, (name, label, is_train) in enumerate(rows, 1):
        write_picture(folder / "images" / name / f"{number}.jpg", number)
        lists["images"].append(f"{number} {name}/{number}.jpg")
        lists["image_class_labels"].append(f"{number} {label}")
        lists["train_test_split"].append(f"{number} {is_train}")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def car_annotations(names, labels, **more):
    fields = {"bbox_x1": [1] * len(names), "class": labels, **more}
    key = "relative_im_path" if "test" in more else "fname"
    fields[key] = names
    rows = np.zeros((1, len(names)), [(field, object) for field in fields])
    for field, values in fields.items():
        for i, value in enumerate(values):
            rows[field][0, i] = np.array([[value]], np.uint8) if isinstance(value, int) else value
    return rows


CARS = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], object)


def write_cars(root, labels=(1, 2, 1)):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": CARS})
    for seed, (split, file) in enumerate(
        (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat"))
    ):
        names = [f"{i:05d}.jpg" for i in range(1, len(labels) + 1)]
        for i, name in enumerate(names):
            write_picture(folder / f"cars_{split}" / name, 10 * seed + i)
        scipy.io.savemat(folder / file, {"annotations": car_annotations(names, list(labels))})
    return folder


def write_all_cars(root):
    names = [f"car_ims/{i:06d}.jpg" for i in range(4)]
    for i, name in enumerate(names):
        write_picture(root / name, i)
    table = car_annotations(names, [1, 2, 1, 2], test=[0, 0, 1, 1])
    scipy.io.savemat(root / "cars_annos.mat", {"annotations": table, "class_names": CARS})
    return root


def write_aircraft(root):
    folder = root / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nBoeing 727-200\n")
    for split, number in (("trainval", 1), ("test", 2)):
        rows = [(f"{number}00000", "707-320"), (f"{number}00001", "Boeing 727-200")]
        for seed, (name, _) in enumerate(rows):
            write_picture(folder / "images" / f"{name}.jpg", 10 * number + seed)
        (folder / f"images_variant_{split}.txt").write_text("".join(f"{a} {b}\n" for a, b in rows))
    return folder


def write_flowers(root, labels=(1, 1, 2, 2, 1, 2)):
    folder = root / "flowers-102"
    for i in range(1, len(labels) + 1):
        write_picture(folder / "jpg" / f"image_{i:05d}.jpg", i)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    ids = {"trnid": [[1, 3]], "valid": [[2]], "tstid": [[4, 5, 6]]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array(value, np.uint16) for name, value in ids.items()})
    return folder


def write_food(root):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        lists = {name: [f"{name}/{number}", f"{name}/{number}0"] for name in ("waffles", "apple_pie")}
        for seed, path in enumerate(path for paths in lists.values() for path in paths):
            write_picture(folder / "images" / f"{path}.jpg", 10 * number + seed)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(lists))
    return folder


# name: what writes it, class names, labels of train and test
FORMATS = {
    "dtd": (write_dtd, ("banded", "zigzagged"), [1, 0, 1, 0], [1, 0]),
    "dogs": (
        write_dogs,
        ("n02085620-Chihuahua", "n02085782-Japanese_spaniel"),
        [0, 1, 1],
        [0, 1, 1],
    ),
    "cub": (write_cub, ("001.Black_footed_Albatross", "002.Laysan_Albatross"), [0, 1, 1], [0, 1]),
    "cars": (write_cars, tuple(CARS[0]), [0, 1, 0], [0, 1, 0]),
    "aircraft": (write_aircraft, ("707-320", "Boeing 727-200"), [0, 1], [0, 1]),
    "flowers": (write_flowers, ("pink primrose", "hard-leaved pocket orchid"), [0, 1, 0], [1, 0, 1]),
    "food101": (write_food, ("apple_pie", "waffles"), [0, 0, 1, 1], [0, 0, 1, 1]),
    "imagefolder": (write_folders, ("cat", "dog"), [0] * 4 + [1] * 3, [0, 0, 1]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_lists_of_files_are_read_as_they_say(tmp_path, name):
    """Classes, labels and pictures of every data set whose pictures are files; no picture in two splits."""
    write, class_names, train, test = FORMATS[name]
    write(tmp_path)
    opened = open_dataset(name, tmp_path)
    assert opened.class_names == class_names
    assert opened.train.labels.tolist() == train
    assert opened.test.labels.tolist() == test
    assert opened.train.labels.dtype == torch.int64
    paths = origins(opened.train, opened.test)
    assert len(set(paths)) == len(paths)
    for part in (opened.train, opened.test):
        for i in range(len(part)):
            assert (np.asarray(part.image(i)) == by_pil(part.origin(i))).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_data_set_is_found_in_its_own_folder_too(tmp_path, name):
    """Whoever points at the unpacked folder itself need not know torchvision's root."""
    folder = FORMATS[name][0](tmp_path)
    assert origins(open_dataset(name, folder).train) == origins(open_dataset(name, tmp_path).train)


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_missing_file_is_named(tmp_path, name):
    """Each file of a data set in turn is taken away: the error names it, and where to get the data set."""
    folder = FORMATS[name][0](tmp_path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files if name != "imagefolder" else []:
        aside = tmp_path / "aside"
        file.rename(aside)
        error = fails("no such file", lambda: open_dataset(name, tmp_path))
        assert str(file) in str(error) and "get it from http" in str(error)
        aside.rename(file)
    open_dataset(name, tmp_path)


def test_what_torchvision_reads_is_what_we_read(tmp_path):
    """On the formats that torchvision reads without checksums of the true archives."""
    sets = torchvision.datasets
    for write in (write_dtd, write_food, write_aircraft, write_cars):
        write(tmp_path)
    theirs = {
        "dtd": [sets.DTD(tmp_path, "train"), sets.DTD(tmp_path, "val")],
        "food101": [sets.Food101(tmp_path, "train")],
        "aircraft": [sets.FGVCAircraft(tmp_path, "trainval")],
        "cars": [sets.StanfordCars(tmp_path, "train")],
    }
    for name, parts in theirs.items():
        train = open_dataset(name, tmp_path).train
        pairs = [(str(np.asarray(image).tobytes()), int(label)) for part in parts for image, label in part]
        ours = [(str(np.asarray(train.image(i)).tobytes()), int(train.labels[i])) for i in range(len(train))]
        assert sorted(ours) == sorted(pairs), name


def test_cars_in_one_folder(tmp_path):
    """The other form of Stanford Cars: car_ims/ and one list with a field that says what is for testing."""
    write_all_cars(tmp_path)
    opened = open_dataset("cars", tmp_path)
    assert opened.class_names == tuple(CARS[0])
    assert [file.name for file in map(type(tmp_path), origins(opened.test))] == ["000002.jpg", "000003.jpg"]


# --- arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [10, 100])
@pytest.mark.parametrize("write", [write_cifar, write_cifar_binary])
def test_both_forms_of_cifar(tmp_path, write, n_classes):
    """Rows in the order of the files, red, green and blue planes; the fine labels of CIFAR-100."""
    write(tmp_path, n_classes)
    opened = open_dataset(f"cifar-{n_classes}", tmp_path)
    assert opened.class_names == tuple(f"class {i}" for i in range(n_classes))
    n_files = 5 if n_classes == 10 else 1
    assert opened.train.labels.tolist() == [i % n_classes for i in range(12)] * n_files
    expected = noise(12, 3072, seed=n_files)[7].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (np.asarray(opened.test.image(7)) == expected).all()
    last = noise(12, 3072, seed=n_files - 1)[11].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (np.asarray(opened.train.image(12 * n_files - 1)) == last).all()
    assert len(set(origins(opened.train, opened.test))) == 12 * (n_files + 1)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_pickles_of_every_protocol(tmp_path, protocol):
    write_cifar(tmp_path, protocol=protocol, labels=list(np.arange(12) % 10))  # numpy's own integers
    train = open_dataset("cifar10", tmp_path).train
    assert train.labels[:12].tolist() == [i % 10 for i in range(12)]
    assert (np.asarray(train.image(0))[..., 0].ravel() == noise(12, 3072)[0, :1024]).all()


def test_a_cifar_pickle_as_python_2_wrote_it(tmp_path):
    """The real files: protocol 2, texts that hold raw bytes, numpy's functions by their old names."""
    folder = write_cifar(tmp_path)
    pixels = noise(3, 3072, seed=9)

    def text(data):
        return b"T" + len(data).to_bytes(4, "little") + data  # BINSTRING

    def integers(*values):
        return b"".join(b"K" + bytes([value]) for value in values)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    array += b"(K\x01(K\x03M\x00\x0ctcnumpy\ndtype\n(" + text(b"u1") + integers(0, 1) + b"tR"
    array += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += text(pixels.tobytes()) + b"tb"
    batch = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + integers(3, 1, 2) + b"eu."
    (folder / "test_batch").write_bytes(batch)
    assert set(pickle.loads(batch, encoding="latin1")) == {"data", "labels"}  # ours is a true one
    test = open_dataset("cifar10", tmp_path).test
    assert test.labels.tolist() == [3, 1, 2]
    assert (np.asarray(test.image(2)) == pixels[2].reshape(3, 32, 32).transpose(1, 2, 0)).all()


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("content", [_RunsCode(), {"data": _RunsCode()}, {"data": codecs.lookup}])
def test_a_pickle_that_asks_for_code_is_refused(tmp_path, monkeypatch, content):
    """Nothing runs; the error names the file and what it asked for."""
    monkeypatch.chdir(tmp_path)
    folder = write_cifar(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps(content))
    fails(r"data_batch_3: the pickle asks for \S+", lambda: open_dataset("cifar10", tmp_path))
    assert not (tmp_path / "made-by-a-pickle").exists()


DAMAGE = {
    "no dictionary": [1, 2],
    "no pictures": {"labels": [1]},
    "another shape": {"data": np.zeros((2, 3000), np.uint8), "labels": [1, 1]},
    "fractions": {"data": np.zeros((2, 3072), np.float32), "labels": [1, 1]},
    "too few labels": {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
    "no labels": {"data": np.zeros((2, 3072), np.uint8)},
    "a text as label": {"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]},
    "one number for all labels": {"data": np.zeros((1, 3072), np.uint8), "labels": np.array(1)},
    "complex labels": {"data": np.zeros((1, 3072), np.uint8), "labels": np.array([1 + 0j])},
    "objects": {"data": np.array([[None]], object), "labels": [1]},
    "label 10": {"data": np.zeros((1, 3072), np.uint8), "labels": [10]},
    "label -1": {"data": np.zeros((1, 3072), np.uint8), "labels": [-1]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_cifar_batch_that_is_none(tmp_path, damage):
    folder = write_cifar(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps(DAMAGE[damage], 2))
    fails("data_batch_2: ", lambda: open_dataset("cifar10", tmp_path))


@pytest.mark.parametrize("write, name", [(write_cifar, "cifar10"), (write_cifar_binary, "cifar10")])
def test_truncated_batches(tmp_path, write, name):
    folder = write(tmp_path)
    file = sorted(folder.glob("data_batch_4*"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    fails("data_batch_4", lambda: open_dataset(name, tmp_path))


@pytest.mark.parametrize("write", [write_cifar, write_cifar_binary, write_stl10])
def test_a_missing_array_file_is_named(tmp_path, write):
    folder = write(tmp_path)
    name = "stl10" if write is write_stl10 else "cifar10"
    for file in sorted(folder.iterdir()):
        file.rename(tmp_path / "aside")
        fails(f"{file}: no such file.*https://", lambda: open_dataset(name, tmp_path))
        (tmp_path / "aside").rename(file)
    assert len(open_dataset(name, folder).train) == len(open_dataset(name, tmp_path).train)


def test_stl10(tmp_path):
    """Planes go column by column; labels count from 1."""
    folder = write_stl10(tmp_path)
    opened = open_dataset("stl10", tmp_path)
    assert len(opened.class_names) == 10 and len(opened.train) == 7
    assert opened.test.labels.tolist() == [0, 1, 2, 3]
    assert (np.asarray(opened.test.image(3)) == noise(4, 3, 96, 96, seed=1)[3].transpose(2, 1, 0)).all()
    (folder / "test_y.bin").write_bytes(bytes([1, 2, 11, 1]))
    fails("test_y.bin: label 11 of picture 2, expected 1 to 10", lambda: open_dataset("stl10", tmp_path))
    (folder / "test_y.bin").write_bytes(bytes([1, 2, 3]))
    fails("test_y.bin: 4 pictures, 3 labels", lambda: open_dataset("stl10", tmp_path))
    (folder / "test_X.bin").write_bytes(bytes(1000))
    fails("test_X.bin: 1000 bytes", lambda: open_dataset("stl10", tmp_path))


# --- faults in lists -------------------------------------------------------------------------------------


def edited(file, old, new):
    file.write_text(file.read_text().replace(old, new))


def test_labels_out_of_range(tmp_path):
    for labels in ((1, 121, 2), (0, 1, 1)):
        write_dogs(tmp_path / f"dogs{labels[1]}", labels)
        fails("train_list.mat: label", lambda: open_dataset("dogs", tmp_path / f"dogs{labels[1]}"))  # noqa: B023
    write_cars(tmp_path, (1, 3, 1))
    fails("annos.mat: label 3 of picture 1, expected 1 to 2", lambda: open_dataset("cars", tmp_path))
    write_flowers(tmp_path, (1, 1, 103, 1, 1, 1))
    fails("imagelabels.mat: label 103", lambda: open_dataset("flowers", tmp_path))
    edited(write_cub(tmp_path) / "image_class_labels.txt", "5 2", "5 201")
    fails("image_class_labels.txt: label 201", lambda: open_dataset("cub", tmp_path))
    edited(write_aircraft(tmp_path) / "images_variant_test.txt", "727-200", "727-20")
    fails("variant_test.txt: unknown class .*did you mean", lambda: open_dataset("aircraft", tmp_path))


def test_a_path_that_leaves_its_folder(tmp_path):
    write_picture(tmp_path / "outside.jpg")
    folder = write_dtd(tmp_path)
    for path in ("banded/../../../../outside.jpg", str(tmp_path / "outside.jpg")):
        (folder / "labels" / "val1.txt").write_text(f"{path}\n")
        fails("val1.txt: .* is no path below", lambda: open_dataset("dtd", tmp_path))


def test_a_picture_listed_twice(tmp_path):
    """In two splits it would be trained on and tested on; twice in one, trained on and validated on."""
    folder = write_dtd(tmp_path)
    edited(folder / "labels" / "test1.txt", "banded_0002", "banded_0000")
    fails(
        "train1.txt, .*test1.txt: banded/banded_0000.jpg is listed twice",
        lambda: open_dataset("dtd", tmp_path),
    )
    folder = write_food(tmp_path)
    edited(folder / "meta" / "train.json", "waffles/10", "waffles/1")
    fails("train.json: waffles/1.jpg is listed twice", lambda: open_dataset("food101", tmp_path))


def test_a_label_that_disagrees_with_the_folder(tmp_path):
    edited(write_cub(tmp_path) / "image_class_labels.txt", "5 2", "5 1")
    fails("label 1 is in both", lambda: open_dataset("cub", tmp_path))


def test_damaged_lists(tmp_path):
    """Lists that are no such thing end in one line that names them."""
    (write_food(tmp_path) / "meta" / "test.json").write_text('{"waffles": [')
    fails("test.json: not valid JSON", lambda: open_dataset("food101", tmp_path))
    (tmp_path / "food-101" / "meta" / "test.json").write_text('{"waffles": [[]]}')
    fails("test.json: .* in place of a text", lambda: open_dataset("food101", tmp_path))
    file = write_flowers(tmp_path) / "setid.mat"
    file.write_bytes(file.read_bytes()[:200])
    fails("setid.mat: ", lambda: open_dataset("flowers", tmp_path))
    scipy.io.savemat(file, {"trnid": [[1, 99]], "valid": [[2]], "tstid": [[3]]})
    fails("setid.mat: picture 99 in trnid, expected 1 to 6", lambda: open_dataset("flowers", tmp_path))
    scipy.io.savemat(file, {"trnid": [[1, 1.5]], "valid": [[2]], "tstid": [[3]]})
    fails("setid.mat: '1.5' in place of an integer", lambda: open_dataset("flowers", tmp_path))
    edited(write_cub(tmp_path) / "train_test_split.txt", "3 0\n", "")
    fails("split.txt: no line for picture 3", lambda: open_dataset("cub", tmp_path))
    edited(tmp_path / "CUB_200_2011" / "images.txt", "5 002", "4 002")
    fails("images.txt: 5 lines for 4 pictures", lambda: open_dataset("cub", tmp_path))
    (write_aircraft(tmp_path) / "variants.txt").write_bytes(b"\xff\xfe")
    fails("variants.txt: no text", lambda: open_dataset("aircraft", tmp_path))


def test_a_damaged_picture_is_named(tmp_path):
    """When it is read, also by a worker; opening decodes none."""
    write_folders(tmp_path)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no picture")
    splits = open_splits("imagefolder", tmp_path, validation=0)
    for workers in (0, 2):
        every = batches(splits.train, transforms(8, False)[1], 3, seed=0, workers=workers)
        fails(r"dog/1.png: .*cannot be decoded", lambda: list(every))  # noqa: B023
    (tmp_path / "test" / "cat" / "0.png").unlink()
    fails(r"cat/0.png: no such file", lambda: splits.test.image(0))


def test_unknown_names_and_folders(tmp_path):
    fails("cifar11: no such data set, did you mean 'cifar10", lambda: open_dataset("cifar11", tmp_path))
    fails("nowhere: no such folder, expected DTD; get it", lambda: open_dataset("dtd", tmp_path / "nowhere"))
    fails("data_batch_1: no such file", lambda: open_dataset("cifar10", tmp_path))
    fails("no folder, expected one per class", lambda: open_dataset("imagefolder", tmp_path))


def test_published_names_are_known():
    published = ("cifar10", "cifar-100", "stl-10", "dog", "stanford_dogs", "cub200", "Caltech-256", "dtd")
    for name in (*published, "stanford-cars", "flowers102", "food-101", "CUB-200-2011", "caltech101"):
        assert known(name).name in DATASETS
    assert known("dog") is known("dogs") and known("stl-10").image_size == 32
