"""Run directories: rows survive, a run continues, parts add up, and nothing foreign is added to."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from conftest import fails, patterned_episode

from amt.attacks.kinds import Attack
from amt.evaluation import runs
from amt.evaluation.evaluate import columns, measure
from amt.evaluation.samples import LARGEST, SAMPLED, sample_of
from amt.evaluation.writer import Writer
from amt.tasks.classifier import Classifier

ATTACKS = (Attack("pgd", (2, 8), steps=3),)
ABOUT = {
    "command": "test_meta_dataset.py --seed 0",
    "commit": "0123456789ab",
    "seed": 0,
    "episodes": 3,
    "attacks": [{"kind": "pgd", "epsilons": [2, 8], "steps": 3}],
    "columns": columns(ATTACKS),
    "sources": ["a", "b"],
    "averages": {"average": ["a", "b"], "out-of-domain": ["b"]},
    "settings": {"seed": 0, "aug_prob": 0.9},
    "deployments": {"a": {"beta": 1.0}, "b": {"beta": 1.0}},
}


def row(source: str, index: int, clean: float = 0.8, **more) -> dict:
    shape = {"ways": 5, "support": 5, "queries": 10, "coefficients": [0.5, 0.5], "seconds": 0.1}
    return {"source": source, "index": index, **shape, "clean": clean, "pgd3@2": 0.5, "pgd3@8": 0.25, **more}


def fill(folder, rows, about=ABOUT, part=(0, 1)) -> None:
    with Writer(folder, about, part) as out:
        for each in rows:
            out.append(each)


ALL = [row(source, index, 0.2 * index + 0.2) for source in "ab" for index in range(3)]


def test_what_was_written_is_read_again(tmp_path):
    fill(tmp_path, reversed(ALL))
    run = runs.load(tmp_path)
    assert run.sources == ("a", "b") and run.complete
    assert [each["index"] for each in run.rows["a"]] == [0, 1, 2]
    assert run.summary("a", "clean").mean == pytest.approx(40) and run.summary("a", "clean").n == 3
    assert run.summary("average", "pgd3@8").mean == pytest.approx(25)
    assert run.summary("out-of-domain", "clean") == run.summary("b", "clean")
    assert run.summary("c", "clean") is None
    assert run.findings == [] and run.suspect("a", "clean") is None and run.samples() == []


def test_an_unfinished_run_continues_and_never_counts_an_episode_twice(tmp_path):
    fill(tmp_path, ALL[:2])
    assert not runs.load(tmp_path).complete
    fill(tmp_path, [ALL[1] | {"clean": 0.0}, *ALL[2:]])
    run = runs.load(tmp_path)
    assert run.complete and run.rows == {s: [r for r in ALL if r["source"] == s] for s in "ab"}


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_cut_short_by_a_crash_is_done_again(tmp_path, cut):
    fill(tmp_path, ALL[:3])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(runs.load(tmp_path).rows["a"]) == 2
    fill(tmp_path, ALL[2:])
    assert runs.load(tmp_path).complete
    assert all(json.loads(line) for line in path.read_text().splitlines())


def write_and_die(folder) -> None:
    with Writer(folder, ABOUT) as out:
        out.append(ALL[0])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_loses_nothing_it_has_written(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert runs.load(tmp_path).rows == {"a": [ALL[0]]}


def test_parts_of_a_run_add_up(tmp_path):
    fill(tmp_path, ALL[::2], part=(0, 2))
    assert not runs.load(tmp_path).complete
    fill(tmp_path, ALL[1::2], part=(1, 2))
    assert runs.load(tmp_path).complete
    assert {path.name for path in tmp_path.glob("rows*")} == {"rows.0of2.jsonl", "rows.1of2.jsonl"}


def test_two_processes_cannot_write_the_same_part(tmp_path):
    with Writer(tmp_path, ABOUT) as out:
        out.append(ALL[0])
        before = (tmp_path / "run.json").read_bytes()
        fewer = ABOUT | {"sources": ["a"], "episodes": 1}
        fails("another process is writing", lambda: fill(tmp_path, ALL[1:], fewer))
        assert (tmp_path / "run.json").read_bytes() == before
        fill(tmp_path, ALL[1:2], part=(1, 2))
    assert len(runs.load(tmp_path).rows["a"]) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"seed": 1, "aug_prob": 0.9}}, "with seed 0, not 1"),
        ({"settings": {"seed": 0}}, "with aug_prob 0.9, not null"),
        ({"settings": {**ABOUT["settings"], "new": "x"}}, 'with new null, not "x"'),
        ({"deployments": {"a": {"beta": 1.0}, "b": {"beta": 2.0}}}, "with beta of b 1.0, not 2.0"),
        ({"commit": "ba9876543210"}, "commit 0123456789ab, the code is now ba9876543210"),
    ],
)
def test_a_run_of_other_settings_or_code_is_not_added_to(tmp_path, change, named):
    fill(tmp_path, ALL[:2])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert named in str(fails("begun with", lambda: fill(tmp_path, ALL[2:], ABOUT | change)))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_more_episodes_and_more_domains_may_be_added(tmp_path):
    fill(tmp_path, ALL)
    more = ABOUT | {
        "episodes": 4,
        "sources": ["a", "b", "c"],
        "deployments": {**ABOUT["deployments"], "c": {"beta": 3.0}},
    }
    fill(tmp_path, [row("a", 3)], more)
    run = runs.load(tmp_path)
    assert not run.complete and [len(each) for each in run.rows.values()] == [4, 3]
    fill(tmp_path, [], ABOUT)
    assert runs.load(tmp_path).complete and len(runs.load(tmp_path).rows["a"]) == 3


@pytest.mark.parametrize("name", ["results.json", "rows.jsonl", "rows.1of2.jsonl"])
def test_results_without_their_run_are_not_touched(tmp_path, name):
    (tmp_path / name).write_text("{}")
    fails(f"{name} but no run.json", lambda: fill(tmp_path, ALL))


def test_a_domain_left_out_once_keeps_what_decided_it(tmp_path):
    fill(tmp_path, ALL)
    fill(tmp_path, [], ABOUT | {"sources": ["a"], "deployments": {"a": ABOUT["deployments"]["a"]}})
    other = ABOUT | {"deployments": {**ABOUT["deployments"], "b": {"beta": 2.0}}}
    fails("beta of b 1.0, not 2.0", lambda: fill(tmp_path, [], other))
    fill(tmp_path, [])
    assert runs.load(tmp_path).complete


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        (None, None, "no run directory: it has no run.json"),
        ("run.json", "{", "run.json: not valid JSON"),
        ("run.json", "[]", "run.json: expected an object, found a list of 0"),
        ("run.json", "{}", "run.json: field 'settings' is missing"),
        (
            "run.json",
            json.dumps({"format": 1, **ABOUT, "attacks": [{"kind": "pdg"}]}),
            "field 'attacks.0.epsilons' is missing",
        ),
        (
            "run.json",
            json.dumps({"format": 1, **ABOUT, "attacks": [{"kind": "pgd", "epsilons": [3]}]}),
            "field 'columns': expected pgd",
        ),
        ("rows.jsonl", json.dumps(row("a", 0, ways=0)) + "\n", "line 1: field 'ways': expected greater"),
        ("merging.json", '{"a": {"how": "x", "epsilons": [[]]}}', "field 'a.epsilons.0': expected a number"),
        ("run.json", json.dumps({"format": 9, **ABOUT}), "format is 9, expected 1"),
        ("rows.jsonl", "nonsense\n", "rows.jsonl, line 1: not valid JSON"),
        ("rows.jsonl", '{"source": "a"}\n', "line 1: field 'index' is missing"),
        ("rows.jsonl", json.dumps(row("a", 0, 1.5)) + "\n", "expected less than or equal to 1, found 1.5"),
        ("rows.jsonl", json.dumps(row("a", 0, None)) + "\n", "expected a number, found None"),
        (
            "rows.jsonl",
            json.dumps(row("a", 0, seconds="long")) + "\n",
            "line 1: field 'seconds': expected a number",
        ),
        (
            "rows.jsonl",
            json.dumps(row("a", 0, coefficients=[2.0])) + "\n",
            "line 1: field 'coefficients.0': ",
        ),
        ("rows.jsonl", json.dumps(row("a", 0, checks={})) + "\n", "line 1: field 'checks.images' is missing"),
        ("rows.jsonl", json.dumps(row("a", 0, checks=5)) + "\n", "line 1:"),
        (
            "rows.jsonl",
            json.dumps(row("a", 0, variants=[1])) + "\n",
            "line 1: field 'variants': expected an object",
        ),
        (
            "run.json",
            json.dumps({"format": 1, **ABOUT, "averages": {"x": 3}}),
            "field 'averages.x': expected a list",
        ),
        (
            "run.json",
            json.dumps({"format": 1, **ABOUT, "sources": [[1]]}),
            "field 'sources.0': expected a string",
        ),
        ("merging.json", '{"a": []}', "merging.json: field 'a': expected an object, found a list of 0"),
        ("rows.jsonl", "", "no results yet"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, file, text, named):
    if file is not None:
        fill(tmp_path, [])
        (tmp_path / file).write_text(text)
    assert named in str(fails(tmp_path.name, lambda: runs.load(tmp_path)))


def test_how_each_domain_was_merged_is_kept(tmp_path):
    with Writer(tmp_path, ABOUT, (0, 2)) as one, Writer(tmp_path, ABOUT, (1, 2)) as other:
        one.note_merging("a", {"how": "given"})
        other.note_merging("b", {"how": "chosen"})
        one.append(ALL[0])
    assert runs.load(tmp_path).merging == {"a": {"how": "given"}, "b": {"how": "chosen"}}


def test_the_summary_names_what_is_suspect(tmp_path):
    checks = {"images": 10, "changed": 2}
    fill(tmp_path, [ALL[0] | {"checks": checks}, *ALL[1:]])
    run = runs.load(tmp_path)
    results = runs.summarise_run(run, {"device": "cpu"})
    assert ["a", "pgd3@8", run.suspect("a", "pgd3@8")] in results["suspect"]
    assert "2 predictions change" in run.suspect("a", "clean")
    assert run.suspect("average", "clean").startswith("a: 2 predictions") and not run.suspect("b", "clean")
    assert results["device"] == "cpu" and results["summary"]["average"]["clean"]["n"] == 6
    json.loads(json.dumps(results, allow_nan=False))


def test_what_was_run_under_a_name_is_told(tmp_path):
    one, other = ({"variants": {"pgd3@8": variant}} for variant in ("ce, having 3 ways", "dlr"))
    fill(tmp_path, [ALL[0] | one, ALL[1] | other, ALL[2] | one, *ALL[3:]])
    assert runs.load(tmp_path).variants == {"pgd3@8": ("ce, having 3 ways", "dlr")}


def test_a_single_episode_has_no_interval_in_json(tmp_path):
    fill(tmp_path, ALL[:1])
    results = runs.summarise_run(runs.load(tmp_path), {})
    assert results["summary"]["a"]["clean"]["interval"] is None
    json.dumps(results, allow_nan=False)


# --- samples ---------------------------------------------------------------------------------------------


def measured_toy():
    episode = patterned_episode(2, n_way=4, shots=1, queries=5)
    head = torch.randn(4, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    logits = lambda images: images.flatten(1) @ head.T  # noqa: E731
    return episode, measure(lambda _: Classifier(logits, lambda _: logits, ()), episode, ATTACKS)


def test_samples_show_every_class_before_and_after(tmp_path):
    episode, measured = measured_toy()
    with Writer(tmp_path, ABOUT | {"sources": ["tiny"]}) as out:
        out.keep(sample_of(episode, measured))
        out.append(row("tiny", 2))
    (sample,) = runs.load(tmp_path).samples()
    assert (sample.source, sample.index, sample.column) == ("tiny", 2, "pgd3@8")
    assert len(sample.clean) == SAMPLED and set(sample.labels[:4]) == {0, 1, 2, 3}
    assert sample.clean.dtype == sample.attacked.dtype == np.uint8 and sample.clean.shape[1:] == (8, 8, 3)
    assert 0 < abs(sample.perturbation).max() <= 8.01 and len(sample.class_names) == 4
    moved = sample.attacked.astype(float) - sample.clean
    assert abs(moved - sample.perturbation).max() <= 1.01  # both were rounded
    assert sample.shots.tolist() == [1] * 4 and sample.support_labels.tolist() == [0, 1, 2, 3]
    assert (sample.support == (255 * episode.support).round().byte().permute(0, 2, 3, 1).numpy()).all()
    right = measured.correct["clean"].float().mean()
    assert (sample.predicted_clean == sample.labels).mean() == pytest.approx(float(right), abs=0.5)


def test_a_sample_of_before_there_was_support_in_it_is_read(tmp_path):
    episode, measured = measured_toy()
    older = sample_of(episode, measured)._asdict()
    with Writer(tmp_path, ABOUT | {"sources": ["tiny"]}) as out:
        out.append(row("tiny", 2))
    (tmp_path / "samples").mkdir()
    for name in ("support", "support_labels", "shots"):
        older.pop(name)
    np.savez(tmp_path / "samples" / "tiny-2.npz", **older)
    (sample,) = runs.load(tmp_path).samples()
    assert len(sample.clean) == SAMPLED and len(sample.support) == len(sample.shots) == 0


@pytest.mark.parametrize("damage", ["cut", "pickle", "labels", "shape", "support", "bomb"])
def test_a_damaged_sample_is_named(tmp_path, damage):
    episode, measured = measured_toy()
    with Writer(tmp_path, ABOUT | {"sources": ["tiny"]}) as out:
        sample = sample_of(episode, measured)
        if damage == "labels":
            sample = sample._replace(labels=sample.labels + 9)
        if damage == "support":
            sample = sample._replace(support_labels=sample.support_labels + 9)
        if damage == "shape":
            sample = sample._replace(attacked=sample.attacked[:-1])
        out.keep(sample)
        out.append(row("tiny", 2))
    (path,) = (tmp_path / "samples").glob("*.npz")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    if damage == "pickle":
        np.savez(path, clean=np.array([{}], dtype=object))
    if damage == "bomb":
        np.savez_compressed(path, clean=np.zeros(LARGEST + 1, np.uint8))
    fails("no sample of images", runs.load(tmp_path).samples)


def test_a_pipe_among_the_samples_does_not_hang(tmp_path):
    with Writer(tmp_path, ABOUT | {"sources": ["tiny"]}) as out:
        out.append(row("tiny", 2))
    (tmp_path / "samples").mkdir()
    os.mkfifo(tmp_path / "samples" / "x.npz")
    fails("x.npz: is a pipe", runs.load(tmp_path).samples)
