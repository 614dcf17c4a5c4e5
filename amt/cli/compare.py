"""Say by how much one run of test_meta_dataset.py is better than another on the same episodes.

    python -m amt compare RUN_A RUN_B                  A minus B, in points, with 95% intervals
    python -m amt compare A=RUN,RUN,RUN B=RUN,RUN,RUN  rows of several training seeds

The runs need the same seed, split and sampling: then their episodes and the starts of their attacks are the
same, and the difference is taken episode by episode. A star marks a difference both of whose intervals leave
out zero. Give all training seeds that there are, separated by commas: then the intervals know them.
"""

import math
from collections.abc import Sequence

from amt.cli.options import Parser
from amt.evaluation import seeds
from amt.evaluation.chance import chance_notes
from amt.evaluation.comparison import compare, seed_by_seed
from amt.evaluation.runs import Run
from amt.evaluation.statistics import Summary
from meta_dataset_readers.errors import InputError, say


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt compare")
    parser.add_argument("ours", metavar="RUN_A", help="--output_dir of an evaluation, or several by commas")
    parser.add_argument("theirs", metavar="RUN_B", help="the one that it is compared with")
    args = parser.parse(argv)
    ours, theirs = seeds.read_row(args.ours), seeds.read_row(args.theirs)
    found = compare(ours, theirs)
    if not found.differences:
        raise InputError(f"{args.ours} cannot be compared with {args.theirs}: {'; '.join(found.refusals)}")
    columns = list(dict.fromkeys(column for _, column in found.differences))
    say(f"accuracy of {args.ours} minus that of {args.theirs}, in points; 95% intervals of the paired")
    say("difference: normal, and in brackets by the bootstrap; with a star where both leave out zero")
    for line in lines(found.differences, columns):
        say(line)
    for line in per_seed(ours, theirs, columns):
        say(line)
    for reason in found.refusals:
        say(f"left out: {reason}")
    for path, run in ((args.ours, ours), (args.theirs, theirs)):
        for stamp in run.stamps:
            say(f"{path}: {stamp}")
        for line in doubts(run, columns):
            say(f"suspect: {path}: {line}")
        for line in chance_notes(run, columns):
            say(f"{path}: {line}")
    return 0


def lines(differences: dict[tuple[str, str], Summary], columns: Sequence[str]) -> list[str]:
    """The table, a line per domain or average."""
    names = list(dict.fromkeys(name for name, _ in differences))
    body = [
        [name, *(cell(differences[name, column]) for column in columns), str(differences[name, columns[0]].n)]
        for name in names
    ]
    head = ["", *columns, "n"]
    widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in [head, *body]
    ]


def per_seed(ours: Run, theirs: Run, columns: Sequence[str]) -> list[str]:
    """The mean differences of each training seed, or that there is only one."""
    if len(ours.seeds) == 1:
        return [seeds.ONE_SEED]
    found = [compare(a, b).differences for a, b in seed_by_seed(ours, theirs)]
    names = [name for name in ours.averages if len(ours.averages[name]) > 1] or list(ours.sources)
    return [
        f"{name}, by training seed: "
        + "; ".join(f"{c} {' '.join(f'{each[name, c].mean:+.1f}' for each in found)}" for c in columns)
        for name in names
        if all((name, columns[0]) in each for each in found)
    ]


def cell(difference: Summary) -> str:
    """For example `+3.1 +- 1.2 [+1.9, +4.2]*`."""
    if not math.isfinite(difference.interval):
        return f"{difference.mean:+.1f} +- n/a "
    return (
        f"{difference.mean:+.1f} +- {difference.interval:.1f} "
        f"[{difference.low:+.1f}, {difference.high:+.1f}]{'*' if difference.decided else ' '}"
    )


def doubts(run: Run, columns: Sequence[str]) -> list[str]:
    """What is suspect about the results that were compared."""
    return [f"{f.source} {f.column}: {f.reason}" for f in run.findings if f.column in columns]
