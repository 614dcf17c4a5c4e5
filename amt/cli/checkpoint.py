"""Describe any checkpoint or file of weights, or convert it into a safe one.

    python -m amt checkpoint FILE                                    what is in it, and whose it is
    python -m amt checkpoint FILE --convert OUT.safetensors          LoRAs in our format, weights in timm's
    python -m amt checkpoint FILE --convert OUT.safetensors --trust  the same for a file that can run code

--trust lets FILE run whatever its author put into it. Use it for files of your own, in a place where nothing
can be lost; the file it writes is then safe anywhere.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from amt.cli.options import Parser, add_weights_key
from amt.files import checkpoint, pretrained, published, version, weight_files
from amt.files.checkpoint import Checkpoint
from amt.files.digests import serialise
from amt.files.names import beside
from amt.files.shipped import as_pool
from amt.files.weight_files import Content
from amt.models.architectures import matching_archs
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, printable, say
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.settings import as_path

Lines = list[tuple[str, str]]


def main(argv: Sequence[str]) -> int:
    parser = Parser(__doc__.partition("\n")[0], "python -m amt checkpoint")
    parser.add_argument(
        "file",
        type=as_pool,
        help="safetensors or .pth: ours, the published code's, or weights; or the name of a pool in the box",
    )
    parser.add_argument(
        "--convert", type=as_path, metavar="OUT", help="write its contents to this .safetensors"
    )
    parser.add_argument(
        "--trust", action="store_true", help="with --convert: let FILE run any code it brings"
    )
    add_weights_key(parser)
    args = parser.parse(argv)
    if args.trust and args.convert is None:
        raise InputError("--trust is for --convert: nothing needs to be run to describe a file")
    content = weight_files.read(args.file, "checkpoint", args.trust)
    if checkpoint.HEADER in content.header or published.find_state(content.data) is not None:
        found = checkpoint.parse(args.file, content)
        about = describe_pool(found, content)
    else:
        found, about = describe_weights(args.file, content, args.weights_key)
    if args.convert is not None:
        convert(args.file, found, args.convert)
        say(f"wrote {args.convert}")
        return 0
    for name, value in [("file", str(args.file)), *about, *trust_in(args.file, content), *hashes(args.file)]:
        say(f"{name:12} {value}")
    return 0


def describe_pool(found: Checkpoint, content: Content) -> Lines:
    """What is known about a pool, ours or published."""
    pool, about = found.pool, found.about
    loras = pool.rank is not None
    levels = ", ".join(f"{level.epsilon:g}" for level in pool.levels) + " (of 255)"
    if checkpoint.HEADER in content.header:
        unfinished = "tuner" in about and not about.get("finished")
        kind = "our pool of " + ("LoRAs" if loras else "complete networks")
        kind += " and LayerNorms" * (pool.tune == "lora+norm")
        kind += ", of an unfinished training that main.py --resume continues" * unfinished
        state = content.data
    else:
        kind = {
            "pool": "published pool of LoRAs (dino_small_patch16_amt_merge and its like)",
            "training": "published training checkpoint of one LoRA (dino_small_patch16_amt and its like)",
        }[about["published"]]
        state = published.find_state(content.data)
    if "levels_from" in about:
        source = about["levels_from"]
        levels = "not in the file" if source == "nowhere" else f"{levels}, from {source}"
    arch = f"{about['arch']}, it says; " if about.get("arch") else ""
    lines = [
        ("kind", kind),
        ("container", content.container),
        ("arch", arch + possible_archs(pool[0].merge((1.0,)))),
        ("adapters", f"{len(pool)} of rank {pool.rank} on {len(pool.A)} layers" if loras else f"{len(pool)}"),
        ("levels", levels),
        ("tensors", count(state.values())),
    ]
    if about.get("epoch") is not None:
        lines.append(("epoch", str(about["epoch"])))
    if about.get("head") is not None:
        lines.append(("recommends", f"--head {about['head']}"))
    if about.get("coefficients") is not None:
        lines.append(("recommends", f"--coefficients {' '.join(map(str, about['coefficients']))}"))
    notes = about.get("notes", [])
    return lines + [("note", str(note)) for note in (notes if isinstance(notes, list) else [notes])]


def describe_weights(path: Path, content: Content, key: str | None = None) -> tuple[Weights, Lines]:
    """The weights of a network, of a ViT without what served its pretraining only, and what is known of them.

    Raises:
        InputError: there are no weights of a network, or they are not sound.
    """
    found = pretrained.unwrap(path, content.data, key=key)
    state = found.weights
    is_vit = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys()
    if not is_vit:  # of which every tensor is kept: AutoLoRa's readers know what to leave out
        if not any(tensor.ndim > 1 for tensor in state.values()):
            raise InputError(
                f"{path}: neither a pool of LoRAs nor the weights of a network; "
                f"it holds {', '.join(map(printable, list(state)[:3]))} and the like"
            )
        return _sound(path, state), [
            ("kind", "weights of a network that is no vision transformer"),
            ("container", content.container),
            ("tensors", count(state.values())),
            *(("note", note) for note in found.notes()),
        ]
    parts = {name: beside(name) for name in state if not (found.width and name.startswith("head."))}
    weights = {name: tensor for name, tensor in state.items() if not parts.get(name)}
    left_out = Counter(filter(None, parts.values()))
    layout = {
        "": "a plain state dict",
        "teacher": "the teacher of a DINO or iBOT checkpoint",
        "student": "the student of a DINO or iBOT checkpoint",
    }.get(found.container, f"a checkpoint that keeps them as {found.container!r}, as DeiT does")
    last = {name: state[name] for name in ("head.weight", "head.bias") if name in state}  # or a projection
    return _sound(path, weights | last), [
        ("kind", f"weights of a vision transformer, {layout}"),
        ("container", content.container),
        ("arch", possible_archs(weights)),
        ("tensors", count(weights.values())),
        *(("left out", f"{number} tensors: {part}") for part, number in left_out.items()),
        *(("note", note) for note in found.notes()),
    ]


def _sound(path: Path, weights: Weights) -> Weights:
    """The weights, checked and as float32; counters stay as they are."""
    counters = {name: tensor.clone() for name, tensor in weights.items() if tensor.dtype == torch.int64}
    numbers = {name: tensor for name, tensor in weights.items() if name not in counters}
    shapes = {name: tuple(tensor.shape) for name, tensor in numbers.items()}
    return weight_files.check_fit(path, numbers, shapes) | counters


def possible_archs(weights: Mapping[str, Tensor]) -> str:
    """What the shapes of weights say about their architecture."""
    names = matching_archs(weights)
    told = f"by its shapes {' or '.join(names)}" if names else "none in our table"
    stem = weights.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 4:
        dim, _, patch, _ = stem.shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        told += f" (dim {dim}, depth {depth}, patch {patch})"
    return told


def count(tensors: Iterable[Tensor]) -> str:
    """For example: 248 tensors, 22,329,218 numbers, float32."""
    tensors = list(tensors)
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return f"{len(tensors)}, {sum(tensor.numel() for tensor in tensors):,} numbers, {' and '.join(kinds)}"


def trust_in(path: Path, content: Content) -> Lines:
    """What guards the file's numbers against a changed byte, and whether the .json beside it fits."""
    found = f"{content.verified} of every tensor, compared" if content.verified else _NO_CHECKSUMS
    lines = [("checksums", found)]
    if checkpoint.contradicted(path, content):
        beside = path.with_suffix(".json").name
        lines.append(("note", f"{beside} beside it says something else than the file, which alone is read"))
    return lines


_NO_CHECKSUMS = (
    "none in a file of this kind, so a changed number goes unnoticed; --convert writes one that has them"
)


def hashes(path: Path) -> Lines:
    """A file's digests, and whether it is one of those that the authors released."""
    blob = published.git_blob_id(path)
    released = published.RELEASED.get(blob)
    lines = [("sha256", version.digest(path)), ("git blob", blob)]
    return lines + [("released", f"bit for bit the authors' {released}")] * (released is not None)


def convert(path: Path, found: Checkpoint | Weights, out: Path) -> None:
    """Write what a file holds as safetensors: LoRAs as a checkpoint of ours, weights by timm's names.

    Raises:
        InputError: the place is unsuitable, or the levels of the LoRAs are not known.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--convert {out}: expected a name that ends in .safetensors")
    if isinstance(found, Checkpoint):
        checkpoint.require_levels(path, found)
        checkpoint.save(out, found)
    else:
        replace_file(out, serialise(found, {"format": "pt"}))
