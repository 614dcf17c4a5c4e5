"""`python -m amt COMMAND ...`: what is done with checkpoints and runs besides training and testing them.

python -m amt                       list the commands
python -m amt COMMAND --help        explain one
"""

import importlib
import pkgutil
import sys

from amt import commands
from meta_dataset_readers.errors import InputError, exit_on_bad_input, nearest


def main() -> int:
    known = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        for name in known:
            summary = importlib.import_module(f"amt.commands.{name}").__doc__.partition("\n")[0]
            print(f"python -m amt {name:12} {summary}")
        return 0
    name, *arguments = sys.argv[1:]
    if name not in known:
        raise InputError(f"no command {name!r}; {nearest(name, known)}")
    return importlib.import_module(f"amt.commands.{name}").main(arguments)


if __name__ == "__main__":
    exit_on_bad_input(main)
