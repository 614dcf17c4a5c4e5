"""Files of robustly pretrained networks, recognised by what they hold and read into one network's names.

    container    and prefixes as in `state_dicts`
    names        cleaned by `names`
    BatchNorm    X.bn_list.1 (adversarial) -> X;  X.bn_list.0 (natural) -> the same names, kept apart
    shortcuts    downsample.conv, downsample.bn -> downsample.0, downsample.1
    LoRA         convN.conv.weight -> convN.weight; the factors beside it are left out
    left out     normalisation, heads of self-supervision, a classifier that does not fit

Every tensor of a file is accounted for: it is a weight of the network or by its name one of these. (Method,
section 8.) Files are read by `weight_files`, which runs nothing of them. Knows no training.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from amt.files import names, state_dicts, weight_files
from amt.files.checkpoint import HEADER, parse_header
from amt.files.pretrainings import PRETRAININGS, published_name
from amt.files.state_dicts import StateDict
from amt.models.architectures import Triple
from amt.models.network import Network
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, damaged, printable

CLASSIFIER = "classifier"  # the kind of our files that hold one


class Pretrained(NamedTuple):
    """What a file gives a network.

    Args:
        weights: a complete state dict on the CPU, float32; what is not in the file is as it started.
        natural_norms: the natural BatchNorm set of a file that has two, by the network's names; else empty.
        head: whether the classifier came from the file.
        normalise: whether networks of this pretraining normalise their input; None where nothing tells.
        kind: what was recognised, on one line.
        statistics: the mean and standard deviation in the file, if it keeps them.
        about: what a classifier of ours says of itself; of other files nothing.
    """

    weights: Weights
    natural_norms: Weights
    head: bool
    normalise: bool | None
    kind: str
    statistics: tuple[Triple, Triple] | None = None
    about: Mapping[str, Any] = MappingProxyType({})


def read(
    path: Path, network: Network, start: Weights, pretraining: str | None = None, key: str | None = None
) -> Pretrained:
    """The weights for `network` in a file.

    Args:
        path: a safetensors file or one of torch.save.
        network: the structure that the file's weights are to fit.
        start: a complete state dict of it, for what the file may lack: the classifier, and
            `num_batches_tracked`.
        pretraining: a name in `PRETRAININGS`, with - or _, any case. It tells only what the file cannot:
            whether its network normalised.
        key: of the network to take, see `state_dicts.unwrap`.

    Raises:
        InputError: the file cannot be read, is of another architecture (the first tensors that are missing,
            unexpected or misshapen are listed) or holds numbers that are not finite; or the pretraining is
            unknown.
    """
    normalises = None if pretraining is None else PRETRAININGS[published_name(pretraining)]
    content = weight_files.read(path, "checkpoint")
    about = _about(path, content.header)
    found = state_dicts.unwrap(path, content.data, {n: tuple(t.shape) for n, t in start.items()}, key)
    parts = _sort(path, found, network)
    head, note = _choose_head(parts.heads, network, start)
    headless = {name: value for name, value in start.items() if head or not network.is_head(name)}
    weights = _fit(f"{path} for --arch {network.arch}", parts.weights | head, headless, network)
    notes = [f"tensors under {found.container!r}" if found.container else "plain tensors"]
    notes += [*found.notes(), *parts.notes, note]
    natural = {}
    if parts.natural:
        norms = {name: start[name] for name in network.norms}
        natural = _fit(f"{path} in its natural BatchNorm", parts.natural, norms, network)
        notes.append("two sets of BatchNorm, the adversarial one taken")
    return Pretrained(
        {name: weights[name] if name in weights else value.clone() for name, value in start.items()},
        natural,
        bool(head),
        True if normalises is None and (parts.normalisation or about or found.width) else normalises,
        "; ".join(filter(None, notes)),
        (about["mean"], about["std"]) if about else statistics_of(parts.normalisation),
        about,
    )


def _about(path: Path, header: Mapping[str, str]) -> dict:
    """What the header of a file of ours says; empty for others."""
    if HEADER not in header:
        return {}
    fault = f"{path}: no classifier, damaged header field {HEADER!r}"
    with damaged(fault, (KeyError, TypeError, ValueError, OverflowError), said=repr):
        found = parse_header(path, header[HEADER])
        kind = found["kind"]
        if kind == CLASSIFIER:
            mean, std = (tuple(float(value) for value in found[name]) for name in ("mean", "std"))
            if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
                raise ValueError(f"mean {mean}, std {std}")
            return {**found, "mean": mean, "std": std}
    raise InputError(f"{path}: holds a {kind}, expected a classifier, such as the best.safetensors beside it")


# Names


class _Parts(NamedTuple):
    """A file's tensors by what they are for; `notes` tell what was left out."""

    weights: Weights  # by the network's names, as far as it has them
    natural: Weights  # BatchNorm's natural set, likewise
    heads: Weights  # classifiers, and what self-supervision put in their place
    normalisation: Weights
    notes: list[str]


def _sort(path: Path, found: StateDict, network: Network) -> _Parts:
    parts, left = _Parts({}, {}, {}, {}, []), Counter()
    for full, tensor in found.weights.items():
        name = names.renamed(re.sub(r"\.bn_list\.[01]\.", ".", full), names.RESNET, network.names)
        part = None if name in network.names else names.beside(full)
        if found.width and network.is_head(name):
            left["projection to texts"] += 1
            continue
        if normalisation := names.NORMALISATION.fullmatch(full):
            parts.normalisation[normalisation["what"]] = tensor  # some files have it twice
            continue
        if part in (names.HEAD, names.LOSS) or (part is None and network.is_head(full)):
            where, name = parts.heads, full
        elif part is not None:
            left[part] += 1
            continue
        else:
            where = parts.natural if ".bn_list.0." in full else parts.weights
            name = name if name in network.names else full
        if name in where:
            raise InputError(f"{path}: holds tensor {printable(name)} under two names")
        where[name] = tensor
    parts.notes.extend(f"{count} {what} left out" for what, count in left.items())
    return parts


# Values


def _choose_head(heads: Weights, network: Network, start: Weights) -> tuple[Weights, str]:
    """The classifier among `heads` that fits, by the network's names, and a note of what became of all."""
    own = [name.removeprefix(f"{network.classifier}.") for name in start if network.is_head(name)]

    def fits(root: str) -> bool:
        return all(
            f"{root}.{part}" in heads
            and heads[f"{root}.{part}"].shape == start[f"{network.classifier}.{part}"].shape
            for part in own
        )

    # The published high-resolution code trains the first of these beside ImageNet's classifier.
    root = next(filter(fits, ("fc_downstream", network.classifier, "linear")), None)
    others = sorted({name.partition(".")[0] for name in heads if not root or not name.startswith(f"{root}.")})
    notes = [f"classifier {root}"] if root else []
    notes += [f"left out {', '.join(map(printable, others))}"] if others else []
    head = {f"{network.classifier}.{part}": heads[f"{root}.{part}"] for part in own} if root else {}
    return head, "; ".join(notes)


_POSITIONS = "pos_embed"


def _fit(where: str, found: Weights, start: Weights, network: Network) -> Weights:
    """`found` as a state dict like `start`, on the CPU: numbers float32, counters as they are counted.

    Counters (BatchNorm's of its batches) may be missing; a position table may be of another size.
    """
    counters = {name: value for name, value in start.items() if not value.is_floating_point()}
    shapes = {name: value.shape for name, value in start.items() if name not in counters}
    resized = _POSITIONS in shapes and _POSITIONS in found and _is_table(found[_POSITIONS], network)
    if resized:
        shapes[_POSITIONS] = found[_POSITIONS].shape
    weights = weight_files.check_fit(
        where, {name: tensor for name, tensor in found.items() if name not in counters}, shapes
    )
    if resized:
        weights[_POSITIONS] = _resized(weights[_POSITIONS], start[_POSITIONS], network)
    for name, value in counters.items():
        counted = found.get(name, value)
        fits = counted.shape == value.shape and counted.dtype == value.dtype
        weights[name] = (counted if fits else value).clone()
    return weights


def _own_tokens(network: Network) -> int:
    """Rows of a position table that are no patch's."""
    module = network.module
    return 0 if getattr(module, "no_embed_class", False) else getattr(module, "num_prefix_tokens", 0)


def _is_table(table: Tensor, network: Network) -> bool:
    """Whether `table` is a position table (1, tokens, D) of a square grid of patches."""
    patches = table.shape[1] - _own_tokens(network) if table.ndim == 3 else 0
    width = network.module.state_dict()[_POSITIONS].shape[-1]
    return patches > 0 and math.isqrt(patches) ** 2 == patches and table.shape[0::2] == (1, width)


def _resized(table: Tensor, like: Tensor, network: Network) -> Tensor:
    if table.shape == like.shape:
        return table
    from timm.layers.pos_embed import resample_abs_pos_embed

    own = _own_tokens(network)
    side = math.isqrt(like.shape[1] - own)
    return resample_abs_pos_embed(table, [side, side], num_prefix_tokens=own)


def statistics_of(normalisation: Weights) -> tuple[Triple, Triple] | None:
    """The mean and standard deviation that a file keeps as `mean` and `std`, three numbers of any shape each;
    None if it has no such."""
    values = [normalisation[what] for what in ("mean", "std") if what in normalisation]
    if len(values) < 2 or any(value.numel() != 3 or not value.is_floating_point() for value in values):
        return None
    mean, std = (tuple(value.flatten().tolist()) for value in values)
    sound = all(map(math.isfinite, mean)) and all(math.isfinite(value) and value > 0 for value in std)
    return (mean, std) if sound else None
