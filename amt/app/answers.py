"""What the page computes: from pictures in class slots to answers, and a picture under attack.

Plain functions around `amt.few_shot`, which know no page: what belongs to one person goes in and comes out,
nothing is kept here.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amt.attacks.kinds import Attack
from amt.few_shot import pictures
from amt.few_shot.fitting import fit_pictures
from amt.few_shot.pools import open_pool
from amt.few_shot.task import Merging, Task, logits_of, standing
from amt.report.pictures import amplify
from meta_dataset_readers.errors import InputError, printable

MOST_CLASSES = 6
MOST_EXAMPLES = 20  # pictures of one class
MOST_QUERIES = 24
SHOWN_SIDE = 224  # least side in pixels of a picture that is shown


@dataclasses.dataclass(frozen=True)
class Source:
    """Where classifiers come from.

    Args:
        pool: its file.
        merging: how it becomes one network.
        arch, image_size, device: see `open_pool`.
    """

    pool: Path
    merging: Merging = dataclasses.field(default_factory=Merging)
    arch: str | None = None
    image_size: int | None = None
    device: str = "auto"

    def fit(self, images: Sequence[Any], labels: Sequence[str]) -> Task:
        """The task of labelled images; errors as of `fit_pictures`."""
        opened = open_pool(self.pool, self.arch, self.image_size, self.device)
        return fit_pictures(opened, images, np.array(labels), self.merging)[0]

    def side(self) -> int:
        """Side in pixels of what the network sees."""
        return open_pool(self.pool, self.arch, self.image_size).network.image_size


@dataclasses.dataclass(frozen=True)
class Examples:
    """One class slot of the page.

    Args:
        name: of the class, as typed.
        files: its pictures.
    """

    name: str
    files: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Answers:
    """The pictures of one person, and what was answered.

    Args:
        task: fitted to the person's classes.
        images: (n, 3, S, S) float32 in [0, 1], as the network sees them.
        probabilities: (n, N) float64.
        unread: a line for each new picture that could not be read.
    """

    task: Task
    images: Tensor
    probabilities: np.ndarray
    unread: tuple[str, ...]

    @property
    def classes(self) -> list[str]:
        """The N names."""
        return [str(name) for name in self.task.classes]

    def best(self, number: int) -> tuple[str, float]:
        """The likeliest class of a picture, and its probability."""
        k = int(self.probabilities[number].argmax())
        return self.classes[k], float(self.probabilities[number, k])


class UnderAttack(NamedTuple):
    """What became of one picture.

    Args:
        pictures: clean, the perturbation around grey, and attacked, (H, W, 3) uint8, enlarged.
        factor: by which the perturbation is enlarged in brightness; None where nothing was moved.
        before, after: the probability of each class, by its name.
    """

    pictures: tuple[np.ndarray, np.ndarray, np.ndarray]
    factor: float | None
    before: dict[str, float]
    after: dict[str, float]

    @property
    def stands(self) -> bool:
        """Whether the answer is the same as before."""
        return likeliest(self.before) == likeliest(self.after)


def answer(source: Source, slots: Sequence[Examples], queries: Sequence[Path]) -> Answers:
    """Fit the classes in the slots and classify the new pictures.

    Args:
        slots: the classes; those without pictures are left out.
        queries: files; those that cannot be read are told of, and the others go on.

    Raises:
        InputError: fewer than two classes, a name twice or none, too many pictures, an example that cannot be
            read, or no new picture that can.
    """
    used = [slot for slot in slots if slot.files]
    check(used, queries)
    used.sort(key=lambda slot: slot.name.strip())  # answers do not depend on the order of the slots
    size = source.side()
    support = [read(file, size, f"{slot.name}: ") for slot in used for file in slot.files]
    labels = [slot.name.strip() for slot in used for _ in slot.files]
    images, unread = [], []
    for file in queries:
        try:
            images.append(read(file, size))
        except InputError as error:
            unread.append(str(error))
    if not images:
        raise InputError(f"no new picture could be read: {unread[0]}")
    task, stacked = source.fit(support, labels), torch.stack(images)
    return Answers(task, stacked, probabilities(task, stacked), tuple(unread))


def probabilities(task: Task, images: Tensor) -> np.ndarray:
    """Of each class: (n, 3, S, S) in [0, 1] -> (n, N) float64."""
    return task.probabilities(logits_of(task, images)).numpy()


def check(used: Sequence[Examples], queries: Sequence[Path]) -> None:
    """Raise an `InputError` for classes and pictures that make no task, or are too many."""
    if len(used) < 2:
        found = f"pictures of {len(used)} class" if used else "no pictures"
        raise InputError(f"{found} so far; put pictures into two classes or more")
    if len(used) > MOST_CLASSES:
        raise InputError(f"{len(used)} classes, expected {MOST_CLASSES} at most")
    names = [slot.name.strip() for slot in used]
    if not all(names):
        raise InputError("a class has pictures and no name; type one")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} classes are called {printable(name)!r}; give each a name of its own")
    for slot in used:
        if len(slot.files) > MOST_EXAMPLES:
            raise InputError(
                f"{printable(slot.name)}: {len(slot.files)} pictures, expected {MOST_EXAMPLES} at most"
            )
    if not queries:
        raise InputError("no new pictures; put the ones to classify below the classes")
    if len(queries) > MOST_QUERIES:
        raise InputError(f"{len(queries)} new pictures, expected {MOST_QUERIES} at most")


def read(file: Path, size: int, where: str = "") -> Tensor:
    """The picture in a file as the network sees it: (3, S, S) float32 in [0, 1].

    Raises:
        InputError: it cannot be read; the file is named without its folder, which says nothing to people.
    """
    try:
        return pictures.image(file, size)
    except InputError as error:
        raise InputError(f"{where}{str(error).replace(str(file), file.name)}") from error


def attack(answers: Answers, number: int, epsilon: float, seed: int = 0) -> UnderAttack:
    """One of the pictures under PGD that wants to change its answer.

    Args:
        number: of the picture, 0..n-1.
        epsilon: largest change of a value, in 1/255 of the pixel range; 0: none.
        seed: decides the attack's random start.
    """
    task, clean = answers.task, answers.images[number]
    before = answers.probabilities[number]
    moved = clean
    if epsilon > 0:
        own = torch.tensor([int(before.argmax())])
        found = standing(task, clean[None], own, Attack("pgd", (epsilon,)), seed, [number])
        moved = found.attacked[0]
    after = probabilities(task, moved[None])[0]
    seen, factor = amplify(255 * (moved - clean).permute(1, 2, 0).numpy())
    return UnderAttack(
        (enlarged(clean), _enlarged(seen), enlarged(moved)),
        factor,
        shares(answers, before),
        shares(answers, after),
    )


def verdict(seen: UnderAttack, epsilon: float) -> str:
    """For example `Stands at 4/255: still cat, 71%.`"""
    first, then = likeliest(seen.before), likeliest(seen.after)
    share = f"{100 * seen.after[then]:.0f}%"
    if epsilon == 0:
        return f"Nothing was changed at epsilon 0: {first}, {share}."
    if seen.stands:
        return f"Stands at {epsilon:g}/255: still {first}, {share}."
    return f"Falls at {epsilon:g}/255: {first} becomes {then}, {share}."


def shares(answers: Answers, probabilities: np.ndarray) -> dict[str, float]:
    """Probabilities (N,) by the names of the classes."""
    return dict(zip(answers.classes, probabilities.tolist(), strict=True))


def likeliest(probabilities: dict[str, float]) -> str:
    """The class of the largest probability, the first of equal ones."""
    return max(probabilities, key=probabilities.__getitem__)


def adapters(task: Task) -> dict[str, float]:
    """The share of each adapter, by what it was trained for."""
    if not task.epsilons:
        return {f"adapter {p}": share for p, share in enumerate(task.merged.coefficients)}
    found: dict[str, float] = {}
    for epsilon, share in zip(task.epsilons, task.merged.coefficients, strict=True):
        name = f"trained at {epsilon:g}/255"
        found[name] = found.get(name, 0.0) + share
    return found


def enlarged(image: Tensor) -> np.ndarray:
    """An image (3, S, S) in [0, 1] for people: (H, W, 3) uint8, pixels repeated until it can be seen."""
    return _enlarged((255 * image).round().byte().permute(1, 2, 0).numpy())


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    times = -(-SHOWN_SIDE // len(pixels))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    side = (picture.width * times, picture.height * times)
    return np.asarray(picture.resize(side, Image.Resampling.NEAREST))
