"""How episodes are drawn, as settings: Meta-Dataset's protocol and its variations. Knows no arrays."""

import dataclasses
import math

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.hierarchy import MOST_LEAVES
from meta_dataset_readers.settings import setting

MOST = 10**6  # classes or images that a flag may ask for


@dataclasses.dataclass(frozen=True)
class EpisodeSampling:
    """How episodes are drawn; the defaults are Meta-Dataset's variable-way, variable-shot protocol.

    Counts are of classes (ways) or images. `num_support` is shots per class, or a pair (lo, hi) from which
    one value is drawn for all classes of an episode. `num_query` is per class, and 0 is a legal number.
    None means: drawn by the rules, within the bounds below. Raises InputError for values that make no sense.

    >>> EpisodeSampling(num_ways=5, num_support=5, num_query=10).support_range
    (5, 5)
    """

    num_ways: int | None = setting(None, "fixed number of classes (default: variable)", least=2, most=MOST)
    num_support: int | tuple[int, int] | None = setting(
        None,
        "fixed shots, or two numbers: one value drawn between them per episode (default: variable)",
        nargs="+",
        metavar="K",
        least=1,
        most=MOST,
    )
    num_query: int | None = setting(None, "fixed queries per class (default: variable)", least=1, most=MOST)
    min_ways: int = setting(5, "least ways when variable", least=2, most=MOST)
    max_ways_upper_bound: int = setting(50, "most ways when variable", least=2, most=MOST)
    max_num_query: int = setting(10, "most queries when variable", least=1, most=MOST)
    max_support_set_size: int = setting(500, "largest whole support set, when shots vary", least=1, most=MOST)
    max_support_size_contrib_per_class: int = setting(
        100, "most images of a class that count for it, when shots vary", least=1, most=MOST
    )
    min_log_weight: float = setting(math.log(0.5), "of a class, when shots vary")
    max_log_weight: float = setting(math.log(2.0), "of a class, when shots vary")
    min_examples_in_class: int = setting(0, "leave smaller classes out", least=0)
    max_leaves_below_node: int = MOST_LEAVES  # graph nodes above more classes are too general for an episode
    ignore_dag_ontology: bool = setting(False, "classes need not be below one node of ImageNet's graph")
    ignore_bilevel_ontology: bool = setting(False, "classes need not be of one alphabet")
    ignore_hierarchy_probability: float = setting(0.0, "share of episodes that ignore it", least=0, most=1)
    use_all_classes: bool = False  # every class of the split, in the order of its ids; nothing is drawn
    episode_description_switch_frequency: int = 1  # so many episodes in a row share classes and sizes

    def __post_init__(self) -> None:
        lo, hi = self.support_range or (1, 1)
        bounds = {
            "num_ways": (self.num_ways, 1),
            "num_support": (lo, 1),
            "num_query": (self.num_query, 0),
            "min_ways": (self.min_ways, 1),
            "max_ways_upper_bound": (self.max_ways_upper_bound, self.min_ways),
            "max_num_query": (self.max_num_query, 1),
            "max_support_set_size": (self.max_support_set_size, 1),
            "max_support_size_contrib_per_class": (self.max_support_size_contrib_per_class, 1),
            "min_examples_in_class": (self.min_examples_in_class, 0),
            "max_leaves_below_node": (self.max_leaves_below_node, self.min_ways),
            "episode_description_switch_frequency": (self.episode_description_switch_frequency, 1),
        }
        for name, (value, least) in bounds.items():
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        if self.use_all_classes and self.num_ways is not None:
            raise InputError(f"use_all_classes leaves nothing to num_ways, which is {self.num_ways}")
        if lo > hi:
            raise InputError(f"num_support is {self.num_support}, expected a pair (lo, hi) with lo <= hi")
        if not -math.inf < self.min_log_weight <= self.max_log_weight < math.inf:
            found = f"{self.min_log_weight} and {self.max_log_weight}"
            raise InputError(f"min_log_weight and max_log_weight are {found}, expected finite min <= max")
        if not 0.0 <= self.ignore_hierarchy_probability <= 1.0:
            raise InputError(
                f"ignore_hierarchy_probability is {self.ignore_hierarchy_probability}, expected 0..1"
            )

    @property
    def support_range(self) -> tuple[int, int] | None:
        """Fewest and most shots of a fixed support set; None where the rules decide."""
        return (self.num_support, self.num_support) if isinstance(self.num_support, int) else self.num_support

    @property
    def images_needed(self) -> int:
        """The fewest images a class must have to take part in any episode."""
        return (self.support_range or (1, 1))[1] + (1 if self.num_query is None else self.num_query)
