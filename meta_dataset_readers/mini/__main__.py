"""The command `python -m meta_dataset_readers.mini`: options in, directory and a table out."""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import argparse
import sys
from collections.abc import Sequence

from meta_dataset_readers.command import Parser
from meta_dataset_readers.cores import available_cores
from meta_dataset_readers.errors import exit_on_bad_input, say
from meta_dataset_readers.mini.sheets import write_contact_sheets
from meta_dataset_readers.mini.sources import OBJECTS_PER_CLASS, SOURCE_NAMES
from meta_dataset_readers.mini.write import Settings, make_mini
from meta_dataset_readers.settings import as_path, nonnegative_int, positive_int


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "Make Mini-Meta-Dataset: six small domains in the layout of Meta-Dataset.",
        "python -m meta_dataset_readers.mini",
    )
    parser.add_argument(
        "--out", type=as_path, required=True, metavar="DIR", help="directory to hold the sources"
    )
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="decides every picture")
    parser.add_argument(
        "--sources", nargs="+", default=SOURCE_NAMES, metavar="NAME", help=f"of {', '.join(SOURCE_NAMES)}"
    )
    parser.add_argument(
        "--objects_per_class",
        type=positive_int,
        default=OBJECTS_PER_CLASS,
        metavar="N",
        help="images per class of mini_objects",
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=available_cores(),
        metavar="N",
        help="processes, by default one per core; changes no byte",
    )
    parser.add_argument(
        "--force", action="store_true", help="write into DIR although it holds other things; they are kept"
    )
    parser.add_argument(
        "--contact_sheets",
        action="store_true",
        help="also write DIR/contact_sheets/NAME.png, a row per class",
    )
    return parser.parse(arguments)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    written = make_mini(
        options.out,
        settings=Settings(options.seed, options.objects_per_class),
        sources=options.sources,
        workers=options.workers,
        force=options.force,
        progress=sys.stderr.isatty(),
    )
    if not any(source.fresh for source in written):
        say(f"{options.out} already holds this set, complete; nothing to do")
    for source in written:
        size = f"{source.bytes / 1e6:6.1f} MB"
        say(f"{source.name:14} {source.classes:4} classes {source.images:6} images {size}")
    if options.contact_sheets:
        for path in write_contact_sheets(options.out, [source.name for source in written]):
            say(path)


if __name__ == "__main__":
    exit_on_bad_input(main)
