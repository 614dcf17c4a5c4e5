"""Means over episodes with their 95% intervals, paired differences, and the averages that papers print.

Works on rows of results, dictionaries with an accuracy in [0, 1] per column. An interval is given twice: mean
+- 1.96 standard errors, as the papers have it, and by the bootstrap, which stays within 0 and 100 and follows
the skew of accuracies near them.

One trained network says nothing about the next one. Where a row has several training seeds both intervals
know them (`over_seeds`): the first by Satterthwaite's degrees of freedom, the second by the hierarchical
bootstrap, which draws seeds and then episodes (Davison & Hinkley, Bootstrap Methods, 1997, section 3.8).
"""

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BOOTSTRAP_SAMPLES = 2000
AT_ONCE = 2**20  # draws, which take some ten megabytes
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

    @property
    def decided(self) -> int:
        """Of a difference: 1 or -1 where both of its intervals exclude zero on that side; else 0."""
        least = min(self.low, self.mean - self.interval)
        most = max(self.high, self.mean + self.interval)
        return (least > 0) - (most < 0)

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


def over_seeds(seeds: Sequence[Mapping[str, Sequence[float]]], same_episodes: bool = False) -> Summary:
    """Mean over domains, training seeds and episodes, with intervals that know the seeds.

    All domains weigh the same, and all seeds. The domains were measured on the same trained networks: a seed
    is drawn once for all of them, and then episodes of each.

    Args:
        seeds: by domain the values of the episodes, in per cent or points, for each of S seeds.
        same_episodes: whether all seeds had the same episodes in the same order, which are then drawn once
            for all seeds; otherwise each has its own.

    Returns:
        Of one seed the intervals are those over episodes. With more, `interval` is the half-width of the
        t-interval whose variance is that between seeds and that of the episodes, with Satterthwaite's (1946)
        degrees of freedom: with three seeds up to 4.3 standard errors, as three seeds tell little. `low` and
        `high` are the hierarchical bootstrap's, which is too narrow for few seeds that differ a lot.

    Raises:
        ValueError: there is no seed, domain or episode, or the seeds differ in domains.
    """
    if not seeds or not seeds[0] or any(s.keys() != seeds[0].keys() for s in seeds):
        raise ValueError("a mean over seeds needs at least one seed, and the same domains of each")
    domains = [[np.asarray(seed[name], dtype=float) for seed in seeds] for name in seeds[0]]
    if any(len(values) == 0 for domain in domains for values in domain):
        raise ValueError("a mean over seeds needs at least one episode of every domain and seed")
    if len(seeds) == 1:
        return average_summary([_summary(domain[0].tolist()) for domain in domains])
    means = np.array([[values.mean() for values in domain] for domain in domains]).mean(0)
    low, high = np.percentile(_drawn_seeds(domains, same_episodes), (2.5, 97.5))
    n = sum(len(values) for domain in domains for values in domain)
    half = _satterthwaite(means, domains, same_episodes)
    return Summary(float(means.mean()), half, n, float(low), float(high))


def _satterthwaite(means: np.ndarray, domains: Sequence[Sequence[np.ndarray]], same_episodes: bool) -> float:
    """Half-width of the t-interval for the mean of the seeds' `means` (S,).

    The variance has a part of the seeds, with S - 1 degrees of freedom, and one of the episodes. Where every
    seed has its own episodes the spread of the seeds' means holds both, and the excess is the seeds'.
    """
    count = len(means)
    spread = float(means.var(ddof=1)) / count
    samples = [[np.mean(domain, axis=0)] if same_episodes else domain for domain in domains]
    drawn = [values for sample in samples for values in sample]
    if any(len(values) < 2 for values in drawn):
        return float("inf")
    episodes = sum(float(values.var(ddof=1)) / len(values) for values in drawn) / len(drawn) ** 2
    of_seeds = spread if same_episodes else max(spread - episodes, 0.0)
    variance = of_seeds + episodes
    if variance == 0:
        return 0.0
    from scipy.special import stdtrit  # here: whoever classifies a picture does not wait for it

    freedom = sum(len(values) - 1 for values in drawn)
    df = variance**2 / (of_seeds**2 / (count - 1) + episodes**2 / freedom)
    return float(stdtrit(df, 0.975)) * variance**0.5


def _drawn_seeds(domains: Sequence[Sequence[np.ndarray]], same_episodes: bool) -> np.ndarray:
    """(BOOTSTRAP_SAMPLES,) means over domains of the hierarchical bootstrap."""
    count = len(domains[0])
    generator = np.random.default_rng(0)
    picks = generator.integers(count, size=(BOOTSTRAP_SAMPLES, count))
    total = np.zeros(BOOTSTRAP_SAMPLES)
    for values in domains:
        if same_episodes:
            every = _resampled(generator, np.stack(values, axis=1), BOOTSTRAP_SAMPLES)
            total += np.take_along_axis(every, picks, axis=1).mean(1)
            continue
        drawn = np.empty(picks.shape)
        for seed, own in enumerate(values):  # a seed that is drawn twice draws its episodes twice
            places = picks == seed
            drawn[places] = _resampled(generator, own, int(places.sum()))
        total += drawn.mean(1)
    return total / len(domains)


def _resampled(generator: np.random.Generator, values: np.ndarray, count: int) -> np.ndarray:
    """Means of `count` resamples of the first dimension of `values` (n, ...), a bounded number at a time."""
    n = len(values)
    step = max(1, AT_ONCE // n)
    parts = [min(step, count - first) for first in range(0, count, step)]
    means = [values[generator.integers(n, size=(part, n))].mean(1) for part in parts]
    return np.concatenate([values[:0], *means])


def chance(rows: Iterable[Mapping]) -> float:
    """The accuracy of guessing, in per cent: the mean of 1 / ways over the rows.

    A classifier that always gives the same answer has it clean and at every epsilon.

    Raises:
        ValueError: there is no row.
    """
    return 100 * statistics.fmean(1 / row["ways"] for row in rows)


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
