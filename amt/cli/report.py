"""Show runs of test_meta_dataset.py as one HTML page, with tables, figures and sample images.

    python -m amt report RUN --out report.html
    python -m amt report RUN OTHER ... --out report.html --figures figures
    python -m amt report ours=RUN,RUN,RUN theirs=RUN,RUN,RUN --out report.html
    python -m amt report results/*.json --out leaderboard.html

The page is one file that needs no network. The first run is the one that the others are compared with, where
they scored the same episodes; several runs by commas are the training seeds of one row. Files of `amt row`
become one ranked page. --figures writes the same figures as PNG and PDF.
"""

from collections.abc import Sequence
from pathlib import Path

from amt.cli import dry_run
from amt.cli.options import Parser, add_dry_run, check_output
from amt.evaluation import leaderboard, seeds
from amt.evaluation.runs import Run
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.settings import as_path


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt report")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="--output_dir of an evaluation, several by commas, or a .json"
    )
    parser.add_argument("--out", type=as_path, required=True, help="the page, an .html")
    parser.add_argument("--figures", type=as_path, metavar="DIR", help="where figures go, as PNG and PDF")
    add_dry_run(parser)
    args = parser.parse(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {args.out}: expected a name that ends in .html")
    if args.out.is_dir():
        raise InputError(f"--out {args.out}: is a folder, expected the name of a file")
    if args.dry_run is not None:
        return dry_run.page(args)
    check_output(args.out.parent, "--out")
    if args.figures is not None:
        check_output(args.figures, "--figures")
    files = [is_file_of_a_row(word) for word in args.runs]
    if any(files) and not all(files):
        raise InputError(f"{args.runs[files.index(False)]}: expected either runs, or the .json of rows")
    found = [leaderboard.read(as_path(word)) if all(files) else seeds.read_row(word) for word in args.runs]
    check_different(found)

    # These bring matplotlib and templates, which nobody should wait for who mistyped a folder.
    from amt.report import charts, document, figures, ranking
    from amt.report.shown import label

    # Names on a disk need not be UTF-8.
    make = ranking.ranked_page if all(files) else document.page
    data = make(found).encode("utf-8", "backslashreplace")
    replace_file(args.out, data)
    say(f"wrote {args.out} ({len(data) / 1e6:.1f} MB)")
    if args.figures is not None:
        drawn = [ranking.plane(label(found))] if all(files) else charts.figures(label(found))
        written = figures.write([figure for figure in drawn if figure is not None], args.figures)
        say(f"wrote {len(written)} files in {args.figures}")
    return 0


def is_file_of_a_row(word: str) -> bool:
    """Whether a word names a file of a leaderboard, there or not."""
    return word.endswith(".json") and not as_path(word).is_dir()


def check_different(found: Sequence[Run]) -> None:
    """Raise an `InputError` if two rows hold the same run."""
    seen: dict[Path, Path] = {}
    for run in (part for row in found for part in row.seeds):
        if (resolved := run.folder.resolve()) in seen:
            raise InputError(f"{run.folder}: is the same run as {seen[resolved]}")
        seen[resolved] = run.folder
