"""The command `python -m meta_dataset_readers.convert`: any readable source into the packed layout.

    python -m meta_dataset_readers.convert DATA_PATH SOURCE [SOURCE ...] --out DIR

Every picture is decoded before it is written. A finished file is read back from its beginning: checksums,
labels, and by a running SHA-256 that it holds what was written, byte for byte. The originals are only read.

A run that was killed leaves `unfinished.jsonl` behind: what is being packed, which records were left out,
which files are finished and verified. The next run believes of an unfinished file its records up to the
first that is not whole, cuts off the rest and goes on, and so ends with the same bytes.
Knows how packed files come to be; how they are laid out and read is known to `packed`.
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import argparse
import array
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from meta_dataset_readers import files
from meta_dataset_readers.command import Parser, add_sources
from meta_dataset_readers.convert_journal import Journal
from meta_dataset_readers.errors import DamagedRecord, InputError, exit_on_bad_input, printable, say
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.packed import (
    FORMAT,
    INDEX_FILE,
    JOURNAL_FILE,
    OFFSETS_DTYPE,
    Index,
    PackedStore,
    SplitFile,
    class_checksums,
    offsets_file,
    open_packed,
    record_file,
)
from meta_dataset_readers.pictures import UnreadableImage, as_published, decode_image
from meta_dataset_readers.settings import as_path
from meta_dataset_readers.spec import DAG, FILE_PATTERN, SPEC_FILE, SPLITS, DatasetSpec, load_spec
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.tfrecord import (
    MalformedExample,
    decode_example,
    encode_example,
    frame,
    sound_records,
)

_SAMPLED = 200  # pictures of a source whose size is looked at to tell how much room its copy needs
_PER_RECORD = 80  # bytes that a record and its offset take beside the picture, rounded up
_MARGIN = 1.02  # of that estimate


@dataclasses.dataclass(frozen=True)
class Packed:
    """One source as it lies packed on disk."""

    directory: Path
    classes: int
    images: int
    bytes: int
    fresh: bool  # finished by this call, rather than found complete
    notes: tuple[str, ...] = ()  # a line for each record left out and each count corrected by this packing


# --- the command -----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "Pack sources: one record file per split, and an index.", "python -m meta_dataset_readers.convert"
    )
    add_sources(parser, "+", "name of a source below DATA_PATH")
    parser.add_argument(
        "--out", type=as_path, required=True, metavar="DIR", help="directory to hold the packed sources"
    )
    parser.add_argument(
        "--skip_bad_records",
        action="store_true",
        help="leave damaged records out and correct wrong counts; without this the first one ends the run",
    )
    return parser.parse(arguments)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    prefix = tuple(options.image_prefix) if options.image_prefix else None
    sources = {name: open_source(options.data_path, name, prefix) for name in options.sources}
    for name, packed in convert(sources, options.out, skip_bad_records=options.skip_bad_records):
        for note in packed.notes:
            say(f"{name}: {note}", file=sys.stderr)
        state = "packed and verified" if packed.fresh else "already complete, left alone"
        size = f"{packed.classes} classes, {packed.images} images, {packed.bytes / 1e6:.1f} MB"
        say(f"{name}: {state}: {size} in {packed.directory}")


def convert(
    sources: Mapping[str, Source], out: Path, *, skip_bad_records: bool = False
) -> Iterator[tuple[str, Packed]]:
    """Pack `sources`, by name, into directories of these names below `out`, one after the other.

    With `skip_bad_records`, damaged and missing pictures are left out, and a class that has another number
    of pictures than its specification claims is packed as it is; otherwise either is an error. A source that
    is packed there already is left alone, one whose packing was cut short is finished.

    Raises InputError for those, for a file that is missing or cannot be read, and, before anything is
    written, for an `out` inside a source, a directory in the way, and too little room.
    """
    for name, source in sources.items():
        _check_place(out / name, [other.spec.directory for other in sources.values()])
        # A picture that is missing can be left out; a file of a whole class cannot, which its store will say.
        if not skip_bad_records and not _is_complete(out / name):
            _check_files(source)
    _check_room(sources, out)
    for name, source in sources.items():
        if _is_complete(out / name):
            yield name, _found(out / name, name)
        else:
            yield name, _pack(source, name, out / name, skip_bad_records)


def _check_files(source: Source) -> None:
    missing = source.store.missing(_classes(source.spec))
    if missing:
        found = f"{len(missing)} files are missing, the first is {missing[0]}"
        raise InputError(f"{source.spec.directory}: {found}")


def _classes(spec: DatasetSpec) -> range:
    return range(len(spec.images_per_class))


def _is_complete(directory: Path) -> bool:
    return (directory / INDEX_FILE).exists()


def _found(directory: Path, name: str) -> Packed:
    """The complete source in `directory`. Raises InputError if its files are not as its index says."""
    source = open_packed(directory, name)
    for class_id in _classes(source.spec):
        source.store.count(class_id)
    (directory / JOURNAL_FILE).unlink(missing_ok=True)  # killed after the index was written
    return _packed(directory, source.spec, fresh=False)


def _packed(directory: Path, spec: DatasetSpec, fresh: bool, notes: Sequence[str] = ()) -> Packed:
    size = sum(record_file(directory, split).stat().st_size for split in SPLITS if spec.classes(split))
    counts = spec.images_per_class
    return Packed(directory, len(counts), sum(counts), size, fresh, tuple(notes))


# --- before anything is written ----------------------------------------------------------------------------


def _check_place(directory: Path, originals: Sequence[Path]) -> None:
    place = Path(os.path.realpath(directory))  # unlike `resolve` it takes a link to itself as it is
    for original in originals:
        if place.is_relative_to(original.resolve()) or original.resolve().is_relative_to(place):
            raise InputError(f"--out: {directory}: lies inside the source {original}, or around it")
    try:
        held = sorted(file.name for file in directory.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"--out: {directory}: cannot be used as a directory: {error.strerror}") from error
    if held and INDEX_FILE not in held and JOURNAL_FILE not in held:
        found = f"holds {held[0]!r} and is no packed source"
        raise InputError(f"--out: {directory}: {found}; choose a new or empty directory")


def _check_room(sources: Mapping[str, Source], out: Path) -> None:
    needed = 0
    for name, source in sources.items():
        if not _is_complete(out / name):
            begun = (record_file(out / name, split) for split in SPLITS)
            needed += _estimated_size(source) - sum(file.stat().st_size for file in begun if file.exists())
    there = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        found = f"{free / 1e6:.1f} MB are free, about {needed / 1e6:.1f} MB are needed"
        raise InputError(f"--out: {out}: {found}")


def _estimated_size(source: Source) -> int:
    """How many bytes the copy will take, judged by a sample of its pictures."""
    ends = list(itertools.accumulate(source.spec.images_per_class))
    sizes = []
    for number in np.linspace(0, ends[-1] - 1, min(_SAMPLED, ends[-1]), dtype=np.int64) if ends else ():
        class_id = int(np.searchsorted(ends, number, side="right"))
        index = int(number) - ends[class_id] + source.spec.images_per_class[class_id]
        if index < source.store.count(class_id):
            with contextlib.suppress(DamagedRecord):
                sizes.append(len(source.store.encoded(class_id, index)))
    return int((np.mean(sizes) + _PER_RECORD) * ends[-1] * _MARGIN) if sizes else 0


# --- one source --------------------------------------------------------------------------------------------


def _pack(source: Source, name: str, directory: Path, skip_bad_records: bool) -> Packed:
    counts, corrected = _counts(source, skip_bad_records)
    plan = {
        "format": FORMAT,
        "source": name,
        "origin": str(source.spec.directory.resolve()),
        "resize": source.resize,
        "images": list(counts),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(directory / JOURNAL_FILE, plan, skip_bad_records)
        for split in SPLITS:
            if source.spec.classes(split) and split not in journal.finished:
                _pack_split(source, split, counts, directory, journal)
        spec = _finish(source, counts, directory, plan, journal)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise InputError(f"--out: {directory}: {reason}; the same command goes on from here") from error
    left_out = [f"left out: {line}" for line in journal.left_out.values()]
    return _packed(directory, spec, fresh=True, notes=[*corrected, *left_out])


def _counts(source: Source, skip_bad_records: bool) -> tuple[tuple[int, ...], list[str]]:
    """How many pictures each class has, and a line for each that its specification is wrong about."""
    spec, wrong = source.spec, []
    counts = tuple(source.store.count(class_id) for class_id in _classes(spec))
    for class_id, (there, claimed) in enumerate(zip(counts, spec.images_per_class, strict=True)):
        if there != claimed:
            found = f"{there} images of class {class_id} ({spec.class_name(class_id)!r})"
            wrong.append(f"{source.store.place(class_id)}: {found}, {spec.file} claims {claimed}")
    if wrong and not skip_bad_records:
        raise InputError(wrong[0])
    return counts, [f"count corrected: {line}" for line in wrong]


# --- one split: written, and read back ---------------------------------------------------------------------

_Wanted = Iterator[tuple[int, int]]  # (class id, index) of records in the order in which a file holds them


def _pack_split(source: Source, split: str, counts: Sequence[int], directory: Path, journal: Journal) -> None:
    path, classes = record_file(directory, split), source.spec.classes(split)

    def wanted() -> _Wanted:
        for class_id in classes:
            for index in range(counts[class_id]):
                if (class_id, index) not in journal.left_out:
                    yield class_id, index

    total = sum(counts[class_id] for class_id in classes)
    digest = _write(source.store, path, wanted(), journal.leave_out, total)
    offsets = _read_back(path, wanted(), digest, total)
    with offsets_file(directory, split).open("wb") as file:
        np.save(file, offsets)
        files.to_disk(file)
    packed = _without(counts, journal.left_out)[classes.start : classes.stop]
    entry = SplitFile(len(offsets) - 1, int(offsets[-1]), digest)
    journal.finish(split, entry, class_checksums(offsets, packed))


def _write(
    store: ImageStore,
    path: Path,
    wanted: _Wanted,
    leave_out: Callable[[int, int, DamagedRecord], None],
    total: int,
) -> str:
    """Write the `wanted` records to `path`, after those it holds already; the SHA-256 of the whole file."""
    digest, end, kept = hashlib.sha256(), 0, 0
    path.touch()
    with path.open("r+b") as file:
        for record in _records_in(file, path, wanted):
            digest.update(record)
            end += len(record)
            kept += 1
        file.seek(end)
        file.truncate()
        for class_id, index in _bar(wanted, f"{path.parent.name} {path.stem}", total, kept):
            try:
                picture = _picture(store, class_id, index)
            except DamagedRecord as error:
                leave_out(class_id, index, error)
                continue
            record = frame(encode_example(picture, class_id))
            digest.update(record)
            file.write(record)
        files.to_disk(file)
        if hasattr(os, "posix_fadvise"):  # so that it is the disk which is read back, not this memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _picture(store: ImageStore, class_id: int, index: int) -> bytes:
    """A picture as a record holds it, which certainly decodes. Raises DamagedRecord if it does not."""
    data = store.encoded(class_id, index)
    try:
        decode_image(data, prepare=as_published)
    except UnreadableImage as error:
        store.image(class_id, index)  # says the same, and names file, record and byte
        where = f"{store.place(class_id)}: image {index} of class {class_id}"
        raise DamagedRecord(f"{where} cannot be kept as a record: {error}") from error
    return data


def _read_back(path: Path, wanted: _Wanted, digest: str, total: int) -> np.ndarray:
    """Where the records of `path` begin, and its size: (records + 1,) uint64.

    Raises InputError unless they are the `wanted` ones and the whole file has the SHA-256 `digest`.
    """
    offsets, found = array.array("Q", [0]), hashlib.sha256()
    with path.open("rb") as file:
        records = _records_in(file, path, wanted)
        for record in _bar(records, f"{path.parent.name} {path.stem}, reading back", total, 0):
            found.update(record)
            offsets.append(offsets[-1] + len(record))
    if found.hexdigest() != digest or offsets[-1] != path.stat().st_size:
        where = f"{path}: record {len(offsets) - 1} at byte {offsets[-1]}"
        raise InputError(f"{where}: does not read back as it was written; check the disk, then run again")
    return np.frombuffer(offsets, dtype=np.uint64).astype(OFFSETS_DTYPE, copy=False)


def _records_in(file: BinaryIO, path: Path, wanted: _Wanted) -> Iterator[bytes]:
    """The records at the beginning of `file` that are whole, one for each that is taken from `wanted`."""
    for payload, (class_id, _) in zip(sound_records(file), wanted, strict=False):
        try:
            label = decode_example(payload)[1]
        except MalformedExample:
            label = None
        if label != class_id:
            found = f"holds a record of class {label} among those of class {class_id}"
            raise InputError(f"{path}: {found}, so this program did not write it; delete {path.parent}")
        yield frame(payload)


def _bar(items: Iterable, title: str, total: int, done: int) -> Iterable:
    return tqdm(items, printable(title), total=total, initial=done, unit="image", leave=False, disable=None)


# --- the end ------------------------------------------------------------------------------------------------


def _finish(
    source: Source, counts: Sequence[int], directory: Path, plan: dict[str, Any], journal: Journal
) -> DatasetSpec:
    """Write the specification and, when a reader accepts everything else, the index."""
    packed = _without(counts, journal.left_out)
    files.replace_file(directory / SPEC_FILE, _spec_text(source.spec, packed))
    spec = load_spec(directory)
    told = {"told_by": SPEC_FILE, "advice": ""}
    if spec != dataclasses.replace(source.spec, directory=directory, images_per_class=packed, **told):
        raise InputError(f"{source.spec.file}: has changed since the source was opened")
    finished = [(split, *journal.finished[split]) for split in SPLITS if split in journal.finished]
    index = Index(
        source=plan["source"],
        origin=plan["origin"],
        resize=plan["resize"],
        images_per_class=packed,
        offsets_crc32c=tuple(checksum for _, _, checksums in finished for checksum in checksums),
        splits={split: file for split, file, _ in finished},
        left_out=tuple(there - kept for there, kept in zip(counts, packed, strict=True)),
    )
    store = PackedStore(directory, plan["source"], spec, index)
    for class_id in _classes(spec):
        store.count(class_id)
    files.replace_file(directory / INDEX_FILE, json.dumps(index.json(), indent=2))
    (directory / JOURNAL_FILE).unlink()
    return spec


def _without(counts: Sequence[int], left_out: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """`counts` by class, less the (class id, index) that are left out."""
    fewer = collections.Counter(class_id for class_id, _ in left_out)
    return tuple(count - fewer[class_id] for class_id, count in enumerate(counts))


def _spec_text(spec: DatasetSpec, counts: tuple[int, ...]) -> bytes:
    """The specification's own text, the same with other counts, or one made for a source that has none."""
    if spec.told_by != SPEC_FILE:  # folders and lists, which another file may divide
        made = {
            "name": spec.name,
            "classes_per_split": {split: len(spec.classes(split)) for split in SPLITS},
            "images_per_class": dict(enumerate(counts)),
            "class_names": dict(enumerate(spec.class_names)),
            "path": "",
            "file_pattern": FILE_PATTERN,
            "__class__": "DatasetSpecification",
        }
        return json.dumps(made, indent=2).encode()
    text = files.read_bytes(spec.file, files.LARGEST_LIST)
    if counts == spec.images_per_class:
        return text
    value = json.loads(text)
    images = value["images_per_class"]
    if spec.ontology == DAG:  # counts by split and node: of a leaf its images, of an inner node those below
        for split in SPLITS:
            for class_id in spec.classes(split):
                images[split][value["class_names"][str(class_id)]] = counts[class_id]
            for node in spec.groups[split]:
                images[split][node.name] = sum(counts[class_id] for class_id in node.class_ids)
    else:
        images.update((str(class_id), count) for class_id, count in enumerate(counts))
    return json.dumps(value, indent=2).encode()


if __name__ == "__main__":
    exit_on_bad_input(main)
