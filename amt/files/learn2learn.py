"""Our episodes for learn2learn's loops, and learn2learn's tasks for ours.

    tasks = EpisodeTaskset(EpisodeReader(...))             # a task source: tasks.sample() -> data, labels
    episodes = TasksetEpisodes(taskset, shots=1)           # episodes: evaluate(..., episodes), Tuner.step

A task there is one batch of images and labels, and an algorithm knows by an image's position whether it is
support ("adaptation") or query ("evaluation"); an episode here keeps the two apart. Knows learn2learn by the
shape of its tasks and never imports it: who has a Taskset has learn2learn, and the other direction needs
none. (`python -m tools.install_learn2learn` installs it on Pythons that its release does not know.)
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, nearest

ORDERS = ("interleaved", "grouped")


class EpisodeTaskset(Dataset):
    """Episodes as learn2learn's loops expect a Taskset: `sample()`, `len`, `[i]` and iteration.

    Task i is episode i, of a map-style data set or sequence; its images are in an order of `task_of`.
    `sample()` gives the tasks in turn and after the last begins again, so every episode is used before one is
    used twice, and no random generator is touched.
    """

    def __init__(self, episodes: Dataset | Sequence[Episode], order: str = "interleaved"):
        _check_order(order)
        if len(episodes) == 0:
            raise InputError("a task source needs at least one episode")
        self.episodes, self.order = episodes, order
        self._sampled = 0

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Task `index` in 0..len-1: data (S + Q, 3, H, W) in [0, 1] and labels (S + Q,). Raises InputError if
        the episode's shots do not fit the order, or it cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        return task_of(self.episodes[index], self.order)

    def sample(self) -> tuple[Tensor, Tensor]:
        """The next task in turn."""
        task = self[self._sampled % len(self)]
        self._sampled += 1
        return task


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise InputError(f"order is {order!r}; {nearest(order, ORDERS)}")


def task_of(episode: Episode, order: str) -> tuple[Tensor, Tensor]:
    """An episode's images and labels as one batch: (S + Q, 3, H, W) and (S + Q,).

    "interleaved": support at the even positions 0, 2, ..., 2 (S - 1), query at all others: the
    `adaptation_indices` of learn2learn's MAML and ANIL examples, where S is shots times ways. Needs at least
    S - 1 queries, or the last support images would have no place. "grouped": by label, and within a label
    first support, then query: the split of `partition_task`, of the prototypical networks and of the
    Lightning modules. Needs as many support images of each class as of the others, and as many queries, since
    that is how those find the border between the two. Raises InputError if the episode is not so, or there is
    no such order."""
    _check_order(order)
    n_support, n_query = len(episode.support), len(episode.query)
    data = torch.cat([episode.support, episode.query])
    labels = torch.cat([episode.support_labels, episode.query_labels])
    where = f"episode {episode.index} of {episode.source!r}"
    if order == "grouped":
        for part, counted in (("support", episode.support_labels), ("query", episode.query_labels)):
            counts = torch.bincount(counted, minlength=episode.n_way).tolist()
            if len(set(counts)) > 1:
                found = f"{min(counts)} to {max(counts)} {part} images of a class"
                raise InputError(f"{where}: {found}, the order 'grouped' needs equally many of each")
        position = labels.sort(stable=True).indices  # stable keeps support before query
    else:
        if n_query < n_support - 1:
            found = f"{n_support} support and {n_query} query images"
            raise InputError(f"{where}: {found}, the order 'interleaved' needs {n_support - 1} query images")
        is_support = torch.zeros(len(data), dtype=torch.bool, device=data.device)
        is_support[: 2 * n_support : 2] = True
        position = torch.empty_like(labels)
        position[is_support] = torch.arange(n_support, device=data.device)
        position[~is_support] = torch.arange(n_support, len(data), device=data.device)
    return data[position], labels[position]


def unit_pixels(images: Tensor) -> Tensor:
    """8-bit images as floats in [0, 1]; any others as they are."""
    return images / 255 if images.dtype == torch.uint8 else images


class TasksetEpisodes(Dataset):
    """The tasks of a learn2learn `Taskset` (or `TaskDataset`) as a map-style data set of episodes.

    Episode i is a function of the taskset and of (seed, i), and of nothing else: it is drawn anew with
    Python's, NumPy's and PyTorch's generators set from (seed, i), and these are then put back as they were.
    Tasks that the taskset keeps from earlier use are neither looked at nor added to. (Random transforms that
    run on a GPU draw from its own generator, and are outside of this.)

    Labels are numbered 0..N-1 in the order of their values; RemapLabels' own numbers stay. Of the classes
    themselves a task tells nothing, so `class_ids` and `class_names` are empty. A single channel (Omniglot)
    becomes three equal ones.

    Args:
        taskset: its transforms draw support and query together, for instance NWays(n=5), KShots(k=1 + 15),
            LoadData and RemapLabels for `shots` of 1.
        shots: so many images of each class, the first in the task's order, are support; the others are query.
        n_episodes: how many; None for the taskset's own `num_tasks`.
        seed: decides, with the number of the episode, what is drawn.
        source: what results call this source.
        to_unit: turns a task's images (n, C, H, W) into floats in [0, 1], for instance
            `lambda images: images / 255` for learn2learn's mini-ImageNet.

    Raises:
        InputError: not a Taskset, no shots, or a taskset without end and no `n_episodes`.
    """

    def __init__(
        self,
        taskset,
        shots: int,
        *,
        n_episodes: int | None = None,
        seed: int = 0,
        source: str = "learn2learn",
        to_unit: Callable[[Tensor], Tensor] = unit_pixels,
    ):
        if not (hasattr(taskset, "sample_task_description") and hasattr(taskset, "get_task")):
            raise InputError(f"taskset is a {type(taskset).__name__}, expected a learn2learn Taskset")
        if n_episodes is None:
            if taskset.num_tasks < 0:
                raise InputError("the taskset has no end (num_tasks is -1), so n_episodes is needed")
            n_episodes = taskset.num_tasks
        for name, value, least in (("shots", shots, 1), ("n_episodes", n_episodes, 0), ("seed", seed, 0)):
            if value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        self.taskset, self.shots, self.n_episodes, self.seed = taskset, shots, n_episodes, seed
        self.source, self.to_unit = source, to_unit

    def __len__(self) -> int:
        return self.n_episodes

    def __getitem__(self, index: int) -> Episode:
        """Episode `index` in 0..n_episodes-1.

        Raises:
            InputError: the task is not one of labelled images in [0, 1], has too few images of a class, or
                the same image as support and as query.
        """
        if not 0 <= index < self.n_episodes:
            raise IndexError(f"episode {index} of {self.n_episodes}")
        where = f"{self.source}: task {index}"
        with generators_set_to(self.seed, index):
            drawn = self.taskset.sample_task_description()
            data, labels = self.taskset.get_task(drawn)
            images = self.to_unit(data)
        images = _checked_images(images, where)
        if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
            raise InputError(f"{where}: expected an integer as label of each of the {len(images)} images")
        _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
        if counts.min() <= self.shots:
            found = f"{counts.min()} images of a class"
            raise InputError(f"{where}: {found}, expected more than the {self.shots} that become support")
        member = F.one_hot(labels)
        is_support = (member.cumsum(0) * member).sum(1) <= self.shots
        _refuse_overlap([chosen.index for chosen in drawn], is_support.tolist(), where)
        return Episode(
            support=images[is_support],
            support_labels=labels[is_support],
            query=images[~is_support],
            query_labels=labels[~is_support],
            source=self.source,
            index=index,
        )


def _checked_images(images: Tensor, where: str) -> Tensor:
    """`images` as float32 (n, 3, H, W), if they are images in [0, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"{where}: images are {found}, expected (n, 3, H, W) or (n, 1, H, W)")
    low, high = images.min().item(), images.max().item()
    if not (images.is_floating_point() and low >= 0 and high <= 1):  # so that NaN is refused as well
        found = f"{images.dtype} images in [{low:g}, {high:g}]"
        raise InputError(f"{where}: {found}, expected floats in [0, 1]; to_unit says how to get there")
    return images.float().expand(-1, 3, -1, -1)


def _refuse_overlap(records: list[int], is_support: list[bool], where: str) -> None:
    """Of a task drawn with replacement, the answers to some queries may be among the support."""
    if len(records) != len(is_support):
        raise InputError(f"{where}: {len(is_support)} images, of which the taskset drew {len(records)}")
    support, query = (
        {record for record, part in zip(records, is_support, strict=True) if part == wanted}
        for wanted in (True, False)
    )
    if shared := support & query:
        hint = "draw without replacement"
        raise InputError(f"{where}: image {min(shared)} is both support and query; {hint}")


@contextlib.contextmanager
def generators_set_to(*key: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's (CPU) global generators seeded from `key`, and later put back."""
    python, numpy = random.getstate(), np.random.get_state()
    seeds = np.random.SeedSequence(key).generate_state(4)
    with torch.random.fork_rng(devices=()):
        random.seed(seeds.tobytes())
        np.random.seed(seeds)
        torch.default_generator.manual_seed(int(seeds[0]) << 32 | int(seeds[1]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
