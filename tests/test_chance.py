"""Chance: a constant classifier is at 1/N at every epsilon, and what is not above that is marked."""

import dataclasses

import pytest
import torch
from conftest import patterned_episode
from test_runs import ABOUT, fill, row

from amt.attacks.kinds import Attack
from amt.cli.compare import main
from amt.evaluation import runs
from amt.evaluation.chance import chance_notes, is_below_chance
from amt.evaluation.evaluate import columns, evaluate
from amt.evaluation.statistics import chance
from amt.tasks.classifier import Classifier


def constant(episode):
    """Always class 1."""

    def logits(images):
        return torch.eye(episode.n_way)[1].repeat(len(images), 1) + 0 * images.sum((1, 2, 3))[:, None]

    return Classifier(logits, lambda _: logits, ())


def test_chance_is_the_mean_of_one_in_n_and_domains_count_alike(tmp_path):
    rows = [row("a", 0, ways=4), row("a", 1, ways=2), row("a", 2, ways=4), row("b", 0), row("b", 1)]
    fill(tmp_path, rows)
    run = runs.load(tmp_path)
    assert chance(rows[:3]) == pytest.approx(100 / 3) and run.chance("b") == pytest.approx(20)
    assert run.chance("average") == pytest.approx((100 / 3 + 20) / 2)
    assert not is_below_chance(run, "c", "pgd3@2")


def test_what_is_not_above_chance_is_marked(tmp_path):
    fill(tmp_path, [row("a", 0, 0.8, **{"pgd3@2": 0.21, "pgd3@8": 0.1}), row("b", 0, 0.9)])
    run = runs.load(tmp_path)
    assert [is_below_chance(run, "a", column) for column in run.columns] == [False, False, True]
    assert chance_notes(run, ["clean", "pgd3@2"]) == []
    run = dataclasses.replace(run, about=run.about | {"averages": {}})
    assert chance_notes(run) == [
        "< a pgd3@8: not above chance (20.0): a constant classifier scores that at every epsilon",
    ]


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_a_constant_classifier_is_marked_at_every_epsilon(tmp_path, ways):
    attacks = (Attack("pgd", (2, 8), steps=2, loss="ce+dlr"),)
    episodes = [dataclasses.replace(patterned_episode(k, n_way=ways), source="a") for k in range(3)]
    about = ABOUT | {
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "columns": columns(attacks),
        "sources": ["a"],
        "averages": {},
        "deployments": {"a": {}},
    }
    fill(tmp_path, evaluate(constant, episodes, attacks), about)
    run = runs.load(tmp_path)
    assert all(run.summary("a", column).mean == pytest.approx(100 / ways) for column in run.columns)
    assert all(is_below_chance(run, "a", column) for column in run.columns)


def test_a_comparison_says_what_is_not_above_chance(tmp_path, capsys):
    fill(tmp_path / "ours", [row("a", k, 0.1) for k in range(3)], ABOUT | {"sampling": {}, "split": "TEST"})
    fill(tmp_path / "theirs", [row("a", k, 0.8) for k in range(3)], ABOUT | {"sampling": {}, "split": "TEST"})
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "chance" in line]
    assert notes and all(line.startswith(f"{tmp_path / 'ours'}: < a") or "average" in line for line in notes)
