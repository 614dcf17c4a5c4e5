"""benchmarks/predict.py: both sides answer alike before they are timed, and the tables come out."""

import json

import numpy as np
import predict as bench
import pytest
import side_by_side
import torch
from commands import called

from amt.models.architectures import ARCHS, Arch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sides_that_answer_differently_are_not_timed():
    answers = np.arange(100) % 5
    bench.check_alike(answers, torch.from_numpy(answers))
    with pytest.raises(RuntimeError, match="other answers to 80 of 100"):
        bench.check_alike(answers, torch.zeros(100))


def test_as_many_images_go_through_as_the_table_says(tmp_path, monkeypatch):
    """Counted at the first layer: 125 of one adapter, and 25 twice for each of four when routed. The network
    is used at another size than it was pretrained at, as the ViT-S is."""
    monkeypatch.setitem(ARCHS, "vit_mini", Arch(4, 24, 2, 2, pretrained_size=16, image_size=24))
    runs, images = bench.sides("vit_mini", tmp_path)
    for name, run in runs.items():
        assert side_by_side.counted(run).images == images[name], name


def test_a_run_writes_its_table_and_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "cold_starts", lambda *_: bench.Cold([2.0], [1.5], [0.9]))
    ended = called(bench.main, ["predict.py", "--quick", "--threads", 1, "--json", tmp_path / "all.json"])
    assert ended.code == 0, ended.err
    assert "| ours, routed | " in ended.out and "2 (2-2) s, 1.5 (1.5-1.5) s of CPU" in ended.out
    assert "`import torch` alone 0.9 (0.9-0.9)" in ended.out
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found["results"]["vit_mini"]["seconds"]) == {
        *("ours, one adapter", "ours, routed", "prototypical network by hand"),
        *("bare, 125 images", "bare, 325 images"),
    }
