"""The domains of Mini-Meta-Dataset: their classes, their splits, their dataset_spec.json.

Knows which classes there are and what the specification of each kind of source looks like. Does not draw
(that is `objects.py`, `glyphs.py`, ...) and touches no file.
"""

import dataclasses
import itertools
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.random import Generator
from PIL import Image

from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.mini import digits, glyphs, objects, signs, sketches, textures
from meta_dataset_readers.mini.shapes import FAMILIES
from meta_dataset_readers.spec import FILE_PATTERN, SPLITS


@dataclasses.dataclass(frozen=True)
class Source:
    """One domain. Class ids are positions in `classes`: those of TRAIN first, then VALID, then TEST."""

    name: str
    classes: tuple[str, ...]  # the human name of each class, which is all its drawing function needs
    counts: tuple[int, ...]  # images of each class
    draw: Callable[[Generator, str, int], Image.Image]  # (rng, class name, number of the image) -> picture
    specify: Callable[["Source"], dict]  # what dataset_spec.json holds beyond the common fields

    def images(self, class_id: int, seed: int) -> Iterator[Image.Image]:
        """The images of one class, RGB: a function of (seed, source, class), whoever draws them.

        Fewer images of the same class are the first of more.
        """
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), class_id])
        for number in range(self.counts[class_id]):
            yield self.draw(rng, self.classes[class_id], number)

    def spec(self) -> dict:
        """The content of dataset_spec.json . Readers replace `path` by where they found the file."""
        return {"name": self.name, **self.specify(self), "path": self.name, "file_pattern": FILE_PATTERN}


def flat_spec(per_split: tuple[int, int, int]) -> Callable[[Source], dict]:
    """The fields of a `DatasetSpecification` with the given numbers of TRAIN, VALID and TEST classes."""

    def specify(source: Source) -> dict:
        return {
            "classes_per_split": dict(zip(SPLITS, per_split, strict=True)),
            "images_per_class": {str(k): count for k, count in enumerate(source.counts)},
            "class_names": {str(k): name for k, name in enumerate(source.classes)},
            "__class__": "DatasetSpecification",
        }

    return specify


def bilevel_spec(superclasses: dict[str, dict[str, int]]) -> Callable[[Source], dict]:
    """The fields of a `BiLevelDatasetSpecification`: `superclasses` is {split: {name: number of classes}}."""

    def specify(source: Source) -> dict:
        sizes = {name: size for split in SPLITS for name, size in superclasses[split].items()}
        return {
            "superclasses_per_split": {split: len(superclasses[split]) for split in SPLITS},
            "classes_per_superclass": {str(k): size for k, size in enumerate(sizes.values())},
            "images_per_class": {str(k): count for k, count in enumerate(source.counts)},
            "superclass_names": {str(k): name for k, name in enumerate(sizes)},
            "class_names": {str(k): name for k, name in enumerate(source.classes)},
            "__class__": "BiLevelDatasetSpecification",
        }

    return specify


def objects_spec(source: Source) -> dict:
    """The fields of a `HierarchicalDatasetSpecification`: a graph per split in which every class has two
    parents, its shape and its texture.

        root -> shape families -> shapes   -.
             -> texture groups -> textures --> leaves (the classes)
    """
    graphs, images, class_names = {}, {}, {}
    first_id = 1
    first_class = 0
    for split in SPLITS:
        leaves = list(range(first_class, first_class + len(objects.combinations(split))))
        children = _object_graph(split, [source.classes[k] for k in leaves])
        # Leaves are named first, so that wn_ids in sorted order are class ids in order.
        labels = [source.classes[k] for k in leaves] + list(children)
        ids = {label: f"n{first_id + k:08d}" for k, label in enumerate(labels)}
        parents = {label: [p for p, below in children.items() if label in below] for label in labels}
        graphs[split] = [
            {
                "wn_id": ids[label],
                "words": label,
                "children_ids": sorted(ids[child] for child in children.get(label, ())),
                "parents_ids": sorted(ids[parent] for parent in parents[label]),
            }
            for label in labels
        ]
        count_of = {source.classes[k]: source.counts[k] for k in leaves}
        images[split] = {
            ids[label]: sum(count_of[leaf] for leaf in _leaves_below(label, children)) for label in labels
        }
        class_names |= {str(k): ids[source.classes[k]] for k in leaves}
        first_id += len(labels)
        first_class += len(leaves)
    return {
        "split_subgraphs": graphs,
        "images_per_class": images,
        "class_names": class_names,
        "__class__": "HierarchicalDatasetSpecification",
    }


def _object_graph(split: str, leaves: list[str]) -> dict[str, set[str]]:
    """The children of every inner node of a split's graph, by words."""
    children = {f"{split.lower()} objects": {*FAMILIES[split], *objects.SURFACE_GROUPS}}
    children |= {family: {draw.__name__ for draw in draws} for family, draws in FAMILIES[split].items()}
    children |= {group: set(textures) for group, textures in objects.SURFACE_GROUPS.items()}
    for leaf in leaves:
        shape, texture, _ = objects.object_attributes(leaf)
        children.setdefault(shape, set()).add(leaf)
        children.setdefault(texture, set()).add(leaf)
    return children


def _leaves_below(label: str, children: dict[str, set[str]]) -> set[str]:
    if label not in children:
        return {label}
    return set().union(*(_leaves_below(child, children) for child in children[label]))


def mini_objects(images_per_class: int) -> Source:
    """The training source: 84 / 20 / 20 classes in a graph, every split with shapes of its own."""
    chosen = [combination for split in SPLITS for combination in objects.combinations(split)]
    words = tuple(objects.object_words(*combination) for combination in chosen)
    counts = (images_per_class,) * len(words)
    return Source(OBJECTS, words, counts, ignoring_number(objects.draw_object), objects_spec)


def mini_glyphs() -> Source:
    """Characters of twelve scripts, split by script, 20 images each, like omniglot."""
    names = tuple(
        unicodedata.name(character)
        for split in SPLITS
        for characters in glyphs.SCRIPTS[split].values()
        for character in characters
    )
    sizes = {
        split: {script: len(characters) for script, characters in scripts.items()}
        for split, scripts in glyphs.SCRIPTS.items()
    }
    return Source(
        "mini_glyphs", names, (20,) * len(names), ignoring_number(glyphs.draw_glyph), bilevel_spec(sizes)
    )


def flat_source(name: str, splits: Mapping[str, Sequence[str]], draw: Callable, n_images: int = 40) -> Source:
    """A source without hierarchy."""
    classes = tuple(itertools.chain.from_iterable(splits.get(split, ()) for split in SPLITS))
    sizes = tuple(len(splits.get(split, ())) for split in SPLITS)
    return Source(name, classes, (n_images,) * len(classes), ignoring_number(draw), flat_spec(sizes))


def names_of(drawings: Mapping[str, Sequence[Callable]]) -> dict[str, list[str]]:
    """Of the classes of each split, where they are called as what draws them."""
    return {split: [draw.__name__ for draw in draws] for split, draws in drawings.items()}


def real_digits() -> Source:
    """The handwritten digits of scikit-learn, test only, with their true numbers of images."""
    return Source(
        "digits", digits.NAMES, digits.COUNTS, digits.draw_digit, flat_spec((0, 0, len(digits.NAMES)))
    )


def ignoring_number(
    draw: Callable[[Generator, str], Image.Image],
) -> Callable[[Generator, str, int], Image.Image]:
    """For sources whose images are made up: which one it is does not matter."""
    return lambda rng, name, number: draw(rng, name)


OBJECTS_PER_CLASS = 80
OBJECTS = "mini_objects"
OTHERS: dict[str, Callable[[], Source]] = {
    "mini_glyphs": mini_glyphs,
    "mini_textures": lambda: flat_source("mini_textures", names_of(textures.TEXTURES), textures.draw_texture),
    "mini_sketches": lambda: flat_source("mini_sketches", names_of(sketches.SKETCHES), sketches.draw_sketch),
    "mini_signs": lambda: flat_source("mini_signs", {"TEST": tuple(signs.SIGNS)}, signs.draw_sign),
    "digits": real_digits,
}
SOURCE_NAMES = (OBJECTS, *OTHERS)


def build(name: str, objects_per_class: int = OBJECTS_PER_CLASS) -> Source:
    """The source called `name`. Raises InputError if there is none.

    `objects_per_class` is the number of images of each class of mini_objects; the others ignore it.
    """
    if name not in SOURCE_NAMES:
        raise InputError(f"--sources: unknown source {name!r}: {nearest(name, SOURCE_NAMES)}")
    return mini_objects(objects_per_class) if name == OBJECTS else OTHERS[name]()
