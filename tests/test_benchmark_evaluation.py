"""The benchmark of evaluation compares like with like, and prints what it says. No test looks at a time."""

import dataclasses
import json

import baseline
import evaluation
import pytest
import side_by_side
import torch
from commands import called

from amt.attacks.kinds import Attack
from amt.evaluation.evaluate import measure, query_generators
from amt.models.architectures import Arch, build_network
from amt.models.network import Network
from amt.models.trim import Trim
from amt.models.weights import stream
from amt.tasks.classifier import merged_predictor
from amt.tasks.settings import Routing

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=20, mlp_ratio=2.0)
MACHINE = side_by_side.Machine("cpu", 1, None, gemm_side=64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """A job on a network that is as small as can be."""
    monkeypatch.setitem(evaluation.ARCHS, "vit_mini", ARCH)
    return evaluation.Job("vit_mini", n_shot=2, per_class=3, episodes=2)


def test_baseline_trims_as_we_do():
    """Coefficients given, in double precision: same logits, and accuracy under an attack that fools some."""
    torch.manual_seed(1)
    network = Network("small", build_network(ARCH).double(), ARCH.image_size)
    pool = side_by_side.random_pool(network, 4, 3, stream(1))
    episode = side_by_side.random_episode(ARCH.image_size, 2, 3, stream(2))
    episode = dataclasses.replace(episode, support=episode.support.double(), query=episode.query.double())
    shares, trims, attack = (
        (0.1, 0.2, 0.3, 0.4),
        (Trim("qkv", -1, 0.5), Trim("fc1", 1, 0.2)),
        Attack("pgd", (8,), steps=4),
    )
    measured = measure(merged_predictor(network, pool, lambda *_: shares, trims), episode, [attack])
    model = baseline.Baseline(network)
    found = baseline.evaluate_episode(
        model, pool, episode, Routing(), stream(0, 0, 1), attack, query_generators(episode, 0), trims, shares
    )
    torch.testing.assert_close(found.logits, measured.classifier.logits(episode.query), rtol=1e-5, atol=1e-6)
    plain = merged_predictor(network, pool, lambda *_: shares)(episode).logits(episode.query)
    assert (plain - found.logits).abs().max() > 1e-3  # trimming does something
    assert found.accuracy == pytest.approx(measured.row["pgd4@8"]) and 0 < found.accuracy < 1


@pytest.mark.parametrize("trimmed", [False, True])
def test_both_sides_are_found_alike(tiny, trimmed):
    job = dataclasses.replace(tiny, trimmed=trimmed, attack=Attack("pgd", (8.0,), steps=2))
    found = evaluation.check_alike(job, MACHINE)
    assert found.logits < 1e-4 and found.coefficients < 1e-5


@pytest.mark.parametrize("change", ["logits", "coefficients", "accuracy"])
def test_sides_that_compute_different_things_are_not_timed(tiny, monkeypatch, change):
    changed = {
        "logits": lambda found: found._replace(logits=lambda: found.logits() + 0.01),
        "coefficients": lambda found: found._replace(coefficients=(1.0, 0.0, 0.0, 0.0)),
        "accuracy": lambda found: found._replace(accuracy=found.accuracy - 1 / 15),
    }[change]

    def other(*problem):
        run = evaluation.baseline(*problem)
        return lambda episode, attack: changed(run(episode, attack))

    monkeypatch.setitem(evaluation.SIDES, "baseline", other)
    with pytest.raises(RuntimeError, match="the two sides compute different things"):
        evaluation.check_alike(tiny, MACHINE)


def test_a_turn_merges_anew_but_keeps_what_does_not_change(tiny, monkeypatch):
    """Routing differs by episode, so that remembering the last merges saves nothing; equal parts do not."""
    merges = []
    monkeypatch.setattr(
        evaluation.Pool,
        "merge",
        lambda self, c, merge=evaluation.Pool.merge: merges.append(c) or merge(self, c),
    )
    for trimmed, expected in ((False, 2 * (4 + 1)), (True, 0)):
        bench = evaluation.Bench(dataclasses.replace(tiny, trimmed=trimmed), "ours", MACHINE)
        bench.warm_up()
        for _ in range(3):
            merges.clear()
            bench.run()
            assert len(merges) == expected


def test_counts_are_those_of_a_turn(tiny):
    """The images that one turn of two episodes puts through the network."""
    for name in side_by_side.IMPLEMENTATIONS:
        job = dataclasses.replace(tiny, attack=Attack("pgd", (1e-6,), steps=3, step_size=0.0))
        support, query = 5 * 2, 5 * 3
        routing, fitting, clean, attack = 4 * 2 * support, support, query, (3 + 1) * query
        counts = evaluation.Bench(job, name, MACHINE).count()
        assert counts.images == 2 * (routing + fitting + clean + attack)
        assert counts.flops > 0


def test_the_plan_is_that_of_the_contract():
    """Pool of four, 1 and 5 shots, 10 queries a class, clean and under PGD-20."""
    jobs = evaluation.plan_of("vit_mini", quick=False)
    assert [job.name for job in jobs] == [
        f"{shots}-shot, {what}"
        for shots in (1, 5)
        for what in (
            "routed, clean",
            "uniform, trimmed, clean",
            "routed, PGD-20 none fooled",
            "routed, PGD-20 at 8/255",
        )
    ]
    assert {job.per_class for job in jobs} == {10} and evaluation.POOL == 4


def test_quick_benchmark_prints_its_table(tmp_path):
    flags = ("--quick", "--threads", 1, "--json", tmp_path / "x.json")
    done = called(evaluation.main, ["evaluation.py", *flags])
    assert done.code == 0, done.err
    assert evaluation.HEADING in done.out and f"torch {torch.__version__}" in done.out
    rows = [line for line in done.out.splitlines() if line.startswith("| 1-shot")]
    assert len(rows) == 3 and all(line.count("|") == 9 for line in rows)
    report = json.loads((tmp_path / "x.json").read_text())
    for row in report["rows"]:
        assert row["difference"]["logits"] < evaluation.TOLERANCE
        for name in side_by_side.IMPLEMENTATIONS:
            assert len(row[name]["seconds"]) == 1 and row[name]["gemm_share"] > 0
    assert report["rows"][-1]["ours"]["accuracy"] == 1  # every image is attacked to the end
