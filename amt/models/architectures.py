"""The table of architectures: their names and sizes, where their weights come from, how they are built.

There are two kinds of names: `ARCHS`, vision transformers without a head, for few-shot tasks; and
`CLASSIFIERS`, which are fine-tuned on one data set. `timm:NAME` is either. Knows no file and no weights.
timm and torchvision are imported for the networks that are theirs: they take longer than most tasks.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from amt.models.vit import VisionTransformer
from amt.models.wide_resnet import WideResNet
from meta_dataset_readers.errors import InputError, first_line, nearest

TIMM = "timm:"  # prefix of the name of an architecture in timm's table instead of those below
PROJECTION = "head.weight"  # (E, D), of a network whose features are those of the space it shares with texts

Triple = tuple[float, float, float]  # one number per RGB channel

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

HUB_FILE = "model.safetensors"
_HUB = "https://huggingface.co"
_DINO = "https://dl.fbaipublicfiles.com/dino"
_DEIT = "https://dl.fbaipublicfiles.com/deit"
_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where pretrained weights come from: a repository on timm's hub, an address to download."""

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
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
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


class _Residual(NamedTuple):
    block: str  # of torchvision
    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)


_RESNETS = {
    "resnet18": _Residual("BasicBlock", (2, 2, 2, 2)),
    "resnet34": _Residual("BasicBlock", (3, 4, 6, 3)),
    "resnet50": _Residual("Bottleneck", (3, 4, 6, 3)),
    "resnet_mini": _Residual("BasicBlock", (1, 1, 1), (8, 16, 32)),
}
_WIDE = {"wrn28-10": (28, 10)}  # depth and widening
_OF_TIMM = {
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
}
CLASSIFIERS = (*_RESNETS, *_WIDE, *_OF_TIMM)  # besides timm:NAME
ALIASES = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "wrn-28-10": "wrn28-10",
    "wideresnet28_10": "wrn28-10",
    **{name: arch for arch, name in _OF_TIMM.items()},
}

SMALLEST = 16  # px: below, a last stage has one value per channel, which has no statistics
SMALL = 64  # px: images under this side get a ResNet's stem that does not shrink them
LARGE = 128  # px: from this side on, the published code for high resolutions applies
_WIDEST = 10**5  # of a projection
TOKENS = 4  # patches per side at least: attention over fewer has nothing to tell apart


def base_arch(name: str) -> str:
    """The architecture behind a name; `X_amt` (training) and `X_amt_merge` (testing) are X. Raises InputError
    for a name that is neither in the table nor, after `timm:`, in timm's."""
    base = re.sub("_amt(_merge)?$", "", name)
    if base.startswith(TIMM):
        _check_timm_name(base)
    elif base not in ARCHS:
        raise InputError(f"--arch {name!r} is not known; {nearest(base, ARCHS)}")
    return base


def timm_name(arch: str) -> tuple[str, int | None]:
    """NAME and E of `timm:NAME:E`: the features are those of a projection to E numbers, with 0 those before
    it. E is None where the name leaves it to the file of weights. Raises InputError for another E."""
    name, colon, width = arch.removeprefix(TIMM).partition(":")
    if not colon:
        return name, None
    if not (width.isdecimal() and int(width) <= _WIDEST):
        raise InputError(
            f"--arch {arch!r}: expected {TIMM}NAME, or {TIMM}NAME:E for a projection to E numbers"
        )
    return name, int(width)


def stated(arch: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """`arch` with the projection that saved weights of these shapes have, if the name leaves it open."""
    if not arch.startswith(TIMM) or timm_name(arch)[1] is not None:
        return arch
    return f"{arch}:{shapes[PROJECTION][0] if PROJECTION in shapes else 0}"


def projection_widths(arch: str) -> set[int | None]:
    """The widths E of the projections that timm's own files of this network have, none of classifiers."""
    import timm

    name = timm_name(arch)[0].partition(".")[0]
    tags = timm.list_models(f"{name}.*", pretrained=True) if "clip" in name else []
    return {timm.get_pretrained_cfg_value(tag, "num_classes") for tag in tags if "_ft_" not in tag}


def _check_timm_name(arch: str) -> None:
    import timm

    name, _ = timm_name(arch)
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    if name not in known:
        # nearest() would list all thousands of names where none is close.
        (closest,) = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)
        raise InputError(f"--arch {arch!r} is not known to timm; did you mean '{TIMM}{closest}'?")


def build_network(arch: Arch) -> nn.Module:
    """A randomly initialised vision transformer (LayerNorm eps 1e-6, exact GELU) without a head, in eval mode
    and without parameter gradients, for images of any size."""
    shape = arch.pretrained_size, arch.patch_size, arch.dim, arch.depth, arch.heads, arch.mlp_ratio
    return VisionTransformer(*shape).eval().requires_grad_(False)


def build_timm_network(arch: str) -> nn.Module:
    """A randomly initialised network of timm, the NAME of `timm:NAME`, without a classifier; of `timm:NAME:E`
    it ends in a projection to E features. Queries, keys and values are one layer, as the LoRAs adapt it.
    Raises InputError for what is no ViT for images of any size, or has no layer `qkv`."""
    import timm
    from timm.models.eva import Eva

    name, width = timm_name(arch)
    network = _created(name)
    if network is not None and not _has_one_qkv(network):
        network = _created(name, **one_qkv(network))
    if not isinstance(network, timm.models.VisionTransformer | Eva):
        raise InputError(f"--arch {arch!r} is no plain vision transformer that takes images of any size")
    if not _has_one_qkv(network):
        raise InputError(
            f"--arch {arch!r}: its queries, keys and values are separate layers, "
            "expected one layer attn.qkv for all three, as the LoRAs adapt it"
        )
    return freeze(with_projection(network, width or 0))


def _created(name: str, **options: Any) -> nn.Module | None:
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:  # the network has no such option
        return None


def one_qkv(network: nn.Module) -> dict[str, bool]:
    """The option by which timm makes a network with one layer for queries, keys and values: EVA's has it."""
    from timm.models.eva import Eva

    return {"qkv_fused": True} if isinstance(network, Eva) else {}


def _has_one_qkv(network: nn.Module) -> bool:
    return any(name.endswith("attn.qkv.weight") for name, _ in network.named_parameters())


def with_projection(network: Any, width: int) -> Any:
    """A network of timm without a classifier, now with `width` features: those of a linear layer after its
    pooling. 0 leaves it as it is."""
    if width:
        network.head = nn.Linear(network.num_features, width)
        network.num_features = width
    return network


def freeze(network: nn.Module) -> nn.Module:
    """`network` in eval mode, without parameter gradients, for images of any size."""
    embed: Any = network.patch_embed
    embed.strict_img_size = False
    return network.eval().requires_grad_(False)


def timm_statistics(network: nn.Module) -> tuple[Triple, Triple]:
    """The mean and standard deviation that timm knows for a network; ImageNet's if it knows none."""
    settings = getattr(network, "pretrained_cfg", {})
    return tuple(settings.get("mean", IMAGENET_MEAN)), tuple(settings.get("std", IMAGENET_STD))


def timm_origin(network: nn.Module) -> Origin:
    """Where the weights of a network of timm come from."""
    settings: Any = network.pretrained_cfg
    hub = settings.get("hf_hub_id")
    return Origin(hub, f"{_HUB}/{hub}/resolve/main/{HUB_FILE}" if hub else None)


def classifier_maker(arch: str, n_classes: int, side: int) -> Callable[[], nn.Module]:
    """A function that builds a classifier with random weights, drawn from torch's global generator.

    Args:
        arch: a name in `CLASSIFIERS`, or `timm:NAME`.
        n_classes: K.
        side: in pixels, of the images that reach the first layer.

    Raises:
        InputError: the name is unknown, or images of that size are too small. For timm's networks the
            returned function raises it.
    """
    if side < SMALLEST and (arch in _RESNETS or arch in _WIDE):
        raise InputError(f"--arch {arch!r}: {side} px are too small, expected {SMALLEST} px or more")
    if arch in _RESNETS:
        return functools.partial(_build_resnet, _RESNETS[arch], n_classes, side < SMALL)
    if arch in _WIDE:
        return functools.partial(WideResNet, *_WIDE[arch], n_classes)
    if arch in _OF_TIMM or arch.startswith(TIMM):
        return functools.partial(_build_timm_classifier, arch, n_classes, side)
    raise InputError(
        f"--arch {arch!r} is not known; {nearest(arch, (*CLASSIFIERS, *ALIASES, TIMM + 'NAME'))}"
    )


def _build_resnet(kind: _Residual, n_classes: int, small: bool) -> nn.Module:
    from torchvision.models import resnet

    from amt.models.resnet import ResNet

    return ResNet(getattr(resnet, kind.block), kind.depths, kind.widths, n_classes, small)


def _build_timm_classifier(arch: str, n_classes: int, side: int) -> nn.Module:
    """A random network of timm for images of `side` pixels."""
    import timm
    from timm.layers.drop import DropPath

    name = _OF_TIMM.get(arch, arch)
    if arch.startswith(TIMM):
        _check_timm_name(arch)
        name, width = timm_name(arch)
        if width is not None:
            raise InputError(f"--arch {arch!r}: a classifier takes no projection; expected '{TIMM}{name}'")
    try:
        try:
            module = timm.create_model(name, num_classes=n_classes, img_size=side)
        except TypeError:  # networks that take any size have no such option
            module = timm.create_model(name, num_classes=n_classes)
    except Exception as error:  # each network raises something else over a size it does not support
        reason = first_line(error)
        raise InputError(f"--arch {arch!r} cannot be built for images of {side} px: {reason}") from error
    for part in module.modules():  # dropout would not follow the seed of a run
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, DropPath):
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


def _keep_resolution(module: Any) -> None:
    """Give a ResNet of timm the stem for small images."""
    if isinstance(module.conv1, nn.Conv2d):
        wide = module.conv1.out_channels
        module.conv1 = nn.Conv2d(3, wide, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    else:  # a deep stem, whose first of three convolutions halves the resolution
        first: Any = module.conv1[0]
        first.stride = (1, 1)
    module.maxpool = nn.Identity()


def matching_archs(weights: Mapping[str, Tensor]) -> list[str]:
    """The names in `ARCHS` whose networks have the sizes of `weights`: patches (D, 3, p, p), positions
    (1, 1 + N, D), depth and MLP. Shapes cannot tell more."""

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


_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")  # of a ResNet, torchvision's or timm's


def reached(layers: Sequence[str], place: int) -> list[str]:
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
