"""CLIP and its kin: files that the original libraries write give those libraries' features and gradients,
whatever is kept beside the image tower; files without one tower for the network are refused in one line."""

from pathlib import Path

import pytest
import timm
import torch
from commands import about, called
from conftest import fails, write_classes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_autolora_runs import command as autolora
from toy_towers import (
    DEPTH,
    MEAN,
    SHARED,
    SIDE,
    STD,
    WIDTH,
    hugging_face,
    hugging_face_alone,
    normal,
    open_clip_model,
    open_clip_on_timm,
    pixels,
    randomised,
)
from toy_training import command

from amt.__main__ import main as amt
from amt.files import robust_weights
from amt.files.pretrained import load_network, read_weights
from amt.models.architectures import freeze, stated
from amt.models.network import build_classifier, features, logits
from amt.models.pool import adapted_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def of_open_clip(**options):
    pytest.importorskip("open_clip")
    make = open_clip_on_timm if "timm_model_name" in options else open_clip_model
    model = make(**options)
    return model, model.encode_image


def of_hugging_face(kind: str, act: str):
    pytest.importorskip("transformers")
    model = hugging_face(kind, act)

    def found(images: Tensor) -> Tensor:
        seen = model.get_image_features(images) if kind == "CLIPModel" else model(images)
        return seen.image_embeds if "Projection" in kind else getattr(seen, "pooler_output", seen)

    return model, found


# --arch, the width of its features, the original network.
FORMATS = {
    "OpenCLIP": ("toy_clip", SHARED, lambda: of_open_clip()),
    "OpenAI": ("toy_clip_quickgelu", SHARED, lambda: of_open_clip(quick_gelu=True)),
    "SigLIP of OpenCLIP": (
        *("toy_siglip", WIDTH),
        lambda: of_open_clip(timm_model_name="toy_siglip", timm_pool="map", timm_proj="none"),
    ),
    "EVA's way": (
        "toy_clip",
        SHARED,
        lambda: of_open_clip(timm_model_name="toy_clip", timm_pool="token", timm_proj=None),
    ),
    "projection of its own": (
        *("toy_clip", SHARED),
        lambda: of_open_clip(timm_model_name="toy_clip", timm_pool="token", timm_proj="linear"),
    ),
    "CLIPModel": ("toy_clip_quickgelu", SHARED, lambda: of_hugging_face("CLIPModel", "quick_gelu")),
    "CLIPVisionModel": ("toy_clip", WIDTH, lambda: of_hugging_face("CLIPVisionModel", "gelu")),
    "with projection": (
        *("toy_clip", SHARED),
        lambda: of_hugging_face("CLIPVisionModelWithProjection", "gelu"),
    ),
    "SiglipVisionModel": ("toy_siglip", WIDTH, lambda: of_hugging_face("SiglipVisionModel", "")),
}


@pytest.mark.parametrize("form", FORMATS)
def test_features_and_gradients_are_the_original_librarys(tmp_path, form):
    name, width, make = FORMATS[form]
    model, original = make()
    torch.save({"state_dict": nn.DataParallel(model).state_dict(), "epoch": 3}, tmp_path / "x.pt")
    notes: list[str] = []
    ours = load_network(f"timm:{name}", tmp_path / "x.pt", tell=notes.append)
    assert (ours.arch, ours.module.num_features) == (
        f"timm:{name}" + f":{SHARED}" * (width == SHARED),
        width,
    )
    has_texts = any("token_embedding" in weight for weight in model.state_dict())
    assert ("tensors of texts left out" in " ".join(notes)) == has_texts

    found, expected = (pixels().requires_grad_() for _ in "12")
    ours_out, original_out = features(ours, ours.weights, found), original(normal(expected))
    assert torch.allclose(ours_out, original_out, atol=1e-5) and original_out.std() > 0.1
    pattern = torch.rand(ours_out.shape, generator=torch.Generator().manual_seed(1))
    for seen in (ours_out, original_out):
        (seen * pattern).sum().backward()
    assert torch.allclose(found.grad, expected.grad, atol=1e-5) and expected.grad.std() > 1e-3


# --arch, the class of transformers, its settings.
DINOV3 = {"num_register_tokens": 4, "layer_norm_eps": 1e-5}
NO_BIAS = {"query_bias": False, "value_bias": False}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
ALONE = {
    "ViT": ("toy_vit", "ViTModel", {}),
    "ViT with a classifier": ("toy_vit", "ViTForImageClassification", {}),
    "DeiT with two classifiers": ("toy_deit", "DeiTForImageClassificationWithTeacher", {}),
    "MAE": ("toy_vit", "ViTMAEForPreTraining", {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1}),
    "DINOv2": ("toy_dinov2", "Dinov2ForImageClassification", {}),
    "DINOv2 with registers": ("toy_dinov2_reg4", "Dinov2WithRegistersModel", {}),
    "DINOv2, gated": ("toy_dinov2_giant", "Dinov2Model", {"use_swiglu_ffn": True}),
    "DINOv3": ("toy_dinov3_qkvb", "DINOv3ViTModel", DINOV3),
    "DINOv3 without biases": ("toy_dinov3", "DINOv3ViTModel", DINOV3 | NO_BIAS),
    "DINOv3, gated": ("toy_dinov3_plus", "DINOv3ViTModel", DINOV3 | NO_BIAS | GATED),
}


@pytest.mark.parametrize("form", ALONE)
def test_networks_of_transformers_without_texts_give_its_features(tmp_path, form):
    """By the names in its files; and by those that a network has in memory, which are others."""
    pytest.importorskip("transformers")
    name, kind, settings = ALONE[form]
    model = hugging_face_alone(kind, **settings)
    body = model if kind.endswith("Model") else getattr(model, model.base_model_prefix)
    tokens = body(normal(pixels())).last_hidden_state
    expected = tokens[:, :2].mean(1) if "DeiT" in form else tokens[:, 0]
    model.save_pretrained(tmp_path)
    files = [tmp_path / "model.safetensors", saved(tmp_path, {"state_dict": model.state_dict()})]
    for file in files[:1] if form == "DINOv2, gated" else files:
        ours = load_network(f"timm:{name}", file)
        found = features(ours, ours.weights, pixels())
        assert torch.allclose(found, expected, atol=1e-5) and found.std() > 0.1


def test_biases_that_a_network_has_not_are_refused(tmp_path):
    pytest.importorskip("transformers")
    file = saved(tmp_path, hugging_face_alone("DINOv3ViTModel", **DINOV3).state_dict())
    fails("unexpected tensor blocks.0.attn.qkv.bias", lambda: load_network("timm:toy_dinov3", file))


def test_a_classifier_of_autolora_starts_from_a_network_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    file = saved(tmp_path, hugging_face_alone("Dinov2WithRegistersModel").state_dict())
    network = build_classifier("timm:toy_dinov2_reg4", 10, SIDE)
    found = robust_weights.read(file, network, network.start(0))
    features_only = load_network("timm:toy_dinov2_reg4", file).weights
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in features_only.items())


def clip() -> nn.Module:
    pytest.importorskip("open_clip")
    return open_clip_model()


def saved(folder, state, name="x.pt"):
    torch.save(state, folder / name)
    return folder / name


# What is put around a tower, as (state of a CLIP's) -> the file's.
AROUND = {
    "the tower alone": lambda clip: clip.visual.state_dict(),
    "in a module called model": lambda clip: {f"model.{n}": t for n, t in clip.visual.state_dict().items()},
    "one part of another network": lambda clip: {f"vlm.clip.{n}": t for n, t in clip.state_dict().items()},
    "with its normalisation": lambda clip: {
        **{f"model.{n}": t for n, t in clip.visual.state_dict().items()},
        "normalize.mean": torch.tensor(MEAN).view(1, 3, 1, 1),
        "normalize.std": torch.tensor(STD).view(1, 3, 1, 1),
    },
    "after its normalisation in a Sequential": lambda clip: {
        **{f"module.1.visual.{n}": t for n, t in clip.visual.state_dict().items()},
        "module.0.mean": torch.tensor(MEAN).view(1, 3, 1, 1),
        "module.0.std": torch.tensor(STD).view(1, 3, 1, 1),
    },
    "beside a prompter and an optimiser": lambda clip: {
        "state_dict": {"pad_up": torch.zeros(1, 3, 3, SIDE)},
        "vision_encoder_state_dict": clip.visual.state_dict(),
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    },
    "under a classifier": lambda clip: {
        **{f"image_encoder.model.{n}": t for n, t in clip.state_dict().items()},
        "classification_head.weight": torch.ones(10, SHARED),
    },
}


@pytest.mark.parametrize("around", AROUND)
def test_a_tower_is_found_whatever_is_around_it(tmp_path, around):
    model = clip()
    ours = load_network("timm:toy_clip", saved(tmp_path, AROUND[around](model)))
    found = features(ours, ours.weights, pixels())
    assert torch.allclose(found, model.encode_image(normal(pixels())), atol=1e-5)


@pytest.mark.parametrize("library", ["OpenCLIP", "timm"])
def test_a_converted_tower_keeps_its_projection(tmp_path, library):
    """A layer `head` of timm's is one by the network's name alone."""
    alone = clip() if library == "OpenCLIP" else randomised(timm.create_model("toy_clip", num_classes=SHARED))
    file = saved(tmp_path, alone.state_dict())
    flags = ["amt", "checkpoint", file, "--convert", tmp_path / "y.safetensors"]
    assert called(amt, flags).code == 0
    for arch in ("timm:toy_clip", "timm:toy_clip:0"):
        one, other = (load_network(arch, path) for path in (file, tmp_path / "y.safetensors"))
        assert torch.equal(features(one, one.weights, pixels()), features(other, other.weights, pixels()))


def test_the_projection_is_found_beside_a_tower_without_prefix(tmp_path):
    pytest.importorskip("transformers")
    model = hugging_face("CLIPVisionModelWithProjection", "gelu")
    state = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    ours = load_network("timm:toy_clip", saved(tmp_path, state))
    expected = model(normal(pixels())).image_embeds
    assert torch.allclose(features(ours, ours.weights, pixels()), expected, atol=1e-5)


def test_the_name_can_say_which_features_are_meant(tmp_path):
    """Without a number the file decides; 0 are the features before the projection, which is then left out."""
    model = clip()
    file = saved(tmp_path, model.state_dict())
    whole, before = load_network(f"timm:toy_clip:{SHARED}_amt", file), load_network("timm:toy_clip:0", file)
    assert (whole.arch, before.arch) == (f"timm:toy_clip:{SHARED}", "timm:toy_clip")
    seen = features(before, before.weights, pixels())
    assert seen.shape == (3, WIDTH)
    assert torch.allclose(seen @ model.visual.proj, features(whole, whole.weights, pixels()), atol=1e-5)
    assert stated("timm:toy_clip", {"head.weight": (9, 64)}) == "timm:toy_clip:9"
    assert stated("timm:toy_clip", {}) == "timm:toy_clip:0"
    fails(
        "takes no projection; expected 'timm:toy_clip'", lambda: build_classifier("timm:toy_clip:0", 9, SIDE)
    )
    assert stated("timm:toy_clip:7", {}) == "timm:toy_clip:7" and stated("vit_mini", {}) == "vit_mini"


@pytest.mark.parametrize(("classes", "width"), [(SHARED, SHARED), (10, WIDTH)])
def test_timms_own_files_have_a_projection_or_a_classifier(tmp_path, classes, width):
    """Which of both a layer `head` is, timm's table says of every name."""
    alone = randomised(timm.create_model("toy_clip", num_classes=classes))
    save_file(alone.state_dict(), tmp_path / "x.safetensors")
    ours = load_network("timm:toy_clip", tmp_path / "x.safetensors")
    found = features(ours, ours.weights, pixels())
    assert found.shape == (3, width)
    expected = (
        alone(normal(pixels()))
        if width == SHARED
        else alone.forward_head(alone.forward_features(normal(pixels())), pre_logits=True)
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_three_layers_become_one(tmp_path):
    """EVA-02's large networks have separate queries, keys without bias, and values."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    alone = randomised(timm.create_model("eva02_base_patch14_224", num_classes=0, **sizes))
    assert "blocks.0.attn.q_proj.weight" in alone.state_dict()
    one = timm.create_model("eva02_base_patch14_224", num_classes=0, qkv_fused=True, **sizes)
    one.dynamic_img_size = False
    one.load_state_dict(read_weights(saved(tmp_path, alone.state_dict()), freeze(one)))
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(one(images), alone(images), atol=1e-5)
    layers = {name.split(".", 2)[2] for name in adapted_layers(one.state_dict())}
    assert layers == {
        f"{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")
    }


# RobustBench and ARES keep their ViTs so.
WRAPPED = {
    "RobustBench": lambda state: {
        "normalize.mean": torch.full((1, 3, 1, 1), 0.5),
        "normalize.std": torch.full((1, 3, 1, 1), 0.5),
        **{f"model.{name}": tensor for name, tensor in state.items()},
    },
    "a Sequential": lambda state: {
        **{f"0.{name}": torch.full((3,), 0.5) for name in ("mean", "std")},
        **{f"1.{name}": tensor for name, tensor in state.items()},
    },
    "a network that normalises": lambda state: {
        **{f"model.{name}": tensor for name, tensor in state.items()},
        **{f"_{name}": torch.full((1, 3, 1, 1), 0.5) for name in ("mean", "std")},
    },
    "ARES": lambda state: {"state_dict_ema": {f"module.{name}": t for name, t in state.items()}, "epoch": 9},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_robust_classifiers_of_imagenet_give_their_features(tmp_path, wrapped):
    alone = randomised(timm.create_model("test_vit"))
    ours = load_network("timm:test_vit", saved(tmp_path, WRAPPED[wrapped](alone.state_dict())))
    images = pixels(2, 160)
    expected = alone.forward_head(
        alone.forward_features(normal(images, (0.5,) * 3, (0.5,) * 3)), pre_logits=True
    )
    assert torch.allclose(features(ours, ours.weights, images), expected, atol=1e-5)


def twice(clip: nn.Module) -> dict:
    tower = clip.visual.state_dict()
    return {f"{kind}.visual.{name}": t for kind in ("clean", "robust") for name, t in tower.items()}


# Name, what the file holds, words of the error.
BAD = {
    "texts alone": (
        *("toy_clip", lambda clip: {n: t for n, t in clip.state_dict().items() if "visual." not in n}),
        "holds a text tower and no image tower",
    ),
    "two towers": ("toy_clip", twice, "holds 2 image towers, under 'clean.visual.', 'robust.visual.'"),
    "another size": (
        *("toy_clip", lambda _: open_clip_model(patch_size=16).state_dict()),
        r"has shape \(64, 3, 16, 16\), expected \(64, 3, 8, 8\)",
    ),
    "no projection": (
        *("toy_clip:16", lambda clip: {n: t for n, t in clip.visual.state_dict().items() if n != "proj"}),
        "lacks tensor head.weight, head.bias",
    ),
    "another projection": (
        *("toy_clip:8", lambda clip: clip.state_dict()),
        r"head.weight has shape \(16, 64\), expected \(8, 64\)",
    ),
    "another pooling": ("toy_siglip", lambda clip: clip.state_dict(), "lacks tensor .*attn_pool"),
    "another normalisation": (
        *("toy_clip", lambda clip: AROUND["with its normalisation"](clip) | {"normalize.std": torch.ones(3)}),
        "normalises by mean 0.4814 0.4578 0.4082 and std 1 1 1, --arch timm:toy_clip",
    ),
    "something of a third kind": (
        *("toy_clip", lambda clip: clip.state_dict() | {"audio.conv1.weight": torch.ones(2, 2)}),
        "unexpected tensor audio.conv1.weight",
    ),
    "a projection that is nowhere": (
        *("toy_clip", lambda clip: clip.visual.state_dict() | {"proj": torch.ones(1).expand(64, 10**9)}),
        r"its projection head.weight of shape \(1000000000, 64\) is no matrix, or claims more numbers",
    ),
    "a projection of nothing": (
        *("toy_clip", lambda clip: clip.visual.state_dict() | {"proj": torch.ones(0, 10**12)}),
        r"its projection head.weight of shape \(1000000000000, 0\) is no matrix",
    ),
    "a projection that is a number": (
        *("toy_clip", lambda clip: {"head.weight": torch.tensor(1.0)}),
        "lacks tensor cls_token",
    ),
    "keys that are numbers": (
        "toy_clip",
        lambda _: {f"blocks.0.attn.{w}_proj.weight": torch.tensor(1.0) for w in "qkv"},
        "unexpected tensor blocks.0.attn.q_proj.weight",
    ),
    "one name twice, nowhere": (
        "toy_clip",
        lambda _: {name: torch.ones(1).expand(10**6, 10**6) for name in ("a", "module.a")},
        "holds tensor a under two names",
    ),
    "keys that are nowhere": (
        "toy_clip",
        lambda _: {f"blocks.0.attn.{w}_proj.weight": torch.ones(1).expand(10**6, 10**6) for w in "qkv"},
        "lacks tensor",
    ),
    "no number": ("toy_clip:all", lambda clip: {}, "expected timm:NAME, or timm:NAME:E"),
    "a huge number": ("toy_clip:9999999", lambda clip: {}, "expected timm:NAME, or timm:NAME:E"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_without_one_tower_for_the_network_are_refused(tmp_path, case):
    name, state, words = BAD[case]
    file = saved(tmp_path, state(clip()))
    error = str(fails(words, lambda: load_network(f"timm:{name}", file)))
    assert "\n" not in error and len(error) < 700


def test_a_classifier_of_autolora_starts_from_a_tower(tmp_path):
    """Its layer `head` is for the classes, and no projection, though it be as wide."""
    model = clip()
    network = build_classifier("timm:toy_clip", SHARED, SIDE)
    found = robust_weights.read(saved(tmp_path, model.state_dict()), network, network.start(0))
    assert not found.head and "projection to texts left out" in found.kind
    weights = found.weights | {"head.weight": model.visual.proj.T, "head.bias": torch.zeros(SHARED)}
    assert torch.allclose(logits(network, weights, pixels()), model.encode_image(normal(pixels())), atol=1e-5)
    assert len(network.adapted()) == 4 * DEPTH


@pytest.mark.parametrize("library", ["OpenCLIP", "transformers"])
def test_autolora_tunes_a_tower_by_its_command(cifar, tmp_path, library):
    """SLF trains the classifier alone, on the tower as the file has it; AFF moves all of it."""
    if library == "OpenCLIP":
        arch, mode, file = "timm:toy_clip", "SLF", saved(tmp_path, clip().state_dict())
    else:
        pytest.importorskip("transformers")
        arch, mode, file = "timm:toy_clip_quickgelu", "AFF", tmp_path / "hf" / "model.safetensors"
        hugging_face("CLIPVisionModelWithProjection").save_pretrained(file.parent)
    flags = ("--arch", arch, "--checkpoint", file, "--mode", mode, "--epochs", 1)
    ended = autolora(*cifar.flags(tmp_path / "run", *flags))
    assert ended.code == 0, ended.err
    assert f"{file}: plain tensors" in ended.out and "projection to texts left out" in ended.out
    assert "nothing tells whether its pre-training normalised" not in ended.out
    assert len((tmp_path / "run" / mode / "test" / "rows.jsonl").read_text().splitlines()) == 20
    best = load_file(tmp_path / "run" / mode / "best.safetensors")
    assert best["head.weight"].shape == (10, WIDTH) and best["head.weight"].any()
    tower = load_network(f"{arch}:0", file).weights
    assert all(torch.equal(best[name], tensor) for name, tensor in tower.items()) == (mode == "SLF")
    said = about(tmp_path / "run" / mode / "best.safetensors")
    assert torch.allclose(torch.tensor([said["mean"], said["std"]]), torch.tensor([MEAN, STD]), atol=1e-3)


# --- the tool chain --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_clip(world, tmp_path_factory) -> tuple[Path, Path]:
    """A file of OpenCLIP, and a pool that main.py has trained from it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.save(clip().state_dict(), folder / "clip.pt")
    flags = ("--arch", "timm:toy_clip", "--pretrained_checkpoint", folder / "clip.pt")
    ended = command("main", *world.train(folder / "run", *flags, "--epochs", 1, "--nEpisode", 1))
    assert ended.code == 0, ended.err
    return folder / "clip.pt", folder / "run" / "best.safetensors"


def test_a_pool_is_trained_tested_and_used_like_any(world, trained_clip, tmp_path, monkeypatch):
    """The checkpoint says which features are meant: nobody has to name the projection."""
    file, pool = trained_clip
    assert about(pool)["arch"] == f"timm:toy_clip:{SHARED}"
    flags = ("--arch", "timm:toy_clip", "--resume", pool, "--pretrained_checkpoint", file)
    mixed = ("--head", "mix", "of=prototypes", "other=pretrained")
    ended = command("test_meta_dataset", *world.test(tmp_path / "test", *flags, *mixed, "--nTestEpisode", 1))
    assert ended.code == 0, ended.err
    support = write_classes(tmp_path / "photos", one=2, two=2)
    ended = called(amt, ["amt", "predict", pool, "--support", support, support / "one", "--epsilon"])
    assert ended.code == 0 and "one" in ended.out, ended.err
    for head in ("prototypes", "lda"):
        out, words = tmp_path / head, ("--support", support, "--head", head)
        ended = called(amt, ["amt", "export", pool, "--to", "timm", "--out", out, *words])
        assert ended.code == 0, ended.err
        again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert again(pixels()).shape == (3, 2 if head == "lda" else SHARED)
