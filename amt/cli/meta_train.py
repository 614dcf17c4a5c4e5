"""`amt train` and main.py: flags are read and checked here; amt/cli/train.py does the work.

amt train --arch vit_mini_amt --data_path data/mini --base_sources mini_objects --output_dir runs/x
"""

from collections.abc import Sequence

from amt.cli import options
from amt.files import ranks


def main(argv: Sequence[str], prog: str | None = "amt train") -> int:
    """Meta-train as the flags say; the exit code.

    Args:
        argv: the words of the command line after the command.
        prog: the command as its help calls it; None for the name of the script.

    Raises:
        InputError: a flag, or what it names, is at fault.
    """
    parser = options.training_parser()
    parser.prog = prog or parser.prog
    with ranks.one_voice():
        args = parser.parse(argv)
        options.check_training(args)
        if args.dry_run is not None:
            from amt.cli import dry_run

            return dry_run.training(args)
    # Only now torch is imported: nobody waits for it who asks for --help or mistyped a flag.
    from amt.cli import train

    return train.main(args)
