"""A run of evaluation for TensorBoard: its scalars, its sample images, and an hparams row.

Writes what the run already holds; computes nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import summary

from amt.evaluation.runs import Run
from amt.files.tensorboard import TensorBoard
from amt.report.pictures import amplify
from meta_dataset_readers.errors import damaged, strerror

SUFFIX = ".evaluation"


def write_events(run: Run, folder: Path) -> None:
    """Write TensorBoard events into `folder`, in place of those of an earlier call.

    Scalars are `COLUMN/DOMAIN` in per cent, averages among the domains; the images of a sample are a grid of
    clean, amplified perturbation and attacked, one line per image. The hparams row sets the settings against
    the averages. Common corruptions are `corruptions/NAME` in per cent, a step per severity.

    Raises:
        InputError: the folder cannot be written to, or a sample is damaged.
    """
    with damaged(f"{folder}: cannot be written to", OSError, strerror):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        with TensorBoard(folder, suffix=SUFFIX) as board:
            _write(run, board)


def _write(run: Run, board: TensorBoard) -> None:
    metrics = {}
    for name in (*run.sources, *run.averages):
        for column in run.columns:
            mean = run.summaries[name, column].mean
            board.add({f"{column}/{name}": mean}, 0)
            if name in run.averages or len(run.sources) == 1:
                metrics[f"hparam/{name}/{column}"] = mean
    for name, accuracies in run.corruptions.items():
        for severity, accuracy in enumerate(accuracies, 1):
            board.add({f"corruptions/{name}": 100 * accuracy}, severity)
    for sample in run.samples():
        amplified = np.stack([amplify(each)[0] for each in sample.perturbation])
        lines = [
            np.concatenate(line, axis=1)
            for line in zip(sample.clean, amplified, sample.attacked, strict=True)
        ]
        grid = np.concatenate(lines)
        name = f"{sample.source}/{sample.column}"
        board.add_summary(summary.image(name, grid, dataformats="HWC"), sample.index)
    settings = flat({"arch": run.about.get("arch"), "checkpoint": run.about.get("checkpoint")})
    settings |= flat(run.about["settings"])
    for event in summary.hparams(settings, metrics):
        board.add_summary(event, 0)
    board.add(metrics, 0)


def flat(settings: Mapping) -> dict[str, bool | float | str]:
    """Settings as hparams take them: numbers, booleans and texts; whatever is nested becomes one text."""
    return {
        str(name): value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in settings.items()
        if value is not None
    }
