"""Classifiers to be fine-tuned: their structure, what of it gets a low-rank branch, and the one function from
images and weights to logits.

Knows the names of architectures, how a network is made fit for small images, and what its input is
normalised by. A network is a structure only: its weights are an argument of `logits`, and the module is never
written to. Knows no file and no training.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from amt.models.weights import Weights
from amt.models.wide_resnet import WideResNet
from meta_dataset_readers.errors import InputError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALLEST = 16  # px: under it a last stage has one value per channel, of which there are no statistics
SMALL = 64  # px: images under this side get a ResNet's stem that does not shrink them
LARGE = 128  # px: from this side on the published code is its high-resolution one
TOKENS = 4  # patches per side, at the least: of fewer, attention has nothing to tell apart

TIMM = "timm:"  # opens the name of an architecture of timm's


@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier whose own parameters are only a random start.

    Args:
        arch: its name, as `--arch` has it.
        module: the structure, from normalised images (N, 3, h, w) to logits (N, K); it is put into eval mode
            and freed of gradients here.
        make: makes such a module anew, by torch's global generator.
        image_size: side in pixels that images are read, and attacked, at.
        mean, std: what the network's input is normalised by, per RGB channel of [0, 1] images.
        resize: side in pixels that images are enlarged to inside the network; None leaves them.
    """

    arch: str
    module: nn.Module
    make: Callable[[], nn.Module]
    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: int | None = None

    def __post_init__(self):
        self.module.eval().requires_grad_(False)

    @property
    def side(self) -> int:
        """Side in pixels of the images that reach the first layer."""
        return self.resize or self.image_size

    @functools.cached_property
    def stem(self) -> str:
        """The first convolution, "" if there is none."""
        return next((name for name, part in self.module.named_modules() if isinstance(part, nn.Conv2d)), "")

    @functools.cached_property
    def classifier(self) -> str:
        """The last linear layer."""
        return [name for name, part in self.module.named_modules() if isinstance(part, nn.Linear)][-1]

    @functools.cached_property
    def norms(self) -> tuple[str, ...]:
        """All parameters and buffers of BatchNorm layers; none of LayerNorms."""
        return tuple(
            f"{name}.{own}"
            for name, part in self.module.named_modules()
            if isinstance(part, _BatchNorm)
            for own in part.state_dict()
        )

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """All that gradients train; the rest of the weights are buffers."""
        return tuple(name for name, _ in self.module.named_parameters())

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Parameters and buffers: the weights that `logits` asks for."""
        return frozenset(self.module.state_dict())

    def is_head(self, name: str) -> bool:
        """Whether the weight called `name` is the classifier's."""
        return name.startswith(f"{self.classifier}.")

    @functools.cached_property
    def constants(self) -> Weights:
        """What the module computes for itself and no state dict has, such as tables of positions."""
        return {name: tensor for name, tensor in self.module.named_buffers() if name not in self.names}

    @property
    def n_classes(self) -> int:
        return self.module.get_submodule(self.classifier).out_features

    def adapted(self, published: bool = False) -> tuple[str, ...]:
        """The weights that get a low-rank branch: those of all convolutions and linear layers but the stem
        and the classifier, in the network's order (method, section 1).

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
        module = self.make()
        for name, part in module.named_modules():
            if name.endswith(".downsample"):
                part.register_forward_hook(lambda _part, _inputs, out: out[:1].expand_as(out))
        return dataclasses.replace(self, module=module)

    def start(self, seed: int) -> Weights:
        """A random complete state dict, float32, a function of the seed alone; its tensors are fresh."""
        return dict(_seeded(self.make, seed).state_dict())


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch's own would seed CUDA's, too, and not restore it
        return make()


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


def logits(network: Network, weights: Weights, images: Tensor, training: bool = False) -> Tensor:
    """Logits of `images` under `weights`: (N, 3, S, S) float in [0, 1] -> (N, K).

    Args:
        network: the structure.
        weights: a complete state dict, of one floating-point type and device with `images`.
        images: of the network's `image_size`.
        training: normalise by the batch's statistics, and update the running statistics (momentum 0.1,
            unbiased variance) IN PLACE in `weights`; otherwise by the running statistics, which stay.

    Raises:
        ValueError: `weights` lacks a name; the module's own tensor would be used, and written to, instead.
    """
    missing = network.names - weights.keys()
    if missing:
        raise ValueError(f"the weights lack {sorted(missing)[:3]}")
    if network.resize is not None:
        images = F.interpolate(images, size=(network.resize, network.resize), mode="nearest")
    mean, std = _statistics(network.mean, network.std, images.dtype, images.device)
    normal = (images - mean) / std
    if network.constants:
        weights = {name: tensor.to(images.device) for name, tensor in network.constants.items()} | weights
    if training:
        network.module.train()
    try:
        return torch.func.functional_call(network.module, weights, (normal,), tie_weights=False)
    finally:
        if training:
            network.module.eval()


@functools.lru_cache(maxsize=8)  # made anew they would be sent to the device at every pass
def _statistics(mean, std, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1) for values in (mean, std))


class ResNet(nn.Module):
    """A residual network of any widths and depths out of torchvision's blocks, with torchvision's names.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks per stage.
        widths: planes per stage; every stage but the first halves the resolution.
        n_classes: K.
        small: a stem of 3x3 that does not shrink the image, in place of 7x7 / 2 and a max-pool.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        n_classes: int,
        small: bool,
    ):
        super().__init__()
        wide = widths[0]
        if small:
            self.conv1 = nn.Conv2d(3, wide, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, wide, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self._stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        for name, depth, width in zip(self._stages, depths, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            self.add_module(name, _stage(block, wide, width, depth, stride))
            wide = width * block.expansion
        self.fc = nn.Linear(wide, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self._stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean(dim=(2, 3)))


def _stage(block: type, inside: int, width: int, depth: int, stride: int) -> nn.Sequential:
    out = width * block.expansion
    shortcut = None
    if stride != 1 or inside != out:
        shortcut = nn.Sequential(conv1x1(inside, out, stride), nn.BatchNorm2d(out))
    return nn.Sequential(
        block(inside, width, stride, shortcut), *(block(out, width) for _ in range(depth - 1))
    )


class _Residual(NamedTuple):
    block: type
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)


_RESNETS = {
    "resnet18": _Residual(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _Residual(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _Residual(Bottleneck, (3, 4, 6, 3)),
    "resnet_mini": _Residual(BasicBlock, (1, 1, 1), (8, 16, 32)),
}
_WIDE = {"wrn28-10": (28, 10)}  # depth and widening
_OF_TIMM = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
}
_ALIASES = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "wrn-28-10": "wrn28-10",
    "wideresnet28_10": "wrn28-10",
    **{name: arch for arch, name in _OF_TIMM.items()},
}
ARCHS = (*_RESNETS, *_WIDE, *_OF_TIMM)  # besides timm:NAME


def build(
    arch: str, n_classes: int, image_size: int, *, resize: int | None = None, normalise: bool = True
) -> Network:
    """The network called `arch`, with random weights.

    ResNets for images (or `resize`) under 64 px have a stem of 3x3, stride 1 and no max-pool; transformers
    have a position table of the size that is asked for.

    Args:
        arch: a name in `ARCHS`, the published r18, r34 and r50, or `timm:NAME` for a classifier of timm's.
        n_classes: K.
        image_size: side in pixels that images are read at.
        resize: side in pixels that images are enlarged to inside the network.
        normalise: whether the network's input is normalised (ImageNet's mean and standard deviation, of
            timm's networks their own); False for networks that take pixels in [0, 1].

    Raises:
        InputError: the name is unknown, it is no classifier, or images of that size are too small for it.
    """
    arch = _ALIASES.get(arch, arch)
    side = resize or image_size
    if side < SMALLEST and (arch in _RESNETS or arch in _WIDE):
        raise InputError(f"--arch {arch!r}: {side} px are too small, expected {SMALLEST} px or more")
    if arch in _RESNETS:
        block, depths, widths = _RESNETS[arch]
        make = functools.partial(ResNet, block, depths, widths, n_classes, side < SMALL)
    elif arch in _WIDE:
        make = functools.partial(WideResNet, *_WIDE[arch], n_classes)
    elif arch in _OF_TIMM or arch.startswith(TIMM):
        name = _OF_TIMM.get(arch, arch.removeprefix(TIMM))
        make = functools.partial(_make_of_timm, arch, name, n_classes, side)
    else:
        raise InputError(f"--arch {arch!r} is not known; {nearest(arch, (*ARCHS, *_ALIASES, TIMM + 'NAME'))}")
    module = _seeded(make, 0)
    settings = getattr(module, "pretrained_cfg", {})
    mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    if not normalise:
        mean, std = (0.0,) * 3, (1.0,) * 3
    network = Network(arch, module, make, image_size, tuple(mean), tuple(std), resize)
    if arch.startswith(TIMM):
        _check_classifier(network, n_classes)
    return network


def _make_of_timm(arch: str, name: str, n_classes: int, side: int) -> nn.Module:
    """A random network of timm's for images of `side` pixels."""
    if not timm.is_model(name):
        (closest,) = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)
        raise InputError(f"--arch {arch!r} is not known to timm; did you mean '{TIMM}{closest}'?")
    try:
        try:
            module = timm.create_model(name, num_classes=n_classes, img_size=side)
        except TypeError:  # of networks that have no such option, since they take any size
            module = timm.create_model(name, num_classes=n_classes)
    except Exception as error:  # whatever a network makes of a size it cannot have
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--arch {arch!r} cannot be built for images of {side} px: {reason}") from error
    for part in module.modules():  # a network's own noise would not follow the seed of a run
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, timm.layers.DropPath):
            part.drop_prob = 0.0
    _check_patches(arch, module, side)
    if isinstance(module, timm.models.ResNet) and side < SMALL:
        _keep_resolution(module)
    return module


def _check_patches(arch: str, module: nn.Module, side: int) -> None:
    patch = max(getattr(getattr(module, "patch_embed", None), "patch_size", None) or (1,))
    if side < TOKENS * patch:
        raise InputError(
            f"--arch {arch!r} sees patches of {patch} px, images of {side} px are too small for it: expected "
            f"at least {TOKENS * patch} px, or images enlarged to 224 px inside the network"
        )


def _keep_resolution(module: timm.models.ResNet) -> None:
    """Give a ResNet of timm's the stem for small images."""
    if isinstance(module.conv1, nn.Conv2d):
        wide = module.conv1.out_channels
        module.conv1 = nn.Conv2d(3, wide, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    else:  # a deep stem, whose first of three convolutions halves the resolution
        module.conv1[0].stride = (1, 1)
    module.maxpool = nn.Identity()


def _check_classifier(network: Network, n_classes: int) -> None:
    """Raise an `InputError` unless the network maps its images to logits through one last linear layer."""
    fault = f"--arch {network.arch!r} is no classifier with one last linear layer"
    module = network.module
    head = module.get_classifier()
    if not isinstance(head, nn.Linear) or module.get_submodule(network.classifier) is not head:
        raise InputError(fault)
    image = next(module.parameters()).new_zeros(1, 3, network.image_size, network.image_size)
    try:
        with torch.no_grad():
            out = logits(network, module.state_dict(), image)
    except Exception as error:  # whatever a network makes of images it cannot take
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--arch {network.arch!r} takes no images of {network.side} px: {reason}") from error
    if not isinstance(out, Tensor) or out.shape != (1, n_classes):
        raise InputError(fault)
