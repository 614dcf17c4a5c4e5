"""Classifiers for AutoLoRa: which weights get a low-rank branch, stems, sizes, and `logits` as a pure
function of weights and images."""

import functools

import pytest
import torch
import torchvision
from conftest import fails
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from amt.models.architectures import CLASSIFIERS, IMAGENET_MEAN, IMAGENET_STD
from amt.models.network import Network, build_classifier, features, logits, untrained
from amt.models.resnet import ResNet
from amt.models.wide_resnet import WideResNet


def unmade(arch: str, *arguments, **more) -> Network:
    """A network without numbers: large ones cost nothing."""
    with torch.device("meta"):
        return build_classifier(arch, *arguments, **more)


def images(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def factor_sizes(network: Network, rank: int) -> list[int]:
    """Numbers of A (r k, C_in k) and of B (C_out / g k, r k) for every adapted weight."""
    sizes = []
    for name in network.adapted():
        layer = network.module.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, nn.Conv2d):
            side, groups, inside, out = (
                layer.kernel_size[0],
                layer.groups,
                layer.in_channels,
                layer.out_channels,
            )
        else:
            side, groups, inside, out = 1, 1, layer.in_features, layer.out_features
        sizes += [rank * side * inside * side, out // groups * side * rank * side]
    return sizes


# Which weights are adapted


@pytest.mark.parametrize(
    ("arch", "side", "tensors", "numbers"),
    [("r18", 32, 38, 531_456), ("r18", 224, 38, 531_456), ("r50", 32, 104, 875_520), ("r34", 32, 70, None)],
)
def test_resnets_have_as_many_factors_as_published(arch, side, tensors, numbers):
    sizes = factor_sizes(unmade(arch, 10, side), 8)
    assert len(sizes) == tensors
    assert numbers is None or sum(sizes) == numbers


@pytest.mark.parametrize(("arch", "blocks"), [("vit_small", 12), ("vit_base", 12), ("deit_tiny", 12)])
def test_transformers_adapt_the_four_layers_of_every_block(arch, blocks):
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = tuple(f"blocks.{block}.{layer}.weight" for block in range(blocks) for layer in layers)
    network = unmade(arch, 10, 224)
    assert network.adapted() == network.adapted(published=True) == expected
    assert (network.stem, network.classifier, network.norms) == ("patch_embed.proj", "head", ())


@pytest.mark.parametrize(
    ("arch", "side"),
    [
        ("resnet_mini", 32),
        ("resnet50", 96),
        ("wrn28-10", 32),
        ("deit_small", 64),
        ("timm:resnet18", 32),
        ("timm:mobilenetv3_small_050", 64),  # grouped convolutions
        ("timm:convnext_atto", 64),
    ],
)
def test_every_convolution_and_linear_layer_is_adapted_but_the_first_and_the_last(arch, side):
    build_one = build_classifier if arch.startswith("timm:") else unmade
    network = build_one(arch, 7, side)
    layers = [
        f"{name}.weight"
        for name, part in network.module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    assert (layers[0], layers[-1]) == (f"{network.stem}.weight", f"{network.classifier}.weight")
    assert network.adapted() == tuple(layers[1:-1])
    assert network.n_classes == 7


def test_the_published_coverage_of_resnets_depends_on_the_size():
    everything = unmade("resnet18", 10, 32)
    assert everything.adapted(published=True) == everything.adapted()
    stl = unmade("resnet18", 10, 96).adapted(published=True)
    assert stl == tuple(f"layer{stage}.0.conv{number}.weight" for stage in (1, 2, 3, 4) for number in (1, 2))
    for high in (unmade("resnet50", 10, 224), unmade("resnet50", 10, 32, resize=224)):
        last = {1: 2, 2: 3, 3: 5, 4: 2}
        assert high.adapted(published=True) == tuple(
            f"layer{stage}.{block}.conv{number}.weight"
            for stage, block in last.items()
            for number in (1, 2, 3)
        )
    wide = unmade("wrn28-10", 10, 96)
    assert wide.adapted(published=True) == wide.adapted()


def test_norms_are_the_parameters_and_buffers_of_batch_normalisation():
    network = build_classifier("resnet_mini", 5, 32)
    owns = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert network.norms[:5] == tuple(f"bn1.{own}" for own in owns)
    assert set(network.norms) == {
        name for name in network.names if ".bn" in f".{name}" or "downsample.1" in name
    }
    assert set(network.parameters) == {name for name, _ in network.module.named_parameters()}
    assert network.names - set(network.parameters) == {
        name for name in network.norms if not name.endswith((".weight", ".bias"))
    }


# Structures


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_names_and_shapes_are_torchvisions(arch):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)(num_classes=10).state_dict()
    ours = unmade(arch, 10, 224).module.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


@pytest.mark.parametrize(
    ("arch", "block"), [("resnet18", BasicBlock), ("resnet50", Bottleneck)], ids=["basic", "bottleneck"]
)
def test_logits_are_torchvisions(arch, block):
    """The whole network, in both modes, on one state dict."""
    theirs = getattr(torchvision.models, arch)(num_classes=4)
    depths = tuple(len(getattr(theirs, f"layer{stage}")) for stage in (1, 2, 3, 4))
    make = functools.partial(ResNet, block, depths, (64, 128, 256, 512), 4, False)
    network = Network(arch, make(), 64, make=make)
    weights = copied(theirs.state_dict())
    batch = images(2, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = theirs.train()((batch - mean) / std)
        torch.testing.assert_close(logits(network, weights, batch, training=True), expected)
        assert all(torch.allclose(weights[name], value) for name, value in theirs.state_dict().items())
        torch.testing.assert_close(logits(network, weights, batch), theirs.eval()((batch - mean) / std))


@pytest.mark.parametrize("arch", ["resnet18", "timm:resnet18", "timm:resnet18d", "resnet_mini"])
def test_the_stem_of_small_images_keeps_their_resolution(arch):
    def first_block_sees(network: Network) -> int:
        seen = []
        handle = network.module.layer1.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[-1])
        )
        try:
            with torch.no_grad():
                logits(network, network.start(0), images(1, network.image_size))
        finally:
            handle.remove()
        return seen[0]

    assert first_block_sees(build_classifier(arch, 10, 32)) == 32
    assert first_block_sees(build_classifier(arch, 10, 64)) == 16
    assert first_block_sees(build_classifier(arch, 10, 16, resize=64)) == 16


def test_the_mini_network_is_of_the_promised_size():
    network = unmade("resnet_mini", 10, 32)
    assert sum(value.numel() for value in network.module.parameters()) == 19_954
    assert network.module.conv1.kernel_size == (3, 3)


def test_wide_resnet_has_the_size_and_names_of_robust_trainings_files():
    network = unmade("wideresnet28_10", 10, 32)
    assert network.arch == "wrn28-10"
    assert sum(value.numel() for value in network.module.parameters()) == 36_479_194
    assert len(network.adapted()) == 27
    assert {
        "block1.layer.0.bn1.weight",
        "block1.layer.0.convShortcut.weight",
        "bn1.running_var",
        "fc.bias",
    } <= set(network.names)
    assert "block2.layer.1.convShortcut.weight" not in network.names


def test_a_wide_unit_without_its_convolutions_is_its_shortcut():
    """Pre-activation: nothing is done to the sum."""
    module = WideResNet(10, 1, 3).eval()
    block = module.block1.layer[0]
    assert block.convShortcut is None  # 16 channels in, 16 out
    block.conv2.weight.data.zero_()
    x = images(2, 8)[:, :1].repeat(1, 16, 1, 1) - 0.5
    assert torch.equal(block(x), x)
    assert module(images(2, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"6 n \+ 4"):
        WideResNet(12, 1, 3)


@pytest.mark.parametrize(("side", "resize", "tokens"), [(224, None, 197), (96, None, 37), (32, 224, 197)])
def test_position_tables_are_of_the_size_that_reaches_the_network(side, resize, tokens):
    network = unmade("vit_small", 10, side, resize=resize)
    assert network.module.pos_embed.shape == (1, tokens, 384)
    assert (network.mean, network.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_all_names_and_aliases_build():
    for arch in CLASSIFIERS:
        assert unmade(arch, 3, 64).arch == arch
    for alias, arch in {
        "r34": "resnet34",
        "wrn-28-10": "wrn28-10",
        "deit_tiny_patch16_224": "deit_tiny",
    }.items():
        assert unmade(alias, 3, 64).arch == arch


@pytest.mark.parametrize(
    ("arch", "side", "message"),
    [
        ("resnet19", 32, "did you mean 'resnet18'"),
        ("timm:resnt18", 32, "did you mean 'timm:resnet18'"),
        ("timm:resnet18.nobody", 32, "did you mean 'timm:resnet18"),
        ("timm:nest_tiny_jx", 50, "cannot be built"),
        ("vit_small", 32, "at least 64 px"),
        ("timm:vit_tiny_patch16_224", 48, "at least 64 px"),
        ("timm:deit_tiny_distilled_patch16_224", 224, "one last linear layer"),
        ("timm:inception_v3", 32, "takes no images of 32 px"),
    ],
)
def test_what_cannot_be_built_is_told(arch, side, message):
    fails(message, lambda: build_classifier(arch, 10, side))


# Weights are an argument


def test_a_start_is_a_function_of_its_seed_alone():
    network = build_classifier("resnet_mini", 4, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = network.start(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = network.start(7)
    assert same(one, again) and one.keys() == network.names
    assert not torch.equal(one["conv1.weight"], network.start(8)["conv1.weight"])
    again["conv1.weight"].zero_()  # fresh tensors: nobody else sees that
    assert same(one, network.start(7))


def test_evaluation_changes_nothing():
    network = build_classifier("resnet_mini", 4, 32)
    weights = network.start(0)
    kept, own = copied(weights), copied(network.module.state_dict())
    logits(network, weights, images(3, 32))
    assert same(weights, kept) and same(network.module.state_dict(), own)


def test_training_updates_running_statistics_in_the_weights_and_never_in_the_module():
    network = build_classifier("resnet_mini", 4, 32)
    weights = network.start(0)
    kept, own = copied(weights), copied(network.module.state_dict())
    batch = images(3, 32)
    logits(network, weights, batch, training=True)

    changed = {name for name in weights if not torch.equal(weights[name], kept[name])}
    assert changed == network.names - set(network.parameters)
    assert same(network.module.state_dict(), own)
    assert not any(part.training for part in network.module.modules())

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    first = nn.functional.conv2d((batch - mean) / std, kept["conv1.weight"], padding=1)
    torch.testing.assert_close(weights["bn1.running_mean"], 0.1 * first.mean((0, 2, 3)))
    torch.testing.assert_close(weights["bn1.running_var"], 0.9 + 0.1 * first.var((0, 2, 3), unbiased=True))
    logits(network, weights, batch, training=True)
    assert int(weights["bn1.num_batches_tracked"]) == 2


def test_modes_leave_no_trace_even_where_the_network_fails():
    network = build_classifier("resnet_mini", 4, 32)
    with pytest.raises(RuntimeError):
        logits(network, network.start(0), torch.zeros(1, 2, 32, 32), training=True)
    assert not any(part.training for part in network.module.modules())


@pytest.mark.parametrize("arch", ["resnet_mini", "wide", "deit_tiny", "timm:mobilenetv3_small_050"])
def test_logits_are_the_classifier_of_the_features(arch):
    """Whatever the network: logits = features W^T + b; and features need no classifier to be had."""
    if arch == "wide":
        make = functools.partial(WideResNet, 10, 1, 4)
        network = Network("wide", make(), 64, make=make)
    else:
        network = build_classifier(arch, 4, 64)
    weights, batch = network.start(0), images(3, 64)
    W, b = (weights[f"{network.classifier}.{part}"] for part in ("weight", "bias"))
    kept = copied(weights)
    with torch.no_grad():
        found = features(network, weights, batch)
        torch.testing.assert_close(logits(network, weights, batch), found @ W.T + b)
        other = weights | {name: value + 1 for name, value in weights.items() if network.is_head(name)}
        assert torch.equal(features(network, other, batch), found)
    assert found.shape == (3, W.shape[1]) and found.dtype == torch.float32
    assert same(weights, kept)
    del weights[f"{network.stem}.weight"]
    with pytest.raises(ValueError, match="lack"):
        features(network, weights, batch)


def test_a_network_without_a_classifier_has_no_logits():
    network, _ = untrained("vit_mini")
    assert network.classifier == "" and not any(map(network.is_head, network.names))
    with pytest.raises(ValueError, match="vit_mini ends in features"):
        logits(network, network.start(0), images(1, 32))


def test_an_incomplete_state_is_refused():
    """Otherwise the module's own random tensors would be used, and written to."""
    network = build_classifier("resnet_mini", 4, 32)
    weights = network.start(0)
    del weights["bn1.running_mean"]
    with pytest.raises(ValueError, match="lack"):
        logits(network, weights, images(2, 32), training=True)


@pytest.mark.parametrize("arch", ["resnet_mini", "deit_tiny"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_every_parameter_and_the_image_in_float64(arch, training):
    network = build_classifier(arch, 4, 64)
    weights = {
        name: value.double() if value.is_floating_point() else value
        for name, value in network.start(0).items()
    }
    for name in network.parameters:
        weights[name].requires_grad_()
    batch = images(2, 64).double().requires_grad_()
    out = logits(network, weights, batch, training=training)
    assert out.dtype == torch.float64 and out.shape == (2, 4)
    wanted = {name: weights[name] for name in network.parameters}
    grads = torch.autograd.grad(out.square().sum(), [batch, *wanted.values()])
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert not any(value.requires_grad for value in network.module.parameters())


def test_images_are_enlarged_inside_and_normalised():
    """Nearest neighbour: one pixel becomes a square; mean and standard deviation act on [0, 1] images."""
    network = build_classifier("resnet_mini", 4, 16, resize=32)
    plain = build_classifier("resnet_mini", 4, 32, normalise=False)
    weights, batch = network.start(0), images(2, 16)
    enlarged = batch.repeat_interleave(2, -1).repeat_interleave(2, -2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = logits(plain, weights, (enlarged - mean) / std)
    torch.testing.assert_close(logits(network, weights, batch), expected)
    assert (plain.mean, plain.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
