"""A task to click: invented traffic signs of Mini-Meta-Dataset, drawn on the spot."""

import itertools
from typing import NamedTuple

from PIL import Image

from meta_dataset_readers.mini.sources import build

SOURCE = "mini_signs"
CLASSES = ("ahead only", "crossroads", "first aid")
EXAMPLES, NEW = 5, 2  # pictures of a class


class Example(NamedTuple):
    """A task.

    Args:
        classes: pictures to learn from, by the name of their class.
        new: pictures of the same classes to be classified.
    """

    classes: dict[str, list[Image.Image]]
    new: list[Image.Image]


def draw(seed: int = 0) -> Example:
    """The task of a seed."""
    source, classes, new = build(SOURCE), {}, []
    for name in CLASSES:
        drawn = source.images(source.classes.index(name), seed)
        classes[name] = list(itertools.islice(drawn, EXAMPLES))
        new += itertools.islice(drawn, NEW)
    return Example(classes, new)
