"""Images on their way to the device that computes, and how long it waits for them.

Pixels travel as the uint8 that they are, a quarter of the size, and become float32 on the device: by a table
of the 256 values they have on the CPU, since a GPU divides by 255 with another rounding. Does not know
episodes.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from meta_dataset_readers.cores import available_cores
from meta_dataset_readers.transforms import unit_range

Item = TypeVar("Item")
_WINDOW = 60.0  # seconds over which the share of waiting is taken, the latest counting most
_SETTLED, _STARVED = 30.0, 0.25  # seconds before which nothing is said; the share from which on it is


class Feed:
    """Sends tensors of the CPU to `device`, to a GPU through pinned memory, so that nothing waits for it."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self._table: Tensor | None = None

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def images(self, images: Tensor) -> Tensor:
        """Images of any shape on the device: uint8 in 0..255 as float32 in [0, 1], with the bits that
        `unit_range` gives; others as they are."""
        if images.dtype != torch.uint8:
            return self.send(images)
        if self._device.type == "cpu":
            return unit_range(images.numpy())
        if self._table is None:
            self._table = unit_range(np.arange(256, dtype=np.uint8)).to(self._device)
        pixels = self.send(images)
        return self._table.index_select(0, pixels.flatten().int()).view(pixels.shape)


class Waiting:
    """Times the waits for items; `share` is that of the last minute or so, in [0, 1].

    A step that tells its numbers has let the device finish, so while the next item is waited for it idles.

    Args:
        clock: seconds.

    >>> waiting = Waiting()
    >>> list(waiting.timed("ab")), waiting.share < 1
    (['a', 'b'], True)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._waited = self._passed = 0.0
        self._is_said = False

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; what passes between two of them is work."""
        asked = self._clock()
        for item in items:
            came = self._clock()
            yield item
            done = self._clock()
            kept = math.exp((asked - done) / _WINDOW)
            self._waited = self._waited * kept + came - asked
            self._passed = self._passed * kept + done - asked
            asked = done

    @property
    def share(self) -> float:
        """Of the time that was spent waiting."""
        return self._waited / self._passed if self._passed else 0.0

    @property
    def shown(self) -> str:
        """The share for a progress line."""
        return f"{100 * self.share:.0f}% waiting for data"

    def warning(self) -> str:
        """A line if data come too slowly, once; else nothing."""
        if self._is_said or self._passed < _SETTLED or self.share < _STARVED:
            return ""
        self._is_said = True
        return (
            f"note: {self.shown}; more --num_workers read faster, up to the {available_cores()} cores that "
            "this process may use, and so do packed data (amt convert)"
        )
