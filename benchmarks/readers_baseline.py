"""Episodes as one would first read them; what `readers.py` compares `meta_dataset_readers` with.

One HDF5 file per class, opened when first needed and never closed; in it a group "0", "1", ... per image,
which holds the decoded picture (PMF's conversion: at most 224 x 224 pixels, whatever the aspect ratio); PIL,
and torchvision's transforms one by one. Which classes an episode has, and how many images of each, is drawn
by the package that it is compared with: that is no part of reading.
"""

from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.sampling import EpisodeDescription, sample_episode
from meta_dataset_readers.spec import load_spec

MOST_SIDE = 224  # pictures with both sides at least that long are stored as 224 x 224


def write_class(path: Path, pictures: list[Image.Image], images: int) -> None:
    """A class file of `images` groups. Where there are fewer pictures, groups share them (as hard links), so
    that the file has all its groups at a fraction of its size."""
    with h5py.File(path, "w") as file:
        for k in range(images):
            group = file.create_group(str(k))
            if k < len(pictures):
                group["image"] = np.asarray(converted(pictures[k]))
            else:
                group["image"] = file[str(k % len(pictures))]["image"]


def converted(picture: Image.Image) -> Image.Image:
    """The picture as PMF's conversion stores it."""
    if min(picture.size) < MOST_SIDE:
        return picture
    return picture.resize((MOST_SIDE, MOST_SIDE), Image.Resampling.BILINEAR)


class H5Episodes(Dataset):
    """Episodes of the TRAIN split as (support, its labels, query, its labels).

    Images are float32 (N, 3, image_size, image_size) in [0, 1], labels int64 (N,).
    """

    def __init__(self, directory: Path, sampling: EpisodeSampling, image_size: int, n_episodes: int):
        self.spec, self.sampling, self.n_episodes = load_spec(directory), sampling, n_episodes
        self.files: dict[int, h5py.File] = {}
        self.transform = transforms.Compose(
            [
                transforms.Resize(image_size * 256 // 224),
                transforms.CenterCrop(image_size),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return self.n_episodes

    def describe(self, index: int) -> EpisodeDescription:
        return sample_episode(self.spec, "TRAIN", self.sampling, np.random.default_rng(index))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        description, rng = self.describe(index), np.random.default_rng([index, 1])
        support, support_labels, query, query_labels = [], [], [], []
        for label, (class_id, shots) in enumerate(zip(description.class_ids, description.shots, strict=True)):
            file = self.file(class_id)
            chosen = rng.permutation(len(file))[: shots + description.queries]
            images = [self.transform(Image.fromarray(file[str(k)]["image"][()])) for k in chosen]
            support += images[:shots]
            support_labels += [label] * shots
            query += images[shots:]
            query_labels += [label] * description.queries
        return (
            torch.stack(support),
            torch.tensor(support_labels),
            torch.stack(query),
            torch.tensor(query_labels),
        )

    def file(self, class_id: int) -> h5py.File:
        if class_id not in self.files:
            self.files[class_id] = h5py.File(self.spec.directory / f"{class_id}.h5", "r")
        return self.files[class_id]
