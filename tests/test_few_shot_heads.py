"""The classifier of one's own pictures with other heads than prototypes: the same answers as evaluation, on
disk, under attack, in an export and in the command; what is missing is one line."""

import dataclasses
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Ended, called
from conftest import fails
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from toy_photos import toy_pool, write_photos
from toy_pools import rewritten

from amt.__main__ import main as amt
from amt.evaluation.deploy import deploy
from amt.evaluation.settings import Deployment
from amt.few_shot import pictures
from amt.few_shot.classifier import FewShotClassifier
from amt.few_shot.pools import open_pool
from amt.files import checkpoint
from amt.files.pretrained import load_network
from amt.models.head_settings import default_head, parse_head
from amt.models.heads import Linear, PoolStatistics, Statistics
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader

pytestmark = pytest.mark.usefixtures("one_thread", "box")

QUICK = "pgd steps=3"
PLAIN = ["prototypes", "centred", "lda", "ridge", "robust-lda support=0.2 source=0.1 attack=0.3 identity=0.4"]
MIXED = [
    "mix",
    "mix of=prototypes share=0.6 other=1",
    "mix of=centred other=pretrained",
    "mix of=ridge other=0",
]


@pytest.fixture(scope="module")
def known(photos, tmp_path_factory) -> Path:
    """The toy pool with statistics for heads."""
    roots = torch.randn(6, 96, 120, generator=torch.Generator().manual_seed(0))
    matrices = roots @ roots.mT
    statistics = PoolStatistics(matrices[:2], matrices[2:4], Statistics(matrices[4], matrices[5]))
    file = tmp_path_factory.mktemp("known") / "pool.safetensors"
    checkpoint.save(file, checkpoint.Checkpoint(toy_pool(), {"arch": "vit_mini"}, statistics=statistics))
    return file


def episode(photos: Path, shots: int):
    sampling = EpisodeSampling(num_ways=2, num_support=shots, num_query=2)
    return EpisodeReader(photos, "support", "TEST", sampling, 32, n_episodes=1)[0]


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("head", PLAIN + MIXED)
def test_logits_are_those_of_the_evaluation(photos, known, head, shots):
    """Bit for bit those of a run's first episode, from one example per class on."""
    task, opened = episode(photos, shots), open_pool(known)
    deployment = Deployment(heads=(parse_head(head.split()),))
    network = load_network("vit_mini")
    known_statistics = opened.statistics
    predict, _ = deploy(
        network, opened.pool, deployment, "support", lambda *_: [], statistics=known_statistics
    )
    expected = predict(task)
    clf = FewShotClassifier(known, head=head, device="cpu").fit(task.support, task.support_labels)
    assert tuple(clf.coefficients_) == expected.coefficients
    with torch.no_grad():
        assert np.array_equal(clf.logits(task.query), expected.logits(task.query).numpy())


@pytest.mark.parametrize("head", PLAIN[1:] + MIXED)
def test_a_saved_task_pickles_and_copies_answer_alike(photos, known, head, tmp_path):
    clf = FewShotClassifier(known, head=head).fit(photos / "support")
    expected = clf.logits(photos / "new")
    assert len({*map(tuple, expected)}) == 2  # of two pictures
    clf.save(tmp_path / "task.safetensors")
    loaded = FewShotClassifier.load(tmp_path / "task.safetensors")
    about = json.loads((tmp_path / "task.json").read_text())
    assert about["head"] == clf.task_.head.name == loaded.head
    for other in (loaded, pickle.loads(pickle.dumps(clf)), clf.__class__(known)._fitted(clf.task_.to("cpu"))):
        assert np.array_equal(other.logits(photos / "new"), expected)
        assert other.task_.head.kind == parse_head(head.split()).kind


def test_the_files_tensors_are_as_its_docstring_says(photos, known, tmp_path):
    file = tmp_path / "task.safetensors"
    for head, own, others in (
        ("centred", {"prototypes", "origin"}, set()),
        ("lda", {"head/weight", "head/bias"}, set()),
        ("mix", {"head/weight", "head/bias"}, {"second/head/weight", "second/head/bias"}),
        ("mix of=prototypes", {"prototypes"}, {f"second/{n}" for n in ("prototypes", "scale", "bias")}),
    ):
        FewShotClassifier(known, head=head).fit(photos / "support").save(file)
        names = {name for name in load_file(file) if "weights/" not in name}
        factors = {"factor", "second/factor"} if others else set()
        assert names == own | others | factors | {"scale", "bias"}, head


def test_older_files_of_tasks_say_neither_head_nor_temperature(photos, known, tmp_path):
    file = tmp_path / "task.safetensors"
    clf = FewShotClassifier(known).fit(photos / "support")
    clf.save(file)
    rewritten(file, lambda _, about: (about.pop("head"), about.pop("temperature")))
    old, logits = FewShotClassifier.load(file), clf.logits(photos / "new")
    assert np.array_equal(old.logits(photos / "new"), logits)
    np.testing.assert_allclose(old.predict_proba(photos / "new"), softmax(logits.astype(float), axis=1))


@pytest.mark.parametrize("head", ("prototypes", "lda", "mix of=lda share=0.7"))
def test_probabilities_are_the_softmax_at_the_temperature_that_the_support_gave(
    photos, known, tmp_path, head
):
    clf = FewShotClassifier(known, head=head).fit(photos / "support")
    clf.save(tmp_path / "task.safetensors")
    expected = softmax(clf.logits(photos / "new").astype(float) / clf.task_.temperature, axis=1)
    assert clf.task_.temperature != 1
    for each in (clf, FewShotClassifier.load(tmp_path / "task.safetensors")):
        np.testing.assert_allclose(each.predict_proba(photos / "new"), expected)


@pytest.mark.parametrize("temperature", (0, -1, 1e-320, 1e300, float("inf"), float("nan"), "1"))
def test_a_damaged_temperature_is_one_line(photos, known, tmp_path, temperature):
    file = tmp_path / "task.safetensors"
    FewShotClassifier(known).fit(photos / "support").save(file)
    rewritten(file, lambda _, about: about.update(temperature=temperature))
    fails("temperature", lambda: FewShotClassifier.load(file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lda", "holds unexpected tensor"),
        ("ldaa", "did you mean 'lda'"),
        ("", "field 'amt'"),
        (3, "a string"),
    ],
)
def test_a_damaged_head_is_one_line(photos, known, tmp_path, name, message):
    file = tmp_path / "task.safetensors"
    FewShotClassifier(known, head="centred").fit(photos / "support").save(file)
    rewritten(file, lambda _, about: about.update(head=name))
    fails(message, lambda: FewShotClassifier.load(file))


@pytest.mark.parametrize("head", ["lda", "mix of=robust-lda share=0.5"])
def test_attacks_go_through_the_head(photos, known, head):
    """What an attack differentiates is what answers, and its gradient reaches every image."""
    clf = FewShotClassifier(known, head=head).fit(photos / "support")
    assert clf.robustness(photos / "new", (0.01,), attack=QUICK).tolist() == [0.01, 0.01]
    assert clf.robustness(photos / "new", (255,), attack=QUICK).tolist() == [0, 0]
    images = pictures.images(pictures.listed(photos / "new"), 32).requires_grad_()
    logits = clf.task_.logits(images)
    assert torch.equal(logits.detach(), torch.from_numpy(clf.logits(photos / "new")))
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    assert (gradient != 0).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize(("head", "name"), [("centred", "prototypes"), ("robust-lda", "head")])
def test_exports_hold_the_head(photos, known, head, name, tmp_path):
    """The programs that apply it are tested with `amt export`."""
    clf = FewShotClassifier(known, head=head).fit(photos / "support")
    written = {path.name: path for path in clf.export(tmp_path / "net.safetensors")}
    found, fitted = load_file(written[f"net.safetensors.{name}.safetensors"]), clf.task_.merged.head
    names = {"prototypes": fitted.centres, "origin": fitted.origin} if head == "centred" else vars(fitted)
    assert all(torch.equal(found[key], tensor) for key, tensor in names.items())


MISSING = {
    "no statistics": ("robust-lda", r"holds no statistics for --head robust-lda; add them: .*--statistics"),
    "no statistics to mix": ("mix", "holds no statistics"),
    "no such member": ("mix of=lda other=2", "holds adapters 0 to 1"),
    "no such head": ("robust-llda", "did you mean 'robust-lda'"),
    "no such option": ("ridge support=1", "expected penalty="),
}


@pytest.mark.parametrize(("head", "message"), MISSING.values(), ids=MISSING)
def test_heads_that_cannot_be_fitted_are_one_line(photos, head, message):
    fails(message, lambda: FewShotClassifier("vit_mini_pool", head=head).fit(photos / "support"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"coefficients": (1, 0)}, "broken.safetensors: its logits are not finite; expected a pool"),
        ({"coefficients": (1, 0), "head": "lda"}, "broken.safetensors: its logits are not finite"),
        ({}, "adapter 0: its features are not finite; --coefficients can leave it out"),
    ],
)
def test_a_network_without_finite_features_is_one_line(photos, tmp_path, how, message):
    pool, file = toy_pool(), tmp_path / "broken.safetensors"
    residual = pool.residual | {"norm.weight": torch.full((96,), 3e38)}
    broken = dataclasses.replace(pool, residual=residual)
    checkpoint.save(file, checkpoint.Checkpoint(broken, {"arch": "vit_mini"}))
    clf = FewShotClassifier(file, **how, device="cpu")
    fails(message, lambda: clf.fit(photos / "support").predict([photos / "new" / "1.png"]))


def test_mixing_needs_the_weights_that_the_pool_was_trained_from(photos, known, tmp_path):
    """Those in the box, or the file that is named."""
    own = tmp_path / "own.safetensors"
    save_file({name: 0.5 * weight for name, weight in load_network("vit_mini").weights.items()}, own)
    mixed = partial(FewShotClassifier, known, head="mix of=lda")
    boxed = mixed().fit(photos / "support").logits(photos / "new")
    other = mixed(pretrained_checkpoint=own).fit(photos / "support").logits(photos / "new")
    assert not np.array_equal(boxed, other)
    torch.save({"teacher": load_network("vit_mini").weights, "student": load_file(own)}, tmp_path / "two.pt")
    student = mixed(pretrained_checkpoint=tmp_path / "two.pt", weights_key="student")
    assert np.array_equal(student.fit(photos / "support").logits(photos / "new"), other)
    wrong = ("--pretrained_checkpoint", tmp_path / "two.pt", "--weights_key", "no")
    classify = ("predict", known, "--support", photos / "support", photos / "new", "--head", "mix", "of=lda")
    measure = (
        "pool",
        known,
        "--statistics",
        "--data_path",
        photos,
        "--base_sources",
        "x",
        "--out",
        "x.safetensors",
    )
    for words in (classify, measure):
        ended = called(amt, ["amt", *words, *wrong])
        assert ended.code == 2 and "expected one of 'teacher', 'student'" in ended.err
    nowhere = mixed(pretrained_checkpoint=tmp_path / "nowhere")
    fails("nowhere: no such", lambda: nowhere.fit(photos / "support"))
    clf = mixed().fit(photos / "support")
    fails("two networks do not go into one export", lambda: clf.export(tmp_path / "net.onnx"))


def test_a_head_is_a_parameter_like_any_other(known, tmp_path):
    files, names = pictures.in_class_folders(write_photos(tmp_path / "own", ("cat", "dog", "fox"), 4))
    for head in ("lda", default_head("ridge")):
        clf = clone(FewShotClassifier(known, head=head))
        assert clf.get_params()["head"] == head
        assert cross_val_score(clf, files, names, cv=2).tolist() == [1, 1]
    assert isinstance(clf.fit(files, names).task_.merged.head, Linear)


# --- the command -----------------------------------------------------------------------------------------


def predict(*flags) -> Ended:
    return called(amt, ["amt", "predict", *flags])


def test_the_command_takes_and_keeps_a_head(photos, known, tmp_path):
    out, task = tmp_path / "answers.json", tmp_path / "task.safetensors"
    flags = [photos / "new", "--epsilon", "--device", "cpu"]
    words = ["--head", "mix", "of=lda", "share=0.7"]
    ended = predict(known, "--support", photos / "support", *flags, *words, "--out", out, "--save", task)
    assert ended.code == 0, ended.err
    clf = FewShotClassifier(known, head="mix of=lda share=0.7").fit(photos / "support")
    assert f"head: {clf.task_.head.name}" in ended.out.splitlines()
    found = json.loads(out.read_text())
    assert found["head"] == clf.task_.head.name
    shown = [list(each["probabilities"].values()) for each in found["answers"]]
    np.testing.assert_allclose(shown, clf.predict_proba(photos / "new"), rtol=1e-5)
    again = predict(task, *flags)
    assert [x for x in again.out.splitlines() if "next" in x] == [
        x for x in ended.out.splitlines() if "next" in x
    ]
    refused = predict(task, *flags, "--head", "lda")
    assert refused.code == 2 and "is a saved task, which has its head" in refused.err


def test_one_example_per_class_says_what_the_head_does_without(photos, known, tmp_path):
    support = write_photos(tmp_path / "few", ("cat", "dog"), 1)
    ended = predict(known, "--support", support, photos / "new", "--epsilon", "--head", "robust-lda")
    assert ended.code == 0 and "the covariance over augmented views" in ended.out


def test_heads_that_make_no_sense_are_one_line_each(photos):
    words = ["vit_mini_pool", "--support", photos / "support", photos / "new"]
    for flags, message in (
        (["--head", "lda", "--head", "ridge"], "--head is given 2 times"),
        (["--head", "lda", "support=much"], "expected a number"),
        (["--head", "robust-lda"], "--statistics"),
    ):
        ended = predict(*words, *flags)
        assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, flags


def test_a_file_recommends_what_is_used_unless_something_else_is_named(photos, known, tmp_path):
    """`amt pool` writes it down: the head, and the shares of the adapters instead of the router."""
    out = tmp_path / "pool.safetensors"
    words = ["--head", "mix", "share=0.7", "--coefficients", 0, 1]
    ended = called(amt, ["amt", "pool", known, *words, "--out", out])
    assert ended.code == 0, ended.err
    shown = called(amt, ["amt", "checkpoint", out]).out
    assert "share=0.7" in shown and "--coefficients 0.0 1.0" in shown

    def fitted(file, **given) -> FewShotClassifier:
        return FewShotClassifier(file, **given).fit(photos / "support")

    own, explicit = fitted(out), fitted(known, head="mix share=0.7", coefficients=(0, 1))
    assert np.array_equal(own.logits(photos / "new"), explicit.logits(photos / "new"))
    assert fitted(out, head="lda").task_.head.kind == "lda"
    routed = fitted(known, head="lda").coefficients_
    assert routed.tolist() not in ([0, 1], [1, 0])
    assert fitted(out, head="lda", coefficients="route").coefficients_.tolist() == routed.tolist()
    assert (
        fitted(out, head="lda", top_k=1).coefficients_.tolist()
        == fitted(known, top_k=1).coefficients_.tolist()
    )
    assert fitted(out, head="lda", coefficients=(0.5, 0.5)).coefficients_.tolist() == [0.5, 0.5]
    fails("expected numbers, 'route' or None", lambda: fitted(out, coefficients="router"))

    flags = ["--support", photos / "support", photos / "new", "--epsilon", "--device", "cpu"]
    assert f"head: {own.task_.head.name}" in predict(out, *flags).out
    assert "head:" not in predict(known, *flags).out
    assert predict(out, *flags, "--head", "prototypes", "--top_k", 2).out == predict(known, *flags).out


@pytest.mark.parametrize(
    ("field", "value"),
    [("head", "robust-llda"), ("head", "lda support=much"), ("head", ""), ("head", 3)]
    + [("coefficients", value) for value in ("1", 3, ["1", "0"], [1.0], [0.5, 0.6])],
)
def test_a_recommendation_that_makes_no_sense_is_one_line(photos, known, tmp_path, field, value):
    saved, file = checkpoint.load(known), tmp_path / "pool.safetensors"
    checkpoint.save(file, dataclasses.replace(saved, about=saved.about | {field: value}))
    clf = FewShotClassifier(file)
    fails("coefficients|damaged header field 'head'", lambda: clf.fit(photos / "support"))
    clf.set_params(head="lda", coefficients=(0.5, 0.5)).fit(photos / "support")


def test_a_head_that_the_pool_has_no_statistics_for_is_not_recommended(known, tmp_path):
    bare, out = tmp_path / "bare.safetensors", tmp_path / "out.safetensors"
    checkpoint.save(bare, dataclasses.replace(checkpoint.load(known), statistics=None))
    ended = called(amt, ["amt", "pool", bare, "--head", "mix", "--out", out])
    assert ended.code == 2 and "holds no statistics for --head robust-lda" in ended.err and not out.exists()
