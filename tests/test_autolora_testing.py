"""Testing a fine-tuned classifier: a row per image, whatever its batch; stopping and going on; the report."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails
from pyautoattack.square import SquareAttack
from torch import nn

from amt.attacks.evaluation import attack_queries
from amt.attacks.kinds import Attack
from amt.cli import compare as compare_command
from amt.data.labelled import ArrayImages
from amt.evaluation import runs
from amt.evaluation import test_set as testing
from amt.evaluation.comparison import compare, other_episodes
from amt.evaluation.evaluate import columns, measure
from amt.evaluation.statistics import summarise
from amt.evaluation.writer import Writer
from amt.models.network import Network, logits
from amt.report.document import page
from amt.report.finish import finish
from meta_dataset_readers.transforms import planes, unit_range

CLASSES = ("red", "green", "blue", "dark", "light")
SIDE = 8
ATTACKS = (
    Attack("pgd", (4, 16), steps=3),
    Attack("apgd", (16,), steps=5, restarts=2),
    Attack("fab", (16,), steps=4, targets=2),
    Attack("square", (16,), queries=20),
    Attack("square", (100,), "l2", queries=20),
)
PGD = (Attack("pgd", (8,), steps=2),)


def small_network(n_classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, n_classes),
    )


NETWORK = Network("toy", small_network(), SIDE, make=small_network)


def pictures(n: int = 70, seed: int = 0) -> ArrayImages:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(CLASSES))
    colours = np.array([[200, 80, 80], [80, 200, 80], [80, 80, 200], [60, 60, 60], [200, 200, 200]])
    pixels = colours[labels][:, None, None] + rng.integers(-55, 55, (n, SIDE, SIDE, 3))
    return ArrayImages(pixels.astype(np.uint8), labels, "made up")


def transform(image, _generator) -> np.ndarray:
    return planes(image)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A classifier that gets most pictures right, and some wrong."""
    part = pictures(100, seed=1)
    images = torch.stack([unit_range(transform(part.image(k), None)) for k in range(100)])
    found = NETWORK.start(0)
    trained = {name: found[name].requires_grad_() for name in NETWORK.parameters}
    optimiser = torch.optim.SGD(trained.values(), 0.05, momentum=0.9)
    for _ in range(12):
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits(NETWORK, found, images, training=True), part.labels).backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def run_test(weights):
    """`testing.test` on 70 pictures into a folder, and the end of a complete run."""

    def run(folder, attacks=PGD, part=None, **options) -> int:
        def test_set(images):
            reading = {name: options[name] for name in ("batch_size", "workers") if name in options}
            names = options.get("class_names", CLASSES)
            return testing.TestSet("toys", images, names, transform, **{"batch_size": 16, **reading})

        run, code = testing.test(
            options.get("network", NETWORK),
            options.get("weights", weights),
            test_set(pictures() if part is None else part),
            folder,
            about=options.get("about", {"settings": {"mode": "AFF"}}),
            attacks=attacks,
            seed=options.get("seed", 0),
            corrupted={
                name: [test_set(images) for images in severities]
                for name, severities in options.get("corrupted", {}).items()
            },
        )
        if run.complete:
            finish(run, torch.device("cpu"))
        return code

    return run


@pytest.fixture(scope="module")
def whole(run_test, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run under many attacks."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_test(folder, ATTACKS) == 0
    return folder


def untimed(folder: Path) -> list[str]:
    """The lines of a run without the times they took: what has to be the same to the byte."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [json.dumps(json.loads(line) | {"seconds": 0, "fit_seconds": 0}) for line in lines]


# --- rows ------------------------------------------------------------------------------------------------


def test_there_is_a_row_per_image_and_its_clean_column_is_plain_accuracy(whole, weights):
    run = runs.load(whole)
    part = pictures()
    images = torch.stack([unit_range(transform(part.image(k), None)) for k in range(len(part))])
    with torch.no_grad():
        plain = logits(NETWORK, weights, images).argmax(1)
    (rows,) = run.rows.values()
    assert run.complete and run.unit == "image" and run.columns == columns(ATTACKS)
    assert [row["index"] for row in rows] == list(range(70))
    assert [row["label"] for row in rows] == part.labels.tolist()
    assert [row["predicted"] for row in rows] == plain.tolist()
    assert [row["clean"] for row in rows] == (plain == part.labels).int().tolist()
    for row in rows:
        assert {row[column] for column in run.columns} <= {0, 1}
        assert (row["source"], row["ways"], row["support"], row["queries"]) == ("toys", 5, 0, 1)
        assert row["union"] <= row["pgd3@16"] <= row["pgd3@4"] <= row["clean"] and row["seconds"] > 0
    accuracy = [run.summary("toys", column).mean for column in ("clean", "pgd3@4", "pgd3@16")]
    assert 100 > accuracy[0] > accuracy[1] > accuracy[2]
    results = json.loads((whole / "results.json").read_text())
    assert results["summary"]["toys"]["clean"]["n"] == 70
    assert results["summary"]["toys"]["clean"]["mean"] == pytest.approx(
        100 * (plain == part.labels).double().mean()
    )


def test_what_was_run_is_said_of_the_images_that_were_attacked(whole):
    (rows,) = runs.load(whole).rows.values()
    assert [row.get("variants", {}) for row in rows] == [
        {"fab4-t2@16": "fab-t x2"} if row["clean"] else {} for row in rows
    ]


@pytest.mark.parametrize("batch_size", [5, 70])
def test_a_row_does_not_depend_on_the_batch(run_test, whole, tmp_path, batch_size):
    """Attacks of the library included, which draw for all images of a batch at once."""
    assert run_test(tmp_path, ATTACKS, batch_size=batch_size) == 0
    assert untimed(tmp_path) == untimed(whole)


def test_a_row_does_not_depend_on_what_else_is_attacked(run_test, whole, tmp_path):
    assert run_test(tmp_path, ATTACKS[3:4]) == 0
    ours, theirs = (runs.load(folder).every_row for folder in (tmp_path, whole))
    assert [row["square20@16"] for row in ours] == [row["square20@16"] for row in theirs]


def test_another_seed_starts_the_attacks_elsewhere(run_test, whole, tmp_path):
    assert run_test(tmp_path, ATTACKS, seed=1) == 0
    ours, theirs = (runs.load(folder).every_row for folder in (tmp_path, whole))
    assert [row["predicted"] for row in ours] == [row["predicted"] for row in theirs]
    assert any(a["square20@16"] != b["square20@16"] for a, b in zip(ours, theirs, strict=True))


def test_workers_and_no_attack_at_all(run_test, whole, tmp_path):
    assert run_test(tmp_path, (), workers=1) == 0
    assert [row["clean"] for row in runs.load(tmp_path).every_row] == [
        row["clean"] for row in runs.load(whole).every_row
    ]
    assert not (tmp_path / "samples").exists() and runs.load(tmp_path).columns == ("clean",)


def test_the_weights_are_never_written_to(run_test, weights, tmp_path):
    before = {name: tensor.clone() for name, tensor in weights.items()}
    leaves = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in weights.items()
    }
    assert run_test(tmp_path, ATTACKS[:3], weights=leaves) == 0
    assert all(torch.equal(leaves[name], before[name]) and leaves[name].grad is None for name in before)


# --- attacks of the library, image by image ---------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["apgd", "fab", "square", "autoattack"])
def test_the_library_treats_an_image_alike_in_any_company(kind, norm, monkeypatch):
    """Images that fall early, late and not at all, alone and together."""
    quick = lambda *args, **more: SquareAttack(*args, **more | {"n_queries": 100})  # noqa: E731
    monkeypatch.setattr("pyautoattack.autoattack.SquareAttack", quick)
    normal = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(7))

    def plane(images):
        height = ((images - 0.5) * normal).sum((1, 2, 3))
        return torch.stack([height, -height, height - 40, *[height * 0 - 50] * 2], dim=1)

    size = normal.norm() if norm == "l2" else normal.abs().sum()
    step = normal / normal.norm() ** 2 * size / 255
    images = torch.stack([0.5 + distance * step for distance in (0.3, 1.7, 2.5)])
    labels = torch.zeros(3, dtype=torch.int64)
    options = {"apgd": {"steps": 10, "restarts": 3}, "square": {"queries": 150}}.get(kind, {})
    attack = Attack(kind, (2.0,), norm, **options)

    def run(which: list[int], seed: int = 3):
        return attack_queries(attack, 2.0, plane, images[which], labels[which], 5, [], seed=seed)

    together = run([0, 1, 2])
    assert together.fooled[0] and not together.fooled[2]
    for which in ([2, 0], [1]):
        alone = run(which)
        assert torch.equal(alone.fooled, together.fooled[which])
        torch.testing.assert_close(alone.images, together.images[which])


def test_fab_finds_the_nearest_image_of_another_class():
    """Of a plane the distance is known: FAB stays within it and hardly further, however large epsilon is."""
    normal = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(7))

    def plane(images):
        height = ((images - 0.5) * normal).sum((1, 2, 3))
        return torch.stack([height, -height, height * 0 - 50], dim=1)

    images = 0.5 + 2.0 / 255 * normal[None] / normal.norm() ** 2 * normal.abs().sum()
    found = attack_queries(Attack("fab", (8.0,)), 8.0, plane, images, torch.zeros(1).long(), 3, [])
    assert found.fooled.all() and found.variant == "fab-t x2"
    assert 2.0 < 255 * float((found.images - images).abs().max()) < 2.2


def test_fab_refuses_more_targets_than_there_are_classes(run_test, tmp_path):
    attack = Attack("fab", (8,), targets=5)
    fails(
        "--attack fab targets=5: an episode of 5 ways has 4 other",
        lambda: run_test(tmp_path / "out", [attack]),
    )
    assert not (tmp_path / "out").exists()


# --- stopping and going on --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_stopped_test_goes_on_where_it_was(run_test, whole, tmp_path, monkeypatch, capsys, stop_at):
    """The first batch has the 32 images that the attacks are checked on, the others 16."""
    append, calls = Writer.append, []

    def noisy(self, *rows):
        append(self, *rows)
        calls.append(len(rows))
        if len(calls) == stop_at + 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "append", noisy)
        code = run_test(tmp_path, ATTACKS)
    done = 32 + 16 * stop_at if stop_at < 3 else 70
    if done < 70:
        assert code == 128 + signal.SIGTERM and not (tmp_path / "results.json").exists()
        assert f"{done} of 70 images are done; the same command continues" in capsys.readouterr().out
    assert calls == [32, 16, 16, 6][: stop_at + 1]
    assert run_test(tmp_path, ATTACKS, batch_size=20) == 0
    assert untimed(tmp_path) == untimed(whole)
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole)]
    assert results[0]["summary"] == results[1]["summary"] and results[0]["suspect"] == results[1]["suspect"]


@pytest.mark.parametrize("cut", [0.0, 0.003, 0.2, 0.5, 0.999])
def test_a_killed_test_goes_on_where_it_was(run_test, whole, tmp_path, cut):
    """Whatever had reached the disk: nothing, part of a line, part of a batch, all but the summary."""
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    content = (whole / "rows.jsonl").read_bytes()
    (folder / "rows.jsonl").write_bytes(content[: int(cut * len(content))])
    kept = content[: content.rfind(b"\n", 0, int(cut * len(content))) + 1]
    assert run_test(folder, ATTACKS) == 0
    assert (folder / "rows.jsonl").read_bytes().startswith(kept)
    assert untimed(folder) == untimed(whole)
    results = [json.loads((each / "results.json").read_text()) for each in (folder, whole)]
    assert results[0]["summary"] == results[1]["summary"]
    assert (folder / "answers.csv").read_bytes() == (whole / "answers.csv").read_bytes()


def test_the_same_call_on_a_finished_run_only_shows_it(run_test, whole, capsys):
    before = (whole / "rows.jsonl").read_bytes()
    assert run_test(whole, ATTACKS) == 0
    out = capsys.readouterr().out
    assert "accuracy on test images in per cent" in out and "toys" in out and "merging" not in out
    assert "the attacks were checked on" in out
    assert (whole / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed 0, not 2"),
        ({"attacks": PGD}, "begun with attacks"),
        ({"about": {"settings": {"mode": "SLF"}}}, 'mode "AFF", not "SLF"'),
        ({"network": dataclasses.replace(NETWORK, mean=(0, 0, 0))}, "begun with network"),
        ({"weights": None}, "begun with weights"),
    ],
)
def test_a_run_of_other_weights_or_settings_is_refused_and_kept(run_test, weights, whole, change, named):
    if "weights" in change:
        change = {"weights": weights | {"4.bias": weights["4.bias"] + 1}}
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    fails(named, lambda: run_test(whole, **{"attacks": ATTACKS, **change}))
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


# --- corruptions ------------------------------------------------------------------------------------------


def corrupted(names=("fog", "noise")) -> dict:
    """Test sets that get worse: the share of pictures of other classes grows."""
    found = {}
    for k, name in enumerate(names):
        found[name] = []
        for severity in range(1, 6):
            part = pictures(30, seed=20 + k)
            pixels = part.pixels.copy()
            pixels[: 5 * severity] = 255 - pixels[: 5 * severity]
            found[name].append(ArrayImages(pixels, part.labels, name))
    return found


def test_common_corruptions_are_measured_summed_up_and_gone_on_with(
    run_test, weights, tmp_path, monkeypatch, capsys
):
    note = Writer.note_corruption

    def noisy(self, *found):
        note(self, *found)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "note_corruption", noisy)
        assert run_test(tmp_path, corrupted=corrupted()) == 130
    out = capsys.readouterr().out
    assert "70 of 70 images are done, and 1 of 2 corruptions; the same command continues" in out
    first = json.loads((tmp_path / "corruptions.json").read_text())
    assert list(first) == ["fog"] and not runs.load(tmp_path).complete
    assert run_test(tmp_path, corrupted=corrupted()) == 0
    found = runs.load(tmp_path).corruptions
    assert found["fog"] == first["fog"] and list(found) == ["fog", "noise"]
    for name, parts in corrupted().items():
        for accuracy, part in zip(found[name], parts, strict=True):
            images = torch.stack([unit_range(transform(part.image(k), None)) for k in range(len(part))])
            with torch.no_grad():
                right = logits(NETWORK, weights, images).argmax(1) == part.labels
            assert accuracy == pytest.approx(float(right.double().mean()))
    summary = json.loads((tmp_path / "results.json").read_text())["corruption_summary"]
    assert summary["by_severity"][0] == pytest.approx(50 * (found["fog"][0] + found["noise"][0]))
    assert summary["mean"] == pytest.approx(10 * sum(map(sum, found.values())))
    out = capsys.readouterr().out
    assert "common corruptions" in out and f"{summary['mean']:.1f}" in out
    # The same run without them is complete, too, and keeps what was measured.
    assert run_test(tmp_path) == 0
    assert runs.load(tmp_path).corruptions == found


@pytest.mark.parametrize("content", ['{"fog": [1, 1]}', '{"fog": [0, 0, 0, 0, 2]}', '{"fog": 3}', "[]"])
def test_damaged_corruptions_are_named(run_test, tmp_path, content):
    assert run_test(tmp_path, ()) == 0
    (tmp_path / "corruptions.json").write_text(content)
    assert "corruptions.json" in str(fails("corruptions.json", lambda: runs.load(tmp_path)))


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_names": CLASSES[:4]}, "its head has 5 classes, the dataset 4"),
        ({"attacks": [Attack("support", (8,))]}, "--attack support: there is no support set"),
        ({"attacks": [Attack("transfer", (8,))]}, "--attack transfer: there is no other network"),
        ({"attacks": [Attack("autoattack", (8,), targets=7)]}, "targets=7"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(run_test, tmp_path, options, words):
    fails(words, lambda: run_test(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", [5, -1])
def test_labels_outside_of_the_head_are_refused(run_test, tmp_path, label):
    part = pictures(10)
    part.labels[3] = label
    words = f"the test set of toys: label {label}, expected 0 to 4"
    fails(words, lambda: run_test(tmp_path / "out", part=part))
    worse = {"fog": [pictures(5)] * 4 + [part]}
    fails(f"fog of severity 5 of toys: label {label}", lambda: run_test(tmp_path / "out", corrupted=worse))
    assert not (tmp_path / "out").exists()


def test_an_empty_test_set_and_weights_that_are_no_numbers_are_refused(run_test, weights, tmp_path):
    fails("the test set of toys: holds no image", lambda: run_test(tmp_path / "out", part=pictures(0)))
    broken = weights | {"4.bias": torch.full((5,), float("nan"))}
    fails("4.bias", lambda: run_test(tmp_path / "out", weights=broken))
    assert not (tmp_path / "out").exists()


# --- comparing and showing --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(run_test, weights, tmp_path_factory) -> Path:
    """A run of a worse classifier, with corruptions."""
    folder = tmp_path_factory.mktemp("other")
    blurred = weights | {"4.weight": weights["4.weight"] * torch.linspace(1, 0, 64)}
    assert run_test(folder, ATTACKS, weights=blurred, corrupted=corrupted()) == 0
    return folder


def test_two_classifiers_are_compared_image_by_image(whole, other, capsys):
    ours, theirs = runs.load(whole), runs.load(other)
    found = compare(ours, theirs)
    assert not found.refusals
    clean = found.differences["toys", "clean"]
    pairs = zip(ours.every_row, theirs.every_row, strict=True)
    assert clean.n == 70 and clean.mean == pytest.approx(
        100 / 70 * sum(a["clean"] - b["clean"] for a, b in pairs)
    )
    capsys.readouterr()
    assert compare_command.main([str(whole), str(other)]) == 0
    assert "toys" in capsys.readouterr().out


def test_test_sets_with_other_labels_are_not_paired(run_test, whole, tmp_path):
    assert run_test(tmp_path, ATTACKS[:1], part=pictures(70, seed=4)) == 0
    found = compare(runs.load(tmp_path), runs.load(whole))
    assert not found.differences and "they share no image of toys" in found.refusals


def test_the_page_speaks_of_images(whole, other):
    text = page([runs.load(whole), runs.load(other)])
    visible = text.partition("<body>")[2].partition("<script>")[0]
    assert "70 images of toys" in visible and "Common corruptions" in visible
    for word in ("episode", "Few-shot", "support images", "-way", "ways,"):
        assert word not in visible, word
    assert "70, of 5 classes" in visible and "on the same images" in visible
    assert visible.count("fog") == 1 and "Example images" in visible
    assert "Common corruptions" not in page([runs.load(whole)])


def test_an_unfinished_run_is_shown_as_such(run_test, tmp_path):
    assert run_test(tmp_path, ()) == 0
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:50]))
    assert "is unfinished: of 70 images per domain it has toys 50" in page([runs.load(tmp_path)])


def test_many_rows_are_summed_up_as_few_are():
    """The bootstrap of ten thousand images makes no matrix of as many columns, and finds the interval."""
    values = np.random.default_rng(3).random(10_000) < 0.8
    found = summarise([{"x": float(value)} for value in values], "x")
    assert found.low == pytest.approx(found.mean - found.interval, abs=0.1)
    assert found.high == pytest.approx(found.mean + found.interval, abs=0.1)
    assert summarise([{"x": float(value)} for value in values], "x") == found


def test_measuring_by_numbers(weights):
    """Batches that share an index, with numbers, start as one batch does."""
    part = pictures(12)
    images = torch.stack([unit_range(transform(part.image(k), None)) for k in range(12)])
    whole = testing.as_episode(images, part.labels, "toys", CLASSES)
    last = testing.as_episode(images[8:], part.labels[8:], "toys", CLASSES)
    predict = testing.predictor(NETWORK, weights)
    together = measure(predict, whole, PGD, 5)
    alone = measure(predict, last, PGD, 5, numbers=range(8, 12), chunk=3)
    column = PGD[0].columns[0]
    assert whole.n_way == 5
    assert torch.equal(alone.predicted, together.predicted[8:])
    assert torch.equal(alone.correct[column], together.correct[column][8:])
    torch.testing.assert_close(alone.attacked[column], together.attacked[column][8:])


def test_runs_of_other_seeds_are_compared_image_by_image():
    """A test set is the same for every seed; episodes are not, and images are no episodes."""
    image, episode = {"unit": "image", "split": "test"}, {"split": "TEST"}
    assert other_episodes(image | {"seed": 1}, image | {"seed": 2}) is None
    assert other_episodes(episode | {"seed": 1}, episode | {"seed": 2}) == "its seed is 1, not 2"
    assert "one image each" in other_episodes(image, episode)
