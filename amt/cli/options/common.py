"""The flags that training and evaluation share, turned into how episodes are drawn and read."""

import argparse
import math
from collections.abc import Sequence

import torch

from amt.cli.options.parsing import Parser, amount, fraction, natural, place, positive
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.sampling import EpisodeSampling

CDFSL_QUERIES = 15  # per class, in the benchmark's own evaluation


FOLDER_DATASETS = {"cifar_fs": "cifar_fs", "cifar_fs_elite": "cifar_fs", "mini_imagenet": "mini_imagenet"}


def add_overwrite(group) -> None:
    """Add the flag of every program that keeps a run in a directory."""
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in an output directory that holds a run, whose files are removed; without it the "
        "same settings continue what is there and others are refused",
    )


def add_saving(group) -> None:
    """Add the flag of every program that trains."""
    group.add_argument(
        "--save_every_minutes",
        type=amount,
        default=10.0,
        help="time after which a checkpoint is written within an epoch; 0: only when an epoch ends",
    )


def add_common(parser: Parser, sources: str, default: Sequence[str], split_help: str) -> None:
    """Add the flags that both programs have; theirs of sources are called differently."""
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
    add_overwrite(machine)


def check_episodes(args: argparse.Namespace) -> None:
    """Raise an `InputError` for numbers of ways or shots that make no sense together."""
    if args.num_support is not None and len(args.num_support) > 2:
        raise InputError(
            f"--num_support has {len(args.num_support)} values, expected one, or a least and a most"
        )
    if args.min_ways > args.max_ways_upper_bound:
        raise InputError(
            f"--min_ways {args.min_ways} exceeds --max_ways_upper_bound {args.max_ways_upper_bound}"
        )


def folder_source(args: argparse.Namespace) -> list[str]:
    """The source that --dataset stands for, if it is not Meta-Dataset."""
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
