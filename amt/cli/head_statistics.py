"""Statistics for the heads: measured on TRAIN episodes, and put into checkpoints. main.py does it at its end,
`amt pool --statistics` for files that have none."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.models.head_settings import RECOMMENDED
from amt.models.network import Network
from amt.models.pool import Pool
from amt.tasks.classifier import pretrained
from amt.training.head_statistics import EPSILON, STEPS, measure_statistics
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader

RECOMMENDATIONS = ("head", "coefficients")  # fields of a file: what a classifier of it uses

# The episodes of a dataset, prepared by so many processes, maybe ended by a signal.
Watch = Callable[[Iterable[Episode]], Iterable[Episode]]


def train_episodes(
    open_source: Callable[..., EpisodeReader], sources: Sequence[str], n: int, seed: int
) -> SourceMixture:
    """n episodes of TRAIN classes whose images are not augmented."""
    readers = [open_source(source=source, split="TRAIN", n_episodes=n) for source in sources]
    return SourceMixture(readers, n, seed)


def with_statistics(
    saved: Checkpoint,
    network: Network,
    episodes: Dataset,
    sources: Sequence[str],
    seed: int,
    workers: int,
    watch: Watch = iter,
) -> Checkpoint:
    """The checkpoint with the statistics of its pool, a note of how they were measured, and what is
    recommended with them: the most robust member, classified by a head that uses them."""
    network = dataclasses.replace(network, autocast=None)
    shown = watch(episode_loader(episodes, workers, network.device))
    pool = saved.pool.to(network.device)
    found = measure_statistics(network, pool, pretrained(network), shown, seed)
    note = {
        "episodes": len(episodes),  # type: ignore[arg-type]  a mixture knows its length
        "base_sources": list(sources),
        "seed": seed,
        "attack": f"pgd{STEPS}@{255 * EPSILON:g}",
    }
    return dataclasses.replace(
        saved,
        statistics=found,
        about=saved.about | {"statistics": note, "head": RECOMMENDED, "coefficients": most_robust(pool)},
    )


def most_robust(pool: Pool) -> list[float]:
    """All for the member of the largest epsilon, of equals the first."""
    epsilons = [level.epsilon for level in pool.levels]
    return [float(p == epsilons.index(max(epsilons))) for p in range(len(pool))]


def complete(files: Iterable[Path], measured: Callable[[Checkpoint], Checkpoint]) -> list[Path]:
    """Put statistics into those of a finished run's checkpoints that have none; the files written.

    Files that hold the same pool get the same statistics, measured once.
    """
    known: list[Checkpoint] = []
    written = []
    for path in files:
        if not path.exists() or (saved := checkpoint.load(path)).statistics is not None:
            continue
        twin = next((each for each in known if _same_pool(each.pool, saved.pool)), None)
        if twin is None:
            twin = measured(saved)
            known.append(twin)
        about = saved.about | {name: twin.about[name] for name in ("statistics", *RECOMMENDATIONS)}
        checkpoint.save(path, dataclasses.replace(saved, statistics=twin.statistics, about=about))
        written.append(path)
    return written


def _same_pool(one: Pool, other: Pool) -> bool:
    factors = other.factors
    return all(torch.equal(factor, factors[name]) for name, factor in one.factors.items()) and torch.equal(
        one.scale, other.scale
    )
