"""`python -m amt COMMAND ...`: what is done with checkpoints and runs besides training and testing them.

python -m amt                       list the commands
python -m amt COMMAND --help        explain one
"""

if __name__ == "__main__":
    from meta_dataset_readers import endings

    endings.begin()

import ast
import importlib
import sys
from pathlib import Path

from meta_dataset_readers.errors import InputError, exit_on_bad_input, nearest, say

COMMANDS = ("autolora", "checkpoint", "compare", "export", "pool", "predict", "report", "row")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        for name in COMMANDS:
            say(f"python -m amt {name:12} {summary(name)}")
        return 0
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        raise InputError(f"no command {name!r}; {nearest(name, COMMANDS)}")
    return importlib.import_module(f"amt.cli.{name}").main(arguments)


def summary(name: str) -> str:
    """The first line of a command's docstring, read without importing what the command needs."""
    source = (Path(__file__).parent / "cli" / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    exit_on_bad_input(main)
