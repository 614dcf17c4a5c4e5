"""What the benchmarks that run two implementations side by side share: problems, counting, taking turns.

Ours and a baseline each run in a fresh process of their own and take turns, so that both see the same
machine. Weights and images are random: no figure depends on their values. Knows neither implementation: a
side is an object with the methods `count`, `warm_up`, `run` and `finish`, see `Side`.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import harness
import timm
import torch
import torch.nn.functional as F
from harness import MIB, digits, peak_resident
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from amt.attacks.levels import Perturbation
from amt.cli import options
from amt.models.architectures import ARCHS, base_arch, build_network
from amt.models.network import Network, find_device
from amt.models.pool import Pool, adapted_layers
from amt.models.vit import PatchEmbed
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.settings import positive_int

IMPLEMENTATIONS = ("ours", "baseline")
N_WAY = 5
RANK = 8
POOL = 4
LEVEL = Perturbation(epsilon=8, step_size=2, gamma=0.005)

ROW_SECONDS = 15  # repeat a row about that long, unless --repeats says how often
MOST_REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how the networks run.

    Args:
        gemm_side: of the square matrices of the yardstick.
        cpu_time: whether seconds are those of the processor, not of the wall clock: on a busy machine.
        compile: whether ours is timed through torch.compile.
    """

    device: str
    threads: int
    autocast: torch.dtype | None
    gemm_side: int
    cpu_time: bool = False
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.autocast or torch.float32

    def now(self) -> float:
        """Seconds, once the device has done its work."""
        synchronise(self.device)
        return time.process_time() if self.cpu_time else time.perf_counter()


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


class Side(Protocol):
    """One implementation of one job."""

    def count(self) -> Counts:
        """What the job counts. Counting costs memory, so a process that counts does nothing else."""

    def warm_up(self) -> float:
        """Get ready; about how many seconds a run will take."""

    def run(self) -> tuple[float, float | None]:
        """Seconds of one run, and its accuracy if it has one."""

    def finish(self) -> tuple[float, float, float]:
        """Peak and idle memory in MiB, then the rate of the yardstick, whose matrices take memory, too."""


class Alone:
    """What sides have in common: a process that is theirs alone.

    Args:
        machine: where they run.
    """

    idle_memory: float  # to be set when everything is there

    def __init__(self, machine: Machine):
        torch.manual_seed(0)
        torch.set_num_threads(machine.threads)
        self.machine = machine

    def finish(self) -> tuple[float, float, float]:
        """See `Side`."""
        peak = peak_memory(self.machine.device)
        return peak, self.idle_memory, gemm_rate(self.machine)


def random_backbone(arch: str, machine: Machine) -> Network:
    shape = ARCHS[arch]
    network = build_network(shape).to(machine.device)
    return Network(arch, network, shape.image_size, shape.mean, shape.std, machine.autocast)


def random_pool(network: Network, size: int, rank: int, generator: torch.Generator) -> Pool:
    """A pool of unlike adapters; spares the singular value decompositions of a real start."""
    weights = network.weights
    residual, A, B = dict(weights), {}, {}
    for name in adapted_layers(weights):
        rows, columns = weights[name].shape
        groups = 3 if name.endswith("qkv.weight") else 1
        A[name] = 0.05 * torch.randn(size, groups, rank, columns, generator=generator).to(weights[name])
        B[name] = 0.05 * torch.randn(size, groups, rows // groups, rank, generator=generator).to(A[name])
        residual[name] = weights[name].clone()  # a real residual is no view of the network, either
    head = A[name].new_ones(size)
    return Pool(residual, A, B, 10 * head, 0 * head, (LEVEL,) * size)


def random_episode(image_size: int, n_shot: int, per_class: int, generator: torch.Generator) -> Episode:
    """Classes of coarse random pictures, their images alike but for a little noise, so that even a random
    network tells them apart."""
    pictures = F.interpolate(torch.rand(N_WAY, 3, 4, 4, generator=generator), image_size)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(N_WAY).repeat_interleave(count)
        noise = torch.rand(len(labels), *pictures.shape[1:], generator=generator)
        return 0.95 * pictures[labels] + 0.05 * noise, labels

    return Episode(*draw(n_shot), *draw(per_class))


def counted(run: Callable[[], object]) -> Counts:
    """What `run` counts, by running it."""
    images = 0

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal images
        if isinstance(module, PatchEmbed | TimmPatchEmbed):
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
        began = machine.now()
        left @ right
        seconds.append(machine.now() - began)
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


def serve(pipe, make: Callable[..., object], *arguments) -> None:
    """A worker's life: make a side, and answer each order, the name of a method, with what it returns."""
    side = make(*arguments)
    while True:
        pipe.send(getattr(side, pipe.recv())())


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
        self._process.kill()  # a forked process leaves signals to its parent, SIGTERM among them
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


def outcomes(make: Callable[[str], Side]) -> list[Any]:
    """What the method `outcome` of each side returns, in `IMPLEMENTATIONS`' order; `make` as of `measure`."""
    found = []
    for name in IMPLEMENTATIONS:
        with Worker(serve, make, name) as worker:
            found.append(worker.ask("outcome"))
    return found


def say(line: str) -> None:
    """Tell of the progress."""
    print(f"  {line}", file=sys.stderr, flush=True)


def measure(make: Callable[[str], Side], planned: Callable[[float], int]) -> dict[str, Measured]:
    """One row: count, warm both implementations up, then let them take turns.

    Args:
        make: makes a side by its name in `IMPLEMENTATIONS`; it is called in the side's own process.
        planned: how many turns of so many seconds there are to be.
    """
    counts = {}
    for name in IMPLEMENTATIONS:
        with Worker(serve, make, name) as counter:
            counts[name] = counter.ask("count")
    with Worker(serve, make, "ours") as ours, Worker(serve, make, "baseline") as baseline:
        workers = dict(zip(IMPLEMENTATIONS, (ours, baseline), strict=True))
        turn = sum(worker.ask("warm_up") for worker in workers.values())
        say(f"  counted and warm; a turn takes about {digits(turn)} s")
        runs = {name: [] for name in workers}

        def take_turns(numbers: range) -> None:
            for number in numbers:
                for name in IMPLEMENTATIONS if number % 2 == 0 else IMPLEMENTATIONS[::-1]:
                    time.sleep(0.05)  # idle threads of the other process stop spinning
                    runs[name].append(workers[name].ask("run"))

        take_turns(range(1))
        take_turns(range(1, planned(sum(runs[name][0][0] for name in workers))))
        return {
            name: Measured(
                [seconds for seconds, _ in runs[name]],
                counts[name],
                *worker.ask("finish"),
                accuracy=runs[name][-1][1],
            )
            for name, worker in workers.items()
        }


class Report:
    """What is printed and written: on which machine, row by row, and at the end the rate of the yardstick."""

    def __init__(self, machine: Machine, device: str):
        self._machine, self._began, self._rates = machine, time.perf_counter(), []
        self.rows: list[dict] = []
        self._environment = harness.machine() | {
            "threads": machine.threads,
            "device": device,
            "precision": str(machine.dtype).removeprefix("torch."),
            "compile": machine.compile,
            "seconds": "of the processor" if machine.cpu_time else "of the wall clock",
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        print(", ".join(f"{key} {value}" for key, value in self._environment.items()), flush=True)

    def add(self, line: str, described: Mapping, row: Mapping[str, Measured]) -> None:
        """A row: its line in the table, and as plain data what it is `described` as, and both sides."""
        self._rates += [measured.gemm_rate for measured in row.values()]
        sides = {
            name: measured._asdict()
            | {"counts": measured.counts._asdict(), "gemm_share": measured.gemm_share}
            for name, measured in row.items()
        }
        self.rows.append({**described, **sides})
        print(line, flush=True)

    def end(self, file: Path | None) -> None:
        """The last line; and all figures in `file`, if there is to be one."""
        gigaflops = harness.spread([rate / 1e9 for rate in self._rates])
        side, seconds = self._machine.gemm_side, digits(time.perf_counter() - self._began)
        print(f"\nGEMM rate, {side} x {side}: {gigaflops} GFLOP/s. All in {seconds} s.")
        if file:
            report = {"environment": self._environment, "gemm_side": side, "rows": self.rows}
            file.write_text(json.dumps(report, indent=2) + "\n")


def planned_repeats(turn: float, asked: int | None, least: int = 1) -> int:
    """How many turns of `turn` seconds a row gets."""
    return asked or max(least, min(MOST_REPEATS, math.ceil(ROW_SECONDS / max(turn, 1e-3))))


def parse(argv: list[str], description: str, archs: list[str], compiles: bool = False) -> argparse.Namespace:
    """The command line of a benchmark, checked.

    Args:
        archs: networks to time where none is named; with --quick the first of them alone.
        compiles: whether it knows --compile.

    Raises:
        InputError: an unknown network, two precisions at once, a device of a third kind, or a report that
            could not be written.
    """
    parser = parser_of(description, archs[0])
    parser.add_argument("--arch", nargs="+", metavar="NAME", help=f"networks (default: {' '.join(archs)})")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        help=f"turns per row (default: what takes {ROW_SECONDS} s, at most {MOST_REPEATS}, "
        "at least 2 of a training step)",
    )
    parser.add_argument("--fp16", action="store_true", help="mixed precision in float16")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument(
        "--cpu_time", action="store_true", help="count seconds of the processor, on a busy machine"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this text alone")
    parser.set_defaults(compile=False)
    if compiles:
        parser.add_argument("--compile", action="store_true", help="time ours through torch.compile")
    args = checked(parser.parse(argv))
    if args.fp16 and args.bf16:
        raise InputError("--fp16 and --bf16 exclude each other")
    if args.cpu_time and args.device != "cpu":
        raise InputError("--cpu_time is for --device cpu")
    args.arch = [base_arch(name) for name in args.arch or (archs[:1] if args.quick else archs)]
    return args


def parser_of(description: str, quick: str) -> options.Parser:
    """A parser of the flags that all have; `quick` is the network that --quick times."""
    parser = options.Parser(description)
    parser.formatter_class = argparse.HelpFormatter  # every default is said in words
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help=f"tiny jobs once, {quick} alone by default")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of `parser_of`, and --repeats.

    Raises:
        InputError: a device of a third kind, or a report that could not be written.
    """
    if not args.device.startswith(("cpu", "cuda")):
        raise InputError(f"--device {args.device!r}: only cpu and cuda can be timed")
    if args.json and not args.json.resolve().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder {args.json.resolve().parent}")
    args.repeats = args.repeats or (1 if args.quick else None)
    return args


def chosen(plan: list[Any], only: str) -> list[Any]:
    """The rows of a plan, objects with a `name`, that has the text `only`.

    Raises:
        InputError: there is none.
    """
    found = [row for row in plan if only in row.name]
    if not found:
        names = "; ".join(row.name for row in plan)
        raise InputError(f"--only {only!r}: no such row, the rows are: {names}")
    return found


def find_machine(args: argparse.Namespace) -> tuple[Machine, str, float]:
    """The machine that the flags ask for, its device's name, and its rate of float32 products.

    Raises:
        InputError: there is no such device.
    """
    side = 512 if args.quick else 8192 if args.device.startswith("cuda") else 2048
    threads = args.threads or torch.get_num_threads()
    autocast = options.arithmetic(args).autocast
    machine = Machine(args.device, threads, autocast, side, args.cpu_time, args.compile)
    # In float32, since on many processors a network is far from the rate of a product in low precision.
    with Worker(probe, dataclasses.replace(machine, autocast=None)) as prober:
        answer = prober.answer()
    if isinstance(answer, InputError):
        raise answer
    return machine, *answer
