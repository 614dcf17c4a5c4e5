"""The checks of the attacks: sound results pass, and every kind of unsound one is found."""

import dataclasses

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.evaluation.evaluate import Measurement, measure
from amt.evaluation.sanity import judge, probe
from amt.models.architectures import Arch
from amt.models.pool import principal_pool
from amt.tasks.classifier import Classifier, merged_predictor

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
ATTACKS = (Attack("pgd", (20, 80), steps=10), Attack("pgd", (900,), "l2", steps=10))
WORST = tuple(dataclasses.replace(attack, loss="ce+dlr") for attack in ATTACKS)
EPISODES = [
    dataclasses.replace(patterned_episode(k, n_way=3, shots=2, queries=8, side=6, noise=0.05), source="toy")
    for k in range(2)
]


def findings(predict, attacks=ATTACKS, episodes=EPISODES, alter=lambda row: row) -> list:
    """What is found in the rows of all episodes, each of them probed."""
    rows = []
    for episode in episodes:
        measured = measure(predict, episode, attacks)
        rows.append(alter(measured.row | {"checks": probe(predict, episode, measured, attacks)}))
    return judge(rows, attacks)


def nearest(episode, blur=lambda images: images, scale=0.5):
    """A classifier by distance to the mean image of each class, of blurred images."""
    centres = torch.stack(
        [blur(episode.support)[episode.support_labels == k].mean(0) for k in range(episode.n_way)]
    )

    def logits(images):
        return -scale * (blur(images)[:, None] - centres[None]).square().sum((2, 3, 4))

    return Classifier(logits, lambda _: logits, ())


def columns_of(found) -> set[str]:
    return {finding.column for finding in found}


def test_a_sound_network_is_not_suspected():
    network = random_backbone(ARCH, scale=0.3)
    pool = moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2)] * 2), 0.1)
    settled = [dataclasses.replace(attack, steps=30, restarts=2) for attack in WORST]
    assert findings(merged_predictor(network, pool, lambda *_: (0.5, 0.5)), settled) == []
    assert findings(nearest) == findings(nearest, WORST) == []
    assert findings(nearest, [Attack("apgd", (20, 80), steps=20)]) == []


def test_a_network_without_gradients_is_suspected():
    """Rounding makes every gradient zero: PGD finds nothing, and only its random start ever helps."""
    found = findings(lambda episode: nearest(episode, lambda images: (8 * images).round() / 8 + 0 * images))
    assert {"pgd10@20", "pgd10@80", "pgd10-l2@900"} <= columns_of(found)
    assert any("exactly zero gradient" in finding.reason for finding in found)
    assert "clean" not in columns_of(found)


def test_a_misleading_gradient_is_suspected():
    """The gradient points the wrong way: ascent descends, and queries without gradients do better."""

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(_context, images):
            return images.clone()

        @staticmethod
        def backward(_context, gradient):
            return -gradient

    found = findings(lambda episode: nearest(episode, Backwards.apply))
    reasons = {finding.reason for finding in found if finding.column == "pgd10@80"}
    assert any("does not rise" in reason for reason in reasons)
    assert any("without limit" in reason for reason in reasons)
    assert not any("zero gradient" in reason for reason in reasons)


def test_a_random_network_is_suspected_everywhere():
    noise = torch.Generator().manual_seed(0)

    def predict(episode):
        blur = lambda images: images + 0.7 * torch.randn(images.shape, generator=noise)  # noqa: E731
        return nearest(episode, blur)

    found = findings(predict)
    assert {"clean", "pgd10@20", "pgd10@80", "pgd10-l2@900"} <= columns_of(found)
    assert any("nothing perturbed" in finding.reason for finding in found)


def test_a_constant_network_is_suspected():
    """It is right about one class, for ever: images of that class withstand everything."""

    def predict(episode):
        def logits(images):
            return torch.tensor([1.0, 0.0, 0.0]).repeat(len(images), 1) + 0 * images.sum((1, 2, 3))[:, None]

        return Classifier(logits, lambda _: logits, ())

    reasons = {finding.reason for finding in findings(predict)}
    assert {"16 of 16 images withstand a perturbation without limit"} <= reasons
    assert any("zero gradient" in reason for reason in reasons)


def test_an_attack_that_forgets_is_suspected(monkeypatch):
    """One that breaks images at a small radius and cannot any more at a large one."""
    from amt.evaluation import evaluate, sanity

    honest = evaluate.attack_some

    def forgetful(attack, epsilon, *rest, **more):
        found = honest(attack, epsilon, *rest, **more)
        return found._replace(fooled=found.fooled & (epsilon < 80 or epsilon > 200))

    monkeypatch.setattr(sanity, "attack_some", forgetful)
    found = findings(nearest, [Attack("pgd", (60, 100), steps=10)])
    assert any("withstand a larger radius" in finding.reason for finding in found)


def test_black_box_attacks_that_do_better_are_suspected_beyond_noise():
    """Over all episodes; a single image more is no evidence."""
    attacks = [Attack("pgd", (8,)), Attack("square", (8,), queries=50), Attack("transfer", (8,))]
    base = {"source": "toy", "clean": 1.0, "union@8": 0.1}
    rows = [
        base | {"index": k, "pgd20@8": 0.6 + 0.02 * (k % 3), "square50@8": 0.4, "transfer-pgd20@8": 0.6}
        for k in range(20)
    ]
    found = judge(rows, attacks)
    assert columns_of(found) == {"pgd20@8", "union@8"}
    assert any(finding.reason == "square50@8 breaks 21.9 points more images" for finding in found)
    noisy = [row | {"square50@8": row["pgd20@8"] + (-0.02 if k == 3 else 0)} for k, row in enumerate(rows)]
    noisy = [row | {"transfer-pgd20@8": 0.9} for row in noisy]
    assert judge(noisy, attacks) == []


@pytest.mark.parametrize("attacks", [ATTACKS, ()])
def test_nothing_right_leaves_nothing_to_probe(attacks):
    def predict(episode):
        classifier = nearest(episode)
        logits = lambda images: classifier.logits(images).roll(1, dims=1)  # noqa: E731
        return Classifier(logits, lambda _: logits, ())

    assert findings(predict, attacks, EPISODES[:1]) == []
    assert judge([], attacks) == []


def test_probing_changes_nothing_and_is_repeatable():
    measured = measure(nearest, EPISODES[0], ATTACKS)
    before = {name: mask.clone() for name, mask in measured.correct.items()}
    first, again = (probe(nearest, EPISODES[0], measured, ATTACKS, seed=3) for _ in range(2))
    assert first == again and first["images"] == 24
    assert all(torch.equal(before[name], mask) for name, mask in measured.correct.items())
    assert isinstance(measured, Measurement) and "checks" not in measured.row


def test_black_box_attacks_alone_are_checked_as_well():
    """A constant network under nothing but Square Attack: right about one class, for ever."""

    def predict(episode):
        def logits(images):
            return torch.tensor([1.0, 0.0, 0.0]).repeat(len(images), 1) + 0 * images.sum((1, 2, 3))[:, None]

        return Classifier(logits, lambda _: logits, ())

    found = findings(predict, [Attack("square", (8,), queries=5)])
    assert columns_of(found) == {"square5@8"}
    assert any("without limit" in finding.reason for finding in found)
