"""The flags that training and evaluation share, turned into how episodes are drawn and read."""

import argparse
from collections.abc import Sequence

from amt.cli.options.parsing import Parser
from amt.models.precision import Arithmetic
from meta_dataset_readers.command import add_image_prefix
from meta_dataset_readers.cores import available_cores, default_workers
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.protocol import MOST, EpisodeSampling
from meta_dataset_readers.settings import Number, add_flags, as_path, from_args, nonnegative

CDFSL_QUERIES = 15  # per class, in the benchmark's own evaluation

FOLDER_DATASETS = {"cifar_fs": "cifar_fs", "cifar_fs_elite": "cifar_fs", "mini_imagenet": "mini_imagenet"}

WAYS = Number(int, least=2, most=MOST)
COUNT = Number(int, least=1, most=MOST)
SIDE = Number(int, least=1, most=4096)  # px of an image
PROCESSES = Number(int, least=0, most=1024)
THREADS = Number(int, least=1, most=1024)
SEED = Number(int, least=0, most=2**62)
EPSILON = Number(float, least=0, most=10**6)  # in 1/255, of any norm


def add_overwrite(group) -> None:
    """Add the flag of every program that keeps a run in a directory."""
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in an output directory that holds a run, whose files are removed; without it the "
        "same settings continue what is there and others are refused",
    )


def add_saving(group) -> None:
    """Add the flags of every program that trains."""
    group.add_argument(
        "--save_every_minutes",
        type=nonnegative,
        default=10.0,
        help="time after which a checkpoint is written within an epoch; 0: only when an epoch ends",
    )
    group.add_argument(
        "--rank_timeout",
        type=Number(float, above=0, most=10**6),
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: how long processes wait for one that does not answer (ours)",
    )


def add_common(parser: Parser, sources: str, default: Sequence[str], split_help: str) -> None:
    """Add the flags that both programs have; theirs of sources are called differently."""
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", type=as_path, required=True, help="folder with one folder per source")
    data.add_argument(
        f"--{sources}", nargs="+", metavar="SOURCE", help=f"{split_help} (default: {' '.join(default)})"
    )
    data.add_argument(
        "--dataset",
        choices=["meta_dataset", *FOLDER_DATASETS],
        default="meta_dataset",
        help="the others stand for that source, with episodes by --nClsEpisode, --nSupport and --nQuery",
    )
    add_image_prefix(data)
    data.add_argument("--image_size", type=SIDE, help="side in pixels (default: the backbone's)")
    add_workers(data, "prepare episodes")
    data.add_argument(
        "--skip_bad_records",
        action="store_true",
        help="replace a damaged record by another image of its class, and count it, instead of stopping",
    )

    episodes = parser.add_argument_group("episodes")
    add_flags(episodes, EpisodeSampling)
    episodes.add_argument("--nClsEpisode", type=WAYS, default=5, help="ways with another --dataset")
    episodes.add_argument("--nSupport", type=COUNT, default=1, help="shots with another --dataset")
    episodes.add_argument("--nQuery", type=COUNT, default=15, help="queries with another --dataset")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_checkpoint",
        "--pretrained_weights",
        type=as_path,
        help="backbone weights, safetensors or an official .pth (default: shipped, or from timm's hub)",
    )
    add_weights_key(model)
    model.add_argument("--no_pretrain", action="store_true", help="start from random weights")
    add_compile(model)
    add_machine(parser, seed=0)


def add_compile(group: argparse._ArgumentGroup) -> None:
    """The flag that makes passes and attack steps faster."""
    group.add_argument(
        "--compile",
        action="store_true",
        help="make programs of passes and attack steps by torch.compile, on CUDA with CUDA graphs: for long "
        "runs, as the first episodes or images take longer; results differ in last digits (ours)",
    )


def add_workers(group: argparse._ArgumentGroup, work: str) -> None:
    """The flag of how many processes do the `work` of reading."""
    group.add_argument(
        "--num_workers",
        type=PROCESSES,
        default=default_workers(),
        help=f"processes that {work}; changes no result (default: a core less than this process may use, at "
        "most 8; here %(default)s)",
    )


def add_weights_key(parser: argparse._ActionsContainer) -> None:
    """The flag --weights_key."""
    parser.add_argument(
        "--weights_key",
        metavar="KEY",
        help="which network to take of a weights file that holds several, such as student; a wrong one lists "
        "those there are",
    )


def add_machine(parser: Parser, seed: int) -> argparse._ArgumentGroup:
    """Add the flags that every program has, and return their group."""
    machine = parser.add_argument_group("machine")
    add_dry_run(machine)
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one")
    machine.add_argument(
        "--threads",
        type=THREADS,
        help="CPU threads (default: torch's choice, within the cores and quota of the job); 1 is best for "
        "small networks or on a busy machine",
    )
    machine.add_argument("--seed", type=SEED, default=seed, help="decides everything random")
    add_flags(machine, Arithmetic, unset=("precision",))
    add_overwrite(machine)
    return machine


def add_dry_run(parser: argparse._ActionsContainer) -> None:
    """The flag --dry_run: None, or what an earlier command is going to make; see amt/cli/dry_run.py."""
    parser.add_argument(
        "--dry_run",
        type=as_path,
        nargs="*",
        metavar="MADE",
        help="check settings, weights and data, say what would run and what is missing, stop; each file or "
        "folder MADE counts as there, since an earlier command makes it",
    )


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
    fixed = {}
    if vars(args).get("dataset") in FOLDER_DATASETS:
        fixed = {"num_ways": args.nClsEpisode, "num_support": args.nSupport, "num_query": args.nQuery}
    elif vars(args).get("cdfsl_domains"):
        fixed = {"num_ways": args.test_n_way, "num_support": args.n_shot, "num_query": CDFSL_QUERIES}
    own = {name: value for name, value in fixed.items() if getattr(args, name) is None}
    if args.num_support is not None and len(args.num_support) == 1:
        own["num_support"] = args.num_support[0]
    return from_args(EpisodeSampling, args, **own)


def arithmetic(args: argparse.Namespace) -> Arithmetic:
    """How the command computes: --precision, or the published --fp16, and --deterministic.

    Raises:
        InputError: two precisions.
    """
    given = {name: f"--{name}" for name in ("fp16", "bf16") if vars(args).get(name)}
    if asked := vars(args).get("precision"):
        given.setdefault(asked, f"--precision {asked}")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given.values())} exclude each other")
    return from_args(Arithmetic, args, **({"precision": next(iter(given))} if given else {}))


def use_machine(args: argparse.Namespace) -> None:
    """Let torch use `--threads`, by default no more than there are cores for this process, and compute as
    `arithmetic` says."""
    import torch  # which a mistyped flag need not wait for

    torch.set_num_threads(args.threads or min(torch.get_num_threads(), available_cores()))
    arithmetic(args).use()


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
