"""The vision transformer of our own table is timm's: the same names, random weights, tokens and gradients,
bit for bit, and features up to rounding, since its last block computes the class token alone. So a pool means
the same whichever of the two its weights are loaded into."""

import copy
import dataclasses
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

from amt.models.architectures import ARCHS, Arch, build_network
from amt.models.network import Network, features
from amt.models.vit import resize_positions

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "vit_mini": ARCHS["vit_mini"],
    "two blocks of ViT-S": dataclasses.replace(ARCHS["dino_small_patch16"], depth=2),
    "a ratio that is rounded down": Arch(
        patch_size=3, dim=10, depth=1, heads=5, pretrained_size=9, image_size=9, mlp_ratio=1.77
    ),
}


def of_timm(arch: Arch) -> nn.Module:
    """timm's own network of these sizes, as it comes."""
    return timm.models.VisionTransformer(
        img_size=arch.pretrained_size,
        patch_size=arch.patch_size,
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=arch.heads,
        mlp_ratio=arch.mlp_ratio,
        num_classes=0,
        global_pool="token",
        dynamic_img_size=False,
    ).eval()


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, built from the same state of torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ours = build_network(request.param)
        torch.manual_seed(5)
        return ours, of_timm(request.param)


def test_random_weights_are_the_same_in_the_same_order(pair):
    ours, theirs = (module.state_dict() for module in pair)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [name for name, _ in pair[0].named_parameters()] == [
        name for name, _ in pair[1].named_parameters()
    ]


def outcome(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Features or tokens of visibly moved weights, and the gradients of images and of every parameter."""
    module = copy.deepcopy(module).requires_grad_()
    for number, parameter in enumerate(module.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data += 0.1 * noise
    images = images.clone().requires_grad_()
    found = module(images)
    return [found, *torch.autograd.grad(found.square().sum(), [images, *module.parameters()])]


def test_tokens_features_and_all_gradients_are_the_same(pair):
    side = pair[1].patch_embed.img_size[0]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    ours, theirs = (outcome(module, images) for module in pair)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    for module in pair:
        module.global_pool = ""
    ours, theirs = (outcome(module, images) for module in pair)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_token_is_there_for_those_who_ask(pair):
    side = pair[1].patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    pair[0].global_pool = ""
    with torch.no_grad():
        assert torch.equal(pair[0](images), pair[1].forward_features(images))


def test_a_network_is_pickled_and_copied_whole():
    arch = ARCHS["vit_mini"]
    network = Network("vit_mini", build_network(arch), arch.image_size)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    expected = features(network, network.weights, images)
    for other in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network)):
        assert torch.equal(features(other, other.weights, images), expected)


def test_a_table_that_is_trained_is_resized_where_bits_repeat(monkeypatch):
    """A GPU's bicubic resizing has no gradient that --deterministic allows."""
    there, table = [], torch.rand(1, 17, 4, requires_grad=True)
    monkeypatch.setattr(Tensor, "cpu", lambda self: there.append(self) or self)
    expected = resize_positions(table, (2, 2))
    assert there == []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch.equal(resize_positions(table, (2, 2)), expected) and len(there) == 1
    resize_positions(table.detach(), (2, 2))
    assert len(there) == 1
