"""Meta-tuning step by step: who trains which level on which episode, the optimisers, and their state.

A step has B episodes (`episodes_per_step`), whose gradients are averaged, level by level. The processes of a
run share its P levels and B episodes out, see `share`: first the levels, which have nothing to tell each
other, then the episodes. Gradients are added in the order of the episodes, so that a step is the same, bit
for bit, whoever works on it. The weights are moved (AMT, section 3.3) for every episode by its own gradient;
the published code, under DistributedDataParallel, moves them by the mean over its processes.

What an episode asks for is told in amt/training/meta_tune.py. Knows no files, no validation and no command
line.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from amt.attacks.levels import together
from amt.files.ranks import ALONE, Ranks
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.weights import Weights, stream
from amt.training.meta_tune import QueryOutcome, drawn_levels, outcome_of, started
from amt.training.optimiser import check_finite, check_loss, momentum, restore_momentum
from amt.training.records import NO_STEPS, EpochSums, StepRecord, mean
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode


class Share(NamedTuple):
    """What one rank trains: some levels, on the episodes `place`, `place` + `places`, ... of every step."""

    levels: tuple[int, ...]
    place: int
    places: int

    def episodes(self, n: int) -> range:
        """Those of a step's n episodes, by their numbers within it."""
        return range(self.place, n, self.places)


def share(rank: int, world: int, levels: int) -> Share:
    """What a rank trains. While there are levels enough every rank has some of its own; otherwise it has one,
    and shares the episodes out with the other ranks of that level.

    >>> share(1, 2, levels=4), share(5, 6, levels=4)
    (Share(levels=(2, 3), place=0, places=1), Share(levels=(1,), place=1, places=2))
    """
    if world <= levels:
        return Share(tuple(range(rank * levels // world, (rank + 1) * levels // world)), 0, 1)
    level = rank % levels
    return Share((level,), rank // levels, len(range(level, world, levels)))


class Tuner:
    """A pool in training: leaf copies of its members, an optimiser for each, and the number of episodes done.

    Only `step` changes it. `state` and `restore` give and take its state; a restored tuner continues exactly
    as the saved one would have.

    Args:
        pool: all members, on every rank.
        at_once: most levels in one pass, for less memory; None for all.
        ranks: that train it together, each its `share`; what they know of others' levels are the records.

    >>> tuner = Tuner(network, pool, TuneSettings(method="standard"))
    >>> [round(record.clean_accuracy) <= 1 for record in tuner.step(episode)]
    [True, True]
    """

    def __init__(
        self,
        network: Network,
        pool: Pool,
        settings: TuneSettings,
        at_once: int | None = None,
        ranks: Ranks = ALONE,
    ):
        self.network = network
        self.settings = settings
        self.episodes_done = 0
        self._sums = [NO_STEPS] * len(pool)
        self._ranks, self.share = ranks, share(ranks.rank, ranks.world, len(pool))
        shares = [share(rank, ranks.world, len(pool)) for rank in range(ranks.world)]
        distinct = dict.fromkeys(each.levels for each in shares)
        self._siblings = ranks.split(  # those who train the same levels
            [[rank for rank, each in enumerate(shares) if each.levels == own] for own in distinct]
        )
        self._plain = pool.to("cpu") if ranks.world > 1 else None  # what `gathered` puts members back into
        # The levels that train together, by their numbers, and leaves of their members side by side.
        own = self.share.levels
        groups = together([pool.levels[p] for p in own], at_once or len(pool))
        self._together = {
            numbers: _leaves(Pool.concat([pool[p] for p in numbers]))
            for numbers in (tuple(own[k] for k in group) for group in groups)
        }
        members = {}
        for numbers, leaves in self._together.items():
            members |= zip(numbers, _views(leaves), strict=True)
        self._members = {p: members[p] for p in own}
        self._optimisers = {
            p: torch.optim.SGD(_parameters(member).values(), settings.lr, settings.momentum)
            for p, member in self._members.items()
        }
        half = network.autocast == torch.float16
        self._scalers = {
            p: torch.amp.GradScaler(network.device.type, init_scale=2.0**10, enabled=half) for p in own
        }

    @property
    def pool(self) -> Pool:
        """The members that this rank trains, all if it is alone, as they are now: detached copies."""
        return Pool.concat(list(self._members.values()))

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.episodes_done // self.settings.episodes_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.settings.epochs

    def own_episodes(self, total: int) -> list[int]:
        """The numbers of the episodes, up to `total`, that this rank needs from now on, step by step."""
        size = self.settings.episodes_per_step
        return [
            first + k for first in range(self.episodes_done, total, size) for k in self.share.episodes(size)
        ]

    def step(self, *episodes: Episode) -> list[StepRecord]:
        """Train on this rank's share of the episodes of one step; a record per level, the mean over all of
        the step's episodes. Raises NonFiniteLoss if the loss of a level is not finite; no level of its pass
        has made its step."""
        size, lr = self.settings.episodes_per_step, learning_rate(self.settings, self.epoch)
        starts_epoch = self.episodes_done % self.settings.episodes_per_epoch == 0
        rows = torch.zeros(len(self._sums), size, len(StepRecord._fields), dtype=torch.float64)
        for numbers, leaves in self._together.items():
            self._step_together(numbers, leaves, episodes, rows, lr)
        found = [[StepRecord.of(row) for row in level] for level in self._ranks.total(rows).tolist()]
        for p, records in enumerate(found):
            before = NO_STEPS if starts_epoch else self._sums[p]
            self._sums[p] = functools.reduce(EpochSums.plus, records, before)
        self.episodes_done += size
        return [mean(records) for records in found]

    def collapsed(self) -> dict[int, int]:
        """The levels that behave like a constant network since the epoch began, with their last ways."""
        if self.settings.loss == "features":  # a constant network is far from the pretrained one
            return {}
        robust = self.settings.method == "adsv"  # the other methods have no divergence
        return {p: sums.ways for p, sums in enumerate(self._sums) if sums.collapsed(robust)}

    def check_finite(self) -> None:
        """Raise `NonFiniteLoss` if the last step left anything that is not finite."""
        for p, member in self._members.items():
            check_finite(_parameters(member), f"episode {self.episodes_done}, level {p}")

    def _step_together(
        self, numbers: Sequence[int], leaves: Pool, episodes: Sequence[Episode], rows: Tensor, lr: float
    ) -> None:
        """The passes of some levels, one for each episode, and then each one's step of its own; what is noted
        of them goes into `rows` (P, B, fields)."""
        size, places = self.settings.episodes_per_step, self.share.places
        found: list[Tensor | None] = []
        total: list[Tensor | None] = []
        for first in range(0, size, places):
            place = first + self.share.place
            if place < size:  # else others have an episode left: they are only listened to
                found, noted = self._gradients(numbers, leaves, episodes[first // places], place, lr)
                rows[list(numbers), place] = torch.tensor(noted, dtype=torch.float64)
            for gradients in self._siblings.each(found)[: size - first]:
                total = [_sum(a, b) for a, b in zip(total, gradients, strict=True)] if total else gradients
        if size > 1:
            total = [None if gradient is None else gradient / size for gradient in total]
        for k, p in enumerate(numbers):
            self._descend(p, [None if gradient is None else gradient[k : k + 1] for gradient in total], lr)

    def _gradients(
        self, numbers: Sequence[int], leaves: Pool, episode: Episode, place: int, lr: float
    ) -> tuple[list[Tensor | None], list[StepRecord]]:
        """The scaled gradients (P, ...) of some levels on the episode `place` of a step, and what is noted of
        each level."""
        began = time.perf_counter()
        one = torch.ones((), device=episode.query.device)
        scales = torch.stack([self._scalers[p].scale(one) for p in numbers])
        outcome = self._outcome(numbers, leaves, episode, scales, self.episodes_done + place)
        (scales * outcome.loss.total).sum().backward()
        right = [
            (logits.argmax(-1) == episode.query_labels).float().mean(-1)
            for logits in (outcome.clean, outcome.attacked)
        ]
        # All numbers at once, and only now: a device has to finish its work before it can tell any.
        told = torch.stack([scales, *outcome.loss, *right], dim=1).tolist()
        for p, (scale, total, *_) in zip(numbers, told, strict=True):
            # Float16 may overflow at a large loss scale; the scaler then skips the step and halves the scale.
            if scale <= 1:
                epsilon = self._members[p].levels[0].epsilon
                where = f"episode {self.episodes_done + place}, level {p} (epsilon {epsilon:g}/255)"
                check_loss(total, where)
        gradients = [parameter.grad for parameter in _parameters(leaves).values()]
        for parameter in _parameters(leaves).values():
            parameter.grad = None
        seconds = (time.perf_counter() - began) / len(numbers)
        n_way = outcome.clean.shape[-1]
        return gradients, [StepRecord._make([*row[1:6], lr, n_way, seconds]) for row in told]

    def _descend(self, p: int, gradients: Sequence[Tensor | None], lr: float) -> None:
        """One step of SGD on level p, by the scaled gradients of its parameters."""
        optimiser, scaler = self._optimisers[p], self._scalers[p]
        (group,) = optimiser.param_groups
        group["lr"] = lr
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = gradient
        scaler.unscale_(optimiser)
        if self.settings.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], self.settings.clip_grad)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()

    def _outcome(
        self, numbers: Sequence[int], leaves: Pool, episode: Episode, scales: Tensor, index: int
    ) -> QueryOutcome:
        """The losses of some levels on the episode `index` of the run."""
        ramp = (index + 1) / max(self.settings.epsilon_warmup, 1)
        # Keyed by the level's number in the pool: whatever trains together, and where, it sees the same.
        generators = [stream(self.settings.seed, index, p) for p in numbers]
        drawn = drawn_levels(leaves.levels, self.settings.epsilon_from, generators)
        levels = tuple(level.scaled(min(ramp, 1.0)) for level in drawn)
        start = started(levels, episode.query, generators) if self.settings.adversarial else []
        outcome = outcome_of(self.settings)
        pool = dataclasses.replace(leaves, levels=levels)
        return outcome(self.network, pool, episode, start, scales, self.settings.head)

    def state(self) -> tuple[Weights, dict]:
        """The state besides the pool, of this rank's levels: the optimisers' momentum by name, and plain
        numbers."""
        buffers = {
            f"{p}.{name}": buffer
            for p, member in self._members.items()
            for name, buffer in momentum(self._optimisers[p], _parameters(member)).items()
        }
        return buffers, {
            "episodes_done": self.episodes_done,
            "scalers": [scaler.state_dict() for scaler in self._scalers.values()],
            "seen": [list(sums) for sums in self._sums],
        }

    def gathered(self) -> tuple[Pool, Weights, dict]:
        """The pool and the state of all levels, on rank 0, whatever the number of ranks; all ranks call it,
        and what the others get has their own levels up to date."""
        buffers, numbers = self.state()
        if self._plain is None:
            return self.pool, buffers, numbers
        mine = [
            (p, _on_cpu(_parameters(member)), scaler)
            for (p, member), scaler in zip(self._members.items(), numbers["scalers"], strict=True)
        ]
        found = self._ranks.collected((mine, _on_cpu(buffers)) if self.share.place == 0 else ([], {}))
        levels = sorted(itertools.chain(*(part for part, _ in found)), key=lambda level: level[0])
        members = [self._plain[p] for p in range(len(self._plain))]
        scalers: list[dict] = [{}] * len(members)
        for p, tensors, scaler in levels:
            scale = tensors.pop("scale")
            members[p] = dataclasses.replace(members[p].with_factors(tensors), scale=scale)
            scalers[p] = scaler
        momentum = {name: buffer for _, part in found for name, buffer in part.items()}
        return Pool.concat(members), momentum, numbers | {"scalers": scalers}

    def restore(self, buffers: Weights, numbers: dict) -> None:
        """Continue from the state of all levels, what `gathered` gave; the pool is given to the constructor.
        Raises KeyError, IndexError, TypeError or ValueError for anything else."""
        self.episodes_done = numbers["episodes_done"]
        for p, member in self._members.items():
            own = {name.removeprefix(f"{p}."): b for name, b in buffers.items() if name.startswith(f"{p}.")}
            restore_momentum(self._optimisers[p], _parameters(member), own)
            if numbers["scalers"][p]:
                self._scalers[p].load_state_dict(numbers["scalers"][p])
        if "seen" in numbers:  # not in older files
            self._sums = [EpochSums(*numbers["seen"][p]) for p in range(len(self._sums))]


def meta_tune(
    network: Network, pool: Pool, episodes: Iterable[Episode], settings: TuneSettings | None = None
) -> Pool:
    """The pool after a step of every member on each episode, until the episodes or the settings' epochs end.

    main.py does the same step, and keeps a run beside it: checkpoints, validation, a log.

    Args:
        pool: on the network's device, for example a `principal_pool`; it is not written to.
        settings: length and rate; None for the published ones, whose first epochs warm up.

    Raises:
        NonFiniteLoss: a loss or a weight is not finite.

    >>> short = TuneSettings(epochs=1, episodes_per_epoch=2, method="standard")
    >>> len(meta_tune(network, pool, [episode, episode], short))
    2
    """
    tuner = Tuner(network, pool, settings or TuneSettings())
    chosen = itertools.islice(episodes, tuner.settings.epochs * tuner.settings.episodes_per_epoch)
    for some in steps(chosen, tuner.settings.episodes_per_step):
        tuner.step(*(episode.to(network.device) for episode in some))
    tuner.check_finite()
    return tuner.pool


def steps(episodes: Iterable[Episode], size: int) -> Iterator[list[Episode]]:
    """The episodes, so many for each step; what is left over is no step."""
    coming = iter(episodes)
    while len(some := list(itertools.islice(coming, size))) == size:
        yield some


@functools.cache  # builds a scheduler, and the rate is the same for a whole epoch
def learning_rate(settings: TuneSettings, epoch: int) -> float:
    """The learning rate of an epoch: linear from `warmup_lr`, then a cosine over all epochs to `min_lr`."""
    schedule = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], settings.lr),
        t_initial=settings.epochs,
        lr_min=settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
        cycle_decay=0.5,  # of a second cycle, which does not come; of 1, timm warns where there is one epoch
    )
    schedule.step(epoch)
    return schedule.optimizer.param_groups[0]["lr"]


def _parameters(member: Pool) -> dict[str, Tensor]:
    return member.factors | {"scale": member.scale}


def _on_cpu(tensors: Weights) -> Weights:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other


def _leaves(pool: Pool) -> Pool:
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in pool.factors.items()}
    scale = pool.scale.detach().clone().requires_grad_()
    return dataclasses.replace(pool.with_factors(factors), scale=scale)


def _views(leaves: Pool) -> list[Pool]:
    """The members one by one, without graph: what is written to them the leaves hold."""
    factors = {name: factor.detach() for name, factor in leaves.factors.items()}
    plain = dataclasses.replace(leaves.with_factors(factors), scale=leaves.scale.detach())
    return [plain[k] for k in range(len(plain))]
