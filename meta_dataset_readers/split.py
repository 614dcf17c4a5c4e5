"""The command `python -m meta_dataset_readers.split`: which classes of one's own are for training.

    python -m meta_dataset_readers.split FOLDER [--ways N] [--seed S] [--train 0.6 --valid 0.2 --test 0.2]

FOLDER has a folder of image files per class. Its classes are shuffled by the seed and divided among TRAIN,
VALID and TEST by these shares, in `splits.json` beside them; where there are enough, each gets N.
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from meta_dataset_readers.command import Parser
from meta_dataset_readers.errors import InputError, exit_on_bad_input, say
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.folders import SPLITS_FILE, class_files, class_folders, open_class_folders
from meta_dataset_readers.layouts import layout_of
from meta_dataset_readers.settings import Number, as_path, nonnegative, nonnegative_int
from meta_dataset_readers.spec import SPLITS

_NEEDED = ("TEST", "TRAIN", "VALID")  # which split comes first where classes are few


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "Divide the classes of a folder among TRAIN, VALID and TEST.", "python -m meta_dataset_readers.split"
    )
    parser.add_argument(
        "folder", type=as_path, metavar="FOLDER", help="a source with a folder of image files per class"
    )
    parser.add_argument(
        "--ways", type=Number(int, least=2), default=5, help="classes that each split is to have at least"
    )
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="of the shuffle")
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        parser.add_argument(
            f"--{split.lower()}", type=nonnegative, default=share, help="share of the classes"
        )
    parser.add_argument("--overwrite", action="store_true", help=f"replace a {SPLITS_FILE}")
    return parser.parse(arguments)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    folder, layout = layout_of(options.folder)
    if layout.open is not open_class_folders:
        raise InputError(f"{folder}: its classes are divided already: {layout.name}")
    file = folder / SPLITS_FILE
    if os.path.lexists(file) and not options.overwrite:
        raise InputError(f"{file}: is there already; --overwrite replaces it")
    classes = class_folders(folder)
    for name in classes:
        class_files(folder, name)  # one without a picture would be refused whenever the source is opened
    shares = {split: getattr(options, split.lower()) for split in SPLITS}
    divided = divide(classes, shares, options.ways, options.seed)
    replace_file(file, json.dumps(divided, indent=1) + "\n")
    say(f"wrote {file}: " + ", ".join(f"{len(divided[split])} {split}" for split in SPLITS))
    for split in SPLITS:
        if shares[split] and len(divided[split]) < options.ways:
            say(f"note: {split} has too few classes for episodes of {options.ways} ways")


def divide(classes: Sequence[str], shares: Mapping[str, float], ways: int, seed: int) -> dict[str, list[str]]:
    """The classes of each split, sorted: a function of the arguments.

    Every split with a share gets `ways` classes, TEST first, as far as there are enough; what is left goes by
    the shares. Raises InputError if all shares are 0.
    """
    if not sum(shares.values()):
        raise InputError("--train, --valid and --test are 0, expected a share above 0")
    sizes = _sizes(len(classes), shares, ways)
    shuffled = [classes[i] for i in np.random.default_rng(seed).permutation(len(classes))]
    divided, begin = {}, 0
    for split in SPLITS:
        divided[split] = sorted(shuffled[begin : begin + sizes[split]])
        begin += sizes[split]
    return divided


def _sizes(n_classes: int, shares: Mapping[str, float], ways: int) -> dict[str, int]:
    total, sizes = sum(shares.values()), dict.fromkeys(SPLITS, 0)
    for split in _NEEDED:
        if shares[split]:
            sizes[split] = min(ways, n_classes - sum(sizes.values()))
    while sum(sizes.values()) < n_classes:  # to the split that is furthest below its share
        wanted = {
            split: n_classes * shares[split] / total - sizes[split] for split in SPLITS if shares[split]
        }
        sizes[max(wanted, key=wanted.__getitem__)] += 1
    return sizes


if __name__ == "__main__":
    exit_on_bad_input(main)
