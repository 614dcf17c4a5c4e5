"""The keeper of a training run: its directory, checkpoints, signals, progress line and TensorBoard events.

    RUN/run.json            what the run was begun with
    RUN/last.safetensors    everything the run continues from
    RUN/best.safetensors    the epoch that validates best
    RUN/tensorboard/

Observes a run and never steers it: a run with another keeper ends with the same weights. Where several ranks
train together only the first one's keeper writes and prints, and all see a signal at the same step. Knows no
method; the loops in amt/cli decide what is trained, how an epoch is validated and what the files hold.
"""

import contextlib
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from torch import nn
from tqdm import tqdm

from amt.files import checkpoint, weight_files
from amt.files.ranks import ALONE, LostRank, Ranks
from amt.files.run_directory import RunDirectory
from amt.files.signals import Interrupted, Interrupts
from amt.files.tensorboard import TensorBoard
from amt.models.weights import Weights
from amt.training.optimiser import NonFiniteLoss
from meta_dataset_readers.errors import InputError, damaged, printable
from meta_dataset_readers.feeding import Waiting

Item = TypeVar("Item")
FINE_TUNING = "fine-tuning"  # the kind of AutoLoRa's last.safetensors
WROTE = (
    *("last.safetensors", "last.json", "best.safetensors", "best.json"),
    *("tensorboard/events.out.tfevents.*", "tensorboard"),
)


class Keeper:
    """Keeps one run in its directory; use it as a context manager.

    Args:
        folder: created if missing.
        kind: of run, in words, such as "a meta-tuning"; another kind's directory is refused.
        settings: what decides the result; a run of other settings is refused.
        flag, overwrite, older: as of `RunDirectory`.
        minutes: of training after which a checkpoint is due within an epoch; 0 for none.
        results: patterns of files of this run besides those above.
        ranks: that train together; every rank makes the same calls, except where it says otherwise.

    Raises:
        InputError: on entering, see `RunDirectory`; on leaving, in place of a `NonFiniteLoss`, or with
            what is kept where a rank was lost.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        settings: Mapping,
        *,
        flag: str = "--output_dir",
        overwrite: bool = False,
        minutes: float = 10.0,
        results: Sequence[str] = (),
        older: Mapping = MappingProxyType({}),
        ranks: Ranks = ALONE,
    ):
        self.folder, self._ranks = folder, ranks
        self.last, self.best = folder / "last.safetensors", folder / "best.safetensors"
        self.good: Path | None = None  # holds the last good state
        self._directory = RunDirectory(
            folder,
            {"format": checkpoint.FORMAT, "kind": kind, "settings": settings, **checkpoint.provenance()},
            results=(*WROTE, *results),
            flag=flag,
            overwrite=overwrite,
            resumable=[self.last.name],
            older=older,
        )
        self._seconds = 60 * minutes
        self._interrupts = Interrupts(once=ranks.world > 1)
        self._waiting = Waiting()
        self._saved_at, self._due = time.monotonic(), False
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "Keeper":
        with contextlib.ExitStack() as opened:
            if self._ranks.first:
                opened.enter_context(self._directory)
            opened.enter_context(self._interrupts)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        try:
            self._opened.close()
        except OSError:  # a full disk is told once
            if error is None:
                raise
        if isinstance(error, NonFiniteLoss | LostRank):
            kept = f"the last good state is kept in {self.good}" if self.good else "nothing was saved yet"
            raise InputError(f"{self.folder}: {error}; {kept}") from error

    def goes_on_alone(self) -> None:
        """From now on only rank 0 is left."""
        self._ranks = ALONE

    def begin(self, what: str, unit: str, total: int, done: int) -> None:
        """Open the progress line and TensorBoard's file; `done` of `total` units are done. To be called once
        `last`, if it exists, has been checked against the settings."""
        self._saved_at, self._due = time.monotonic(), False
        self.good = self.last if done and self.last.exists() else None
        if self._ranks.first:
            self._directory.confirm()
            self._tensorboard = TensorBoard(self.folder / "tensorboard", first=done + 1)
            self._opened.callback(self._tensorboard.close)
            self._progress = tqdm(total=total, initial=done, unit=unit, desc=what, smoothing=0.05)
            self._opened.callback(self._progress.close)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items up to the first signal to any rank, which also interrupts the wait for the next one;
        every rank has as many. How long that wait is the progress line shows."""
        coming = self._interrupts.watch(self._waiting.timed(items))
        while True:
            found = list(itertools.islice(coming, 1))
            over, caught, due = self._ranks.most(not found, self._interrupts.caught or 0, self._is_late())
            self._interrupts.caught, self._due = self._interrupts.caught or caught or None, bool(due)
            if over or caught:
                return
            yield found[0]

    def whole(self, items: Iterable[Item]) -> Iterator[Item]:
        """All items, as many for every rank; raises `Interrupted` after a signal, as half a validation is
        useless."""
        yield from self.watch(items)
        if self.interrupted:
            raise Interrupted

    def passes(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While active a pass through `module` raises `Interrupted` after a signal; with several ranks, which
        only stop together, it does not."""
        if self._ranks.world > 1:
            return contextlib.nullcontext()
        return self._interrupts.passes(module)

    @property
    def interrupted(self) -> bool:
        """Whether a signal has arrived, at any rank."""
        (caught,) = self._ranks.most(self._interrupts.caught or 0)
        self._interrupts.caught = self._interrupts.caught or caught or None
        return caught > 0

    @property
    def code(self) -> int:
        """The exit code after a signal."""
        return self._interrupts.code

    def log_step(self, step: int, scalars: Mapping[str, float], brief: str) -> None:
        """Note one step, from 1, and show it on the progress line."""
        self.log(step, scalars)
        if self._ranks.first:
            self._progress.update(step - self._progress.n)
            self._progress.set_postfix_str(f"{brief}, {self._waiting.shown}", refresh=False)
            if line := self._waiting.warning():
                self.say(line)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Note values for TensorBoard."""
        if self._ranks.first:
            self._tensorboard.add(scalars, step)

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._ranks.first:
            self._progress.write(printable(line))

    def is_due(self) -> bool:
        """Whether the last checkpoint was written long enough ago, when this step began."""
        return self._due

    def save_last(self, tensors: Weights, about: dict) -> None:
        """Write the checkpoint that the run continues from."""
        if self._ranks.first:
            checkpoint.write(self.last, tensors, about)
            self._tensorboard.flush()
        self.good, self._saved_at = self.last, time.monotonic()

    def save_best(self, tensors: Weights, about: dict) -> None:
        """Write the best epoch. Save it before `last`: killed in between, the continued run judges this epoch
        again and finds it best again."""
        if self._ranks.first:
            checkpoint.write(self.best, tensors, about)

    def _is_late(self) -> bool:
        return 0 < self._seconds <= time.monotonic() - self._saved_at


def check_resumable(path: Path, saved: checkpoint.Checkpoint) -> None:
    """Raise an `InputError` unless a meta-tuning can continue from `saved`, which is what `path` holds."""
    if "published" in saved.about:
        raise InputError(
            f"{path}: a checkpoint of the published code, whose training cannot be continued exactly; "
            "expected a last.safetensors of ours"
        )
    if "tuner" not in saved.about:
        raise InputError(f"{path}: holds no optimiser state; continue from a last.safetensors")
    for name, kind in {"tuner": dict, "settings": dict, "protocol": dict, "history": list}.items():
        if not isinstance(saved.about.get(name), kind):
            raise InputError(f"{path}: damaged header field 'amt': {name} is missing or no {kind.__name__}")


def fine_tuning_state(path: Path) -> tuple[Weights, dict]:
    """The tensors that a fine-tuning continues from, and the header of its file, with at least `protocol` and
    `tuner`. Raises InputError for a file that is damaged or holds no such state."""
    content = weight_files.read(path, "state of a fine-tuning")
    with damaged(f"{path}: no state of a fine-tuning", KeyError, said=repr):
        about = checkpoint.parse_header(path, content.header[checkpoint.HEADER])
    for name in ("format", "kind", "protocol", "tuner"):
        if name not in about:
            raise InputError(f"{path}: no state of a fine-tuning ({name} is missing)")
    if about["format"] != checkpoint.FORMAT:
        raise InputError(f"{path}: format {about['format']!r}, expected {checkpoint.FORMAT}")
    kind = about["kind"]
    if kind != FINE_TUNING:
        raise InputError(f"{path}: a {kind}, expected the state of a fine-tuning")
    return content.data, about


def scalars(prefix: str, record: NamedTuple, without: Collection[str] = ()) -> dict[str, float]:
    """The fields of a step's record as TensorBoard shows them."""
    return {f"{prefix}/{name}": value for name, value in record._asdict().items() if name not in without}


def brief(record) -> str:
    """A step's record on the progress line: loss, clean and robust accuracy in per cent."""
    return f"{record.total:.2f} {100 * record.clean_accuracy:.0f}/{100 * record.robust_accuracy:.0f}%"
