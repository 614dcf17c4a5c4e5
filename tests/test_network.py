"""Where a network's weights come from, how official files lay them out, and timm's networks under our
arithmetic. No weights are downloaded: small files are written in every format."""

import argparse
import dataclasses
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import fails, moved_apart, patterned_episode, random_backbone
from safetensors.torch import save_file
from timm.layers import GluMlp, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from amt.attacks.levels import Perturbation
from amt.cli import checkpoint as describing
from amt.files import checkpoint, state_dicts
from amt.files.pretrained import load_network, read_weights
from amt.models.architectures import (
    ARCHS,
    Arch,
    Origin,
    base_arch,
    build_network,
    build_timm_network,
    freeze,
    matching_archs,
)
from amt.models.network import Network, features, find_device
from amt.models.pool import principal_pool
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.errors import InputError

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=16, mlp_ratio=2.0)
FORMS = ("plain", "dino_full", "ibot", "ibot_full", "deit", "safetensors", "student_only")


def write_official(path: Path, form: str, weights: dict[str, Tensor]) -> Path:
    """A file of `weights` as the project behind `form` publishes its own, with whatever it adds."""
    dim = weights["cls_token"].shape[-1]

    def head(prefix: str = "", classes: int = 7) -> dict[str, Tensor]:
        return {f"{prefix}head.weight": torch.ones(classes, dim), f"{prefix}head.bias": torch.ones(classes)}

    def wrapped(prefix: str, sign: int = 1, **more: Tensor) -> dict[str, Tensor]:
        last = torch.ones(5, 3)
        projection = {
            f"{prefix}head.mlp.0.weight": torch.ones(3, dim),
            f"{prefix}head.mlp.1.num_batches_tracked": torch.tensor(4),
            f"{prefix}head.last_layer.weight_g": torch.ones(5, 1),
            f"{prefix}head.last_layer.weight_v": last,
            f"{prefix}head.last_layer2.weight_v": last,
            f"{prefix}head.last_norm.running_mean": torch.ones(5),
        }
        inner = {name: sign * tensor for name, tensor in (weights | more).items()}
        return {f"{prefix}backbone.{name}": tensor for name, tensor in inner.items()} | projection

    masked = {"masked_embed": torch.ones(1, dim)}
    training = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_small", use_fp16=True, global_crops_scale=(0.25, 1.0)),
        "fp16_scaler": {"scale": 65536.0},
    }
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in (weights | head()).items()}, path)
        return path
    content = {
        "plain": weights,
        "dino_full": {
            "student": wrapped("module.", -1),
            "teacher": wrapped(""),
            "dino_loss": {"center": torch.ones(1, 5)},
            **training,
        },
        "ibot": {"state_dict": weights | masked},
        "ibot_full": {
            "student": wrapped("module.", -1, **masked),
            "teacher": wrapped("module."),
            **training,
        },
        "deit": {"model": weights | head()},
        "student_only": {"student": wrapped("module.", **masked)},
    }
    torch.save(content[form], path)
    return path


@pytest.fixture(scope="module")
def tiny() -> Network:
    return random_backbone(ARCH)


# official formats


@pytest.mark.parametrize("form", FORMS)
def test_every_official_format_gives_the_weights_bit_for_bit(tiny, form, tmp_path):
    """Whatever the file's name; of teacher and student the teacher is taken; heads are left out."""
    found = read_weights(write_official(tmp_path / "some.bin", form, tiny.weights), tiny.module)
    assert found.keys() == tiny.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in tiny.weights.items())
    assert all(weight.dtype == torch.float32 for weight in found.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_widened(tiny, dtype, tmp_path):
    half = {name: weight.to(dtype) for name, weight in tiny.weights.items()}
    found = read_weights(write_official(tmp_path / "half.pth", "plain", half), tiny.module)
    assert all(torch.equal(found[name], weight.float()) for name, weight in half.items())


@pytest.mark.parametrize("form", ["plain", "ibot_full", "deit", "safetensors"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cls_token": torch.ones(1, 1, 5)}, ["cls_token has shape (1, 1, 5), expected (1, 1, 24)"]),
        ({"norm__bias": None, "norm__weight": None}, ["lacks tensor", "norm.bias", "norm.weight"]),
        ({"dist_token": torch.ones(1, 1, 24)}, ["unexpected tensor dist_token"]),
        (
            {"fc_norm__weight": torch.ones(24), "norm__bias": None},
            ["fc_norm.weight", "lacks tensor norm.bias"],
        ),
        ({"norm__bias": torch.full((24,), torch.nan)}, ["norm.bias", "not finite"]),
        ({"norm__bias": torch.full((24,), torch.inf)}, ["norm.bias", "not finite"]),
        ({"norm__bias": torch.ones(24, dtype=torch.int64)}, ["norm.bias is int64", "float32"]),
        ({"norm__bias": torch.ones(24, dtype=torch.float64)}, ["norm.bias is float64", "float32"]),
        ({"head__weight": torch.full((7, 24), torch.nan)}, []),
    ],
)
def test_every_tensor_is_accounted_for(tiny, form, changes, words, tmp_path):
    """What is missing, unexpected, misshapen, of another type or not finite is named, but in heads."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    weights = {name: tensor for name, tensor in (tiny.weights | named).items() if tensor is not None}
    path = write_official(tmp_path / "weights.pth", form, weights)
    if not words:
        read_weights(path, tiny.module)
        return
    with pytest.raises(InputError) as refused:
        read_weights(path, tiny.module)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in [str(path), *words])


def test_many_misfits_are_counted(tiny, tmp_path):
    path = write_official(tmp_path / "weights.pth", "plain", {"cls_token": torch.ones(1, 1, 24)})
    with pytest.raises(InputError, match=r"lacks tensor pos_embed, .* and \d+ more$"):
        read_weights(path, tiny.module)


def test_files_that_hold_no_backbone(tiny, tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"epoch": 3, "lr": 0.1}, path)
    with pytest.raises(InputError, match=r"'epoch', 'lr', expected tensors by name, or .* teacher, student"):
        read_weights(path, tiny.module)
    torch.save({"model": {"backbone.blocks.0.mlp.fc1.lora_A": torch.ones(2, 2)}}, path)
    with pytest.raises(InputError, match=r"holds LoRAs.*--resume"):
        read_weights(path, tiny.module)
    pool = principal_pool(tiny.weights, 2, (Perturbation(8, 2),))
    checkpoint.save(tmp_path / "pool.safetensors", checkpoint.Checkpoint(pool, {}))
    with pytest.raises(InputError, match=r"holds LoRAs.*--resume"):
        read_weights(tmp_path / "pool.safetensors", tiny.module)
    torch.save({"module.norm.bias": torch.ones(1), "norm.bias": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"norm.bias under two names, 'module.norm.bias' and 'norm.bias'"):
        read_weights(path, tiny.module)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.module.", "module.model.backbone."])
def test_prefixes_in_any_nesting_are_taken_off(tiny, prefix, tmp_path):
    state = {f"{prefix}{name}": weight for name, weight in tiny.weights.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "file.pth")
    found = read_weights(tmp_path / "file.pth", tiny.module)
    assert all(torch.equal(found[name], weight) for name, weight in tiny.weights.items())


def test_of_several_networks_it_is_told_which_were_not_taken():
    one, other = {"module.a": torch.zeros(1)}, {"b": torch.ones(1)}
    found = state_dicts.unwrap(Path("file"), {"student": other, "teacher": one, "epoch": 3})
    assert (found.weights.keys(), found.container, found.others) == ({"a"}, "teacher", ("student",))
    twice = {"attacker.model.a": torch.ones(1)} | one
    found = state_dicts.unwrap(Path("file"), twice)
    assert torch.equal(found.weights["a"], torch.zeros(1)) and found.copies == 1
    kept = state_dicts.unwrap(Path("file"), {"model.a": torch.ones(1)}, known={"model.a": (1,)})
    assert kept.weights.keys() == {"model.a"}


COMMON = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
DINOV2 = {"init_values": 1.0, "dynamic_img_size": True}
DINOV3 = {"global_pool": "token", "init_values": 1.0, "num_reg_tokens": 4, "use_abs_pos_emb": False}
DINOV3 |= {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True, "dynamic_img_size": True}


def official_of_dino(network: nn.Module) -> dict[str, Tensor]:
    """Random tensors of `network` by the names and in the shapes of DINOv2's and DINOv3's authors."""
    weights = {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    state = {"mask_token": torch.zeros(1, 32)}
    for name, tensor in weights.items():
        if name.endswith(".v_bias") or (name == "reg_token" and "pos_embed" in weights):
            continue
        if name.endswith(".q_bias"):
            other, name = weights[name.replace("q_bias", "v_bias")], name.replace("q_bias", "qkv.bias")
            tensor = torch.cat([tensor, torch.ones(32), other])
            state[f"{name}_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
        for timms, theirs in (
            ("gamma_1", "ls1.gamma"),
            ("gamma_2", "ls2.gamma"),
            ("reg_token", "storage_tokens"),
        ):
            name = name.replace(timms, theirs)
        if "blocks.0.mlp.fc1_g.weight" in weights:
            for timms, theirs in (("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3")):
                name = name.replace(timms, theirs)
        elif isinstance(network.blocks[0].mlp, GluMlp):
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state[name] = tensor
    if "reg_token" in weights and "pos_embed" in weights:
        state["register_tokens"] = weights["reg_token"]
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 32), weights["pos_embed"]], dim=1)
    if "pos_embed" not in weights:
        state["rope_embed.periods"] = torch.ones(4)
    return state


OF_DINO = {
    "DINOv2 with registers": lambda: VisionTransformer(**COMMON, **DINOV2, reg_tokens=4, no_embed_class=True),
    "DINOv2, gated": lambda: VisionTransformer(
        **COMMON, **DINOV2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=5
    ),
    "DINOv3": lambda: Eva(**COMMON, **DINOV3),
    "DINOv3 without biases": lambda: Eva(**COMMON, **DINOV3, qkv_bias=False),
    "DINOv3, gated": lambda: Eva(**COMMON, **DINOV3, swiglu_mlp=True, swiglu_align_to=8),
}


@pytest.mark.parametrize("which", OF_DINO)
def test_official_dinov2_and_dinov3_files_are_converted_as_timm_does(tmp_path, which):
    """DINOv2 with registers adds the CLS token's position to it; DINOv3 has its own names."""
    torch.manual_seed(0)
    network = freeze(OF_DINO[which]())
    official = official_of_dino(network)
    if "without" in which:
        official |= {f"blocks.{block}.attn.qkv.bias": torch.zeros(96) for block in range(2)}
    torch.save(official, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth", network)
    convert = sys.modules[type(network).__module__].checkpoint_filter_fn
    expected = convert(
        {name: tensor for name, tensor in official.items() if "bias_mask" not in name}, network
    )
    assert found.keys() == expected.keys() - {"rope_embed.periods"} == network.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    describing.main([str(tmp_path / "x.pth"), "--convert", str(tmp_path / "y.safetensors")])
    again = read_weights(tmp_path / "y.safetensors", network)
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())


def test_a_bias_is_never_dropped(tmp_path):
    """Which timm does where its network has none; nor is one of keys that no mask covers."""
    torch.manual_seed(0)
    network = freeze(Eva(**COMMON, **DINOV3))
    official = official_of_dino(network)
    torch.save(
        {name: tensor for name, tensor in official.items() if "mask" not in name}, tmp_path / "keys.pth"
    )
    torch.save(official, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"keys.pth: .*unexpected tensor blocks\.0\.attn\.qkv\.bias"):
        read_weights(tmp_path / "keys.pth", network)
    with pytest.raises(InputError, match=r"x.pth: holds unexpected tensor blocks\.0\.attn\.qkv\.bias"):
        read_weights(tmp_path / "x.pth", freeze(Eva(**COMMON, **DINOV3, qkv_bias=False)))


def test_half_a_dinov2_is_refused(tmp_path):
    network = freeze(OF_DINO["DINOv2 with registers"]())
    torch.save({"register_tokens": torch.ones(1, 4, 32), "mask_token": torch.ones(1, 32)}, tmp_path / "half")
    with pytest.raises(InputError, match="half: lacks tensor cls_token, pos_embed"):
        read_weights(tmp_path / "half", network)


# where weights come from


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty checkpoints/, and a hub that has nothing and cannot be reached."""

    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr("amt.files.shipped.BOX", tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setitem(ARCHS, "tiny", dataclasses.replace(ARCH, origin=Origin("timm/tiny", "URL")))
    return tmp_path


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_in_the_projects_folder_is_taken(tiny, folder, ending):
    write_official(folder / f"tiny{ending}", "deit", tiny.weights)
    found = load_network("tiny_amt_merge", image_size=24)
    assert found.arch == "tiny" and found.image_size == 24
    assert all(torch.equal(found.weights[name], weight) for name, weight in tiny.weights.items())


@pytest.mark.parametrize("cached", [False, True])
def test_the_hub_is_asked_when_there_is_no_file(tiny, folder, monkeypatch, cached):
    """A cached file is used without asking whether the hub is there."""
    path = write_official(folder / "elsewhere", "safetensors", tiny.weights)

    def fetch(*request, **_):
        assert request == ("timm/tiny", "model.safetensors")
        return str(path)

    if cached:
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", fetch)
    else:
        monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: None)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = load_network("tiny")
    assert all(torch.equal(found.weights[name], weight) for name, weight in tiny.weights.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_amt", ["timm's hub", "no route to host", "URL", "--pretrained_checkpoint", "tiny.pth"]),
        ("ibot_small_patch16", ["not have", "vits_16/checkpoint_teacher.pth", "--pretrained_checkpoint"]),
        ("timm:test_vit.r160_in1k_amt", ["timm/test_vit.r160_in1k", "--pretrained_checkpoint"]),
    ],
)
def test_without_a_network_one_line_says_what_to_put_where(folder, name, words):
    with pytest.raises(InputError) as refused:
        load_network(name)
    assert "\n" not in str(refused.value) and "more lines" not in str(refused.value)
    assert all(word in str(refused.value) for word in [name.removesuffix("_amt"), *words])


@pytest.mark.parametrize("name", [name for name in ARCHS if not name.startswith(("vit_mini", "ibot"))])
def test_the_table_agrees_with_timms(name):
    """The same weights by hub and by address, the same sizes and the same normalisation."""
    arch = ARCHS[name]
    settings = timm.get_pretrained_cfg(arch.origin.hub.removeprefix("timm/"))
    assert (settings.hf_hub_id, settings.url) == (arch.origin.hub, arch.origin.url)
    assert (settings.mean, settings.std) == (arch.mean, arch.std)
    assert settings.input_size == (3, arch.pretrained_size, arch.pretrained_size)


def test_the_table_has_every_published_name():
    for name in ("dino", "ibot", "deit"):
        for size in ("small", "base"):
            for ending in ("", "_amt", "_amt_merge"):
                assert base_arch(f"{name}_{size}_patch16{ending}") == f"{name}_{size}_patch16"


def test_shapes_tell_an_architecture_as_far_as_they_can(tiny):
    assert matching_archs(tiny.weights) == []
    assert matching_archs(build_network(ARCHS["vit_mini"]).state_dict()) == ["vit_mini"]
    small = build_network(ARCHS["dino_small_patch16"]).state_dict()
    assert matching_archs(small) == ["dino_small_patch16", "ibot_small_patch16", "deit_small_patch16"]


# timm's networks

# CLS token; register and mean; register and attention pooling as SigLIP; registers, rotary positions, layer
# scale (DINOv3); absolute and rotary positions, gated MLP
REAL = ["test_vit", "test_vit2", "test_vit3", "vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"]
LARGER = ["vit_small_patch14_reg4_dinov2", "vit_tiny_r_s16_p8_224"]


def randomised(network: nn.Module) -> nn.Module:
    """The network with weights under which every one of them matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.requires_grad_(False).parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + 0.1 * noise if parameter.ndim > 1 else 0.5 + 0.1 * noise)
    return network.eval()


@pytest.fixture(scope="module")
def from_timm(tmp_path_factory):
    """`from_timm(name)`: a network that timm alone has built, and our backbone with its weights."""

    def make(name: str) -> tuple[nn.Module, Network]:
        if name not in made:
            alone = randomised(timm.create_model(name, pretrained=False, num_classes=0))
            path = tmp_path_factory.mktemp("timm") / "model.safetensors"
            save_file(alone.state_dict(), path)
            made[name] = alone, load_network(f"timm:{name}_amt", path)
        return made[name]

    made: dict[str, tuple[nn.Module, Network]] = {}
    return make


@pytest.mark.parametrize("name", REAL + LARGER)
def test_features_of_timms_networks_are_their_own(from_timm, name):
    """At their native size, with their mean and deviation, whatever their pooling; and any size works."""
    alone, ours = from_timm(name)
    side = alone.pretrained_cfg["input_size"][-1]
    assert ours.arch == f"timm:{name}" and ours.image_size == side
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(alone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = alone((images - mean) / std)
    found = features(ours, ours.weights, images)
    assert found.shape == (1, alone.num_features)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))

    patch = ours.patch_size
    oblong = images[..., : 3 * patch + 1, : 2 * patch]
    assert torch.equal(
        features(ours, ours.weights, oblong), features(ours, ours.weights, oblong[..., : 3 * patch, :])
    )
    aware = build_timm_network(f"timm:{name}")
    aware.load_state_dict(alone.state_dict())
    expected = aware((oblong[..., : 3 * patch, :] - mean) / std)
    assert torch.allclose(features(ours, ours.weights, oblong), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REAL)
def test_pools_over_timms_networks(from_timm, name):
    """An untrained pool is the network, all tokens count, and a training step reaches every factor."""
    _, ours = from_timm(name)
    levels = (
        Perturbation(8, 2, steps=1, grids=(2, 0), scalars=(2.0, 1.0)),
        Perturbation(0.1, 0.025, steps=1),
    )
    pool = principal_pool(ours.weights, 2, levels)
    groups = {name.split(".")[-2]: factor.shape[1] for name, factor in pool.A.items()}
    assert groups["qkv"] == 3 and {groups[layer] for layer in groups if layer != "qkv"} == {1}
    assert {int(name.split(".")[1]) for name in pool.A if name.startswith("blocks.")} == set(
        range(len(ours.module.blocks))
    )
    images = torch.rand(2, 3, 2 * ours.patch_size, 2 * ours.patch_size)
    expected = features(ours, ours.weights, images)
    found = features(ours, pool.merge((0.3, 0.7)), images)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))

    for part in {"cls_token", "reg_token", "pos_embed"} & ours.weights.keys():
        other = features(ours, ours.weights | {part: -ours.weights[part]}, images)
        assert not torch.allclose(other, expected, rtol=1e-2), part

    before = moved_apart(pool)
    kept = {name: weight.clone() for name, weight in ours.weights.items()}
    tuner = Tuner(ours, before, TuneSettings(epochs=1, episodes_per_epoch=1, lr=0.1, warmup_lr=0.1))
    tuner.step(patterned_episode(0, side=2 * ours.patch_size))
    after = tuner.pool
    still = [
        f"{name} of level {p}"
        for name, factor in after.factors.items()
        for p in range(len(levels))
        if torch.equal(factor[p], before.factors[name][p])
    ]
    assert not still
    assert all(torch.equal(weight, kept[name]) for name, weight in ours.weights.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet18", ["no plain vision transformer"]),
        ("timm:beit_base_patch16_224", ["no plain vision transformer"]),
        (
            "timm:vit_tiny_patch16_rope_reg1_gap_25",
            ["did you mean 'timm:vit_medium_patch16_rope_reg1_gap_256'"],
        ),
        (
            "timm:vit_small_patch14_dinov2.lvd124m_amt",
            ["did you mean 'timm:vit_small_patch14_dinov2.lvd142m'"],
        ),
        ("timm:", ["did you mean"]),
        ("dino_smal_patch16_amt", ["did you mean 'dino_small_patch16'"]),
    ],
)
def test_other_networks_and_unknown_names_are_refused(name, words):
    with pytest.raises(InputError) as refused:
        load_network(name)
    assert all(word in str(refused.value) for word in [name.removesuffix("_amt"), *words])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_a_network_with_separate_queries_keys_and_values_is_refused(monkeypatch):
    """It has no attn.qkv that three groups of LoRA could adapt."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(
        timm, "create_model", lambda *_, **given: Eva(**sizes, qkv_fused=False, num_classes=0)
    )
    with pytest.raises(InputError, match=r"separate layers, expected one layer attn.qkv"):
        build_timm_network("timm:eva02_base_patch14_224")


def test_the_automatic_device_is_cuda_where_there_is_one(monkeypatch):
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["meta", "tpu", "cuda:x", ""])
def test_devices_that_cannot_be_used_are_one_short_line(name):
    error = str(fails(f"--device '{name}' cannot be used here", lambda: find_device(name)))
    assert "\n" not in error and len(error) < 150 and error.endswith("; expected cpu, cuda, cuda:N or auto")


def test_processes_of_torchrun_share_the_devices_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found = [find_device(name) for name in ("auto", "cuda", "cuda:1")]
        assert [each.index for each in found] == [rank % 2, rank % 2, 1]


def test_image_sizes_below_a_patch_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--image_size is 3, expected at least a patch of 4 px"):
        load_network("vit_mini", image_size=3)
