"""Find a pool by its name, and open it with its network."""

import copy
import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from amt.few_shot.hub import fetch, is_name
from amt.files import checkpoint, shipped
from amt.files.pretrained import load_network
from amt.models.architectures import stated
from amt.models.head_settings import Head, parse_head
from amt.models.heads import PoolStatistics
from amt.models.network import Network, find_device, untrained
from amt.models.pool import Pool
from amt.models.weights import Coefficients, Weights
from meta_dataset_readers.errors import InputError, blaming, nearest
from meta_dataset_readers.files import size_of

_IN_A_RUN = ("best.safetensors", "last.safetensors")  # what a training leaves in its folder, by preference


@dataclasses.dataclass(frozen=True)
class OpenPool:
    """A pool on its network's device.

    Args:
        file: it comes from.
        network: its structure, whose own weights are not used unless `with_pretrained` made it.
        pool: the members.
        about: what the file says of itself.
        statistics: of the members' features, for heads that need them; None: the file has none.
    """

    file: Path
    network: Network
    pool: Pool
    about: dict[str, Any]
    statistics: PoolStatistics | None = None

    @property
    def head(self) -> Head:
        """What the file recommends to classify features with; prototypes if it says nothing.

        Raises:
            InputError: it names no head.
        """
        return head_of(f"{self.file}: damaged header field 'head'", self.about)

    @property
    def coefficients(self) -> Coefficients | None:
        """The share of each member that the file recommends; None if it says nothing.

        Raises:
            InputError: it names no shares.
        """
        found = self.about.get("coefficients")
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(share, int | float) for share in found):
            raise InputError(f"{self.file}: damaged header field 'coefficients': expected a list of numbers")
        return tuple(found)

    def to(self, device: torch.device | str) -> "OpenPool":
        """The same on another device, itself if it is there."""
        if self.network.device == torch.device(device):
            return self
        network = dataclasses.replace(self.network, module=copy.deepcopy(self.network.module).to(device))
        known = self.statistics and self.statistics.to(device)
        return dataclasses.replace(self, network=network, pool=self.pool.to(device), statistics=known)

    def packed(self) -> tuple[Weights, dict[str, Any]]:
        """The tensors and the text of a file of this pool, without what only its training needs."""
        about = {name: value for name, value in self.about.items() if name != "tuner"}
        named = about | {"arch": self.network.arch}
        return checkpoint.packed(checkpoint.Checkpoint(self.pool, named, statistics=self.statistics))

    def with_pretrained(self, weights: Path | None = None, key: str | None = None) -> "OpenPool":
        """The same with a network that has its pretrained weights, which mixing with them needs.

        Args:
            weights: their file; None: see `find_weights`.
            key: of the network to take, see `load_network`.

        Raises:
            InputError: there are none, or they do not fit.
        """
        side = self.network.image_size
        arch = stated(self.network.arch, self.pool.shapes)
        network = load_network(arch, weights, self.network.device, image_size=side, key=key)
        return dataclasses.replace(self, network=network)


def find_pool(name: str | os.PathLike, **hub: Any) -> Path:
    """The file of a pool, or of a saved task.

    Args:
        name: a file, a folder with best.safetensors, last.safetensors or one single .safetensors, the name of
            a pool in the box, or ORG/NAME on the hub.
        hub: how files are asked for there, see `fetch`.

    Raises:
        InputError: there is no such thing.
    """
    found = local_pool(name)
    if found is not None:
        return found
    text = str(name)
    if is_name(text) and not text.endswith(shipped.ENDINGS):
        return fetch(text, **hub)
    path = Path(text)
    if len(path.parts) > 1 or path.suffix:
        raise InputError(f"{text}: no such file or folder, expected a pool")
    names = [file.stem for file in shipped.BOX.glob("*") if file.suffix in shipped.ENDINGS]
    raise InputError(
        f"no pool {text!r}: neither a file, nor a folder, nor in the box; {nearest(text, names)}"
    )


def local_pool(name: str | os.PathLike) -> Path | None:
    """`find_pool` without the hub: None for what is not on this computer. Raises InputError for a folder that
    holds no pool."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _in_folder(path)
    return path if path.exists() else shipped.boxed(str(name))


def _in_folder(folder: Path) -> Path:
    for name in _IN_A_RUN:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        held = f"{len(found)} files .safetensors" if found else "no file .safetensors"
        raise InputError(f"{folder}: holds {held}, expected one, or {' or '.join(_IN_A_RUN)}; name the file")
    return found[0]


def open_pool(
    name: str | os.PathLike, arch: str | None = None, image_size: int | None = None, device: str = "cpu"
) -> OpenPool:
    """The pool called `name` with the network it was made for.

    Args:
        name: see `find_pool`.
        arch: of the network; None for what the file says.
        image_size: side in pixels; None for the network's own.
        device: see `find_device`.

    Raises:
        InputError: there is no such pool or device, nothing says which network it is of, or it does not fit
            that one.
    """
    file = find_pool(name)
    size = size_of(file, what="pool")
    return _opened(file, (size, file.stat().st_mtime_ns), arch, image_size).to(find_device(device))


@functools.lru_cache(maxsize=1)  # cross-validation fits one pool again and again
def _opened(file: Path, _state: tuple[int, int], arch: str | None, image_size: int | None) -> OpenPool:
    """`open_pool` of a file in a state of its contents."""
    saved = checkpoint.load(file)
    network = network_of(file, saved.about, arch, image_size, saved.pool.shapes)
    checkpoint.check_architecture(file, saved.pool, network.weights, network.arch)
    return OpenPool(file, network, saved.pool, saved.about, saved.statistics)


def head_of(where: str, about: Mapping[str, Any]) -> Head:
    """What a file's header says that classifies. Raises InputError, begun by `where`, if that is no head."""
    with blaming(where):
        return parse_head(str(about.get("head", Head.kind)).split())


def network_of(
    file: Path,
    about: dict[str, Any],
    arch: str | None,
    image_size: int | None,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Network:
    """The structure that a file's weights, of these `shapes`, belong to; its own weights are random.

    Raises:
        InputError: nothing says which network it is, or images of that size are too small for it.
    """
    network, _ = untrained(checkpoint.arch_of(file, about, shapes, arch))
    network = dataclasses.replace(network, image_size=image_size or network.image_size)
    if network.image_size < network.patch_size:
        raise InputError(
            f"--image_size is {network.image_size}, expected at least a patch of {network.patch_size} px"
        )
    return network
