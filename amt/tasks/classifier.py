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

from amt.files.text_prototypes import TextPrototypes
from amt.models.head_settings import COSINE, PRETRAINED, TEXT, Head
from amt.models.heads import (
    SPREAD,
    Cosine,
    Fitted,
    Linear,
    PoolStatistics,
    Statistics,
    WithTexts,
    fit,
    has_two,
    scaled,
    spread,
)
from amt.models.network import Network, features, fixed_features
from amt.models.pool import Pool
from amt.models.weights import Coefficients, Merged, Trim, Weights, stream
from amt.tasks.merge import augment
from amt.tasks.texts import chosen_share
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
    texts: TextPrototypes | None = None,
) -> Classifier:
    """The classifier by any head, fitted to the support; a `Fitter` once `head` and what follows are bound.

    Args:
        network, merged, episode, coefficients: as of `prototype_classifier`; support (S, 3, H, W).
        head: which, and its options.
        statistics: of the pool that was merged, for heads that need them.
        second: the network whose logits are mixed in, if `head` mixes.
        seed: decides, with the episode's index, the augmented views of the support.
        texts: of all classes, by name, if `head` mixes those in.
    """
    fitted_to = functools.partial(
        fitted_voices,
        network,
        merged,
        labels=episode.support_labels,
        coefficients=coefficients,
        head=head,
        statistics=statistics,
        second=second,
        seed=seed,
        index=episode.index,
        texts=texts_of(texts, head, episode.names, episode.support.device),
    )

    def refit(support: Tensor) -> Logits:
        return functools.partial(spoken, network, fitted_to(support=support, features_of=features))

    voices = fitted_to(support=episode.support)
    return Classifier(functools.partial(spoken, network, voices), refit, coefficients)


class Voice(NamedTuple):
    """What one network says of the images of a task.

    Args:
        weights: of the network.
        head: fitted to the support under these weights.
        factor: a scalar, of its logits, where those of two networks are added; None for one alone.
    """

    weights: Weights
    head: Fitted
    factor: Tensor | None = None


FeaturesOf = Callable[[Network, Weights, Tensor], Tensor]


def spoken(
    network: Network, voices: Sequence[Voice], images: Tensor, features_of: FeaturesOf = features
) -> Tensor:
    """The logits of a task, those of two voices added: (n, 3, H, W) in [0, 1] -> (n, N)."""
    found = []
    for voice in voices:
        logits = voice.head(features_of(network, voice.weights, images))
        found.append(logits if voice.factor is None else voice.factor * logits)
    return found[0] if len(found) == 1 else found[0] + found[1]


def fitted_voices(
    network: Network,
    merged: Merged,
    support: Tensor,
    labels: Tensor,
    coefficients: Coefficients = (),
    head: Head = Head(),  # noqa: B008  frozen
    statistics: PoolStatistics | None = None,
    second: Merged | None = None,
    seed: int = 0,
    index: int = 0,
    features_of: FeaturesOf = fixed_features,
    texts: Tensor | None = None,
) -> tuple[Voice, ...]:
    """What `spoken` takes: one network with its head, or two if `head` mixes.

    Args:
        support, labels: (S, 3, H, W) in [0, 1], and (S,) int64 in 0..N-1.
        index: of the episode; 0 for the first of a run, or the only one.
        features_of: `features` for a graph that reaches the support.
        texts: (N, D) embeddings of the classes, if `head` mixes those in.
        network, merged, coefficients, head, statistics, second, seed: as of `head_classifier`.
    """
    merged = merged._replace(weights=network.cast(merged.weights))
    parts = [_Part(network, merged, head, statistics and statistics.merged(coefficients))]
    if texts is not None:
        views = functools.partial(support_views, network, support, seed=seed, index=index)
        return _with_texts(parts[0], support, labels, views, features_of, texts)
    if second is not None and head.other is not None:
        alone = tuple(float(p == head.other) for p in range(len(coefficients)))
        other = () if head.other == PRETRAINED else alone
        parts.append(_Part(network, second, head, statistics and statistics.merged(other)))
    needs_views = not has_two(labels) and (head.views > 0 or len(parts) > 1)
    views = support_views(network, support, seed=seed, index=index) if needs_views else None
    found = [part.fitted(support, labels, views, features_of) for part in parts]
    if len(found) == 1:
        return (Voice(merged.weights, found[0].head),)
    share = float(head.share)
    shares = (share, 1 - share)
    return tuple(
        Voice(part.merged.weights, each.head, share * (SPREAD / spread(each.on_support)))
        for part, each, share in zip(parts, found, shares, strict=True)
    )


def _with_texts(
    part: "_Part",
    support: Tensor,
    labels: Tensor,
    views: Callable[[], Tensor],
    features_of: FeaturesOf,
    texts: Tensor,
) -> tuple[Voice, ...]:
    """A network with the head of its support and the texts (N, D), or with the latter alone."""
    said, weights = Cosine(texts, SPREAD), part.merged.weights
    if part.head.zero_shot:
        return (Voice(weights, said),)
    seen = part.features(support, None if has_two(labels) else views(), features_of)
    found, share = part.fitted_to(*seen, labels), part.head.share
    if isinstance(share, str):

        def fit(features: Tensor, labels: Tensor) -> Fitted:
            return part.fitted_to(features, None, labels).head

        share = chosen_share(seen[0], labels, said, fit, seen[1])
    of_texts = said(seen[0] if seen[1] is None else seen[1].flatten(0, 1))
    own = scaled(found.head, share * (SPREAD / spread(found.on_support)))
    rest = Cosine(texts, (1 - share) * SPREAD * (SPREAD / spread(of_texts)))
    return (Voice(weights, WithTexts(own, rest)),)


def texts_of(
    texts: TextPrototypes | None, head: Head, names: Sequence[str], device: torch.device
) -> Tensor | None:
    """The embeddings (N, D) of these classes that a head mixes in; None for a head that mixes in none."""
    return texts.of(names, device) if texts is not None and head.other == TEXT else None


def mixed_in(network: Network, pool: Pool | None, head: Head) -> Merged | None:
    """The network whose logits a head mixes in: a member of the pool, or the network's own weights, which
    are the pretrained ones; None for a head that does not mix."""
    if head.other == PRETRAINED:
        return pretrained(network)
    if isinstance(head.other, int) and pool is not None:
        return pool[head.other].merged((1.0,))
    return None


VIEWS = 8  # of each support image, where there is one for each class


def support_views(network: Network, support: Tensor, *, seed: int, index: int) -> Tensor:
    """Augmented views of support images, differentiable: (S, 3, H, W) -> (VIEWS, S, 3, H, W), in [0, 1].

    Args:
        seed, index: decide the augmentation, the latter being the episode's.
    """
    generator, normal = stream(seed, index, 5), network.normalise(support)
    seen = [network.denormalise(augment(normal, generator)).clamp(0, 1) for _ in range(VIEWS)]
    return torch.stack(seen)


class _Found(NamedTuple):
    """A fitted network: its head, and its logits of the support, or of its views."""

    head: Cosine | Linear
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
        features_of: FeaturesOf,
    ) -> _Found:
        return self.fitted_to(*self.features(support, views, features_of), labels)

    def features(
        self, support: Tensor, views: Tensor | None, features_of: FeaturesOf
    ) -> tuple[Tensor, Tensor | None]:
        """Features of the support (S, D), and of its views (V, S, D)."""
        weights = self.merged.weights
        seen = features_of(self.network, weights, support)
        if views is None:
            return seen, None
        moved = features_of(self.network, weights, views.flatten(0, 1))
        return seen, moved.unflatten(0, views.shape[:2])

    def fitted_to(self, seen: Tensor, by_view: Tensor | None, labels: Tensor) -> _Found:
        _, scale, bias = self.merged
        scale, bias = (scale, bias) if self.head.kind in COSINE else (SPREAD, 0.0)
        found = fit(self.head, seen, labels, self.statistics, scale, bias, by_view)
        # The only image of a class says little of how its logits spread, views of it say more.
        on_support = found(seen if by_view is None else by_view.flatten(0, 1))
        return _Found(found, on_support)


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
