"""The four sources of BSCD-FSL as their archives unpack: CropDisease, EuroSAT, ISIC and ChestX.

Guo et al., "A Broader Study of Cross-Domain Few-Shot Learning" (ECCV 2020). Knows which of the files belong
to the benchmark, and to which class; all classes are TEST. Opening a source reads its lists and directories
and opens no picture. Does not look at a source's name: `LAYOUTS` says what its directory holds.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.files import LARGEST_LIST, read_bytes
from meta_dataset_readers.folders import ClassFiles, classes_below, flat_source
from meta_dataset_readers.pictures import picture_names
from meta_dataset_readers.store import Source

CROP_DISEASE_IMAGES = "dataset/train"
EUROSAT_IMAGES = "2750"
ISIC_LABELS = "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
ISIC_IMAGES = "ISIC2018_Task3_Training_Input"
CHESTX_LABELS = "Data_Entry_2017.csv"
CHESTX_IMAGES = "images"
CHESTX_FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumothorax",
)

_CHESTX_SIZE = (256, 256)  # width and height, whatever the picture's own
_RESIZE = "square"

# Where else they may lie: other archives of the same pictures, and what tools that unpack them make of it.
_EUROSAT_FOLDERS = (EUROSAT_IMAGES, "EuroSAT_RGB")
_ISIC_LISTS = (ISIC_LABELS, ISIC_LABELS.rpartition("/")[2])
_ISIC_FOLDERS = (ISIC_IMAGES, f"{ISIC_IMAGES}/{ISIC_IMAGES}")
_CHESTX_LISTS = (CHESTX_LABELS, "Data_Entry_2017_v2020.csv")
_CHESTX_FOLDERS = (CHESTX_IMAGES, "images/images", "images_*/images", "images_*")

# A row of a list that belongs to the benchmark: its line, its file and the position of its class.
_Labelled = tuple[int, str, int]


def open_crop_disease(directory: Path, name: str) -> Source:
    """The class folders in dataset/train, by sorted name; the benchmark does not use dataset/test.

    Raises InputError for a folder that is not there, cannot be read, or holds no class or no picture.
    """
    classes = classes_below(directory, CROP_DISEASE_IMAGES)
    return flat_source(directory, name, {"TEST": classes}, resize=_RESIZE)


def open_eurosat(directory: Path, name: str) -> Source:
    """The class folders in 2750 or EuroSAT_RGB, by sorted name. Raises InputError as `open_crop_disease`."""
    classes = classes_below(directory, _first(directory, _EUROSAT_FOLDERS))
    return flat_source(directory, name, {"TEST": classes}, resize=_RESIZE)


def open_isic(directory: Path, name: str) -> Source:
    """ISIC 2018 Task 3: the training pictures of the ground truth, whose columns are the classes.

    Raises InputError, naming file and line, for a row that puts its picture in no class or in several (the
    published loader takes a row of zeros for class 0), and for a picture named twice or outside its folder.
    """
    file = directory / _first(directory, _ISIC_LISTS)
    header, rows = _table(file)
    classes = header[1:]
    if not classes or len(set(classes)) < len(classes):
        raise InputError(f"{file}: line 1: expected 'image' and the classes, found {_brief(header)}")
    labelled = ((line, f"{row[0]}.jpg", _only_one(file, line, row[1:], len(classes))) for line, row in rows)
    listed = _listed(directory, file, _ISIC_FOLDERS, classes, labelled)
    return flat_source(directory, name, {"TEST": listed}, resize=_RESIZE)


def open_chestx(directory: Path, name: str) -> Source:
    """NIH ChestX-ray8: the pictures with exactly one finding, if that is one of the benchmark's seven.

    Every picture is brought to 256 x 256 pixels by PIL's default filter, in its own mode, before it becomes
    RGB, as the published loader does. Raises InputError, naming file and line, for a row without findings,
    and for a picture named twice or outside its folder.
    """
    file = directory / _first(directory, _CHESTX_LISTS)
    listed = _listed(directory, file, _CHESTX_FOLDERS, CHESTX_FINDINGS, _single_findings(file))
    return flat_source(directory, name, {"TEST": listed}, resize=_RESIZE, prepare=_to_chestx_size)


# Who opens a directory in which one of these lies. Either half of ISIC will do: without the other it is still
# an ISIC, and no folder of class folders.
LAYOUTS = {
    CROP_DISEASE_IMAGES: open_crop_disease,
    **dict.fromkeys(_EUROSAT_FOLDERS, open_eurosat),
    **dict.fromkeys((*_ISIC_LISTS, ISIC_IMAGES), open_isic),
    **dict.fromkeys(_CHESTX_LISTS, open_chestx),
}


def _first(directory: Path, names: Sequence[str]) -> str:
    """The first of `names` that is there, of all the first, so that what is missing is told by its name."""
    return next((name for name in names if (directory / name).exists()), names[0])


def _only_one(file: Path, line: int, columns: Sequence[str], n_classes: int) -> int:
    """The position of the 1 in a row of zeros."""
    try:
        numbers = [float(column) for column in columns]
    except ValueError:
        numbers = []
    if len(numbers) != n_classes or sorted(numbers) != [0.0] * (n_classes - 1) + [1.0]:
        expected = f"expected a single 1 and {n_classes - 1} times 0"
        raise InputError(f"{file}: line {line}: {expected}, found {_brief(columns)}")
    return numbers.index(1.0)


def _single_findings(file: Path) -> Iterator[_Labelled]:
    label_of = {finding: label for label, finding in enumerate(CHESTX_FINDINGS)}
    _, rows = _table(file)
    for line, row in rows:
        if len(row) < 2:
            raise InputError(f"{file}: line {line}: expected a picture and its findings, found {_brief(row)}")
        image, findings = row[:2]
        if findings in label_of:  # several findings are joined by "|", and so in none of the seven
            yield line, image, label_of[findings]


def _to_chestx_size(image: Image.Image) -> Image.Image:
    return image.resize(_CHESTX_SIZE)


def _listed(
    directory: Path, file: Path, places: Sequence[str], classes: Sequence[str], labelled: Iterable[_Labelled]
) -> list[ClassFiles]:
    """The pictures that `file` puts in each of `classes`, in its order; each lies in one of `places`."""
    folders = _folders(directory, places)
    if not folders:
        expected = f"expected all pictures that {file.name} names"
        raise InputError(f"{directory / places[0]}: no such folder, {expected}")
    # A single folder need not be listed.
    folder_of = _folder_of_each(directory, folders) if len(folders) > 1 else {}
    images: list[list[str]] = [[] for _ in classes]
    first_line: dict[str, int] = {}
    for line, image, label in labelled:
        if image in ("", ".", "..") or not image.isprintable() or not {"/", "\\"}.isdisjoint(image):
            raise InputError(f"{file}: line {line}: expected the name of a picture, found {_brief([image])}")
        if first_line.setdefault(image, line) != line:
            raise InputError(f"{file}: line {line}: {_brief([image])} is already in line {first_line[image]}")
        images[label].append(f"{folder_of.get(image, folders[0])}/{image}")
    if not first_line:
        raise InputError(f"{file}: no picture of any class in it")
    return [ClassFiles(name, tuple(found)) for name, found in zip(classes, images, strict=True)]


def _folder_of_each(directory: Path, folders: Sequence[str]) -> dict[str, str]:
    """By the name of a picture the first of `folders` that has it."""
    found: dict[str, str] = {}
    for folder in folders:
        for picture in picture_names(directory / folder):
            found.setdefault(picture, folder)
    return found


def _folders(directory: Path, places: Sequence[str]) -> list[str]:
    """The folders of `directory` at `places`, in which "*" stands for any name."""
    found = (path for place in places for path in sorted(directory.glob(place)) if path.is_dir())
    return [path.relative_to(directory).as_posix() for path in found]


def _table(file: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header, and line number and cells of every further row that is not blank."""
    data = read_bytes(file, LARGEST_LIST)
    # Not strictly UTF-8: what matters is ASCII, and a name that is not cannot be found afterwards.
    rows = _rows(file, data.decode("utf-8-sig", "replace"))
    for _, header in rows:
        return header, rows
    raise InputError(f"{file}: empty, expected a header and one row per picture")


def _rows(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    # Strict: an unclosed quotation mark would swallow the rows that follow.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise InputError(f"{file}: line {reader.line_num}: not valid CSV: {error}") from error


def _brief(cells: Sequence[str]) -> str:
    """The cells of a row for a message: one short line, whatever they hold."""
    text = ",".join(cells)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
