"""What a network is merged of, drawn as bars: a domain each, an adapter's mean share a part of it."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from amt.report.lettering import short
from amt.report.panels import HeatMap, Share
from amt.report.svg import COLOURS, MUTED, PAGE, mark

DARKEST, PALEST = 0.52, 0.08  # of the first adapter and the last: text is read on all of them
LEAST_NAMED = 15  # per cent: what a number fits into


def bars(heat: HeatMap, width: float) -> Figure:
    """The bars of one run, `width` inches wide, below a legend of the adapters."""
    entries = [Patch(label=name, **shade(k, len(heat.columns))) for k, name in enumerate(heat.columns)]
    across = min(len(entries), max(1, int(width / 0.95)))
    lines = -(-len(entries) // across)
    drawing = Figure(figsize=(width, 0.75 + 0.2 * lines + 0.34 * len(heat.rows)), layout="constrained")
    axes = drawing.subplots()
    axes.set(xlim=(0, 100), ylim=(len(heat.rows) - 0.5, -0.5), xlabel="share, per cent")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks((0, 25, 50, 75, 100))
    axes.set_yticks(range(len(heat.rows)), [short(name, 18) for name in heat.rows])
    for label, name in zip(axes.get_yticklabels(), heat.rows, strict=True):
        mark(label, "name", [name], "text")
    for row, line in enumerate(heat.cells):
        _draw_bar(axes, row, line)
    drawing.legend(handles=entries, loc="outside upper center", ncols=across, handlelength=1.2)
    return drawing


def shade(k: int, count: int) -> dict:
    """How adapter k of `count` is filled."""
    alpha = DARKEST - (DARKEST - PALEST) * k / max(count - 1, 1)
    return {"facecolor": (COLOURS[0], alpha), "edgecolor": PAGE, "linewidth": 1}


def _draw_bar(axes: Axes, row: int, line: tuple[Share | None, ...]) -> None:
    left = 0.0
    for k, share in enumerate(line):
        mean = 0.0 if share is None else share.summary.mean
        axes.barh(row, mean, 0.72, left, **shade(k, len(line)))
        if mean >= LEAST_NAMED:
            axes.text(left + mean / 2, row, f"{mean:.0f}", ha="center", va="center_baseline")
        left += mean
    if left == 0:
        axes.text(50, row, "–", ha="center", va="center", color=MUTED)
