"""Exported heads classify as those of evaluation do: in every format, for every head that fits into one."""

import dataclasses
import io
import json

import pytest
import timm
import torch
from conftest import moved_apart, patterned_episode, random_backbone, write_picture
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from toy_export import with_task

from amt.attacks.levels import Perturbation
from amt.cli import export as command
from amt.files import checkpoint, export
from amt.files.checkpoint import Checkpoint
from amt.files.export.merged import describe, head_files
from amt.files.export.programs import torch_program
from amt.files.pretrained import load_network
from amt.models.architectures import Arch
from amt.models.head_settings import Head, default_head
from amt.models.heads import PoolStatistics, Statistics
from amt.models.network import features
from amt.models.pool import principal_pool
from amt.tasks.classifier import head_classifier
from meta_dataset_readers.errors import InputError

SIDE = 8
ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=SIDE, image_size=SIDE, mlp_ratio=2.0)
SHARES = (0.25, 0.75)
KINDS = ("centred", "lda", "ridge", "robust-lda")


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH, scale=0.3)


@pytest.fixture(scope="module")
def pool(network):
    return moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2), Perturbation(1, 0.25)]), 0.3)


@pytest.fixture(scope="module")
def known() -> PoolStatistics:
    roots = torch.randn(6, 12, 20, generator=torch.Generator().manual_seed(0))
    matrices = roots @ roots.mT
    return PoolStatistics(matrices[:2], matrices[2:4], Statistics(matrices[4], matrices[5]))


def exported(network, pool, known, head: Head, shots: int):
    """The merged network with its head, and the logits of evaluation for some images."""
    episode = patterned_episode(1, shots=shots, queries=2, side=SIDE)
    merged = export.merged_network(network, pool, SHARES)
    task = with_task(merged, episode, ("one", "two", "three"), head, known)
    first = dataclasses.replace(episode, index=0)  # as an export fits its support
    ours = head_classifier(network, pool.merged(SHARES), first, SHARES, head, known)
    with torch.no_grad():
        logits = ours.logits(episode.query)
    return task, episode.query, logits


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_programs_return_the_logits_of_evaluation(network, pool, known, kind, shots):
    merged, images, expected = exported(network, pool, known, default_head(kind), shots)
    program = torch.export.load(io.BytesIO(torch_program(merged))).module()
    seen, logits = program(images)
    assert seen.shape == (len(images), 12) and torch.allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_beside_has_the_head(network, pool, known, kind):
    merged, images, expected = exported(network, pool, known, default_head(kind), 3)
    ((name, content),) = head_files(merged, describe(merged, "timm")).items()
    found = load_tensors(content)
    with torch.no_grad():
        seen = features(merged.network, merged.weights, images)
    if kind == "centred":
        cosines = torch.cosine_similarity((seen - found["origin"])[:, None], found["prototypes"][None], dim=2)
        assert name == "prototypes.safetensors"
        assert torch.allclose(found["scale"] * (cosines + found["bias"]), expected, atol=1e-3)
    else:
        assert name == "head.safetensors"
        assert torch.allclose(seen @ found["weight"].T + found["bias"], expected, atol=1e-3)


def test_timm_gets_a_linear_head_as_its_last_layer(network, pool, known):
    merged, images, expected = exported(network, pool, known, default_head("robust-lda"), 3)
    call = export.timm_call(merged.network, SIDE, classes=3)
    model = timm.create_model(call.name, **call.options).eval()
    model.load_state_dict(export.timm_state(merged))
    with torch.no_grad():
        assert torch.allclose(model(network.normalise(images)), expected, atol=1e-3)
    assert call.options["num_classes"] == 3 and "num_classes=3" in str(call)


@pytest.fixture
def mini(tmp_path):
    """A pool on the shipped network, without statistics, and a folder of two classes with two images."""
    network = load_network("vit_mini")
    pool = principal_pool(network.weights, 1, [Perturbation(8, 2), Perturbation(1, 0.25)])
    checkpoint.save(tmp_path / "pool.safetensors", Checkpoint(pool, {"arch": "vit_mini"}))
    for k in range(4):
        write_picture(tmp_path / "task" / f"class{k % 2}" / f"{k}.png", k)
    return tmp_path


def test_the_command_exports_a_linear_head(mini, capsys):
    out = mini / "net.safetensors"
    words = [mini / "pool.safetensors", "--to", "timm", "--out", out, "--support", mini / "task"]
    assert command.main([*map(str, words), "--head", "lda", "--coefficients", "1", "0"]) == 0
    head = load_file(f"{out}.head.safetensors")
    assert head["weight"].shape == (2, 96) and torch.equal(load_file(out)["head.weight"], head["weight"])
    readme = (mini / "net.safetensors.README.txt").read_text()
    assert "num_classes=2" in readme and "features @ weight.T + bias" in readme
    assert "logits (N, 2)" in readme and json.dumps(["class0", "class1"]) in readme


def test_an_export_follows_what_the_file_recommends(mini):
    """As `amt predict` does, so that both give the same answers; flags count more."""
    saved = checkpoint.load(mini / "pool.safetensors")
    pool, shares = moved_apart(saved.pool), ["0", "1"]
    for name, more in (("plain", {}), ("told", {"head": "ridge", "coefficients": [0.0, 1.0]})):
        file = mini / f"{name}.safetensors"
        checkpoint.save(file, dataclasses.replace(saved, pool=pool, about=saved.about | more))

    def exported(name: str, *flags: str) -> dict[str, torch.Tensor]:
        words = [mini / f"{name}.safetensors", "--to", "timm", "--support", mini / "task", *flags]
        assert command.main([*map(str, words), "--out", str(mini / "net.safetensors")]) == 0
        return load_file(mini / "net.safetensors")

    for head in ("ridge", "lda"):
        asked = exported("plain", "--head", head, "--coefficients", *shares)
        found = exported("told", *(["--head", head] if head != "ridge" else []))
        assert all(torch.equal(found[each], asked[each]) for each in asked), head
        assert not torch.equal(exported("plain", "--head", head)["head.weight"], found["head.weight"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--head robust-lda --support TASK", "holds no statistics for --head robust-lda"),
        ("--head mix --support TASK", "two networks do not go into one export"),
        ("--head lda --coefficients 1 0", "--support FOLDER, which is missing"),
        ("--head lda --head ridge --support TASK", "given 2 times"),
    ],
)
def test_heads_that_cannot_be_exported_are_refused(mini, flags, told):
    words = [str(mini / "task") if word == "TASK" else word for word in flags.split()]
    with pytest.raises(InputError, match=told) as caught:
        command.main([str(mini / "pool.safetensors"), "--to", "torch", "--out", str(mini / "a.pt2"), *words])
    assert "\n" not in str(caught.value) and not (mini / "a.pt2").exists()
