"""Pretrained weights: where the files come from, and how official ones are read into a network.

Every tensor of a file must find its place, or be known to serve the pretraining task only.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn

from amt.files import names, robust_weights, shipped, state_dicts, weight_files
from amt.files.state_dicts import Shapes, StateDict
from amt.models.architectures import (
    HUB_FILE,
    PROJECTION,
    TIMM,
    Origin,
    base_arch,
    projection_widths,
    timm_name,
)
from amt.models.network import Network, projected, untrained
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, first_line


def load_network(
    name: str,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    image_size: int | None = None,
    pretrained: bool = True,
    key: str | None = None,
    tell: Callable[[str], object] | None = None,
) -> Network:
    """The backbone called `name`, with its pretrained weights.

    Args:
        name: a name in `ARCHS`, or `timm:NAME` for a ViT of timm; with or without `_amt` or `_amt_merge`.
            Where a CLIP's file has the projection to the space of its texts, that is a part of the network,
            which is then called `timm:NAME:E` with its width; `timm:NAME:0` leaves it out.
        weights: a file of weights in any format of `read_weights`.
            None takes NAME.safetensors or NAME.pth in the project's folder checkpoints if there is one, and
            otherwise asks timm's hub.
        autocast, image_size: see `Network`; None for the architecture's own size.
        pretrained: False for random weights, always the same: where a checkpoint brings all of them.
        key, tell: see `read_weights`.

    Raises:
        InputError: unknown name, no weights, weights that do not fit, or images too small.

    >>> load_network("vit_mini").image_size
    32
    """
    base = base_arch(name)
    network, origin = untrained(base)
    if image_size is not None and image_size < network.patch_size:
        raise InputError(
            f"--image_size is {image_size}, expected at least a patch of {network.patch_size} px"
        )
    if pretrained:
        path = weights or find_weights(network.arch, origin)
        found = _found(path, network.module, key)
        if base.startswith(TIMM) and timm_name(base)[1] is None and (width := _projection(base, found)):
            network = projected(network, width)
        _check_normalisation(path, found.weights, network)
        network.module.load_state_dict(_fitted(path, found, network.module, tell))
    return dataclasses.replace(
        network,
        module=network.module.to(device),
        image_size=image_size or network.image_size,
        autocast=autocast,
    )


def find_weights(base: str, origin: Origin) -> Path:
    """The file of pretrained weights to take when none is named: one in checkpoints/, or one from timm's hub.
    Raises InputError where the hub has none or cannot be reached."""
    if (found := shipped.boxed(base)) is not None:
        return found
    reason = "timm's hub does not have its weights"
    if origin.hub is not None:
        cached = huggingface_hub.try_to_load_from_cache(origin.hub, HUB_FILE)
        if isinstance(cached, str):
            return Path(cached)
        try:
            huggingface_hub.model_info(origin.hub, timeout=10)  # a download would retry for a minute
            return Path(huggingface_hub.hf_hub_download(origin.hub, HUB_FILE))
        except Exception as error:  # of the hub's HTTP library, which has been exchanged more than once
            reason = f"its weights do not come from timm's hub ({first_line(error)})"
    file = f"download {origin.url} and name that file" if origin.url else "name a file of them"
    place = "" if base.startswith(TIMM) else f", or save it as {shipped.BOX / base}.pth"
    raise InputError(f"--arch {base!r}: {reason}; {file} by --pretrained_checkpoint{place}")


def unwrap(
    path: Path, data: Mapping[str, Any], known: Shapes | None = None, key: str | None = None
) -> StateDict:
    """`state_dicts.unwrap` of a network without LoRAs; raises an `InputError` also if there are some."""
    found = state_dicts.unwrap(path, data, known or {}, key)
    if any("lora_" in name for name in found.weights):
        raise _holds_loras(path)
    return found


def _holds_loras(path: Path) -> InputError:
    return InputError(f"{path}: holds LoRAs, expected the weights of a backbone; name it by --resume")


def read_weights(
    path: Path, network: nn.Module, key: str | None = None, tell: Callable[[str], object] | None = None
) -> Weights:
    """The weights for `network` in a file of timm's, Hugging Face's, DINO's, iBOT's, DeiT's, MoCo's or CLIP's
    format.

    Every tensor of the file is accounted for: it is one of the network's, or by its name a part of the
    pretraining task (see `names.beside`) or a text tower's; other libraries' names and shapes become the
    network's (see `towers`). Gives a complete state dict, float32.

    Args:
        key: of the network to take from a file of several, see `state_dicts.unwrap`.
        tell: is given a line for each choice among networks and for what is left out.

    Raises:
        InputError: the file cannot be read, or tensors are missing, unexpected, misshapen or not finite.
    """
    return _fitted(path, _found(path, network, key), network, tell)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _found(path: Path, network: nn.Module, key: str | None) -> StateDict:
    """What a file has for `network`, in its names, with all that serves pretraining."""
    content = weight_files.read(path, "weights file")
    if "amt" in content.header:
        raise _holds_loras(path)
    return unwrap(path, content.data, _shapes(network), key)


def _fitted(
    path: Path, found: StateDict, network: nn.Module, tell: Callable[[str], object] | None
) -> Weights:
    """The complete state dict of `network`; says what was chosen and left out."""
    state, shapes = found.weights, _shapes(network)
    parts = {name: part for name in state if name not in shapes and (part := names.beside(name))}
    weights = weight_files.check_fit(path, {n: t for n, t in state.items() if n not in parts}, shapes)
    left_out = [f"{number} tensors left out: {part}" for part, number in Counter(parts.values()).items()]
    for note in (*found.notes(), *left_out) if tell is not None else ():
        tell(f"note: {path}: {note}")
    return weights


def _projection(arch: str, found: StateDict) -> int:
    """The width of a file's projection to the space of texts: of CLIP's formats, and of timm's files of CLIP,
    where a classifier has the same name; 0 if there is none."""
    rows = [*found.weights[PROJECTION].shape, 0][0] if PROJECTION in found.weights else 0
    return found.width or (rows if rows and rows in projection_widths(arch) else 0)


def _check_normalisation(path: Path, state: Weights, network: Network) -> None:
    """Raise an `InputError` if a file says that its network normalises otherwise."""
    parts = {found["what"]: state[name] for name in state if (found := names.NORMALISATION.fullmatch(name))}
    statistics = robust_weights.statistics_of(parts)
    own = (network.mean, network.std)
    if statistics and not torch.allclose(torch.tensor(statistics), torch.tensor(own), atol=1e-3):
        (mean, std), (own_mean, own_std) = (
            [" ".join(f"{value:.4g}" for value in row) for row in rows] for rows in (statistics, own)
        )
        raise InputError(
            f"{path}: normalises by mean {mean} and std {std}, --arch {network.arch} by {own_mean} and "
            f"{own_std}; expected the same"
        )
