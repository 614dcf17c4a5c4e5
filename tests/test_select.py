"""Choosing a router's settings: the best candidate on the episodes given, and nothing else looked at."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from conftest import patterned_episode, random_backbone

from amt import select as selecting
from amt.backbone import Arch, Backbone
from amt.evaluate import PGD, evaluate, merged_predictor
from amt.lora import LoRAPool, Trim, principal_pool
from amt.merge import Routing, route
from amt.perturb import Perturbation
from amt.select import BETAS, GAMMAS, select

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
GRID = [(beta, gamma) for beta in BETAS for gamma in GAMMAS]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(backbone) -> LoRAPool:
    """Adapter 0 is the pretrained network; adapter 1 is blind: at full rank, all its layers are zero.

    So its classes coincide, and every router that weighs the distance between classes prefers adapter 0.
    """
    started = principal_pool(backbone.weights, ARCH.dim, (Perturbation(8, 2), Perturbation(1, 0.25)))
    return started.with_factors(
        {name: torch.cat([factor[:1], 0 * factor[1:]]) for name, factor in started.factors.items()}
    )


make_episode = partial(patterned_episode, n_way=4, shots=1, queries=5, noise=0.15)
EPISODES = [make_episode(seed) for seed in range(3)]
ROUTING = Routing(augment_probability=0.0)


def straightforwardly(backbone, pool, episodes, routing, attacks, trims=(), seed=0) -> float:
    """The score of one candidate: route, merge and evaluate every episode, as the scored ones will be."""
    predict = merged_predictor(backbone, pool, partial(route, backbone, pool, routing=routing), trims, seed)
    rows = list(evaluate(predict, episodes, attacks, seed))
    columns = ["clean", *(attack.name for attack in attacks)]
    return 100 * sum(row[column] for row in rows for column in columns) / len(rows) / len(columns)


@pytest.mark.parametrize("view", ["augmented", "attacked"])
def test_every_candidate_is_scored_as_an_evaluation_with_it_would_be(backbone, pool, view):
    """The shortcuts (cosines once, equal coefficients once) do not change a score."""
    attacks, episodes = (PGD(2, 1, 2),), EPISODES[:2]
    routing = Routing(view=view, augment_probability=0.5)
    selection = select(backbone, pool, episodes, routing, attacks, seed=4)
    assert [what for what, _ in selection.scores] == [f"beta {b:g}, gamma {g:g}" for b, g in GRID]
    for (beta, gamma), (_, score) in zip(GRID, selection.scores, strict=True):
        candidate = dataclasses.replace(routing, beta=beta, gamma=gamma)
        expected = straightforwardly(backbone, pool, episodes, candidate, attacks, seed=4)
        assert score == pytest.approx(expected, abs=100 / 40 + 1e-9)  # an image, where rounding differs
    scores = [score for _, score in selection.scores]
    assert (selection.routing.beta, selection.routing.gamma) == GRID[scores.index(max(scores))]


def test_everything_else_about_the_router_stays(backbone, pool):
    routing = Routing(top_k=1, view="attacked", augment_probability=0.25)
    found = select(backbone, pool, EPISODES[:1], routing).routing
    assert dataclasses.replace(found, beta=routing.beta, gamma=routing.gamma) == routing


def test_episodes_are_looked_at_once_and_only_those_given(backbone, pool):
    drawn = iter(EPISODES)
    select(backbone, pool, itertools.islice(drawn, 2), ROUTING)
    assert next(drawn) is EPISODES[2]


def test_selection_is_a_function_of_its_seed(backbone, pool):
    routing, attacks = Routing(augment_probability=1.0), (PGD(2, 1, 2),)
    first = select(backbone, pool, EPISODES, routing, attacks, seed=1)
    torch.rand(5)
    assert select(backbone, pool, EPISODES, routing, attacks, seed=1) == first


# --- what is best is prescribed, whatever the network ----------------------------------------------------

HALF, MOST, BLOCK = Trim("qkv", -1, 0.5), Trim("fc1", -1, 0.9), Trim("proj", 0, 0.5)


@pytest.fixture
def prescribed(monkeypatch):
    """`prescribed(score)`: episodes score `score(coefficients, trims)`; the list of the trims tried."""
    tried = []

    def arrange(score) -> list[tuple[Trim, ...]]:
        def quality(backbone, pool, episode, coefficients, trims, attacks, seed):
            tried.append(tuple(trims))
            return score(coefficients, tuple(trims))

        monkeypatch.setattr(selecting, "_quality", quality)
        return tried

    return arrange


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8, 1.0])
def test_the_settings_that_merge_best_are_chosen(backbone, pool, prescribed, share):
    """If that is best which gives the first adapter a certain share."""
    prescribed(lambda coefficients, _trims: -abs(coefficients[0] - share))
    chosen = select(backbone, pool, EPISODES, ROUTING).routing

    def distance(routing: Routing) -> float:
        shares = [
            route(backbone, pool, episode.support, episode.support_labels, torch.Generator(), routing)[0]
            for episode in EPISODES
        ]
        return sum(abs(found - share) for found in shares) / len(shares)

    distances = [distance(dataclasses.replace(ROUTING, beta=b, gamma=g)) for b, g in GRID]
    assert max(distances) > min(distances) + 0.1  # there is something to choose
    assert distance(chosen) <= min(distances) + 0.01  # nearly equal coefficients are as one


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ((50, 60, 70), (MOST,)),
        ((50, 70, 60), (HALF,)),
        ((50, 60, 60), (HALF,)),  # of equals the first
        ((50, 50, 40), ()),  # an improvement it must be
    ],
)
def test_a_trimming_is_taken_only_if_it_improves(backbone, pool, prescribed, scores, chosen):
    by_trims = dict(zip([(), (HALF,), (MOST,)], scores, strict=True))
    prescribed(lambda _coefficients, trims: by_trims[trims])
    selection = select(backbone, pool, EPISODES[:1], ROUTING, trim_candidates=(HALF, MOST))
    assert selection.trims == chosen
    assert selection.scores[-2:] == (("trim qkv:-1:0.5", scores[1]), ("trim fc1:-1:0.9", scores[2]))


def test_settings_are_chosen_for_the_network_that_is_scored(backbone, pool, prescribed):
    """What is trimmed in any case is trimmed while choosing, too."""
    tried = prescribed(lambda _coefficients, trims: len(trims))
    selection = select(backbone, pool, EPISODES[:1], ROUTING, trims=(BLOCK,), trim_candidates=(HALF,))
    assert selection.trims == (HALF,) and set(tried) == {(BLOCK,), (BLOCK, HALF)}


def test_of_equal_settings_the_first_is_taken(backbone, pool, prescribed):
    prescribed(lambda *_: 50.0)
    selection = select(backbone, pool, EPISODES[:1], ROUTING)
    assert (selection.routing.beta, selection.routing.gamma) == GRID[0]
    assert len(selection.scores) == len(GRID)
