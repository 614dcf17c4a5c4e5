"""The table of architectures: their names and sizes, where their weights come from, how they are built.

Knows no file and no weights.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from meta_dataset_readers.errors import InputError, nearest

TIMM = "timm:"  # opens the name of an architecture that is not in the table below but in timm's

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)

HUB_FILE = "model.safetensors"

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
