"""Text prototypes: files of them, zero-shot classification, mixtures with the support's head, and runs."""

import dataclasses
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, called
from conftest import fails, patterned_episode, random_backbone
from toy_photos import LEVELS
from toy_towers import hugging_face, normal, open_clip_model
from toy_training import command, error_line, strict_json

from amt.__main__ import main as amt
from amt.attacks.kinds import Attack
from amt.evaluation.evaluate import measure
from amt.files import checkpoint, text_prototypes
from amt.files.pretrained import load_network
from amt.files.text_prototypes import TextPrototypes
from amt.models.architectures import Arch
from amt.models.head_settings import Head, default_head, parse_head
from amt.models.heads import Cosine, fit, prototypes
from amt.models.network import features
from amt.models.pool import principal_pool
from amt.report import shots
from amt.tasks.classifier import head_classifier, pretrained
from amt.tasks.texts import SHARES, chosen_share

pytestmark = pytest.mark.usefixtures("one_thread")

ARCH = Arch(patch_size=4, dim=12, depth=1, heads=2, pretrained_size=8, image_size=8, mlp_ratio=2.0)
NAMES = ("a stop_sign", "Yield", "no-entry")
MIXED = parse_head(["mix", "of=prototypes", "other=text", "share=support"])
ZERO_SHOT = parse_head(["text"])


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH, scale=0.3)


def episode(shots: int = 3):
    return dataclasses.replace(patterned_episode(7, shots=shots, queries=4), class_names=NAMES)


def saved(file: Path, **arrays) -> Path:
    np.savez(file, **arrays)
    return file


def texts_of(network, shots: int = 3, mix: float = 0.0) -> TextPrototypes:
    """Texts of the classes and of others: `mix` of the class means of the queries, the rest noise."""
    seen = episode(shots)
    centres = prototypes(features(network, network.weights, seen.query), seen.query_labels)
    noise = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    noise[1:4] = (1 - mix) * noise[1:4] + mix * centres
    return TextPrototypes(Path("x.npz"), ("other", "A Stop sign", "yield", "no entry", "last"), noise)


def logits(network, head: Head, shots: int = 3, mix: float = 0.5) -> torch.Tensor:
    task = episode(shots)
    found = head_classifier(network, pretrained(network), task, (), head, texts=texts_of(network, shots, mix))
    return found.logits(task.query)


def test_zero_shot_is_the_cosine_to_the_texts_and_no_support(network):
    texts = texts_of(network).of(NAMES)
    seen = features(network, network.weights, episode().query)
    expected = 10 * F.normalize(seen, dim=1) @ F.normalize(texts, dim=1).T
    assert torch.allclose(logits(network, ZERO_SHOT, mix=0.0), expected, atol=1e-5)
    assert torch.equal(logits(network, ZERO_SHOT, shots=3), logits(network, ZERO_SHOT, shots=3))
    moved = dataclasses.replace(episode(), support=torch.rand(9, 3, 8, 8))
    other = head_classifier(
        network, pretrained(network), moved, (), ZERO_SHOT, texts=texts_of(network, mix=0.5)
    )
    assert torch.equal(other.logits(moved.query), logits(network, ZERO_SHOT))


@pytest.mark.parametrize("kind", ["prototypes", "centred", "lda", "ridge"])
def test_shares_of_one_and_none_are_the_support_and_the_texts(network, kind):
    own = head_classifier(network, pretrained(network), episode(), (), default_head(kind))
    support, text = (dataclasses.replace(default_head(kind), other="text", share=s) for s in (1.0, 1e-9))
    expected = own.logits(episode().query).argmax(1)
    assert torch.equal(logits(network, support).argmax(1), expected)
    assert torch.equal(logits(network, text).argmax(1), logits(network, ZERO_SHOT).argmax(1))


@pytest.mark.parametrize("shots", [1, 2, 5, 12])
@pytest.mark.parametrize(("mix", "low", "high"), [(1.0, 0.0, 0.5), (0.0, 0.5, 1.0)])
def test_the_share_is_chosen_on_the_support(network, shots, mix, low, high):
    """Texts that know the classes are listened to, noise is not; whatever the number of shots."""
    task = episode(shots)
    seen = features(network, network.weights, task.support)
    own = prototypes(seen, task.support_labels)
    good = own if mix else -own
    views = None if shots > 1 else seen[None] + 0.5 * torch.randn(8, *seen.shape)
    share = chosen_share(seen, task.support_labels, Cosine(good, 10.0), lambda f, y: fit(Head(), f, y), views)
    assert share in SHARES and low <= share <= high


def test_an_image_is_classified_by_a_head_that_never_saw_it(network):
    """With images that nothing tells apart but themselves, a head that saw them would be trusted wholly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(4)
    noise = torch.randn(12, 12, generator=generator)
    texts = Cosine(torch.stack([noise[labels == k].mean(0) for k in range(3)]) + 0.1, 10.0)
    fitted: list[int] = []

    def nearest(features, labels):
        fitted.append(len(features))
        return fit(Head(), features, labels)

    assert chosen_share(noise, labels, texts, nearest) < 1
    assert fitted == [9, 9, 9, 9]


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("head", [ZERO_SHOT, MIXED, dataclasses.replace(MIXED, kind="ridge", penalty=1.0)])
def test_both_are_attacked_end_to_end(network, head, shots):
    """Queries through the logits, and the support through the fit, on which zero-shot does not depend."""
    task, texts = episode(shots), texts_of(network, shots, 0.7)

    def predict(each):
        return head_classifier(network, pretrained(network), each, (), head, texts=texts)

    attack = Attack("pgd", (8.0,), steps=3)
    row = measure(predict, task, [attack]).row
    assert row[attack.columns[0]] < row["clean"]
    images = task.query.clone().requires_grad_()
    F.cross_entropy(predict(task).logits(images), task.query_labels).backward()
    assert images.grad.abs().sum() > 0
    support = task.support.clone().requires_grad_()
    found = predict(task).refit(support)(task.query)
    assert found.requires_grad == (not head.zero_shot)


# --- files -----------------------------------------------------------------------------------------------


def good(**changes) -> dict:
    return {"names": np.array(["a", "b"]), "embeddings": np.eye(2, 3, dtype=np.float16)} | changes


def test_a_file_is_read_and_classes_are_found_however_they_are_spelt(tmp_path):
    names = np.array(["Stop_Sign", "no-entry"])
    assert text_prototypes.plain("CAFÉ_a") == text_prototypes.plain("cafe\u0301 a")  # as macOS names folders
    found = text_prototypes.read(saved(tmp_path / "x.npz", **good(names=names)))
    assert found.width == 3 and found.embeddings.dtype == torch.float32
    assert torch.equal(found.of(["no entry", "stop sign", "NO_ENTRY"]), torch.eye(2, 3)[[1, 0, 1]])
    fails(
        "has no text for 'a', 'b', 'c' and 1 more, classes of x",
        lambda: found.check("abcd", ", classes of x"),
    )


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_embeddings_of_any_length_have_their_direction(tmp_path, size, recwarn):
    """In float32 the square of many of them overflows, or vanishes."""
    dtype = np.float32 if 1e-38 < size < 1e38 else np.float64
    rows = np.random.default_rng(0).normal(size=(2, 5)).astype(dtype)
    found = text_prototypes.read(saved(tmp_path / "x.npz", **good(embeddings=rows * dtype(size)))).embeddings
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(torch.nn.functional.normalize(found, dim=1), expected, rtol=1e-5)
    assert not recwarn.list


def no_arrays(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("names", "a b")
        archive.writestr("embeddings", "1 2")


NO_CHARACTER = np.array([2**21, 97], np.uint32).view("U1")

BAD_FILES = {
    "nothing": (lambda file: file.write_bytes(b""), "no .npz file"),
    "missing": (lambda file: None, "no such file of text prototypes"),
    "text": (lambda file: file.write_text("names: a b"), "no .npz file"),
    "objects": (lambda file: saved(file, **good(names=np.array(["a", 1], object))), "no .npz file"),
    "other arrays": (lambda file: saved(file, texts=np.eye(2)), "holds texts, expected the arrays names"),
    "numbers as names": (lambda file: saved(file, **good(names=np.arange(2))), "expected texts"),
    "one too few": (lambda file: saved(file, **good(names=np.array(["a"]))), "1 names and embeddings of"),
    "none": (
        lambda file: saved(file, names=np.array([], "U1"), embeddings=np.empty((0, 3))),
        "0 names and embeddings",
    ),
    "no arrays": (no_arrays, "names is no array"),
    "no characters": (lambda file: saved(file, **good(names=NO_CHARACTER)), "the names are no texts"),
    "half a character": (lambda file: saved(file, **good(names=np.array(["\udc80", "a"]))), "are no texts"),
    "integers": (lambda file: saved(file, **good(embeddings=np.eye(2, dtype=int))), "floating-point numbers"),
    "one name twice": (lambda file: saved(file, **good(names=np.array(["a_b", "A b"]))), "have one name"),
    "not finite": (
        lambda file: saved(file, **good(embeddings=np.full((2, 3), np.nan))),
        "of 'a' is zero or not",
    ),
    "zero": (lambda file: saved(file, **good(embeddings=np.zeros((2, 3)))), "zero or not finite"),
    "larger than any": (
        lambda file: np.savez_compressed(file, **good(embeddings=np.ones((2, 2**10)))),
        "unpacks to [0-9]+ bytes, at most",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_other_files_are_refused(tmp_path, case, monkeypatch):
    monkeypatch.setattr(text_prototypes, "LARGEST", 10**4)
    write, words = BAD_FILES[case]
    write(tmp_path / "x.npz")
    fails(words, lambda: text_prototypes.read(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text", "share=1"], "expected no option"),
        (["mix", "share=support", "other=pretrained"], "share=support is for other=text"),
        (["mix", "share=half", "other=text"], "share is 'half', expected a number"),
        (["mix", "other=texts"], "expected pretrained, text or the number"),
    ],
)
def test_heads_that_make_no_sense(words, said):
    fails(said, lambda: parse_head(words))


def test_a_head_with_texts_is_named_as_it_is_given():
    for head in (MIXED, ZERO_SHOT):
        assert parse_head(head.name.split()) == head == Head(**dataclasses.asdict(head))


# --- runs ------------------------------------------------------------------------------------------------

CLASSES = [f"class {k}" for k in range(16)]  # of the source `tiny`


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    numbers = np.random.default_rng(0).normal(size=(16, 96))
    return saved(tmp_path_factory.mktemp("texts") / "x.npz", names=np.array(CLASSES), embeddings=numbers)


def untuned(world, out: Path, *flags):
    """Of the pretrained network, one episode, one attack."""
    quick = (
        "--samples",
        0,
        "--probe_episodes",
        0,
        "--nTestEpisode",
        1,
        "--epsilon",
        4,
        "--attack_iters",
        1,
        "--num_query",
        2,
    )
    own = world.test(out)
    at = own.index("--num_support")
    del own[at : at + 2]
    return command("test_meta_dataset", *own, *quick, *flags)


def test_shots_make_a_run_each_and_one_curve(world, texts, tmp_path):
    ended = untuned(world, tmp_path, "--text_prototypes", texts, "--shots", 2, 0)
    assert ended.code == 0, ended.err
    for number in (0, 2):
        folder = tmp_path / f"{number}-shot"
        noted = strict_json(folder / "run.json")
        assert noted["shots"] == number and len(noted["settings"]["text_prototypes"]) > 20
        (head,) = noted["deployments"]["tiny"]["heads"]
        assert (head["other"], head["share"]) == ("text", "support" if number else 0)
        (row,) = (folder / "rows.jsonl").read_text().splitlines()
        assert json.loads(row)["support"] == 5 * number
    row = ("row", tmp_path / "0-shot", "--name", "texts", "--out", tmp_path / "row.json")
    assert called(amt, ["amt", *row]).code == 0
    page = (tmp_path / "shots.html").read_text()
    assert "Accuracy by shots" in page and "tiny, 2 shots, clean" in page
    assert (tmp_path / "shots.png").stat().st_size and (tmp_path / "shots.pdf").stat().st_size


def test_the_curve_is_drawn_of_runs_that_note_their_shots():
    made = {shots: SimpleNamespace(run=SimpleNamespace(about={"shots": shots})) for shots in (1, 2)}
    assert shots.curves([made[1]]) == [] and shots.curves([made[1], made[1]]) == []
    assert shots.curves([made[1], SimpleNamespace(run=SimpleNamespace(about={}))]) == []


REFUSED = {
    "another width": (
        {"embeddings": np.eye(16)},
        (),
        "embeddings of 16 numbers, the network has 96 features",
    ),
    "unknown classes": (
        {"names": np.array([f"other {k}" for k in range(16)])},
        (),
        "has no text for 'class 11', 'class 12', 'class 13' and 2 more, classes of tiny, TEST",
    ),
    "no texts": (None, ("--shots", 0, 1), "--shots 0 classifies by texts alone: it needs --text_prototypes"),
    "a head without": (None, ("--head", "text"), "needs --text_prototypes FILE.npz"),
    "a head of images": ({}, ("--head", "lda"), "does not use --text_prototypes; expected --head text"),
    "shots twice": ({}, ("--shots", 1, 1), "--shots names a value twice"),
    "support as well": ({}, ("--shots", 1, "--num_support", 2), "--shots and --num_support exclude"),
    "too few images": ({}, ("--shots", 0, 99), "fewer than the 100 images that support and query take"),
    "no support to attack": ({}, ("--head", "text", "--attack", "support"), "moves the support set"),
    "nothing to merge by": ({}, ("--shots", 0, "--resume", "x"), "has no support set to merge a pool by"),
    "nothing to tune on": ({}, ("--shots", 0, "--deploy", "finetune"), "no support set for --deploy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_cannot_be_are_refused_before_any_work(world, texts, tmp_path, case):
    changes, flags, words = REFUSED[case]
    given = ()
    if changes is not None:
        with np.load(texts) as held:
            given = ("--text_prototypes", saved(tmp_path / "y.npz", **{**held, **changes}))
    own = [flag for flag in world.test(tmp_path / "out", *given)]
    if case != "support as well":
        at = own.index("--num_support")
        del own[at : at + 2]
    ended = command("test_meta_dataset", *own, *flags)
    assert ended.code == 2 and words in error_line(ended)
    assert not (tmp_path / "out").exists()


def test_classes_that_settings_are_chosen_on_need_texts_before_any_work(world, texts, tmp_path):
    """Those of VALID (class 6 to class 10), in a dry run as well; where nothing is chosen nobody asks."""
    with np.load(texts) as held:
        missing = np.array(
            [name if k not in (8, 9) else f"other {k}" for k, name in enumerate(held["names"])]
        )
        given = saved(tmp_path / "y.npz", **{**held, "names": missing})
    pool = principal_pool(load_network("vit_mini", world.weights).weights, 1, LEVELS)
    checkpoint.save(tmp_path / "pool.safetensors", checkpoint.Checkpoint(pool, {"arch": "vit_mini"}))
    flags = ("--resume", tmp_path / "pool.safetensors", "--text_prototypes", given)
    choice = ("--select", "valid", "--routing", "best")
    own = world.test(tmp_path / "out", *flags, *choice)
    said = f"{given}: has no text for 'class 8', 'class 9', classes of tiny, VALID; expected every class"
    ended = command("test_meta_dataset", *own)
    assert ended.code == 2 and said in error_line(ended)
    ended = command("test_meta_dataset", *own, "--dry_run")
    assert ended.code == 2 and said in ended.out
    ended = command("test_meta_dataset", *world.test(tmp_path / "out", *flags, "--dry_run"))
    assert ended.code == 0 and f"text prototypes {given}: 16 classes, 96 numbers each" in ended.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_the_documented_script_gives_the_librarys_zero_shot_answers(tmp_path, library):
    """From its file and its weights to the cosines that the library itself computes."""
    pytest.importorskip(library)
    found = re.search(r"```python\n(.+?)```", (ROOT / "docs/how-to/text-prototypes.md").read_text(), re.S)
    script: dict = {}
    exec(found[1], script)

    def tokens(sentences, **_):
        rows = torch.tensor([[1, *map(ord, sentence)] for sentence in sentences]) % 98  # 98 ends a text
        rows = torch.cat([rows[:, :7], torch.full((len(rows), 1), 98)], dim=1)
        return rows if library == "open_clip" else {"input_ids": rows}

    model = open_clip_model() if library == "open_clip" else hugging_face("CLIPModel")
    ways = {"open_clip": "open_clip_texts", "transformers": "hugging_face_texts"}
    embed = script[ways[library]](model, tokens)
    script["SENTENCES"] = ("{}",)
    script["write_texts"](tmp_path / "x.npz", ["ab_cdef", "ghijklm", "nopqrst"], embed)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    name = "toy_clip" if library == "open_clip" else "toy_clip_quickgelu"
    ours = load_network(f"timm:{name}", tmp_path / "x.pt")
    task = dataclasses.replace(patterned_episode(7, side=32), class_names=("nopqrst", "ab cdef", "ghijklm"))
    texts = text_prototypes.read(tmp_path / "x.npz")
    answers = head_classifier(ours, pretrained(ours), task, (), ZERO_SHOT, texts=texts).logits(task.query)
    seen, said = normal(task.query), tokens(["nopqrst", "ab cdef", "ghijklm"])
    if library == "open_clip":
        images, words = model.encode_image(seen), model.encode_text(said)
    else:
        out = model(pixel_values=seen, **said)
        images, words = out.image_embeds, out.text_embeds
    expected = 10 * F.normalize(images, dim=1) @ F.normalize(words, dim=1).T
    assert torch.allclose(answers, expected, atol=1e-4) and expected.std() > 0.1
