"""Probabilities of answers are held against how often the answers are right, in tables of a report."""

import json

import pytest
from toy_runs import DOMAINS, write_run

from amt.evaluation import runs
from amt.evaluation.calibration import calibration
from amt.report.document import page


def with_answers(folder, given):
    """A run of one domain whose first row alone has answers: these (label, predicted, probability)."""
    write_run(folder, domains=DOMAINS[:1], episodes=2, samples=0)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    labels, predicted, probability = (list(each) for each in zip(*given, strict=True))
    n, columns = len(labels), list(rows[0]["answers"]["predicted"])
    rows[0]["queries"] = n
    rows[0]["answers"] |= {"labels": labels}
    rows[0]["answers"] |= {"predicted": dict.fromkeys(columns, predicted)}
    rows[0]["answers"] |= {"probability": dict.fromkeys(columns, probability)}
    for name in ("files", "records"):
        rows[0]["answers"].pop(name, None)
    del rows[1]["answers"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.load(folder)


def test_the_error_is_the_distance_of_probability_and_share_of_right_answers_over_bins(tmp_path):
    # Two answers at 0.9, both right: 0.1 apart. Two at 0.3, one right: 0.2 apart. One without an answer.
    given = [(0, 0, 0.9), (1, 1, 0.9), (2, 2, 0.3), (3, 4, 0.3), (4, None, None)]
    found = calibration(with_answers(tmp_path / "run", given), DOMAINS[0])
    assert found is not None
    assert found.images == 4
    assert found.right == pytest.approx(75)
    assert found.probability == pytest.approx(60)
    assert found.error == pytest.approx(15)


def test_certain_and_right_has_no_error(tmp_path):
    found = calibration(with_answers(tmp_path / "run", [(0, 0, 1.0), (1, 1, 1.0)]), DOMAINS[0])
    assert found is not None and found.error == 0


def test_the_page_has_a_table_of_it_where_answers_were_kept(tmp_path):
    kept = runs.load(write_run(tmp_path / "kept", samples=0))
    old = runs.load(write_run(tmp_path / "old", samples=0, answers=False))
    assert "How sure the answers are" in page([kept])
    assert calibration(old, DOMAINS[0]) is None
    assert "How sure the answers are" not in page([old])
