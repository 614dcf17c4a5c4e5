"""List the recipes that come with this package, or run one.

    amt recipe                                      what there is, and in which folder
    amt recipe meta_dataset_5w1s DATA OUT --dry_run what would run, and what is missing
    amt recipe meta_dataset_5w1s DATA OUT           the commands of that table, one after the other

A recipe is a shell script, or a file of flags for `amt train @FILE` and `amt test @FILE`.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from amt.cli.options import Parser
from amt.files.shipped import shipped
from meta_dataset_readers.errors import InputError, nearest, say
from meta_dataset_readers.settings import as_path

_SHARED = ("common", "networks")  # what the scripts have in common


def main(argv: Sequence[str]) -> int:
    """List the recipes or run one with this interpreter; the exit code is the script's.

    Raises:
        InputError: an unknown name, a missing folder, or no bash.
    """
    parser = Parser(__doc__.partition("\n")[0], "amt recipe")
    parser.add_argument("name", nargs="?", help="the recipe to run (default: list them)")
    parser.add_argument("data", nargs="?", type=as_path, metavar="DATA", help="the folder of its data sets")
    parser.add_argument("out", nargs="?", type=as_path, metavar="OUT", help="where results go")
    parser.add_argument("--dry_run", action="store_true", help="say what would run, and what is missing")
    args = parser.parse(argv)
    folder = shipped("recipes")
    if args.name is None:
        say(f"in {folder}:")
        say(*(f"  {file.name}" for file in sorted(folder.iterdir()) if file.suffix in (".sh", ".args")))
        return 0
    known = scripts(folder)
    if args.name not in known:
        raise InputError(f"no recipe {args.name!r}; {nearest(args.name, known)}")
    if args.data is None or args.out is None:
        raise InputError(f"expected two folders: amt recipe {args.name} DATA OUT")
    words = ["bash", known[args.name], args.data, args.out, *(["--dry_run"] if args.dry_run else [])]
    try:
        return subprocess.run(words, env=os.environ | {"PYTHON": sys.executable}, check=False).returncode
    except FileNotFoundError as error:
        raise InputError("bash is not installed, and recipes are scripts of it") from error


def scripts(folder: Path) -> dict[str, Path]:
    """The recipes that can be run, by name."""
    return {file.stem: file for file in sorted(folder.glob("*.sh")) if file.stem not in _SHARED}
