"""Adversarial meta-tuning: for each episode, for each robustness level, one step on that level's member
of the pool: a LoRA, or a complete network, which makes no difference here.

All P levels of an episode go through the network together: the images of one level after those of the other,
each by that level's weights, so that a pass is a pass whatever P. Nothing crosses from level to level, and
each has its own random start, optimiser and loss scale: the same as one level after the other.

Per episode (AMT, sections 3.2 and 3.3), with K attack steps:

    support features -> prototypes                    1 support forward, graph kept
    clean query logits                                1 query forward, graph kept: target of the attack,
                                                      and clean term of the weight perturbation
    pyramid attack on the query                       K query forwards, each with one input gradient
    move of the singular factors                      1 query forward on the attacked images
    natural + beta * robust loss at the moved factors 2 query forwards
    SGD step on the unmoved factors

So K + 4 query forwards of P levels. Gradients reach the factors through the moved weights (queries) and the
unmoved ones (support). That is the method "adsv"; two baselines take its place in the same loop:

    "querying"    adversarial querying (Goldblum, Fowl and Goldstein 2020, arxiv.org/abs/1910.00982): the
                  loss is that of the attacked queries; the support set is clean, the weights stay in place
    "standard"    plain meta-tuning on clean images; with complete networks this is the meta-training of
                  P>M>F (Hu et al. 2022, arxiv.org/abs/2204.07305)

Knows no files, no validation and no command line.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from amt.attacks.constants import constant
from amt.attacks.levels import Perturbation, together
from amt.attacks.losses import cross_entropy_sum, kl_sum
from amt.attacks.perturb import perturb_weights
from amt.models.head_settings import default_head
from amt.models.heads import Fitted, detached, fit, stacked
from amt.models.network import Network, level_features
from amt.models.pool import Pool
from amt.models.weights import Weights, stream
from amt.training.attack import attacked_queries
from amt.training.losses import RobustLoss, robust_loss
from amt.training.optimiser import check_finite, check_loss, momentum, restore_momentum
from amt.training.records import NO_STEPS, EpochSums, StepRecord
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode


class QueryOutcome(NamedTuple):
    """The forward passes of P levels: the losses (P,), and the logits (P, Q, N) of clean and attacked queries
    behind them."""

    loss: RobustLoss
    clean: Tensor
    attacked: Tensor


def query_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor],
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """The dual-perturbation loss of every member on one episode ("adsv"; AMT, sections 3.2 and 3.3), with
    graph to its factors and scale.

    Args:
        pool: P members whose factors and scale require gradients, and their levels, which have grids, scalars
            and steps in common; where every gamma is 0 the weights do not move.
        start: the attack's start on the queries of all levels (P Q, 3, H, W), see `started`.
        loss_scale: scales the losses whose gradients steer the two perturbations, so that float16 does not
            flush them to zero: a number, or one for each level (P,).
        head: what classifies the queries, see `TuneSettings`.
    """
    # Each graph gets weights of its own, since taking the weight perturbation's gradient frees its graph.
    # The support has no part in the move of the weights: there its head is settled.
    heads, weights, settled, fixed = _fitted_to_support(network, pool, episode, head)
    query = _for_each(pool, episode.query)
    clean = level_features(network, weights, query)
    target = settled(clean).detach()

    def divergence(images: Tensor, which: slice) -> Tensor:
        return (loss_scale * kl_sum(target[:, which], fixed(images))).sum()

    images = attacked_queries(pool.levels, divergence, query, start, network.micro_batch, network.compiler)
    attacked = level_features(network, weights, images)
    gamma, beta = _numbers(pool.levels, "gamma", pool.scale), _numbers(pool.levels, "beta", target)
    if any(level.gamma > 0 for level in pool.levels):
        uphill = robust_loss(settled(clean), settled(attacked), episode.query_labels, beta)
        moved = perturb_weights((loss_scale * uphill.total).sum(), pool.factors, gamma)
        both = torch.cat([query, images], dim=1)
        clean, attacked = level_features(network, pool.with_factors(moved).stack(), both).chunk(2, dim=1)
    clean_logits, attacked_logits = _classified(heads, clean), _classified(heads, attacked)
    loss = robust_loss(clean_logits, attacked_logits, episode.query_labels, beta)
    return QueryOutcome(loss, clean_logits, attacked_logits)


def querying_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor],
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """Adversarial querying: cross-entropy of the attacked queries alone, the support set clean.

    The attack increases the cross-entropy with the true labels, under weights and prototypes as they are.
    Arguments as of `query_outcome`, queries (Q, 3, H, W); the levels' `gamma` and `beta` are not used.
    """
    heads, weights, _, fixed = _fitted_to_support(network, pool, episode, head)
    query = _for_each(pool, episode.query)

    def mistakes(images: Tensor, which: slice) -> Tensor:
        return (loss_scale * cross_entropy_sum(fixed(images), episode.query_labels[which])).sum()

    images = attacked_queries(pool.levels, mistakes, query, start, network.micro_batch, network.compiler)
    attacked = _classified(heads, level_features(network, weights, images))
    with torch.no_grad():
        clean = fixed(query)  # for the record: nothing is learnt from it
    return QueryOutcome(_cross_entropy_alone(attacked, episode.query_labels), clean, attacked)


def natural_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    start: list[Tensor] | None = None,
    loss_scale: Tensor | float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """Plain meta-tuning: cross-entropy of the clean queries, support and query under the same weights.

    Queries are (Q, 3, H, W). Nothing is attacked, so levels, start and loss_scale are not used.
    """
    images = _for_each(pool, torch.cat([episode.support, episode.query]))
    both = level_features(network, pool.stack(), images)
    support, query = both.split([len(episode.support), len(episode.query)], dim=1)
    clean = _classified(_fit(pool, head, support, episode.support_labels), query)
    return QueryOutcome(_cross_entropy_alone(clean, episode.query_labels), clean, clean)


OUTCOMES = {"adsv": query_outcome, "querying": querying_outcome, "standard": natural_outcome}
METHODS = tuple(OUTCOMES)


def _for_each(pool: Pool, images: Tensor) -> Tensor:
    """The same images (N, 3, H, W) for every member: (P, N, 3, H, W)."""
    return images.expand(len(pool), *images.shape)


def _numbers(levels: Sequence[Perturbation], name: str, like: Tensor) -> Tensor:
    """One number of every level: (P,), on the device of `like`."""
    return constant(tuple(getattr(level, name) for level in levels), like)


def _fit(pool: Pool, head: str | None, support: Tensor, labels: Tensor) -> list[Fitted]:
    """The head of every member fitted to its support features (P, S, D), with graph; the scale is the one
    that is trained."""
    kind = default_head(head or "prototypes")
    own = zip(support, pool.scale.split(1), pool.bias.split(1), strict=True)
    return [fit(kind, seen, labels, scale=scale, bias=bias) for seen, scale, bias in own]


def _classified(heads: list[Fitted], queries: Tensor) -> Tensor:
    """Logits (P, Q, N) of features (P, Q, D), head by head: their gradients are then those of each alone."""
    return torch.stack([fitted(seen) for fitted, seen in zip(heads, queries, strict=True)])


def _fitted_to_support(
    network: Network, pool: Pool, episode: Episode, head: str | None
) -> tuple[list[Fitted], Weights, Fitted, Callable[[Tensor], Tensor]]:
    """All members fitted to the support set: heads with graph; weights with a graph of their own for the
    queries; and without graph all heads as one, and the classifier images (P, Q, 3, H, W) -> logits (P, Q, N)
    for the attack, differentiable by the images alone."""
    support = level_features(network, pool.stack(), _for_each(pool, episode.support))
    heads = _fit(pool, head, support, episode.support_labels)
    settled = stacked([detached(fitted) for fitted in heads])
    weights = pool.stack()
    still = {name: weight.detach() for name, weight in weights.items()}

    def fixed(images: Tensor) -> Tensor:
        return settled(level_features(network, still, images))

    return heads, weights, settled, fixed


def _cross_entropy_alone(logits: Tensor, labels: Tensor) -> RobustLoss:
    loss = cross_entropy_sum(logits, labels) / len(labels)
    return RobustLoss(loss, loss, torch.zeros_like(loss))


def started(
    levels: Sequence[Perturbation], query: Tensor, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """The attack's start on the queries (Q, 3, H, W) at P levels, from a CPU generator for each: (P Q, 3,
    rows, columns) for every grid."""
    shape = torch.empty(query.shape)
    drawn = [
        level.pyramid.start(shape, generator) for level, generator in zip(levels, generators, strict=True)
    ]
    return [torch.cat(grid).to(query) for grid in zip(*drawn, strict=True)]


class Tuner:
    """A pool in training: leaf copies of its members, an optimiser for each, and the number of episodes done.

    Only `step` changes it. `state` and `restore` give and take its state; a restored tuner continues exactly
    as the saved one would have.

    Args:
        at_once: most levels in one pass; fewer need less memory and give the same result. None for all.

    >>> tuner = Tuner(network, pool, TuneSettings(method="standard"))
    >>> [round(record.clean_accuracy) <= 1 for record in tuner.step(episode)]
    [True, True]
    """

    def __init__(self, network: Network, pool: Pool, settings: TuneSettings, at_once: int | None = None):
        self.network = network
        self.settings = settings
        self.episodes_done = 0
        self._sums = [NO_STEPS] * len(pool)
        # The levels that train together, by their numbers, and leaves of their members side by side.
        self._together = {
            numbers: _leaves(Pool.concat([pool[p] for p in numbers]))
            for numbers in together(pool.levels, at_once or len(pool))
        }
        members = {}
        for numbers, leaves in self._together.items():
            members |= zip(numbers, _views(leaves), strict=True)
        self._members = [members[p] for p in range(len(pool))]
        self._optimisers = [
            torch.optim.SGD(_parameters(member).values(), settings.lr, settings.momentum)
            for member in self._members
        ]
        half = network.autocast == torch.float16
        self._scalers = [
            torch.amp.GradScaler(network.device.type, init_scale=2.0**10, enabled=half) for _ in self._members
        ]

    @property
    def pool(self) -> Pool:
        """The members as they are now, detached copies."""
        return Pool.concat(self._members)

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.episodes_done // self.settings.episodes_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.settings.epochs

    def step(self, episode: Episode) -> list[StepRecord]:
        """Train every level on one episode; a record per level.

        Raises:
            NonFiniteLoss: the loss of a level is not finite; no level of its pass has made its step.
        """
        starts_epoch = self.episodes_done % self.settings.episodes_per_epoch == 0
        found: dict[int, StepRecord] = {}
        for numbers, leaves in self._together.items():
            found |= zip(numbers, self._step_together(numbers, leaves, episode), strict=True)
        records = [found[p] for p in range(len(self._members))]
        before = [NO_STEPS] * len(records) if starts_epoch else self._sums
        self._sums = [sums.plus(record) for sums, record in zip(before, records, strict=True)]
        self.episodes_done += 1
        return records

    def collapsed(self) -> dict[int, int]:
        """The levels that behave like a constant network since the epoch began, with their last ways."""
        robust = self.settings.method == "adsv"  # the other methods have no divergence
        return {p: sums.ways for p, sums in enumerate(self._sums) if sums.collapsed(robust)}

    def check_finite(self) -> None:
        """Raise `NonFiniteLoss` if the last step left anything that is not finite."""
        for p, member in enumerate(self._members):
            check_finite(_parameters(member), f"episode {self.episodes_done}, level {p}")

    def _step_together(self, numbers: Sequence[int], leaves: Pool, episode: Episode) -> list[StepRecord]:
        """One pass of some levels, then each one's step of its own."""
        began = time.perf_counter()
        one = torch.ones((), device=episode.query.device)
        scales = torch.stack([self._scalers[p].scale(one) for p in numbers])
        outcome = self._outcome(numbers, leaves, episode, scales)
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
                check_loss(total, f"episode {self.episodes_done}, level {p} (epsilon {epsilon:g}/255)")
        lr = learning_rate(self.settings, self.epoch)
        parameters = _parameters(leaves).values()
        for k, p in enumerate(numbers):
            self._descend(p, [None if x.grad is None else x.grad[k : k + 1] for x in parameters], lr)
        for parameter in parameters:
            parameter.grad = None
        seconds = (time.perf_counter() - began) / len(numbers)
        n_way = outcome.clean.shape[-1]
        return [StepRecord(*row[1:6], lr=lr, n_way=n_way, seconds_per_step=seconds) for row in told]

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
        self, numbers: Sequence[int], leaves: Pool, episode: Episode, scales: Tensor
    ) -> QueryOutcome:
        ramp = (self.episodes_done + 1) / max(self.settings.epsilon_warmup, 1)
        levels = tuple(level.scaled(min(ramp, 1.0)) for level in leaves.levels)
        # Keyed by the level's number in the pool: whatever trains together, a level sees the same.
        generators = [stream(self.settings.seed, self.episodes_done, p) for p in numbers]
        start = started(levels, episode.query, generators) if self.settings.adversarial else []
        outcome = OUTCOMES[self.settings.method]
        pool = dataclasses.replace(leaves, levels=levels)
        return outcome(self.network, pool, episode, start, scales, self.settings.head)

    def state(self) -> tuple[Weights, dict]:
        """The state besides the pool: the optimisers' momentum by name, and plain numbers."""
        buffers = {
            f"{p}.{name}": buffer
            for p, member in enumerate(self._members)
            for name, buffer in momentum(self._optimisers[p], _parameters(member)).items()
        }
        return buffers, {
            "episodes_done": self.episodes_done,
            "scalers": [scaler.state_dict() for scaler in self._scalers],
            "seen": [list(sums) for sums in self._sums],
        }

    def restore(self, buffers: Weights, numbers: dict) -> None:
        """Continue from what `state` gave; the pool itself is given to the constructor.

        Raises:
            KeyError, IndexError, TypeError or ValueError: it is not the state of such a tuner.
        """
        self.episodes_done = numbers["episodes_done"]
        for p, member in enumerate(self._members):
            own = {name.removeprefix(f"{p}."): b for name, b in buffers.items() if name.startswith(f"{p}.")}
            restore_momentum(self._optimisers[p], _parameters(member), own)
            if numbers["scalers"][p]:
                self._scalers[p].load_state_dict(numbers["scalers"][p])
            if "seen" in numbers:  # not in older files
                self._sums[p] = EpochSums(*numbers["seen"][p])


def meta_tune(
    network: Network, pool: Pool, episodes: Iterable[Episode], settings: TuneSettings | None = None
) -> Pool:
    """The pool after a step of every member on each episode, until the episodes or the settings' epochs end.

    main.py does the same step, and keeps a run beside it: checkpoints, validation, a log.

    Args:
        network: the structure, on the device to train on.
        pool: on that device, for example a `principal_pool`; it is not written to.
        episodes: support (S, 3, H, W) and query (Q, 3, H, W) in [0, 1].
        settings: length and rate; None for the published ones, whose first epochs warm up.

    Raises:
        NonFiniteLoss: a loss or a weight is not finite.

    >>> short = TuneSettings(epochs=1, episodes_per_epoch=2, method="standard")
    >>> len(meta_tune(network, pool, [episode, episode], short))
    2
    """
    tuner = Tuner(network, pool, settings or TuneSettings())
    for episode in itertools.islice(episodes, tuner.settings.epochs * tuner.settings.episodes_per_epoch):
        tuner.step(episode.to(network.device))
    tuner.check_finite()
    return tuner.pool


@functools.cache  # builds a scheduler, and the rate is the same for a whole epoch
def learning_rate(settings: TuneSettings, epoch: int) -> float:
    """The learning rate of an epoch: linear from `warmup_lr`, then a cosine over all epochs to `min_lr`."""
    schedule = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], settings.lr),
        t_initial=settings.epochs,
        lr_min=settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
    )
    schedule.step(epoch)
    return schedule.optimizer.param_groups[0]["lr"]


def _parameters(member: Pool) -> dict[str, Tensor]:
    return member.factors | {"scale": member.scale}


def _leaves(pool: Pool) -> Pool:
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in pool.factors.items()}
    scale = pool.scale.detach().clone().requires_grad_()
    return dataclasses.replace(pool.with_factors(factors), scale=scale)


def _views(leaves: Pool) -> list[Pool]:
    """The members one by one, without graph: what is written to them the leaves hold."""
    factors = {name: factor.detach() for name, factor in leaves.factors.items()}
    plain = dataclasses.replace(leaves.with_factors(factors), scale=leaves.scale.detach())
    return [plain[k] for k in range(len(plain))]
