"""From labelled pictures of any kind and a pool to a task."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from amt.few_shot import pictures
from amt.few_shot.pools import OpenPool
from amt.few_shot.task import Merging, Task, fit
from amt.models.head_settings import PRETRAINED, ZERO_SHOT
from meta_dataset_readers.errors import InputError


def fit_pictures(
    opened: OpenPool, items: Sequence[Any], labels: np.ndarray, merging: Merging, where: str = ""
) -> tuple[Task, np.ndarray]:
    """A task of labelled pictures, and its classes (N,), sorted, as an array.

    Args:
        opened: the pool, on the device that is to answer.
        items: see `pictures.listed`.
        labels: one for each, texts or numbers.
        where: begins the message about classes or images that are too few or too many.

    Raises:
        InputError: the pool, the labels or a picture is at fault.
    """
    classes, numbers = np.unique(_named(labels), return_inverse=True)
    if len(items) > pictures.MOST_SUPPORT:
        raise InputError(f"{where}{len(items)} images, a support set has {pictures.MOST_SUPPORT} at most")
    if merging.texts is not None:
        merging.texts.check(map(str, classes.tolist()), " that there are examples of")
        merging.texts.check_apart(map(str, classes.tolist()))
    return _fitted(opened, items, numbers, classes, merging, where)


def fit_texts(opened: OpenPool, merging: Merging) -> tuple[Task, np.ndarray]:
    """A task of all classes that `merging` has texts of, by these alone, and the classes (N,), sorted.

    Raises:
        InputError: the head is fitted to pictures, or as of `fit_pictures`.
    """
    texts = merging.texts
    assert texts is not None, "there are neither pictures nor texts"
    head = merging.head or ZERO_SHOT
    if not head.zero_shot:
        raise InputError(f"--head {head.name} is fitted to labelled pictures, which are missing (--support)")
    merging = dataclasses.replace(merging, head=head)
    classes, none = np.array(sorted(texts.names)), np.empty(0, np.int64)
    where = f"--text_prototypes {texts.file}: "
    return _fitted(opened, [], none, classes, merging, where)


def _fitted(
    opened: OpenPool,
    items: Sequence[Any],
    numbers: np.ndarray,
    classes: np.ndarray,
    merging: Merging,
    where: str,
) -> tuple[Task, np.ndarray]:
    if len(classes) < 2:
        found = f"one class, {classes.tolist()[0]!r}" if len(classes) else "no class"
        raise InputError(f"{where}{found}; a classifier needs 2 classes or more")
    if merging.head_for(opened).other == PRETRAINED:
        opened = opened.with_pretrained(merging.pretrained, merging.weights_key)
    side = opened.network.image_size
    images = pictures.images(items, side) if len(items) else torch.empty(0, 3, side, side)
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
