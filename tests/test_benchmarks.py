"""The benchmark runs, counts what it says it counts, and compares like with like. No test looks at a time."""

import dataclasses
import json

import baseline
import meta_tuning
import pytest
import torch
from commands import called

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.evaluation.evaluate import evaluate, query_generators
from amt.models.architectures import Arch, build_network
from amt.models.network import Network, features
from amt.models.weights import stream
from amt.tasks.classifier import merged_predictor
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from amt.training.meta_tune import query_outcome
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.errors import InputError

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=20, mlp_ratio=2.0)
LEVEL = Perturbation(epsilon=8, step_size=2, steps=3)
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


pytestmark = pytest.mark.usefixtures("one_thread")


def small_problem(adapters: int, n_shot: int = 2):
    """A double-precision network, where no gradient's sign hangs on rounding; its pool, and an episode."""
    torch.manual_seed(1)
    network = Network("small", build_network(ARCH).double(), ARCH.image_size)
    pool = meta_tuning.random_pool(network, adapters, 3, stream(1))
    episode = meta_tuning.random_episode(ARCH.image_size, n_shot, 3, stream(2))
    double = {"support": episode.support.double(), "query": episode.query.double()}
    return network, pool, dataclasses.replace(episode, **double)


def our_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A learner's trained tensors by the names of `Pool.factors`, and `scale`."""
    return {
        name.removeprefix("vit.").replace(".lora_", ".weight.lora_"): value
        for name, value in model.trained.items()
    }


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name].reshape(theirs[name].shape), rtol=1e-5, atol=1e-9)


def test_baseline_starts_as_the_merged_network():
    network, pool, episode = small_problem(1)
    ours = features(network, pool.merge([1.0]), episode.query)
    torch.testing.assert_close(baseline.Learner(network, pool)(episode.query), ours, rtol=1e-5, atol=1e-6)


def test_baseline_takes_our_training_step():
    """Same loss, gradients, and weights after two steps (the second with momentum)."""
    network, pool, episode = small_problem(1)
    pool = dataclasses.replace(pool, levels=(LEVEL,))
    settings = TuneSettings(epochs=10, episodes_per_epoch=100, lr=0.01, warmup_epochs=0)
    tuner = Tuner(network, pool, settings)
    model = baseline.Learner(network, pool)
    optimiser = torch.optim.SGD(model.trained.values(), settings.lr, settings.momentum)
    for number in range(2):
        start = LEVEL.pyramid.start(episode.query, stream(settings.seed, number, 0))
        before = tuner.pool
        leaves = {name: factor.requires_grad_() for name, factor in before.factors.items()}
        leaves["scale"] = before.scale.requires_grad_()
        leaf_pool = dataclasses.replace(before.with_factors(leaves), scale=leaves["scale"])
        outcome = query_outcome(network, leaf_pool, episode, start)
        gradients = torch.autograd.grad(outcome.loss.total.sum(), list(leaves.values()))

        (record,) = tuner.step(episode)
        loss = baseline.training_step(model, optimiser, NO_SCALING, episode, LEVEL, start)
        assert loss.total.item() == pytest.approx(record.total, rel=1e-5)
        assert loss.robust.item() == pytest.approx(record.robust, rel=1e-5) and record.robust > 0
        assert_close(
            dict(zip(leaves, gradients, strict=True)),
            {name: value.grad for name, value in our_names(model).items()},
        )
        after = tuner.pool
        assert_close(after.factors | {"scale": after.scale}, our_names(model))


@pytest.mark.parametrize("augmented", [0.0, 1.0])
def test_baseline_evaluates_as_we_do(augmented):
    """Same coefficients, logits, and accuracy under an attack that fools some of the images."""
    network, pool, episode = small_problem(4)
    routing = Routing(beta=10, augment_probability=augmented)
    attack = Attack("pgd", (8,), steps=4, step_size=2)
    predict = merged_predictor(network, pool, lambda *seen: route(network, pool, *seen, routing))
    classifier = predict(episode)
    (row,) = evaluate(predict, [episode], [attack])
    starts = query_generators(episode, 0)
    found = baseline.evaluate_episode(
        baseline.Baseline(network), pool, episode, routing, stream(0, 0, 1), attack, starts
    )
    assert found.coefficients == pytest.approx(classifier.coefficients, abs=1e-5)
    assert sum(c > 0 for c in found.coefficients) == 2
    torch.testing.assert_close(found.logits, classifier.logits(episode.query), rtol=1e-5, atol=1e-6)
    assert row["clean"] == 1 and 0 < row[attack.columns[0]] < 1  # else accuracies would agree too easily
    assert found.accuracy == pytest.approx(row[attack.columns[0]])


def test_counter_sees_every_matrix_product_of_a_forward_pass():
    network, _, episode = small_problem(1)
    images = len(episode.query)
    counts = meta_tuning.counted(lambda: features(network, network.weights, episode.query))
    patches = (ARCH.image_size // ARCH.patch_size) ** 2
    tokens, dim = patches + 1, ARCH.dim
    linear = 2 * tokens * dim**2 * (4 + 2 * ARCH.mlp_ratio)
    attention = 2 * 2 * tokens**2 * dim
    # The last block: keys and values of every token, and all else of the class token alone.
    last = 2 * tokens * dim**2 * 2 + 2 * dim**2 * (2 + 2 * ARCH.mlp_ratio) + attention / tokens
    embedding = 2 * patches * dim * 3 * ARCH.patch_size**2
    assert counts == (images * (embedding + (ARCH.depth - 1) * (linear + attention) + last), images)


def test_counter_sees_the_backward_pass_of_attention():
    """Twice the forward products for gradients of q, k and v, and once more q k^T, which is recomputed."""
    q, k, v = (torch.rand(2, 3, 10, 8, requires_grad=True) for _ in range(3))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    forward = meta_tuning.counted(attend).flops
    both = meta_tuning.counted(lambda: attend().sum().backward()).flops
    assert both == forward * 3.5


@pytest.mark.parametrize("implementation", meta_tuning.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("job", "steps", "levels"), [("step", 3, 1), ("step", 3, 2), ("episode", 0, 1), ("episode", 3, 1)]
)
def test_counts_from_smaller_jobs_are_those_of_the_job_itself(
    monkeypatch, implementation, job, steps, levels
):
    """Those of a pool are per level."""
    monkeypatch.setitem(meta_tuning.ARCHS, "vit_mini", ARCH)
    workload = meta_tuning.Workload("vit_mini", job, n_shot=2, per_class=3, steps=steps, levels=levels)
    machine = meta_tuning.Machine("cpu", 1, None, gemm_side=64)
    bench = meta_tuning.Bench(workload, implementation, machine)
    counts = bench.count()
    assert [levels * count for count in counts] == list(meta_tuning.counted(bench.run))
    if job == "step":
        expected = steps + 4 if implementation == "ours" else 2 * steps + 4
        assert meta_tuning.query_forwards(workload, counts) == expected


def test_ours_alone_is_timed_as_a_program_and_counted_as_it_is_written(monkeypatch):
    monkeypatch.setitem(meta_tuning.ARCHS, "vit_mini", ARCH)
    monkeypatch.setattr(
        meta_tuning, "compiler_for", lambda _: lambda function, repeated=False: made(function)
    )
    machine = meta_tuning.Machine("cpu", 1, None, gemm_side=64, compile=True)
    workload = meta_tuning.Workload("vit_mini", "step", n_shot=1, per_class=1, steps=1)
    compiled = []

    def made(function):
        compiled.append(function)
        return function

    for implementation in ("baseline", "ours"):
        bench = meta_tuning.Bench(workload, implementation, machine)
        bench.count()
        assert not compiled
        bench.run()
        assert bool(compiled) == (implementation == "ours")


def test_full_plan_has_every_row_and_the_quick_one_the_two_kinds():
    full = [row.name for row in meta_tuning.plan_of("dino_small_patch16", quick=False)]
    assert full == [
        "step, 5-way 1-shot, 50 query",
        "step, 5-way 5-shot, 50 query",
        "step of 4 levels, per level, 5-way 1-shot, 50 query",
        "episode, 5-way 1-shot, 50 query",
        "episode, 5-way 5-shot, 50 query",
        "episode, 5-way 1-shot, 50 query, PGD-20",
    ]
    assert {row.job for row in meta_tuning.plan_of("vit_mini", quick=True)} == {"step", "episode"}


def test_only_some_rows():
    plan = meta_tuning.plan_of("vit_mini", quick=False)
    assert meta_tuning.chosen(plan, "step, 5-way 1-shot") == plan[:1]
    assert meta_tuning.chosen(plan, "") == plan
    with pytest.raises(InputError, match=r"--only 'stpe': no such row.* step, 5-way 1-shot"):
        meta_tuning.chosen(plan, "stpe")


def test_quick_benchmark_prints_its_table(tmp_path):
    flags = ("--quick", "--threads", 1, "--cpu_time", "--json", tmp_path / "figures.json")
    done = called(meta_tuning.main, ["meta_tuning.py", *flags])
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and "threads 1" in lines[0]
    assert "seconds of the processor" in lines[0]
    assert meta_tuning.HEADING in done.out
    rows = [line for line in lines if line.startswith(("| step", "| episode"))]
    assert len(rows) == 3 and all(line.count("|") == 8 for line in rows)
    assert "ours 6 (K + 4 = 6), baseline 8 (2K + 4 = 8)" in done.out
    assert "GEMM rate" in lines[-1]
    assert "everything left: about" in done.err

    report = json.loads((tmp_path / "figures.json").read_text())
    assert [row["job"] for row in report["rows"]] == ["step", "step", "episode"]
    for row in report["rows"]:
        for implementation in meta_tuning.IMPLEMENTATIONS:
            measured = row[implementation]
            assert len(measured["seconds"]) == 1
            assert measured["peak_memory"] >= measured["idle_memory"] > 0
            assert measured["gemm_share"] > 0
    assert report["rows"][-1]["ours"]["accuracy"] == 1  # every image is attacked to the end


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--arch", "vit_minni"], "did you mean 'vit_mini'"),
        (["--threads", "0"], "--threads"),
        (["--fp16", "--bf16"], "--fp16 and --bf16"),
        (["--device", "mps"], "only cpu and cuda"),
        (["--device", "cuda", "--cpu_time"], "--cpu_time is for"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_options_are_named(argv, named):
    with pytest.raises(InputError, match=named):
        meta_tuning.parse(argv)
