"""Episodes from a source on disk: `reader[i]`.

Episode i is a function of (seed, source, split, i) and of the settings, and of nothing else: not of the
number of workers, the process, or the episodes read before. Knows how the other modules of this package
fit together; does not normalise, and does not know networks.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from meta_dataset_readers.episode import Episode, ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError
from meta_dataset_readers.feeding import Feed
from meta_dataset_readers.layouts import open_source
from meta_dataset_readers.loader import OrderedLoader
from meta_dataset_readers.pictures import UnreadableImage
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.sampling import EpisodeDescription, check_sampling, sample_episode
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.transforms import (
    eval_crop,
    planes,
    reduced_eval_crop,
    reduced_train_crop,
    train_crop,
)


class EpisodeReader(Dataset):
    """The episodes of one split of one source, as a map-style data set.

    `root` holds one directory per source, see `layouts.open_source`. `sampling` says how episodes are drawn;
    images are `image_size` x `image_size` pixels. With `augment`, support and query go through the random
    training transform (PMF's protocol), otherwise both through the evaluation transform. A damaged record
    raises InputError; with `skip_bad_records` another unused image of its class takes its place and the
    episode's `skipped` says so (also where a file holds another number of records than the specification
    claims). With `fast_decode`, JPEGs of at least twice the image size are decoded at a reduced scale:
    photographs change by 1 to 3 grey levels on average, one pixel in a hundred by 5 to 20.

    Opening reads the specification and the names of the files beside it, no image; `image_prefix` as in
    `layouts.open_source`. Raises InputError for a path, source or split that is not there, a missing file,
    and settings the source cannot satisfy.

    >>> sampling = EpisodeSampling(num_ways=2, num_support=1, num_query=1)
    >>> reader = EpisodeReader("photos", "support", "TEST", sampling, image_size=32, n_episodes=10)
    >>> reader[0].support.shape, reader[0].n_way
    (torch.Size([2, 3, 32, 32]), 2)
    """

    def __init__(
        self,
        root: str | Path,
        source: str,
        split: str,
        sampling: EpisodeSampling,
        image_size: int,
        *,
        n_episodes: int,
        seed: int = 0,
        augment: bool = False,
        skip_bad_records: bool = False,
        fast_decode: bool = False,
        image_prefix: tuple[str, str] | None = None,
    ):
        numbers = (("image_size", image_size, 1), ("n_episodes", n_episodes, 0), ("seed", seed, 0))
        for name, value, least in numbers:
            if value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        self.source, self.split, self.sampling, self.image_size = source, split, sampling, image_size
        self.n_episodes, self.seed = n_episodes, seed
        self.augment, self.skip_bad_records = augment, skip_bad_records
        opened = open_source(root, source, image_prefix)
        self.spec, self.store, self.resize = opened.spec, opened.store, opened.resize
        # A store without picture files would have to write one first.
        self.fast_decode = fast_decode and type(self.store).encoded is not ImageStore.encoded
        check_sampling(self.spec, split, sampling)
        _check_files(opened, split)

    def __len__(self) -> int:
        return self.n_episodes

    def __getitem__(self, index: int) -> Episode:
        """Episode `index` in 0..n_episodes-1. Raises InputError for damaged files, see the class."""
        if not 0 <= index < self.n_episodes:
            raise IndexError(f"episode {index} of {self.n_episodes}")
        return self.episode(index)

    def describe(self, index: int) -> EpisodeDescription:
        """The classes, shots and queries of episode `index`; no record file is opened."""
        first = index - index % self.sampling.episode_description_switch_frequency
        return sample_episode(self.spec, self.split, self.sampling, self._generators(first)[0])

    def episode(self, index: int) -> Episode:
        """Episode `index` >= 0, also beyond the length of this reader."""
        return _fed(Feed(), self.raw(index))

    def raw(self, index: int) -> Episode:
        """`episode` before its last step: images are uint8 in 0..255, a quarter of the size."""
        description = self.describe(index)
        _, choice, augmentation = self._generators(index)
        support, query, skipped = [], [], []
        for label, (class_id, shots) in enumerate(zip(description.class_ids, description.shots, strict=True)):
            drawn = self._draw(class_id, label, shots + description.queries, choice, augmentation, skipped)
            support += drawn[:shots]
            query += drawn[shots:]
        return Episode(
            support=self._stack(support),
            support_labels=_labels(support),
            query=self._stack(query),
            query_labels=_labels(query),
            source=self.source,
            index=index,
            class_ids=description.class_ids,
            class_names=tuple(self.spec.class_name(class_id) for class_id in description.class_ids),
            support_origin=tuple(image.origin for image in support),
            query_origin=tuple(image.origin for image in query),
            skipped=tuple(skipped),
        )

    def _generators(self, index: int) -> list[np.random.Generator]:
        """Independent streams for the description, the choice of images and the augmentation."""
        sequence = _seed_sequence(self.seed, index, self.source, self.split)
        return [np.random.default_rng(child) for child in sequence.spawn(3)]

    def _draw(
        self,
        class_id: int,
        label: int,
        n_images: int,
        choice: np.random.Generator,
        augmentation: np.random.Generator,
        skipped: list[str],
    ) -> list["_Drawn"]:
        """`n_images` different images of one class; messages about records passed over go to `skipped`."""
        there, claimed = self.store.count(class_id), self.spec.images_per_class[class_id]
        place = self.store.place(class_id)
        if there != claimed:
            found = f"{there} images of class {class_id} ({self.spec.class_name(class_id)!r})"
            self._raise_or_skip(InputError(f"{place}: {found}, {self.spec.file} claims {claimed}"), skipped)
        drawn: list[_Drawn] = []
        for chosen in _without_replacement(min(there, claimed), choice):
            if len(drawn) == n_images:
                break
            try:
                crop = self._crop(class_id, chosen, augmentation)
            except DamagedRecord as error:
                self._raise_or_skip(error, skipped)
                continue
            drawn.append(_Drawn(planes(crop), label, self.store.origin(class_id, chosen)))
        if len(drawn) < n_images:
            found = f"{len(drawn)} readable images of class {class_id}"
            raise InputError(f"{place}: {found}, an episode needs {n_images}")
        return drawn

    def _crop(self, class_id: int, index: int, augmentation: np.random.Generator) -> Image.Image:
        """A picture as it goes into the episode."""
        if self.fast_decode:
            # What cannot be decoded is left to the store, whose message says where it lies.
            with contextlib.suppress(UnreadableImage):
                data = self.store.encoded(class_id, index)
                if self.augment:
                    return reduced_train_crop(data, self.image_size, augmentation)
                return reduced_eval_crop(data, self.image_size, self.resize)
        image = self.store.image(class_id, index)
        if self.augment:
            return train_crop(image, self.image_size, augmentation)
        return eval_crop(image, self.image_size, self.resize)

    def _raise_or_skip(self, error: InputError, skipped: list[str]) -> None:
        if not self.skip_bad_records:
            raise error
        skipped.append(str(error))

    def _stack(self, images: Sequence["_Drawn"]) -> Tensor:
        stacked = np.empty((len(images), 3, self.image_size, self.image_size), np.uint8)
        for place, image in zip(stacked, images, strict=True):
            place[:] = image.pixels
        return torch.from_numpy(stacked)


class SourceMixture(Dataset):
    """Episodes from several readers: the source of episode i is uniform, a function of (seed, i) only.

    Sources count equally, whatever their size. Episode i of the mixture is episode i of that reader.
    """

    def __init__(self, readers: Sequence[EpisodeReader], n_episodes: int, seed: int = 0):
        if not readers:
            raise InputError("a mixture of sources needs at least one source")
        self.readers, self.n_episodes, self.seed = tuple(readers), n_episodes, seed

    def __len__(self) -> int:
        return self.n_episodes

    def __getitem__(self, index: int) -> Episode:
        return _fed(Feed(), self.raw(index))

    def raw(self, index: int) -> Episode:
        """The same with uint8 images, see `EpisodeReader.raw`."""
        if not 0 <= index < self.n_episodes:
            raise IndexError(f"episode {index} of {self.n_episodes}")
        rng = np.random.default_rng(_seed_sequence(self.seed, index, "source"))
        return self.readers[rng.integers(0, len(self.readers))].raw(index)


def episode_loader(dataset: Dataset, num_workers: int = 0, device: torch.device | str = "cpu") -> DataLoader:
    """Iterate over the episodes of `dataset` in order, prepared by `num_workers` processes (0: by this one),
    with their tensors on `device`.

    See `loader.OrderedLoader` and `feeding.Feed`.
    """
    return _EpisodeLoader(_RawEpisodes(dataset), num_workers, device)


class _RawEpisodes(Dataset):
    """Episodes with uint8 images where a data set can give them so: shared memory is dear."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Episode:
        return _raw(self.dataset, index)


class _EpisodeLoader(OrderedLoader):
    def __init__(self, dataset: Dataset, num_workers: int, device: torch.device | str):
        super().__init__(dataset, num_workers, keep_workers=True)
        self._feed = Feed(device)

    def __iter__(self) -> Iterator[Episode]:
        return (_fed(self._feed, episode) for episode in super().__iter__())


def _raw(dataset: Dataset, index: int) -> Episode:
    if isinstance(dataset, Subset):
        return _raw(dataset.dataset, dataset.indices[index])
    return dataset.raw(index) if hasattr(dataset, "raw") else dataset[index]


def _fed(feed: Feed, episode: Episode) -> Episode:
    """The episode on the feed's device with float32 images in [0, 1], whatever they are now."""
    return dataclasses.replace(
        episode,
        support=feed.images(episode.support),
        support_labels=feed.send(episode.support_labels),
        query=feed.images(episode.query),
        query_labels=feed.send(episode.query_labels),
    )


@dataclasses.dataclass(frozen=True)
class _Drawn:
    pixels: np.ndarray  # (3, H, W) uint8
    label: int  # within the episode
    origin: ImageOrigin


def _labels(images: Sequence[_Drawn]) -> Tensor:
    return torch.tensor([image.label for image in images], dtype=torch.int64)


def _without_replacement(n: int, rng: np.random.Generator) -> Iterator[int]:
    """0..n-1 in random order, drawn one by one: a Fisher-Yates shuffle that stores only what it moved.

    A class may have 100,000 images, of which an episode takes 20.
    """
    moved: dict[int, int] = {}
    for position in range(n):
        other = int(rng.integers(position, n))
        yield moved.get(other, other)
        moved[other] = moved.get(position, position)


def _seed_sequence(seed: int, index: int, *names: str) -> np.random.SeedSequence:
    # Not hash(): that differs from process to process.
    digests = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big") for name in names]
    return np.random.SeedSequence([seed, index, *digests])


def _check_files(source: Source, split: str) -> None:
    wanted = source.spec.classes(split)
    missing = source.store.missing(wanted)
    if missing:
        raise InputError(
            f"{source.spec.directory}: {len(missing)} of the {len(wanted)} files of {split} are missing, "
            f"the first is {missing[0]}"
        )
