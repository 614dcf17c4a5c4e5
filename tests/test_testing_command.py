"""test_meta_dataset.py from the flags to the results it leaves."""

import csv
import math
from pathlib import Path

import pytest
import torch
from commands import Ended, about
from PIL import Image
from toy_training import World, command, strict_json

from amt.evaluation import runs
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.stored_episodes import open_episodes

# --- evaluation ------------------------------------------------------------------------------------------


def evaluated(world: World, trained: tuple[Ended, Path], out: Path, *flags) -> tuple[Ended, dict]:
    """How test_meta_dataset.py ended on the trained pool, and its results.json with the rows."""
    ended = command(
        "test_meta_dataset", *world.test(out, "--resume", trained[1] / "last.safetensors", *flags)
    )
    assert ended.code == 0, ended.err
    return ended, strict_json(out / "results.json") | {"rows": runs.load(out).rows}


def test_evaluation_end_to_end(world, trained, tmp_path):
    """The table is printed, and results.json and the picture hold what the table came from."""
    resume = trained[1] / "best.safetensors"
    flags = world.test(tmp_path / "out", "--resume", resume, "--num_workers", 1, "--seed", 3)
    ended = command("test_meta_dataset", *flags)
    assert ended.code == 0 and "error" not in ended.err, ended.err
    results = strict_json(tmp_path / "out" / "results.json")
    assert results["peak_memory_mb"] > 0 and results["episode_seconds"] > 0 and results["suspect"] == []

    assert results["command"].startswith("test_meta_dataset.py ") and str(resume) in results["command"]
    assert results["seed"] == 3 and results["split"] == "TEST" and results["checkpoint"] == str(resume)
    assert results["merging"]["tiny"]["how"] == "amt, beta 1 and gamma 0.6 as given"
    assert [attack["epsilons"] for attack in results["attacks"]] == [[2.0, 8.0]]
    columns = ("clean", "pgd2-ce+dlr@2", "pgd2-ce+dlr@8")
    rows = runs.load(tmp_path / "out").rows["tiny"]
    assert [row["index"] for row in rows] == [0, 1]
    for row in rows:
        assert (row["ways"], row["support"], row["queries"]) == (5, 5, 5)
        assert len(row["coefficients"]) == 2 and math.isclose(sum(row["coefficients"]), 1)
        assert 1 >= row["clean"] >= row["pgd2-ce+dlr@2"] >= row["pgd2-ce+dlr@8"] >= 0
    for column in columns:
        a, b = (100 * row[column] for row in rows)
        found = results["summary"]["tiny"][column]
        assert math.isclose(found["mean"], (a + b) / 2) and found["n"] == 2
        assert math.isclose(found["interval"], 1.96 * abs(a - b) / 2)
        assert results["summary"]["average"][column] == found

    head, table, average = ended.out.splitlines()[1:4]
    assert head.split() == [*columns, "n"]
    summary = [results["summary"]["tiny"][column] for column in columns]
    cells = " ".join(f"{s['mean']:.1f} +- {s['interval']:.1f}" for s in summary)
    assert " ".join(table.split()) == f"tiny {cells} 2" and " ".join(average.split()) == f"average {cells} 2"
    with Image.open(tmp_path / "out" / "accuracy.png") as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_every_answer_is_in_a_table(world, trained, tmp_path):
    """With the picture's own place in the data; the answers come to the accuracies of the summary."""
    _, results = evaluated(world, trained, tmp_path / "out", "--epsilon", 2, 8)
    with (tmp_path / "out" / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    rows = results["rows"]["tiny"]
    assert len(answers) == sum(row["queries"] for row in rows)
    for column, found in results["summary"]["tiny"].items():
        by_episode = [[a["class"] == a[column] for a in answers if a["episode"] == str(k)] for k in range(2)]
        assert 50 * sum(sum(each) / len(each) for each in by_episode) == pytest.approx(found["mean"])
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
    reader = EpisodeReader(world.data, "tiny", "TEST", sampling, 32, n_episodes=2)
    origins = [(each.file, str(each.record)) for each in reader[0].query_origin]
    assert [(a["file"], a["record"]) for a in answers if a["episode"] == "0"] == origins
    assert [a["class"] for a in answers[:5]] == [reader[0].class_names[k] for k in reader[0].query_labels]


def test_the_evaluated_episodes_can_be_written_out_and_validated_on(world, trained, tmp_path):
    """In Meta-Dataset's format, with where every image came from; they come back as they were."""
    evaluated(world, trained, tmp_path / "out", "--dump", tmp_path / "dump")
    stored = open_episodes(tmp_path / "dump" / "tiny", 32)
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
    read = EpisodeReader(world.data, "tiny", "TEST", sampling, 32, n_episodes=2)
    assert len(stored) == 2
    for back, episode in zip(stored, read, strict=True):
        assert torch.equal(back.query, episode.query) and back.query_origin == episode.query_origin
    flags = ("--val_episodes", tmp_path / "dump" / "tiny", "--epochs", 1)
    ended = command("main", *world.train(tmp_path / "run", *flags))
    assert ended.code == 0, ended.err
    assert len(about(tmp_path / "run" / "last.safetensors")["history"][0]["validation"]) == 2


def test_evaluation_is_repeatable(world, trained, tmp_path):
    """Whatever the number of workers: the same rows but for the time they took."""
    found = []
    for workers in (0, 1):
        _, results = evaluated(world, trained, tmp_path / str(workers), "--num_workers", workers)
        found.append([row | {"seconds": None, "fit_seconds": None} for row in results["rows"]["tiny"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "coefficients", "how"),
    [
        (("--specified_expert", 1), [0, 1], "fixed coefficients 0, 1"),
        (("--specified_expert", 0, 1), [0.5, 0.5], "fixed coefficients 0.5, 0.5"),
        (("--coefficients", 0.25, 0.75), [0.25, 0.75], "fixed coefficients 0.25, 0.75"),
        (("--routing", "uniform"), [0.5, 0.5], "fixed coefficients 0.5, 0.5"),
        (("--trim", "qkv:-1:0.5", "--routing", "uniform"), [0.5, 0.5], "; trimmed qkv:-1:0.5 as given"),
        (("--route_epsilon", 4), None, "amt, beta 1 and gamma 0.6, route_epsilon 4 as given"),
        (("--blend_beta", 10, "--blend_gamma", 0.4), None, "amt, beta 10 and gamma 0.4 as given"),
    ],
)
def test_the_flags_decide_the_merging_and_the_results_say_so(
    world, trained, tmp_path, flags, coefficients, how
):
    ended, results = evaluated(world, trained, tmp_path, *flags, "--nTestEpisode", 1)
    (row,) = results["rows"]["tiny"]
    assert math.isclose(sum(row["coefficients"]), 1)
    assert coefficients is None or row["coefficients"] == coefficients
    merging = results["merging"]["tiny"]
    assert how in merging["how"] and merging["how"] in ended.out
    assert merging["epsilons"] == [8.0, 0.1]


def test_settings_are_selected_on_the_valid_split_alone(world, trained, tmp_path, monkeypatch):
    read = []
    draw = EpisodeReader.raw

    def noted(self, index):
        read.append((self.source, self.split))
        return draw(self, index)

    monkeypatch.setattr(EpisodeReader, "raw", noted)
    flags = ("--select_on", "tiny", "--nSelectEpisode", 2, "--trim_candidates", "fc1:0:0.5", "--epsilon", 8)
    _, results = evaluated(world, trained, tmp_path, *flags)
    assert read[-2:] == [("tiny", "TEST")] * 2 and set(read[:-2]) == {("tiny", "VALID")}
    merging = results["merging"]["tiny"]
    assert "chosen on 2 VALID episodes of tiny" in merging["how"]
    scores = dict(merging["candidates"])
    chosen = f"beta {merging['routing']['beta']:g}, gamma {merging['routing']['gamma']:g}"
    grid = {name: score for name, score in scores.items() if name.startswith("beta")}
    assert len(grid) == 28 and grid[chosen] == max(grid.values())
    assert bool(merging["trims"]) == (scores["trim fc1:0:0.5"] > grid[chosen])


def test_without_a_checkpoint_the_pretrained_network_is_measured(world, tmp_path):
    ended = command("test_meta_dataset", *world.test(tmp_path, "--epsilon"))
    assert ended.code == 0, ended.err
    results = strict_json(tmp_path / "results.json")
    assert results["checkpoint"] is None and results["attacks"] == []
    assert results["merging"] == {"tiny": {"how": "none, the pretrained network"}}
    assert all(row["coefficients"] == [] and "clean" in row for row in runs.load(tmp_path).rows["tiny"])


def test_several_domains_are_averaged(world, tmp_path):
    ended = command("test_meta_dataset", *world.test(tmp_path, "--test_sources", "tiny", "no_valid"))
    assert ended.code == 0, ended.err
    results = strict_json(tmp_path / "results.json")
    one, other = (results["summary"][name]["clean"] for name in ("tiny", "no_valid"))
    average = results["summary"]["average"]["clean"]
    assert math.isclose(average["mean"], (one["mean"] + other["mean"]) / 2) and average["n"] == 4


def test_a_failed_evaluation_leaves_the_results_of_an_earlier_one(world, trained, tmp_path):
    evaluated(world, trained, tmp_path, "--nTestEpisode", 1)
    before = (tmp_path / "results.json").read_bytes()
    flags = world.test(tmp_path, "--test_sources", "damaged", "--resume", trained[1] / "last.safetensors")
    assert command("test_meta_dataset", *flags).code == 2
    assert (tmp_path / "results.json").read_bytes() == before


# --- damaged records -------------------------------------------------------------------------------------


def test_evaluation_passes_over_damaged_records_and_counts_them(world, tmp_path):
    flags = ("--test_sources", "damaged", "--skip-bad-records")
    ended = command("test_meta_dataset", *world.test(tmp_path, *flags))
    assert ended.code == 0, ended.err
    skipped = strict_json(tmp_path / "results.json")["skipped_records"]
    assert skipped > 0 and f"{skipped} damaged records were passed over" in ended.out
