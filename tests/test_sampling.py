"""Episode descriptions: Meta-Dataset's rules, and every impossible setting refused beforehand."""

import collections
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import bilevel_spec, dag_spec, example_spec, write_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.sampling import check_sampling, sample_episode
from meta_dataset_readers.spec import DatasetSpec, load_spec

FIVE_WAY = EpisodeSampling(num_ways=5, num_support=5, num_query=10)


def flat(sizes, before=0) -> DatasetSpec:
    """A source whose TEST classes have `sizes` images, after `before` TRAIN classes of 3."""
    n = before + len(sizes)
    split_classes = {"TRAIN": range(before), "VALID": range(before, before), "TEST": range(before, n)}
    names = tuple(f"class {i}" for i in range(n))
    return DatasetSpec("flat", Path("flat"), split_classes, (3,) * before + tuple(sizes), names)


def draw(spec, sampling, seed=0, split="TEST"):
    return sample_episode(spec, split, sampling, np.random.default_rng(seed))


def draws(spec, sampling, n=100, split="TEST"):
    return [draw(spec, sampling, seed, split) for seed in range(n)]


# --- invariants ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(2, 300), min_size=5, max_size=70),
    before=st.integers(0, 3),
    max_ways=st.integers(5, 60),
    max_num_query=st.integers(1, 20),
    max_support=st.integers(60, 600),
    contribution=st.integers(1, 120),
    seed=st.integers(0, 2**32),
)
def test_variable_episodes_keep_every_bound(
    sizes, before, max_ways, max_num_query, max_support, contribution, seed
):
    sampling = EpisodeSampling(
        max_ways_upper_bound=max_ways,
        max_num_query=max_num_query,
        max_support_set_size=max_support,
        max_support_size_contrib_per_class=contribution,
    )
    spec = flat(sizes, before)
    episode = draw(spec, sampling, seed)
    images = [spec.images_per_class[class_id] for class_id in episode.class_ids]
    assert 5 <= len(episode.class_ids) <= min(max_ways, len(sizes))
    assert len(set(episode.class_ids)) == len(episode.class_ids) == len(episode.shots)
    assert set(episode.class_ids) <= set(spec.classes("TEST"))
    assert episode.queries == min(max_num_query, min(images) // 2) >= 1
    assert all(1 <= s <= n - episode.queries for s, n in zip(episode.shots, images, strict=True))
    assert sum(episode.shots) <= max_support
    assert sum(episode.shots) <= sum(min(contribution, n - episode.queries) for n in images)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=3, max_size=40),
    ways=st.none() | st.integers(1, 20),
    support=st.none() | st.integers(1, 30) | st.tuples(st.integers(1, 5), st.integers(5, 30)),
    query=st.none() | st.integers(0, 30),
    least=st.integers(0, 60),
    seed=st.integers(0, 2**32),
)
def test_whatever_the_check_lets_pass_can_be_drawn(sizes, ways, support, query, least, seed):
    sampling = EpisodeSampling(
        num_ways=ways, num_support=support, num_query=query, min_examples_in_class=least
    )
    spec = flat(sizes)
    try:
        check_sampling(spec, "TEST", sampling)
    except InputError as error:
        assert "\n" not in str(error)
        with pytest.raises(InputError):
            draw(spec, sampling, seed)
        return
    episode = draw(spec, sampling, seed)
    assert ways is None or len(episode.class_ids) == ways
    assert query is None or episode.queries == query
    for class_id, shots in zip(episode.class_ids, episode.shots, strict=True):
        assert spec.images_per_class[class_id] >= max(least, shots + episode.queries)
        assert shots >= 1
    if support is not None:
        lo, hi = support if isinstance(support, tuple) else (support, support)
        assert lo <= episode.shots[0] <= hi and len(set(episode.shots)) == 1


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_an_episode_is_a_function_of_the_generator(tmp_path, kind):
    spec = load_spec(write_spec(tmp_path, example_spec(kind, "s", 30)[0]))
    first, again = (draws(spec, EpisodeSampling(), 20, "TRAIN") for _ in range(2))
    assert first == again
    assert len(set(first)) > 10


# --- fixed and variable counts ---------------------------------------------------------------------------


def test_queries_are_half_of_the_smallest_class_drawn():
    assert draw(flat([10, 9, 20, 21, 30]), EpisodeSampling()).queries == 4
    assert draw(flat([100] * 5), EpisodeSampling()).queries == 10


def test_with_fixed_shots_the_queries_are_what_the_smallest_class_has_left():
    assert draw(flat([12, 9, 20, 21, 30]), EpisodeSampling(num_support=5)).queries == 4


def test_fixed_counts_may_exceed_the_bounds_of_the_variable_case():
    spec = flat([200] * 70)
    episode = draw(spec, EpisodeSampling(num_ways=60, num_support=20, num_query=60))
    assert (len(episode.class_ids), episode.shots, episode.queries) == (60, (20,) * 60, 60)


def test_no_query_at_all_is_legal():
    for sampling in (EpisodeSampling(num_query=0), EpisodeSampling(num_ways=5, num_support=3, num_query=0)):
        assert draw(flat([3] * 6), sampling).queries == 0


def test_a_range_of_shots_gives_one_value_for_the_whole_episode():
    episodes = draws(flat([30] * 6), EpisodeSampling(num_support=(1, 3), num_query=2))
    assert {episode.shots[0] for episode in episodes} == {1, 2, 3}
    assert all(len(set(episode.shots)) == 1 for episode in episodes)


def test_five_classes_always_give_five_ways():
    assert {len(episode.class_ids) for episode in draws(flat([20] * 5), EpisodeSampling())} == {5}


def test_500_and_100_bound_the_support_set_and_not_a_class():
    """A class much larger than the others gets more than its `contribution`, as in the publication."""
    shots = [max(episode.shots) for episode in draws(flat([20] * 4 + [5000]), EpisodeSampling())]
    assert max(shots) > 100


def test_all_classes_of_a_split_can_be_asked_for_in_their_order():
    spec = flat([20] * 60, before=3)
    episode = draw(spec, EpisodeSampling(use_all_classes=True, max_support_set_size=500))
    assert episode.class_ids == tuple(range(3, 63))
    with pytest.raises(InputError, match="use_all_classes"):
        EpisodeSampling(use_all_classes=True, num_ways=5)
    with pytest.raises(InputError, match="60 ways"):
        check_sampling(spec, "TEST", EpisodeSampling(use_all_classes=True, max_support_set_size=50))


def test_larger_classes_get_more_shots():
    sampling = EpisodeSampling(min_log_weight=0.0, max_log_weight=0.0)
    spec = flat([20, 40, 60, 80, 100])
    for episode in draws(spec, sampling, 20):
        by_size = sorted(
            (spec.images_per_class[c], s) for c, s in zip(episode.class_ids, episode.shots, strict=True)
        )
        assert [s for _, s in by_size] == sorted(episode.shots)


def test_one_shot_with_hierarchies_is_had_by_bounding_the_variable_case():
    """AMT's "5-way 1-shot": at most 5 ways and a contribution of 1."""
    sampling = EpisodeSampling(max_ways_upper_bound=5, max_support_size_contrib_per_class=1, max_num_query=15)
    for episode in draws(flat([20, 31] * 5), sampling, 20):
        assert episode.shots == (1,) * 5
        assert episode.queries in (10, 15)


def test_small_classes_are_left_out_and_equal_ones_kept():
    sampling = dataclasses.replace(FIVE_WAY, min_examples_in_class=15)
    seen = {c for episode in draws(flat([14, 15, 16, 15, 99, 15, 14]), sampling) for c in episode.class_ids}
    assert seen == {1, 2, 3, 4, 5}


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "sampling", "complaint"),
    [
        ([], EpisodeSampling(), "split TEST has no classes; splits with classes: TRAIN"),
        ([20] * 4, EpisodeSampling(), "has 4 classes, 5-way episodes need 5"),
        ([20] * 9, EpisodeSampling(num_ways=10), "has 9 classes, 10-way episodes need 10"),
        (
            [20, 20, 20, 20, 19],
            dataclasses.replace(FIVE_WAY, min_examples_in_class=20),
            "4 classes with at least 20 images, 5-way",
        ),
        (
            [20] * 5 + [14, 6],
            FIVE_WAY,
            r"2 of 7 classes .* the 15 images .* class 8 \('class 8'\) with 6; min_examples_in_class=15",
        ),
        ([20] * 4 + [6], FIVE_WAY, "1 of 5 classes .* with 6$"),  # leaving it out would not help
        ([20] * 5 + [1], EpisodeSampling(), "1 of 6 classes have fewer than the 2 images"),
        ([20] * 5 + [6], EpisodeSampling(num_support=(1, 6)), "fewer than the 7 images"),
        ([20] * 5 + [6], EpisodeSampling(num_query=6), "fewer than the 7 images"),
        ([20] * 600, EpisodeSampling(num_ways=600), "up to 600 ways .* max_support_set_size is 500"),
        ([20] * 12, EpisodeSampling(max_support_set_size=11), "up to 12 ways"),
    ],
)
def test_what_cannot_be_drawn_is_refused_beforehand(sizes, sampling, complaint):
    spec = flat(sizes, before=2)
    for attempt in (lambda: check_sampling(spec, "TEST", sampling), lambda: draw(spec, sampling)):
        with pytest.raises(InputError, match=complaint) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [
        {"num_ways": 0},
        {"num_support": 0},
        {"num_support": (0, 3)},
        {"num_support": (3, 2)},
        {"num_query": -1},
        {"min_ways": 0},
        {"max_ways_upper_bound": 4},
        {"max_num_query": 0},
        {"max_support_set_size": 0},
        {"max_support_size_contrib_per_class": 0},
        {"min_examples_in_class": -1},
        {"min_log_weight": 1.0},
        {"max_log_weight": math.inf},
        {"min_log_weight": math.nan},
        {"ignore_hierarchy_probability": 1.5},
    ],
)
def test_settings_without_sense_are_refused_by_name(fault):
    with pytest.raises(InputError, match=next(iter(fault))):
        EpisodeSampling(**fault)


# --- hierarchies -----------------------------------------------------------------------------------------


@pytest.fixture
def alphabets(tmp_path):
    return load_spec(write_spec(tmp_path, bilevel_spec("b", (1, 0, 2), [3, 5, 7], [20] * 15)))


ALPHABETS = [set(range(3, 8)), set(range(8, 15))]  # of TEST


def test_letters_of_an_episode_share_their_alphabet_and_alphabets_count_equally(alphabets):
    episodes = draws(alphabets, EpisodeSampling(), 300)
    homes = [next(i for i, a in enumerate(ALPHABETS) if set(e.class_ids) <= a) for e in episodes]
    assert 110 < homes.count(0) < 190
    ways = collections.Counter(len(e.class_ids) for e, home in zip(episodes, homes, strict=True) if home == 1)
    assert set(ways) == {5, 6, 7}


@pytest.mark.parametrize(
    "off", [{"num_ways": 5}, {"ignore_bilevel_ontology": True}, {"ignore_hierarchy_probability": 1.0}]
)
def test_alphabets_can_be_switched_off(alphabets, off):
    episodes = draws(alphabets, EpisodeSampling(**off), 20)
    assert any(not any(set(e.class_ids) <= a for a in ALPHABETS) for e in episodes)


def test_a_hierarchy_can_be_ignored_now_and_then(alphabets):
    episodes = draws(alphabets, EpisodeSampling(ignore_hierarchy_probability=0.5), 200)
    mixed = sum(not any(set(e.class_ids) <= a for a in ALPHABETS) for e in episodes)
    assert 60 < mixed < 130


def test_an_alphabet_with_too_few_letters_is_named(alphabets):
    with pytest.raises(InputError, match="superclass 'alphabet 1' has 5 classes, fewer than min_ways 6"):
        check_sampling(alphabets, "TEST", EpisodeSampling(min_ways=6))


def test_alphabets_and_a_least_class_size_exclude_each_other(alphabets):
    with pytest.raises(InputError, match="ignore_bilevel_ontology"):
        check_sampling(alphabets, "TEST", EpisodeSampling(min_examples_in_class=1))
    check_sampling(alphabets, "TEST", EpisodeSampling(min_examples_in_class=1, ignore_bilevel_ontology=True))


@pytest.fixture
def graph(tmp_path):
    """Class ids 0..8 = leaves a..i. Eligible for 5 ways: r (all nine), m and its copy n (a..e)."""
    inner = {"r": [*"fghi", "m", "n", "o"], "m": list("abcde"), "n": ["m"], "o": list("fghi")}
    images = dict.fromkeys("abcdefghi", 20) | {"e": 10}
    return load_spec(write_spec(tmp_path, dag_spec("d", {"TEST": inner}, images)))


def test_all_leaves_below_a_node_form_the_episode_in_order(graph):
    """Nodes with the same leaves count twice; the number of ways is not drawn."""
    counts = collections.Counter(e.class_ids for e in draws(graph, EpisodeSampling(), 300))
    assert set(counts) == {tuple(range(5)), tuple(range(9))}
    assert 165 < counts[tuple(range(5))] < 235


def test_a_node_with_too_many_leaves_is_drawn_from(graph):
    episodes = draws(graph, EpisodeSampling(max_ways_upper_bound=6), 100)
    above_six = [e.class_ids for e in episodes if len(e.class_ids) == 6]
    assert len(set(above_six)) > 10
    assert all(len(set(class_ids)) == 6 for class_ids in above_six)


def test_leaves_are_counted_after_small_classes_are_left_out(graph):
    episodes = draws(graph, EpisodeSampling(min_examples_in_class=11), 20)
    assert {e.class_ids for e in episodes} == {(0, 1, 2, 3, 5, 6, 7, 8)}


def test_a_graph_without_an_eligible_node_is_refused(tmp_path):
    inner = {"m": list("abcd"), "n": list("efgh")}
    spec = load_spec(write_spec(tmp_path, dag_spec("d", {"TEST": inner}, dict.fromkeys("abcdefgh", 20))))
    with pytest.raises(InputError, match=r"no node of the class graph .*ignore_dag_ontology"):
        check_sampling(spec, "TEST", EpisodeSampling())
    check_sampling(spec, "TEST", EpisodeSampling(ignore_dag_ontology=True))


def test_a_class_that_no_eligible_node_spans_may_be_small(tmp_path):
    inner = {"m": list("abcde"), "n": ["f"]}
    images = dict.fromkeys("abcde", 20) | {"f": 1}
    spec = load_spec(write_spec(tmp_path, dag_spec("d", {"TEST": inner}, images)))
    check_sampling(spec, "TEST", EpisodeSampling())
    with pytest.raises(InputError, match="1 of 6 classes"):
        check_sampling(spec, "TEST", EpisodeSampling(ignore_hierarchy_probability=0.1))
