"""Settings per domain from a YAML file: what it means, and that a fault in it is one clear line."""

import pytest
from conftest import fails

from amt.cli import options
from amt.cli.options.domain_config import DomainSettings, read_domain_config
from amt.evaluation.settings import published_grid
from amt.models.trim import Trim
from amt.tasks.settings import Routing
from meta_dataset_readers.files import LARGEST_SETTINGS

SOURCES = ("signs", "digits")
POOL = "--data_path d --test_sources signs digits --output_dir o --arch vit_mini --resume pool.safetensors"


@pytest.fixture
def written(tmp_path):
    """`written(text)`: a file with that text."""

    def write(text: str | bytes):
        path = tmp_path / "domains.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def deployments(path, flags=""):
    args = options.testing_parser().parse([*POOL.split(), *flags.split(), "--domain_config", str(path)])
    options.check_testing(args)
    return options.deployments(args)


def test_a_domains_own_fields_come_before_the_default(written):
    text = """
    default: {beta: 10, top_k: 1, trim: ["qkv:-1:0.5"]}
    digits: {beta: [1, 2.5], route_epsilon: 4, trim: []}
    """
    found = read_domain_config(written(text), SOURCES)
    trim = (Trim("qkv", -1, 0.5),)
    assert found["signs"] == DomainSettings(beta=(10,), top_k=(1,), trim=trim)
    assert found["digits"] == DomainSettings(beta=(1, 2.5), top_k=(1,), route_epsilon=(4,), trim=())


def test_the_file_comes_before_the_flags(written):
    path = written("signs: {gamma: 1, route_epsilon: 8}")
    found = deployments(path, "--blend_beta 3 --blend_gamma 0.2 --trim fc1:0:0.5")
    assert found["signs"].routings == (Routing(beta=3, gamma=1, epsilon=8),)
    assert found["digits"].routings == (Routing(beta=3, gamma=0.2),)
    assert {each.trims for each in found.values()} == {(Trim("fc1", 0, 0.5),)}


def test_the_published_search(written):
    """Its grid in place of ours, its trimmings as candidates; the other domain is searched as usual."""
    text = "signs: {search_scale: [100, 1], search_step: [5, 4], candidate_pool: ['fc1:-1:0.9']}"
    found = deployments(written(text), "--select published")
    betas, gammas = published_grid((100, 1), (5, 4))
    assert [(r.beta, r.gamma) for r in found["signs"].routings] == [(b, g) for b in betas for g in gammas]
    assert found["signs"].trim_candidates == (Trim("fc1", -1, 0.9),)
    assert len(found["digits"].routings) == 28 and found["digits"].trim_candidates == ()


def test_a_grid_and_a_value_replace_each_other(written):
    """Whichever the domain's own entry has."""
    text = """
    default: {search_scale: [100, 1], search_step: [5, 4]}
    signs: {beta: 1, gamma: 0.5}
    """
    found = deployments(written(text), "--select support")
    assert len(found["signs"].routings) == 1 and len(found["digits"].routings) == 25


def test_an_empty_entry_says_nothing(written):
    assert read_domain_config(written("signs:\ndefault: {}\n"), SOURCES) == dict.fromkeys(
        SOURCES, DomainSettings()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sings: {beta: 1}", ["'sings'", "no test source", "did you mean 'signs'"]),
        ("1: {beta: 1}", ["entry 1", "no test source"]),
        ("signs: {betta: 1}", ["signs: no field 'betta'", "did you mean 'beta'"]),
        ("signs: 3", ["signs: found 3", "expected fields"]),
        ("[signs]", ["found ['signs']", "expected entries"]),
        ("", ["found None"]),
        ("signs: {beta: high}", ["signs: beta is 'high'", "a number of at least 0"]),
        ("signs: {beta: -1}", ["signs: beta is -1"]),
        ("signs: {beta: .nan}", ["signs: beta is nan"]),
        ("signs: {beta: .inf}", ["signs: beta is inf"]),
        (f"signs: {{beta: 1{'0' * 400}}}", ["signs: beta is 1"]),
        ("signs: {beta: true}", ["signs: beta is True"]),
        ("signs: {beta: 2001-01-01}", ["signs: beta is datetime"]),
        ("signs: {beta: []}", ["signs: beta is []"]),
        ("signs: {gamma: [0.5, 0.5]}", ["signs: gamma is [0.5, 0.5]", "different"]),
        ("signs: {top_k: 0}", ["signs: top_k is 0", "a positive integer"]),
        ("signs: {top_k: 1.5}", ["signs: top_k is 1.5"]),
        ("signs: {route_epsilon: null}", ["signs: route_epsilon is None"]),
        ("signs: {trim: 'qkv:-1:0.5'}", ["signs: trim is 'qkv:-1:0.5'", "a list"]),
        ("signs: {trim: ['qkv:-1']}", ["signs: trim is ['qkv:-1']", "NAME:BLOCK:KEEP"]),
        ("signs: {candidate_pool: ['qkv:-1:2']}", ["candidate_pool", "(0, 1]"]),
        ("signs: {search_scale: [1, 1]}", ["search_scale and search_step go together"]),
        ("signs: {search_scale: 5, search_step: [1, 1]}", ["search_scale is 5", "[largest beta"]),
        ("signs: {search_scale: [1, 1], search_step: [1, 0]}", ["search_step is [1, 0]"]),
        ("signs: {beta: 1, search_scale: [1, 1], search_step: [1, 1]}", ["without them"]),
        ("signs: {beta: 1}\nsigns: {beta: 2}", ["'signs' is there twice", "line 2"]),
        ("signs:\n  beta: 1\n  beta: 2", ["'beta' is there twice", "line 3"]),
        ("signs: {beta: 1", ["no YAML", "line 1"]),
        ("signs: {beta: !!python/object:os.system 1}", ["no YAML", "python/object"]),
        ("signs: *nowhere", ["no YAML", "nowhere"]),
        (b"signs: \xff", ["no YAML"]),
        ("signs: \x07", ["no YAML"]),
        ("[" * 5000, ["nested too deeply"]),
        ("#" * (LARGEST_SETTINGS + 1), [f"{LARGEST_SETTINGS + 1} bytes, at most"]),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nsigns: {beta: *c}", ["'a'", "no test source"]),
    ],
)
def test_a_fault_is_one_line_that_says_where_and_what(written, text, words):
    path = written(text)
    message = str(fails("domain_config", lambda: read_domain_config(path, SOURCES)))
    assert all(word in message for word in [f"--domain_config {path}", *words]), message
    assert len(message) < 400


def test_a_few_aliases_cannot_fill_a_message(written):
    lines = ["default: &l0 {beta: 1}"]
    bomb = "[" + ", ".join(["x"] * 9) + "]"
    lines += [f"signs: {{beta: &a0 {bomb}, gamma: &a1 [{', '.join(['*a0'] * 9)}]}}"]
    fails("signs: beta is", lambda: read_domain_config(written("\n".join(lines)), SOURCES))
    deep = "default:\n  beta: &a0 [x]\n" + "".join(
        f"  f{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 30)
    )
    fails("default: beta is", lambda: read_domain_config(written(deep), SOURCES))


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_is_not_there_is_one_line(tmp_path, name):
    fails("--domain_config", lambda: read_domain_config(tmp_path / name, SOURCES))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("signs: {top_k: [1, 2]}", ["signs: top_k has 2 values", "--select"]),
        ("default: {beta: [1, 2]}", ["signs: beta has 2 values", "--select"]),
        ("signs: {candidate_pool: ['qkv:-1:0.5']}", ["candidate_pool is for --select"]),
        ("signs: {search_scale: [9, 1], search_step: [2, 2]}", ["search_scale is for --select"]),
    ],
)
def test_several_values_need_a_selection(written, text, words):
    path = written(text)
    message = str(fails("domain_config", lambda: deployments(path)))
    assert all(word in message for word in [str(path), *words]), message
    assert deployments(path, "--select support")
