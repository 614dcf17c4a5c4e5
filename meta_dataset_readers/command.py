"""What the commands of this package share: how a command line is read, and how much of the machine is ours.

Does not know what any command does.
"""

import argparse
import os
import re
from collections.abc import Sequence

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
