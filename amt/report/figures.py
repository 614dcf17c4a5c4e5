"""Figures on paper: the same points and intervals as on the page, as PNG and PDF."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

from amt.files.writing import replace_file
from amt.report import drawing
from amt.report.drawing import (
    Box,
    Figure,
    HeatMap,
    Panel,
    Series,
    Style,
    along,
    asides,
    by_name,
    number,
    place_labels,
)

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

# As many as in `drawing`; the colours are those of Okabe & Ito, as on the page in light.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#1a1d21")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (10, 3)))
SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text, as journals ask for
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "text.parse_math": False,  # a name from a file may hold a dollar sign
}


def write(figures: Sequence[Figure | HeatMap], folder: Path) -> list[Path]:
    """Write every figure as SLUG.png and SLUG.pdf; the paths.

    Raises:
        InputError: the folder cannot be written to.
    """
    written = []
    for figure in figures:
        with plt.rc_context(SETTINGS):
            drawn = _heat_map(figure) if isinstance(figure, HeatMap) else _panels(figure)
            # A PDF says when it was made, unless told not to: the same runs give the same bytes.
            for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
                path = folder / f"{figure.slug}.{kind}"
                replace_file(path, partial(drawn.savefig, format=kind, metadata=metadata))
                written.append(path)
            plt.close(drawn)
    return written


def _panels(figure: Figure) -> plt.Figure:
    if figure.panels[0].labelled:
        across, width, height = 1, 5.2, 4.2
    else:
        names = max(len(panel.y.names) for panel in figure.panels)
        most = max(len(panel.series) for panel in figure.panels)
        across, width = min(len(figure.panels), 3), 2.6 + 0.6 * bool(names)
        height = 0.9 + names * (0.14 + 0.12 * most) if names else 2.2
    down = -(-len(figure.panels) // across)
    drawn, axes = plt.subplots(
        down, across, figsize=(width * across, height * down + 0.7), layout="constrained", squeeze=False
    )
    for each, panel in zip(axes.flat, figure.panels, strict=False):
        _draw(each, panel)
    for each in list(axes.flat)[len(figure.panels) :]:
        each.set_visible(False)
    handles = [_handle(*item) for item in drawing.legend(figure)]
    if handles:
        drawn.legend(
            handles=handles, loc="outside upper center", ncols=min(len(handles), 4), handlelength=3.2
        )
    drawn.supxlabel(figure.caption, fontsize=6.5, color="0.35", wrap=True)
    for each, panel in zip(axes.flat, figure.panels, strict=False):
        if panel.labelled:
            drawn.canvas.draw()  # places are known only now
            _label(each, panel)
    return drawn


def _handle(name: str, style: Style | None, dash: int | None) -> Line2D:
    """An entry of the legend: marker, line, or both."""
    return Line2D(
        *([], []),
        color="0.2" if style is None else COLOURS[style.colour % len(COLOURS)],
        marker="" if style is None else MARKERS[style.marker % len(MARKERS)],
        markersize=4.5,
        linestyle="none" if dash is None else DASHES[dash % len(DASHES)],
        linewidth=1.3,
        label=name,
    )


def _draw(axes: Axes, panel: Panel) -> None:
    if panel.title:
        axes.set_title(_short(panel.title, 18), loc="left", fontweight="bold")
    if panel.note:
        axes.set_title(panel.note, loc="right", fontsize=7, color="0.35")
    axes.set_xlabel(panel.x.label)
    axes.set_ylabel(panel.y.label)
    axes.set_xlim(panel.x.low, panel.x.high)
    axes.set_ylim(panel.y.low, panel.y.high)
    axes.set_xticks(panel.x.ticks, [number(tick) for tick in panel.x.ticks])
    if panel.y.names:
        axes.set_yticks(range(len(panel.y.names)), map(_short, panel.y.names))
        axes.invert_yaxis()
    else:
        axes.set_yticks(panel.y.ticks, [number(tick) for tick in panel.y.ticks])
    if panel.zero:
        axes.axvline(0, color="0.2", linewidth=0.8, linestyle=(0, (4, 3)))
    if panel.labelled:
        for start, end in drawing.links(panel):
            axes.plot([start.x, end.x], [start.y, end.y], color="0.6", linewidth=0.6, zorder=1)
    reach = panel.x.high - panel.x.low
    lanes = asides(panel, math.inf, 0.6) if panel.y.names else asides(panel, 0.01 * reach, 0.04 * reach)
    for series, aside in zip(panel.series, lanes, strict=True):
        _series(axes, series, aside if series.joined else 0, aside if panel.y.names else 0)


def _series(axes: Axes, series: Series, dx: float, dy: float) -> None:
    style = series.style
    colour = COLOURS[style.colour % len(COLOURS)]
    places = [(point.x + dx, point.y + dy) for point in series.points]
    axes.plot(
        [x for x, _ in places],
        [y for _, y in places],
        color=colour,
        marker=MARKERS[style.marker % len(MARKERS)],
        markersize=3.5 if series.joined else 4.5,
        linestyle=DASHES[style.dash % len(DASHES)] if series.joined else "none",
        linewidth=1.2,
        clip_on=False,
    )
    for point, (x, y) in zip(series.points, places, strict=True):
        if point.x_span:
            axes.plot([end + dx for end in point.x_span], [y, y], color=colour, linewidth=1)
        if point.y_span:
            axes.plot([x, x], [end + dy for end in point.y_span], color=colour, linewidth=1)
        if point.suspect:
            marker = MARKERS[style.marker % len(MARKERS)]
            axes.plot(x, y, marker, markersize=3.8, color=colour, markerfacecolor="white", clip_on=False)


def _label(axes: Axes, panel: Panel) -> None:
    """A name per domain, beside its first point."""
    renderer = axes.figure.canvas.get_renderer()
    first = {name: points[0] for name, points in by_name(panel).items()}
    texts = [
        axes.text(0, 0, _short(name), fontsize=8, ha="left", va="bottom", in_layout=False) for name in first
    ]
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    to_pixels = axes.transData.transform
    anchors = [tuple(to_pixels((point.x, point.y))) for point in first.values()]
    obstacles: list[Box] = []
    for start, end in drawing.links(panel):
        obstacles += along(*to_pixels(((start.x, start.y), (end.x, end.y))))
    for point in (point for series in panel.series for point in series.points):
        (left, low), (right, high) = to_pixels(
            [
                ((point.x_span or (point.x,))[0], (point.y_span or (point.y,))[0]),
                ((point.x_span or (point.x,))[-1], (point.y_span or (point.y,))[-1]),
            ]
        )
        x, y = to_pixels((point.x, point.y))
        obstacles += [(x - 4, y - 4, x + 4, y + 4), (left, y - 1, right, y + 1), (x - 1, low, x + 1, high)]
    room = axes.get_window_extent(renderer)
    boxes = place_labels(anchors, sizes, (room.x0 + 2, room.y0 + 2, room.x1, room.y1), obstacles, gap=6)
    for text, box in zip(texts, boxes, strict=True):
        text.set_position(axes.transData.inverted().transform(box[:2]))


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _heat_map(heat: HeatMap) -> plt.Figure:
    down, across = len(heat.rows), len(heat.columns)
    longest = max(len(_short(name)) for name in heat.rows)
    drawn, axes = plt.subplots(
        figsize=(0.9 + 0.06 * longest + 0.95 * across, 1.3 + 0.5 * down), layout="constrained"
    )
    axes.set(xlim=(0, across), ylim=(down, 0))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks([k + 0.5 for k in range(across)], heat.columns)
    axes.set_yticks([k + 0.5 for k in range(down)], map(_short, heat.rows))
    for i, line in enumerate(heat.cells):
        for j, share in enumerate(line):
            if share is None:
                axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color="0.4")
                continue
            mean = share.summary.mean
            axes.add_patch(
                plt.Rectangle((j, i), 0.97, 0.94, color=COLOURS[0], alpha=0.42 * mean / 100, linewidth=0)
            )
            half = f" ±{share.summary.interval:.1f}" if share.summary.n > 1 else ""
            axes.text(j + 0.48, i + 0.34, f"{mean:.1f}{half}", ha="center", va="center")
            least, lower, median, upper, most = (j + 0.12 + 0.72 * value / 100 for value in share.quartiles)
            axes.plot([j + 0.12, j + 0.84], [i + 0.72] * 2, color="0.75", linewidth=0.6)
            axes.plot([least, most], [i + 0.72] * 2, color="0.1", linewidth=0.8)
            axes.add_patch(
                plt.Rectangle(
                    (lower, i + 0.64), upper - lower, 0.16, facecolor="white", edgecolor="0.1", linewidth=0.7
                )
            )
            axes.plot([median, median], [i + 0.6, i + 0.84], color="0.1", linewidth=1.3)
    drawn.supxlabel(heat.caption, fontsize=6.5, color="0.35", wrap=True)
    return drawn
