"""Fine-tune a robustly pretrained network on an ordinary data set by AutoLoRa, and test it.

    python main.py autolora --dataset cifar10 --data DIR --arch resnet18 --checkpoint FILE --output RUN

Reads and checks the flags (amt/cli/options/autolora.py); what happens then is told in amt/cli/fine_tune.py.
"""

from collections.abc import Sequence

from amt.cli.options import autolora as options
from amt.cli.options import check_output
from amt.files import ranks


def main(argv: Sequence[str]) -> int:
    with ranks.one_voice():
        args = options.parse(list(argv))
        attacks = options.attacks(args)
        if args.dry_run is not None:
            from amt.cli import dry_run

            return dry_run.fine_tuning(args)
        options.check_ranks(args)
        check_output(args.output, "--output")
    # Only now torch is imported: nobody waits for it who asks for --help or mistyped a flag.
    from amt.cli import fine_tune

    return fine_tune.main(args, attacks)
