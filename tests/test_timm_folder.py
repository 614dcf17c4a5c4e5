"""The folder that timm itself makes a network of, by its path and from a hub: our features and logits, and
how pictures are prepared."""

import json
from functools import partial

import huggingface_hub
import pytest
import timm
import torch
from conftest import moved_apart, patterned_episode, random_backbone
from safetensors.torch import load_file
from stub_hub import stub_hub  # noqa: F401  a fixture
from timm.data import resolve_model_data_config
from toy_export import follow_readme, with_task

from amt import Perturbation
from amt.files import export
from amt.files.export import merged_network
from amt.models.architectures import Arch, freeze
from amt.models.head_settings import default_head
from amt.models.network import Network, features
from amt.models.pool import principal_pool

pytestmark = pytest.mark.usefixtures("one_thread")

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=26, mlp_ratio=2.0)
SHARES = (0.25, 0.75)


def exported(network: Network, kind: str = "prototypes"):
    """The merged network of a task, with a head of this kind."""
    pool = moved_apart(principal_pool(network.weights, 2, [Perturbation(8, 2), Perturbation(1, 0.25)]), 0.3)
    episode = patterned_episode(1, shots=3, side=network.image_size)
    return with_task(merged_network(network, pool, SHARES), episode, head=default_head(kind))


def seen(merged) -> torch.Tensor:
    side = merged.network.image_size
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2))


def ready(merged, images: torch.Tensor) -> torch.Tensor:
    """As timm's networks take images: normalised, whole patches alone."""
    side = export.merged.whole_patches(merged.network)
    return merged.network.normalise(images)[..., :side, :side]


@pytest.mark.parametrize("kind", ["prototypes", "lda"])
def test_timm_makes_the_network_of_the_folder(kind, tmp_path, monkeypatch):
    """By the lines in its README; a linear head is the network's own, so timm's classifies."""
    merged = exported(random_backbone(ARCH), kind)
    folder, *files = export.save(tmp_path / "net", "timm", merged)
    head = "head.safetensors" if kind == "lda" else "prototypes.safetensors"
    assert {file.name for file in files} == {"config.json", "model.safetensors", "README.md", head}
    images = seen(merged)
    text = (folder / "README.md").read_text()
    found = follow_readme(text, tmp_path, monkeypatch, images=ready(merged, images))
    with torch.no_grad():
        ours = features(merged.network, merged.weights, images)
        expected = merged.head(ours) if kind == "lda" else ours
    torch.testing.assert_close(found["logits" if kind == "lda" else "features"], expected, rtol=0, atol=2e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == (3 if kind == "lda" else 0)
    assert config.get("label_names", []) == (list(merged.classes) if kind == "lda" else [])
    assert load_file(folder / head)


def test_pictures_are_prepared_as_ours(tmp_path):
    merged = exported(random_backbone(ARCH))
    export.save(tmp_path / "net", "timm", merged)
    network = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    assert resolve_model_data_config(network) == {
        "input_size": (3, 24, 24),  # of 26 px: whole patches
        "interpolation": "bilinear",
        "mean": list(merged.network.mean),
        "std": list(merged.network.std),
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def test_a_network_of_timms_own_keeps_its_name_and_any_size(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = freeze(timm.create_model("test_vit", num_classes=0, dynamic_img_size=True))
    merged = exported(Network("timm:test_vit", module, 104), "ridge")
    export.save(tmp_path / "net", "timm", merged)
    network = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    assert network.num_classes == 3
    images = seen(merged)
    with torch.no_grad():
        expected = merged.head(features(merged.network, merged.weights, images))
        torch.testing.assert_close(network(ready(merged, images)), expected, rtol=0, atol=2e-5)
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_a_pushed_folder_is_a_network_of_the_hub(tmp_path, stub_hub):  # noqa: F811
    merged = exported(random_backbone(ARCH), "lda")
    folder, *_ = export.save(tmp_path / "net", "timm", merged)
    api = huggingface_hub.HfApi()
    api.create_repo("org/net")
    api.upload_folder(repo_id="org/net", folder_path=folder)
    make = partial(timm.create_model, pretrained=True)
    with torch.no_grad():
        images = ready(merged, seen(merged))
        found, expected = (make(name)(images) for name in ("hf-hub:org/net", f"local-dir:{folder}"))
    assert torch.equal(found, expected)


def test_what_lies_there_already_stays(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "mine").write_text("")
    merged = exported(random_backbone(ARCH))
    with pytest.raises(export.InputError, match="expected a new or an empty folder"):
        export.save(tmp_path / "net", "timm", merged)
    with pytest.raises(export.InputError, match=r"ends in \.safetensors, .* or a folder's, without ending"):
        export.save(tmp_path / "net.pt", "timm", merged)
