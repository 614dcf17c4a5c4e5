"""The criterion on a support set: each image left out of its own prototype, and networks compared by it."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import moved_apart, patterned_episode, random_backbone
from hypothesis import given
from hypothesis import strategies as st

from amt.attacks.levels import Perturbation
from amt.models.architectures import Arch
from amt.models.network import Network, features
from amt.models.pool import Merged, principal_pool
from amt.tasks import leave_one_out
from amt.tasks.leave_one_out import (
    STEPS,
    leave_one_out_logits,
    lowest_loss,
    new_trial,
)
from meta_dataset_readers.episode import Episode

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)


def leave_one_out_loss(network, merged, trial) -> float:
    """The loss of a single network."""
    return lowest_loss(network, [lambda: merged], trial)[1]


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def some(network) -> list[Merged]:
    """Networks that differ, heads included."""
    pool = moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2)] * 5), 0.3)
    return [Merged(pool[p].merge((1.0,)), torch.tensor(5.0 + p), torch.tensor(0.1 * p)) for p in range(5)]


def uneven(seed: int = 0) -> Episode:
    """Classes of one, two and three support images, in no order."""
    full = patterned_episode(seed, n_way=3, shots=3)
    keep = torch.tensor([4, 0, 1, 2, 5, 8])  # labels 1 0 1 2 2 2
    return dataclasses.replace(full, support=full.support[keep], support_labels=full.support_labels[keep])


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    seed=st.integers(0, 99),
    scale=st.floats(0.5, 20),
    bias=st.floats(-1, 1),
)
def test_each_image_is_left_out_of_its_own_class_alone(labels, seed, scale, bias):
    """Against a loop that takes the image out and averages what is left, whatever the classes' sizes."""
    labels = torch.tensor([0, 1, 2, 3, *labels])
    support = torch.randn(len(labels), 5, generator=draws(seed), dtype=torch.double)
    views = torch.randn(len(labels), 5, generator=draws(seed + 1), dtype=torch.double)
    which = torch.randperm(len(labels), generator=draws(seed))[:3]
    found = leave_one_out_logits(views[which], support, labels, which, scale, bias)
    for row, i in zip(found, which.tolist(), strict=True):
        for c in range(4):
            others = [j for j in range(len(labels)) if labels[j] == c and j != i] or [i]
            centre = support[others].mean(0)
            cosine = views[i] @ centre / views[i].norm() / centre.norm()
            assert float(row[c]) == pytest.approx(float(scale * (cosine + bias)), abs=1e-8)


def test_the_loss_counts_every_class_the_same(network, some):
    """The mean over classes of their images' mean cross-entropy; a class's only image is augmented."""
    episode, merged = uneven(), some[0]
    trial = new_trial(network, episode.support, episode.support_labels, 0, draws())
    labels = episode.support_labels
    with torch.no_grad():
        plain = features(network, merged.weights, episode.support)
        shown = features(network, merged.weights, trial.held_out)
    logits = leave_one_out_logits(shown, plain, labels, torch.arange(6), merged.scale, merged.bias)
    errors = F.cross_entropy(logits, labels, reduction="none")
    expected = sum(float(errors[labels == c].mean()) for c in range(3)) / 3
    assert leave_one_out_loss(network, merged, trial) == pytest.approx(expected, rel=1e-4)
    moved = [not torch.equal(a, b) for a, b in zip(trial.held_out, episode.support, strict=True)]
    assert moved == [bool((labels == label).sum() == 1) for label in labels]
    assert ((trial.held_out >= 0) & (trial.held_out <= 1)).all()


def test_one_shot_tasks_are_judged_by_augmented_views(network, some):
    """Otherwise every network would be perfect; other draws are other views."""
    episode = patterned_episode(3, n_way=4, shots=1)
    trials = [new_trial(network, episode.support, episode.support_labels, 0, draws(k)) for k in (0, 0, 1)]
    losses = [leave_one_out_loss(network, some[0], trial) for trial in trials]
    assert losses[0] == losses[1] != losses[2]


def test_an_attack_makes_it_worse_the_further_it_reaches(network, some):
    episode = patterned_episode(1, n_way=4, shots=3)
    losses = [
        leave_one_out_loss(
            network, some[1], new_trial(network, episode.support, episode.support_labels, epsilon, draws())
        )
        for epsilon in (0, 2, 8, 32)
    ]
    assert losses == sorted(losses) and losses[-1] > 1.5 * losses[0]


def test_attacked_images_are_images_within_epsilon(network, some, monkeypatch):
    """Also where an augmented view left the range of pixels."""
    seen = []
    real = leave_one_out.features

    def noted(network, weights, images):
        seen.append(images.detach())
        return real(network, weights, images)

    monkeypatch.setattr(leave_one_out, "features", noted)
    episode = patterned_episode(2, n_way=3, shots=1)
    trial = new_trial(network, episode.support, episode.support_labels, 8, draws())
    leave_one_out_loss(network, some[0], trial)
    assert len(seen) == STEPS + 1
    for images in seen:
        assert ((images >= 0) & (images <= 1)).all()
        assert float((images - trial.held_out).abs().max()) <= 8 / 255 + 1e-6
    assert float((seen[-1] - trial.held_out).abs().mean()) > 0.6 * 8 / 255  # half would be no attack


def test_of_a_large_support_set_some_of_every_class_are_attacked(network, monkeypatch):
    monkeypatch.setattr(leave_one_out, "ATTACKED", 7)
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 0])
    support = patterned_episode(0, n_way=9, shots=1).support
    trial = new_trial(network, support, labels, 4, draws())
    assert trial.which.tolist() == [0, 1, 3, 4, 5]
    assert new_trial(network, support, labels, 0, draws()).which.tolist() == list(range(9))


@pytest.mark.parametrize("epsilon", [0, 4, 16])
def test_the_least_loss_is_found_without_attacking_everyone_to_the_end(network, some, epsilon):
    """The same as comparing all of them, with fewer steps where there is an attack."""
    episode = uneven(1)
    trial = new_trial(network, episode.support, episode.support_labels, epsilon, draws())
    losses = [leave_one_out_loss(network, merged, trial) for merged in some]
    visits = []

    def asked(k: int) -> Merged:
        visits.append(k)
        return some[k]

    found, loss = lowest_loss(network, [partial(asked, k) for k in range(5)], trial)
    assert found == losses.index(min(losses)) and loss == losses[found]
    if epsilon == 16:
        assert len(visits) < 5 * (1 + trial.points)


def test_of_equal_networks_the_first_is_taken(network, some):
    episode = uneven()
    for epsilon in (0, 8):
        trial = new_trial(network, episode.support, episode.support_labels, epsilon, draws())
        best = min(range(5), key=lambda k: leave_one_out_loss(network, some[k], trial))
        worst = max(range(5), key=lambda k: leave_one_out_loss(network, some[k], trial))
        order = [worst, best, best]
        assert lowest_loss(network, [partial(lambda k: some[k], k) for k in order], trial)[0] == 1


@pytest.mark.parametrize("epsilon", [0, 8])
def test_a_network_without_numbers_is_not_the_best(network, some, epsilon):
    broken = some[0]._replace(weights=some[0].weights | {"norm.weight": torch.full((12,), torch.nan)})
    trial = new_trial(network, uneven().support, uneven().support_labels, epsilon, draws())
    assert lowest_loss(network, [lambda: broken, lambda: some[1]], trial)[0] == 1


def test_large_support_sets_go_through_in_parts(network, some, monkeypatch):
    episode = patterned_episode(0, n_way=3, shots=4)
    trial = new_trial(network, episode.support, episode.support_labels, 8, draws())
    whole = leave_one_out_loss(network, some[0], trial)
    monkeypatch.setattr(leave_one_out, "CHUNK", 5)
    assert leave_one_out_loss(network, some[0], trial) == pytest.approx(whole, rel=1e-3)
