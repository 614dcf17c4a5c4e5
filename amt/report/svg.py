"""A drawing of matplotlib as an SVG element of a page: in the page's font, its colours variables of the style
sheet, which has a light and a dark value for each.

What SVG can say beyond matplotlib, a class and titles that appear under the pointer, travels in an artist's
gid as JSON.
"""

import io
import json
import re
import warnings
from collections.abc import Sequence
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.figure import Figure

# The colours of series are those of Okabe & Ito, which colour-blind readers tell apart; markers and dashes
# say the same once more. The page's style sheet gives the variables these values in light.
TEXT, MUTED, LINE, PAGE = "#1a1d21", "#55606b", "#d3d9df", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", TEXT)
VARIABLES = {colour: f"var(--c{k})" for k, colour in enumerate(COLOURS)} | {
    TEXT: "var(--text)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAGE: "var(--page)",
}
XLINK = "{http://www.w3.org/1999/xlink}"
PIXELS = 1.6 * 72  # an inch on the page: text of 8 points is then as large as small print


def svg_element(drawing: Figure, classes: str, label: str | None, salt: str) -> Markup:
    """The drawing as an element of a page.

    Args:
        label: what it shows, for those who cannot see it; None: the text beside it says so.
        salt: its identifiers start from; another for each drawing of a page.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same runs give the same bytes
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font may have it
        drawing.savefig(file, format="svg", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    kept = {use.get(f"{XLINK}href", "")[1:] for use in root.iter() if _tag(use) == "use"}
    for element in list(root.iter()):
        _clean(element, kept)
    described = {"aria-hidden": "true"}
    if label is not None:
        described = {"role": "img", "aria-label": f"{label}; the numbers are in the table below"}
    width, height = (f"{PIXELS * inches:.0f}" for inches in drawing.get_size_inches())
    box = {"class": classes, "viewBox": root.get("viewBox"), "width": width, "height": height}
    root.attrib = box | described
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _clean(element: ElementTree.Element, kept: set[str]) -> None:
    """Make an element one of a page: short, in the page's colours and font, with what `mark` noted."""
    element.tag, element.tail = _tag(element), None
    if element.tag != "text":
        element.text = None
    for child in list(element):
        if _tag(child) in ("metadata", "style", "clipPath"):
            element.remove(child)
    given = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    given.pop("clip-path", None)
    identifier = given.pop("id", "")
    if identifier in kept:
        given["id"] = identifier
    for name, value in given.items():
        if name in ("d", "x", "y", "transform", "style"):
            given[name] = re.sub(r"-?\d+\.\d+", _rounded, value)
    if "style" in given:
        style = re.sub(r"font-family:[^;]*;|stroke-dashoffset: 0;", "", given["style"])
        given["style"] = re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), style)
    if identifier.startswith("{"):
        noted = json.loads(identifier)
        given["class"] = noted["class"]
        below = [each for each in element.iter() if _tag(each) == noted["below"]]
        for each, title in zip(below, noted["titles"], strict=True):
            ElementTree.SubElement(each, "title").text = title
    element.attrib = given


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}".rstrip("0").rstrip(".")


def mark(artist: Artist, class_: str, titles: Sequence[str] = (), below: str = "use") -> None:
    """Note a class for an artist's element, and titles for the elements `below` it, one for each."""
    artist.set_gid(json.dumps({"class": class_, "titles": list(titles), "below": below if titles else ""}))
