"""`amt test` and test_meta_dataset.py: flags are read and checked here; amt/cli/test.py does the work.

    amt test --arch vit_mini_amt_merge --resume runs/x/best.safetensors --data_path data/mini \\
        --test_sources mini_signs digits --output_dir results/x --epsilon 4 8
"""

import argparse
from collections.abc import Sequence

from amt.cli import options


def main(argv: Sequence[str], prog: str | None = "amt test") -> int:
    """Evaluate as the flags say; the exit code.

    Args:
        argv: the words of the command line after the command.
        prog: the command as its help calls it; None for the name of the script.

    Raises:
        InputError: a flag, or what it names, is at fault.
    """
    parser = options.testing_parser()
    parser.prog = prog or parser.prog
    args = parser.parse(argv)
    if args.shots:
        from amt.cli import shots

        return shots.main(args, run)
    options.check_testing(args)
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Evaluate as checked flags say, or tell what would be done; the exit code."""
    if args.dry_run is not None:
        from amt.cli import dry_run

        return dry_run.testing(args)
    # Only now torch is imported: nobody waits for it who asks for --help or mistyped a flag.
    from amt.cli import test

    return test.main(args)
