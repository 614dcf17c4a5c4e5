"""The readers' benchmark runs, writes what it says it writes, and compares like with like. No test looks at a
time."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import readers
import readers_baseline
import torch
from commands import ROOT
from PIL import Image

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the benchmark needs /proc")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Both sources with 5 classes of 15 small pictures."""
    return readers.make_sources(tmp_path_factory.mktemp("data"), 5, 15, (60, 45))


def test_a_quick_run_prints_its_tables_and_writes_its_figures(tmp_path):
    command = [sys.executable, "benchmarks/readers.py", "--quick", "--json", str(tmp_path / "figures.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("processor ")
    assert readers.OPENING_HEADING in done.stdout and done.stdout.count(readers.HEADING) == 2
    for name in readers.READERS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 3
    for name in readers.LIMITS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 2
    assert "fast_decode changes a pixel by" in lines[-1]

    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["plan"]["classes"] == 6 and set(report["opening"]) == set(readers.READERS)
    for row in report["rows"]:
        (turn,) = row["turns"]
        assert turn["images"] > 0 and turn["seconds"] > 0 and turn["peak_memory"] > 0
        assert (turn["episodes"] > 0) == (row["reader"] in readers.READERS)
        if row["reader"] in (readers.OURS, readers.FAST):
            assert turn["open_files"] <= 1
        if row["reader"] == readers.BASELINE:
            assert turn["open_files"] == 6  # every class file it has seen
    assert 0 < report["pixels"]["mean"] < 3


def test_the_sources_are_made_once(sources):
    files = sorted(sources.rglob("*.*"))
    before = [file.stat().st_mtime_ns for file in files]
    assert readers.make_sources(sources.parent, 5, 15, (60, 45)) == sources
    assert [file.stat().st_mtime_ns for file in files] == before
    assert len(files) == 2 * (5 + 1)


def test_pictures_are_of_the_size_and_weight_that_are_promised():
    data = readers.picture(*readers.SIZE, np.random.default_rng(0))
    assert 30_000 < len(data) < 50_000 and Image.open(io.BytesIO(data)).size == (500, 375)


def test_every_reader_hands_over_whole_episodes_of_its_source(sources):
    plan = readers.Plan(sources, 5, 15, 16, 75)
    for name in readers.READERS:
        for protocol, sampling in readers.PROTOCOLS.items():
            episode = readers.open_reader(name, plan, protocol)[0]
            parts = episode if isinstance(episode, tuple) else (episode.support, episode.support_labels)
            images, labels = parts[:2]
            assert images.shape == (len(labels), 3, 16, 16) and images.dtype == torch.float32
            assert images.min() >= 0 and images.max() <= 1
            if sampling.num_ways:
                assert readers.images_in(episode) == 75


def test_the_baseline_makes_of_a_picture_what_we_make_of_it(sources):
    """Its conversion leaves small pictures as they are, so that the pixels can be compared; both take all."""
    sampling = EpisodeSampling(num_ways=5, num_support=10, num_query=5)
    ours = EpisodeReader(sources, readers.ARRAYS, "TRAIN", sampling, 16, n_episodes=1)[0]
    support, _, query, _ = readers_baseline.H5Episodes(sources / readers.ARRAYS, sampling, 16, 1)[0]
    theirs = {image.numpy().tobytes() for image in (*support, *query)}
    assert {image.numpy().tobytes() for image in (*ours.support, *ours.query)} == theirs


def test_the_baselines_conversion_is_pmfs(tmp_path):
    """At most 224 x 224; groups beyond the pictures given share them."""
    sizes = [(300, 260), (300, 100)]
    pictures = [Image.fromarray(np.full((h, w, 3), 9, np.uint8)) for w, h in sizes]
    readers_baseline.write_class(tmp_path / "0.h5", pictures, 5)
    with h5py.File(tmp_path / "0.h5") as file:
        shapes = [file[str(k)]["image"].shape for k in range(5)]
        assert len(file) == 5
    assert shapes == [(224, 224, 3), (100, 300, 3), (224, 224, 3), (100, 300, 3), (224, 224, 3)]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--classes", "4"], "at least 5 classes"),
        (["--images", "14"], "of 15 images"),
        (["--workers", "0"], "--workers"),
        (["--data", ""], "--data"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_options_are_named(argv, named):
    with pytest.raises(InputError, match=named):
        readers.parse(argv)


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="MiB are free"):
        readers.make_sources(tmp_path, 10**7, 10**7)
    assert not list(tmp_path.iterdir())
