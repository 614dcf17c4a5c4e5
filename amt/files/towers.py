"""Vision transformers of other libraries in timm's names: those of CLIP and its kin, and those without texts.

    OpenCLIP, OpenAI    visual.transformer.resblocks.0.attn.in_proj_weight, visual.proj, transformer...
    OpenCLIP on timm    visual.trunk.blocks.0.attn.qkv.weight, visual.head.proj.weight, text...
    Hugging Face        vision_model.encoder.layers.0.self_attn.q_proj.weight, visual_projection.weight, ...
    likewise, no texts  dinov2.encoder.layer.0.attention.attention.query.weight, classifier.weight
    DINOv2, DINOv3      register_tokens, blocks.0.ls1.gamma, blocks.0.attn.qkv.bias_mask, ...

A tower may be all that a file holds, or lie under any name beside a text tower, which is left out. The
projection into the space that images and texts share becomes the layer `head`. FARE and TeCoA (Schlarmann et
al. 2024, arxiv.org/abs/2402.12336) are published in these formats. `state_dicts` calls this last, when what
training tools put around is taken off; the names are in `names`.
"""

from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from amt.files import names
from amt.models.architectures import PROJECTION
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, printable


class Tower(NamedTuple):
    """A network in timm's names.

    Args:
        weights: its tensors, a projection (E, D) as the layer `head`.
        width: E, 0 without a projection.
        texts: how many tensors of a text tower were left out.
    """

    weights: Weights
    width: int = 0
    texts: int = 0


# A tensor by which a tower is known, and another that is beside it.
_SIGNS = (
    ("class_embedding", "conv1.weight"),
    ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"),
    ("trunk.patch_embed.proj.weight", "trunk.patch_embed.proj.weight"),
    ("embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"),
    ("embeddings.patch_embeddings.weight", "embeddings.register_tokens"),
)


def in_timms_names(path: Path, state: Weights, own: Container[str]) -> Tower:
    """The image tower among a file's tensors; those of other networks as they are.

    Args:
        path: for errors.
        state: by the file's names, without prefixes of training tools.
        own: names of the network to be filled, if it is known.

    Raises:
        InputError: there are several image towers, or a text tower without one.
    """
    roots = [
        name.removesuffix(sign)
        for name in state
        for sign, other in _SIGNS
        if name.endswith(sign) and name.removesuffix(sign) + other in state
    ]
    if not roots:
        if any(name.endswith(("token_embedding.weight", "word_embeddings.weight")) for name in state):
            raise InputError(f"{path}: holds a text tower and no image tower, expected a ViT's weights")
        return Tower(_of_network(state, own))
    if len(roots) > 1:
        shown = ", ".join(repr(printable(root)) for root in roots[:5])
        raise InputError(
            f"{path}: holds {len(roots)} image towers, under {shown}; expected one: save the one you mean "
            "in a file of its own"
        )
    found, texts = _renamed(state, roots[0])
    width = 0
    if PROJECTION in found:
        projection = found[PROJECTION]
        if projection.ndim != 2 or not projection.numel() or not is_whole(projection):
            raise InputError(
                f"{path}: its projection {PROJECTION} of shape {tuple(projection.shape)} is no matrix, or "
                "claims more numbers than the file holds"
            )
        width = len(projection)
        found.setdefault("head.bias", torch.zeros(width))
    return Tower(_of_network(found, own), width, texts)


def _renamed(state: Weights, root: str) -> tuple[Weights, int]:
    """What is under `root` and the projection beside it by timm's names, anything unknown by its own; and how
    many tensors of texts there are."""
    around = root[: root.rfind(".", 0, -1) + 1]
    found: Weights = {}
    texts = 0
    for full, tensor in state.items():
        if full.startswith(root):
            found |= _of_timm(full.removeprefix(root), tensor)
        elif full == f"{around}visual_projection.weight":
            found[PROJECTION] = tensor
        elif names.TEXTS.fullmatch(full.removeprefix(around)):
            texts += 1
        else:
            found[full] = tensor
    return found, texts


def _of_timm(name: str, tensor: Tensor) -> Weights:
    """One tensor as timm names and shapes it: views, which hold no memory of their own."""
    name = names.renamed(name, names.TOWER)
    if name == "proj" and tensor.ndim == 2:
        return {PROJECTION: tensor.T}
    if name == "embeddings.position_ids":  # 0, 1, 2, ...
        return {}
    if name == "cls_token" and tensor.ndim == 1:
        return {name: tensor[None, None]}
    if name == "pos_embed" and tensor.ndim == 2:
        return {name: tensor[None]}
    if name.startswith("attn_pool.qkv.") and tensor.ndim:  # one query for all images: its layer is alone
        third, part = len(tensor) // 3, name.removeprefix("attn_pool.qkv.")
        return {f"attn_pool.q.{part}": tensor[:third], f"attn_pool.kv.{part}": tensor[third:]}
    return {name: tensor}


def is_whole(*tensors: Tensor) -> bool:
    """Whether a file holds as many numbers as each claims, so that joining them takes no more memory."""
    return all(each.numel() * each.element_size() <= each.untyped_storage().nbytes() for each in tensors)


def _of_network(weights: Weights, own: Container[str]) -> Weights:
    """Tensors in timm's names as the network to be filled names and shapes them."""
    found: Weights = {}
    weights = _with_one_qkv(weights, own) | _masked(weights)
    if "reg_token" in own:
        weights |= _with_position(weights)
    for name, tensor in weights.items():
        before = name.removesuffix("qkv.bias")
        if name != before and name not in own and f"{before}qkv.weight" in own:
            found |= _of_biases(before, tensor, own)
        else:
            new = names.renamed(name, names.DINO, own)
            found[new if new in own and new not in weights else name] = tensor
    return found


def _with_position(weights: Weights) -> Weights:
    """DINOv2's CLS token with its position, and the positions of patches alone, as timm has them where there
    are registers; none of both without such."""
    token, table = weights.get("cls_token"), weights.get("pos_embed")
    if "register_tokens" not in weights or token is None or table is None or not is_whole(token):
        return {}
    if not table.ndim == token.ndim == 3 or table.shape[0::2] != token.shape[0::2]:
        return {}
    return {"cls_token": token + table[:, :1], "pos_embed": table[:, 1:]}


def _masked(weights: Weights) -> Weights:
    """DINOv3's biases that have its mask beside them, under which the keys' part counts as zero."""
    found: Weights = {}
    for name, bias in weights.items():
        if name.endswith("qkv.bias") and f"{name}_mask" in weights and _has_three_parts(bias):
            query, key, value = bias.chunk(3)
            found[name] = torch.cat([query, torch.zeros_like(key), value])
    return found


def _has_three_parts(bias: Tensor) -> bool:
    return is_whole(bias) and bias.ndim == 1 and len(bias) % 3 == 0


def _of_biases(before: str, bias: Tensor, own: Container[str]) -> Weights:
    """The bias of one layer for queries, keys and values for a network that has no such: two parts where it
    keeps those apart, none of zeros; any other is left as it is, and fits nowhere."""
    if _has_three_parts(bias):
        query, key, value = bias.chunk(3)
        if not key.any():
            if f"{before}q_bias" in own:
                return {f"{before}q_bias": query, f"{before}v_bias": value}
            if not (query.any() or value.any()):
                return {}
    return {f"{before}qkv.bias": bias}


def _with_one_qkv(weights: Weights, own: Container[str]) -> Weights:
    """Separate layers X.q_proj, X.k_proj and X.v_proj as one X.qkv, unless the network has them itself.

    A bias that keys have not is zero. EVA keeps the others' as X.q_bias and X.v_bias.
    """
    found = dict(weights)
    for name, query in weights.items():
        before, sign, part = name.rpartition("q_proj.")
        key, value = (weights.get(f"{before}{which}_proj.{part}") for which in "kv")
        if not sign or name in own or value is None or not query.ndim or not is_whole(query, value):
            continue
        if key is None and part == "bias" and f"{before}q_bias" in own:
            found |= {f"{before}q_bias": query, f"{before}v_bias": value}
        else:
            key = torch.zeros_like(query) if key is None and part == "bias" else key
            if key is None or not is_whole(key) or not query.shape == key.shape == value.shape:
                continue
            found[f"{before}qkv.{part}"] = torch.cat([query, key, value])
        for which in "qkv":
            found.pop(f"{before}{which}_proj.{part}", None)
    return found
