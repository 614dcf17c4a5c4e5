"""Small data sets of labelled pictures, in the formats they are distributed in."""

import pickle

import numpy as np
from conftest import write_classes


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_cifar(root, n_classes=10, n=12, protocol=2, labels=None):
    """The pickled form; batch b has rows noise(n, 3072, seed=b). Returns its folder."""
    ten = n_classes == 10
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    for b, name in enumerate([*train, "test_batch" if ten else "test"]):
        found = [i % n_classes for i in range(n)] if labels is None else labels
        batch = {"data": noise(n, 3072, seed=b), "filenames": [f"{i}.png" for i in range(n)]}
        batch |= {"labels": found} if ten else {"fine_labels": found, "coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    names = [f"class {i}" for i in range(n_classes)]
    meta = {"label_names": names} if ten else {"fine_label_names": names, "coarse_label_names": []}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol))
    return folder


def write_folders(root, **more):
    write_classes(root / "train", cat=4, dog=3)
    write_classes(root / "test", cat=2, dog=1)
    for split, classes in more.items():
        write_classes(root / split, **classes)
    return root


def origins(*parts):
    return [part.origin(i) for part in parts for i in range(len(part))]
