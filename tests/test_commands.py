"""The command `amt`: what it lists, what it calls, and what it says to a name it does not know."""

import sys

import pytest
from commands import ROOT, called

from amt import __main__ as command


def amt(*words):
    return called(command.main, ["amt", *words])


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_the_list_has_a_line_for_every_command_that_is_there(words):
    ended = amt(*words)
    there = [name for name, entry in command.COMMANDS.items() if command.is_there(entry)]
    assert ended.code == 0 and set(there) >= {
        "train",
        "test",
        "autolora",
        "report",
        "check",
        "mini",
        "recipe",
    }
    assert [line.split()[1] for line in ended.out.split("\n\n")[0].splitlines()] == there
    assert all(len(line) < 100 for line in ended.out.splitlines())


@pytest.mark.parametrize(
    "word, hint", [("tran", "did you mean 'train'?"), ("repot", "did you mean 'report'?"), ("xyz", "known: ")]
)
def test_an_unknown_command_is_one_line(word, hint):
    ended = amt(word)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: no command {word!r}; ") and hint in ended.err
    assert ended.err.count("\n") == 1


def test_a_command_that_is_not_installed_is_unknown(monkeypatch):
    monkeypatch.setitem(command.COMMANDS, "absent", command.Command("amt.cli.absent", "nothing"))
    assert "absent" not in amt().out
    assert amt("absent").code == 2


@pytest.mark.parametrize("name", [name for name in command.COMMANDS if name not in ("report", "compare")])
def test_every_command_explains_itself(name):
    """Also those of the readers, which have a name of their own as modules."""
    if not command.is_there(command.COMMANDS[name]):
        pytest.skip(f"amt {name} is not part of this installation")
    ended = amt(name, "--help")
    assert ended.code == 0 and ended.out.startswith("usage: "), ended


@pytest.mark.parametrize("name", ["train", "test"])
def test_the_words_after_a_command_are_its_flags(name):
    ended = amt(name, "--no_such_flag")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert amt(name, "--help").out.startswith(f"usage: amt {name} ")


def test_recipes_are_listed_and_called_with_this_interpreter(monkeypatch):
    from amt.cli import recipe

    ended = amt("recipe")
    assert (
        str(ROOT / "recipes") in ended.out and "mini_demo.args" in ended.out and "common.py" not in ended.out
    )
    calls = []

    class Done:
        returncode = 7

    monkeypatch.setattr(
        recipe.subprocess, "run", lambda words, env, check: calls.append((words, env)) or Done
    )
    assert amt("recipe", "bscd_fsl", "data", "out", "--dry_run").code == 7
    ((words, env),) = calls
    assert [str(word) for word in words[1:]] == [
        str(ROOT / "recipes/bscd_fsl.sh"),
        "data",
        "out",
        "--dry_run",
    ]
    assert env["PYTHON"] == sys.executable


@pytest.mark.parametrize(
    "words, expected",
    [
        (["bscd_fs", "data", "out"], "did you mean 'bscd_fsl'?"),
        (["common", "data", "out"], "no recipe 'common'"),
        (["bscd_fsl", "data"], "expected two folders: amt recipe bscd_fsl DATA OUT"),
    ],
)
def test_a_wrong_recipe_is_one_line(words, expected):
    ended = amt("recipe", *words)
    assert ended.code == 2 and expected in ended.err and ended.err.count("\n") == 1
