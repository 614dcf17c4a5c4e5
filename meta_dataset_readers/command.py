"""What the commands of this package share: how a command line is read, how sources are named on it, and how
much of the machine is ours.

Does not know what any command does.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from meta_dataset_readers.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags may be spelt with dashes or underscores alike.

    `module` is what follows `python -m`. Flags are declared with underscores.
    """

    def __init__(self, module: str, description: str):
        super().__init__(prog=f"python -m {module}", description=description)

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse `arguments`; an InputError says what is wrong with the first bad one."""
        return self.parse_args([_spelling(word) for word in arguments])


def add_sources(parser: Parser, nargs: str, sources_help: str) -> None:
    """The arguments that say which sources are meant: `data_path`, `sources`, and `image_prefix`, which is
    None or a list of two, for `layouts.open_source`. `nargs` says how many sources there may be ("+" or "*").
    """
    parser.add_argument("data_path", type=Path, metavar="DATA_PATH", help="directory that holds the sources")
    parser.add_argument("sources", nargs=nargs, metavar="SOURCE", help=sources_help)
    parser.add_argument(
        "--image_prefix",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="where the images of filelists written on another machine are (default: they are looked for)",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small, expected at least 1")
    return value


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spelling(word: str) -> str:
    flag = re.match(r"--[A-Za-z][\w-]*", word)
    return "--" + flag[0][2:].replace("-", "_") + word[flag.end() :] if flag else word
