"""Pretrained networks, and the one function that turns images into features.

Knows the table of architectures, where their weights come from, how position embeddings are resized and
what mean and standard deviation a network was trained with (nowhere else knows the last). The network is
an untouched timm model that is never written to: its weights are an argument of `features`.
"""

import dataclasses
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from meta_dataset_readers.errors import InputError, nearest

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Arch:
    """One row of the table: a ViT's shape, the image size it is used at, and its normalisation."""

    patch_size: int
    dim: int
    depth: int
    heads: int
    pretrained_size: int  # image side of the stored position table
    image_size: int  # image side that this project uses by default
    weights: str | None = None  # file under checkpoints/ that the project ships
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    mlp_ratio: float = 4.0


_SMALL = Arch(patch_size=16, dim=384, depth=12, heads=6, pretrained_size=224, image_size=128)
_BASE = dataclasses.replace(_SMALL, dim=768, heads=12)

ARCHS = {
    "vit_mini": Arch(
        patch_size=4,
        dim=96,
        depth=4,
        heads=3,
        pretrained_size=32,
        image_size=32,
        weights="vit_mini.safetensors",
        mlp_ratio=2.0,
    ),
    "dino_small_patch16": _SMALL,
    "dino_base_patch16": _BASE,
    "ibot_small_patch16": _SMALL,
    "ibot_base_patch16": _BASE,
    "deit_small_patch16": _SMALL,
    "deit_base_patch16": _BASE,
}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network whose own parameters are only its starting weights.

    Args:
        arch: its name in `ARCHS`.
        network: a timm VisionTransformer in eval mode whose forward returns (N, D) features.
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

    For a ViT this is the CLS token after the final LayerNorm. Any image size works: the position table is
    resized as DINO does it, and rows and columns beyond the last whole patch are not seen.
    """
    patch = backbone.network.patch_embed.patch_size[0]
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    weights = weights | {"pos_embed": resize_positions(weights["pos_embed"], grid)}
    images = images[..., : grid[0] * patch, : grid[1] * patch]
    with torch.autocast(images.device.type, backbone.autocast, enabled=backbone.autocast is not None):
        out = torch.func.functional_call(backbone.network, weights, (backbone.normalise(images),))
    return out.float()


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
        InputError: the name is not in the table.
    """
    base = name.removesuffix("_merge").removesuffix("_amt")
    if base not in ARCHS:
        raise InputError(f"--arch {name!r} is not known; {nearest(base, ARCHS)}")
    return base


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


def freeze(network: nn.Module) -> nn.Module:
    """`network` in eval mode, without parameter gradients, and indifferent to the image size."""
    network.patch_embed.strict_img_size = False
    return network.eval().requires_grad_(False)


def find_device(name: str) -> torch.device:
    """The device called `name`, if this machine has it.

    Raises:
        InputError: it has not, or `name` is no device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {name!r} cannot be used here: {reason}") from error
    return device


def load_backbone(
    name: str,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    image_size: int | None = None,
) -> Backbone:
    """The backbone called `name`, with its pretrained weights.

    Args:
        name: a name in `ARCHS`, with or without `_amt` or `_amt_merge`.
        weights: a safetensors file with timm's names; None takes the file the project ships.
        device: where the network lives.
        autocast: see `Backbone`.
        image_size: side in pixels that episodes are read at; None for the architecture's own.

    Raises:
        InputError: unknown name, no weights to be had, weights that do not fit, or images too small.
    """
    base = base_arch(name)
    arch = ARCHS[base]
    if weights is None:
        if arch.weights is None:
            raise InputError(f"--arch {name!r} ships without weights; name a file by --pretrained_checkpoint")
        weights = CHECKPOINTS / arch.weights
    image_size = image_size or arch.image_size
    if image_size < arch.patch_size:
        raise InputError(f"--image_size is {image_size}, expected at least a patch of {arch.patch_size} px")
    network = build_network(arch)
    load_weights(network, weights)
    return Backbone(base, network.to(device), image_size, arch.mean, arch.std, autocast)


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a fresh network from a safetensors file whose names and shapes match one to one.

    Raises:
        InputError: the file is missing, is no safetensors file, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    check_fit(path, found, network.state_dict())
    network.load_state_dict(found)


def check_fit(path: Path, found: Weights, expected: Weights) -> None:
    """Raise an `InputError` that names the first misfit between two sets of named tensors."""
    for what, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("holds unexpected", sorted(found.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{path}: {what} tensor {', '.join(names[:3])}{more}")
    for name, tensor in found.items():
        wanted = tuple(expected[name].shape)
        if tuple(tensor.shape) != wanted:
            raise InputError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {wanted}")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} holds values that are not finite")
