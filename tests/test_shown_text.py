"""Text out of files and their names reaches the terminal on one line, and without power over it."""

import io

import pytest

from meta_dataset_readers.errors import InputError, exit_on_bad_input, printable, say

CASES = {
    "plain": ("café 猫 50 %", "café 猫 50 %"),
    "screen cleared": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "another line": ("a\nb\rc", r"a\nb\rc"),
    "written backwards": ("a\u202eb", r"a\u202eb"),
    "a name that is not UTF-8": (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\xe9"),
    "half a letter": ("\ud83d", r"\ud83d"),
}


@pytest.mark.parametrize(("text", "shown"), CASES.values(), ids=CASES)
def test_a_text_is_shown_without_power_over_the_terminal(text, shown, capsys):
    assert printable(text) == shown
    say(text.replace("\n", " "))
    assert capsys.readouterr().out == shown.replace(r"\n", " ") + "\n"


@pytest.mark.parametrize(("text", "shown"), CASES.values(), ids=CASES)
def test_an_error_is_one_line(text, shown, capsys):
    def main():
        raise InputError(f"{text}: no such file")

    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {shown}: no such file\n"


def test_an_error_does_not_fill_the_screen(capsys):
    def main():
        raise InputError(f"run.json: format is {'y' * 10**6}, expected 1")

    with pytest.raises(SystemExit):
        exit_on_bad_input(main)
    said = capsys.readouterr().err
    assert len(said) < 2100 and said.startswith("error: run.json") and said.endswith("y, expected 1\n")


def test_a_table_keeps_its_lines_and_a_poor_terminal_gets_escapes():
    poor = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("a\nb", "é", file=poor)
    assert poor.buffer.getvalue() == b"a\nb\n\\xe9\n"


@pytest.mark.parametrize(
    "make", [lambda at: at.mkdir(), lambda at: at.symlink_to(at)], ids=["folder", "loop"]
)
def test_what_the_system_says_about_a_file_is_one_line(make, tmp_path, capsys):
    make(tmp_path / "a\x1bb")
    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(lambda: open(tmp_path / "a\x1bb").close())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and r"a\x1bb: " in said


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on_bad_input(lambda: 1 // 0)
