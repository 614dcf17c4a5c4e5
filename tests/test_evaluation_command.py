"""Long evaluations: several attacks, stopping and going on, sharing out, comparing, and what is refused."""

import json
import shutil
import signal
import time

import pytest
from commands import ROOT, SLOW, start
from toy_training import assert_refused, command, error_line, strict_json

from amt.cli import compare
from amt.evaluation import runs
from amt.evaluation.writer import Writer
from meta_dataset_readers.errors import exit_on_bad_input

ATTACKS = (
    *("--attack", "pgd", "epsilon=2,8", "--attack", "square", "queries=5", "epsilon=8"),
    *("--attack", "pgd", "norm=l2", "epsilon=60", "--attack", "support", "steps=2", "epsilon=4"),
    *("--attack", "transfer", "epsilon=8"),
    *("--attack", "strong", "epsilon=8", "steps=2", "restarts=1", "queries=5"),
)
FEW = ATTACKS[:7]  # two radii, and random queries
WORST = "pgd2-ce+dlr"


def untimed(folder) -> dict:
    """The rows of a run without the times they took."""
    timed = {"seconds": None, "fit_seconds": None}
    return {source: [row | timed for row in rows] for source, rows in runs.load(folder).rows.items()}


@pytest.fixture(scope="module")
def flags(world, trained):
    """Flags of test_meta_dataset.py on the trained pool for three episodes, into a folder."""

    def flags_for(out, *more) -> list:
        resume = ("--resume", trained[1] / "last.safetensors")
        return world.test(out, *resume, "--nTestEpisode", 3, "--num_query", 2, *more)

    return flags_for


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of an uninterrupted run under many attacks."""
    return evaluated(flags, tmp_path_factory.mktemp("whole"), ATTACKS)


@pytest.fixture(scope="module")
def under_few(flags, tmp_path_factory):
    """The same under few."""
    return evaluated(flags, tmp_path_factory.mktemp("under_few"), FEW)


def evaluated(flags, out, attacks):
    ended = command("test_meta_dataset", *flags(out, *attacks))
    assert ended.code == 0, ended.err
    return out


def test_every_attack_gets_its_column_and_their_union(whole):
    run = runs.load(whole)
    assert run.columns == (
        *("clean", f"{WORST}@2", f"{WORST}@8", "square5@8", f"{WORST}-l2@60", "support-pgd2@4"),
        *("transfer-pgd2@8", "strong2-q5@8"),
        *("union@2", "union@8", "union"),
    )
    for row in run.rows["tiny"]:
        assert (
            row["union"] <= row["union@8"] <= min(row[f"{WORST}@8"], row["square5@8"], row["transfer-pgd2@8"])
        )
        assert row["strong2-q5@8"] <= row["clean"]
        # Made on the pretrained network and on each of the pool's two adapters.
        assert "transfer x3" in row["variants"]["strong2-q5@8"]
    assert [("checks" in row) for row in run.rows["tiny"]] == [True, True, False]
    assert run.findings == [tuple(found) for found in strict_json(whole / "results.json")["suspect"]]
    (sample,) = run.samples()
    assert sample.column == "strong2-q5@8" and sample.index == 0
    assert list((whole / "tensorboard").glob("*"))


def test_the_same_command_on_a_finished_run_only_shows_it(flags, whole):
    before = (whole / "rows.jsonl").read_bytes()
    ended = command("test_meta_dataset", *flags(whole, *ATTACKS))
    assert ended.code == 0 and "average" in ended.out
    assert (whole / "rows.jsonl").read_bytes() == before


def check_continued(flags, under_few, out) -> None:
    """The same command finishes what is there, and the result is that of an uninterrupted run."""
    rows = out / "rows.jsonl"
    kept = rows.read_bytes()[: rows.read_bytes().rfind(b"\n") + 1]
    assert 1 <= kept.count(b"\n") < 3 and not (out / "results.json").exists()
    evaluated(flags, out, FEW)
    assert rows.read_bytes().startswith(kept) and untimed(out) == untimed(under_few)
    summary = strict_json(out / "results.json")["summary"]
    assert summary == strict_json(under_few / "results.json")["summary"]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_stopped_evaluation_goes_on_where_it_was(flags, under_few, tmp_path, monkeypatch, number, workers):
    append = Writer.append

    def noisy(self, row):
        append(self, row)
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", noisy)
        ended = command("test_meta_dataset", *flags(tmp_path, *FEW, "--num_workers", workers))
    assert ended.code == 128 + number and "Traceback" not in ended.err
    assert "1 of 3 episodes are done; the same command continues" in ended.out
    check_continued(flags, under_few, tmp_path)


def test_a_killed_evaluation_goes_on_where_it_was(flags, under_few, tmp_path):
    words = (ROOT / "test_meta_dataset.py", *flags(tmp_path / "out", *FEW))
    running = start("-c", SLOW, *words, cwd=tmp_path)
    rows = tmp_path / "out" / "rows.jsonl"
    while running.poll() is None and not (rows.exists() and b"\n" in rows.read_bytes()):
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    check_continued(flags, under_few, tmp_path / "out")


def test_what_was_chosen_is_not_chosen_again(flags, tmp_path, monkeypatch):
    """A run that goes on reads no VALID episode, and merges as before."""
    choosing = ("--select_on", "tiny", "--nSelectEpisode", 2, "--blend_beta", 1, 10, "--epsilon", 8)
    choosing += ("--trim_candidates", "fc1:0:0.5")
    assert command("test_meta_dataset", *flags(tmp_path / "whole", *choosing)).code == 0
    assert command("test_meta_dataset", *flags(tmp_path / "two", *choosing, "--nTestEpisode", 2)).code == 0
    monkeypatch.setattr("amt.evaluation.deploy.select", None)
    ended = command("test_meta_dataset", *flags(tmp_path / "two", *choosing))
    assert ended.code == 0, ended.err
    assert untimed(tmp_path / "two") == untimed(tmp_path / "whole")
    merging = strict_json(tmp_path / "two" / "merging.json")
    assert merging == strict_json(tmp_path / "whole" / "merging.json")
    assert "chosen on 2 VALID episodes of tiny" in merging["tiny"]["how"]


def test_domains_that_choose_alike_choose_once(flags, tmp_path, monkeypatch):
    from amt.evaluation import deploy

    calls = []
    select = deploy.select
    monkeypatch.setattr(deploy, "select", lambda *args, **kw: calls.append(1) or select(*args, **kw))
    two = ("--test_sources", "tiny", "no_valid", "--nTestEpisode", 1, "--blend_beta", 1, 10)
    choosing = (*two, "--nSelectEpisode", 2, "--epsilon")
    assert command("test_meta_dataset", *flags(tmp_path, *choosing, "--select_on", "tiny")).code == 0
    merging = strict_json(tmp_path / "merging.json")
    assert len(calls) == 1 and merging["tiny"] == merging["no_valid"]


def test_parts_share_a_folder_and_the_last_one_sums_up(flags, whole, tmp_path, monkeypatch):
    ended = command("test_meta_dataset", *flags(tmp_path, *ATTACKS, "--shard", "0/2"))
    assert ended.code == 0 and "2 of 3 episodes are done; other parts are to follow" in ended.out
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setenv("RANK", "1")  # as torchrun would
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = command("test_meta_dataset", *flags(tmp_path, *ATTACKS))
    assert ended.code == 0, ended.err
    assert untimed(tmp_path) == untimed(whole)
    summary = strict_json(tmp_path / "results.json")["summary"]
    assert summary == strict_json(whole / "results.json")["summary"]


def test_more_episodes_are_added_to_a_finished_run(flags, tmp_path):
    assert command("test_meta_dataset", *flags(tmp_path, "--nTestEpisode", 2)).code == 0
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert command("test_meta_dataset", *flags(tmp_path)).code == 0
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(before)
    assert strict_json(tmp_path / "results.json")["summary"]["tiny"]["clean"]["n"] == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seed", 5), "seed 0, not 5"),
        (("--attack_iters", 3), "attack_iters 2, not 3"),
        (("--epsilon", 8), "epsilon [2.0, 8.0], not [8.0]"),
        (("--blend_beta", 3), "blend_beta null, not [3.0]"),
        (("--num_query", 1), "num_query 2, not 1"),
        (("--resume", "best.safetensors"), "begun with checkpoint"),
    ],
)
def test_a_run_of_other_settings_is_refused_and_kept(flags, trained, whole, change, named):
    change = [trained[1] / word if word == "best.safetensors" else word for word in change]
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    ended = command("test_meta_dataset", *flags(whole, *ATTACKS, *change))
    assert ended.code == 2 and named in error_line(ended) and str(whole / "run.json") in error_line(ended)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_a_run_of_other_code_is_refused_and_one_with_other_settings_of_a_domain(flags, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    about = strict_json(whole / "run.json")
    asked = flags(tmp_path / "run", *ATTACKS)
    (tmp_path / "run" / "run.json").write_text(json.dumps(about | {"commit": "0123456789ab"}))
    assert "commit 0123456789ab, the code is now" in error_line(command("test_meta_dataset", *asked))
    deployments = {"tiny": about["deployments"]["tiny"] | {"routing": "uniform"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about | {"deployments": deployments}))
    assert 'routing of tiny "uniform", not "amt"' in error_line(command("test_meta_dataset", *asked))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--attack", "pdg"), ["--attack pdg", "did you mean 'pgd'"]),
        (("--attack", "pgd", "stepps=3"), ["stepps=3", "steps=..."]),
        (("--attack", "autoattack", "targets=5"), ["targets=5", "5 ways has 4 other classes"]),
        (("--attack", "pgd", "norm=l2"), ["norm=l2", "epsilon=..."]),
        (("--attack", "pgd", "epsilon=8,2"), ["epsilon 8,2", "increasing"]),
        (("--attack", "pgd", "--attack", "pgd"), ["--attack", "pgd2-ce+dlr pgd2-ce+dlr"]),
        (("--attack", "pgd", "--epsilon"), ["epsilon", "no value"]),
        (("--epsilon", 8, 2), ["--epsilon 8 2", "increasing"]),
        (("--epsilon", 2, 2), ["--epsilon 2 2", "increasing"]),
        (("--shard", "2/2"), ["2/2", "0 to N - 1"]),
        (("--shard", "half"), ["half", "I/N"]),
    ],
)
def test_attacks_and_parts_that_make_no_sense_are_refused(flags, tmp_path, wrong, words):
    ended = command("test_meta_dataset", *flags(tmp_path / "out", *wrong))
    assert_refused(ended, tmp_path / "out", *words)


def test_mixed_precision_is_accepted_and_said_to_be_without_effect(flags, tmp_path):
    ended = command("test_meta_dataset", *flags(tmp_path, "--nTestEpisode", 1, "--fp16"))
    assert ended.code == 0 and "--fp16 has no effect: evaluation is in float32" in ended.err


# --- comparing -------------------------------------------------------------------------------------------


def compared(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(lambda: compare.main([str(word) for word in words]))
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


def test_two_runs_are_compared_on_the_same_episodes(flags, whole, tmp_path, capsys):
    other = flags(tmp_path, "--attack", "pgd", "epsilon=8", "--specified_expert", 0)
    assert command("test_meta_dataset", *other).code == 0
    code, out, _ = compared(capsys, tmp_path, whole)
    assert code == 0 and "square5@8" not in out
    ours, theirs = (runs.load(folder).rows["tiny"] for folder in (tmp_path, whole))
    for column in ("clean", "pgd2-ce+dlr@8"):
        mean = 100 * sum(a[column] - b[column] for a, b in zip(ours, theirs, strict=True)) / 3
        assert f"{mean:+.1f} +- " in out and column in out
    (line,) = [line for line in out.splitlines() if line.startswith("tiny")]
    assert line.split()[-1] == "3"


def test_a_run_equals_itself(whole, capsys):
    code, out, _ = compared(capsys, whole, whole)
    assert code == 0 and "*" not in out.split("bootstrap", 1)[1] and "+0.0 +- 0.0 [+0.0, +0.0]" in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seed", 1), "its seed is 1, not 0"),
        (("--split", "VALID"), "its split is VALID, not TEST"),
        (("--num_support", 2), "its sampling is"),
        (("--test_sources", "no_valid"), "they share no domain"),
    ],
)
def test_runs_on_other_episodes_are_not_compared(flags, whole, tmp_path, capsys, change, named):
    ended = command("test_meta_dataset", *flags(tmp_path, "--nTestEpisode", 1, "--epsilon", *change))
    assert ended.code == 0, ended.err
    code, out, err = compared(capsys, tmp_path, whole)
    assert code == 2 and out == "" and named in err and err.startswith("error: ") and err.count("\n") == 1


def test_what_is_no_run_is_not_compared(whole, tmp_path, capsys):
    code, _, err = compared(capsys, whole, tmp_path)
    assert code == 2 and f"{tmp_path}: no run directory" in err


@pytest.mark.parametrize(("flags", "warned"), [((), True), (("--specified_expert", 0), False)])
def test_a_merge_that_is_half_near_clean_is_warned_of(world, trained, flags, warned, tmp_path):
    """Below the table: adapters for 8/255 and 0.1/255 score alike here, so each gets half of the weight."""
    words = world.test(tmp_path / "out", "--resume", trained[1] / "last.safetensors", *flags)
    ended = command("test_meta_dataset", *words)
    assert ended.code == 0, ended.err
    warnings = [line for line in ended.out.splitlines() if line.startswith("warning: tiny: ")]
    assert len(warnings) == warned, ended.out
    assert not warned or "% of the weight is on adapters for at most 0.1/255" in warnings[0]
