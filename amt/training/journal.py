"""What a training run leaves behind: checkpoints, TensorBoard scalars, a progress line, and warnings.

Watches a run and never steers it: a run with another journal ends with the same weights.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from amt.files import checkpoint
from amt.models.pool import Pool
from amt.training.meta_tune import StepRecord, Tuner, collapsed
from meta_dataset_readers.episode import Episode

Validate = Callable[[Pool], list[dict[str, float]]]


class Journal:
    """Keeps the books of one run in `folder`: last.safetensors, best.safetensors and TensorBoard events.

    Args:
        folder: created if missing.
        about: what every checkpoint says of itself: arch, options, provenance.
        validate: scores a pool, a dictionary per level, each with `clean` and perhaps `robust` in per cent;
            None for no validation.
        history: what an earlier part of the run noted, see `Checkpoint.about`.
        total: episodes in the whole run.
        done: episodes done already.

    `skipped` has a line for each damaged record that was passed over, `saved` is the last checkpoint written.
    """

    def __init__(
        self,
        folder: Path,
        about: dict,
        validate: Validate | None,
        total: int,
        done: int = 0,
        history: Sequence[dict] = (),
    ):
        self.folder = folder
        self.about = about
        self.validate = validate
        self.history = list(history)
        self.skipped: set[str] = set()
        self.saved: Path | None = None
        self._records: list[list[StepRecord]] = []
        self._board = SummaryWriter(folder / "tensorboard", purge_step=done + 1)
        self._progress = tqdm(total=total, initial=done, unit="episode", desc="meta-tuning", smoothing=0.05)

    def watch(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """The same episodes, while the damaged records that were passed over are noted."""
        for episode in episodes:
            self.skipped.update(episode.skipped)
            yield episode

    def on_step(self, tuner: Tuner, records: list[StepRecord]) -> None:
        """Note one episode."""
        for p, record in enumerate(records):
            for name, value in record._asdict().items():
                if name != "n_way":
                    self._board.add_scalar(f"level{p}/{name}", value, tuner.episodes_done)
        self._records.append(records)
        self._progress.update()
        self._progress.set_postfix_str(" | ".join(_brief(record) for record in records), refresh=False)

    def on_epoch(self, tuner: Tuner) -> None:
        """Note the end of an epoch: validate, warn of a collapse, save `best` if it is, and `last`."""
        note = {"epoch": tuner.epoch, "episodes": tuner.episodes_done}
        diverges = tuner.settings.method == "adsv"  # the others have no divergence to look at
        for p, records in enumerate(zip(*self._records, strict=True)):
            if collapsed(list(records), diverges):
                note.setdefault("collapsed", []).append(p)
                self.say(
                    f"warning: level {p} has collapsed: its loss stayed at ln(ways) = "
                    f"{math.log(records[-1].n_way):.3f} {'with the divergence at zero ' * diverges}"
                    "for the whole epoch; "
                    "lower --lr, or try --clip_grad 1 and --epsilon_warmup"
                )
        self._records = []
        if self.validate is not None:
            note["validation"] = self.validate(tuner.pool)
            note["score"] = score(note["validation"])
            for p, values in enumerate(note["validation"]):
                for name, value in values.items():
                    self._board.add_scalar(f"level{p}/validation_{name}", value, tuner.episodes_done)
            self.say(f"epoch {tuner.epoch}: validation {note['score']:.1f} ({_listed(note['validation'])})")
        best = max((old["score"] for old in self.history if "score" in old), default=-math.inf)
        self.history.append(note)
        # `last` comes last: killed in between, the resumed run does this epoch again and finds it best again.
        if note.get("score", math.inf) > best:
            checkpoint.save(self.folder / "best.safetensors", self._checkpoint(tuner, resumable=False))
        self.save(tuner)

    def save(self, tuner: Tuner) -> Path:
        """Write `last.safetensors`, from which the run continues exactly."""
        path = self.folder / "last.safetensors"
        checkpoint.save(path, self._checkpoint(tuner, resumable=True))
        self._board.flush()
        self.saved = path
        return path

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        self._progress.write(line)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_exception) -> None:
        self._progress.close()
        self._board.close()

    def _checkpoint(self, tuner: Tuner, resumable: bool) -> checkpoint.Checkpoint:
        momentum, numbers = tuner.state()
        about = {
            **self.about,
            "settings": dataclasses.asdict(tuner.settings),
            "finished": tuner.finished,
            "history": self.history,
            **({"tuner": numbers} if resumable else {}),
        }
        return checkpoint.Checkpoint(tuner.pool, about, momentum if resumable else {})


def score(validation: Sequence[dict[str, float]]) -> float:
    """One number to choose the best epoch by: the mean of every level's clean and robust accuracy."""
    values = [value for level in validation for value in level.values()]
    return sum(values) / len(values)


def _brief(record: StepRecord) -> str:
    return f"{record.total:.2f} {100 * record.clean_accuracy:.0f}/{100 * record.robust_accuracy:.0f}%"


def _listed(validation: Sequence[dict[str, float]]) -> str:
    return ", ".join("/".join(f"{value:.0f}" for value in level.values()) for level in validation)
