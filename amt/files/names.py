"""What others call tensors: one cleaner of names, whatever network they are of.

    renames     into timm's names: of other libraries' ViTs, of DINOv2's and DINOv3's own, and of ResNets
    left out    what serves a pretraining task, or texts, or is not used; told with its number

`state_dicts` takes off before what training tools put around names. Knows no file.
"""

import re
from collections.abc import Container

Renames = tuple[tuple[re.Pattern[str], str], ...]


def renamed(name: str, renames: Renames, known: Container[str] = ()) -> str:
    """The name after every rename that fits, one after the other, until it is a `known` one."""
    for pattern, new in renames:
        name = name if name in known else pattern.sub(new, name)
    return name


def _of(*pairs: tuple[str, str]) -> Renames:
    """Renames whose patterns begin with a whole part of a name."""
    return tuple((re.compile(rf"(?<![^.]){pattern}"), new) for pattern, new in pairs)


def _at_start(*pairs: tuple[str, str]) -> Renames:
    return tuple((re.compile(rf"^{pattern}"), new) for pattern, new in pairs)


TOWER = _at_start(
    # OpenCLIP
    (r"conv1\.", "patch_embed.proj."),
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"transformer\.resblocks\.", "blocks."),
    (r"ln_pre\.", "norm_pre."),
    (r"ln_post\.", "norm."),
    (r"(blocks\.\d+)\.ln_", r"\1.norm"),
    (r"(blocks\.\d+\.attn)\.in_proj_", r"\1.qkv."),
    (r"(blocks\.\d+\.attn)\.out_proj\.", r"\1.proj."),
    (r"(blocks\.\d+\.mlp)\.c_fc\.", r"\1.fc1."),
    (r"(blocks\.\d+\.mlp)\.c_proj\.", r"\1.fc2."),
    # OpenCLIP on timm
    (r"head\.proj\.", "head."),
    (r"trunk\.", ""),
    # Hugging Face
    (r"visual_projection\.", "head."),
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.", "norm_pre."),  # so they spell it
    (r"post_layernorm\.", "norm."),
    (r"(encoder\.)?layers\.", "blocks."),
    (r"(blocks\.\d+)\.layer_norm", r"\1.norm"),
    (r"(blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
    # Hugging Face's ViTs without texts: ViT, DeiT, DINO, MAE, DINOv2, DINOv3
    (r"embeddings\.(cls|mask|register)_token", r"\1_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"(encoder\.)?layer\.", "blocks."),
    (r"layernorm\.", "norm."),
    (r"(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.attention\.(output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r"\1.attn.\3_proj."),
    (r"(blocks\.\d+)\.layer_scale(\d)\.lambda1", r"\1.ls\2.gamma"),
    (r"(blocks\.\d+)\.(intermediate\.dense|mlp\.up_proj|mlp\.weights_in)\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.(output\.dense|mlp\.down_proj|mlp\.weights_out)\.", r"\1.mlp.fc2."),
    (r"(blocks\.\d+\.mlp)\.gate_proj\.", r"\1.fc1_g."),
)
# Of DINOv2 and DINOv3: where a network of timm has the new name and not the old one.
DINO = _at_start(
    (r"(register|storage)_tokens", "reg_token"),
    (r"(blocks\.\d+)\.ls(\d)\.gamma", r"\1.gamma_\2"),
    (r"(blocks\.\d+\.mlp)\.fc1\.", r"\1.fc1_x."),
    (r"(blocks\.\d+\.mlp)\.w1\.", r"\1.fc1_g."),
    (r"(blocks\.\d+\.mlp)\.w2\.", r"\1.fc1_x."),
    (r"(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2."),
    (r"(blocks\.\d+\.mlp)\.w12\.", r"\1.fc1."),
)
RESNET = _of(
    (r"shortcut\.(?=[01]\.)", "downsample."),
    (r"downsample\.conv\.", "downsample.0."),
    (r"downsample\.bn\.", "downsample.1."),
    (r"(conv\d+|downsample\.0)\.conv\.", r"\1."),
)

# What lies beside an image tower.
TEXTS = re.compile(
    r"(text|text_model|transformer|ln_final|token_embedding)\..+|text_projection(\.weight|\.bias)?|attn_mask"
    r"|positional_embedding|logit_(scale|bias)"
)

# Of wrappers that normalise, torch.nn.Sequential among them, and of networks that keep it themselves.
NORMALISATION = re.compile(
    r"((attacker\.)?normali[sz]er?\.(new_)?|(0\.)?(pixel)?_?(?=(mean|std)$))(?P<what>.+)"
)
HEAD, LOSS, MEAN_AND_STD = "classification or projection head", "state of a loss", "normalisation"
_BESIDE = {  # the first that fits
    "LoRA factors": re.compile(r".+\.lora_[AB]_(nat|adv)"),  # their product is not in the weights beside them
    HEAD: re.compile(
        r"(fc|fc_downstream|linear|(\w+_)?classifier|heads?|head_\w+|projectors?|predictor|projection\w*"
        r"|prediction\w*|prototypes|pre_logits|pooler|\w+_head)\..+"
    ),
    LOSS: re.compile(r"(dino_loss|ibot_patch_loss|koleo_loss)\..+|queue(_ptr)?"),
    MEAN_AND_STD: NORMALISATION,
    "embedding of masked patches": re.compile(r"masked_embed|mask_token"),
    "decoder of masked patches": re.compile(
        r"decoder\..+|decoder_(embed|blocks|norm|pred)\..+|decoder_pos_embed"
    ),
    "constants of attention": re.compile(r".+\.bias_mask|rope_embed\.periods"),
    "counts of batches": re.compile(r"(.+\.)?num_batches_tracked"),
    # Of WideResNets, of ResNets with one more BatchNorm, of DINOv3 for small crops.
    "unused tensors": re.compile(r"sub_block1\..+|.*bn.*adv.*|local_cls_norm\..+"),
}


def beside(name: str) -> str | None:
    """What a tensor is that a network of images does not have: a part of its pretraining task, or otherwise
    beside the features; None: nothing that is known."""
    return next((what for what, names in _BESIDE.items() if names.fullmatch(name)), None)
