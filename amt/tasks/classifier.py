"""Few-shot classifiers, made from the support set of an episode.

A `Predictor` takes an episode and returns a `Classifier`, which the attacks differentiate through.
It looks at the support set only. A `Fitter` makes the classifier once the weights are decided: by the
prototypes of the support, or by another head (amt/models/heads.py). Knows no attack, no table and no file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from amt.models.head_settings import COSINE, PRETRAINED, Head
from amt.models.heads import SPREAD, Fitted, PoolStatistics, Statistics, fit, has_two, spread
from amt.models.network import Network, features, fixed_features
from amt.models.pool import Pool
from amt.models.weights import Coefficients, Merged, Trim, Weights, stream
from amt.tasks.merge import augment
from meta_dataset_readers.episode import Episode

Logits = Callable[[Tensor], Tensor]
Chooser = Callable[[Tensor, Tensor, torch.Generator], Coefficients]


class Classifier(NamedTuple):
    """A classifier of the N classes of one task.

    Args:
        logits: images (n, 3, H, W) in [0, 1] -> (n, N), differentiable.
        refit: other support images of the same labels -> the logits function of the head fitted to them
            under the same weights, differentiable with respect to them.
        coefficients: of the merge, empty if there was none.
    """

    logits: Logits
    refit: Callable[[Tensor], Logits]
    coefficients: Coefficients


Predictor = Callable[[Episode], Classifier]


class Fitter(Protocol):
    """What makes the classifier of a task under given weights."""

    def __call__(
        self, network: Network, merged: Merged, episode: Episode, coefficients: Coefficients = ()
    ) -> Classifier:
        """The classifier of an episode with support (S, 3, H, W); `coefficients` are those of the merge."""
        ...


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
    return head_classifier(network, merged, episode, coefficients)


def head_classifier(
    network: Network,
    merged: Merged,
    episode: Episode,
    coefficients: Coefficients = (),
    head: Head = Head(),  # noqa: B008  frozen
    statistics: PoolStatistics | None = None,
    second: Merged | None = None,
    seed: int = 0,
) -> Classifier:
    """The classifier by any head, fitted to the support; a `Fitter` once `head` and what follows are bound.

    Args:
        network, merged, episode, coefficients: as of `prototype_classifier`; support (S, 3, H, W).
        head: which, and its options.
        statistics: of the pool that was merged, for heads that need them.
        second: the network whose logits are mixed in, if `head` mixes.
        seed: decides, with the episode's index, the augmented views of the support.
    """
    labels = episode.support_labels
    parts = [_Part(network, merged, head, statistics and statistics.merged(coefficients))]
    if second is not None and head.other is not None:
        alone = tuple(float(p == head.other) for p in range(len(coefficients)))
        other = () if head.other == PRETRAINED else alone
        parts.append(_Part(network, second, head, statistics and statistics.merged(other)))
    views = functools.partial(support_views, network, seed=seed, index=episode.index)
    needs_views = not has_two(labels) and (head.views > 0 or len(parts) > 1)

    def fitted_to(support: Tensor, features_of: Callable[[Network, Weights, Tensor], Tensor]) -> Logits:
        moved = views(support) if needs_views else None
        found = [part.fitted(support, labels, moved, features_of) for part in parts]
        if len(found) == 1:
            return found[0].logits
        (own, a), (other, b) = ((each.logits, SPREAD / spread(each.on_support)) for each in found)
        share = head.share
        return lambda images: share * a * own(images) + (1 - share) * b * other(images)

    return Classifier(
        fitted_to(episode.support, fixed_features), lambda support: fitted_to(support, features), coefficients
    )


VIEWS = 8  # of each support image, where there is one for each class


def support_views(network: Network, support: Tensor, *, seed: int, index: int) -> Tensor:
    """Augmented views of support images, differentiable: (S, 3, H, W) -> (VIEWS, S, 3, H, W), in [0, 1].

    Args:
        seed, index: decide the augmentation, the latter being the episode's.
    """
    generator, normal = stream(seed, index, 5), network.normalise(support)
    seen = [network.denormalise(augment(normal, generator)).clamp(0, 1) for _ in range(VIEWS)]
    return torch.stack(seen)


def fitted_head(
    network: Network,
    merged: Merged,
    support: Tensor,
    labels: Tensor,
    head: Head,
    statistics: Statistics | None = None,
    seed: int = 0,
) -> Fitted:
    """The head alone, of one network, as `head_classifier` fits it to the first episode of a run.

    Args:
        support, labels: (S, 3, H, W) in [0, 1], and (S,) int64 in 0..N-1.
        statistics: of the merged network, for heads that need them.
    """
    seen = head.views > 0 and not has_two(labels)
    views = support_views(network, support, seed=seed, index=0) if seen else None
    return _Part(network, merged, head, statistics).fitted(support, labels, views, fixed_features).head


class _Found(NamedTuple):
    """A fitted network: its head, its logits function, and its logits of the support, or of its views."""

    head: Fitted
    logits: Logits
    on_support: Tensor


class _Part(NamedTuple):
    """One network with its head."""

    network: Network
    merged: Merged
    head: Head
    statistics: Statistics | None

    def fitted(
        self,
        support: Tensor,
        labels: Tensor,
        views: Tensor | None,
        features_of: Callable[[Network, Weights, Tensor], Tensor],
    ) -> _Found:
        weights, scale, bias = self.merged
        scale, bias = (scale, bias) if self.head.kind in COSINE else (SPREAD, 0.0)
        seen = features_of(self.network, weights, support)
        by_view = None
        if views is not None:
            moved = features_of(self.network, weights, views.flatten(0, 1))
            by_view = moved.unflatten(0, views.shape[:2])
        found = fit(self.head, seen, labels, self.statistics, scale, bias, by_view)
        # The only image of a class says little of how its logits spread, views of it say more.
        on_support = found(seen if by_view is None else by_view.flatten(0, 1))
        return _Found(found, lambda images: found(features(self.network, weights, images)), on_support)


def pretrained(network: Network) -> Merged:
    """The pretrained weights, and the scale and bias that training starts from."""
    return Merged(network.weights, 10.0, 0.0)


def fixed_predictor(
    network: Network,
    merged: Merged,
    coefficients: Coefficients = (),
    fitter: Fitter = prototype_classifier,
) -> Predictor:
    """The same weights for every task, with its own head; arguments as of `prototype_classifier`."""
    return lambda episode: fitter(network, merged, episode, coefficients)


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
    network: Network,
    pool: Pool,
    choose: Chooser,
    trims: Sequence[Trim] = (),
    seed: int = 0,
    fitter: Fitter = prototype_classifier,
) -> Predictor:
    """For every task: coefficients from the support set, merge, trim, prototypes (AMT, section 3.4).

    Args:
        choose: (support, labels, generator) -> coefficients; it gets no query.
        trims: see `trim_singular_values`.
        seed: decides, with the episode's index, the generator for `choose`.
        fitter: classifies by prototypes, or by another head.
    """
    merged = merged_networks(pool)

    def predict(episode: Episode) -> Classifier:
        generator = stream(seed, episode.index, 1)
        coefficients = choose(episode.support, episode.support_labels, generator)
        return fitter(network, merged(coefficients, tuple(trims)), episode, coefficients)

    return predict
