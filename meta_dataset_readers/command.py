"""What all commands share: how a command line is read, how sources are named on it, and how much of the
machine is ours.

Does not know what any command does.
"""

import argparse
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from meta_dataset_readers.errors import InputError, blaming
from meta_dataset_readers.settings import as_path

_LARGEST_FILE = 2**20  # bytes of an @FILE: what people write is far smaller


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, whose flags may be spelt with dashes or underscores alike, and that
    reads flags from an @FILE: one or more to a line, # starts a comment, paths of further @FILEs are relative
    to it. Flags are declared with underscores."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(prog=prog, description=description, formatter_class=Help)

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse flags; an `InputError` says what is wrong with the first bad one."""
        return self.parse_args(list(_expanded(argv)))


def _expanded(words: Sequence[str], folder: Path = Path(), opened: tuple[Path, ...] = ()) -> Iterator[str]:
    """The words, flags spelt with underscores, each @FILE replaced by its contents."""
    for word in words:
        if not word.startswith("@"):
            yield spelling(word)
            continue
        file = folder / os.path.expanduser(word[1:])
        if (resolved := Path(os.path.realpath(file))) in opened:
            raise InputError(f"@{file}: the file names itself, expected flags")
        yield from _expanded(_words(file), file.parent, (*opened, resolved))


def _words(file: Path) -> list[str]:
    """The words of an @FILE."""
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"@{file}: not a regular file, expected a text file of flags")
        with open(file, "rb") as opened:
            data = opened.read(_LARGEST_FILE + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"@{file}: {reason}, expected a text file of flags") from error
    if len(data) > _LARGEST_FILE or "\0" in text:
        raise InputError(f"@{file}: not a text file of flags")
    words = []
    for line in text.splitlines():
        with blaming(f"@{file}: cannot read the flags {line!r}"):  # a quotation mark without its partner
            words += shlex.split(line, comments=True)
    return words


def add_sources(parser: Parser, nargs: str, sources_help: str) -> None:
    """The arguments that say which sources are meant: `data_path`, `sources`, and `image_prefix`, which is
    None or a list of two, for `layouts.open_source`. `nargs` says how many sources there may be ("+" or "*").
    """
    parser.add_argument(
        "data_path", type=as_path, metavar="DATA_PATH", help="directory that holds the sources"
    )
    parser.add_argument("sources", nargs=nargs, metavar="SOURCE", help=sources_help)
    add_image_prefix(parser)


def add_image_prefix(parser: argparse._ActionsContainer) -> None:
    """The flag --image_prefix."""
    parser.add_argument(
        "--image_prefix",
        nargs=2,
        type=os.path.expanduser,
        metavar=("OLD", "NEW"),
        help="where the images of filelists written on another machine are (default: they are looked for)",
    )


def spelling(word: str) -> str:
    """A flag with its dashes as underscores; anything else as it is."""
    flag = re.match(r"--[A-Za-z][\w-]*", word)
    return "--" + flag[0][2:].replace("-", "_") + word[flag.end() :] if flag else word
