"""One network for everything: a structure, its normalisation, and two functions of weights and images.

    features(network, weights, images)    (N, 3, H, W) in [0, 1] -> (N, D)    what a classifier is shown
    logits(network, weights, images)      (N, 3, H, W) in [0, 1] -> (N, K)    of networks that have one

The module is an untouched ViT, ResNet or WRN that is never written to: its weights are an argument. Knows how
position tables are resized and how images are normalised. Knows no file and no training.
"""

import copy
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amt.models import architectures
from amt.models.architectures import (
    ALIASES,
    ARCHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    SMALL,
    TIMM,
    Origin,
    Triple,
)
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, first_line

CHUNK = 64  # images in one pass: episodes of Meta-Dataset have up to 500 of a kind, and graphs are large


@dataclasses.dataclass(frozen=True)
class Network:
    """A structure, whose own parameters are only its starting weights.

    Args:
        arch: its name, as `--arch` has it.
        module: from normalised images (N, 3, H, W) to features (N, D), or to logits (N, K) if it ends in a
            classifier; it is put into eval mode and freed of gradients here.
        image_size: side in pixels that images are read, and attacked, at.
        mean, std: the normalisation the network was trained with, per RGB channel of [0, 1] images.
        autocast: None for float32, else the dtype of mixed precision (float16 or bfloat16).
        resize: side in pixels that images are enlarged to inside the network; None leaves them.
        make: makes such a module anew, by torch's global generator; `start` needs it.
    """

    arch: str
    module: nn.Module
    image_size: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    autocast: torch.dtype | None = None
    resize: int | None = None
    make: Callable[[], nn.Module] | None = None

    def __post_init__(self):
        self.module.eval().requires_grad_(False)

    # Weights

    @property
    def weights(self) -> Weights:
        """The module's own parameters by name; views, to be read and never written."""
        return {name: value.detach() for name, value in self.module.named_parameters()}

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of all that gradients train; the rest of the weights are buffers."""
        return tuple(name for name, _ in self.module.named_parameters())

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Parameters and buffers: the weights that `logits` asks for."""
        return frozenset(self.module.state_dict())

    @functools.cached_property
    def constants(self) -> Weights:
        """What the module computes for itself and no state dict has, such as tables of rotary positions."""
        return {name: tensor for name, tensor in self.module.named_buffers() if name not in self.names}

    def start(self, seed: int) -> Weights:
        """A random complete state dict, float32, a function of the seed alone; its tensors are fresh."""
        if self.make is None:
            raise ValueError(f"{self.arch}: how to make it anew is not known")
        return dict(_seeded(self.make, seed).state_dict())

    # Structure

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def side(self) -> int:
        """Side in pixels of the images that reach the first layer."""
        return self.resize or self.image_size

    @property
    def patch_size(self) -> int:
        """Side in pixels of what becomes one token of a ViT; a hybrid's stem shrinks the image first."""
        embed: Any = self.module.patch_embed
        return embed.feat_ratio()

    @functools.cached_property
    def any_size(self) -> bool:
        """Whether it is a ViT for images of any size, see `architectures.freeze`, without a classifier."""
        embed = getattr(self.module, "patch_embed", None)
        return not self.classifier and not getattr(embed, "strict_img_size", True)

    @functools.cached_property
    def stem(self) -> str:
        """The first convolution, "" if there is none."""
        return next((name for name, part in self.module.named_modules() if isinstance(part, nn.Conv2d)), "")

    @functools.cached_property
    def classifier(self) -> str:
        """The last linear layer, "" if the network ends in features."""
        if getattr(self.module, "num_classes", None) == 0:
            return ""
        layers = [name for name, part in self.module.named_modules() if isinstance(part, nn.Linear)]
        return layers[-1] if layers else ""

    @property
    def n_classes(self) -> int:
        layer: Any = self.module.get_submodule(self.classifier)
        return layer.out_features

    def is_head(self, name: str) -> bool:
        """Whether the weight called `name` is the classifier's."""
        return bool(self.classifier) and name.startswith(f"{self.classifier}.")

    @functools.cached_property
    def norms(self) -> tuple[str, ...]:
        """All parameters and buffers of BatchNorm layers; none of LayerNorms."""
        return tuple(
            f"{name}.{own}"
            for name, part in self.module.named_modules()
            if isinstance(part, _BatchNorm)
            for own in part.state_dict()
        )

    def adapted(self, published: bool = False) -> tuple[str, ...]:
        """The weights that get a low-rank branch of AutoLoRa's: those of all convolutions and linear layers
        but the stem and the classifier, in the network's order (method, section 1).

        Args:
            published: only those that the published code's natural thread reaches. It passes its keyword to
                the last block of a stage alone in the high-resolution code (images of `LARGE` and more), to
                the first alone in that for 96 px, to every block in that for 32 px, and to no shortcut but
                in the last; so of ResNets those weights, of other networks all.
        """
        layers = [
            name
            for name, part in self.module.named_modules()
            if isinstance(part, nn.Conv2d | nn.Linear) and name not in (self.stem, self.classifier)
        ]
        if published and self.side >= SMALL:
            layers = _reached(layers, -1 if self.side >= LARGE else 0)
        return tuple(f"{name}.weight" for name in layers)

    def with_published_shortcuts(self) -> "Network":
        """The fault of the published network with two BatchNorm sets: in a block with a downsample the
        shortcut of every image is that of the batch's first."""
        module = copy.deepcopy(self.module)
        for name, part in module.named_modules():
            if name.endswith(".downsample"):
                part.register_forward_hook(lambda _part, _inputs, out: out[:1].expand_as(out))
        return dataclasses.replace(self, module=module)

    # Normalisation

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] to the network's own units; (N, 3, H, W) -> (N, 3, H, W)."""
        mean, std = self._statistics(images)
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._statistics(images)
        return images * std + mean

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # What is traced is no tensor that may be kept.
        make = _statistics.__wrapped__ if torch.compiler.is_compiling() else _statistics
        return make(self.mean, self.std, images.dtype, images.device)


@functools.lru_cache(maxsize=8)  # made anew they would be sent to the device at every pass
def _statistics(mean: Triple, std: Triple, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    found = torch.tensor([mean, std], dtype=dtype, device=device).view(2, 3, 1, 1)
    return found[0], found[1]


def features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """Features of `images` under `weights`: (N, 3, H, W) float in [0, 1] -> (N, D) float32.

    This is what the network itself returns: of those in `ARCHS` the CLS token after the final LayerNorm, of
    timm's what their pooling makes; of a network with a classifier, what the classifier is shown. Of those
    without, any image size works: rows and columns beyond the last whole patch are not seen, and the position
    table is resized, for `ARCHS` as DINO does it, for timm's by timm's own rule.
    """
    if network.classifier:
        _check_complete(network, weights)
        weights = weights | _identity(network, weights)
    return _forward(network, weights, images).float()


def logits(network: Network, weights: Weights, images: Tensor, training: bool = False) -> Tensor:
    """Logits of `images` under `weights`: (N, 3, S, S) float in [0, 1] -> (N, K).

    Args:
        network: the structure.
        weights: a complete state dict, of one floating-point type and device with `images`.
        images: of the network's `image_size`.
        training: normalise by the batch's statistics, and update the running statistics (momentum 0.1,
            unbiased variance) IN PLACE in `weights`; otherwise by the running statistics, which stay.

    Raises:
        ValueError: the network has no classifier, or `weights` lacks a name: the module's own tensor would be
            used, and written to, instead.
    """
    if not network.classifier:
        raise ValueError(f"{network.arch} ends in features, expected a network with a classifier")
    _check_complete(network, weights)
    if not training:
        return _forward(network, weights, images)
    network.module.train()
    try:
        return _forward(network, weights, images)
    finally:
        network.module.eval()


def fixed_features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """`features` of any number of images, without graph: (N, 3, H, W) -> (N, D)."""
    with torch.no_grad():
        return torch.cat([features(network, weights, part) for part in images.split(CHUNK)])


def _forward(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """What the module makes of images (N, 3, H, W) in [0, 1] under `weights`, in its present mode."""
    if network.resize is not None:
        images = F.interpolate(images, size=(network.resize, network.resize), mode="nearest")
    if network.any_size:
        patch = network.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        images = images[..., : grid[0] * patch, : grid[1] * patch]
        if not network.module.dynamic_img_size:  # such a network resizes its table itself
            weights = weights | {"pos_embed": resize_positions(weights["pos_embed"], grid)}
    if network.constants:
        weights = {name: tensor.to(images.device) for name, tensor in network.constants.items()} | weights
    with torch.autocast(images.device.type, network.autocast, enabled=network.autocast is not None):
        normal = network.normalise(images)
        return torch.func.functional_call(network.module, weights, (normal,), tie_weights=False)


def _check_complete(network: Network, weights: Weights) -> None:
    if missing := network.names - weights.keys():
        raise ValueError(f"the weights lack {sorted(missing)[:3]}")


def _identity(network: Network, weights: Weights) -> Weights:
    """The classifier that returns what it is shown: sums of one feature and zeros, which are exact."""
    like = weights[f"{network.classifier}.weight"]
    dim = like.shape[1]
    own = {"weight": torch.eye(dim, dtype=like.dtype, device=like.device), "bias": like.new_zeros(dim)}
    named = {f"{network.classifier}.{part}": tensor for part, tensor in own.items()}
    return {name: tensor for name, tensor in named.items() if name in weights}


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


_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")  # of a ResNet, torchvision's or timm's


def _reached(layers: Sequence[str], place: int) -> list[str]:
    """Layers of ResNet blocks at one place of their stage, 0 for the first and -1 for the last, without the
    shortcut; of a network that has no such blocks, all layers."""
    blocks = {name: found for name in layers if (found := _BLOCK.match(name))}
    if not blocks:
        return list(layers)
    stages: dict[str, list[int]] = {}
    for found in blocks.values():
        stages.setdefault(found[1], []).append(int(found[2]))
    chosen = {stage: sorted(set(numbers))[place] for stage, numbers in stages.items()}
    return [
        name
        for name, found in blocks.items()
        if int(found[2]) == chosen[found[1]] and ".downsample." not in name
    ]


# Building


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch's own would seed CUDA's, too, and not restore it
        return make()


def untrained(base: str) -> tuple[Network, Origin]:
    """The network of a `base_arch` without a head, with random weights, always the same; and
    where its pretrained weights come from."""
    if base in ARCHS:
        arch = ARCHS[base]
        make = functools.partial(architectures.build_network, arch)
        return Network(base, _seeded(make, 0), arch.image_size, arch.mean, arch.std, make=make), arch.origin
    make = functools.partial(architectures.build_timm_network, base)
    module: Any = _seeded(make, 0)
    mean, std = architectures.timm_statistics(module)
    side = module.pretrained_cfg["input_size"][-1]
    return Network(base, module, side, mean, std, make=make), architectures.timm_origin(module)


def build_classifier(
    arch: str, n_classes: int, image_size: int, *, resize: int | None = None, normalise: bool = True
) -> Network:
    """The classifier called `arch`, with random weights, always the same.

    ResNets for images (or `resize`) under 64 px have a stem of 3x3, stride 1 and no max-pool; transformers
    have a position table of the size that is asked for.

    Args:
        arch: a name in `CLASSIFIERS`, the published r18, r34 and r50, or `timm:NAME`.
        n_classes: K.
        image_size: side in pixels that images are read at.
        resize: side in pixels that images are enlarged to inside the network.
        normalise: whether the network's input is normalised (ImageNet's mean and standard deviation, of
            timm's networks their own); False for networks that take pixels in [0, 1].

    Raises:
        InputError: the name is unknown, it is no classifier, or images of that size are too small for it.
    """
    arch = ALIASES.get(arch, arch)
    make = architectures.classifier_maker(arch, n_classes, resize or image_size)
    module = _seeded(make, 0)
    mean, std = architectures.timm_statistics(module) if normalise else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    network = Network(arch, module, image_size, mean, std, resize=resize, make=make)
    if arch.startswith(TIMM):
        _check_classifier(network, n_classes)
    return network


def _check_classifier(network: Network, n_classes: int) -> None:
    """Raise an `InputError` unless the network maps its images to logits through one last linear layer."""
    fault = f"--arch {network.arch!r} is no classifier with one last linear layer"
    module: Any = network.module
    head = module.get_classifier()
    if not isinstance(head, nn.Linear) or module.get_submodule(network.classifier) is not head:
        raise InputError(fault)
    image = next(module.parameters()).new_zeros(1, 3, network.image_size, network.image_size)
    try:
        with torch.no_grad():
            out = logits(network, module.state_dict(), image)
    except Exception as error:  # whatever a network makes of images it cannot take
        reason = first_line(error)
        raise InputError(f"--arch {network.arch!r} takes no images of {network.side} px: {reason}") from error
    if not isinstance(out, Tensor) or out.shape != (1, n_classes):
        raise InputError(fault)


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
