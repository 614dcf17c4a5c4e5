"""A task: a pool merged for the classes of a support set, and all that is needed to answer without it.

    support set -> `route` -> coefficients -> merged weights, head            `fit`
    images -> logits -> probabilities                                  `Task.logits`, `.probabilities`
    images -> until which epsilon each answer stands                   `standing`

Coefficients, weights and logits are those of test_meta_dataset.py for the first episode of a run with the
same seed. Knows no folder and no picture; `task_file` reads and writes tasks.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.evaluation.deploy import check_fit
from amt.evaluation.evaluate import measure
from amt.evaluation.needs import check_heads
from amt.evaluation.settings import Deployment
from amt.few_shot.pools import OpenPool
from amt.files.export.merged import MergedNetwork, merged_network
from amt.files.text_prototypes import TextPrototypes
from amt.models.head_settings import TEXT, WITH_TEXTS, Head
from amt.models.heads import mapped
from amt.models.network import CHUNK, Network, features, fixed_features
from amt.models.trim import Trim
from amt.models.weights import Coefficients, Merged, Weights, stream
from amt.tasks.classifier import Classifier, FeaturesOf, Voice, fitted_voices, mixed_in, spoken, texts_of
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, blaming

Label = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Task:
    """A classifier of N classes, fitted to a support set.

    Args:
        merged: weights and head of the first voice, on the device that answers.
        voices: the network with its fitted head, or the two whose logits are added.
        classes: the N labels, as they are given and returned.
        shots: how many support images each class had.
        epsilons: what each adapter was trained for, in 1/255 of the pixel range; empty where nobody knows.
        about: where it comes from, plain JSON values.
        head: what was fitted.
        temperature: what logits are divided by before their softmax, so that the probabilities are about as
            high as the share of right answers; see amt/tasks/held_out.py.
    """

    merged: MergedNetwork
    voices: tuple[Voice, ...]
    classes: tuple[Label, ...]
    shots: tuple[int, ...]
    epsilons: tuple[float, ...]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    head: Head = dataclasses.field(default_factory=Head)
    temperature: float = 1.0

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it looks at."""
        return self.merged.network.image_size

    @property
    def device(self) -> torch.device:
        """Where it answers."""
        return self.merged.network.device

    def logits(self, images: Tensor, features_of: FeaturesOf = features) -> Tensor:
        """Logits of images on the device: (n, 3, S, S) in [0, 1] -> (n, N), differentiable."""
        return spoken(self.merged.network, self.voices, images, features_of)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class, behind logits: (n, N) -> (n, N) float64, each row of sum 1."""
        return (logits.double() / self.temperature).softmax(1)

    def to(self, device: torch.device | str) -> "Task":
        """The same on another device."""
        voices = tuple(_moved(voice, device) for voice in self.voices)
        module = copy.deepcopy(self.merged.network.module).to(device)
        network = dataclasses.replace(self.merged.network, module=module)
        weights, head, _ = voices[0]
        merged = dataclasses.replace(self.merged, network=network, weights=weights, head=head)
        return dataclasses.replace(self, merged=merged, voices=voices)


def _moved(voice: Voice, device: torch.device | str) -> Voice:
    return Voice(
        {name: tensor.to(device) for name, tensor in voice.weights.items()},
        mapped(voice.head, lambda tensor: tensor.to(device)),
        None if voice.factor is None else voice.factor.to(device),
    )


@dataclasses.dataclass(frozen=True)
class Merging:
    """How the pool becomes one network for a task.

    Args:
        routing: the router's settings, used without `coefficients`; None: the shares that the pool's file
            recommends, or where it recommends none a router with the default settings.
        coefficients: instead, one number per adapter, of sum 1.
        trims: trimmings of the merged weights.
        seed: of the router's augmentation, or attack, and of views of a single example per class.
        head: what classifies the features; None: with texts `WITH_TEXTS`, else what the pool's file
            recommends.
        pretrained: the file of weights that the pool was trained from, which only a head reads that mixes
            them in; None: see `find_weights`.
        texts: of the classes, which the head mixes in.
        weights_key: of the network to take from `pretrained`, where it holds several.

    Raises:
        InputError: there are texts, and the head does not use them.
    """

    routing: Routing | None = None
    coefficients: Coefficients | None = None
    trims: tuple[Trim, ...] = ()
    seed: int = 0
    head: Head | None = None
    pretrained: Path | None = None
    texts: TextPrototypes | None = None
    weights_key: str | None = None

    def __post_init__(self) -> None:
        if self.texts is not None and self.head is not None and self.head.other != TEXT:
            raise InputError(
                f"--head {self.head.name} does not use --text_prototypes; expected --head text, or mix "
                "other=text"
            )

    def head_for(self, opened: OpenPool) -> Head:
        """What classifies the features of a pool; errors as of `OpenPool.head`."""
        return self.head or (WITH_TEXTS if self.texts is not None else opened.head)


def fit(opened: OpenPool, images: Tensor, labels: Tensor, classes: Sequence[Label], merging: Merging) -> Task:
    """The task of a support set.

    Args:
        opened: a pool, on the device that is to answer; `with_pretrained` if the head mixes those weights in.
        images: (S, 3, H, W) float32 in [0, 1], at the network's image size; none if texts alone classify.
        labels: (S,) int64 in 0..N-1; every class has an image, or none has.
        classes: the N labels.

    Raises:
        InputError: coefficients of another number or sum than the pool takes, or none and no image to decide
            them by, trimmings of no layer of it, or a head that needs what the pool does not have.
    """
    network, pool = opened.network, opened.pool
    shares, routing = merging.coefficients, merging.routing or Routing()
    if merging.routing is None and shares is None:
        shares = opened.coefficients
    asked = Deployment(coefficients=shares, trims=merging.trims, routings=(routing,))
    check_fit(asked, pool, str(opened.file))
    dim: Any = network.module.num_features
    head = merging.head_for(opened)
    check_heads([head], pool, opened.statistics, str(opened.file), dim, merging.texts)
    support, numbers, names = images.to(network.device), labels.to(network.device), tuple(map(str, classes))
    shares = (1.0,) if shares is None and len(pool) == 1 else shares
    if shares is None:
        if len(images) == 0:
            raise InputError(
                f"{opened.file}: holds {len(pool)} adapters, and there is no picture to merge them by; "
                "expected --coefficients C ..., one for each"
            )
        draws = stream(merging.seed, 0, 1)  # as of the first episode of a run
        shares = route(network, pool, support, numbers, draws, routing)
    with blaming(f"coefficients {' '.join(f'{c:g}' for c in shares)}"):
        merged = merged_network(network, pool, shares, merging.trims)
    voices, temperature = fitted_voices(
        network,
        Merged(merged.weights, merged.scale, merged.bias),
        support,
        numbers,
        merged.coefficients,
        head,
        opened.statistics,
        mixed_in(network, pool, head),
        merging.seed,
        texts=texts_of(merging.texts, head, names, network.device),
    )
    merged = dataclasses.replace(merged, classes=names, head=voices[0].head)
    shots = tuple(labels.bincount(minlength=len(classes)).tolist())
    about = {"pool": opened.file.name, "seed": merging.seed}
    unknown = opened.about.get("levels_from") == "nowhere"  # of a published pool
    epsilons = () if unknown else tuple(level.epsilon for level in pool.levels)
    return Task(merged, voices, tuple(classes), shots, epsilons, about, head, temperature())


def logits_of(task: Task, images: Tensor) -> Tensor:
    """Logits of any number of images, without graph: (n, 3, S, S) in [0, 1] -> (n, N), on the CPU. Raises
    InputError unless they are finite."""

    def features_of(network: Network, weights: Weights, images: Tensor) -> Tensor:
        parts = [fixed_features(network, weights, part.to(task.device)) for part in images.split(CHUNK)]
        return torch.cat(parts)

    found = task.logits(images, features_of).cpu()
    if not found.isfinite().all():
        pool = task.about.get("pool", "the task")
        raise InputError(f"{pool}: its logits are not finite; expected a pool whose weights are sound")
    return found


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
