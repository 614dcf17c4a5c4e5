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


def _in_blocks(*pairs: tuple[str, str]) -> Renames:
    """Renames of what follows `blocks.N.`, which is the first group."""
    return _at_start(*((rf"(blocks\.\d+\.){pattern}", rf"\g<1>{new}") for pattern, new in pairs))


TOWER = (
    *_at_start(
        # OpenCLIP
        (r"conv1\.", "patch_embed.proj."),
        (r"class_embedding", "cls_token"),
        (r"positional_embedding", "pos_embed"),
        (r"transformer\.resblocks\.", "blocks."),
        (r"ln_pre\.", "norm_pre."),
        (r"ln_post\.", "norm."),
        # OpenCLIP on timm
        (r"head\.proj\.", "head."),
        (r"trunk\.", ""),
        # Hugging Face, of CLIP and SigLIP; ViT, DeiT, DINO and MAE; DINOv2 and DINOv3
        (r"visual_projection\.", "head."),
        (r"embeddings\.(class_embedding|cls_token)", "cls_token"),
        (r"embeddings\.(mask|register)_token", r"\1_token"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
        (r"embeddings\.position_embedding(s|\.weight)", "pos_embed"),
        (r"pre_layrnorm\.", "norm_pre."),  # so they spell it
        (r"(post_)?layernorm\.", "norm."),
        (r"(encoder\.)?layers?\.", "blocks."),
        (r"head\.probe", "attn_pool.latent"),
        (r"head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"head\.attention\.in_proj_", "attn_pool.qkv."),
        (r"head\.layernorm\.", "attn_pool.norm."),
        (r"head\.mlp\.", "attn_pool.mlp."),
    ),
    *_in_blocks(
        # OpenCLIP
        (r"ln_", "norm"),
        (r"attn\.in_proj_", "attn.qkv."),
        (r"attn\.out_proj\.", "attn.proj."),
        (r"mlp\.c_fc\.", "mlp.fc1."),
        (r"mlp\.c_proj\.", "mlp.fc2."),
        # Hugging Face
        (r"layer_norm", "norm"),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"(self_attn\.out_proj|attention\.output\.dense|attention\.o_proj)\.", "attn.proj."),
        (r"self_attn\.", "attn."),
        (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r"attn.\3_proj."),
        (r"layer_scale(\d)\.lambda1", r"ls\2.gamma"),
        (r"(intermediate\.dense|mlp\.up_proj|mlp\.weights_in)\.", "mlp.fc1."),
        (r"(output\.dense|mlp\.down_proj|mlp\.weights_out)\.", "mlp.fc2."),
        (r"mlp\.gate_proj\.", "mlp.fc1_g."),
    ),
)
# Of DINOv2 and DINOv3: where a network of timm has the new name and not the old one.
DINO = (
    *_at_start((r"(register|storage)_tokens", "reg_token")),
    *_in_blocks(
        (r"ls(\d)\.gamma", r"gamma_\2"),
        (r"mlp\.(fc1|w2)\.", "mlp.fc1_x."),
        (r"mlp\.w1\.", "mlp.fc1_g."),
        (r"mlp\.w3\.", "mlp.fc2."),
        (r"mlp\.w12\.", "mlp.fc1."),
    ),
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
