"""Time, memory and arithmetic of meta-tuning and of evaluation, side by side with a straightforward baseline.

    python benchmarks/meta_tuning.py                  vit_mini and a ViT-S/16 at 128 px, minutes
    python benchmarks/meta_tuning.py --quick          a few seconds, to see that it works

Weights are random: no figure here depends on their values. Each row is one job: a training step of one
robustness level, or an evaluation episode, that is scoring the pool on the augmented support, merging and
classifying the query, with or without PGD on the query. The attack of that last row is sized so that it
fools nobody (epsilon 0): every image is then worked on at every step, which is the longest it can take.

Ours and the baseline (`baseline.py`: the same mathematics, differently arranged) each run in a fresh
process of their own, warm up on a single attack step, and then take turns. A time is the median of the runs,
with their least and greatest; a ratio is that of the medians, with the least and greatest of the turns.
Reading images is no part of it. Peak memory is the resident set of that process, libraries and weights
included, or what torch allocated on a GPU.

The GEMM share is the time that the counted multiplications (linear layers, attention, convolution, forward
and backward) would take at the rate of one large square matrix product in the same process, over the time
measured. In mixed precision that rate is the low precision's, although routing stays in float32.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import harness
import timm
import torch
import torch.nn.functional as F
from baseline import Learner, Network, evaluate_episode, training_step
from harness import MIB, digits, peak_resident, spread
from timm.layers import PatchEmbed
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from amt import options
from amt.backbone import ARCHS, Backbone, base_arch, build_network, find_device
from amt.evaluate import PGD, evaluate, merged_predictor
from amt.lora import LoRAPool, adapted_layers
from amt.merge import Routing, route
from amt.meta_tune import Tuner, TuneSettings, stream
from amt.perturb import Perturbation, pyramid_start
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, exit_on_bad_input

IMPLEMENTATIONS = ("ours", "baseline")
N_WAY = 5
RANK = 8
POOL = 4
LEVEL = Perturbation(epsilon=8, step_size=2, gamma=0.005)
ROUTING = Routing(augment_probability=1.0)
SETTINGS = TuneSettings(epochs=30, episodes_per_epoch=2000)

ROW_SECONDS = 15  # repeat a row about that long, unless --repeats says how often
MOST_REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the table.

    Args:
        arch: name in `ARCHS`.
        job: "step" of training, or "episode" of evaluation.
        n_shot, per_class: support and query images of each of the five classes.
        steps: of the training attack, or of PGD; 0 for an episode without attack.
    """

    arch: str
    job: str
    n_shot: int
    per_class: int
    steps: int

    @property
    def name(self) -> str:
        attack = f", PGD-{self.steps}" if self.job == "episode" and self.steps else ""
        return f"{self.job}, {N_WAY}-way {self.n_shot}-shot, {N_WAY * self.per_class} query{attack}"

    @property
    def least_repeats(self) -> int:
        return 2 if self.job == "step" else 1

    def passes(self, implementation: str) -> int:
        """About how many forward passes of one image it is worth; only the forecast of the time uses it."""
        support, query = N_WAY * self.n_shot, N_WAY * self.per_class
        if self.job == "step":
            per_attack_step = 2 if implementation == "ours" else 3
            return 3 * support + query * (per_attack_step * self.steps + 12)
        return (2 * POOL + 1) * support + query * (2 * self.steps + 2)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how the networks run; `gemm_side` is that of the square matrices of the yardstick."""

    device: str
    threads: int
    autocast: torch.dtype | None
    gemm_side: int

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or torch.float32


class Counts(NamedTuple):
    """What one run takes: floating-point operations of its matrix products, and images put through the
    network."""

    flops: float
    images: float


class Measured(NamedTuple):
    """One implementation's side of a row. Memory is in MiB: resident on a CPU, allocated on a GPU."""

    seconds: list[float]
    counts: Counts
    peak_memory: float
    idle_memory: float  # the peak before the first run: interpreter, libraries, weights
    gemm_rate: float  # floating-point operations per second
    accuracy: float | None  # an episode's last figure

    @property
    def gemm_share(self) -> float:
        return self.counts.flops / self.gemm_rate / statistics.median(self.seconds)


Bind = Callable[[Episode, int], Callable[[], float | None]]


def our_step(backbone: Backbone, pool: LoRAPool) -> Bind:
    def bind(episode: Episode, steps: int) -> Callable[[], None]:
        level = dataclasses.replace(LEVEL, steps=steps)
        tuner = Tuner(backbone, dataclasses.replace(pool, levels=(level,)), SETTINGS)

        def run() -> None:
            tuner.step(episode)

        return run

    return bind


def baseline_step(backbone: Backbone, pool: LoRAPool) -> Bind:
    model = Learner(backbone, pool)
    optimiser = torch.optim.SGD(model.trained.values(), SETTINGS.lr, SETTINGS.momentum)
    scaler = torch.amp.GradScaler(backbone.device.type, enabled=backbone.autocast == torch.float16)

    def bind(episode: Episode, steps: int) -> Callable[[], None]:
        level = dataclasses.replace(LEVEL, steps=steps)

        def run() -> None:
            start = pyramid_start(episode.query, level, stream(SETTINGS.seed))
            training_step(model, optimiser, scaler, episode, level, start)

        return run

    return bind


def our_episode(backbone: Backbone, pool: LoRAPool) -> Bind:
    def choose(support: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[float, ...]:
        return route(backbone, pool, support, labels, generator, ROUTING)

    predict = merged_predictor(backbone, pool, choose)

    def bind(episode: Episode, steps: int) -> Callable[[], float]:
        attacks = [harmless(steps)] if steps else []

        def run() -> float:
            row = next(evaluate(predict, [episode], attacks))
            return row[attacks[0].name] if attacks else row["clean"]

        return run

    return bind


def baseline_episode(backbone: Backbone, pool: LoRAPool) -> Bind:
    model = Network(backbone)

    def bind(episode: Episode, steps: int) -> Callable[[], float]:
        attack = harmless(steps) if steps else None

        def run() -> float:
            return evaluate_episode(model, pool, episode, ROUTING, stream(1), attack, stream(2)).accuracy

        return run

    return bind


def harmless(steps: int) -> PGD:
    """PGD that moves nothing, so that no image drops out before the last step."""
    return PGD(epsilon=0, step_size=0, steps=steps)


JOBS = {
    ("ours", "step"): our_step,
    ("baseline", "step"): baseline_step,
    ("ours", "episode"): our_episode,
    ("baseline", "episode"): baseline_episode,
}


def random_backbone(arch: str, machine: Machine) -> Backbone:
    shape = ARCHS[arch]
    network = build_network(shape).to(machine.device)
    return Backbone(arch, network, shape.image_size, shape.mean, shape.std, machine.autocast)


def random_pool(backbone: Backbone, size: int, rank: int, generator: torch.Generator) -> LoRAPool:
    """A pool of unlike adapters; spares the singular value decompositions of a real start."""
    weights = backbone.weights
    residual, A, B = dict(weights), {}, {}
    for name in adapted_layers(weights):
        rows, columns = weights[name].shape
        groups = 3 if name.endswith("qkv.weight") else 1
        A[name] = 0.05 * torch.randn(size, groups, rank, columns, generator=generator).to(weights[name])
        B[name] = 0.05 * torch.randn(size, groups, rows // groups, rank, generator=generator).to(A[name])
        residual[name] = weights[name].clone()  # a real residual is no view of the network, either
    head = A[name].new_ones(size)
    return LoRAPool(residual, A, B, 10 * head, 0 * head, (LEVEL,) * size)


def random_episode(image_size: int, n_shot: int, per_class: int, generator: torch.Generator) -> Episode:
    """Classes of coarse random pictures, their images alike but for a little noise, so that even a random
    network tells them apart."""
    pictures = F.interpolate(torch.rand(N_WAY, 3, 4, 4, generator=generator), image_size)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(N_WAY).repeat_interleave(count)
        noise = torch.rand(len(labels), *pictures.shape[1:], generator=generator)
        return 0.95 * pictures[labels] + 0.05 * noise, labels

    return Episode(*draw(n_shot), *draw(per_class))


class Bench:
    """One implementation of one workload, in a process of its own."""

    def __init__(self, workload: Workload, implementation: str, machine: Machine):
        torch.manual_seed(0)
        torch.set_num_threads(machine.threads)
        self.workload, self.machine, self._name = workload, machine, implementation
        backbone = random_backbone(workload.arch, machine)
        pool = random_pool(backbone, 1 if workload.job == "step" else POOL, RANK, stream(0))
        self._bind = JOBS[implementation, workload.job](backbone, pool)
        self._run = self._bound(workload.per_class, workload.steps)
        self.idle_memory = peak_memory(machine.device)

    def _bound(self, per_class: int, steps: int) -> Callable[[], float | None]:
        side = ARCHS[self.workload.arch].image_size
        episode = random_episode(side, self.workload.n_shot, per_class, stream(3))
        return self._bind(episode.to(self.machine.device), steps)

    def count(self) -> Counts:
        """What the job counts, from smaller jobs: besides a fixed part there is one in proportion to the
        query images, and one in proportion to these times the attack steps. Counting costs memory, so a
        process that counts is not one whose memory is told."""
        per_class, steps = self.workload.per_class, self.workload.steps
        few = min(steps, 1)
        small, wider = (counted(self._bound(width, few)) for width in (1, 2))
        longer = counted(self._bound(1, 2)) if steps > 1 else small
        return Counts(
            *(
                s + (per_class - 1) * (w - s) + per_class * (steps - few) * (n - s)
                for s, w, n in zip(small, wider, longer, strict=True)
            )
        )

    def warm_up(self) -> float:
        """Run once at full size, but with one attack step; about how many seconds the job will take."""
        brief = dataclasses.replace(self.workload, steps=min(self.workload.steps, 1))
        run = self._bound(brief.per_class, brief.steps)
        began = time.perf_counter()
        run()
        return self._since(began) * self.workload.passes(self._name) / brief.passes(self._name)

    def run(self) -> tuple[float, float | None]:
        """Seconds of one run, and its accuracy if it has one."""
        began = time.perf_counter()
        accuracy = self._run()
        return self._since(began), accuracy

    def finish(self) -> tuple[float, float, float]:
        """Peak and idle memory, then the rate of the yardstick: last, since its matrices take memory, too."""
        peak = peak_memory(self.machine.device)
        return peak, self.idle_memory, gemm_rate(self.machine)

    def _since(self, began: float) -> float:
        synchronise(self.machine.device)
        return time.perf_counter() - began


def counted(run: Callable[[], object]) -> Counts:
    """What `run` counts, by running it."""
    images = 0

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal images
        if isinstance(module, PatchEmbed):
            images += len(inputs[0])

    hook = register_module_forward_pre_hook(look)
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        hook.remove()
    return Counts(counter.get_total_flops(), images)


def peak_memory(device: str) -> float:
    """Greatest use by this process so far, in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / MIB
    return peak_resident()


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def gemm_rate(machine: Machine) -> float:
    """Floating-point operations per second of a large square matrix product, best of five."""
    side = machine.gemm_side
    left, right = (torch.randn(side, side, device=machine.device).to(machine.dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronise(machine.device)
        began = time.perf_counter()
        left @ right
        synchronise(machine.device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])


def probe(pipe, machine: Machine) -> None:
    """Answer with the device's name and the rate of the yardstick, or with the `InputError` of a device that
    is not there."""
    try:
        find_device(machine.device)
    except InputError as error:
        pipe.send(error)
    else:
        torch.set_num_threads(machine.threads)
        on_gpu = machine.device.startswith("cuda")
        name = torch.cuda.get_device_name(machine.device) if on_gpu else "cpu"
        pipe.send((name, gemm_rate(machine)))


def serve(pipe, workload: Workload, implementation: str, machine: Machine) -> None:
    """A worker's life: answer each order, the name of a `Bench` method, with what that method returns."""
    bench = Bench(workload, implementation, machine)
    while True:
        pipe.send(getattr(bench, pipe.recv())())


class Worker:
    """A fresh process at the other end of a pipe; use as a context.

    It is forked, which spares it the import of torch. That is safe as long as the parent computes nothing:
    neither threads of OpenMP nor a GPU would survive.
    """

    def __init__(self, target: Callable[..., None], *arguments):
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def answer(self):
        """What the process sends next."""
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker died, exit code {self._process.exitcode}") from None

    def ask(self, order: str):
        self._pipe.send(order)
        return self.answer()


def measure(
    workload: Workload, machine: Machine, repeats: int | None, say: Callable[[str], None]
) -> dict[str, Measured]:
    """One row: count, warm both implementations up, then let them take turns."""
    counts = {}
    for name in IMPLEMENTATIONS:
        with Worker(serve, workload, name, machine) as counter:
            counts[name] = counter.ask("count")
    with (
        Worker(serve, workload, "ours", machine) as ours,
        Worker(serve, workload, "baseline", machine) as baseline,
    ):
        workers = dict(zip(IMPLEMENTATIONS, (ours, baseline), strict=True))
        turn = sum(worker.ask("warm_up") for worker in workers.values())
        say(f"counted and warm; a turn takes about {digits(turn)} s")
        runs = {name: [] for name in workers}

        def take_turns(numbers: range) -> None:
            for number in numbers:
                for name in IMPLEMENTATIONS if number % 2 == 0 else IMPLEMENTATIONS[::-1]:
                    time.sleep(0.05)  # idle threads of the other process stop spinning
                    runs[name].append(workers[name].ask("run"))

        take_turns(range(1))
        first = sum(runs[name][0][0] for name in workers)
        take_turns(range(1, planned_repeats(workload, first, repeats)))
        return {
            name: Measured(
                [seconds for seconds, _ in runs[name]],
                counts[name],
                *worker.ask("finish"),
                accuracy=runs[name][-1][1],
            )
            for name, worker in workers.items()
        }


def planned_repeats(workload: Workload, turn: float, asked: int | None) -> int:
    """How many turns of `turn` seconds a row gets."""
    return asked or max(workload.least_repeats, min(MOST_REPEATS, math.ceil(ROW_SECONDS / max(turn, 1e-3))))


class Forecast:
    """What is left to do, in seconds: from the rows of the same network that were timed, or before there is
    one, as if the network ran at half the machine's GEMM rate."""

    def __init__(self, plan: list[Workload], repeats: int | None, rate: float):
        self._left, self._repeats, self._rate = list(plan), repeats, rate
        self._timed: dict[str, tuple[float, float]] = {}  # passes and seconds, by network

    def timed(self, workload: Workload, row: dict[str, Measured]) -> None:
        """Take note of a row that is done."""
        self._left.remove(workload)
        passes, seconds = self._timed.get(workload.arch, (0.0, 0.0))
        for name, measured in row.items():
            passes += workload.passes(name)
            seconds += statistics.median(measured.seconds)
        self._timed[workload.arch] = passes, seconds

    def __str__(self) -> str:
        seconds = sum(self._seconds(workload) for workload in self._left)
        return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"

    def _seconds(self, workload: Workload) -> float:
        if workload.arch in self._timed:
            passes, seconds = self._timed[workload.arch]
            per_pass = seconds / passes
        else:
            shape = ARCHS[workload.arch]
            tokens = (shape.image_size // shape.patch_size) ** 2 + 1
            parameters = shape.depth * shape.dim**2 * (4 + 2 * shape.mlp_ratio)
            per_pass = 2 * tokens * parameters / (self._rate / 2)

        def cost(workload: Workload) -> float:
            return per_pass * sum(workload.passes(name) for name in IMPLEMENTATIONS)

        warm_up = cost(dataclasses.replace(workload, steps=min(workload.steps, 1)))
        turn = cost(workload)
        return 1 + 1.5 * warm_up + turn * planned_repeats(workload, turn, self._repeats)


HEADING = (
    "| job | ours, s | baseline, s | baseline / ours | GEMM share | peak MiB | turns |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def table_row(workload: Workload, row: dict[str, Measured]) -> str:
    """A line under `HEADING`; where a cell holds two figures, ours comes first."""
    ours, baseline = row["ours"], row["baseline"]
    ratio = statistics.median(baseline.seconds) / statistics.median(ours.seconds)
    turns = [b / a for a, b in zip(ours.seconds, baseline.seconds, strict=True)]
    name = workload.name
    if workload.job == "episode" and workload.steps and ours.accuracy < 1:
        name += f", of which {100 * ours.accuracy:.0f}% to the end"
    cells = (
        name,
        spread(ours.seconds),
        spread(baseline.seconds),
        f"{ratio:.2f} ({min(turns):.2f}-{max(turns):.2f})",
        f"{100 * ours.gemm_share:.0f}% / {100 * baseline.gemm_share:.0f}%",
        f"{ours.peak_memory:.0f} / {baseline.peak_memory:.0f}",
        str(len(ours.seconds)),
    )
    return f"| {' | '.join(cells)} |"


def query_forwards(workload: Workload, counts: Counts) -> float:
    """How often a training step puts the whole query set through the network."""
    return (counts.images - N_WAY * workload.n_shot) / (N_WAY * workload.per_class)


def footnotes(workload: Workload, row: dict[str, Measured]) -> str:
    """The counts of a training step, and what memory begins with."""
    ours, baseline = (query_forwards(workload, row[name].counts) for name in IMPLEMENTATIONS)
    k = workload.steps
    idle = " / ".join(f"{row[name].idle_memory:.0f}" for name in IMPLEMENTATIONS)
    flops = " / ".join(digits(row[name].counts.flops / 1e9) for name in IMPLEMENTATIONS)
    return (
        f"Counted in a step with K = {k}: query forwards, ours {ours:g} (K + 4 = {k + 4}), "
        f"baseline {baseline:g} (2K + 4 = {2 * k + 4}); 10^9 operations of matrix products, {flops}.\n"
        f"Peak memory before the first run: {idle} MiB."
    )


def environment(machine: Machine, device: str) -> dict[str, str | int]:
    """What the figures depend on besides this code."""
    return harness.machine() | {
        "threads": machine.threads,
        "device": device,
        "precision": str(machine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def plan_of(arch: str, quick: bool) -> list[Workload]:
    """The rows of one network."""
    per_class = 2 if quick else 6 if arch == "vit_mini" else 10
    attack, pgd = (2, 2) if quick else (10, 20)
    shots = (1,) if quick else (1, 5)
    steps = [Workload(arch, "step", n_shot, per_class, attack) for n_shot in shots]
    clean = [Workload(arch, "episode", n_shot, per_class, 0) for n_shot in shots if not quick]
    return [*steps, *clean, Workload(arch, "episode", 1, per_class, pgd)]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: an unknown network, two precisions at once, a device of a third kind, or a report that
            could not be written.
    """
    parser = options.Parser("Time meta-tuning and evaluation beside a straightforward baseline.")
    parser.formatter_class = argparse.HelpFormatter  # every default below is said in words
    parser.add_argument(
        "--arch", nargs="+", metavar="NAME", help="networks (default: vit_mini dino_small_patch16)"
    )
    parser.add_argument("--threads", type=options.positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--repeats",
        type=options.positive,
        help=f"turns per row (default: what takes {ROW_SECONDS} s, at most {MOST_REPEATS}, "
        "at least 2 of a training step)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny jobs once, vit_mini alone by default")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--fp16", action="store_true", help="mixed precision in float16")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    args = parser.parse(argv)
    if args.fp16 and args.bf16:
        raise InputError("--fp16 and --bf16 exclude each other")
    if not args.device.startswith(("cpu", "cuda")):
        raise InputError(f"--device {args.device!r}: only cpu and cuda can be timed")
    if args.json and not args.json.resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder {args.json.resolve().parent}")
    default = ["vit_mini"] if args.quick else ["vit_mini", "dino_small_patch16"]
    args.arch = [base_arch(name) for name in args.arch or default]
    if args.quick:
        args.repeats = args.repeats or 1
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    side = 512 if args.quick else 8192 if args.device.startswith("cuda") else 2048
    threads = args.threads or torch.get_num_threads()
    machine = Machine(args.device, threads, options.autocast(args), side)
    # In float32, since on many processors a network is far from the rate of a product in low precision.
    with Worker(probe, dataclasses.replace(machine, autocast=None)) as prober:
        answer = prober.answer()
    if isinstance(answer, InputError):
        raise answer
    device, rate = answer

    plan = [workload for arch in args.arch for workload in plan_of(arch, args.quick)]
    forecast = Forecast(plan, args.repeats, rate)
    about = environment(machine, device)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    began, results, rates = time.perf_counter(), [], []
    for arch in args.arch:
        shape = ARCHS[arch]
        print(
            f"\n{arch}, random weights, {shape.image_size} px, rank {RANK}, pool of {POOL}\n\n{HEADING}",
            flush=True,
        )
        rows = []
        for workload in plan_of(arch, args.quick):
            print(f"  {workload.name}; everything left: {forecast}", file=sys.stderr, flush=True)
            row = measure(workload, machine, args.repeats, lambda line: print(f"    {line}", file=sys.stderr))
            forecast.timed(workload, row)
            rates += [measured.gemm_rate for measured in row.values()]
            rows.append((workload, row))
            results.append(record(workload, row))
            print(table_row(workload, row), flush=True)
        print(f"\n{footnotes(*rows[0])}")
    gigaflops = spread([rate / 1e9 for rate in rates])
    print(f"\nGEMM rate, {side} x {side}: {gigaflops} GFLOP/s. All in {time.perf_counter() - began:.0f} s.")
    if args.json:
        report = {"environment": about, "gemm_side": side, "rows": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def record(workload: Workload, row: dict[str, Measured]) -> dict:
    """A row as plain data."""
    sides = {
        name: measured._asdict() | {"counts": measured.counts._asdict(), "gemm_share": measured.gemm_share}
        for name, measured in row.items()
    }
    if workload.job == "step":
        for name, measured in row.items():
            sides[name]["query_forwards"] = query_forwards(workload, measured.counts)
    return dataclasses.asdict(workload) | sides


if __name__ == "__main__":
    exit_on_bad_input(main)
