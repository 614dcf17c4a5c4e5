"""Meta-testing: merge the pool anew for every task, and measure it per domain, clean and under attack.

    python test_meta_dataset.py --arch vit_mini_amt_merge --resume runs/x/best.safetensors \\
        --data_path data/mini --test_sources mini_signs digits --output_dir results/x --epsilon 4 8

For each episode the support set decides the coefficients (amt/tasks/merge.py), the adapters are merged into
one network, singular values are trimmed if asked for, and prototypes classify the query images; then the same
network is attacked. Nothing is chosen on the episodes that are scored, unless --select published says so.

Every episode's row is on the disk as soon as it is known: the same command continues a run that was stopped,
and processes with --shard I/N, or under torchrun, share one --output_dir.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from amt.cli import options
from meta_dataset_readers.errors import InputError, exit_on_bad_input

if TYPE_CHECKING:
    from amt.evaluation import runs
    from amt.evaluation.settings import Deployment
    from amt.files import checkpoint
    from amt.files.signals import Interrupts
    from amt.models.network import Network
    from amt.tasks.classifier import Predictor
    from meta_dataset_readers.episode import Episode

# Flags that change neither an episode's row nor what it is compared with.
NOT_SETTINGS = (
    *("output_dir", "device", "threads", "num_workers", "shard", "samples", "dump", "resume"),
    *("dry_run", "nTestEpisode", "test_sources", "cdfsl_domains", "domain_config"),
)


def main() -> int:
    args = options.testing_parser().parse(sys.argv[1:])
    options.check_testing(args)
    if args.dry_run is not None:
        from amt.cli import dry_run

        return dry_run.testing(args)
    options.check_output(args.output_dir)

    # These bring torch, which nobody should wait for who asks for --help or mistyped a flag.
    from torch.utils.data import Subset
    from tqdm import tqdm

    from amt.evaluation import runs
    from amt.evaluation.deploy import as_decided, check_deployment, deploy
    from amt.files.pretrained import load_network
    from amt.files.signals import Interrupts
    from amt.models.network import find_device
    from amt.report.finish import conclude
    from meta_dataset_readers.reader import EpisodeReader, episode_loader
    from meta_dataset_readers.stored_episodes import dump_episode

    options.use_threads(args)
    deployments, attacks = options.deployments(args), options.attacks(args)
    transfer = any(attack.kind == "transfer" for attack in attacks)
    if transfer and args.no_pretrain:
        raise InputError(
            "--attack transfer makes its images on the pretrained network: not with --no_pretrain"
        )
    network = load_network(
        args.arch,
        args.pretrained_checkpoint,
        find_device(args.device),
        image_size=args.image_size,
        pretrained=not args.no_pretrain and (args.resume is None or transfer),
    )
    open_source = partial(EpisodeReader, **options.reading(args, network.image_size))

    def open_episodes(source: str, split: str, n: int, seed: int | None = None):
        other_seed = {} if seed is None else {"seed": seed}
        return episode_loader(
            open_source(source=source, split=split, n_episodes=n, **other_seed), args.num_workers
        )

    saved = load_pool(args, network) if args.resume else None
    pool = saved.pool.to(network.device) if saved else None
    readers = {
        source: open_source(source=source, split=args.split, n_episodes=args.nTestEpisode)
        for source in deployments
    }
    for source, deployment in deployments.items():
        check_deployment(
            deployment, pool, source, open_episodes, where=str(args.resume or "the pretrained network")
        )

    part, parts = options.part(args)
    todo = range(part, args.nTestEpisode, parts)
    about = description(args, network, saved, deployments, attacks)
    with runs.Writer(args.output_dir, about, (part, parts)) as out, Interrupts() as interrupts:
        earlier = runs.peek(args.output_dir)
        finished = {source: {row["index"] for row in rows} for source, rows in earlier.rows.items()}
        chosen: dict[Deployment | str, dict] = {}
        done = sum(len(finished.get(source, set()) & set(todo)) for source in readers)
        with tqdm(total=len(readers) * len(todo), initial=done, unit="episode") as progress:
            for source, reader in readers.items():
                left = [index for index in todo if index not in finished.get(source, ())]
                if not left or interrupts.pending():
                    continue
                progress.set_description(source)
                # Of one deployment on another source's VALID every domain gets the same choice: made once.
                alike = deployments[source] if deployments[source].select_on else source
                decided = runs.read_merging(args.output_dir).get(source, chosen.get(alike))
                predict, merging = deploy(
                    network,
                    pool,
                    as_decided(deployments[source], decided) if decided else deployments[source],
                    source,
                    open_episodes,
                    attacks,
                    args.seed,
                    partial(watched, network, interrupts),
                )
                if saved and saved.about.get("levels_from") == "nowhere":
                    merging["epsilons"] = "unknown"
                chosen[alike] = decided or merging
                out.note_merging(source, chosen[alike])
                for read in episode_loader(Subset(reader, left), args.num_workers):
                    if args.dump is not None:
                        dump_episode(args.dump / source, read.index, read, reader)
                    out.append(score(args, network, predict, read.to(network.device), attacks, out))
                    progress.update()
                    if interrupts.pending():
                        break

    run = runs.peek(args.output_dir)
    if not run.complete:
        found = sum(map(len, run.rows.values()))
        print(f"{found} of {len(readers) * args.nTestEpisode} episodes are done; ", end="")
        print("the same command continues" if interrupts.pending() else "other parts are to follow")
        return 128 + interrupts.caught if interrupts.pending() else 0
    conclude(run, network.device)
    return 0


def load_pool(args: argparse.Namespace, network: Network) -> checkpoint.Checkpoint:
    """The checkpoint that --resume names, which fits the backbone."""
    from amt.files import checkpoint

    saved = checkpoint.load(args.resume)
    checkpoint.check_architecture(args.resume, saved.pool, network.weights, network.arch)
    for note in saved.about.get("notes", ()):
        print(f"note: {args.resume}: {note}")
    return saved


def watched(network: Network, interrupts: Interrupts, episodes, title: str) -> Iterator[Episode]:
    """The episodes that something is chosen on, on the backbone's device, with a progress line; a signal
    ends the program, since half a choice is none."""
    from tqdm import tqdm

    for episode in tqdm(episodes, desc=title, unit="episode", leave=False):
        yield episode.to(network.device)
        if interrupts.pending():
            raise SystemExit(128 + interrupts.caught)


def score(args, network: Network, predict: Predictor, episode: Episode, attacks, out: runs.Writer) -> dict:
    """The row of one episode; of the first ones the attacks are checked, and images kept."""
    from amt.evaluation import runs
    from amt.evaluation.evaluate import measure
    from amt.evaluation.sanity import probe
    from amt.tasks.classifier import pretrained_predictor

    measured = measure(predict, episode, attacks, args.seed, pretrained_predictor(network))
    row = measured.row
    if attacks and episode.index < args.probe_episodes:
        row |= {"checks": probe(predict, episode, measured, attacks, args.seed)}
    if measured.attacked and episode.index < args.samples:
        out.keep(runs.sample_of(episode, measured))
    return row | ({"skipped": len(episode.skipped)} if episode.skipped else {})


def description(args, network, saved, deployments, attacks) -> dict:
    """What run.json says: everything that decides the rows, and how to get them again."""
    from amt.evaluation.evaluate import columns
    from amt.evaluation.statistics import groups
    from amt.files import checkpoint, writing
    from meta_dataset_readers.domains import DOMAINS

    trained_on = ()
    if saved:
        protocol = saved.about.get("protocol", {})
        trained_on = protocol.get(
            "base_sources", options.TRAINING_SOURCES if "published" in saved.about else ()
        )
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"checkpoint": writing.digest(args.resume), "device": network.device.type}
    settings |= {"pretrained_checkpoint": writing.digest(args.pretrained_checkpoint)}
    about = {
        **checkpoint.provenance(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arch": network.arch,
        "checkpoint": str(args.resume) if args.resume else None,
        "seed": args.seed,
        "split": args.split,
        "sampling": dataclasses.asdict(options.sampling(args)),
        "attacks": [dataclasses.asdict(attack) for attack in attacks],
        "columns": columns(attacks),
        "sources": list(deployments),
        "episodes": args.nTestEpisode,
        "averages": groups(
            list(deployments), trained_on, {name: domain.benchmark for name, domain in DOMAINS.items()}
        ),
        "settings": settings,
        "deployments": {source: dataclasses.asdict(each) for source, each in deployments.items()},
    }
    return json.loads(json.dumps(about, default=plain))


def plain(value: object) -> object:
    """What JSON has no notation for."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


if __name__ == "__main__":
    exit_on_bad_input(main)
