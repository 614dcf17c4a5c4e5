"""`dataset_spec.json`: the classes of one Meta-Dataset source, how many images each has, and its splits.

Knows the three kinds of specification (flat, two-level, hierarchical) and hides the difference: whatever
the kind, a class is an absolute id, and a hierarchy is a set of groups of classes. Does not look into the
record files, and ignores the `path` a specification carries: it is the converter's machine, not this one.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from meta_dataset_readers.errors import InputError, blaming, nearest
from meta_dataset_readers.files import read_json
from meta_dataset_readers.hierarchy import ClassGroup, GraphError, Node, graph_groups
from meta_dataset_readers.json_fields import Fields

SPLITS = ("TRAIN", "VALID", "TEST")
SPEC_FILE = "dataset_spec.json"
FILE_PATTERN = "{}.tfrecords"
BILEVEL, DAG = "bilevel", "dag"

_KINDS = ("DatasetSpecification", "BiLevelDatasetSpecification", "HierarchicalDatasetSpecification")


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """What a source holds. Class ids are absolute: 0..C-1, TRAIN first, then VALID, then TEST."""

    name: str
    directory: Path
    split_classes: dict[str, range]  # split -> its absolute class ids
    images_per_class: tuple[int, ...]  # by class id
    class_names: tuple[str, ...]  # by class id
    ontology: str | None = None  # BILEVEL, DAG, or None where classes have no hierarchy
    groups: dict[str, tuple[ClassGroup, ...]] = dataclasses.field(default_factory=dict)  # by split
    told_by: str = SPEC_FILE  # the file that says all this; empty where the directory itself does
    advice: str = ""  # for whoever misses classes

    @property
    def file(self) -> Path:
        """What says all this, for messages."""
        return self.directory / self.told_by

    def classes(self, split: str) -> range:
        """The absolute class ids of `split` (possibly none). Raises InputError for an unknown split."""
        if split not in self.split_classes:
            raise InputError(f"split {split!r} is unknown; {nearest(str(split), SPLITS)}")
        return self.split_classes[split]

    def class_name(self, class_id: int) -> str:
        """The name of a class; for a hierarchical source the words of its leaf."""
        return self.class_names[class_id]


def load_spec(directory: str | Path) -> DatasetSpec:
    """Read and check `dataset_spec.json` in `directory`; no record file is touched.

    Raises InputError, naming the file and the field, for anything that is missing, of the wrong type or
    contradictory: class ids that are not contiguous, an unknown kind, a file pattern other than
    `{}.tfrecords`, images counted by pool, a graph with dangling links, cycles or nodes given twice.
    """
    file = Path(directory) / SPEC_FILE
    if not file.exists() and file.with_suffix(".pkl").exists():
        raise InputError(f"{file}: no such file; dataset_spec.pkl is not read, convert the source again")
    spec = Fields(str(file), read_json(file))
    kind = spec.get("__class__", str)
    if kind not in _KINDS:
        raise InputError(f"{file}: field '__class__': unknown kind {kind!r}; {nearest(kind, _KINDS)}")
    pattern = spec.get("file_pattern", str)
    if pattern != FILE_PATTERN:
        raise InputError(f"{file}: field 'file_pattern': found {pattern!r}, expected {FILE_PATTERN!r}")
    parse = {_KINDS[0]: _flat, _KINDS[1]: _bilevel, _KINDS[2]: _hierarchical}[kind]
    return DatasetSpec(name=spec.get("name", str), directory=Path(directory), **parse(spec))


# --- the three kinds; each returns the fields of DatasetSpec that differ -----------------------------------


def _flat(spec: "Fields") -> dict[str, Any]:
    sizes = spec.object("classes_per_split").counts(SPLITS)
    return {"split_classes": dict(zip(SPLITS, _blocks(sizes), strict=True)), **_class_table(spec, sum(sizes))}


def _bilevel(spec: "Fields") -> dict[str, Any]:
    superclasses = spec.object("superclasses_per_split").counts(SPLITS)
    n_superclasses = sum(superclasses)
    sizes = spec.object("classes_per_superclass").by_id(n_superclasses, int)
    names = spec.object("superclass_names").by_id(n_superclasses, str)
    table = _class_table(spec, sum(sizes))  # first: it refuses sizes too large to be written out as ids
    groups = [ClassGroup(name, tuple(ids)) for name, ids in zip(names, _blocks(sizes), strict=True)]
    split_groups = {
        split: tuple(groups[ids.start : ids.stop])
        for split, ids in zip(SPLITS, _blocks(superclasses), strict=True)
    }
    split_sizes = [sum(len(group.class_ids) for group in split_groups[split]) for split in SPLITS]
    split_classes = dict(zip(SPLITS, _blocks(split_sizes), strict=True))
    return {"split_classes": split_classes, "ontology": BILEVEL, "groups": split_groups, **table}


def _hierarchical(spec: "Fields") -> dict[str, Any]:
    subgraphs = spec.object("split_subgraphs")
    subgraphs.expect_keys(SPLITS)
    nodes = {split: _nodes(subgraphs, split) for split in SPLITS}
    _check_disjoint(nodes, subgraphs.where)
    leaves = {split: [node for node in nodes[split] if not node.children] for split in SPLITS}
    split_classes = dict(zip(SPLITS, _blocks([len(leaves[split]) for split in SPLITS]), strict=True))
    n_classes = split_classes["TEST"].stop
    wn_ids = spec.object("class_names").by_id(n_classes, str)
    class_ids = {wn_id: class_id for class_id, wn_id in enumerate(wn_ids)}

    counts = spec.object("images_per_class")
    images, names, groups = [0] * n_classes, [""] * n_classes, {}
    for split in SPLITS:
        split_counts = counts.object(split)
        for leaf in leaves[split]:
            class_id = class_ids.get(leaf.wn_id)
            if class_id is None or class_id not in split_classes[split]:
                raise InputError(
                    f"{spec.where}: field 'class_names': the leaf {leaf.wn_id!r} of {split} has class id "
                    f"{class_id}, expected one of {split_classes[split]}"
                )
            images[class_id] = split_counts.count(leaf.wn_id)
            names[class_id] = leaf.words
        with blaming(f"{subgraphs.where}[{split}]", GraphError):
            groups[split] = graph_groups(nodes[split], class_ids)
    return {
        "split_classes": split_classes,
        "images_per_class": tuple(images),
        "class_names": tuple(names),
        "ontology": DAG,
        "groups": groups,
    }


def _check_disjoint(nodes: dict[str, tuple[Node, ...]], where: str) -> None:
    home: dict[str, str] = {}
    for split, found in nodes.items():
        for node in found:
            if home.setdefault(node.wn_id, split) != split:
                raise InputError(
                    f"{where}: node {node.wn_id!r} occurs in both {home[node.wn_id]} and {split}"
                )


def _nodes(subgraphs: "Fields", split: str) -> tuple[Node, ...]:
    nodes = []
    for index, entry in enumerate(subgraphs.get(split, list)):
        node = Fields(f"{subgraphs.where}[{split}][{index}]", entry)
        children, parents = node.strings("children_ids"), node.strings("parents_ids")
        nodes.append(Node(node.get("wn_id", str), node.get("words", str), children, parents))
    return tuple(nodes)


def _class_table(spec: "Fields", n_classes: int) -> dict[str, Any]:
    return {
        "images_per_class": spec.object("images_per_class").by_id(n_classes, int),
        "class_names": spec.object("class_names").by_id(n_classes, str),
    }


def _blocks(sizes) -> list[range]:
    """Consecutive ranges of the given sizes, starting at 0."""
    return [range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
