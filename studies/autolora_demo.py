"""AutoLoRa beside the methods it is compared with, at the size of two CPU cores.

    make autolora-demo                                  (python -m studies.autolora_demo)

A small ResNet is pre-trained adversarially on drawn surfaces at 32 px, and fine-tuned on real handwritten
digits at 16 px, twice the size they come in. It is this way round because surfaces can be drawn in any
number, as pre-training asks for, and because the result is then one on real pictures. Every fine-tuning is
`main.py autolora` from the same file, with each method's own defaults for rates, schedules and epochs.
Decisions are made on a part of the training digits; the test digits are seen once, at the end.

Two processes share the work, with a thread each, since a network as small as this gains little from a second
one. What the commands print goes to OUT/*.log. Started again the study goes on where it was, and
shows what is finished.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from safetensors import safe_open

from amt.cli import autolora, report
from amt.evaluation import runs
from amt.files.checkpoint import HEADER
from meta_dataset_readers.errors import exit_on_bad_input
from meta_dataset_readers.mini.sources import Source, build

SURFACES = 10  # of the 25, those that Mini-Meta-Dataset trains on
COLUMNS = ("standard", "PGD-20, ce+dlr")

# Three steps of half of epsilon reach every corner of the ball; five are enough to compare epochs by.
COMMON = """
    --dataset imagefolder --arch resnet_mini --num_steps_train 3 --num_steps_test 5 --attack pgd steps=20
    --test_batch_size 250 --num_workers 0 --threads 1 --device cpu
"""
PRETRAINING = """
    --no_pretrain --method vanilla --resize 32 --epsilon 4 --step_size 2 --epochs 15 --batch_size 64
    --val 0.05
"""
TUNING = "--resize 16 --epsilon 8 --step_size 4 --batch_size 32 --val 0.2"

START = "{pretrained}"  # in the flags of a row: the file of the pre-training
TWINS = f"--method twins --epochs 60 --decreasing_lr 30,50 --checkpoint {START}"  # its authors' schedule
ROWS = {
    "vanilla": f"--method vanilla --checkpoint {START}",
    "TWINS": f"--method twins --checkpoint {START}",
    "AutoLoRa": f"--method autolora --checkpoint {START}",
    "vanilla, no pre-training": "--method vanilla --no_pretrain",
}
MORE_ROWS = {  # how much of the difference is the schedules', and that of the epochs that come with them
    "vanilla + scalars": f"--method vanilla --auto_scalars 1 --checkpoint {START}",
    "vanilla + LR": f"--method vanilla --autoLR 1 --checkpoint {START}",
    "vanilla + LR + scalars": f"--method vanilla --autoLR 1 --auto_scalars 1 --checkpoint {START}",
    "TWINS + LR + scalars": f"--method twins --autoLR 1 --auto_scalars 1 --checkpoint {START}",
    # As published by AutoLoRa, "TWINS" has AutoLoRa's rate of 0.1. Here are its own authors' settings and a
    # small grid of rates with the same schedule, from which the validation part chooses.
    **{f"TWINS at {rate}": f"{TWINS} --lr {rate}" for rate in ("0.03", "0.01", "0.003", "0.001")},
}
AS_PUBLISHED = "TWINS"  # by AutoLoRa
CHOICES = {
    "TWINS, rate chosen on validation": (
        *(AS_PUBLISHED, "TWINS at 0.03", "TWINS at 0.01", "TWINS at 0.003", "TWINS at 0.001"),
    )
}
NOTES = {
    AS_PUBLISHED: "as published by AutoLoRa: its own rates for a competitor",
    "TWINS at 0.003": "its authors' own settings: rate 0.003, 60 epochs, divided by ten at 30 and 50",
}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Where everything lies and how large it is.

    Args:
        data, out: folders, made if missing.
        surfaces, digits: pictures of each class to train on, and to test on.
        seeds: of the fine-tunings.
        rows: of the table: flags by name.
        more: further flags for every command, of which the last counts.
    """

    data: Path = Path("data/autolora_demo")
    out: Path = Path("results/autolora_demo")
    surfaces: tuple[int, int] = (100, 20)
    digits: tuple[int, int] = (50, 50)
    seeds: tuple[int, ...] = (1, 2, 3)
    rows: Mapping[str, str] = dataclasses.field(default_factory=lambda: ROWS)
    more: str = ""

    def write_data(self) -> None:
        """Both datasets as folders of classes, unless they are there."""
        surfaces = build("mini_textures")
        names = surfaces.classes[:SURFACES]
        surfaces = dataclasses.replace(surfaces, classes=names, counts=(sum(self.surfaces),) * SURFACES)
        write_folders(self.data / "surfaces", surfaces, 32, *self.surfaces)
        write_folders(self.data / "digits", build("digits"), 16, *self.digits)

    def command(self, name: str, data: str, flags: Sequence[str]) -> None:
        """Run `main.py autolora` to its end, or show that it is there.

        Raises:
            SystemExit: a signal stopped it.
        """
        began = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        words = [*shlex.split(COMMON), *flags, *shlex.split(self.more)]
        words += ["--data", str(self.data / data), "--output", str(self.out / name)]
        with open(self.out / f"{name}.log", "a") as log, called_as(["main.py", "autolora", *words]):
            print(shlex.join(sys.argv), file=log, flush=True)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                code = autolora.main(words)
        if code:
            print(f"{name}: stopped; the same command continues", file=sys.stderr)
            sys.exit(code)
        accuracies = self.finished(name).accuracies()
        marks = ", ".join(f"{accuracy:.1f} {column}" for column, accuracy in accuracies.items())
        print(f"{name:32} {time.monotonic() - began:5.1f} s   {marks}", flush=True)

    def pretrain(self) -> None:
        """Make the network that fine-tunings start from."""
        self.command("pretrained", "surfaces", shlex.split(PRETRAINING))

    def tune(self, cases: Sequence[tuple[str, int]]) -> None:
        """Fine-tune as rows and seeds say."""
        start = str(self.finished("pretrained").folder / "best.safetensors")
        for row, seed in cases:
            flags = [word.replace(START, start) for word in shlex.split(f"{TUNING} {self.rows[row]}")]
            self.command(name_of(row, seed), "digits", [*flags, "--seed", str(seed)])

    def make_all(self) -> None:
        """The pre-training and all fine-tunings; in two processes, unless there is nothing to do."""
        cases = list(itertools.product(reversed(self.rows), self.seeds))  # the longest first
        names = ["pretrained", *itertools.starmap(name_of, cases)]
        if all((self.finished(name).test / "results.json").is_file() for name in names):
            self.pretrain()
            self.tune(cases)
            return
        with_start = [case for case in cases if START in self.rows[case[0]]]
        self.side_by_side(self.pretrain, [case for case in cases if case not in with_start])
        # Dealt out back and forth, so that both have long and short ones.
        ours, theirs = (
            [case for k, case in enumerate(with_start) if (k + 1) // 2 % 2 == half] for half in (0, 1)
        )
        self.side_by_side(functools.partial(self.tune, ours), theirs)

    def side_by_side(self, here: Callable[[], None], cases: Sequence[tuple[str, int]]) -> None:
        """Call `here` while a process of its own fine-tunes `cases`.

        Raises:
            SystemExit: that process failed, or was stopped.
        """
        if not cases:
            here()
            return
        elsewhere = functools.partial(self.tune, cases)
        other = multiprocessing.get_context("spawn").Process(target=exit_on_bad_input, args=(elsewhere,))
        other.start()
        try:
            here()
        finally:
            other.join()
        if other.exitcode:
            sys.exit(other.exitcode)

    def finished(self, name: str) -> "Finished":
        return Finished(self.out / name / "AFF")

    def found(self) -> dict[str, list["Finished"]]:
        """By row the fine-tunings of all seeds; after them, by choice, those of the best robust accuracy on
        the validation part, for every seed its own."""
        found = {row: [self.finished(name_of(row, seed)) for seed in self.seeds] for row in self.rows}
        for choice, rows in CHOICES.items():
            if all(row in found for row in rows):
                by_seed = zip(*(found[row] for row in rows), strict=True)
                found[choice] = [max(tunings, key=Finished.validation) for tunings in by_seed]
        return found


def name_of(row: str, seed: int) -> str:
    """What a fine-tuning is called on the disk."""
    return f"{row.lower().replace(',', '').replace(' ', '_')}_seed{seed}"


def write_folders(folder: Path, source: Source, side: int, train: int, test: int) -> None:
    """Write train/CLASS/*.png and test/CLASS/*.png of `side` pixels: the first and the last of each class."""
    if folder.is_dir():
        return
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for class_id, name in enumerate(source.classes):
        pictures = [
            image.resize((side, side), Image.Resampling.BOX) for image in source.images(class_id, seed=0)
        ]
        for split, chosen in (("train", pictures[:train]), ("test", pictures[len(pictures) - test :])):
            place = partial / split / name
            place.mkdir(parents=True)
            for number, picture in enumerate(chosen):
                picture.save(place / f"{number:04}.png")
    partial.rename(folder)


@contextlib.contextmanager
def called_as(words: Sequence[str]) -> Iterator[None]:
    """Have results say the command line that makes them."""
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before


class Finished(NamedTuple):
    """A fine-tuning that is done: its folder."""

    folder: Path

    @property
    def test(self) -> Path:
        """The run directory of its test."""
        return self.folder / "test"

    @property
    def history(self) -> list[dict]:
        """What its journal noted after each epoch."""
        with safe_open(self.folder / "last.safetensors", framework="np") as file:
            return json.loads(file.metadata()[HEADER])["history"]

    def accuracies(self) -> dict[str, float]:
        """On the test set in per cent, by `COLUMNS`."""
        run = runs.load(self.test)
        means = (run.summary(run.sources[0], column).mean for column in run.columns)
        return dict(zip(COLUMNS, means, strict=True))

    def validation(self) -> float:
        """The best robust accuracy on the validation part in per cent: that of the weights that were kept."""
        return max(note["robust"] for note in self.history)

    def rates(self) -> dict[float, int]:
        """The learning rates, with the first epoch of each."""
        return {note["lr"]: note["epoch"] for note in reversed(self.history)}

    def chosen(self) -> str:
        """What the schedules chose, in words."""
        (first, _), *later = sorted(self.rates().items(), key=lambda pair: pair[1])
        words = [f"rate {first:g}", *(f"{rate:.2g} from epoch {epoch}" for rate, epoch in later)]
        notes = self.history
        text = f"{', '.join(words)}; weights of epoch {notes[-1]['best']} of {len(notes)}"
        if "lambda1" in notes[0]:
            text += "".join(
                f"; {name} {notes[0][name]:.2f} to {notes[-1][name]:.2f}" for name in ("lambda1", "lambda2")
            )
        return text


def markdown(found: Mapping[str, Sequence[Finished]]) -> str:
    """The table: mean and standard deviation over seeds; learning rates and lambdas from first to last."""
    heads = ["", *COLUMNS, "learning rate", "lambda1", "lambda2", "epochs", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, tunings in found.items():
        accuracies = [each.accuracies() for each in tunings]
        cells = [spread([each[column] for each in accuracies]) for column in COLUMNS]
        histories = [each.history for each in tunings]
        for name, form in (("lr", ".2g"), ("lambda1", ".2g"), ("lambda2", ".2g")):
            ends = [mean_at(histories, place, name, form) for place in (0, -1)]
            cells.append(" to ".join(dict.fromkeys(ends)))
        cells += [str(len(histories[0])), str(len(tunings))]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation; of a single value the value."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def mean_at(histories: Sequence[Sequence[Mapping]], place: int, name: str, form: str) -> str:
    """The mean over histories of what was noted at one place; where nothing was, the fixed weight 1 or 6."""
    fixed = {"lambda1": 1.0, "lambda2": 6.0}
    return format(statistics.fmean(history[place].get(name, fixed.get(name)) for history in histories), form)


def demonstrate(demo: Demo) -> None:
    """Make or find everything; print the table and what was chosen, and write the page."""
    demo.write_data()
    demo.make_all()
    found = demo.found()
    print("\nstandard and robust accuracy on test digits in per cent, mean ± standard deviation over seeds;")
    print("learning rates and lambdas in the first and the last epoch, mean over seeds\n")
    print(markdown(found), end="\n\n")
    for row, tunings in found.items():
        for seed, each in zip(demo.seeds, tunings, strict=True):
            print(f"{row}, seed {seed}: {each.chosen()}")
    for row, note in NOTES.items():
        if row in found:
            print(f"{row}: {note}")
    for choice, rows in CHOICES.items():
        if choice in found:
            print(f"{choice}: one of {len(rows)} for every seed, {', '.join(rows)}")
    print(flush=True)
    folders = [str(each.test) for row in demo.rows for each in found[row]]
    report.main([*folders, "--out", str(demo.out / "report.html")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=Demo.data)
    parser.add_argument("--out", type=Path, default=Demo.out)
    more = ", ".join((*MORE_ROWS, *CHOICES))
    parser.add_argument("--more_rows", action="store_true", help=f"also {more}")
    args = parser.parse_args()
    demonstrate(Demo(args.data, args.out, rows=ROWS | (MORE_ROWS if args.more_rows else {})))


if __name__ == "__main__":
    exit_on_bad_input(main)
