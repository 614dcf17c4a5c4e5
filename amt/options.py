"""The command line: every flag once, checked once, turned into typed settings.

Flags are those of the published code, with dashes and underscores alike; `@FILE` reads flags from a file
(one or more to a line, # starts a comment). Knows no tensors, and of the disk only --domain_config and
whether --output_dir can be written to.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from amt.attacks import PGD_KINDS, Attack, autoattack_parts, parse_attack
from amt.backbone import base_arch
from amt.deploy import ROUTINGS, SELECTS, Deployment
from amt.domain_config import DomainSettings, parse_trim, read_domain_config
from amt.finetune import Finetuning
from amt.full_pool import FullPool
from amt.lora import LoRAPool, Trim
from amt.merge import AUGMENTATIONS, Routing
from amt.meta_tune import METHODS, TuneSettings
from amt.perturb import STARTS, Perturbation
from amt.published import POOL_EPSILONS
from amt.published_flags import is_published, n_values, reasons
from amt.select import BETAS, GAMMAS, published_grid
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.sampling import EpisodeSampling

TRAINING_SOURCES = (
    *("aircraft", "cu_birds", "dtd", "fungi"),
    *("ilsvrc_2012", "omniglot", "quickdraw", "vgg_flower"),
)
TEST_SOURCES = (
    *("traffic_sign", "mscoco", "ilsvrc_2012", "omniglot", "aircraft"),
    *("cu_birds", "dtd", "quickdraw", "fungi", "vgg_flower"),
)
_NEEDING_A_POOL = ("trim", "trim_candidates", "select_on", "domain_config")
_FLAGS = {"beta": "blend_beta", "gamma": "blend_gamma"}  # where a setting is not called as its flag
CDFSL_QUERIES = 15  # per class, in the benchmark's own evaluation
TUNED = (LoRAPool.tune, FullPool.tune)
_PYRAMID = {"pyramid_grids": (4, 8, 0), "pyramid_scalars": (20.0, 10.0, 1.0), "delta_init": "random2"}
_PGD = {"pyramid_grids": (0,), "pyramid_scalars": (1.0,), "delta_init": "random1"}
_ATTACK_DEFAULTS = {
    "adsv": {"epsilon": POOL_EPSILONS, **_PYRAMID},
    "querying": {"epsilon": (8.0,), **_PGD},
    "standard": {"epsilon": (0.0,), **_PYRAMID},
}
FOLDER_DATASETS = {"cifar_fs": "cifar_fs", "cifar_fs_elite": "cifar_fs", "mini_imagenet": "mini_imagenet"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, whose flags may be spelt with dashes, and that reads @FILEs."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            fromfile_prefix_chars="@",
            formatter_class=Help,
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return [spelling(word) for word in shlex.split(line, comments=True)]
        except ValueError as error:  # a quotation mark without its partner
            raise InputError(f"cannot read the flags {line!r}: {error}") from error

    def error(self, message: str) -> None:
        raise InputError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse flags; an `InputError` says what is wrong with the first bad one."""
        args = self.parse_args([spelling(word) for word in argv])
        for flag, reason in vars(args).pop("without_effect", {}).items():
            print(f"note: {flag} has no effect: {reason}", file=sys.stderr)
        return args

    def add_published(self) -> None:
        """Accept every flag of the published scripts that has no meaning here, as the last of all flags."""
        self.usage = "%(prog)s [@FILE ...] --data_path DIR --output_dir DIR [flags]"  # not all 130 of them
        group = self.add_argument_group("accepted from published command lines, without effect")
        for name, reason in reasons().items():
            if f"--{name}" not in self._option_string_actions:
                group.add_argument(
                    f"--{name}",
                    nargs=n_values(name),
                    action=WithoutEffect,
                    default=argparse.SUPPRESS,
                    metavar="X" if n_values(name) else None,
                    help=reason,
                )

    def _get_option_tuples(self, option_string: str) -> list:
        """What an abbreviation may stand for: of several flags the published one, if that is one."""
        found = super()._get_option_tuples(option_string)
        published = [match for match in found if is_published(match[1].lstrip("-"))]
        return published if len(published) == 1 else found


class WithoutEffect(argparse.Action):
    """Takes the values of a flag and remembers only that it was given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        given = vars(namespace).setdefault("without_effect", {})
        given[option_string] = self.help


def spelling(word: str) -> str:
    """A flag with its dashes as underscores; anything else as it is."""
    match = re.match(r"--[A-Za-z][\w-]*", word)
    return "--" + match[0][2:].replace("-", "_") + word[match.end() :] if match else word


def place(text: str) -> Path:
    """A path; an empty one is what a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small, expected at least 1")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative, expected at least 0")
    return value


def amount(text: str) -> float:
    """A finite number that is not negative."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not an amount, expected a number of at least 0")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no fraction, expected 0 to 1")
    return value


def shard(text: str) -> tuple[int, int]:
    """I/N with 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N with I from 0 to N - 1, such as 0/2")
    return int(match[1]), int(match[2])


def trim(text: str) -> Trim:
    """NAME:BLOCK:KEEP, as in qkv:-1:0.5."""
    try:
        return parse_trim(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _common(parser: Parser, sources: str, default: Sequence[str], split_help: str) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", type=place, required=True, help="folder with one folder per source")
    data.add_argument(
        f"--{sources}", nargs="+", metavar="SOURCE", help=f"{split_help} (default: {' '.join(default)})"
    )
    data.add_argument(
        "--dataset",
        choices=["meta_dataset", *FOLDER_DATASETS],
        default="meta_dataset",
        help="the others stand for that source, with episodes by --nClsEpisode, --nSupport and --nQuery",
    )
    data.add_argument(
        "--image_prefix",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="where the images of filelists written on another machine are (default: they are looked for)",
    )
    data.add_argument("--image_size", type=positive, help="side in pixels (default: the backbone's)")
    data.add_argument("--num_workers", type=natural, default=1, help="processes that prepare episodes")
    data.add_argument(
        "--skip_bad_records",
        action="store_true",
        help="replace a damaged record by another image of its class, and count it, instead of stopping",
    )

    episodes = parser.add_argument_group("episodes")
    episodes.add_argument("--num_ways", type=positive, help="fixed number of classes (default: variable)")
    episodes.add_argument(
        "--num_support",
        type=positive,
        nargs="+",
        metavar="K",
        help="fixed shots, or two numbers: one value drawn between them per episode (default: variable)",
    )
    episodes.add_argument("--num_query", type=positive, help="fixed queries per class (default: variable)")
    episodes.add_argument("--min_ways", type=positive, default=5, help="least ways when variable")
    episodes.add_argument("--max_ways_upper_bound", type=positive, default=50, help="most ways when variable")
    episodes.add_argument("--max_num_query", type=positive, default=10, help="most queries when variable")
    episodes.add_argument("--max_support_set_size", type=positive, default=500, help="when shots vary")
    episodes.add_argument(
        "--max_support_size_contrib_per_class", type=positive, default=100, help="when shots vary"
    )
    episodes.add_argument(
        "--min_examples_in_class", type=natural, default=0, help="leave smaller classes out"
    )
    episodes.add_argument("--min_log_weight", type=float, default=math.log(0.5), help="when shots vary")
    episodes.add_argument("--max_log_weight", type=float, default=math.log(2), help="when shots vary")
    for kind, what in (("dag", "below one node of ImageNet's graph"), ("bilevel", "of one alphabet")):
        episodes.add_argument(
            f"--ignore_{kind}_ontology", action="store_true", help=f"classes need not be {what}"
        )
    episodes.add_argument(
        "--ignore_hierarchy_probability", type=fraction, default=0.0, help="share of episodes that ignore it"
    )
    episodes.add_argument("--nClsEpisode", type=positive, default=5, help="ways with another --dataset")
    episodes.add_argument("--nSupport", type=positive, default=1, help="shots with another --dataset")
    episodes.add_argument("--nQuery", type=positive, default=15, help="queries with another --dataset")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_checkpoint",
        "--pretrained_weights",
        type=place,
        help="backbone weights, safetensors or an official .pth (default: shipped, or from timm's hub)",
    )
    model.add_argument("--no_pretrain", action="store_true", help="start from random weights")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one")
    machine.add_argument(
        "--threads",
        type=positive,
        help="CPU threads (default: torch's choice); 1 is best for small networks or on a busy machine",
    )
    machine.add_argument("--seed", type=natural, default=0, help="decides everything that is random")


def training_parser() -> Parser:
    """The flags of main.py."""
    parser = Parser("Meta-tune a pool, one LoRA or network per robustness level, under dual perturbation.")
    _common(parser, "base_sources", TRAINING_SOURCES, "sources to train on, drawn uniformly")
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
    parser.add_argument("--resume", type=place, help="a last.safetensors to continue exactly")
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


def add_merging(group: argparse._ArgumentGroup) -> None:
    """The flags that say how a pool becomes one network, wherever that is done."""
    group.add_argument(
        "--coefficients", type=amount, nargs="+", metavar="C", help="one number per adapter, summing to 1"
    )
    several = "; several values are for --select to choose from"
    group.add_argument(
        "--blend_beta",
        type=amount,
        nargs="+",
        metavar="BETA",
        help=f"sharpness of the scores{several} (default: 1, or with --select {_listed(BETAS)})",
    )
    group.add_argument(
        "--blend_gamma",
        type=amount,
        nargs="+",
        metavar="GAMMA",
        help=f"balance of intra and inter{several} (default: 0.6, or with --select {_listed(GAMMAS)})",
    )
    group.add_argument(
        "--top_k",
        type=positive,
        nargs="+",
        metavar="K",
        help=f"adapters that share the weight{several} (default: 2)",
    )
    group.add_argument(
        "--route_epsilon",
        type=amount,
        nargs="+",
        metavar="E",
        help="from clean to robust: score the adapters on support images attacked within E/255; 0: the "
        f"published scores, on clean ones{several} (default: 0; ours)",
    )
    group.add_argument("--aug_prob", type=fraction, default=0.9, help="chance of augmenting the support")
    group.add_argument(
        "--trim",
        type=trim,
        nargs="+",
        default=[],
        metavar="NAME:BLOCK:KEEP",
        help="keep a fraction of the singular values of these layers; block -1 for all",
    )


def _add_finetuning(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ada_steps",
        type=natural,
        default=100,
        help="steps of Adam; 100 is the published example's, 50 and 40 are elsewhere in that code",
    )
    group.add_argument(
        "--ada_lr",
        type=amount,
        default=1e-4,
        help="its rate, which matters most: 0.0001 is the published example's; per domain its authors choose "
        "one of 0, 0.0001, 0.001 and 0.01 on labelled episodes",
    )
    group.add_argument(
        "--aug_types",
        nargs="+",
        choices=AUGMENTATIONS,
        default=list(AUGMENTATIONS),
        help="how the support is augmented for it, with the chance --aug_prob (as published)",
    )


def testing_parser() -> Parser:
    """The flags of test_meta_dataset.py."""
    parser = Parser("Evaluate a pool per domain: route, merge, trim, classify; clean and under attack.")
    _common(parser, "test_sources", TEST_SOURCES, "domains to evaluate on, one after another")
    parser.add_argument(
        "--cdfsl_domains",
        nargs="+",
        metavar="SOURCE",
        help="domains of BSCD-FSL and fine-grained ones instead, --test_n_way --n_shot with 15 queries",
    )
    parser.add_argument("--test_n_way", type=positive, default=5, help="ways with --cdfsl_domains")
    parser.add_argument("--n_shot", type=positive, default=5, help="shots with --cdfsl_domains")
    parser.add_argument("--arch", required=True, help="backbone, for example vit_mini_amt_merge")
    parser.add_argument(
        "--resume", type=place, help="checkpoint, ours or a published .pth; none: the pretrained network"
    )
    parser.add_argument("--eval", action="store_true", help="what this script does anyway")
    parser.add_argument(
        "--deploy",
        choices=["vanilla", "merge-vanilla", "finetune"],
        help="vanilla: at most one adapter; merge-vanilla: a pool; finetune: as P>M>F, one network all of "
        "whose weights are tuned on each support set (default: vanilla or merge-vanilla, as --resume holds)",
    )
    parser.add_argument("--output_dir", type=place, required=True, help="where results.json and pictures go")
    parser.add_argument("--nTestEpisode", type=positive, default=600, help="episodes per domain")
    parser.add_argument("--split", choices=["TRAIN", "VALID", "TEST"], default="TEST")
    parser.add_argument(
        "--dump", type=place, metavar="DIR", help="also write every episode there, in Meta-Dataset's format"
    )

    attack = parser.add_argument_group("attack")
    attack.add_argument(
        "--attack",
        nargs="+",
        action="append",
        metavar=("NAME", "OPTION=VALUE"),
        help="any number of times: pgd, apgd, autoattack, square, pyramid, transfer (images made on the "
        "pretrained network) or support (its images are attacked, not the queries), with any of norm=l2, "
        "epsilon=1,2,4, steps=, restarts=, step_size=, loss=ce|kl|dlr, queries=, targets= "
        "(default: pgd)",
    )
    attack.add_argument(
        "--epsilon",
        type=amount,
        nargs="*",
        default=[8.0],
        help="in 1/255 of the pixel range, increasing, for attacks that name none; none: clean only",
    )
    attack.add_argument("--attack_iters", type=positive, default=20, help="steps of PGD")
    attack.add_argument(
        "--alpha", type=amount, help="step size of PGD in 1/255 (default: a quarter of each epsilon)"
    )
    attack.add_argument(
        "--probe_episodes",
        type=natural,
        default=2,
        help="episodes per domain on which the attacks themselves are checked; 0: none",
    )

    running = parser.add_argument_group("run")
    running.add_argument(
        "--samples", type=natural, default=1, help="episodes per domain whose images are kept for the report"
    )
    running.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do only part I (from 0) of N parts, in processes that share --output_dir "
        "(default: what torchrun says, else everything)",
    )
    for flag in ("--fp16", "--bf16"):
        parser.add_argument(
            flag,
            nargs=0,
            action=WithoutEffect,
            default=argparse.SUPPRESS,
            help="evaluation is in float32, as the attacks need it",
        )

    merging = parser.add_argument_group("merging")
    merging.add_argument(
        "--routing",
        choices=ROUTINGS,
        default="amt",
        help="amt: the published scores; uniform: equal shares; soup: factors A and B averaged separately; "
        "best: the single adapter that --select finds best",
    )
    merging.add_argument(
        "--specified_expert", type=natural, nargs="+", metavar="P", help="plain average of these adapters"
    )
    add_merging(merging)
    merging.add_argument(
        "--select",
        choices=SELECTS,
        default="none",
        help="choose beta, gamma and whatever has several values; valid: on labelled episodes of the "
        "domain's own VALID classes; support: for every task by leave-one-out on its support set; published: "
        "on 6 labelled episodes of the split that is scored, for comparison only",
    )
    merging.add_argument(
        "--select_on", metavar="SOURCE", help="--select valid, but on VALID episodes of this source"
    )
    merging.add_argument("--nSelectEpisode", type=positive, default=40, help="VALID episodes to choose on")
    merging.add_argument(
        "--trim_candidates",
        type=trim,
        nargs="+",
        default=[],
        metavar="NAME:BLOCK:KEEP",
        help="trimmings of which --select may add one",
    )
    merging.add_argument(
        "--domain_config",
        type=place,
        metavar="FILE.yaml",
        help="settings per domain, over these flags: beta, gamma, top_k, route_epsilon, trim, search_scale, "
        "search_step, candidate_pool (amt/domain_config.py)",
    )
    _add_finetuning(parser.add_argument_group("test-time fine-tuning, with --deploy finetune"))
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
    _check_distinct("base_sources", args.base_sources or ())
    _check_distinct("val_sources", args.val_sources or ())
    _check_episodes(args)


def check_testing(args: argparse.Namespace) -> None:
    """The same for the flags of test_meta_dataset.py."""
    base_arch(args.arch)
    given = [flag for flag in ("specified_expert", "coefficients") if getattr(args, flag) is not None]
    if len(given) > 1:
        raise InputError("--specified_expert and --coefficients exclude each other")
    needy = [*given, *(flag for flag in _NEEDING_A_POOL if getattr(args, flag))]
    needy += ["select"] if args.select != "none" else []
    if args.resume is None and needy:
        raise InputError(f"--{needy[0]} needs a pool; name its checkpoint with --resume")
    if args.deploy == "merge-vanilla" and args.resume is None:
        raise InputError("--deploy merge-vanilla needs a pool; name its checkpoint with --resume")
    _check_selection(args, given)
    if args.cdfsl_domains and args.test_sources:
        raise InputError("--cdfsl_domains and --test_sources exclude each other")
    sources = test_sources(args)
    if args.coefficients is not None and abs(sum(args.coefficients) - 1) > 1e-4:
        raise InputError(f"--coefficients sum to {sum(args.coefficients):g}, expected 1")
    if any(a >= b for a, b in itertools.pairwise(args.epsilon)):
        raise InputError(f"--epsilon {' '.join(f'{e:g}' for e in args.epsilon)}: expected increasing values")
    _check_distinct("test_sources", sources)
    _check_episodes(args)


def _check_selection(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Raise an `InputError` for a selection that cannot be, or would look at what it must not."""
    way = selection(args)
    if args.select_on and way != "valid":
        raise InputError(f"--select_on {args.select_on} is for --select valid, found --select {way}")
    if args.trim_candidates and way == "none":
        raise InputError("--trim_candidates are for --select to choose from, for example --select support")
    if given and args.routing != "amt":
        raise InputError(f"--{given[0]} and --routing {args.routing} exclude each other")
    if args.routing == "best" and way == "none":
        raise InputError("--routing best: which adapter is best has to be chosen, say by --select valid")
    scored = test_sources(args)
    if args.split == "VALID" and way == "valid" and (args.select_on is None or args.select_on in scored):
        on = f"--select_on {args.select_on}" if args.select_on else "--select valid"
        raise InputError(f"{on} would choose on the very VALID episodes it then scores")
    if any(args.route_epsilon or ()) and way != "support" and (given or args.routing != "amt"):
        raise InputError("--route_epsilon is for the scores of --routing amt, or for --select support")
    for flag in ("blend_beta", "blend_gamma", "top_k", "route_epsilon"):
        _check_distinct(flag, getattr(args, flag) or ())


def check_output(folder: Path) -> None:
    """Raise an `InputError` unless files can be written in `folder`, which is not made yet if missing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written to: {error.strerror}") from error


def _listed(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _check_distinct(flag: str, values: Sequence) -> None:
    if len(set(values)) < len(values):
        raise InputError(f"--{flag} names a value twice: {' '.join(map(str, values))}")


def _check_episodes(args: argparse.Namespace) -> None:
    if args.num_support is not None and len(args.num_support) > 2:
        raise InputError(
            f"--num_support has {len(args.num_support)} values, expected one, or a least and a most"
        )
    if args.min_ways > args.max_ways_upper_bound:
        raise InputError(
            f"--min_ways {args.min_ways} exceeds --max_ways_upper_bound {args.max_ways_upper_bound}"
        )


def autocast(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32."""
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None


def training_sources(args: argparse.Namespace) -> tuple[str, ...]:
    """The sources that main.py trains on."""
    return tuple(args.base_sources or _folder_source(args) or TRAINING_SOURCES)


def test_sources(args: argparse.Namespace) -> tuple[str, ...]:
    """The domains that test_meta_dataset.py evaluates on."""
    return tuple(args.cdfsl_domains or args.test_sources or _folder_source(args) or TEST_SOURCES)


def _folder_source(args: argparse.Namespace) -> list[str]:
    return [FOLDER_DATASETS[args.dataset]] if args.dataset in FOLDER_DATASETS else []


def sampling(args: argparse.Namespace) -> EpisodeSampling:
    """How episodes are drawn."""
    if args.dataset in FOLDER_DATASETS:
        fixed = args.nClsEpisode, [args.nSupport], args.nQuery
    elif vars(args).get("cdfsl_domains"):
        fixed = args.test_n_way, [args.n_shot], CDFSL_QUERIES
    else:
        fixed = None, None, None
    ways, shots, queries = (
        default if given is None else given
        for given, default in zip((args.num_ways, args.num_support, args.num_query), fixed, strict=True)
    )
    return EpisodeSampling(
        num_ways=ways,
        num_support=None if shots is None else shots[0] if len(shots) == 1 else tuple(shots),
        num_query=queries,
        min_ways=args.min_ways,
        max_ways_upper_bound=args.max_ways_upper_bound,
        max_num_query=args.max_num_query,
        max_support_set_size=args.max_support_set_size,
        max_support_size_contrib_per_class=args.max_support_size_contrib_per_class,
        min_examples_in_class=args.min_examples_in_class,
        min_log_weight=args.min_log_weight,
        max_log_weight=args.max_log_weight,
        ignore_dag_ontology=args.ignore_dag_ontology,
        ignore_bilevel_ontology=args.ignore_bilevel_ontology,
        ignore_hierarchy_probability=args.ignore_hierarchy_probability,
    )


def use_threads(args: argparse.Namespace) -> None:
    """Limit torch to `--threads`, if given."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def reading(args: argparse.Namespace, image_size: int) -> dict:
    """What every `EpisodeReader` of a run has in common, as its keyword arguments."""
    return {
        "root": args.data_path,
        "sampling": sampling(args),
        "image_size": image_size,
        "seed": args.seed,
        "skip_bad_records": args.skip_bad_records,
        "image_prefix": tuple(args.image_prefix) if args.image_prefix else None,
    }


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


def attacks(args: argparse.Namespace) -> tuple[Attack, ...]:
    """The attacks of evaluation.

    Raises:
        InputError: one of them makes no sense, or two have the same name.
    """
    epsilons = [epsilon for epsilon in args.epsilon if epsilon > 0]
    found = []
    for words in args.attack or ([["pgd"]] if epsilons else []):
        own = {word.partition("=")[0]: word.partition("=")[2] for word in words[1:]}
        linf = own.get("norm", "linf") == "linf"  # the norm that --epsilon and --alpha are meant in
        if not linf and "epsilon" not in own:
            raise InputError(f"--attack {' '.join(words)}: another norm than linf needs an epsilon=... too")
        defaults = {"epsilon": epsilons}
        if words[0] in PGD_KINDS:
            defaults |= {"steps": args.attack_iters, "step_size": args.alpha if linf else None}
        found.append(parse_attack(words, **defaults))
    _check_distinct("attack", [attack.name for attack in found])
    ways = sampling(args).num_ways or args.min_ways
    for attack in found:
        if attack.kind == "autoattack":
            autoattack_parts(ways, attack.targets)
    return tuple(found)


def part(args: argparse.Namespace) -> tuple[int, int]:
    """Which part of how many this process does.

    Raises:
        InputError: torchrun's variables make no sense.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return args.shard or shard(f"{rank}/{world}")
    except argparse.ArgumentTypeError as error:
        raise InputError(f"RANK/WORLD_SIZE is {error}") from error


def finetuning(args: argparse.Namespace) -> Finetuning:
    """The settings of `--deploy finetune`."""
    return Finetuning(args.ada_steps, args.ada_lr, args.aug_prob, tuple(args.aug_types))


def routing(args: argparse.Namespace) -> Routing:
    """The settings of the router.

    Raises:
        InputError: a flag has several values.
    """
    (found,) = _routings(args, DomainSettings(), "none", "")
    return found


def selection(args: argparse.Namespace) -> str:
    """How settings are chosen, one of `SELECTS`: --select_on SOURCE is a way of --select valid."""
    return "valid" if args.select_on and args.select == "none" else args.select


def deployments(args: argparse.Namespace) -> dict[str, Deployment]:
    """By test source how the pool is deployed there.

    Raises:
        InputError: --domain_config is at fault, there are several values and no --select, or a --select and
            nowhere anything to choose from.
    """
    sources, way = test_sources(args), selection(args)
    own = dict.fromkeys(sources, DomainSettings())
    if args.domain_config is not None:
        own = read_domain_config(args.domain_config, sources)
    found = {source: _deployment(args, own[source], source) for source in sources}
    open_to = [
        len(each.routings) > 1 or each.trim_candidates or each.routing == "best" for each in found.values()
    ]
    if way != "none" and not any(open_to):
        raise InputError(
            "--select or --select_on has nothing to choose from: expected --routing amt or best, several "
            "values of a flag, or --trim_candidates"
        )
    return found


def _deployment(args: argparse.Namespace, domain: DomainSettings, source: str) -> Deployment:
    way = selection(args)
    where = f"--domain_config {args.domain_config}: {source}: "
    if way == "none" and (domain.search_scale or domain.candidate_pool):
        field = "search_scale" if domain.search_scale else "candidate_pool"
        raise InputError(f"{where}{field} is for --select to choose from, found --select none")
    epsilons = domain.route_epsilon or args.route_epsilon or (Routing.epsilon,)
    routes = args.routing == "amt" and args.specified_expert is None and args.coefficients is None
    return Deployment(
        routing=args.routing,
        coefficients=None if args.coefficients is None else tuple(args.coefficients),
        experts=None if args.specified_expert is None else tuple(args.specified_expert),
        routings=_routings(args, domain, way, where) if routes else (),
        trims=tuple(args.trim if domain.trim is None else domain.trim),
        trim_candidates=tuple(
            args.trim_candidates if domain.candidate_pool is None else domain.candidate_pool
        ),
        select=way,
        select_on=args.select_on,
        select_episodes=args.nSelectEpisode,
        support_epsilon=max(epsilons) if way == "support" else 0.0,
        split=args.split,
        single=args.deploy == "vanilla",
        finetune=finetuning(args) if args.deploy == "finetune" else None,
    )


def _routings(args: argparse.Namespace, domain: DomainSettings, way: str, where: str) -> tuple[Routing, ...]:
    """The routers' settings: a domain's own before those of the flags, or what there is to choose from."""
    values = {
        "beta": args.blend_beta or (BETAS if way != "none" else (Routing.beta,)),
        "gamma": args.blend_gamma or (GAMMAS if way != "none" else (Routing.gamma,)),
        "top_k": args.top_k or (Routing.top_k,),
        "route_epsilon": args.route_epsilon or (Routing.epsilon,),
    }
    own = {name: getattr(domain, name) for name in values if getattr(domain, name)}
    if domain.search_scale:
        own["beta"], own["gamma"] = published_grid(domain.search_scale, domain.search_step)
    values |= own
    several = [name for name, found in values.items() if len(found) > 1]
    if way == "none" and several:
        name = several[0]
        flag = f"{where}{name}" if name in own else f"--{_FLAGS.get(name, name)}"
        raise InputError(
            f"{flag} has {len(values[name])} values, expected one; among several chooses --select of "
            "test_meta_dataset.py"
        )
    return tuple(
        Routing(beta, gamma, top_k, args.aug_prob, epsilon)
        for top_k, epsilon, beta, gamma in itertools.product(
            *(values[name] for name in ("top_k", "route_epsilon", "beta", "gamma"))
        )
    )
