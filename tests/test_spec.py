"""Specifications: the three kinds look alike, and nothing contradictory is accepted."""

import copy
import json

import pytest
from conftest import bilevel_spec, dag_spec, example_spec, flat_spec, write_spec

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.hierarchy import ClassGroup, GraphError, Node, eligible_groups, leaves_below
from meta_dataset_readers.spec import load_spec

FLAT = flat_spec("f", (3, 0, 2), [4, 5, 6, 7, 8])
BILEVEL = bilevel_spec("b", (1, 1, 0), [2, 3], [4] * 5)
DAG = dag_spec(
    "d", {"TRAIN": {"r": ["a", "m"], "m": ["b", "c"]}, "TEST": {"s": ["x"]}}, dict.fromkeys("abcx", 9)
)


def changed(spec, *path, value=None):
    """A copy of `spec` with the entry at `path` replaced, or removed where no value is given."""
    spec = copy.deepcopy(spec)
    *parents, last = path
    inner = spec
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return spec


def test_a_flat_specification(tmp_path):
    spec = load_spec(write_spec(tmp_path / "elsewhere", FLAT))
    assert (spec.name, spec.ontology) == ("f", None)
    assert [list(spec.classes(split)) for split in ("TRAIN", "VALID", "TEST")] == [[0, 1, 2], [], [3, 4]]
    assert spec.images_per_class == (4, 5, 6, 7, 8)  # by id, whatever the order in the file
    assert spec.class_name(3) == "class 3"


def test_a_two_level_specification(tmp_path):
    spec = load_spec(write_spec(tmp_path, BILEVEL))
    assert [list(spec.classes(split)) for split in ("TRAIN", "VALID", "TEST")] == [[0, 1], [2, 3, 4], []]
    assert spec.groups["VALID"] == (ClassGroup("alphabet 1", (2, 3, 4)),)
    assert spec.groups["TEST"] == ()


def test_a_hierarchical_specification(tmp_path):
    spec = load_spec(write_spec(tmp_path, DAG))
    assert [list(spec.classes(split)) for split in ("TRAIN", "VALID", "TEST")] == [[0, 1, 2], [], [3]]
    assert spec.class_name(1) == "words of b"
    assert spec.groups["TRAIN"] == (ClassGroup("m", (1, 2)), ClassGroup("r", (0, 1, 2)))
    assert spec.groups["TEST"] == (ClassGroup("s", (3,)),)  # a node with a single child is legal


def test_class_names_rule_over_the_order_of_the_graph(tmp_path):
    swapped = changed(changed(DAG, "class_names", "0", value="c"), "class_names", "2", value="a")
    spec = load_spec(write_spec(tmp_path, swapped))
    assert spec.class_name(0) == "words of c"
    assert spec.groups["TRAIN"][0] == ClassGroup("m", (1, 0))


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"'TRIAN'.*did you mean 'TRAIN'"):
        load_spec(write_spec(tmp_path, FLAT)).classes("TRIAN")


NODES = ("split_subgraphs", "TRAIN")  # sorted by id: a, b, c, m, r


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (changed(FLAT, "__class__"), "'__class__' is missing"),
        (changed(FLAT, "__class__", value="DatasetSpecificatoin"), "did you mean 'DatasetSpecification'"),
        (changed(FLAT, "name", value=3), "'name': expected a string, found an integer"),
        (changed(FLAT, "images_per_class"), "'images_per_class' is missing"),
        (changed(FLAT, "file_pattern", value="{}_{}.tfrecords"), "'file_pattern'"),
        (changed(FLAT, "file_pattern", value="../{}.tfrecords"), "'file_pattern'"),
        (changed(FLAT, "classes_per_split", "VALID"), "'VALID' is missing"),
        (changed(FLAT, "classes_per_split", "DEV", value=1), "unknown key 'DEV'"),
        (changed(FLAT, "classes_per_split", "TRAIN", value=5), "5 entries, 7 expected"),
        (
            changed(FLAT, "classes_per_split", "TRAIN", value=10**30),
            "expected a count, found an integer of more than 30 digits",
        ),
        (changed(FLAT, "classes_per_split", "TRAIN", value=True), "expected an integer, found a boolean"),
        (changed(FLAT, "images_per_class", "4"), "4 entries, 5 expected"),
        (
            changed(changed(FLAT, "images_per_class", "4"), "images_per_class", "04", value=1),
            "'4' is missing",
        ),
        (changed(FLAT, "images_per_class", "2", value=-1), "field '2': expected a count, found -1"),
        (changed(FLAT, "images_per_class", "2", value=1.5), "expected an integer, found float"),
        (changed(FLAT, "images_per_class", "2", value={"train": 3, "test": 2}), "by pool"),
        (changed(FLAT, "class_names", value=["a"]), "expected an object, found a list"),
        ([], "expected an object, found a list"),
        (changed(BILEVEL, "superclasses_per_split", "TEST", value=1), "2 entries, 3 expected"),
        (changed(BILEVEL, "classes_per_superclass", "0", value=3), "5 entries, 6 expected"),
        (changed(BILEVEL, "classes_per_superclass", "0", value=10**15), "5 entries"),
        (changed(BILEVEL, "superclass_names"), "'superclass_names' is missing"),
        (changed(DAG, *NODES, 4, "children_ids", value=["a", "m", "gone"]), "'gone' is a child of 'r'"),
        (changed(DAG, *NODES, 0, "parents_ids", value=["r", "gone"]), "'gone' is a parent of 'a'"),
        (
            changed(DAG, *NODES, 0, "parents_ids", value=["m", "r"]),
            "'m' is a parent of 'a', but its children lack that node",
        ),
        (
            changed(DAG, *NODES, 0, "parents_ids", value=[]),
            "'a' is a child of 'r', but its parents lack that node",
        ),
        (changed(DAG, *NODES, 0, "wn_id", value="b"), "'b' occurs twice|'a'"),
        (changed(DAG, *NODES, 0, "words"), r"\[TRAIN\]\[0\]: field 'words' is missing"),
        (changed(DAG, *NODES, 0, value="a"), r"\[TRAIN\]\[0\]: expected an object"),
        (changed(DAG, "images_per_class", "TRAIN", "b"), "'b' is missing"),
        (changed(DAG, "class_names", "0", value="x"), "leaf 'a' of TRAIN has class id None"),
        (
            changed(changed(DAG, "class_names", "0", value="x"), "class_names", "3", value="a"),
            "leaf 'a' of TRAIN has class id 3",
        ),
        (changed(DAG, "split_subgraphs", "VALID"), "'VALID' is missing"),
        (
            changed(DAG, "split_subgraphs", "VALID", value=DAG["split_subgraphs"]["TEST"]),
            "in both VALID and TEST",
        ),
    ],
)
def test_a_contradictory_specification_is_refused_in_one_line(tmp_path, spec, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        load_spec(write_spec(tmp_path, spec))
    assert str(tmp_path / "dataset_spec.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"<html>not found</html>", "not valid JSON"),
        (b'{"name": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b"1" * 5000, "not valid JSON"),
    ],
)
def test_a_file_that_is_not_json_is_refused_in_one_line(tmp_path, text, complaint):
    (tmp_path / "dataset_spec.json").write_bytes(text)
    with pytest.raises(InputError, match=complaint) as caught:
        load_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_specification_is_named_and_a_pickled_one_is_not_opened(tmp_path):
    with pytest.raises(InputError, match=r"dataset_spec.json: no such file"):
        load_spec(tmp_path)
    (tmp_path / "dataset_spec.pkl").write_bytes(b"")
    with pytest.raises(InputError, match=r"dataset_spec.pkl is not read"):
        load_spec(tmp_path)


def test_an_oversized_file_is_refused_before_it_is_parsed(tmp_path):
    with (tmp_path / "dataset_spec.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(InputError, match=r"dataset_spec\.json: 68157440 bytes, at most"):
        load_spec(tmp_path)


@pytest.mark.parametrize("kind", ["flat", "bilevel", "dag"])
def test_loading_does_not_depend_on_the_order_of_keys(tmp_path, kind):
    spec, _ = example_spec(kind, "s", 5)
    original = load_spec(write_spec(tmp_path, spec))
    (tmp_path / "dataset_spec.json").write_text(json.dumps(spec, sort_keys=True))
    assert load_spec(tmp_path) == original


# --- graphs ----------------------------------------------------------------------------------------------


def graph(children):
    parents = {n: tuple(sorted(p for p in children if n in children[p])) for n in children}
    return [Node(n, "", tuple(children[n]), parents[n]) for n in children]


def test_the_leaves_below_every_node():
    spans = leaves_below(graph({"r": "mn", "m": "ab", "n": "bm", "a": "", "b": ""}))
    assert spans == {"r": ("a", "b"), "m": ("a", "b"), "n": ("a", "b"), "a": ("a",), "b": ("b",)}


@pytest.mark.parametrize(
    "children", [{"a": "a"}, {"a": "b", "b": "a"}, {"r": "ax", "a": "b", "b": "a", "x": ""}]
)
def test_a_cycle_is_refused(children):
    with pytest.raises(GraphError, match="cycle"):
        leaves_below(graph(children))


def test_a_node_given_twice_is_refused():
    with pytest.raises(GraphError, match="'a' occurs twice"):
        leaves_below(graph({"a": ""}) * 2)


def test_a_very_deep_graph_is_no_trouble():
    chain = {f"n{i}": [f"n{i + 1}"] for i in range(2000)} | {"n2000": []}
    assert leaves_below(graph(chain))["n0"] == ("n2000",)


def test_eligible_nodes_are_counted_after_small_classes_are_left_out():
    groups = [
        ClassGroup("big", tuple(range(400))),
        ClassGroup("five", (0, 1, 2, 3, 4)),
        ClassGroup("one", (7,)),
    ]
    assert eligible_groups(groups, range(1, 393), 5) == (ClassGroup("big", tuple(range(1, 393))),)
    assert eligible_groups(groups, range(394), 5) == (groups[1],)
