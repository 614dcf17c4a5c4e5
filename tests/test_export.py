"""Ways out: every format gives the same features elsewhere, loaded as its README says."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import patterned_episode, random_backbone
from safetensors import safe_open
from safetensors.torch import load_file
from toy_export import LEVELS, SIDE, TINY, assert_same, follow_readme, images, pool_of, with_task
from toy_towers import randomised

from amt.files import checkpoint, export
from amt.files.export import MergedNetwork, merged_network
from amt.models.architectures import ARCHS, Arch, freeze
from amt.models.heads import cosine_logits
from amt.models.network import Network, features, untrained
from amt.models.pool import Pool, principal_pool
from amt.models.trim import Trim
from meta_dataset_readers.errors import InputError

GOLDEN = Path(os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))

MIXED = (0.25, 0.75, 0.0)


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(TINY)


@pytest.fixture(scope="module")
def pool(network) -> Pool:
    return pool_of(network)


@pytest.fixture(scope="module")
def merged(network, pool) -> MergedNetwork:
    return with_task(merged_network(network, pool, MIXED), patterned_episode(seed=0, side=SIDE))


def expected(merged: MergedNetwork, seen: torch.Tensor) -> torch.Tensor:
    """What our own code computes."""
    with torch.no_grad():
        return features(merged.network, merged.weights, seen)


def logits_of(merged: MergedNetwork, found: torch.Tensor) -> torch.Tensor:
    return cosine_logits(found, merged.head.centres, merged.scale, merged.bias)


# --- timm ------------------------------------------------------------------------------------------------


def test_timm_takes_the_state_dict_as_it_is(merged, pool, tmp_path, monkeypatch):
    """Loaded by the lines in the README, timm's own model returns our features at our image size."""
    file, readme, beside = export.save(tmp_path / "net.safetensors", "timm", merged, pool)
    seen = images()
    found = follow_readme(readme.read_text(), tmp_path, monkeypatch, images=merged.network.normalise(seen))
    assert_same(found["features"], expected(merged, seen), 1e-6)
    assert_same(load_file(beside)["prototypes"], merged.head.centres, 0)
    assert_same(logits_of(merged, found["features"]), logits_of(merged, expected(merged, seen)), 1e-6)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[export.METADATA])
    assert about["classes"] == list(merged.classes) and about["coefficients"] == list(MIXED)
    assert (about["mean"], about["std"]) == (list(merged.network.mean), list(merged.network.std))


@pytest.mark.parametrize("arch", ["dino_small_patch16", "deit_base_patch16", "vit_mini"])
def test_the_networks_of_the_table_by_their_timm_names(arch):
    """Names and shapes of the whole table fit, at the image size used and at the pretrained one."""
    with torch.device("meta"):
        network = Network(arch, untrained(arch)[0].module, ARCHS[arch].image_size)
        for side in (ARCHS[arch].image_size, ARCHS[arch].pretrained_size):
            call = export.timm_call(network, side)
            theirs = timm.create_model(call.name, **call.options).state_dict()
            weights = network.module.state_dict()
            tokens = 1 + (side // ARCHS[arch].patch_size) ** 2
            weights["pos_embed"] = torch.empty(1, tokens, ARCHS[arch].dim)
            assert {name: t.shape for name, t in theirs.items()} == {n: t.shape for n, t in weights.items()}
    assert call.name == {
        "dino_small_patch16": "vit_small_patch16_224",
        "deit_base_patch16": "vit_base_patch16_224",
    }.get(arch, call.name)


def test_timm_gets_the_width_of_the_mlp_despite_rounding():
    """timm computes it as int(dim * ratio), which for a quotient of floats may fall one short."""
    dim, hidden = 22, 15
    assert int(dim * (hidden / dim)) == hidden - 1, "the example has become too easy"
    network = random_backbone(Arch(8, dim, 1, 2, 8, 8, mlp_ratio=(hidden + 0.5) / dim))
    call = export.timm_call(network, 8)
    assert timm.create_model(call.name, **call.options).blocks[0].mlp.fc1.out_features == hidden


def test_the_pretrained_network_comes_back_from_an_untrained_pool(network):
    untouched = principal_pool(network.weights, 2, LEVELS)
    state = export.timm_state(merged_network(network, untouched, MIXED))
    for name, weight in network.weights.items():
        if name != "pos_embed":
            assert_same(state[name], weight, 1e-6)


@pytest.mark.parametrize("to", ["timm", "peft", "torch"])
def test_networks_of_timms_own_at_another_size(to, tmp_path, monkeypatch):
    """timm resizes their positions itself; of pixels beyond whole patches the README tells."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        merged = freeze(timm.create_model("test_vit", num_classes=0, dynamic_img_size=True))
    network = Network("timm:test_vit", merged, 104)
    pool = pool_of(network)
    merged = merged_network(network, pool, MIXED)
    name = {"timm": "net.safetensors", "peft": "net", "torch": "net.pt2"}[to]
    written = export.save(tmp_path / name, to, merged, pool)
    readme = next(file for file in written if file.name.endswith("README.txt")).read_text()
    seen = images(side=104)
    ready = seen if to == "torch" else network.normalise(seen)[..., :96, :96]
    assert f"({', '.join(map(str, ['N', *ready.shape[1:]]))})" in readme
    found = follow_readme(readme, tmp_path, monkeypatch, images=ready, pretrained=network.weights)
    assert_same(found["features"], expected(merged, seen))


def test_programs_of_networks_with_constants(tmp_path):
    """EVA and DINOv3 compute tables of positions, and have biases of keys that no file holds."""
    network, _ = untrained("timm:toy_dinov3_qkvb")
    randomised(network.module)
    merged = merged_network(network, pool_of(network), MIXED)
    file = export.save(tmp_path / "net.pt2", "torch", merged)[0]
    (found,) = torch.export.load(file).module()(images(side=32))
    assert_same(found, expected(merged, images(side=32)))


# --- PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", [(0, 1, 0), MIXED, (0.2, 0.3, 0.5)])
def test_peft_ends_with_our_weights(coefficients, network, pool, tmp_path, monkeypatch):
    """The real library, on timm's network with the untouched pretrained weights: one adapter, and merges."""
    merged = with_task(merged_network(network, pool, coefficients), patterned_episode(seed=0, side=SIDE))
    folder = export.save(tmp_path / "adapter", "peft", merged, pool)[0]
    before = {name: weight.clone() for name, weight in network.weights.items()}
    seen = images()
    found = follow_readme(
        (folder / "README.txt").read_text(),
        tmp_path,
        monkeypatch,
        images=network.normalise(seen),
        pretrained=before,
    )
    wanted = expected(merged, seen)
    assert_same(found["features"], wanted)
    assert_same(logits_of(merged, found["features"]), logits_of(merged, wanted))
    scalings = [layer.scaling for layer in found["network"].modules() if hasattr(layer, "scaling")]
    assert len(scalings) == len(pool.A) and all(scaling == {"default": 1.0} for scaling in scalings)
    assert load_file(folder / "prototypes.safetensors")["scale"] == merged.scale
    with torch.no_grad():
        plain = found["network"].merge_and_unload()
        assert_same(plain(network.normalise(seen)), wanted)
        for name, weight in merged.weights.items():
            if name != "pos_embed":
                assert_same(plain.state_dict()[name], weight, 1e-6)


def test_peft_adapters_mix_in_peft_as_ours_do(network, pool, tmp_path):
    """Each adapter takes the same part away from the pretrained weights, so shares that sum to 1 mix them."""
    from peft import PeftModel

    for p in range(2):
        alone = merged_network(network, pool, [float(p == q) for q in range(3)])
        export.save(tmp_path / str(p), "peft", alone, pool)
    call = export.timm_call(network, TINY.pretrained_size)
    merged = timm.create_model(call.name, **call.options)
    merged.load_state_dict(network.weights)
    merged = PeftModel.from_pretrained(merged, tmp_path / "0", adapter_name="first")
    merged.load_adapter(tmp_path / "1", "second")
    merged.add_weighted_adapter(["first", "second"], list(MIXED[:2]), "both", combination_type="cat")
    merged.set_adapter("both")
    wanted = merged_network(dataclasses.replace(network, image_size=16), pool, MIXED)
    seen = images(side=16)
    with torch.no_grad():
        assert_same(merged.eval()(network.normalise(seen)), expected(wanted, seen))


def test_a_peft_adapter_has_no_more_rank_than_it_needs(network, pool):
    config, tensors = export.peft_adapter(network, pool, MIXED)
    assert (config["r"], config["rank_pattern"]["blocks.0.attn.qkv"]) == (6, 18)
    assert tensors["base_model.model.blocks.1.mlp.fc2.lora_A.weight"].shape == (6, 48)
    B = tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert B.shape == (72, 18) and not B[:24, 6:].any() and not B[24:48, :6].any()


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "norm.bias"])
def test_a_peft_adapter_is_refused_for_another_network(name, network, pool):
    """No adapter for these weights would equal the pool, be the difference in an adapted layer or not."""
    weights = network.weights | {name: network.weights[name] + 0.01 * images(1).flatten()[0]}
    weights[name] = weights[name] + 0.01 * torch.randn(weights[name].shape)
    other = random_backbone(TINY)
    other.module.load_state_dict(weights)
    with pytest.raises(InputError, match="not trained from these pretrained weights"):
        export.peft_adapter(other, pool, MIXED)


def test_a_peft_folder_with_anything_in_it_is_left_alone(merged, pool, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    export.save(folder, "peft", merged, pool)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="expected a new or an empty folder"):
        export.save(folder, "peft", merged, pool)
    with pytest.raises(InputError, match="cannot be written"):
        export.write_folder(folder, {"adapter_config.json": b""})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


# --- torch.export and ONNX -------------------------------------------------------------------------------


def test_torch_export_holds_everything_from_pixels_to_logits(merged, pool, tmp_path, monkeypatch):
    """Any batch size; what it says about itself names no file of the machine."""
    file, readme, _ = export.save(tmp_path / "net.pt2", "torch", merged, pool)
    for count in (1, 2, 5):
        seen = images(count)
        found = follow_readme(readme.read_text(), tmp_path, monkeypatch, images=seen)
        assert_same(found["features"], expected(merged, seen), 1e-6)
        assert_same(found["logits"], logits_of(merged, expected(merged, seen)), 1e-6)
    extra = {f"{export.METADATA}.json": ""}
    torch.export.load(file, extra_files=extra)
    about = json.loads(extra.popitem()[1])
    assert about["input"] == "RGB in [0, 1]" and about["classes"] == list(merged.classes)
    assert (
        b"site-packages" not in file.read_bytes()
        and str(Path(__file__).parent).encode() not in file.read_bytes()
    )


def test_torch_export_without_a_task_returns_features_alone(network, pool):
    merged = merged_network(network, pool, MIXED, trims=[Trim("fc1", 0, 0.5)])
    (found,) = export.exported_program(merged).module()(images(4))
    assert_same(found, expected(merged, images(4)), 1e-6)


def test_onnxruntime_runs_the_exported_network(merged, pool, tmp_path, monkeypatch):
    """The real runtime, any batch size, float32 pixels in and features and logits out."""
    import onnxruntime

    file, readme, _ = export.save(tmp_path / "net.onnx", "onnx", merged, pool)
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, SIDE, SIDE])
    assert json.loads(session.get_modelmeta().custom_metadata_map[export.METADATA])["scale"] == merged.scale
    for count in (1, 2, 5):
        seen = images(count)
        found = follow_readme(readme.read_text(), tmp_path, monkeypatch, images=seen.numpy())
        assert_same(torch.from_numpy(found["features"]), expected(merged, seen))
        assert_same(torch.from_numpy(found["logits"]), logits_of(merged, expected(merged, seen)))
    assert b"site-packages" not in file.read_bytes()


def test_onnx_without_its_packages_says_which(merged, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="without onnxscript: pip install onnx onnxscript"):
        export.onnx_model(merged)


# --- the published layouts -------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize(("suffix", "adapter"), [("", 2), ("_merge", None)])
def test_published_names_shapes_and_order_of_vit_small(suffix, adapter):
    """Exactly the table recorded of the published code."""
    tables = [*GOLDEN.rglob(f"keys_dino_small_patch16_amt{suffix}.tsv")]
    if not tables:
        pytest.skip(f"no table of keys below {GOLDEN}")
    rows = [line.split("\t") for line in tables[0].read_text().splitlines()[1:]]
    with torch.device("meta"):
        weights = untrained("dino_small_patch16")[0].weights
    residual = {name: torch.zeros(1).expand(weight.shape) for name, weight in weights.items()}
    A, B = {}, {}
    for name in residual:
        if name.endswith(("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")):
            groups = 3 if "qkv" in name else 1
            out, width = residual[name].shape
            A[name] = torch.zeros(1).expand(4, groups, 8, width)
            B[name] = torch.zeros(1).expand(4, groups, out // groups, 8)
    pool = Pool(residual, A, B, torch.full((4,), 10.0), torch.zeros(4), LEVELS[:1] * 4)
    state = export.published_state(pool, adapter)
    found = [(name, "x".join(map(str, t.shape)), str(t.dtype)) for name, t in state.items()]
    assert found == [tuple(row[:3]) for row in rows]


@pytest.mark.parametrize("adapter", [None, 1])
def test_our_own_reader_gets_a_published_file_back_exactly(adapter, pool, tmp_path):
    file, readme = export.save_published(tmp_path / "amt.pth", pool, adapter)
    back = checkpoint.load(file).pool
    ours = pool if adapter is None else pool[adapter]
    assert back.residual.keys() == pool.residual.keys() and len(back) == len(ours)
    for name, weight in ours.residual.items():
        assert torch.equal(back.residual[name], weight)
    for name, factor in ours.factors.items():
        assert torch.equal(back.factors[name], factor)
    assert torch.equal(back.scale, ours.scale.mean().expand(len(ours)))
    assert torch.equal(back.bias, ours.bias.mean().expand(len(ours)))
    assert (
        file.stat().st_size
        < 1.5 * sum(t.nbytes for t in export.published_state(pool, adapter).values()) + 2**17
    )
    assert "8 4 1" in readme.read_text() or adapter is not None


def test_the_published_head_of_a_pool_changes_no_prediction(pool, merged):
    state = export.published_state(pool)
    cosines = logits_of(dataclasses.replace(merged, scale=1.0, bias=0.0), expected(merged, images(20)))
    theirs = state["scale_cls"] * (cosines + state["bias"])
    assert torch.equal(theirs.argmax(1), logits_of(merged, expected(merged, images(20))).argmax(1))


def test_a_network_that_the_published_code_lacks_is_refused(network, pool):
    registers = dataclasses.replace(pool, residual=pool.residual | {"reg_token": torch.zeros(1, 4, 24)})
    with pytest.raises(InputError, match=r"reg_token is \(1, 4, 24\), .* absent: .* expected timm, peft"):
        export.published_state(registers)
    partly = principal_pool(network.weights, 2, LEVELS, layers=("attn.qkv",))
    with pytest.raises(InputError, match=r"lora_A\.0 is absent"):
        export.published_state(partly)
    without = {name: weight for name, weight in pool.residual.items() if name != "pos_embed"}
    with pytest.raises(InputError, match="no networks without pos_embed"):
        export.published_state(dataclasses.replace(pool, residual=without))
