"""The flags of main.py, those of its settings' fields among them: checked, and turned into typed settings.
Knows no tensors."""

import argparse
from typing import Any

from amt.attacks.levels import POOL_EPSILONS, Perturbation
from amt.cli.options.common import (
    COUNT,
    EPSILON,
    add_common,
    add_saving,
    arithmetic,
    check_episodes,
    folder_source,
)
from amt.cli.options.parsing import Parser, check_distinct
from amt.files import ranks
from amt.training.settings import TuneSettings
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.settings import Number, add_flags, as_path, from_args

TRAINING_SOURCES = (
    *("aircraft", "cu_birds", "dtd", "fungi"),
    *("ilsvrc_2012", "omniglot", "quickdraw", "vgg_flower"),
)

_PYRAMID = {"pyramid_grids": (4, 8, 0), "pyramid_scalars": (20.0, 10.0, 1.0), "delta_init": "random2"}
_PGD = {"pyramid_grids": (0,), "pyramid_scalars": (1.0,), "delta_init": "random1"}
_ATTACK_DEFAULTS: dict[str, dict[str, Any]] = {
    "adsv": {"epsilon": POOL_EPSILONS, **_PYRAMID},
    "querying": {"epsilon": (8.0,), **_PGD},
    "standard": {"epsilon": (0.0,), **_PYRAMID},
}


def training_parser() -> Parser:
    """The flags of main.py."""
    parser = Parser(
        "Meta-tune a pool, one LoRA or network per robustness level, under dual perturbation. "
        "`main.py autolora --help` explains the other path, fine-tuning on an ordinary data set."
    )
    add_common(parser, "base_sources", TRAINING_SOURCES, "sources to train on, drawn uniformly")
    parser.add_argument("--arch", default="dino_small_patch16_amt", help="backbone, for example vit_mini_amt")
    parser.add_argument(
        "--tune",
        choices=["lora", "lora+norm", "full"],
        default="lora",
        help="what each level trains: a LoRA; lora+norm: a LoRA and the weights and biases of all LayerNorms "
        "(ours); or a full set of weights, as the baselines PM and P>M>F do (their flags: 100 epochs, "
        "--lr 5e-5)",
    )
    parser.add_argument("--rank", type=COUNT, default=8, help="rank of every LoRA")
    parser.add_argument("--output_dir", type=as_path, required=True, help="where checkpoints and logs go")
    parser.add_argument(
        "--resume",
        type=as_path,
        help="a last.safetensors to continue exactly, in any --output_dir (default: the one that is there)",
    )
    add_saving(parser)
    parser.add_argument("--eval", action="store_true", help="refused: test_meta_dataset.py evaluates")

    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="--precision fp16")
    precision.add_argument("--bf16", action="store_true", help="--precision bf16")

    levels = parser.add_argument_group("perturbation")
    add_flags(levels, TuneSettings, "method", "loss", "epsilon_warmup", "epsilon_from", unset=("method",))
    levels.add_argument(
        "--epsilon",
        type=EPSILON,
        nargs="+",
        help="one LoRA or network for each value, in 1/255 of the pixel range (default: "
        f"{' '.join(f'{e:g}' for e in POOL_EPSILONS)}; with querying 8; with standard a single one)",
    )
    add_flags(levels, Perturbation, unset=("step_size", "grids", "scalars", "start"))

    training = parser.add_argument_group("training")
    add_flags(training, TuneSettings)
    episodes = Number(int, least=1, most=10**9)
    training.add_argument("--nEpisode", type=episodes, default=2000, help="episodes per epoch and source")
    training.add_argument(
        "--levels_at_once",
        type=COUNT,
        metavar="N",
        help="levels that go through the network in one pass; fewer need less memory, and the result is the "
        "same up to rounding (ours) (default: all)",
    )
    training.add_argument(
        "--micro_batch",
        type=COUNT,
        metavar="N",
        help="images of an episode that go through the network in one pass; more are taken part by part, for "
        "less memory and some time; the result is the same up to rounding (ours) (default: all)",
    )
    training.add_argument(
        "--grad_checkpointing",
        action="store_true",
        help="keep only what goes from block to block, and compute the blocks again for the gradient: a "
        "fraction of the memory for a third more time, and the same bits on the CPU (ours)",
    )
    training.add_argument("--sched", choices=["cosine"], default="cosine", help="schedule of the rate")
    training.add_argument("--val_sources", nargs="+", metavar="SOURCE", help="default: the base sources")
    training.add_argument(
        "--val_episodes",
        type=as_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="stored episodes to validate on instead, such as PMF's val_ep120_img128.h5",
    )
    fixed = Number(int, least=0, most=10**7)
    training.add_argument("--nValEpisode", type=fixed, default=120, help="fixed episodes per source; 0: none")
    add_statistics(training, default=20)
    parser.add_published()
    return parser


def add_statistics(group: argparse._ArgumentGroup, default: int) -> None:
    """The flag of how many episodes the statistics for heads are measured on."""
    group.add_argument(
        "--statistics_episodes",
        type=Number(int, least=0, most=10**6),
        default=default,
        metavar="N",
        help="TRAIN episodes on which the covariances for test-time heads such as robust-lda are measured, "
        f"once after meta-training; 0: none (default: {default})",
    )


def check_training(args: argparse.Namespace) -> None:
    """Raise an `InputError` for flags that are well-formed one by one and wrong together."""
    from amt.models.architectures import base_arch  # brings timm, which --help need not wait for

    base_arch(args.arch)
    grids, scalars = (_attack_default(args, name) for name in ("pyramid_grids", "pyramid_scalars"))
    if len(grids) != len(scalars):
        raise InputError(
            f"--pyramid_grids has {len(grids)} values and --pyramid_scalars {len(scalars)}, expected as many"
        )
    if args.loss and method(args) == "standard":
        raise InputError(f"--loss {args.loss} needs an attack: --pgd_method adsv or querying, got standard")
    if args.loss and args.no_pretrain:
        raise InputError(f"--loss {args.loss} needs the pretrained network: it excludes --no_pretrain")
    reach = min(_attack_default(args, "epsilon"))
    if args.epsilon_from is not None and args.epsilon_from > reach:
        raise InputError(f"--epsilon_from is {args.epsilon_from:g}, expected at most --epsilon, {reach:g}")
    if args.eval:
        raise InputError("--eval: main.py trains; test_meta_dataset.py evaluates")
    arithmetic(args)
    _check_ranks(args)
    check_distinct("base_sources", args.base_sources or ())
    check_distinct("val_sources", args.val_sources or ())
    check_episodes(args)


def _check_ranks(args: argparse.Namespace) -> None:
    """Raise an `InputError` if there is not something to do for every rank, in every step."""
    settings, most = tune_settings(args), len(levels(args)) * args.episodes_per_step
    if settings.episodes_per_epoch % settings.episodes_per_step:
        raise InputError(
            f"--episodes_per_step {settings.episodes_per_step} does not divide the "
            f"{settings.episodes_per_epoch} episodes of an epoch"
        )
    _, world = ranks.place()
    if world > most:
        raise InputError(
            f"{world} ranks for {len(levels(args))} levels x {args.episodes_per_step} episodes per step: "
            f"start at most {most}, or raise --episodes_per_step"
        )


def training_sources(args: argparse.Namespace) -> tuple[str, ...]:
    """The sources that main.py trains on."""
    return tuple(args.base_sources or folder_source(args) or TRAINING_SOURCES)


def method(args: argparse.Namespace) -> str:
    """The training method, one of `METHODS`: without --pgd_method, that of the paper that --loss or --tune
    stands for."""
    if args.loss is not None and args.pgd_method is None:
        return "querying"
    return args.pgd_method or ("standard" if args.tune == "full" else "adsv")


def levels(args: argparse.Namespace) -> tuple[Perturbation, ...]:
    """One `Perturbation` for each value of --epsilon."""
    start = _attack_default(args, "delta_init")
    own: dict[str, Any] = {
        "grids": tuple(_attack_default(args, "pyramid_grids")),
        "scalars": tuple(_attack_default(args, "pyramid_scalars")),
        "start": "random2" if start == "random" else start,
    }
    if method(args) == "querying":  # which moves no weights and has no second term in its loss
        own |= {"gamma": 0.0, "beta": 0.0}
    return tuple(
        from_args(
            Perturbation,
            args,
            epsilon=epsilon,
            step_size=epsilon / 4 if args.alpha is None else args.alpha,
            **own,
        )
        for epsilon in _attack_default(args, "epsilon")
    )


def _attack_default(args: argparse.Namespace, flag: str):
    """The value of a flag of the training attack, or if not given the default, which the method decides."""
    return _ATTACK_DEFAULTS[method(args)][flag] if getattr(args, flag) is None else getattr(args, flag)


def tune_settings(args: argparse.Namespace) -> TuneSettings:
    """How long and how fast to train."""
    episodes = args.nEpisode * len(training_sources(args))
    return from_args(TuneSettings, args, episodes_per_epoch=episodes, method=method(args))
