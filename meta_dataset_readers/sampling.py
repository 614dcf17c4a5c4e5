"""Which classes an episode has, and how many support and query images of each: Meta-Dataset's rules.

Triantafillou et al., "Meta-Dataset" (ICLR 2020), section 3.2 and the published sampler. Pure functions of
(specification, split, settings, generator). Does not know images: which ones are taken is the reader's
business. Everything that cannot work is refused by `check_sampling` before the first episode.

Where this differs from the published sampler: settings that some class cannot satisfy are refused at
once, not in the episode that happens to draw that class; a fixed number of ways turns class hierarchies
off instead of clashing with them (as PMF does) and needs that many classes, whatever `min_ways` says.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.hierarchy import ClassGroup, eligible_groups
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.spec import BILEVEL, DAG, SPLITS, DatasetSpec


@dataclasses.dataclass(frozen=True)
class EpisodeDescription:
    """The shape of an episode: N classes in label order, shots of each, queries of every one."""

    class_ids: tuple[int, ...]  # (N,) absolute, distinct
    shots: tuple[int, ...]  # (N,) support images per class, at least 1
    queries: int  # query images per class, the same for all


def check_sampling(spec: DatasetSpec, split: str, settings: EpisodeSampling) -> None:
    """Raise InputError, one line, if some episode of `split` could not be drawn with `settings`."""
    _class_pools(spec, split, settings)


def sample_episode(
    spec: DatasetSpec, split: str, settings: EpisodeSampling, rng: np.random.Generator
) -> EpisodeDescription:
    """Draw the shape of one episode. Raises InputError as `check_sampling`.

    For each class, shots + queries is at most its number of images in the specification.
    """
    pools = _class_pools(spec, split, settings)
    class_ids = pools.kept if settings.use_all_classes else _draw_classes(pools, spec.ontology, settings, rng)
    sizes = np.array([spec.images_per_class[class_id] for class_id in class_ids])
    if settings.support_range is not None:
        lo, hi = settings.support_range
        shot = lo if lo == hi else int(rng.integers(lo, hi + 1))
        queries = _queries(sizes, settings)
        return EpisodeDescription(class_ids, (shot,) * len(class_ids), queries)
    queries = _queries(sizes, settings)
    return EpisodeDescription(class_ids, _draw_shots(sizes, sizes - queries, settings, rng), queries)


# --- classes ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ClassPools:
    kept: tuple[int, ...]  # every class of the split with enough images
    groups: tuple[ClassGroup, ...]  # of the hierarchy in use; empty where none is
    ignore_groups: float  # probability of drawing from `kept`

    def drawable(self) -> list[Sequence[int]]:
        """Every set of classes that episodes are drawn from."""
        return [group.class_ids for group in self.groups] + ([self.kept] if self.ignore_groups > 0 else [])


def _class_pools(spec: DatasetSpec, split: str, settings: EpisodeSampling) -> _ClassPools:
    """From which classes episodes are drawn, after every check there is."""
    where = f"{spec.file}: split {split}"
    if not spec.classes(split):
        filled = ", ".join(other for other in SPLITS if spec.classes(other))
        advice = f"; {spec.advice}" if spec.advice else ""
        raise InputError(f"{where} has no classes; splits with classes: {filled or 'none'}{advice}")
    kept = tuple(
        class_id
        for class_id in spec.classes(split)
        if spec.images_per_class[class_id] >= settings.min_examples_in_class
    )
    needed = settings.num_ways or settings.min_ways
    if len(kept) < needed:
        filtered = settings.min_examples_in_class
        among = f" with at least {filtered} images" if filtered else ""
        raise InputError(f"{where} has {len(kept)} classes{among}, {needed}-way episodes need {needed}")
    groups = _groups_in_use(where, spec, split, kept, settings)
    pools = _ClassPools(kept, groups, settings.ignore_hierarchy_probability if groups else 1.0)
    _check_class_sizes(where, spec, pools, settings)
    _check_support_size(where, pools, settings)
    return pools


def _check_class_sizes(where: str, spec: DatasetSpec, pools: _ClassPools, settings: EpisodeSampling) -> None:
    needed = settings.images_needed
    drawable = sorted(set().union(*pools.drawable()))
    short = [class_id for class_id in drawable if spec.images_per_class[class_id] < needed]
    if short:
        worst = min(short, key=spec.images_per_class.__getitem__)
        enough_left = len(drawable) - len(short) >= (settings.num_ways or settings.min_ways)
        helps = enough_left and not (pools.groups and spec.ontology == BILEVEL)
        hint = f"; min_examples_in_class={needed} leaves such classes out" if helps else ""
        raise InputError(
            f"{where}: {len(short)} of {len(drawable)} classes have fewer than the {needed} images that "
            f"support and query take; the smallest is class {worst} ({spec.class_name(worst)!r}) with "
            f"{spec.images_per_class[worst]}{hint}"
        )


def _check_support_size(where: str, pools: _ClassPools, settings: EpisodeSampling) -> None:
    largest = max(len(class_ids) for class_ids in pools.drawable())
    most_ways = settings.num_ways or min(settings.max_ways_upper_bound, largest)
    if settings.use_all_classes:
        most_ways = largest
    if settings.support_range is None and most_ways > settings.max_support_set_size:
        raise InputError(
            f"{where}: episodes of up to {most_ways} ways need a support image of each class, "
            f"max_support_set_size is {settings.max_support_set_size}"
        )


def _groups_in_use(
    where: str, spec: DatasetSpec, split: str, kept: Sequence[int], settings: EpisodeSampling
) -> tuple[ClassGroup, ...]:
    if settings.num_ways is not None or settings.use_all_classes:
        return ()
    if spec.ontology == DAG and not settings.ignore_dag_ontology:
        groups = eligible_groups(spec.groups[split], kept, settings.min_ways, settings.max_leaves_below_node)
        if not groups:
            raise InputError(
                f"{where}: no node of the class graph has {settings.min_ways} (min_ways) or more classes to "
                "draw from; ignore_dag_ontology draws from all classes"
            )
        return groups
    if spec.ontology == BILEVEL and not settings.ignore_bilevel_ontology:
        _check_superclasses(where, spec.groups[split], settings)
        return spec.groups[split]
    return ()


def _check_superclasses(where: str, groups: Sequence[ClassGroup], settings: EpisodeSampling) -> None:
    if settings.min_examples_in_class > 0:
        raise InputError(
            f"{where}: min_examples_in_class cannot be combined with superclasses; "
            "ignore_bilevel_ontology draws from all classes"
        )
    for group in groups:
        if len(group.class_ids) < settings.min_ways:
            raise InputError(
                f"{where}: superclass {group.name!r} has {len(group.class_ids)} classes, "
                f"fewer than min_ways {settings.min_ways}"
            )


def _draw_classes(
    pools: _ClassPools, ontology: str | None, settings: EpisodeSampling, rng: np.random.Generator
) -> tuple[int, ...]:
    # With groups the coin is tossed even when its outcome is certain: the published order of draws.
    if not pools.groups or rng.random() >= 1 - pools.ignore_groups:
        return _draw_from(pools.kept, settings, rng)
    group = pools.groups[rng.integers(0, len(pools.groups))]
    if ontology == BILEVEL:
        return _draw_from(group.class_ids, settings, rng)
    # All classes below a node, in order: for the graph the number of ways is not drawn.
    most = settings.max_ways_upper_bound
    return group.class_ids if len(group.class_ids) <= most else _choose(group.class_ids, most, rng)


def _draw_from(
    class_ids: Sequence[int], settings: EpisodeSampling, rng: np.random.Generator
) -> tuple[int, ...]:
    most = min(settings.max_ways_upper_bound, len(class_ids))
    ways = settings.num_ways or int(rng.integers(settings.min_ways, most + 1))
    return _choose(class_ids, ways, rng)


def _choose(class_ids: Sequence[int], ways: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(class_ids[position] for position in rng.choice(len(class_ids), ways, replace=False))


# --- images per class ------------------------------------------------------------------------------------


def _queries(sizes: np.ndarray, settings: EpisodeSampling) -> int:
    """Query images per class, from the sizes n_c (N,) of the classes drawn."""
    if settings.num_query is not None:
        return settings.num_query
    if settings.support_range is not None:
        return int(min(settings.max_num_query, sizes.min() - settings.support_range[1]))
    return int(min(settings.max_num_query, sizes.min() // 2))


def _draw_shots(
    sizes: np.ndarray, left: np.ndarray, settings: EpisodeSampling, rng: np.random.Generator
) -> tuple[int, ...]:
    """Variable shots per class: `sizes` n_c and `left` r_c = n_c - queries, both (N,), r_c >= 1."""
    ways = len(sizes)
    beta = rng.random()
    contributions = np.floor(beta * np.minimum(settings.max_support_size_contrib_per_class, left) + 1)
    total = min(settings.max_support_set_size, int(contributions.sum()))
    weights = sizes * np.exp(rng.uniform(settings.min_log_weight, settings.max_log_weight, size=ways))
    shots = np.floor(weights / weights.sum() * (total - ways)).astype(int) + 1
    return tuple(int(shot) for shot in np.minimum(shots, left))
