"""What is noted of the steps of meta-tuning: plain numbers. Knows no tensors."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class StepRecord(NamedTuple):
    """The record of one level's step: plain numbers, accuracies in [0, 1]."""

    total: float
    natural: float
    robust: float
    clean_accuracy: float
    robust_accuracy: float
    lr: float
    n_way: int
    seconds_per_step: float

    @classmethod
    def of(cls, row: Sequence[float]) -> "StepRecord":
        """The record in a row of numbers."""
        found = cls._make(row)
        return found._replace(n_way=int(found.n_way))


def mean(records: Sequence[StepRecord]) -> StepRecord:
    """The mean of one level's records of the episodes of one step; the ways are those of the last."""
    means = map(statistics.fmean, zip(*records, strict=True))
    return StepRecord._make(means)._replace(lr=records[-1].lr, n_way=records[-1].n_way)


class EpochSums(NamedTuple):
    """Sums over one level's steps since an epoch began, which show a collapse: of 1, of the natural loss's
    distance from ln(ways), of the robust loss; and the ways of the last step."""

    steps: int
    excess: float
    divergence: float
    ways: int

    def plus(self, record: StepRecord) -> "EpochSums":
        """The sums with one more step, unless its loss overflowed, as in float16: then none was made."""
        if not math.isfinite(record.total):
            return self
        excess = abs(record.natural - math.log(record.n_way))
        return EpochSums(self.steps + 1, self.excess + excess, self.divergence + record.robust, record.n_way)

    def collapsed(self, robust: bool) -> bool:
        """Whether the level looks like a constant network: loss at ln(ways), and where it trains against an
        adversary (`robust`) KL divergence at zero."""
        if self.steps == 0 or self.excess / self.steps >= 0.01:
            return False
        return not robust or self.divergence / self.steps < 1e-3


NO_STEPS = EpochSums(0, 0.0, 0.0, 0)
