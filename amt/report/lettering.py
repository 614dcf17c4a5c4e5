"""Names as drawings can show them: on one line, of printable characters, no wider than there is room for."""

import warnings
from unicodedata import east_asian_width

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

WIDTH = 5.2  # points, of a rather wide letter of text of 8 points


def short(name: str, most: int = 24) -> str:
    """A name as it is drawn: on one line, of printable characters, cut where `most` of usual width end."""
    name = printable(name)
    if _fits(name, most):
        return name
    return next(cut for k in range(most, -1, -1) if _fits(cut := f"{name[:k]}…", most))


def printable(text: str) -> str:
    """Without line breaks and control characters, which XML does not know."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def _fits(name: str, most: int) -> bool:
    """Whether a name is no wider than `most` characters: in cells of a terminal, which tell how wide
    letters are that the font lacks, and as the font draws them, where a W takes the room of two."""
    if sum(2 if east_asian_width(each) in "WF" else 1 for each in name) > most:
        return False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        points, _, _ = text_to_path.get_text_width_height_descent(name, FontProperties(size=8), ismath=False)
    return points <= WIDTH * most
