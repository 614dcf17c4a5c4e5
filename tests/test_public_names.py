"""What `import amt` gives: every public docstring has an example, and every example runs as it is."""

import doctest
import inspect
import shutil

import pytest
import torch
import toy_photos

import amt
from amt.few_shot.classifier import FewShotClassifier
from amt.files.pretrained import load_network
from amt.tasks.classifier import pretrained_predictor
from meta_dataset_readers.episode import Episode

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def names(box, tmp_path, monkeypatch) -> dict:
    """The names that examples may use, in a folder of their own with the photos in photos/."""
    shutil.copytree(box, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    network = load_network("vit_mini")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1])
    episode = Episode(images, labels, images, labels, source="photos", class_names=("cat", "dog"))
    classifier = pretrained_predictor(network)(episode)
    return {
        "amt": amt,
        "network": network,
        "pool": toy_photos.toy_pool(),
        "images": images,
        "labels": labels,
        "episode": episode,
        "logits": classifier.logits,
        "fit": classifier.refit,
    }


def failures(found: list[doctest.DocTest]) -> list[str]:
    runner, told = doctest.DocTestRunner(verbose=False), []
    for example in found:
        runner.run(example, out=told.append)
    return told


def documented() -> list[tuple[str, object]]:
    """The public names, and the methods of the classifier."""
    public = [(name, getattr(amt, name)) for name in amt.__all__]
    methods = [
        (f"FewShotClassifier.{name}", method)
        for name, method in inspect.getmembers(FewShotClassifier)
        if name in vars(FewShotClassifier) and not name.startswith(("_", "set_"))  # which scikit-learn makes
    ]
    return public + methods


def test_every_public_docstring_has_an_example():
    assert [name for name, found in documented() if ">>> " not in (inspect.getdoc(found) or "")] == []


@pytest.mark.parametrize("name", amt.__all__)
def test_examples_run_as_they_are(name, names):
    found = getattr(amt, name)
    module = inspect.getmodule(found)
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = finder.find(found, name, module, extraglobs=names)
    assert any(each.examples for each in tests)
    assert failures(tests) == []


def test_the_example_of_the_package_runs(names):
    found = doctest.DocTestFinder(recurse=False).find(amt, "amt", extraglobs=names)
    assert failures(found) == [] and found[0].examples
