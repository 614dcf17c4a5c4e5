"""What the site is made of besides text: help texts come from the programs, formulas become MathML.

MkDocs calls `on_page_markdown` for every page (see mkdocs.yml). In a page

    <!-- help: train -->                what `amt train --help` prints
    <!-- help: train --help_published -->   the same with another flag
    <!-- public names -->               an entry for every public name of `amt`
    $$ formula $$                       LaTeX, shown by the browser itself

are replaced. Help cannot go out of date, and no script is loaded from elsewhere.
"""

import contextlib
import importlib
import io
import os
import re
from unittest import mock

from latex2mathml.converter import convert

import amt
from amt.__main__ import COMMANDS, is_there

_HELP = re.compile(r"<!-- help: (\w+)( --\w+)? -->")
_NAMES = "<!-- public names -->"
_FORMULA = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)


def on_page_markdown(markdown: str, **_about: object) -> str:
    """The text of a page with help texts and formulas in it."""
    markdown = _HELP.sub(lambda found: block(help_of(found[1], (found[2] or " --help").strip())), markdown)
    markdown = markdown.replace(_NAMES, public_names())
    return _FORMULA.sub(lambda found: convert(found[1].strip(), display="block"), markdown)


def block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def public_names() -> str:
    return "\n".join(f"::: amt.{name}" for name in amt.__all__)


def help_of(name: str, flag: str = "--help") -> str:
    """What a command prints, 84 characters wide, on any machine."""
    if not is_there(COMMANDS[name]):
        return f"amt {name} is not part of this installation."
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "84", "NO_COLOR": "1"}),
        mock.patch("os.sched_getaffinity", lambda _process: {0, 1}, create=True),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(COMMANDS[name].module).main([flag])
    return out.getvalue()
