"""Tables and pictures from results; computes nothing that is not in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from amt.evaluation.statistics import Summary
from amt.files.writing import replace_file

matplotlib.use("agg")

import matplotlib.pyplot as plt

TABLE_COLUMNS = 8  # in one table, so that it fits a wide terminal


def table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Summary | None]]],
    suspects: Sequence[Sequence[str | None]] = (),
) -> str:
    """A plain-text table of `mean +- interval` per domain and column, with the number of episodes; of many
    columns, several tables.

    Args:
        suspects: like `rows`, why a result is not to be believed; it gets a question mark, and a line below
            the table says why.
    """
    width = max(len(name) for name, _ in rows)
    cell = max(14, *(len(column) for column in columns))
    reasons: dict[tuple[str, str], list[str]] = {}
    blocks = []
    for first in range(0, len(columns), TABLE_COLUMNS):
        block = range(first, min(first + TABLE_COLUMNS, len(columns)))
        lines = [" ".join([" " * width, *(columns[j].rjust(cell) for j in block), "       n"])]
        for k, (name, summaries) in enumerate(rows):
            cells = []
            for j in block:
                reason = suspects[k][j] if suspects else None
                if reason:
                    reasons.setdefault((name, reason), []).append(columns[j])
                text = "-" if summaries[j] is None else f"{summaries[j]}{'?' if reason else ''}"
                cells.append(text.rjust(cell))
            n = next((s.n for s in summaries if s is not None), 0)
            lines.append(" ".join([name.ljust(width), *cells, f"{n:8d}"]))
        blocks.append("\n".join(lines))
    doubts = [f"suspect: {name} {', '.join(named)}: {why}" for (name, why), named in reasons.items()]
    return "\n".join(["\n\n".join(blocks), *doubts])


def corruption_table(corruptions: Mapping[str, Sequence[float]]) -> str:
    """A plain-text table of accuracies in per cent: a line per corruption and one for their mean, a column
    per severity and one for their mean.

    Args:
        corruptions: by name the accuracy in [0, 1] at each severity.
    """
    lines = {name: [100 * each for each in values] for name, values in corruptions.items()}
    lines["mean"] = [sum(each) / len(each) for each in zip(*lines.values(), strict=True)]
    width = max(map(len, lines))
    severities = range(1, len(lines["mean"]) + 1)
    head = " ".join([" " * width, *(f"{severity:6d}" for severity in severities), "  mean"])
    cells = {name: (*values, sum(values) / len(values)) for name, values in lines.items()}
    body = [" ".join([name.ljust(width), *(f"{c:6.1f}" for c in each)]) for name, each in cells.items()]
    return "\n".join([head, *body])


def accuracy_picture(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Summary]]]
) -> None:
    """Bars of accuracy per domain, one colour per column, with 95% intervals; written to `path` (.png)."""
    figure, axes = plt.subplots(figsize=(1.6 + 1.25 * len(rows), 3.6), layout="constrained")
    width = 0.8 / len(columns)
    colours = matplotlib.colormaps["viridis"]
    for k, column in enumerate(columns):
        places = [x - 0.4 + (k + 0.5) * width for x in range(len(rows))]
        axes.bar(
            places,
            [summaries[k].mean for _, summaries in rows],
            width * 0.92,
            yerr=[summaries[k].interval for _, summaries in rows],
            color=colours(0.15 + 0.7 * k / max(len(columns) - 1, 1)),
            error_kw={"elinewidth": 1, "ecolor": "0.3", "capsize": 2},
            label=column,
        )
    axes.set_xticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylabel("accuracy, per cent")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(columns), frameon=False)
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=150))
    plt.close(figure)


def mixing_picture(
    path: Path,
    curves: dict[str, dict[str, Sequence[tuple[float, Summary]]]],
    label: str = "share of the robust adapter",
) -> None:
    """One panel per domain: accuracy (per cent, with 95% intervals) against what is called `label`."""
    figure, panels = plt.subplots(
        1, len(curves), figsize=(2.6 * len(curves), 2.8), sharey=True, layout="constrained", squeeze=False
    )
    colours = matplotlib.colormaps["viridis"]
    for axes, (domain, columns) in zip(panels[0], curves.items(), strict=True):
        for k, (column, points) in enumerate(columns.items()):
            axes.errorbar(
                [share for share, _ in points],
                [summary.mean for _, summary in points],
                [summary.interval for _, summary in points],
                color=colours(0.1 + 0.7 * k / max(len(columns) - 1, 1)),
                marker="o",
                markersize=3,
                capsize=2,
                label=column,
            )
        axes.set_title(domain, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
        if len({tuple(each) for each in curves.values()}) > 1:  # panels of different columns
            axes.legend(frameon=False, fontsize=7)
    if not panels[0][0].get_legend():
        lines, names = panels[0][0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=8)
    panels[0][0].set_ylabel("accuracy, per cent")
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=150))
    plt.close(figure)
