"""Where a pool starts, its features, prototypes and logits, by the recorded numbers."""

import copy
import dataclasses

import pytest
import torch
from amt_golden import arrays, assert_close, golden, params, pixels
from test_network import write_official

from amt.files.pretrained import read_weights
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import features
from amt.models.pool import split_principal
from amt.models.vit import resize_positions

pytestmark = golden

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
    patch = single.network.module.patch_embed.patch_size[0]
    every_token = copy.copy(single.network.module)
    every_token.global_pool = ""
    tokens = dataclasses.replace(single.network, module=every_token)
    sizes = [name.removeprefix("feat_") for name in data if name.startswith("feat_")]
    assert sizes
    for size in sizes:
        images = pixels(data[f"x_{size}_u8"])
        assert_close(features(single.network, weights, images), data[f"feat_{size}"], 3e-6, size)
        rows, columns = (side // patch for side in images.shape[-2:])
        positions = resize_positions(weights["pos_embed"], (rows, columns))
        assert_close(positions, data[f"pos_{size}"], 1e-6, size)
        if f"tokens_{size}" in data:
            found = features(tokens, weights, images)
            assert_close(found[:, 1:], data[f"tokens_{size}"], 3e-6, size)


def test_prototypes_and_logits(single):
    """Raw mean prototypes of unbalanced classes, and cosine logits for any head."""
    file, data = "c_protonet.npz", arrays("c_protonet.npz")
    weights = single.pool.merge([1.0])
    support = features(single.network, weights, pixels(data["sx_u8"]))
    centres = prototypes(support, data["sy"])
    assert_close(support, data["supp_f"], 3e-6)
    assert_close(centres, data["prototypes"], 3e-6)
    query = features(single.network, weights, pixels(data["x_u8"]))
    heads = [name for name in data if name.startswith("logits_")]
    assert heads
    for name in heads:
        head = params(file, name)
        found = cosine_logits(query, centres, head["scale_cls"], head["bias"])
        assert_close(found, data[name], 2e-6, name)


# checkpoints


@pytest.mark.parametrize("form", ["plain", "dino_full", "ibot", "deit", "safetensors"])
def test_backbone_features_from_every_official_format(single, form, tmp_path):
    """The recorded network's weights, written as each project publishes them, give the recorded features."""
    weights = single.pool.merge([1.0])
    path = write_official(tmp_path / "weights.pth", form, weights)
    found = read_weights(path, single.network.module)
    data = arrays("b_backbone.npz")
    for size in (name.removeprefix("feat_") for name in data if name.startswith("feat_")):
        images = pixels(data[f"x_{size}_u8"])
        assert_close(features(single.network, found, images), data[f"feat_{size}"], 3e-6, size)
