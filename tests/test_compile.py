"""`--compile`: passes and attack steps become one program each, few programs serve all episodes, and they
compute what is computed without them."""

import dataclasses
import functools

import pytest
import torch
from commands import called
from conftest import fails, moved_apart, patterned_episode, random_backbone
from torch._dynamo.utils import counters
from toy_pools import ARCH, RANK, make_episode, quick
from toy_training import assert_refused, command

from amt.__main__ import main as amt
from amt.attacks.kinds import parse_attack
from amt.attacks.levels import Perturbation
from amt.attacks.perturb import Ball, ascend
from amt.cli import test, train
from amt.evaluation.evaluate import measure
from amt.models.compiled import Compiler, compiler_for
from amt.models.network import Network
from amt.models.pool import Pool, principal_pool
from amt.tasks.classifier import fixed_predictor
from amt.training.tuner import Tuner
from meta_dataset_readers.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "programs")


@pytest.fixture
def programs():
    """Torch's settings for programs as `compiler_for` has them, without any program."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
        yield
    torch._dynamo.reset()


class Counting:
    """A backend that leaves programs as they are traced, and counts them."""

    def __init__(self):
        self.made = 0
        counters.clear()

    def __call__(self, program, _inputs):
        self.made += 1
        return program


@pytest.fixture
def small() -> Network:
    return random_backbone(dataclasses.replace(ARCH, depth=1))


def pool_of(network: Network) -> Pool:
    levels = tuple(Perturbation(e, e / 4, steps=2, grids=(2, 0), scalars=(5.0, 1.0)) for e in (8, 6))
    return moved_apart(principal_pool(network.weights, RANK, levels))


@pytest.mark.parametrize(
    ("variant", "micro_batch", "most"),
    [
        ({}, None, 6),
        ({"method": "querying", "head": "ridge"}, 4, 6),
        ({"loss": "features", "epsilon_from": 0.0}, None, 8),  # the pretrained network has a pass of its own
    ],
)
def test_training_makes_a_program_of_a_pass_and_one_of_an_attack_step(small, variant, micro_batch, most):
    """Episodes of one shape share them, and those of other shapes need few more; the gradients are the same.
    With parts, of four images and of what is left, the attack alone is compiled."""
    counting, settings = Counting(), quick(lr=1e-3, epsilon_warmup=8, **variant)
    plain = dataclasses.replace(small, micro_batch=micro_batch)
    tuners = [
        Tuner(each, pool_of(small), settings)
        for each in (plain, dataclasses.replace(plain, compiler=Compiler(counting)))
    ]
    made = []
    for shape in ((3, 2, 3), (3, 2, 3), (3, 1, 4), (3, 3, 5)):
        before = counting.made
        for tuner in tuners:
            tuner.step(patterned_episode(0, *shape, side=16))
        made.append(counting.made - before)
    assert 0 < made[0] <= sum(made) <= most and made[1] == 0, made
    assert not counters["graph_break"]
    expected, found = (tuner.state()[0] for tuner in tuners)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


def test_the_compiler_of_a_cpu_computes_the_same(small):
    """Programs of machine code, not traced ones; without a C++ compiler there are none."""
    try:
        compiler = compiler_for(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))
    tuners = [
        Tuner(each, pool_of(small), quick(method="standard", lr=1e-3))
        for each in (small, dataclasses.replace(small, compiler=compiler))
    ]
    for tuner in tuners:
        tuner.step(patterned_episode(0, 3, 2, 3, side=16))
    expected, found = (tuner.state()[0] for tuner in tuners)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


class Replayed:
    """A backend whose programs write every result where the last one was, as CUDA graphs do, and refuse their
    own memory as an argument."""

    def __call__(self, program, _inputs, **_options):
        memory = []

        def run(*given):
            assert not {each.data_ptr() for each in memory} & {each.data_ptr() for each in given}
            results = [each.clone() for each in program(*given)]
            if not memory:
                memory.extend(torch.empty_like(each) for each in results)
            return tuple(place.copy_(each) for place, each in zip(memory, results, strict=True))

        return run


def test_attack_steps_are_replayed_on_what_the_last_replay_returned():
    levels = [Perturbation(8, 2, grids=(2, 0), scalars=(5.0, 1.0))]
    images, weight = torch.rand(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    for geometry, start in (
        (Ball("linf", 0.1, 0.03), images),
        (levels[0].pyramid, levels[0].pyramid.start(images, torch.Generator().manual_seed(0))),
    ):

        def loss_of(attacked):
            return (attacked * weight).square().sum()

        compiler = functools.partial(Compiler(Replayed(), graphs=True), repeated=True)
        expected, found = (
            ascend(loss_of, images, start, geometry, steps=4, compiled=each) for each in (None, compiler)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch._dynamo.reset()


def test_evaluation_makes_few_programs(small):
    """Though an attack goes on with fewer and fewer images."""
    counting, attack = Counting(), parse_attack(["pgd", "steps=2", "epsilon=0.5,2"])
    merged, rows, made = pool_of(small).merged([0.5, 0.5]), [], []
    for each in (small, dataclasses.replace(small, compiler=Compiler(counting))):
        for k in range(3):
            row = measure(fixed_predictor(each, merged), make_episode(k), [attack]).row
            rows.append([row[name] for name in ("clean", *attack.columns)])
            made.append(counting.made)
    assert rows[:3] == rows[3:] and len({str(row) for row in rows}) > 1
    assert 0 < made[-1] <= 6 and made[-1] == made[-2] and not counters["graph_break"]


class Noting:
    """In place of a `Compiler`: functions stay as they are, and their names are kept."""

    def __init__(self):
        self.seen = set()

    def __call__(self, function, repeated=False):
        self.seen.add((function.__name__, repeated))
        return function


def test_both_programs_compile_what_they_do_again_and_again(world, tmp_path, monkeypatch):
    trained, tested = Noting(), Noting()
    monkeypatch.setattr(train, "compiler_for", lambda _: trained)
    monkeypatch.setattr(test, "compiler_for", lambda _: tested)
    short = ("--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0, "--statistics_episodes", 0, "--compile")
    assert command("main", *world.train(tmp_path / "trained", *short)).code == 0
    assert trained.seen == {("_forward", False), ("step", True)}
    short = ("--nTestEpisode", 1, "--probe_episodes", 0, "--compile")
    assert command("test_meta_dataset", *world.test(tmp_path / "tested", *short)).code == 0
    assert tested.seen == {("_forward", False)}


def test_predict_compiles_its_passes(photos, box, monkeypatch):
    noting = Noting()
    monkeypatch.setattr("amt.models.compiled.compiler_for", lambda _: noting)
    flags = ("--support", photos / "support", photos / "new", "--attack", "pgd", "steps=1", "--device", "cpu")
    found = [called(amt, ["amt", "predict", "vit_mini_pool", *flags, *more]) for more in ((), ("--compile",))]
    assert found[1].code == 0 and found[1].out == found[0].out
    assert noting.seen == {("_forward", False)}


def test_without_a_compiler_it_is_refused_before_anything_is_made(world, tmp_path):
    with torch._inductor.config.patch({"cpp.cxx": ("no_such_compiler",)}):
        ended = command("main", *world.train(tmp_path / "out", "--compile"))
    assert_refused(ended, tmp_path / "out", "--compile", "C++ compiler", "CXX")


def test_what_torch_wraps_is_said_itself(monkeypatch):
    """A damaged file in the cache, such as a killed process leaves, was `backend='inductor' raised:`."""

    def failing(*_):
        raise ImportError("x.so: file too short\nmore")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    fails(
        "TORCHINDUCTOR_CACHE_DIR names another[)]: ImportError: x.so: file too short$",
        lambda: compiler_for(torch.device("cpu")),
    )
