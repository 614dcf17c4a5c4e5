"""Write a pool, or the network it becomes for one task, in the formats of other tools.

    python -m amt export POOL --to timm --support FOLDER --out net.safetensors    a state dict for timm
    python -m amt export POOL --to timm --support FOLDER --out NET                a folder for timm, and a hub
    python -m amt export POOL --to peft --adapter 0 --out ADAPTER                 a folder for PEFT
    python -m amt export POOL --to onnx --coefficients 0.7 0.3 0 0 --out net.onnx pixels in, features out
    python -m amt export POOL --to torch --support FOLDER --out net.pt2           the same for torch.export
    python -m amt export POOL --to published --out pool.pth                       for the authors' own code

One network of a pool is one adapter, a mixture by given coefficients, or what `amt predict` merges for the
task whose labelled images are in FOLDER, in one folder per class. With --support the head that `amt predict`
classifies by is written as well, and the networks of onnx and torch return logits.
What goes in, what comes out and how to load it is said in a README.txt beside every export.
"""

import argparse
import dataclasses
import logging
from collections.abc import Sequence

from amt.cli import options
from amt.cli.options import Parser, texts
from amt.cli.predict import merging
from amt.evaluation.deploy import check_fit
from amt.evaluation.dilution import dilution
from amt.evaluation.settings import Deployment
from amt.few_shot import pictures
from amt.few_shot.fitting import fit_pictures, fit_texts
from amt.few_shot.pools import OpenPool, network_of
from amt.files import checkpoint, export
from amt.files.export import FORMATS
from amt.files.pretrained import load_network
from amt.files.shipped import as_pool
from amt.models.network import Network
from amt.models.pool import Pool
from amt.tasks.merge import average_of
from meta_dataset_readers.errors import InputError, say
from meta_dataset_readers.settings import as_path, nonnegative_int, positive_int


def parser() -> Parser:
    """The flags of the command."""
    parser = Parser(__doc__.partition("\n")[0], "python -m amt export")
    parser.add_argument(
        "pool", type=as_pool, help="checkpoint of LoRAs, ours or published, or the name of a pool in the box"
    )
    parser.add_argument("--to", choices=FORMATS, required=True, help="whose format")
    parser.add_argument(
        "--out",
        type=as_path,
        required=True,
        help="the file to write; the folder for peft, and for timm if the name has no ending",
    )
    parser.add_argument("--arch", help="backbone (default: what the checkpoint says)")
    parser.add_argument(
        "--pretrained_checkpoint",
        type=as_path,
        help="weights the pool was trained from, which only peft needs (default: shipped, or timm's hub)",
    )
    options.add_weights_key(parser)
    parser.add_argument(
        "--image_size",
        type=positive_int,
        help="side in pixels of the exported network (default: the backbone's)",
    )

    which = parser.add_argument_group("which network")
    which.add_argument("--adapter", type=nonnegative_int, metavar="P", help="this adapter alone")
    which.add_argument(
        "--support",
        type=as_path,
        metavar="FOLDER",
        help="images in one folder per class: write a head, and decide the coefficients if not given",
    )
    options.add_merging(which)
    options.add_head(which, "", "what the pool's file recommends, else prototypes")
    texts.add_texts(which, "; without --support they alone classify")
    which.add_argument("--seed", type=nonnegative_int, default=0, help="of the augmentation or the attack")
    return parser


def main(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    check(args)
    logging.getLogger("onnxscript").setLevel(
        logging.ERROR
    )  # it reports on every node that it leaves as it is
    saved = checkpoint.load(args.pool)
    pool = saved.pool
    check_pool(args, pool)
    if args.to == "published":
        written = export.save_published(args.out, pool, args.adapter)
    else:
        network = backbone_of(args, saved)
        checkpoint.check_architecture(args.pool, pool, network.weights, network.arch)
        merged = merged_of(args, OpenPool(args.pool, network, pool, saved.about, saved.statistics))
        written, coefficients = export.save(args.out, args.to, merged, pool), merged.coefficients
        say(f"coefficients {' '.join(f'{c:.4g}' for c in coefficients)}")
        if warning := dilution([coefficients], [level.epsilon for level in pool.levels], "--adapter"):
            say(f"warning: {warning}")
    for path in written:
        say(f"wrote {path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise an `InputError` for flags that are wrong together, and for an impossible place."""
    if args.adapter is not None and args.coefficients is not None:
        raise InputError("--adapter and --coefficients exclude each other")
    options.check_coefficients(args)
    options.routing(args)
    check_head(args)
    if args.to == "published":
        for flag in ("coefficients", "support", "text_prototypes", "image_size", "trim"):
            if getattr(args, flag):
                raise InputError(
                    f"--{flag} does not go with --to published: that code merges a pool anew for every task; "
                    "expected the whole pool, or --adapter P"
                )
    if args.to == "peft" and args.trim:
        raise InputError("--trim does not go with --to peft: trimming is no low-rank change of the weights")
    export.check_place(args.out, args.to)


def check_head(args: argparse.Namespace) -> None:
    """Raise an `InputError` for a head that cannot be exported."""
    found = options.heads(args) or ()
    if len(found) > 1:
        raise InputError(f"--head is given {len(found)} times, an export has one")
    if found and args.support is None and args.text_prototypes is None:
        raise InputError("--head is fitted to the images of --support FOLDER, which is missing")
    for head in found:
        export.check_single(head)


def merged_of(args: argparse.Namespace, opened: OpenPool) -> export.MergedNetwork:
    """The network that the flags choose, with a head where there is a support set, or texts.

    Raises:
        InputError: as of `fit_pictures` and `fit_texts`.
    """
    shares = args.coefficients
    if shares is None and (args.adapter is not None or args.support is None):
        shares = average_of(opened.pool, [args.adapter or 0])
    wanted = dataclasses.replace(merging(args), coefficients=shares)
    if args.support is None and wanted.texts is None:
        return export.merged_network(opened.network, opened.pool, shares, wanted.trims)
    if args.support is None:
        return fit_texts(opened, wanted)[0].merged
    head = wanted.head_for(opened)
    export.check_single(head)
    found, names = pictures.in_class_folders(args.support)
    task, _ = fit_pictures(opened, found, names, wanted, where=f"--support {args.support}: ")
    if head.one_shot_note and max(task.shots) == 1:
        say(f"note: --head {head.name}: {head.one_shot_note}")
    return task.merged


def check_pool(args: argparse.Namespace, pool: Pool) -> None:
    """Raise an `InputError` for flags that do not fit the pool."""
    export.check_kind(pool, args.to, str(args.pool))
    if args.adapter is not None and args.adapter >= len(pool):
        raise InputError(f"--adapter {args.adapter}: {args.pool} holds adapters 0 to {len(pool) - 1}")
    asked = Deployment(
        coefficients=args.coefficients, trims=tuple(args.trim or ()), routings=(options.routing(args),)
    )
    check_fit(asked, pool, str(args.pool))
    given = (args.adapter, args.coefficients, args.support)
    if args.to != "published" and len(pool) > 1 and given == (None,) * 3:
        raise InputError(
            f"{args.pool} holds {len(pool)} adapters, --to {args.to} takes one network: "
            "choose by --adapter P, --coefficients C ..., or --support FOLDER"
        )


def backbone_of(args: argparse.Namespace, saved: checkpoint.Checkpoint) -> Network:
    """The pool's network; with pretrained weights only where they are needed, so that a pool's file suffices.

    Raises:
        InputError: nothing says which network it is, or its pretrained weights are needed and missing.
    """
    if args.to != "peft":
        return network_of(args.pool, saved.about, args.arch, args.image_size, saved.pool.shapes)
    return load_network(
        checkpoint.arch_of(args.pool, saved.about, saved.pool.shapes, args.arch),
        args.pretrained_checkpoint,
        image_size=args.image_size,
        key=args.weights_key,
        tell=say,
    )
