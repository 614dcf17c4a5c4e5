"""What an installed package holds besides modules: without it types are not seen and no report is drawn."""

import fnmatch
import importlib.resources
import tomllib
from pathlib import Path

import pytest
from commands import ROOT

PACKAGES = ("amt", "meta_dataset_readers")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
PATTERNS = SETTINGS["setuptools"]["package-data"]


def shipped(path: Path) -> bool:
    """Whether a file of a package, relative to the repository, is among its package data."""
    patterns = PATTERNS.get(".".join(path.parent.parts), [])
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


@pytest.mark.parametrize(
    "package, names",
    [
        ("amt", ["py.typed"]),
        ("meta_dataset_readers", ["py.typed"]),
        ("amt.report", ["page.html.j2", "page.css", "page.js"]),
    ],
)
def test_data_files_are_there_and_shipped(package, names):
    for name in names:
        assert importlib.resources.files(package).joinpath(name).is_file()
        assert shipped(Path(*package.split("."), name))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_data_file_is_left_out(package):
    files = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()]
    data = [path for path in files if path.suffix not in (".py", ".pyc")]
    assert data and all(shipped(path) for path in data)


def test_types_are_checked_where_tensors_are_computed_with():
    checked = SETTINGS["pyright"]["include"]
    assert set(checked) >= {f"amt/{name}" for name in ("models", "attacks", "tasks", "training")}
    assert all((ROOT / folder).is_dir() for folder in checked)
