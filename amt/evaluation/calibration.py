"""Whether the probabilities of a run's answers are what they claim to be.

Of the answers given with probability p, a share p should be right. The expected calibration error (Guo et al.
2017, arxiv.org/abs/1706.04599) is the mean distance of the two: over 15 bins of p, weighted by their images.
"""

from typing import NamedTuple

import numpy as np

from amt.evaluation.runs import Run

BINS = 15


class Calibration(NamedTuple):
    """Of the clean images of a domain.

    Args:
        images: how many were answered.
        right: the share of right answers, in per cent.
        probability: the mean probability of the answers, in per cent.
        error: the expected calibration error, in points.
    """

    images: int
    right: float
    probability: float
    error: float


def calibration(run: Run, source: str) -> Calibration | None:
    """How far the probabilities of a domain's clean images can be trusted; None if no row has answers."""
    rows = [row["answers"] for row in run.rows.get(source, ()) if "answers" in row]
    told = [
        (label == predicted, probability)
        for found in rows
        for label, predicted, probability in zip(
            found["labels"], found["predicted"]["clean"], found["probability"]["clean"], strict=True
        )
        if predicted is not None
    ]
    if not told:
        return None
    right, probability = np.array(told, dtype=float).T
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=right - probability, minlength=BINS)
    return Calibration(
        len(told), 100 * right.mean(), 100 * probability.mean(), 100 * np.abs(gaps).sum() / len(told)
    )
