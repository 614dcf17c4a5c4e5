"""Small networks of images and texts, as OpenCLIP and Hugging Face make them, and the same ViTs as timm's."""

import functools

import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIDE, PATCH, WIDTH, DEPTH, HEADS, SHARED = 32, 8, 64, 2, 2, 16  # SHARED: of the space of images and texts
MEAN, STD = (0.4814, 0.4578, 0.4082), (0.2686, 0.2613, 0.2757)
_CFG = {"input_size": (3, SIDE, SIDE), "mean": MEAN, "std": STD, "classifier": "head"}
default_cfgs = timm.models.generate_default_cfgs(
    {
        "toy_clip.openai": {"num_classes": SHARED, "hf_hub_id": "timm/", **_CFG},
        "toy_clip.openai_ft_in1k": {"num_classes": 10, "hf_hub_id": "timm/", **_CFG},
        "toy_clip_quickgelu.openai": {"num_classes": SHARED, "hf_hub_id": "timm/", **_CFG},
        "toy_siglip.webli": {"num_classes": 0, "hf_hub_id": "timm/", **_CFG},
        **{f"toy_{name}": {"num_classes": 0, **_CFG} for name in ("deit", "dinov2", "dinov3", "vit")},
    }
)


def _vit(name: str, pretrained: bool, given: dict, kind=VisionTransformer, **options) -> nn.Module:
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return timm.models.build_model_with_cfg(kind, name, pretrained, **{**shape, **options, **given})


_CLIP = {"pre_norm": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)}


@register_model
def toy_clip(pretrained=False, **kwargs):
    return _vit("toy_clip", pretrained, kwargs, **_CLIP)


@register_model
def toy_clip_quickgelu(pretrained=False, **kwargs):
    act = timm.layers.get_act_layer("quick_gelu")
    return _vit("toy_clip_quickgelu", pretrained, kwargs, act_layer=act, **_CLIP)


@register_model
def toy_siglip(pretrained=False, **kwargs):
    act = timm.layers.get_act_layer("gelu_tanh")
    return _vit("toy_siglip", pretrained, kwargs, class_token=False, global_pool="map", act_layer=act)


@register_model
def toy_vit(pretrained=False, **kwargs):
    return _vit("toy_vit", pretrained, kwargs)


@register_model
def toy_deit(pretrained=False, **kwargs):
    return _vit("toy_deit", pretrained, kwargs, VisionTransformerDistilled)


@register_model
def toy_dinov2(pretrained=False, **kwargs):
    return _vit("toy_dinov2", pretrained, kwargs, init_values=1e-5)


@register_model
def toy_dinov2_reg4(pretrained=False, **kwargs):
    return toy_dinov2(pretrained, reg_tokens=4, no_embed_class=True, **kwargs)


@register_model
def toy_dinov2_giant(pretrained=False, **kwargs):
    return toy_dinov2(pretrained, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5.5, **kwargs)


@register_model
def toy_dinov3(pretrained=False, **kwargs):
    rotary = {
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
    }
    norm = {"use_fc_norm": False, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)}
    rest = {"global_pool": "token", "init_values": 1e-5, "num_reg_tokens": 4, "use_abs_pos_emb": False}
    return _vit("toy_dinov3", pretrained, {**rotary, **norm, **rest, "qkv_bias": False, **kwargs}, Eva)


@register_model
def toy_dinov3_qkvb(pretrained=False, **kwargs):
    return toy_dinov3(pretrained, qkv_bias=True, **kwargs)


@register_model
def toy_dinov3_plus(pretrained=False, **kwargs):
    return toy_dinov3(pretrained, swiglu_mlp=True, swiglu_align_to=8, **kwargs)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights under which every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * noise + (0.0 if parameter.ndim > 1 else 0.5))
    return module.eval().requires_grad_(False)


_TEXTS = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}


def open_clip_model(**vision) -> nn.Module:
    """A CLIP of OpenCLIP's own; `vision` over its settings."""
    from open_clip.model import CLIP

    shape = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    quick = vision.pop("quick_gelu", False)
    return randomised(CLIP(SHARED, shape | {"image_size": SIDE} | vision, _TEXTS, quick_gelu=quick))


def open_clip_on_timm(**vision) -> nn.Module:
    """A CLIP of OpenCLIP with an image tower of timm's."""
    from open_clip.model import CustomTextCLIP

    tower = {"timm_model_name": "toy_siglip", "timm_model_pretrained": False, "image_size": SIDE}
    return randomised(CustomTextCLIP(SHARED, tower | vision, _TEXTS))


_SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
_VISION = _SHAPE | {"intermediate_size": 4 * WIDTH, "image_size": SIDE, "patch_size": PATCH}


def hugging_face(kind: str, act: str = "quick_gelu") -> nn.Module:
    """A network of transformers with or beside texts: CLIPModel, CLIPVisionModel,
    CLIPVisionModelWithProjection or SiglipVisionModel."""
    import transformers

    vision = dict(_VISION)
    texts = {"vocab_size": 99, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "CLIPModel":
        texts |= _SHAPE | {"num_hidden_layers": 1, "intermediate_size": 64}
        vision |= {"hidden_act": act}
        config = transformers.CLIPConfig(text_config=texts, vision_config=vision, projection_dim=SHARED)
    elif kind == "SiglipVisionModel":
        config = transformers.SiglipVisionConfig(**vision)
    else:
        config = transformers.CLIPVisionConfig(**vision, hidden_act=act, projection_dim=SHARED)
    return randomised(getattr(transformers, kind)(config))


def hugging_face_alone(kind: str, **settings) -> nn.Module:
    """A network of transformers without texts."""
    import transformers

    make = getattr(transformers, kind)
    return randomised(make(make.config_class(**_VISION | {"layer_norm_eps": 1e-6} | settings)))


def normal(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """Pixels in [0, 1] as a network takes them that normalises by `mean` and `std`."""
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pixels(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))
