"""Whether a GPU gives the numbers of the CPU, and what it makes of its time: a line and a verdict for each.

    python benchmarks/gpu_check.py                at most 8 minutes
    python benchmarks/gpu_check.py --device cpu   what can be run without a GPU

Weights are random, pictures are made, nothing is downloaded:

a  both programs against the CPU: logits, coefficients, every attack once, every precision of training
b  how often the CPU waits for the GPU in a step of training and in evaluation
c  a training step of four levels: milliseconds, kernels, idle time, share of a large product's speed
d  a training that was stopped goes on to the same bits
e  peak memory of a step beside what was calculated for it
f  images that are read in a second, beside those that a step takes

The exit code is 1 if a line is bad, else 0; a line that could not be run says why.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harness
import torch
from programs import OVER, Place, rows, run, stop, testing, training, weights
from safetensors.torch import load_file
from side_by_side import (
    RANK,
    Machine,
    counted,
    gemm_rate,
    random_backbone,
    random_episode,
    random_pool,
    synchronise,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from amt.attacks.kinds import Attack
from amt.attacks.levels import POOL_EPSILONS, Perturbation
from amt.cli import options
from amt.evaluation.evaluate import evaluate
from amt.files import checkpoint
from amt.files.pretrained import load_network
from amt.models.compiled import compiler_for
from amt.models.network import Network, find_device
from amt.models.precision import PRECISIONS, Arithmetic
from amt.models.weights import stream
from amt.tasks.classifier import fixed_predictor
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.cores import available_cores, default_workers
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, exit_on_bad_input, first_line, say
from meta_dataset_readers.mini.write import Settings, make_mini
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, episode_loader

GIB = 2**30
MOST_SECONDS = 8 * 60
LOGITS, COEFFICIENTS = 1e-4, 1e-3  # largest differences from the CPU
READS = 5  # of the CPU in a step of one level, at most: 2 reads and 3 copies
MEMORY_SLACK = 1.5  # of what was calculated: PyTorch's allocator keeps more than there is
ATTACKS = (
    *("pgd steps=5", "apgd steps=5", "fab steps=5", "square queries=20", "autoattack targets=1"),
    *("strong steps=5 queries=20", "pyramid steps=2", "transfer steps=2", "support steps=2"),
    "pgd norm=l2 epsilon=128 steps=2",
)
WAYS_OF_TUNING = {"loop": {"at_once": 1}, "batched": {}, "compiled": {"compiled": True}}
# GiB that were calculated for 5-way 5-shot, 50 query, one level: network, px, precision.
MEMORY = {("dino_small_patch16", 128, "float32"): 2.3, ("dino_small_patch16", 128, "bf16"): 1.3,
          ("dino_small_patch16", 224, "bf16"): 3.9}  # fmt: skip


class Line(NamedTuple):
    """A line of the table."""

    what: str
    found: str
    good: bool | None  # None: no verdict


# What the checks share


def ended(what: str, problem: str) -> Line:
    return Line(what, problem or "ran", None if problem == OVER else not problem)


def random_network(place: Place, arch: str, autocast: torch.dtype | None = None) -> Network:
    return random_backbone(arch, Machine(place.device, torch.get_num_threads(), autocast, 0))


def step_of(
    place: Place,
    precision: str,
    shape: tuple[str, int] | None = None,
    shots: int = 1,
    levels: int = 4,
    at_once: int | None = None,
    compiled: bool = False,
) -> tuple[Callable[[], object], Episode]:
    """A training step that can be repeated, and its 5-way episode.

    Args:
        shape: network and side in pixels; None for those of `place`.
        at_once: levels in one pass; None for all.
        compiled: whether as with --compile.
    """
    arch, side = shape or (place.arch, place.image_size)
    arithmetic = Arithmetic(precision)
    arithmetic.use()
    torch.manual_seed(0)
    compiler = compiler_for(torch.device(place.device)) if compiled else None
    network = random_network(place, arch, arithmetic.autocast)
    network = dataclasses.replace(network, image_size=side, compiler=compiler)
    pool = random_pool(network, levels, RANK, stream(0))
    alike = tuple(Perturbation(e, e / 4, steps=place.steps) for e in POOL_EPSILONS[:levels])
    episode = random_episode(side, shots, place.queries, stream(1)).to(place.device)
    tuner = Tuner(network, dataclasses.replace(pool, levels=alike), TuneSettings(), at_once)
    return partial(tuner.step, episode), episode


def milliseconds(place: Place, work: Callable[[], object], times: int = 3) -> float:
    """The median of some runs, after one to get warm."""
    taken = []
    for _ in range(times + 1):
        synchronise(place.device)
        began = time.perf_counter()
        work()
        synchronise(place.device)
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken[1:])


# a


def both_programs(place: Place) -> Iterator[Line]:
    """main.py and test_meta_dataset.py on the CPU and on the device."""
    problem = run(place, "main.py", *training(place, "trained", "cpu"))
    yield ended("main.py on the CPU", problem)
    if problem:
        return
    yield logits(place)
    for out, device, attacks in (("on_cpu", "cpu", ATTACKS[:1]), ("on_device", place.device, ATTACKS)):
        problem = run(place, "test_meta_dataset.py", *testing(place, out, device, attacks))
        yield ended(f"test_meta_dataset.py on {device}, {len(attacks)} attacks", problem)
        if problem:
            return
    yield coefficients(*(rows(place, out) for out in ("on_cpu", "on_device")))
    for precision in PRECISIONS:
        words = [*training(place, precision, place.device), "--precision", precision]
        yield ended(f"main.py --precision {precision}", run(place, "main.py", *words))


def logits(place: Place) -> Line:
    """The largest difference of logits under an even merge of the pool."""
    pool = checkpoint.load(place.folder / "trained" / "last.safetensors").pool
    even = [1 / len(pool)] * len(pool)
    Arithmetic().use()
    episode = random_episode(32, 5, 10, stream(2))
    found = []
    for device in ("cpu", place.device):
        network = load_network("vit_mini", weights(place), torch.device(device))
        there = episode.to(device)
        classifier = fixed_predictor(network, pool.to(network.device).merged(even))(there)
        with torch.no_grad():
            found.append(classifier.logits(there.query).cpu())
    difference = float((found[0] - found[1]).abs().max())
    return Line("logits against the CPU", f"{difference:.1e}, at most {LOGITS:g}", difference <= LOGITS)


def coefficients(ours: Sequence[dict], theirs: Sequence[dict]) -> Line:
    """The largest difference of the merging coefficients of two evaluations of the same episodes."""
    one, other = (torch.tensor([row["coefficients"] for row in each]) for each in (ours, theirs))
    difference = float((one - other).abs().max())
    text = f"{difference:.1e}, at most {COEFFICIENTS:g}"
    return Line("coefficients against the CPU", text, difference <= COEFFICIENTS)


# b


def stalls_of(work: Callable[[], object]) -> int:
    """How often the CPU waits for the GPU."""
    work()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in told)


def stalls(place: Place) -> Iterator[Line]:
    """A step of training, and PGD-20 on an episode beyond the clean pass."""
    step, episode = step_of(place, "float32")
    found, most = stalls_of(step), 4 * READS
    yield Line("stalls in a step of four levels", f"{found}, at most {most}", found <= most)
    network = random_network(place, place.arch)
    predict = fixed_predictor(network, random_pool(network, 1, RANK, stream(0)).merged([1.0]))
    clean, attacked = (
        stalls_of(lambda attacks=attacks: next(evaluate(predict, [episode], attacks)))
        for attacks in ([], [Attack("pgd", (1e-6,), steps=20, step_size=0.0)])
    )
    text = f"{attacked - clean} beyond {clean} of the clean pass, at most 20"
    yield Line("stalls of PGD-20 in evaluation", text, attacked - clean <= 20)


# c


def speed(place: Place) -> Iterator[Line]:
    """A training step in every precision and way of tuning."""
    for precision in ("float32", "tf32", "bf16"):
        Arithmetic(precision).use()
        side = 8192 if place.on_gpu else 512
        rate = gemm_rate(Machine(place.device, 1, Arithmetic(precision).autocast, side))
        operations = counted(step_of(place, precision)[0]).flops
        for name, way in WAYS_OF_TUNING.items():
            if name == "compiled" and not place.on_gpu:  # which takes a CPU longer than all the rest
                continue
            step, _ = step_of(place, precision, **way)
            taken = milliseconds(place, step)
            share = operations / rate / taken * 1000
            found = f"{harness.digits(taken)} ms, {100 * share:.0f}% of a product's speed"
            if place.on_gpu:
                launches, busy = kernels(step)
                found += f", {launches} kernels, {100 * max(0.0, 1 - busy / taken):.0f}% idle"
            yield Line(f"step of {place.arch}, {place.image_size} px, {precision}, {name}", found, None)


def kernels(work: Callable[[], object]) -> tuple[int, float]:
    """How many kernels a piece of work starts, and the milliseconds that they take."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    on_gpu = (event for event in seen.events() if event.device_type == DeviceType.CUDA)
    found = [event for event in on_gpu if not event.is_user_annotation]
    return len(found), sum(event.time_range.elapsed_us() for event in found) / 1000


# d


def resuming(place: Place) -> Iterator[Line]:
    """A training that SIGTERM stops in the middle, and the same command again."""
    episodes = 6
    whole, stopped = (
        [*training(place, name, place.device, episodes), "--deterministic"] for name in ("whole", "stopped")
    )
    problem = run(place, "main.py", *whole) or stop(place, "main.py", *stopped)
    problem = problem or run(place, "main.py", *stopped)
    if problem:
        yield ended("stopped and continued", problem)
        return
    one, other = (load_file(place.folder / name / "last.safetensors") for name in ("whole", "stopped"))
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    found = f"{len(differing)} of {len(one)} tensors differ"
    yield Line("stopped and continued, --deterministic", found, not differing)


# e


def memory(place: Place) -> Iterator[Line]:
    """The peak of a step of one level, 5-way 5-shot and 50 query."""
    for (arch, side, precision), expected in MEMORY.items():
        step, _ = step_of(dataclasses.replace(place, steps=1), precision, (arch, side), shots=5, levels=1)
        torch.cuda.reset_peak_memory_stats(place.device)
        before = torch.cuda.memory_allocated(place.device)
        step()
        found = (torch.cuda.max_memory_allocated(place.device) - before) / GIB
        text = f"{found:.2f} GiB, calculated {expected:g}"
        yield Line(f"memory of {arch}, {side} px, {precision}", text, found <= MEMORY_SLACK * expected)


# f


def reading(place: Place) -> Iterator[Line]:
    """Images in a second, read onto the device and consumed by a step."""
    sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=10)
    count, workers = 40, default_workers()
    reader = EpisodeReader(
        place.data, place.source, "TRAIN", sampling, place.image_size, n_episodes=count, augment=True
    )
    loader = iter(episode_loader(reader, workers, place.device))
    next(loader)  # by now the processes are there
    began = time.perf_counter()
    images = sum(len(each.support) + len(each.query) for each in loader)
    synchronise(place.device)
    read = images / (time.perf_counter() - began)
    text = f"{read:.0f} images/s, {workers} workers, {available_cores()} cores"
    if not place.on_gpu:
        yield Line(f"reading at {place.image_size} px", text, None)
        return
    step, episode = step_of(place, "bf16")
    taken = (len(episode.support) + len(episode.query)) / milliseconds(place, step) * 1000
    text += f"; a step of four levels in bf16 takes {taken:.0f}"
    yield Line(f"reading at {place.image_size} px", text, read >= taken)


# The table


class Check(NamedTuple):
    name: str
    lines: Callable[[Place], Iterator[Line]]
    needs_gpu: bool


CHECKS = (
    Check("a", both_programs, False),
    Check("b", stalls, True),
    Check("c", speed, True),
    Check("d", resuming, False),
    Check("e", memory, True),
    Check("f", reading, False),
)


def checked(place: Place, checks: Sequence[Check] = CHECKS) -> Iterator[tuple[str, Line]]:
    """The lines of all checks by their letter; what cannot be run, or goes on no longer, says so."""
    for check in checks:
        if check.needs_gpu and not place.on_gpu:
            yield check.name, Line(check.lines.__name__, "not run: no GPU", None)
        elif time.monotonic() > place.end:
            yield check.name, Line(check.lines.__name__, "not run: the time is over", None)
        else:
            try:
                for line in check.lines(place):
                    yield check.name, line
                    if time.monotonic() > place.end:  # programs that torch.compile makes take minutes
                        yield check.name, Line(check.lines.__name__, "broken off: the time is over", None)
                        break
            except (InputError, RuntimeError) as error:  # such as no Triton, or no memory left
                yield check.name, Line(check.lines.__name__, f"ended by: {first_line(error)}", False)


def table(lines: Iterator[tuple[str, Line]]) -> int:
    """Print the table as it comes; the exit code."""
    say("| | check | found | verdict |", "| --- | --- | --- | --- |")
    bad = 0
    for name, line in lines:
        verdict = {True: "good", False: "BAD", None: "-"}[line.good]
        say(f"| {name} | {line.what} | {line.found} | {verdict} |")
        bad += line.good is False
    say("", f"{bad} lines are bad" if bad else "nothing is bad")
    return 1 if bad else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("Check a GPU against the CPU, and time it; at most 8 minutes.", "gpu_check.py")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, or cpu for what needs no GPU")
    return parser.parse(argv)


def main() -> int:
    """Make the data, run the checks, print the table."""
    end = time.monotonic() + MOST_SECONDS
    device = str(find_device(parse(sys.argv[1:]).device))
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    about = {**harness.machine(), "device": name, "torch": torch.__version__}
    say(", ".join(f"{key} {value}" for key, value in about.items()), "")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        make_mini(data, settings=Settings(0, 12), sources=["mini_objects"])
        return table(checked(Place(device, Path(folder), data, "mini_objects", end=end)))


if __name__ == "__main__":
    exit_on_bad_input(main)
