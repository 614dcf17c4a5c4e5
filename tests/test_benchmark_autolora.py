"""The benchmark of AutoLoRa compares like with like and counts what it says. No test looks at a time."""

import dataclasses
import functools
import json
import re

import autolora as benchmark
import autolora_baseline as baseline
import pytest
import side_by_side
import torch
from commands import called
from timm.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck

from amt.models.network import Network, build_classifier
from amt.models.resnet import ResNet
from amt.models.weights import stream
from amt.training.accuracy import validate
from amt.training.autolora_settings import Adversary
from amt.training.objectives import attack
from meta_dataset_readers.errors import InputError

MACHINE = side_by_side.Machine("cpu", 1, None, gemm_side=64)
NETWORKS = {
    "basic": functools.partial(ResNet, BasicBlock, (1, 1), (4, 6), 10, True),
    "bottleneck": functools.partial(ResNet, Bottleneck, (1, 1), (3, 4), 10, True),
    "vit": functools.partial(
        VisionTransformer, img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=2, num_classes=10
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The benchmark on networks that are as small as can be."""

    def build(arch: str, _classes: int, side: int) -> Network:
        return Network(arch, NETWORKS[arch](), side, make=NETWORKS[arch])

    monkeypatch.setattr(benchmark, "build_classifier", build)


def job_of(kind: str, arch: str = "basic", **changes):
    return benchmark.Job(arch, kind, **{"batch": 6, "steps": 3, **changes})


# --- the baseline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", NETWORKS)
def test_baseline_takes_our_steps(arch):
    """In double precision, where no gradient's sign hangs on rounding: same losses, and same weights, factors
    and statistics after each of three steps, the later ones with momentum and a weight decay."""
    problem = benchmark.Problem(job_of("step", arch), "cpu", torch.float64)
    problem.labels, _ = problem.partly_right()  # of an accuracy of zero no weight would have a gradient
    tuner, settings = problem.tuner(), problem.settings()
    trainer = baseline.Trainer(
        problem.model(), settings.lr, settings.momentum, settings.weight_decay, settings.scale
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.tensors.items()}
    assert before.keys() == tuner.student.tensors.keys()
    for batch in range(3):
        record = tuner.step(problem.images, problem.labels)
        start = stream(settings.seed, 1, 0, batch)
        loss = trainer.step(problem.images, problem.labels, settings.adversary, start)
        assert loss.total.item() == pytest.approx(record.total, rel=1e-9)
        assert loss.robust.item() == pytest.approx(record.robust, rel=1e-9) and record.robust > 0
        found = trainer.model.tensors
        for name, tensor in tuner.student.tensors.items():
            torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-9, atol=1e-11, msg=name)
    for name, tensor in found.items():
        assert not torch.equal(tensor, before[name]), f"{name} was never trained"


def test_baseline_attacks_as_we_do():
    problem = benchmark.Problem(job_of("step"), "cpu", torch.float64)
    model = problem.model().eval()
    model.take_thread(natural=False)
    weights = problem.student.weights
    for start in ("gaussian", "uniform", "none"):
        adversary = Adversary(steps=4, start=start)
        arguments = problem.images, problem.labels, adversary
        ours = attack(problem.network, weights, *arguments, stream(5))
        torch.testing.assert_close(baseline.attack(model, *arguments, stream(5)), ours)


def test_baseline_validates_as_we_do():
    """Under attacks that fell none, some and all of the images that are right."""
    problem = benchmark.Problem(job_of("validation", batch=24, steps=5), "cpu", torch.float64)
    labels, epsilon = problem.partly_right()
    network, weights, model = problem.network, problem.student.weights, problem.model()
    batch = (problem.images, labels, torch.arange(24))
    robust = set()
    for radius in (epsilon / 8, epsilon, 1.4 * epsilon, 2 * epsilon, 255):
        adversary = Adversary(radius, radius / 4, 5)
        ours = validate(network, weights, [batch], adversary, 0)
        assert baseline.validate(model, problem.images, labels, adversary, 0) == pytest.approx(ours)
        assert ours.clean == pytest.approx(100 * 5 / 6)
        robust.add(ours.robust)
    assert len(robust) > 2


@pytest.mark.parametrize("steps", [2, 6])
def test_about_two_in_three_stand_in_the_row_of_validation(steps):
    problem = benchmark.Problem(job_of("validation", batch=48, steps=steps), "cpu")
    labels, epsilon = problem.partly_right()
    adversary = Adversary(epsilon, epsilon / 4, steps)
    found = validate(
        problem.network, problem.student.weights, [(problem.images, labels, torch.arange(48))], adversary, 0
    )
    assert found.clean == pytest.approx(100 * 5 / 6)
    assert 0.4 < found.robust / found.clean < 1


# --- counting and comparing ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", side_by_side.IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_is_k_attack_passes_and_two_more(name, steps):
    found = benchmark.Bench(job_of("step", steps=steps), name, MACHINE).count()
    assert (found.forwards, found.backwards) == (steps + 2, steps + 2) and found.flops > 0


def test_both_sides_of_a_step_multiply_as_much():
    """But for the factors' products, none is taken twice, and no weight gets a gradient in the attack."""
    ours, other = (
        benchmark.Bench(job_of("step"), name, MACHINE).count() for name in side_by_side.IMPLEMENTATIONS
    )
    assert ours.flops == pytest.approx(other.flops, rel=1e-6)


def test_counter_sees_a_convolution_and_its_backward_passes():
    """Two operations per multiplication; as many again for the gradient of the images, and of the weights."""
    layer = torch.nn.Conv2d(2, 3, 3, padding=1, bias=False)
    forward = 2 * (3 * 2 * 9) * 5 * 7 * 7

    def turn(of_images: bool, of_weights: bool):
        x = torch.rand(5, 2, 7, 7, requires_grad=of_images)
        layer.requires_grad_(of_weights)

        def run() -> float:
            out = layer(x)
            if of_images or of_weights:
                out.sum().backward()
            return 0.0

        return benchmark.counted(benchmark.Side(run, layer), 5)

    assert turn(False, False) == (forward, 1, 0)
    assert turn(True, False) == turn(False, True) == (2 * forward, 1, 1)
    assert turn(True, True) == (3 * forward, 1, 1)


@pytest.mark.parametrize(("batches", "passes"), [(1, 2), (4, 5), (7, 8), (8, 5), (10, 6)])
def test_an_epoch_of_whole_passes_has_as_many_more_as_published(batches, passes):
    job = job_of("epoch", batch=2, steps=1, batches=batches)
    ours, other = (benchmark.Bench(job, name, MACHINE).count() for name in side_by_side.IMPLEMENTATIONS)
    assert ours.forwards == pytest.approx(3)
    assert other.forwards - ours.forwards == pytest.approx(passes)
    assert ours.backwards == other.backwards == pytest.approx(3)


def test_validation_that_stops_takes_fewer_passes():
    job = job_of("validation", batch=24, steps=5)
    ours, other = (benchmark.Bench(job, name, MACHINE).count() for name in side_by_side.IMPLEMENTATIONS)
    assert (other.forwards, other.backwards) == (5 + 2, 5)  # the clean images, the steps and the last point
    assert ours.forwards < other.forwards and ours.backwards < other.backwards


@pytest.mark.parametrize("kind", ["step", "validation"])
def test_both_sides_are_found_alike(kind):
    assert benchmark.check_alike(job_of(kind, batch=12), MACHINE) < (1e-4 if kind == "step" else 9)


@pytest.mark.parametrize("kind", ["step", "validation"])
def test_sides_that_compute_different_things_are_not_timed(monkeypatch, kind):
    def other(problem):
        side = benchmark.our_step(problem) if kind == "step" else benchmark.our_validation(problem)
        return side._replace(turn=lambda: side.turn() * (1.01 if kind == "step" else 0.7))

    monkeypatch.setitem(benchmark.SIDES, ("baseline", kind), other)
    with pytest.raises(RuntimeError, match="the two sides compute different things"):
        benchmark.check_alike(job_of(kind, batch=24), MACHINE)


# --- the command -----------------------------------------------------------------------------------------


def test_quick_benchmark_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "build_classifier", build_classifier)
    flags = ("--quick", "--threads", 1, "--json", tmp_path / "figures.json")
    done = called(benchmark.main, ["autolora.py", *flags])
    assert done.code == 0, done.err
    assert benchmark.HEADING in done.out and f"torch {torch.__version__}" in done.out
    rows = [line for line in done.out.splitlines() if re.match(r"\| (step|epoch|validation)", line)]
    assert len(rows) == 3 and all(line.count("|") == 10 for line in rows)
    assert "forward passes 4 (K + 2 = 4)" in done.out
    assert "n = 4 batches: 5 (1 + ceil(n / floor(n/4)) = 5)" in done.out
    report = json.loads((tmp_path / "figures.json").read_text())
    assert [row["kind"] for row in report["rows"]] == list(benchmark.KINDS)
    assert report["rows"][0]["difference"] < benchmark.TOLERANCE
    for row in report["rows"]:
        for name in side_by_side.IMPLEMENTATIONS:
            measured = row[name]
            assert len(measured["seconds"]) == 1 and measured["gemm_share"] > 0
            assert measured["peak_memory"] >= measured["idle_memory"] > 0


def test_rows_are_those_asked_for(monkeypatch):
    monkeypatch.setattr(benchmark, "build_classifier", lambda *_: None)

    def rows(*argv: str) -> dict[str, list[tuple]]:
        plan = benchmark.jobs_of(benchmark.parse(list(argv)))
        return {arch: [(job.kind, job.batch, job.steps) for job in jobs] for arch, jobs in plan.items()}

    assert rows() == {
        "resnet_mini": [("step", 128, 10), ("epoch", 32, 10), ("validation", 128, 20)],
        "resnet18": [("step", 16, 10)],
    }
    asked = rows("--arch", "resnet50", "--rows", "step", "--batch", "4", "--steps", "3")
    assert asked == {"resnet50": [("step", 4, 3)]}
    on_a_gpu = rows("--device", "cuda", "--arch", "resnet18")
    assert [row[:2] for row in on_a_gpu["resnet18"]] == [("step", 128), ("epoch", 32), ("validation", 128)]
    assert [row[0] for row in rows("--quick")["resnet_mini"]] == list(benchmark.KINDS)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--threads", "0"], "--threads"),
        (["--batch", "0"], "--batch"),
        (["--rows", "steps"], "--rows"),
        (["--device", "mps"], "only cpu and cuda"),
        (["--json", "no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_options_are_named(argv, named):
    with pytest.raises(InputError, match=named):
        benchmark.parse(argv)


def test_an_unknown_network_is_named_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(benchmark, "build_classifier", build_classifier)
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        benchmark.jobs_of(benchmark.parse(["--arch", "resnet19"]))


def test_a_job_is_told_by_its_name():
    job = job_of("epoch", batches=4)
    assert job.name == "epoch, 4 x 6 images, K = 3" and job.images == 24
    assert dataclasses.replace(job, kind="step", batches=1).name == "step, 6 images, K = 3"
