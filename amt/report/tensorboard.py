"""A run of evaluation for TensorBoard: its scalars, its sample images, and an hparams row.

Writes what the run already holds; computes nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from amt.evaluation.runs import Run
from amt.report.pictures import amplify
from meta_dataset_readers.errors import InputError

SUFFIX = ".evaluation"


def write_events(run: Run, folder: Path) -> None:
    """Write TensorBoard events into `folder`, in place of those of an earlier call.

    Scalars are `COLUMN/DOMAIN` in per cent, averages among the domains; the images of a sample are a grid of
    clean, amplified perturbation and attacked, one line per image. The hparams row sets the settings against
    the averages. Common corruptions are `corruptions/NAME` in per cent, a step per severity.

    Raises:
        InputError: the folder cannot be written to, or a sample is damaged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        with SummaryWriter(folder, filename_suffix=SUFFIX) as writer:
            _write(run, writer)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror})") from error


def _write(run: Run, writer: SummaryWriter) -> None:
    metrics = {}
    for name in (*run.sources, *run.averages):
        for column in run.columns:
            summary = run.summary(name, column)
            writer.add_scalar(f"{column}/{name}", summary.mean, 0)
            if name in run.averages or len(run.sources) == 1:
                metrics[f"hparam/{name}/{column}"] = summary.mean
    for name, accuracies in run.corruptions.items():
        for severity, accuracy in enumerate(accuracies, 1):
            writer.add_scalar(f"corruptions/{name}", 100 * accuracy, severity)
    for sample in run.samples():
        amplified = np.stack([amplify(each)[0] for each in sample.perturbation])
        lines = [
            np.concatenate(line, axis=1)
            for line in zip(sample.clean, amplified, sample.attacked, strict=True)
        ]
        grid = np.concatenate(lines)
        writer.add_image(f"{sample.source}/{sample.column}", grid, sample.index, dataformats="HWC")
    # add_hparams would put the row into a run of its own, beside this one.
    settings = flat({"arch": run.about.get("arch"), "checkpoint": run.about.get("checkpoint")})
    settings |= flat(run.about["settings"])
    for event in hparams(settings, metrics):
        writer.file_writer.add_summary(event)
    for name, value in metrics.items():
        writer.add_scalar(name, value, 0)


def flat(settings: Mapping) -> dict[str, bool | float | str]:
    """Settings as hparams take them: numbers, booleans and texts; whatever is nested becomes one text."""
    return {
        str(name): value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in settings.items()
        if value is not None
    }
