"""One network for everything: a structure, its normalisation, and two functions of weights and images.

    features(network, weights, images)    (N, 3, H, W) in [0, 1] -> (N, D)    what the classifier is given
    logits(network, weights, images)      (N, 3, H, W) in [0, 1] -> (N, K)    networks with a classifier

The module is an untouched ViT, ResNet or WRN that is never written to: its weights are an argument. Knows how
images are normalised and cut to whole patches. Knows no file and no training.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amt.attacks.constants import constant
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
from amt.models.compiled import Compiler, compiled_if_asked
from amt.models.parts import in_parts
from amt.models.vit import Linear, VisionTransformer, resize_positions
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, first_line

CHUNK = 64  # images in one pass: episodes of Meta-Dataset have up to 500 of a kind, and graphs are large


@dataclasses.dataclass(frozen=True)
class Network:
    """A structure, whose own parameters are only its starting weights.

    Args:
        arch: its name, as given to `--arch`.
        module: from normalised images (N, 3, H, W) to features (N, D), or to logits (N, K) if it ends in a
            classifier; put into eval mode, without gradients, here.
        image_size: side in pixels that images are read, and attacked, at.
        mean, std: the normalisation the network was trained with, per RGB channel of [0, 1] images.
        autocast: None for float32, else the dtype of mixed precision (float16 or bfloat16).
        resize: side in pixels that images are enlarged to inside the network; None leaves them.
        make: builds such a module anew from torch's global generator; `start` needs it.
        micro_batch: most images of a level that `level_features` keeps a graph of at once; None for all.
        compiler: None, or what makes passes and attack steps faster, see amt/models/compiled.py.

    >>> network.arch, network.image_size, network.patch_size
    ('vit_mini', 32, 4)
    """

    arch: str
    module: nn.Module
    image_size: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    autocast: torch.dtype | None = None
    resize: int | None = None
    make: Callable[[], nn.Module] | None = None
    micro_batch: int | None = None
    compiler: Compiler | None = None

    def __post_init__(self):
        self.module.eval().requires_grad_(False)

    # Weights

    @property
    def weights(self) -> Weights:
        """The module's own parameters by name; views, to be read and never written."""
        return {name: value.detach() for name, value in self.module.named_parameters()}

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, which gradients train; the other weights are buffers."""
        return tuple(name for name, _ in self.module.named_parameters())

    @functools.cached_property
    def dims(self) -> dict[str, int]:
        """Numbers of dimensions of the parameters, by name."""
        return {name: parameter.ndim for name, parameter in self.module.named_parameters()}

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Names of parameters and buffers: the weights that `logits` needs."""
        # As variables: detaching them would be an operation that a trace sees.
        return frozenset(self.module.state_dict(keep_vars=True))

    @functools.cached_property
    def constants(self) -> Weights:
        """Buffers that the module computes and no state dict has, such as tables of rotary positions."""
        return {name: tensor for name, tensor in self.module.named_buffers() if name not in self.names}

    def start(self, seed: int) -> Weights:
        """A random complete state dict, float32, a function of the seed alone; its tensors are fresh. Raises
        ValueError for a network without `make`."""
        if self.make is None:
            raise ValueError(f"{self.arch} cannot be built anew: it has no `make`")
        return dict(_seeded(self.make, seed).state_dict())

    # Structure

    @property
    def device(self) -> torch.device:
        """The device of the module's own parameters."""
        return next(self.module.parameters()).device

    @property
    def side(self) -> int:
        """Side in pixels of the images that reach the first layer."""
        return self.resize or self.image_size

    @property
    def patch_size(self) -> int:
        """Side in pixels of the patch behind one token of a ViT; a hybrid's stem shrinks the image first."""
        embed: Any = self.module.patch_embed
        return embed.feat_ratio()

    @functools.cached_property
    def any_size(self) -> bool:
        """Whether it is a ViT for images of any size, see `architectures.freeze`, without a classifier."""
        embed = getattr(self.module, "patch_embed", None)
        return not self.classifier and not getattr(embed, "strict_img_size", True)

    @functools.cached_property
    def stem(self) -> str:
        """Name of the first convolution, "" if there is none."""
        return next((name for name, part in self.module.named_modules() if isinstance(part, nn.Conv2d)), "")

    @functools.cached_property
    def classifier(self) -> str:
        """Name of the last linear layer, "" if the network ends in features."""
        if getattr(self.module, "num_classes", None) == 0:
            return ""
        layers = [name for name, part in self.module.named_modules() if isinstance(part, nn.Linear)]
        return layers[-1] if layers else ""

    @property
    def n_classes(self) -> int:
        """K, the outputs of the classifier."""
        layer: Any = self.module.get_submodule(self.classifier)
        return layer.out_features

    def is_head(self, name: str) -> bool:
        """Whether the weight called `name` is the classifier's."""
        return bool(self.classifier) and name.startswith(f"{self.classifier}.")

    @functools.cached_property
    def norms(self) -> tuple[str, ...]:
        """Names of all parameters and buffers of BatchNorm layers, not of LayerNorms."""
        return tuple(
            f"{name}.{own}"
            for name, part in self.module.named_modules()
            if isinstance(part, _BatchNorm)
            for own in part.state_dict()
        )

    @property
    def takes_factors(self) -> bool:
        """Whether its weights may be of several networks, with factors beside them, see `Pool.stack`."""
        return isinstance(self.module, VisionTransformer)

    @functools.cached_property
    def _of_products(self) -> frozenset[str]:
        """Names of the parameters of plain layers, which mixed precision casts; a subclass may do more with
        them first."""
        plain = (nn.Linear, nn.Conv2d, Linear)
        layers = [(name, part) for name, part in self.module.named_modules() if type(part) in plain]
        return frozenset(f"{name}.{own}" for name, part in layers for own, _ in part.named_parameters())

    def cast(self, weights: Weights) -> Weights:
        """Weights as mixed precision casts them in every pass, cast once; the same if there is none. Those
        that require gradients stay: passes that share a cast would add up gradients in its precision."""
        if self.autocast is None:
            return weights
        cast = {name for name in self._of_products & weights.keys() if not weights[name].requires_grad}
        return weights | {name: weights[name].to(self.autocast) for name in cast}

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
            layers = architectures.reached(layers, -1 if self.side >= LARGE else 0)
        return tuple(f"{name}.weight" for name in layers)

    def with_published_shortcuts(self) -> "Network":
        """The network with a fault of the published one with two BatchNorm sets: in a block with a downsample
        every image gets the shortcut of the batch's first."""
        module = copy.deepcopy(self.module)
        for name, part in module.named_modules():
            if name.endswith(".downsample"):
                part.register_forward_hook(lambda _part, _inputs, out: out[:1].expand_as(out))
        return dataclasses.replace(self, module=module)

    # Normalisation

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] to the network's own units: (N, 3, H, W) -> (N, 3, H, W)."""
        mean, std = self._statistics(images)
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`: (N, 3, H, W) -> (N, 3, H, W)."""
        mean, std = self._statistics(images)
        return images * std + mean

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (constant(numbers, images).view(3, 1, 1) for numbers in (self.mean, self.std))
        return mean, std


def features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """Features of `images` under `weights`: (N, 3, H, W) float in [0, 1] -> (N, D) float32.

    A network without a classifier returns them: those in `ARCHS` the CLS token after the final LayerNorm,
    timm's the output of their pooling. Otherwise they are the input of the classifier. A network without a
    classifier takes any image size: rows and columns beyond the last whole patch are ignored, and the
    position table is resized, for `ARCHS` as DINO does it, for timm's by timm's own rule.

    Raises:
        ValueError: the network has a classifier, and `weights` lacks a name.

    >>> features(network, network.weights, images).shape
    torch.Size([4, 96])
    """
    if network.classifier:
        _check_complete(network, weights)
        weights = weights | _identity(network, weights)
    return _forward(network, weights, images).float()


def logits(network: Network, weights: Weights, images: Tensor, training: bool = False) -> Tensor:
    """Logits of `images` under `weights`: (N, 3, S, S) float in [0, 1], S the `image_size` -> (N, K).

    Args:
        weights: a complete state dict, of one floating-point type and device with `images`.
        training: normalise by the batch's statistics, and update the running statistics (momentum 0.1,
            unbiased variance) IN PLACE in `weights`; otherwise by the running statistics, which stay.

    Raises:
        ValueError: the network has no classifier, or `weights` lacks a name: instead the module's own tensor
            would be used, and written to.
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


def level_features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """Features of P networks of one structure, each with images of its own: (P, N, 3, H, W) float in [0, 1]
    -> (P, N, D) float32. Weights are those of `Pool.stack`.

    One pass where there are several and the structure is made for it (`Network.takes_factors`), else a pass
    for each; of more than `network.micro_batch` images in parts.
    """
    return in_parts(functools.partial(_level_features, network, weights), images, network.micro_batch)


def _level_features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    levels = len(images)
    if levels > 1 and network.takes_factors:
        return features(network, weights, images.flatten(0, 1)).unflatten(0, (levels, -1))

    def alone(p: int) -> Weights:
        own = {name: each.ndim > network.dims.get(name, 3) for name, each in weights.items()}  # 3: of factors
        return {name: each[p] if own[name] else each for name, each in weights.items()}

    return torch.stack([features(network, alone(p), images[p]) for p in range(levels)])


def fixed_features(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """`features` of any number of images, without graph: (N, 3, H, W) -> (N, D)."""
    with torch.no_grad():
        return torch.cat([features(network, weights, part) for part in images.split(CHUNK)])


@compiled_if_asked
def _forward(network: Network, weights: Weights, images: Tensor) -> Tensor:
    """The module's output for images (N, 3, H, W) in [0, 1] under `weights`, in its present mode."""
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
    """A classifier that returns its input: sums of one feature and zeros, which are exact."""
    like = weights[f"{network.classifier}.weight"]
    dim = like.shape[1]
    own = {"weight": torch.eye(dim, dtype=like.dtype, device=like.device), "bias": like.new_zeros(dim)}
    named = {f"{network.classifier}.{part}": tensor for part, tensor in own.items()}
    return {name: tensor for name, tensor in named.items() if name in weights}


# Building


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch's own would seed CUDA's, too, and not restore it
        return make()


def untrained(base: str) -> tuple[Network, Origin]:
    """The network of a `base_arch` without a head, with random weights that are always the same; and where
    its pretrained weights come from."""
    if base in ARCHS:
        arch = ARCHS[base]
        make = functools.partial(architectures.build_network, arch)
        return Network(base, _seeded(make, 0), arch.image_size, arch.mean, arch.std, make=make), arch.origin
    make = functools.partial(architectures.build_timm_network, base)
    module: Any = _seeded(make, 0)
    mean, std = architectures.timm_statistics(module)
    side = module.pretrained_cfg["input_size"][-1]
    name, width = architectures.timm_name(base)
    named = f"{TIMM}{name}:{width}" if width else f"{TIMM}{name}"
    return Network(named, module, side, mean, std, make=make), architectures.timm_origin(module)


def projected(network: Network, width: int) -> Network:
    """A network of timm, whose module now ends in a linear layer (`width`, D) with random weights."""
    arch = f"{network.arch}:{width}"
    module = _seeded(functools.partial(architectures.with_projection, network.module, width), 0)
    make = functools.partial(architectures.build_timm_network, arch)
    return dataclasses.replace(network, arch=arch, module=module, make=make)


def build_classifier(
    arch: str, n_classes: int, image_size: int, *, resize: int | None = None, normalise: bool = True
) -> Network:
    """The classifier of K classes called `arch`, with random weights that are always the same.

    ResNets for images (or `resize`) under 64 px have a stem of 3x3, stride 1 and no max-pool; transformers
    have a position table of the requested size.

    Args:
        arch: a name in `CLASSIFIERS`, the published r18, r34 and r50, or `timm:NAME`.
        image_size, resize: as of `Network`.
        normalise: whether the network's input is normalised (ImageNet's mean and standard deviation, of
            timm's networks their own); False for networks that take pixels in [0, 1].

    Raises:
        InputError: the name is unknown or no classifier's, or images of that size are too small for it.
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
    except Exception as error:  # each network raises something else over images it does not support
        reason = first_line(error)
        raise InputError(f"--arch {network.arch!r} takes no images of {network.side} px: {reason}") from error
    if not isinstance(out, Tensor) or out.shape != (1, n_classes):
        raise InputError(fault)


def find_device(name: str) -> torch.device:
    """The device called `name`; "cuda" is the device of this process among torchrun's, and so is "auto" if
    this machine has one, else the CPU. Raises InputError where there is no such device."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cuda") and devices:  # torchrun's processes on one machine share its devices out
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % devices}"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if reason.startswith("Expected one of"):  # and then names twenty kinds
            reason = "torch knows no such device"
        raise InputError(
            f"--device {name!r} cannot be used here: {reason}; expected cpu, cuda, cuda:N or auto"
        ) from error
    return device
