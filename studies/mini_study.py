"""The mini study: robustness and its price, against every baseline, on domains that no part of it has seen.

    make results                                   (python -m studies.mini_study --shots 5)
    python -m studies.mini_study --rows oracle uniform --seeds 0 --shots 5      only a part of it
    python -m studies.mini_study --rows "recipe: *"                             other ways to train

Meta-tunes on mini_objects TRAIN, chooses every setting on mini_objects VALID, and scores the five other
domains of Mini-Meta-Dataset, 5-way 1-shot and 5-way 5-shot, clean and under the default attack at 1, 2, 4 and
8 of 255, with three training seeds. Every number comes from main.py and test_meta_dataset.py, called as a
user would: the commands are printed. Each part is a folder of its own under --out; killed, the study goes on
where it was, by the same command. When all seeds of a row are done it becomes a file of the leaderboard under
--results, from which `python -m studies.mini_results` makes docs/results/mini-study.md and its figures.

On two cores it takes about four hours with `--shots 5`, which is what `make results` does, and two more with
`--shots 1`: an episode under the default attack takes about 1.2 seconds of one core with vit_mini, a training
1 to 12 minutes. Every part says its seconds. Other ways to train (`RECIPES`) are rows only where they are
named: for each seed a training of 3 to 11 minutes of one core, and 2 to score it with one head at one number
of shots.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amt.evaluation import runs
from meta_dataset_readers.errors import InputError, exit_on_bad_input, nearest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "mini_objects"
DOMAINS = ("mini_signs", "mini_textures", "mini_sketches", "mini_glyphs", "digits")
EPSILONS = (1, 2, 4, 8)  # of all domains alike: none is picked for what it shows
SEEDS = (0, 1, 2)
SHOTS = (1, 5)
GAMMAS = (0.0, 0.005, 0.02, 0.05)
SHARES = (0.2, 0.4, 0.6, 0.8)  # of the robust network's logits: the knob from clean to robust
POOL = ("--epsilon", "8", "6", "0.1", "0.01")
ONE = ("--epsilon", "8")  # as the first level of POOL, which levels beside it do not change
# One level in place of four sees four times the episodes, so that as many images pass through the network.
LONGER = (*ONE, "--nEpisode", "240", "--epsilon_warmup", "400")
# Other ways to train, each against one at equal cost (`_recipe_rows`); recipes/README.md has the commands.
FEATURES = ("--loss", "features", "--pgd_method", "querying")
RECIPES = {
    "features": (*FEATURES, *ONE),
    "features longer": (*FEATURES, *LONGER),
    "features random": (*FEATURES, *LONGER, "--epsilon_from", "0"),
    "norms too": ("--tune", "lora+norm", *ONE),
    "ridge": ("--head", "ridge", *ONE),
    "real levels": ("--epsilon", "8", "4", "2", "1"),
    "longer": LONGER,
    "random epsilon": (*LONGER, "--epsilon_from", "0"),
    "gentle": (*LONGER, "--lr", "0.002"),
}
RECIPE = "recipe: "  # what the names of their rows begin with

TRAININGS = {
    "pool": POOL,
    **{f"gamma {gamma:g}": ("--epsilon", "8", "--awp_gamma", f"{gamma:g}") for gamma in GAMMAS},
    **{
        f"plain {rate}": ("--pgd_method", "standard", "--epsilon", "0", "--lr", rate)
        for rate in ("0.02", "0.005", "0.002")
    },
    "querying": ("--pgd_method", "querying", "--epsilon", "8"),
    **{f"full {rate}": ("--tune", "full", "--epsilon", "0", "--lr", rate) for rate in ("0.00005", "0.0005")},
    **{f"{RECIPE}{name}": flags for name, flags in RECIPES.items()},
}
FIRST = ("--specified_expert", "0")  # the adapter for 8/255
FINETUNE = ("--deploy", "finetune", "--ada_steps", "50")
ON_VALID = ("--select_on", SOURCE, "--nSelectEpisode", "{choosing}")
ROBUST = tuple(
    ("--head", "robust-lda", f"support={s}", f"attack={a}", "identity=0.4")
    for s, a in itertools.product((0.15, 0.3, 0.6), (0.15, 0.3, 0.6))
)
MIXES = tuple(
    ("--head", "mix", "of=robust-lda", f"share={share:g}", "other=pretrained") for share in (*SHARES, 0.9)
)


def slug(name: str) -> str:
    """A name as part of a path."""
    return "-".join("".join(each if each.isalnum() or each in "." else " " for each in name).split())


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: of the row.
        trainings: whose checkpoints; several are candidates, none is the pretrained network.
        flags: of test_meta_dataset.py.
        variants: further flags of which one is a candidate.
        episodes: share of the scored episodes; the first of them, so that pairs remain.
        shots: numbers of shots that it is scored at.
        against: of another way to train, the row that it is compared with as well.
        by: what the best of `candidates` has most of on VALID: "clean" accuracy, or its "mean" with that
            under attack.
    """

    name: str
    trainings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    variants: tuple[tuple[str, ...], ...] = ((),)
    episodes: float = 1.0
    shots: tuple[int, ...] = SHOTS
    against: str = ""
    by: str = "clean"

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return slug(self.name)

    @property
    def candidates(self) -> list[tuple[str | None, tuple[str, ...]]]:
        """Pairs of a training and further flags to choose from on VALID."""
        return list(itertools.product(self.trainings or (None,), self.variants))


def _tuned(*heads: Sequence[str]) -> tuple[str, ...]:
    return (*FIRST, *ON_VALID, *itertools.chain.from_iterable(heads))


REFERENCE = "pretrained + prototypes"
KNOB = tuple(f"ours, mix at share {share:g}" for share in SHARES)
ORACLE = "oracle"
ONE_LORA, BEST, MERGING, OURS = "one LoRA", "best single", "published merging", "ours, robust-lda"
ANCHORED, LONG, RANDOM = "features, robust-lda", "features longer", "features random"
LONG_KNOB = tuple(f"{LONG}, mix at share {share:g}" for share in SHARES[:-1])  # the last is the default
HOW = {BEST: ("--routing", "best", *ON_VALID), MERGING: ("--routing", "amt", *ON_VALID)}
GAMMA_ROWS = tuple(f"weight perturbation, gamma {gamma:g}" for gamma in GAMMAS)
LDA = " + robust-lda"
# What the study's own pools choose on VALID, whatever the seed; other trainings are scored with the same.
CHOSEN = ("--head", "robust-lda", "support=0.15", "attack=0.15", "identity=0.4")


def _recipe_rows() -> Iterable[Row]:
    """Every other way to train, beside its equal in cost and head: one level beside the pool's adapter for
    8/255, a pool or one level with a pool's episodes beside the pool, a variant of that beside it."""
    longer = f"{RECIPE}longer"
    beside = {"gentle": longer, **dict.fromkeys(("longer", "random epsilon", LONG, RANDOM), MERGING)}
    for name, flags in RECIPES.items():
        row, trainings = f"{RECIPE}{name}", (f"{RECIPE}{name}",)
        if name == "real levels":
            yield from (Row(f"{row}, {how}", trainings, words, against=how) for how, words in HOW.items())
            continue
        plain = beside.get(name, ONE_LORA)
        yield Row(row, trainings, against=plain)
        if name not in ("features", LONG, RANDOM):  # rows of the main table
            yield Row(f"{row}{LDA}", trainings, CHOSEN, against=f"{longer}{LDA}" if plain == longer else OURS)
        if "--head" in flags:
            yield Row(f"{row} + {name}", trainings, ("--head", name), against=plain)


ROWS = (
    Row(REFERENCE),
    *(Row(f"pretrained + {head}", (), ("--head", head)) for head in ("centred", "lda", "ridge")),
    Row("plain meta-tuning", ("plain 0.02", "plain 0.005", "plain 0.002")),
    Row(
        "P>M>F",
        ("full 0.00005", "full 0.0005"),
        FINETUNE,
        tuple(("--ada_lr", rate) for rate in ("0", "0.0001", "0.001")),
        0.5,
    ),
    # VALID, whose classes are like those of TRAIN, chooses a rate of 0; unseen domains may want another.
    Row("P>M>F, fine-tuned", ("full 0.00005",), (*FINETUNE, "--ada_lr", "0.0001"), ((),), 0.5, (5,)),
    Row("adversarial querying", ("querying",)),
    Row(ONE_LORA, ("pool",), FIRST),
    Row("uniform", ("pool",), ("--routing", "uniform")),
    Row("soup", ("pool",), ("--routing", "soup")),
    *(Row(how, ("pool",), words) for how, words in HOW.items()),
    Row(OURS, ("pool",), _tuned(*ROBUST)),
    Row("ours, mix", ("pool",), _tuned(*MIXES)),
    # Trainings of one level: at the cost of one, at that of four, and with the clean accuracy in view.
    Row(ANCHORED, ("gamma 0.005", f"{RECIPE}features"), CHOSEN, against=OURS, by="mean"),
    Row(f"{LONG}, robust-lda", (f"{RECIPE}features", f"{RECIPE}{LONG}"), CHOSEN, against=ANCHORED, by="mean"),
    Row(f"{RANDOM}, robust-lda", (f"{RECIPE}{LONG}", f"{RECIPE}{RANDOM}"), CHOSEN, against=ANCHORED),
    Row("features, mix", (f"{RECIPE}features",), (*ON_VALID, *itertools.chain.from_iterable(MIXES))),
    # With the share that is the head's default, 0.8.
    Row(f"{LONG}, mix", (f"{RECIPE}{LONG}",), ("--head", "mix")),
    *(
        Row(name, (training,), (*first, "--head", "mix", "of=robust-lda", f"share={share:g}"), episodes=0.5)
        for names, training, first in ((KNOB, "pool", FIRST), (LONG_KNOB, f"{RECIPE}{LONG}", ()))
        for name, share in zip(names, SHARES, strict=False)
    ),
    Row(ORACLE, ("pool",), ("--routing", "oracle", "--oracle_parts", "2"), episodes=0.25),
    *(Row(name, (f"gamma {gamma:g}",), shots=(5,)) for name, gamma in zip(GAMMA_ROWS, GAMMAS, strict=True)),
    *_recipe_rows(),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """Where everything lies and how large it is.

    Args:
        folder: of runs and trainings.
        results: of the files of the leaderboard.
        data: Mini-Meta-Dataset.
        recipe: of all trainings.
        episodes: scored ones per domain, seed and row.
        choosing: VALID episodes that settings are chosen on.
        seeds: all training seeds of a row.
        training: further flags of all trainings.
        device: of torch.
    """

    folder: Path
    results: Path
    data: Path
    recipe: Path
    episodes: int
    choosing: int
    seeds: tuple[int, ...]
    training: tuple[str, ...] = ()
    device: str = "cpu"

    def checkpoint(self, training: str, seed: int) -> Path:
        """Where a training leaves its network."""
        return self.folder / "training" / f"{slug(training)}-{seed}" / "last.safetensors"

    def train(self, training: str, seed: int) -> None:
        """Run main.py, or what is left of it."""
        last = self.checkpoint(training, seed)
        about = json.loads(last.with_suffix(".json").read_text()) if last.exists() else {}
        if about.get("finished") and "statistics" in about:
            return
        self._call(
            last.parent,
            *("main.py", f"@{self.recipe}", *TRAININGS[training], *self.training),
            *("--seed", seed, "--output_dir", last.parent),
        )

    def run(self, row: Row, seed: int, shots: int) -> None:
        """Score a row, after what is left to choose."""
        training, flags = self.chosen(row, seed, shots)
        count = max(1, round(row.episodes * self.episodes))
        scored = ("--test_sources", *DOMAINS, "--epsilon", *EPSILONS, "--nTestEpisode", count)
        self._evaluate(self.scored(row, seed, shots), training, seed, shots, (*scored, *flags))

    def scored(self, row: Row, seed: int, shots: int) -> Path:
        """The folder of a scored run."""
        return self.folder / "scored" / f"{shots}-shot" / row.slug / f"seed-{seed}"

    def chosen(self, row: Row, seed: int, shots: int) -> tuple[str | None, tuple[str, ...]]:
        """The best candidate on VALID, of equals the first: its training and flags."""
        own = tuple(word.format(choosing=self.choosing) for word in row.flags)
        if len(row.candidates) == 1:
            ((training, more),) = row.candidates
            return training, (*own, *more)
        columns = ("--epsilon", *(EPSILONS if row.by == "mean" else ()))
        scores = []
        for number, (training, more) in enumerate(row.candidates):
            out = self.folder / "choosing" / f"{shots}-shot" / row.slug / f"seed-{seed}-{number}"
            valid = ("--test_sources", SOURCE, "--split", "VALID", "--nTestEpisode", self.choosing)
            self._evaluate(out, training, seed, shots, (*valid, *own, *more, *columns))
            scores.append(mean_accuracy(runs.load(out)))
        training, more = row.candidates[scores.index(max(scores))]
        return training, (*own, *more)

    def publish(self, row: Row, shots: int) -> Path | None:
        """Write the row's file of the leaderboard; None while a seed is missing."""
        folders = [self.scored(row, seed, shots) for seed in self.seeds]
        if not all((folder / "results.json").exists() for folder in folders):
            return None
        out = self.results / f"{shots}-shot" / f"{row.slug}.json"
        words = ["-m", "amt", "row", ",".join(map(str, folders)), "--name", row.name, "--out", out]
        if len(row.candidates) > 1:
            by = "clean accuracy" if row.by == "clean" else "mean accuracy, clean and under attack"
            on = f"{self.choosing} VALID episodes of {SOURCE} by {by}"
            words += ["--tuned_on", on, "--candidates", len(row.candidates)]
        elif row.flags[-len(CHOSEN) :] == CHOSEN:
            words += ["--tuned_on", f"VALID, for {OURS}", "--candidates", len(ROBUST)]
        self._call(folders[0].parent, *words)
        return out

    def _evaluate(self, out: Path, training: str | None, seed: int, shots: int, flags: Iterable) -> None:
        if (out / "results.json").exists():
            return
        words = ["test_meta_dataset.py", "--arch", "vit_mini_amt_merge", "--num_ways", 5]
        words += ["--num_support", shots, "--num_query", 3, "--seed", seed, "--samples", 0]
        words += ["--resume", self.checkpoint(training, seed)] if training is not None else []
        self._call(out, *words, "--output_dir", out, *flags)

    def _call(self, out: Path, *words) -> None:
        """Run a Python program in a process with one thread, its output in a log beside `out`.

        Raises:
            InputError: it failed; with its last line.
        """
        command = [*words]
        if command[0] != "-m":
            more = ["--data_path", self.data, "--device", self.device, "--threads", "1"]
            command[1:1] = [command.pop(1), *more] if command[1].startswith("@") else more
        # Rows keep their commands, which are run in ROOT: places in it are named from there.
        command = [str(word).replace(f"{ROOT}{os.sep}", "") for word in command]
        out.parent.mkdir(parents=True, exist_ok=True)
        log, began = out.with_name(f"{out.name}.log"), time.monotonic()
        print(f"python {shlex.join(command)}", flush=True)
        with open(log, "a", encoding="utf-8") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            ended = subprocess.run(
                [sys.executable, *command], stdout=file, stderr=file, env=environment, cwd=ROOT
            )
        if ended.returncode != 0:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise InputError(f"{command[0]} ended with code {ended.returncode}: {' '.join(last)} ({log})")
        print(f"{time.monotonic() - began:.0f} s: {out}", flush=True)


def mean_accuracy(run: runs.Run) -> float:
    """Over the columns, of VALID."""
    found = [run.summary(SOURCE, column) for column in run.columns]
    return sum(each.mean for each in found if each is not None) / len(found)


def in_parallel(jobs: int, work: Callable, cases: Iterable[tuple]) -> None:
    """`work(*case)` for every case, `jobs` at a time; after a failure no further one is begun."""
    with ThreadPoolExecutor(jobs) as executor:
        waiting = [executor.submit(work, *case) for case in cases]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def named(names: Sequence[str]) -> list[Row]:
    """The rows of these names or slugs, or patterns of them such as "recipe: *", in the order of the table;
    without a name all but the other ways to train.

    Raises:
        InputError: there is none of a name.
    """
    known = {key: row for row in ROWS for key in (row.name, row.slug)}
    found = {name: fnmatch.filter(known, name) for name in names}
    unknown = [name for name in names if not found[name]]
    if unknown:
        raise InputError(f"--rows {unknown[0]}: {nearest(unknown[0], known)}")
    wanted = [known[key] for keys in found.values() for key in keys]
    return [row for row in ROWS if row in wanted or not (names or row.name.startswith(RECIPE))]


def study_of(args: argparse.Namespace) -> Study:
    """The study that the flags describe, with absolute paths, as its commands run elsewhere."""
    paths = [path.absolute() for path in (args.out, args.results, args.data_path, args.recipe)]
    return Study(
        *(*paths, args.episodes, args.choosing, SEEDS),
        training=tuple(shlex.split(args.training)),
        device=args.device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mini_study"), help="of runs and trainings")
    parser.add_argument("--results", type=Path, default=Path("results/mini"), help="of the rows' files")
    parser.add_argument("--data_path", type=Path, default=Path("data/mini"))
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "mini_train.args")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these, * is any end")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, choices=SEEDS, help="only these")
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS, choices=SHOTS, help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, of one thread each")
    parser.add_argument("--episodes", type=int, default=16, help="scored ones per domain, seed and row")
    parser.add_argument("--choosing", type=int, default=30, help="VALID episodes to choose settings on")
    parser.add_argument("--training", default="", metavar="FLAGS", help="further flags of every training")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows, study = named(args.rows), study_of(args)

    subprocess.run(
        [sys.executable, "-m", "meta_dataset_readers.mini", "--out", study.data], check=True, cwd=ROOT
    )
    needed = {training: None for row in rows for training in row.trainings}
    in_parallel(args.jobs, study.train, itertools.product(needed, args.seeds))
    # Seed by seed, so that a study cut short has whole tables of fewer seeds.
    cases = [
        (row, seed, shots)
        for seed in args.seeds
        for row in rows
        for shots in args.shots
        if shots in row.shots
    ]
    in_parallel(args.jobs, study.run, cases)
    for row, shots in itertools.product(rows, args.shots):
        if shots in row.shots and study.publish(row, shots) is None:
            print(f"{row.name}, {shots}-shot: other seeds are to follow")


if __name__ == "__main__":
    exit_on_bad_input(main)
