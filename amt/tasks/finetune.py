"""Test-time fine-tuning: all weights of one network adapted to each task's support set.

The last step of P>M>F (Hu et al. 2022, arxiv.org/abs/2204.07305). With support images x of labels y, weights
W, prototypes c and an augmentation a drawn anew in every step:

    for K steps:    Adam step on W for the cross-entropy of  scale * (cos(f_W(a(x)), c_W(x)) + bias)  with y
    afterwards:     prototypes of x under the tuned W classify the query

Both features carry gradients; scale and bias stay. Starts every task from the same weights, which are an
argument: no network is written to. Uses no query image and no query label.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features
from amt.models.weights import Coefficients, Merged, Weights, stream
from amt.tasks.classifier import Classifier, Fitter, Predictor, head_classifier
from amt.tasks.merge import augment
from amt.tasks.settings import Finetuning
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError


def finetuned_predictor(
    network: Network,
    merged: Merged,
    settings: Finetuning,
    seed: int,
    coefficients: Coefficients = (),
    fitter: Fitter = head_classifier,
) -> Predictor:
    """For every task: fine-tune the weights on the support set, then prototypes, or another `fitter`. The
    seed decides, with the episode's index, the augmentation."""

    def predict(episode: Episode) -> Classifier:
        generator = stream(seed, episode.index, 3)
        support, labels = episode.support, episode.support_labels
        weights = finetune(network, merged, support, labels, settings, generator)
        return fitter(network, merged._replace(weights=weights), episode, coefficients)

    return predict


@torch.enable_grad()
def finetune(
    network: Network,
    merged: Merged,
    support: Tensor,
    labels: Tensor,
    settings: Finetuning,
    generator: torch.Generator,
) -> Weights:
    """The weights tuned to a support set, without graph; in float32, whatever the network's precision.

    Args:
        merged: the weights that every task starts from; they are not written to.
        support, labels: (S, 3, H, W) in [0, 1], and (S,) int64 in 0..N-1.
        generator: a CPU generator for the augmentation.

    Raises:
        InputError: some weights are not finite, as the rate is too large.
    """
    weights, scale, bias = merged
    if settings.lr == 0:
        return weights
    network = dataclasses.replace(network, autocast=None)  # Adam's small steps would drown in float16
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    optimiser = torch.optim.Adam(leaves.values(), settings.lr)
    for _ in range(settings.steps):
        view = support
        if torch.rand((), generator=generator) < settings.augment_probability:
            normal = augment(network.normalise(support), generator, settings.augment_kinds)
            view = network.denormalise(normal)
        plain, seen = features(network, leaves, torch.cat([support, view])).chunk(2)
        logits = cosine_logits(seen, prototypes(plain, labels), scale, bias)
        optimiser.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimiser.step()
    if not all(leaf.isfinite().all() for leaf in leaves.values()):
        raise InputError(f"--ada_lr is {settings.lr:g}: fine-tuning diverges, expected a smaller rate")
    return {name: leaf.detach() for name, leaf in leaves.items()}
