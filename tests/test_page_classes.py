"""What the page says about classes and tasks: matrices that add up, or pairs; support images; older runs."""

import dataclasses

import numpy as np
import pytest
from page_reader import Reader
from toy_runs import ATTACKS, write_run

from amt.attacks.kinds import Attack
from amt.evaluation import runs
from amt.evaluation.classes import gather
from amt.report import by_class
from amt.report.by_class import by_domain
from amt.report.document import page
from amt.report.example_tasks import example_tasks
from amt.report.shown import label, telling

CLASSES = ("stop", "yield", "no entry", "turn right", "<b>roundabout</b>")


@pytest.fixture
def load(tmp_path):
    """`load(name, **how)` writes a run (see `write_run`) and reads it."""
    how = {"samples": 0, "attacks": ATTACKS[:1], "domains": ("digits",), "classes": CLASSES}
    return lambda name="run", **other: runs.load(write_run(tmp_path / name, **(how | other)))


def test_a_matrix_holds_what_the_answers_say(load):
    run = load()
    shown = label([run])
    (domain,) = by_domain(shown)
    assert [matrix.title for matrix in domain.matrices] == ["clean", *telling(shown)]
    found = gather(run, "digits")
    counts = np.zeros((5, 5))
    np.add.at(counts, (found.labels, found.predicted["clean"]), 1)
    shares = 100 * counts / counts.sum(1, keepdims=True)  # all classes meet in every task
    drawn = [[square.share for square in row] for row in domain.matrices[0].rows]
    np.testing.assert_allclose(drawn, shares)
    # Same sizes everywhere: the mean of the diagonal is the accuracy of the domain.
    assert np.mean([drawn[k][k] for k in range(5)]) == pytest.approx(run.summary("digits", "clean").mean)
    assert [row[0].text for row in domain.classes.rows] == sorted(CLASSES)
    reader = Reader(page([run]))
    cells = [a for tag, a in reader.tags if tag == "td" and a.get("class") in ("hit", "miss")]
    assert len(cells) == sum(bool(s.text) for m in domain.matrices for row in m.rows for s in row)
    assert f"stop taken for yield: {int(counts[2, 4])} of 200 images" in [a["title"] for a in cells]


def test_many_classes_become_the_pairs_most_often_confused(load, monkeypatch):
    monkeypatch.setattr(by_class, "MOST_CLASSES", 4)
    monkeypatch.setattr(by_class, "MOST_PAIRS", 3)
    (domain,) = by_domain(label([load()]))
    assert domain.matrices == [] and domain.hidden == 2 and len(domain.classes.rows) == 3
    counts = [row[-2].value for row in domain.pairs.rows]
    assert len(counts) == 2 * 3 and counts[:3] == sorted(counts[:3], reverse=True)
    assert all(row[0].text != row[1].text for row in domain.pairs.rows)
    assert "2 more are in classes.csv" in Reader(page([load("other")])).text


def test_matrices_of_a_page_have_a_budget(load, monkeypatch):
    monkeypatch.setattr(by_class, "CELLS", 2 * 4 * 4)
    (domain,) = by_domain(label([load()]))
    assert domain.matrices == [] and domain.pairs is not None


def test_runs_without_answers_have_no_such_section(load):
    old = load("old", answers=False)
    assert by_domain(label([old])) == [] and 'id="classes"' not in page([old])
    both = by_domain(label([old, load("new")]))
    assert len(both) == 1 and len(both[0].matrices) == 2


def test_beyond_chance_nothing_is_told_apart(load):
    strong, weak = load("strong", strength=1.0), load("weak", strength=0.0, attacks=(Attack("pgd", (8, 60)),))
    assert telling(label([strong])) == ["pgd20@8"] and telling(label([weak])) == ["pgd20@8"]
    assert telling(label([load("clean", attacks=())])) == []


def test_runs_of_one_episode_share_its_task(load):
    """And its support images, where the samples have them."""
    one, two = load("one", samples=2), load("two", samples=2, strength=0.2)
    path = one.folder / "samples" / "digits-0.npz"
    with np.load(path) as old:
        more = dict(old)
    more["support"] = np.arange(5 * 32 * 32 * 3).reshape(5, 32, 32, 3).astype(np.uint8)
    more["support_labels"] = np.array([0, 0, 0, 0, 1])
    more["shots"] = np.array([5, 5, 5, 5, 5])
    np.savez(path, **more)
    found = example_tasks(label([one, two]))
    (task,) = found["tasks"]
    assert [attempt.label for attempt in task.attempts] == ["one", "two"]
    assert found["count"] == found["total"] == 4
    assert (
        task.where == "digits, episode 0" and "5 labelled images of each of these 5 classes" in task.question
    )
    assert [(each.name, each.shots, len(each.images)) for each in task.support] == [
        ("stop", 5, 3),
        ("yield", 5, 1),
    ]
    reader = Reader(page([one, two]))
    alts = [a["alt"] for tag, a in reader.tags if tag == "img"]
    assert alts.count("support image of stop") == 3 and "+2" in reader.text and "+4" in reader.text
    (older,) = example_tasks(label([two]))["tasks"]
    assert older.support == [] and older.question == "Which of 5 classes is it?"
    by_texts = dataclasses.replace(one, about=one.about | {"shots": 0})
    shown, unseen = example_tasks(label([one, by_texts]))["tasks"]
    assert len(shown.support) == 2 and (unseen.support, unseen.question) == ([], older.question)
