"""How fast episodes are read from disk, beside a straightforward reader and the limit set by decoding.

    python benchmarks/readers.py --data FOLDER        1,000 classes x 100 pictures, about ten minutes
    python benchmarks/readers.py --quick              a few seconds, to see that it works

The pictures are made here, once for each FOLDER (6 GB in the full size): 500 x 375 px, smooth random fields
with noise, JPEG of about 40 kB, a few hundred different ones dealt out to all classes. Ours reads them from
Meta-Dataset's record files, exactly or with `fast_decode`; the baseline (`readers_baseline.py`) from one
HDF5 file per class of pictures that its conversion has decoded and shrunk to 224 x 224 beforehand: it has
nothing to decode and less to resize, and pays with almost four times the disk space and with other pixels.
Ours reads these files, too. (Here their groups share pictures, which keeps all of them in memory.)

The limits are loops over pictures already in memory, in as many processes as the readers have workers: PIL's
decoding alone, and with what no exact reader can leave out either, PIL's resizing and cropping.

Readers and limits take turns, each turn in fresh processes: a reader meets every class once (for which there
is a table of its own), then hands over as many episodes as have a few thousand images for every worker. Files
are in the page cache where it is large enough. Rates are of all workers together: median of the turns, least
and greatest. They count what it takes to start the workers, and that these wait for one another at the end:
episodes arrive in order, and vary tenfold in size. CPU time is that of the workers alone. "Of decoding"
compares each turn with decoding's, by rate and by CPU time; it is the median of the turns. Peak memory is the
resident set of the largest worker, libraries and shared memory included; open files are those below FOLDER
that a worker has at the end of a turn.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import harness
import numpy as np
import PIL
import torch
import torchvision
from harness import MIB, digits, spread
from PIL import Image, features
from readers_baseline import H5Episodes, write_class
from torch import Tensor
from torch.utils.data import DataLoader

from amt.cli import options
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, exit_on_bad_input
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, episode_loader
from meta_dataset_readers.sampling import EpisodeDescription
from meta_dataset_readers.settings import as_path, positive_int
from meta_dataset_readers.spec import SPEC_FILE
from meta_dataset_readers.tfrecord import encode_example, write_records
from meta_dataset_readers.transforms import eval_crop

PROTOCOLS = {
    "5-way 5-shot 10-query": EpisodeSampling(num_ways=5, num_support=5, num_query=10),
    "variable way and shot": EpisodeSampling(),
}
OURS, FAST, OURS_H5, BASELINE = "ours", "ours, fast_decode", "ours, HDF5 files", "baseline, HDF5 files"
READERS = (OURS, FAST, OURS_H5, BASELINE)
DECODING, RESIZING = "limit: decoding", "limit: decoding, resizing"

USUAL = {
    "classes": 1000,
    "images": 100,
    "image_size": 128,
    "workers": [1, 2],
    "turns": 3,
    "turn_images": 4000,
}
USUAL_QUICK = {"classes": 6, "images": 20, "image_size": 32, "workers": [1], "turns": 1, "turn_images": 100}
SIZE, QUICK_SIZE = (500, 375), (160, 120)  # of a picture, in pixels
QUALITY, NOISE = 90, 2.8  # which make about 40 kB of such a picture
DISTINCT = 300  # different pictures in all classes together, but not more than of three classes
DISTINCT_PER_FILE = 10  # different pictures in a file of the baseline
BYTES_PER_IMAGE = 60_000  # on disk, both forms together
RECORDS, ARRAYS = "records", "arrays"  # the two sources' directories


class Plan(NamedTuple):
    """What is read, and how much of it."""

    root: Path  # of the sources
    classes: int
    images: int  # of each class
    image_size: int
    turn_images: int  # read in a turn, by each worker


class Turn(NamedTuple):
    """One turn of a reader or a limit; seconds add up over workers where they are CPU time."""

    images: int
    episodes: int
    seconds: float
    cpu_seconds: float
    peak_memory: float  # MiB
    open_files: int


class Opening(NamedTuple):
    """Seconds to open a source, from then to its first episode, and to meet every class once."""

    opening: float
    first_episode: float
    every_class: float


# --- the sources -----------------------------------------------------------------------------------------


def make_sources(folder: Path, classes: int, images: int, size: tuple[int, int] = SIZE) -> Path:
    """Write both sources below `folder`, or find them there; the directory that holds them."""
    root = folder / f"{classes}x{images}x{size[0]}x{size[1]}"
    if (root / RECORDS / SPEC_FILE).exists():
        return root
    needed, free = classes * images * BYTES_PER_IMAGE, shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise InputError(f"--data {folder}: {needed >> 20} MiB are needed, {free >> 20} MiB are free")
    print(f"writing {classes} classes x {images} images below {root}", file=sys.stderr, flush=True)
    for source in (RECORDS, ARRAYS):
        (root / source).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = [picture(*size, rng) for _ in range(min(DISTINCT, 3 * images))]
    write_arrays(root / ARRAYS, [Image.open(io.BytesIO(data)) for data in pictures], classes, images)
    dealt = itertools.cycle(pictures)
    for class_id in range(classes):
        payloads = (encode_example(next(dealt), class_id) for _ in range(images))
        write_records(root / RECORDS / f"{class_id}.tfrecords", payloads)
    spec = {
        "name": RECORDS,
        "classes_per_split": {"TRAIN": classes, "VALID": 0, "TEST": 0},
        "images_per_class": {str(class_id): images for class_id in range(classes)},
        "class_names": {str(class_id): f"class {class_id}" for class_id in range(classes)},
        "path": "",
        "file_pattern": "{}.tfrecords",
        "__class__": "DatasetSpecification",
    }
    for source in (ARRAYS, RECORDS):
        (root / source / SPEC_FILE).write_text(json.dumps(spec))  # last: without it all is written again
    return root


def write_arrays(directory: Path, pictures: list[Image.Image], classes: int, images: int) -> None:
    """The baseline's files: a few are written, the others are copies."""
    few = [pictures[k : k + DISTINCT_PER_FILE] for k in range(0, len(pictures), DISTINCT_PER_FILE)]
    for class_id in range(classes):
        path = directory / f"{class_id}.h5"
        if class_id < len(few):
            write_class(path, few[class_id], images)
        else:
            shutil.copyfile(directory / f"{class_id % len(few)}.h5", path)


def picture(width: int, height: int, rng: np.random.Generator) -> bytes:
    """A JPEG of smooth colours, details of every size, and a camera's noise."""
    pixels = np.full((height, width, 3), 128.0)
    for cells in (4, 8, 16, 32, 64):
        rows, columns = cells, cells * width // height
        shades = rng.normal(size=(rows, columns, 1)) + 0.3 * rng.normal(size=(rows, columns, 3))
        for channel, layer in enumerate(np.moveaxis(shades.astype(np.float32), -1, 0)):
            smooth = Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += 40 / (cells / 4) ** 0.6 * np.asarray(smooth)
    pixels += NOISE * rng.normal(size=(height, width, 1))
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


def _existing(folder: Path) -> Path:
    """The folder, or what exists of the path to it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


# --- the readers -----------------------------------------------------------------------------------------


def open_reader(name: str, plan: Plan, protocol: str) -> EpisodeReader | H5Episodes:
    if name == BASELINE:
        return H5Episodes(plan.root / ARRAYS, PROTOCOLS[protocol], plan.image_size, n_episodes=1)
    return EpisodeReader(
        plan.root,
        ARRAYS if name == OURS_H5 else RECORDS,
        "TRAIN",
        PROTOCOLS[protocol],
        plan.image_size,
        n_episodes=1,
        fast_decode=name == FAST,
    )


def loader_of(reader: EpisodeReader | H5Episodes, workers: int) -> DataLoader:
    if isinstance(reader, H5Episodes):
        return DataLoader(reader, batch_size=None, num_workers=workers)
    return episode_loader(reader, workers)


def read_turn(name: str, plan: Plan, protocol: str, workers: int) -> Turn:
    """Read one turn's episodes through `workers` processes that know every class already."""
    reader = open_reader(name, plan, protocol)
    meet_every_class(reader, plan)
    reader.n_episodes = episodes_with(reader, workers * plan.turn_images)
    began = time.perf_counter()
    arriving = iter(loader_of(reader, workers))
    images = sum(images_in(next(arriving)) for _ in range(reader.n_episodes))
    seconds = time.perf_counter() - began
    processes = [Process(child.pid) for child in multiprocessing.active_children()]
    return Turn(
        images=images,
        episodes=reader.n_episodes,
        seconds=seconds,
        cpu_seconds=sum(process.cpu_seconds() for process in processes),
        peak_memory=max(process.peak_resident() for process in processes),
        open_files=max(process.open_files(plan.root) for process in processes),
    )


def episodes_with(reader: EpisodeReader | H5Episodes, images: int) -> int:
    """How many of the reader's first episodes it takes to have that many images."""
    sizes = (size(reader.describe(index)) for index in itertools.count())
    return 1 + next(n for n, total in enumerate(itertools.accumulate(sizes)) if total >= images)


def size(description: EpisodeDescription) -> int:
    return sum(description.shots) + len(description.shots) * description.queries


def meet_every_class(reader: EpisodeReader | H5Episodes, plan: Plan) -> None:
    """Have done, as after many episodes, what a reader does when it comes upon a class for the first time:
    ours finds the records of its file, the baseline opens it."""
    for class_id in range(plan.classes):
        if isinstance(reader, EpisodeReader):
            reader.store.count(class_id)
        else:
            reader.file(class_id)


def images_in(episode: Episode | list[Tensor]) -> int:
    """Support and query images of an episode, ours or the baseline's."""
    if isinstance(episode, Episode):
        return len(episode.support) + len(episode.query)
    support, _, query, _ = episode
    return len(support) + len(query)


def open_turn(name: str, plan: Plan, protocol: str) -> Opening:
    began = time.perf_counter()
    reader = open_reader(name, plan, protocol)
    opened = time.perf_counter()
    reader[0]
    read = time.perf_counter()
    meet_every_class(reader, plan)
    return Opening(opened - began, read - opened, time.perf_counter() - read)


class Process:
    """What Linux knows of a running process."""

    def __init__(self, pid: int):
        self._proc = Path(f"/proc/{pid}")

    def cpu_seconds(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system

    def peak_resident(self) -> float:
        lines = (self._proc / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith("VmHWM:"))

    def open_files(self, below: Path) -> int:
        names = []
        for link in (self._proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has been closed by now
                names.append(os.readlink(link))
        return sum(name.startswith(f"{below.resolve()}{os.sep}") for name in names)


# --- the limits ------------------------------------------------------------------------------------------


def decode(data: bytes, _image_size: int) -> None:
    Image.open(io.BytesIO(data)).load()


def decode_and_resize(data: bytes, image_size: int) -> None:
    eval_crop(Image.open(io.BytesIO(data)), image_size)


LIMITS: dict[str, Callable[[bytes, int], None]] = {DECODING: decode, RESIZING: decode_and_resize}


def limit_turn(limit: str, plan: Plan, protocol: str) -> Turn:
    """One process's turn at the pictures of the source."""
    store, rng = open_reader(OURS, plan, protocol).store, np.random.default_rng(0)
    places = zip(
        rng.integers(plan.classes, size=DISTINCT), rng.integers(plan.images, size=DISTINCT), strict=True
    )
    pictures = [store.encoded(int(class_id), int(index)) for class_id, index in places]
    handle = LIMITS[limit]
    spent, began = time.process_time(), time.perf_counter()
    for data in itertools.islice(itertools.cycle(pictures), plan.turn_images):
        handle(data, plan.image_size)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - spent
    return Turn(plan.turn_images, 0, seconds, cpu_seconds, harness.peak_resident(), 0)


def together(turns: list[Turn]) -> Turn:
    """Several processes' turns that went on at the same time."""
    return Turn(
        images=sum(turn.images for turn in turns),
        episodes=0,
        seconds=statistics.mean(turn.seconds for turn in turns),
        cpu_seconds=sum(turn.cpu_seconds for turn in turns),
        peak_memory=max(turn.peak_memory for turn in turns),
        open_files=0,
    )


# --- measuring -------------------------------------------------------------------------------------------


def in_fresh_processes(count: int, function: Callable, *arguments) -> list:
    """What `function` returns in each of `count` new processes that run it at the same time.

    They are forked, which spares them the import of torch; safe as long as this process computes nothing.
    """
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork")) as pool:
        return [job.result() for job in [pool.submit(function, *arguments) for _ in range(count)]]


def take_turn(function: Callable, *arguments) -> Any:
    """What `function` returns in a new process."""
    return in_fresh_processes(1, function, *arguments)[0]


def compare_readers(
    plan: Plan, protocol: str, workers: Sequence[int], n_turns: int
) -> dict[tuple[str, int], list[Turn]]:
    """The turns of all readers and limits, by name and number of workers."""
    turns: dict[tuple[str, int], list[Turn]] = {}
    for number in range(n_turns):
        print(f"  {protocol}, turn {number + 1} of {n_turns}", file=sys.stderr, flush=True)
        for count in workers:
            for name in READERS:
                turn = take_turn(read_turn, name, plan, protocol, count)
                turns.setdefault((name, count), []).append(turn)
            for name in LIMITS:
                turn = together(in_fresh_processes(count, limit_turn, name, plan, protocol))
                turns.setdefault((name, count), []).append(turn)
    return turns


def pixel_difference(plan: Plan, protocol: str) -> dict[str, float]:
    """By how much `fast_decode` changes an episode's images, in grey levels."""
    exact, fast = (open_reader(name, plan, protocol)[0].support for name in (OURS, FAST))
    difference = (exact - fast).abs().mul(255).round().numpy()
    return {
        "mean": float(difference.mean()),
        "99.9 percentile": float(np.percentile(difference, 99.9)),
        "greatest": float(difference.max()),
    }


# --- the tables ------------------------------------------------------------------------------------------

HEADING = (
    "| reader | workers | images/s | episodes/s | CPU ms per image | of decoding, by rate (by CPU) "
    "| peak MiB | open files |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)
OPENING_HEADING = (
    "| reader | opening, ms | first episode, ms | every class once, ms |\n| --- | --- | --- | --- |"
)


def rate(turn: Turn) -> float:
    return turn.images / turn.seconds


def cpu_per_image(turn: Turn) -> float:
    """Milliseconds."""
    return 1e3 * turn.cpu_seconds / turn.images


def opening_row(name: str, found: list[Opening]) -> str:
    """A line under `OPENING_HEADING`."""
    milliseconds = (spread([1e3 * seconds for seconds in column]) for column in zip(*found, strict=True))
    return f"| {name} | {' | '.join(milliseconds)} |"


def table(turns: dict[tuple[str, int], list[Turn]]) -> Iterator[str]:
    """Lines under `HEADING`, by reader and workers."""
    read = [turn for (name, _), found in turns.items() if name not in LIMITS for turn in found]
    per_episode = sum(turn.images for turn in read) / sum(turn.episodes for turn in read)
    for (name, workers), found in turns.items():
        pairs = list(zip(found, turns[DECODING, workers], strict=True))
        by_rate = statistics.median(rate(turn) / rate(limit) for turn, limit in pairs)
        by_cpu = statistics.median(cpu_per_image(limit) / cpu_per_image(turn) for turn, limit in pairs)
        own = [turn.episodes / turn.seconds or rate(turn) / per_episode for turn in found]
        cells = (
            name,
            str(workers),
            spread([rate(turn) for turn in found]),
            spread(own),
            spread([cpu_per_image(turn) for turn in found]),
            f"{100 * by_rate:.0f}% ({100 * by_cpu:.0f}%)",
            digits(max(turn.peak_memory for turn in found)),
            "-" if name in LIMITS else str(max(turn.open_files for turn in found)),
        )
        yield f"| {' | '.join(cells)} |"


def environment() -> dict[str, str | int]:
    """What the figures depend on besides this code."""
    return harness.machine() | {
        "pillow": PIL.__version__,
        "libjpeg-turbo": features.version("libjpeg_turbo") or "no",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "h5py": h5py.__version__,
        "numpy": np.__version__,
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises InputError."""
    parser = options.Parser("Time the reading of episodes beside a straightforward reader, and its limits.")
    parser.formatter_class = argparse.HelpFormatter  # every default below is said in words
    parser.add_argument(
        "--data",
        type=as_path,
        metavar="FOLDER",
        help="where the pictures are kept (default: a temporary folder, removed afterwards)",
    )
    parser.add_argument("--classes", type=positive_int, help="of the source (default: 1000)")
    parser.add_argument("--images", type=positive_int, help="of each class (default: 100)")
    parser.add_argument("--image_size", type=positive_int, help="of an episode (default: 128)")
    parser.add_argument(
        "--workers", type=positive_int, nargs="+", metavar="N", help="processes (default: 1 2; quick: 1)"
    )
    parser.add_argument("--turns", type=positive_int, help="of every reader (default: 3)")
    parser.add_argument(
        "--turn_images", type=positive_int, help="read in a turn, by each worker (default: 4000)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny pictures, few of them, and one short turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    args = parser.parse(argv)
    usual = USUAL_QUICK if args.quick else USUAL
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.classes < 5 or args.images < 15:
        raise InputError("--classes and --images: the episodes need at least 5 classes of 15 images")
    if args.json and not args.json.resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder {args.json.resolve().parent}")
    if not Path("/proc/self/status").exists():
        raise InputError("memory and open files of workers are read from Linux's /proc, which is not there")
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    if args.data:
        return compare(args, args.data, about)
    with tempfile.TemporaryDirectory(prefix="amt_readers_") as folder:
        return compare(args, Path(folder), about)


def compare(args: argparse.Namespace, folder: Path, about: dict[str, str | int]) -> int:
    torch.set_num_threads(1)  # inherited: no reader computes on more than its worker's core
    root = make_sources(folder, args.classes, args.images, QUICK_SIZE if args.quick else SIZE)
    plan = Plan(root, args.classes, args.images, args.image_size, args.turn_images)
    first = next(iter(PROTOCOLS))
    print(f"\n{plan.classes} classes x {plan.images} images, episodes of {plan.image_size} px")
    print(f"\n{OPENING_HEADING}")
    openings = {}
    for name in READERS:
        openings[name] = [take_turn(open_turn, name, plan, first) for _ in range(args.turns)]
        print(opening_row(name, openings[name]), flush=True)
    rows = []
    for protocol in PROTOCOLS:
        turns = compare_readers(plan, protocol, args.workers, args.turns)
        print(f"\n{protocol}\n\n{HEADING}", *table(turns), sep="\n", flush=True)
        rows += [
            {"protocol": protocol, "reader": name, "workers": workers, "turns": as_dicts(found)}
            for (name, workers), found in turns.items()
        ]
    pixels = take_turn(pixel_difference, plan, first)
    figures = ", ".join(f"{name} {digits(value)}" for name, value in pixels.items())
    print(f"\nfast_decode changes a pixel by, in grey levels of 255: {figures}.")
    if args.json:
        opening = {name: as_dicts(found) for name, found in openings.items()}
        report = {"environment": about, "opening": opening, "rows": rows, "pixels": pixels}
        report["plan"] = {name: value for name, value in plan._asdict().items() if name != "root"}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def as_dicts(tuples: Sequence[NamedTuple]) -> list[dict[str, float]]:
    return [one._asdict() for one in tuples]


if __name__ == "__main__":
    exit_on_bad_input(main)
