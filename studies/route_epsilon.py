"""The knob from clean to robust: what `--route_epsilon` trades, on one pool.

    python -m studies.route_epsilon --resume runs/mini_demo/last.safetensors --top_k 1

Evaluates the pool with test_meta_dataset.py once for each value of the knob, on the same episodes with the
same attacks, and draws clean and robust accuracy against it. Flags that are not its own go to
test_meta_dataset.py: which adapters are mixed, and how sharply, is decided by --top_k and --blend_beta. A run
that is there already is not made again, one that was stopped goes on.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amt.evaluation import runs
from amt.evaluation.statistics import Summary
from amt.report.figures import mixing_picture
from meta_dataset_readers.errors import InputError, exit_on_bad_input

ROOT = Path(__file__).resolve().parent.parent
KNOB = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def evaluate(out: Path, recipe: Path, resume: Path, epsilon: float, flags: Sequence[str]) -> runs.Run:
    """The run at one value of the knob, made unless it is complete."""
    folder = out / f"{epsilon:g}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "results.json").exists():
        command = [sys.executable, "test_meta_dataset.py", f"@{recipe}", "--resume", resume]
        command += ["--route_epsilon", f"{epsilon:g}", "--output_dir", folder.resolve(), *flags]
        with open(folder / "log.txt", "w") as log:
            run = subprocess.run(
                list(map(str, command)),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if run.returncode != 0:
            last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
            raise InputError(f"test_meta_dataset.py ended with code {run.returncode}: {' '.join(last)}")
    return runs.load(folder)


def markdown(found: dict[float, runs.Run]) -> str:
    """A table: by domain and value of the knob the accuracies, and the mean share of every adapter."""
    first = next(iter(found.values()))
    epsilons = first.merging[first.sources[0]]["epsilons"]
    levels = ", ".join(f"{e:g}" for e in epsilons) if isinstance(epsilons, list) else epsilons
    lines = [
        f"| domain | route_epsilon | {' | '.join(first.columns)} | n | mean shares of {levels} |",
        "|---" * (len(first.columns) + 4) + "|",
    ]
    for name in [*first.sources, *(name for name in first.averages if name not in first.sources)]:
        for epsilon, run in found.items():
            cells = [run.summary(name, column) for column in run.columns]
            rows = [row for source in run.averages.get(name, (name,)) for row in run.rows[source]]
            shares = [
                sum(column) / len(rows) for column in zip(*(r["coefficients"] for r in rows), strict=True)
            ]
            lines.append(
                f"| {name} | {epsilon:g} | {' | '.join(map(shown, cells))} | {cells[0].n} | "
                f"{' '.join(f'{share:.2f}' for share in shares)} |"
            )
    return "\n".join(lines)


def shown(summary: Summary) -> str:
    return f"{summary.mean:.1f}±{summary.interval:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--resume", type=Path, required=True, help="the pool")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "mini_demo_test.args")
    parser.add_argument("--out", type=Path, default=Path("results/route_epsilon"))
    parser.add_argument(
        "--knob", type=float, nargs="+", default=KNOB, metavar="E", help="its values, in 1/255"
    )
    parser.add_argument("--jobs", type=int, default=2, help="evaluations at a time")
    args, flags = parser.parse_known_args()
    resume = args.resume.resolve()

    with ThreadPoolExecutor(args.jobs) as executor:
        made = executor.map(lambda e: evaluate(args.out, args.recipe.resolve(), resume, e, flags), args.knob)
        found = dict(zip(args.knob, made, strict=True))
    print(markdown(found))
    first = next(iter(found.values()))
    picture = args.out / "route_epsilon.png"
    curves = {
        name: {
            column: [(epsilon, run.summary(name, column)) for epsilon, run in found.items()]
            for column in first.columns
        }
        for name in (*first.sources, "average")
        if first.summary(name, "clean") is not None
    }
    mixing_picture(picture, curves, "route_epsilon, in 1/255")
    print(f"\nwrote {picture}")


if __name__ == "__main__":
    exit_on_bad_input(main)
