"""The answers to every image: they say what the columns count, survive a run, and add up by class."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from conftest import fails, patterned_episode
from test_numbers import flat_classifier, nan_episode, nan_logits
from toy_runs import write_run

from amt.attacks.kinds import Attack
from amt.evaluation import runs
from amt.evaluation.answers import answered, first_wrong
from amt.evaluation.classes import by_class, confusions, gather, most_confused
from amt.evaluation.evaluate import columns, measure
from amt.evaluation.test_set import as_episode, image_rows
from amt.report.answer_files import NAMES, write_answers
from amt.tasks.classifier import Classifier

ATTACKS = (
    Attack("pgd", (1, 4), steps=2),
    Attack("square", (4,), queries=3),
    Attack("pgd", (40,), "l2", steps=2),
    Attack("support", (2, 4), steps=2),
)


def measured(seed: int):
    """An episode under attacks of each kind, by the distance to the means of its noisy support."""
    episode = patterned_episode(seed, n_way=4, shots=2, queries=10)
    noise = torch.rand(episode.query.shape, generator=torch.Generator().manual_seed(seed))
    episode = dataclasses.replace(episode, query=0.12 * episode.query + 0.88 * noise)

    def refit(support: torch.Tensor):
        means = torch.stack([support[episode.support_labels == k].mean(0).flatten() for k in range(4)])
        return lambda images: -torch.cdist(images.flatten(1), means)

    return episode, measure(lambda e: Classifier(refit(e.support), refit, ()), episode, ATTACKS, seed)


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_right_exactly_where_its_column_counts_it(seed):
    episode, found = measured(seed)
    row, labels = found.row["answers"], episode.query_labels.tolist()
    assert row["labels"] == labels and row["classes"] == ["class 0", "class 1", "class 2", "class 3"]
    assert tuple(row["predicted"]) == tuple(row["probability"]) == columns(ATTACKS)
    for column, answers in row["predicted"].items():
        right = [a == b for a, b in zip(answers, labels, strict=True)]
        assert right == found.correct[column].tolist(), column
        assert found.row[column] == sum(right) / len(right)
    assert row["predicted"]["clean"] == found.predicted.tolist()
    assert found.row["union"] < found.row["clean"] < 1  # there was something to tell apart


def test_what_is_broken_keeps_its_answer_at_every_larger_radius():
    _, found = measured(1)
    predicted, right = found.row["answers"]["predicted"], found.correct
    for small, large in (("clean", "pgd2@1"), ("pgd2@1", "pgd2@4"), ("clean", "square3@4")):
        wrong = (~right[small]).nonzero().squeeze(1).tolist()
        assert wrong and all(predicted[small][k] == predicted[large][k] for k in wrong)
    for k in (~right["union"]).nonzero().squeeze(1).tolist():
        assert predicted["union"][k] in {
            predicted[column][k] for column in columns(ATTACKS)[:-1] if not right[column][k]
        }


def test_what_counts_decides_where_the_last_bit_of_a_logit_does_not_agree():
    logits, labels = torch.tensor([[1.0, 1.0 - 1e-7, -3.0]]).repeat(2, 1), torch.zeros(2).long()
    found = answered(logits, labels, torch.tensor([True, False]))
    assert found.predicted.tolist() == [0, 1] and found.probability.max() < 0.5


def test_a_worst_case_tells_the_first_wrong_answer():
    right = [torch.tensor(each) for each in ([True, True, False], [True, False, False], [False, False, True])]
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 3), torch.tensor([[0.0, 1.0, 2.0]] * 3)
    labels = torch.zeros(3).long()
    answers = [answered(logits[k % 2], labels, each) for k, each in enumerate(right)]
    assert first_wrong(right, answers).predicted.tolist() == [1, 2, 1]


def test_logits_that_are_no_numbers_are_no_answer():
    found = measure(lambda _: flat_classifier(nan_logits), nan_episode(), [Attack("pgd", (1.0,), steps=1)])
    answers = json.loads(json.dumps(found.row["answers"], allow_nan=False))
    assert answers["predicted"]["clean"] == [None, 0, 0, 0] and answers["probability"]["clean"][0] is None
    assert answers["predicted"]["pgd1@1"][0] is None


def test_of_a_test_set_every_picture_has_a_row_with_its_answers():
    episode = patterned_episode(0, n_way=3, queries=4)
    tested = as_episode(episode.query, episode.query_labels, "toys", "abc")
    swapped = episode.query[[0, 2, 1]].flatten(1)  # right about the first class alone
    near = flat_classifier(lambda images: -torch.cdist(images.flatten(1), swapped))
    found = measure(lambda _: near, tested, ATTACKS[:1], chunk=5)
    rows = image_rows(found, tested, range(20, 32), ATTACKS[:1], [f"file {k}" for k in range(20, 32)])
    for row, label in zip(rows, tested.query_labels.tolist(), strict=True):
        answers = row["answers"]
        assert answers["files"] == [f"file {row['index']}"] and answers["labels"] == [label]
        assert answers["predicted"]["clean"] == [row["predicted"]] and "classes" not in answers
        for column, (predicted,) in answers["predicted"].items():
            assert row[column] == (predicted == label)
    assert len({row["pgd2@4"] for row in rows} | {row["clean"] for row in rows}) == 2


# --- by class --------------------------------------------------------------------------------------------

ABOUT = {
    **{"format": 1, "seed": 0, "episodes": 3, "attacks": [], "columns": ["clean"], "sources": ["a"]},
    **{"averages": {}, "settings": {}, "deployments": {}},
}


def written(folder, tasks, **about) -> runs.Run:
    """A run of tasks: (names of the classes, labels, predicted classes) each."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(ABOUT | about))
    lines = []
    for index, (names, labels, predicted) in enumerate(tasks):
        right = sum(a == b for a, b in zip(labels, predicted, strict=True))
        row = {"source": "a", "index": index, "ways": 2, "support": 2, "queries": len(labels)}
        said = {"labels": labels, "predicted": {"clean": predicted}}
        said |= {"probability": {"clean": [None if p is None else 0.5 for p in predicted]}}
        said |= {"classes": names} if names else {}
        more = {"clean": right / len(labels), "coefficients": [], "seconds": 0, "answers": said}
        lines.append(json.dumps(row | more))
    (folder / "rows.jsonl").write_text("\n".join([*lines, ""]))
    return runs.load(folder)


TASKS = [
    (["cat", "dog"], [0, 0, 1, 1], [0, 1, 1, 1]),
    (["owl", "cat"], [0, 0, 1, 1], [1, 1, 1, None]),
    (["dog", "owl"], [0, 0, 1, 1], [0, 0, 1, 0]),
]


def test_classes_of_several_tasks_add_up_by_name(tmp_path):
    found = gather(written(tmp_path, TASKS), "a")
    accuracies = {each.name: each for each in by_class(found, "clean")}
    assert {name: (each.mean, each.tasks, each.images) for name, each in accuracies.items()} == {
        "cat": (50, 2, 4),
        "dog": (100, 2, 4),
        "owl": (25, 2, 4),
    }
    assert accuracies["owl"].interval == pytest.approx(1.96 * 25)  # 0 and 50: a standard error of 25
    pairs = {(each.true, each.other): (each.count, each.met) for each in confusions(found, "clean")}
    # A class can only be taken for another where a task has both: two images of cat met dog, all four cat.
    assert pairs == {
        **{("cat", "cat"): (2, 4), ("cat", "dog"): (1, 2), ("cat", "owl"): (0, 2)},
        **{("dog", "dog"): (4, 4), ("dog", "cat"): (0, 2), ("dog", "owl"): (0, 2)},
        **{("owl", "owl"): (1, 4), ("owl", "cat"): (2, 2), ("owl", "dog"): (1, 2)},
    }
    first, *rest = most_confused(found, "clean", 2)
    assert (first.true, first.other, first.share) == ("owl", "cat", 100) and len(rest) == 1


def test_the_names_of_a_test_set_are_those_of_its_run(tmp_path):
    tasks = [(None, [0], [1]), (None, [2], [2])]
    run = written(tmp_path, tasks, unit="image", class_names=["x", "y", "z"])
    found = gather(run, "a")
    assert [(each.name, each.mean) for each in by_class(found, "clean")] == [("x", 0), ("z", 100)]
    assert math.isinf(by_class(found, "clean")[0].interval)
    assert {(e.true, e.other) for e in confusions(found, "clean")} == {(a, b) for a in "xz" for b in "xyz"}
    header, first, _ = write_answers(run)[0].read_text().splitlines()
    assert header == "domain,image,file,record,class,clean,p(clean)" and first == "a,0,,,x,y,0.5"


def test_tables_for_other_programs_hold_every_answer(tmp_path):
    run = written(tmp_path, TASKS)
    assert [path.name for path in write_answers(run)] == list(NAMES)
    answers, classes, confusion = (list(csv.DictReader((tmp_path / n).open(newline=""))) for n in NAMES)
    assert len(answers) == 12 and answers[1]["class"] == "cat" and answers[1]["clean"] == "dog"
    assert answers[7]["clean"] == answers[7]["p(clean)"] == ""
    right = sum(line["class"] == line["clean"] for line in answers)
    assert 100 * right / 12 == pytest.approx(run.summary("a", "clean").mean)
    assert {line["class"]: line["accuracy"] for line in classes} == {
        "cat": "50.000",
        "dog": "100.000",
        "owl": "25.000",
    }
    assert sum(int(line["images"]) for line in confusion) == 11  # one has no answer
    before = [(tmp_path / name).read_bytes() for name in NAMES]
    write_answers(runs.load(tmp_path))
    assert [(tmp_path / name).read_bytes() for name in NAMES] == before


def test_a_run_without_answers_has_no_tables(tmp_path):
    run = runs.load(write_run(tmp_path / "old", answers=False, samples=0))
    assert write_answers(run) == [] and gather(run, "digits") is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": [0, 2, 1, 1]}, "expected 4 images of 2 classes, found 4 images and label 2"),
        ({"labels": [0, 0, 1]}, r"field 'answers.predicted.clean': expected 3 values, found 4"),
        ({"predicted": {}}, "field 'answers.predicted.clean': expected 4 values, found 0"),
        ({"probability": {"clean": [2.0] * 4}}, "field 'answers.probability.clean.0'"),
        ({"labels": [-1] * 4}, "field 'answers.labels.0'"),
        ({"files": ["x"]}, "field 'answers.files': expected 4 values, found 1"),
        ({"classes": []}, "of 0 classes"),
        ({"records": [0.5] * 4}, "field 'answers.records.0': expected an integer"),
    ],
)
def test_answers_that_do_not_fit_are_named(tmp_path, change, named):
    written(tmp_path, TASKS)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    lines[1] = json.dumps(row | {"answers": row["answers"] | change})
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, ""]))
    fails(f"rows.jsonl, line 2.*{named}", lambda: runs.load(tmp_path))
