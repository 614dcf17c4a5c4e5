"""A pretrained network as plain data, and the one function that turns images into features.

Knows how position embeddings are resized and what mean and standard deviation a network was trained with
(nowhere else knows the last). The network is an untouched timm model that is never written to: its weights
are an argument of `features`.
"""

import dataclasses
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amt.models.architectures import (
    ARCHS,
    HUB_FILE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TIMM,
    Origin,
    build_network,
    build_timm_network,
)
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError

CHUNK = 64  # images in one pass: episodes of Meta-Dataset have up to 500 of a kind, and graphs are large


@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose own parameters are only its starting weights.

    Args:
        arch: its name in `ARCHS`, or `timm:NAME`.
        module: a timm VisionTransformer or Eva in eval mode whose forward returns (N, D) features.
        image_size: side in pixels that episodes are read at.
        mean, std: the normalisation the network was trained with, per RGB channel of [0, 1] images.
        autocast: None for float32, else the dtype of mixed precision (float16 or bfloat16).
    """

    arch: str
    module: nn.Module
    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    autocast: torch.dtype | None = None

    @property
    def weights(self) -> Weights:
        """The pretrained weights by timm's names; views, to be read and never written."""
        return {name: value.detach() for name, value in self.module.named_parameters()}

    @property
    def patch_size(self) -> int:
        """Side in pixels of what becomes one token; a hybrid's stem shrinks the image first."""
        return self.module.patch_embed.feat_ratio()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

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


def features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """Features of `images` under `weights`: (N, 3, H, W) float in [0, 1] -> (N, D) float32.

    This is what the network itself returns: of those in `ARCHS` the CLS token after the final LayerNorm, of
    timm's what their pooling makes. Any image size works: rows and columns beyond the last whole patch are
    not seen, and the position table is resized, for `ARCHS` as DINO does it, for timm's by timm's own rule.
    """
    patch = network.patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    images = images[..., : grid[0] * patch, : grid[1] * patch]
    if not network.module.dynamic_img_size:  # such a network resizes its table itself
        weights = weights | {"pos_embed": resize_positions(weights["pos_embed"], grid)}
    with torch.autocast(images.device.type, network.autocast, enabled=network.autocast is not None):
        normal = network.normalise(images)
        out = torch.func.functional_call(network.module, weights, (normal,), tie_weights=False)
    return out.float()


def fixed_features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """`features` of any number of images, without graph: (N, 3, H, W) -> (N, D)."""
    with torch.no_grad():
        return torch.cat([features(network, weights, part) for part in images.split(CHUNK)])


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


def untrained(base: str) -> tuple[Network, Origin]:
    """The randomly initialised backbone of a `base_arch`, and where its pretrained weights are had."""
    if not base.startswith(TIMM):
        arch = ARCHS[base]
        return Network(base, build_network(arch), arch.image_size, arch.mean, arch.std), arch.origin
    network = build_timm_network(base)
    settings = network.pretrained_cfg
    hub = settings.get("hf_hub_id")
    origin = Origin(hub, f"https://huggingface.co/{hub}/resolve/main/{HUB_FILE}" if hub else None)
    side, mean, std = settings["input_size"][-1], tuple(settings["mean"]), tuple(settings["std"])
    return Network(base, network, side, mean, std), origin
