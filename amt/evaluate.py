"""Few-shot evaluation, clean and under attack: a row per episode, and its summary.

The attack is fully adaptive and white-box: it differentiates through the very network that classifies the
query, which is fixed once the support set has been seen. Prints nothing and chooses no setting.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amt.backbone import Backbone, Weights, features
from amt.lora import LoRAPool, Trim, trim_singular_values
from amt.merge import Coefficients
from amt.meta_tune import stream
from amt.perturb import pgd
from amt.protonet import cosine_logits, prototypes
from meta_dataset_readers.episode import Episode

Logits = Callable[[Tensor], Tensor]
Chooser = Callable[[Tensor, Tensor, torch.Generator], Coefficients]


@dataclasses.dataclass(frozen=True)
class PGD:
    """An attack of evaluation: L-infinity PGD in pixels; epsilon and step_size in 1/255 of their range."""

    epsilon: float
    step_size: float
    steps: int

    @property
    def name(self) -> str:
        """For example `pgd20@8`: 20 steps within 8/255."""
        return f"pgd{self.steps}@{self.epsilon:g}"


class Task(NamedTuple):
    """A classifier for one task: images (n, 3, H, W) -> logits (n, N), and the coefficients behind it."""

    logits: Logits
    coefficients: Coefficients


Predictor = Callable[[Episode], Task]


def prototype_classifier(
    backbone: Backbone,
    weights: Weights,
    support: Tensor,
    labels: Tensor,
    scale: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
) -> Logits:
    """A classifier by cosine to the support's prototypes under `weights`."""
    with torch.no_grad():
        centres = prototypes(features(backbone, weights, support), labels, int(labels.max()) + 1)
    return lambda images: cosine_logits(features(backbone, weights, images), centres, scale, bias)


def pretrained_predictor(backbone: Backbone) -> Predictor:
    """The pretrained network as it is, with prototypes; no coefficients."""

    def predict(episode: Episode) -> Task:
        logits = prototype_classifier(
            backbone, backbone.weights, episode.support, episode.support_labels, scale=10.0
        )
        return Task(logits, ())

    return predict


def merged_predictor(
    backbone: Backbone, pool: LoRAPool, choose: Chooser, trims: Sequence[Trim] = (), seed: int = 0
) -> Predictor:
    """For every task: coefficients from the support set, merge, trim, prototypes.

    Args:
        choose: (support, labels, generator) -> coefficients; it is shown no query.
        trims: see `trim_singular_values`.
        seed: decides, with the episode's index, the generator that `choose` is given.
    """

    def predict(episode: Episode) -> Task:
        support, labels = episode.support, episode.support_labels
        coefficients = choose(support, labels, stream(seed, episode.index, 1))
        weights = trim_singular_values(pool.merge(coefficients), trims)
        scale, bias = pool.head(coefficients)
        return Task(prototype_classifier(backbone, weights, support, labels, scale, bias), coefficients)

    return predict


def evaluate(
    predict: Predictor, episodes: Iterable[Episode], attacks: Sequence[PGD] = (), seed: int = 0
) -> Iterator[dict]:
    """Yield a row per episode: what it was, `clean` and one accuracy in [0, 1] per attack, coefficients.

    An image counts as robust at epsilon if it is classified correctly clean, under that attack, and under
    every attack listed with a smaller epsilon, whose result lies within the larger ball as well.

    Args:
        predict: sees the episode's support set; the attacks see what it returns, and the query labels.
        episodes: on the device of the network.
        attacks: any number, each with an epsilon of its own.
        seed: decides, with the episode's index, the attacks' random starts.
    """
    for episode in episodes:
        began = time.perf_counter()
        task = predict(episode)
        with torch.no_grad():
            clean = task.logits(episode.query)
        standing = (clean.argmax(1) == episode.query_labels).nonzero().squeeze(1)
        row = {
            "source": episode.source,
            "index": episode.index,
            "ways": episode.n_way,
            "support": len(episode.support),
            "queries": len(episode.query),
            "clean": len(standing) / len(episode.query),
        }
        for attack in sorted(attacks, key=lambda attack: attack.epsilon):
            _, fooled = pgd(
                task.logits,
                episode.query[standing],
                episode.query_labels[standing],
                epsilon=attack.epsilon,
                step_size=attack.step_size,
                steps=attack.steps,
                generator=stream(seed, episode.index, 2),
            )
            standing = standing[~fooled]
            row[attack.name] = len(standing) / len(episode.query)
        row["coefficients"] = list(task.coefficients)
        row["seconds"] = round(time.perf_counter() - began, 4)
        yield row


class Summary(NamedTuple):
    """Mean over episodes in per cent, half-width of its 95% interval in points, number of episodes."""

    mean: float
    interval: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.interval:.1f}"


def summarise(rows: Sequence[dict], column: str) -> Summary:
    """Mean and 1.96 standard errors of one column over episodes; a single episode has an infinite interval.

    Raises:
        ValueError: there is no row.
    """
    values = [100 * row[column] for row in rows]
    if not values:
        raise ValueError(f"no row to summarise {column!r} over")
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return Summary(statistics.fmean(values), 1.96 * error, len(values))


def average_summary(summaries: Sequence[Summary]) -> Summary:
    """The unweighted average of independent domains, with the interval that follows from theirs."""
    mean = statistics.fmean(summary.mean for summary in summaries)
    interval = sum(summary.interval**2 for summary in summaries) ** 0.5 / len(summaries)
    return Summary(mean, interval, sum(summary.n for summary in summaries))


def validate(
    backbone: Backbone, pool: LoRAPool, episodes: Iterable[Episode], robust: bool, seed: int = 0
) -> list[dict[str, float]]:
    """Accuracy in per cent of every adapter alone: `clean`, and `robust` at its own epsilon if asked for.

    The episodes are gone through once, and none is kept: those of Meta-Dataset fill gigabytes.
    """
    attacks = [PGD(level.epsilon, level.step_size, level.steps) for level in pool.levels]
    predictors = [merged_predictor(backbone, pool[p], lambda *_: (1.0,)) for p in range(len(pool))]
    rows: list[list[dict]] = [[] for _ in attacks]
    for episode in episodes:
        for found, predict, attack in zip(rows, predictors, attacks, strict=True):
            found += evaluate(predict, [episode], [attack] if robust else [], seed)
    scores = []
    for found, attack in zip(rows, attacks, strict=True):
        score = {"clean": summarise(found, "clean").mean}
        if robust:
            score["robust"] = summarise(found, attack.name).mean
        scores.append(score)
    return scores
