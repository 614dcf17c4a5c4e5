"""Training by several processes is that of one: meta-training bit for bit, AutoLoRa up to rounding."""

import contextlib
import functools
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import Ended, about, same_tensors
from conftest import fails, moved_apart
from hypothesis import given
from hypothesis import strategies as st
from pretended_device import on_device, pretended
from safetensors.torch import load_file, save_file
from torch.distributed import distributed_c10d
from toy_autolora import METHODS, SHORT, chosen, data, network, start_of
from toy_autolora_runs import command as autolora
from toy_autolora_runs import rows
from toy_pools import RANK, make_episode, make_network, quick, tensors
from toy_ranks import Running, program, signalled, together
from toy_training import World, assert_refused, command, scalars, signal_after, write_source

from amt.attacks.levels import Perturbation
from amt.files import ranks
from amt.files.ranks import LostRank
from amt.files.run_directory import RunDirectory
from amt.files.signals import Interrupts
from amt.models.branch import Student
from amt.models.pool import Pool, principal_pool
from amt.training.accuracy import accuracy, validate
from amt.training.autolora import FineTuner, new_student
from amt.training.parallel import _WholeBatch
from amt.training.tuner import Tuner, share

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = tuple(Perturbation(e, e / 4, steps=2, grids=(2, 0), scalars=(2.0, 1.0)) for e in (8, 6, 2, 0.1))


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_every_level_sees_every_episode_of_a_step_once(levels, episodes, draw):
    """While there are levels enough no rank has another's, and none has two more than another."""
    world = draw.draw(st.integers(1, levels * episodes))
    shares = [share(rank, world, levels) for rank in range(world)]
    todo = [(p, k) for each in shares for p in each.levels for k in each.episodes(episodes)]
    assert sorted(todo) == [(p, k) for p in range(levels) for k in range(episodes)]
    assert all(len(each.levels) * len(each.episodes(episodes)) for each in shares)
    if world <= levels:
        sizes = {len(each.levels) for each in shares}
        assert all(each.places == 1 for each in shares) and max(sizes) - min(sizes) <= 1


# Steps

# Levels, episodes in a step, most levels in a pass, and how they are trained. A pass of one level rounds
# otherwise than one of several: where ranks have one each, one process takes one at a time, too. Of two
# episodes LayerNorms are trained as well.
STEPS = {
    "two levels each": (4, 1, None, {}),
    "three levels": (3, 1, 1, {"epsilon_warmup": 3, "clip_grad": 1.0}),
    "two episodes": (1, 2, None, {"clip_grad": 1.0, "loss": "features"}),
    "three episodes": (1, 3, None, {"method": "querying", "head": "ridge"}),
    "levels and episodes": (2, 2, 1, {"epsilon_warmup": 3, "epsilon_from": 0.05}),
}


def trained(case: str, team: ranks.Ranks) -> tuple[Pool, dict[str, torch.Tensor], dict]:
    """The pool, momentum and numbers after two steps."""
    levels, episodes, at_once, how = STEPS[case]
    net = make_network()
    pool = moved_apart(principal_pool(net.weights, RANK, LEVELS[:levels], norms=episodes == 2))
    settings = quick(lr=1e-3, episodes_per_step=episodes, episodes_per_epoch=2 * episodes, **how)
    tuner = Tuner(net, pool, settings, at_once, team)
    total = 2 * episodes
    mine = [make_episode(k) for k in tuner.own_episodes(total)]
    size = len(mine) // 2
    records = [tuner.step(*mine[k * size : (k + 1) * size]) for k in range(2)]
    found = tuner.gathered()
    found[2]["records"] = [[each._replace(seconds_per_step=0) for each in level] for level in records]
    return found


def fits(case: str, world: int) -> bool:
    """Whether there is something to do for every rank, and as much in a pass as for one process."""
    levels, episodes, at_once, _ = STEPS[case]
    return world <= levels * episodes and (at_once == 1 or levels == 1 or levels >= 2 * world)


def write_steps(folder: Path) -> None:
    """What rank 0 of some ranks finds, case by case."""
    with ranks.together(100) as team:
        for case in STEPS:
            if not fits(case, team.world):
                continue
            pool, momentum, numbers = trained(case, team)
            if team.first:
                save_file(tensors(pool) | momentum, folder / f"{case}.safetensors")
                (folder / f"{case}.json").write_text(json.dumps(numbers))


@pytest.mark.parametrize("world", [2, 3])
def test_a_step_of_several_ranks_is_that_of_one(tmp_path, world):
    """Members, momentum and records, to the same bits, whatever is shared out."""
    for ended in together(functools.partial(write_steps, tmp_path), world, tmp_path):
        assert ended == (0, "", ""), ended
    cases = [case for case in STEPS if fits(case, world)]
    assert len(cases) == (5 if world == 2 else 3)
    for case in cases:
        pool, momentum, numbers = trained(case, ranks.ALONE)
        save_file(tensors(pool) | momentum, tmp_path / "alone.safetensors")
        assert same_tensors(tmp_path / "alone.safetensors", tmp_path / f"{case}.safetensors"), case
        assert json.loads((tmp_path / f"{case}.json").read_text()) == json.loads(json.dumps(numbers)), case


def test_a_step_of_several_episodes_follows_the_mean_of_their_gradients():
    """Without momentum and perturbations: each episode alone moves the weights by its own part."""
    net = make_network()
    pool = moved_apart(principal_pool(net.weights, RANK, LEVELS[:1]))

    def moved(size: int, *episodes: int) -> dict[str, torch.Tensor]:
        settings = quick(lr=0.1, momentum=0, method="standard", episodes_per_step=size, episodes_per_epoch=4)
        tuner = Tuner(net, pool, settings)
        tuner.step(*map(make_episode, episodes))
        return {name: each - tensors(pool)[name] for name, each in tensors(tuner.pool).items()}

    one, other, both = moved(1, 0), moved(1, 1), moved(2, 0, 1)
    for name, found in both.items():
        torch.testing.assert_close(found, (one[name] + other[name]) / 2, rtol=1e-3, atol=1e-6)
    assert not torch.equal(one["scale"], other["scale"])


# AutoLoRa


FINE_TUNINGS = {
    "resnet": [*METHODS, "measured"],
    "vit": ["autolora", "ALF"],
}
SIZES = (8, 5, 1)  # of batches; of the last one rank has nothing


def fine_tuned(kind: str, case: str, team: ranks.Ranks) -> tuple[dict[str, torch.Tensor], list]:
    """State and records of three batches and their epoch's end, in float64: up to rounding 1e-16 is 0."""
    how = METHODS.get(case, {"similarity_every": 1, "whole_passes": True})
    net = network(kind)
    student = new_student(net, start_of(net), chosen(**how), start_of(net, seed=5))
    student = Student.of_tensors(double(student.tensors))
    seen = [(images.double(), labels, labels) for images, labels in (data(5, seed=9), data(3, seed=8))]
    tuner = FineTuner(
        net, student, chosen(**how), len(SIZES), lambda weights: accuracy(tuner.network, weights, seen), team
    )
    records = []
    for number, size in enumerate(SIZES):
        images, labels = data(size, seed=number)
        record = tuner.step(images.double(), labels)._replace(seconds=0)
        records.append([*record[:-1], *(record.similarity or {}).values()])
    found = validate(tuner.network, tuner.student.weights, seen, SHORT, seed=1)
    tuner.end_epoch(*found)
    return tuner.state()[0], [*records, list(found)]


def double(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each.double() if each.is_floating_point() else each for name, each in weights.items()}


def write_fine_tunings(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranks.together(100) as team:
        for kind, case in ((kind, case) for kind, cases in FINE_TUNINGS.items() for case in cases):
            state, records = fine_tuned(kind, case, team)
            save_file(state, folder / f"{kind} {case} {team.rank}.safetensors")
            (folder / f"{kind} {case}.json").write_text(json.dumps(records))


def test_a_batch_of_several_ranks_is_that_of_one(tmp_path):
    """Weights, BatchNorm statistics, momentum, accuracies and what weighs the loss, for all methods; and the
    ranks hold the same bits."""
    for ended in together(functools.partial(write_fine_tunings, tmp_path), 2, tmp_path):
        assert ended == (0, "", ""), ended
    for kind, case in ((kind, case) for kind, cases in FINE_TUNINGS.items() for case in cases):
        state, records = fine_tuned(kind, case, ranks.ALONE)
        files = [tmp_path / f"{kind} {case} {rank}.safetensors" for rank in range(2)]
        assert same_tensors(*files)
        found = load_file(files[0])
        assert found.keys() == state.keys()
        for name, each in state.items():
            torch.testing.assert_close(found[name], each, rtol=1e-6, atol=1e-6, msg=f"{kind} {case} {name}")
        there = json.loads((tmp_path / f"{kind} {case}.json").read_text())
        for one, other in zip(there, records, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-6), (kind, case)


def test_a_fine_tuning_by_ranks_stops_goes_on_and_is_tested(cifar, tmp_path):
    """The batch that a signal to one rank arrives in is the last for all; rank 0 tests at the end."""
    work = program("autolora", *cifar.flags(tmp_path / "run", "--rank_timeout", 100))
    stopped = signalled(work, step=2, number=signal.SIGTERM, of=1)
    first, other = together(stopped, 2, tmp_path / "stopped")
    assert first.code == 143 and "stopped after 0 epochs and 2 batches" in first.out, first
    assert other == (143, "", "")
    first, other = together(work, 2, tmp_path / "finished")
    assert first.code == 0 and "goes on after 0 epochs and 2 batches" in first.out, first
    assert other == (0, "", "")
    folder = tmp_path / "run" / "AFF"
    assert [note["epoch"] for note in about(folder / "last.safetensors")["history"]] == [1, 2]
    assert len(rows(folder / "test")) == 20


# The command


class Runs:
    """A run of three steps of two episodes at two levels, by one process or by several."""

    def __init__(self, world: World):
        self.world = world

    def flags(self, out: Path, *more) -> list:
        short = ("--epochs", 1, "--nEpisode", 6, "--nValEpisode", 1, "--statistics_episodes", 0)
        shared = ("--episodes_per_step", 2, "--levels_at_once", 1, "--rank_timeout", 100)
        return self.world.train(out, *short, *shared, "--attack_iters", 1, *more)


@pytest.fixture(scope="module")
def runs(world) -> Runs:
    return Runs(world)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> Path:
    """The folder of the run of one process."""
    out = tmp_path_factory.mktemp("whole")
    ended = command("main", *runs.flags(out))
    assert ended.code == 0, ended.err
    return out


def assert_same_run(found: Path, whole: Path) -> None:
    """Checkpoints, what they say of themselves, and what TensorBoard shows."""
    for name in ("last.safetensors", "best.safetensors"):
        assert same_tensors(found / name, whole / name)
        one, other = (about(folder / name) | {"command": ""} for folder in (found, whole))
        assert one == other
    one, other = (
        {name: values for name, values in scalars(folder).items() if "seconds" not in name}
        for folder in (found, whole)
    )
    assert one == other and "level1/total" in one and len(one["level1/total"]) == 3


def assert_told_once(ended: list[Ended], code: int, *words: str) -> None:
    """All ranks end with this code, and one of them says why, in one line."""
    assert [each.code for each in ended] == [code] * len(ended), ended
    lines = [line for each in ended for line in each.err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), ended
    assert not [each for each in ended if "Traceback" in each.err or "terminate" in each.err]


def test_a_run_that_ranks_began_and_a_signal_stopped_is_finished_by_one_process(runs, whole, tmp_path):
    """SIGTERM reaches one of three ranks, and all stop after the same step."""
    work = signalled(program(*runs.flags(tmp_path)), step=2, number=signal.SIGTERM, of=2)
    first, *others = together(work, 3, tmp_path / "printed")
    assert first.code == 143 and "stopped after 2 of 6 episodes; the same command continues" in first.out
    assert others == [(143, "", "")] * 2
    assert command("main", *runs.flags(tmp_path)).code == 0
    assert_same_run(tmp_path, whole)


def test_a_run_that_one_process_began_is_finished_by_ranks(runs, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 2, signal.SIGINT)
        assert command("main", *runs.flags(tmp_path)).code == 130
    first, other = together(program(*runs.flags(tmp_path)), 2, tmp_path / "printed")
    assert first.code == 0 and first.out.endswith(f"done: {tmp_path / 'last.safetensors'}\n"), first
    assert other == (0, "", "")
    assert_same_run(tmp_path, whole)


def test_a_rank_that_is_killed_ends_the_run_and_costs_no_more_than_a_step(runs, whole, tmp_path):
    flags = runs.flags(tmp_path, "--save_every_minutes", 1e-9)
    work = signalled(program(*flags), step=4, number=signal.SIGKILL, of=1)
    first, killed = together(work, 2, tmp_path / "printed")
    assert killed.code == -signal.SIGKILL
    kept = f"the last good state is kept in {tmp_path / 'last.safetensors'}"
    assert_told_once([first], 2, "another rank has ended", kept)
    assert about(tmp_path / "last.safetensors")["tuner"]["episodes_done"] == 2
    assert command("main", *flags).code == 0
    assert_same_run(tmp_path, whole)


def end(how: str) -> None:
    """Print what torch is told at a rank's end."""
    for module, name in ((dist, "destroy_process_group"), (distributed_c10d, "_abort_process_group")):
        told = getattr(module, name)
        setattr(module, name, lambda name=name, told=told, **how: (print(name, flush=True), told(**how))[1])
    meet = ranks._meet
    ranks._meet = lambda *given: meet(*given) or True  # as if NCCL connected them
    with contextlib.suppress(LostRank), ranks.together(100) as team:
        team.most(1)
        if how == "one fails" and not team.first:
            raise LostRank("gone")
        if how == "rank 0 goes on":
            team.leave()
            assert not dist.is_initialized()
        elif how == "one fails":
            team.most(1)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("all end", ["destroy_process_group\n"] * 2),
        ("rank 0 goes on", ["destroy_process_group\n", ""]),  # within `together` rank 0 alone prints
        ("one fails", ["_abort_process_group\n"] * 2),
    ],
)
def test_ranks_wait_for_each_other_at_their_end_but_not_for_one_that_failed(tmp_path, how, told):
    """By NCCL `destroy_process_group` waits for all that has begun, and so for ever where a rank is lost."""
    ended = together(functools.partial(end, how), 2, tmp_path)
    assert [each.out for each in ended] == told, ended


@pytest.mark.parametrize(
    ("others", "expected"), [("with a GPU of its own", ("cpu:gloo,cuda:nccl", [0])), ("", ("gloo", []))]
)
def test_nccl_connects_ranks_that_all_have_a_gpu_of_their_own(monkeypatch, others, expected):
    """Which may be the only one that a rank is shown: number 0 for all."""
    begun, chosen_devices = [], []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: begun.append(backend))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen_devices.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    store = dist.HashStore()
    store.set("here/1", others)
    assert ranks._meet(store, 0, 2, 10) is bool(others)
    assert (*begun, chosen_devices) == expected


def test_what_nccl_says_is_told(monkeypatch):
    """No rank has ended where two have one GPU, or no network joins them."""

    def fail(*_given, **_named):
        raise dist.DistBackendError(
            "NCCL error in: NCCLUtils.hpp:1\nncclInvalidUsage: This\nLast error:\nDuplicate GPU detected"
        )

    monkeypatch.setattr(dist, "all_reduce", fail)
    team = ranks.Ranks(0, 2, 10, by_nccl=True)
    fails("NCCL fails: Duplicate GPU detected; NCCL_DEBUG", lambda: team.most(1))


@pytest.mark.parametrize("call", ["all_reduce", "destroy_process_group"])
def test_who_waits_for_too_long_is_told_of_the_flag(monkeypatch, call):
    def late(*_given, **_named):
        raise dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL ran for 9999 ms")

    monkeypatch.setattr(dist, call, late)
    team = ranks.Ranks(0, 2, 10, by_nccl=True)
    part = (lambda: team.most(1)) if call == "all_reduce" else team.leave
    fails("another rank did not answer within 10 s; see --rank_timeout", part)


def test_the_statistics_of_a_batch_are_sent_to_no_gpu():
    """Each copy would wait for all that the device has to do, a hundred times a batch."""
    alone: Any = SimpleNamespace(total=lambda tensor: tensor)
    norm = torch.nn.BatchNorm2d(2)
    images = torch.rand(3, 2, 4, 4)
    expected = norm(images)
    with pretended() as seen:
        found = _WholeBatch(norm.forward, alone)._normalised(
            on_device(images), None, None, None, None, True, 0.1, norm.eps
        )
        assert seen.copies == seen.reads == 0
    torch.testing.assert_close(found.held, expected.detach())


def test_a_signal_that_torchrun_and_a_batch_system_both_send_is_one():
    with Interrupts(once=True) as interrupts:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert interrupts.caught == signal.SIGTERM


# Bad input


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--batch_size", 2), "3 ranks for --batch_size 2"),
        (("--eval_only",), "--eval_only"),
        (("--published", "--dualBN", 1), "--dualBN"),
    ],
)
def test_what_ranks_cannot_fine_tune_is_refused(cifar, tmp_path, monkeypatch, flags, word):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    ended = autolora(*cifar.flags(tmp_path / "out", *flags))
    assert ended.code == 2 and word in ended.err and not (tmp_path / "out").exists(), ended


def test_only_the_first_process_of_a_machine_tells_what_is_wrong_with_flags(runs, tmp_path, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    flags = runs.flags(tmp_path / "out", "--lr", "much")
    for local, said in (("0", "error: argument --lr"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local)
        ended = command("main", *flags)
        assert ended.code == 2 and ended.err.startswith(said) and bool(ended.err) == bool(said)


def test_ranks_without_anything_to_do_are_refused_before_work_starts(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for world, words in (("5", ["5 ranks for 2 levels x 2 episodes", "at most 4"]), ("two", ["0/two"])):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert_refused(command("main", *runs.flags(tmp_path / "out")), tmp_path / "out", *words)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "")  # as a job script leaves it whose own variable is not set
    assert_refused(command("main", *runs.flags(tmp_path / "out")), tmp_path / "out", "LOCAL_RANK is ''")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = runs.flags(tmp_path / "out", "--episodes_per_step", 4)
    words = ["--episodes_per_step 4", "6 episodes"]
    assert_refused(command("main", *flags), tmp_path / "out", *words)


def test_a_rank_that_cannot_reach_the_others_names_its_patience(runs, tmp_path):
    work = program(*runs.flags(tmp_path / "out", "--rank_timeout", 1))
    (alone,) = Running([work], tmp_path, world=2).ended()
    assert_told_once([alone], 2, "rank 0 of 2", "127.0.0.1", "1 s (--rank_timeout)")
    assert not (tmp_path / "out").exists()


def test_what_only_rank_0_finds_is_told_once(runs, tmp_path):
    with RunDirectory(tmp_path / "out", {"kind": "a meta-tuning", "settings": {}}, results=[]):
        ended = together(program(*runs.flags(tmp_path / "out")), 2, tmp_path / "printed")
    assert_told_once(ended, 2, "another process is writing here")


@pytest.mark.parametrize("what", ["settings", "data"])
def test_ranks_with_other_settings_or_data_are_refused(runs, tmp_path, what):
    flags = runs.flags(tmp_path / "out")
    other, words = [*flags, "--lr", 0.1], ["lr 0.1", "0.005"]
    if what == "data":
        write_source(tmp_path / "data" / "tiny", (6, 5, 5), 11)
        other, words = [*flags, "--data_path", tmp_path / "data"], ["first episode"]
    ended = Running([program(*flags), program(*other)], tmp_path).ended()
    assert_told_once(ended, 2, "rank 1", *words)
    assert not (tmp_path / "out").exists()
