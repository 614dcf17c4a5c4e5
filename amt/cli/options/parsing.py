"""How a command line is read: flags that only published scripts have, a check of where files are to go.

Knows no flag by name, and of the disk only whether a folder can be written to.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from amt.cli.options.published_flags import is_published, n_values, reasons
from meta_dataset_readers import command
from meta_dataset_readers.errors import InputError, damaged, say, strerror


class Parser(command.Parser):
    """A parser that also takes flags without effect: `--help_published` lists them, and of those that are
    given each is named once."""

    def __init__(self, description: str, prog: str | None = None):
        super().__init__(description, prog)
        self.without_effect: dict[str, str] = {}

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args = super().parse(argv)
        for flag in vars(args).pop("without_effect", {}):
            say(f"note: {flag} has no effect: {self.without_effect[flag]}", file=sys.stderr)
        return args

    def add_published(self) -> None:
        """Accept every flag of the published scripts that has no meaning here, as the last of all flags."""
        self.usage = "%(prog)s [@FILE ...] --data_path DIR --output_dir DIR [flags]"  # not all 130 of them
        self.add_without_effect({name: (n_values(name), reason) for name, reason in reasons().items()})

    def add_without_effect(self, flags: Mapping[str, tuple[int | str, str]]) -> None:
        """Accept flags, unless they have a meaning, with as many values as argparse's `nargs` says; each with
        the reason why it has no effect."""
        for name, (nargs, reason) in flags.items():
            if f"--{name}" in self._option_string_actions:
                continue
            self.without_effect[f"--{name}"] = reason
            self.add_argument(
                f"--{name}",
                nargs=nargs,
                action=_WithoutEffect,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        if "--help_published" not in self._option_string_actions:
            self.add_argument(
                "--help_published", nargs=0, action=_HelpPublished, help="list the flags without effect"
            )

    def _get_option_tuples(self, option_string: str) -> list:
        """What an abbreviation may stand for: of several flags the published one, if that is one."""
        found = super()._get_option_tuples(option_string)
        published = [match for match in found if is_published(match[1].lstrip("-"))]
        return published if len(published) == 1 else found


class _WithoutEffect(argparse.Action):
    """Takes the values of a flag and remembers only that it was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        vars(namespace).setdefault("without_effect", {})[self.option_strings[0]] = True


class _HelpPublished(argparse.Action):
    """Lists the flags without effect, and ends the program."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        say("Flags of published command lines that are accepted without effect:")
        for flag, reason in parser.without_effect.items():
            say(f"  {flag:29} {reason}")
        parser.exit()


def check_output(folder: Path, flag: str = "--output_dir") -> None:
    """Raise an `InputError` unless files can be written in `folder`, which is not made yet if missing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with damaged(f"{flag} {folder}: cannot be written to", OSError, strerror):
        tempfile.TemporaryFile(dir=existing).close()


def check_coefficients(args: argparse.Namespace) -> None:
    """Raise an `InputError` for --coefficients that do not sum to 1."""
    if args.coefficients is not None and abs(sum(args.coefficients) - 1) > 1e-4:
        raise InputError(f"--coefficients sum to {sum(args.coefficients):g}, expected 1")


def check_increasing(args: argparse.Namespace) -> None:
    """Raise an `InputError` unless each --epsilon is larger than the one before."""
    if any(a >= b for a, b in itertools.pairwise(args.epsilon)):
        raise InputError(f"--epsilon {' '.join(f'{e:g}' for e in args.epsilon)}: expected increasing values")


def check_distinct(flag: str, values: Sequence) -> None:
    """Raise an `InputError` if a flag names a value twice."""
    if len(set(values)) < len(values):
        raise InputError(f"--{flag} names a value twice: {' '.join(map(str, values))}")
