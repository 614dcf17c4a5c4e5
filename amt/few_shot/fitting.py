"""From labelled pictures of any kind and the name of a pool to a task."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from amt.few_shot import pictures
from amt.few_shot.pools import open_pool
from amt.few_shot.task import Merging, Task, fit
from amt.models.head_settings import PRETRAINED
from amt.models.network import find_device
from meta_dataset_readers.errors import InputError


def fit_pictures(
    pool: str | os.PathLike,
    items: Sequence[Any],
    labels: np.ndarray,
    merging: Merging,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    device: str = "auto",
    where: str = "",
) -> tuple[Task, np.ndarray]:
    """A task of labelled pictures, and its classes (N,), sorted, as an array.

    Args:
        pool: see `find_pool`.
        items: see `pictures.listed`.
        labels: one for each, texts or numbers.
        arch, image_size: see `open_pool`.
        device: see `find_device`.
        where: begins the message about classes or images that are too few or too many.

    Raises:
        InputError: the pool, the labels, a picture or the device is at fault.
    """
    classes, numbers = np.unique(_named(labels), return_inverse=True)
    if len(classes) < 2:
        found = f"one class, {classes.tolist()[0]!r}" if len(classes) else "no class"
        raise InputError(f"{where}{found}; a classifier needs 2 classes or more")
    if len(items) > pictures.MOST_SUPPORT:
        raise InputError(f"{where}{len(items)} images, a support set has {pictures.MOST_SUPPORT} at most")
    opened = open_pool(pool, arch, image_size).to(find_device(device))
    if (merging.head or opened.head).other == PRETRAINED:
        opened = opened.with_pretrained(merging.pretrained)
    images = pictures.images(items, opened.network.image_size)
    task = fit(opened, images, torch.from_numpy(numbers.astype(np.int64)), classes.tolist(), merging)
    return task, classes


def _named(labels: np.ndarray) -> np.ndarray:
    """Labels (N,) that name classes, and that a file can hold.

    Raises:
        InputError: they are neither texts nor whole numbers nor truths.
    """
    kinds = {type(label) for label in labels.tolist()}
    if len(kinds) > 1 or not kinds <= {str, int, bool, float}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"Unknown label type: {found}; expected texts or whole numbers, all of one kind")
    if kinds == {float} and not (np.isfinite(labels) & (labels == np.round(labels))).all():
        raise InputError("Unknown label type: continuous numbers; expected texts or whole numbers")
    return labels
