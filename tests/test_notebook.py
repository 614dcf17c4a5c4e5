"""The tutorial notebook runs from its first cell to its last, with fewer tasks than a reader would take."""

import json

import matplotlib
import pytest
from commands import ROOT

NOTEBOOK = ROOT / "docs" / "tutorials" / "first_task.ipynb"
SIZE = "EPISODES = 20"


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text())


def test_the_tutorial_runs(notebook, tmp_path, monkeypatch, one_thread):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(SIZE in text for text in code) == 1
    known: dict = {}
    for number, text in enumerate(code):
        exec(compile(text.replace(SIZE, "EPISODES = 2"), f"cell {number}", "exec"), known)
    rows = known["rows"]
    assert len(rows) == 2 and sum(known["shares"]) == pytest.approx(1)
    assert all(row["clean"] >= row["pgd10-ce+dlr@1"] >= row["pgd10-ce+dlr@4"] for row in rows)
    assert (
        float((known["mixed"] - known["alone"]).abs().max()) < 1e-4
    )  # what the text says of an untrained pool
    matplotlib.pyplot.close("all")


def test_it_is_kept_without_outputs(notebook):
    """Outputs would change with every run, and hold pictures."""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
