"""Prototypes and cosine logits: the classifier head, without state (Snell et al. 2017; Hu et al. 2022)."""

import torch.nn.functional as F
from torch import Tensor


def prototypes(features: Tensor, labels: Tensor) -> Tensor:
    """Mean of the raw features of each class: (S, D) float and (S,) int64 in 0..N-1 -> (N, D).

    N is the largest label plus one; every class has an image.
    """
    member = F.one_hot(labels).to(features.dtype)
    return member.T @ features / member.sum(0)[:, None]


def index_in_class(labels: Tensor) -> Tensor:
    """Number each image within its class, from 0, in the given order: (S,) int64 -> (S,) int64."""
    return F.one_hot(labels).cumsum(0).gather(1, labels[:, None]).squeeze(1) - 1


def cosine_logits(
    features: Tensor, prototypes: Tensor, scale: Tensor | float = 1.0, bias: Tensor | float = 0.0
) -> Tensor:
    """scale * (cos(feature, prototype) + bias): (Q, D) and (N, D) -> (Q, N)."""
    cosines = F.normalize(features, dim=1, eps=1e-12) @ F.normalize(prototypes, dim=1, eps=1e-12).T
    return scale * (cosines + bias)
