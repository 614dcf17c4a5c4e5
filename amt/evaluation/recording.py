"""Recording of an evaluation in its run directory, for episodes and for whole test sets.

    description    what run.json says
    examine        measure an episode, check the attacks on it, keep some of its images
    interruptible  within it a signal ends the work at the next pass through the network
    record         append rows to the run as they come
    ended          say how much of an unfinished run is done; the exit code

Chooses nothing, and knows no flags.
"""

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from amt.attacks.kinds import Attack
from amt.evaluation.evaluate import Measurement, columns, measure
from amt.evaluation.runs import Run
from amt.evaluation.samples import sample_of
from amt.evaluation.sanity import probe
from amt.evaluation.writer import Writer
from amt.files.checkpoint import provenance
from amt.files.signals import Interrupted, Interrupts
from amt.models.network import CHUNK, Network
from amt.tasks.classifier import Predictor
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import say
from meta_dataset_readers.feeding import Waiting


def description(attacks: Sequence[Attack], **about) -> dict:
    """The content of run.json in plain values: `about`, the attacks with their columns, command, versions,
    date.

    Args:
        about: arch, checkpoint, seed, split, sources, episodes, averages, deployments, and under "settings"
            everything else that decides a row.
    """
    found = {
        **provenance(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **about,
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "columns": columns(attacks),
    }
    return json.loads(json.dumps(found, default=_plain))


def _plain(value: object) -> object:
    """Values that JSON does not support, as plain ones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def examine(
    out: Writer,
    predict: Predictor,
    episode: Episode,
    attacks: Sequence[Attack],
    seed: int,
    *,
    check: bool,
    keep: bool,
    others: Sequence[Predictor] = (),
    numbers: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Measurement:
    """Measure an episode; arguments and result as of `measure`.

    Args:
        check: check the attacks on this episode: their counts are "checks" of the row, see `sanity.probe`.
        keep: keep some of its images, if its queries were attacked.
    """
    measured = measure(predict, episode, attacks, seed, others, numbers, chunk)
    if attacks and check:
        measured.row["checks"] = probe(predict, episode, measured, attacks, seed)
    if measured.attacked and keep:
        out.keep(sample_of(episode, measured))
    return measured


@contextlib.contextmanager
def interruptible(network: Network, interrupts: Interrupts) -> Iterator[None]:
    """Within it a signal raises `Interrupted` at the next pass through the network, which ends the context;
    an episode, a choice or a corruption that is not complete is done again by the same command."""
    with contextlib.suppress(Interrupted), interrupts.passes(network.module):
        yield


def record(out: Writer, rows: Iterable[Sequence[dict]], progress: tqdm, waiting: Waiting) -> None:
    """Append rows as they come; the progress line shows how much of the time was `waiting` for their data."""
    for found in rows:
        out.append(*found)
        progress.update(len(found))
        progress.set_postfix_str(waiting.shown, refresh=False)
        if line := waiting.warning():
            progress.write(line)


def ended(run: Run, interrupts: Interrupts) -> int:
    """Say how much of an unfinished run is done.

    Returns:
        The exit code: 0, or 128 and the number of the signal that stopped it.
    """
    stopped = interrupts.pending()
    if not run.complete:
        wanted = len(run.about["sources"]) * run.about["episodes"]
        text = f"{len(run.every_row)} of {wanted} {run.unit}s are done"
        if corruptions := run.about.get("corruptions"):
            text += f", and {len(run.corruptions)} of {len(corruptions)} corruptions"
        say(f"{text}; {'the same command continues' if stopped else 'other parts are to follow'}")
    return interrupts.code if stopped else 0
