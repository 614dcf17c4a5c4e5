"""Meta-test, or continue: what test_meta_dataset.py does once its flags are read."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from amt.attacks.kinds import Attack
from amt.cli import options
from amt.cli.options.texts import check_classes
from amt.evaluation import runs
from amt.evaluation.deploy import check_deployment, chosen_on, deploy, earlier_note
from amt.evaluation.evaluate import columns, measure
from amt.evaluation.needs import check_heads
from amt.evaluation.oracle import best_row
from amt.evaluation.recording import description, ended, examine, interruptible, record
from amt.evaluation.statistics import groups
from amt.evaluation.writer import Writer
from amt.files import checkpoint, text_prototypes, version
from amt.files.pretrained import load_network
from amt.files.signals import Interrupts
from amt.models.architectures import base_arch, stated
from amt.models.compiled import compiler_for
from amt.models.head_settings import PRETRAINED
from amt.models.network import Network, find_device
from amt.models.pool import Pool
from amt.report.finish import finish
from amt.tasks.classifier import Predictor, fixed_predictor, pretrained_predictor
from amt.tasks.merge import average_of
from meta_dataset_readers.domains import DOMAINS
from meta_dataset_readers.dump import dump_episode
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, printable, say
from meta_dataset_readers.feeding import Waiting
from meta_dataset_readers.reader import EpisodeReader, episode_loader

# Flags that change neither an episode's row nor what it is compared with.
NOT_SETTINGS = (
    *("output_dir", "device", "threads", "num_workers", "shard", "samples", "dump", "resume", "overwrite"),
    *("dry_run", "nTestEpisode", "test_sources", "cdfsl_domains", "domain_config", "deterministic"),
    *("text_prototypes", "shots"),
)


def main(args: argparse.Namespace) -> int:
    """Evaluate as the flags say, or continue; the exit code."""
    options.check_output(args.output_dir)
    options.use_machine(args)
    deployments, attacks = options.deployments(args), options.attacks(args)
    saved = load_pool(args) if args.resume else None
    network = open_network(args, attacks, saved)
    pool = saved.pool.to(network.device) if saved else None
    others = other_networks(args, network, pool, attacks)
    statistics = saved.statistics.to(network.device) if saved and saved.statistics else None
    unknown_levels = saved is not None and saved.about.get("levels_from") == "nowhere"

    open_source = partial(EpisodeReader, **options.reading(args, network.image_size))
    open_episodes = partial(labelled_episodes, open_source, args.num_workers, network.device)
    readers = {
        source: open_source(source=source, split=args.split, n_episodes=args.nTestEpisode)
        for source in deployments
    }
    where = str(args.resume or "the pretrained network")
    texts = text_prototypes.given(args.text_prototypes)
    for source, deployment in deployments.items():
        check_deployment(deployment, pool, source, open_episodes, where)
        dim = network.module.num_features
        check_heads(deployment.offered_heads, pool, statistics, where, dim, texts)
        if texts is not None:
            check_classes(texts, readers[source])
            if on := chosen_on(deployment, pool, source):
                check_classes(texts, open_source(source=on[0], split=on[1], n_episodes=1))
    say_fallbacks(args)

    part, parts = options.part(args)
    todo = range(part, args.nTestEpisode, parts)
    about = describe(args, network, saved, deployments, attacks)
    writer = Writer(args.output_dir, about, (part, parts), args.overwrite)
    with writer as out, Interrupts() as interrupts, interruptible(network, interrupts):
        earlier = runs.peek(args.output_dir)
        left = {source: earlier.left(source, todo) for source in readers}
        total = len(readers) * len(todo)
        waiting = Waiting()
        with tqdm(total=total, initial=total - sum(map(len, left.values())), unit="episode") as progress:
            for source, reader in readers.items():
                if not left[source]:
                    continue
                interrupts.check()
                progress.set_description(source)
                predict, note = deploy(
                    network,
                    pool,
                    deployments[source],
                    source,
                    open_episodes,
                    attacks,
                    args.seed,
                    partial(watched, interrupts),
                    earlier_note(source, deployments, runs.read_merging(args.output_dir)),
                    statistics,
                    texts,
                )
                out.note_merging(source, note | ({"epsilons": "unknown"} if unknown_levels else {}))
                episodes = waiting.timed(read(args, reader, left[source], network.device))
                rows = (
                    [score(args, predict, each, attacks, out, others)] for each in interrupts.whole(episodes)
                )
                record(out, rows, progress, waiting)

    run = runs.peek(args.output_dir)
    code = ended(run, interrupts)
    if run.complete:
        finish(run, network.device)
    return code


def open_network(
    args: argparse.Namespace, attacks: Sequence[Attack], saved: checkpoint.Checkpoint | None
) -> Network:
    """The network, which the pool in the checkpoint fits, with pretrained weights where they are needed."""
    if args.no_pretrain and any(head.other == PRETRAINED for head in options.heads(args) or ()):
        raise InputError(
            "--head mix other=pretrained needs the pretrained network: it excludes --no_pretrain"
        )
    if args.no_pretrain and any(attack.kind == "transfer" for attack in attacks):
        raise InputError("--attack transfer attacks the pretrained network: it excludes --no_pretrain")
    arch = base_arch(args.arch)
    network = load_network(
        stated(arch, saved.pool.shapes) if saved else arch,
        args.pretrained_checkpoint,
        find_device(args.device),
        image_size=args.image_size,
        pretrained=options.needs_pretrained(args),
        key=args.weights_key,
        tell=say,
    )
    if saved:
        checkpoint.check_architecture(args.resume, saved.pool, network.weights, network.arch)
    return dataclasses.replace(network, compiler=compiler_for(network.device)) if args.compile else network


def other_networks(
    args: argparse.Namespace, network: Network, pool: Pool | None, attacks: Sequence[Attack]
) -> tuple[Predictor, ...]:
    """The networks that attacks make images on: the pretrained one, and for "strong" every adapter alone."""
    found = [] if args.no_pretrain else [pretrained_predictor(network)]
    if pool is not None and any(attack.kind == "strong" for attack in attacks):
        alone = [average_of(pool, [p]) for p in range(len(pool))]
        found += [fixed_predictor(network, pool.merged(each), each) for each in alone]
    return tuple(found)


def say_fallbacks(args: argparse.Namespace) -> None:
    """Say what a head does without, if all support sets have one image per class."""
    if options.sampling(args).num_support not in (1, (1, 1)):
        return
    for head in options.heads(args) or ():
        if head.one_shot_note:
            say(f"note: --head {head.name}: {head.one_shot_note}")


def load_pool(args: argparse.Namespace) -> checkpoint.Checkpoint:
    """The checkpoint that --resume names."""
    saved = checkpoint.load(args.resume)
    for note in saved.about.get("notes", ()):
        say(f"note: {args.resume}: {note}")
    return saved


def labelled_episodes(
    open_source: Callable[..., EpisodeReader],
    workers: int,
    device: torch.device,
    source: str,
    split: str,
    n: int,
    seed: int | None = None,
) -> Iterable[Episode]:
    """Episodes to choose settings on; without `seed` those of the run's seed."""
    other_seed = {} if seed is None else {"seed": seed}
    episodes = open_source(source=source, split=split, n_episodes=n, **other_seed)
    return episode_loader(episodes, workers, device)


def watched(interrupts: Interrupts, episodes: Iterable[Episode], title: str) -> Iterator[Episode]:
    """The episodes that settings are chosen on, with a progress line; after a signal `Interrupted` is raised,
    since half a choice is none."""
    return interrupts.whole(tqdm(episodes, desc=printable(title), unit="episode", leave=False))


def read(args, reader: EpisodeReader, numbers: Sequence[int], device: torch.device) -> Iterator[Episode]:
    """Some episodes of a source on the device, written to --dump as well if asked for."""
    for episode in episode_loader(Subset(reader, numbers), args.num_workers, device):
        if args.dump is not None:
            dump_episode(args.dump / episode.source, episode.index, episode, reader)
        yield episode


def score(
    args,
    predict: Predictor | tuple[Predictor, ...],
    episode: Episode,
    attacks,
    out: Writer,
    others: Sequence[Predictor],
) -> dict:
    """The row of one episode; on the first ones the attacks are checked, and images kept."""
    check, keep = episode.index < args.probe_episodes, episode.index < args.samples
    if isinstance(predict, tuple):
        rows = [measure(each, episode, attacks, args.seed, others).row for each in predict]
        return best_row(rows, columns(attacks))
    measured = examine(out, predict, episode, attacks, args.seed, check=check, keep=keep, others=others)
    more = {"support": 0} if args.shots == [0] else {}  # one image a class was drawn, and not looked at
    return measured.row | more | ({"skipped": len(episode.skipped)} if episode.skipped else {})


def describe(args, network, saved, deployments, attacks) -> dict:
    """What run.json says: everything that decides the rows, and how to get them again."""
    trained_on = ()
    if saved:
        protocol = saved.about.get("protocol", {})
        trained_on = protocol.get(
            "base_sources", options.TRAINING_SOURCES if "published" in saved.about else ()
        )
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= {"checkpoint": version.digest(args.resume), "device": network.device.type}
    settings |= {"pretrained_checkpoint": version.digest(args.pretrained_checkpoint)}
    if args.text_prototypes:
        settings |= {"text_prototypes": version.digest(args.text_prototypes)}
    benchmarks = {name: domain.benchmark for name, domain in DOMAINS.items()}
    return description(
        attacks,
        arch=network.arch,
        checkpoint=str(args.resume) if args.resume else None,
        seed=args.seed,
        split=args.split,
        sampling=dataclasses.asdict(options.sampling(args)),
        sources=list(deployments),
        episodes=args.nTestEpisode,
        averages=groups(list(deployments), trained_on, benchmarks),
        settings=settings,
        deployments={source: dataclasses.asdict(each) for source, each in deployments.items()},
        **({"shots": args.shots[0]} if args.shots else {}),
    )
