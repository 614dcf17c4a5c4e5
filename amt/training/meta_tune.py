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
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from amt.attacks.perturb import PIXELS, ValueSpace, perturb_weights, pyramid_attack, pyramid_start
from amt.attacks.settings import Perturbation
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features
from amt.models.pool import Pool
from amt.models.weights import Weights, stream
from amt.training.losses import RobustLoss, kl_sum, robust_loss
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode

ALONE = (1.0,)


class QueryOutcome(NamedTuple):
    """What one level's forward passes gave: the loss, and the logits (Q, N) it was made of."""

    loss: RobustLoss
    clean: Tensor
    attacked: Tensor


def query_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    level: Perturbation,
    start: list[Tensor],
    space: ValueSpace = PIXELS,
    loss_scale: float = 1.0,
) -> QueryOutcome:
    """The dual-perturbation loss of one member on one episode, with graph to its factors and scale.

    Args:
        pool: a pool of size one whose factors and scale require gradients.
        level: the perturbation to train against; with gamma 0 the weights stay where they are.
        start: the attack's start, see `pyramid_start`.
        space: units of the episode's images.
        loss_scale: scales the losses whose gradients steer the two perturbations.
    """

    def query_features(weights: Weights, images: Tensor) -> Tensor:
        return features(network, weights, images)

    def logits(query: Tensor, centres: Tensor) -> Tensor:
        return cosine_logits(query, centres, pool.scale, pool.bias)

    # Each graph gets weights of its own, since taking the weight perturbation's gradient frees its graph.
    support = features(network, pool.merge(ALONE), episode.support)
    centres = prototypes(support, episode.support_labels, episode.n_way)
    fixed_centres = centres.detach()
    weights = pool.merge(ALONE)
    clean = query_features(weights, episode.query)

    fixed = _fixed_network(network, pool, weights, centres)
    target = logits(clean, fixed_centres).detach()

    def divergence(images: Tensor) -> Tensor:
        return kl_sum(target, fixed(images))

    images = pyramid_attack(divergence, episode.query, start, level, space, loss_scale)
    attacked = query_features(weights, images)
    if level.gamma > 0:
        uphill = robust_loss(
            logits(clean, fixed_centres), logits(attacked, fixed_centres), episode.query_labels, level.beta
        )
        moved = pool.with_factors(perturb_weights(uphill.total, pool.factors, level.gamma, loss_scale))
        both = query_features(moved.merge(ALONE), torch.cat([episode.query, images]))
        clean, attacked = both.chunk(2)
    clean_logits, attacked_logits = logits(clean, centres), logits(attacked, centres)
    loss = robust_loss(clean_logits, attacked_logits, episode.query_labels, level.beta)
    return QueryOutcome(loss, clean_logits, attacked_logits)


def querying_outcome(
    network: Network,
    pool: Pool,
    episode: Episode,
    level: Perturbation,
    start: list[Tensor],
    space: ValueSpace = PIXELS,
    loss_scale: float = 1.0,
) -> QueryOutcome:
    """Adversarial querying: cross-entropy of the attacked queries alone, the support set clean.

    The attack increases the cross-entropy with the true labels, under weights and prototypes as they are.
    Arguments as for `query_outcome`; the level's `gamma` and `beta` have no part in it.
    """
    support = features(network, pool.merge(ALONE), episode.support)
    centres = prototypes(support, episode.support_labels, episode.n_way)
    weights = pool.merge(ALONE)
    fixed = _fixed_network(network, pool, weights, centres)

    def mistakes(images: Tensor) -> Tensor:
        return F.cross_entropy(fixed(images), episode.query_labels, reduction="sum")

    images = pyramid_attack(mistakes, episode.query, start, level, space, loss_scale)
    attacked = cosine_logits(features(network, weights, images), centres, pool.scale, pool.bias)
    with torch.no_grad():
        clean = fixed(episode.query)  # for the record: nothing is learnt from it
    return QueryOutcome(_cross_entropy_alone(attacked, episode.query_labels), clean, attacked)


def _fixed_network(
    network: Network, pool: Pool, weights: Weights, centres: Tensor
) -> Callable[[Tensor], Tensor]:
    """Images -> logits with nothing but the images to differentiate, which is what an attack is shown."""
    weights = {name: weight.detach() for name, weight in weights.items()}
    centres, scale = centres.detach(), pool.scale.detach()
    return lambda images: cosine_logits(features(network, weights, images), centres, scale, pool.bias)


def natural_outcome(network: Network, pool: Pool, episode: Episode) -> QueryOutcome:
    """Plain meta-tuning: cross-entropy of the clean queries, support and query under the same weights."""
    weights = pool.merge(ALONE)
    both = features(network, weights, torch.cat([episode.support, episode.query]))
    support, query = both.split([len(episode.support), len(episode.query)])
    centres = prototypes(support, episode.support_labels, episode.n_way)
    clean = cosine_logits(query, centres, pool.scale, pool.bias)
    return QueryOutcome(_cross_entropy_alone(clean, episode.query_labels), clean, clean)


def _cross_entropy_alone(logits: Tensor, labels: Tensor) -> RobustLoss:
    loss = F.cross_entropy(logits, labels)
    return RobustLoss(loss, loss, torch.zeros_like(loss))


class StepRecord(NamedTuple):
    """What one level's step is remembered by; plain numbers, accuracies in [0, 1]."""

    total: float
    natural: float
    robust: float
    clean_accuracy: float
    robust_accuracy: float
    lr: float
    n_way: int
    seconds_per_step: float


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the episode and the level."""


class Tuner:
    """A pool in training: one leaf copy of every member, its optimiser, and the number of episodes done.

    `step` is all that changes it. State goes out and in by `state` and `restore`, and a restored tuner
    continues exactly as the saved one would have.
    """

    def __init__(self, network: Network, pool: Pool, settings: TuneSettings):
        self.network = network
        self.settings = settings
        self.episodes_done = 0
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
        return self.episodes_done // self.settings.episodes_per_epoch

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs

    def step(self, episode: Episode) -> list[StepRecord]:
        """Train every level on one episode; a record per level.

        Raises:
            NonFiniteLoss: before the level concerned was changed; levels before it have made their step.
        """
        records = [self._level_step(p, episode) for p in range(len(self._members))]
        self.episodes_done += 1
        return records

    def _level_step(self, p: int, episode: Episode) -> StepRecord:
        began = time.perf_counter()
        member, optimiser, scaler = self._members[p], self._optimisers[p], self._scalers[p]
        lr = learning_rate(self.settings, self.epoch)
        outcome = self._outcome(member, episode, p, scaler.get_scale())
        # Float16 may overflow at a large loss scale; the scaler then skips the step and halves the scale.
        if not outcome.loss.total.isfinite() and scaler.get_scale() <= 1:
            raise NonFiniteLoss(
                f"loss is {outcome.loss.total.item()} at episode {self.episodes_done}, "
                f"level {p} (epsilon {member.levels[0].epsilon:g}/255)"
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
        if not self.settings.adversarial:
            return natural_outcome(self.network, member, episode)
        ramp = (self.episodes_done + 1) / max(self.settings.epsilon_warmup, 1)
        level = member.levels[0].scaled(min(ramp, 1.0))
        generator = stream(self.settings.seed, self.episodes_done, p)
        start = pyramid_start(episode.query, level, generator)
        outcome = querying_outcome if self.settings.method == "querying" else query_outcome
        return outcome(self.network, member, episode, level, start, loss_scale=loss_scale)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What the pool does not hold: the optimisers' momentum by name, and plain numbers."""
        momentum = {
            f"{p}.{name}": self._optimisers[p].state[parameter]["momentum_buffer"]
            for p, member in enumerate(self._members)
            for name, parameter in _parameters(member).items()
            if parameter in self._optimisers[p].state
        }
        return momentum, {
            "episodes_done": self.episodes_done,
            "scalers": [scaler.state_dict() for scaler in self._scalers],
        }

    def restore(self, momentum: dict[str, Tensor], numbers: dict) -> None:
        """Take over what `state` gave; the pool itself is given to the constructor.

        Raises:
            KeyError, IndexError, TypeError or ValueError: it is not the state of such a tuner.
        """
        self.episodes_done = numbers["episodes_done"]
        for p, member in enumerate(self._members):
            for name, parameter in _parameters(member).items():
                if f"{p}.{name}" in momentum:
                    buffer = momentum[f"{p}.{name}"].to(parameter.device)
                    if buffer.shape != parameter.shape:
                        raise ValueError(f"momentum of {name} has shape {tuple(buffer.shape)}")
                    self._optimisers[p].state[parameter] = {"momentum_buffer": buffer}
            if numbers["scalers"][p]:
                self._scalers[p].load_state_dict(numbers["scalers"][p])


def meta_tune(
    tuner: Tuner,
    episodes: Iterable[Episode],
    on_step: Callable[[Tuner, list[StepRecord]], None],
    on_epoch: Callable[[Tuner], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> Pool:
    """Train until the episodes end or `interrupted()` is true after a step; the pool as it then is.

    Args:
        tuner: fresh or restored.
        episodes: those still to come, beginning with number `tuner.episodes_done`.
        on_step, on_epoch: called after each episode and after each completed epoch.
    """
    for episode in episodes:
        records = tuner.step(episode.to(tuner.network.device))
        on_step(tuner, records)
        if tuner.episodes_done % tuner.settings.episodes_per_epoch == 0:
            on_epoch(tuner)
        if interrupted():
            break
    return tuner.pool


@functools.cache  # a scheduler is built for the answer, which is the same for a whole epoch
def learning_rate(settings: TuneSettings, epoch: int) -> float:
    """The rate of a whole epoch: linear from `warmup_lr`, then a cosine over all epochs to `min_lr`."""
    schedule = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], settings.lr),
        t_initial=settings.epochs,
        lr_min=settings.min_lr,
        warmup_t=settings.warmup_epochs,
        warmup_lr_init=settings.warmup_lr,
    )
    schedule.step(epoch)
    return schedule.optimizer.param_groups[0]["lr"]


def collapsed(records: list[StepRecord], robust: bool) -> bool:
    """Whether a level's whole epoch looks like a constant network: loss at ln(ways), KL at zero.

    Args:
        records: one level's steps of one epoch.
        robust: whether the level trains against an adversary (only then is there a KL to look at).
    """
    if not records:
        return False
    excess = sum(abs(r.natural - math.log(r.n_way)) for r in records) / len(records)
    kl = sum(r.robust for r in records) / len(records)
    return excess < 0.01 and (not robust or kl < 1e-3)


def _parameters(member: Pool) -> dict[str, Tensor]:
    return member.factors | {"scale": member.scale}


def _leaves(member: Pool) -> Pool:
    factors = {name: factor.detach().clone().requires_grad_() for name, factor in member.factors.items()}
    scale = member.scale.detach().clone().requires_grad_()
    return dataclasses.replace(member.with_factors(factors), scale=scale)
