"""The oracle: no worse than any mixture it tried, on the very queries, and stamped as no method."""

import math

import pytest
from commands import called
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from toy_pools import make_episode

import test_meta_dataset
from amt.attacks.kinds import Attack
from amt.evaluation.deploy import deploy
from amt.evaluation.evaluate import columns, measure
from amt.evaluation.oracle import STAMP, best_row, simplex_grid
from amt.evaluation.settings import Deployment
from amt.tasks.classifier import merged_predictor

ATTACKS = (Attack("pgd", (4, 8), steps=2),)


def nowhere(*_):
    raise AssertionError("no episode may be asked for")


@given(st.integers(1, 5), st.integers(1, 8))
def test_the_grid_is_the_whole_simplex(members, parts):
    grid = simplex_grid(members, parts)
    assert len(grid) == len(set(grid)) == math.comb(parts + members - 1, parts)
    assert all(len(each) == members and sum(each) == pytest.approx(1) and min(each) >= 0 for each in grid)
    assert {tuple(float(p == k) for p in range(members)) for k in range(members)} <= set(grid)


def test_a_grid_that_takes_forever_is_refused():
    fails("--oracle_parts 20: more than 2000 mixtures of 8 adapters", lambda: simplex_grid(8, 20))


def test_the_oracle_is_no_worse_than_any_single_member(network, pool):
    oracle, note = deploy(network, pool, Deployment(routing="oracle", oracle_parts=2), "tiny", nowhere)
    assert isinstance(oracle, tuple) and len(oracle) == 6
    assert note["stamp"] == STAMP and "no method" in STAMP and "query labels" in note["tuned_on"]
    assert len(note["candidates"]) == 6
    single = [merged_predictor(network, pool[p], lambda *_: (1.0,)) for p in range(len(pool))]
    for number in range(3):
        episode = make_episode(number)
        found = best_row([measure(each, episode, ATTACKS).row for each in oracle], columns(ATTACKS))
        for predict in single:
            alone = measure(predict, episode, ATTACKS).row
            assert all(found[column] >= alone[column] for column in columns(ATTACKS))
        assert found["index"] == number and sum(found["coefficients"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--routing", "oracle", "--select", "support"), "excludes --select"),
        (("--select_by", "clean"), "--select_by clean is for --select valid, found --select none"),
        (("--select", "valid", "--select_by", "robust", "--epsilon"), "--select_by robust needs an attack"),
        (("--routing", "oracle", "--oracle_parts", "0"), "--oracle_parts"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, flags, named):
    words = ["test_meta_dataset.py", "--arch", "vit_mini_amt_merge", "--resume", "pool.safetensors"]
    words += ["--data_path", tmp_path]
    ended = called(test_meta_dataset.main, [*words, "--output_dir", tmp_path / "out", *flags])
    assert ended.code == 2 and named in ended.err and ended.err.count("\n") == 1
