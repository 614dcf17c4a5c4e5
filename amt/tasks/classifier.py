"""Few-shot classifiers, made from the support set of an episode.

A `Predictor` takes an episode and returns a `Classifier`, which the attacks differentiate through.
It looks at the support set only. A `Fitter` makes the classifier once the weights are decided: by the
prototypes of the support, or by another head (amt/models/heads.py). Knows no attack, no table and no file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amt.files.text_prototypes import TextPrototypes
from amt.models.head_settings import COSINE, PRETRAINED, TEXT, Head
from amt.models.heads import (
    SPREAD,
    Cosine,
    Fitted,
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
from amt.tasks.held_out import temperature
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
        temperature: finds that of the softmax which makes probabilities of the logits, see held_out.py.
    """

    logits: Logits
    refit: Callable[[Tensor], Logits]
    coefficients: Coefficients
    temperature: Callable[[], float] = lambda: 1.0


Predictor = Callable[[Episode], Classifier]
Fitter = Callable[..., Classifier]  # of a network, merged weights, an episode, and coefficients: see below


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
    """The classifier by any head, fitted to an episode's support (S, 3, H, W), which is on the device of the
    weights; a `Fitter`, also once `head` and what follows are bound.

    Args:
        coefficients: of the merge, if any.
        head: by default the cosine to the prototypes (Snell et al. 2017; Hu et al. 2022).
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
        return functools.partial(spoken, network, fitted_to(support=support, features_of=features)[0])

    voices, tempered = fitted_to(support=episode.support)
    return Classifier(functools.partial(spoken, network, voices), refit, coefficients, tempered)


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


CLIP_SCALE = 100.0  # what CLIP multiplies its cosines by, which have no support set to be calibrated on
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
) -> tuple[tuple[Voice, ...], Callable[[], float]]:
    """One network with its head, or two if `head` mixes: what `spoken` takes, and the temperature as of
    `Classifier`.

    Args:
        support, labels: (S, 3, H, W) in [0, 1], and (S,) int64 in 0..N-1.
        index: of the episode; 0 for the first of a run, or the only one.
        features_of: `features` for a graph that reaches the support.
        texts: (N, D) embeddings of the classes, if `head` mixes those in.
        network, merged, coefficients, head, statistics, second, seed: as of `head_classifier`.
    """
    merged = merged._replace(weights=network.cast(merged.weights))
    parts = [(merged, statistics and statistics.merged(coefficients))]
    if texts is not None and head.zero_shot:
        return (Voice(merged.weights, Cosine(texts, SPREAD)),), lambda: SPREAD / CLIP_SCALE
    if second is not None and head.other is not None:
        alone = tuple(float(p == head.other) for p in range(len(coefficients)))
        other = () if head.other == PRETRAINED else alone
        parts.append((second, statistics and statistics.merged(other)))
    mixes = texts is not None or len(parts) > 1
    needs_views = not has_two(labels) and (head.views > 0 or mixes)
    views = support_views(network, support, seed=seed, index=index) if needs_views else None
    found = [_fitted(network, *part, head, support, labels, views, features_of) for part in parts]
    if texts is not None:
        found = [_with_texts(found[0], labels, head.share, texts)]
    shares = (float(head.share), 1 - float(head.share)) if len(found) > 1 else (None,)
    voices = tuple(
        Voice(whole.weights, each.head, share if share is None else each.factor(share))
        for (whole, _), each, share in zip(parts, found, shares, strict=True)
    )
    return voices, functools.partial(_temperature, voices, found, labels)


def _with_texts(found: "_Found", labels: Tensor, share: float | str, texts: Tensor) -> "_Found":
    """The head of a support, and the texts (N, D) of the classes beside it."""
    said = Cosine(texts, SPREAD)
    if isinstance(share, str):
        share = chosen_share(found.seen, labels, said, found.again, found.by_view)
    factor = found.factor(share)
    rest = scaled(said, (1 - share) * (SPREAD / spread(said(found.looked_at))))

    def beside(own: Fitted) -> Fitted:
        return WithTexts(scaled(own, factor), rest)

    return found._replace(head=beside(found.head), again=lambda *support: beside(found.again(*support)))


@torch.no_grad()
def _temperature(voices: Sequence[Voice], found: Sequence["_Found"], labels: Tensor) -> float:
    """Of the sum of the voices' logits, each fitted anew without the images that are held out."""
    widths = [each.seen.shape[1] for each in found]
    factors = [1.0 if voice.factor is None else voice.factor for voice in voices]

    def total(heads: Sequence[Fitted], seen: Tensor) -> Tensor:
        pairs = zip(factors, heads, seen.split(widths, 1), strict=True)
        return torch.stack([factor * head(part) for factor, head, part in pairs]).sum(0)

    def fit(seen: Tensor, labels: Tensor) -> Logits:
        parts = zip(found, seen.split(widths, 1), strict=True)
        return functools.partial(total, [each.again(part, labels) for each, part in parts])

    seen = torch.cat([each.seen for each in found], 1)
    return temperature(total([voice.head for voice in voices], seen), seen, labels, fit)


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
    """Augmented views of support images, differentiable: (S, 3, H, W) -> (VIEWS, S, 3, H, W), in [0, 1]. Seed
    and the episode's index decide the augmentation."""
    generator, normal = stream(seed, index, 5), network.normalise(support)
    seen = [network.denormalise(augment(normal, generator)).clamp(0, 1) for _ in range(VIEWS)]
    return torch.stack(seen)


class _Found(NamedTuple):
    """A network with its head, fitted to a support set.

    Args:
        head: of N classes.
        again: features (n, D) and labels (n,) of some images of all classes -> the same kind of head.
        seen: (S, D) features of the support.
        by_view: (V, S, D) of its views, if there are any.
    """

    head: Fitted
    again: Callable[[Tensor, Tensor], Fitted]
    seen: Tensor
    by_view: Tensor | None

    @property
    def looked_at(self) -> Tensor:
        """(n, D) features that show how logits spread: the only image of a class says little of it, views of
        it say more."""
        return self.seen if self.by_view is None else self.by_view.flatten(0, 1)

    def factor(self, share: float) -> Tensor:
        """A scalar that gives its logits this share of a mixture."""
        return share * (SPREAD / spread(self.head(self.looked_at)))


def _fitted(
    network: Network,
    merged: Merged,
    statistics: Statistics | None,
    head: Head,
    support: Tensor,
    labels: Tensor,
    views: Tensor | None,
    features_of: FeaturesOf,
) -> _Found:
    weights, scale, bias = merged
    scale, bias = (scale, bias) if head.kind in COSINE else (SPREAD, 0.0)

    def again(seen: Tensor, labels: Tensor, by_view: Tensor | None = None) -> Fitted:
        return fit(head, seen, labels, statistics, scale, bias, by_view)

    seen, by_view = features_of(network, weights, support), None
    if views is not None:
        by_view = features_of(network, weights, views.flatten(0, 1)).unflatten(0, views.shape[:2])
    return _Found(again(seen, labels, by_view), again, seen, by_view)


def pretrained(network: Network) -> Merged:
    """The pretrained weights, and the scale and bias that training starts from."""
    return Merged(network.weights, 10.0, 0.0)


def fixed_predictor(
    network: Network, merged: Merged, coefficients: Coefficients = (), fitter: Fitter = head_classifier
) -> Predictor:
    """The same weights for every task, with its own head."""
    return lambda episode: fitter(network, merged, episode, coefficients)


def pretrained_predictor(network: Network) -> Predictor:
    """The pretrained network as it is, with prototypes; no coefficients."""
    return fixed_predictor(network, pretrained(network))


def merged_networks(pool: Pool, kept: int = 2) -> Callable[[Coefficients, tuple[Trim, ...]], Merged]:
    """A function that merges and trims, and caches the last `kept` networks: fixed coefficients give every
    task the same weights, and trimming them takes longer than the task itself."""

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
    fitter: Fitter = head_classifier,
) -> Predictor:
    """For every task: coefficients from the support set, merge, trim, prototypes (AMT, section 3.4).

    Args:
        choose: (support, labels, generator) -> coefficients; it gets no query.
        seed: decides, with the episode's index, the generator for `choose`.
    """
    merged = merged_networks(pool)

    def predict(episode: Episode) -> Classifier:
        generator = stream(seed, episode.index, 1)
        coefficients = choose(episode.support, episode.support_labels, generator)
        return fitter(network, merged(coefficients, tuple(trims)), episode, coefficients)

    return predict
