"""Attacks of several losses and `strong`: a union per image, the same for every batch, not misled by networks
that mask one loss; and the check that finds what a column's own attack misses."""

import dataclasses
import json

import pytest
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from test_attacks import generators
from test_sanity import EPISODES, nearest

from amt.attacks.evaluation import attack_queries
from amt.attacks.kinds import Attack, parse_attack
from amt.attacks.levels import Perturbation
from amt.evaluation.evaluate import measure
from amt.evaluation.other_losses import missing
from amt.evaluation.sanity import judge, probe
from amt.models.architectures import Arch
from amt.models.pool import principal_pool
from amt.tasks.classifier import Classifier, merged_predictor, pretrained_predictor

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
EPISODE = dataclasses.replace(patterned_episode(1, n_way=5, shots=2, queries=5, noise=0.1), source="toy")
RADII = (1.0, 2.0, 6.0)


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def predict(network):
    pool = moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2)] * 2), 0.1)
    return merged_predictor(network, pool, lambda *_: (0.5, 0.5))


def scaled(predict, factor: float):
    """The same classifier with its logits multiplied: at a million every softmax is saturated."""

    def masked(episode):
        inner = predict(episode)
        return Classifier(
            lambda images: factor * inner.logits(images),
            lambda support: lambda images: factor * inner.refit(support)(images),
            inner.coefficients,
        )

    return masked


def standing(predict, words: str, episode=EPISODE, others=(), **more) -> list[torch.Tensor]:
    """Which queries stand, by radius."""
    attack = parse_attack(words.split(), epsilon=RADII, **more)
    found = measure(predict, episode, [attack], others=others).correct
    return [found[column] for column in attack.columns]


# --- a union per image -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pgd steps=4", "apgd steps=4", "pgd steps=3 restarts=2"])
def test_of_several_losses_exactly_what_one_of_them_breaks_falls(predict, kind):
    """At every radius, those broken at smaller ones among them."""
    both = standing(predict, f"{kind} loss=ce+dlr")
    alone = [standing(predict, f"{kind} loss={loss}") for loss in ("ce", "dlr")]
    for found, of_ce, of_dlr in zip(both, *alone, strict=True):
        assert torch.equal(found, of_ce & of_dlr)
    assert both[0].any() and not both[-1].all()


@pytest.mark.parametrize("losses", ["ce+dlr", "dlr+ce", "margin+dlr+ce", "kl+ce"])
def test_more_losses_never_save_an_image(predict, losses):
    found, kept = None, torch.ones(len(EPISODE.query), dtype=torch.bool)
    for n in range(1, losses.count("+") + 2):
        found = standing(predict, f"pgd steps=3 loss={'+'.join(losses.split('+')[:n])}")[1]
        assert not (found & ~kept).any()
        kept = found


def test_transfer_of_several_losses_is_their_union(network, predict):
    others = [pretrained_predictor(network)]
    both = standing(predict, "transfer steps=4 loss=ce+dlr", others=others)[2]
    alone = [standing(predict, f"transfer steps=4 loss={loss}", others=others)[2] for loss in ("ce", "dlr")]
    assert torch.equal(both, alone[0] & alone[1])


@pytest.mark.parametrize("words", ["pgd steps=3", "pgd steps=2 restarts=2", "apgd steps=4"])
def test_an_image_falls_alone_as_it_falls_among_others(predict, words):
    attack = parse_attack(words.split(), epsilon=(2.0,))
    logits, images, labels = predict(EPISODE).logits, EPISODE.query, EPISODE.query_labels
    whole = attack_queries(attack, 2.0, logits, images, labels, 5, generators(images))
    assert whole.fooled.any() and not whole.fooled.all()
    for k in range(0, len(images), 6):
        own = [generators(images)[k]]
        alone = attack_queries(attack, 2.0, logits, images[k : k + 1], labels[k : k + 1], 5, own)
        assert alone.fooled.item() == whole.fooled[k].item()


# --- strong ----------------------------------------------------------------------------------------------


STRONG = "strong steps=3 restarts=1 queries=10"


def test_strong_breaks_whatever_its_parts_break(network, predict):
    others = [pretrained_predictor(network)]
    found = standing(predict, STRONG, others=others)
    parts = ("apgd steps=3", "fab steps=3", "square queries=10", "transfer")
    for words in parts:
        for ours, theirs in zip(found, standing(predict, words, others=others), strict=True):
            assert not (ours & ~theirs).any(), words


def test_strong_shows_images_made_on_every_other_network():
    """Where gradients vanish and queries are few, only another network tells which way to go."""
    direction = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)).sign()

    def towards(sign):
        def logits(images):
            height = sign * ((images - 0.5) * direction).mean((1, 2, 3))
            return 100 * torch.stack([height, -height], dim=1)

        return logits

    def masked(images):
        return (towards(1)(images).sign() - 0.1 * torch.tensor([0.0, 1.0])).detach() + 0 * images.sum()

    images, labels = 0.5 + 0.004 * direction[None], torch.zeros(1, dtype=torch.int64)
    attack = Attack("strong", (4.0,), steps=2, queries=1)
    for others, falls in (((), False), ((towards(-1),), False), ((towards(-1), towards(1)), True)):
        found = attack_queries(attack, 4.0, masked, images, labels, 2, generators(images), others)
        assert found.fooled.item() is falls
    assert found.variant == "apgd-ce, apgd-margin, transfer x2, fab-t x1, square"


def test_transfer_alone_is_of_the_first_other_network(network, predict):
    """The pretrained one, as it always was."""
    others = [pretrained_predictor(network), predict]
    ours, theirs = (standing(predict, "transfer", others=each)[2] for each in (others, others[:1]))
    assert torch.equal(ours, theirs)


# --- masking, and the check that finds it ----------------------------------------------------------------


def checked(predict, words: str, episodes) -> tuple[list, list[dict]]:
    """What is found in the rows of episodes, and the rows as they are read again."""
    attacks = [parse_attack(each.split(), epsilon=(40.0, 80.0)) for each in words.split("; ")]
    rows = []
    for episode in episodes:
        measured = measure(predict, episode, attacks)
        rows.append(measured.row | {"checks": probe(predict, episode, measured, attacks)})
    return judge(rows, attacks), json.loads(json.dumps(rows))


def reasons(found, column: str) -> str:
    return "; ".join(each.reason for each in found if each.column == column)


MASKED = scaled(nearest, 1e6)


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_a_saturated_softmax_does_not_mask(kind):
    """Cross-entropy alone finds nothing, and is told what to type; the worst case finds what there is."""
    found, rows = checked(MASKED, f"{kind} steps=8 loss=ce", EPISODES[:1])
    own, worst = (
        parse_attack([kind, "steps=8", loss], epsilon=(40, 80)) for loss in ("loss=ce", "loss=ce+dlr")
    )
    column = own.columns[1]
    assert "that this leaves standing" in reasons(found, column) and "type --attack" in reasons(found, column)
    assert "exactly zero gradient" in reasons(found, column)
    found, better = checked(MASKED, f"{kind} steps=8", EPISODES[:1])
    assert better[0][worst.columns[1]] < rows[0][column] - 0.3
    assert not any("zero gradient" in each.reason or "does not rise" in each.reason for each in found)
    _, plain = checked(nearest, f"{kind} steps=8 loss=dlr", EPISODES[:1])
    assert better[0][worst.columns[1]] <= plain[0][f"{kind}8-dlr@80"]  # DLR does not see the scale


def test_a_worst_case_is_not_blamed_for_a_part_of_it():
    found, _ = checked(MASKED, "pgd loss=ce; pgd loss=dlr steps=21", EPISODES[:1])
    assert "leaves standing" in reasons(found, "pgd20@80")
    assert "leaves standing" not in reasons(found, "union@80") + reasons(found, "pgd21-dlr@80")


def test_two_ways_work_and_are_checked(predict):
    """DLR does not exist: the margin takes its place, and is checked against."""
    pair = dataclasses.replace(patterned_episode(3, n_way=2, shots=2, queries=8, noise=0.1), source="toy")
    both, of_ce, of_margin = (
        standing(predict, f"pgd steps=4{loss}", pair) for loss in ("", " loss=ce", " loss=margin")
    )
    for found, first, second in zip(both, of_ce, of_margin, strict=True):
        assert torch.equal(found, first & second)
    row = measure(predict, pair, [parse_attack(["pgd"], epsilon=(2,))]).row
    assert row["variants"] == {"pgd20-ce+dlr@2": "ce+margin, having 2 ways"}
    found, rows = checked(MASKED, "pgd loss=ce", [pair])
    assert "type --attack pgd loss=ce+margin" in reasons(found, "pgd20@80")
    assert set(rows[0]["checks"]["missed"]["pgd20@80"]) == {"ce", "margin"}


def row(index: int, queries: int, **missed: int) -> dict:
    """A row whose probe found images that the column pgd20@8 misses."""
    checks = {"images": queries, "queries": queries, "changed": 0, "missed": {"pgd20@8": missed}}
    return {"source": "toy", "index": index, "pgd20@8": 0.5, "checks": checks}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(0, 100, dlr=4)], "loss dlr breaks 4 of 100 images that this leaves standing (4.0 points)"),
        ([row(0, 100, dlr=3)], ""),  # 3 points, not more
        ([row(0, 15, dlr=1)], ""),  # 7 points, and a single image
        ([row(0, 15, dlr=1), row(1, 15, dlr=1)], "loss dlr breaks 2 of 30 images"),
        ([row(0, 100, ce=5, dlr=5, margin=5)], "type --attack pgd loss=ce+dlr"),
        ([row(0, 100, ce=6, dlr=5)], "loss ce breaks 6 of 100"),
        ([{"source": "toy", "index": 0, "pgd20@8": 0.5}], ""),  # nothing was probed
        ([{"pgd20@8": 0.5, "checks": {"images": 0, "changed": 0}}], ""),  # of an older run
    ],
)
def test_more_than_three_points_and_more_than_an_image_are_missing(rows, words):
    found = dict(missing(rows, [Attack("pgd", (8,))]))
    assert words in found.get("pgd20@8", "") and bool(found) == bool(words)


@pytest.mark.parametrize(
    ("attack", "remedy"),
    [
        ("pgd loss=ce", "--attack pgd loss=ce+dlr"),
        ("pgd loss=kl", "--attack pgd loss=kl+dlr"),
        ("pgd", "--attack strong"),
        ("apgd loss=ce", "--attack apgd loss=ce+dlr"),
        ("autoattack", "--attack strong"),
        ("fab", "--attack strong"),
        ("strong", "--attack strong restarts=5"),
    ],
)
def test_the_remedy_can_be_typed(attack, remedy):
    given = parse_attack(attack.split(), epsilon=(8,))
    (column,) = given.columns
    checks = {"images": 50, "queries": 50, "changed": 0, "missed": {column: {"dlr": 9}}}
    found = dict(missing([{"source": "toy", column: 0.5, "checks": checks}], [given]))
    assert found[column].endswith(f"type {remedy}")
    kind, *options = remedy.removeprefix("--attack ").split()
    assert parse_attack([kind, *options], epsilon=(8,)) != given


def test_black_box_attacks_alone_are_not_measured_by_gradients():
    _, rows = checked(nearest, "square queries=5", EPISODES[:1])
    assert rows[0]["checks"]["missed"] == {}
