"""The figures of a report, drawn by matplotlib: SVG for the page, PNG and PDF for paper, pictures of results.

One drawing serves all. Nothing here depends on pyplot's state.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import textalloc
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from amt.evaluation.statistics import Summary
from amt.report.lettering import printable, short
from amt.report.panels import Axis, Figure, HeatMap, Panel, Point, Series, Style, distinct, legend, links
from amt.report.shares import bars
from amt.report.shown import has_interval
from amt.report.svg import COLOURS, LINE, MUTED, PAGE, TEXT, mark, svg_element
from amt.report.tables import number
from meta_dataset_readers.files import replace_file

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (10, 3)))
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": TEXT,
    "axes.titlesize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text, as journals ask for
    "svg.fonttype": "none",  # text in SVG stays text, too
    "savefig.dpi": 200,
    "text.parse_math": False,  # a name from a file may hold a dollar sign
}
WIDE, NARROW = (5.2, 5.2), (3.0, 3.1)  # inches, of a panel whose points carry names
LARGE = (5.6, 3.3)  # of the one that comes first


# --- for paper -------------------------------------------------------------------------------------------


def write(figures: Sequence[Figure | HeatMap], folder: Path) -> list[Path]:
    """Write every figure as SLUG.png and SLUG.pdf; the paths.

    Raises:
        InputError: the folder cannot be written to.
    """
    written = []
    for figure in figures:
        with matplotlib.rc_context(SETTINGS):
            if isinstance(figure, HeatMap):
                drawing = bars(figure, LARGE[0])
            else:
                drawing = compose(figure.panels, min(len(figure.panels), 3), entries=legend(figure.panels))
            drawing.supxlabel(printable(figure.caption), fontsize=6.5, color=MUTED, wrap=True)
            # A PDF says when it was made, unless told not to: the same runs give the same bytes.
            for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
                path = folder / f"{figure.slug}.{kind}"
                _save(drawing, path, metadata)
                written.append(path)
    return written


def _save(drawing: Drawing, path: Path, metadata: Mapping | None = None) -> None:
    content = io.BytesIO()
    drawing.savefig(content, format=path.suffix[1:], metadata=metadata, facecolor=PAGE)
    replace_file(path, content.getvalue())


def accuracy_picture(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Summary]]]
) -> None:
    """Bars of accuracy per domain, one colour per column, with 95% intervals; written to `path` (.png)."""
    with matplotlib.rc_context(SETTINGS):
        drawing = Drawing(figsize=(1.6 + 1.25 * len(rows), 3.6), layout="constrained")
        axes = drawing.subplots()
        width = 0.8 / len(columns)
        colours = matplotlib.colormaps["viridis"]
        for k, column in enumerate(columns):
            axes.bar(
                [x - 0.4 + (k + 0.5) * width for x in range(len(rows))],
                [summaries[k].mean for _, summaries in rows],
                width * 0.92,
                yerr=[s[k].interval if has_interval(s[k]) else 0 for _, s in rows],
                color=colours(0.15 + 0.7 * k / max(len(columns) - 1, 1)),
                error_kw={"elinewidth": 1, "ecolor": MUTED, "capsize": 2},
                label=short(column, 40),
            )
        axes.set_xticks(range(len(rows)), [short(name) for name, _ in rows])
        axes.set_ylabel("accuracy, per cent")
        axes.set_ylim(0, 100)
        axes.grid(False, axis="x")
        drawing.legend(loc="outside upper center", ncols=len(columns))
        _save(drawing, path)


def mixing_picture(
    path: Path,
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, Summary]]]],
    label: str = "share of the robust adapter",
) -> None:
    """One panel per domain: accuracy (per cent, with 95% intervals) against what is called `label`."""
    names = list(dict.fromkeys(column for columns in curves.values() for column in columns))
    panels = [
        Panel(
            domain,
            "",
            Axis(label),
            Axis("accuracy, per cent", 0, 100, 100, (0, 25, 50, 75, 100)),
            tuple(_mixed(column, names.index(column), points) for column, points in columns.items()),
        )
        for domain, columns in curves.items()
    ]
    with matplotlib.rc_context(SETTINGS):
        drawing = compose(panels, len(panels), entries=legend(panels))
        _save(drawing, path)


def _mixed(column: str, place: int, found: Sequence[tuple[float, Summary]]) -> Series:
    points = []
    for share, s in found:
        span = (s.mean - s.interval, s.mean + s.interval) if has_interval(s) else None
        points.append(Point(share, s.mean, None, span, "", ""))
    return Series(column, distinct(place), tuple(points), joined=True, lane=place)


# --- for the page ----------------------------------------------------------------------------------------


def drawings(figure: Figure | HeatMap) -> list[Markup]:
    """A figure as SVG: a drawing per panel, where points carry names one for wide screens and paper and one
    for phones."""
    found = []
    if isinstance(figure, HeatMap):
        for classes, width in (("panel wide", LARGE[0]), ("panel narrow", NARROW[0])):
            with matplotlib.rc_context(SETTINGS):
                drawing = bars(figure, width)
                found.append(svg_element(drawing, classes, figure.title, f"{figure.slug} {classes}"))
        return found
    for k, panel in enumerate(figure.panels):
        title = f"{figure.title}{': ' if panel.title else ''}{panel.title}"
        sizes = [("panel", None)]
        if panel.labelled or panel.large:
            sizes = [("panel wide", WIDE if panel.labelled else LARGE), ("panel narrow", NARROW)]
        for classes, size in sizes:
            with matplotlib.rc_context(SETTINGS):
                found.append(
                    svg_element(compose([panel], 1, size), classes, title, f"{figure.slug} {k} {classes}")
                )
    return found


def swatch(style: Style | None, dash: int | None, salt: str) -> Markup:
    """What a series is drawn with: marker, line, or both; `salt` is another for each swatch of a page."""
    with matplotlib.rc_context(SETTINGS):
        width = 10 if dash is None else 24
        drawing = Drawing(figsize=(width / 72, 10 / 72))
        line = _handle("", style, dash)
        line.set_data([1, width / 2, width - 1], [5, 5, 5])
        line.set_markevery([1])
        drawing.add_artist(line)
        line.set_transform(drawing.dpi_scale_trans + Affine2D().scale(1 / 72))
        return svg_element(drawing, "swatch", None, salt)


# --- drawing ---------------------------------------------------------------------------------------------


def compose(
    panels: Sequence[Panel],
    across: int,
    size: tuple[float, float] | None = None,
    entries: Sequence[tuple[str, Style | None, int | None]] = (),
) -> Drawing:
    """Panels side by side, `across` in a line, below a legend of these entries.

    Args:
        size: of one panel in inches; by default what its kind needs.
    """
    width, height = size or _size(panels)
    down = -(-len(panels) // across)
    drawing = Drawing(figsize=(width * across, height * down + 0.7 * bool(entries)), layout="constrained")
    grid = drawing.subplots(down, across, squeeze=False).flat
    if entries:
        handles = [_handle(*entry) for entry in entries]
        widest = 0.55 + 0.075 * max(len(str(each.get_label())) for each in handles)  # inches, roughly
        ncols = min(len(handles), max(1, int(width * across / widest)))
        drawing.legend(handles=handles, loc="outside upper center", ncols=ncols, handlelength=3.2)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(drawing.axes, panels, strict=False):
        if panel.labelled:  # last, since places are known only now
            _label(axes, panel)
    return drawing


def _size(panels: Sequence[Panel]) -> tuple[float, float]:
    if panels[0].labelled or panels[0].large:
        return WIDE if panels[0].labelled else LARGE
    names = max(len(panel.y.names) for panel in panels)
    most = max(len(panel.series) for panel in panels)
    return 3.0, (0.75 + names * (0.13 + 0.1 * most) if names else 2.2)


def _handle(name: str, style: Style | None, dash: int | None) -> Line2D:
    """An entry of the legend: marker, line, or both."""
    return Line2D(
        *([], []),
        color=TEXT if style is None else COLOURS[style.colour % len(COLOURS)],
        marker="" if style is None else MARKERS[style.marker % len(MARKERS)],
        markersize=5,
        linestyle="none" if dash is None else DASHES[dash % len(DASHES)],
        linewidth=1.3,
        label=short(name, 40),
    )


def _draw(axes: Axes, panel: Panel) -> None:
    title = axes.set_title(short(panel.title, 20), loc="left", fontweight="bold")
    mark(title, "title", [panel.title] * bool(panel.title), "text")
    axes.set_title(short(panel.note, 30), loc="right", fontsize=7, color=MUTED)
    points = [point for series in panel.series for point in series.points]
    axes.set_xlim(limits(panel.x, [end for p in points for end in (p.x_span or (p.x, p.x))]))
    axes.set_ylim(limits(panel.y, [end for p in points for end in (p.y_span or (p.y, p.y))]))
    _draw_axes(axes, panel)
    if panel.labelled:
        for start, end in links(panel):
            axes.plot([start.x, end.x], [start.y, end.y], color=MUTED, linewidth=0.5, alpha=0.7, zorder=1)
    for series in panel.series:
        _draw_series(axes, series, *_aside(axes, panel, series))


def _draw_axes(axes: Axes, panel: Panel) -> None:
    """Ticks or names, labels and rules."""
    for axis, described in ((axes.xaxis, panel.x), (axes.yaxis, panel.y)):
        if described.ticks:
            axis.set_ticks(described.ticks, [number(tick) for tick in described.ticks])
        else:
            most = 3 if panel.y.names else 5
            axis.set_major_locator(MaxNLocator(most, steps=(1, 2, 2.5, 5, 10)))
    # Beside names an axis is short: its label may begin below them.
    axes.set_xlabel(short(panel.x.label, 60), loc="right" if panel.y.names else "center")
    axes.set_ylabel(short(panel.y.label, 60))
    for value in panel.x.rules:
        axes.axvline(value, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
    for value in panel.y.rules:
        axes.axhline(value, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
        if panel.y.rule_name:
            place = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            look = {"ha": "right", "va": "bottom", "fontsize": 7, "color": MUTED}
            mark(axes.annotate(panel.y.rule_name, xytext=(0, 1.5), **place, **look), "label")
    if panel.y.names:
        _name_rows(axes, panel.y.names)


def limits(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: its values, its rules, and a margin, since a marker needs some room."""
    if axis.names:
        return len(axis.names) - 0.5, -0.5
    sighted = [*values, *axis.rules]
    low, high = min(sighted), max(sighted)
    middle, half = (low + high) / 2, max(high - low, axis.least) / 2
    if half < 1e-9 * max(abs(middle), 1):  # a single value, at which there is nothing to see
        half = 0.1 * max(abs(middle), 1)
    shift = max(axis.low - (middle - half), 0) + min(axis.high - (middle + half), 0)
    low, high = max(middle - half + shift, axis.low), min(middle + half + shift, axis.high)
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        mark(label, "name", [name], "text")
    axes.grid(False, axis="y")
    for k in range(1, len(names)):
        axes.axhline(k - 0.5, color=LINE, linewidth=0.8, zorder=0.5)


def _aside(axes: Axes, panel: Panel, series: Series) -> tuple[float, float]:
    """How far a series stands aside of its values: those of other lanes would hide its intervals."""
    lanes = sorted({each.lane for each in panel.series})
    place = lanes.index(series.lane) - (len(lanes) - 1) / 2
    if panel.y.names:
        return 0, place * 0.6 / len(lanes)
    left, right = axes.get_xlim()
    return (place * min(0.01, 0.04 / len(lanes)) * (right - left) if series.joined else 0), 0


def _draw_series(axes: Axes, series: Series, dx: float, dy: float) -> None:
    colour = COLOURS[series.style.colour % len(COLOURS)]
    look = {"color": colour, "marker": MARKERS[series.style.marker % len(MARKERS)], "clip_on": False}
    look |= {"markersize": 3.6 if series.joined else 4.6, "markeredgewidth": 0.9}
    _draw_intervals(axes, series.points, dx, dy, colour)
    (line,) = axes.plot(
        [p.x + dx for p in series.points],
        [p.y + dy for p in series.points],
        linestyle=DASHES[series.style.dash % len(DASHES)] if series.joined else "none",
        linewidth=1.2,
        **look,
    )
    mark(line, "series", [p.says for p in series.points])
    if doubted := [p for p in series.points if p.suspect]:
        xs, ys = [p.x + dx for p in doubted], [p.y + dy for p in doubted]
        (hollow,) = axes.plot(xs, ys, linestyle="none", markerfacecolor=PAGE, **look)
        mark(hollow, "hollow", [p.says for p in doubted])


def _draw_intervals(axes: Axes, points: Sequence[Point], dx: float, dy: float, colour: str) -> None:
    upright = [(p.x + dx, p.y_span[0] + dy, p.y_span[1] + dy) for p in points if p.y_span]
    level = [(p.y + dy, p.x_span[0] + dx, p.x_span[1] + dx) for p in points if p.x_span]
    if upright:
        axes.vlines(*zip(*upright, strict=True), color=colour, linewidth=0.9)
    if level:
        axes.hlines(*zip(*level, strict=True), color=colour, linewidth=0.9)


def _label(axes: Axes, panel: Panel) -> None:
    """A name per domain, beside its first point; where there is no room, the table alone has it."""
    points = [point for series in panel.series for point in series.points]
    first = list({point.name: point for point in reversed(points)}.values())[::-1]
    lines = [((start.x, end.x), (start.y, end.y)) for start, end in links(panel)]
    lines += [(p.x_span, (p.y, p.y)) for p in points if p.x_span]
    lines += [((p.x, p.x), p.y_span) for p in points if p.y_span]
    *_, texts, _ = textalloc.allocate(
        axes,
        [p.x for p in first],
        [p.y for p in first],
        [short(p.name, 18) for p in first],
        x_scatter=[p.x for p in points],
        y_scatter=[p.y for p in points],
        x_lines=[list(x) for x, _ in lines],
        y_lines=[list(y) for _, y in lines],
        textsize=8,
        textcolor=TEXT,
        max_distance=0.5,
        nbr_candidates=1000,
        avoid_label_lines_overlap=True,
        draw_all=False,
        linecolor=MUTED,
        linewidth=0.4,
    )
    for text in (each for each in texts if isinstance(each, Text)):
        text.set_in_layout(False)
        mark(text, "label")
