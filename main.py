"""Meta-training: tune a pool, one member per robustness level, on episodes under dual perturbation.

    python main.py --arch vit_mini_amt --data_path data/mini --base_sources mini_objects --output_dir runs/x

Each episode gives every level one step: support features make prototypes, the query images are attacked,
the singular factors are moved uphill, and the natural plus robust loss at the moved factors is descended
(amt/training/meta_tune.py). Afterwards test_meta_dataset.py merges the pool anew for every task. A member
is a LoRA, or with --tune full a complete network; baselines train in the same loop, see --tune and
--pgd_method.

    python main.py autolora --dataset cifar10 --data DIR --arch resnet18 --checkpoint FILE --output RUN

is the other path, robust fine-tuning on an ordinary data set: amt/cli/autolora.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from typing import TYPE_CHECKING

from amt.cli import options
from meta_dataset_readers.errors import InputError, exit_on_bad_input

if TYPE_CHECKING:
    from amt.models.network import Network
    from amt.models.pool import Pool
    from amt.training.meta_tune import Tuner
    from amt.training.settings import TuneSettings


def main() -> int:
    if sys.argv[1:2] == ["autolora"]:
        from amt.cli import autolora

        return autolora.main(sys.argv[2:])
    args = options.training_parser().parse(sys.argv[1:])
    options.check_training(args)
    if args.dry_run is not None:
        from amt.cli import dry_run

        return dry_run.training(args)
    options.check_output(args.output_dir)

    # These bring torch, which nobody should wait for who asks for --help or mistyped a flag.
    from torch.utils.data import Subset

    from amt.evaluation.evaluate import validate
    from amt.files import checkpoint
    from amt.files.pretrained import load_network
    from amt.files.signals import Interrupts
    from amt.models.network import find_device
    from amt.training.journal import Journal
    from amt.training.meta_tune import NonFiniteLoss, meta_tune
    from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader
    from meta_dataset_readers.stored_episodes import open_episodes

    options.use_threads(args)
    settings = options.tune_settings(args)
    network = load_network(
        args.arch,
        args.pretrained_checkpoint,
        find_device(args.device),
        options.autocast(args),
        args.image_size,
        pretrained=not args.no_pretrain,
    )
    total = settings.epochs * settings.episodes_per_epoch
    open_source = partial(EpisodeReader, **options.reading(args, network.image_size))
    training = [
        open_source(source=source, split="TRAIN", n_episodes=total, augment=True)
        for source in options.training_sources(args)
    ]
    episodes = SourceMixture(training, total, args.seed)
    validation = [open_episodes(path, network.image_size) for path in args.val_episodes] or [
        open_source(source=source, split="VALID", n_episodes=args.nValEpisode)
        for source in args.val_sources or options.training_sources(args)
        if args.nValEpisode
    ]
    tuner, history = resumed(args, network, settings) if args.resume else fresh(args, network, settings)

    def score(pool: Pool) -> list[dict[str, float]]:
        """Validate on the same episodes each time, read anew: together they would fill the memory."""
        fixed = (episode for each in validation for episode in episode_loader(each, args.num_workers))
        on_device = (episode.to(network.device) for episode in journal.watch(fixed))
        return validate(network, pool, on_device, robust=settings.adversarial)

    journal = Journal(
        args.output_dir,
        about={"arch": network.arch, "protocol": protocol(args, network), **checkpoint.provenance()},
        validate=score if validation else None,
        total=total,
        done=tuner.episodes_done,
        history=history,
    )
    coming = episode_loader(Subset(episodes, range(tuner.episodes_done, total)), args.num_workers)
    if args.delta_init == "zero" and settings.method == "adsv":
        journal.say(
            "warning: from --delta_init zero the attack's first gradient vanishes; it may never start"
        )
    with journal, Interrupts() as interrupts:
        try:
            meta_tune(tuner, journal.watch(coming), journal.on_step, journal.on_epoch, interrupts.pending)
        except NonFiniteLoss as error:
            good = journal.saved or args.resume
            kept = f"{good} holds the last good state" if good else "no epoch was complete, nothing is saved"
            raise InputError(f"{error}; {kept}") from error
        saved = journal.save(tuner)
    if journal.skipped:
        print(f"{len(journal.skipped)} damaged records were passed over")
    if interrupts.pending() and not tuner.finished:
        print(f"stopped after {tuner.episodes_done} of {total} episodes; continue with --resume {saved}")
        return 128 + interrupts.caught
    print(f"done: {saved}")
    return 0


def protocol(args: argparse.Namespace, network: Network) -> dict:
    """What a run's weights depend on besides its settings and levels, as plain JSON values."""
    found = {
        "base_sources": options.training_sources(args),
        "image_size": network.image_size,
        "autocast": str(network.autocast),
        "augmented": ["support", "query"],
        **dataclasses.asdict(options.sampling(args)),
    }
    return json.loads(json.dumps(found))


def fresh(args: argparse.Namespace, network: Network, settings: TuneSettings) -> tuple[Tuner, list[dict]]:
    """A tuner at the start of its run, and an empty history."""
    from amt.models.full_pool import pretrained_pool
    from amt.models.lora import principal_pool
    from amt.training.meta_tune import Tuner

    levels = options.levels(args)
    if args.tune == "full":
        pool = pretrained_pool(network.weights, levels)
    else:
        try:
            pool = principal_pool(network.weights, args.rank, levels)
        except ValueError as error:
            raise InputError(f"--rank is {args.rank}: {error}") from error
    return Tuner(network, pool, settings), []


def resumed(args: argparse.Namespace, network: Network, settings: TuneSettings) -> tuple[Tuner, list[dict]]:
    """The tuner that `--resume` saved, and the history of its run."""
    from amt.files import checkpoint
    from amt.training.meta_tune import Tuner

    saved = checkpoint.load(args.resume)
    checkpoint.check_architecture(args.resume, saved.pool, network.weights, network.arch)
    tuned = {"tune": args.tune, "rank": args.rank if args.tune == "lora" else None}
    checkpoint.check_resumable(
        args.resume, saved, settings, options.levels(args), tuned, protocol(args, network)
    )
    tuner = Tuner(network, saved.pool.to(network.device), settings)
    try:
        tuner.restore(saved.momentum, saved.about["tuner"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{args.resume}: damaged optimiser state ({error!r})") from error
    return tuner, saved.about["history"]


if __name__ == "__main__":
    exit_on_bad_input(main)
