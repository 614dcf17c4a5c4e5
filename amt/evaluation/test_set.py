"""Testing a fine-tuned classifier: every image of a test set, clean and under attack, and common corruptions.

A classifier is a predictor that ignores the support set, and a batch of test images is the query of an
episode without support. So a test is a run directory (amt/evaluation/runs.py) with a row per image, and
means, intervals, paired comparisons, the report and continuing after a stop are those of every other run. An
image's row depends on the seed and its place in the test set, not on its batch.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from amt.attacks.kinds import TARGETED, Attack, target_count
from amt.data.labelled import Chosen, Labelled
from amt.data.loading import Transform, batches
from amt.evaluation import runs
from amt.evaluation.answers import Answers, image_answers
from amt.evaluation.evaluate import Measurement, measure
from amt.evaluation.recording import description, ended, examine, interruptible, record
from amt.evaluation.writer import Writer
from amt.files import digests
from amt.files.signals import Interrupts
from amt.models.network import Network, logits
from amt.models.weights import Weights
from amt.tasks.classifier import Classifier, Predictor
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, printable
from meta_dataset_readers.feeding import Waiting

PROBED = 32  # images, the first ones, on which the attacks themselves are checked
NEEDING_MORE = {"support": "there is no support set to move", "transfer": "there is no other network"}


@dataclasses.dataclass(frozen=True)
class TestSet:
    """A labelled test set, and how it is read.

    Args:
        name: of the dataset.
        images: all of them; an image's number is its place among them.
        class_names: one for each of the K classes of the classifier.
        transform: the deterministic one of testing.
        batch_size: images in one pass.
        workers: processes that read images.
    """

    name: str
    images: Labelled
    class_names: Sequence[str]
    transform: Transform
    batch_size: int = 128
    workers: int = 0

    def episodes(self, which: Sequence[int], device: torch.device) -> Iterator[tuple[Episode, list[int]]]:
        """Batches of some images as the queries of episodes, and their numbers."""
        if len(which) == 0:
            return
        part = Chosen(self.images, np.array(which))
        for images, labels, places in batches(
            part, self.transform, self.batch_size, seed=0, workers=self.workers, device=device
        ):
            episode = as_episode(images, labels, self.name, self.class_names)
            yield episode, [which[place] for place in places.tolist()]


def test(
    network: Network,
    weights: Weights,
    tested: TestSet,
    folder: Path,
    *,
    about: Mapping,
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    corrupted: Mapping[str, Sequence[TestSet]] | None = None,
    overwrite: bool = False,
) -> tuple[runs.Run, int]:
    """Classify a test set under `weights`; continue where an earlier call was stopped.

    The first Ctrl-C, SIGTERM or SIGHUP ends it within seconds; batches that are complete are kept.
    Images of the first batch are kept for the report.

    Args:
        network: the structure.
        weights: a complete state dict; the work is done on its device.
        tested: the test set.
        folder: of the run; created if missing.
        about: further entries of run.json: `arch`, `checkpoint` and `settings`, which must be equal for a run
            to be continued.
        attacks: of different names; any but "support" and "transfer".
        seed: decides the attacks' random starts, image by image.
        corrupted: by common corruption the test set at each severity; only accuracy is measured on it.
        overwrite: start anew, whatever the folder holds.

    Returns:
        The run, complete or not, and the exit code: 0, or 128 and the number of the signal that stopped it.

    Raises:
        InputError: a label is outside of the head's classes, a weight is not finite, an attack does not apply
            to a classifier alone, the test set is empty, or the folder holds a run of other weights, settings
            or code.
    """
    corrupted = corrupted or {}
    _check(network, weights, tested, corrupted, attacks)
    weights = {key: tensor.detach() for key, tensor in weights.items()}
    predict, device = predictor(network, weights), next(iter(weights.values())).device
    described = _description(network, weights, tested, about, attacks, seed, corrupted)
    writer = Writer(folder, described, overwrite=overwrite, flag="--output")
    with writer as out, Interrupts() as interrupts, interruptible(network, interrupts):
        left = runs.peek(folder).left(tested.name, range(len(tested.images)))
        done = len(tested.images) - len(left)
        with tqdm(
            total=len(tested.images), initial=done, unit="image", desc=printable(tested.name)
        ) as progress:
            waiting = Waiting()
            rows = _rows(out, predict, tested, left, attacks, seed, device, interrupts, waiting)
            record(out, rows, progress, waiting)
        for corruption, severities in corrupted.items():
            interrupts.check()
            if corruption in runs.read_corruptions(folder):
                continue
            parts = tqdm(severities, desc=corruption, unit="severity", leave=False)
            found = [_accuracy(predict, part, device, interrupts) for part in parts]
            out.note_corruption(corruption, found)
    run = runs.peek(folder)
    return run, ended(run, interrupts)


def predictor(network: Network, weights: Weights) -> Predictor:
    """A predictor that ignores the support set."""

    def classify(images: Tensor) -> Tensor:
        return logits(network, weights, images)

    classifier = Classifier(classify, lambda _support: classify, ())
    return lambda _episode: classifier


def as_episode(images: Tensor, labels: Tensor, name: str, class_names: Sequence[str]) -> Episode:
    """Test images (Q, 3, S, S) as the queries of an episode without support; all batches share its index."""
    return Episode(images[:0], labels[:0], images, labels, source=name, class_names=tuple(class_names))


def image_rows(
    measured: Measurement,
    episode: Episode,
    numbers: Sequence[int],
    attacks: Sequence[Attack],
    origins: Sequence[str],
) -> list[dict]:
    """A row per image: its place in the test set, its label, the predicted class, and 1 or 0 per column.

    Times are equal shares. The rows of attacked images say what was run under the name of a column; the first
    row holds the results of checking the attacks, and how many images of the batch have NaN logits.

    Args:
        origins: where the images come from.
    """
    n = len(numbers)
    shares = {name: round(measured.row[name] / n, 6) for name in ("fit_seconds", "seconds")}
    correct = {column: right.tolist() for column, right in measured.correct.items()}
    before = {}
    for attack in attacks:
        before |= dict(zip(attack.columns, ("clean", *attack.columns), strict=False))
    variants = measured.row.get("variants", {})
    labels, predicted = episode.query_labels.tolist(), measured.predicted.tolist()
    answers = {column: Answers(*(each.cpu() for each in found)) for column, found in measured.answers.items()}
    first = {name: measured.row[name] for name in ("checks", "nan_images") if name in measured.row}
    rows = []
    for k, number in enumerate(numbers):
        ran = {column: text for column, text in variants.items() if correct[before[column]][k]}
        rows.append(
            {
                **{"source": episode.source, "index": number},
                **{"ways": episode.n_way, "support": 0, "queries": 1},
                **{"label": labels[k], "predicted": predicted[k]},
                **{column: int(right[k]) for column, right in correct.items()},
                "answers": image_answers(k, labels[k], answers, origins[k]),
                "coefficients": [],
                **shares,
                **({"variants": ran} if ran else {}),
                **(first if k == 0 else {}),
            }
        )
    return rows


def _description(
    network: Network,
    weights: Weights,
    tested: TestSet,
    about: Mapping,
    attacks: Sequence[Attack],
    seed: int,
    corrupted: Iterable[str],
) -> dict:
    """The content of run.json: everything that decides the rows, including the weights."""
    settings = {
        **about.get("settings", {}),
        "weights": digests.of_tensors(weights),
        "network": [network.arch, network.image_size, network.resize, network.mean, network.std],
        "attacks": [attack.columns for attack in attacks],
        "seed": seed,
        "device": next(iter(weights.values())).device.type,
    }
    known = {
        "unit": "image",
        "seed": seed,
        "split": "test",
        "sources": [tested.name],
        "episodes": len(tested.images),
        "averages": {},
        "deployments": {tested.name: {}},
        "corruptions": list(corrupted),
        "class_names": list(tested.class_names),
    }
    return description(attacks, **{"arch": network.arch, **about, "settings": settings, **known})


def check_labels(where: str, labels: Tensor, n_classes: int) -> None:
    """Raise an `InputError` unless `labels` (n,) has at least one label, all in 0..K-1.

    Args:
        where: the source of the labels, for the message.
        n_classes: K.
    """
    if len(labels) == 0:
        raise InputError(f"{where}: holds no image")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < n_classes:
            raise InputError(
                f"{where}: label {label}, expected 0 to {n_classes - 1}, the classes of the head"
            )


def check_classifier(network: Network, weights: Weights, class_names: Sequence[str]) -> None:
    """Raise an `InputError` unless the head fits the classes and all weights are finite."""
    if len(class_names) != network.n_classes:
        raise InputError(
            f"--arch {network.arch}: its head has {network.n_classes} classes, the dataset {len(class_names)}"
        )
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"the classifier cannot be tested: its {name} has values that are not finite")


def check_attacks(attacks: Sequence[Attack], n_classes: int) -> None:
    """Raise an `InputError` for an attack that does not apply to a classifier of K classes."""
    for attack in attacks:
        if attack.kind in NEEDING_MORE:
            raise InputError(f"--attack {attack.kind}: {NEEDING_MORE[attack.kind]}, of a classifier alone")
        if attack.kind in TARGETED:
            target_count(attack.kind, n_classes, attack.targets)


def _rows(
    out: Writer,
    predict: Predictor,
    tested: TestSet,
    left: Sequence[int],
    attacks: Sequence[Attack],
    seed: int,
    device: torch.device,
    interrupts: Interrupts,
    waiting: Waiting,
) -> Iterator[list[dict]]:
    """The rows of the images that are left, batch by batch; the first batch holds the images that the attacks
    are checked on, whatever the batch size."""
    first = left[:PROBED] if left[:1] == [0] else []
    probed = dataclasses.replace(tested, batch_size=PROBED).episodes(first, device)
    others = tested.episodes(left[len(first) :], device)
    for episode, numbers in interrupts.whole(waiting.timed(itertools.chain(probed, others))):
        starts = numbers[0] == 0
        measured = examine(
            *(out, predict, episode, attacks, seed),
            check=starts,
            keep=starts,
            numbers=numbers,
            chunk=tested.batch_size,
        )
        origins = [tested.images.origin(number) for number in numbers]
        yield image_rows(measured, episode, numbers, attacks, origins)


def _accuracy(predict: Predictor, tested: TestSet, device: torch.device, interrupts: Interrupts) -> float:
    """The share of images that are classified correctly."""
    right = 0
    for episode, numbers in interrupts.whole(tested.episodes(range(len(tested.images)), device)):
        right += int(measure(predict, episode, chunk=len(numbers)).correct["clean"].sum())
    return right / len(tested.images)


def _check(
    network: Network,
    weights: Weights,
    tested: TestSet,
    corrupted: Mapping[str, Sequence[TestSet]],
    attacks: Sequence[Attack],
) -> None:
    """Raise an `InputError` for what `test` cannot test."""
    check_labels(f"the test set of {tested.name}", tested.images.labels, network.n_classes)
    for corruption, severities in corrupted.items():
        for severity, part in enumerate(severities, 1):
            where = f"{corruption} of severity {severity} of {tested.name}"
            check_labels(where, part.images.labels, network.n_classes)
    check_classifier(network, weights, tested.class_names)
    check_attacks(attacks, network.n_classes)
