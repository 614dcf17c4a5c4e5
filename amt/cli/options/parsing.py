"""How a command line is read: a parser whose errors are one line, and the kinds of values flags have.

Flags are those of the published code, with dashes and underscores alike; `@FILE` reads flags from a file
(one or more to a line, # starts a comment). Knows no flag by name, and of the disk only whether a folder can
be written to.
"""

import argparse
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from amt.cli.options.domain_config import parse_trim
from amt.cli.options.published_flags import is_published, n_values, reasons
from amt.models.weights import Trim
from meta_dataset_readers.errors import InputError


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, whose flags may be spelt with dashes, and that reads @FILEs."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            fromfile_prefix_chars="@",
            formatter_class=Help,
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return [spelling(word) for word in shlex.split(line, comments=True)]
        except ValueError as error:  # a quotation mark without its partner
            raise InputError(f"cannot read the flags {line!r}: {error}") from error

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse flags; an `InputError` says what is wrong with the first bad one."""
        args = self.parse_args([spelling(word) for word in argv])
        for flag, reason in vars(args).pop("without_effect", {}).items():
            print(f"note: {flag} has no effect: {reason}", file=sys.stderr)
        return args

    def add_published(self) -> None:
        """Accept every flag of the published scripts that has no meaning here, as the last of all flags."""
        self.usage = "%(prog)s [@FILE ...] --data_path DIR --output_dir DIR [flags]"  # not all 130 of them
        group = self.add_argument_group("accepted from published command lines, without effect")
        for name, reason in reasons().items():
            if f"--{name}" not in self._option_string_actions:
                group.add_argument(
                    f"--{name}",
                    nargs=n_values(name),
                    action=WithoutEffect,
                    default=argparse.SUPPRESS,
                    metavar="X" if n_values(name) else None,
                    help=reason,
                )

    def _get_option_tuples(self, option_string: str) -> list:
        """What an abbreviation may stand for: of several flags the published one, if that is one."""
        found = super()._get_option_tuples(option_string)
        published = [match for match in found if is_published(match[1].lstrip("-"))]
        return published if len(published) == 1 else found


class WithoutEffect(argparse.Action):
    """Takes the values of a flag and remembers only that it was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        given = vars(namespace).setdefault("without_effect", {})
        given[option_string] = self.help


def spelling(word: str) -> str:
    """A flag with its dashes as underscores; anything else as it is."""
    match = re.match(r"--[A-Za-z][\w-]*", word)
    return "--" + match[0][2:].replace("-", "_") + word[match.end() :] if match else word


def place(text: str) -> Path:
    """A path; an empty one is what a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small, expected at least 1")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative, expected at least 0")
    return value


def amount(text: str) -> float:
    """A finite number that is not negative."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not an amount, expected a number of at least 0")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no fraction, expected 0 to 1")
    return value


def trim(text: str) -> Trim:
    """NAME:BLOCK:KEEP, as in qkv:-1:0.5."""
    try:
        return parse_trim(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_output(folder: Path, flag: str = "--output_dir") -> None:
    """Raise an `InputError` unless files can be written in `folder`, which is not made yet if missing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written to ({error.strerror})") from error


def listed(numbers: Iterable[float]) -> str:
    """Numbers as a flag takes them."""
    return " ".join(f"{number:g}" for number in numbers)


def check_distinct(flag: str, values: Sequence) -> None:
    """Raise an `InputError` if a flag names a value twice."""
    if len(set(values)) < len(values):
        raise InputError(f"--{flag} names a value twice: {' '.join(map(str, values))}")
