"""Write finished runs as one row of a leaderboard, a small JSON file that `amt report` ranks.

    python -m amt row RUN,RUN,RUN --name "ours" --out results/ours.json

The runs are those of the training seeds of one method. Say what its training was tuned on, and how many
candidates there were; what test_meta_dataset.py chose by itself is added.
"""

from collections.abc import Sequence

from amt.cli.options import Parser, check_output
from amt.evaluation import leaderboard, seeds
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.settings import as_path, positive_int


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt row")
    parser.add_argument(
        "runs", metavar="RUN[,RUN...]", help="--output_dir of evaluations, a training seed each"
    )
    parser.add_argument("--name", required=True, help="of the row")
    parser.add_argument("--out", type=as_path, required=True, help="the file, a .json")
    parser.add_argument("--tuned_on", default="", help="what settings of the training were chosen on, if any")
    parser.add_argument("--candidates", type=positive_int, default=1, help="how many trainings were tried")
    args = parser.parse(argv)
    if args.out.suffix != ".json":
        raise InputError(f"--out {args.out}: expected a name that ends in .json")
    check_output(args.out.parent, "--out")
    run = seeds.read_row(args.runs)
    found = leaderboard.content(run, args.name, args.tuned_on, args.candidates)
    text = leaderboard.dump(found)
    leaderboard.parse(args.out, text)  # what could not be read back is not written
    replace_file(args.out, text)
    say(f"wrote {args.out} ({len(text) / 1e3:.0f} kB, {len(run.seeds)} training seeds)")
    return 0
