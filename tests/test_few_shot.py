"""The classifier of one's own pictures: any form of images, scikit-learn's conventions, and the same answers
as the evaluation command."""

import contextlib
import json
import pickle
import warnings
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import fails
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import estimator_checks_generator
from toy_photos import photo, toy_pool, write_photos

import amt
from amt.cli.predict import adapters
from amt.evaluation.deploy import deploy
from amt.evaluation.settings import Deployment
from amt.few_shot import pictures, task_file
from amt.few_shot.classifier import FewShotClassifier
from amt.few_shot.pools import find_pool, open_pool
from amt.files import checkpoint
from amt.models.pool import pretrained_pool
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader

pytestmark = pytest.mark.usefixtures("one_thread", "box")
QUICK = "pgd steps=3"


@pytest.fixture(scope="module")
def fitted(photos) -> FewShotClassifier:
    return FewShotClassifier(photos / "vit_mini_pool.safetensors", device="cpu").fit(photos / "support")


# --- the same as test_meta_dataset.py --------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"beta": 10.0, "top_k": 1}, {"route_epsilon": 4.0}])
def test_logits_are_those_of_the_evaluation(photos, settings):
    """Same support, same seed: the coefficients and, bit for bit, the logits of a run's first episode."""
    opened = open_pool(photos / "vit_mini_pool.safetensors")
    sampling = EpisodeSampling(num_ways=2, num_support=2, num_query=2)
    episode = EpisodeReader(photos, "support", "TEST", sampling, 32, n_episodes=1)[0]
    renamed = {"route_epsilon": "epsilon"}
    routing = amt.Routing(**{renamed.get(name, name): value for name, value in settings.items()})
    deployment = Deployment(routings=(routing,))
    predict, _ = deploy(opened.network, opened.pool, deployment, "support", lambda *_: [])
    expected = predict(episode)
    clf = FewShotClassifier(photos / "vit_mini_pool.safetensors", device="cpu", **settings)
    clf.fit(episode.support, episode.support_labels)
    assert tuple(clf.coefficients_) == expected.coefficients
    with torch.no_grad():
        assert np.array_equal(clf.logits(episode.query), expected.logits(episode.query).numpy())


def test_files_are_prepared_as_evaluation_prepares_folders_of_ones_own(photos):
    sampling = EpisodeSampling(num_ways=2, num_support=1, num_query=1)
    reader = EpisodeReader(photos, "support", "TEST", sampling, 32, n_episodes=1)
    episode = reader[0]
    files = [photos / origin.file for origin in episode.query_origin]
    assert torch.equal(pictures.images(files, 32), episode.query)


# --- forms of images -------------------------------------------------------------------------------------


def as_forms(photos) -> dict:
    files = sorted((photos / "new").iterdir())
    opened = [Image.open(file).copy() for file in files]
    arrays = np.stack([np.asarray(each) for each in opened])
    planes = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    return {
        "folder": photos / "new",
        "paths": [str(file) for file in files],
        "array of paths": np.array([str(file) for file in files]),
        "PIL": opened,
        "uint8 arrays": arrays,
        "list of arrays": list(arrays),
        "channels first": arrays.transpose(0, 3, 1, 2),
        "uint8 tensor": planes,
        "list of tensors": list(planes),
    }


def test_all_forms_of_one_picture_are_one_image(photos):
    forms = as_forms(photos)
    images = {name: pictures.images(pictures.listed(form), 32) for name, form in forms.items()}
    assert all(torch.equal(found, images["folder"]) for found in images.values()), images.keys()


def test_floating_point_pictures_are_resized_like_files(photos):
    """Within rounding to 8 bits, which only files have."""
    forms = as_forms(photos)
    files = pictures.images(pictures.listed(forms["folder"]), 32)
    for form in (forms["uint8 arrays"] / 255, forms["uint8 tensor"].double() / 255):
        assert (pictures.images(pictures.listed(form), 32) - files).abs().max() <= 1.1 / 255


def test_single_images_grey_ones_and_those_of_the_right_size():
    generator = torch.Generator().manual_seed(0)
    ready = torch.rand(2, 3, 32, 32, generator=generator)
    assert torch.equal(pictures.images(pictures.listed(ready), 32), ready)
    assert torch.equal(pictures.images(pictures.listed(ready[0]), 32), ready[:1])
    grey = pictures.images(pictures.listed(ready[:, :1].numpy()), 32)
    assert torch.equal(grey, ready[:, :1].expand(-1, 3, -1, -1))
    plain = pictures.images([Image.new("L", (50, 40), 128)], 32)
    assert plain.shape == (1, 3, 32, 32)


BAD_IMAGES = {
    "table": (np.zeros((5, 4)), r"got ndarray of shape \(5, 4\)"),
    "grey without channels": (np.zeros((5, 8, 8), np.uint8), r"\(N, H, W, 1\)"),
    "out of range": (np.full((1, 8, 8, 3), 16.0), r"image 0: values from 16 to 16, expected \[0, 1\]"),
    "NaN": (torch.full((1, 3, 8, 8), torch.nan), "NaN or infinity"),
    "integers": (np.zeros((1, 8, 8, 3), np.int64), "values are int64, expected uint8"),
    "four channels": (np.zeros((1, 8, 8, 4)), "4 channels"),
    "none": ([], "no images"),
    "a number": (3, "got a int"),
    "bytes": (b"GIF89a", "got a bytes"),
    "no file": (["nowhere.png"], "nowhere.png: no such file"),
    "alpha alone": ([Image.new("RGBA", (9, 9))], "transparent"),
    "elongated": ([Image.new("RGB", (900, 2))], "900 x 2 pixels"),
    "mixed": ([np.zeros((8, 8, 3), np.uint8), object()], "image 1: .* got a object"),
}


@pytest.mark.parametrize(("form", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_what_is_no_image_is_one_line(fitted, form, message):
    fails(message, lambda: fitted.predict(form))


def test_labels_come_back_as_they_were_given(photos, tmp_path):
    files, names = pictures.in_class_folders(photos / "support")
    kinds = {
        "text": (names, ["cat", "dog"]),
        "integers": (np.where(names == "cat", 7, 3), [3, 7]),
        "truths": ([name == "cat" for name in names], [False, True]),
        "objects": (names.astype(object), ["cat", "dog"]),
    }
    for kind, (labels, classes) in kinds.items():
        clf = FewShotClassifier("vit_mini_pool").fit(files, labels)
        assert clf.classes_.tolist() == classes, kind
        assert clf.score(files, labels) == 1, kind
        clf.save(tmp_path / "task.safetensors")
        assert FewShotClassifier.load(tmp_path / "task.safetensors").classes_.tolist() == classes, kind


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 8, "one class, 'a'; a classifier needs 2 classes"),
        (["a"] * 7, r"8 images with labels of shape \(7,\)"),
        ([0.5] * 4 + [1.5] * 4, "Unknown label type: continuous"),
        ([None] * 8, "Unknown label type: NoneType"),
        (None, "requires y"),
    ],
)
def test_labels_that_name_no_classes_are_one_line(photos, labels, message):
    files, _ = pictures.in_class_folders(photos / "support")
    fails(message, lambda: FewShotClassifier("vit_mini_pool").fit(files, labels))


def test_too_many_images_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_SUPPORT", 3)
    fails("4 images, a support set has 3", lambda: FewShotClassifier().fit(["no.png"] * 4, [0, 0, 1, 1]))


# --- verdicts --------------------------------------------------------------------------------------------


def test_robustness_says_until_which_epsilon_an_answer_stands(fitted, photos):
    """Each radius has to be stood with all smaller ones, and none is stood without limit."""
    x = photos / "new"
    until = fitted.robustness(x, epsilon=(0.01, 255), attack=QUICK)
    assert until.tolist() == [0.01, 0.01]
    assert fitted.robustness(x, epsilon=(255,), attack=QUICK).tolist() == [0, 0]


def test_robustness_against_given_labels_knows_wrong_answers(fitted, photos):
    files = sorted((photos / "new").iterdir())
    found = fitted.robustness(files, (0.01,), y=["cat", "cat"], attack=QUICK)
    assert found[0] == 0.01 and np.isnan(found[1])
    fails("label 'bear' was not fitted", lambda: fitted.robustness(files, (1,), y=["cat", "bear"]))


def test_verdicts_do_not_depend_on_how_images_are_parted(fitted, photos, monkeypatch):
    files = [each for _ in range(3) for each in sorted((photos / "support" / "cat").iterdir())]
    whole = fitted.robustness(files, (0.5, 1, 2, 4), attack=QUICK)
    monkeypatch.setattr("amt.few_shot.classifier.CHUNK", 5)
    assert np.array_equal(fitted.robustness(files, (0.5, 1, 2, 4), attack=QUICK), whole)


@pytest.mark.parametrize(
    ("epsilon", "attack", "message"),
    [
        ((4, 2), "pgd", "increasing"),
        ((), "pgd", "positive"),
        ((2,), "nonsense", "nonsense"),
        ((0,), "pgd", "positive"),
    ],
)
def test_impossible_attacks_are_one_line(fitted, photos, epsilon, attack, message):
    fails(message, lambda: fitted.robustness(photos / "new", epsilon, attack=attack))


# --- files -----------------------------------------------------------------------------------------------


def test_a_saved_task_answers_without_pool_and_support(fitted, photos, tmp_path):
    file = tmp_path / "task.safetensors"
    fitted.save(file)
    loaded = FewShotClassifier.load(file)
    assert np.array_equal(loaded.logits(photos / "new"), fitted.logits(photos / "new"))
    assert np.array_equal(loaded.coefficients_, fitted.coefficients_)
    about = loaded.task_.about
    assert about["pool"] == "vit_mini_pool.safetensors" and "command" in about and "commit" in about
    assert loaded.task_.shots == (4, 4) and loaded.task_.epsilons == (8, 0.1)
    fails("task of FewShotClassifier.save, expected a pool", lambda: checkpoint.load(file))
    fails("holds no task", lambda: FewShotClassifier.load(photos / "vit_mini_pool.safetensors"))


def damaged(text: str, **changes) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["one"]}, "1 classes"),
        ({"classes": ["a", "b", "c"], "shots": [1, 1, 1]}, "prototypes has shape"),
        ({"classes": [["a"], "b"]}, "field 'classes"),
        ({"arch": "dino_small_patch16"}, "lacks tensor"),
        ({"image_size": 10**9}, "image_size 1000000000, expected 1 to 4096"),
        ({"format": 2}, "format 2, expected 1"),
        ({"coefficients": "much"}, "field 'coefficients': expected a list"),
        ({"coefficients": [10**30, 0]}, "field 'coefficients.0': expected less than"),
        ({"epsilons": [8]}, "2 coefficients, 1 epsilons"),
        ({"classes": ["cat", "cat"]}, "two classes have one name"),
    ],
)
def test_damaged_tasks_are_one_line(fitted, tmp_path, changes, message):
    file = tmp_path / "task.safetensors"
    fitted.save(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    save_file(tensors, file, {"amt": damaged(header["amt"], **changes)})
    assert task_file.is_task(file)
    fails(message, lambda: FewShotClassifier.load(file))


def test_exports_give_the_same_logits(fitted, photos, tmp_path):
    file, *_ = fitted.export(tmp_path / "net.onnx")
    images = pictures.images(pictures.listed(photos / "new"), 32)
    _, logits = onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, fitted.logits(images), atol=1e-4)
    assert fitted.export(tmp_path / "net.safetensors")[0].exists()
    fails("ends in .onnx, .pt2, .safetensors", lambda: fitted.export(tmp_path / "net.txt"))
    fails("ends in .safetensors", lambda: fitted.save(tmp_path / "net.pt"))


# --- names of pools --------------------------------------------------------------------------------------


def test_a_pool_is_found_by_name_file_and_folder(box, tmp_path, monkeypatch):
    file = box / "vit_mini_pool.safetensors"
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.safetensors").write_bytes(file.read_bytes())
    assert find_pool("vit_mini_pool").samefile(file) and find_pool(file) == file
    assert find_pool(run) == run / "last.safetensors"
    (run / "best.safetensors").write_bytes(file.read_bytes())
    assert find_pool(str(run)) == run / "best.safetensors"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_mini_poll", "no pool 'vit_mini_poll': .* did you mean 'vit_mini_pool'"),
        ("no/such/pool.safetensors", "no such file or folder"),
        (".", "holds no file .safetensors"),
    ],
)
def test_pools_that_are_not_there_are_one_line(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(message, lambda: FewShotClassifier.from_pretrained(name))


def test_a_pool_that_was_replaced_is_read_anew(photos, tmp_path):
    saved, file = checkpoint.load(photos / "vit_mini_pool.safetensors"), tmp_path / "pool.safetensors"
    for pool in (saved.pool, saved.pool[0]):
        checkpoint.save(file, checkpoint.Checkpoint(pool, {"arch": "vit_mini"}))
        clf = FewShotClassifier(file).fit(photos / "support")
        assert len(clf.coefficients_) == len(pool)
    assert clf.coefficients_.tolist() == [1.0]


def test_a_pool_of_complete_networks_and_one_whose_levels_nobody_knows(photos, tmp_path):
    network = amt.load_network("vit_mini")
    full = pretrained_pool(network.weights, toy_pool().levels)
    plain = checkpoint.Checkpoint(full, {"arch": "vit_mini", "levels_from": "nowhere"})
    checkpoint.save(tmp_path / "pool.safetensors", plain)
    clf = FewShotClassifier(tmp_path / "pool.safetensors").fit(photos / "support")
    assert clf.score(photos / "support") == 1 and clf.task_.epsilons == ()
    assert adapters(clf.task_) == "0.50 of number 0, 0.50 of number 1"


def test_a_pool_that_does_not_name_its_network_asks_for_it(photos, tmp_path):
    saved = checkpoint.load(photos / "vit_mini_pool.safetensors")
    checkpoint.save(tmp_path / "pool.safetensors", checkpoint.Checkpoint(saved.pool, {}))
    load = partial(FewShotClassifier.from_pretrained, tmp_path / "pool.safetensors")
    fails("does not say its architecture", load)
    assert load(arch="vit_mini").arch == "vit_mini"
    fails("dino_small_patch16", lambda: load(arch="dino_small_patch16"))


# --- scikit-learn ----------------------------------------------------------------------------------------


class TableClassifier(FewShotClassifier):
    """The classifier of tables: scikit-learn's checks have no images, so each row is drawn as one."""

    def fit(self, X, y):
        return super().fit(drawn(X), y)

    def logits(self, X):
        return super().logits(drawn(X))

    def score(self, X, y=None, sample_weight=None):
        return super().score(drawn(X), y, sample_weight)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.classifier_tags.poor_score = True  # on stripes, which no network was trained for
        tags.no_validation = True  # of columns: images of any size are resized, there is no number to keep to
        return tags


SIDE = 16  # px, for speed


def drawn(table) -> np.ndarray:
    """A picture (S, S, 3) for each row, whose columns are broad stripes as bright as their values."""
    with contextlib.suppress(TypeError, ValueError):
        values = np.asarray(table, dtype=float)
        if values.ndim == 2 and values.size:
            columns = np.arange(SIDE) * values.shape[1] // SIDE
            bright = 0.5 + np.arctan(values)[:, None, columns, None] / np.pi
            return np.broadcast_to(bright, (len(values), SIDE, SIDE, 3)).copy()
    return table


# Besides these, `no_validation` leaves out what scikit-learn checks of tables: a fixed number of columns,
# complex numbers, no columns, infinity.
_TABLES = "pictures, not tables: no sparse matrices, and no message that tells how to reshape a table"
LEFT_OUT = {
    "check_estimator_sparse_tag": _TABLES,
    "check_estimator_sparse_array": _TABLES,
    "check_estimator_sparse_matrix": _TABLES,
    "check_fit2d_predict1d": _TABLES,
    "check_methods_subset_invariance": "asks for 1e-7; products of float32 differ by 1e-6 with the batch",
}


def checks() -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        return [
            pytest.param(check, id=getattr(check, "func", check).__name__ + f"-{k}")
            for k, (_, check) in enumerate(estimator_checks_generator(TableClassifier(image_size=SIDE)))
        ]


@pytest.mark.parametrize("check", checks())
def test_scikit_learn_agrees(check):
    if getattr(check, "func", check).__name__ in LEFT_OUT:
        pytest.skip(LEFT_OUT[check.func.__name__])
    check(TableClassifier(image_size=SIDE))


def test_parameters_are_stored_and_cloned(fitted, photos):
    clf = FewShotClassifier("elsewhere", beta=3.0, seed=5)  # which reads nothing
    assert clone(clf).get_params() == clf.get_params()
    assert clf.set_params(top_k=1).top_k == 1
    assert not hasattr(clone(fitted), "task_")
    with pytest.raises(NotFittedError):
        clone(fitted).predict(photos / "new")


def test_pickles_answer_alike(fitted, photos):
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.logits(photos / "new"), fitted.logits(photos / "new"))


def test_cross_validation_and_pipelines_take_paths_and_pictures(tmp_path):
    files, names = pictures.in_class_folders(write_photos(tmp_path / "own", ("cat", "dog", "fox"), 4))
    clf = FewShotClassifier("vit_mini_pool")
    assert cross_val_score(clf, files, names, cv=2).tolist() == [1, 1]
    turned = FunctionTransformer(lambda paths: [Image.open(path).rotate(180) for path in paths])
    assert make_pipeline(turned, clf).fit(files, names).score(files, names) == 1


def test_nothing_is_written_to_the_pool_in_use(photos):
    """Fitting and attacking leave the file, and what a second classifier makes of it, as they were."""
    before = (photos / "vit_mini_pool.safetensors").read_bytes()
    clf = FewShotClassifier("vit_mini_pool").fit(photos / "support")
    first = clf.logits(photos / "new")
    clf.robustness([photo("cat", 3)], (4,), attack=QUICK)
    assert np.array_equal(clf.logits(photos / "new"), first)
    assert (photos / "vit_mini_pool.safetensors").read_bytes() == before
