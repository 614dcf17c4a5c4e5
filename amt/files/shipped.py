"""Where the folders lie that come with the package and hold no code, recipes and checkpoints, and what is in
the latter: the box.

They have one home, the top of a checkout. A wheel holds copies of them inside the package `amt`.
"""

from pathlib import Path

from meta_dataset_readers.settings import as_path

ENDINGS = (".safetensors", ".pth")
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """The folder called `name`: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


BOX = shipped("checkpoints")  # where weights and pools in the box are


def boxed(name: str) -> Path | None:
    """The file of the weights or the pool called `name` in the box; None if there is none."""
    files = [BOX / f"{name}{ending}" for ending in ENDINGS] if Path(name).name == name else []
    return next((file for file in files if file.is_file()), None)


def as_pool(text: str) -> Path:
    """The file of a checkpoint as a flag names it: a path, or where nothing lies there the name of a pool in
    the box."""
    path = as_path(text)
    return path if path.exists() else boxed(text) or path
