"""What a report says first: who is ahead where, and only where that is decided; and the cards below it."""

import pytest
from page_reader import Reader
from toy_runs import DOMAINS, write_run

from amt.attacks.kinds import Attack
from amt.evaluation import runs
from amt.evaluation.comparison import compare
from amt.evaluation.statistics import Summary
from amt.report.document import page
from amt.report.headline import cards, decided, headline, verdicts
from amt.report.shown import curve_columns, label, telling

PGD = (Attack("pgd", (2, 4, 8)),)


@pytest.fixture
def load(tmp_path):
    """`load(name, **how)` writes a run (see `write_run`) and reads it."""
    how = {"samples": 0, "attacks": PGD}
    return lambda name="run", **other: runs.load(write_run(tmp_path / name, **(how | other)))


def said(found) -> str:
    """The sentences with the names that begin them."""
    return " ".join(f"{each.about.label} {each.text}" if each.about else each.text for each in found)


def test_a_run_alone_is_told_along_its_whole_curve(load):
    run = load()
    line, found = headline(label([run]))
    assert line == "One run on 3 domains, 20 episodes each."
    for column in run.columns:
        summary = run.summary("average", column)
        assert f"{summary.mean:.1f}% ±{summary.interval:.1f}" in said(found)
    assert said(found).startswith("run classifies") and "at epsilon 2," in said(found)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_who_is_ahead_is_said_column_by_column(load, order):
    """The robust run is weaker on clean images; whichever run comes first, the same is said."""
    both = [load("strong", strength=0.9), load("weak", strength=0.1, adapters=())]
    line, found = headline(label([both[k] for k in order]))
    strong, weak = (run.summary("average", "pgd20@8").mean for run in both)
    assert line == "2 runs on 3 domains, 20 episodes each."
    assert (
        f"strong is ahead at epsilon 2, 4 and 8, most at epsilon 8: {strong:.1f} against {weak:.1f} per cent."
        in said(found)
    )
    assert "weak is ahead on clean images" in said(found)
    text = Reader(page([both[k] for k in order])).text
    assert " is ahead at epsilon 2, 4 and 8" in text


def test_every_run_that_is_named_is_ahead_of_every_other_in_pairs(load):
    shown = label([load(name, strength=s) for name, s in (("a", 0.5), ("b", 0.55), ("c", 0.9))])
    found = verdicts(shown)
    assert {verdict.column for verdict in found} == set(shown[0].run.columns)
    for verdict in found:
        best = max(shown, key=lambda each: each.run.summary("average", verdict.column).mean)
        behind = [each for each in shown if each is not best]
        ends = [compare(best.run, e.run).differences["average", verdict.column].low for e in behind]
        assert verdict.leader is (best if min(ends) > 0 else None)
    assert any(verdict.leader for verdict in found)


def test_nobody_is_ahead_where_the_interval_holds_zero(load):
    _, found = headline(label([load("one"), load("two")]))  # the same numbers
    assert said(found).startswith("No run is ahead on clean images and at epsilon 2, 4 and 8")
    _, found = headline(label([load("three", episodes=1), load("four", episodes=1, strength=0.1)]))
    assert "is ahead" in said(found) and not [each for each in found if each.about]


def test_nobody_is_ahead_below_chance(load):
    """Twelve against two per cent at chance 20 is no win, whatever the interval."""
    one, two = (load(n, strength=s, attacks=(Attack("pgd", (2, 20)),)) for n, s in (("a", 0.5), ("b", 0.0)))
    difference = compare(one, two).differences["average", "pgd20@20"]
    assert difference.low > 0 and one.summary("average", "pgd20@20").mean < 20
    _, found = headline(label([one, two]))
    assert "No run is above chance (20.0%) at epsilon 20." in said(found)
    assert telling(label([one, two])) == ["pgd20@2"]


def test_runs_of_other_episodes_or_domains_are_not_ranked(load):
    _, found = headline(label([load("a"), load("b", seed=1, strength=0.1)]))
    assert not [each for each in found if each.about]
    _, found = headline(label([load("c"), load("d", domains=DOMAINS[:1], strength=0.1)]))
    assert "none is called ahead" in said(found)


def test_a_difference_is_decided_by_both_intervals():
    assert decided(Summary(3, 2, 9, 1, 5)) == 1 and decided(Summary(-3, 2, 9, -5, -1)) == -1
    assert decided(Summary(3, 4, 9, 1, 5)) == decided(Summary(3, 2, 9, -1, 5)) == decided(None) == 0
    assert decided(Summary(3, float("inf"), 1, 3, 3)) == 0


def test_cards_are_laid_out_alike(load):
    shown = label([load(name, strength=s) for name, s in (("a", 0.5), ("b", 0.55), ("c", 0.9))])
    found = cards(shown)
    layouts = {tuple(tile["what"] for tile in card["tiles"]) for card in found}
    assert layouts == {("clean", "ε 2", "ε 4", "ε 8")}
    assert [card["from"] for card in found] == ["", "points from a", "points from a"]
    assert all(tile.keys() == found[0]["tiles"][0].keys() for card in found for tile in card["tiles"])
    two = cards(shown[:2])
    assert [card["from"] for card in two] == ["points from b", "points from a"]
    signs = [[tile["versus"] for tile in card["tiles"]] for card in two]
    assert [text.replace("−", "+") for text in signs[0]] == [text.replace("−", "+") for text in signs[1]]


def test_the_curve_is_that_of_what_stands_for_robustness(load):
    several = (*PGD, Attack("square", (4, 8), queries=500), Attack("pgd", (64,), "l2"))
    shown = label([load(attacks=several)])
    assert curve_columns(shown) == ["clean", "union@2", "union@4", "union@8", "union"]
    assert curve_columns(label([load("clean", attacks=())])) == ["clean"]
    assert curve_columns(label([load("l2", attacks=several[2:])])) == ["clean", "pgd20-l2@64"]
