"""Draw the figure of results: clean against robust accuracy, read from the table of the mini study.

    python docs/figures/draw_results.py [--table docs/results/mini-study.md] [--out docs/figures/results.svg]

Bars are averages over the five unseen domains at 5 shots with 95% intervals; nothing is typed in here.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "amt", "font.family": "sans-serif"}
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
HEAD = "| 5-shot |"
CHANCE = 20  # per cent, 5-way


class Point(NamedTuple):
    """A method's averages in per cent, with half-widths of their intervals."""

    method: str
    clean: tuple[float, float]
    robust: tuple[float, float]


def points(table: str) -> list[Point]:
    """The rows of the 5-shot table: method, and of its last column clean and at the smaller epsilon."""
    lines = table[table.index(HEAD) :].split("\n\n", 1)[0].splitlines()[2:]
    found = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        clean, weak, _strong = ((float(a), float(b)) for a, b in re.findall(r"([\d.]+)±([\d.]+)", cells[-1]))
        found.append(Point(cells[0], clean, weak))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=HERE.parent / "results" / "mini-study.md")
    parser.add_argument("--out", type=Path, default=HERE / "results.svg")
    args = parser.parse_args()
    found = points(args.table.read_text(encoding="utf-8"))
    figure, ax = plt.subplots(figsize=(7.2, 4.2))
    for shift, name, colour in ((0.2, "clean", "#2e86ab"), (-0.2, "robust", "#e4572e")):
        means, errors = zip(*(getattr(point, name) for point in found), strict=True)
        places = [-row + shift for row in range(len(found))]
        label = "clean" if name == "clean" else "under PGD-20 at the smaller epsilon"
        ax.barh(places, means, 0.38, xerr=errors, color=colour, ecolor="0.2", capsize=2, label=label)
    ax.axvline(CHANCE, color="0.3", linestyle=":", linewidth=1)
    ax.text(CHANCE + 0.5, 0.55, "chance", fontsize=8, color="0.3")
    ax.set(xlim=(0, 100), ylim=(0.5 - len(found), 0.95), xlabel="accuracy, per cent (5-way 5-shot)")
    ax.set_yticks([-row for row in range(len(found))], [point.method for point in found])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(args.out, bbox_inches="tight", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
