"""Testing a fine-tuned classifier: every image of a test set, clean and under attack, and common corruptions.

To the project's one evaluation a classifier is a predictor that ignores the support set, and a batch of test
images the queries of an episode without support. What it leaves is a run directory as of
amt/evaluation/runs.py, with a row per image: so means, intervals, paired comparisons, the report and going
on after a stop are those of every other run. An image's row depends on the seed and its place in the test
set, not on its batch.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from amt.attacks.evaluation import TARGETED, Attack, target_count
from amt.data.labelled import Chosen, Labelled
from amt.data.loading import Transform, batches
from amt.evaluation import runs
from amt.evaluation.evaluate import Measurement, columns, measure
from amt.evaluation.sanity import probe
from amt.files import checkpoint
from amt.files.signals import Interrupts
from amt.models.classifiers import Network, logits
from amt.models.weights import Weights
from amt.report.finish import conclude
from amt.tasks.classifier import Predictor, Task
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

PROBED = 32  # images, the first ones, on which the attacks themselves are checked
NEEDING_MORE = {"support": "there is no support set to move", "transfer": "there is no other network"}


def test(
    network: Network,
    weights: Weights,
    images: Labelled,
    class_names: Sequence[str],
    folder: Path,
    *,
    name: str,
    about: Mapping,
    transform: Transform,
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    corrupted: Mapping[str, Sequence[Labelled]] | None = None,
    corrupted_transform: Transform | None = None,
    overwrite: bool = False,
) -> int:
    """Classify a test set under `weights`, and print the table; goes on where an earlier call was stopped.

    The first Ctrl-C or SIGTERM lets the batch be finished. Images of the first batch are kept for the report.

    Args:
        network: the structure.
        weights: a complete state dict; where it is, the work is done.
        images: the test set.
        class_names: one for each of the K classes of the classifier.
        folder: of the run; created if missing.
        name: of the dataset.
        about: what run.json is to say besides what this function knows: `arch`, `checkpoint` and `settings`,
            which have to be the same for a run to be gone on with.
        transform: the deterministic one of testing.
        attacks: of different names; any but "support" and "transfer".
        seed: decides the attacks' random starts, image by image.
        batch_size: images in one pass.
        workers: processes that read images.
        corrupted: by common corruption the test set at each severity, of which accuracy is all that is
            measured.
        corrupted_transform: of these, if another than `transform`.
        overwrite: start anew, whatever the folder holds.

    Returns:
        The exit code: 0, or 128 and the number of the signal that stopped it.

    Raises:
        InputError: a label is outside of the head, a weight is no number, an attack makes no sense, the test
            set is empty, or the folder holds a run of other weights, settings or code.
    """
    corrupted = corrupted or {}
    for where, part in _parts(name, images, corrupted):
        check_labels(where, part.labels, network.n_classes)
    check_classifier(network, weights, class_names)
    check_attacks(attacks, network.n_classes)
    weights = {key: tensor.detach() for key, tensor in weights.items()}
    predict, device = predictor(network, weights), next(iter(weights.values())).device
    described = description(network, weights, len(images), name, about, attacks, seed, corrupted)
    reading = {"transform": transform, "batch_size": batch_size, "workers": workers}
    with (
        runs.Writer(folder, described, overwrite=overwrite, flag="--output") as out,
        Interrupts() as interrupts,
    ):
        done = {row["index"] for row in runs.peek(folder).every_row}
        left = [index for index in range(len(images)) if index not in done]
        with tqdm(total=len(images), initial=len(done), unit="image", desc=name) as progress:
            for batch, labels, numbers in _pieces(images, left, **reading):
                episode = as_episode(batch.to(device), labels.to(device), name, class_names)
                measured = measure(predict, episode, attacks, seed, numbers=numbers, chunk=batch_size)
                rows = image_rows(measured, episode, numbers, attacks)
                if attacks and numbers[0] == 0:
                    out.keep(runs.sample_of(episode, measured))
                    rows[0] |= {"checks": probe(predict, episode, measured, attacks, seed)}
                out.append(*rows)
                progress.update(len(rows))
                if interrupts.pending():
                    break
        for corruption, severities in corrupted.items():
            if interrupts.pending():
                break
            if corruption not in runs.read_corruptions(folder):
                parts = tqdm(severities, desc=corruption, unit="severity", leave=False)
                other = reading | {"transform": corrupted_transform or transform}
                found = [
                    _accuracy(predict, part, name, class_names, device, interrupts, other) for part in parts
                ]
                if None not in found:
                    out.note_corruption(corruption, found)

    run = runs.peek(folder)
    if not run.complete:
        print(f"{len(run.every_row)} of {len(images)} images are done", end="")
        print(f", and {len(run.corruptions)} of {len(corrupted)} corruptions" if corrupted else "", end="")
        print("; the same command continues")
        return 128 + interrupts.caught
    conclude(run, device)
    return 128 + interrupts.caught if interrupts.pending() else 0


def predictor(network: Network, weights: Weights) -> Predictor:
    """The classifier, as evaluation has it; there is nothing to fit it to."""

    def classify(images: Tensor) -> Tensor:
        return logits(network, weights, images)

    task = Task(classify, lambda _support: classify, ())
    return lambda _episode: task


def as_episode(images: Tensor, labels: Tensor, name: str, class_names: Sequence[str]) -> Episode:
    """Test images (Q, 3, S, S) as the queries of an episode without support; all batches share its index."""
    return Episode(images[:0], labels[:0], images, labels, source=name, class_names=tuple(class_names))


def image_rows(
    measured: Measurement, episode: Episode, numbers: Sequence[int], attacks: Sequence[Attack]
) -> list[dict]:
    """A row per image: its place in the test set, its label, what it was taken for, and 1 or 0 per column.

    Times are equal shares. What was run under the name of a column is said of the images that were attacked.
    """
    n = len(numbers)
    shares = {name: round(measured.row[name] / n, 6) for name in ("fit_seconds", "seconds")}
    standing = {column: right.tolist() for column, right in measured.standing.items()}
    before = {}
    for attack in attacks:
        before |= dict(zip(attack.columns, ("clean", *attack.columns), strict=False))
    variants = measured.row.get("variants", {})
    labels, predicted = episode.query_labels.tolist(), measured.predicted.tolist()
    rows = []
    for k, number in enumerate(numbers):
        ran = {column: text for column, text in variants.items() if standing[before[column]][k]}
        rows.append(
            {
                **{"source": episode.source, "index": number},
                **{"ways": episode.n_way, "support": 0, "queries": 1},
                **{"label": labels[k], "predicted": predicted[k]},
                **{column: int(right[k]) for column, right in standing.items()},
                "coefficients": [],
                **shares,
                **({"variants": ran} if ran else {}),
            }
        )
    return rows


def description(
    network: Network,
    weights: Weights,
    n_images: int,
    name: str,
    about: Mapping,
    attacks: Sequence[Attack],
    seed: int,
    corrupted: Iterable[str],
) -> dict:
    """What run.json says: everything that decides the rows, the very weights included."""
    settings = {
        **about.get("settings", {}),
        "weights": digest(weights),
        "network": [network.arch, network.image_size, network.resize, network.mean, network.std],
        "attacks": [attack.columns for attack in attacks],
        "seed": seed,
        "device": next(iter(weights.values())).device.type,
    }
    found = {
        **checkpoint.provenance(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arch": network.arch,
        **about,
        "settings": settings,
        "unit": "image",
        "seed": seed,
        "split": "test",
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "columns": columns(attacks),
        "sources": [name],
        "episodes": n_images,
        "averages": {},
        "deployments": {name: {}},
        "corruptions": list(corrupted),
    }
    return json.loads(json.dumps(found, default=str))


def digest(weights: Weights) -> str:
    """SHA-256 of names and values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(f"{name} {weights[name].dtype} {list(weights[name].shape)};".encode())
        found.update(weights[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def check_labels(where: str, labels: Tensor, n_classes: int) -> None:
    """Raise an `InputError` unless there are images, all of classes that the head has."""
    if len(labels) == 0:
        raise InputError(f"{where}: holds no image")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < n_classes:
            raise InputError(
                f"{where}: label {label}, expected 0 to {n_classes - 1}, the classes of the head"
            )


def check_classifier(network: Network, weights: Weights, class_names: Sequence[str]) -> None:
    """Raise an `InputError` unless the head fits the classes and the weights are numbers."""
    if len(class_names) != network.n_classes:
        raise InputError(
            f"--arch {network.arch}: its head has {network.n_classes} classes, the dataset {len(class_names)}"
        )
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} of the classifier is not a number everywhere: it cannot be tested")


def check_attacks(attacks: Sequence[Attack], n_classes: int) -> None:
    """Raise an `InputError` for an attack that no classifier of K classes can be put under."""
    for attack in attacks:
        if attack.kind in NEEDING_MORE:
            raise InputError(f"--attack {attack.kind}: {NEEDING_MORE[attack.kind]}, of a classifier alone")
        if attack.kind in TARGETED:
            target_count(attack.kind, n_classes, attack.targets)


def _pieces(
    images: Labelled, left: Sequence[int], transform: Transform, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """The images that are left, with labels and places in the test set: first those that the attacks are
    checked on, which are together whatever the batch size, then batches."""
    first = left[:PROBED] if left[:1] == [0] else []
    for which, size in ((first, PROBED), (left[len(first) :], batch_size)):
        if which:
            part = Chosen(images, np.array(which))
            for batch, labels, places in batches(part, transform, size, seed=0, workers=workers):
                yield batch, labels, [which[place] for place in places.tolist()]


def _parts(
    name: str, images: Labelled, corrupted: Mapping[str, Sequence[Labelled]]
) -> Iterator[tuple[str, Labelled]]:
    """Everything that is classified, and what it is called in a message."""
    yield f"the test set of {name}", images
    for corruption, severities in corrupted.items():
        for severity, part in enumerate(severities, 1):
            yield f"{corruption} of severity {severity} of {name}", part


def _accuracy(
    predict: Predictor,
    part: Labelled,
    name: str,
    class_names: Sequence[str],
    device: torch.device,
    interrupts: Interrupts,
    reading: Mapping,
) -> float | None:
    """The share of images that are classified correctly; None if a signal came first."""
    right = 0
    for images, labels, _ in batches(part, seed=0, **reading):
        if interrupts.pending():
            return None
        episode = as_episode(images.to(device), labels.to(device), name, class_names)
        right += int(measure(predict, episode, chunk=len(images)).standing["clean"].sum())
    return right / len(part)
