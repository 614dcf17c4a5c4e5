"""Probabilities of a task's answers: as sure as the support set warrants, whatever size the logits have."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from amt.models.head_settings import default_head
from amt.models.heads import fit, spread
from amt.tasks.held_out import held_out, temperature

HEADS = ("prototypes", "centred", "lda", "ridge")


def world(distance, shots, ways=5, dim=32, seed=0):
    """Gaussian classes whose means lie `distance` apart, on average: support and query with labels."""
    generator = torch.Generator().manual_seed(seed)
    means = distance / 2**0.5 * torch.randn(ways, dim, generator=generator) / dim**0.5
    labels = torch.arange(ways).repeat(shots)
    asked = torch.arange(ways).repeat(40)
    features, queries = (
        means[which] + torch.randn(len(which), dim, generator=generator) / dim**0.5
        for which in (labels, asked)
    )
    return features, labels, queries, asked


def of(kind, scale=10.0):
    return lambda features, labels: fit(default_head(kind), features, labels, scale=scale)


def found(features, labels, fitter):
    return temperature(fitter(features, labels)(features), features, labels, fitter)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("distance", (0.0, 1.0, 3.0))
def test_probabilities_are_about_as_high_as_the_share_of_right_answers(kind, distance):
    gaps, raw = [], []
    for seed in range(12):
        features, labels, queries, asked = world(distance, shots=5, seed=seed)
        logits = of(kind)(features, labels)(queries)
        t = found(features, labels, of(kind))
        right = (logits.argmax(1) == asked).float().mean()
        gaps.append((logits / t).softmax(1).amax(1).mean() - right)
        raw.append(logits.softmax(1).amax(1).mean() - right)
    gap, before = (torch.stack(each).mean().abs() for each in (gaps, raw))
    assert gap < 0.12
    assert gap < before or before < 0.05


@pytest.mark.parametrize("kind", HEADS)
def test_the_size_of_the_logits_does_not_matter(kind):
    features, labels, *_ = world(1.0, shots=5)
    assert found(features, labels, of(kind, 30.0)) == pytest.approx(
        3 * found(features, labels, of(kind, 10.0)), rel=1e-4
    )


@pytest.mark.parametrize("shots", (2, 5, 23))
def test_it_minimises_the_loss_of_held_out_images_and_the_prior(shots):
    features, labels, *_ = world(1.5, shots)
    start = float(spread(of("lda")(features, labels)(features))) / 2
    parts = list(held_out(features, labels, of("lda")))

    def loss(log_t):
        held = sum(
            float(cross_entropy(z.double() / (start * 2.718281828459045**log_t), y, reduction="sum"))
            for z, _, y in parts
        )
        return held + log_t**2

    best = minimize_scalar(loss, bounds=(-4.6, 4.6), method="bounded")
    t = found(features, labels, of("lda"))
    assert loss(torch.tensor(t / start).log().item()) == pytest.approx(best.fun, abs=0.02)
    assert sum(len(y) for *_, y in parts) == len(labels)


def test_one_image_per_class_leaves_the_prior():
    features, labels, *_ = world(1.0, shots=1)
    logits = of("prototypes")(features, labels)(features)
    assert found(features, labels, of("prototypes")) == pytest.approx(float(spread(logits)) / 2, rel=1e-5)


def test_the_only_image_of_a_class_is_never_left_out():
    features, labels, *_ = world(1.0, shots=3)
    keep = torch.tensor([0, 1, 2, 3, 4, 6, 7, 11, 12])  # classes 0, 3 and 4 have one or two images
    features, labels = features[keep], labels[keep]
    seen = []

    def fitter(some, which):
        seen.append(which)
        return of("prototypes")(some, which)

    left_out = torch.cat([true for _, _, true in held_out(features, labels, fitter)])
    assert all(set(which.tolist()) == {0, 1, 2, 3, 4} for which in seen)
    assert left_out.bincount(minlength=5).tolist() == [n if n > 1 else 0 for n in labels.bincount().tolist()]


@pytest.mark.parametrize(("kind", "noise"), [*((kind, 0.0) for kind in HEADS), ("prototypes", 1e-7)])
@pytest.mark.parametrize("labels", ([0, 0, 1, 1], [0, 1, 2, 3]))
def test_classes_of_the_same_images_leave_every_answer_open(kind, noise, labels):
    """Their logits differ by rounding at most, which no temperature may blow up."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 32, generator=generator).repeat(len(labels), 1)
    features, labels = features + noise * torch.arange(len(labels))[:, None], torch.tensor(labels)
    asked = of(kind)(features, labels)(torch.randn(50, 32, generator=generator))
    probabilities = (asked / found(features, labels, of(kind))).softmax(1)
    assert (probabilities.amax(1) < 1.1 / len(labels.unique())).all()
