"""A task: a pool merged for the classes of a support set, and all that is needed to answer without it.

    support set -> `route` -> coefficients -> merged weights, prototypes        `fit`
    images -> logits -> probabilities                                           `logits_of`
    images -> until which epsilon each answer stands                            `standing`

Coefficients, weights and logits are those of test_meta_dataset.py for the first episode of a run with the
same seed. Knows no folder and no picture; `task_file` reads and writes tasks.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.evaluation.deploy import check_fit
from amt.evaluation.evaluate import measure
from amt.evaluation.settings import Deployment
from amt.few_shot.pools import OpenPool
from amt.files.export.merged import MergedNetwork, Support, merged_network
from amt.models.network import CHUNK, features, fixed_features
from amt.models.trim import Trim
from amt.models.weights import Coefficients, stream
from amt.tasks.classifier import Classifier
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

Label = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Task:
    """A classifier of N classes, fitted to a support set.

    Args:
        merged: weights, prototypes and head, on the device that answers.
        classes: the N labels, as they are given and returned.
        shots: how many support images each class had.
        epsilons: what each adapter was trained for, in 1/255 of the pixel range; empty where nobody knows.
        about: where it comes from, plain JSON values.
    """

    merged: MergedNetwork
    classes: tuple[Label, ...]
    shots: tuple[int, ...]
    epsilons: tuple[float, ...]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it looks at."""
        return self.merged.network.image_size

    @property
    def device(self) -> torch.device:
        """Where it answers."""
        return self.merged.network.device

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images on the device: (n, 3, S, S) in [0, 1] -> (n, N), differentiable."""
        return self.classified(features(self.merged.network, self.merged.weights, images))

    def classified(self, found: Tensor) -> Tensor:
        """Logits (n, N) of features (n, D): the head."""
        assert self.merged.head is not None, "a task has a head"
        return self.merged.head(found)

    def to(self, device: torch.device | str) -> "Task":
        """The same on another device."""
        merged = self.merged
        assert merged.head is not None, "a task has a head"
        held = {name: part.to(device) for name, part in vars(merged.head).items() if isinstance(part, Tensor)}
        module = copy.deepcopy(merged.network.module).to(device)
        moved = dataclasses.replace(
            merged,
            network=dataclasses.replace(merged.network, module=module),
            weights={name: tensor.to(device) for name, tensor in merged.weights.items()},
            head=dataclasses.replace(merged.head, **held),
        )
        return dataclasses.replace(self, merged=moved)


@dataclasses.dataclass(frozen=True)
class Merging:
    """How the pool becomes one network for a task.

    Args:
        routing: the router's settings; used without `coefficients`.
        coefficients: instead, one number per adapter, of sum 1.
        trims: trimmings of the merged weights.
        seed: of the router's augmentation, or attack.
    """

    routing: Routing = dataclasses.field(default_factory=Routing)
    coefficients: Coefficients | None = None
    trims: tuple[Trim, ...] = ()
    seed: int = 0


def fit(opened: OpenPool, images: Tensor, labels: Tensor, classes: Sequence[Label], merging: Merging) -> Task:
    """The task of a support set.

    Args:
        opened: a pool, on the device that is to answer.
        images: (S, 3, H, W) float32 in [0, 1], at the network's image size.
        labels: (S,) int64 in 0..N-1; every class has an image.
        classes: the N labels.

    Raises:
        InputError: coefficients of another number or sum than the pool takes, or trimmings of no layer of it.
    """
    network, pool = opened.network, opened.pool
    asked = Deployment(coefficients=merging.coefficients, trims=merging.trims, routings=(merging.routing,))
    check_fit(asked, pool, str(opened.file))
    support = Support(images.to(network.device), labels.to(network.device), tuple(map(str, classes)))
    shares = (1.0,) if merging.coefficients is None and len(pool) == 1 else merging.coefficients
    if shares is None:
        draws = stream(merging.seed, 0, 1)  # as of the first episode of a run
        shares = route(network, pool, support.images, support.labels, draws, merging.routing)
    try:
        merged = merged_network(network, pool, shares, merging.trims, support)
    except ValueError as error:
        raise InputError(f"coefficients {' '.join(f'{c:g}' for c in shares)}: {error}") from error
    shots = tuple(labels.bincount(minlength=len(classes)).tolist())
    about = {"pool": opened.file.name, "seed": merging.seed}
    unknown = opened.about.get("levels_from") == "nowhere"  # of a published pool
    epsilons = () if unknown else tuple(level.epsilon for level in pool.levels)
    return Task(merged, tuple(classes), shots, epsilons, about)


def logits_of(task: Task, images: Tensor) -> Tensor:
    """Logits of any number of images, without graph: (n, 3, S, S) in [0, 1] -> (n, N), on the CPU."""
    network, weights = task.merged.network, task.merged.weights
    parts = [fixed_features(network, weights, part.to(task.device)) for part in images.split(CHUNK)]
    return task.classified(torch.cat(parts)).cpu()


class Standing(NamedTuple):
    """What became of answers under attack.

    Args:
        until: (n,) float64, the largest epsilon tried at which the answer is still the same, at every smaller
            one, too; 0 where the smallest one changed it, NaN where it was wrong to begin with.
        attacked: (n, 3, S, S) in [0, 1], the images as the attack left them at the largest epsilon,
            or as they fell.
    """

    until: Tensor
    attacked: Tensor


def standing(
    task: Task,
    images: Tensor,
    answers: Tensor,
    attack: Attack,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Standing:
    """Until which of the attack's radii each answer stands; see `evaluate.measure`.

    Args:
        images: (n, 3, S, S) in [0, 1].
        answers: (n,) int64 in 0..N-1: the task's own answers, or the true classes.
        attack: of the images, at increasing epsilons in 1/255 of the pixel range.
        seed: decides, with the images' numbers, the attack's random starts.
        numbers: of the images, so that nothing depends on how they are parted; None for 0..n-1.
    """
    side = images.shape[-1]
    episode = Episode(
        support=images.new_empty(0, 3, side, side),
        support_labels=answers.new_empty(0),
        query=images,
        query_labels=answers,
        class_names=tuple(map(str, task.classes)),
    ).to(task.device)
    classifier = Classifier(task.logits, lambda _: task.logits, task.merged.coefficients)
    found = measure(lambda _: classifier, episode, [attack], seed, numbers=numbers)
    until = torch.zeros(len(images), dtype=torch.float64)
    until[~found.correct["clean"].cpu()] = torch.nan
    for epsilon, column in zip(attack.epsilons, attack.columns, strict=True):
        until[found.correct[column].cpu()] = epsilon
    return Standing(until, found.attacked[attack.columns[-1]].cpu())
