"""Against what the published tools wrote and drew: record files, damage, and the sampler's episodes.

The files come from the folders named by AMT_BENCHMARK_DATA and AMT_REAL_SPECS; every name, number and
setting is read from them.
"""

import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import BENCHMARKS, REAL_SPECS, write_spec

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.hierarchy import eligible_groups
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.sampling import check_sampling, sample_episode
from meta_dataset_readers.spec import SPLITS, DatasetSpec, load_spec

pytestmark = pytest.mark.benchmark_data
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no benchmark data in {BENCHMARKS}")
needs_real_specs = pytest.mark.skipif(not REAL_SPECS.is_dir(), reason=f"no specifications in {REAL_SPECS}")


def expected(name: str) -> dict:
    file = BENCHMARKS / "expect" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


# --- specifications and records --------------------------------------------------------------------------


def written_sources() -> list[Path]:
    folders = (
        BENCHMARKS / folder / name for name in expected("records") for folder in ("records", "records_extra")
    )
    return [folder for folder in folders if folder.is_dir()]


@needs_benchmarks
@pytest.mark.parametrize("directory", written_sources(), ids=lambda directory: directory.name)
def test_specifications_are_understood_as_by_the_published_code(directory):
    spec = load_spec(directory)
    assert spec.name == expected("records")[directory.name]["name"]
    for split, block in expected("records")[directory.name]["splits"].items():
        ids = spec.classes(split)
        assert [ids.start, ids.stop] == block["class_ids"] or (not ids and not block["num_classes"])
        assert [spec.images_per_class[i] for i in ids] == block["images_per_class"]
        if spec.groups.get(split) is None or spec.ontology != "dag":  # a graph's classes go by their words
            assert [spec.class_name(i) for i in ids] == block["class_names"]


@needs_benchmarks
@pytest.mark.parametrize("directory", written_sources(), ids=lambda directory: directory.name)
def test_every_record_is_read_pixel_by_pixel(directory):
    source = open_source(directory.parent, directory.name)
    for class_id, block in expected("records")[directory.name]["files"].items():
        assert source.store.count(int(class_id)) == len(block["records"])
        for index, record in enumerate(block["records"]):
            assert digest(source.store.encoded(int(class_id), index)) == record["image_sha256_16"]
            pixels = source.store.read(int(class_id), index)
            assert pixels.dtype == np.uint8 and digest(pixels.tobytes()) == record["pil_rgb_sha256_16"]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# --- damage ----------------------------------------------------------------------------------------------


def damaged_sources() -> list[Path]:
    return sorted(path for path in (BENCHMARKS / "broken").glob("*") if path.is_dir())


def read_all(directory: Path) -> None:
    """Open a source and look at every picture, and every count, as an episode would."""
    source = open_source(directory.parent, directory.name)
    for split in SPLITS:
        missing = source.store.missing(source.spec.classes(split))
        if missing:
            raise InputError(f"{directory}: {missing[0]} is missing")
        for class_id in source.spec.classes(split):
            there, claimed = source.store.count(class_id), source.spec.images_per_class[class_id]
            for index in range(there):
                source.store.read(class_id, index)
            if there != claimed:
                raise InputError(f"{source.store.place(class_id)}: {there} images, {claimed} claimed")


@needs_benchmarks
@pytest.mark.parametrize("directory", damaged_sources(), ids=lambda directory: directory.name)
def test_damage_is_seen_and_named(directory):
    """One line that names the source, and the file, record and byte where a note says which it is."""
    note = json.loads((BENCHMARKS / "broken" / "NOTES.json").read_text())[directory.name]
    if "nothing wrong" in note or "spec says 0" in note:
        read_all(directory)
        return
    with pytest.raises(InputError) as caught:
        read_all(directory)
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    where = re.match(r"class (\d+)(?:, record (\d+))?", note)
    if where:
        assert f"{where[1]}.tfrecords" in message
    if where and where[2] and "length" not in note:
        assert re.search(rf"record {where[2]} at byte \d+", message)


# --- the sampler -----------------------------------------------------------------------------------------


class PublishedStream:
    """The generator of the published sampler behind the few methods ours calls."""

    def __init__(self, seed: int):
        state = np.random.RandomState(seed)
        self.random, self.integers = state.random_sample, state.randint
        self.choice, self.uniform = state.choice, state.uniform


def settings_of(entry: dict) -> EpisodeSampling:
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in entry["config"].items()}
    if not entry["use_dag_hierarchy"]:
        config["ignore_dag_ontology"] = True
    if not entry["use_bilevel_hierarchy"]:
        config["ignore_bilevel_ontology"] = True
    if "MAX_SPANNING_LEAVES_ELIGIBLE" in entry:
        config["max_leaves_below_node"] = entry["MAX_SPANNING_LEAVES_ELIGIBLE"]
    return EpisodeSampling(
        **config, ignore_hierarchy_probability=entry.get("ignore_hierarchy_probability_arg", 0.0)
    )


def refused(entry: dict) -> bool:
    """Whether the published sampler cannot draw every episode. It fails in the episode concerned, or when it
    is made; ours always beforehand. Two of its errors are none of ours: numpy's about lists of equal
    length, and fixed ways beside a hierarchy, which ours draws without the hierarchy, as PMF does."""
    errors = " ".join([entry.get("constructor_error", ""), *entry.get("episode_errors", {})])
    return bool(errors.strip()) and "1-dimensional" not in errors and 'with "num_ways"' not in errors


@pytest.fixture(scope="module")
def real_specs(tmp_path_factory) -> dict[str, DatasetSpec]:
    directory = tmp_path_factory.mktemp("real")
    specs = {}
    for packed in REAL_SPECS.glob("*_dataset_spec.json.gz"):
        name = packed.name.removesuffix("_dataset_spec.json.gz")
        specs[name] = load_spec(
            write_spec(directory / name, json.loads(gzip.decompress(packed.read_bytes())))
        )
    return specs


def written_entries() -> list:
    file = BENCHMARKS / "expect" / "sampling.json"
    return sorted(json.loads(file.read_text()).items()) if file.is_file() else []


def real_entries() -> list:
    file = REAL_SPECS / "sampling_real_specs.json"
    return sorted(json.loads(file.read_text()).items()) if file.is_file() else []


def check_against_reference(spec: DatasetSpec, entry: dict) -> None:
    """The first episodes bit for bit from the same stream, then distributions from a stream of our own."""
    settings, split = settings_of(entry), entry["split"]
    if refused(entry):
        with pytest.raises(InputError):
            check_sampling(spec, split, settings)
        return
    check_eligible_nodes(spec, entry, settings)
    first, stream = spec.classes(split).start, PublishedStream(entry.get("sampler_seed", 0))
    for reference in entry.get("first_episodes", ()):
        episode = sample_episode(spec, split, settings, stream)
        found = zip(episode.class_ids, episode.shots, strict=True)
        assert [[i - first, shots, episode.queries] for i, shots in found] == reference
    if "ways" not in entry:
        return
    rng = np.random.default_rng(11)
    episodes = [sample_episode(spec, split, settings, rng) for _ in range(300)]
    check_histogram([len(e.class_ids) for e in episodes], entry["ways"]["hist"])
    check_histogram([e.queries for e in episodes], entry["query_per_class"]["hist"])
    check_quantiles([sum(e.shots) for e in episodes], entry["support_set_size"])


def check_eligible_nodes(spec: DatasetSpec, entry: dict, settings: EpisodeSampling) -> None:
    split = entry["split"]
    kept = [i for i in spec.classes(split) if spec.images_per_class[i] >= settings.min_examples_in_class]
    first = spec.classes(split).start
    if "eligible_nodes" in entry:
        groups = eligible_groups(spec.groups[split], kept, settings.min_ways, settings.max_leaves_below_node)
        found = {group.name: [i - first for i in group.class_ids] for group in groups}
        assert found == {node["wn_id"]: node["leaves_rel"] for node in entry["eligible_nodes"]}


SURPRISING = 1e-6  # several hundred comparisons at fixed seeds; a wrong rule is far below this


def check_histogram(values: list[int], histogram: dict[str, int]) -> None:
    """Chi-square test that two samples have one distribution; bins of fewer than ten are put together."""
    counts = {int(value): count for value, count in histogram.items()}
    ours = {value: values.count(value) for value in set(values)}
    table, rest = [], np.zeros(2)
    for value in sorted(counts.keys() | ours.keys()):
        column = np.array([counts.get(value, 0), ours.get(value, 0)])
        if column.sum() < 10:
            rest += column
        else:
            table.append(column)
    table += [rest] if rest.sum() else []
    if len(table) > 1:
        assert scipy.stats.chi2_contingency(np.array(table).T).pvalue > SURPRISING
    else:
        assert counts.keys() == ours.keys()


def check_quantiles(values: list[int], reference: dict) -> None:
    """Kolmogorov-Smirnov test at the quantiles that the reference gives of its sample."""
    n, m = len(values), 2000
    gap = 0.0
    for per_cent, quantile in reference["quantiles"].items():
        below, up_to = np.mean(np.array(values) < quantile), np.mean(np.array(values) <= quantile)
        # Where many values are equal, the reference's own share lies anywhere up to the step at that value.
        gap = max(gap, below - int(per_cent) / 100, int(per_cent) / 100 - up_to)
    assert scipy.stats.kstwobign.sf(gap * np.sqrt(n * m / (n + m))) > SURPRISING
    error = reference["std"] * np.sqrt(1 / n + 1 / m)
    assert abs(np.mean(values) - reference["mean"]) <= 5 * error


@needs_benchmarks
@pytest.mark.parametrize(("key", "entry"), written_entries(), ids=lambda x: x if isinstance(x, str) else "")
def test_episodes_are_drawn_as_published(key, entry):
    check_against_reference(load_spec(BENCHMARKS / "records" / key.split("/")[0]), entry)


@needs_real_specs
@pytest.mark.parametrize(("key", "entry"), real_entries(), ids=lambda x: x if isinstance(x, str) else "")
def test_episodes_of_the_real_specifications_are_drawn_as_published(real_specs, key, entry):
    check_against_reference(real_specs[key.split("/")[0]], entry)
