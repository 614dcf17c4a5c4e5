"""Meta-training: tune a pool of LoRAs, one per robustness level, on episodes under dual perturbation.

    python main.py --arch vit_mini_amt --data_path data/mini --base_sources mini_objects --output_dir runs/x

Each episode gives every level one step: support features make prototypes, the query images are attacked,
the singular factors are moved uphill, and the natural plus robust loss at the moved factors is descended
(amt/meta_tune.py). Afterwards test_meta_dataset.py merges the pool anew for every task.
"""

import argparse
import sys
from functools import partial

from torch.utils.data import Subset

from amt import checkpoint, options
from amt.backbone import Backbone, find_device, load_backbone
from amt.evaluate import validate
from amt.journal import Interrupts, Journal
from amt.lora import principal_pool
from amt.meta_tune import NonFiniteLoss, Tuner, TuneSettings, meta_tune
from meta_dataset_readers.errors import InputError, exit_on_bad_input
from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader


def main() -> int:
    args = options.training_parser().parse(sys.argv[1:])
    options.check_training(args)
    settings = options.tune_settings(args)
    backbone = load_backbone(
        args.arch,
        args.pretrained_checkpoint,
        find_device(args.device),
        options.autocast(args),
        args.image_size,
    )
    total = settings.epochs * settings.episodes_per_epoch
    episodes = SourceMixture(
        [reader(args, backbone, source, "TRAIN", total, augment=True) for source in args.base_sources],
        total,
        args.seed,
    )
    fixed = [
        episode.to(backbone.device)
        for source in args.val_sources or args.base_sources
        for episode in episode_loader(reader(args, backbone, source, "VALID", args.nValEpisode))
    ]

    pool = principal_pool(backbone.weights, args.rank, options.levels(args))
    tuner, history = Tuner(backbone, pool, settings), []
    if args.resume:
        tuner, history = resumed(args, backbone, settings)
    score = partial(validate, backbone, episodes=fixed, robust=settings.method == "adsv")
    journal = Journal(
        args.output_dir,
        about={"arch": backbone.arch, "image_size": backbone.image_size, **checkpoint.provenance()},
        validate=score if fixed else None,
        total=total,
        done=tuner.episodes_done,
        history=history,
    )
    coming = episode_loader(Subset(episodes, range(tuner.episodes_done, total)), args.num_workers)
    with journal, Interrupts() as interrupts:
        try:
            meta_tune(tuner, coming, journal.on_step, journal.on_epoch, interrupts.pending)
        except NonFiniteLoss as error:
            raise InputError(f"{error}; what {args.output_dir} holds is the last good state") from error
        saved = journal.save(tuner)
    if interrupts.pending():
        print(f"stopped after {tuner.episodes_done} of {total} episodes; continue with --resume {saved}")
        return 128 + interrupts.caught
    print(f"done: {saved}")
    return 0


def reader(
    args: argparse.Namespace, backbone: Backbone, source: str, split: str, count: int, augment: bool = False
) -> EpisodeReader:
    """`count` episodes of one source."""
    return EpisodeReader(
        args.data_path,
        source,
        split,
        options.sampling(args),
        backbone.image_size,
        n_episodes=count,
        seed=args.seed,
        augment=augment,
        skip_bad_records=args.skip_bad_records,
    )


def resumed(args: argparse.Namespace, backbone: Backbone, settings: TuneSettings) -> tuple[Tuner, list[dict]]:
    """The tuner that `--resume` saved, and the history of its run."""
    saved = checkpoint.load(args.resume)
    checkpoint.check_architecture(args.resume, saved.pool, backbone.weights, backbone.arch)
    checkpoint.check_resumable(args.resume, saved, settings, options.levels(args), args.rank)
    tuner = Tuner(backbone, saved.pool.to(backbone.device), settings)
    tuner.restore(saved.momentum, saved.about["tuner"])
    return tuner, saved.about["history"]


if __name__ == "__main__":
    exit_on_bad_input(main)
