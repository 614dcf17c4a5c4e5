"""The episode: what a reader hands to everything else, and all that the rest knows about data."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ImageOrigin:
    """Where one image came from: `file` relative to the data root, `record` its index in that file."""

    file: str
    record: int


@dataclasses.dataclass(frozen=True)
class Episode:
    """One few-shot task: S support images, Q query images, N ways.

    Images are float32 RGB in [0, 1], not normalised; labels are int64 in 0..N-1, where label k is the
    k-th class drawn.
    """

    support: Tensor  # (S, 3, H, W)
    support_labels: Tensor  # (S,)
    query: Tensor  # (Q, 3, H, W)
    query_labels: Tensor  # (Q,)
    source: str = ""
    index: int = 0
    class_ids: tuple[int, ...] = ()  # absolute ids in the source's specification, by label
    class_names: tuple[str, ...] = ()
    support_origin: tuple[ImageOrigin, ...] = ()
    query_origin: tuple[ImageOrigin, ...] = ()
    skipped: tuple[str, ...] = ()  # one line for each damaged record that was passed over

    @property
    def n_way(self) -> int:
        """Number of classes N; of an episode without support, a part of an ordinary test set, that of the
        class names."""
        return int(self.support_labels.max()) + 1 if len(self.support_labels) else len(self.class_names)

    @property
    def names(self) -> tuple[str, ...]:
        """A name for every class by label, also where the source gives none."""
        return self.class_names or tuple(f"class {label}" for label in range(self.n_way))

    def to(self, device) -> "Episode":
        """The same episode with its four tensors on `device`."""
        return dataclasses.replace(
            self,
            support=self.support.to(device, non_blocking=True),
            support_labels=self.support_labels.to(device, non_blocking=True),
            query=self.query.to(device, non_blocking=True),
            query_labels=self.query_labels.to(device, non_blocking=True),
        )
