"""Evaluation: what counts as robust, a row per episode, and the arithmetic of the summaries."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from hypothesis import given
from hypothesis import strategies as st

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.evaluation.evaluate import columns, evaluate, measure, validate
from amt.evaluation.statistics import summarise
from amt.models.architectures import Arch
from amt.models.head_settings import default_head
from amt.models.network import Network
from amt.models.pool import Pool, principal_pool
from amt.tasks.classifier import Classifier, head_classifier, merged_predictor, pretrained_predictor
from meta_dataset_readers.episode import Episode

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
ATTACKS = (Attack("pgd", (1, 4, 16), steps=4),)


# --- a classifier whose margins are known ----------------------------------------------------------------


class Halves:
    """Two classes by the sign of the mean over a pattern of signs: no attack within epsilon moves that
    mean by more than epsilon, and one does by exactly epsilon. Notes what it is shown."""

    def __init__(self, side: int = 6):
        self.pattern = 1 - 2.0 * (torch.arange(3 * side * side) % 2).view(3, side, side)
        self.seen: list[torch.Tensor] = []

    def images(self, margins: list[float]) -> torch.Tensor:
        """Mid-grey images with these margins in 1/255, far from black and white."""
        return 0.5 + torch.tensor(margins).view(-1, 1, 1, 1) / 255 * self.pattern

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach().clone())
        mean = ((images - 0.5) * self.pattern).mean((1, 2, 3))
        return 100 * torch.stack([mean, -mean], dim=1)

    def episode(self, margins: list[float], index: int = 0) -> Episode:
        """Queries of class 0 with these margins; a negative one is misclassified as it is."""
        query = self.images(margins)
        labels = torch.zeros(len(margins), dtype=torch.int64)
        return Episode(query[:2], torch.tensor([0, 1]), query, labels, source="halves", index=index)


def rows_of(classifier, episodes, attacks=(), seed: int = 0) -> list[dict]:
    return list(
        evaluate(lambda _episode: Classifier(classifier, lambda _: classifier, ()), episodes, attacks, seed)
    )


MARGINS = [-3.0, 0.5, 1.5, 2.5, 4.5, 9.0]


@pytest.mark.parametrize(
    ("epsilon", "standing"), [(0.4, 5), (0.6, 4), (1.4, 4), (2.6, 2), (8.9, 1), (9.1, 0)]
)
def test_an_image_falls_exactly_when_epsilon_exceeds_its_margin(epsilon, standing):
    halves = Halves()
    (row,) = rows_of(halves, [halves.episode(MARGINS)], [Attack("pgd", (epsilon,), steps=10)])
    assert row["clean"] == 5 / 6
    assert row[f"pgd10@{epsilon:g}"] == pytest.approx(standing / 6)


@given(st.lists(st.floats(-20, 20).map(lambda m: m + 0.05 * math.copysign(1, m)), min_size=1, max_size=12))
def test_the_curve_over_epsilon_is_the_distribution_of_margins(margins):
    halves = Halves(side=4)
    attack = Attack("pgd", (1, 3, 6, 12), steps=10)
    margins = [m for m in margins if all(abs(m - epsilon) > 0.02 for epsilon in attack.epsilons)] or [2.0]
    (row,) = rows_of(halves, [halves.episode(margins)], [attack])
    assert row["clean"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    for epsilon in attack.epsilons:
        assert row[attack.column(epsilon)] == pytest.approx(sum(m > epsilon for m in margins) / len(margins))


def test_an_attack_stays_in_its_ball_and_in_the_range_of_pixels():
    halves = Halves()
    episode = halves.episode([1.0, 2.0])
    extreme = ((episode.query - 0.5) * 80 + 0.5).clamp(0, 1)  # the second is black and white
    episode = dataclasses.replace(episode, query=extreme)
    rows_of(halves, [episode], [Attack("pgd", (8,), steps=6, step_size=4)])
    for images in halves.seen:
        assert images.min() >= 0 and images.max() <= 1
        distances = (images[:, None] - episode.query[None]).abs().amax((2, 3, 4))
        assert distances.min(1).values.max() <= 8 / 255 + 1e-6


def test_the_attack_does_not_touch_what_is_wrong_already():
    halves = Halves()
    rows_of(halves, [halves.episode([-3.0, -1.0])], ATTACKS)
    assert [len(images) for images in halves.seen] == [2]  # the clean pass alone


def test_what_a_small_ball_breaks_is_broken_in_a_large_one():
    """Even where the attack takes steps that are too large to find it there: it is not tried again."""
    halves = Halves()
    episode = halves.episode([1.0, 12.0])
    (row,) = rows_of(halves, [episode], [Attack("pgd", (2, 11), steps=10)])
    assert (row["pgd10@2"], row["pgd10@11"]) == (0.5, 0.5)
    tried = [len(images) for images in halves.seen]
    assert tried[-11:] == [1] * 11  # at 11 only what was left at 2


def test_the_union_is_the_worst_case_per_image():
    """Per image, not per episode; at each radius what any attack of that norm did up to there."""
    halves = Halves()
    weak, strong = Attack("pgd", (2, 11), steps=1, step_size=0.001), Attack("apgd", (4,), steps=20)
    other = Attack("pgd", (60,), "l2", steps=10)
    measured = measure(
        lambda _: Classifier(halves, lambda _: halves, ()), halves.episode(MARGINS), [weak, strong, other]
    )
    row, standing = measured.row, measured.correct
    assert row["union@2"] == row["pgd1-step0.001@2"] and row["union@4"] == row[
        "apgd20-ce@4"
    ] == pytest.approx(2 / 6)
    assert row["union@11"] == row["union@4"] < row["pgd1-step0.001@11"]
    both = standing["union@11"] & standing["pgd10-l2@60"]
    assert torch.equal(standing["union"], both) and "union-l2@60" not in row
    assert list(standing) == list(columns([weak, strong, other]))


# --- rows ------------------------------------------------------------------------------------------------


make_episode = partial(patterned_episode, queries=4)


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(network) -> Pool:
    """Two adapters, each moved a way of its own."""
    levels = Perturbation(8, 2, steps=3), Perturbation(1, 0.25, steps=3)
    return moved_apart(principal_pool(network.weights, 2, levels), 0.1)


def untimed(rows) -> list[dict]:
    return [{**row, "seconds": None, "fit_seconds": None} for row in rows]


def test_a_row_per_episode_says_what_it_was(network, pool):
    episodes = [make_episode(3), make_episode(4, n_way=5, shots=1, queries=2)]
    predict = merged_predictor(network, pool, lambda *_: (0.25, 0.75))
    found = list(evaluate(predict, episodes, ATTACKS))
    shapes = [(row["source"], row["index"], row["ways"], row["support"], row["queries"]) for row in found]
    assert shapes == [("tiny", 3, 3, 6, 12), ("tiny", 4, 5, 5, 10)]
    assert all(
        row["coefficients"] == [0.25, 0.75] and row["seconds"] >= row["fit_seconds"] >= 0 for row in found
    )


def test_accuracy_never_rises_with_epsilon(network, pool):
    predict = merged_predictor(network, pool, lambda *_: (0.5, 0.5))
    found = list(evaluate(predict, map(make_episode, range(6)), ATTACKS))
    for row in found:
        assert 1 >= row["clean"] >= row["pgd4@1"] >= row["pgd4@4"] >= row["pgd4@16"] >= 0
    assert summarise(found, "clean").mean > summarise(found, "pgd4@16").mean  # there is something to see


def test_rows_come_one_by_one(network, pool):
    """An episode is drawn only when its row is asked for, so that a long evaluation needs little memory."""
    drawn = []

    def episodes():
        for index in range(3):
            drawn.append(index)
            yield make_episode(index)

    rows = evaluate(merged_predictor(network, pool, lambda *_: (0.5, 0.5)), episodes())
    assert drawn == []
    next(rows)
    assert drawn == [0]


def test_evaluation_is_a_function_of_its_seed(network, pool):
    predict = merged_predictor(network, pool, lambda *_: (0.5, 0.5))
    episodes = [make_episode(0), make_episode(1)]
    first = untimed(evaluate(predict, episodes, ATTACKS, seed=1))
    torch.rand(7)  # torch's global generator plays no part
    assert untimed(evaluate(predict, episodes, ATTACKS, seed=1)) == first
    assert untimed(evaluate(predict, episodes[1:], ATTACKS, seed=1)) == first[1:]


def test_another_seed_or_episode_starts_the_attack_elsewhere():
    halves = Halves()

    def start(seed: int, index: int) -> torch.Tensor:
        halves.seen.clear()
        rows_of(halves, [halves.episode([9.0], index)], [Attack("pgd", (1,), steps=1, step_size=0.25)], seed)
        return halves.seen[1]

    assert torch.equal(start(0, 0), start(0, 0))
    assert not torch.equal(start(0, 0), start(1, 0))
    assert not torch.equal(start(0, 0), start(0, 1))


def test_the_coefficients_are_chosen_from_the_support_set(network, pool):
    """The chooser sees support images and labels, and a generator that seed and index decide."""
    seen = []

    def choose(support, labels, generator):
        seen.append((support, labels, torch.rand(4, generator=generator).tolist()))
        return (1.0, 0.0)

    episode = make_episode(0)
    for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0)):
        merged_predictor(network, pool, choose, seed=seed)(dataclasses.replace(episode, index=index))
    assert all(support is episode.support and labels is episode.support_labels for support, labels, _ in seen)
    numbers = [tuple(drawn) for _, _, drawn in seen]
    assert numbers[0] == numbers[1] and len(set(numbers)) == 3


def test_an_untrained_pool_predicts_as_the_pretrained_network(network):
    untrained = principal_pool(network.weights, 2, (Perturbation(8, 2), Perturbation(1, 0.25)))
    episode = make_episode(0)
    merged = merged_predictor(network, untrained, lambda *_: (0.3, 0.7))(episode)
    pretrained = pretrained_predictor(network)(episode)
    assert merged.coefficients == (0.3, 0.7) and pretrained.coefficients == ()
    torch.testing.assert_close(
        merged.logits(episode.query), pretrained.logits(episode.query), rtol=1e-4, atol=1e-4
    )


def test_validation_scores_every_adapter_alone_at_its_own_level(network, pool):
    episodes = [make_episode(0), make_episode(1)]
    found = validate(network, pool, episodes, robust=True, seed=5)
    assert [set(score) for score in found] == [{"clean", "robust"}] * 2
    for p, (attack, share) in enumerate(
        (
            (Attack("pgd", (8,), steps=3, step_size=2), (1.0, 0.0)),
            (Attack("pgd", (1,), steps=3, step_size=0.25), (0.0, 1.0)),
        )
    ):
        predict = merged_predictor(network, pool, lambda *_, share=share: share)
        rows = list(evaluate(predict, episodes, [attack], seed=5))
        assert found[p]["clean"] == pytest.approx(summarise(rows, "clean").mean)
        assert found[p]["robust"] == pytest.approx(summarise(rows, attack.columns[0]).mean)
    plain = validate(network, pool, episodes, robust=False)
    assert plain == [{"clean": score["clean"]} for score in found]


def test_validation_classifies_by_the_head_that_is_trained(network, pool):
    episodes = [make_episode(index) for index in range(4)]
    found = validate(network, pool, episodes, robust=False, head=default_head("ridge"))
    for p, share in enumerate(((1.0, 0.0), (0.0, 1.0))):
        fitter = partial(head_classifier, head=default_head("ridge"))
        rows = evaluate(merged_predictor(network, pool, lambda *_, s=share: s, fitter=fitter), episodes, [])
        assert found[p]["clean"] == pytest.approx(summarise(list(rows), "clean").mean)
    assert found != validate(network, pool, episodes, robust=False)
