"""`--shots 0 1 2 4 8 16` of test_meta_dataset.py: a run for each number of shots, and a page with the curve.

DIR/0-shot, DIR/1-shot, ...    run directories like any; a finished one is not done again
DIR/shots.html, .png, .pdf     accuracy against shots, as soon as all of them are complete
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

from amt.cli import options
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.files import replace_file


def each_number(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of the run for each number of shots, in order.

    Raises:
        InputError: numbers, or flags beside them, that make no sense together.
    """
    options.check_distinct("shots", args.shots)
    given = [flag for flag in ("num_support", "dump") if getattr(args, flag)]
    if given:
        raise InputError(f"--shots and --{given[0]} exclude each other")
    return [_run(args, shots) for shots in sorted(args.shots)]


def _run(args: argparse.Namespace, shots: int) -> argparse.Namespace:
    each = copy.copy(args)
    each.shots, each.num_support = [shots], [max(shots, 1)]
    each.output_dir = args.output_dir / f"{shots}-shot"
    if shots == 0:
        each.head, each.select, each.select_on = [["text"]], "none", None
        _check_zero_shot(args)
    return each


def _check_zero_shot(args: argparse.Namespace) -> None:
    """Raise an `InputError` where something else than texts would have to decide without a support set."""
    if args.text_prototypes is None:
        raise InputError("--shots 0 classifies by texts alone: it needs --text_prototypes FILE.npz")
    fixed = args.coefficients is not None or args.specified_expert is not None
    if args.resume and not fixed and args.routing not in ("uniform", "soup"):
        raise InputError(
            "--shots 0 has no support set to merge a pool by; expected --coefficients, --specified_expert, "
            "or --routing uniform or soup"
        )
    if args.deploy == "finetune":
        raise InputError("--shots 0 has no support set for --deploy finetune")


def main(args: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Do every run that is not complete, by `run` from its flags to its exit code; then write the page."""
    todo = each_number(args)
    for each in todo:
        options.check_testing(each)
    codes = []
    for each in reversed(todo):  # the most shots first: what they need is missed before any work is done
        if args.dry_run is None:
            say(f"{each.output_dir.name}:")
        codes.append(run(each))
        if codes[-1] and args.dry_run is None:
            return codes[-1]
    if args.dry_run is None:
        write_page(args.output_dir, [each.output_dir for each in todo])
    return max(codes)


def write_page(out: Path, folders: list[Path]) -> None:
    """Write the page of these runs and its curve into `out`, if all of them are complete."""
    from amt.evaluation import runs
    from amt.report import document, figures, shots
    from amt.report.shown import label

    found = [runs.peek(folder) for folder in folders]
    if not all(run.complete for run in found):
        return  # other processes are still at work; the last of them writes it
    written = figures.write(shots.curves(label(found)), out)
    page = out / "shots.html"
    replace_file(page, document.page(found).encode("utf-8", "backslashreplace"))
    say(f"wrote {page}; beside it {', '.join(path.name for path in written)}")
