"""Adversarial meta-tuning: for each episode, for each robustness level, one step on that level's member
of the pool: a LoRA, or a complete network, which makes no difference here.

Per level and episode (AMT, sections 3.2 and 3.3), with K attack steps:

    support features -> prototypes                    1 support forward, graph kept
    clean query logits                                1 query forward, graph kept: target of the attack,
                                                      and clean term of the weight perturbation
    pyramid attack on the query                       K query forwards, each with one input gradient
    move of the singular factors                      1 query forward on the attacked images
    natural + beta * robust loss at the moved factors 2 query forwards
    SGD step on the unmoved factors

So K + 4 query forwards. Gradients reach the factors through the moved weights (queries) and the unmoved
ones (support). That is the method "adsv"; two baselines take its place in the same loop:

    "querying"    adversarial querying (Goldblum, Fowl and Goldstein 2020, arxiv.org/abs/1910.00982): the
                  loss is that of the attacked queries; the support set is clean, the weights stay in place
    "standard"    plain meta-tuning on clean images; with complete networks this is the meta-training of
                  P>M>F (Hu et al. 2022, arxiv.org/abs/2204.07305)

Knows no files, no validation and no command line.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.attacks.losses import kl_sum
from amt.attacks.perturb import ascend, perturb_weights
from amt.models.head_settings import default_head
from amt.models.heads import Fitted, detached, fit
from amt.models.network import Network, features
from amt.models.pool import Pool
from amt.models.weights import Weights, stream
from amt.training.losses import RobustLoss, robust_loss
from amt.training.optimiser import check_finite, check_loss, momentum, restore_momentum
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode

ALONE = (1.0,)


class QueryOutcome(NamedTuple):
    """One level's forward passes: the loss, and the logits (Q, N) of clean and attacked queries behind it."""

    loss: RobustLoss
    clean: Tensor
    attacked: Tensor


def query_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    level: Perturbation,
    start: list[Tensor],
    loss_scale: float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """The dual-perturbation loss of one member on one episode ("adsv"; AMT, sections 3.2 and 3.3), with graph
    to its factors and scale.

    Args:
        pool: a pool of size one whose factors and scale require gradients.
        level: the perturbation to train against; with gamma 0 the weights do not move.
        start: the attack's start on the queries (Q, 3, H, W), see `Pyramid.start`.
        loss_scale: scales the losses whose gradients steer the two perturbations, so that float16 does not
            flush them to zero.
        head: what classifies the queries, see `TuneSettings`.
    """
    # Each graph gets weights of its own, since taking the weight perturbation's gradient frees its graph.
    classify, weights, fixed = _fitted_to_support(network, pool, episode, head)
    settled = detached(classify)  # the support has no part in the move of the weights
    clean = features(network, weights, episode.query)
    target = settled(clean).detach()

    def divergence(images: Tensor) -> Tensor:
        return kl_sum(target, fixed(images))

    images = ascend(divergence, episode.query, start, level.pyramid, level.steps, loss_scale)
    attacked = features(network, weights, images)
    if level.gamma > 0:
        uphill = robust_loss(settled(clean), settled(attacked), episode.query_labels, level.beta)
        moved = pool.with_factors(perturb_weights(uphill.total, pool.factors, level.gamma, loss_scale))
        both = features(network, moved.merge(ALONE), torch.cat([episode.query, images]))
        clean, attacked = both.chunk(2)
    clean_logits, attacked_logits = classify(clean), classify(attacked)
    loss = robust_loss(clean_logits, attacked_logits, episode.query_labels, level.beta)
    return QueryOutcome(loss, clean_logits, attacked_logits)


def querying_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    level: Perturbation,
    start: list[Tensor],
    loss_scale: float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """Adversarial querying: cross-entropy of the attacked queries alone, the support set clean.

    The attack increases the cross-entropy with the true labels, under weights and prototypes as they are.
    Arguments as of `query_outcome`, queries (Q, 3, H, W); the level's `gamma` and `beta` are not used.
    """
    classify, weights, fixed = _fitted_to_support(network, pool, episode, head)

    def mistakes(images: Tensor) -> Tensor:
        return F.cross_entropy(fixed(images), episode.query_labels, reduction="sum")

    images = ascend(mistakes, episode.query, start, level.pyramid, level.steps, loss_scale)
    attacked = classify(features(network, weights, images))
    with torch.no_grad():
        clean = fixed(episode.query)  # for the record: nothing is learnt from it
    return QueryOutcome(_cross_entropy_alone(attacked, episode.query_labels), clean, attacked)


def natural_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    level: Perturbation | None = None,
    start: list[Tensor] | None = None,
    loss_scale: float = 1.0,
    head: str | None = None,
) -> QueryOutcome:
    """Plain meta-tuning: cross-entropy of the clean queries, support and query under the same weights.

    Queries are (Q, 3, H, W). Nothing is attacked, so level, start and loss_scale are not used.
    """
    weights = pool.merge(ALONE)
    both = features(network, weights, torch.cat([episode.support, episode.query]))
    support, query = both.split([len(episode.support), len(episode.query)])
    clean = _fit(pool, head, support, episode.support_labels)(query)
    return QueryOutcome(_cross_entropy_alone(clean, episode.query_labels), clean, clean)


OUTCOMES = {"adsv": query_outcome, "querying": querying_outcome, "standard": natural_outcome}
METHODS = tuple(OUTCOMES)


def _fit(pool: Pool, head: str | None, support: Tensor, labels: Tensor) -> Fitted:
    """The head fitted to support features (S, D), with graph; the scale is the one that is trained."""
    return fit(default_head(head or "prototypes"), support, labels, scale=pool.scale, bias=pool.bias)


def _fitted_to_support(
    network: Network, pool: Pool, episode: Episode, head: str | None
) -> tuple[Fitted, Weights, Callable[[Tensor], Tensor]]:
    """A member fitted to the support set: the head with graph, weights with a graph of their own for the
    queries, and the classifier images -> logits for the attack, differentiable by the images alone."""
    support = features(network, pool.merge(ALONE), episode.support)
    classify = _fit(pool, head, support, episode.support_labels)
    weights = pool.merge(ALONE)
    still = {name: weight.detach() for name, weight in weights.items()}
    fixed_head = detached(classify)

    def fixed(images: Tensor) -> Tensor:
        return fixed_head(features(network, still, images))

    return classify, weights, fixed


def _cross_entropy_alone(logits: Tensor, labels: Tensor) -> RobustLoss:
    loss = F.cross_entropy(logits, labels)
    return RobustLoss(loss, loss, torch.zeros_like(loss))


class StepRecord(NamedTuple):
    """The record of one level's step: plain numbers, accuracies in [0, 1]."""

    total: float
    natural: float
    robust: float
    clean_accuracy: float
    robust_accuracy: float
    lr: float
    n_way: int
    seconds_per_step: float


class EpochSums(NamedTuple):
    """Sums over one level's steps since an epoch began, which show a collapse.

    Args:
        steps: how many.
        excess: of |natural loss - ln(ways)|.
        divergence: of the robust loss.
        ways: of the last step.
    """

    steps: int
    excess: float
    divergence: float
    ways: int

    def plus(self, record: StepRecord) -> "EpochSums":
        """The sums with one more step."""
        excess = abs(record.natural - math.log(record.n_way))
        return EpochSums(self.steps + 1, self.excess + excess, self.divergence + record.robust, record.n_way)

    def collapsed(self, robust: bool) -> bool:
        """Whether the level looks like a constant network: loss at ln(ways), KL divergence at zero.

        Args:
            robust: whether the level trains against an adversary (only then is there a divergence).
        """
        if self.steps == 0 or self.excess / self.steps >= 0.01:
            return False
        return not robust or self.divergence / self.steps < 1e-3


NO_STEPS = EpochSums(0, 0.0, 0.0, 0)


class Tuner:
    """A pool in training: one leaf copy of every member, its optimiser, and the number of episodes done.

    Only `step` changes it. `state` and `restore` give and take its state; a restored tuner continues exactly
    as the saved one would have.

    >>> tuner = Tuner(network, pool, TuneSettings(method="standard"))
    >>> [round(record.clean_accuracy) <= 1 for record in tuner.step(episode)]
    [True, True]
    """

    def __init__(self, network: Network, pool: Pool, settings: TuneSettings):
        self.network = network
        self.settings = settings
        self.episodes_done = 0
        self._sums = [NO_STEPS] * len(pool)
        self._members = [_leaves(pool[p]) for p in range(len(pool))]
        self._optimisers = [
            torch.optim.SGD([*member.factors.values(), member.scale], settings.lr, settings.momentum)
            for member in self._members
        ]
        half = network.autocast == torch.float16
        self._scalers = [
            torch.amp.GradScaler(network.device.type, init_scale=2.0**10, enabled=half) for _ in self._members
        ]

    @property
    def pool(self) -> Pool:
        """The members as they are now, detached copies."""
        pool = Pool.concat(self._members)
        factors = {name: factor.detach() for name, factor in pool.factors.items()}
        return dataclasses.replace(pool.with_factors(factors), scale=pool.scale.detach())

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
            NonFiniteLoss: the loss of a level is not finite; that level is unchanged, earlier ones have made
                their step.
        """
        starts_epoch = self.episodes_done % self.settings.episodes_per_epoch == 0
        records = [self._level_step(p, episode) for p in range(len(self._members))]
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

    def _level_step(self, p: int, episode: Episode) -> StepRecord:
        began = time.perf_counter()
        member, optimiser, scaler = self._members[p], self._optimisers[p], self._scalers[p]
        lr = learning_rate(self.settings, self.epoch)
        outcome = self._outcome(member, episode, p, scaler.get_scale())
        # Float16 may overflow at a large loss scale; the scaler then skips the step and halves the scale.
        if scaler.get_scale() <= 1:
            epsilon = member.levels[0].epsilon
            check_loss(
                outcome.loss.total, f"episode {self.episodes_done}, level {p} (epsilon {epsilon:g}/255)"
            )
        optimiser.param_groups[0]["lr"] = lr
        optimiser.zero_grad()
        scaler.scale(outcome.loss.total).backward()
        scaler.unscale_(optimiser)
        if self.settings.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], self.settings.clip_grad)
        scaler.step(optimiser)
        scaler.update()
        labels = episode.query_labels
        return StepRecord(
            *(part.item() for part in outcome.loss),
            clean_accuracy=float((outcome.clean.argmax(1) == labels).float().mean()),
            robust_accuracy=float((outcome.attacked.argmax(1) == labels).float().mean()),
            lr=lr,
            n_way=episode.n_way,
            seconds_per_step=time.perf_counter() - began,
        )

    def _outcome(self, member: Pool, episode: Episode, p: int, loss_scale: float) -> QueryOutcome:
        ramp = (self.episodes_done + 1) / max(self.settings.epsilon_warmup, 1)
        level = member.levels[0].scaled(min(ramp, 1.0))
        generator = stream(self.settings.seed, self.episodes_done, p)
        start = level.pyramid.start(episode.query, generator) if self.settings.adversarial else []
        outcome = OUTCOMES[self.settings.method]
        return outcome(self.network, member, episode, level, start, loss_scale, self.settings.head)

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


def _leaves(member: Pool) -> Pool:
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in member.factors.items()}
    scale = member.scale.detach().clone().requires_grad_()
    return dataclasses.replace(member.with_factors(factors), scale=scale)
