"""A full disk ends every program with one line and exit code 2; afterwards the same command goes on."""

import contextlib
import re
import resource
import sys
from collections.abc import Callable, Iterator

import pytest
from commands import called
from toy_autolora_runs import rows
from toy_training import command, strict_json

from amt.cli import report
from amt.report import figures
from meta_dataset_readers import convert
from meta_dataset_readers.mini import __main__ as mini


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_room(size: int, function: Callable, *arguments):
    with room(size):
        return function(*arguments)


def report_command() -> int:
    return report.main(sys.argv[1:])


def assert_told(ended, file: str = "") -> None:
    """One line, about the folder or file whose path holds `file`."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert len(re.findall(rf"^error: .*{file}.*File too large.*$", ended.err, re.MULTILINE)) == 1, ended.err


def test_an_evaluation_goes_on_when_there_is_room_again(world, tmp_path):
    """Where the description, a row, the images, the results and the picture no longer fit."""
    whole = command("test_meta_dataset", *world.test(tmp_path / "whole"))
    assert whole.code == 0, whole.err
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    flags = world.test(tmp_path / "run")
    for file in ("run.json", "rows.jsonl", "accuracy.png"):
        with room(sizes[file] - 1):
            assert_told(command("test_meta_dataset", *flags))
    ended = command("test_meta_dataset", *flags)
    assert ended.code == 0, ended.err
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob("*.part"))


def test_what_a_finished_evaluation_shows_is_written_when_there_is_room_again(world, tmp_path, monkeypatch):
    """Images while it runs, then results.json and TensorBoard's events, at last a page and its figures."""
    flags, page = world.test(tmp_path / "run", "--samples", 1), tmp_path / "page.html"
    with room(20_000):
        assert_told(command("test_meta_dataset", *flags), "samples")
    for size, file in ((4000, "results.json"), (20_000, "tensorboard")):
        assert command("test_meta_dataset", *flags).code == 0  # all that is needed before that file is there
        with room(size):
            assert_told(command("test_meta_dataset", *flags), file)
    assert command("test_meta_dataset", *flags).code == 0
    strict_json(tmp_path / "run" / "results.json")
    words = ["report", tmp_path / "run", "--out", page, "--figures", tmp_path / "figures"]
    with room(20_000):
        assert_told(called(report_command, words), "page.html")
        assert not page.exists()
    # The page is larger than any figure, so the disk fills up once it is written.
    write = figures.write
    with monkeypatch.context() as patch:
        patch.setattr(figures, "write", lambda *what: in_room(12_000, write, *what))
        assert_told(called(report_command, words), "figures")
    assert page.exists()
    ended = called(report_command, words)
    assert ended.code == 0, ended.err
    drawn = [path.suffix for path in (tmp_path / "figures").iterdir()]
    assert sorted(drawn) == [".pdf"] * 3 + [".png"] * 3


@pytest.mark.parametrize("size", [10, 3000, 20_000])
def test_a_made_data_set_is_complete_when_there_is_room_again(tmp_path, size):
    words = ["mini", "--out", tmp_path / "out", "--sources", "mini_signs", "--workers", 1]
    with room(size):
        assert_told(called(mini.main, words))
    ended = called(mini.main, words)
    assert ended.code in (None, 0), ended.err
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [10, 3000])
def test_a_conversion_is_complete_when_there_is_room_again(world, tmp_path, size):
    words = ["convert", world.data, "tiny", "--out", tmp_path / "packed"]
    with room(size):
        assert_told(called(convert.main, words))
    ended = called(convert.main, words)
    assert ended.code in (None, 0), ended.err
