"""What the page for trying a pool computes, what its server refuses and leaves, and faults of its command."""

import itertools
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Ended, called
from test_lazy_imports import HEAVY, loaded
from toy_photos import write_photos

from amt.__main__ import main as amt
from amt.app import answers, example, server
from amt.app.answers import Examples, Source
from amt.few_shot.classifier import FewShotClassifier
from meta_dataset_readers.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "box")


def slot(folder: Path, name: str = "") -> Examples:
    """The pictures in a folder as a class."""
    return Examples(name or folder.name, tuple(sorted(folder.iterdir())))


@pytest.fixture
def source(photos) -> Source:
    return Source(photos / "vit_mini_pool.safetensors", device="cpu")


@pytest.fixture
def slots(photos) -> list[Examples]:
    return [slot(photos / "support" / name) for name in ("dog", "cat")]


@pytest.fixture
def new(photos) -> list[Path]:
    return sorted((photos / "new").iterdir())


def test_answers_are_those_of_the_library(source, slots, new, photos):
    """Whatever the order of the slots; empty ones are left out."""
    found = answers.answer(source, [*slots, Examples("class 3", ())], new)
    clf = FewShotClassifier("vit_mini_pool", device="cpu").fit(photos / "support")
    assert found.classes == ["cat", "dog"] and found.unread == ()
    np.testing.assert_allclose(found.probabilities, clf.predict_proba(photos / "new"), rtol=1e-5)
    assert [found.best(k)[0] for k in (0, 1)] == ["cat", "dog"]
    assert list(answers.adapters(found.task).values()) == pytest.approx(clf.coefficients_.tolist())
    assert list(answers.adapters(found.task)) == ["trained at 8/255", "trained at 0.1/255"]


def test_an_unreadable_new_picture_is_told_of_and_the_others_go_on(source, slots, new, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    found = answers.answer(source, slots, [new[0], bad, new[1]])
    assert len(found.images) == len(found.probabilities) == 2
    (line,) = found.unread
    assert line.startswith("bad.png: ") and str(tmp_path) not in line
    with pytest.raises(InputError, match=r"no new picture could be read: bad\.png"):
        answers.answer(source, slots, [bad])
    with pytest.raises(InputError, match=r"^cat: bad\.png: "):
        answers.answer(source, [slots[0], Examples("cat", (bad,))], new)


def test_a_picture_under_attack_is_within_epsilon_and_answered_as_it_looks(source, slots, new):
    found = answers.answer(source, slots, new)
    seen = answers.attack(found, 1, 255)
    assert not seen.stands and answers.verdict(seen, 255).startswith("Falls at 255/255: dog becomes cat, ")
    for share in (seen.before, seen.after):
        assert list(share) == ["cat", "dog"] and sum(share.values()) == pytest.approx(1)
    seen = answers.attack(found, 1, 3)
    clean, perturbation, attacked = (picture.astype(int) for picture in seen.pictures)
    assert 0 < np.abs(attacked - clean).max() <= 3
    np.testing.assert_allclose(perturbation, 127.5 + seen.factor * (attacked - clean), atol=seen.factor)
    again = answers.attack(found, 1, 3)
    assert (again.pictures[2] == seen.pictures[2]).all() and again.after == seen.after
    tiny = answers.attack(found, 1, 0.01)
    assert tiny.stands and answers.verdict(tiny, 0.01).startswith("Stands at 0.01/255: still dog, ")


def test_epsilon_0_changes_nothing(source, slots, new):
    seen = answers.attack(answers.answer(source, slots, new), 0, 0)
    assert seen.factor is None and (seen.pictures[0] == seen.pictures[2]).all()
    assert seen.after == pytest.approx(seen.before, rel=1e-5)  # float32, alone and among others
    assert answers.verdict(seen, 0).startswith("Nothing was changed at epsilon 0: cat, ")


@pytest.mark.parametrize("side", [1, 32, 224, 300])
def test_pictures_are_shown_large_enough_without_a_pixel_changed(side):
    image = torch.rand(3, side, side)
    shown = answers.enlarged(image)
    assert len(shown) >= answers.SHOWN_SIDE and len(shown) % side == 0
    first = shown[:: len(shown) // side, :: len(shown) // side]
    assert (first == (255 * image).round().byte().permute(1, 2, 0).numpy()).all()


def many(name: str, count: int) -> Examples:
    return Examples(name, (Path("a.png"),) * count)


TWO = (many("a", 1), many("b", 1))
FAULTS = {
    "nothing": ((), 1, "no pictures so far"),
    "one class": ((many("a", 3), many("b", 0)), 1, "pictures of 1 class so far"),
    "no name": ((many(" ", 1), many("b", 1)), 1, "a class has pictures and no name"),
    "same name": ((many("a", 1), many("a ", 1)), 1, "2 classes are called 'a'"),
    "too many classes": ([many(str(k), 1) for k in range(7)], 1, "7 classes, expected 6 at most"),
    "too many examples": ((many("a", 21), many("b", 1)), 1, "a: 21 pictures, expected 20 at most"),
    "no new ones": (TWO, 0, "no new pictures"),
    "too many new ones": (TWO, 25, "25 new pictures, expected 24 at most"),
}


@pytest.mark.parametrize(("slots", "new", "message"), FAULTS.values(), ids=FAULTS)
def test_what_makes_no_task_is_said_before_a_picture_is_read(source, slots, new, message):
    with pytest.raises(InputError, match=message):
        answers.answer(source, slots, [Path("nowhere.png")] * new)


def test_the_example_is_a_task_within_the_limits(source, tmp_path):
    drawn = example.draw()
    slots, new = [], []
    for number, (name, held) in enumerate([*drawn.classes.items(), ("new", drawn.new)]):
        (tmp_path / str(number)).mkdir()
        for k, picture in enumerate(held):
            picture.save(tmp_path / str(number) / f"{k}.png")
        slots.append(slot(tmp_path / str(number), name))
    new = list(slots.pop().files)
    found = answers.answer(source, slots, new)
    assert found.classes == sorted(example.CLASSES) and len(found.images) == len(drawn.new)
    every = [picture.tobytes() for held in (*drawn.classes.values(), drawn.new) for picture in held]
    assert len(set(every)) == len(every)  # none is both an example and new
    assert [picture.tobytes() for picture in example.draw().new] == every[-len(drawn.new) :]


# --- the server --------------------------------------------------------------------------------------------


def upload(length: bytes | None, path: str = "/gradio_api/upload") -> dict:
    headers = [] if length is None else [(b"content-length", length)]
    return {"type": "http", "path": path, "headers": headers}


@pytest.mark.parametrize(
    ("scope", "refused"),
    [
        (upload(b"100"), None),
        (upload(b"101"), "101 bytes at once"),
        (upload(b"90"), None),
        (upload(None), "says how long"),
        (upload(b"-5"), "says how long"),
        (upload(b"999", "/config"), None),
        ({"type": "lifespan"}, None),
    ],
)
def test_uploads_are_bounded(tmp_path, scope, refused):
    found = server.Bounded(None, tmp_path, largest=100, most=150).refusal(scope)
    assert found is None if refused is None else refused in found


def test_a_full_folder_takes_no_more(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "picture.png").write_bytes(bytes(100))
    bounded = server.Bounded(None, tmp_path, largest=100, most=150)
    assert bounded.refusal(upload(b"50")) is None and "full" in bounded.refusal(upload(b"51"))


def test_the_folder_goes_and_the_environment_comes_back(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt), server.own_folder() as folder:
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "a").mkdir()
        (folder / "a" / "picture.png").write_bytes(b"private")
        raise KeyboardInterrupt
    assert not folder.exists() and dict(os.environ) == before


# --- the command -------------------------------------------------------------------------------------------


def app(*flags) -> Ended:
    return called(amt, ["amt", "app", *flags])


def one_line(ended: Ended, message: str) -> None:
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", ended.err) and message in ended.err, ended.err


def test_help_waits_for_neither_torch_nor_gradio():
    code = "from amt.cli import app\ntry:\n    app.main(['--help'])\nexcept SystemExit:\n    pass"
    assert not loaded(code) & (HEAVY | {"gradio"})


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    one_line(app("vit_mini_pool"), "pip install 'adversarial-meta-tuning[app]'")


@pytest.fixture
def with_gradio():
    pytest.importorskip("gradio", reason="the extra `app` is not installed")


def test_a_port_in_use_is_one_line(with_gradio):
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line(app("vit_mini_pool", "--port", port), f"--port {port}: Address already in use; expected a")
        assert server.free_port(0) != port


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("vit_mini_poll",), "did you mean 'vit_mini_pool'"),
        (("vit_mini_pool", "--port", 65536), "--port"),
        (("vit_mini_pool", "--coefficients", 1, 0, 0), "--coefficients has 3 values"),
        (("vit_mini_pool", "--device", "cuda:77"), "cuda:77"),
    ],
)
def test_faults_are_one_line(with_gradio, flags, message):
    port = () if "--port" in flags else ("--port", 0)
    one_line(app(*flags, *port), message)


def test_a_saved_task_is_no_pool(with_gradio, photos, tmp_path):
    task = tmp_path / "task.safetensors"
    FewShotClassifier("vit_mini_pool").fit(photos / "support").save(task)
    one_line(app(task, "--port", 0), "is a saved task, which has its classes; expected a pool")


# --- what the page shows -----------------------------------------------------------------------------------


@pytest.fixture
def page(with_gradio):
    from amt.app import page

    return page


def test_values_fit_the_page(page, source, photos, tmp_path):
    """From what galleries hand over to what labels and galleries show; names are text, not markup."""
    evil = "<b onclick=x>"
    support = write_photos(tmp_path / "support", ("cat", "dog"), 2)
    (tmp_path / f"{evil}.png").write_bytes(b"no picture")
    held = [[(str(file), None) for file in slot(support / name).files] for name in ("cat", "dog")]
    new = [(str(photos / "new" / "2.png"), None), (str(tmp_path / f"{evil}.png"), None)]
    names = ["cat", evil, "", "", "", ""]
    found, chosen, panel, shown, shares, merged, notes, *rest = page._classified(
        source, *names, *held, None, [], None, None, new
    )
    assert chosen == 0 and panel.visible and not rest[0].visible and rest[1:] == [None] * 6
    ((picture, caption),) = shown
    assert picture.dtype == np.uint8 and caption.startswith(f"{evil} ")
    assert shares == answers.shares(found, found.probabilities[0]) and sum(
        merged.value["confidences"][k]["confidence"] for k in (0, 1)
    ) == pytest.approx(1)
    assert notes.startswith("Not read: &lt;b onclick=x&gt;.png: ") and "<b" not in notes
    panel, verdict, *_ = page._attack(source, found, 0, 255)
    assert panel.visible and "&lt;b onclick=x&gt; becomes cat" in verdict


def test_slots_are_added_up_to_the_limit(page):
    counts = list(itertools.accumulate(range(5), lambda count, _: page._one_more(count)[0], initial=3))
    assert counts == [3, 4, 5, 6, 6, 6]
    assert not page._one_more(5)[1].interactive
    assert [column.visible for column in page._one_more(3)[2:]] == [True] * 4 + [False] * 2


def test_nothing_is_attacked_before_an_answer(page, source):
    with pytest.raises(InputError, match="classify pictures first"):
        page._attack(source, None, 0, 4)


def test_an_emptied_epsilon_is_asked_for(page, source, slots, new):
    with pytest.raises(InputError, match="no epsilon; expected 0 to 16"):
        page._attack(source, answers.answer(source, slots, new), 0, None)
