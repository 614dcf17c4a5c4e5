"""A few images of an episode, clean and attacked, for people to look at: RUN/samples/SOURCE-INDEX.npz."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amt.evaluation.evaluate import Measurement
from amt.files import npz
from amt.models.heads import index_in_class
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, damaged
from meta_dataset_readers.files import replace_file

SAMPLED = 10  # queries kept of an episode
SUPPORT_SAMPLED = 20  # support images kept of it
LARGEST = 2**28  # bytes of a file; forty images of 512 px are a third of that
_ARRAYS = {  # of which dtype, with a letter for each dimension: the same letter is the same length
    **{"clean": ("u1", "nhw3"), "attacked": ("u1", "nhw3"), "perturbation": ("f2", "nhw3")},
    **dict.fromkeys(("labels", "predicted_clean", "predicted_attacked"), ("i8", "n")),
    **{"support": ("u1", "mxy3"), "support_labels": ("i8", "m"), "shots": ("i8", "k")},
}
_SUPPORT = ("support", "support_labels", "shots")  # older samples have none


class Sample(NamedTuple):
    """Some images of one episode.

    Args:
        source, index: which episode.
        column: the attack.
        clean, attacked: (n, H, W, 3) uint8.
        perturbation: (n, H, W, 3) float16, attacked - clean in 1/255 of the pixel range.
        labels, predicted_clean, predicted_attacked: (n,) int64.
        class_names: (N,).
        support: (m, H, W, 3) uint8, the first support images of each class.
        support_labels: (m,) int64.
        shots: (N,) int64, how many support images each class has; empty in older samples and test sets.
    """

    source: str
    index: int
    column: str
    clean: np.ndarray
    attacked: np.ndarray
    perturbation: np.ndarray
    labels: np.ndarray
    predicted_clean: np.ndarray
    predicted_attacked: np.ndarray
    class_names: tuple[str, ...]
    support: np.ndarray = np.empty((0, 1, 1, 3), np.uint8)
    support_labels: np.ndarray = np.empty(0, np.int64)
    shots: np.ndarray = np.empty(0, np.int64)


def sample_of(episode: Episode, measured: Measurement) -> Sample:
    """Up to `SAMPLED` queries of an episode, classes in turn, before and after the last attack on them, and
    up to `SUPPORT_SAMPLED` of its support images."""
    column, attacked = list(measured.attacked.items())[-1]
    labels, shown = episode.query_labels, episode.support_labels
    chosen = _in_turn(labels, episode.n_way)[:SAMPLED]
    seen = _in_turn(shown, episode.n_way)[:SUPPORT_SAMPLED]
    clean, attacked = episode.query[chosen], attacked[chosen]
    with torch.no_grad():
        before, after = (measured.classifier.logits(images).argmax(1) for images in (clean, attacked))

    def pixels(images: Tensor) -> np.ndarray:
        return (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    return Sample(
        episode.source,
        episode.index,
        column,
        pixels(clean),
        pixels(attacked),
        (255 * (attacked - clean)).half().permute(0, 2, 3, 1).cpu().numpy(),
        labels[chosen].cpu().numpy(),
        before.cpu().numpy(),
        after.cpu().numpy(),
        episode.names,
        pixels(episode.support[seen]),
        shown[seen].cpu().numpy(),
        shown.bincount(minlength=episode.n_way * bool(len(shown))).cpu().numpy(),
    )


def _in_turn(labels: Tensor, n_way: int) -> Tensor:
    """The numbers of images so that classes follow each other in turn."""
    if len(labels) == 0:
        return labels
    return (index_in_class(labels) * n_way + labels).argsort()


def write_sample(folder: Path, sample: Sample) -> None:
    """Write a sample into the run directory `folder`."""
    path = folder / "samples" / f"{sample.source}-{sample.index}.npz"
    content = io.BytesIO()
    np.savez_compressed(content, **sample._asdict())
    replace_file(path, content.getvalue())


def read_samples(folder: Path) -> list[Sample]:
    """All samples of the run directory `folder`, by file name.

    Raises:
        InputError: a file is damaged.
    """
    return [_read_sample(path) for path in sorted((folder / "samples").glob("*.npz"))]


def _read_sample(path: Path) -> Sample:
    with damaged(f"{path}: no sample of images", said=repr):
        arrays = npz.read(path, LARGEST)
        sample = Sample(
            source=str(arrays["source"]),
            index=int(arrays["index"]),
            column=str(arrays["column"]),
            class_names=tuple(map(str, arrays["class_names"])),
            **{name: arrays[name] for name in _ARRAYS if name not in _SUPPORT or name in arrays},
        )
        good = _fits(sample)
    if not good:
        raise InputError(f"{path}: no sample of images (its arrays do not fit each other)")
    return sample


def _fits(sample: Sample) -> bool:
    """Whether all arrays have their dtype and the lengths that fit each other, and all labels have a name."""
    arrays, lengths = sample._asdict(), {"3": 3}
    for name, (dtype, dimensions) in _ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != len(dimensions):
            return False
        for dimension, length in zip(dimensions, arrays[name].shape, strict=True):
            if lengths.setdefault(dimension, length) != length:
                return False
    names, shots = len(sample.class_names), len(sample.shots)
    if shots not in (0, names) or (sample.shots < 0).any():
        return False
    most = {"labels": names, "predicted_clean": names, "predicted_attacked": names}
    most["support_labels"] = max(shots, 1)
    return all(bool(((arrays[name] >= 0) & (arrays[name] < n)).all()) for name, n in most.items())
