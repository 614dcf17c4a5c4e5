"""Class hierarchies: which sets of classes may form one episode.

A hierarchy reduces to named groups of classes: the alphabets of Omniglot, or the inner nodes of the
ImageNet graph with the leaves below each. Knows graphs and groups; does not know files or randomness.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

# Meta-Dataset's limit: inner nodes above more leaves than this are too general to make an episode of.
MOST_LEAVES = 392


@dataclasses.dataclass(frozen=True)
class ClassGroup:
    """Classes that belong together: `name` is an alphabet or a WordNet id, `class_ids` are absolute."""

    name: str
    class_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Node:
    """A synset of the ImageNet graph; one without children is a leaf, that is, a class."""

    wn_id: str
    words: str
    children: tuple[str, ...]
    parents: tuple[str, ...]


class GraphError(ValueError):
    """The nodes do not form a directed acyclic graph; the message names the node."""


def leaves_below(nodes: Sequence[Node]) -> dict[str, tuple[str, ...]]:
    """For each node the WordNet ids of the leaves it spans, sorted; a leaf spans itself.

    Raises GraphError for a node given twice, a child or parent that no node describes, a link that only
    one of its two ends knows, and a cycle.
    """
    by_id: dict[str, Node] = {}
    for node in nodes:
        if node.wn_id in by_id:
            raise GraphError(f"node {node.wn_id!r} occurs twice")
        by_id[node.wn_id] = node
    _check_links(nodes, by_id)

    waiting = {node.wn_id: len(set(node.children)) for node in nodes}
    ready = [wn_id for wn_id, children in waiting.items() if children == 0]
    spans: dict[str, frozenset[str]] = {}
    while ready:  # children before parents, without recursion: a graph from a file may be deep
        node = by_id[ready.pop()]
        below = frozenset().union(*(spans[child] for child in node.children))
        spans[node.wn_id] = below or frozenset([node.wn_id])
        for parent in set(node.parents):
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
    if len(spans) < len(nodes):
        raise GraphError(f"node {min(by_id.keys() - spans.keys())!r} is part of a cycle or above one")
    return {wn_id: tuple(sorted(leaves)) for wn_id, leaves in spans.items()}


def _check_links(nodes: Iterable[Node], by_id: dict[str, Node]) -> None:
    for node in nodes:
        for role, others, back in (("child", node.children, "parents"), ("parent", node.parents, "children")):
            for other in others:
                if other not in by_id:
                    raise GraphError(f"{other!r} is a {role} of {node.wn_id!r}, but no node describes it")
                if node.wn_id not in getattr(by_id[other], back):
                    raise GraphError(
                        f"{other!r} is a {role} of {node.wn_id!r}, but its {back} lack that node"
                    )


def graph_groups(nodes: Sequence[Node], class_ids: dict[str, int]) -> tuple[ClassGroup, ...]:
    """One group for every inner node, by WordNet id; its classes in the order of theirs.

    `class_ids` gives the absolute class id of every leaf. Nodes spanning the same leaves stay separate
    groups, as in Meta-Dataset: such a set of classes is drawn more often. Raises as `leaves_below`.
    """
    spans = leaves_below(nodes)
    inner = sorted(node.wn_id for node in nodes if node.children)
    return tuple(ClassGroup(wn_id, tuple(class_ids[leaf] for leaf in spans[wn_id])) for wn_id in inner)


def eligible_groups(
    groups: Iterable[ClassGroup], kept: Collection[int], min_ways: int, most_leaves: int = MOST_LEAVES
) -> tuple[ClassGroup, ...]:
    """The groups of graph nodes an episode may come from: with min_ways..most_leaves classes out of `kept`.

    What is not in `kept` is left out of the groups before they are counted.
    """
    kept = frozenset(kept)
    reduced = (
        ClassGroup(group.name, tuple(class_id for class_id in group.class_ids if class_id in kept))
        for group in groups
    )
    return tuple(group for group in reduced if min_ways <= len(group.class_ids) <= most_leaves)
