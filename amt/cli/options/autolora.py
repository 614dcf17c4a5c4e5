"""The flags of `autolora`: those of the two published scripts with their meanings, and ours, as settings.
Knows no tensors.

The published defaults depend on the script: AutoLoRa.py is for 32 to 96 px, AutoLoRa_high_resolution.py for
224 px. Here `--resolution` says which, and follows from the data and the flags where it is not given.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from amt.attacks.kinds import WORST_CASE, Attack, parse_attack
from amt.cli.options.common import COUNT, SIDE, add_machine, add_saving, add_weights_key, add_workers
from amt.cli.options.parsing import Parser, check_distinct
from amt.cli.options.published_settings import PublishedSettings, published_settings
from amt.files import ranks
from amt.files.pretrainings import PRETRAININGS, published_name
from amt.training.autolora_settings import METHODS, MODES, Adversary, Settings
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.settings import add_flags, as_path, flag_of, from_args

INSIDE = 224  # px that smaller images are enlarged to inside a network for high resolutions
# 1/255: a smaller epsilon is meant in parts of the pixel range, as the published scripts have it; a radius of
# the L2 norm between the two may be either.
FRACTIONS, SMALLEST_L2 = 0.5, 16

# Published flags that nothing here needs: reason -> flags.
WITHOUT_EFFECT = {
    "the data set has one name, --dataset": "data_name",
    "everything is written to --output": "log_root affix",
    "never used by the method": "beta_unlabel occupy",
    "the last state and the best weights are always kept": "save_all n_checkpoint_step",
    "an epoch is looked at when it ends": "n_eval_step test_frequency",
    "the report shows images": "n_store_image_step",
    "training is adversarial in any case": "adv_train",
}
_FLAGS_ALONE = ("occupy", "save_all", "adv_train")


def parser() -> Parser:
    """The flags of the command."""
    parser = Parser(
        "Fine-tune a robustly pretrained network by AutoLoRa, and test it clean and under attack.",
        "python main.py autolora",
    )
    parser.usage = "%(prog)s --dataset NAME --data DIR --arch NAME --checkpoint FILE --output DIR [flags]"
    _add_data(parser.add_argument_group("data"))
    _add_network(parser.add_argument_group("network"))
    _add_method(parser.add_argument_group("method"))
    training = parser.add_argument_group("training")
    add_flags(training, Settings, unset=("epochs", "batch_size", "lr", "weight_decay", "milestones"))
    add_flags(training, Adversary)
    _add_testing(parser.add_argument_group("testing"))
    machine = add_machine(parser, seed=1)
    machine.add_argument(
        "--output", "--output_dir", "--model_root", type=as_path, help="where everything is written"
    )
    add_saving(machine)
    machine.add_argument("--experiment", help="the published name for an output of checkpoints/NAME")
    machine.add_argument("--gpu", "-g", help="the published name for --device cuda:N")
    parser.add_without_effect(
        {
            flag: (0 if flag in _FLAGS_ALONE else 1, reason)
            for reason, flags in WITHOUT_EFFECT.items()
            for flag in flags.split()
        }
    )
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        default="cifar10",
        help="cifar10, cifar100, stl10, dtd, dogs, cub, caltech101, caltech256, cars, aircraft, flowers, "
        "food101, or imagefolder: train/CLASS/* and test/CLASS/*, or class folders alone",
    )
    group.add_argument(
        "--data", "--data_root", type=as_path, default=Path("data"), help="where it lies on the disk"
    )
    group.add_argument("--resize", type=SIDE, help="side in pixels of the images (default: by data set)")
    group.add_argument(
        "--val",
        type=float,
        default=0.1,
        help="share of the training images, of every class, that learning rate, restores and the reported "
        "epoch are decided on",
    )
    group.add_argument("--num_classes", type=COUNT, help="outputs of the head (default: as many as classes)")
    add_workers(group, "read images")


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--arch",
        "--model",
        "--model_arch",
        default="resnet18",
        help="resnet18, resnet34, resnet50 (or r18, r34, r50), wrn28-10, vit_small, vit_base, deit_tiny, "
        "deit_small, or timm:NAME",
    )
    group.add_argument("--checkpoint", "--model_path", type=as_path, help="a robustly pretrained network")
    group.add_argument(
        "--load_checkpoint", type=as_path, help="the published name for --checkpoint beside --todo test"
    )
    add_weights_key(group)
    group.add_argument("--no_pretrain", action="store_true", help="start from random weights")
    group.add_argument(
        "--pretraining",
        metavar="NAME",
        help=f"what the file was made by, of {', '.join(PRETRAININGS)} (default: its content tells)",
    )
    group.add_argument(
        "--resolution",
        choices=["low", "high"],
        help="schedules and augmentation for up to 96 px, or for 224 px, which smaller images are enlarged "
        "to inside the network (default: by --resize; high for transformers and the flags of the published "
        "high-resolution script)",
    )
    group.add_argument("--dualBN", type=int, choices=[0, 1], default=0, help="1: two BatchNorm sets")


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--mode",
        choices=["ALL", *MODES],
        help="SLF, ALF: only the classifier, on clean or attacked images; AFF: everything; ALL: one after "
        "the other, each from the checkpoint (default: AFF; with the published --experiment ALL)",
    )
    group.add_argument("--autolora", action="store_true", help="the published flag for what is the default")
    group.add_argument(
        "--autoLR", type=int, choices=[0, 1], help="1: learning rate by the schedule (default: with autolora)"
    )
    group.add_argument(
        "--auto_scalars",
        type=int,
        choices=[0, 1],
        help="1: weights of the loss by the schedule (default: with autolora)",
    )
    fields = (
        "method",
        "natural_share",
        "scale",
        "divide",
        "rank",
        "whole_passes",
        "published",
        "twins_share",
    )
    add_flags(group, Settings, *fields, unset=("natural_share",))


def _add_testing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num_steps_test", type=COUNT, help="PGD steps (default: 20; high: 10)")
    group.add_argument("--test_batch_size", type=COUNT, default=128)
    group.add_argument("--eval_only", action="store_true", help="test --checkpoint, which has its head")
    group.add_argument(
        "--todo", choices=["train", "valid", "test"], default="train", help="other than train: --eval_only"
    )
    group.add_argument("--eval_AA", action="store_true", help="also under AutoAttack")
    group.add_argument(
        "--attack",
        nargs="+",
        action="append",
        metavar=("NAME", "OPTION=VALUE"),
        help="any number of times: pgd, apgd, fab, autoattack, square, strong; see test_meta_dataset.py "
        "--help (default: pgd, loss=ce+dlr; with --published or a published script's own flags loss=ce)",
    )
    group.add_argument(
        "--eval_OOD", action="store_true", help="also under common corruptions: --corruptions, or made here"
    )
    group.add_argument("--corruptions", type=as_path, help="folder of CIFAR-10-C or CIFAR-100-C")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked once, with every default filled in that depends on others.

    Raises:
        InputError: a flag is unknown, or wrong by itself or beside another.
    """
    args = parser().parse(argv)
    _translate_published(args)
    _check(args)
    high_script = _is_high_script(argv)
    _fill_in_sizes(args, high_script)
    as_published = args.published or args.experiment is not None or high_script
    args.test_loss = "ce" if as_published else WORST_CASE
    if 0 < args.epsilon < FRACTIONS:
        args.epsilon, args.step_size = _from_fraction(args.epsilon), _from_fraction(args.step_size)
    return args


def _translate_published(args: argparse.Namespace) -> None:
    """Put published flags in the terms of ours."""
    args.mode = args.mode or ("AFF" if args.experiment is None else "ALL")
    args.eval_only |= args.todo != "train"
    args.eval_AA |= args.todo == "test"
    if args.todo == "test" and args.load_checkpoint is not None:
        args.checkpoint = args.load_checkpoint
    if args.experiment is not None and args.output is None:
        args.output = Path("checkpoints") / args.experiment
    if args.gpu is not None and args.device == "auto":
        args.device = f"cuda:{args.gpu.partition(',')[0]}"
    if args.pretraining is not None:
        args.pretraining = published_name(args.pretraining)


def _check(args: argparse.Namespace) -> None:
    """Raise an `InputError` for flags that are well-formed one by one and wrong together."""
    ambiguous = args.perturbation_type == "l2" and FRACTIONS <= args.epsilon < SMALLEST_L2
    wrong = {
        "--output is missing: the folder that everything is written to": args.output is None,
        "--checkpoint is missing: a file to start from (or --no_pretrain)": args.checkpoint is None
        and (args.eval_only or not args.no_pretrain),
        "--checkpoint and --no_pretrain: give one of them": args.checkpoint is not None and args.no_pretrain,
        f"--val is {args.val:g}, expected more than 0 and at most 0.5 (the published 0 validates on the "
        "training images)": not 0 < args.val <= 0.5,
        "--r_nat is 0: without a low-rank branch it is --method vanilla": args.r_nat == 0
        and args.method == "autolora",
        "--corruptions: is read with --eval_OOD": args.corruptions is not None and not args.eval_OOD,
        f"--epsilon {args.epsilon:g}: of l2 is ambiguous, expected 1/255, such as 128": ambiguous,
        f"--seed {args.seed}: expected less than 2^62": args.seed >= 2**62,
        "--eval_AA: needs an --epsilon above 0": args.eval_AA and not args.epsilon,
        f"--precision {args.precision}: the published method has no mixed precision; expected float32 or "
        "tf32": args.precision in ("bf16", "fp16"),
    }
    for message, is_so in wrong.items():
        if is_so:
            raise InputError(message)


def _is_high_script(argv: list[str]) -> bool:
    """Whether flags have the names that only the published script for high resolution gives them."""
    own = ("__model_arch", "__model_path", "__model_root")
    return any(word.replace("-", "_").startswith(own) for word in argv)


def _fill_in_sizes(args: argparse.Namespace, high_script: bool) -> None:
    """The size of the images by the data set, and the resolution that follows from it."""
    from amt.data.datasets import known  # these bring torch, which --help need not wait for
    from amt.models.architectures import LARGE

    entry = known(args.dataset)
    args.resize = args.resize or entry.image_size
    if args.resolution is None:
        transformer = args.arch.startswith(("vit", "deit", "timm:vit", "timm:deit")) or "_patch" in args.arch
        args.resolution = "high" if high_script or transformer or args.resize >= LARGE else "low"


def _from_fraction(value: float) -> float:
    """1/255 of the pixel range from its parts, where 0.0314 and 0.00784 are meant as 8 and 2; a value that
    was in 1/255 already stays."""
    if value >= FRACTIONS:
        return value
    units = 255 * value
    return float(round(units)) if abs(units - round(units)) < 0.02 else units


def high(args: argparse.Namespace) -> bool:
    """Whether schedules and augmentation are those for 224 px."""
    return args.resolution == "high"


def inside(args: argparse.Namespace) -> int | None:
    """The side that images are enlarged to inside the network, if they are."""
    from amt.models.architectures import LARGE

    return INSIDE if high(args) and args.resize < LARGE else None


def large_crops(args: argparse.Namespace) -> bool:
    """Whether images are read as those of 224 px are; smaller ones go whole to where they are enlarged."""
    return high(args) and inside(args) is None


def modes(args: argparse.Namespace) -> tuple[str, ...]:
    """What is trained, one after another."""
    return MODES if args.mode == "ALL" else (args.mode,)


def check_ranks(args: argparse.Namespace) -> None:
    """Raise an `InputError` for what several ranks cannot do together."""
    _, world = ranks.place()
    if world == 1:
        return
    if args.eval_only:
        raise InputError(f"--eval_only is for one process, and there are {world} ranks")
    if args.published and args.dualBN:
        raise InputError(f"--published --dualBN 1 is for one process, and there are {world} ranks")
    smallest = min(settings(args, mode).batch_size for mode in modes(args))
    if smallest < world:
        raise InputError(f"{world} ranks for --batch_size {smallest}: start at most {smallest}")


def settings(args: argparse.Namespace, mode: str) -> Settings:
    """How one mode is trained."""
    full = mode == "AFF"
    automatic = args.method == "autolora"
    auto_lr = bool(args.autoLR) if args.autoLR is not None else args.autolora or automatic
    auto_weights = bool(args.auto_scalars) if args.auto_scalars is not None else automatic
    own = _defaults(args, mode, auto_lr)
    flags = {field.name: flag_of(field) for field in dataclasses.fields(Settings)}
    own = {name: value for name, value in own.items() if getattr(args, flags[name]) is None}
    if args.decreasing_lr is None and "milestones" not in own:
        own["milestones"] = milestones(args, args.epochs or own["epochs"])
    return from_args(
        Settings,
        args,
        **own,
        mode=mode,
        method=args.method if full else METHODS[0],
        adversary=adversary(args, mode),
        auto_lr=auto_lr,
        auto_weights=full and auto_weights,
        rank=args.r_nat or Settings.rank,
        dual_norms=bool(args.dualBN) and full,
        high_resolution=high(args),
        whole_passes=args.whole_passes or args.published,
    )


def _defaults(args: argparse.Namespace, mode: str, auto_lr: bool) -> dict[str, Any]:
    """Settings that no flag gives, by the field's name, by resolution, mode and published tables."""
    full = mode == "AFF"
    found: dict[str, Any] = {
        "batch_size": 128,
        "natural_share": 0.5 if full and args.method == "autolora" else 1.0,
    }
    if high(args):
        return found | {"epochs": 60, "lr": 0.01, "weight_decay": 1e-4}
    found |= {"epochs": 50 if auto_lr else 25, "lr": 0.1 if full or auto_lr else 0.01, "weight_decay": 2e-4}
    table = published(args, mode, auto_lr)
    if table is None:
        return found
    # Without --pretraining, or with an automatic rate, only the batches are as published.
    return found | (table._asdict() if args.pretraining and not auto_lr else {"batch_size": table.batch_size})


def published(args: argparse.Namespace, mode: str, automatic: bool) -> PublishedSettings | None:
    """What the published tables for low resolution say; None for data that they do not have."""
    from amt.data.datasets import known

    name = args.pretraining or "ACL"
    return published_settings(name, known(args.dataset).name, args.resize, mode, automatic)


def milestones(args: argparse.Namespace, epochs: int) -> tuple[int, ...]:
    """The ordinary schedule: after 15 and 20 of 25 epochs; at high resolution after 30 and 50 of 60."""
    shares = (30 / 60, 50 / 60) if high(args) else (15 / 25, 20 / 25)
    return tuple(round(share * epochs) for share in shares)


def adversary(args: argparse.Namespace, mode: str) -> Adversary:
    """The attack of training."""
    start = "gaussian" if mode == "AFF" else "uniform"
    if high(args) or args.perturbation_type == "l2":
        start = "uniform_valid"
    return from_args(Adversary, args, start=start)


def examiner(args: argparse.Namespace) -> Adversary:
    """The attack of validation."""
    steps = args.num_steps_test or (10 if high(args) else 20)
    return dataclasses.replace(adversary(args, "ALF"), steps=steps)


def attacks(args: argparse.Namespace) -> tuple[Attack, ...]:
    """The attacks of testing.

    Raises:
        InputError: one of them makes no sense, or two have the same name.
    """
    norm = args.perturbation_type
    found = [
        parse_attack(words, epsilon=(args.epsilon,), norm=norm)
        for words in args.attack or ([["pgd", f"loss={args.test_loss}"]] if args.epsilon else [])
    ]
    if not args.attack:
        step = None if args.step_size == args.epsilon / 4 else args.step_size
        found = [dataclasses.replace(attack, steps=examiner(args).steps, step_size=step) for attack in found]
    if args.eval_AA:
        found.append(Attack("autoattack", (args.epsilon,), norm))
    check_distinct("attack", [attack.name for attack in found])
    return tuple(found)
