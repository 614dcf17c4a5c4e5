"""Texts of the classes in the classifier of one's own pictures: beside examples or in place of them, on disk,
on a hub's layout, under attack, in exports and in the commands; what is missing is one line."""

import csv
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from commands import Ended, called
from conftest import fails
from safetensors.torch import load_file
from test_few_shot_heads import episode
from toy_photos import COLOURS, toy_pool

from amt.__main__ import main as amt
from amt.evaluation.deploy import deploy
from amt.evaluation.settings import Deployment
from amt.few_shot import pictures
from amt.few_shot.classifier import FewShotClassifier
from amt.few_shot.pools import open_pool
from amt.files import checkpoint, text_prototypes
from amt.files.pretrained import load_network
from amt.models.head_settings import WITH_TEXTS, ZERO_SHOT, parse_head
from amt.models.network import features

pytestmark = pytest.mark.usefixtures("one_thread", "box")

SHARES = (0.5, 0.5)
BY_TEXTS = ("text", "mix of=lda share=0 other=text")
MIXED = ("mix of=prototypes share=support other=text", "mix of=ridge share=0.5 other=text")


@pytest.fixture(scope="module")
def texts(photos, tmp_path_factory) -> Path:
    """Of three classes in no order: `Cat` and `dog` near the features of such photos, `a_fox` elsewhere."""
    network, held = load_network("vit_mini"), {}
    for name in ("cat", "dog"):
        images = pictures.images(pictures.listed(photos / "support" / name), 32)
        held[name] = features(network, network.weights, images).mean(0).detach().numpy()
    rows = np.stack([held["dog"], np.random.default_rng(0).normal(size=96), held["cat"]]).astype(np.float32)
    file = tmp_path_factory.mktemp("texts") / "x.npz"
    np.savez(file, names=np.array(["dog", "a_fox", "Cat"]), embeddings=rows)
    return file


def classifier(texts: Path, **given) -> FewShotClassifier:
    return FewShotClassifier("vit_mini_pool", text_prototypes=texts, device="cpu", **given)


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("head", [None, "text", MIXED[1]])
def test_logits_are_those_of_the_evaluation(photos, texts, head, shots):
    """Those of a run's first episode, by the same share; classes are sorted here, in runs they are not."""
    task, opened = episode(photos, shots), open_pool("vit_mini_pool")
    deployment = Deployment(heads=(parse_head(head.split()) if head else WITH_TEXTS,))
    said = text_prototypes.read(texts)
    predict, _ = deploy(
        load_network("vit_mini"), opened.pool, deployment, "support", lambda *_: [], texts=said
    )
    expected = predict(task)
    clf = classifier(texts, head=head).fit(task.support, np.array(task.names)[task.support_labels])
    np.testing.assert_allclose(clf.coefficients_, expected.coefficients, rtol=1e-4)
    with torch.no_grad():
        logits = expected.logits(task.query)[:, np.argsort(task.names)]
    np.testing.assert_allclose(clf.logits(task.query), logits, atol=1e-3)


def test_texts_alone_classify_without_a_support_set(photos, texts):
    clf = classifier(texts, coefficients=SHARES).fit()
    assert clf.classes_.tolist() == ["Cat", "a_fox", "dog"] and clf.task_.shots == (0, 0, 0)
    assert clf.predict(photos / "new").tolist() == ["Cat", "dog"] and clf.task_.head == ZERO_SHOT
    network, pool = load_network("vit_mini"), open_pool("vit_mini_pool").pool
    seen = features(network, pool.merge(SHARES), pictures.images(pictures.listed(photos / "new"), 32))
    rows = torch.from_numpy(np.load(texts)["embeddings"][[2, 1, 0]])
    expected = 10 * torch.cosine_similarity(seen[:, None], rows[None], dim=2)
    np.testing.assert_allclose(clf.logits(photos / "new"), expected.detach(), rtol=1e-4)
    assert clf.robustness(photos / "new", (0.01,), attack="pgd steps=3").tolist() == [0.01, 0.01]
    assert clf.robustness(photos / "new", (255,), attack="pgd steps=3").tolist() == [0, 0]


def fitted(photos: Path, texts: Path, head: str) -> FewShotClassifier:
    if head in BY_TEXTS:
        return classifier(texts, head=head, coefficients=SHARES).fit()
    return classifier(texts, head=head).fit(photos / "support")


@pytest.mark.parametrize("head", BY_TEXTS + MIXED)
def test_what_was_saved_answers_without_the_texts_file(photos, texts, head, tmp_path):
    clf, own = fitted(photos, texts, head), tmp_path / "own"
    expected = clf.logits(photos / "new")
    clf.save(tmp_path / "task.safetensors")
    clf.save_pretrained(own)
    loaded = FewShotClassifier.load(tmp_path / "task.safetensors")
    for other in (loaded, FewShotClassifier.from_pretrained(own), pickle.loads(pickle.dumps(clf))):
        assert np.array_equal(other.logits(photos / "new"), expected)
        assert other.classes_.tolist() == clf.classes_.tolist()
    size = sum(tensor.numel() for tensor in clf.task_.merged.weights.values())
    held = load_file(tmp_path / "task.safetensors")
    assert sum(tensor.numel() for tensor in held.values()) < 1.1 * size  # the network is there once
    card = (own / "README.md").read_text()
    assert ("by their texts alone" in card) == (head in BY_TEXTS) and f"{expected.shape[1]} classes" in card
    moved = clf.task_.to("cpu")
    assert torch.equal(moved.logits(torch.ones(1, 3, 32, 32)), clf.task_.logits(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("head", (BY_TEXTS[0], *MIXED))
def test_exports_give_the_same_logits(photos, texts, head, tmp_path):
    clf = fitted(photos, texts, head)
    images = pictures.images(pictures.listed(photos / "new"), 32)
    expected = torch.from_numpy(clf.logits(photos / "new"))
    clf.export(tmp_path / "net.pt2")
    with torch.no_grad():
        seen, logits = torch.export.load(tmp_path / "net.pt2").module()(images)
    assert torch.allclose(logits, expected, atol=1e-4)
    clf.export(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(logits, expected, atol=1e-3)

    _, readme, beside = clf.export(tmp_path / "net.safetensors")
    found = load_file(beside)

    def cosine(seen, rows):
        return torch.cosine_similarity(seen[:, None], rows[None], dim=2)

    lines = readme.read_text().splitlines()
    (formula,) = (line.partition("=")[2].strip() for line in lines if line.startswith("    logits = "))
    assert "or the embedding of its text if it has none" in readme.read_text() or "prototypes" not in found
    by_hand = eval(formula, {"features": seen, "cosine": cosine} | found)
    assert torch.allclose(by_hand, expected, atol=1e-3) and ("texts" in found) == (head in MIXED)


# --- the commands ----------------------------------------------------------------------------------------


def command(*flags) -> Ended:
    return called(amt, ["amt", *flags])


def test_predict_and_export_take_texts(photos, texts, tmp_path):
    out, task = tmp_path / "answers.csv", tmp_path / "task.safetensors"
    words = ["--text_prototypes", texts, "--coefficients", *SHARES]
    flags = [photos / "new", "--epsilon", 0.01, "--attack", "pgd", "steps=2", "--device", "cpu"]
    ended = command("predict", "vit_mini_pool", *flags, *words, "--out", out, "--save", task)
    assert ended.code == 0, ended.err
    assert "classes, by their texts alone: Cat, a_fox, dog" in ended.out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["class"], row["stands_up_to"]) for row in rows] == [("Cat", "0.01"), ("dog", "0.01")]
    again = command("predict", task, *flags)
    shown = [[line for line in each.out.splitlines() if "next" in line] for each in (ended, again)]
    assert shown[0] == shown[1] and len(shown[0]) == 2

    pool = photos / "vit_mini_pool.safetensors"
    ended = command("export", pool, "--to", "timm", *words, "--out", tmp_path / "net.safetensors")
    assert ended.code == 0, ended.err
    held = load_file(tmp_path / "net.safetensors.prototypes.safetensors")
    assert torch.equal(held["prototypes"], load_file(task)["prototypes"]) and held["scale"] == 10

    support = ["--support", photos / "support", "--text_prototypes", texts]
    ended = command("predict", "vit_mini_pool", *flags, *support, "--save", task)
    assert ended.code == 0 and f"head: {WITH_TEXTS.name}" in ended.out, ended.err
    assert json.loads(task.with_suffix(".json").read_text())["head"] == WITH_TEXTS.name
    ended = command("export", pool, "--to", "timm", *support, "--out", tmp_path / "net.safetensors")
    assert ended.code == 0, ended.err
    held = load_file(tmp_path / "net.safetensors.prototypes.safetensors")
    assert torch.equal(held["texts"], load_file(task)["texts/prototypes"])


def other_texts(file: Path, names: list[str], width: int = 96) -> Path:
    np.savez(file, names=np.array(names), embeddings=np.ones((len(names), width)))
    return file


def test_of_many_classes_the_first_are_named(photos, tmp_path):
    many = other_texts(tmp_path / "many.npz", [f"c{k:03}" for k in range(120)])
    flags = [photos / "new", "--epsilon", "--device", "cpu", "--coefficients", *SHARES]
    ended = command("predict", "vit_mini_pool", *flags, "--text_prototypes", many)
    assert ended.code == 0 and "c018, c019 and 100 more\n" in ended.out, ended.err


# The command, its flags (X: the texts; Y: others), words of the one line.
REFUSED = {
    "no shares": (
        ("predict", "--text_prototypes", "X"),
        "holds 2 adapters, and there is no picture to merge",
    ),
    "the router": (("predict", "--text_prototypes", "X", "--top_k", 1), "no picture to merge them by"),
    "a head of examples": (
        ("predict", "--text_prototypes", "X", "--head", *MIXED[0].split()),
        "is fitted to labelled pictures, which are missing",
    ),
    "another head": (
        ("predict", "--text_prototypes", "X", "--support", "S", "--head", "lda"),
        "--head lda support=0.5 identity=0.5 does not use --text_prototypes; expected --head text, or mix",
    ),
    "no texts": (("predict", "--support", "S", "--head", "text"), "needs --text_prototypes FILE.npz"),
    "neither": (("predict",), "or texts of the classes by --text_prototypes FILE.npz"),
    "a class without": (
        ("predict", "--text_prototypes", "Y", "--support", "S"),
        "has no text for 'cat' that there are examples of; expected every class to have one",
    ),
    "two of one text": (
        ("predict", "--text_prototypes", "W", "--support", "T"),
        "'red cat' and 'red_cat' have one text; expected a text for each class",
    ),
    "another width": (
        ("predict", "--text_prototypes", "Z", "--support", "S"),
        "embeddings of 5 numbers, the network has 96 features",
    ),
    "one class": (("predict", "--text_prototypes", "O", "--coefficients", 1, 0), "one class, 'dog'; a class"),
    "no file": (("predict", "--text_prototypes", "nowhere"), "nowhere: no such file of text prototypes"),
    "no shares to export": (("export", "--text_prototypes", "X"), "choose by --adapter P"),
    "published": (
        ("export", "--text_prototypes", "X", "--to", "published"),
        "--text_prototypes does not go with --to published",
    ),
    "an export of examples": (
        ("export", "--text_prototypes", "X", "--adapter", 0, "--head", *MIXED[0].split()),
        "is fitted to labelled pictures, which are missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(photos, texts, tmp_path, case):
    (name, *flags), message = REFUSED[case]
    places = {"X": texts, "S": photos / "support", "O": other_texts(tmp_path / "o.npz", ["dog"])}
    places |= {"Y": other_texts(tmp_path / "y.npz", ["dog", "fox"])}
    places |= {"Z": other_texts(tmp_path / "z.npz", list(COLOURS), 5)}
    places |= {"W": other_texts(tmp_path / "w.npz", ["red cat", "dog"]), "T": tmp_path / "twins"}
    for each in ("red cat", "red_cat", "dog"):
        shutil.copytree(photos / "support" / "cat", tmp_path / "twins" / each)
    own = [photos / "new"] if name == "predict" else ["--out", tmp_path / "net.pth"]
    own += ["--to", "onnx"] if name == "export" and "--to" not in flags else []
    pool = photos / "vit_mini_pool.safetensors"
    ended = command(name, pool, *own, *(places.get(flag, flag) for flag in flags))
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "net.pth").exists()


def test_a_saved_task_takes_no_texts_and_a_pool_keeps_none(photos, texts, tmp_path):
    task = tmp_path / "task.safetensors"
    FewShotClassifier("vit_mini_pool").fit(photos / "support").save(task)
    ended = command("predict", task, photos / "new", "--text_prototypes", texts)
    assert ended.code == 2 and "is a saved task, which has its classes" in ended.err
    fails("expected fit", lambda: classifier(texts).save_pretrained(tmp_path / "own"))
    assert not (tmp_path / "own").exists()
    fails("requires y to be passed", lambda: FewShotClassifier("vit_mini_pool").fit())


def test_a_pool_of_one_needs_no_shares_and_a_file_may_recommend_them(photos, texts, tmp_path):
    file = tmp_path / "pool.safetensors"
    for pool, about, shares in (
        (toy_pool()[0], {}, [1.0]),
        (toy_pool(), {"coefficients": [0.25, 0.75]}, [0.25, 0.75]),
    ):
        checkpoint.save(file, checkpoint.Checkpoint(pool, {"arch": "vit_mini"} | about))
        found = FewShotClassifier(file, text_prototypes=texts).fit()
        assert found.coefficients_.tolist() == shares
        assert found.predict(photos / "new").tolist() == ["Cat", "dog"]
