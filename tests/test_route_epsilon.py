"""The study of the knob from clean to robust: it runs what it says, once, and shows the curve."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import fails
from PIL import Image
from toy_runs import write_run

from studies import route_epsilon


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`study(*flags)` runs it on a pool; the commands that it would run, each ended with code `ends_with`."""
    asked = []

    def run(*flags, ends_with=0, writes=True):
        def pretend(command, stdout, **_):
            asked.append(command)
            stdout.write("some progress\nerror: no such thing\n")
            stdout.flush()
            folder = Path(command[command.index("--output_dir") + 1])
            if ends_with == 0 and writes:
                epsilon = float(command[command.index("--route_epsilon") + 1])
                (folder / "log.txt").unlink()
                folder.rmdir()
                write_run(folder, strength=epsilon / 10)
            return SimpleNamespace(returncode=ends_with)

        monkeypatch.setattr(subprocess, "run", pretend)
        words = ["route_epsilon", "--resume", "pool.safetensors", "--out", str(tmp_path / "out"), *flags]
        monkeypatch.setattr(sys, "argv", words)
        route_epsilon.main()

    run.asked = asked
    return run


def test_the_knob_is_turned_and_nothing_else(study, tmp_path, capsys):
    """Other flags go to test_meta_dataset.py; a table with intervals and shares, and a picture."""
    study("--knob", "0", "4", "8", "--top_k", "1", "--jobs", "1")
    turned = [command[command.index("--route_epsilon") + 1] for command in study.asked]
    assert turned == ["0", "4", "8"]
    for command in study.asked:
        assert command[1] == "test_meta_dataset.py" and command[-2:] == ["--top_k", "1"]
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| mini_signs |")]
    assert [row.split("|")[2].strip() for row in rows] == turned
    assert "±" in rows[0] and "mean shares of 8, 6, 0.1, 0.01" in said and "| average | 8 |" in said
    assert Image.open(tmp_path / "out" / "route_epsilon.png").width > 500


def test_what_is_there_is_not_run_again(study):
    study("--knob", "0", "8")
    study("--knob", "0", "8")
    assert len(study.asked) == 2


def test_a_run_that_fails_is_one_line(study):
    fails("ended with code 2: error: no such thing", lambda: study("--knob", "0", ends_with=2))
