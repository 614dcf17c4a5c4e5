"""HTML and SVG put together element by element, so that nothing gets into a page unescaped.

A plain string is text and is escaped; only what `element` and `join` return, and what is declared to be
`Markup`, is taken as it is. Knows no page.
"""

from collections.abc import Iterable
from html import escape

_VOID = {"img", "meta", "path", "line", "rect"}


class Markup(str):
    """A string that is markup already."""

    __slots__ = ()


Child = str | int | float | None


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """One element around its children.

    Args:
        children: text, which is escaped, or markup; numbers as they print; None is left out.
        attributes: their values are escaped; True stands for an attribute without value, None and False
            leave it out. A trailing underscore is dropped (`class_`), inner ones become dashes.
    """
    given = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(_plain(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Markup(f"<{tag}{given}/>")
    return Markup(f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Markup:
    """Texts and markup, one after the other."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(_plain(child))
            for child in children
            if child is not None
        )
    )


def _plain(value: Child) -> str:
    # Coordinates: a tenth of a pixel is more than anybody sees.
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
