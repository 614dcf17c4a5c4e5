"""Numbers without meaning: refused as flags, counted as wrong as logits, left away as intervals."""

import dataclasses
import math

import pytest
import torch

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.attacks.losses import misclassified
from amt.attacks.perturb import Ball, pgd
from amt.cli import options
from amt.cli.compare import cell
from amt.cli.options import autolora
from amt.evaluation.deploy import check_fit
from amt.evaluation.dilution import dilution
from amt.evaluation.evaluate import measure
from amt.evaluation.sanity import judge
from amt.evaluation.settings import Deployment
from amt.evaluation.statistics import Summary, summarise
from amt.tasks.classifier import Classifier
from amt.tasks.settings import Finetuning, Routing
from amt.training.autolora_settings import Adversary, Settings
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.settings import Number

# A logarithm of a weight may be anything; seconds and minutes may be longer than any run.
WITHOUT_BOUND = {"min_log_weight", "max_log_weight", "min_examples_in_class", "specified_expert"}
WITHOUT_BOUND |= {"save_every_minutes", "top_k", "coefficients", "gradient_similarity", "load_epoch"}
USED = (Adversary, Deployment, EpisodeSampling, Finetuning, Perturbation, Routing, Settings, TuneSettings)
PARSERS = {
    "main": options.training_parser(),
    "test": options.testing_parser(),
    "autolora": autolora.parser(),
}


def numeric(parser) -> list:
    return [action for action in parser._actions if isinstance(action.type, Number)]


CASES = [(name, action.dest) for name, parser in PARSERS.items() for action in numeric(parser)]


@pytest.mark.parametrize(("program", "dest"), CASES)
def test_every_number_has_a_range(program, dest):
    """No flag takes what is no number, and none a value that can only end in an overflow."""
    (action,) = [action for action in numeric(PARSERS[program]) if action.dest == dest]
    for text in ("nan", "inf", "-inf", "", "abc", "1e30" if action.type.kind is int else "1e400"):
        with pytest.raises(Exception, match="expected"):
            action.type(text)
    if dest not in WITHOUT_BOUND:
        assert action.type.least is not None or action.type.above is not None, dest
        huge = "1" + 30 * "0"
        with pytest.raises(Exception, match=r"at most|from 0 to 1"):
            action.type(huge)


@pytest.mark.parametrize("cls", USED)
def test_settings_that_are_numbers_are_declared_with_a_range(cls):
    for field in dataclasses.fields(cls):
        if field.metadata.get("help") and field.type in ("int", "float", int, float):
            bounded = {"least", "above", "choices", "read"} & field.metadata.keys()
            assert bounded or field.name in WITHOUT_BOUND, f"{cls.__name__}.{field.name}"


def flat_classifier(logits) -> Classifier:
    return Classifier(logits, lambda _support: logits, ())


def nan_episode() -> Episode:
    images = torch.rand(4, 3, 2, 2)
    images[0] = 0  # whose logits are no numbers
    labels = torch.tensor([0, 1, 0, 1])
    return Episode(images[:2], labels[:2], images, labels, source="here", class_names=("a", "b"))


def nan_logits(images: torch.Tensor) -> torch.Tensor:
    score = images.flatten(1).sum(1)
    return torch.stack([score / score * 5, score / score], 1)


def test_nan_logits_count_as_wrong_clean_and_attacked_and_are_stamped():
    """Torch's argmax takes NaN for the largest, so that an image of class 0 would look right."""
    found = measure(lambda _: flat_classifier(nan_logits), nan_episode(), [Attack("pgd", (1.0,), steps=1)])
    assert found.correct["clean"].tolist() == [False, False, True, False]
    assert found.row["nan_images"] == 1
    findings = judge([found.row], [Attack("pgd", (1.0,), steps=1)])
    assert {finding.column for finding in findings} == {"clean", "pgd1@1"}
    assert all("1 images with NaN logits" in finding.reason for finding in findings)


def test_an_attack_that_reaches_nan_has_fooled_the_network():
    def fragile(images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 2), math.nan, requires_grad=True) + images.sum()

    images, labels = torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.int64)
    _, fooled, _ = pgd(fragile, images, labels, Ball("linf", 0.1, 0.1), 1, torch.Generator())
    assert fooled.all()
    assert misclassified(torch.tensor([[1.0, 0.0], [math.nan, 0.0]]), labels).tolist() == [False, True]


def test_one_episode_has_no_interval():
    one = summarise([{"clean": 0.5}], "clean")
    assert str(one) == "50.0 +- n/a"
    assert "inf" not in cell(one) and "n/a" in cell(one)
    assert str(Summary(50, 1.25, 9, 48, 52)) == "50.0 +- 1.2"


@pytest.mark.parametrize(
    ("coefficients", "epsilons", "words"),
    [
        (
            [[0.5, 0.5]],
            [8, 0.1],
            ["50% of the", "0.1/255", "--route_epsilon 8", "--specified_expert 0"],
        ),
        ([[0.1, 0.9], [0.5, 0.5]], [0.1, 8], ["30%"]),
        ([[0.25] * 4], [0.01, 6, 8, 0.1], ["50%", "--specified_expert 2"]),
        ([[0.8, 0.2]], [8, 0.1], []),
        ([[0.5, 0.5]], [8, 6], []),
        ([[0.5, 0.5]], [0.1, 0.01], []),
        ([], [8, 0.1], []),
    ],
)
def test_a_merge_that_is_half_near_clean_is_warned_of(coefficients, epsilons, words):
    said = dilution(coefficients, epsilons)
    assert bool(said) == (bool(words) and "30%" not in words)
    assert "30%" in words or all(word in said for word in words)


def test_more_adapters_than_there_are_cannot_share_the_weight(pool):
    with pytest.raises(InputError, match=f"--top_k 9: here holds {len(pool)} adapters"):
        check_fit(Deployment(routings=(Routing(top_k=9),)), pool, "here")
