"""Fine-tuning step by step: attack, descend, follow the schedules; and the state that a run continues from.

A `FineTuner` holds all that changes during a run. The history of its validation accuracies alone decides the
learning rate and when the best weights come back (amt/training/schedule.py). Knows no file, no data set and
no test data.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from amt.files.ranks import ALONE, Ranks
from amt.models.branch import Student, natural_weights, new_factors
from amt.models.network import Network, logits
from amt.models.weights import Weights, stream
from amt.training import parallel
from amt.training.autolora_settings import Settings
from amt.training.objectives import Outcome, attack, linear, objective_gradients, twins, two_threads
from amt.training.optimiser import check_finite, check_loss, momentum, restore_momentum
from amt.training.schedule import (
    LOWEST_RATE,
    LossWeights,
    Verdict,
    loss_weights,
    step_rate,
    update_batches,
    verdict,
    windows,
)
from amt.training.similarity import gradient_similarity


class StepRecord(NamedTuple):
    """The record of one batch: plain numbers, accuracies in [0, 1] in train mode.

    `natural` is the cross-entropy and `robust` the divergence, see `robust_loss`; `similarity` the cosine
    between the gradients of the natural and the adversarial objective by layer, where it was asked for.
    """

    total: float
    natural: float
    robust: float
    clean_accuracy: float
    robust_accuracy: float
    lr: float
    lambda1: float
    lambda2: float
    seconds: float
    similarity: dict[str, float] | None = None


def new_student(network: Network, weights: Weights, settings: Settings, norms: Weights) -> Student:
    """The student before its first step, on the device of `weights`, a complete state dict; its tensors are
    copies. `norms` is the pre-training's BatchNorm set for clean images; empty: that of `weights` is both."""
    factors: Weights = {}
    if settings.branch:
        names = network.adapted(settings.published)
        factors = new_factors(network, names, settings.rank, stream(settings.seed, 0))
    device = next(iter(weights.values())).device
    second: Weights = {}
    if settings.mode == "AFF" and network.norms:
        if settings.method == "twins":
            second = {name: weights[name] for name in network.norms}
        elif settings.dual_norms:
            second = {name: norms.get(name, weights[name]) for name in network.norms}

    def copied(tensors: Weights) -> Weights:
        return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

    return Student(copied(weights), copied(factors), copied(second))


class FineTuner:
    """A student in training, its optimiser, and how far the run is.

    Only `step` and `end_epoch` change it. `state` and `restore` give and take its state; a restored tuner
    continues exactly as the saved one would have.

    Args:
        student: see `new_student`; becomes leaves that are trained in place.
        n_batches: in an epoch.
        training_accuracy: the accuracy in [0, 1] of weights on the whole training set, augmented and in eval
            mode; needed with `settings.whole_passes` only.
        ranks: that share the work on every batch, see amt/training/parallel.py; each is given all of it.

    Raises:
        ValueError: `settings.whole_passes` without `training_accuracy`, at the first step.
    """

    def __init__(
        self,
        network: Network,
        student: Student,
        settings: Settings,
        n_batches: int,
        training_accuracy: Callable[[Weights], float] | None = None,
        ranks: Ranks = ALONE,
    ):
        if settings.published and settings.dual_norms and settings.branch:
            network = network.with_published_shortcuts()
        self.network, self.student, self.settings = parallel.shared(network, ranks), student, settings
        self._ranks = ranks
        self.n_batches, self.training_accuracy = n_batches, training_accuracy
        self.epoch = 0  # finished epochs
        self.batch = 0  # finished batches of the next one
        self.history: list[dict] = []
        self.best: Student | None = None
        self._accuracy: float | None = None  # that weighs the loss
        self._seen: list[tuple[int, int]] = []  # right and all, of the latest batches
        self.trained = {name: student.tensors[name].requires_grad_() for name in self._trained_names()}
        self._optimiser = torch.optim.SGD(
            list(self.trained.values()), settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )

    def _trained_names(self) -> list[str]:
        network, settings = self.network, self.settings
        parameters = set(network.parameters)
        if settings.mode != "AFF":
            parameters = {name for name in parameters if name.startswith(f"{network.classifier}.")}
        trained = {"weights": parameters, "factors": set(self.student.factors), "norms": set()}
        if settings.method != "autolora":  # AutoLoRa's natural thread gives BatchNorm no gradient
            trained["norms"] = set(network.parameters)
        split = {name: name.partition("/") for name in self.student.tensors}
        return [name for name, (part, _, own) in split.items() if own in trained[part]]

    @property
    def verdict(self) -> Verdict:
        """What the schedule decides after the history so far."""
        settings = self.settings
        accuracies = [note["robust"] for note in self.history]
        ends = windows(settings.mode, settings.epochs, settings.high_resolution, settings.published)
        return verdict(accuracies, ends if settings.auto_lr else (), settings.lr, settings.divide)

    @property
    def rate(self) -> float:
        """The learning rate of the coming epoch."""
        if self.settings.auto_lr:
            return self.verdict.rate
        return step_rate(self.settings.lr, self.epoch + 1, self.settings.milestones)

    @property
    def weighing(self) -> LossWeights:
        """The weights of the loss for the next batch."""
        if not self.settings.weighs or self._accuracy is None:
            return LossWeights(self.settings.natural_share, self.settings.scale)
        return loss_weights(self._accuracy, self.settings.scale)

    @property
    def steps(self) -> int:
        """Finished batches of the whole run."""
        return self.epoch * self.n_batches + self.batch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the rate has fallen below `LOWEST_RATE` at high resolution."""
        settings = self.settings
        too_slow = settings.high_resolution and settings.auto_lr and self.rate < LOWEST_RATE
        return self.epoch >= settings.epochs or too_slow

    def natural(self) -> Weights:
        """The weights whose accuracy on clean training images weighs the loss."""
        settings, student = self.settings, self.student
        deviates = settings.published and not settings.high_resolution and not settings.dual_norms
        if settings.method == "autolora" and not deviates:
            return natural_weights(self.network, student, settings.rank)
        return student.weights if settings.method == "twins" else student.weights | student.norms

    def step(self, images: Tensor, labels: Tensor) -> StepRecord:
        """Train on one batch: (n, 3, S, S) float in [0, 1] and (n,) int64, on the student's device. Raises
        NonFiniteLoss if the loss is not finite; only running statistics have changed."""
        began = time.perf_counter()
        if self.settings.weighs:
            self._weigh_first(images, labels)
        weighing, rate = self.weighing, self.rate
        attacked = self._attacked(images, labels)
        similarity = self._similarity(images, attacked, labels, weighing)
        outcome = self._outcome(images, attacked, labels, weighing)
        check_loss(
            outcome.loss.total.item(),
            f"epoch {self.epoch + 1}, batch {self.batch + 1}, learning rate {rate:g}",
        )
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.zero_grad()
        outcome.loss.total.backward()
        trained = self.trained.values()
        for tensor, gradient in zip(trained, self._ranks.added([each.grad for each in trained]), strict=True):
            tensor.grad = gradient
        self._optimiser.step()
        self.batch += 1
        right = int((outcome.clean.argmax(1) == labels).sum())
        if self.settings.weighs:
            self._weigh(right, len(labels))
        return StepRecord(
            *(part.item() for part in outcome.loss),
            clean_accuracy=right / len(labels),
            robust_accuracy=float((outcome.attacked.argmax(1) == labels).double().mean()),
            lr=rate,
            lambda1=weighing.natural,
            lambda2=weighing.robust,
            seconds=time.perf_counter() - began,
            similarity=similarity,
        )

    def _attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        if settings.mode == "SLF":
            return images
        return attack(
            self.network,
            self.student.weights,
            images,
            labels,
            settings.adversary,
            stream(settings.seed, 1, self.epoch, self.batch),
            away_from=self.natural() if settings.mode == "AFF" and settings.method == "vanilla" else None,
        )

    def _outcome(self, images: Tensor, attacked: Tensor, labels: Tensor, weighing: LossWeights) -> Outcome:
        network, student, settings = self.network, self.student, self.settings
        if settings.mode != "AFF":
            return linear(network, student, attacked, labels)
        if settings.published and settings.high_resolution:
            weighing = weighing._replace(robust=weighing.robust * len(labels) / settings.batch_size)
        if settings.method == "twins":
            return twins(network, student, images, attacked, labels, weighing, settings.twins_share)
        natural = student.weights | student.norms
        if settings.branch:
            natural = natural_weights(network, student, settings.rank)
        return two_threads(network, natural, student.weights, images, attacked, labels, weighing)

    def _similarity(
        self, images: Tensor, attacked: Tensor, labels: Tensor, weighing: LossWeights
    ) -> dict[str, float] | None:
        every = self.settings.similarity_every
        if every == 0 or self.settings.mode != "AFF" or self.batch % every:
            return None
        found = objective_gradients(self.network, self.student, images, attacked, labels, weighing)
        natural, adversarial = (
            {name: self._ranks.total(gradient) for name, gradient in part.items()} for part in found
        )
        return gradient_similarity(natural, adversarial)

    def _weigh_first(self, images: Tensor, labels: Tensor) -> None:
        """Measure the accuracy that weighs the loss where there is none before a batch."""
        if self.settings.whole_passes:
            if self.batch == 0 and (self._accuracy is None or not self.settings.high_resolution):
                self._accuracy = self._whole_pass()
        elif self._accuracy is None:  # on the very first batch, as there is no other
            with torch.no_grad():
                guesses = logits(self.network, self.natural(), images).argmax(1)
            self._accuracy = float((guesses == labels).double().mean())

    def _weigh(self, right: int, count: int) -> None:
        """Update that accuracy after a batch, where it is due."""
        high = self.settings.high_resolution
        memory = self.n_batches if high else max(self.n_batches // 4, 1)
        self._seen = [*self._seen, (right, count)][-memory:]
        due = self.batch == self.n_batches if high else self.batch - 1 in update_batches(self.n_batches)
        if due and self.settings.whole_passes:
            self._accuracy = self._whole_pass()
        elif due:
            rights, counts = zip(*self._seen, strict=True)
            self._accuracy = sum(rights) / sum(counts)

    def _whole_pass(self) -> float:
        if self.training_accuracy is None:
            raise ValueError("settings.whole_passes needs a function that measures the training accuracy")
        return self.training_accuracy(self.natural())

    def check_finite(self) -> None:
        """Raise `NonFiniteLoss` if the last step left anything that is not finite."""
        check_finite(
            self.student.tensors, f"epoch {self.epoch + 1}, batch {self.batch}, learning rate {self.rate:g}"
        )

    def end_epoch(self, clean: float, robust: float) -> dict:
        """Note the validation accuracies in per cent, beside epoch, rate, weights of the loss and what the
        schedule says; keep the best weights, or bring them back."""
        rate, weighing = self.rate, self.weighing
        self.epoch, self.batch = self.epoch + 1, 0
        note = {"epoch": self.epoch, "lr": rate, "clean": clean, "robust": robust}
        if self.settings.weighs:
            note |= {"lambda1": weighing.natural, "lambda2": weighing.robust}
        self.history.append(note)
        found = self.verdict
        note |= {"condition": found.condition, "best": found.best}
        if found.best == self.epoch:
            self.best = self.student.copy()
        elif found.condition and self.best is not None:  # the optimiser's momentum stays as it is
            _overwrite(self.student, self.best)
        return note

    def state(self) -> tuple[Weights, dict]:
        """What a run continues from: all tensors by name, and plain numbers."""
        tensors = {name: tensor.detach() for name, tensor in self.student.tensors.items()}
        if self.best is not None:
            tensors |= {f"best/{name}": tensor for name, tensor in self.best.tensors.items()}
        buffers = momentum(self._optimiser, self.trained)
        tensors |= {f"momentum/{name}": buffer for name, buffer in buffers.items()}
        return tensors, {
            "epoch": self.epoch,
            "batch": self.batch,
            "accuracy": self._accuracy,
            "seen": self._seen,
            "history": self.history,
        }

    def restore(self, tensors: Weights, numbers: dict) -> None:
        """Continue from what `state` gave. Raises KeyError, TypeError or ValueError for anything else."""
        best, buffers, student = {}, {}, {}
        for name, tensor in tensors.items():
            part, _, own = name.partition("/")
            if part in ("best", "momentum"):
                (best if part == "best" else buffers)[own] = tensor
            else:
                student[name] = tensor
        _overwrite(self.student, Student.of_tensors(student))
        if best:
            self.best = self.student.copy()
            _overwrite(self.best, Student.of_tensors(best))
        restore_momentum(self._optimiser, self.trained, buffers)
        self.epoch, self.batch = int(numbers["epoch"]), int(numbers["batch"])
        self._accuracy = None if numbers["accuracy"] is None else float(numbers["accuracy"])
        self._seen = [(int(right), int(count)) for right, count in numbers["seen"]]
        if not all(0 <= right <= count != 0 for right, count in self._seen):
            raise ValueError("a batch has more right answers than images, or none of them")
        self.history = [dict(note, robust=float(note["robust"])) for note in numbers["history"]]


def _overwrite(student: Student, source: Student) -> None:
    """Make `student` equal to `source`, in place. Raises ValueError if they differ in names or shapes."""
    targets, values = student.tensors, source.tensors
    for name in sorted(targets.keys() | values.keys()):
        found = tuple(values[name].shape) if name in values else "absent"
        expected = tuple(targets[name].shape) if name in targets else "absent"
        if found != expected:
            raise ValueError(f"tensor {name} is {found}, expected {expected}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
