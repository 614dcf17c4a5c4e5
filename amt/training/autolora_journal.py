"""What a fine-tuning leaves behind: its state, the best classifier, TensorBoard scalars and a progress line.

    RUN/MODE/last.safetensors    everything the run is continued from
    RUN/MODE/best.safetensors    the classifier of the best validation epoch: a plain state dict
    RUN/MODE/tensorboard/

Both files carry one JSON text in their header: settings, command, versions, history. Watches a run and never
steers it. Knows no data set.
"""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from amt.files import weight_files
from amt.files.checkpoint import FORMAT, HEADER, write
from amt.files.robust_weights import CLASSIFIER
from amt.training.autolora import FineTuner, StepRecord
from meta_dataset_readers.errors import InputError

STATE = "fine-tuning"  # the kind of our files that a run is continued from


class Journal:
    """Keeps the books of one mode of a run; use it as a context manager.

    Args:
        folder: RUN/MODE, created if missing.
        about: what both files say of the run: arch, protocol, provenance. Of `protocol` a run that is
            continued must have the same.
        tuner: fresh, or already restored.
    """

    def __init__(self, folder: Path, about: dict, tuner: FineTuner):
        self.folder, self.about = folder, about
        done = tuner.epoch * tuner.n_batches + tuner.batch
        self._board = SummaryWriter(folder / "tensorboard", purge_step=done + 1)
        self._progress = tqdm(
            total=tuner.settings.epochs * tuner.n_batches,
            initial=done,
            unit="batch",
            desc=tuner.settings.mode,
            smoothing=0.05,
        )

    def on_step(self, tuner: FineTuner, record: StepRecord) -> None:
        """Note one batch."""
        step = tuner.epoch * tuner.n_batches + tuner.batch
        for name, value in record._asdict().items():
            if name != "similarity":
                self._board.add_scalar(f"training/{name}", value, step)
        for layer, cosine in (record.similarity or {}).items():
            self._board.add_scalar(f"gradient_similarity/{layer}", cosine, step)
        self._progress.update()
        text = f"{record.total:.2f} {100 * record.clean_accuracy:.0f}/{100 * record.robust_accuracy:.0f}%"
        self._progress.set_postfix_str(text, refresh=False)

    def on_epoch(self, tuner: FineTuner, note: dict) -> None:
        """Note the end of an epoch, and save."""
        step = tuner.epoch * tuner.n_batches
        for name in ("clean", "robust"):
            self._board.add_scalar(f"validation/{name}", note[name], step)
        weights = "".join(f", {name} {note[name]:.2f}" for name in ("lambda1", "lambda2") if name in note)
        why = f"; rate reduced to {tuner.rate:g} (condition {note['condition']})" if note["condition"] else ""
        best = " (best so far)" if note["best"] == note["epoch"] else ""
        self.say(
            f"{tuner.settings.mode} epoch {note['epoch']}: lr {note['lr']:g}{weights}, validation "
            f"{note['clean']:.1f} clean, {note['robust']:.1f} robust{best}{why}"
        )
        if note["best"] == note["epoch"]:
            self.save_classifier(tuner)
        self.save(tuner)

    def save(self, tuner: FineTuner) -> Path:
        """Write `last.safetensors`, from which the run continues exactly."""
        tensors, numbers = tuner.state()
        path = self.folder / "last.safetensors"
        write(path, tensors, {**self._described(tuner), "kind": STATE, "tuner": numbers})
        self._board.flush()
        return path

    def save_classifier(self, tuner: FineTuner) -> None:
        """Write `best.safetensors`: the weights as they are, without branch, by the architecture's names."""
        weights = {name: tensor.detach() for name, tensor in tuner.student.weights.items()}
        write(self.folder / "best.safetensors", weights, {**self._described(tuner), "kind": CLASSIFIER})

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        self._progress.write(line)

    def _described(self, tuner: FineTuner) -> dict:
        return {"format": FORMAT, **self.about, "finished": tuner.finished, "history": tuner.history}

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_exception) -> None:
        self._progress.close()
        self._board.close()


def continued(folder: Path, about: dict, tuner: FineTuner) -> bool:
    """Give `tuner` the state of the run in `folder`, if there is one; whether there was.

    Raises:
        InputError: the file is damaged, or of a run with other settings.
    """
    path = folder / "last.safetensors"
    if not path.exists():
        return False
    content = weight_files.read(path, "state of a fine-tuning")
    try:
        found = json.loads(content.header[HEADER])
        kind, protocol, numbers = found["kind"], found["protocol"], found["tuner"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no state of a fine-tuning ({error!r})") from error
    if kind != STATE:
        raise InputError(f"{path}: a {kind}, expected the state of a fine-tuning")
    asked = json.loads(json.dumps(about["protocol"]))
    for name in sorted(asked.keys() | protocol.keys()):
        if protocol.get(name) != asked.get(name):
            raise InputError(
                f"{path}: this run was begun with {name} {json.dumps(protocol.get(name))}, not "
                f"{json.dumps(asked.get(name))}; name another --output, or the same settings to continue it"
            )
    try:
        tuner.restore(content.data, numbers)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged state ({error})") from error
    return True
