"""Choosing how a pool is merged: the best candidate on what it is shown, and nothing else looked at."""

import dataclasses
import itertools
import math
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from hypothesis import given
from hypothesis import strategies as st

from amt.attacks.kinds import WORST_CASE, Attack
from amt.attacks.levels import Perturbation
from amt.evaluation import select as selecting
from amt.evaluation.evaluate import evaluate
from amt.evaluation.select import candidate_names, select, selection_attacks, support_predictor
from amt.evaluation.settings import published_grid
from amt.models.architectures import Arch
from amt.models.network import Network
from amt.models.pool import Pool, principal_pool
from amt.models.trim import Trim
from amt.models.weights import stream
from amt.tasks import leave_one_out
from amt.tasks.classifier import head_classifier, merged_networks, merged_predictor
from amt.tasks.leave_one_out import lowest_loss, new_trial
from amt.tasks.merge import route
from amt.tasks.settings import BETAS, GAMMAS, Routing
from meta_dataset_readers.episode import Episode

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
PGD = (Attack("pgd", (2,), steps=2),)


def grid(routing: Routing) -> list[Routing]:
    return [dataclasses.replace(routing, beta=b, gamma=g) for b in BETAS for g in GAMMAS]


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(network) -> Pool:
    """Adapter 0 is the pretrained network; adapter 1 is blind: at full rank, all its layers are zero.

    So its classes coincide, and every router that weighs the distance between classes prefers adapter 0.
    """
    started = principal_pool(network.weights, ARCH.dim, (Perturbation(8, 2), Perturbation(1, 0.25)))
    return started.with_factors(
        {name: torch.cat([factor[:1], 0 * factor[1:]]) for name, factor in started.factors.items()}
    )


@pytest.fixture(scope="module")
def three(network) -> Pool:
    """Three adapters that differ."""
    return moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2)] * 3), 0.3)


make_episode = partial(patterned_episode, n_way=4, shots=1, queries=5, noise=0.15)
EPISODES = [make_episode(seed) for seed in range(3)]
ROUTING = Routing(augment_probability=0.0)
CANDIDATES = grid(ROUTING)


def chosen(network, pool, candidates, episodes, *args, **keywords):
    return select(network, pool, candidates, lambda: episodes, *args, **keywords)


def straightforwardly(network, pool, episodes, candidate, attacks, trims=(), seed=0) -> float:
    """The score of one candidate: route, merge and evaluate every episode, as the scored ones will be."""
    predict = merged_predictor(network, pool, partial(route, network, pool, routing=candidate), trims, seed)
    rows = list(evaluate(predict, episodes, attacks, seed))
    columns = ["clean", *(column for attack in attacks for column in attack.columns)]
    return 100 * sum(row[column] for row in rows for column in columns) / len(rows) / len(columns)


@pytest.mark.parametrize("epsilon", [0, 8])
def test_every_candidate_is_scored_as_an_evaluation_with_it_would_be(network, three, epsilon, monkeypatch):
    """The shortcuts (support features once, equal coefficients once) do not change a score or the choice."""
    monkeypatch.setattr(selecting, "_rounded", lambda coefficients: coefficients)
    candidates = grid(Routing(epsilon=epsilon, augment_probability=0.5))[::6]
    found = chosen(network, three, candidates, EPISODES[:2], PGD, seed=4, halving=False)
    assert [what for what, _ in found.scores] == candidate_names(candidates)
    expected = [straightforwardly(network, three, EPISODES[:2], each, PGD, seed=4) for each in candidates]
    assert [score for _, score in found.scores] == pytest.approx(expected)
    assert found.candidate == expected.index(max(expected))


def test_views_are_shared_and_yet_what_each_would_be_alone(network, three):
    """Several settings of the router at once give what each gives alone, to the bit."""
    settings = [Routing(epsilon=e, top_k=k, augment_probability=1) for e in (0, 4, 8) for k in (1, 3)]
    episode = EPISODES[0]

    def of(candidates):
        generator = stream(3, 0, 1)
        return selecting.candidate_coefficients(
            network, three, candidates, episode.support, episode.support_labels, generator
        )

    assert of(settings) == [of([each])[0] for each in settings]
    assert len(set(of(settings))) > 2


def test_each_episode_is_looked_at_once_and_then_let_go(network, pool):
    """And once more for trimmings; while one is read no other is kept but that before it."""
    seen, alive = [], []

    def episodes():
        for number in range(4):
            assert sum(reference() is not None for reference in alive) <= 1
            episode = make_episode(number)
            alive.append(weakref.ref(episode))
            seen.append(number)
            yield episode
            del episode

    select(network, pool, CANDIDATES[:2], episodes)
    assert seen == [0, 1, 2, 3]
    select(network, pool, CANDIDATES[:2], episodes, trim_candidates=(HALF, MOST))
    assert seen == [0, 1, 2, 3] * 3


def test_selection_is_a_function_of_its_seed(network, three):
    candidates = grid(Routing(augment_probability=1.0))[:6]
    first = chosen(network, three, candidates, EPISODES, PGD, seed=1)
    torch.rand(5)
    assert chosen(network, three, candidates, EPISODES, PGD, seed=1) == first


def test_the_attacks_of_a_selection_are_cheap_ones_at_the_same_radii():
    """Strong, black-box and support attacks rank networks at a price that a grid cannot pay."""
    scoring = (
        Attack("autoattack", (4, 8)),
        Attack("pgd", (2, 8), steps=50),
        Attack("square", (64,), norm="l2"),
        Attack("support", (3,)),
    )
    assert selection_attacks(scoring) == (
        Attack("pgd", (2, 4, 8), steps=10, loss=WORST_CASE),
        Attack("pgd", (64,), norm="l2", steps=10, loss=WORST_CASE),
    )
    few = Attack("pgd", (2,), steps=3, loss="ce")
    assert (
        selection_attacks((few,)) == (dataclasses.replace(few, loss=WORST_CASE),)
        and selection_attacks(()) == ()
    )


def test_the_published_grid():
    """Beta's upper end is left out, gamma's is not."""
    assert published_grid((10.1, 1.0), (2, 4)) == ((0.1, 5.1), (0.0, 0.25, 0.5, 0.75, 1.0))


def test_candidates_are_called_by_what_they_differ_in():
    assert candidate_names([Routing(), Routing(gamma=1)]) == ["beta 1, gamma 0.6", "beta 1, gamma 1"]
    several = [Routing(top_k=1, epsilon=4), Routing(), (0.0, 1.0), (0.5, 0.5)]
    assert candidate_names(several) == [
        "beta 1, gamma 0.6, top 1, route_epsilon 4",
        "beta 1, gamma 0.6, top 2, route_epsilon 0",
        "adapter 1",
        "coefficients 0.5, 0.5",
    ]


# --- what is best is prescribed, whatever the network ----------------------------------------------------

HALF, MOST, BLOCK = Trim("qkv", -1, 0.5), Trim("fc1", -1, 0.9), Trim("proj", 0, 0.5)


def prescribing(monkeypatch, score) -> list[tuple]:
    """Episodes score `score(index, coefficients, trims)` per cent; the list of what was tried."""
    tried = []

    def measure(predict, episode, attacks, seed):
        coefficients, trims = predict(episode)
        tried.append((episode.index, coefficients, trims))
        return SimpleNamespace(row={"clean": score(episode.index, coefficients, trims) / 100})

    monkeypatch.setattr(selecting, "measure", measure)
    monkeypatch.setattr(selecting, "_classifier", lambda network, merged, episode, setting: setting[:2])
    return tried


@pytest.fixture
def prescribed(monkeypatch):
    return partial(prescribing, monkeypatch)


def corner(k: int, n: int = 12) -> tuple[float, ...]:
    return tuple(float(p == k) for p in range(n))


def unread(n: int) -> list[Episode]:
    """Episodes whose images nobody may look at."""
    return [dataclasses.replace(EPISODES[0], support=None, query=None, index=k) for k in range(n)]


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8, 1.0])
def test_the_settings_that_merge_best_are_chosen(network, pool, prescribed, share):
    """If that is best which gives the first adapter a certain share."""
    prescribed(lambda _index, coefficients, _trims: -abs(coefficients[0] - share))
    found = CANDIDATES[chosen(network, pool, CANDIDATES, EPISODES).candidate]

    def distance(routing: Routing) -> float:
        shares = [
            route(network, pool, episode.support, episode.support_labels, torch.Generator(), routing)[0]
            for episode in EPISODES
        ]
        return sum(abs(found - share) for found in shares) / len(shares)

    distances = [distance(candidate) for candidate in CANDIDATES]
    assert max(distances) > min(distances) + 0.1  # there is something to choose
    assert distance(found) <= min(distances) + 0.05  # nearly equal coefficients are as one


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((50, 60, 70), (MOST,)),
        ((50, 70, 60), (HALF,)),
        ((50, 60, 60), (HALF,)),  # of equals the first
        ((50, 50, 40), ()),  # an improvement it must be
    ],
)
def test_a_trimming_is_taken_only_if_it_improves(network, pool, prescribed, scores, expected):
    by_trims = dict(zip([(), (HALF,), (MOST,)], scores, strict=True))
    prescribed(lambda _index, _coefficients, trims: by_trims[trims])
    selection = chosen(network, pool, CANDIDATES, EPISODES[:1], trim_candidates=(HALF, MOST))
    assert selection.trims == expected
    assert selection.scores[-2:] == (("trim qkv:-1:0.5", scores[1]), ("trim fc1:-1:0.9", scores[2]))


def test_trimmings_are_tried_with_what_was_chosen(network, pool, prescribed):
    """With the chosen coefficients, and with what is trimmed in any case."""
    tried = prescribed(lambda _index, coefficients, trims: coefficients[1] + len(trims))
    candidates = [(1.0, 0.0), (0.0, 1.0)]
    selection = chosen(network, pool, candidates, EPISODES[:2], trims=(BLOCK,), trim_candidates=(HALF,))
    assert (selection.candidate, selection.trims) == (1, (HALF,))
    assert tried == [
        *((index, candidate, (BLOCK,)) for index in range(2) for candidate in candidates),
        *((index, (0.0, 1.0), (BLOCK, HALF)) for index in range(2)),
    ]


def test_the_criterion_decides_and_the_curve_tells_what_the_others_would_have_chosen(network, pool):
    """On real episodes: each criterion takes the best candidate by its own mean."""
    candidates = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    for by, value in (("clean", lambda p: p[1]), ("robust", lambda p: p[2]), ("mean", lambda p: p[1] + p[2])):
        found = chosen(network, pool, candidates, EPISODES, PGD, by=by)
        assert [n for *_, n in found.curve] == [3] * 3
        values = [value(point) for point in found.curve]
        assert found.candidate == values.index(max(values))
        assert found.scores[0][1] == pytest.approx(values[0] / (2 if by == "mean" else 1))


def test_nothing_is_robust_without_an_attack(network, pool):
    assert chosen(network, pool, [(1.0, 0.0), (0.0, 1.0)], EPISODES).curve[0][2] is None
    with pytest.raises(ValueError, match="needs an attack"):
        chosen(network, pool, [(1.0, 0.0), (0.0, 1.0)], EPISODES, by="robust")


def test_of_equal_settings_the_first_is_taken(network, pool, prescribed):
    prescribed(lambda *_: 50.0)
    selection = chosen(network, pool, CANDIDATES, EPISODES)
    assert selection.candidate == 0 and len(selection.scores) == len(CANDIDATES)


@pytest.mark.parametrize(
    ("n", "evaluations"),
    [(29, 29 * 12), (30, 30 * 12), (40, 30 * 12 + 10 * 6), (70, 30 * 12 + 30 * 6 + 10 * 3)],
)
def test_those_that_lag_behind_are_given_up(network, prescribed, n, evaluations):
    """Nobody before 30 episodes; after 30, 60, 120 ... half of 12 goes on, two at the end."""
    tried = prescribed(lambda _index, coefficients, _trims: coefficients.index(1))
    selection = chosen(network, None, [corner(k) for k in range(12)], unread(n))
    assert selection.candidate == 11 and len(tried) == evaluations
    given_up = [name for name, _ in selection.scores if "given up after 30 episodes" in name]
    assert len(given_up) == (6 if n > 30 else 0)
    assert [count for *_, count in selection.curve[:6]] == [min(n, 30)] * 6
    assert [score for _, score in selection.scores] == pytest.approx(range(12))


def test_the_published_protocol_gives_nobody_up(network, prescribed):
    """There the best may come from behind."""
    prescribed(lambda index, coefficients, _trims: coefficients.index(1) * (-1 if index < 30 else 9))
    everyone = [corner(k) for k in range(6)]
    assert chosen(network, None, everyone, unread(40), halving=False).candidate == 5
    assert chosen(network, None, everyone, unread(40)).candidate != 5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.sampled_from([1, 9, 31, 61]))
def test_giving_up_changes_nothing_where_episodes_agree(network, scores, n):
    """Also among equals."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        prescribing(monkeypatch, lambda _index, coefficients, _trims: scores[coefficients.index(1)])
        everyone = [corner(k) for k in range(len(scores))]
        assert chosen(network, None, everyone, unread(n)).candidate == scores.index(max(scores))


def test_candidates_that_cannot_be_told_apart_go_on_together(network, prescribed):
    """Three names for the best: none of them takes another's place."""
    prescribed(lambda _index, coefficients, _trims: coefficients[0])
    everyone = [(0.2, 0.8), (0.9, 0.1), (0.91, 0.09), (0.9, 0.1), (0.5, 0.5), (0.7, 0.3)]
    selection = chosen(network, None, everyone, unread(30))
    assert selection.candidate == 1
    assert [name for name, _ in selection.scores if "given up" in name] == []
    selection = chosen(network, None, everyone, unread(31))
    assert ["given up" in name for name, _ in selection.scores] == [True, False, False, False, True, False]


# --- from the support set of a task ----------------------------------------------------------------------


def by_hand(network, pool, episode, settings, epsilon, seed) -> list[float]:
    """The loss of every setting, each by itself."""
    trial = new_trial(
        network, episode.support, episode.support_labels, epsilon, stream(seed, episode.index, 4)
    )
    networks = [partial(merged_networks(pool), *setting) for setting in settings]
    return [lowest_loss(network, [each], trial)[1] for each in networks]


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("epsilon", [0, 8])
def test_a_task_gets_the_candidate_that_tells_its_support_apart(network, three, epsilon, shots, monkeypatch):
    monkeypatch.setattr(selecting, "_rounded", lambda coefficients: coefficients)
    candidates = grid(Routing(epsilon=epsilon, augment_probability=0.5))[::5]
    predict = support_predictor(network, three, candidates, epsilon=epsilon, seed=2)
    taken = []
    for number in range(3):
        episode = make_episode(number, shots=shots)
        generator = stream(2, number, 1)
        given_ = selecting.candidate_coefficients(
            network, three, candidates, episode.support, episode.support_labels, generator
        )
        losses = by_hand(network, three, episode, [(each, ()) for each in given_], epsilon, 2)
        assert predict(episode).coefficients == given_[losses.index(min(losses))]
        taken.append(losses.index(min(losses)))
    assert len(set(taken)) > 1 or shots == 3  # tasks do differ


def test_no_query_is_looked_at(network, three):
    """Neither images nor labels: whatever they are, the task's classifier is the same."""
    predict = support_predictor(network, three, grid(Routing(epsilon=4))[::4], (), (HALF,), epsilon=4)
    episode = make_episode(1, shots=2)
    garbage = dataclasses.replace(
        episode, query=torch.full_like(episode.query, math.nan), query_labels=-episode.query_labels
    )
    here, there = predict(episode), predict(garbage)
    assert here.coefficients == there.coefficients
    assert torch.equal(here.logits(episode.query), there.logits(episode.query))


@pytest.mark.parametrize("offered", [(HALF,), (HALF, MOST), (Trim("qkv", -1, 1.0),)])
def test_a_tasks_trimming_is_one_that_improves(network, three, offered):
    predict = support_predictor(network, three, [(0.5, 0.5, 0.0)], (BLOCK,), offered)
    for number in range(3):
        episode = make_episode(number, shots=2)
        settings = [((0.5, 0.5, 0.0), (BLOCK, *extra)) for extra in [(), *((trim,) for trim in offered)]]
        losses = by_hand(network, three, episode, settings, 0, 0)
        merged = merged_networks(three)(*settings[losses.index(min(losses))])
        expected = head_classifier(network, merged, episode)
        assert torch.allclose(predict(episode).logits(episode.query), expected.logits(episode.query))


def test_each_distinct_network_sees_a_task_once(network, three, monkeypatch):
    """Of 28 settings of which several agree, and of one-hot candidates whose weights are merged but once."""
    seen = []
    real = leave_one_out.fixed_features

    def counted(network, weights, images):
        seen.append(len(images))
        return real(network, weights, images)

    monkeypatch.setattr(leave_one_out, "fixed_features", counted)
    episode = make_episode(0, shots=2)
    generator = stream(0, 0, 1)
    arguments = network, three, CANDIDATES, episode.support, episode.support_labels, generator
    distinct = {selecting._rounded(each) for each in selecting.candidate_coefficients(*arguments)}
    support_predictor(network, three, CANDIDATES)(episode)
    assert seen == [len(episode.support)] * len(distinct) and len(distinct) < len(CANDIDATES)

    merges = []
    monkeypatch.setattr(Pool, "merge", lambda self, c: merges.append(c) or network.weights)
    predict = support_predictor(network, three, [corner(p, 3) for p in range(3)])
    for number in range(4):
        predict(make_episode(number, shots=2))
    assert sorted(merges) == sorted(corner(p, 3) for p in range(3))


def test_the_support_attack_can_go_through_it(network, three):
    """A moved support set is chosen for anew, and prototypes follow it differentiably."""
    predict = support_predictor(network, three, list(itertools.islice(grid(Routing()), 4)))
    rows = list(evaluate(predict, EPISODES[:1], (Attack("support", (4,), steps=1),)))
    assert rows[0]["support-pgd1@4"] <= rows[0]["clean"]
