"""Pictures by (class, index): what every layout on disk looks like to the rest of the package.

Knows how a picture is asked for and what is promised about the answer, and Meta-Dataset's layout (one
record file per class). Other layouts live in modules of their own. Does not know episodes.
"""

import dataclasses
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from meta_dataset_readers.episode import ImageOrigin
from meta_dataset_readers.errors import DamagedRecord
from meta_dataset_readers.files import exists, listing
from meta_dataset_readers.pictures import as_published, decoded
from meta_dataset_readers.spec import DatasetSpec, load_spec
from meta_dataset_readers.tfrecord import RecordFileCache


class ImageStore(ABC):
    """Random access to the pictures of one source, by absolute class id and index within the class.

    A store can be pickled and used from any process: it opens files when asked for a picture, in the process
    that asks, and never holds more than a few of them open. Making one reads no picture.
    """

    has_checksums = False  # whether a changed picture is noticed when it is read

    @abstractmethod
    def count(self, class_id: int) -> int:
        """How many pictures the class really has, whatever a specification claims.

        Raises InputError, naming file and place, where that cannot be told: a missing or damaged file.
        """

    @abstractmethod
    def image(self, class_id: int, index: int) -> Image.Image:
        """Picture `index` in 0..count-1 of a class, in mode RGB.

        Raises DamagedRecord, naming file and record, for a picture that is at fault, InputError for a file.
        """

    @abstractmethod
    def origin(self, class_id: int, index: int) -> ImageOrigin:
        """Where the picture comes from."""

    @abstractmethod
    def place(self, class_id: int) -> Path:
        """The file or directory that holds the class, for messages."""

    def missing(self, class_ids: Iterable[int]) -> list[str]:
        """The names of files that these classes need and that are not there; opens none of them.

        Here for a file per class; a listing of their directory is cheaper than asking for thousands of files.
        """
        places = [self.place(class_id) for class_id in class_ids]
        folders = {place.parent for place in places}
        present = {folder / name for folder in folders for name in listing(folder, exists)}
        return [place.name for place in places if place not in present]

    def read(self, class_id: int, index: int) -> np.ndarray:
        """The pixels of a picture: uint8, (H, W, 3), RGB. Raises as `image`."""
        return np.asarray(self.image(class_id, index))

    def encoded(self, class_id: int, index: int) -> bytes:
        """A picture file that decodes to exactly what `image` gives: the original bytes where there are any,
        else a PNG. Raises as `image`."""
        png = io.BytesIO()
        self.image(class_id, index).save(png, "PNG")
        return png.getvalue()


@dataclasses.dataclass(frozen=True)
class Source:
    """One domain, opened: what its classes are, and where their pictures come from.

    `resize` names the evaluation transform of its published protocol, see `transforms.RESIZES`.
    """

    spec: DatasetSpec
    store: ImageStore
    resize: str = "shorter"


def open_records(directory: Path, name: str) -> Source:
    """The source whose `dataset_spec.json` and `<class id>.tfrecords` lie in `directory`.

    Raises InputError as `spec.load_spec`.
    """
    return Source(load_spec(directory), RecordStore(directory, name))


class RecordStore(ImageStore):
    """Meta-Dataset's layout: `<class id>.tfrecords`, in which every record says its class."""

    has_checksums = True

    def __init__(self, directory: Path, name: str):
        self._directory, self._name = directory, name
        self._files = RecordFileCache()

    def count(self, class_id: int) -> int:
        return len(self._files.open(self.place(class_id)))

    def image(self, class_id: int, index: int) -> Image.Image:
        where = self._where(class_id, index)
        return decoded(self.encoded(class_id, index), where, prepare=as_published)

    def encoded(self, class_id: int, index: int) -> bytes:
        data, label = self._files.open(self.place(class_id)).read_example(index)
        if label != class_id:
            where = self._where(class_id, index)
            raise DamagedRecord(f"{where}: label {label} in the file of class {class_id}")
        return data

    def origin(self, class_id: int, index: int) -> ImageOrigin:
        return ImageOrigin(f"{self._name}/{self.place(class_id).name}", index)

    def place(self, class_id: int) -> Path:
        return self._directory / f"{class_id}.tfrecords"

    def _where(self, class_id: int, index: int) -> str:
        return self._files.open(self.place(class_id)).where(index)
