"""Episodes per second of evaluation, clean and under attack, beside a straightforward baseline.

    python benchmarks/evaluation.py                              vit_mini, a few minutes
    python benchmarks/evaluation.py --arch dino_small_patch16    a ViT-S/16 at 128 px
    python benchmarks/evaluation.py --quick                      a few seconds, to see that it works

An episode is 5-way with 1 or 5 shots and 10 queries per class, and a pool of four adapters: they are scored
on the augmented support and merged, or merged in equal parts and qkv trimmed to half its singular values;
then the queries are classified, and attacked by PGD-20 in some rows. Of these "none fooled" works on every
image at every step, the longest it can take; "at 8/255" is the attack as it is used, and the table says how
many images were right to its end. Weights and images are random.

The baseline (`baseline.py`) is arranged as the published code: the model is copied for every episode, its
weights are reloaded for one adapter after another, trimming is done anew, and the attack goes on with every
image. Before a row is timed both sides work on one of its episodes and must come to the same coefficients,
logits and accuracy. Each then runs in a fresh process of its own, and they take turns: figures are medians,
with least and greatest. Reading images is no part of it, and no episode comes twice in a row.

The GEMM share is the time that the counted multiplications (linear layers, attention, convolution, low-rank
updates, forward and backward) would take at the rate of one large square matrix product, over the time
measured; the singular value decompositions of trimming are not counted.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import side_by_side
import torch
from baseline import Baseline, evaluate_episode
from harness import ratio, spread
from side_by_side import (
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
    outcomes,
    peak_memory,
    random_backbone,
    random_episode,
    random_pool,
    say,
)
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.evaluation.evaluate import measure, query_generators
from amt.models.architectures import ARCHS
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.weights import stream
from amt.tasks.classifier import merged_predictor
from amt.tasks.merge import route, uniform
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import exit_on_bad_input

ROUTING = Routing(augment_probability=1.0)
TRIMS = (Trim("qkv", -1, 0.5),)
DISTINCT = 4  # episodes that a side goes through in turn
TOLERANCE = 1e-3  # of logits, which are of the order of ten


@dataclasses.dataclass(frozen=True)
class Job:
    """One row of the table.

    Args:
        arch: name in `ARCHS`.
        n_shot, per_class: support and query images of each of the five classes.
        episodes: how many a turn takes.
        attack: on the queries; None for none.
        trimmed: uniform merging and trimming, instead of routing without.
    """

    arch: str
    n_shot: int
    per_class: int
    episodes: int
    attack: Attack | None = None
    trimmed: bool = False

    @property
    def name(self) -> str:
        merging = "uniform, trimmed" if self.trimmed else "routed"
        return f"{self.n_shot}-shot, {merging}, {self._attacked}"

    @property
    def _attacked(self) -> str:
        if self.attack is None:
            return "clean"
        (radius,) = self.attack.epsilons
        harm = f"at {radius:g}/255" if self.attack.step_at(radius) else "none fooled"
        return f"PGD-{self.attack.steps} {harm}"

    def episode(self, number: int) -> Episode:
        """The episode of that number, on the CPU."""
        side = ARCHS[self.arch].image_size
        drawn = random_episode(side, self.n_shot, self.per_class, stream(3, number))
        return dataclasses.replace(drawn, index=number)


class Outcome(NamedTuple):
    """What became of one episode: coefficients, clean logits (Q, N) for whoever asks, and the share of its
    queries that are right to the end."""

    coefficients: tuple[float, ...]
    logits: Callable[[], Tensor]
    accuracy: float


Evaluate = Callable[[Episode, Attack | None], Outcome]


def ours(network: Network, pool: Pool, job: Job) -> Evaluate:
    """As test_meta_dataset.py evaluates."""

    def routed(support: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[float, ...]:
        return route(network, pool, support, labels, generator, ROUTING)

    equal = uniform(pool)
    predict = merged_predictor(
        network, pool, (lambda *_: equal) if job.trimmed else routed, TRIMS if job.trimmed else ()
    )

    def run(episode: Episode, attack: Attack | None) -> Outcome:
        measured = measure(predict, episode, [attack] if attack else [])
        last = attack.columns[-1] if attack else "clean"
        found = measured.classifier
        return Outcome(found.coefficients, lambda: found.logits(episode.query), measured.row[last])

    return run


def baseline(network: Network, pool: Pool, job: Job) -> Evaluate:
    """As the published code does, with a plain attack."""
    model = Baseline(network)
    trims, fixed = (TRIMS, uniform(pool)) if job.trimmed else ((), None)

    def run(episode: Episode, attack: Attack | None) -> Outcome:
        draws, starts = stream(0, episode.index, 1), query_generators(episode, 0)
        found = evaluate_episode(model, pool, episode, ROUTING, draws, attack, starts, trims, fixed)
        return Outcome(found.coefficients, lambda: found.logits, found.accuracy)

    return run


SIDES = {"ours": ours, "baseline": baseline}


class Bench(Alone):
    """One implementation of one job, in a process of its own; a `side_by_side.Side`."""

    def __init__(self, job: Job, implementation: str, machine: Machine):
        super().__init__(machine)
        self.job = job
        network = random_backbone(job.arch, machine)
        self._evaluate = SIDES[implementation](network, random_pool(network, POOL, RANK, stream(0)), job)
        self._episodes = [
            job.episode(number).to(machine.device) for number in range(max(DISTINCT, job.episodes))
        ]
        self._next = 0
        self.idle_memory = peak_memory(machine.device)

    def _go_through(self, count: int, attack: Attack | None) -> float:
        """Evaluate the next episodes; the mean of their accuracies."""
        accuracies = []
        for _ in range(count):
            episode = self._episodes[self._next % len(self._episodes)]
            self._next += 1
            accuracies.append(self._evaluate(episode, attack).accuracy)
        return statistics.fmean(accuracies)

    def outcome(self) -> tuple[list[float], list[list[float]], float]:
        """Coefficients, clean logits and accuracy of the first episode."""
        found = self._evaluate(self._episodes[0], self.job.attack)
        with torch.no_grad():
            return list(found.coefficients), found.logits().tolist(), found.accuracy

    def count(self) -> Counts:
        """What a turn counts: as the first one does, and as one that finds the trimmed weights ready."""
        self._go_through(self.job.episodes, brief(self.job.attack))
        return counted(lambda: self._go_through(self.job.episodes, self.job.attack))

    def warm_up(self) -> float:
        """Go through the episodes once with a single attack step; about how many seconds a turn will take."""
        began = self.machine.now()
        self._go_through(self.job.episodes, brief(self.job.attack))
        seconds = self.machine.now() - began
        return seconds * self.passes(self.job.attack) / self.passes(brief(self.job.attack))

    def passes(self, attack: Attack | None) -> int:
        """About how many forward passes of one image an episode is worth, to forecast its time."""
        steps = attack.steps if attack else 0
        return N_WAY * ((2 * POOL + 1) * self.job.n_shot + self.job.per_class * (3 * steps + 1))

    def run(self) -> tuple[float, float]:
        """Seconds of one turn, and the share of queries right to the end."""
        began = self.machine.now()
        accuracy = self._go_through(self.job.episodes, self.job.attack)
        return self.machine.now() - began, accuracy


def brief(attack: Attack | None) -> Attack | None:
    """The attack with a single step."""
    return attack and dataclasses.replace(attack, steps=1)


class Difference(NamedTuple):
    """How far the sides are apart on one episode: greatest difference of coefficients, logits, accuracy."""

    coefficients: float
    logits: float
    accuracy: float


def check_alike(job: Job, machine: Machine) -> Difference:
    """How far apart both sides are on an episode of the job.

    Raises:
        RuntimeError: too far to compute the same thing. Of the attacked images one may differ, since the sign
            of a gradient next to zero depends on rounding.
    """
    both = zip(*outcomes(lambda name: Bench(job, name, machine)), strict=True)
    found = Difference(*((torch.tensor(a) - torch.tensor(b)).abs().max().item() for a, b in both))
    one_image = 1.5 / (N_WAY * job.per_class) if job.attack else 1e-6
    if found.coefficients > TOLERANCE or found.logits > TOLERANCE or found.accuracy > one_image:
        raise RuntimeError(f"{job.name}: the two sides compute different things: {found}")
    return found


HEADING = (
    "| 5-way episode | ours, episodes/s | baseline, episodes/s | ours / baseline | GEMM share | right | "
    "logits differ by | turns |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def table_row(job: Job, difference: Difference, row: dict[str, Measured]) -> str:
    """A line under `HEADING`; where a cell holds two figures, ours comes first."""
    mine, other = row["ours"], row["baseline"]
    cells = (
        job.name,
        spread([job.episodes / seconds for seconds in mine.seconds]),
        spread([job.episodes / seconds for seconds in other.seconds]),
        ratio(mine.seconds, other.seconds),
        f"{100 * mine.gemm_share:.0f}% / {100 * other.gemm_share:.0f}%",
        f"{100 * mine.accuracy:.0f}%",
        f"{difference.logits:.0e}",
        str(len(mine.seconds)),
    )
    return f"| {' | '.join(cells)} |"


def plan_of(arch: str, quick: bool) -> list[Job]:
    """The rows of one network."""
    steps, per_class = (2, 2) if quick else (20, 10)
    episodes = 2 if quick else 8 if arch == "vit_mini" else 1
    none_fooled = Attack("pgd", (1e-6,), steps=steps, step_size=0.0)
    jobs = []
    for n_shot in (1, 5):
        job = Job(arch, n_shot, per_class, episodes)
        fewer = dataclasses.replace(job, episodes=max(1, episodes // 4))
        jobs += [
            job,
            dataclasses.replace(job, trimmed=True),
            dataclasses.replace(fewer, attack=none_fooled),
            dataclasses.replace(fewer, attack=Attack("pgd", (8.0,), steps=steps)),
        ]
    return jobs[:3] if quick else jobs


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    return side_by_side.parse(argv, "Time evaluation beside a straightforward baseline.", ["vit_mini"])


def main() -> int:
    args = parse(sys.argv[1:])
    machine, device, _ = side_by_side.find_machine(args)
    report = Report(machine, device)
    for arch in args.arch:
        size = ARCHS[arch].image_size
        jobs = chosen(plan_of(arch, args.quick), args.only)
        queries = N_WAY * jobs[0].per_class
        print(
            f"\n{arch}, random weights, {size} px, {queries} queries, pool of {POOL}\n\n{HEADING}", flush=True
        )
        for number, job in enumerate(jobs):
            say(f"{number + 1} of {len(jobs)}: {job.name}")
            difference = check_alike(job, machine)
            row = side_by_side.measure(
                lambda name, job=job: Bench(job, name, machine),
                lambda turn: side_by_side.planned_repeats(turn, args.repeats),
            )
            described = {"name": job.name, **dataclasses.asdict(job), "difference": difference._asdict()}
            report.add(table_row(job, difference, row), described, row)
    report.end(args.json)
    return 0


if __name__ == "__main__":
    exit_on_bad_input(main)
