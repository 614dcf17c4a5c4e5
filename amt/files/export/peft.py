"""PEFT: one LoRA, or a merge of several, as an adapter of Hugging Face's PEFT for the timm model.

    ours, one adapted layer:   W_res + sum_p c_p B_p A_p           W_res = W - B_0 A_0
    PEFT, the same layer:      W + (sum_p c_p B_p A_p - B_0 A_0)   a LoRA of rank (k + 1) r for k adapters

Does not import PEFT.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from amt.files.digests import serialise
from amt.files.export.merged import (
    MergedNetwork,
    as_metadata,
    at_image_size,
    check_kind,
    head_files,
    whole_patches,
)
from amt.files.export.readme import export_readme
from amt.files.export.timm_model import timm_call
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError

_SAME_NETWORK = 1e-5  # largest distance, relative to W, of W - W_res from rank r: far above float32 rounding


def peft_adapter(network: Network, pool: Pool, coefficients: Sequence[float]) -> tuple[dict, Weights]:
    """An adapter that makes the pretrained network into the merged one: PEFT's config and tensors.

    PEFT adds to the pretrained W, our factors to the residual W_res = W - B_0 A_0 that all adapters share. So
    the adapter holds the k merged pairs and minus the pair B_0 A_0, which is found again as W - W_res. A
    fused qkv has three groups of rank r; they become one LoRA of three times the rank, B block-diagonal.

        A (g R, in),  B (out, g R),  R = (k + 1) r;   scaling alpha / rank = 1 in every layer

    Such adapters of one pool may be mixed in PEFT, by weights that sum to 1 (`combination_type="cat"`).
    LayerNorms of the members are merged and kept whole (`modules_to_save`); PEFT mixes no such adapters.

    Args:
        network: the network with the pretrained weights that the pool was trained from.
        coefficients: one per adapter, summing to 1; those that are 0 take no rank.

    Returns:
        What adapter_config.json holds, and the tensors of adapter_model.safetensors, float32.

    Raises:
        InputError: the pool is none of LoRAs, or was not trained from these pretrained weights.
        ValueError: another number of coefficients than adapters.
    """
    check_kind(pool, "peft")
    chosen = [(p, float(c)) for p, c in zip(range(len(pool)), coefficients, strict=True) if c != 0]
    pretrained, tensors, ranks = network.weights, {}, {}
    for name, weight in pretrained.items():
        if name not in pool.A:
            if not torch.allclose(pool.residual[name], weight, rtol=_SAME_NETWORK, atol=_SAME_NETWORK):
                raise _other_network(name)
            continue
        A0, B0 = _removed(name, weight, pool)
        A = torch.cat([*(pool.A[name][p].double() for p, _ in chosen), A0], dim=1)
        B = torch.cat([*(c * pool.B[name][p].double() for p, c in chosen), -B0], dim=2)
        layer = name.removesuffix(".weight")
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A.flatten(0, 1).float()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.block_diag(*B).float()
        ranks[layer] = A.shape[0] * A.shape[1]
    merged = pool.merge(coefficients) if pool.whole else {}
    norms = {name: merged[name] for name in pool.whole}
    tensors |= {f"base_model.model.{name}": norm.float().contiguous() for name, norm in sorted(norms.items())}
    usual = min(ranks.values())
    unusual = {layer: rank for layer, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": list(ranks),
        **({"modules_to_save": sorted({name.rpartition(".")[0] for name in norms})} if norms else {}),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return config, tensors


def _removed(name: str, weight: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """A_0 (g, r, in) and B_0 (g, out/g, r) with B_0 A_0 = W - W_res, in double precision."""
    groups, rank = pool.A[name].shape[1:3]
    difference = (weight.double() - pool.residual[name].double()).reshape(groups, len(weight) // groups, -1)
    U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
    if S[:, rank:].norm() > _SAME_NETWORK * weight.norm():
        raise _other_network(name)
    return Vh[:, :rank], U[:, :, :rank] * S[:, None, :rank]


def _other_network(name: str) -> InputError:
    return InputError(
        f"{name}: the pool was not trained from these pretrained weights, so no adapter for them equals it; "
        "name its own by --pretrained_checkpoint"
    )


def adapter_files(folder: Path, merged: MergedNetwork, pool: Pool, about: dict) -> dict[str, bytes]:
    """The files of the adapter that is to lie in `folder`, by name; `about` describes it.

    Raises InputError as `peft_adapter`, and for a trimmed network.
    """
    if merged.trims:
        raise InputError("a trimmed network is no low-rank change of the pretrained one: PEFT cannot hold it")
    config, tensors = peft_adapter(merged.network, pool, merged.coefficients)
    network, table = merged.network, merged.weights.get("pos_embed")
    positions = at_image_size(network, merged.weights).get("pos_embed")
    resized = positions is not table
    tokens_per_side = math.isqrt(table.shape[1] - 1) if resized else network.image_size // network.patch_size
    loading = _loading_lines(merged, folder, tokens_per_side * network.patch_size, resized)
    readme = export_readme(merged, about, loading, f"{folder.name}/")
    files = {
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "adapter_model.safetensors": serialise(tensors, {"format": "pt", **as_metadata(about)}),
        "README.txt": readme.encode(),
    }
    if resized:
        files["positions.safetensors"] = serialise({"pos_embed": positions.contiguous()}, {})
    return files | head_files(merged, about)


def _loading_lines(merged: MergedNetwork, path: Path, pretrained_size: int, resized: bool) -> list[str]:
    network = merged.network
    lines = [
        "import timm",
        "from peft import PeftModel",
        *(["from safetensors.torch import load_file"] if resized else []),
        f"network = {timm_call(network, pretrained_size)}",
        f"network.load_state_dict(...)  # the pretrained weights of {network.arch}, as they are",
    ]
    if resized:  # timm's rule, and then DINO's in its place
        lines += [
            f"network.set_input_size(img_size={whole_patches(network)})",
            f"network.load_state_dict(load_file('{path.name}/positions.safetensors'), strict=False)",
        ]
    return lines + [
        f"network = PeftModel.from_pretrained(network, {path.name!r}).eval()",
        "features = network(images)",
    ]
