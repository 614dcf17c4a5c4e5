"""Few-shot classifiers, made from the support set of an episode.

A `Predictor` takes an episode and returns a `Classifier`, which the attacks differentiate through.
It looks at the support set only. Knows no attack, no table and no file.
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


class Classifier(NamedTuple):
    """A classifier of the N classes of one task.

    Args:
        logits: images (n, 3, H, W) in [0, 1] -> (n, N), differentiable.
        refit: other support images of the same labels -> the logits function that their prototypes give
            under the same weights, differentiable with respect to them.
        coefficients: of the merge, empty if there was none.
    """

    logits: Logits
    refit: Callable[[Tensor], Logits]
    coefficients: Coefficients


Predictor = Callable[[Episode], Classifier]


def prototype_classifier(
    network: Network, merged: Merged, episode: Episode, coefficients: Coefficients = ()
) -> Classifier:
    """The classifier by cosine to the support's prototypes (Snell et al. 2017; Hu et al. 2022).

    Args:
        network: the structure.
        merged: its weights, and the scale and bias of the logits.
        episode: on the device of the weights; its support is (S, 3, H, W), its query is not used.
        coefficients: of the merge, empty if there was none.
    """
    labels = episode.support_labels
    weights, scale, bias = merged

    def with_prototypes(centres: Tensor) -> Logits:
        return lambda images: cosine_logits(features(network, weights, images), centres, scale, bias)

    def refit(support: Tensor) -> Logits:
        return with_prototypes(prototypes(features(network, weights, support), labels))

    support = fixed_features(network, weights, episode.support)
    return Classifier(with_prototypes(prototypes(support, labels)), refit, coefficients)


def pretrained(network: Network) -> Merged:
    """The pretrained weights, and the scale and bias that training starts from."""
    return Merged(network.weights, 10.0, 0.0)


def fixed_predictor(network: Network, merged: Merged, coefficients: Coefficients = ()) -> Predictor:
    """The same weights for every task, with its prototypes; arguments as of `prototype_classifier`."""
    return lambda episode: prototype_classifier(network, merged, episode, coefficients)


def pretrained_predictor(network: Network) -> Predictor:
    """The pretrained network as it is, with prototypes; no coefficients."""
    return fixed_predictor(network, pretrained(network))


def merged_networks(pool: Pool, kept: int = 2) -> Callable[[Coefficients, tuple[Trim, ...]], Merged]:
    """A function that merges and trims, and caches the last `kept` networks.

    Fixed coefficients give every task the same weights, and trimming them takes longer than the task itself.
    """

    @functools.lru_cache(maxsize=kept)
    def merged(coefficients: Coefficients, trims: tuple[Trim, ...]) -> Merged:
        return pool.merged(coefficients, trims)

    return merged


def merged_predictor(
    network: Network, pool: Pool, choose: Chooser, trims: Sequence[Trim] = (), seed: int = 0
) -> Predictor:
    """For every task: coefficients from the support set, merge, trim, prototypes (AMT, section 3.4).

    Args:
        choose: (support, labels, generator) -> coefficients; it gets no query.
        trims: see `trim_singular_values`.
        seed: decides, with the episode's index, the generator for `choose`.
    """
    merged = merged_networks(pool)

    def predict(episode: Episode) -> Classifier:
        generator = stream(seed, episode.index, 1)
        coefficients = choose(episode.support, episode.support_labels, generator)
        return prototype_classifier(network, merged(coefficients, tuple(trims)), episode, coefficients)

    return predict
