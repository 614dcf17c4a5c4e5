"""Meta-train a pool, or continue: what main.py does once its flags are read.

Read downward: episodes and networks are opened, the state that is furthest on is found, and `train` goes
through epochs in plain sight: step, save, validate, save.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from amt.cli import head_statistics, memory, options
from amt.evaluation.evaluate import validate
from amt.files import checkpoint, digests
from amt.files.pretrained import load_network
from amt.files.ranks import Ranks, together
from amt.files.run_directory import check_same
from amt.files.signals import Interrupted
from amt.models.compiled import compiler_for
from amt.models.head_settings import default_head
from amt.models.network import Network, find_device
from amt.models.parts import with_blocks_made_again
from amt.models.pool import pretrained_pool, principal_pool
from amt.models.weights import Weights
from amt.training.keeper import Keeper, brief, check_resumable, scalars
from amt.training.tuner import Tuner, steps
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, blaming, damaged, say
from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader
from meta_dataset_readers.stored_episodes import open_episodes

OLDER = {"episodes_per_step": 1}  # settings that older runs do not name


def main(args: argparse.Namespace) -> int:
    """Train as the flags say, or continue; the exit code."""
    with together(args.rank_timeout) as ranks:
        return run_of(args, ranks)


def run_of(args: argparse.Namespace, ranks: Ranks) -> int:
    """Train as one of the ranks; the exit code. What there is to start from is rank 0's."""
    if ranks.first:
        options.check_output(args.output_dir)
    options.use_machine(args)
    settings = options.tune_settings(args)
    network = load_network(
        args.arch,
        args.pretrained_checkpoint,
        find_device(args.device),
        options.arithmetic(args).autocast,
        args.image_size,
        pretrained=not args.no_pretrain,
        key=args.weights_key,
        tell=say,
    )
    network = sparing(network, args)
    total = settings.epochs * settings.episodes_per_epoch
    open_source = partial(EpisodeReader, **options.reading(args, network.image_size))
    training = [
        open_source(source=source, split="TRAIN", n_episodes=total, augment=True)
        for source in options.training_sources(args)
    ]
    memory.check_fits(network, memory.plan_of(args, [each.spec for each in training], ranks.world))
    episodes = SourceMixture(training, total, args.seed)
    validation = [open_episodes(path, network.image_size) for path in args.val_episodes] or [
        open_source(source=source, split="VALID", n_episodes=args.nValEpisode)
        for source in args.val_sources or options.training_sources(args)
        if args.nValEpisode
    ]
    described = asked(args, network)
    if ranks.world > 1:
        shown = episodes[0]
        seen = digests.of_tensors({"support": shown.support, "query": shown.query})
        ranks.check_same(described | {"a first episode of digest": seen})
    first = beginning(args, network) if ranks.first else None
    run = Keeper(
        args.output_dir,
        "a meta-tuning",
        described,
        overwrite=args.overwrite,
        minutes=args.save_every_minutes,
        older=OLDER,
        ranks=ranks,
    )
    with run:
        found = [restored(args, network, run.last)] if ranks.first and run.last.exists() else []
        found += [first] if first else []
        furthest = max(found, key=lambda each: each[0].episodes_done, default=None)
        tuner, history = shared_out(args, network, furthest, ranks)
        already = "" if len(history) < settings.epochs else " already"
        if not already:
            code = train(args, run, tuner, history, episodes, validation, ranks)
            if len(history) < settings.epochs:
                return code
        ranks.leave()
        if not ranks.first:
            return 0
        run.goes_on_alone()
        code = with_statistics(args, run, network, open_source)
        if already or code == 0:
            say(f"done{already}: {run.last}{'; --overwrite starts anew' if already else ''}")
        return code


def beginning(args: argparse.Namespace, network: Network) -> tuple[Tuner, list[dict]] | None:
    """What there is to start from besides the last.safetensors of the run's own directory; faults in it are
    told before a folder is made."""
    last = args.output_dir / "last.safetensors"
    if args.overwrite and args.resume and os.path.realpath(args.resume) == os.path.realpath(last):
        raise InputError(f"--overwrite would remove --resume {args.resume}; name another --output_dir")
    if args.resume is not None and not (last.exists() and last.samefile(args.resume)):
        found = restored(args, network, args.resume)
        if len(found[1]) == found[0].settings.epochs:
            raise InputError(f"{args.resume}: this run is finished, nothing is left to resume")
        return found
    return (fresh(args, network), []) if args.overwrite or not last.exists() else None


def shared_out(
    args: argparse.Namespace, network: Network, start: tuple[Tuner, list[dict]] | None, ranks: Ranks
) -> tuple[Tuner, list[dict]]:
    """The tuner of this rank's share, and the history: rank 0's `start`, which others need not have."""
    if start is not None and ranks.world == 1:
        return start
    sent = None
    if start is not None:
        pool, buffers, numbers = start[0].gathered()
        sent = pool.to("cpu"), {name: each.cpu() for name, each in buffers.items()}, numbers, start[1]
    shared = ranks.shared(sent)
    assert shared is not None  # rank 0 has a start
    pool, buffers, numbers, history = shared
    pool = pool.to(network.device)
    tuner = Tuner(network, pool, options.tune_settings(args), args.levels_at_once, ranks)
    tuner.restore(buffers, numbers)
    return tuner, history


def train(
    args: argparse.Namespace,
    run: Keeper,
    tuner: Tuner,
    history: list[dict],
    episodes: SourceMixture,
    validation: Sequence[Dataset],
    ranks: Ranks,
) -> int:
    """Train to the end, or to the first signal; the exit code.

    Args:
        history: a note for each epoch that is trained and validated.
        episodes: of the whole run.
    """
    settings, total, skipped = tuner.settings, len(episodes), set()
    size = settings.episodes_per_step
    content = partial(contents, about(args, tuner.network), tuner, history)
    run.begin("meta-tuning", "episode", total, tuner.episodes_done)
    if tuner.pool.levels[0].start == "zero" and (settings.loss or settings.method == "adsv"):
        run.say("warning: from --delta_init zero the attack's first gradient vanishes; it may never start")
    loader = episode_loader(
        Subset(episodes, tuner.own_episodes(total)), args.num_workers, tuner.network.device
    )
    coming = run.watch(steps(loader, len(tuner.share.episodes(size))))

    for epoch in range(len(history), settings.epochs):
        end = (epoch + 1) * settings.episodes_per_epoch
        for own in itertools.islice(coming, (end - tuner.episodes_done) // size):
            skipped.update(line for episode in own for line in episode.skipped)
            records = tuner.step(*own)
            shown: dict[str, float] = {}
            for p, record in enumerate(records):
                shown |= scalars(f"level{p}", record, without=["n_way"])
            run.log_step(tuner.episodes_done, shown, " | ".join(map(brief, records)))
            if run.is_due():
                tuner.check_finite()
                run.save_last(*content())
        tuner.check_finite()
        if tuner.episodes_done < end:
            break
        try:
            note = judged(run, tuner, validation, args.num_workers, skipped, ranks)
        except Interrupted:
            break
        best = max((old["score"] for old in history if "score" in old), default=-math.inf)
        history.append(note)
        if note.get("score", math.inf) > best:
            run.save_best(*content(resumable=False))
        run.save_last(*content())

    skipped = set().union(*ranks.gathered(skipped))
    if skipped:
        say(f"{len(skipped)} damaged records were passed over")
    if len(history) < settings.epochs:
        run.save_last(*content())
        say(f"stopped after {tuner.episodes_done} of {total} episodes; the same command continues")
        return run.code
    return 0


def with_statistics(
    args: argparse.Namespace, run: Keeper, network: Network, open_source: Callable[..., EpisodeReader]
) -> int:
    """Measure what heads need, and put it into the run's checkpoints; the exit code."""
    if args.statistics_episodes == 0:
        return 0
    options.arithmetic(args).exact.use()
    sources = options.training_sources(args)
    found = head_statistics.train_episodes(open_source, sources, args.statistics_episodes, args.seed)
    measured = partial(
        head_statistics.with_statistics,
        network=network,
        episodes=found,
        sources=sources,
        seed=args.seed,
        workers=args.num_workers,
        watch=run.whole,
    )
    try:
        head_statistics.complete((run.best, run.last), measured)
    except Interrupted:
        say("stopped while measuring statistics for the heads; the same command continues")
        return run.code
    return 0


def judged(
    run: Keeper, tuner: Tuner, validation: Sequence[Dataset], workers: int, skipped: set[str], ranks: Ranks
) -> dict[str, Any]:
    """The note of the epoch that has just ended: its levels that have collapsed, and the validation.

    The episodes of the validation are the same every time and read anew: together they would fill the memory.

    Raises:
        Interrupted: a signal has arrived.
    """
    note: dict[str, Any] = {"epoch": tuner.epoch, "episodes": tuner.episodes_done}
    if collapsed := tuner.collapsed():
        note["collapsed"] = list(collapsed)
    for p, ways in collapsed.items():
        run.say(
            f"warning: level {p} has collapsed: its loss stayed at ln(ways) = {math.log(ways):.3f} "
            f"{'with the divergence at zero ' * (tuner.settings.method == 'adsv')}for the whole epoch; "
            "lower --lr, or try --clip_grad 1 and --epsilon_warmup"
        )
    if not validation:
        return note

    def fixed() -> Iterator[Episode]:
        loaders = (episode_loader(part, workers, tuner.network.device) for part in validation)
        for episode in run.whole(itertools.chain.from_iterable(loaders)):
            skipped.update(episode.skipped)
            yield episode

    with run.passes(tuner.network.module):
        head = default_head(tuner.settings.head)
        own = validate(tuner.network, tuner.pool, fixed(), tuner.settings.adversarial, head=head)
    # Where several ranks train a level they all validate it; the first one's word counts.
    found = ranks.gathered(dict(zip(tuner.share.levels, own, strict=True)))
    levels = [level for _, level in sorted(functools.reduce(lambda a, b: b | a, found).items())]
    # One number to choose the best epoch by: the mean of every level's clean and robust accuracy.
    score = statistics.fmean(value for level in levels for value in level.values())
    for p, level in enumerate(levels):
        run.log(tuner.episodes_done, {f"level{p}/validation_{name}": value for name, value in level.items()})
    listed = ", ".join("/".join(f"{value:.0f}" for value in level.values()) for level in levels)
    run.say(f"epoch {tuner.epoch}: validation {score:.1f} ({listed})")
    return note | {"validation": levels, "score": score}


def contents(
    about: dict, tuner: Tuner, history: list[dict], resumable: bool = True
) -> tuple[Weights, dict[str, Any]]:
    """Tensors and text of a checkpoint, on rank 0; a resumable one continues exactly."""
    pool, momentum, numbers = tuner.gathered()
    about = {
        **about,
        "settings": dataclasses.asdict(tuner.settings),
        "finished": len(history) == tuner.settings.epochs,
        "history": history,
        **({"tuner": numbers} if resumable else {}),
    }
    return checkpoint.packed(checkpoint.Checkpoint(pool, about, momentum if resumable else {}))


def about(args: argparse.Namespace, network: Network) -> dict:
    """What every checkpoint says of the run, besides its settings and levels."""
    return {"arch": network.arch, "protocol": protocol(args, network), **checkpoint.provenance()}


def protocol(args: argparse.Namespace, network: Network) -> dict:
    """What a run's weights depend on besides its settings and levels, as plain JSON values."""
    found = {
        "base_sources": options.training_sources(args),
        "image_size": network.image_size,
        "autocast": options.arithmetic(args).noted,
        "augmented": ["support", "query"],
        **dataclasses.asdict(options.sampling(args)),
        **({"features_of": digests.of_tensors(network.weights)} if args.loss == "features" else {}),
    }
    return json.loads(json.dumps(found))


def asked(args: argparse.Namespace, network: Network) -> dict:
    """Everything that a run must have alike to be continued, as plain JSON values."""
    found = {
        "tune": args.tune,
        "rank": None if args.tune == "full" else args.rank,
        **protocol(args, network),
        **dataclasses.asdict(options.tune_settings(args)),
        "levels": [dataclasses.asdict(level) for level in options.levels(args)],
    }
    return json.loads(json.dumps(found))


def sparing(network: Network, args: argparse.Namespace) -> Network:
    """The network, as sparing of memory and as fast as the flags say."""
    module = with_blocks_made_again(network.module) if args.grad_checkpointing else network.module
    compiler = compiler_for(network.device) if args.compile else None
    return dataclasses.replace(network, module=module, micro_batch=args.micro_batch, compiler=compiler)


def fresh(args: argparse.Namespace, network: Network) -> Tuner:
    """A tuner at the start of its run."""
    levels = options.levels(args)
    if args.tune == "full":
        pool = pretrained_pool(network.weights, levels)
    else:
        with blaming(f"--rank is {args.rank}"):
            pool = principal_pool(network.weights, args.rank, levels, norms=args.tune == "lora+norm")
    return Tuner(network, pool, options.tune_settings(args), args.levels_at_once)


def restored(args: argparse.Namespace, network: Network, path: Path) -> tuple[Tuner, list[dict]]:
    """The tuner that a last.safetensors holds, and the history of its run.

    Raises:
        InputError: it holds another run, or is damaged.
    """
    saved = checkpoint.load(path)
    checkpoint.check_architecture(path, saved.pool, network.weights, network.arch)
    check_resumable(path, saved)
    pool = saved.pool
    found = {**OLDER, **saved.about["protocol"], **saved.about["settings"]}
    found |= {"tune": pool.tune, "rank": pool.rank, "levels": list(map(dataclasses.asdict, pool.levels))}
    found, settings = json.loads(json.dumps(found)), asked(args, network)
    check_same(path, [(name, found.get(name), value) for name, value in settings.items()])
    pool = pool.to(network.device)
    tuner = Tuner(network, pool, options.tune_settings(args), args.levels_at_once)
    kinds = (KeyError, IndexError, TypeError, ValueError, RuntimeError)
    with damaged(f"{path}: damaged optimiser state", kinds, said=repr):
        tuner.restore(saved.momentum, saved.about["tuner"])
        history, size = saved.about["history"], tuner.settings.episodes_per_epoch
        if not len(history) * size <= tuner.episodes_done <= (len(history) + 1) * size:
            raise ValueError(f"{tuner.episodes_done} episodes done, {len(history)} epochs noted")
    return tuner, history
