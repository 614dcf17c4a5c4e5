"""benchmarks/gpu_check.py at toy size on the CPU: it runs what it says, and a bad figure is called bad."""

import json
import signal
import sys
import warnings

import gpu_check as check
import pytest
import torch
from commands import called
from toy_training import World, command, signal_after

from amt.attacks.kinds import KINDS
from amt.cli import options
from amt.models.architectures import ARCHS, Arch
from amt.models.precision import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread")
ATTACKS = ("pgd steps=1 loss=ce", "support steps=1")
EVERY_ATTACK, EVERY_PRECISION = check.ATTACKS, check.PRECISIONS


@pytest.fixture
def place(world: World, tmp_path, monkeypatch):
    """A toy of a place; its programs run in this process."""

    def run(_place, script: str, *words) -> str:
        done = command(script.removesuffix(".py"), *words)
        return f"exit code {done.code}: {done.err}" if done.code else ""

    def once(_place, work) -> float:
        work()
        return 1.0

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "milliseconds", once)
    monkeypatch.setattr(check, "ATTACKS", ATTACKS)
    monkeypatch.setattr(check, "PRECISIONS", ("tf32", "bf16"))
    yield check.Place("cpu", tmp_path, world.data, "tiny", arch="vit_mini", image_size=32, steps=1, queries=1)
    check.Arithmetic().use()


@pytest.fixture
def small(monkeypatch):
    """A network for what runs in this process alone."""
    monkeypatch.setitem(ARCHS, "vit_mini", Arch(4, 24, 2, 2, pretrained_size=16, image_size=32))


def test_both_programs_run_and_are_compared(place):
    lines = list(check.both_programs(place))
    assert [line.what for line in lines] == [
        "main.py on the CPU",
        "logits against the CPU",
        "test_meta_dataset.py on cpu, 1 attacks",
        "test_meta_dataset.py on cpu, 2 attacks",
        "coefficients against the CPU",
        "main.py --precision tf32",
        "main.py --precision bf16",
    ]
    assert all(line.good for line in lines), lines
    assert "0.0e+00" in lines[1].found and "0.0e+00" in lines[4].found
    assert (place.folder / "bf16" / "last.safetensors").exists()
    columns = json.loads((place.folder / "on_device" / "results.json").read_text())["columns"]
    assert columns[:3] == ["clean", "pgd1@8", "support-pgd1@8"]


def test_every_attack_and_every_precision_is_tried(place):
    """And the command understands all of it at once."""
    assert {attack.split()[0] for attack in EVERY_ATTACK} == set(KINDS)
    words = check.testing(place, "out", "cpu", EVERY_ATTACK)
    args = options.testing_parser().parse([str(word) for word in words])
    assert len(options.attacks(args)) == len(EVERY_ATTACK)
    assert set(EVERY_PRECISION) == set(PRECISIONS)


def test_a_program_that_fails_is_bad(place):
    missing = check.dataclasses.replace(place, source="absent")
    (line,) = check.both_programs(missing)
    assert line.good is False and "absent" in line.found


def test_a_program_that_is_cut_short_has_no_verdict(place, monkeypatch):
    monkeypatch.undo()
    late = check.dataclasses.replace(place, end=0.0)
    problem = check.run(late, "main.py", "--help")
    assert check.ended("help", problem) == check.Line("help", check.OVER, None)


def test_other_logits_and_coefficients_are_bad(place, monkeypatch):
    assert check.run(place, "main.py", *check.training(place, "trained", "cpu")) == ""
    load, scales = check.load_network, iter((1.0, 1.01))

    def another(*given):
        network = load(*given)
        (bias,) = (p for name, p in network.module.named_parameters() if name == "norm.bias")
        bias += next(scales) - 1
        return network

    monkeypatch.setattr(check, "load_network", another)
    assert check.logits(place).good is True  # the pool has the weights, the network only the structure
    rows = [{"coefficients": [0.5, 0.5]}]
    assert check.coefficients(rows, rows).good
    assert not check.coefficients(rows, [{"coefficients": [0.502, 0.498]}]).good


PROGRAM = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
sys.stderr.write("meta-tuning: 1/6 [00:01]")
sys.stderr.flush()
signal.pause()
"""


def test_a_program_is_stopped_as_soon_as_a_step_is_done(place, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    assert check.stop(place, tmp_path / "program.py", 143) == ""
    assert check.stop(place, tmp_path / "program.py", 0) == "exit code 0 after SIGTERM, expected 143"
    (tmp_path / "program.py").write_text("")
    assert check.stop(place, tmp_path / "program.py") == "it ended before the signal"


def test_a_stopped_training_is_continued_and_compared(place, monkeypatch):
    def stop(place, script, *words) -> str:
        with pytest.MonkeyPatch.context() as patch:
            signal_after(patch, 1, signal.SIGTERM)
            return "" if command(script.removesuffix(".py"), *words).code == 143 else "it was not stopped"

    monkeypatch.setattr(check, "stop", stop)
    (line,) = check.resuming(place)
    assert line.good is True and line.found.startswith("0 of "), line
    assert json.loads((place.folder / "stopped" / "run.json").read_text())["arithmetic"][0]["deterministic"]
    loaded = check.load_file
    monkeypatch.setattr(
        check,
        "load_file",
        lambda file: {n: t + (file.parent.name == "whole") for n, t in loaded(file).items()},
    )
    monkeypatch.setattr(check, "stop", lambda *_: "")
    (line,) = check.resuming(place)
    assert line.good is False


def test_a_step_is_timed_in_every_precision_and_way(place, small):
    found = [line.what for line in check.speed(place)]
    assert found == [
        f"step of vit_mini, 32 px, {precision}, {way}"
        for precision in ("float32", "tf32", "bf16")
        for way in ("loop", "batched")
    ]


def test_reading_is_measured(place):
    (line,) = check.reading(place)
    assert line.good is None and float(line.found.split()[0]) > 0


def test_stalls_are_those_that_torch_warns_of(monkeypatch):
    modes, runs = [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work():
        runs.append(True)
        for line in (
            "called a synchronizing CUDA operation",
            "called a synchronizing CUDA operation",
            "other",
        ):
            warnings.warn(line, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check.stalls_of(work) == 2
    assert modes == ["warn", "default"] and len(runs) == 2


@pytest.mark.parametrize(("stalls", "good"), [(20, [True, True]), (21, [False, False])])
def test_more_stalls_than_there_may_be_are_bad(place, small, stalls, good, monkeypatch):
    """In a step of four levels, and of PGD beyond the clean pass, whose 3 do not count."""

    def counted(work):
        work()
        called_for.append(work)
        return (stalls, 3, stalls + 3)[len(called_for) - 1]

    called_for = []
    monkeypatch.setattr(check, "stalls_of", counted)
    lines = list(check.stalls(place))
    assert [line.good for line in lines] == good


@pytest.mark.parametrize(("peak", "good"), [(1.0, True), (9.0, False)])
def test_more_memory_than_was_calculated_is_bad(place, small, peak, good, monkeypatch):
    monkeypatch.setattr(check, "MEMORY", {("vit_mini", 32, "bf16"): 2.0})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak * check.GIB)
    (line,) = check.memory(place)
    assert line.good is good and line.what == "memory of vit_mini, 32 px, bf16"


def test_the_table_says_what_was_not_run_and_fails_for_a_bad_line(place):
    def bad(_place):
        yield check.Line("figure", "9", False)

    checks = [check.Check("a", bad, False), check.Check("b", bad, True)]
    shown = called(lambda: check.table(check.checked(place, checks)), ["gpu_check.py"])
    assert shown.code == 1 and "| a | figure | 9 | BAD |" in shown.out and "1 lines are bad" in shown.out
    assert "| b | bad | not run: no GPU | - |" in shown.out
    late = check.dataclasses.replace(place, end=0.0)
    shown = called(lambda: check.table(check.checked(late, checks)), ["gpu_check.py"])
    assert shown.code == 0 and "not run: the time is over" in shown.out and "nothing is bad" in shown.out


def test_a_check_that_goes_on_for_too_long_is_broken_off(place, monkeypatch):
    def long(_place):
        for figure in ("9", "8", "7"):
            passed.append(figure)
            yield check.Line("figure", figure, None)

    passed = []
    monkeypatch.setattr(check.time, "monotonic", lambda: float(len(passed)))
    timed = check.dataclasses.replace(place, end=1.0)
    lines = list(check.checked(timed, [check.Check("c", long, False), check.Check("d", long, False)]))
    assert [line.found for _, line in lines] == [
        *("9", "8", "broken off: the time is over"),
        "not run: the time is over",
    ]


def test_a_check_that_breaks_off_is_a_bad_line_and_the_others_run(place):
    def broken(_place):
        yield check.Line("figure", "9", None)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def sound(_place):
        yield check.Line("another", "8", True)

    lines = list(check.checked(place, [check.Check("a", broken, False), check.Check("b", sound, False)]))
    assert [(name, line.what, line.good) for name, line in lines] == [
        ("a", "figure", None),
        ("a", "broken", False),
        ("b", "another", True),
    ]
    assert lines[1][1].found == "ended by: OutOfMemoryError: CUDA out of memory."


def test_without_a_gpu_the_table_names_what_was_left_out(monkeypatch):
    """The rest is run on pictures that are made; here on none."""
    made, of_gpu = [], [each for each in check.CHECKS if each.needs_gpu]
    monkeypatch.setattr(check, "make_mini", lambda out, **settings: made.append(settings["sources"]))
    checked = check.checked
    monkeypatch.setattr(check, "checked", lambda place: checked(place, of_gpu))
    ended = called(check.main, ["gpu_check.py", "--device", "cpu"])
    assert ended.code == 0 and made == [["mini_objects"]]
    assert [line.split(" | ")[0] for line in ended.out.splitlines() if "not run: no GPU" in line] == [
        "| b",
        "| c",
        "| e",
    ]


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cuda:77"])
    ended = called(check.main, ["gpu_check.py", "--device", "cuda:77"])
    assert ended.code == 2 and "cuda:77" in ended.err
