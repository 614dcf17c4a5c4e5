"""Files of robust pretraining: every published way of naming a network's weights is read into one, and what
is not read is told. Against recorded key conversions of the published code (marker `golden`), and against
files that are written here."""

import argparse
import functools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import fails
from safetensors.torch import save_file
from torch import Tensor

from amt.files.robust_weights import PRETRAININGS, read
from amt.models.architectures import IMAGENET_MEAN, IMAGENET_STD
from amt.models.network import Network, build_classifier, logits
from amt.models.wide_resnet import WideResNet

Weights = dict[str, Tensor]

FOLDER = os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
RECORD = Path(FOLDER) / "autolora" / "misc.json"
GOLDEN = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
golden = pytest.mark.golden
recorded = pytest.mark.skipif(not GOLDEN, reason=f"no reference numbers at {RECORD}")

COUNTER = "num_batches_tracked"


@functools.cache
def network(arch: str = "resnet_mini", n_classes: int = 5, side: int = 32) -> Network:
    return build_classifier(arch, n_classes, side)


def random_state(like: Weights, seed: int) -> Weights:
    """Numbers unlike any other tensor's; counters count to the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.full_like(value, seed)
        for name, value in like.items()
    }


@pytest.fixture
def mini():
    """A small network, its start, and pretrained weights for all of it."""
    start = network().start(0)
    return network(), start, random_state(start, seed=9)


def saved(folder: Path, content: object) -> Path:
    file = folder / "file.pt"
    torch.save(content, file)
    return file


def headless(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def wrapped(name: str) -> str:
    """The published LoRA layer's name for a convolution's weight."""
    return re.sub(r"(layer.*\.(conv\d|downsample\.0))\.weight", r"\1.conv.weight", name)


def old_shortcut(name: str) -> str:
    return name.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")


def dual(weights: Weights, natural: Weights) -> Weights:
    """As the dual-BatchNorm encoders of ACL and its successors are saved."""
    norms = set(network().norms)
    state = {}
    for name, value in weights.items():
        if name not in norms:
            state[old_shortcut(name)] = value
            continue
        layer, own = old_shortcut(name).rsplit(".", 1)
        state[f"{layer}.bn_list.0.{own}"] = natural[name]
        state[f"{layer}.bn_list.1.{own}"] = value
    return state


# Files of every kind


@pytest.mark.parametrize("place", ["state_dict_dual", "state_dict", "model", None])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "module.model.", "backbone.", "module.backbone."]
)
def test_containers_and_prefixes(tmp_path, mini, place, prefix):
    net, start, weights = mini
    state = {f"{prefix}{name}": value for name, value in weights.items()}
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1), place: state} if place else state
    found = read(saved(tmp_path, content), net, start)
    assert_same(found.weights, weights)
    assert found.head and not found.natural_norms
    assert (place or "plain") in found.kind


def test_of_several_containers_the_dual_one_counts(tmp_path, mini):
    net, start, weights = mini
    found = read(saved(tmp_path, {"state_dict": start, "state_dict_dual": weights}), net, start)
    assert_same(found.weights, weights)


def test_dual_batch_normalisation(tmp_path, mini):
    """Set 1 is the adversarial one and becomes the network's; set 0 is kept; heads are left out."""
    net, start, weights = mini
    natural = random_state({name: start[name] for name in net.norms}, seed=4)
    state = dual(headless(weights), natural) | {
        "normalize.mean": torch.tensor(IMAGENET_MEAN),
        "normalize.std": torch.tensor(IMAGENET_STD),
        "fc.fc1.weight": torch.rand(7, 64),
        "fc.bn1.bn_list.0.weight": torch.rand(7),
        "fc.bn1.bn_list.1.weight": torch.rand(7),
        "fc.fc2.weight": torch.rand(3, 7),
    }
    found = read(saved(tmp_path, {"state_dict": state, "epoch": 1}), net, start, "DynACL_AIR")
    assert_same(found.weights, start | headless(weights))
    assert_same(found.natural_norms, natural)
    assert not found.head and found.normalise is True
    assert "left out fc" in found.kind and "two sets of BatchNorm" in found.kind


def test_a_single_set_of_batch_normalisation_loads_under_any_name(tmp_path, mini):
    """The published code dies of an assertion where an ACL-like file has one set."""
    net, start, weights = mini
    state = {old_shortcut(name): value for name, value in weights.items()}
    found = read(saved(tmp_path, {"state_dict": state}), net, start, "DynACL++")
    assert_same(found.weights, weights)
    assert not found.natural_norms


def test_layers_that_were_wrapped_for_lora(tmp_path, mini):
    net, start, weights = mini
    state = {wrapped(name): value for name, value in weights.items()}
    assert "layer2.0.downsample.0.conv.weight" in state
    layers = [*(name.removesuffix(".weight") for name in net.adapted()), net.classifier]
    for layer in layers:
        state |= {f"{layer}.lora_A_nat": torch.rand(2, 3), f"{layer}.lora_B_nat": torch.rand(4, 2)}
    found = read(saved(tmp_path, {"state_dict": state}), net, start)
    assert_same(found.weights, weights)
    assert f"{2 * len(layers)} LoRA factors left out" in found.kind
    both = {"layer3.0.downsample.conv.conv.weight": state.pop("layer3.0.downsample.0.conv.weight")}
    assert_same(read(saved(tmp_path, state | both), net, start).weights, weights)


def test_a_robust_imagenet_file(tmp_path, mini):
    """Everything is there twice, the classifier has 1000 classes, and the normalisation is kept with it."""
    net, start, weights = mini
    imagenet = headless(weights) | {"fc.weight": torch.rand(1000, 64), "fc.bias": torch.rand(1000)}
    state = {f"module.attacker.model.{name}": value for name, value in imagenet.items()}
    state |= {f"module.model.{name}": value for name, value in imagenet.items()}
    for place in ("normalizer", "attacker.normalize"):
        state[f"module.{place}.new_mean"] = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        state[f"module.{place}.new_std"] = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict()
    content = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule,
        "epoch": 9,
        "amp": None,
    }
    found = read(saved(tmp_path, content), net, start)
    assert_same(found.weights, start | headless(weights))
    assert not found.head and found.normalise is True
    assert f"{len(imagenet)} second copies left out" in found.kind
    for values, expected in zip(found.statistics, (IMAGENET_MEAN, IMAGENET_STD), strict=True):
        assert values == pytest.approx(expected)
    alone = {name: value for name, value in state.items() if ".attacker." in name}
    assert_same(read(saved(tmp_path, {"model": alone}), net, start).weights, start | headless(weights))


def test_the_head_that_was_fine_tuned_is_taken_before_imagenets(tmp_path, mini):
    net, start, weights = mini
    state = headless(weights) | {
        "fc.weight": torch.rand(5, 64),
        "fc.bias": torch.rand(5),
        "fc_downstream.weight": weights["fc.weight"],
        "fc_downstream.bias": weights["fc.bias"],
    }
    found = read(saved(tmp_path, state), net, start)
    assert_same(found.weights, weights)
    assert found.head and "classifier fc_downstream; left out fc" in found.kind


def test_heads_of_self_supervision_are_left_out(tmp_path, mini):
    net, start, weights = mini
    state = {f"backbone.{name}": value for name, value in headless(weights).items()}
    state |= {
        "projector.0.weight": torch.rand(2, 2),
        "head_proj.0.weight": torch.rand(2),
        "head_pred.weight": torch.rand(2),
    }
    found = read(saved(tmp_path, state), net, start, "DeACL")
    assert_same(found.weights, start | headless(weights))
    assert "left out head_pred, head_proj, projector" in found.kind


def test_shortcuts_and_the_classifier_of_another_usual_naming(tmp_path, mini):
    net, start, weights = mini
    state = {
        name.replace("downsample.", "shortcut.").replace("fc.", "linear."): value
        for name, value in weights.items()
    }
    assert_same(read(saved(tmp_path, {"model": state}), net, start).weights, weights)


def test_counters_may_be_missing(tmp_path, mini):
    """Files older than BatchNorm's counters have none."""
    net, start, weights = mini
    state = {name: value for name, value in weights.items() if not name.endswith(COUNTER)}
    found = read(saved(tmp_path, state), net, start).weights
    assert_same(
        found, {name: start[name] if name.endswith(COUNTER) else value for name, value in weights.items()}
    )


def test_classifiers_of_ours_and_smaller_numbers(tmp_path, mini):
    """safetensors with plain names, in half precision: widened, which is exact. The header says how the input
    is normalised; one that makes no sense, or the state of a training, is refused."""
    net, start, weights = mini
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    about = {"kind": "classifier", "mean": [0, 0, 0], "std": [1, 1, 1], "image_size": 32}
    save_file(half, tmp_path / "classifier.safetensors", {"amt": json.dumps(about)})
    found = read(tmp_path / "classifier.safetensors", net, start)
    assert found.statistics == ((0, 0, 0), (1, 1, 1)) and found.about["image_size"] == 32
    for fault, reason in (({"std": [1, 0, 1]}, "damaged header"), ({"kind": "fine-tuning"}, "holds a fine-")):
        save_file(half, tmp_path / "other.safetensors", {"amt": json.dumps(about | fault)})
        fails(reason, lambda: read(tmp_path / "other.safetensors", net, start))
    assert_same(found.weights, {name: half[name].to(value.dtype) for name, value in weights.items()})


def test_wide_resnets(tmp_path):
    """The usual file: DataParallel's prefix, and a copy of the first block that is never used."""
    make = functools.partial(WideResNet, 10, 1, 5)
    net = Network("wide", make(), 32, make=make)
    start = net.start(0)
    weights = random_state(start, 3)
    state = {f"module.{name}": value for name, value in weights.items()}
    state["module.sub_block1.layer.0.conv1.weight"] = torch.rand(16, 16, 3, 3)
    found = read(saved(tmp_path, {"state_dict": state}), net, start)
    assert_same(found.weights, weights)
    assert found.head and "1 unused tensors left out" in found.kind


def test_transformers_and_their_position_tables(tmp_path):
    """timm's names, DeiT's nesting, ImageNet's head left out, the table resized and its own row kept."""
    net = build_classifier("timm:vit_tiny_patch16_224", 5, 64)
    start = net.start(0)
    weights = random_state(start, 1)
    state = headless(weights) | {
        "pos_embed": torch.rand(1, 1 + 14 * 14, 192),
        "head.weight": torch.rand(1000, 192),
        "head.bias": torch.rand(1000),
    }
    found = read(saved(tmp_path, {"model": state}), net, start)
    assert not found.head and "left out head" in found.kind
    for name in ("head.weight", "head.bias"):
        assert torch.equal(found.weights[name], start[name])
    table = found.weights.pop("pos_embed")
    assert table.shape == start["pos_embed"].shape
    assert torch.equal(table[:, 0], state["pos_embed"][:, 0])
    assert all(
        torch.equal(value, (start if "head" in name else weights)[name])
        for name, value in found.weights.items()
    )
    as_large = state | {"pos_embed": weights["pos_embed"]}
    assert torch.equal(read(saved(tmp_path, as_large), net, start).weights["pos_embed"], weights["pos_embed"])


def test_what_is_read_is_nobody_elses(tmp_path, mini):
    """Training writes into weights: neither the start nor a second reading may see that."""
    net, start, weights = mini
    file = saved(tmp_path, headless(weights))
    kept = {name: value.clone() for name, value in start.items()}
    found = read(file, net, start).weights
    for value in found.values():
        value.zero_()
    assert_same(start, kept)
    assert_same(read(file, net, start).weights, start | headless(weights))


def test_read_weights_run(tmp_path, mini):
    net, start, weights = mini
    found = read(saved(tmp_path, weights), net, start).weights
    batch = torch.rand(2, 3, 32, 32)
    assert torch.equal(logits(net, found, batch), logits(net, weights, batch))


# What content cannot tell


@pytest.mark.parametrize("pretraining", PRETRAININGS)
def test_only_two_kinds_of_pretraining_do_not_normalise(tmp_path, mini, pretraining):
    net, start, weights = mini
    file = saved(tmp_path, weights)
    expected = pretraining not in ("AdvCL", "A-InfoNCE")
    for spelling in (pretraining, pretraining.replace("_", "-"), pretraining.replace("-", "_").lower()):
        assert read(file, net, start, spelling).normalise is expected
    assert read(file, net, start).normalise is None


def test_an_unknown_pretraining_is_told(tmp_path, mini):
    net, start, weights = mini
    fails("did you mean 'DynACL'", lambda: read(saved(tmp_path, weights), net, start, "DynoACL"))


# Bad files


def test_a_file_of_another_architecture_lists_the_first_mismatches(tmp_path, mini):
    net, start, _ = mini
    with torch.device("meta"):
        other = build_classifier("resnet18", 5, 32).module.state_dict()
    state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in other.items()}
    error = fails("--arch resnet_mini: ", lambda: read(saved(tmp_path, {"model": state}), net, start))
    message = str(error)
    assert (
        "file.pt" in message and "unexpected tensor layer1.1.conv1.weight" in message and " more" in message
    )
    assert "conv1.weight has shape (64, 3, 3, 3), expected (8, 3, 3, 3)" in message
    assert len(message) < 1500


def test_a_missing_tensor_is_named(tmp_path, mini):
    net, start, weights = mini
    del weights["layer3.0.bn2.running_var"]
    fails("lacks tensor layer3.0.bn2.running_var", lambda: read(saved(tmp_path, weights), net, start))


def test_half_a_set_of_batch_normalisation_is_told(tmp_path, mini):
    net, start, weights = mini
    state = dual(weights, weights)
    del state["layer2.0.downsample.bn.bn_list.0.bias"]
    fails(
        r"natural BatchNorm: lacks tensor layer2\.0\.downsample\.1\.bias",
        lambda: read(saved(tmp_path, state), net, start),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var", "fc.bias"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, mini, name, value):
    net, start, weights = mini
    weights[name].view(-1)[0] = value
    fails(f"{name} holds values that are not finite", lambda: read(saved(tmp_path, weights), net, start))


def test_a_tensor_under_two_names_is_refused(tmp_path, mini):
    net, start, weights = mini
    state = weights | {"module.conv1.weight": weights["conv1.weight"] + 1}
    fails("conv1.weight under two names", lambda: read(saved(tmp_path, state), net, start))


def test_a_file_without_a_network_is_told(tmp_path, mini):
    net, start, _ = mini
    fails(
        "holds 'epoch', 'lr', expected tensors",
        lambda: read(saved(tmp_path, {"epoch": 3, "lr": 0.1}), net, start),
    )
    fails("no such checkpoint", lambda: read(tmp_path / "absent.pt", net, start))


# Against the published code


def conversions(*kinds: str) -> list:
    """Every recorded conversion with a map, by its table and the kind of its file."""
    return [
        pytest.param(table, kind, id=f"{table}-{kind}")
        for table in kinds
        for kind, entry in GOLDEN.get(table, {}).items()
        if "map" in entry
    ] or [pytest.param(None, None, marks=recorded)]


@golden
@pytest.mark.parametrize(("table", "kind"), conversions("key_conversion_lora", "key_conversion_plain"))
def test_weights_come_from_the_tensors_that_the_published_code_takes(tmp_path, table, kind):
    net = network(GOLDEN["architecture"], n_classes=3)
    start = net.start(0)
    entry = GOLDEN[table][kind]
    plain = {wrapped(name): name for name in net.names}
    sources = {plain.get(target, target): source for target, source in entry["map"].items()}
    sources = {
        target: source for target, source in sources.items() if target in net.names and "NEW(" not in source
    }
    assert sources.keys() == {name for name in net.names if not net.is_head(name)}

    shapes = {source: start[target].shape for target, source in sources.items()}
    # The other BatchNorm set is shaped like the one that is taken; heads are as they like.
    other = {source.replace(".bn_list.1.", ".bn_list.0."): shape for source, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.tensor(index)
        if name.endswith(COUNTER)
        else torch.rand((shapes | other).get(name, (3,)), generator=generator)
        for index, name in enumerate(GOLDEN["source_keys"][kind])
    }
    found = read(saved(tmp_path, {"state_dict": state}), net, start, kind if kind in PRETRAININGS else None)
    for target, source in sources.items():
        assert torch.equal(found.weights[target], state[source]), target
    assert not found.head
    assert all(torch.equal(found.weights[name], start[name]) for name in net.names if net.is_head(name))
    natural = {target: source for target, source in sources.items() if ".bn_list.1." in source}
    assert found.natural_norms.keys() == natural.keys()
    for target, source in natural.items():
        assert torch.equal(found.natural_norms[target], state[source.replace(".bn_list.1.", ".bn_list.0.")])


def renamings() -> list:
    entries = GOLDEN.get("highres_key_conversion", {})
    return [name for name, entry in entries.items() if "renamed" in entry] or [
        pytest.param(None, marks=recorded)
    ]


@golden
@pytest.mark.parametrize("name", renamings())
def test_high_resolution_files_load_as_published_and_as_published_code_saves_them(tmp_path, name):
    """The recorded renaming is of the adapted weights exactly; either spelling is read."""
    arch, _, place = name.partition("_")
    entry = GOLDEN["highres_key_conversion"][name]
    net = network(arch, n_classes=3, side=224)
    assert sorted(entry["renamed"]) == sorted(net.adapted())
    assert entry["lora_tensors"] == 2 * len(net.adapted())
    start = net.start(0)
    weights = random_state(start, 2)
    for rename in ({}, entry["renamed"]):
        state = {f"module.model.{rename.get(key, key)}": value for key, value in headless(weights).items()}
        state |= {
            f"module.model.fc.{part}": torch.rand(1000, *more)
            for part, more in (("weight", (2,)), ("bias", ()))
        }
        found = read(saved(tmp_path, {place: state, "epoch": 1}), net, start)
        assert_same(found.weights, start | headless(weights))


@golden
@pytest.mark.parametrize(
    "arch",
    [
        name.removesuffix("_params")
        for name in GOLDEN.get("highres_key_conversion", {})
        if name.endswith("_params")
    ]
    or [pytest.param(None, marks=recorded)],
)
def test_factors_are_as_many_numbers_as_recorded(arch):
    entry = GOLDEN["highres_key_conversion"][f"{arch}_params"]
    with torch.device("meta"):
        net = build_classifier(arch, 1000, 224)
    sides = [net.module.get_submodule(name.removesuffix(".weight")) for name in net.adapted()]
    rank = 8
    factors = sum(
        rank * part.kernel_size[0] ** 2 * (part.in_channels + part.out_channels // part.groups)
        for part in sides
    )
    assert factors == entry["lora"]
