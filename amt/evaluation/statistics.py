"""Means over episodes with their 95% intervals, paired differences, and the averages that papers print.

Works on rows of results, dictionaries with an accuracy in [0, 1] per column. An interval is given twice: mean
+- 1.96 standard errors, as the papers have it, and by the bootstrap, which stays within 0 and 100 and follows
the skew of accuracies near them.
"""

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BOOTSTRAP_SAMPLES = 2000
MANY = 2000  # rows whose resampling matrix would fill the memory; few of their values differ


class Summary(NamedTuple):
    """Mean over episodes in per cent (or a difference, in points), and its 95% interval.

    Args:
        mean: in per cent.
        interval: half-width of the normal interval, 1.96 standard errors, in points; infinite for n = 1.
        n: number of episodes.
        low, high: the ends of the bootstrap interval, in per cent; the mean itself for n = 1.
    """

    mean: float
    interval: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {f'{self.interval:.1f}' if math.isfinite(self.interval) else 'n/a'}"


def summarise(rows: Sequence[Mapping], column: str) -> Summary:
    """Mean and intervals of one column over episodes.

    Args:
        rows: with an accuracy in [0, 1] under `column`.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError(f"no row to summarise {column!r} over")
    return _summary([100 * row[column] for row in rows])


def average_summary(summaries: Sequence[Summary]) -> Summary:
    """The unweighted average of independent domains, with the intervals that follow from theirs.

    Independent errors add in squares, for the normal interval and for both sides of the bootstrap interval.
    """
    count = len(summaries)
    mean = statistics.fmean(summary.mean for summary in summaries)
    interval = sum(summary.interval**2 for summary in summaries) ** 0.5 / count
    below = sum((summary.mean - summary.low) ** 2 for summary in summaries) ** 0.5 / count
    above = sum((summary.high - summary.mean) ** 2 for summary in summaries) ** 0.5 / count
    return Summary(mean, interval, sum(s.n for s in summaries), mean - below, mean + above)


def with_averages(
    by_source: Mapping[str, Summary], averages: Mapping[str, Sequence[str]]
) -> dict[str, Summary]:
    """The summaries of domains by name, and after them those of the averages over them.

    Args:
        averages: by name the domains behind each, one at least, all of them in `by_source`.
    """
    found = {
        name: average_summary([by_source[source] for source in members]) for name, members in averages.items()
    }
    return {**by_source, **found}


def paired_difference(ours: Sequence[Mapping], theirs: Sequence[Mapping], column: str) -> Summary:
    """Mean of ours - theirs in points over the episodes, which are the same ones in the same order.

    Raises:
        ValueError: there is no row, or the episodes differ.
    """
    if not ours or [row["index"] for row in ours] != [row["index"] for row in theirs]:
        raise ValueError("a paired difference needs the same episodes, and at least one")
    return _summary([100 * (a[column] - b[column]) for a, b in zip(ours, theirs, strict=True)])


def groups(
    sources: Sequence[str], trained_on: Iterable[str] = (), benchmarks: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """The domains behind each average that is printed under a table, by the average's name.

    "average" is over all domains. "without ImageNet", "in-domain", "out-of-domain" and one for each benchmark
    follow where they are over other domains than those before.

    Args:
        sources: the domains evaluated on.
        trained_on: the sources of meta-training; empty if they are unknown, or there was none.
        benchmarks: the collection each known domain belongs to.
    """
    sources, seen, benchmarks = tuple(sources), set(trained_on), benchmarks or {}
    candidates = {
        "average": sources,
        "without ImageNet": tuple(s for s in sources if s != "ilsvrc_2012"),
        "in-domain": tuple(s for s in sources if s in seen),
        "out-of-domain": tuple(s for s in sources if s not in seen) if seen else (),
    }
    for name in dict.fromkeys(benchmarks[s] for s in sources if s in benchmarks):
        candidates[name] = tuple(s for s in sources if benchmarks.get(s) == name)
    found: dict[str, tuple[str, ...]] = {}
    for name, members in candidates.items():
        if members and members not in found.values():
            found[name] = members
    return found


def _summary(values: Sequence[float]) -> Summary:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Summary(mean, float("inf"), 1, mean, mean)
    error = statistics.stdev(values) / len(values) ** 0.5
    low, high = np.percentile(_resampled_means(np.asarray(values)), (2.5, 97.5))
    return Summary(mean, 1.96 * error, len(values), float(low), float(high))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """(n,) values -> (BOOTSTRAP_SAMPLES,) means of n draws of them with replacement."""
    if len(values) <= MANY:
        return _resampling(len(values)) @ values
    # The same distribution: of n draws of n values it only matters how often each value comes up.
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), BOOTSTRAP_SAMPLES)
    return drawn @ distinct / len(values)


@functools.lru_cache(maxsize=8)
def _resampling(n: int) -> np.ndarray:
    """The bootstrap as a matrix (BOOTSTRAP_SAMPLES, n): times n values it gives the resampled means.

    It is the same for every call, so that an interval does not depend on what was summarised before.
    """
    picks = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_SAMPLES, n))
    shares = np.zeros(picks.shape)
    np.add.at(shares, (np.arange(BOOTSTRAP_SAMPLES)[:, None], picks), 1 / n)
    return shares
