"""Routing, merging, trimming and published checkpoints, by the recorded numbers."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from amt_golden import (
    ENTRIES,
    INDEX,
    ROOT,
    Model,
    arrays,
    assert_close,
    golden,
    meaning,
    model_around,
    model_of,
    params,
    pixels,
)
from torch import Tensor

from amt.files.checkpoint import Checkpoint, load, save
from amt.files.published import published_shapes
from amt.models.pool import Merged
from amt.models.trim import Trim
from amt.models.weights import Coefficients, trim_singular_values, truncate
from amt.tasks import merge
from amt.tasks.classifier import head_classifier
from amt.tasks.merge import average_of, blend, compactness, support_cosines
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode

pytestmark = golden


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


# g: routing and merging


def routing_cases() -> list[tuple[str, str]]:
    """(episode, prefix) of every recorded routing decision, the augmented one included."""
    return sorted(
        (name.split("/")[0], name.removesuffix("/expw"))
        for file, name in ENTRIES
        if file == "g_merge.npz" and name.endswith("/expw")
    )


def routed_episode(data: dict[str, Tensor], name: str) -> Episode:
    """The episode of a routing case; the augmented case looks at the one whose support it augments."""
    if f"{name}/sx_u8" not in data:
        views = data[f"{name}/z"].shape
        others = [key.removesuffix("/sx_u8") for key in data if key.endswith("/sx_u8")]
        name = next(other for other in others if data[f"{other}/sx_u8"].shape == views)
    support, query = pixels(data[f"{name}/sx_u8"]), pixels(data[f"{name}/x_u8"])
    return Episode(support, data[f"{name}/sy"], query, data[f"{name}/y"])


def settings_of(entry: dict) -> Routing:
    return Routing(
        beta=entry["blend_beta"],
        gamma=entry["blend_gamma"],
        top_k=entry.get("top_k", INDEX["meta"]["architecture"]["top_k"]),
        augment_probability=entry.get("aug_prob", 0),
    )


def recorded_shares(data: dict[str, Tensor], case: str, adapters: int) -> Tensor:
    shares = torch.zeros(adapters)
    return shares.scatter(0, data[f"{case}/topk_i"], data[f"{case}/weights"])


def merged_logits(model: Model, coefficients: Coefficients, episode: Episode, trims=()) -> Tensor:
    weights = trim_singular_values(model.pool.merge(coefficients), trims)
    merged = Merged(weights, *model.pool.head(coefficients))
    return head_classifier(model.network, merged, episode).logits(episode.query)


def merged_layers() -> dict[str, str]:
    """Short names of recorded weights, and the weight each is, as their meanings say."""
    found = {}
    for file, name in ENTRIES:
        match = re.search(r"merged weight of model\.(\S+)", meaning(file, name))
        if match:
            found[name.split("/")[-1]] = f"{match[1]}.weight"
    return found


def normalised_shares(coefficients: Tensor) -> list[float]:
    """Float32 shares as a sum of exactly 1, which a merge asks for."""
    return (coefficients.double() / coefficients.double().sum()).tolist()


@pytest.mark.parametrize("name, case", routing_cases())
def test_routing(name, case, several, monkeypatch):
    """Cosines, scores and coefficients from the support set."""
    data = arrays("g_merge.npz")
    episode = routed_episode(data, name)
    routing = settings_of(params("g_merge.npz", f"{case}/expw"))
    if f"{name}/z" in data:
        # Only the augmentation's random draw is replaced; what is done with its result is ours.
        monkeypatch.setattr(merge, "augment", lambda images, generator: data[f"{name}/z"])
        assert routing.augment_probability == 1
    labels, generator = episode.support_labels, torch.Generator()
    given = (several.network, several.pool, episode.support, labels, generator, [routing])
    (cosines,) = support_cosines(*given)
    assert_close(cosines, data[f"{name}/expert_cos"], 3e-6, case)
    intra, inter = compactness(cosines, labels)
    assert_close(intra, data[f"{name}/intra"], 2e-6, case)
    assert_close(inter, data[f"{name}/inter"], 2e-6, case)

    everyone = dataclasses.replace(routing, top_k=len(several.pool))
    shares = torch.tensor(blend(intra, inter, everyone), dtype=torch.double)
    weights = data[f"{case}/expw"].double()
    assert_close(shares, weights / weights.sum(), 2e-6, case)
    assert_close(shares, (routing.beta * data[f"{case}/score"].double()).softmax(0), 2e-6, case)

    best = weights.sort(descending=True).values
    if routing.top_k < len(best) and best[routing.top_k - 1] - best[routing.top_k] < 3e-6 * best[0]:
        return  # equally good adapters: which of them is chosen means nothing
    found = torch.tensor(blend(intra, inter, routing))
    assert_close(found, recorded_shares(data, case, len(found)), 2e-6, case)
    generator.manual_seed(0)
    routed = merge.route(several.network, several.pool, episode.support, labels, generator, routing)
    assert torch.allclose(torch.tensor(routed), found, rtol=0, atol=1e-6)


def test_merged_weights_and_logits(several):
    """Merges by recorded coefficients, routed or specified: weights of single layers, and query logits."""
    file, data, layers = "g_merge.npz", arrays("g_merge.npz"), merged_layers()
    cases = {case: episode for episode, case in routing_cases()}
    specified = [
        name.split("/")[0]
        for known, name in ENTRIES
        if known == file and name.endswith("/logits") and "specified_expert" in params(file, name)
    ]
    cases |= dict.fromkeys(specified)
    logits = weights = 0
    for case, name in cases.items():
        if name is None:
            chosen = params(file, f"{case}/logits")["specified_expert"]
            coefficients = average_of(several.pool, chosen)
            name = first_unaugmented()[0]
        else:
            coefficients = normalised_shares(recorded_shares(data, case, len(several.pool)))
        if f"{case}/logits" in data:
            found = merged_logits(several, coefficients, routed_episode(data, name))
            assert_close(found, data[f"{case}/logits"], 3e-6, case)
            logits += 1
        merged = several.pool.merge(coefficients)
        for short, layer in layers.items():
            if f"{case}/merged/{short}" in data:
                assert_close(merged[layer], data[f"{case}/merged/{short}"], 1e-6, f"{case} {short}")
                weights += 1
    assert logits >= len(cases) > 0 and weights > 0


def first_unaugmented() -> tuple[str, str]:
    """The first recorded episode and blend: the one that specified experts and trimming look at."""
    names = [name for file, name in ENTRIES if file == "g_merge.npz" and name.endswith("/expw")]
    return names[0].split("/")[0], names[0].removesuffix("/expw")


# h: trimming


def trims_of(setting: dict) -> list[Trim]:
    """The published forms of a setting: one name or several, one block or several, or triples in step."""

    def listed(value) -> list:
        return value if isinstance(value, list) else [value]

    if "names" in setting:
        triples = zip(setting["names"], setting["layer"], setting["ps"], strict=True)
    else:
        triples = [(setting["name"], setting["layer"], setting["p"])]
    return [
        Trim(layer, block, keep)
        for layers, blocks, keep in triples
        for layer in listed(layers)
        for block in listed(blocks)
    ]


def test_truncation_of_merged_weights():
    """The exact best approximation of a recorded merged weight, and its singular values."""
    file, data, merged = "h_trim.npz", arrays("h_trim.npz"), arrays("g_merge.npz")
    _, case = first_unaugmented()
    exact = [name for name in data if name.endswith("/exact")]
    assert exact
    for name in exact:
        short, setting = name.split("/")[0], params(file, name)
        weight = merged[f"{case}/merged/{short}"]
        found = truncate(weight, setting["p"])
        assert_close(found, data[name], 2e-5, name)
        values = torch.linalg.svdvals(found)
        assert int((values > 1e-4 * values[0]).sum()) == setting["q"]
        assert_close(values[: setting["q"]], data[f"{short}/S"][: setting["q"]], 2e-6, name)


def test_trimmed_logits(several):
    """Logits of the merged and trimmed network, and which layers each published setting selects."""
    file, data = "h_trim.npz", arrays("h_trim.npz")
    episode_name, case = first_unaugmented()
    merged = arrays("g_merge.npz")
    episode = routed_episode(merged, episode_name)
    coefficients = normalised_shares(recorded_shares(merged, case, len(several.pool)))
    assert_close(merged_logits(several, coefficients, episode), data["logits_untrimmed"], 3e-6)
    names = [name for name in data if name.endswith("/logits_exact")]
    assert names
    for name in names:
        setting = params(file, name)
        trims = trims_of(setting["trim"])
        selected = {weight for weight in several.pool.residual if any(t.selects(weight) for t in trims)}
        assert selected == {f"{layer.removeprefix('model.')}.weight" for layer in setting["trimmed_modules"]}
        found = merged_logits(several, coefficients, episode, trims)
        assert_close(found, data[name], 2e-5, name)


# checkpoints


@pytest.fixture(scope="module")
def heads() -> int:
    return INDEX["meta"]["config"]["heads"]


@pytest.mark.parametrize("safe", [False, True], ids=["as_published", "converted"])
def test_training_checkpoint(heads, safe, tmp_path):
    """A file as main.py writes it, and what `python -m amt checkpoint --convert` makes of it: same logits."""
    saved = loaded("train_ckpt.pth", tmp_path if safe else None)
    model = model_around(saved.pool, heads)
    data, episode = arrays("ckpt_logits.npz"), arrays("c_protonet.npz")
    episode = Episode(pixels(episode["sx_u8"]), episode["sy"], pixels(episode["x_u8"]), episode["y"])
    assert_close(merged_logits(model, (1.0,), episode), data["train_logits"], 3e-6)
    assert len(saved.pool) == 1 and saved.about["levels_from"] == "the arguments"


@pytest.mark.parametrize("safe", [False, True], ids=["as_published", "converted"])
def test_pool_checkpoint(heads, safe, tmp_path):
    """The pool's file routes and classifies like the numbers recorded of it."""
    merged, data = arrays("g_merge.npz"), arrays("ckpt_logits.npz")
    saved = loaded("pool_ckpt.pth", tmp_path if safe else None)
    assert len(saved.pool) == INDEX["meta"]["config"]["pool"]
    model = model_around(saved.pool, heads)
    equal = re.search(r"equals g_merge (\S+)/logits", meaning("ckpt_logits.npz", "pool_logits"))
    case = equal[1] if equal else first_unaugmented()[1]
    episode = routed_episode(merged, case.split("/")[0])
    routing = settings_of(params("g_merge.npz", f"{case}/expw"))
    coefficients = merge.route(
        model.network, model.pool, episode.support, episode.support_labels, torch.Generator(), routing
    )
    assert_close(merged_logits(model, coefficients, episode), data["pool_logits"], 3e-6)


def loaded(name: str, folder: Path | None) -> Checkpoint:
    """A recorded file as `checkpoint.load` reads it, by way of one of our files if there is a `folder`."""
    saved = load(ROOT / name)
    if folder is None:
        return saved
    save(folder / "converted.safetensors", saved)
    return load(folder / "converted.safetensors")


def test_tables_of_keys():
    """The recorded lists of every published tensor: the names, their order, and their shapes."""
    files = sorted(ROOT.glob("keys_*.tsv"))
    assert files
    for file in files:
        lines = (line.split("\t") for line in file.read_text().splitlines()[1:])
        table = {name: tuple(map(int, shape.split("x"))) for name, shape, *_ in lines}
        prefix = "backbone.model." if any(".model." in name for name in table) else "backbone."
        blocks = {name.split("blocks.")[1].split(".")[0] for name in table if "blocks." in name}
        adapters = sum(name.startswith(f"{prefix}blocks.0.attn.proj.lora_A") for name in table)
        dim, _, patch, _ = table[f"{prefix}patch_embed.proj.weight"]
        found = published_shapes(
            patch=patch,
            dim=dim,
            depth=len(blocks),
            hidden=table[f"{prefix}blocks.0.mlp.fc1.weight"][0],
            tokens=table[f"{prefix}pos_embed"][1],
            rank=next(shape for name, shape in table.items() if "proj.lora_A" in name)[0],
            adapters=adapters if prefix == "backbone.model." else None,
        )
        assert list(found.items()) == list(table.items()), file
