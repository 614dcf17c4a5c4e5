"""Every command that a message recommends is run here as it is printed, and every flag that a message names
is one of some program's."""

import argparse
import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, called, process
from conftest import fails, write_classes
from toy_pools import make_network

from amt.__main__ import main as amt_command
from amt.files import checkpoint, robust_weights
from amt.files.export.published_layout import published_state
from amt.files.pretrained import read_weights
from amt.models.network import build_classifier
from amt.models.pool import Pool
from meta_dataset_readers.files import still_packed
from meta_dataset_readers.folders import open_class_folders

PLACE = "my files"  # a folder whose name a shell would take apart


def recommended(error: object) -> list[str]:
    """The words of the command in a message."""
    found = re.search(r"python -m .*?(?=; | writes one|$)", str(error))
    assert found, error
    return shlex.split(found[0])


def run(words: list[str], cwd: Path, monkeypatch) -> None:
    """Run a recommended command in a folder, in this process."""
    assert words[:2] == ["python", "-m"]
    monkeypatch.chdir(cwd)
    module = words[2]
    main = amt_command if module == "amt" else (lambda: runpy.run_module(module, run_name="__main__"))
    ended = called(main, [module, *words[3:]])
    assert not ended.code, ended.err


def objects() -> np.ndarray:
    return np.array([{"a": 1}], dtype=object)  # pickled, it asks for what is not read without --trust


def save_vit(file: Path) -> Callable[[Path], object]:
    module = make_network().module
    torch.save({"model": module.state_dict(), "log": objects()}, file)
    return lambda path: read_weights(path, module)


def save_resnet(file: Path) -> Callable[[Path], object]:
    network = build_classifier("resnet_mini", 5, 32)
    start = network.start(0)
    torch.save({"state_dict": {f"module.{name}": t for name, t in start.items()}, "log": objects()}, file)
    return lambda path: robust_weights.read(path, network, network.start(1))


def save_whole_module(file: Path) -> Callable[[Path], object]:
    network = build_classifier("resnet_mini", 5, 32)
    torch.save(network.module, file)
    return lambda path: robust_weights.read(path, network, network.start(1))


@pytest.mark.parametrize("save", [save_vit, save_resnet, save_whole_module])
def test_a_file_that_is_not_read_is_converted_as_advised(tmp_path, monkeypatch, save):
    (tmp_path / PLACE).mkdir()
    file = tmp_path / PLACE / "x.pth"
    read = save(file)
    words = recommended(fails("is not read here", lambda: read(file)))
    run(words, tmp_path, monkeypatch)
    assert read(tmp_path / words[words.index("--convert") + 1])


def test_levels_are_given_as_advised(tmp_path, monkeypatch, pool):
    two = Pool.concat([pool[0], pool[1]])
    (tmp_path / PLACE).mkdir()
    torch.save({"model": published_state(two)}, tmp_path / PLACE / "pool.pth")
    file = tmp_path / PLACE / "pool.pth"
    error = fails("levels", lambda: checkpoint.require_levels(file, checkpoint.load(file)))
    words = [re.sub(r"^E(\d)$", r"\1", word) for word in recommended(error)]
    run(words, tmp_path, monkeypatch)
    made = checkpoint.load(tmp_path / words[-1])
    assert [level.epsilon for level in made.pool.levels] == [0, 1]


def test_splits_are_written_as_advised(tmp_path, monkeypatch):
    folder = write_classes(tmp_path / PLACE, **{f"c{i}": 2 for i in range(18)})
    source = open_class_folders(folder, "own")
    assert source.spec.advice is not None
    run(recommended(source.spec.advice), tmp_path, monkeypatch)
    assert open_class_folders(folder, "own").spec.classes("TRAIN")


@pytest.mark.parametrize(
    ("form", "ending", "program"),
    [("gztar", ".tar.gz", "tar"), ("tar", ".tar", "tar"), ("zip", ".zip", "unzip")],
)
def test_archives_are_unpacked_as_advised(tmp_path, form, ending, program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    write_classes(tmp_path / "made" / "cifar", cat=1)
    place = tmp_path / PLACE
    place.mkdir()
    shutil.make_archive(str(place / "cifar"), form, tmp_path / "made", "cifar")
    advice = still_packed(place, "cifar")
    assert f"cifar{ending} is still packed: " in advice
    subprocess.run(["/bin/sh", "-c", advice.partition("packed: ")[2]], check=True, capture_output=True)
    assert (place / "cifar" / "cat" / "0.png").is_file()


def test_one_of_them_as_a_user_types_it(tmp_path):
    file = tmp_path / "x y.pth"
    read = save_resnet(file)
    words = recommended(fails("is not read here", lambda: read(file)))
    ended = process(*words[1:], cwd=tmp_path)
    assert ended.code == 0 and "wrote OUT.safetensors" in ended.out


# Flags


PROGRAMS = ("main.py", "main.py autolora", "test_meta_dataset.py")
MODULES = ("check", "convert", "split", "mini")
COMMANDS = ("checkpoint", "pool", "export", "report", "compare", "row", "predict", "app")
OTHERS = {"--short", "--porcelain"}  # git's


def said_in(file: Path) -> Iterator[str]:
    """The texts in a module that are no docstrings."""
    tree = ast.parse(file.read_text())
    holders = ast.Module | ast.ClassDef | ast.FunctionDef
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All flags of all programs."""
    found: set[str] = set()

    class Built(Exception):
        pass

    def stop(parser, *_, **__):
        found.update(parser._option_string_actions)
        raise Built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        starts = [[ROOT / name.split()[0], *name.split()[1:]] for name in PROGRAMS]
        for path, *words in starts:
            patch.setattr(sys, "argv", [str(path), *words, "--seed", "0"])
            with pytest.raises(Built):
                runpy.run_path(str(path), run_name="__main__")
        for name in COMMANDS:
            patch.setattr(sys, "argv", ["amt", name])
            with pytest.raises(Built):
                amt_command()
        for name in MODULES:
            module = f"meta_dataset_readers.{name}"
            patch.delitem(sys.modules, module, raising=False)
            patch.setattr(sys, "argv", [name])
            with pytest.raises(Built):
                runpy.run_module(module, run_name="__main__")
    return found


@pytest.mark.parametrize("package", ["amt", "meta_dataset_readers"])
def test_flags_in_messages_exist(flags, package):
    named = {
        (flag, str(file.relative_to(ROOT)))
        for file in sorted((ROOT / package).rglob("*.py"))
        if "report" not in file.parts  # CSS has variables that look like flags
        for text in said_in(file)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-zA-Z_]+(?![\w{]|-)", text)
    }
    assert len(named) > 100 or package != "amt"
    assert sorted(pair for pair in named if pair[0] not in flags | OTHERS) == []
