"""`dataset_spec.json`: the classes of one Meta-Dataset source, how many images each has, and its splits.

Knows the three kinds of specification (flat, two-level, hierarchical) and hides the difference: whatever
the kind, a class is an absolute id, and a hierarchy is a set of groups of classes. Does not look into the
record files, and ignores the `path` a specification carries: it is the converter's machine, not this one.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.hierarchy import ClassGroup, GraphError, Node, graph_groups

SPLITS = ("TRAIN", "VALID", "TEST")
SPEC_FILE = "dataset_spec.json"
FILE_PATTERN = "{}.tfrecords"
BILEVEL, DAG = "bilevel", "dag"

_LARGEST_FILE = 64 * 2**20  # bytes; the largest real specification has less than one million
_KINDS = ("DatasetSpecification", "BiLevelDatasetSpecification", "HierarchicalDatasetSpecification")
_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


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

    @property
    def file(self) -> Path:
        """The specification itself, for messages."""
        return self.directory / SPEC_FILE

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
    spec = _Object(str(file), _read_json(file))
    kind = spec.get("__class__", str)
    if kind not in _KINDS:
        raise InputError(f"{file}: field '__class__': unknown kind {kind!r}; {nearest(kind, _KINDS)}")
    pattern = spec.get("file_pattern", str)
    if pattern != FILE_PATTERN:
        raise InputError(f"{file}: field 'file_pattern': found {pattern!r}, expected {FILE_PATTERN!r}")
    parse = {_KINDS[0]: _flat, _KINDS[1]: _bilevel, _KINDS[2]: _hierarchical}[kind]
    return DatasetSpec(name=spec.get("name", str), directory=Path(directory), **parse(spec))


# --- the three kinds; each returns the fields of DatasetSpec that differ -----------------------------------


def _flat(spec: "_Object") -> dict[str, Any]:
    sizes = spec.object("classes_per_split").counts(SPLITS)
    return {"split_classes": dict(zip(SPLITS, _blocks(sizes), strict=True)), **_class_table(spec, sum(sizes))}


def _bilevel(spec: "_Object") -> dict[str, Any]:
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


def _hierarchical(spec: "_Object") -> dict[str, Any]:
    subgraphs = spec.object("split_subgraphs")
    subgraphs.expect_keys(SPLITS)
    nodes = {split: _nodes(subgraphs, split) for split in SPLITS}
    home: dict[str, str] = {}
    for split in SPLITS:
        for node in nodes[split]:
            if home.setdefault(node.wn_id, split) != split:
                raise InputError(
                    f"{subgraphs.where}: node {node.wn_id!r} occurs in both {home[node.wn_id]} and {split}"
                )

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
        try:
            groups[split] = graph_groups(nodes[split], class_ids)
        except GraphError as error:
            raise InputError(f"{subgraphs.where}[{split}]: {error}") from error
    return {
        "split_classes": split_classes,
        "images_per_class": tuple(images),
        "class_names": tuple(names),
        "ontology": DAG,
        "groups": groups,
    }


def _nodes(subgraphs: "_Object", split: str) -> tuple[Node, ...]:
    nodes = []
    for index, entry in enumerate(subgraphs.get(split, list)):
        node = _Object(f"{subgraphs.where}[{split}][{index}]", entry)
        children, parents = node.strings("children_ids"), node.strings("parents_ids")
        nodes.append(Node(node.get("wn_id", str), node.get("words", str), children, parents))
    return tuple(nodes)


def _class_table(spec: "_Object", n_classes: int) -> dict[str, Any]:
    return {
        "images_per_class": spec.object("images_per_class").by_id(n_classes, int),
        "class_names": spec.object("class_names").by_id(n_classes, str),
    }


def _blocks(sizes) -> list[range]:
    """Consecutive ranges of the given sizes, starting at 0."""
    return [range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


# --- JSON that is not believed -----------------------------------------------------------------------------


def _read_json(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        pickled = file.with_suffix(".pkl").exists()
        hint = "; dataset_spec.pkl is not read, convert the source again" if pickled else ""
        raise InputError(f"{file}: no such file{hint}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if len(text) > _LARGEST_FILE:
        raise InputError(f"{file}: larger than {_LARGEST_FILE} bytes, not a dataset specification")
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # not UTF-8 or not JSON; nested beyond reason
        raise InputError(f"{file}: not valid JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return result


class _Object:
    """A JSON object whose entries are checked as they are taken; `where` names it in messages."""

    def __init__(self, where: str, value: Any):
        self.where = where
        self._value: dict[str, Any] = _typed(where, value, dict)

    def get(self, key: str, kind: type) -> Any:
        if key not in self._value:
            raise InputError(f"{self.where}: field {key!r} is missing")
        return _typed(f"{self.where}: field {key!r}", self._value[key], kind)

    def object(self, key: str) -> "_Object":
        return _Object(f"{self.where}: field {key!r}", self.get(key, dict))

    def count(self, key: str) -> int:
        if isinstance(self._value.get(key), dict):
            raise InputError(f"{self.where}: field {key!r}: images counted by pool are not supported")
        value = self.get(key, int)
        if value < 0:
            raise InputError(f"{self.where}: field {key!r}: expected a count, found {value}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        where = f"{self.where}: field {key!r}"
        return tuple(_typed(where, entry, str) for entry in self.get(key, list))

    def expect_keys(self, keys) -> None:
        unknown = self._value.keys() - set(keys)
        if unknown:
            raise InputError(f"{self.where}: unknown key {min(unknown)!r}; {nearest(min(unknown), keys)}")

    def counts(self, keys) -> tuple[int, ...]:
        self.expect_keys(keys)
        return tuple(self.count(key) for key in keys)

    def by_id(self, size: int, kind: type) -> tuple:
        """The values of the keys "0".."size-1", which must be all the keys there are."""
        if len(self._value) != size:
            raise InputError(f"{self.where}: {len(self._value)} entries, {size} expected from the splits")
        take = self.count if kind is int else lambda key: self.get(key, kind)
        return tuple(take(str(number)) for number in range(size))


def _typed(where: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "a boolean" if isinstance(value, bool) else _JSON_NAMES.get(type(value), type(value).__name__)
        raise InputError(f"{where}: expected {_JSON_NAMES[kind]}, found {found}")
    return value
