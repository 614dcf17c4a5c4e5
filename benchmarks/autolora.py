"""Time and passes of fine-tuning by AutoLoRa, side by side with a straightforward baseline.

    python benchmarks/autolora.py                              about three minutes on two cores
    python benchmarks/autolora.py --device cuda --arch resnet18
    python benchmarks/autolora.py --quick                      a few seconds, to see that it works

Three rows per network:

    step         one batch: K attack steps, a natural and an adversarial pass, one backward. The baseline
                 (`autolora_baseline.py`) has LoRA layer classes, and switches requires_grad between threads.
    epoch        ours both times: the weights of the loss from the accuracy of the batches as they come, and
                 (as the baseline) by 1 + ceil(n / floor(n/4)) passes over the training set.
    validation   PGD that leaves an image as soon as it is fooled, and (as the baseline) one that goes on.

Both sides have the same weights, batches and starts, and before a row is timed they must come to the same
loss or accuracy. Each then runs in a fresh process of its own, and they take turns: a time is the median,
with least and greatest, a ratio that of the medians, with least and greatest of the turns. Passes are
counted, per image of the job: forward through the network, and backward from its logits. Weights and images
are random. What validation saves depends on how many images fall: the classifier of these rows is wrong
about one image in six, and epsilon is chosen so that about two in three of the others stand to the end, which
is where robust classifiers of CIFAR-10 are.

The GEMM share is the time that the counted multiplications would take at the rate of one large square matrix
product, over the time measured. Reading images is no part of it.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import autolora_baseline
import side_by_side
import torch
from harness import ratio, spread
from side_by_side import Alone, Machine, Measured, Report, outcomes, peak_memory, say
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from amt.attacks.perturb import Ball, pgd
from amt.models.branch import Student
from amt.models.network import build_classifier, logits
from amt.models.weights import stream
from amt.training.accuracy import accuracy, validate
from amt.training.autolora import FineTuner, new_student
from amt.training.autolora_settings import Adversary, Settings
from meta_dataset_readers.errors import exit_on_bad_input
from meta_dataset_readers.settings import positive_int

CLASSES = 10
SIDE = 32
WRONG = 6  # one image in so many is classified wrongly before any attack
STANDING = 2 / 3  # of the others, about so many stand to the end of validation
TOLERANCE = 1e-3  # of a loss, relative; one image of accuracies


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of the table.

    Args:
        arch: as `build_classifier` takes it.
        kind: "step", "epoch" or "validation".
        batch: images in a batch; all those of validation.
        steps: of the attack.
        batches: in an epoch.
    """

    arch: str
    kind: str
    batch: int
    steps: int
    batches: int = 1

    @property
    def name(self) -> str:
        return {
            "step": f"step, {self.batch} images, K = {self.steps}",
            "epoch": f"epoch, {self.batches} x {self.batch} images, K = {self.steps}",
            "validation": f"validation, {self.batch} images, PGD-{self.steps}",
        }[self.kind]

    @property
    def images(self) -> int:
        """How many a turn goes through."""
        return self.batch * self.batches

    @property
    def adversary(self) -> Adversary:
        return Adversary(steps=self.steps)


class Passes(NamedTuple):
    """What one turn takes: floating-point operations of matrix products; and per image of the job, passes
    through the network and back from its logits."""

    flops: float
    forwards: float
    backwards: float


class Problem:
    """A network with random weights and a branch that has left zero, and labelled images, on a device."""

    def __init__(self, job: Job, device: str, dtype: torch.dtype = torch.float32):
        self.job = job
        self.network = build_classifier(job.arch, CLASSES, SIDE)
        self.network.module.to(dtype)
        weights = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self.network.start(0).items()
        }
        fresh = new_student(self.network, weights, self.settings(), {})
        generator = stream(1)
        self.student = Student(
            fresh.weights,
            {
                name: (factor + 0.02 * torch.randn(factor.shape, generator=generator).to(factor)).to(dtype)
                for name, factor in fresh.factors.items()
            },
        )
        self.images = torch.rand(job.images, 3, SIDE, SIDE, generator=generator).to(device, dtype)
        self.labels = (torch.arange(job.images) % CLASSES).to(device)

    def settings(self, whole_passes: bool = False) -> Settings:
        job = self.job
        return Settings(
            epochs=1 << 30,
            batch_size=job.batch,
            lr=0.01,
            adversary=job.adversary,
            auto_lr=False,
            whole_passes=whole_passes,
        )

    @property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        size, places = self.job.batch, torch.arange(self.job.images)
        return list(zip(*(each.split(size) for each in (self.images, self.labels, places)), strict=True))

    def tuner(self, whole_passes: bool = False) -> FineTuner:
        # In a job of a single step the weights of the loss follow the batch before.
        return FineTuner(
            self.network,
            self.student,
            self.settings(whole_passes),
            self.job.batches if self.job.kind == "epoch" else 4,
            lambda weights: accuracy(self.network, weights, self.batches),
        )

    def model(self) -> autolora_baseline.Model:
        return autolora_baseline.Model(self.network, self.student, self.settings().rank)

    def partly_right(self) -> tuple[Tensor, float]:
        """Labels of which the network is right about all but one in `WRONG`; and, in 1/255, the largest power
        of the root of two at which `STANDING` of the others still stand after a short attack."""
        job, network, weights = self.job, self.network, self.student.weights

        def logits_of(images: Tensor) -> Tensor:
            return logits(network, weights, images)

        with torch.no_grad():
            found = logits_of(self.images).argmax(1)
        labels = torch.where(torch.arange(job.images, device=found.device) % WRONG == 0, 1, 0)
        labels = (found + labels) % CLASSES
        few = slice(0, 48)
        right = int((found[few] == labels[few]).sum())
        for epsilon in (2.0 ** (-half / 2) for half in itertools.count(-14)):
            _, fooled, _ = pgd(
                logits_of,
                self.images[few],
                labels[few],
                Ball("linf", epsilon / 255, epsilon / 4 / 255),
                min(job.steps, 6),
                stream(2),
            )
            if int((~fooled).sum()) >= STANDING * right or epsilon < 1e-3:
                return labels, epsilon


class Side(NamedTuple):
    """One implementation of a job: what a turn does, giving a loss or an accuracy; and the module whose
    passes count."""

    turn: Callable[[], float]
    module: torch.nn.Module


def our_step(problem: Problem) -> Side:
    tuner = problem.tuner()

    def turn() -> float:
        if tuner.batch == tuner.n_batches:
            tuner.end_epoch(0.0, 0.0)
        return tuner.step(problem.images, problem.labels).total

    return Side(turn, problem.network.module)


def baseline_step(problem: Problem) -> Side:
    settings = problem.settings()
    trainer = autolora_baseline.Trainer(
        problem.model(), settings.lr, settings.momentum, settings.weight_decay, settings.scale
    )
    numbers = itertools.count()

    def turn() -> float:
        epoch, batch = divmod(next(numbers), 4)
        start = stream(settings.seed, 1, epoch, batch)
        loss = trainer.step(problem.images, problem.labels, settings.adversary, start)
        return loss.total.item()

    return Side(turn, trainer.model)


def our_epoch(problem: Problem, whole_passes: bool = False) -> Side:
    tuner = problem.tuner(whole_passes)

    def turn() -> float:
        losses = [tuner.step(images, labels).total for images, labels, _ in problem.batches]
        tuner.end_epoch(0.0, 0.0)
        return statistics.fmean(losses)

    return Side(turn, problem.network.module)


def our_validation(problem: Problem) -> Side:
    labels, epsilon = problem.partly_right()
    adversary = Adversary(epsilon, epsilon / 4, problem.job.steps)
    places = torch.arange(len(labels))

    def turn() -> float:
        weights = problem.student.weights
        return validate(problem.network, weights, [(problem.images, labels, places)], adversary, 0).robust

    return Side(turn, problem.network.module)


def baseline_validation(problem: Problem) -> Side:
    labels, epsilon = problem.partly_right()
    adversary = Adversary(epsilon, epsilon / 4, problem.job.steps)
    model = problem.model()
    return Side(lambda: autolora_baseline.validate(model, problem.images, labels, adversary, 0).robust, model)


SIDES = {
    ("ours", "step"): our_step,
    ("baseline", "step"): baseline_step,
    ("ours", "epoch"): our_epoch,
    ("baseline", "epoch"): functools.partial(our_epoch, whole_passes=True),
    ("ours", "validation"): our_validation,
    ("baseline", "validation"): baseline_validation,
}


class Flops(TorchDispatchMode):
    """Adds up the operations of matrix products and convolutions, as `FlopCounterMode` does; that cannot
    follow modules through `torch.autograd.grad` if their parameters require gradients, too."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        out = operation(*arguments, **named)
        count = flop_registry.get(operation._overloadpacket)
        self.total += count(*arguments, **named, out_val=out) if count else 0
        return out


def counted(side: Side, images: int) -> Passes:
    """What a turn counts, by taking it; per image, of which there are so many."""
    forwards = backwards = 0

    def went_back(gradient: Tensor) -> None:
        nonlocal backwards
        backwards += len(gradient)

    def went_through(_module, _inputs, out: Tensor) -> None:
        nonlocal forwards
        forwards += len(out)
        if out.requires_grad:
            out.register_hook(went_back)

    hook = side.module.register_forward_hook(went_through)
    try:
        with Flops() as flops:
            side.turn()
    finally:
        hook.remove()
    return Passes(flops.total, forwards / images, backwards / images)


class Bench(Alone):
    """One implementation of one job, in a process of its own; a `side_by_side.Side`."""

    def __init__(self, job: Job, implementation: str, machine: Machine):
        super().__init__(machine)
        self.job = job
        self._side = SIDES[implementation, job.kind](Problem(job, machine.device))
        self.idle_memory = peak_memory(machine.device)

    def outcome(self) -> float:
        """The loss of the first turn, or the robust accuracy."""
        return self._side.turn()

    def count(self) -> Passes:
        """What a turn counts, but for the very first: that has one more pass, for a first accuracy."""
        self._side.turn()
        return counted(self._side, self.job.images)

    def warm_up(self) -> float:
        """Take a turn; how many seconds it took."""
        return self.run()[0]

    def run(self) -> tuple[float, float]:
        began = self.machine.now()
        result = self._side.turn()
        return self.machine.now() - began, result


def check_alike(job: Job, machine: Machine) -> float:
    """How far apart both sides are after the first turn: losses, relatively, or accuracies in per cent. The
    two sides of an epoch weigh their losses differently, and are not compared.

    Raises:
        RuntimeError: too far to compute the same thing. The sign of a gradient next to zero depends on
            rounding, so one image may fall on one side only.
    """
    ours, other = outcomes(lambda name: Bench(job, name, machine))
    difference = abs(ours - other) / (abs(ours) if job.kind == "step" else 1)
    if difference > (TOLERANCE if job.kind == "step" else 150 / job.images):
        raise RuntimeError(f"{job.name}: the two sides compute different things: {ours} and {other}")
    return difference


HEADING = (
    "| job | ours, s | baseline, s | baseline / ours | forward passes | backward passes | GEMM share | "
    "peak MiB | turns |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def table_row(job: Job, row: dict[str, Measured]) -> str:
    """A line under `HEADING`; where a cell holds two figures, ours comes first."""
    mine, other = row["ours"], row["baseline"]
    name = job.name
    if job.kind == "validation":
        name += f", {mine.accuracy:.0f}% to the end"
    cells = (
        name,
        spread(mine.seconds),
        spread(other.seconds),
        ratio(mine.seconds, other.seconds),
        f"{mine.counts.forwards:.3g} / {other.counts.forwards:.3g}",
        f"{mine.counts.backwards:.3g} / {other.counts.backwards:.3g}",
        f"{100 * mine.gemm_share:.0f}% / {100 * other.gemm_share:.0f}%",
        f"{mine.peak_memory:.0f} / {other.peak_memory:.0f}",
        str(len(mine.seconds)),
    )
    return f"| {' | '.join(cells)} |"


def plan_of(arch: str, batch: int, steps: int, quick: bool, rows: list[str]) -> list[Job]:
    """The rows of one network."""
    if quick:
        jobs = [Job(arch, "step", 4, 2), Job(arch, "epoch", 2, 1, batches=4), Job(arch, "validation", 12, 2)]
    else:
        jobs = [
            Job(arch, "step", batch, steps),
            Job(arch, "epoch", max(batch // 4, 1), steps, batches=8),
            Job(arch, "validation", batch, 2 * steps),
        ]
    return [job for job in jobs if job.kind in rows]


KINDS = ("step", "epoch", "validation")
DEFAULTS = {"resnet_mini": (128, KINDS), "resnet18": (16, KINDS[:1])}  # of a CPU: batch and rows


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: an unknown network, a device of a third kind, or a report that could not be written.
    """
    description = "Time fine-tuning by AutoLoRa beside a straightforward baseline."
    parser = side_by_side.parser_of(description, "resnet_mini")
    parser.add_argument(
        "--arch", nargs="+", metavar="NAME", help="networks at 32 px (default: resnet_mini resnet18)"
    )
    parser.add_argument("--rows", nargs="+", choices=KINDS, help="(default: all; of resnet18 on a CPU, step)")
    parser.add_argument(
        "--batch",
        type=positive_int,
        help="images (default: 128; of other networks than resnet_mini on a CPU 16)",
    )
    parser.add_argument("--steps", type=positive_int, default=10, help="K of training (default: 10)")
    parser.add_argument(
        "--repeats", type=positive_int, help="turns per row (default: what takes 15 s, from 2 to 9)"
    )
    parser.set_defaults(fp16=False, bf16=False, cpu_time=False, compile=False)
    args = side_by_side.checked(parser.parse(argv))
    args.arch = args.arch or list(DEFAULTS)[: 1 if args.quick else None]
    return args


def jobs_of(args: argparse.Namespace) -> dict[str, list[Job]]:
    """All rows, by network."""
    jobs = {}
    for arch in args.arch:
        batch, rows = DEFAULTS.get(arch, (16, KINDS))
        if args.device.startswith("cuda"):
            batch, rows = 128, KINDS
        if args.quick:
            rows = KINDS
        jobs[arch] = plan_of(arch, args.batch or batch, args.steps, args.quick, args.rows or rows)
        with torch.device("meta"):
            build_classifier(arch, CLASSES, SIDE)  # an unknown name is told before anything is timed
    return jobs


def main() -> int:
    args = parse(sys.argv[1:])
    plan = jobs_of(args)
    machine, device, _ = side_by_side.find_machine(args)
    report = Report(machine, device)
    for arch, jobs in plan.items():
        print(f"\n{arch}, random weights, {SIDE} px, {CLASSES} classes\n\n{HEADING}", flush=True)
        for job in jobs:
            say(job.name)
            difference = None if job.kind == "epoch" else check_alike(job, machine)
            row = side_by_side.measure(
                lambda name, job=job: Bench(job, name, machine),
                lambda turn: side_by_side.planned_repeats(turn, args.repeats, least=2),
            )
            described = {"name": job.name, **dataclasses.asdict(job), "difference": difference}
            report.add(table_row(job, row), described, row)
        print(f"\n{footnote(jobs, report.rows)}", flush=True)
    report.end(args.json)
    return 0


def footnote(jobs: list[Job], results: list[dict]) -> str:
    """What the counted passes of a step and of an epoch should be."""
    lines = []
    for job, row in zip(jobs, results[-len(jobs) :], strict=True):
        counts = row["ours"]["counts"]
        if job.kind == "step":
            lines.append(
                f"Counted in a step with K = {job.steps}: forward passes {counts['forwards']:g} "
                f"(K + 2 = {job.steps + 2}), backward from {counts['backwards']:g} logits, K times to the "
                "images alone and once, from both threads, to the weights."
            )
        elif job.kind == "epoch":
            quarter = max(job.batches // 4, 1)
            more = row["baseline"]["counts"]["forwards"] - counts["forwards"]
            lines.append(
                f"Passes over the training set to weigh the loss, in an epoch of n = {job.batches} batches: "
                f"{more:g} (1 + ceil(n / floor(n/4)) = {1 + -(-job.batches // quarter)})."
            )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_on_bad_input(main)
