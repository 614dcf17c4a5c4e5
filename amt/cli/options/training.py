"""The flags of main.py: every flag once, checked once, turned into typed settings. Knows no tensors."""

import argparse

import torch

from amt.attacks.levels import STARTS, Perturbation
from amt.cli.options.common import add_common, add_saving, check_episodes, folder_source
from amt.cli.options.parsing import Parser, amount, check_distinct, natural, place, positive
from amt.files.published import POOL_EPSILONS
from amt.models.architectures import base_arch
from amt.models.pool import FullPool, LoRAPool
from amt.training.meta_tune import METHODS, TuneSettings
from meta_dataset_readers.errors import InputError

TRAINING_SOURCES = (
    *("aircraft", "cu_birds", "dtd", "fungi"),
    *("ilsvrc_2012", "omniglot", "quickdraw", "vgg_flower"),
)


TUNED = (LoRAPool.tune, FullPool.tune)


_PYRAMID = {"pyramid_grids": (4, 8, 0), "pyramid_scalars": (20.0, 10.0, 1.0), "delta_init": "random2"}


_PGD = {"pyramid_grids": (0,), "pyramid_scalars": (1.0,), "delta_init": "random1"}


_ATTACK_DEFAULTS = {
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
        choices=TUNED,
        default=TUNED[0],
        help="what each level trains: a LoRA, or a full set of weights, as the baselines PM and P>M>F do "
        "(their flags: 100 epochs, --lr 5e-5)",
    )
    parser.add_argument("--rank", type=positive, default=8, help="rank of every LoRA")
    parser.add_argument("--output_dir", type=place, required=True, help="where checkpoints and logs go")
    parser.add_argument(
        "--resume",
        type=place,
        help="a last.safetensors to continue exactly, in any --output_dir (default: the one that is there)",
    )
    add_saving(parser)
    parser.add_argument("--eval", action="store_true", help="refused: test_meta_dataset.py evaluates")

    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="mixed precision in float16")
    precision.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive, default=30)
    training.add_argument("--nEpisode", type=positive, default=2000, help="episodes per epoch and source")
    training.add_argument("--lr", type=amount, default=5e-4)
    training.add_argument("--warmup_epochs", type=natural, default=5, help="epochs of linear warm-up")
    training.add_argument("--warmup_lr", type=amount, default=1e-6, help="rate the warm-up starts from")
    training.add_argument("--min_lr", type=amount, default=1e-6, help="rate the cosine ends at")
    training.add_argument("--momentum", type=amount, default=0.9)
    training.add_argument("--sched", choices=["cosine"], default="cosine", help="schedule of the rate")
    training.add_argument("--clip_grad", type=amount, help="largest gradient norm of a level (ours)")
    training.add_argument("--val_sources", nargs="+", metavar="SOURCE", help="default: the base sources")
    training.add_argument(
        "--val_episodes",
        type=place,
        nargs="+",
        default=[],
        metavar="FILE",
        help="stored episodes to validate on instead, such as PMF's val_ep120_img128.h5",
    )
    training.add_argument(
        "--nValEpisode", type=natural, default=120, help="fixed episodes per source; 0: none"
    )

    levels = parser.add_argument_group("perturbation")
    levels.add_argument(
        "--pgd_method",
        choices=METHODS,
        help="adsv: AMT's two perturbations; querying: adversarial querying, only the query images are "
        "attacked, by plain PGD (its authors: --epsilon 8 --alpha 2 --attack_iters 7); standard: plain "
        "meta-tuning, without an adversary (the published default, presumably a slip) "
        "(default: adsv; with --tune full standard)",
    )
    levels.add_argument(
        "--epsilon",
        type=amount,
        nargs="+",
        help="one LoRA or network for each value, in 1/255 of the pixel range (default: "
        f"{' '.join(f'{e:g}' for e in POOL_EPSILONS)}; with querying 8; with standard a single one)",
    )
    levels.add_argument(
        "--alpha", type=amount, help="step size in 1/255 (default: a quarter of each epsilon)"
    )
    levels.add_argument("--attack_iters", type=positive, default=10, help="steps K of the training attack")
    levels.add_argument(
        "--delta_init",
        choices=[*STARTS, "random"],
        help="start of the attack; random is random2; zero is degenerate, its first gradient vanishes (ours) "
        "(default: random2; with querying random1)",
    )
    levels.add_argument("--beta", type=amount, default=6.0, help="weight of the robust term")
    levels.add_argument(
        "--awp_gamma", type=amount, default=0.005, help="relative radius of the weight perturbation (ours)"
    )
    levels.add_argument(
        "--pyramid_grids",
        type=natural,
        nargs="+",
        help="cells per side of each level, 0 for one per pixel (default: 4 8 0; with querying 0)",
    )
    levels.add_argument(
        "--pyramid_scalars",
        type=amount,
        nargs="+",
        help="what each level is multiplied by (default: 20 10 1; with querying 1)",
    )
    levels.add_argument(
        "--epsilon_warmup", type=natural, default=0, help="episodes over which epsilon grows from 0 (ours)"
    )
    parser.add_published()
    return parser


def check_training(args: argparse.Namespace) -> None:
    """Raise an `InputError` for flags that are well-formed one by one and wrong together."""
    base_arch(args.arch)
    grids, scalars = (_attack_default(args, name) for name in ("pyramid_grids", "pyramid_scalars"))
    if len(grids) != len(scalars):
        raise InputError(
            f"--pyramid_grids has {len(grids)} values and --pyramid_scalars {len(scalars)}, expected as many"
        )
    if args.eval:
        raise InputError("--eval: main.py trains; test_meta_dataset.py evaluates")
    check_distinct("base_sources", args.base_sources or ())
    check_distinct("val_sources", args.val_sources or ())
    check_episodes(args)


def autocast(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32."""
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None


def training_sources(args: argparse.Namespace) -> tuple[str, ...]:
    """The sources that main.py trains on."""
    return tuple(args.base_sources or folder_source(args) or TRAINING_SOURCES)


def method(args: argparse.Namespace) -> str:
    """How is trained, one of `METHODS`: without --pgd_method, that of the paper which --tune stands for."""
    return args.pgd_method or ("standard" if args.tune == "full" else "adsv")


def levels(args: argparse.Namespace) -> tuple[Perturbation, ...]:
    """One `Perturbation` for each value of --epsilon."""
    querying = method(args) == "querying"  # which moves no weights and has no second term in its loss
    start = _attack_default(args, "delta_init")
    return tuple(
        Perturbation(
            epsilon=epsilon,
            step_size=epsilon / 4 if args.alpha is None else args.alpha,
            steps=args.attack_iters,
            gamma=0.0 if querying else args.awp_gamma,
            beta=0.0 if querying else args.beta,
            grids=tuple(_attack_default(args, "pyramid_grids")),
            scalars=tuple(_attack_default(args, "pyramid_scalars")),
            start="random2" if start == "random" else start,
        )
        for epsilon in _attack_default(args, "epsilon")
    )


def _attack_default(args: argparse.Namespace, flag: str):
    """The value of a flag of the training attack, or if not given the default, which the method decides."""
    return _ATTACK_DEFAULTS[method(args)][flag] if getattr(args, flag) is None else getattr(args, flag)


def tune_settings(args: argparse.Namespace) -> TuneSettings:
    """How long and how fast to train."""
    return TuneSettings(
        epochs=args.epochs,
        episodes_per_epoch=args.nEpisode * len(training_sources(args)),
        lr=args.lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        momentum=args.momentum,
        method=method(args),
        clip_grad=args.clip_grad,
        epsilon_warmup=args.epsilon_warmup,
        seed=args.seed,
    )
