"""Pretrained networks, and the one function that turns images into features.

Knows the table of architectures, where their weights come from and how official files lay them out, how
position embeddings are resized and what mean and standard deviation a network was trained with (nowhere else
knows the last). The network is an untouched timm model that is never written to: its weights are an argument
of `features`.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amt.files import weight_files
from amt.files.weight_files import Weights
from meta_dataset_readers.errors import InputError, nearest

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"

CHUNK = 64  # images in one pass: episodes of Meta-Dataset have up to 500 of a kind, and graphs are large

TIMM = "timm:"  # opens the name of an architecture that is not in the table below but in timm's

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DINO = "https://dl.fbaipublicfiles.com/dino"
_DEIT = "https://dl.fbaipublicfiles.com/deit"
_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where pretrained weights are had: a repository on timm's hub, and an address to download them from."""

    hub: str | None = None
    url: str | None = None


@dataclasses.dataclass(frozen=True)
class Arch:
    """One row of the table: a ViT's shape, the image size it is used at, and its normalisation."""

    patch_size: int
    dim: int
    depth: int
    heads: int
    pretrained_size: int  # image side of the stored position table
    image_size: int  # image side that this project uses by default
    origin: Origin = Origin()
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    mlp_ratio: float = 4.0


_SMALL = Arch(patch_size=16, dim=384, depth=12, heads=6, pretrained_size=224, image_size=128)
_BASE = dataclasses.replace(_SMALL, dim=768, heads=12)


def _published(arch: Arch, hub: str | None, url: str) -> Arch:
    return dataclasses.replace(arch, origin=Origin(hub, url))


ARCHS = {
    "vit_mini": Arch(
        patch_size=4, dim=96, depth=4, heads=3, pretrained_size=32, image_size=32, mlp_ratio=2.0
    ),
    "dino_small_patch16": _published(
        _SMALL,
        "timm/vit_small_patch16_224.dino",
        f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    ),
    "dino_base_patch16": _published(
        _BASE,
        "timm/vit_base_patch16_224.dino",
        f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    "ibot_small_patch16": _published(_SMALL, None, f"{_IBOT}/vits_16/checkpoint_teacher.pth"),
    "ibot_base_patch16": _published(_BASE, None, f"{_IBOT}/vitb_16/checkpoint_teacher.pth"),
    "deit_small_patch16": _published(
        _SMALL, "timm/deit_small_patch16_224.fb_in1k", f"{_DEIT}/deit_small_patch16_224-cd65a155.pth"
    ),
    "deit_base_patch16": _published(
        _BASE, "timm/deit_base_patch16_224.fb_in1k", f"{_DEIT}/deit_base_patch16_224-b5f2ef4d.pth"
    ),
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network whose own parameters are only its starting weights.

    Args:
        arch: its name in `ARCHS`, or `timm:NAME`.
        network: a timm VisionTransformer or Eva in eval mode whose forward returns (N, D) features.
        image_size: side in pixels that episodes are read at.
        mean, std: the normalisation the network was trained with, per RGB channel of [0, 1] images.
        autocast: None for float32, else the dtype of mixed precision (float16 or bfloat16).
    """

    arch: str
    network: nn.Module
    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    autocast: torch.dtype | None = None

    @property
    def weights(self) -> Weights:
        """The pretrained weights by timm's names; views, to be read and never written."""
        return {name: value.detach() for name, value in self.network.named_parameters()}

    @property
    def patch_size(self) -> int:
        """Side in pixels of what becomes one token; a hybrid's stem shrinks the image first."""
        return self.network.patch_embed.feat_ratio()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] to the network's own units; (N, 3, H, W) -> (N, 3, H, W)."""
        mean, std = self._statistics(images)
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(images)
        return images * std + mean

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.new_tensor(self.mean).view(3, 1, 1), images.new_tensor(self.std).view(3, 1, 1)


def features(backbone: Backbone, weights: Weights, images: Tensor) -> Tensor:
    """Features of `images` under `weights`: (N, 3, H, W) float in [0, 1] -> (N, D) float32.

    This is what the network itself returns: of those in `ARCHS` the CLS token after the final LayerNorm, of
    timm's what their pooling makes. Any image size works: rows and columns beyond the last whole patch are
    not seen, and the position table is resized, for `ARCHS` as DINO does it, for timm's by timm's own rule.
    """
    patch = backbone.patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    images = images[..., : grid[0] * patch, : grid[1] * patch]
    if not backbone.network.dynamic_img_size:  # such a network resizes its table itself
        weights = weights | {"pos_embed": resize_positions(weights["pos_embed"], grid)}
    with torch.autocast(images.device.type, backbone.autocast, enabled=backbone.autocast is not None):
        normal = backbone.normalise(images)
        out = torch.func.functional_call(backbone.network, weights, (normal,), tie_weights=False)
    return out.float()


def fixed_features(backbone: Backbone, weights: Weights, images: Tensor) -> Tensor:
    """`features` of any number of images, without graph: (N, 3, H, W) -> (N, D)."""
    with torch.no_grad():
        return torch.cat([features(backbone, weights, part) for part in images.split(CHUNK)])


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position table (1, 1 + N, D) resized to (1, 1 + grid[0] * grid[1], D); the CLS row is kept.

    The rule of the official DINO code: bicubic, with 0.1 added to the target side so that the division
    cannot round down, and the scale factor used as given (so the 0.1 moves the sampling points, too).
    """
    side = math.isqrt(table.shape[1] - 1)
    if grid == (side, side):
        return table
    dim = table.shape[-1]
    patches = table[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    patches = F.interpolate(
        patches, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False
    )
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)


def base_arch(name: str) -> str:
    """The architecture behind a name; `X_amt` (training) and `X_amt_merge` (testing) are X.

    Raises:
        InputError: the name is neither in the table nor, after `timm:`, in timm's.
    """
    base = re.sub("_amt(_merge)?$", "", name)
    if base.startswith(TIMM):
        _check_timm_name(base)
    elif base not in ARCHS:
        raise InputError(f"--arch {name!r} is not known; {nearest(base, ARCHS)}")
    return base


def _check_timm_name(arch: str) -> None:
    name = arch.removeprefix(TIMM)
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    if name not in known:
        # nearest() would list all thousands of names where none is close.
        (closest,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)
        raise InputError(f"--arch {arch!r} is not known to timm; did you mean '{TIMM}{closest}'?")


def build_network(arch: Arch) -> nn.Module:
    """A randomly initialised timm VisionTransformer (LayerNorm eps 1e-6, exact GELU) without a head."""
    network = timm.models.VisionTransformer(
        img_size=arch.pretrained_size,
        patch_size=arch.patch_size,
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=arch.heads,
        mlp_ratio=arch.mlp_ratio,
        num_classes=0,
        global_pool="token",
    )
    return freeze(network)


def build_timm_network(arch: str) -> nn.Module:
    """The randomly initialised network that timm knows as the NAME of `timm:NAME`, without a head.

    Raises:
        InputError: it is no ViT for images of any size whose queries, keys and values are one layer `qkv`.
    """
    try:
        network = timm.create_model(
            arch.removeprefix(TIMM), pretrained=False, num_classes=0, dynamic_img_size=True
        )
    except TypeError:  # of networks that have no such option
        network = None
    if not isinstance(network, VisionTransformer | Eva):
        raise InputError(f"--arch {arch!r} is no plain vision transformer that takes images of any size")
    if not any(name.endswith("attn.qkv.weight") for name, _ in network.named_parameters()):
        raise InputError(
            f"--arch {arch!r}: its queries, keys and values are separate layers, "
            "expected one layer attn.qkv for all three, as the LoRAs adapt it"
        )
    return freeze(network)


def freeze(network: nn.Module) -> nn.Module:
    """`network` in eval mode, without parameter gradients, and indifferent to the image size."""
    network.patch_embed.strict_img_size = False
    return network.eval().requires_grad_(False)


def find_device(name: str) -> torch.device:
    """The device called `name`, if this machine has it; for "auto" CUDA's if it has one, else the CPU.

    Raises:
        InputError: it has not, or `name` is no device.
    """
    if name == "auto":
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # torchrun's processes on one machine share its devices out.
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % devices}" if devices else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {name!r} cannot be used here: {reason}") from error
    return device


def untrained(base: str) -> tuple[Backbone, Origin]:
    """The randomly initialised backbone of a `base_arch`, and where its pretrained weights are had."""
    if not base.startswith(TIMM):
        arch = ARCHS[base]
        return Backbone(base, build_network(arch), arch.image_size, arch.mean, arch.std), arch.origin
    network = build_timm_network(base)
    settings = network.pretrained_cfg
    hub = settings.get("hf_hub_id")
    origin = Origin(hub, f"https://huggingface.co/{hub}/resolve/main/{_HUB_FILE}" if hub else None)
    side, mean, std = settings["input_size"][-1], tuple(settings["mean"]), tuple(settings["std"])
    return Backbone(base, network, side, mean, std), origin


def load_backbone(
    name: str,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    image_size: int | None = None,
    pretrained: bool = True,
) -> Backbone:
    """The backbone called `name`, with its pretrained weights.

    Args:
        name: a name in `ARCHS`, or `timm:NAME` for a ViT of timm; with or without `_amt` or `_amt_merge`.
        weights: a file of weights in timm's, DINO's, iBOT's or DeiT's format, see `read_weights`. None takes
            NAME.safetensors or NAME.pth in the project's folder checkpoints if there is one, and otherwise
            asks timm's hub.
        device: where the network lives.
        autocast: see `Backbone`.
        image_size: side in pixels that episodes are read at; None for the architecture's own.
        pretrained: False for random weights, always the same: where a checkpoint brings all of them.

    Raises:
        InputError: unknown name, no weights to be had, weights that do not fit, or images too small.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        backbone, origin = untrained(base_arch(name))
    if image_size is not None and image_size < backbone.patch_size:
        raise InputError(
            f"--image_size is {image_size}, expected at least a patch of {backbone.patch_size} px"
        )
    if pretrained:
        path = weights or find_weights(backbone.arch, origin)
        backbone.network.load_state_dict(read_weights(path, backbone.network))
    return dataclasses.replace(
        backbone,
        network=backbone.network.to(device),
        image_size=image_size or backbone.image_size,
        autocast=autocast,
    )


_HUB_FILE = "model.safetensors"


def find_weights(base: str, origin: Origin) -> Path:
    """The file of pretrained weights to take when none is named: one in checkpoints/, or one from timm's hub.

    Raises:
        InputError: there is none in checkpoints/, and the hub has none or cannot be reached.
    """
    for ending in (".safetensors", ".pth"):
        if (CHECKPOINTS / f"{base}{ending}").is_file():
            return CHECKPOINTS / f"{base}{ending}"
    reason = "timm's hub does not have its weights"
    if origin.hub is not None:
        cached = huggingface_hub.try_to_load_from_cache(origin.hub, _HUB_FILE)
        if isinstance(cached, str):
            return Path(cached)
        try:
            huggingface_hub.model_info(origin.hub, timeout=10)  # a download would retry for a minute
            return Path(huggingface_hub.hf_hub_download(origin.hub, _HUB_FILE))
        except Exception as error:  # of the hub's HTTP library, which has been exchanged more than once
            problem = str(error).strip().partition("\n")[0]
            reason = f"its weights cannot be had from timm's hub ({type(error).__name__}: {problem})"
    file = f"download {origin.url} and name that file" if origin.url else "name a file of them"
    place = "" if base.startswith(TIMM) else f", or save it as {CHECKPOINTS / base}.pth"
    raise InputError(f"--arch {base!r}: {reason}; {file} by --pretrained_checkpoint{place}")


# Official files, read by what they hold.

# Where checkpoints keep the network. Of the two that DINO and iBOT keep, they publish the teacher.
_PLACES = ("teacher", "student", "model", "state_dict")

# What files hold besides the features, by name: all of it serves the pretraining task, and is left out.
_PRETRAINING_ONLY = {
    "classification or projection head": re.compile(r"head(_dist)?\..+"),
    "embedding of masked patches": re.compile(r"masked_embed|mask_token"),
}


def unwrap(path: Path, data: Mapping[str, Any]) -> tuple[str, Weights]:
    """The named tensors of a backbone in a file's contents, and where in it they were.

    Args:
        path: for errors.
        data: what `weight_files.read` found: a plain state dict, or a checkpoint that keeps one under
            `teacher`, `student`, `model` or `state_dict`. Of several the first named here is taken.

    Returns:
        "" or the key, and the tensors by names without `module.` and `backbone.`.

    Raises:
        InputError: there is no state dict, or it is one of LoRAs.
    """
    place = next((key for key in _PLACES if weight_files.is_state(data.get(key))), "")
    state = data[place] if place else data
    if not weight_files.is_state(state):
        raise InputError(
            f"{path}: holds {', '.join(map(repr, list(data)[:5])) or 'nothing'}, "
            f"expected tensors by name, or a dictionary of such as one of {', '.join(_PLACES)}"
        )
    if any("lora_" in name for name in state):
        raise InputError(f"{path}: holds LoRAs, expected the weights of a backbone; name it by --resume")
    for prefix in ("module.", "backbone."):
        names = [name.removeprefix(prefix) for name in state]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: holds tensors both with and without the prefix {prefix!r}")
        state = dict(zip(names, state.values(), strict=True))
    return place, state


def pretraining_only(name: str) -> str | None:
    """What part of a pretraining task the tensor called `name` belongs to, or None: to the features."""
    return next((part for part, names in _PRETRAINING_ONLY.items() if names.fullmatch(name)), None)


def read_weights(path: Path, network: nn.Module) -> Weights:
    """The weights for `network` in a file of timm's, DINO's, iBOT's or DeiT's format.

    Every tensor of the file is accounted for: it is one of the network's, or by its name a part of the
    pretraining task (see `pretraining_only`). For networks of timm's own, files that timm itself converts
    when it loads them, such as DINOv2's with registers, are converted likewise.

    Returns:
        A complete state dict, float32.

    Raises:
        InputError: the file cannot be read, or tensors are missing, unexpected, misshapen or not finite.
    """
    content = weight_files.read(path, "weights file")
    if "amt" in content.header:
        raise InputError(f"{path}: holds LoRAs, expected the weights of a backbone; name it by --resume")
    state = unwrap(path, content.data)[1]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if network.dynamic_img_size and _TIMM_CONVERTS & state.keys():
        state = _as_timm_converts(path, state, network)
    state = {name: tensor for name, tensor in state.items() if name in shapes or not pretraining_only(name)}
    return weight_files.check_fit(path, state, shapes)


# Names by which the official files of DINOv2 and DINOv3 are known.
_TIMM_CONVERTS = {"register_tokens", "storage_tokens"}


def _as_timm_converts(path: Path, state: Weights, network: nn.Module) -> Weights:
    convert = sys.modules[type(network).__module__].checkpoint_filter_fn
    try:
        with contextlib.redirect_stdout(None):  # it prints of every bias that a network does without
            return convert(state, network)
    except Exception as error:  # of a file that only looks like what timm knows
        raise InputError(f"{path}: timm cannot convert it for this network ({error!r})") from error


def matching_archs(weights: Mapping[str, Tensor]) -> list[str]:
    """The names in `ARCHS` whose networks have the sizes of `weights`, which is all that shapes can tell."""

    def fits(arch: Arch) -> bool:
        tokens = 1 + (arch.pretrained_size // arch.patch_size) ** 2
        shapes = {
            "patch_embed.proj.weight": (arch.dim, 3, arch.patch_size, arch.patch_size),
            "pos_embed": (1, tokens, arch.dim),
            f"blocks.{arch.depth - 1}.mlp.fc1.weight": (int(arch.dim * arch.mlp_ratio), arch.dim),
        }
        deeper = f"blocks.{arch.depth}.mlp.fc1.weight"
        return deeper not in weights and all(
            name in weights and tuple(weights[name].shape) == shape for name, shape in shapes.items()
        )

    return [name for name, arch in ARCHS.items() if fits(arch)]
