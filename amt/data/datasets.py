"""The data sets that are known by name, and what each looks like on disk.

Every data set is read as its own authors distribute it, unpacked, in the folders that torchvision unpacks it
to or in any of its own; nothing is downloaded. Knows what files a data set has and which of its pictures are
for training and which for testing; does not know validation, transforms or batches.

Opening reads lists and directory listings, and of array files the numbers, but decodes no picture. Nothing in
a file is trusted: paths must stay below their folder, labels must be labels of the data set, and no picture
may be listed twice (it could be trained on and tested on). torchvision's own data sets are not used: they
unpickle, tell that something is missing but not what, and accept a list that names a file which is not there.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from amt.data import cifar
from amt.data.dataset_folder import DatasetFolder, Entry, Known, Opened, class_label, class_names_by_folder
from amt.data.labelled import ArrayImages, choose_per_class, int64
from amt.data.list_files import (
    as_integers,
    as_texts,
    check_same_length,
    labels_from_zero,
    matlab_field,
    read_lines,
    read_matlab,
    read_pairs,
)
from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.files import (
    LARGEST_LIST,
    folder_names,
    read_bytes,
    read_json,
    size_of,
    split_folders,
)
from meta_dataset_readers.pictures import picture_names, upright

# --- the table -------------------------------------------------------------------------------------------


def known(name: str) -> Known:
    """The entry of the table by any of its names: case, "-", "_" and spaces do not count. Raises InputError
    for an unknown one."""
    names = {_plain(alias): entry for entry in DATASETS.values() for alias in (entry.name, *entry.aliases)}
    if _plain(name) not in names:
        hint = f"{nearest(name, DATASETS)}; a folder of one's own is 'imagefolder'"
        raise InputError(f"--dataset {name}: no such data set, {hint}")
    return names[_plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def open_dataset(name: str, folder: Path) -> Opened:
    """The data set `name` (see `known`) in `folder`, which is torchvision's root for it or what its archive
    unpacks to. Those without an official split (Caltech, class folders) are split per class, always alike.

    Raises InputError: an unknown name, the first file or folder that is missing and what it should hold, or
    a file that is not what it should be.
    """
    entry = known(name)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected {entry.title}; get it from {entry.home}")
    try:
        return entry.open(DatasetFolder(folder, entry))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error


def _open_cifar(*forms: cifar.Form) -> Callable[[DatasetFolder], Opened]:
    def read(place: DatasetFolder) -> Opened:
        form = next((form for form in forms if _cifar_place(place, form).holds(".", form.files)), forms[0])
        place = _cifar_place(place, form)
        files = [place.file(name, "a batch of pictures") for name in (*form.train, *form.test)]
        names = form.read_names(place.file(form.names, "the names of the classes"))
        if len(names) != place.entry.n_classes:
            found = f"{len(names)} names of classes, expected {place.entry.n_classes}"
            raise InputError(f"{place.folder / form.names}: {found}")
        train, test = files[: len(form.train)], files[len(form.train) :]
        return Opened(
            _cifar_split(form, train, place, "train"), _cifar_split(form, test, place, "test"), tuple(names)
        )

    return read


def _cifar_place(place: DatasetFolder, form: cifar.Form) -> DatasetFolder:
    return place.at((form.folder, "."), form.files)


def _cifar_split(form: cifar.Form, files: Sequence[Path], place: DatasetFolder, split: str) -> ArrayImages:
    pixels, labels = [], []
    for file in files:
        rows, found = form.read_batch(file)
        if rows.ndim != 2 or rows.shape[1] != 3072 or rows.dtype != np.uint8 or not len(rows):
            expected = "uint8 rows of 3072 = 3 x 32 x 32"
            raise InputError(f"{file}: pictures are {rows.dtype} {rows.shape}, expected {expected}")
        check_same_length(file, pictures=rows, labels=found)
        pixels.append(rows)
        labels += labels_from_zero(file, found, place.entry.n_classes, first=0)
    planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    return ArrayImages(planes.transpose(0, 2, 3, 1), labels, f"{place.folder}, {split}")


# --- the others, by their kinds of lists -----------------------------------------------------------------

_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def _open_stl10(place: DatasetFolder) -> Opened:
    names = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
    place = place.at(("stl10_binary", "."), names)
    files = [place.file(name, "pictures" if "X" in name else "labels") for name in names]
    return Opened(_stl10_split(*files[:2]), _stl10_split(*files[2:]), _STL10_CLASSES)


def _stl10_split(pictures: Path, labels: Path) -> ArrayImages:
    size, each = size_of(pictures), 3 * 96 * 96
    if size == 0 or size % each:
        raise InputError(f"{pictures}: {size} bytes, expected a multiple of {each} = 3 x 96 x 96")
    planes = np.memmap(pictures, np.uint8, "r").reshape(-1, 3, 96, 96)  # a plane goes column by column
    found = list(read_bytes(labels, LARGEST_LIST))
    check_same_length(labels, pictures=planes, labels=found)
    return ArrayImages(planes.transpose(0, 3, 2, 1), labels_from_zero(labels, found, 10), str(pictures))


def _open_dtd(place: DatasetFolder) -> Opened:
    """Split 1 of ten: its train and val are for training, its test for testing."""
    place = place.at(("dtd/dtd", "dtd", "."), ("labels", "images"))
    root = place.subfolder("images", "a folder of pictures per class")
    lists = [place.file(f"labels/{split}1.txt", "a list of pictures") for split in ("train", "val", "test")]
    train, val, test = ([(line, file) for line in read_lines(file)] for file in lists)
    class_names = sorted({line.partition("/")[0] for line, _ in train + val})
    labels = {name: label for label, name in enumerate(class_names)}

    def entry(line: str, file: Path) -> Entry:
        return Entry(line, class_label(file, labels, line.partition("/")[0]), file)

    return place.pictures(root, class_names, [entry(*at) for at in train + val], [entry(*at) for at in test])


def _open_dogs(place: DatasetFolder) -> Opened:
    place = place.at(("stanford_dogs", "StanfordDogs", "."), ("Images", "lists", "train_list.mat"))
    root = place.subfolder("Images", "a folder of pictures per breed")
    splits = []
    for split in ("train", "test"):
        file = place.file(f"lists/{split}_list.mat", "a list of pictures", f"{split}_list.mat")
        files = as_texts(file, read_matlab(file, "file_list"))
        labels = as_integers(file, read_matlab(file, "labels"))
        check_same_length(file, pictures=files, labels=labels)
        labels = labels_from_zero(file, labels, place.entry.n_classes)
        splits.append([Entry(*pair, file) for pair in zip(files, labels, strict=True)])
    return place.pictures(root, class_names_by_folder(*splits), *splits)


def _open_cub(place: DatasetFolder) -> Opened:
    lists = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    place = place.at(("CUB_200_2011", "cub", "."), lists)
    root = place.subfolder("images", "a folder of pictures per species")
    files = [place.file(name, "a list by picture") for name in lists]
    path_of, label_of, is_train = (_by_number(file) for file in files)
    for file, values in zip(files[1:], (label_of, is_train), strict=True):
        for picture in path_of:
            if picture not in values:
                raise InputError(f"{file}: no line for picture {picture} of {files[0].name}")
            if not re.fullmatch(r"\d{1,9}", values[picture]):
                raise InputError(f"{file}: {values[picture][:60]!r} for picture {picture}, expected a number")
    labels = labels_from_zero(
        files[1], (int(label_of[picture]) for picture in path_of), place.entry.n_classes
    )
    splits: dict[str, list[Entry]] = {"1": [], "0": []}
    for (picture, path), label in zip(path_of.items(), labels, strict=True):
        if is_train[picture] not in splits:
            raise InputError(f"{files[2]}: {is_train[picture]!r} for picture {picture}, expected 0 or 1")
        splits[is_train[picture]].append(Entry(path, label, files[0]))
    return place.pictures(root, class_names_by_folder(*splits.values()), *splits.values())


def _by_number(file: Path) -> dict[str, str]:
    """The lines "PICTURE VALUE" of a list of CUB."""
    pairs = read_pairs(file)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError(f"{file}: {len(pairs)} lines for {len(found)} pictures, expected one for each")
    return found


def _open_cars(place: DatasetFolder) -> Opened:
    """Either form: pictures of a split in a folder each, or all in one folder. Lists of both may be there,
    so the pictures tell."""
    place = place.at(
        ("stanford_cars", "cars", "."), ("devkit", "cars_train", "cars_test", "cars_annos.mat", "car_ims")
    )
    by_split = place.holds(".", ("cars_train", "cars_test", "devkit"))
    if place.holds(".", ("car_ims",)) or (place.holds(".", ("cars_annos.mat",)) and not by_split):
        file = place.file("cars_annos.mat", "the labels")
        names = as_texts(file, read_matlab(file, "class_names"))
        table = read_matlab(file, "annotations")
        entries = _car_entries(file, table, "relative_im_path", "", len(names))
        tests = as_integers(file, matlab_field(file, table, "test"))
        splits = [
            [e for e, is_test in zip(entries, tests, strict=True) if is_test == test] for test in (0, 1)
        ]
        return place.pictures(place.folder, names, *splits)
    meta = place.file("devkit/cars_meta.mat", "the names of the classes", "cars_meta.mat")
    names = as_texts(meta, read_matlab(meta, "class_names"))
    splits = []
    for split, mat in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        # torchvision keeps the labels of the test pictures outside the devkit.
        usual, other = (f"devkit/{mat}", mat) if split == "train" else (mat, f"devkit/{mat}")
        file = place.file(usual, f"the {split} labels", other)
        folder = f"cars_{split}"
        place.subfolder(folder, f"the {split} pictures")
        table = read_matlab(file, "annotations")
        if place.holds(folder, (folder,)):  # one folder too many, as Kaggle has it
            folder = f"{folder}/{folder}"
        splits.append(_car_entries(file, table, "fname", f"{folder}/", len(names)))
    return place.pictures(place.folder, names, *splits)


def _car_entries(file: Path, table: np.ndarray, field: str, folder: str, n_classes: int) -> list[Entry]:
    paths = [folder + name for name in as_texts(file, matlab_field(file, table, field))]
    labels = labels_from_zero(file, as_integers(file, matlab_field(file, table, "class")), n_classes)
    return [Entry(*pair, file) for pair in zip(paths, labels, strict=True)]


def _open_aircraft(place: DatasetFolder) -> Opened:
    """The 100 variants; train and val are for training."""
    place = place.at(("fgvc-aircraft-2013b/data", "data", "."), ("variants.txt", "images"))
    root = place.subfolder("images", "the pictures")
    class_names = read_lines(place.file("variants.txt", "the names of the classes"))
    labels = {name: label for label, name in enumerate(class_names)}
    splits = []
    for split in ("trainval", "test"):
        file = place.file(f"images_variant_{split}.txt", "a list of pictures")
        splits.append(
            [Entry(f"{name}.jpg", class_label(file, labels, of), file) for name, of in read_pairs(file)]
        )
    return place.pictures(root, class_names, *splits)


def _open_flowers(place: DatasetFolder) -> Opened:
    """The official training and validation pictures, ten per class each, are both for training."""
    from torchvision.datasets import Flowers102  # for the names, which the archive lacks

    place = place.at(("flowers-102", "."), ("imagelabels.mat", "setid.mat", "jpg"))
    root = place.subfolder("jpg", "the pictures")
    file = place.file("imagelabels.mat", "the labels")
    split_file = place.file("setid.mat", "the split")
    labels = labels_from_zero(file, as_integers(file, read_matlab(file, "labels")), place.entry.n_classes)

    def entries(variable: str) -> list[Entry]:
        numbers = as_integers(split_file, read_matlab(split_file, variable))
        for number in numbers:
            if not 1 <= number <= len(labels):
                raise InputError(f"{split_file}: picture {number} in {variable}, expected 1 to {len(labels)}")
        return [Entry(f"image_{number:05d}.jpg", labels[number - 1], split_file) for number in numbers]

    class_names = Flowers102.classes[: max(labels, default=-1) + 1]
    return place.pictures(root, class_names, entries("trnid") + entries("valid"), entries("tstid"))


def _open_food101(place: DatasetFolder) -> Opened:
    place = place.at(("food-101", "."), ("meta", "images"))
    root = place.subfolder("images", "a folder of pictures per class")
    files = [place.file(f"meta/{split}.json", "a list of pictures") for split in ("train", "test")]
    lists = [read_json(file) for file in files]
    for file, listed in zip(files, lists, strict=True):
        if not isinstance(listed, dict) or not all(isinstance(paths, list) for paths in listed.values()):
            raise InputError(f"{file}: expected a list of pictures for each class")
    class_names = sorted(lists[0])
    labels = {name: label for label, name in enumerate(class_names)}
    splits = [
        [
            Entry(f"{path}.jpg", class_label(file, labels, name), file)
            for name in sorted(listed)
            for path in as_texts(file, listed[name])
        ]
        for file, listed in zip(files, lists, strict=True)
    ]
    return place.pictures(root, class_names, *splits)


# --- folders of classes ----------------------------------------------------------------------------------


def _open_caltech(
    folders: tuple[str, ...], categories: str, most: int, left_out: tuple[str, ...] = ()
) -> Callable[[DatasetFolder], Opened]:
    """No official split: `most` pictures of a class are for training, at most 80 %, the rest for testing."""

    def read(place: DatasetFolder) -> Opened:
        place = place.at((*folders, "."), (categories,))
        root = place.subfolder(categories, "a folder of pictures per class")
        classes = [folder for folder in folder_names(root) if folder not in left_out]
        return _split_classes(place, root, classes, most)

    return read


def _open_folders(place: DatasetFolder) -> Opened:
    """train/, test/ and perhaps val/ of class folders; or class folders alone, 80 % of each for training."""
    place = _unwrapped(place)
    found = split_folders(place.folder)
    if not found.keys() & {"TRAIN", "TEST"}:
        return _split_classes(place, place.folder, folder_names(place.folder))
    root = place.subfolder(found.get("TRAIN", "train"), "a folder of training pictures per class")
    place.subfolder(found.get("TEST", "test"), "a folder of test pictures per class")
    class_names = folder_names(root)
    splits = [_folder_entries(place.folder, found[split], class_names) for split in ("TRAIN", "TEST")]
    for label, name in enumerate(class_names):
        if not any(entry.label == label for entry in splits[0]):
            raise InputError(f"{root / name}: no picture, expected one or more of every class")
    if "VALID" in found:
        splits.append(_folder_entries(place.folder, found["VALID"], class_names))
    return place.pictures(place.folder, class_names, *splits)


def _unwrapped(place: DatasetFolder) -> DatasetFolder:
    """The folder itself, or one that is all it holds, with folders of its own and no picture."""
    inner = [name for name in folder_names(place.folder) if name != "__MACOSX"]
    if len(inner) != 1 or split_folders(place.folder):
        return place
    below = place.folder / inner[0]
    if not folder_names(below) or picture_names(below):
        return place
    return dataclasses.replace(place, folder=below)


def _folder_entries(root: Path, split: str, class_names: Sequence[str]) -> list[Entry]:
    """The pictures in root/split/CLASS. Raises InputError for a class that training has not."""
    labels = {name: label for label, name in enumerate(class_names)}
    return [
        Entry(f"{split}/{name}/{file}", class_label(root / split, labels, name), root / split)
        for name in folder_names(root / split)
        for file in picture_names(root / split / name)
    ]


def _split_classes(
    place: DatasetFolder, root: Path, classes: Sequence[str], most: int | None = None
) -> Opened:
    """Class folders split: of n pictures 80 %, but not more than `most`, for training."""
    if not classes:
        raise InputError(f"{root}: no folder, expected one per class of {place.entry.title}")
    entries = []
    for label, name in enumerate(classes):
        files = picture_names(root / name)
        if len(files) < 2:
            found = f"{len(files)} pictures of the class"
            raise InputError(f"{root / name}: {found}, expected 2 or more: training and test need one each")
        entries += [Entry(f"{name}/{file}", label, root) for file in files]
    labels = int64(entry.label for entry in entries)
    most = len(entries) if most is None else most
    train, test = choose_per_class(labels, lambda n: min(4 * n // 5, most), (0,))
    return place.pictures(root, classes, [entries[i] for i in train], [entries[i] for i in test])


_HOMES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "stl10": "https://cs.stanford.edu/~acoates/stl10/",
    "dtd": "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    "dogs": "http://vision.stanford.edu/aditya86/ImageNetDogs/",
    "cub": "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "caltech101": "https://data.caltech.edu/records/mzrjq-6wc02",
    "caltech256": "https://data.caltech.edu/records/nyy15-4j048",
    "cars": "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    "aircraft": "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    "flowers": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    "food101": "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    "imagefolder": "wherever your own pictures are",
}
_ARCHIVES = {
    "cifar10": ("cifar-10-python", "cifar-10-binary"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
    "dtd": ("dtd-r1.0.1",),
    "dogs": ("images", "lists"),
    "cub": ("CUB_200_2011",),
    "caltech101": ("caltech-101", "101_ObjectCategories"),
    "caltech256": ("256_ObjectCategories",),
    "cars": ("stanford_cars", "cars_train", "cars_test", "car_devkit", "car_ims"),
    "flowers": ("102flowers",),
}
_CALTECH101 = _open_caltech(("caltech101", "caltech-101"), "101_ObjectCategories", 60, ("BACKGROUND_Google",))
_CALTECH256 = _open_caltech(("caltech256", "caltech-256"), "256_ObjectCategories", 150)

# By name: title, number of classes, image size, how it is opened, other names.
DATASETS = {
    name: Known(
        name,
        *entry,
        home=_HOMES[name],
        prepare=upright if name == "imagefolder" else None,
        archives=_ARCHIVES.get(name, ()),
    )
    for name, entry in {
        "cifar10": ("CIFAR-10", 10, 32, _open_cifar(*cifar.CIFAR10)),
        "cifar100": ("CIFAR-100", 100, 32, _open_cifar(*cifar.CIFAR100)),
        "stl10": ("STL-10", 10, 32, _open_stl10),
        "dtd": ("DTD", 47, 224, _open_dtd, ("dtd57",)),
        "dogs": ("Stanford Dogs", 120, 224, _open_dogs, ("dog", "stanford_dogs", "dog120")),
        "cub": ("CUB-200-2011", 200, 224, _open_cub, ("cub200", "cub_200_2011")),
        "caltech101": ("Caltech-101", 101, 224, _CALTECH101),
        "caltech256": ("Caltech-256", 257, 224, _CALTECH256),
        "cars": ("Stanford Cars", 196, 224, _open_cars, ("stanford_cars", "cars196")),
        "aircraft": ("FGVC-Aircraft", 100, 224, _open_aircraft, ("fgvc_aircraft",)),
        "flowers": ("Flowers-102", 102, 224, _open_flowers, ("flowers102",)),
        "food101": ("Food-101", 101, 224, _open_food101, ("food",)),
        "imagefolder": ("a folder of classes", 0, 224, _open_folders),
    }.items()
}
