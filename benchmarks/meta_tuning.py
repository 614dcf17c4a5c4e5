"""Time, memory and arithmetic of meta-tuning and of evaluation, side by side with a straightforward baseline.

    python benchmarks/meta_tuning.py                  vit_mini and a ViT-S/16 at 128 px, minutes
    python benchmarks/meta_tuning.py --quick          a few seconds, to see that it works
    python benchmarks/meta_tuning.py --cpu_time --threads 1        on a busy machine
    python benchmarks/meta_tuning.py --compile        ours through torch.compile

Weights are random: no figure here depends on their values. Each row is one job: a training step of one
robustness level, or of a pool of four, whose figures but memory are per level; or an evaluation episode, that
is scoring the pool on the augmented support, merging and classifying the query, with or without PGD on the
query. The attack of that last row is sized so that it fools nobody (epsilon 0): every image is then worked on
at every step, which is the longest it can take.

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
import statistics
import sys
from collections.abc import Callable

import side_by_side
import torch
from baseline import Baseline, Learner, evaluate_episode, training_step
from harness import digits, ratio, spread
from side_by_side import (
    IMPLEMENTATIONS,
    LEVEL,
    N_WAY,
    POOL,
    RANK,
    Alone,
    Counts,
    Machine,
    Measured,
    Report,
    chosen,
    counted,
    peak_memory,
    random_backbone,
    random_episode,
    random_pool,
    say,
)
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.evaluation.evaluate import evaluate, query_generators
from amt.models.architectures import ARCHS
from amt.models.compiled import compiler_for
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.weights import stream
from amt.tasks.classifier import merged_predictor
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import exit_on_bad_input

Bind = Callable[[Episode, int], Callable[[], float | None]]

ROUTING = Routing(augment_probability=1.0)
SETTINGS = TuneSettings(epochs=30, episodes_per_epoch=2000)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the table.

    Args:
        arch: name in `ARCHS`.
        job: "step" of training, or "episode" of evaluation.
        n_shot, per_class: support and query images of each of the five classes.
        steps: of the training attack, or of PGD; 0 for an episode without attack.
        levels: that a step trains.
    """

    arch: str
    job: str
    n_shot: int
    per_class: int
    steps: int
    levels: int = 1

    @property
    def name(self) -> str:
        attack = f", PGD-{self.steps}" if self.job == "episode" and self.steps else ""
        job = self.job if self.levels == 1 else f"{self.job} of {self.levels} levels, per level"
        return f"{job}, {N_WAY}-way {self.n_shot}-shot, {N_WAY * self.per_class} query{attack}"

    @property
    def least_repeats(self) -> int:
        return 2 if self.job == "step" else 1

    def passes(self, implementation: str) -> int:
        """About how many forward passes of one image it is worth; only the forecast of the time uses it."""
        support, query = N_WAY * self.n_shot, N_WAY * self.per_class
        if self.job == "step":
            per_attack_step = 2 if implementation == "ours" else 3
            return self.levels * (3 * support + query * (per_attack_step * self.steps + 12))
        return (2 * POOL + 1) * support + query * (2 * self.steps + 2)


def our_step(network: Network, pool: Pool) -> Bind:
    def bind(episode: Episode, steps: int) -> Callable[[], None]:
        level = dataclasses.replace(LEVEL, steps=steps)
        tuner = Tuner(network, dataclasses.replace(pool, levels=(level,) * len(pool)), SETTINGS)

        def run() -> None:
            tuner.step(episode)

        return run

    return bind


def baseline_step(network: Network, pool: Pool) -> Bind:
    models = [Learner(network, pool[p]) for p in range(len(pool))]
    optimisers = [torch.optim.SGD(each.trained.values(), SETTINGS.lr, SETTINGS.momentum) for each in models]
    scaler = torch.amp.GradScaler(network.device.type, enabled=network.autocast == torch.float16)

    def bind(episode: Episode, steps: int) -> Callable[[], None]:
        level = dataclasses.replace(LEVEL, steps=steps)

        def run() -> None:
            for model, optimiser in zip(models, optimisers, strict=True):
                start = level.pyramid.start(episode.query, stream(SETTINGS.seed))
                training_step(model, optimiser, scaler, episode, level, start)

        return run

    return bind


def our_episode(network: Network, pool: Pool) -> Bind:
    def choose(support: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[float, ...]:
        return route(network, pool, support, labels, generator, ROUTING)

    def bind(episode: Episode, steps: int) -> Callable[[], float]:
        attacks = [harmless(steps)] if steps else []

        def run() -> float:
            # A predictor of its own each time: it remembers the last merge, and episodes of a run differ.
            predict = merged_predictor(network, pool, choose)
            row = next(evaluate(predict, [episode], attacks))
            return row[attacks[0].columns[0]] if attacks else row["clean"]

        return run

    return bind


def baseline_episode(network: Network, pool: Pool) -> Bind:
    model = Baseline(network)

    def bind(episode: Episode, steps: int) -> Callable[[], float]:
        attack = harmless(steps) if steps else None

        def run() -> float:
            starts = query_generators(episode, 0)
            return evaluate_episode(model, pool, episode, ROUTING, stream(1), attack, starts).accuracy

        return run

    return bind


def harmless(steps: int) -> Attack:
    """PGD that moves nothing, so that no image drops out before the last step."""
    return Attack("pgd", (1e-6,), steps=steps, step_size=0.0)


JOBS = {
    ("ours", "step"): our_step,
    ("baseline", "step"): baseline_step,
    ("ours", "episode"): our_episode,
    ("baseline", "episode"): baseline_episode,
}


class Bench(Alone):
    """One implementation of one workload, in a process of its own; a `side_by_side.Side`."""

    def __init__(self, workload: Workload, implementation: str, machine: Machine):
        super().__init__(machine)
        self.workload, self._name = workload, implementation
        network = random_backbone(workload.arch, machine)
        pool = random_pool(network, workload.levels if workload.job == "step" else POOL, RANK, stream(0))
        job = JOBS[implementation, workload.job]
        self._counted = self._timed = job(network, pool)
        if machine.compile and implementation == "ours":  # what is counted are operations as they are written
            compiler = compiler_for(torch.device(machine.device))
            self._timed = job(dataclasses.replace(network, compiler=compiler), pool)
        self._run = self._bound(self._timed, workload.per_class, workload.steps)
        self.idle_memory = peak_memory(machine.device)

    def _bound(self, bind: Bind, per_class: int, steps: int) -> Callable[[], float | None]:
        side = ARCHS[self.workload.arch].image_size
        episode = random_episode(side, self.workload.n_shot, per_class, stream(3))
        return bind(episode.to(self.machine.device), steps)

    def count(self) -> Counts:
        """What the job counts per level, from smaller jobs: besides a fixed part there is one in proportion
        to the query images, and one in proportion to these times the attack steps. Counting costs memory, so
        a process that counts is not one whose memory is told."""
        per_class, steps = self.workload.per_class, self.workload.steps
        few = min(steps, 1)
        small, wider = (counted(self._bound(self._counted, width, few)) for width in (1, 2))
        longer = counted(self._bound(self._counted, 1, 2)) if steps > 1 else small
        return Counts(
            *(
                (s + (per_class - 1) * (w - s) + per_class * (steps - few) * (n - s)) / self.workload.levels
                for s, w, n in zip(small, wider, longer, strict=True)
            )
        )

    def warm_up(self) -> float:
        """Run once at full size, but with one attack step; about how many seconds the job will take."""
        brief = dataclasses.replace(self.workload, steps=min(self.workload.steps, 1))
        run = self._bound(self._timed, brief.per_class, brief.steps)
        began = self.machine.now()
        run()
        return (self.machine.now() - began) * self.workload.passes(self._name) / brief.passes(self._name)

    def run(self) -> tuple[float, float | None]:
        """Seconds of one run per level, and its accuracy if it has one."""
        began = self.machine.now()
        accuracy = self._run()
        return (self.machine.now() - began) / self.workload.levels, accuracy


def planned_repeats(workload: Workload, turn: float, asked: int | None) -> int:
    """How many turns of `turn` seconds a row gets."""
    return side_by_side.planned_repeats(turn, asked, workload.least_repeats)


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
            seconds += workload.levels * statistics.median(measured.seconds)
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
    name = workload.name
    if workload.job == "episode" and workload.steps and ours.accuracy < 1:
        name += f", of which {100 * ours.accuracy:.0f}% to the end"
    cells = (
        name,
        spread(ours.seconds),
        spread(baseline.seconds),
        ratio(ours.seconds, baseline.seconds),
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


def plan_of(arch: str, quick: bool) -> list[Workload]:
    """The rows of one network."""
    per_class = 2 if quick else 6 if arch == "vit_mini" else 10
    attack, pgd = (2, 2) if quick else (10, 20)
    shots = (1,) if quick else (1, 5)
    steps = [Workload(arch, "step", n_shot, per_class, attack) for n_shot in shots]
    steps.append(Workload(arch, "step", 1, per_class, attack, levels=POOL))
    clean = [Workload(arch, "episode", n_shot, per_class, 0) for n_shot in shots if not quick]
    return [*steps, *clean, Workload(arch, "episode", 1, per_class, pgd)]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    description = "Time meta-tuning and evaluation beside a straightforward baseline."
    return side_by_side.parse(argv, description, ["vit_mini", "dino_small_patch16"], compiles=True)


def main() -> int:
    args = parse(sys.argv[1:])
    machine, device, rate = side_by_side.find_machine(args)
    plan = {arch: chosen(plan_of(arch, args.quick), args.only) for arch in args.arch}
    forecast = Forecast([workload for rows in plan.values() for workload in rows], args.repeats, rate)
    report = Report(machine, device)
    for arch, workloads in plan.items():
        shape = ARCHS[arch]
        print(
            f"\n{arch}, random weights, {shape.image_size} px, rank {RANK}, pool of {POOL}\n\n{HEADING}",
            flush=True,
        )
        rows = []
        for workload in workloads:
            say(f"{workload.name}; everything left: {forecast}")
            row = side_by_side.measure(
                lambda name, workload=workload: Bench(workload, name, machine),
                lambda turn, workload=workload: planned_repeats(workload, turn, args.repeats),
            )
            forecast.timed(workload, row)
            rows.append((workload, row))
            report.add(table_row(workload, row), dataclasses.asdict(workload), row)
            if workload.job == "step":
                for name, measured in row.items():
                    report.rows[-1][name]["query_forwards"] = query_forwards(workload, measured.counts)
        if rows[0][0].job == "step":
            print(f"\n{footnotes(*rows[0])}")
    report.end(args.json)
    return 0


if __name__ == "__main__":
    exit_on_bad_input(main)
