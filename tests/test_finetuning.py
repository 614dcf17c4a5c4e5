"""Fine-tuning on a task: Adam on all weights, from the support set and the seed alone."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, patterned_episode, random_backbone
from torch import Tensor
from toy_baselines import ARCH, Plain, identical

from amt.models.network import Network
from amt.models.pool import Merged
from amt.tasks.classifier import head_classifier, pretrained
from amt.tasks.finetune import finetune, finetuned_predictor
from amt.tasks.merge import augment
from amt.tasks.settings import AUGMENTATIONS, Finetuning
from meta_dataset_readers.episode import Episode


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH)


@pytest.fixture(scope="module")
def episode() -> Episode:
    return patterned_episode(0, side=16)


SETTINGS = Finetuning(steps=4, lr=1e-3)


def logits_of(network: Network, episode: Episode, settings: Finetuning = SETTINGS, seed: int = 0) -> Tensor:
    predict = finetuned_predictor(network, pretrained(network), settings, seed)
    return predict(episode).logits(patterned_episode(9, side=16).query)


@pytest.mark.parametrize("settings", [Finetuning(lr=0.0), Finetuning(steps=0)])
def test_no_rate_or_no_step_is_no_fine_tuning(network, episode, settings):
    classifier = head_classifier(network, pretrained(network), episode)
    expected = classifier.logits(patterned_episode(9, side=16).query)
    assert torch.equal(logits_of(network, episode, settings), expected)


def test_fine_tuning_is_adam_on_all_weights(network, episode):
    """Without augmentation, three steps, against a module and torch's optimiser; the scale stays."""
    plain = Plain(network)
    optimiser = torch.optim.Adam(plain.network.parameters(), lr=1e-3)
    support, labels = episode.support, episode.support_labels
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(plain(support, labels, support), labels).backward()
        optimiser.step()
    settings = Finetuning(steps=3, lr=1e-3, augment_probability=0.0)
    query = patterned_episode(9, side=16).query
    expected = plain(support, labels, query)
    assert torch.allclose(logits_of(network, episode, settings), expected, atol=2e-3)
    untouched = head_classifier(network, pretrained(network), episode).logits(query)
    assert (untouched - expected).abs().max() > 0.1  # so that the tolerance means something


def test_fine_tuning_learns(network):
    """The support set by heart without augmentation, and with it what is new; though no gradient is asked."""
    episode = patterned_episode(1, n_way=4, shots=4, queries=8, side=16)

    @torch.no_grad()
    def losses(settings: Finetuning) -> tuple[float, float]:
        classifier = finetuned_predictor(network, pretrained(network), settings, 0)(episode)
        support = F.cross_entropy(classifier.logits(episode.support), episode.support_labels)
        return support.item(), F.cross_entropy(classifier.logits(episode.query), episode.query_labels).item()

    support, query = losses(Finetuning(steps=0))
    assert losses(Finetuning(steps=20, lr=1e-3, augment_probability=0.0))[0] < 0.1 * support
    assert losses(Finetuning(steps=10, lr=1e-3))[1] < 0.9 * query


def test_fine_tuning_sees_no_query_and_no_query_label(network, episode):
    garbage = dataclasses.replace(
        episode, query=torch.full_like(episode.query, float("nan")), query_labels=-episode.query_labels - 7
    )
    assert torch.equal(logits_of(network, garbage), logits_of(network, episode))


def test_fine_tuning_depends_on_the_seed_and_the_episode_alone(network, episode):
    first = logits_of(network, episode)
    torch.rand(7)
    assert torch.equal(logits_of(network, episode), first)
    assert not torch.equal(logits_of(network, episode, seed=1), first)
    assert not torch.equal(logits_of(network, dataclasses.replace(episode, index=1)), first)


def test_every_task_starts_from_the_same_weights_which_stay_as_they_are(network, episode):
    weights = {name: weight.clone() for name, weight in network.weights.items()}
    before, state = {n: w.clone() for n, w in weights.items()}, copy.deepcopy(network.module.state_dict())
    predict = finetuned_predictor(network, Merged(weights, 10.0, 0.0), SETTINGS, 0)
    images = episode.query
    first = predict(episode).logits(images)
    predict(patterned_episode(4, side=16))
    assert torch.equal(predict(episode).logits(images), first)
    assert identical(weights, before) and identical(network.module.state_dict(), state)
    assert not any(weight.requires_grad for weight in [*weights.values(), *network.module.parameters()])


def test_the_attack_goes_through_the_tuned_network(network, episode):
    """White box: images get a gradient through the tuned weights, which get none; `refit` uses them, too."""
    generator = torch.Generator().manual_seed(0)
    support, labels = episode.support, episode.support_labels
    tuned = finetune(network, pretrained(network), support, labels, SETTINGS, generator)
    assert not any(weight.requires_grad for weight in tuned.values())
    assert [name for name in tuned if torch.equal(tuned[name], network.weights[name])] == []
    predict = finetuned_predictor(network, pretrained(network), Finetuning(steps=2, lr=1e-3), 0)
    classifier = predict(episode)
    images = episode.query.clone().requires_grad_()
    classifier.logits(images).sum().backward()
    assert images.grad.abs().sum() > 0 and classifier.coefficients == ()
    again = support.clone().requires_grad_()
    refitted = classifier.refit(again)(episode.query)
    assert torch.allclose(refitted, classifier.logits(episode.query), atol=1e-5)
    refitted.square().sum().backward()
    assert again.grad.abs().sum() > 0


def test_fine_tuning_is_in_float32_whatever_the_backbone_says(network, episode):
    half = dataclasses.replace(network, autocast=torch.bfloat16)
    arguments = (episode.support, episode.support_labels, SETTINGS)
    one, other = (
        finetune(each, pretrained(network), *arguments, torch.Generator().manual_seed(0))
        for each in (network, half)
    )
    assert identical(one, other)


def test_a_rate_that_destroys_the_network_is_refused(network, episode):
    fails("--ada_lr is 1e[+]30.*smaller", lambda: logits_of(network, episode, Finetuning(steps=3, lr=1e30)))


def test_the_kinds_of_augmentation(episode):
    """No kind is the flip at most; colour moves nothing, translation changes no value but by zeros."""
    images = episode.support

    def seen(seed: int, *kinds: str) -> Tensor:
        return augment(images, torch.Generator().manual_seed(seed), kinds)

    for seed in range(4):
        assert any(torch.equal(seen(seed), flip) for flip in (images, images.flip(3)))
        moved = seen(seed, "translation")
        assert moved.shape == images.shape and set(moved.unique().tolist()) <= {
            0.0,
            *images.unique().tolist(),
        }
        assert not torch.equal(seen(seed, "color"), seen(seed))
        both = augment(images, torch.Generator().manual_seed(seed))
        assert torch.equal(seen(seed, *AUGMENTATIONS), both)
