"""The command `amt`: what can be done, a line each; `python -m amt` is the same.

amt                       list the commands
amt COMMAND --help        explain one

A command is imported when it is called, so that a list and a mistyped name cost nothing.
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from meta_dataset_readers import endings
from meta_dataset_readers.errors import InputError, exit_on_bad_input, nearest, say

_PACKAGES = Path(__file__).resolve().parents[1]


class Command(NamedTuple):
    """A command: the function `main` of a module, which takes the words after the name; and what it does."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("amt.cli.meta_train", "meta-train a pool of LoRAs on few-shot episodes (main.py)"),
    "test": Command(
        "amt.cli.meta_test", "score a pool on new tasks, clean and attacked (test_meta_dataset.py)"
    ),
    "autolora": Command(
        "amt.cli.autolora", "fine-tune a robust network on an ordinary data set, and test it"
    ),
    "predict": Command("amt.cli.predict", "classify your own pictures by a few labelled ones"),
    "app": Command("amt.cli.app", "try a pool in the browser"),
    "report": Command("amt.cli.report", "show evaluations as one HTML page"),
    "compare": Command(
        "amt.cli.compare", "by how much one evaluation is better than another, with intervals"
    ),
    "row": Command("amt.cli.row", "make evaluations of all training seeds a row of the leaderboard"),
    "export": Command("amt.cli.export", "write the network for a task in timm's, PEFT's or ONNX's format"),
    "checkpoint": Command("amt.cli.checkpoint", "say what a file of weights holds, or convert it"),
    "pool": Command("amt.cli.pool", "put checkpoints of single LoRAs together into a pool"),
    "check": Command("meta_dataset_readers.check", "say whether data sets are complete and readable"),
    "convert": Command("meta_dataset_readers.convert", "pack a data set into one file per split"),
    "split": Command("meta_dataset_readers.split", "divide your own classes among training and testing"),
    "mini": Command("meta_dataset_readers.mini.__main__", "make Mini-Meta-Dataset: six small domains"),
    "recipe": Command("amt.cli.recipe", "list or run the recipes of the papers' tables"),
}


def main() -> int | None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        say(*(f"amt {name:11} {command.summary}" for name, command in COMMANDS.items() if is_there(command)))
        say("", "amt COMMAND --help explains one.")
        return 0
    name, *rest = arguments
    if name not in COMMANDS or not is_there(COMMANDS[name]):
        known = [name for name, command in COMMANDS.items() if is_there(command)]
        raise InputError(f"no command {name!r}; {nearest(name, known)}")
    return importlib.import_module(COMMANDS[name].module).main(rest)


def is_there(command: Command) -> bool:
    """Whether the module of a command is installed; importing its package would cost more than a look."""
    return _PACKAGES.joinpath(*command.module.split(".")).with_suffix(".py").is_file()


def script() -> None:
    """The console script `amt`; ends the process."""
    endings.begin()
    sys.argv[0] = "amt"  # what results name as their command, under `python -m amt` too
    exit_on_bad_input(main)


if __name__ == "__main__":
    script()
