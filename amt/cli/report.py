"""Show runs of test_meta_dataset.py as one HTML page, with tables, figures and sample images.

    python -m amt report RUN --out report.html
    python -m amt report RUN OTHER ... --out report.html --figures figures

The page is one file that needs no network. The first run is the one that the others are compared with, where
they scored the same episodes. --figures writes the same figures as PNG and PDF.
"""

from collections.abc import Sequence
from pathlib import Path

from amt.cli import dry_run
from amt.cli.options import Parser, add_dry_run, check_output
from amt.evaluation import runs
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.settings import as_path


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt report")
    parser.add_argument("runs", type=as_path, nargs="+", metavar="RUN", help="--output_dir of an evaluation")
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
    seen: dict[Path, Path] = {}
    for folder in args.runs:
        if (resolved := folder.resolve()) in seen:
            raise InputError(f"{folder}: is the same run as {seen[resolved]}")
        seen[resolved] = folder
    found = [runs.load(folder) for folder in args.runs]

    # These bring matplotlib and templates, which nobody should wait for who mistyped a folder.
    from amt.report import charts, document, figures
    from amt.report.shown import label

    # Names on a disk need not be UTF-8.
    data = document.page(found).encode("utf-8", "backslashreplace")
    replace_file(args.out, data)
    say(f"wrote {args.out} ({len(data) / 1e6:.1f} MB)")
    if args.figures is not None:
        written = figures.write(charts.figures(label(found)), args.figures)
        say(f"wrote {len(written)} files in {args.figures}")
    return 0
