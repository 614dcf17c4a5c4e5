"""The documentation says what is true: its Python runs, its commands are understood, its files are there.

Commands are read by their own programs, which stop before they do anything: flags, values and combinations
are checked, data and weights need not be there. Python is run page by page, in a folder with a few pictures.
"""

import contextlib
import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import ROOT
from conftest import write_classes

import amt
from amt.__main__ import COMMANDS
from amt.cli import options
from meta_dataset_readers import command
from meta_dataset_readers.errors import InputError
from studies import mini_results

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("checkpoints", "recipes")),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Of the commands that a page shortens to three dots, the part that is left out.
LEFT_OUT = {
    "train": "--arch vit_mini_amt --data_path D --base_sources S --output_dir O",
    "test": "--arch vit_mini_amt_merge --data_path D --test_sources S",
}
SCRIPTS = {"main.py": "train", "test_meta_dataset.py": "test"}
MODULES = {f"meta_dataset_readers.{name}": name for name in ("check", "convert", "split", "mini")}
ANYWHERE = {"pip", "pre-commit", "git", "source", "cd"}  # programs of others


class Block(NamedTuple):
    """A code block of a page."""

    page: Path
    language: str
    text: str

    @property
    def name(self) -> str:
        return str(self.page.relative_to(ROOT))


def blocks(*languages: str) -> list[Block]:
    found = [(page, match) for page in PAGES if page.exists() for match in FENCE.finditer(page.read_text())]
    return [Block(page, match[1], match[2]) for page, match in found if match[1] in languages]


def lines(text: str) -> list[list[str]]:
    """The commands of a shell block, as words; comments are gone."""
    found = text.replace("\\\n", " ").splitlines()
    return [words for line in found if (words := shlex.split(line, comments=True))]


COMMAND_LINES = [(block, words) for block in blocks("sh", "bash") for words in lines(block.text)]


class Understood(BaseException):
    """The command line is sound; nothing must happen after that."""


@pytest.fixture
def only_parsing(monkeypatch):
    """Programs stop where they have read their flags and, for training and testing, compared them."""
    read = command.Parser.parse

    def parse(parser, argv):
        args = read(parser, argv)
        if parser.prog.split()[-1] in ("train", "test"):
            return args
        raise Understood

    def stop(*_words, **_named):
        raise Understood

    monkeypatch.setattr(command.Parser, "parse", parse)
    for module in ("amt.cli.train", "amt.cli.test", "amt.cli.dry_run"):
        found = importlib.import_module(module)
        for name in ("main", "training", "testing"):
            if hasattr(found, name):
                monkeypatch.setattr(found, name, stop)
    monkeypatch.chdir(ROOT)


def understood(name: str, words: list[str]) -> None:
    """Let the program of a command read the words after its name."""
    assert name in COMMANDS, f"there is no command {name}"
    if not (ROOT / Path(*COMMANDS[name].module.split("."))).with_suffix(".py").is_file():
        pytest.skip(f"amt {name} is not part of this installation")
    if "--help" in words or "--help_published" in words:
        return
    if words[:1] == ["..."]:
        words = [*LEFT_OUT[name].split(), *words[1:]]
    with pytest.raises(Understood):
        importlib.import_module(COMMANDS[name].module).main(words)


def check_python(words: list[str]) -> None:
    """A line that starts a program of Python."""
    target, *rest = words
    if target == "-m":
        module, *rest = rest
        if module == "amt":
            if rest:
                understood(rest[0], rest[1:])
        elif module in MODULES:
            understood(MODULES[module], rest)
        else:
            found = importlib.util.find_spec(module)
            assert found is not None, f"there is no module {module}"
            flags_exist(Path(found.origin), rest)
    elif target in SCRIPTS and rest[:1] == ["autolora"]:
        understood("autolora", rest[1:])
    elif target in SCRIPTS:
        understood(SCRIPTS[target], rest)
    else:
        flags_exist(ROOT / target, rest)


def flags_exist(program: Path, words: list[str]) -> None:
    """A study, a benchmark or a tool names its flags in its own source, or hands them on to `amt test`."""
    source = program.read_text()
    handed_on = options.testing_parser()._option_string_actions if "parse_known_args" in source else ()
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in source or flag in handed_on, f"{program} has no flag {flag}"


@pytest.mark.parametrize(
    "block, words",
    COMMAND_LINES,
    ids=[f"{block.name}:{' '.join(words)[:60]}" for block, words in COMMAND_LINES],
)
def test_every_command_line_is_understood(block, words, only_parsing):
    program, *rest = words
    if program == "amt":
        if rest and not rest[0].startswith("-"):
            understood(rest[0], rest[1:])
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "torchrun":
        start = next(i for i, word in enumerate(rest) if word in SCRIPTS or word == "-m")
        check_python(rest[start:])
    elif program == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program.startswith(("recipes/", ".ci/")):
        assert (ROOT / program).is_file()
    else:
        assert program in ANYWHERE, f"{block.name}: what is {program}?"
    if program == "pip":
        extras = re.findall(r"\[(.*)\]", " ".join(rest))
        assert {name for found in extras for name in found.split(",")} <= extras_there()


def extras_there() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


PYTHON_PAGES = sorted({block.page for block in blocks("python")})


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page, tmp_path, monkeypatch, one_thread):
    """The blocks of a page one after the other, as a reader types them."""
    code = [block.text for block in blocks("python") if block.page == page]
    if any("FewShotClassifier" in text for text in code) and "FewShotClassifier" not in amt.__all__:
        pytest.skip("the classifier is not part of this installation")
    write_classes(tmp_path / "photos", apple=3, pear=3)
    for number, name in enumerate(("apple/a1.jpg", "pear/p1.jpg")):
        file = sorted((tmp_path / "photos" / name.split("/")[0]).iterdir())[number]
        file.rename(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    known = {"images": torch.rand(2, 3, 32, 32)}  # what the README calls images
    with contextlib.redirect_stdout(sys.stderr):
        for text in code:
            exec(compile(text, str(page), "exec"), known)


# --- names of files ----------------------------------------------------------------------------------------

TOPS = "amt|benchmarks|checkpoints|docs|meta_dataset_readers|recipes|studies|tests|tools"
NAMED = re.compile(rf"`((?:{TOPS})/[\w./-]+|[\w-]+\.(?:md|toml|cff|py))`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
# Written by users and programs, or by others.
MADE = {"checkpoints/NAME", "checkpoints/NAME.pth", "checkpoints/NAME.safetensors", "filelists.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page):
    if not page.exists():
        pytest.fail(f"{page} is not there")
    text = page.read_text()
    named = {name for name in NAMED.findall(text)} - MADE
    missing = {name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()}
    assert missing == set()
    assert {link for link in LINK.findall(text) if not (page.parent / link).exists()} == set()


def test_every_page_is_in_the_navigation():
    """MkDocs would build a page that nobody can find."""
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert there <= listed


def test_every_command_is_explained_on_the_page_of_commands():
    text = (ROOT / "docs/reference/commands.md").read_text()
    assert set(re.findall(r"<!-- help: (\w+) -->", text)) == set(COMMANDS)


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")
    return loaded("docs/hooks.py")


def loaded(script: str):
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_on_the_site_is_what_the_programs_print(hooks):
    text = hooks.on_page_markdown("<!-- help: mini -->\n<!-- help: train --help_published -->")
    assert "usage: " in text and "--objects_per_class N" in text and "default: 2)" in text
    assert "accepted without effect" in text and max(map(len, text.splitlines())) < 200


def test_every_public_name_is_on_the_page_of_python(hooks):
    text = hooks.on_page_markdown((ROOT / "docs/reference/api.md").read_text())
    entries = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert {f"amt.{name}" for name in amt.__all__} < set(entries)
    assert len(set(entries)) == len(entries)
    for entry in entries:
        module, _, name = entry.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, entry


@pytest.mark.parametrize("page", [page for page in PAGES if "$$" in page.read_text()], ids=lambda p: p.stem)
def test_every_formula_becomes_mathml(page, hooks):
    shown = hooks.on_page_markdown(page.read_text())
    formulas = re.findall(r"<math.*?</math>", shown, re.DOTALL)
    assert len(formulas) == page.read_text().count("$$") / 2 > 0 and "$$" not in shown
    assert not [formula for formula in formulas if "\\" in formula]  # a macro that was not understood


def test_the_figure_of_the_method_is_drawn_by_its_script(tmp_path, monkeypatch):
    draw = loaded("docs/figures/draw_method.py")
    monkeypatch.setattr(sys, "argv", ["draw_method.py", "--out", str(tmp_path / "figure.svg")])
    draw.main()
    assert (tmp_path / "figure.svg").read_bytes().startswith(b"<?xml")
    assert (ROOT / "docs/figures/method.svg").stat().st_size > 10_000


def test_the_page_of_results_is_made_of_the_committed_rows(tmp_path, monkeypatch):
    """No number on it is typed in."""
    monkeypatch.chdir(ROOT)
    mini_results.write(Path("results/mini"), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs/results/mini-study.md").read_text()


def test_a_command_with_an_unknown_flag_would_be_seen(only_parsing):
    with pytest.raises(InputError, match="no_such_flag"):
        understood("report", ["runs/a", "--out", "a.html", "--no_such_flag"])
    with pytest.raises(InputError, match="no_epsilon"):
        understood("test", ["...", "--output_dir", "out", "--no_epsilon", "1"])
