"""Assemble checkpoints of single LoRAs, ours or published, or of complete networks, into one pool.

    python -m amt pool A B C D --out POOL.safetensors
    python -m amt pool A B C D --out POOL.safetensors --epsilon 8 6 0.1 0.01

The members come in the order of the files. LoRAs must have been trained on one pretrained network, which is
seen from the residual they share, with one rank and on the same layers; complete networks must be of one
architecture. A file of several members adds all of them, so that a published pool of any size can be given
its levels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from amt.cli.options import Parser
from amt.files import checkpoint
from amt.files.checkpoint import Checkpoint
from amt.models.pool import Pool
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.settings import as_path, nonnegative


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt pool")
    parser.add_argument(
        "files", type=as_path, nargs="+", metavar="FILE", help="checkpoints, ours or published"
    )
    parser.add_argument("--out", type=as_path, required=True, help="the pool, a .safetensors")
    parser.add_argument(
        "--epsilon",
        type=nonnegative,
        nargs="+",
        help="what the members were trained for, in 1/255 of the pixel range (default: what the files say)",
    )
    args = parser.parse(argv)
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
    checkpoint.save(args.out, Checkpoint(pool, about))
    levels = ", ".join(f"{level.epsilon:g}" for level in pool.levels)
    kind = "complete networks" if pool.rank is None else f"LoRAs of rank {pool.rank}"
    say(f"wrote {args.out}: {len(pool)} {kind}, epsilon {levels} (of 255)")
    return 0


def concat(files: Sequence[Path], found: Sequence[Checkpoint]) -> Pool:
    """All members in one pool, in order.

    Raises:
        InputError: two files do not belong together; it names them and the tensor.
    """
    for path, each in zip(files[1:], found[1:], strict=True):
        try:
            Pool.concat([found[0].pool, each.pool])
        except ValueError as error:
            raise InputError(f"{files[0]} and {path}: {error}") from error
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
