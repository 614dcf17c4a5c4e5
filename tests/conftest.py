"""What several test files build on: small real sources written on the spot (JPEG records and a
specification, in all three kinds), and small random networks, pools and episodes."""

import os

# Small tensors on shared cores: OpenMP's waiting threads can make a suite forty times slower. Set before
# torch is imported, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands have it, where a test asks for two

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from amt.models.architectures import Arch, build_network
from amt.models.network import Network
from amt.models.pool import Pool
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.tfrecord import encode_example, write_records

# Modules with fixtures that several files share: each is made once in a process.
pytest_plugins = ["amt_golden", "toy_autolora_runs", "toy_photos", "toy_pools", "toy_training"]

# No test may depend on how busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@contextlib.contextmanager
def single_thread():
    """A single thread of torch: small networks would only wait for more, and sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    with single_thread():
        yield


SPLITS = ("TRAIN", "VALID", "TEST")


def jpeg(class_id: int, record: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A picture unlike any of another class or record."""
    colour = np.random.default_rng([class_id, record]).integers(0, 256, 3)
    pixels = np.tile(colour.astype(np.uint8), (size[1], size[0], 1))
    pixels[: size[1] // 2] //= 2
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    return encoded.getvalue()


def flat_spec(name: str, splits: tuple[int, int, int], images: list[int]) -> dict:
    return {
        "name": name,
        "classes_per_split": dict(zip(SPLITS, splits, strict=True)),
        "images_per_class": {str(i): n for i, n in reversed(list(enumerate(images)))},
        "class_names": {str(i): f"class {i}" for i in range(len(images))},
        "path": "/stale/path/of/the/converter",
        "file_pattern": "{}.tfrecords",
        "__class__": "DatasetSpecification",
    }


def bilevel_spec(name: str, splits: tuple[int, int, int], sizes: list[int], images: list[int]) -> dict:
    """`splits` counts superclasses, `sizes` the classes of each."""
    return {
        "name": name,
        "superclasses_per_split": dict(zip(SPLITS, splits, strict=True)),
        "classes_per_superclass": {str(i): n for i, n in enumerate(sizes)},
        "images_per_class": {str(i): n for i, n in enumerate(images)},
        "superclass_names": {str(i): f"alphabet {i}" for i in range(len(sizes))},
        "class_names": {str(i): f"letter {i}" for i in range(len(images))},
        "path": "",
        "file_pattern": "{}.tfrecords",
        "__class__": "BiLevelDatasetSpecification",
    }


def dag_spec(name: str, graphs: dict[str, dict[str, list[str]]], images: dict[str, int]) -> dict:
    """`graphs` gives the children of every inner node, by split; `images` the count of every leaf."""
    subgraphs, class_names, counts = {}, {}, {}
    for split in SPLITS:
        inner = graphs.get(split, {})
        wn_ids = sorted({*inner, *(child for children in inner.values() for child in children)})
        subgraphs[split] = [
            {
                "wn_id": wn_id,
                "words": f"words of {wn_id}",
                "children_ids": inner.get(wn_id, []),
                "parents_ids": sorted(parent for parent in inner if wn_id in inner[parent]),
            }
            for wn_id in wn_ids
        ]
        leaves = [wn_id for wn_id in wn_ids if wn_id not in inner]
        counts[split] = {leaf: images[leaf] for leaf in leaves}
        for leaf in leaves:
            class_names[str(len(class_names))] = leaf
    return {
        "name": name,
        "split_subgraphs": subgraphs,
        "images_per_class": counts,
        "class_names": class_names,
        "path": "",
        "file_pattern": "{}.tfrecords",
        "__class__": "HierarchicalDatasetSpecification",
    }


def write_spec(directory: Path, spec: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dataset_spec.json").write_text(json.dumps(spec, indent=2))
    return directory


def example_spec(kind: str, name: str, n_images: int) -> tuple[dict, int]:
    """A specification of the given kind in which every class has `n_images`, and its number of classes."""
    if kind == "flat":
        return flat_spec(name, (6, 0, 5), [n_images] * 11), 11
    if kind == "bilevel":
        return bilevel_spec(name, (2, 0, 1), [5, 7, 6], [n_images] * 18), 18
    train = {
        "n0": ["n1", "n2"],
        "n1": ["a1", "a2", "a3", "a4", "a5"],
        "n2": ["a4", "a5", "b1", "b2", "b3", "n3"],
        "n3": ["b4"],
    }
    test = {"t0": ["t1", "t2", "t3", "t4", "t5"]}
    leaves = ["a1", "a2", "a3", "a4", "a5", "b1", "b2", "b3", "b4", "t1", "t2", "t3", "t4", "t5"]
    graphs = {"TRAIN": train, "TEST": test}
    return dag_spec(name, graphs, dict.fromkeys(leaves, n_images)), len(leaves)


def readable(directory: Path) -> dict[tuple[int, int], bytes]:
    """What can be read of a source by class and number, damage passed over; InputError if it cannot be
    opened."""
    source = open_source(directory.parent, directory.name)
    found = {}
    for class_id in range(len(source.spec.images_per_class)):
        with contextlib.suppress(InputError):
            for index in range(source.store.count(class_id)):
                with contextlib.suppress(DamagedRecord):
                    found[class_id, index] = source.store.encoded(class_id, index)
    return found


def change_a_byte(file: Path, draw) -> None:
    """Change one byte of a file, or cut its end off, as hypothesis draws it."""
    content = bytearray(file.read_bytes())
    position = draw(st.integers(0, len(content) - 1))
    if draw(st.booleans()):
        content[position] ^= draw(st.integers(1, 255))
    else:
        del content[position:]
    file.write_bytes(content)


@pytest.fixture
def tiny_source(tmp_path):
    """`tiny_source(kind="flat", name="tiny", n_images=8)` writes a source below `tmp_path`: its directory.

    Kinds: "flat" (6 TRAIN and 5 TEST classes), "bilevel" (superclasses of 5 and 7, TEST 6), "dag" (9 and 5
    leaves). Every class has `n_images` JPEG records of 20 x 16 pixels.
    """

    def write(kind: str = "flat", name: str = "tiny", n_images: int = 8) -> Path:
        spec, n_classes = example_spec(kind, name, n_images)
        directory = write_spec(tmp_path / name, spec)
        for class_id in range(n_classes):
            payloads = (encode_example(jpeg(class_id, record), class_id) for record in range(n_images))
            write_records(directory / f"{class_id}.tfrecords", payloads)
        return directory

    return write


# --- pictures in files of their own, and the sample data -------------------------------------------------

# Files that the published tools wrote; the tests that use them are skipped where they are not.
SAMPLES = Path(__file__).parents[2] / "shared" / "data"
BENCHMARKS = Path(os.environ.get("AMT_BENCHMARK_DATA", SAMPLES / "benchmarks"))
REAL_SPECS = Path(os.environ.get("AMT_REAL_SPECS", SAMPLES / "real_specs"))


def picture(seed, mode="RGB"):
    """A small picture unlike that of any other seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 4), dtype=np.uint8)
    return Image.fromarray(pixels[..., :3]).convert(mode)


def write_picture(file, seed=0, mode="RGB", format=None):
    """The file, which holds `picture(seed)`; its folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, mode).save(file, format)
    return file


def by_pil(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def write_classes(directory, **images):
    """`cat=3` makes a class folder with cat/0.png, cat/1.png and cat/2.png."""
    for name, count in images.items():
        (directory / name).mkdir(parents=True)
        for index in range(count):
            write_picture(directory / name / f"{index}.png", index)
    return directory


def fails(match, call):
    """`call` raises an InputError of one line that matches."""
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


# --- networks, pools and episodes in memory --------------------------------------------------------------


def random_backbone(
    arch: Arch, seed: int = 0, scale: float = 0.25, autocast: torch.dtype | None = None
) -> Network:
    """A random network whose features depend visibly on the image; torch's generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the patch bias is drawn from the global generator
        network = build_network(arch)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return Network("tiny", network, arch.image_size, autocast=autocast)


def patterned_episode(
    seed: int, n_way: int = 3, shots: int = 2, queries: int = 2, side: int = 8, noise: float = 0.3
) -> Episode:
    """Noisy copies of a pattern per class; a part of the pixels sits at the limits."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(n_way, 3, side, side, generator=generator)

    def draw(each: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n_way).repeat(each)
        strays = torch.randn(len(labels), 3, side, side, generator=generator)
        return (patterns[labels] + noise * strays).clamp(0, 1), labels

    return Episode(*draw(shots), *draw(queries), source="tiny", index=seed)


def moved_apart(pool: Pool, scale: float = 0.05, seed: int = 1) -> Pool:
    """The pool with every adapter moved a way of its own."""
    generator = torch.Generator().manual_seed(seed)
    return pool.with_factors(
        {name: f + scale * torch.randn(f.shape, generator=generator) for name, f in pool.factors.items()}
    )


def assert_same_episode(one: Episode, other: Episode) -> None:
    """Every field, tensors bit by bit."""
    for field in dataclasses.fields(Episode):
        left, right = getattr(one, field.name), getattr(other, field.name)
        same = left.equal(right) if isinstance(left, torch.Tensor) else left == right
        assert same, (field.name, left, right)
