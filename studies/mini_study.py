"""The mini study: what each part of the method adds, on domains that no part of it has seen.

    make results                                   (python -m studies.mini_study)

Meta-tunes on mini_objects TRAIN, chooses every setting on mini_objects VALID, and scores the five other
domains of Mini-Meta-Dataset, 5-way 1-shot and 5-way 5-shot, clean and under PGD-20. Every number comes from
main.py and test_meta_dataset.py, run as commands, `--jobs` at a time with one thread each. Killed, it
continues where it was: a finished command is known by its checkpoint or its results.json.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from amt.attacks.kinds import WORST_CASE, Attack
from amt.evaluation import runs
from amt.evaluation.statistics import Summary, average_summary, summarise
from amt.files import checkpoint
from amt.files.pretrained import load_network
from amt.models.weights import stream
from amt.report.figures import mixing_picture
from amt.tasks.merge import compactness, support_cosines
from amt.tasks.settings import Routing
from meta_dataset_readers import EpisodeReader, EpisodeSampling, episode_loader
from meta_dataset_readers.files import replace_file

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "mini_objects"
SEEDS = (0, 1, 2)
SHOTS = (1, 5)
# Each domain at the pair of epsilons that tells something: elsewhere everything stands, or everything falls.
DOMAINS = {(4, 8): ("mini_signs", "mini_textures"), (1, 2): ("mini_sketches", "mini_glyphs", "digits")}
POOL = (8, 6, 0.1, 0.01)
SWEEP = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)  # share of the adapter for 8/255; the one for 0.1/255 has the rest
MIXED = {(4, 8): DOMAINS[4, 8]}  # where the sweep looks

TRAININGS = {
    "plain": ["--pgd_method", "standard", "--epsilon", "0"],
    "input": ["--awp_gamma", "0", "--epsilon", "8"],
    "pool": ["--epsilon", *map(str, POOL)],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: whose checkpoint, with which flags, and what is left to choose on VALID."""

    name: str
    training: str | None
    flags: tuple[str, ...] = ()
    choose: str | None = None  # None, "expert" (the best single adapter) or "routing" (beta and gamma)


ROWS = (
    Row("pretrained + prototypes", None),
    Row("plain meta-tuning, one LoRA", "plain", ("--specified_expert", "0")),
    Row("input perturbation only, one LoRA", "input", ("--specified_expert", "0")),
    Row("dual perturbation, one LoRA", "pool", ("--specified_expert", "0")),
    Row("pool, uniform merging", "pool", ("--routing", "uniform")),
    Row("pool, best single adapter", "pool", (), "expert"),
    Row("pool, published merging (AMT)", "pool", ("--routing", "amt"), "routing"),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """Where everything lies and how large it is."""

    folder: Path
    data: Path
    recipe: Path
    episodes: int  # scored episodes per domain, seed and row
    choosing: int  # VALID episodes that settings are chosen on
    steps: int  # PGD steps of the scored attacks
    device: str

    def checkpoint(self, training: str, seed: int) -> Path:
        return self.folder / "training" / f"{training}-{seed}" / "last.safetensors"

    def train(self, training: str, seed: int) -> None:
        """Run main.py, or what is left of it."""
        last = self.checkpoint(training, seed)
        about = json.loads(last.with_suffix(".json").read_text()) if last.exists() else {}
        if about.get("finished"):
            return
        flags = [*TRAININGS[training], "--seed", seed, "--output_dir", last.parent]
        if about:
            flags += ["--resume", last]
        self._run(last.parent, ["main.py", f"@{self.recipe}", *flags])

    def measure(
        self, row: Row, seed: int, shots: int, domains: Sequence[str], flags: Sequence, kind: str = "scored"
    ) -> runs.Run:
        """The run of test_meta_dataset.py with `flags`, which is made unless it is there already.

        Rows that come to the same flags share one folder, and so one run.
        """
        words = [row.training or "pretrained", *flags, *domains]
        name = "-".join(str(word).lstrip("-") for word in words)
        out = self.folder / kind / f"{shots}-shot" / f"seed-{seed}" / name
        if not (out / "results.json").exists():
            command = ["test_meta_dataset.py", "--arch", "vit_mini_amt_merge", "--test_sources", *domains]
            command += ["--num_ways", 5, "--num_support", shots, "--num_query", 3, "--seed", seed]
            command += ["--output_dir", out, *flags]
            if row.training:
                command += ["--resume", self.checkpoint(row.training, seed)]
            self._run(out, command)
        return runs.load(out)

    def _run(self, out: Path, command: Sequence) -> None:
        out.mkdir(parents=True, exist_ok=True)
        words = [*command, "--data_path", self.data, "--device", self.device]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(out / "log.txt", "w") as log:
            run = subprocess.run(
                [sys.executable, *map(str, words)], stdout=log, stderr=log, env=one_thread, cwd=ROOT
            )
        if run.returncode != 0:
            raise RuntimeError(f"{command[0]} ended with code {run.returncode}; see {out / 'log.txt'}")

    def chosen_flags(self, row: Row, seed: int, shots: int) -> tuple[str, ...]:
        """The row's flags, completed by what scores best on the source's VALID classes."""
        attack = ["--epsilon", 2, 4, 8, "--attack_iters", 10]
        if row.choose == "expert":
            candidates = [("--specified_expert", str(p)) for p in range(len(POOL))]
            quality = []
            for candidate in candidates:
                flags = [*attack, *candidate, "--split", "VALID", "--nTestEpisode", self.choosing]
                run = self.measure(row, seed, shots, [SOURCE], flags, "choosing")
                quality.append(sum(run.summary(SOURCE, column).mean for column in run.columns))
            return candidates[quality.index(max(quality))]
        if row.choose == "routing":
            flags = [*attack, *row.flags, "--select_on", SOURCE, "--nSelectEpisode", self.choosing]
            run = self.measure(row, seed, shots, [SOURCE], [*flags, "--nTestEpisode", 1], "choosing")
            routing = run.merging[SOURCE]["routing"]
            return (*row.flags, "--blend_beta", str(routing["beta"]), "--blend_gamma", str(routing["gamma"]))
        return row.flags

    def scored(
        self, row: Row, seed: int, shots: int, flags: Sequence[str], groups: dict = DOMAINS
    ) -> dict[str, list[dict]]:
        """The rows of every episode, by domain."""
        found = {}
        for epsilons, domains in groups.items():
            attack = ["--epsilon", *epsilons, "--attack_iters", self.steps, "--nTestEpisode", self.episodes]
            found |= self.measure(row, seed, shots, domains, [*attack, *flags]).rows
        return found


def in_parallel(jobs: int, title: str, work: Callable, cases: Iterable[tuple]) -> list:
    """`work(*case)` for every case, `jobs` at a time, with a progress bar; results in the cases' order."""
    cases = list(cases)
    with ThreadPoolExecutor(jobs) as executor:
        return list(tqdm(executor.map(lambda case: work(*case), cases), total=len(cases), desc=title))


def support_compactness(study: Study, seed: int) -> dict[str, list[float]]:
    """Mean intra- and inter-class cosine of every adapter on VALID support sets: what the router sees."""
    network = load_network("vit_mini")
    pool = checkpoint.load(study.checkpoint("pool", seed)).pool
    sampling = EpisodeSampling(num_ways=5, num_support=5, num_query=1)
    reader = EpisodeReader(
        study.data, SOURCE, "VALID", sampling, network.image_size, n_episodes=study.choosing, seed=seed
    )
    routing = Routing(augment_probability=0)
    totals = torch.zeros(2, len(pool))
    for episode in episode_loader(reader):
        cosines = support_cosines(
            network, pool, episode.support, episode.support_labels, stream(seed, episode.index), routing
        )
        totals += torch.stack(compactness(cosines, episode.support_labels))
    return dict(zip(("intra", "inter"), (totals / len(reader)).tolist(), strict=True))


def columns_of(domain: str, steps: int) -> list[str]:
    """The columns of a domain: clean, and its two attacks."""
    epsilons = next(pair for pair, domains in DOMAINS.items() if domain in domains)
    return ["clean", *Attack("pgd", epsilons, steps=steps, loss=WORST_CASE).columns]


def markdown(study: Study, shots: int, results: dict[str, list[dict[str, list[dict]]]]) -> str:
    """The table of one number of shots: rows of the study by domains, and their average."""
    domains = list(next(iter(results.values()))[0])
    radii = {d: "/".join(c[c.rfind("@") :] for c in columns_of(d, study.steps)[1:]) for d in domains}
    heads = [f"{d} clean/{radii[d]}" for d in domains]
    lines = [f"| {shots}-shot | {' | '.join(heads)} | average clean/weak/strong |"]
    lines.append("|---" * (len(domains) + 2) + "|")
    for name, seeds in results.items():
        cells, by_column = [], []
        for domain in domains:
            pooled = [episode for rows in seeds for episode in rows[domain]]
            summaries = [summarise(pooled, column) for column in columns_of(domain, study.steps)]
            cells.append(" / ".join(map(shown, summaries)))
            by_column.append(summaries)
        averages = [average_summary(column) for column in zip(*by_column, strict=True)]
        cells.append(" / ".join(map(shown, averages)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(summary: Summary) -> str:
    return f"{summary.mean:.1f}±{summary.interval:.1f}"


def mean_coefficients(seeds: list[dict[str, list[dict]]]) -> dict[str, list[float]]:
    """Mean share of every adapter, by domain."""
    found = {}
    for domain in seeds[0]:
        shares = [episode["coefficients"] for rows in seeds for episode in rows[domain]]
        found[domain] = [round(sum(column) / len(shares), 3) for column in zip(*shares, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mini_study"))
    parser.add_argument("--data_path", type=Path, default=Path("data/mini"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/mini_train.args"))
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--episodes", type=int, default=64, help="scored episodes per domain, seed and row")
    parser.add_argument("--choosing", type=int, default=12, help="VALID episodes that settings are chosen on")
    parser.add_argument("--steps", type=int, default=20, help="PGD steps of the scored attacks")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    study = Study(
        args.out, args.data_path, args.recipe, args.episodes, args.choosing, args.steps, args.device
    )

    subprocess.run([sys.executable, "-m", "meta_dataset_readers.mini", "--out", args.data_path], check=True)
    trainings = itertools.product(sorted(TRAININGS, key=lambda name: name != "pool"), SEEDS)
    in_parallel(args.jobs, "training", study.train, trainings)

    cases = list(itertools.product(ROWS, SEEDS, SHOTS))
    flags = in_parallel(args.jobs, "choosing on VALID", study.chosen_flags, cases)
    chosen = dict(zip(cases, flags, strict=True))
    distinct = {}  # rows that come to the same flags are one run
    for (row, seed, shots), words in chosen.items():
        distinct.setdefault((row.training, seed, shots, words), (row, seed, shots, words))
    in_parallel(args.jobs, "scoring", study.scored, distinct.values())

    mixer = Row("mixing", "pool")
    mixes = [
        (mixer, seed, 5, ("--coefficients", str(c), "0", f"{1 - c:g}", "0"), MIXED)
        for seed in SEEDS
        for c in SWEEP
    ]
    third = dataclasses.replace(study, episodes=study.episodes // 3)
    mixed = in_parallel(args.jobs, "mixing sweep", third.scored, mixes)

    report = {"coefficients": {}, "chosen": {}, "tables": {}}
    for shots in SHOTS:
        results = {
            row.name: [study.scored(row, seed, shots, chosen[row, seed, shots]) for seed in SEEDS]
            for row in ROWS
        }
        report["tables"][shots] = markdown(study, shots, results)
        for row in ROWS:
            report["coefficients"][f"{row.name}, {shots}-shot"] = mean_coefficients(results[row.name])
            report["chosen"][f"{row.name}, {shots}-shot"] = [chosen[row, seed, shots] for seed in SEEDS]
        print(f"\n{report['tables'][shots]}")
    sweep = {c: [rows for mix, rows in zip(mixes, mixed, strict=True) if mix[3][1] == str(c)] for c in SWEEP}
    report["tables"]["sweep"] = markdown(
        study, 5, {f"share {c:g} of 8/255": rows for c, rows in sweep.items()}
    )
    print(f"\n{report['tables']['sweep']}")
    report["compactness"] = [support_compactness(study, seed) for seed in SEEDS]
    for seed, found in zip(SEEDS, report["compactness"], strict=True):
        print(
            f"seed {seed}: "
            + "; ".join(f"{k} {[round(v, 3) for v in values]}" for k, values in found.items())
        )
    mixing_picture(args.out / "mixing.png", curves(study, sweep))
    replace_file(args.out / "report.json", json.dumps(report, indent=1))
    print(f"\nwrote {args.out / 'report.json'} and {args.out / 'mixing.png'}")


def curves(study: Study, sweep: dict[float, list]) -> dict[str, dict[str, list[tuple[float, Summary]]]]:
    """Per domain and column, accuracy against the share of the robust adapter."""
    return {
        domain: {
            column: [
                (share, summarise([episode for rows in seeds for episode in rows[domain]], column))
                for share, seeds in sweep.items()
            ]
            for column in columns_of(domain, study.steps)
        }
        for domain in next(iter(sweep.values()))[0]
    }


if __name__ == "__main__":
    main()
