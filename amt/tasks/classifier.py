"""Classifiers for single tasks: what the support set of an episode is turned into.

A `Predictor` is shown an episode and returns a `Task`, the classifier that the attacks of evaluation then
differentiate through. It may look at the support set only. Knows no attack, no table and no file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features, fixed_features
from amt.models.pool import Merged, Pool
from amt.models.weights import Coefficients, Trim, stream
from meta_dataset_readers.episode import Episode

Logits = Callable[[Tensor], Tensor]
Chooser = Callable[[Tensor, Tensor, torch.Generator], Coefficients]


class Task(NamedTuple):
    """A classifier for one task.

    Args:
        logits: images (n, 3, H, W) in [0, 1] -> (n, N), differentiable.
        refit: other support images of the same labels -> the logits function that their prototypes give
            under the same weights, differentiable with respect to them.
        coefficients: of the merge, empty if there was none.
    """

    logits: Logits
    refit: Callable[[Tensor], Logits]
    coefficients: Coefficients


Predictor = Callable[[Episode], Task]


def prototype_task(
    network: Network,
    merged: Merged,
    episode: Episode,
    coefficients: Coefficients = (),
) -> Task:
    """The classifier by cosine to the support's prototypes under the merged weights."""
    weights, scale, bias = merged
    labels, n_way = episode.support_labels, episode.n_way

    def with_centres(centres: Tensor) -> Logits:
        return lambda images: cosine_logits(features(network, weights, images), centres, scale, bias)

    def refit(support: Tensor) -> Logits:
        return with_centres(prototypes(features(network, weights, support), labels, n_way))

    plain = fixed_features(network, weights, episode.support)
    return Task(with_centres(prototypes(plain, labels, n_way)), refit, coefficients)


def pretrained_predictor(network: Network) -> Predictor:
    """The pretrained network as it is, with prototypes; no coefficients."""
    return lambda episode: prototype_task(network, Merged(network.weights, scale=10.0), episode)


def merged_predictor(
    network: Network, pool: Pool, choose: Chooser, trims: Sequence[Trim] = (), seed: int = 0
) -> Predictor:
    """For every task: coefficients from the support set, merge, trim, prototypes.

    Args:
        choose: (support, labels, generator) -> coefficients; it is shown no query.
        trims: see `trim_singular_values`.
        seed: decides, with the episode's index, the generator that `choose` is given.
    """

    # Fixed coefficients give every task the same weights, whose trimming takes longer than the task itself.
    @functools.lru_cache(maxsize=2)
    def merged(coefficients: Coefficients) -> Merged:
        return pool.merged(coefficients, trims)

    def predict(episode: Episode) -> Task:
        generator = stream(seed, episode.index, 1)
        coefficients = choose(episode.support, episode.support_labels, generator)
        return prototype_task(network, merged(coefficients), episode, coefficients)

    return predict
