"""Agreement with numbers recorded from an independent implementation of the method.

The folder comes from AMT_GOLDEN (default: shared/golden beside the project); every size and parameter is
read from its index or its arrays, so any set of the same kind can be put there. Tolerances are relative
Frobenius distances.
"""

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amt import merge, meta_tune
from amt.backbone import Arch, Backbone, build_network, features, resize_positions
from amt.checkpoint import check_architecture, pool_from_published
from amt.evaluate import prototype_classifier
from amt.lora import LoRAPool, Trim, split_principal, trim_singular_values, truncate
from amt.losses import kl_sum, robust_loss
from amt.merge import Coefficients, Routing, average_of, blend, compactness, support_cosines
from amt.meta_tune import Tuner, TuneSettings, query_outcome
from amt.perturb import (
    PIXELS,
    Perturbation,
    ValueSpace,
    apply_pyramid,
    perturb_weights,
    pyramid_attack,
    pyramid_step,
)
from amt.protonet import cosine_logits, prototypes
from meta_dataset_readers.episode import Episode

FOLDER = os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
ROOT = Path(FOLDER) / "amt"
INDEX = json.loads((ROOT / "index.json").read_text()) if (ROOT / "index.json").is_file() else None
ENTRIES = {(entry["file"], entry["name"]): entry for entry in INDEX["arrays"]} if INDEX else {}

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(INDEX is None, reason=f"no reference numbers at {ROOT}"),
]

ANY_LEVEL = Perturbation(8, 2)  # where the level is not what is compared


# Reading the recorded numbers


def arrays(file: str) -> dict[str, Tensor]:
    with np.load(ROOT / file, allow_pickle=False) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files if data[name].dtype.kind in "fiub"}


def texts(file: str, name: str) -> list[str]:
    with np.load(ROOT / file, allow_pickle=False) as data:
        return [str(text) for text in data[name]]


def params(file: str, name: str) -> dict:
    return ENTRIES[file, name].get("params") or {}


def meaning(file: str, name: str) -> str:
    return ENTRIES[file, name].get("meaning") or ""


def pixels(u8: Tensor) -> Tensor:
    return u8.float() / 255


def statistics() -> tuple[Tensor, Tensor]:
    normalisation = INDEX["meta"]["normalisation"]
    return torch.tensor(normalisation["mean"]).view(3, 1, 1), torch.tensor(normalisation["std"]).view(3, 1, 1)


def normalised(u8: Tensor) -> Tensor:
    mean, std = statistics()
    return (pixels(u8) - mean) / std


def normalised_space() -> ValueSpace:
    mean, std = statistics()
    return ValueSpace((0 - mean) / std, (1 - mean) / std, 1 / std)


def cut(tensor: Tensor, text: str) -> Tensor:
    """`tensor` indexed by the slices that `text` names in brackets; all of it where it names none."""
    found = re.search(r"\[([-\d:, ]*:[-\d:, ]*)\]", text)
    if found is None:
        return tensor
    slices = [
        slice(*(int(number) if number else None for number in part.strip().split(":")))
        for part in found[1].split(",")
    ]
    return tensor[(..., *slices)]


def assert_close(found: Tensor, expected: Tensor, tolerance: float, about: str = "") -> None:
    """Relative Frobenius distance below `tolerance`."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, about
    distance = (found - expected).norm() / expected.norm().clamp(min=1e-12)
    assert distance < tolerance, f"{about}: relative distance {distance:.3g}, allowed {tolerance:.3g}"


# The recorded models


@dataclasses.dataclass(frozen=True)
class Model:
    """A recorded pool, its backbone, and the same network fed with images that are normalised already."""

    pool: LoRAPool
    backbone: Backbone
    raw: Backbone


def model_of(state: dict[str, Tensor], heads: int) -> Model:
    """The model whose published state dict this is; all sizes but the number of heads are in the state."""
    adapters = {int(found[1]) for name in state if (found := re.search(r"lora_A\.(\d+)$", name))}
    pool = pool_from_published(state, (ANY_LEVEL,) * max(len(adapters), 1))
    dim, _, patch, _ = pool.residual["patch_embed.proj.weight"].shape
    side = patch * round((pool.residual["pos_embed"].shape[1] - 1) ** 0.5)
    hidden = len(pool.residual["blocks.0.mlp.fc1.weight"])
    depth = 1 + max(int(name.split(".")[1]) for name in pool.residual if name.startswith("blocks."))
    network = build_network(
        Arch(patch, dim, depth, heads, pretrained_size=side, image_size=side, mlp_ratio=(hidden + 0.5) / dim)
    )
    mean, std = (tuple(INDEX["meta"]["normalisation"][key]) for key in ("mean", "std"))
    raw = Backbone("golden", network, side, (0.0,) * 3, (1.0,) * 3)
    check_architecture(ROOT, pool, raw.weights, "golden")
    return Model(pool, dataclasses.replace(raw, mean=mean, std=std), raw)


@pytest.fixture(scope="module")
def single() -> Model:
    """The model of one LoRA."""
    return model_of(arrays("weights_amt.npz"), INDEX["meta"]["config"]["heads"])


@pytest.fixture(scope="module")
def several() -> Model:
    """The model of several LoRAs; everything but its factors is that of the model of one."""
    shared = {
        name.replace("backbone.", "backbone.model.", 1): tensor
        for name, tensor in arrays("weights_amt.npz").items()
        if "lora" not in name
    }
    model = model_of(shared | arrays("weights_merge.npz"), INDEX["meta"]["config"]["heads"])
    assert len(model.pool) == INDEX["meta"]["config"]["pool"]
    return model


@pytest.fixture(scope="module")
def attacked_models(single) -> dict[str, Model]:
    """By file of recorded attacks: the model attacked."""
    state = arrays("d_attack128.npz")
    state = {name.removeprefix("sd/"): tensor for name, tensor in state.items() if name.startswith("sd/")}
    large = model_of(state, INDEX["meta"]["config"]["d128"]["heads"])
    return {"d_attack.npz": single, "d_attack128.npz": large}


def as_published(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named and shaped like one adapter's factors, by their published names and shapes."""
    return {
        f"backbone.{name.replace('.weight.lora_', '.lora_')}": factor.reshape(-1, factor.shape[-1])
        for name, factor in factors.items()
    }


def trainable(pool: LoRAPool) -> LoRAPool:
    factors = {name: factor.clone().requires_grad_() for name, factor in pool.factors.items()}
    return dataclasses.replace(pool.with_factors(factors), scale=pool.scale.clone().requires_grad_())


# a: start


def test_svd_start():
    """The split of a weight into leading triplets and residual, plain and per block of a fused qkv."""
    file, data = "a_svd_init.npz", arrays("a_svd_init.npz")
    cases = sorted(name.removesuffix(".W") for name in data if name.endswith(".W"))
    assert cases
    for case in cases:
        weight, rank = data[f"{case}.W"], params(file, f"{case}.lora_A")["r"]
        groups = len(data[f"{case}.lora_A"]) // rank
        residual, A, B = split_principal(weight, rank, groups)
        product = (B @ A).reshape(weight.shape)
        assert_close(residual, data[f"{case}.W_res"], 5e-6, case)
        assert_close(product, data[f"{case}.BA" if f"{case}.BA" in data else f"{case}.delta"], 1e-5, case)
        published_A = data[f"{case}.lora_A"].reshape(A.shape)
        published_B = data[f"{case}.lora_B"].reshape(B.shape)
        signs = (A * published_A).sum(2).sign()
        assert_close(A * signs[:, :, None], published_A, 1e-4, case)
        assert_close(B * signs[:, None], published_B, 1e-4, case)
        if f"{case}.S" in data:
            values = data[f"{case}.S"]
            assert_close(A[0].norm(dim=1) ** 2, values[:rank], 2e-6, case)
            assert_close(torch.linalg.svdvals(residual)[: len(values) - rank], values[rank:], 1e-5, case)
        if f"{case}.x" in data:
            found = data[f"{case}.x"] @ (residual + product).T + data[f"{case}.b"]
            assert_close(found, data[f"{case}.y"], 1e-6, case)


# b, c: features, prototypes, logits


def test_backbone_features_at_every_image_size(single):
    """Position tables, features and patch tokens at square, oblong and ragged sizes."""
    data, weights = arrays("b_backbone.npz"), single.pool.merge([1.0])
    patch = single.backbone.network.patch_embed.patch_size[0]
    tokens = build_tokens(single)
    sizes = [name.removeprefix("feat_") for name in data if name.startswith("feat_")]
    assert sizes
    for size in sizes:
        images = pixels(data[f"x_{size}_u8"])
        assert_close(features(single.backbone, weights, images), data[f"feat_{size}"], 3e-6, size)
        rows, columns = (side // patch for side in images.shape[-2:])
        positions = resize_positions(weights["pos_embed"], (rows, columns))
        assert_close(positions, data[f"pos_{size}"], 1e-6, size)
        if f"tokens_{size}" in data:
            found = features(tokens, weights, images)
            assert_close(found[:, 1:], data[f"tokens_{size}"], 3e-6, size)


def build_tokens(model: Model) -> Backbone:
    """The model's backbone, giving every token instead of the first."""

    class Tokens(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.patch_embed = network, network.patch_embed

        def forward(self, images):
            return self.network.forward_features(images)

    class Named(torch.nn.Module):
        """Answers to timm's parameter names, as `features` uses them."""

    network = model.backbone.network
    named = Named()
    for name, child in network.named_children():
        setattr(named, name, child)
    named.cls_token, named.pos_embed = network.cls_token, network.pos_embed
    del Tokens
    named.__class__ = type("Tokens", (type(network),), {"forward": type(network).forward_features})
    named.__dict__.update({k: v for k, v in network.__dict__.items() if k not in named.__dict__})
    return dataclasses.replace(model.backbone, network=named)


def test_prototypes_and_logits(single):
    """Raw mean prototypes of unbalanced classes, and cosine logits for any head."""
    file, data = "c_protonet.npz", arrays("c_protonet.npz")
    weights = single.pool.merge([1.0])
    support = features(single.backbone, weights, pixels(data["sx_u8"]))
    centres = prototypes(support, data["sy"], int(data["sy"].max()) + 1)
    assert_close(support, data["supp_f"], 3e-6)
    assert_close(centres, data["prototypes"], 3e-6)
    query = features(single.backbone, weights, pixels(data["x_u8"]))
    heads = [name for name in data if name.startswith("logits_")]
    assert heads
    for name in heads:
        head = params(file, name)
        found = cosine_logits(query, centres, head["scale_cls"], head["bias"])
        assert_close(found, data[name], 2e-6, name)
