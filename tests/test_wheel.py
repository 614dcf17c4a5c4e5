"""What users install: a wheel with all that its commands need, and a source distribution that builds it.

Built by setuptools from a copy, as a build leaves folders behind; nothing is downloaded. The wheel in an
environment of its own, on another Python, is tried by `make wheel-test`.
"""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import ROOT, Ended

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKED = ("amt", "meta_dataset_readers")
FOLDERS = ("recipes", "checkpoints")  # of the repository, inside amt in a wheel
NOT_PACKED = {".pyc", ".pth"}


class Built(NamedTuple):
    """Where the distributions lie, and the wheel unpacked."""

    wheel: Path
    again: Path  # the wheel made from the source distribution
    unpacked: Path


def build(source: Path, out: Path, kind: str) -> Path:
    """Build a distribution of the sources in a folder: `kind` is wheel or sdist."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return out / ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    root = tmp_path_factory.mktemp("distributions")
    copy = root / "copy"
    for name in (*PACKED, *FOLDERS):
        ignored = shutil.ignore_patterns("__pycache__", "*.pth")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy(file, copy)
    wheel, sdist = build(copy, root, "wheel"), build(copy, root, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "from_sdist", filter="data")
    (source,) = (root / "from_sdist").iterdir()
    (root / "again").mkdir()
    again = build(source, root / "again", "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(root / "unpacked")
    return Built(wheel, again, root / "unpacked")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def amt(built: Built, folder: Path, *words) -> Ended:
    """A command of the unpacked wheel, in another folder."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHON"}
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "amt", *map(str, words)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(built.unpacked)},
        capture_output=True,
        text=True,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_every_file_of_the_packages_is_in_the_wheel(built):
    expected = {
        (f"amt/{file.relative_to(ROOT)}" if name in FOLDERS else str(file.relative_to(ROOT)))
        for name in (*PACKED, *FOLDERS)
        for file in (ROOT / name).rglob("*")
        if file.is_file() and file.suffix not in NOT_PACKED
    }
    found = {name for name in contents(built.wheel) if ".dist-info/" not in name}
    assert found == expected


def test_the_source_distribution_builds_the_same_wheel(built):
    assert built.again.name == built.wheel.name
    assert contents(built.again) == contents(built.wheel)


def test_the_metadata_say_what_it_is(built):
    (text,) = (data for name, data in contents(built.wheel).items() if name.endswith("/METADATA"))
    found = email.message_from_bytes(text)
    project = SETTINGS["project"]
    assert (found["Name"], found["Version"]) == ("adversarial-meta-tuning", project["version"])
    assert (found["License-Expression"], found["License-File"]) == ("Apache-2.0", "LICENSE")
    assert found["Author"] == "The AMT contributors" and "Typing :: Typed" in found.get_all("Classifier")
    assert "# AMT" in found.get_payload() and found["Description-Content-Type"] == "text/markdown"
    assert {"app", "export", "corruptions", "docs", "test"} == set(found.get_all("Provides-Extra"))
    required = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    listed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in "#"]
    assert sorted(required) == sorted(line.strip() for line in listed)


def test_the_scripts_are_named(built):
    (text,) = (data for name, data in contents(built.wheel).items() if name.endswith("/entry_points.txt"))
    assert b"amt = amt.__main__:script" in text


def test_shipped_folders_are_found_where_a_wheel_has_them(built, tmp_path):
    """By the command that lists recipes; weights are looked for by the same function."""
    ended = amt(built, tmp_path, "recipe")
    assert ended.code == 0, ended
    assert str(built.unpacked / "amt" / "recipes") in ended.out and "bscd_fsl.sh" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_installed_recipes_call_the_commands_of_the_package(built, tmp_path):
    """With an interpreter that only says how it is called."""
    script = built.unpacked / "amt" / "recipes" / "fine_grained.sh"
    ended = subprocess.run(
        ["bash", script, "data", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHON": shutil.which("echo")},
        capture_output=True,
        text=True,
        check=True,
    )
    called = [line for line in ended.stdout.splitlines() if not line.startswith("+")]
    assert {tuple(line.split()[:3]) for line in called} == {
        ("-m", "amt", command) for command in ("train", "test", "report")
    }
