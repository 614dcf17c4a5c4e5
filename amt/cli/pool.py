"""Assemble checkpoints of single LoRAs, ours or published, or of complete networks, into one pool.

    python -m amt pool A B C D --out POOL.safetensors
    python -m amt pool A B C D --out POOL.safetensors --epsilon 8 6 0.1 0.01
    python -m amt pool FILE --statistics --data_path DIR --base_sources SOURCE --out POOL.safetensors

The members come in the order of the files. LoRAs must have been trained on one pretrained network, which is
seen from the residual they share, with one rank and on the same layers; complete networks must be of one
architecture. A file of several members adds all of them, so that a published pool of any size can be given
its levels. --statistics adds the covariances that heads such as robust-lda need, measured on TRAIN episodes
of the meta-training sources (docs/explanation/robust-lda.md). Without it, those that all files hold are kept.
--head and --coefficients write down what `amt predict` uses unless it is told otherwise.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from amt.cli import head_statistics, options
from amt.cli.head_statistics import RECOMMENDATIONS
from amt.cli.options import Parser
from amt.cli.options.common import SIDE, THREADS, check_episodes
from amt.evaluation.deploy import check_fit
from amt.evaluation.needs import check_heads
from amt.evaluation.settings import Deployment
from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.files.pretrained import load_network
from amt.files.shipped import as_pool
from amt.models.heads import PoolStatistics
from amt.models.network import find_device
from amt.models.pool import Pool
from meta_dataset_readers.errors import InputError, blaming, say
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.settings import add_flags, as_path, nonnegative, nonnegative_int


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt pool")
    parser.add_argument(
        "files",
        type=as_pool,
        nargs="+",
        metavar="FILE",
        help="checkpoints, ours or published, or names of pools in the box",
    )
    parser.add_argument("--out", type=as_path, required=True, help="the pool, a .safetensors")
    parser.add_argument(
        "--epsilon",
        type=nonnegative,
        nargs="+",
        help="what the members were trained for, in 1/255 of the pixel range (default: what the files say)",
    )
    options.add_head(parser, "", "what the file recommends")
    add_flags(parser, Deployment, "coefficients")
    add_measuring(parser)
    args = parser.parse(argv)
    check(args)
    if args.out.suffix != ".safetensors":
        raise InputError(f"--out {args.out}: expected a name that ends in .safetensors")
    found = [checkpoint.load(path) for path in args.files]
    pool = concat(args.files, found)
    if args.epsilon is not None:
        pool = with_epsilons(pool, args.epsilon)
    else:
        for path, each in zip(args.files, found, strict=True):
            checkpoint.require_levels(path, each)
    about = {
        **checkpoint.provenance(),
        "assembled_from": [
            {"file": path.name, "adapters": len(each.pool), "kind": each.about.get("published", "ours")}
            for path, each in zip(args.files, found, strict=True)
        ],
    }
    archs = {each.about.get("arch") for each in found}
    if len(archs) == 1 and None not in archs:
        about["arch"] = archs.pop()
    saved = joined(args.files, found, Checkpoint(pool, about))
    saved = measured(args, saved) if args.statistics else saved
    saved = recommending(args, saved)
    checkpoint.save(args.out, saved)
    levels = ", ".join(f"{level.epsilon:g}" for level in pool.levels)
    kind = "complete networks" if pool.rank is None else f"LoRAs of rank {pool.rank}"
    kind += " with LayerNorms" * (pool.tune == "lora+norm")
    heads = ", with statistics for heads" if saved.statistics is not None else ""
    say(f"wrote {args.out}: {len(pool)} {kind}, epsilon {levels} (of 255){heads}")
    return 0


def add_measuring(parser: Parser) -> None:
    """The flags of --statistics."""
    group = parser.add_argument_group("statistics for heads")
    group.add_argument("--statistics", action="store_true", help="measure them, and add them to the pool")
    group.add_argument("--data_path", type=as_path, help="folder with one folder per source")
    group.add_argument("--base_sources", nargs="+", metavar="SOURCE", help="the meta-training sources")
    group.add_argument("--arch", help="backbone (default: what the files say)")
    group.add_argument(
        "--pretrained_checkpoint", type=as_path, help="its weights (default: shipped, or from timm's hub)"
    )
    options.add_weights_key(group)
    group.add_argument("--image_size", type=SIDE, help="side in pixels (default: the backbone's)")
    options.add_statistics(group, default=20)
    add_flags(group, EpisodeSampling)
    options.add_workers(group, "read images")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    group.add_argument("--threads", type=THREADS, help="CPU threads (default: torch's choice)")
    group.add_argument("--seed", type=nonnegative_int, default=0, help="of episodes and random starts")


def check(args: argparse.Namespace) -> None:
    """Raise an `InputError` for --statistics without what it needs, and for a --head that makes no sense."""
    options.single_head(args)
    if not args.statistics:
        return
    for flag in ("data_path", "base_sources"):
        if not getattr(args, flag):
            raise InputError(f"--statistics needs --{flag}: it measures on TRAIN episodes")
    if args.statistics_episodes == 0:
        raise InputError("--statistics_episodes is 0, expected a positive integer with --statistics")
    check_episodes(args)


def joined(files: Sequence[Path], found: Sequence[Checkpoint], saved: Checkpoint) -> Checkpoint:
    """The assembled pool with the statistics of its members, if every file has them."""
    parts = [each.statistics for each in found if each.statistics is not None]
    if not parts:
        return saved
    dims = {part.source.shape[-1] for part in parts}
    if len(parts) < len(found) or len(dims) > 1:
        lacking = next(
            (path for path, each in zip(files, found, strict=True) if each.statistics is None), None
        )
        reason = f"{lacking} has none" if lacking else "they are of different numbers of features"
        say(f"note: statistics for heads are left out: {reason}; --statistics measures them")
        return saved
    notes = [each.about.get("statistics") for each in found]
    about = saved.about | {"statistics": notes[0] if len(notes) == 1 else notes}
    if len(found) == 1:
        about |= {name: found[0].about[name] for name in RECOMMENDATIONS if name in found[0].about}
    return dataclasses.replace(saved, statistics=PoolStatistics.concat(parts), about=about)


def recommending(args: argparse.Namespace, saved: Checkpoint) -> Checkpoint:
    """The pool with notes of the head and the coefficients that the flags name.

    Raises:
        InputError: the head needs what the pool does not have, or the coefficients do not fit.
    """
    notes, where = {}, str(args.files[0])
    if args.head is not None:
        head, known = options.single_head(args), saved.statistics
        check_heads([head], saved.pool, known, where, 0 if known is None else known.source.shape[-1])
        notes["head"] = head.name
    if args.coefficients is not None:
        check_fit(Deployment(coefficients=args.coefficients), saved.pool, where)
        notes["coefficients"] = list(args.coefficients)
    return dataclasses.replace(saved, about=saved.about | notes)


def measured(args: argparse.Namespace, saved: Checkpoint) -> Checkpoint:
    """The pool with statistics measured anew."""
    options.use_machine(args)
    network = load_network(
        checkpoint.arch_of(args.files[0], saved.about, saved.pool.shapes, args.arch),
        args.pretrained_checkpoint,
        find_device(args.device),
        image_size=args.image_size,
        key=args.weights_key,
        tell=say,
    )
    checkpoint.check_architecture(args.files[0], saved.pool, network.weights, network.arch)
    open_source = partial(
        EpisodeReader,
        root=args.data_path,
        sampling=options.sampling(args),
        image_size=network.image_size,
        seed=args.seed,
    )
    episodes = head_statistics.train_episodes(
        open_source, args.base_sources, args.statistics_episodes, args.seed
    )
    return head_statistics.with_statistics(
        saved, network, episodes, args.base_sources, args.seed, args.num_workers
    )


def concat(files: Sequence[Path], found: Sequence[Checkpoint]) -> Pool:
    """All members in one pool, in order.

    Raises:
        InputError: two files do not belong together; it names them and the tensor.
    """
    for path, each in zip(files[1:], found[1:], strict=True):
        with blaming(f"{files[0]} and {path}"):
            Pool.concat([found[0].pool, each.pool])
    return Pool.concat([each.pool for each in found])


def with_epsilons(pool: Pool, epsilons: Sequence[float]) -> Pool:
    """The pool with its levels at these bounds in 1/255, their steps a quarter of them.

    Raises:
        InputError: there are more or fewer of them than LoRAs.
    """
    if len(epsilons) != len(pool):
        raise InputError(f"--epsilon has {len(epsilons)} values, the files hold {len(pool)} LoRAs")
    return dataclasses.replace(
        pool,
        levels=tuple(
            dataclasses.replace(level, epsilon=epsilon, step_size=epsilon / 4)
            for level, epsilon in zip(pool.levels, epsilons, strict=True)
        ),
    )
