"""Draw the picture of the method: a pool is meta-trained once, and merged anew for every task.

python docs/figures/draw_method.py [--out docs/figures/method.svg]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "amt", "font.family": "sans-serif"}
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

INK, PAPER = "#22303c", "#ffffff"
FROZEN, ROBUST, CLEAN, TASK = "#d9dee3", "#e4572e", "#2e86ab", "#5f9e6e"
LEVELS = (("8/255", 1.0), ("6/255", 0.75), ("0.1/255", 0.35), ("0.01/255", 0.2))


def box(ax: Axes, x: float, y: float, size: tuple[float, float], text: str, colour: str, alpha=1.0) -> None:
    """A rounded box with its lower left corner at (x, y), and a text in its middle."""
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x, y), *size, boxstyle=style, facecolor=PAPER, edgecolor="none"))
    ax.add_patch(FancyBboxPatch((x, y), *size, boxstyle=style, facecolor=colour, alpha=alpha, edgecolor=INK))
    middle = x + size[0] / 2, y + size[1] / 2
    ax.text(*middle, text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.4)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.3))


def draw_training(ax: Axes) -> None:
    ax.text(0.2, 5.55, "Meta-training, once", fontsize=13, fontweight="bold", color=INK)
    box(ax, 0.2, 3.7, (2.3, 1.3), "a few-shot task\nof the source data", TASK, 0.35)
    box(ax, 0.2, 1.9, (2.3, 1.3), "attack the images\n(pyramid of grids)", ROBUST, 0.35)
    box(ax, 0.2, 0.1, (2.3, 1.3), "attack the weights\n(factors move uphill)", ROBUST, 0.35)
    arrow(ax, (1.35, 3.7), (1.35, 3.2))
    arrow(ax, (1.35, 1.9), (1.35, 1.4))
    arrow(ax, (2.5, 0.75), (4.0, 1.9))
    ax.text(3.2, 1.65, "descend", ha="right", fontsize=9, color=INK)


def draw_pool(ax: Axes) -> None:
    ax.text(4.0, 5.05, "pool of LoRAs, one per level", fontsize=10, color=INK)
    for row, (level, strength) in enumerate(LEVELS):
        y = 4.25 - 0.72 * row
        box(ax, 4.0, y, (2.6, 0.58), f"$B_{row + 1} A_{row + 1}$   {level}", ROBUST, 0.15 + 0.5 * strength)
    box(ax, 4.0, 0.6, (2.6, 1.0), "frozen residual $W_{res}$\n(pretrained ViT)", FROZEN)


def draw_task(ax: Axes) -> None:
    ax.text(8.0, 5.55, "A new task, each time", fontsize=13, fontweight="bold", color=INK)
    box(ax, 8.0, 3.7, (2.3, 1.3), "labelled pictures\nscore the adapters", CLEAN, 0.3)
    box(ax, 8.0, 1.9, (2.3, 1.3), "merge the best\n$W_{res}+\\Sigma_p c_p B_p A_p$", CLEAN, 0.3)
    box(ax, 8.0, 0.1, (2.3, 1.3), "classify queries\nby prototypes", CLEAN, 0.3)
    arrow(ax, (6.6, 4.0), (8.0, 4.3))
    arrow(ax, (6.6, 1.4), (8.0, 2.3))
    arrow(ax, (9.15, 3.7), (9.15, 3.2))
    arrow(ax, (9.15, 1.9), (9.15, 1.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("method.svg"))
    args = parser.parse_args()
    figure, ax = plt.subplots(figsize=(10.6, 5.9))
    ax.set_xlim(0, 10.6)
    ax.set_ylim(0, 5.9)
    ax.axis("off")
    for draw in (draw_training, draw_pool, draw_task):
        draw(ax)
    figure.savefig(args.out, bbox_inches="tight", facecolor=PAPER, metadata={"Date": None})


if __name__ == "__main__":
    main()
