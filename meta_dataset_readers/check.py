"""The command `python -m meta_dataset_readers.check`: is a source complete, readable and as specified?

    python -m meta_dataset_readers.check DATA_PATH [SOURCE ...]

reads and decodes every picture; with --fast it looks at files, headers and counts only. One line says that a
source is sound; otherwise each fault has a line of its own, and no fault hides the next. With --sums FILE it
also writes a list of digests of all files, and compares them with that list ever after. The exit code is 0
where all sources are sound, 1 where one is not, 2 for a wrong command line.

Works on any layout: knows of pictures only what an `ImageStore` promises.
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import argparse
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from meta_dataset_readers.command import Parser, add_sources
from meta_dataset_readers.cores import available_cores
from meta_dataset_readers.domains import DOMAINS
from meta_dataset_readers.errors import InputError, exit_on_bad_input, nearest, printable, say
from meta_dataset_readers.filelists import UNDIVIDED
from meta_dataset_readers.files import SPLIT_FOLDERS, leads_nowhere, listing, reading
from meta_dataset_readers.folders import FileStore
from meta_dataset_readers.layouts import as_source, open_source, sources, without_layout
from meta_dataset_readers.pictures import other_endings
from meta_dataset_readers.processes import mapped, processes
from meta_dataset_readers.settings import as_path, positive_int
from meta_dataset_readers.spec import SPLITS, DatasetSpec
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.sums import SumsFile
from meta_dataset_readers.tfrecord import sound_records

_SHOWN = 20  # faults of one source, unless all are asked for
_BATCH = 512  # pictures that a process examines at a time
_WORTH_PROCESSES = 20_000  # pictures; fewer are decoded before another process has started

_Batch = list[tuple[int, Sequence[int]]]  # (class id, indices of pictures)
_Address = tuple[str, str, tuple[str, str] | None]  # the arguments of `open_source`


class _Examined(NamedTuple):
    """What was found in a batch: how many pictures, a line for each at fault, and which are constant."""

    number: int
    faults: list[str]
    constant: list[str]


class Report(NamedTuple):
    """The findings about one source, which is sound without faults; a note is no fault."""

    name: str
    contents: str  # what there is: classes, images, layout
    faults: Sequence[str]  # a line for each
    notes: Sequence[str] = ()

    def lines(self, fast: bool, most: int | None) -> Iterator[str]:
        """The report as it is printed, with at most so many faults; `fast` as it was given to `check`."""
        number = len(self.faults)
        if number:
            yield f"{self.name}: {number} fault{'s'[: number != 1]}"
            yield from (f"  {line}" for line in self.faults[:most])
            if most is not None and number > most:
                yield f"  and {number - most} more (--all shows them)"
        else:
            verdict = "complete by files and counts, no picture read" if fast else "complete and readable"
            yield f"{self.name}: {verdict}: {self.contents}"
        yield from (f"  note: {line}" for line in self.notes)


# --- the command -----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "Say whether sources are complete and readable, or what is wrong.",
        "python -m meta_dataset_readers.check",
    )
    add_sources(parser, "*", "name of a source below DATA_PATH (default: all of them)")
    parser.add_argument(
        "--fast", action="store_true", help="look at files, headers and counts only, decode no picture"
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=available_cores(),
        metavar="N",
        help="processes that decode, by default one per core",
    )
    parser.add_argument(
        "--sums",
        type=as_path,
        metavar="FILE",
        help="list of digests: written where it is not there and all is sound, else compared with the files",
    )
    parser.add_argument(
        "--all", action="store_true", help=f"show every fault, not only the first {_SHOWN} of a source"
    )
    return parser.parse(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    prefix = tuple(options.image_prefix) if options.image_prefix else None
    sums = SumsFile(options.sums, options.data_path, options.jobs) if options.sums else None
    sound = True
    with processes(options.jobs) as pool:
        for name in _names(options.data_path, options.sources):
            report = check(
                options.data_path, name, image_prefix=prefix, fast=options.fast, pool=pool, sums=sums
            )
            say(*report.lines(options.fast, None if options.all else _SHOWN))
            sound &= not report.faults
    if not options.sources:
        for name in without_layout(options.data_path):
            say(f"{name}: passed over, in no known layout")
    if sums is not None:
        sound &= sums.finish(sound, everything=not options.sources)
    return 0 if sound else 1


def _names(root: Path, wanted: Sequence[str]) -> list[str]:
    known = sources(root)
    for name in wanted:
        # A directory that is no source is one that has lost what it is known by: for `check` to say.
        if name not in known and not (name and (root / name).is_dir()):
            raise InputError(f"{root}: no source {name!r}; {nearest(name, known)}")
    only_splits = known.keys() <= set(itertools.chain(*SPLIT_FOLDERS.values()))
    if not wanted and only_splits and (not known or as_source(root)):
        expected = "expected a directory with one directory per source"
        raise InputError(f"{root}: no source below it, {expected}{as_source(root)}")
    return list(dict.fromkeys(wanted or known))


# --- one source ------------------------------------------------------------------------------------------


def check(
    root: str | Path,
    name: str,
    *,
    image_prefix: tuple[str, str] | None = None,
    fast: bool = False,
    pool: Executor | None = None,
    sums: SumsFile | None = None,
) -> Report:
    """Examine the source `name` below `root`, whatever is wrong with it.

    `image_prefix` is that of `layouts.open_source`. `fast` leaves the pictures unread. With a `pool`
    of processes large sources are decoded there. `sums` is a list of digests to be compared or written. Shows
    a progress bar if stderr is a terminal.
    """
    try:
        source = open_source(root, name, image_prefix)
    except (InputError, OSError) as error:  # what is wrong with the next source is still to be said
        unread = isinstance(error, OSError) and f"{error.filename or name}: cannot be read: {error.strerror}"
        return Report(name, "nothing that can be opened", [unread or str(error)])
    spec, store = source.spec, source.store
    absent = store.missing(range(len(spec.images_per_class)))
    links = list(_broken_links(source))
    faults = [f"{path}: missing" for file in absent if (path := spec.directory / file) not in links]
    faults += (f"{link}: a link that leads nowhere" for link in links)
    counts = _count(source, faults, fast)
    constant: list[str] = []
    if not fast:
        elsewhere = {f"{name}/{file}" for file in absent}
        wanted = {class_id: _present(store, class_id, count, elsewhere) for class_id, count in counts.items()}
        with tqdm(
            total=sum(counts.values()), desc=printable(name), unit="image", leave=False, disable=None
        ) as bar:
            for batch in _examined(store, (str(root), name, image_prefix), wanted, pool):
                faults += batch.faults
                constant += batch.constant
                bar.update(batch.number)
    if sums is not None:
        try:
            faults += sums.faults(spec.directory)
        except InputError as error:
            faults.append(str(error))
    contents = f"{len(spec.images_per_class)} classes, {sum(counts.values())} images"
    layout = sources(root).get(name)  # None for a directory that its benchmark has another name for
    if layout:
        contents += f", {layout}"
    notes = list(_notes(name, source, sums is not None))
    if constant:
        count = f"{len(constant)} picture{'s are' if len(constant) > 1 else ' is'} constant"
        notes.append(f"{count}, all pixels alike, the first is {constant[0]}")
    # A file that many classes share is at fault once.
    return Report(name, contents, [line for line, _ in itertools.groupby(faults)], notes)


def _folders_of(source: Source) -> list[Path]:
    """The folders that hold the classes of a source whose pictures are files; of others none."""
    if not isinstance(source.store, FileStore):
        return []
    return list(dict.fromkeys(source.store.place(c) for c in range(len(source.spec.images_per_class))))


def _broken_links(source: Source) -> Iterator[Path]:
    """Links that lead nowhere where classes and pictures lie: nothing is read through them."""
    folders = _folders_of(source)
    for folder in dict.fromkeys((*(folder.parent for folder in folders), *folders)):
        if folder.is_dir():
            yield from (folder / name for name in listing(folder, leads_nowhere, any_name=True))


def _count(source: Source, faults: list[str], fast: bool) -> dict[int, int]:
    """The number of pictures of every class of which it can be told, compared with what is specified."""
    spec, store, counts = source.spec, source.store, {}
    classes = tqdm(
        spec.images_per_class, f"{printable(spec.name)}: counting", unit="class", leave=False, disable=None
    )
    for class_id, claimed in enumerate(classes):
        place, called = store.place(class_id), f"class {class_id} ({spec.class_name(class_id)!r})"
        try:
            there = counts[class_id] = store.count(class_id)
        except InputError as error:
            if not store.missing([class_id]):
                faults.append(str(error) if fast else f"{error}{_rest(place)}")
            continue
        if there != claimed:
            wrong = f"{claimed - there} missing" if there < claimed else f"{there - claimed} too many"
            faults.append(f"{place}: {there} images of {called}, {spec.file.name} claims {claimed}: {wrong}")
        elif there == 0:
            faults.append(f"{place}: no image of {called}")
    return counts


def _rest(place: Path) -> str:
    """What is still sound of a file of records that cannot be counted."""
    if place.suffix != ".tfrecords":
        return ""
    try:
        with reading(place) as file:
            return f"; sound records before it: {sum(1 for _ in sound_records(file))}"
    except InputError:
        return ""


def _present(store: ImageStore, class_id: int, count: int, absent: set[str]) -> Sequence[int]:
    """The pictures of a class whose files are there."""
    if not absent:
        return range(count)
    return [index for index in range(count) if store.origin(class_id, index).file not in absent]


def _notes(name: str, source: Source, with_sums: bool) -> Iterator[str]:
    """What is worth knowing about a source, but no fault of it."""
    spec = source.spec
    if spec.name != name:
        yield f"{spec.file} says that the source is called {spec.name!r}"
    if spec.advice == UNDIVIDED:
        yield UNDIVIDED
    strays = _strays(source)
    if strays:
        yield f"{len(strays)} files belong to no class, the first is {strays[0]}"
    if not source.store.has_checksums and not with_sums:
        yield "its files have no checksums, so a changed pixel goes unnoticed; see --sums"
    left_out: Counter[str] = Counter()
    for folder in _folders_of(source):
        left_out += other_endings(folder) if folder.is_dir() else Counter()
    if left_out:
        counts = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common())
        yield f"{left_out.total()} files are left out because of their endings: {counts}"
    yield from _published_sizes(name, spec)


def _published_sizes(name: str, spec: DatasetSpec) -> Iterator[str]:
    """How a source differs from the published one of its name."""
    domain = next((one for key, one in DOMAINS.items() if name == key or name in one.directories), None)
    classes, images = _sizes(spec), sum(spec.images_per_class)
    if domain and domain.classes != classes:
        published, here = ("/".join(map(str, sizes)) for sizes in (domain.classes, classes))
        yield f"the published source has {published} classes in {'/'.join(SPLITS)}, this has {here}"
    elif domain and domain.images not in (None, images):
        yield f"the published source has {domain.images} images, this has {images}"


def _sizes(spec: DatasetSpec) -> tuple[int, ...]:
    return tuple(len(spec.classes(split)) for split in SPLITS)


def _strays(source: Source) -> list[str]:
    """Files that are named like those of a class, by a number, but of no class there is."""
    places = {source.store.place(class_id) for class_id in range(len(source.spec.images_per_class))}
    if not all(place.stem.isdecimal() and place.suffix for place in places):
        return []
    beside = {
        file
        for directory, suffix in {(place.parent, place.suffix) for place in places}
        for file in directory.glob(f"*{suffix}")
        if file.stem.isdecimal()
    }
    return sorted(file.name for file in beside - places)


# --- its pictures ----------------------------------------------------------------------------------------


def _examined(
    store: ImageStore, address: _Address, wanted: Mapping[int, Sequence[int]], pool: Executor | None
) -> Iterator[_Examined]:
    """Decode the `wanted` pictures of every class, by batch.

    `address` is where other processes find the same store.
    """
    if pool is None or sum(len(indices) for indices in wanted.values()) < _WORTH_PROCESSES:
        return map(functools.partial(_examine, store), _batches(wanted))
    died = "a process died while it decoded pictures, of too little memory or of a file that crashes it"
    died = f"{address[1]}: {died}; --jobs 1 shows how far it gets"
    return mapped(pool, functools.partial(_examine_there, address), _batches(wanted), died)


def _batches(wanted: Mapping[int, Sequence[int]]) -> Iterator[_Batch]:
    batch, size = [], 0
    for class_id, indices in wanted.items():
        for start in range(0, len(indices), _BATCH):
            piece = indices[start : start + _BATCH]
            batch.append((class_id, piece))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _examine(store: ImageStore, batch: _Batch) -> _Examined:
    lines, constant = [], []
    for class_id, indices in batch:
        for index in indices:
            try:
                bands = store.image(class_id, index).getextrema()
            except InputError as error:
                lines.append(str(error))
                continue
            if all(least == most for least, most in bands):
                origin = store.origin(class_id, index)
                is_file = isinstance(store, FileStore)
                constant.append(origin.file if is_file else f"{origin.file}, record {origin.record}")
    return _Examined(sum(len(indices) for _, indices in batch), lines, constant)


def _examine_there(address: _Address, batch: _Batch) -> _Examined:
    """In a process of the pool: opening is cheaper than sending what the store has learnt of its files."""
    return _examine(_open_once(*address).store, batch)


_open_once = functools.lru_cache(maxsize=1)(open_source)


if __name__ == "__main__":
    exit_on_bad_input(main)
