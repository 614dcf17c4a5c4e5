"""Where the folders lie that come with the package and hold no code: recipes and checkpoints.

They have one home, the top of a checkout. A wheel holds copies of them inside the package `amt`.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """The folder called `name`: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
