"""The fuzz part of `make torture`: damaged files of every format, and what their readers make of them.

    refused          one line that tells of it
    harmless         the same contents are read
    silently used    other contents are read without a word: 0 where the format has checksums
    crashed          another exception, or the process died
    hung             not done after `PATIENCE` seconds

Each format is read in a process of its own, so that one that dies is counted and the next damage goes on.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import jpeg, moved_apart
from safetensors.torch import save_file
from toy_hdf5 import store_of, write_class
from toy_packed import pack, pictures, write_source
from toy_pools import LEVELS, RANK, make_network

from amt.files import checkpoint, digests, weight_files
from amt.files.checkpoint import Checkpoint
from amt.models.pool import principal_pool
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.layouts import open_source

PATIENCE = 20  # seconds
ENDS = ("refused", "harmless", "silently used", "crashed", "hung")
CLASSES = [3] * 6  # pictures of each


class Format(NamedTuple):
    """How files of a format are written and read.

    Args:
        write: into an empty folder; the files that are to be damaged.
        read: what is in the folder, as something that can be compared.
        checked: whether the format has checksums of all its data.
    """

    write: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    checked: bool


def pool():
    weights = make_network().weights
    return moved_apart(principal_pool(weights, RANK, LEVELS))


def write_checkpoint(folder: Path) -> list[Path]:
    checkpoint.save(folder / "x.safetensors", Checkpoint(pool(), {"arch": "tiny"}))
    return [folder / "x.safetensors"]


def write_foreign(folder: Path) -> list[Path]:
    save_file(make_network().weights, folder / "x.safetensors")
    return [folder / "x.safetensors"]


def write_torch(new: bool) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        content = {"model": make_network().weights, "epoch": 3}
        torch.save(content, folder / "x.pth", _use_new_zipfile_serialization=new)
        return [folder / "x.pth"]

    return write


def comparable(value: object) -> object:
    """Dictionaries of tensors as something that can be compared."""
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()}
    return digests.of_tensor(value) if isinstance(value, torch.Tensor) else repr(value)


def read_weights(folder: Path) -> object:
    content = weight_files.read(next(folder.iterdir()))
    header = content.header.get(checkpoint.HEADER)  # of ours, whose other field are the digests themselves
    return comparable(content.data), header


def write_records(folder: Path) -> list[Path]:
    return sorted(write_source(folder / "s", (2, 2, 2), CLASSES, jpeg).glob("*.tfrecords"))


def write_packed(folder: Path) -> list[Path]:
    with tempfile.TemporaryDirectory() as other:
        source = write_source(Path(other) / "s", (2, 2, 2), CLASSES, jpeg)
        pack(source, folder)
    return sorted(file for file in (folder / "s").iterdir() if file.name != "dataset_spec.json")


def write_hdf5(folder: Path) -> list[Path]:
    return [write_class(folder / "c" / "2.h5", 2)]


def read_hdf5(folder: Path) -> object:
    store = store_of(folder / "c" / "2.h5")
    return [store.image(2, index).tobytes() for index in range(store.count(2))]


FORMATS = {
    "safetensors, ours": Format(write_checkpoint, read_weights, True),
    "safetensors of others": Format(write_foreign, read_weights, False),
    ".pth": Format(write_torch(True), read_weights, True),
    ".pth before torch 1.6": Format(write_torch(False), read_weights, False),
    "TFRecord": Format(write_records, lambda folder: pictures(open_source(folder, "s")), True),
    "packed": Format(write_packed, lambda folder: pictures(open_source(folder, "s")), True),
    "HDF5": Format(write_hdf5, read_hdf5, False),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three other bytes, most often one, or cut short."""
    if draw.random() < 0.2:
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        changed[draw.randrange(len(changed))] ^= draw.randrange(1, 256)
    return bytes(changed)


class Hung(BaseException):
    pass


def _stop(*_) -> None:
    raise Hung


def outcome(read: Callable[[Path], object], folder: Path, sound: object) -> str:
    """How one damage ended, of `ENDS`."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(PATIENCE)
    try:
        return "harmless" if read(folder) == sound else "silently used"
    except InputError as error:
        return "refused" if "\n" not in str(error) else "crashed"
    except Hung:
        return "hung"
    except Exception as error:
        print(f"  {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return "crashed"
    finally:
        signal.alarm(0)


def run_cases(name: str, first: int, last: int, seed: int) -> Iterator[str]:
    """The outcomes of the damages `first` to `last`, each a function of its number and the seed alone."""
    form = FORMATS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = form.write(folder)
        sound = form.read(folder)
        for case in range(first, last):
            draw = random.Random(f"{seed} {name} {case}")
            file = draw.choice(files)
            content = file.read_bytes()
            file.write_bytes(damaged(content, draw))
            yield outcome(form.read, folder, sound)
            file.write_bytes(content)


def counts(name: str, number: int, seed: int) -> Counter[str]:
    """How often each end came about in `number` damages."""
    found: list[str] = []
    while len(found) < number:
        words = [sys.executable, __file__, name, str(len(found)), str(number), str(seed)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found += lines
        if len(found) < number:
            if done.returncode >= 0:
                raise RuntimeError(f"{name}: damages cannot be tried, see above")
            found.append("crashed")  # the process died of this one
    return Counter(found)


def main(number: int, seed: int) -> bool:
    """Try all formats and print a table; whether every format kept what it promises."""
    print(f"{'format':24}{'damages':>8}" + "".join(f"{end:>15}" for end in ENDS))
    kept = True
    for name, form in FORMATS.items():
        found = counts(name, number, seed)
        promise = "" if form.checked else "   (no checksums)"
        print(f"{name:24}{number:8}" + "".join(f"{found[end]:15}" for end in ENDS) + promise, flush=True)
        kept &= not (found["crashed"] or found["hung"] or (form.checked and found["silently used"]))
    return kept


if __name__ == "__main__":
    for end in run_cases(sys.argv[1], *map(int, sys.argv[2:])):
        print(json.dumps(end), flush=True)
