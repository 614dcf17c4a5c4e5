"""Classifiers in folders and on a hub, by the conventions of huggingface_hub's mixins; only 127.0.0.1 is
asked."""

import json
import socket
import time
from functools import partial

import numpy as np
import pytest
from commands import called
from conftest import fails
from huggingface_hub import ModelCard, constants
from stub_hub import stub_hub  # noqa: F401  a fixture

import amt
from amt.__main__ import main
from amt.few_shot.classifier import FewShotClassifier
from amt.files import checkpoint
from amt.models.head_settings import default_head

pytestmark = pytest.mark.usefixtures("one_thread", "box")

PARAMETERS = {
    "beta": 3.0,
    "top_k": 1,
    "head": "lda support=0.25 identity=0.75",
    "trims": (amt.Trim("qkv", -1, 0.5),),
    "seed": 4,
    "image_size": 40,
}


# --- folders ---------------------------------------------------------------------------------------------


def test_a_folder_brings_back_pool_and_parameters(photos, tmp_path):
    clf = FewShotClassifier("vit_mini_pool", **PARAMETERS)
    assert clf.save_pretrained(tmp_path / "own") is None
    assert {file.name for file in (tmp_path / "own").iterdir()} == {
        *("README.md", "config.json", "model.safetensors")
    }
    again = FewShotClassifier.from_pretrained(tmp_path / "own")
    kept = clf.get_params() | {"pool": tmp_path / "own"}
    assert again.get_params() == kept
    images = [clf.fit(photos / "support").logits(photos / "new"), again.fit(photos / "support")]
    assert np.array_equal(images[0], images[1].logits(photos / "new"))
    assert FewShotClassifier.from_pretrained(tmp_path / "own", seed=9, top_k=2).get_params() == (
        kept | {"seed": 9, "top_k": 2}
    )


def test_heads_and_coefficients_of_any_kind_come_back(tmp_path):
    head = default_head("robust-lda")
    clf = FewShotClassifier("vit_mini_pool", head=head, coefficients=np.array([0.25, 0.75]))
    clf.save_pretrained(tmp_path)
    again = FewShotClassifier.from_pretrained(tmp_path)
    assert again.head == head and again.coefficients == (0.25, 0.75)


def test_what_was_fitted_is_what_is_saved(photos, tmp_path):
    clf = FewShotClassifier("vit_mini_pool", head="centred").fit(photos / "support")
    clf.save_pretrained(tmp_path / "fitted")
    again = FewShotClassifier.from_pretrained(tmp_path / "fitted", device="cpu")
    assert again.classes_.tolist() == ["cat", "dog"]
    assert np.array_equal(again.logits(photos / "new"), clf.logits(photos / "new"))
    fails(
        "is a fitted classifier, which takes no seed",
        lambda: FewShotClassifier.from_pretrained(tmp_path / "fitted", seed=1),
    )
    again.save_pretrained(tmp_path / "once more")
    first, second = (tmp_path / name / "model.safetensors" for name in ("fitted", "once more"))
    names = [checkpoint.weight_files.read(file).data.keys() for file in (first, second)]
    assert names[0] == names[1]


def test_a_model_card_has_the_hubs_fields_and_is_never_replaced(photos, tmp_path):
    clf = FewShotClassifier("vit_mini_pool")
    clf.save_pretrained(tmp_path, repo_id="org/pool")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "few-shot-classification" in card.data.tags
    assert 'from_pretrained("org/pool")' in card.text and "8, 0.1 (of 255)" in card.text
    (tmp_path / "README.md").write_text("mine")
    clf.fit(photos / "support").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_state_of_a_training_is_left_out(photos, tmp_path):
    saved = checkpoint.load(photos / "vit_mini_pool.safetensors")
    momentum = {name: 0 * tensor for name, tensor in saved.pool.factors.items()}
    about = {"arch": "vit_mini", "tuner": {"episodes_done": 3}}
    checkpoint.save(tmp_path / "last.safetensors", checkpoint.Checkpoint(saved.pool, about, momentum))
    FewShotClassifier(tmp_path / "last.safetensors").save_pretrained(tmp_path / "own")
    found = checkpoint.load(tmp_path / "own" / "model.safetensors")
    assert not found.momentum and "tuner" not in found.about


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta": "much"}, "field 'beta'"),
        ({"head": {"kind": "ldaa"}}, "field 'head': no head 'ldaa'"),
        ({"head": {"shape": 3}}, "field 'head'"),
        ({"trims": [{"layer": "qkv"}]}, "block' is missing"),
        ([1], "expected an object"),
        ("{", "config.json"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, config, message):
    FewShotClassifier("vit_mini_pool").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    fails(message, lambda: FewShotClassifier.from_pretrained(tmp_path))


def test_fields_of_others_in_a_config_are_left_alone(tmp_path):
    FewShotClassifier("vit_mini_pool").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_name_or_path": "org/pool", "seed": 2}')
    assert FewShotClassifier.from_pretrained(tmp_path).seed == 2


# --- a hub -----------------------------------------------------------------------------------------------


def test_pushed_and_fetched_it_answers_alike(photos, stub_hub):  # noqa: F811
    clf = FewShotClassifier("vit_mini_pool", **PARAMETERS)
    address = clf.push_to_hub("org/pool", commit_message="first", token="hf_secret")
    assert address.startswith(f"{stub_hub.url}/org/pool/commit/")
    assert stub_hub.tokens == {"Bearer hf_secret"}
    assert set(stub_hub.repositories["org/pool"]["main"]) == {
        *("README.md", "config.json", "model.safetensors")
    }
    again = FewShotClassifier.from_pretrained("org/pool")
    assert again.get_params() | {"pool": 0} == clf.get_params() | {"pool": 0}
    expected = clf.fit(photos / "support").logits(photos / "new")
    assert np.array_equal(again.fit(photos / "support").logits(photos / "new"), expected)


def test_revisions_are_told_apart(photos, stub_hub):  # noqa: F811
    push = partial(FewShotClassifier.push_to_hub, repo_id="org/pool")
    push(FewShotClassifier("vit_mini_pool", seed=1))
    first = stub_hub.sha("org/pool", "main")
    push(FewShotClassifier("vit_mini_pool", seed=2), branch="next")
    push(FewShotClassifier("vit_mini_pool", seed=3))
    load = partial(FewShotClassifier.from_pretrained, "org/pool")
    assert [load(revision=r).seed for r in (None, "main", "next", first)] == [3, 3, 2, 1]
    fails("nothing on the hub at revision 'v9': 404", lambda: load(revision="v9"))


def test_the_cache_serves_where_there_is_no_network(photos, stub_hub, tmp_path):  # noqa: F811
    FewShotClassifier("vit_mini_pool", seed=5).push_to_hub("org/pool")
    load = partial(FewShotClassifier.from_pretrained, "org/pool", cache_dir=tmp_path / "cache")
    fails("local_files_only is set, and its cache has no copy", lambda: load(local_files_only=True))
    asked = len(stub_hub.asked)
    assert load().seed == 5 and len(stub_hub.asked) > asked
    asked = len(stub_hub.asked)
    assert load(local_files_only=True).seed == 5 and len(stub_hub.asked) == asked
    stub_hub.failing = 503
    assert load().seed == 5
    fails("the hub fails .503", lambda: FewShotClassifier.from_pretrained("org/pool", cache_dir=tmp_path))


def test_repositories_that_are_not_there_or_hold_something_else_are_one_line(stub_hub):  # noqa: F811
    load = FewShotClassifier.from_pretrained
    fails("org/poool: no folder here, and nothing on the hub: 404", lambda: load("org/poool"))
    stub_hub.repositories["org/empty"] = {"main": {"config.json": b"{}"}}
    fails("org/empty: that repository holds no model.safetensors", lambda: load("org/empty"))
    stub_hub.repositories["org/page"] = {"main": {"model.safetensors": b"<!doctype html>"}}
    fails("a web page, not weights", lambda: load("org/page"))
    stub_hub.failing = 403
    fails("403 out of order", lambda: load("org/poool"))
    fails(
        "org/new: cannot be pushed to the hub: 403",
        lambda: FewShotClassifier("vit_mini_pool").push_to_hub("org/new"),
    )


def test_a_fitted_classifier_is_pushed_with_one_call(photos, stub_hub, tmp_path):  # noqa: F811
    clf = FewShotClassifier("vit_mini_pool").fit(photos / "support")
    clf.save_pretrained(tmp_path / "pets", repo_id="org/pets", push_to_hub=True, commit_message="pets")
    again = FewShotClassifier.from_pretrained("org/pets")
    assert np.array_equal(again.logits(photos / "new"), clf.logits(photos / "new"))
    ended = called(main, ["amt", "predict", "org/pets", photos / "new", "--epsilon"])
    assert ended.code == 0 and [x.split()[1] for x in ended.out.splitlines() if "next" in x] == ["cat", "dog"]
    FewShotClassifier("vit_mini_pool").push_to_hub("org/pool")
    ended = called(main, ["amt", "predict", "org/pool", "--support", photos / "support", photos / "new"])
    assert ended.code == 0 and ended.out.count("/255") >= 2


def test_without_network_the_command_ends_at_once(photos, stub_hub, monkeypatch):  # noqa: F811
    """A port where nobody listens: one line, and none of the minutes that a download would try for."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
    began = time.monotonic()
    ended = called(main, ["amt", "predict", "org/pool", "--support", photos / "support", photos / "new"])
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "org/pool: no folder here, the hub cannot be reached" in ended.err
    assert time.monotonic() - began < 20 and stub_hub.asked == []
