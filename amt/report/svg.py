"""Figures as SVG for a page: real text in the page's font, colours from the page's style sheet.

The style sheet gives .s0 to .s5 a colour each and .d0 to .d4 a dash pattern; sizes are in pixels, meant to be
shown at about their own size, so that text stays legible on a phone.
"""

import itertools
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from amt.report import drawing
from amt.report.drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    Axis,
    Box,
    Figure,
    Panel,
    Series,
    Share,
    Style,
    along,
    asides,
    by_name,
    number,
    place_labels,
)
from amt.report.markup import Markup, element, join

SMALL = 12.0  # font size of everything but titles
_MARKERS = (
    "M0,0m-4.5,0a4.5,4.5 0 1 0 9,0a4.5,4.5 0 1 0 -9,0z",
    "M0,0m-4,-4h8v8h-8z",
    "M0,0m0,-5.5l5.2,9.2h-10.4z",
    "M0,0m0,-5.8l5.8,5.8l-5.8,5.8l-5.8,-5.8z",
    "M0,0m0,5.5l5.2,-9.2h-10.4z",
    "M0,0m-1.7,-5.2h3.4v3.5h3.5v3.4h-3.5v3.5h-3.4v-3.5h-3.5v-3.4h3.5z",
)


def figure_svg(figure: Figure) -> Markup:
    """All panels of a figure, and the legend they share."""
    panels = []
    for panel in figure.panels:
        if panel.labelled:  # one shape for wide screens and paper, one for phones
            panels.append(panel_svg(panel, figure.title, 560, 430, "wide"))
            panels.append(panel_svg(panel, figure.title, 350, 360, "narrow"))
        elif panel.y.names:
            lines = len(panel.y.names) * (14 + 12 * len(panel.series))
            panels.append(panel_svg(panel, figure.title, 350, 84 + lines))
        else:
            panels.append(panel_svg(panel, figure.title, 350, 250))
    return join([legend(figure), element("div", *panels, class_="panels")])


def legend(figure: Figure) -> Markup | None:
    """Which line is which; nothing where there is but one."""
    items = [element("li", swatch(style, dash), name) for name, style, dash in drawing.legend(figure)]
    return element("ul", *items, class_="legend") if items else None


def swatch(style: Style | None, dash: int | None = None) -> Markup:
    """What a series is drawn with: marker, line, or both."""
    width = 14 if dash is None else 38
    colour = "plain" if style is None else _colour(style)
    return element(
        "svg",
        None if dash is None else element("path", d=f"M0,8H{width}", class_=f"line {colour} {_dash(dash)}"),
        None if style is None else _marker(width / 2, 8, style, suspect=False),
        viewBox=f"0 0 {width} 16",
        width=width,
        height=16,
        aria_hidden="true",
    )


def panel_svg(panel: Panel, title: str, width: float, height: float, class_: str = "") -> Markup:
    """One panel, `width` by `height` pixels."""
    names = [_fitted(name, 0.34 * width) for name in panel.y.names]
    left = 12 + max((text_width(name) for name in names), default=40)
    room = (left, 32.0 if panel.title or panel.note else 10.0, width - 14, height - 44)
    x = _scale(panel.x, room[0], room[2])
    y = _scale(panel.y, room[1], room[3]) if panel.y.names else _scale(panel.y, room[3], room[1])
    parts = [
        _text(_fitted(panel.title, 0.68 * width, 13), 4, 16, class_="title"),
        _text(panel.note, width - 4, 16, class_="note", text_anchor="end"),
        *_grid(panel, x, y, room, names),
    ]
    if panel.zero:
        parts.append(element("line", x1=x(0), x2=x(0), y1=room[1], y2=room[3], class_="zero"))
    if panel.labelled:
        parts += _links(panel, x, y)
    for series, aside in zip(
        panel.series, asides(panel, *((12, math.inf) if names else (2.5, 12))), strict=True
    ):
        shift = (0.0, aside) if names else (aside if series.joined else 0.0, 0.0)
        parts.append(_series(series, x, y, shift))
    if panel.labelled:
        parts += _labels(panel, x, y, room)
    named = f"{title}{': ' if panel.title else ''}{panel.title}"
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        class_=f"panel {class_}".strip(),
        role="img",
        aria_label=f"{named}; the numbers are in the table below",
    )


def strip_svg(share: Share) -> Markup:
    """A box plot on a line from 0 to 100 per cent, for a cell of a heat map."""
    least, lower, median, upper, most = (2 + 0.6 * value for value in share.quartiles)
    return element(
        "svg",
        element("path", d="M2,6H62", class_="rail"),
        element("path", d=f"M{least:.1f},6H{most:.1f}", class_="reach"),
        element("rect", x=lower, y=3, width=max(upper - lower, 0.8), height=6, class_="box"),
        element("path", d=f"M{median:.1f},1V11", class_="median"),
        viewBox="0 0 64 12",
        width=64,
        height=12,
        class_="strip",
        aria_hidden="true",
    )


def text_width(text: str, size: float = SMALL) -> float:
    """How wide a text is at most in common sans-serif fonts, about."""
    return size * sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.61 for c in text)


def _fitted(text: str, width: float, size: float = SMALL) -> str:
    """The text, cut to a width."""
    if text_width(text, size) <= width:
        return text
    ends = itertools.accumulate(text_width(c, size) for c in text)
    return text[: sum(end <= width - size for end in ends)] + "…"


def _scale(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    reach = axis.high - axis.low
    return lambda value: start + (value - axis.low) / reach * (end - start)


def _text(content: str, x: float, y: float, **attributes: str) -> Markup | None:
    return element("text", content, x=x, y=y, **attributes) if content else None


def _grid(panel: Panel, x: Callable, y: Callable, room: Box, names: Sequence[str]) -> Iterable[Markup | None]:
    left, top, right, bottom = room
    for value in panel.x.ticks:
        yield element("line", x1=x(value), x2=x(value), y1=top, y2=bottom, class_="grid")
        yield _text(number(value), x(value), bottom + 16, text_anchor="middle")
    for value in panel.y.ticks:
        yield element("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid")
        yield _text(number(value), left - 6, y(value) + 4, text_anchor="end")
    for k, (name, full) in enumerate(zip(names, panel.y.names, strict=True)):
        yield element("line", x1=left, x2=right, y1=y(k + 0.5), y2=y(k + 0.5), class_="grid")
        hint = element("title", full) if name != full else None
        yield element("text", name, hint, x=left - 6, y=y(k) + 4, text_anchor="end")
    yield element("path", d=f"M{left:.1f},{top:.1f}V{bottom:.1f}H{right:.1f}", class_="frame")
    yield _text(panel.x.label, (left + right) / 2, bottom + 36, text_anchor="middle", class_="axis")
    if panel.y.label:
        place = f"translate(13 {(top + bottom) / 2:.1f}) rotate(-90)"
        yield element("text", panel.y.label, transform=place, text_anchor="middle", class_="axis")


def _series(series: Series, x: Callable, y: Callable, shift: tuple[float, float]) -> Markup:
    parts = []
    places = [(x(point.x) + shift[0], y(point.y) + shift[1]) for point in series.points]
    if series.joined:
        path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(
            element("path", d=path, class_=f"line {_colour(series.style)} {_dash(series.style.dash)}")
        )
    for point, (px, py) in zip(series.points, places, strict=True):
        spans = ""
        if point.y_span:
            spans += f"M{px:.1f},{y(point.y_span[0]) + shift[1]:.1f}V{y(point.y_span[1]) + shift[1]:.1f}"
        if point.x_span:
            spans += f"M{x(point.x_span[0]) + shift[0]:.1f},{py:.1f}H{x(point.x_span[1]) + shift[0]:.1f}"
        bars = element("path", d=spans, class_=f"span {_colour(series.style)}") if spans else None
        marker = _marker(px, py, series.style, point.suspect, small=series.joined)
        parts.append(element("g", element("title", point.says), bars, marker))
    return element("g", *parts)


def _marker(x: float, y: float, style: Style, suspect: bool, small: bool = False) -> Markup:
    """Hollow where the number is suspect."""
    place = f"translate({x:.1f} {y:.1f})" + " scale(.78)" * small
    path = _MARKERS[style.marker % MARKERS]
    return element("path", d=path, transform=place, class_=f"mark {_colour(style)}" + " hollow" * suspect)


def _dash(dash: int) -> str:
    return f"d{dash % DASHES}"


def _colour(style: Style) -> str:
    return f"s{style.colour % COLOURS}"


def _links(panel: Panel, x: Callable, y: Callable) -> Iterable[Markup]:
    for start, end in drawing.links(panel):
        path = f"M{x(start.x):.1f},{y(start.y):.1f}L{x(end.x):.1f},{y(end.y):.1f}"
        yield element("path", d=path, class_="link")


def _labels(panel: Panel, x: Callable, y: Callable, room: Box) -> Iterable[Markup]:
    """A name per domain, beside its first point."""
    first = {name: points[0] for name, points in by_name(panel).items()}
    texts = [_fitted(name, 0.4 * (room[2] - room[0])) for name in first]
    anchors = [(x(point.x), y(point.y)) for point in first.values()]
    obstacles: list[Box] = []
    for start, end in drawing.links(panel):
        obstacles += along((x(start.x), y(start.y)), (x(end.x), y(end.y)))
    for point in (point for series in panel.series for point in series.points):
        px, py = x(point.x), y(point.y)
        obstacles.append((px - 6, py - 6, px + 6, py + 6))
        if point.x_span:
            obstacles.append((x(point.x_span[0]), py - 1, x(point.x_span[1]), py + 1))
        if point.y_span:
            obstacles.append((px - 1, y(point.y_span[1]), px + 1, y(point.y_span[0])))
    sizes = [(text_width(text), SMALL + 2) for text in texts]
    inner = (room[0] + 2, room[1], room[2], room[3] - 2)
    boxes = place_labels(anchors, sizes, inner, obstacles, gap=9)
    for text, (left, _, right, bottom), (px, py) in zip(texts, boxes, anchors, strict=True):
        middle, height = (left + right) / 2, bottom - SMALL / 2
        if max(abs(px - middle) - (right - left) / 2, abs(py - height) - SMALL / 2) > 16:
            near = min(max(px, left), right)
            yield element("path", d=f"M{px:.1f},{py:.1f}L{near:.1f},{height:.1f}", class_="link")
        yield element("text", text, x=middle, y=bottom - 3.0, text_anchor="middle", class_="label")
