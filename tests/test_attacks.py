"""The attacks of evaluation: what their names mean, that they stay in their ball, and how strong they are."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, moved_apart, patterned_episode, random_backbone
from hypothesis import given, settings
from hypothesis import strategies as st

from amt.attacks.evaluation import attack_queries, attack_support
from amt.attacks.kinds import KINDS, Attack, autoattack_parts, parse_attack
from amt.attacks.levels import Perturbation
from amt.attacks.losses import dlr
from amt.attacks.perturb import Ball, ascend, pgd
from amt.evaluation.evaluate import columns, measure
from amt.models.architectures import Arch
from amt.models.pool import principal_pool
from amt.tasks.classifier import Classifier, merged_predictor, pretrained_predictor
from amt.tasks.merge import route
from amt.tasks.settings import Routing

ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
EPISODE = patterned_episode(1, n_way=5, shots=2, queries=4, noise=0.1)


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(network):
    levels = Perturbation(8, 2, steps=3), Perturbation(1, 0.25, steps=3)
    return moved_apart(principal_pool(network.weights, 2, levels), 0.1)


@pytest.fixture(scope="module")
def classifier(network, pool):
    return merged_predictor(network, pool, lambda *_: (0.5, 0.5))(EPISODE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(images: torch.Tensor, seed: int = 0) -> list[torch.Generator]:
    """One for each image."""
    return [generator(1000 * seed + k) for k in range(len(images))]


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pgd", ("pgd20-ce+dlr@2", "pgd20-ce+dlr@8")),
        ("pgd loss=ce", ("pgd20@2", "pgd20@8")),
        ("pgd loss=margin+kl", ("pgd20-margin+kl@2", "pgd20-margin+kl@8")),
        ("pgd steps=50 restarts=5 loss=dlr", ("pgd50x5-dlr@2", "pgd50x5-dlr@8")),
        ("pgd norm=l2 epsilon=64,128.5", ("pgd20-ce+dlr-l2@64", "pgd20-ce+dlr-l2@128.5")),
        ("apgd", ("apgd100-ce+dlr@2", "apgd100-ce+dlr@8")),
        ("apgd loss=ce epsilon=8", ("apgd100-ce@8",)),
        ("strong epsilon=8", ("strong100x2@8",)),
        ("strong epsilon=8 steps=5 restarts=1 queries=50 norm=l2", ("strong5-q50-l2@8",)),
        ("autoattack epsilon=8", ("autoattack@8",)),
        ("autoattack targets=3 norm=l2", ("autoattack-t3-l2@2", "autoattack-t3-l2@8")),
        ("square queries=1000 epsilon=0.5", ("square1000@0.5",)),
        ("transfer loss=kl", ("transfer-pgd20-kl@2", "transfer-pgd20-kl@8")),
        ("support steps=7", ("support-pgd7@2", "support-pgd7@8")),
        ("pyramid", ("pyramid10@2", "pyramid10@8")),
    ],
)
def test_a_column_says_what_was_run(words, found):
    assert parse_attack(words.split(), epsilon=(2, 8)).columns == found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pdg", "did you mean 'pgd'"),
        ("pgd step=3", "expected norm=..., epsilon=..., steps=..."),
        ("pgd queries=3", "pgd queries=3: expected"),
        ("pgd steps=0", "expected a positive integer, got '0'"),
        ("pgd steps=many", "expected a positive integer, got 'many'"),
        ("pgd step_size=-1", "expected a positive number, got '-1'"),
        ("pgd loss=cw", "loss 'cw', expected one of ce, kl, dlr, margin, or several such as ce+dlr"),
        ("pgd loss=ce+cw", "loss 'ce+cw', expected one of"),
        ("pgd loss=ce+ce", "loss 'ce+ce', expected one of"),
        ("pgd loss=", "loss '', expected one of"),
        ("strong loss=ce", "expected norm=..., epsilon=..., steps=..., restarts=..., queries=..."),
        ("apgd loss=kl", "loss 'kl', expected one of ce, dlr"),
        ("pgd norm=l1", "norm 'l1', expected linf or l2"),
        ("pyramid norm=l2", "norm 'l2', expected linf"),
        ("pgd epsilon=8,4", "epsilon 8,4, expected increasing values"),
        ("pgd epsilon=4,4", "epsilon 4,4, expected increasing values"),
        ("pgd epsilon=0", "epsilon 0, expected positive numbers"),
        ("pgd epsilon=nan", "expected a number, got 'nan'"),
        ("pgd epsilon=", "expected a number, got ''"),
        ("pgd epsilon=8,x", "expected a number, got 'x'"),
    ],
)
def test_what_makes_no_sense_is_named(words, expected):
    assert expected in str(fails("--attack", lambda: parse_attack(words.split(), epsilon=(8,))))


def test_defaults_apply_where_the_attack_has_them_and_says_nothing():
    assert parse_attack(["pgd"], epsilon=(8,), steps=7).steps == 7
    assert parse_attack(["pgd", "steps=3"], epsilon=(8,), steps=7).steps == 3
    assert parse_attack(["square"], epsilon=(8,), steps=7).queries == 5000
    assert Attack("pgd", (8,)).step_at(8) == 2 and Attack("pgd", (8,), step_size=0.5).step_at(8) == 0.5


# --- the ball --------------------------------------------------------------------------------------------

QUICK = {
    "pgd": {"steps": 4},
    "apgd": {"steps": 6},
    "autoattack": {},
    "fab": {"steps": 6},
    "square": {"queries": 20},
    "strong": {"steps": 4, "queries": 10},
    "pyramid": {"steps": 2},
    "transfer": {"steps": 4},
}


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(0.1, 300),
    far=st.floats(0, 3),
    seed=st.integers(0, 50),
)
def test_starts_and_projections_are_valid_images_of_the_ball(norm, epsilon, far, seed):
    images = torch.rand(3, 3, 4, 4, generator=generator(seed)).round(decimals=1)
    ball = Ball(norm, epsilon / 255, epsilon / 4 / 255)
    away = images + far * torch.randn(images.shape, generator=generator(seed + 1))
    for points in (ball.start(images, generator(seed)), ball.project(away, images)):
        assert points.min() >= 0 and points.max() <= 1
        move = (points - images).flatten(1)
        size = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
        assert size.max() <= ball.epsilon + 1e-6
    inside = ball.start(images, generator(seed))
    torch.testing.assert_close(ball.project(inside, images), inside)


def test_random_starts_fill_the_l2_ball_evenly():
    """Half the volume of a ball in d dimensions lies outside the radius 0.5 ** (1 / d)."""
    images = torch.full((4000, 3, 1, 1), 0.5)
    radii = (Ball("l2", 0.1, 0.025).start(images, generator()) - images).flatten(1).norm(dim=1)
    assert float((radii > 0.1 * 0.5 ** (1 / 3)).float().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "support"])
def test_every_attack_stays_in_its_ball_and_tells_the_truth(network, classifier, kind, norm):
    """Its images are valid and near, what it calls fooled is misclassified, and the seed decides it all."""
    if kind == "pyramid" and norm == "l2":
        pytest.skip("the pyramid is bounded per pixel")
    epsilon = 4.0 if norm == "linf" else 40.0
    attack = Attack(kind, (epsilon,), norm, **QUICK[kind])
    surrogate = pretrained_predictor(network)(EPISODE).logits
    state = torch.random.get_rng_state()
    if kind == "autoattack":  # thousands of queries: a network would take half a minute
        logits = Plane(5)
        images, own = torch.rand(6, 3, 6, 6, generator=generator(2)), torch.zeros(6, dtype=torch.int64)
    else:
        logits, images, own = classifier.logits, EPISODE.query, EPISODE.query_labels
    right = logits(images).argmax(1) == own
    images, own = images[right], own[right]
    assert len(images) > 1

    def run(seed: int):
        return attack_queries(attack, epsilon, logits, images, own, 5, generators(images, seed), [surrogate])

    found, again = run(1), run(1)
    assert torch.equal(found.images, again.images) and torch.equal(found.fooled, again.fooled)
    assert torch.equal(state, torch.random.get_rng_state())  # nothing is left behind in torch's generator
    assert found.images.min() >= 0 and found.images.max() <= 1
    move = 255 * (found.images - images).flatten(1)
    if kind != "pyramid":  # whose coarse grids go further
        assert (move.abs().amax() if norm == "linf" else move.norm(dim=1).amax()) <= epsilon + 1e-3
    assert torch.equal(logits(found.images).argmax(1) != own, found.fooled)


def test_one_way_cannot_be_fooled_and_nothing_is_nothing(classifier):
    attack = Attack("autoattack", (8,))
    images, labels = EPISODE.query[:3], torch.zeros(3, dtype=torch.int64)
    alone = lambda images: images.mean((1, 2, 3))[:, None]  # noqa: E731
    found = attack_queries(attack, 8, alone, images, labels, 1, generators(images))
    assert not found.fooled.any() and torch.equal(found.images, images)
    none = attack_queries(attack, 8, classifier.logits, images[:0], labels[:0], 5, [])
    assert len(none.fooled) == 0


# --- strength --------------------------------------------------------------------------------------------


class Plane:
    """Two of `ways` classes by the side of a plane: the margin of an image is known in either norm."""

    def __init__(self, ways: int = 2):
        self.normal = torch.randn(3, 6, 6, generator=generator(7))
        self.ways = ways

    def images(self, distances: list[float], norm: str) -> torch.Tensor:
        """Images at these distances from the plane, in 1/255."""
        size = self.normal.norm() if norm == "l2" else self.normal.abs().sum()
        step = self.normal / self.normal.norm() ** 2 * size
        return 0.5 + torch.tensor(distances).view(-1, 1, 1, 1) / 255 * step

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        height = ((images - 0.5) * self.normal).sum((1, 2, 3))
        low = torch.full((len(images), self.ways - 2), -50.0)
        return torch.cat([torch.stack([height, -height], dim=1), low], dim=1)


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        *itertools.product(["pgd steps=20", "pgd loss=dlr", "apgd steps=20"], [2, 3, 4, 6]),
        *itertools.product(["autoattack"], [2, 4]),  # of whose parts one needs four ways
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_falls_exactly_when_epsilon_exceeds_its_distance(words, norm, ways):
    """In both norms, with any number of ways; the targets and losses that so many ways allow are found."""
    plane = Plane(ways)
    distances = [0.5, 1.9, 2.1, 6.0]
    images, labels = plane.images(distances, norm), torch.zeros(4, dtype=torch.int64)
    attack = parse_attack(words.split(), epsilon=(2.0,), norm=norm)
    found = attack_queries(attack, 2.0, plane, images, labels, ways, generators(images))
    assert found.fooled.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("ways", "targets", "parts"),
    [
        (2, 1, ["apgd-ce", "fab-t", "square"]),
        (3, 2, ["apgd-ce", "fab-t", "square"]),
        (4, 3, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (5, 4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (10, 9, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (50, 9, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_autoattack_is_the_standard_version_as_far_as_the_ways_allow(ways, targets, parts):
    assert autoattack_parts(ways) == (parts, targets)


def test_autoattack_names_its_variant_and_refuses_too_many_targets():
    plane = Plane(5)
    images, labels = plane.images([1.0], "linf"), torch.zeros(1, dtype=torch.int64)

    def run(**options):
        return attack_queries(
            Attack("autoattack", (2.0,), **options), 2.0, plane, images, labels, 5, generators(images)
        )

    assert run().variant == "apgd-ce, apgd-t x4, fab-t x4, square"
    assert run(targets=2).variant == "apgd-ce, apgd-t x2, fab-t x2, square"
    fails("targets=5: an episode of 5 ways has 4 other classes", lambda: run(targets=5))


@pytest.mark.parametrize(
    ("words", "ways", "variant"),
    [
        ("pgd", 2, "ce+margin, having 2 ways"),
        ("pgd loss=dlr", 2, "margin, having 2 ways"),
        ("pgd loss=dlr+margin", 2, "margin, having 2 ways"),
        ("apgd", 2, "ce+margin, having 2 ways"),
        ("pgd", 3, ""),
        ("apgd loss=dlr", 3, ""),
        ("pgd loss=ce", 2, ""),
    ],
)
def test_dlr_needs_three_ways_and_says_what_was_done_instead(words, ways, variant):
    plane = Plane(ways)
    images, labels = plane.images([1.0], "linf"), torch.zeros(1, dtype=torch.int64)
    attack = parse_attack([*words.split(), "steps=5"], epsilon=(2.0,))
    found = attack_queries(attack, 2.0, plane, images, labels, ways, generators(images))
    assert found.variant == variant and found.fooled.all()


def test_the_dlr_loss_by_hand():
    """Logits 5, 3, 1, 0: right (5 - 3) / (5 - 1) = -0.5; class 1 wrong by (5 - 3) / 4; scaling cancels."""
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0]] * 2)
    torch.testing.assert_close(dlr(logits, torch.tensor([0, 1])), torch.tensor([-0.5, 0.5]))
    torch.testing.assert_close(dlr(100 * logits, torch.tensor([0, 1])), torch.tensor([-0.5, 0.5]))


def test_an_image_starts_at_one_point_whatever_else_is_attacked(network, classifier):
    """So two networks are attacked from the same points, although they got other images right."""
    attack = Attack("pgd", (8.0,), steps=1, step_size=0.0)
    own = torch.full_like(EPISODE.query_labels, -1)  # wrong as they are: the start itself comes back
    every = generators(EPISODE.query)
    whole = attack_queries(attack, 8.0, classifier.logits, EPISODE.query, own, 5, every).images
    which = [3, 7, 8]
    some = [generators(EPISODE.query)[k] for k in which]
    part = attack_queries(attack, 8.0, classifier.logits, EPISODE.query[which], own[which], 5, some).images
    assert torch.equal(part, whole[which])


def test_restarts_only_ever_break_more(classifier):
    right = classifier.logits(EPISODE.query).argmax(1) == EPISODE.query_labels
    images, labels = EPISODE.query[right], EPISODE.query_labels[right]

    def fooled(restarts: int) -> torch.Tensor:
        attack = Attack("pgd", (1.5,), steps=2, restarts=restarts)
        return attack_queries(attack, 1.5, classifier.logits, images, labels, 5, generators(images, 3)).fooled

    assert not (fooled(1) & ~fooled(6)).any()


def test_images_made_for_another_network_go_on_after_it_is_fooled():
    """What just fools the surrogate hardly moves anything else."""
    plane = Plane()
    images, labels = plane.images([1.0], "linf"), torch.zeros(1, dtype=torch.int64)
    ball = Ball("linf", 8 / 255, 1 / 255)
    stopped, *_ = pgd(plane, images, labels, ball, 10, generator())
    start = ball.start(images, generator())
    going = ascend(lambda moved: F.cross_entropy(plane(moved), labels), images, start, ball, 10)
    assert plane(going)[0, 0] < plane(stopped)[0, 0] < 0


def test_transfer_attacks_the_surrogate_and_is_judged_on_the_target():
    """Of a network that shares nothing with the target nothing transfers; of the target itself all does."""
    plane, other = Plane(), Plane()
    other.normal = torch.randn(3, 6, 6, generator=generator(8))
    other.normal -= plane.normal * (other.normal * plane.normal).sum() / plane.normal.norm() ** 2
    images, labels = plane.images([3.0], "l2"), torch.zeros(1, dtype=torch.int64)
    attack = Attack("transfer", (4.0,), "l2", steps=10)
    for surrogate, expected in ((plane, True), (other, False)):
        found = attack_queries(attack, 4.0, plane, images, labels, 2, generators(images), [surrogate])
        assert found.fooled.item() is expected


# --- the support set -------------------------------------------------------------------------------------


def test_an_attack_on_the_support_reaches_routing_and_prototypes(network, pool):
    """Every point is routed anew; the images stay in their ball, the queries as they are."""
    routed, classified = [], []

    def choose(support, labels, chance):
        routed.append(support)
        return route(network, pool, support, labels, chance, Routing(augment_probability=0))

    predict = merged_predictor(network, pool, choose)

    def fit(support):
        logits = predict(dataclasses.replace(EPISODE, support=support.detach())).refit(support)

        def watched(images):
            classified.append(images)
            return logits(images)

        return watched

    attack = Attack("support", (8.0,), steps=3)
    found = attack_support(
        attack, 8.0, fit, EPISODE.support, EPISODE.query, EPISODE.query_labels, generator()
    )
    assert len(routed) == 4 and not torch.equal(routed[0], routed[-1])
    for support in [*routed, found.images]:
        assert (support - EPISODE.support).abs().max() <= 8 / 255 + 1e-6 and 0 <= support.min() <= 1
    assert all(images is EPISODE.query for images in classified)
    assert found.fooled.any()
    assert torch.equal(fit(found.images)(EPISODE.query).argmax(1) != EPISODE.query_labels, found.fooled)


def test_poisoned_support_costs_accuracy_and_more_of_it_no_less(network, pool):
    predict = merged_predictor(network, pool, lambda *_: (0.5, 0.5))
    attack = Attack("support", (1, 4, 32), steps=10)
    row = measure(predict, EPISODE, [attack]).row
    values = [row[column] for column in columns([attack])]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.3


def test_the_poison_that_counts_is_one_for_all_queries():
    """A support image can serve either of two queries, never both: the accuracy is that of the worse choice,
    not of two separate choices."""
    episode = dataclasses.replace(patterned_episode(0, n_way=2, shots=1, queries=1, side=2))

    def predict(shown):
        def logits_by(support):
            side = support[0].mean() - 0.5  # dark support breaks query 0, bright support query 1

            def logits(images):
                value = torch.stack([10 * side + 0.2, -10 * side + 0.2])[: len(images)]
                right = torch.nn.functional.one_hot(episode.query_labels, 2).bool()[: len(images)]
                return torch.where(right, value[:, None], torch.zeros(()))

            return logits

        return Classifier(logits_by(shown.support), logits_by, ())

    episode = dataclasses.replace(episode, support=torch.full_like(episode.support, 0.5))
    row = measure(predict, episode, [Attack("support", (60,), steps=8)]).row
    assert row["clean"] == 1 and row["support-pgd8@60"] == 0.5


def test_a_step_may_be_zero_and_a_radius_must_not():
    assert Attack("pgd", (1e-6,), step_size=0.0).step_at(1e-6) == 0
    for epsilons in ((), (0.0,), (-1.0,), (math.inf,)):
        with pytest.raises(ValueError, match="epsilon"):
            Attack("pgd", epsilons)
