"""Heads: each against an independent formula, gradients, invariances, and what they share."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from torch import Tensor
from toy_pools import few

from amt.models.head_settings import KINDS, TRAINED, Head, default_head, parse_head
from amt.models.heads import (
    Cosine,
    Linear,
    PoolStatistics,
    Statistics,
    detached,
    fit,
    mixed_covariance,
    spread,
    unit,
    within_class,
)

DIM = 7
HEADS = {
    "prototypes": Head(),
    "centred": Head("centred"),
    "lda": Head("lda", support=0.6, identity=0.4),
    "ridge": Head("ridge", penalty=0.3),
    "robust-lda": Head("robust-lda", support=0.3, source=0.2, attack=0.3, identity=0.2, views=0.1),
}


def task(seed: int = 0, shots: int = 4, n_way: int = 3, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Support features and labels, classes shuffled, and query features; all far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_way).repeat(shots)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = 2 * torch.randn(n_way, DIM, generator=generator, dtype=dtype)
    noise = torch.randn(len(labels), DIM, generator=generator, dtype=dtype)
    query = torch.randn(10, DIM, generator=generator, dtype=dtype)
    return centres[labels] + noise + 3, labels, 2 * query + 3


def statistics(seed: int = 1) -> Statistics:
    roots = torch.randn(2, DIM, 2 * DIM, generator=torch.Generator().manual_seed(seed))
    return Statistics(*(root @ root.T for root in roots))


def views_of(support: Tensor) -> Tensor:
    return support + torch.randn(
        5, *support.shape, generator=torch.Generator().manual_seed(2), dtype=support.dtype
    )


def fitted(head: Head, support: Tensor, labels: Tensor):
    return fit(head, support, labels, statistics(), views=views_of(support))


def same_up_to_scale_and_rows(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether logits agree up to a positive factor and a number for each image."""
    one, other = (each - each.mean(1, keepdim=True) for each in (one, other))
    return torch.allclose(one / one.norm(), other / other.norm(), atol=tolerance)


# --- against formulas written elsewhere ------------------------------------------------------------------


def by_numpy(
    support: np.ndarray, labels: np.ndarray, covariance: np.ndarray, query: np.ndarray
) -> np.ndarray:
    """The discriminant as it is written: mu^T S^-1 f - 1/2 mu^T S^-1 mu."""
    inverse = np.linalg.inv(covariance)
    means = np.stack([support[labels == c].mean(0) for c in range(labels.max() + 1)])
    return query @ inverse @ means.T - 0.5 * np.einsum("nd,de,ne->n", means, inverse, means)


@pytest.mark.parametrize("kind", ["lda", "robust-lda"])
def test_discriminants_agree_with_the_formula(kind):
    head = HEADS[kind]
    support, labels, query = task()
    own = sum(np.cov(support[labels == c].T.numpy(), bias=True) for c in range(3))
    source, attack = (each.double().numpy() for each in statistics())
    shares = [(head.support, own), (head.source, source), (head.attack, attack), (head.identity, np.eye(DIM))]
    covariance = sum(share * each / (np.trace(each) / DIM) for share, each in shares)
    expected = by_numpy(support.numpy(), labels.numpy(), covariance, query.numpy())
    found = fitted(head, support, labels)(query)
    assert same_up_to_scale_and_rows(found, torch.from_numpy(expected))


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 0.9])
def test_lda_is_that_of_scikit_learn(shrinkage):
    """Whose shrinkage is towards the identity times the mean variance: the same mixture."""
    support, labels, query = task()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(support, labels)
    expected = torch.from_numpy(reference.decision_function(query.numpy()))
    head = Head("lda", support=1 - shrinkage, identity=shrinkage)
    assert same_up_to_scale_and_rows(fitted(head, support, labels)(query), expected)


@pytest.mark.parametrize("shots", [1, 2, 8])  # fewer and more images than features: both sides of Woodbury
def test_ridge_is_that_of_scikit_learn(shots):
    support, labels, query = task(shots=shots)
    centred = support - support.mean(0)
    alpha = 0.3 * float(centred.square().sum(1).mean())
    reference = Ridge(alpha=alpha).fit(support.numpy(), torch.nn.functional.one_hot(labels).numpy())
    expected = torch.from_numpy(reference.predict(query.numpy()))
    assert same_up_to_scale_and_rows(fitted(HEADS["ridge"], support, labels)(query), expected)


@pytest.mark.parametrize("kind", ["prototypes", "centred"])
def test_cosine_heads_agree_with_the_formula(kind):
    support, labels, query = task()
    means = np.stack([support[labels == c].numpy().mean(0) for c in range(3)])
    origin = means.mean(0) * (kind == "centred")
    a, b = query.numpy() - origin, means - origin
    cosines = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    found = fit(HEADS[kind], support, labels, scale=4.0, bias=0.25)(query)
    assert torch.allclose(found, torch.from_numpy(4 * (cosines + 0.25)))


# --- what all have in common -----------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind, shots):
    """Through the support, which the covariance depends on as well, and through the query."""
    support, labels, query = task(shots=shots)

    def logits(support: Tensor, query: Tensor) -> Tensor:
        return fitted(HEADS[kind], support, labels)(query)

    inputs = support.requires_grad_(), query[:2].requires_grad_()
    assert torch.autograd.gradcheck(logits, inputs)
    assert all(slope.abs().sum() > 0 for slope in torch.autograd.grad(logits(*inputs)[0, 0], inputs))


@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=st.integers(0, 99), shots=st.integers(1, 4))
def test_neither_the_order_of_images_nor_the_numbers_of_classes_matter(kind, seed, shots):
    support, labels, query = task(seed, shots)
    expected = fit(HEADS[kind], support, labels, statistics())(query)
    generator = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(len(labels), generator=generator), torch.randperm(3, generator=generator)
    found = fit(HEADS[kind], support[order], names[labels[order]], statistics())(query)
    assert torch.allclose(found[:, names], expected, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.01, 50.0, 1e-9, 1e18])
def test_the_unit_of_features_does_not_matter(kind, factor):
    """Nor that of the statistics: every covariance is brought to the same mean variance first. Not even where
    squares of logits are no float32 numbers."""
    support, labels, query = task(dtype=torch.float32)
    scaled = Statistics(*(factor * each for each in statistics()))
    expected = fit(HEADS[kind], support, labels, statistics())(query).argmax(1)
    found = fit(HEADS[kind], factor * support, labels, scaled)(factor * query).argmax(1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["centred", "lda", "robust-lda"])
def test_a_common_shift_of_all_features_does_not_matter(kind):
    support, labels, query = task()
    moved = fitted(HEADS[kind], support + 100, labels)(query + 100)
    assert same_up_to_scale_and_rows(moved, fitted(HEADS[kind], support, labels)(query))


@pytest.mark.parametrize("kind", ["lda", "ridge", "robust-lda"])
@pytest.mark.parametrize("shots", [1, 5])
def test_linear_heads_have_the_asked_spread_on_the_support(kind, shots):
    support, labels, _ = task(shots=shots, dtype=torch.float32)
    head = fit(HEADS[kind], support, labels, statistics(), scale=6.0)
    assert isinstance(head, Linear) and head.weight.dtype == torch.float32
    assert float(spread(head(support))) == pytest.approx(6, rel=1e-4)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 1, 1]])
def test_images_that_nothing_tells_apart_do_not_drown_what_is_mixed_in(labels):
    same, labels = torch.ones(len(labels), DIM), torch.tensor(labels)
    for head in HEADS.values():
        logits = fit(head, same, labels, statistics())(same)
        assert logits.isfinite().all() and float(spread(logits)) < 1e-2 and float(logits.abs().max()) < 100


def test_robust_lda_without_statistics_is_lda():
    support, labels, query = task()
    head = Head("robust-lda", support=0.6, identity=0.4)
    assert torch.equal(fitted(head, support, labels)(query), fitted(HEADS["lda"], support, labels)(query))


def test_the_share_of_the_displacement_lowers_what_an_attack_along_it_does():
    """With all displacement in one direction, the logits' slope in it falls as the share grows."""
    support, labels, _ = task()
    direction = torch.zeros(DIM)
    direction[2] = 1
    moved = Statistics(torch.eye(DIM), torch.outer(direction, direction))
    slopes = []
    for share in (0.0, 0.2, 1.0, 5.0):
        head = fit(Head("robust-lda", support=0.3, attack=share, identity=0.4), support, labels, moved)
        slopes.append(float(head.weight[:, 2].norm() / head.weight.norm()))
    assert all(a > b for a, b in itertools.pairwise(slopes)) and slopes[-1] < 0.3 * slopes[0]


def test_at_one_shot_the_views_take_the_place_of_the_support():
    support, labels, _ = task(shots=1)
    head = Head("robust-lda", support=0.5, identity=0.4, views=0.1)
    views = views_of(support)
    residuals = (views - views.mean(0)).flatten(0, 1)
    expected = 0.4 * torch.eye(DIM) + 0.1 * unit(residuals.T @ residuals)
    assert torch.allclose(mixed_covariance(head, support, labels, views=views), expected)
    assert torch.allclose(mixed_covariance(head, support, labels), 0.4 * torch.eye(DIM, dtype=torch.float64))
    assert "one_shot" not in head.name and "views" in head.one_shot_note
    support, labels, _ = task(shots=2)
    expected = 0.4 * torch.eye(DIM) + 0.5 * unit(within_class(support, labels))
    assert torch.allclose(mixed_covariance(head, support, labels, views=views_of(support)), expected)


def test_equal_images_and_a_single_class_give_finite_logits():
    for head, size in itertools.product(HEADS.values(), (1, 0, 1e-38)):
        same = fit(head, torch.full((4, DIM), float(size)), torch.tensor([0, 0, 1, 1]), statistics())
        single = fit(head, torch.randn(2, DIM), torch.zeros(2, dtype=torch.int64), statistics())
        assert same(torch.randn(3, DIM)).isfinite().all() and single(torch.randn(3, DIM)).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_give_logits_that_are_none(value):
    """For evaluation and training to count and tell, whatever the head."""
    support, labels, query = task(dtype=torch.float32)
    support[0, 1] = value
    for head in HEADS.values():
        assert fit(head, support, labels, statistics())(query).isnan().any(1).all()


def test_a_detached_head_is_the_same_head():
    support, labels, query = task()
    for head in HEADS.values():
        found = fitted(head, support.clone().requires_grad_(), labels)
        still = detached(found)
        assert torch.equal(still(query), found(query)) and not still(query).requires_grad


def test_a_head_that_needs_statistics_says_so():
    support, labels, _ = task()
    with pytest.raises(ValueError, match="needs statistics"):
        fit(HEADS["robust-lda"], support, labels)


# --- statistics of a pool --------------------------------------------------------------------------------


def test_statistics_of_a_pool_merge_join_and_come_back():
    one, two = statistics(1), statistics(2)
    pool = two_members(one, two)
    assert pool.merged(()) is one
    assert torch.equal(pool.merged((0.0, 1.0)).attack, two.attack)
    assert torch.allclose(pool.merged((0.25, 0.75)).source, 0.25 * one.source + 0.75 * two.source)
    assert torch.allclose(pool.averaged().merged((1.0,)).source, pool.merged((0.5, 0.5)).source)
    assert PoolStatistics.concat([pool, pool]).source.shape == (4, DIM, DIM)


def two_members(one: Statistics, two: Statistics) -> PoolStatistics:
    return PoolStatistics(torch.stack([one.source, two.source]), torch.stack([one.attack, two.attack]), one)


@given(st.integers(0, 1000), st.floats(-12, 6))
def test_a_file_keeps_half_of_each_symmetric_matrix_in_half_precision(seed, exponent):
    """Whatever its size; what was kept once is kept as it is."""
    one, two = (Statistics(*(10**exponent * each for each in statistics(seed + k))) for k in (0, 1))
    pool = two_members(one, Statistics(two.source, torch.zeros(DIM, DIM)))
    kept = pool.tensors
    again = PoolStatistics.of_tensors(kept, 2)
    assert kept["triangles"].shape == (3, 2, DIM * (DIM + 1) // 2) and kept["triangles"].dtype == torch.half
    for name in ("source", "attack"):
        before, after = getattr(pool, name), getattr(again, name)
        assert torch.equal(after, after.mT)
        assert ((after - before).abs().amax((1, 2)) <= 2**-11 * before.abs().amax((1, 2))).all()
    assert all(torch.equal(found, kept[name]) for name, found in again.tensors.items())


def test_statistics_of_older_files_are_taken_as_they_are():
    pool = two_members(statistics(1), statistics(2))
    older = {"source": pool.source, "attack": pool.attack}
    older |= {f"pretrained_{name}": each for name, each in pool.pretrained._asdict().items()}
    again = PoolStatistics.of_tensors(older, 2)
    assert torch.equal(again.source, pool.source) and torch.equal(
        again.pretrained.attack, pool.pretrained.attack
    )
    for change in ({"source": torch.ones(3, DIM, DIM)}, {"attack": torch.ones(2, DIM, 5)}):
        with pytest.raises(ValueError, match="expected"):
            PoolStatistics.of_tensors(older | change, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"triangles": torch.ones(3, 2, 5)},
        {"triangles": torch.ones(2, 2, 6)},
        {"triangles": torch.ones(())},
        {"units": torch.ones(3)},
        {"more": torch.ones(3)},
    ],
)
def test_tensors_that_are_no_statistics_are_refused(change):
    tensors = two_members(statistics(1), statistics(2)).tensors
    with pytest.raises(ValueError, match="expected"):
        PoolStatistics.of_tensors(tensors | change, 2)


# --- how heads are asked for -----------------------------------------------------------------------------


def test_words_become_heads_and_their_names_are_words_again():
    found = parse_head(["robust-lda", "support=0.2", "attack=0.5"])
    assert (found.kind, found.support, found.attack, found.identity) == ("robust-lda", 0.2, 0.5, 0.4)
    assert parse_head(["prototypes"]) == Head()
    mixed = parse_head(["mix", "of=lda", "share=0.7", "other=1", "support=0.3"])
    assert (mixed.kind, mixed.share, mixed.other, mixed.support) == ("lda", 0.7, 1, 0.3)
    assert parse_head(["mix"]).other == "pretrained"
    for head in (found, mixed, Head("ridge", penalty=2.0), parse_head(["mix", "of=prototypes"])):
        assert parse_head(head.name.split()) == head
    assert {default_head(kind).kind for kind in TRAINED} == set(TRAINED)
    assert not any(default_head(kind).needs_statistics for kind in TRAINED)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rige", "did you mean 'ridge'"),
        ("ridge penalty", "expected OPTION=VALUE"),
        ("ridge support=1", r"--head ridge support=1: expected penalty="),
        ("prototypes share=1", "expected no option"),
        ("ridge penalty=0", "penalty is 0, expected a positive number"),
        ("lda support=some", "support is 'some', expected a number"),
        ("lda support=nan", "support is nan, expected a nonnegative number"),
        ("lda identity=-1", "identity is -1, expected a nonnegative number"),
        ("lda identity=0", "identity is 0 of 0.5, expected at least 1% of the sum"),
        ("mix share=1.5", "share is 1.5, expected a number from 0 to 1"),
        ("mix other=best", "other is 'best', expected pretrained, text or the number of an adapter"),
        ("mix of=mix", "--head mix of=mix"),
    ],
)
def test_heads_that_make_no_sense_are_refused(words, told):
    fails(told, partial(parse_head, words.split()))


def test_cosine_is_the_published_head():
    support, labels, _ = task()
    assert isinstance(fit(Head(), support, labels), Cosine)
