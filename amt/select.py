"""Choosing a router's settings on labelled episodes that are never scored: a VALID split.

The criterion is the mean of clean accuracy and the accuracies under the given attacks, averaged over the
episodes; of equally good candidates the first is taken.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence

from amt.backbone import Backbone
from amt.evaluate import PGD, evaluate, merged_predictor
from amt.lora import LoRAPool, Trim
from amt.merge import Coefficients, Routing, blend, compactness, support_cosines
from amt.meta_tune import stream
from meta_dataset_readers.episode import Episode

BETAS = (0.1, 1.0, 10.0, 100.0)
GAMMAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was chosen (of the trimmings at most one), and every candidate's score in per cent, in order."""

    routing: Routing
    trims: tuple[Trim, ...]
    scores: tuple[tuple[str, float], ...]


def select(
    backbone: Backbone,
    pool: LoRAPool,
    episodes: Iterable[Episode],
    routing: Routing,
    attacks: Sequence[PGD] = (),
    trims: Sequence[Trim] = (),
    trim_candidates: Sequence[Trim] = (),
    seed: int = 0,
) -> Selection:
    """Choose beta and gamma over `BETAS` x `GAMMAS`, then whether one of the trimmings improves on none.

    The adapters' cosines are computed once per episode, whatever the size of the grid, and coefficients
    that agree to three decimals are evaluated once.

    Args:
        episodes: labelled, from a split that is not scored afterwards.
        routing: everything about the router but beta and gamma.
        attacks, seed: as for `evaluate`.
        trims: what is trimmed whatever is chosen.
        trim_candidates: single trimmings to try, after `trims`, with the chosen beta and gamma.
    """
    grid = [dataclasses.replace(routing, beta=b, gamma=g) for b, g in itertools.product(BETAS, GAMMAS)]
    seen: list[tuple[Episode, list[Coefficients]]] = []
    qualities: list[list[float]] = []
    for episode in episodes:
        labels = episode.support_labels
        generator = stream(seed, episode.index, 1)
        cosines = support_cosines(backbone, pool, episode.support, labels, generator, routing)
        scores = compactness(cosines, labels)
        choices = [blend(*scores, candidate) for candidate in grid]
        distinct = {_rounded(choice): choice for choice in choices}
        quality = {
            key: _quality(backbone, pool, episode, choice, trims, attacks, seed)
            for key, choice in distinct.items()
        }
        seen.append((episode, choices))
        qualities.append([quality[_rounded(choice)] for choice in choices])
    means = [statistics.fmean(column) for column in zip(*qualities, strict=True)]
    best = means.index(max(means))
    tried = [(f"beta {r.beta:g}, gamma {r.gamma:g}", mean) for r, mean in zip(grid, means, strict=True)]

    chosen: tuple[Trim, ...] = ()
    best_mean = means[best]
    for candidate in trim_candidates:
        mean = statistics.fmean(
            _quality(backbone, pool, episode, choices[best], (*trims, candidate), attacks, seed)
            for episode, choices in seen
        )
        tried.append((f"trim {candidate.layer}:{candidate.block}:{candidate.keep:g}", mean))
        if mean > best_mean:
            chosen, best_mean = (candidate,), mean
    return Selection(grid[best], chosen, tuple(tried))


def _rounded(coefficients: Coefficients) -> Coefficients:
    return tuple(round(c, 3) for c in coefficients)


def _quality(
    backbone: Backbone,
    pool: LoRAPool,
    episode: Episode,
    coefficients: Coefficients,
    trims: Sequence[Trim],
    attacks: Sequence[PGD],
    seed: int,
) -> float:
    predict = merged_predictor(backbone, pool, lambda *_: coefficients, trims)
    (row,) = evaluate(predict, [episode], attacks, seed)
    return 100 * statistics.fmean([row["clean"], *(row[attack.name] for attack in attacks)])
