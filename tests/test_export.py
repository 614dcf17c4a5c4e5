"""Ways out: every format gives the same features elsewhere, loaded as its README says."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from amt.attacks.levels import Perturbation
from amt.cli import export as command
from amt.evaluation.evaluate import merged_predictor
from amt.files import checkpoint, export
from amt.files.checkpoint import Checkpoint
from amt.files.export import MergedNetwork, Support, merged_network
from amt.files.pretrained import load_network
from amt.models.architectures import ARCHS, Arch, freeze
from amt.models.heads import cosine_logits
from amt.models.network import Network, features, untrained
from amt.models.pool import LoRAPool, principal_pool
from amt.models.trim import Trim
from amt.tasks.merge import route
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

GOLDEN = Path(os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))

# Shown images are larger than pretrained ones, so that the position table has to be resized; the rank is
# not the same for all layers of an adapter, as qkv has three groups.
TINY = Arch(
    patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=24, mlp_ratio=2.0, std=(0.3,) * 3
)
SIDE = TINY.image_size
LEVELS = tuple(Perturbation(epsilon, epsilon / 4) for epsilon in (8.0, 4.0, 1.0))
MIXED = (0.25, 0.75, 0.0)


def pool_of(network: Network, levels: tuple[Perturbation, ...] = LEVELS, rank: int = 2) -> LoRAPool:
    """A pool whose adapters, heads included, all differ."""
    pool = moved_apart(principal_pool(network.weights, rank, levels))
    numbers = torch.arange(len(levels))
    return dataclasses.replace(pool, scale=10.0 + numbers, bias=0.1 * numbers)


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(TINY)


@pytest.fixture(scope="module")
def pool(network) -> LoRAPool:
    return pool_of(network)


@pytest.fixture(scope="module")
def support() -> Support:
    episode = patterned_episode(seed=0, side=SIDE)
    return Support(episode.support, episode.support_labels, ("one", "two", "three, too"))


@pytest.fixture(scope="module")
def merged(network, pool, support) -> MergedNetwork:
    return merged_network(network, pool, MIXED, support=support)


def images(count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def expected(merged: MergedNetwork, seen: torch.Tensor) -> torch.Tensor:
    """What our own code computes."""
    with torch.no_grad():
        return features(merged.network, merged.weights, seen)


def logits_of(merged: MergedNetwork, found: torch.Tensor) -> torch.Tensor:
    return cosine_logits(found, merged.prototypes, merged.scale, merged.bias)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative Frobenius distance."""
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def follow_readme(text: str, place: Path, monkeypatch, **names):
    """The variables after running the README's own lines in the folder `place`."""
    monkeypatch.chdir(place)
    lines = text.partition("Load it:\n")[2].partition("Classify:")[0].splitlines()
    variables = dict(names)
    with torch.no_grad():
        exec("\n".join(line.strip() for line in lines).replace("(...)", "(pretrained)"), variables)
    return variables


# --- timm ------------------------------------------------------------------------------------------------


def test_timm_takes_the_state_dict_as_it_is(merged, pool, tmp_path, monkeypatch):
    """Loaded by the lines in the README, timm's own model returns our features at our image size."""
    file, readme, beside = export.save(tmp_path / "net.safetensors", "timm", merged, pool)
    seen = images()
    found = follow_readme(readme.read_text(), tmp_path, monkeypatch, images=merged.network.normalise(seen))
    assert_same(found["features"], expected(merged, seen), 1e-6)
    assert_same(load_file(beside)["prototypes"], merged.prototypes, 0)
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


# --- PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", [(0, 1, 0), MIXED, (0.2, 0.3, 0.5)])
def test_peft_ends_with_our_weights(coefficients, network, pool, support, tmp_path, monkeypatch):
    """The real library, on timm's network with the untouched pretrained weights: one adapter, and merges."""
    merged = merged_network(network, pool, coefficients, support=support)
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
    pool = LoRAPool(residual, A, B, torch.full((4,), 10.0), torch.zeros(4), LEVELS[:1] * 4)
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
    with pytest.raises(InputError, match=r"reg_token is \(1, 4, 24\), the published code has it absent"):
        export.published_state(registers)
    partly = principal_pool(network.weights, 2, LEVELS, layers=("attn.qkv",))
    with pytest.raises(InputError, match=r"lora_A\.0 is absent"):
        export.published_state(partly)
    without = {name: weight for name, weight in pool.residual.items() if name != "pos_embed"}
    with pytest.raises(InputError, match="no networks without pos_embed"):
        export.published_state(dataclasses.replace(pool, residual=without))


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """A pool of the network that the project ships."""
    pool = pool_of(load_network("vit_mini"))
    path = tmp_path_factory.mktemp("mini") / "pool.safetensors"
    checkpoint.save(path, Checkpoint(pool, {"arch": "vit_mini"}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A support set of three classes in folders, two pictures each, and a file that is none."""
    root = tmp_path_factory.mktemp("support")
    for label, name in enumerate(("apple", "bear", "café")):
        (root / name).mkdir()
        for index in range(2):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    (root / "notes.txt").write_text("not a class")
    return root


def run(*flags: str | Path) -> int:
    return command.main([str(flag) for flag in flags])


def complaint(*flags: str | Path) -> str:
    """The one line that the command refuses the flags with."""
    with pytest.raises(InputError) as caught:
        run(*flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_support_set_decides_as_the_evaluation_does(mini, folder, tmp_path, monkeypatch, capsys):
    """Same coefficients, same logits as test_meta_dataset.py computes for an episode of these images."""
    out = tmp_path / "net.safetensors"
    assert run(mini, "--to", "timm", "--support", folder, "--out", out, "--seed", 3, "--aug-prob", 1) == 0
    assert str(out) in capsys.readouterr().out
    network, saved = load_network("vit_mini"), checkpoint.load(mini)
    task = command.read_support(folder, network.image_size)
    assert task.classes == ("apple", "bear", "café") and task.labels.tolist() == [0, 0, 1, 1, 2, 2]
    seen = images(4, 32)
    episode = Episode(task.images, task.labels, seen, torch.zeros(4, dtype=torch.int64))

    def choose(support, labels, generator):
        routing = Routing(augment_probability=1)
        return route(network, saved.pool, support, labels, generator, routing)

    ours = merged_predictor(network, saved.pool, choose, seed=3)(episode)
    readme = out.with_name("net.safetensors.README.txt").read_text()
    theirs = follow_readme(readme, tmp_path, monkeypatch, images=network.normalise(seen))["features"]
    task_file = out.with_name("net.safetensors.prototypes.safetensors")
    head = load_file(task_file)
    with torch.no_grad():
        assert_same(cosine_logits(theirs, head["prototypes"], head["scale"], head["bias"]), ours.logits(seen))
    with safe_open(task_file, "pt") as opened:
        about = json.loads(opened.metadata()[export.METADATA])
    assert about["coefficients"] == list(ours.coefficients) and about["classes"] == list(task.classes)


def test_prototypes_of_an_earlier_export_do_not_stay_behind(mini, folder, tmp_path):
    out, beside = tmp_path / "net.safetensors", tmp_path / "net.safetensors.prototypes.safetensors"
    run(mini, "--to", "timm", "--adapter", 1, "--support", folder, "--out", out)
    assert beside.is_file()
    run(mini, "--to", "timm", "--adapter", 1, "--out", out)
    assert not beside.exists()


def test_every_other_format_from_the_command(mini, tmp_path):
    """Also at another image size, and what was trimmed."""
    run(mini, "--to", "peft", "--adapter", 0, "--image_size", 40, "--out", tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "positions.safetensors")["pos_embed"].shape == (1, 101, 96)
    run(mini, "--to", "published", "--out", tmp_path / "pool.pth")
    assert len(checkpoint.load(tmp_path / "pool.pth").pool) == 3
    out = tmp_path / "net.safetensors"
    run(mini, "--to", "timm", "--coefficients", 0.5, 0.5, 0, "--trim", "fc1:0:0.5", "--out", out)
    fc1 = load_file(out)["blocks.0.mlp.fc1.weight"]
    assert torch.linalg.matrix_rank(fc1, rtol=1e-4) == min(fc1.shape) // 2
    assert "trimmed       fc1:0:0.5" in out.with_name(f"{out.name}.README.txt").read_text()


def test_a_published_training_is_one_network(mini, tmp_path):
    """Of a single LoRA nothing needs to be chosen, and the file alone is enough."""
    run(mini, "--to", "published", "--adapter", 1, "--out", tmp_path / "one.pth")
    run(tmp_path / "one.pth", "--to", "timm", "--arch", "vit_mini_amt", "--out", tmp_path / "one.safetensors")
    run(mini, "--to", "timm", "--adapter", 1, "--out", tmp_path / "same.safetensors")
    found, same = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "same"))
    assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to timm", "choose by --adapter P, --coefficients C ..., or --support FOLDER"),
        ("--to timm --adapter 3", "--adapter 3: POOL holds adapters 0 to 2"),
        ("--to timm --adapter 1 --coefficients 1 0 0", "exclude each other"),
        ("--to timm --coefficients 1 0", "--coefficients has 2 values, POOL holds 3 adapters"),
        ("--to timm --coefficients 1 1 0", "--coefficients sum to 2, expected 1"),
        ("--to timm --coefficients nan 0 0", "expected a number of at least 0"),
        ("--to timm --adapter 0 --arch dino_small_patch16", "but --arch dino_small_patch16 has it"),
        ("--to timm --adapter 0 --image_size 3", "expected at least a patch of 4 px"),
        ("--to timm --adapter 0 --trim nothing:-1:0.5", "no such layer with adapters"),
        ("--to peft --adapter 0 --trim fc1:-1:0.5", "--trim does not go with --to peft"),
        ("--to published --coefficients 1 0 0", "--coefficients does not go with --to published"),
        ("--to timm --support NOWHERE", "NOWHERE: cannot be listed"),
        ("--to keras --adapter 0", "invalid choice: 'keras'"),
    ],
)
def test_faults_are_one_line(flags, message, mini, tmp_path):
    words = flags.replace("NOWHERE", str(tmp_path / "nowhere")).split()
    found = complaint(mini, *words, "--out", tmp_path / ("adapter" if "peft" in words else "net.safetensors"))
    assert message in found.replace(str(mini), "POOL").replace(str(tmp_path / "nowhere"), "NOWHERE")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_one_line(mini, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a folder" in complaint(mini, "--to", "timm", "--adapter", 0, "--out", tmp_path)
    assert "a new or an empty folder" in complaint(mini, "--to", "peft", "--adapter", 0, "--out", tmp_path)
    for to, name in (("timm", "a.safetensors"), ("peft", "a"), ("published", "a.pth")):
        place = tmp_path / "file" / name
        assert "cannot be written" in complaint(mini, "--to", to, "--adapter", 0, "--out", place)
    for to, ending in (("timm", ".safetensors"), ("torch", ".pt2")):
        place = tmp_path / "net.pth"
        assert f"ends in {ending}" in complaint(mini, "--to", to, "--adapter", 0, "--out", place)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_support_folder_that_is_no_support_set_is_one_line(mini, folder, tmp_path, monkeypatch):
    def refused(place: Path) -> str:
        return complaint(mini, "--to", "timm", "--support", place, "--out", tmp_path / "net.safetensors")

    (tmp_path / "images" / "empty").mkdir(parents=True)
    assert "no picture in this class folder" in refused(tmp_path / "images")
    (tmp_path / "images" / "empty" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "cannot be decoded" in refused(tmp_path / "images")
    assert "give the folder above" in refused(folder / "apple")
    monkeypatch.setattr(command, "MOST_SUPPORT", 5)
    assert "6 images, a support set has 5 at most" in refused(folder)


def test_a_pool_without_an_architecture_needs_one(pool, tmp_path):
    export.save_published(tmp_path / "amt.pth", pool)
    found = complaint(
        tmp_path / "amt.pth", "--to", "timm", "--adapter", 0, "--out", tmp_path / "net.safetensors"
    )
    assert "does not say its architecture; name it by --arch" in found
