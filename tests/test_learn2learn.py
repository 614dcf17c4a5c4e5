"""learn2learn both ways: our episodes in its loops, its tasks in ours.

What needs the real library skips without it; `make learn2learn` installs it.
"""

import importlib
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, patterned_episode, random_backbone
from hypothesis import given
from hypothesis import strategies as st
from test_imports import imports
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from amt.attacks.kinds import Attack
from amt.attacks.levels import Perturbation
from amt.evaluation.evaluate import evaluate
from amt.files.learn2learn import EpisodeTaskset, TasksetEpisodes, task_of
from amt.models.architectures import Arch
from amt.models.pool import principal_pool
from amt.tasks.classifier import pretrained_predictor
from amt.training.settings import TuneSettings
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, episode_loader

SIDE = 8
ARCH = Arch(patch_size=4, dim=12, depth=2, heads=2, pretrained_size=SIDE, image_size=SIDE, mlp_ratio=2.0)


@pytest.fixture(scope="module")
def l2l():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about gym, which it imports
        return pytest.importorskip("learn2learn", reason="learn2learn is not installed: make learn2learn")


def counted_episode(shots: list[int], queries: list[int], index: int = 0) -> Episode:
    """So many support and query images of each class, in mixed order; image i has the value i / 255 all over,
    support first."""
    labels = [torch.arange(len(part)).repeat_interleave(torch.tensor(part)) for part in (shots, queries)]
    generator = torch.Generator().manual_seed(index)
    support, query = (part[torch.randperm(len(part), generator=generator)] for part in labels)
    images = (torch.arange(len(support) + len(query)) / 255).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Episode(images[: len(support)], support, images[len(support) :], query, "counted", index)


# --- our episodes as its tasks: the order ----------------------------------------------------------------


def even_positions(data, labels, n_support):
    """The split of learn2learn's MAML examples: adaptation data and labels, evaluation data and labels."""
    adaptation = np.zeros(len(data), dtype=bool)
    adaptation[np.arange(n_support) * 2] = True
    adaptation, evaluation = torch.from_numpy(adaptation), torch.from_numpy(~adaptation)
    return data[adaptation], labels[adaptation], data[evaluation], labels[evaluation]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_even_positions_of_an_interleaved_task_are_the_support(shots, data):
    """The split of the MAML examples gives back the episode, in its own order, whatever its shots."""
    queries = data.draw(st.lists(st.integers(0, 6), min_size=len(shots), max_size=len(shots)))
    episode = counted_episode(shots, queries)
    if sum(queries) < sum(shots) - 1:
        fails(f"needs {sum(shots) - 1} query images", lambda: task_of(episode, "interleaved"))
        return
    task = task_of(episode, "interleaved")
    parts = even_positions(*task, n_support=sum(shots))
    wanted = (episode.support, episode.support_labels, episode.query, episode.query_labels)
    assert all(torch.equal(part, want) for part, want in zip(parts, wanted, strict=True))


@given(n_way=st.integers(1, 5), shots=st.integers(1, 4), queries=st.integers(0, 4))
def test_a_grouped_task_has_each_class_in_one_piece_support_first(n_way, shots, queries):
    episode = counted_episode([shots] * n_way, [queries] * n_way)
    data, labels = task_of(episode, "grouped")
    assert labels.tolist() == torch.arange(n_way).repeat_interleave(shots + queries).tolist()
    number = (data[:, 0, 0, 0] * 255).round().long().view(n_way, shots + queries)
    assert (number[:, :shots] < len(episode.support)).all()
    assert (number[:, shots:] >= len(episode.support)).all()
    assert torch.equal(torch.cat([episode.support_labels, episode.query_labels])[number.flatten()], labels)


def test_partition_task_finds_support_and_query_of_a_grouped_task(l2l):
    """learn2learn's own function, on an episode whose images come in mixed order."""
    episode = counted_episode([2] * 4, [3] * 4)
    parts = l2l.data.partition_task(*task_of(episode, "grouped"), shots=2)
    whole = (episode.support, episode.support_labels), (episode.query, episode.query_labels)
    for (data, labels), (images, wanted) in zip(parts, whole, strict=True):
        order = wanted.sort(stable=True).indices
        assert torch.equal(data, images[order]) and torch.equal(labels, wanted[order])


@pytest.mark.parametrize(("shots", "queries"), [([1, 2], [3, 3]), ([2, 2], [3, 1]), ([2, 2], [3, 0])])
def test_a_grouped_task_needs_equal_classes(shots, queries):
    """Otherwise whoever splits it would take some query for support, and nobody would notice."""
    fails("equally many", lambda: task_of(counted_episode(shots, queries), "grouped"))


# --- our episodes as its tasks: the task source ----------------------------------------------------------


def test_sampling_goes_through_all_tasks_before_one_comes_again():
    episodes = [counted_episode([1, 1], [1, 2], index) for index in range(3)]
    tasks = EpisodeTaskset(episodes)
    wanted = [task_of(episode, "interleaved") for episode in episodes]
    assert len(tasks) == 3 and len(list(tasks)) == 3
    for (data, labels), (images, truth) in zip([tasks.sample() for _ in range(7)], wanted * 3, strict=False):
        assert torch.equal(data, images) and torch.equal(labels, truth)
    assert all(torch.equal(data, want[0]) for (data, _), want in zip(tasks, wanted, strict=True))


def test_sampling_leaves_random_generators_alone():
    tasks = EpisodeTaskset([counted_episode([1, 1], [1, 1])])
    before = global_states()
    tasks.sample()
    assert global_states() == before


def test_bad_orders_and_empty_sources_are_refused():
    fails("did you mean 'grouped'", lambda: EpisodeTaskset([counted_episode([1], [1])], order="groupd"))
    fails("known: grouped, interleaved", lambda: task_of(counted_episode([1], [1]), "stacked"))
    fails("at least one episode", lambda: EpisodeTaskset([]))


def test_a_task_source_needs_no_learn2learn():
    """Who only hands episodes over, or only imports amt, must not need it."""
    assert not [name for name in imports("amt.files.learn2learn") if name.split(".")[0] == "learn2learn"]


def test_maml_adapts_to_our_episodes(l2l):
    """learn2learn's MAML over its own clone, adapt and second-order gradient, in a loop like its examples':
    the outer steps make one inner step worth more."""
    n_way, shots = 3, 2
    tasks = EpisodeTaskset([patterned_episode(seed, n_way, shots, queries=3) for seed in range(8)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maml = l2l.algorithms.MAML(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, n_way)), lr=0.01)
    optimiser = torch.optim.Adam(maml.parameters(), 0.01)

    def evaluation_error(task) -> torch.Tensor:
        learner = maml.clone()
        data, labels, unseen, truth = even_positions(*task, n_support=n_way * shots)
        learner.adapt(F.cross_entropy(learner(data), labels))
        return F.cross_entropy(learner(unseen), truth)

    before = [evaluation_error(task).item() for task in tasks]
    for _ in range(3 * len(tasks)):
        optimiser.zero_grad()
        evaluation_error(tasks.sample()).backward()
        optimiser.step()
    after = [evaluation_error(task).item() for task in tasks]
    assert np.mean(after) < 0.9 * np.mean(before)


def test_prototypes_of_learn2learn_recognise_our_episodes(l2l):
    """Through a DataLoader that adds a batch dimension, as its prototypical example has it; support is found
    by position within the sorted labels."""
    n_way, shots, queries = 3, 2, 3
    tasks = EpisodeTaskset([patterned_episode(seed, n_way, shots, queries) for seed in range(4)], "grouped")
    seen = 0
    for data, labels in DataLoader(tasks, shuffle=True, generator=torch.Generator()):
        position = labels.sort().indices[0]
        data, labels = data[0, position], labels[0, position]
        is_support = (torch.arange(n_way * (shots + queries)) % (shots + queries)) < shots
        classifier = l2l.nn.PrototypicalClassifier()
        classifier.fit_(data[is_support].flatten(1), labels[is_support])
        right = classifier(data[~is_support].flatten(1)).argmax(1) == labels[~is_support]
        assert right.all()
        seen += len(right)
    assert seen == 4 * n_way * queries


def test_a_reader_is_a_task_source(l2l, tiny_source):
    """Episodes read from record files, split again by learn2learn."""
    sampling = EpisodeSampling(num_ways=3, num_support=2, num_query=3)
    reader = EpisodeReader(tiny_source().parent, "tiny", "TRAIN", sampling, image_size=SIDE, n_episodes=2)
    for episode, task in zip(reader, EpisodeTaskset(reader, "grouped"), strict=True):
        (support, labels), (query, _) = l2l.data.partition_task(*task, shots=2)
        assert torch.equal(support, episode.support) and torch.equal(labels, episode.support_labels)
        assert torch.equal(query, episode.query)


# --- its tasks as our episodes ---------------------------------------------------------------------------

N_CLASSES, PER_CLASS = 6, 9


def numbered_images(channels: int = 3) -> torch.Tensor:
    """Image i has the value i / 255 all over."""
    numbers = torch.arange(N_CLASSES * PER_CLASS) / 255
    return numbers.view(-1, 1, 1, 1).expand(-1, channels, SIDE, SIDE)


def number_of(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


# Label 10 k + 3 for class k, and neighbours of different classes.
LABELS = 10 * (torch.arange(N_CLASSES * PER_CLASS) % N_CLASSES) + 3


def make_taskset(l2l, images=None, ways=4, k=5, num_tasks=-1, remap=True, transform=None, replacement=False):
    images = numbered_images() if images is None else images
    dataset = l2l.data.MetaDataset(
        Augmented(images, LABELS, transform) if transform else TensorDataset(images, LABELS)
    )
    transforms = l2l.data.transforms
    chain = [
        transforms.NWays(dataset, ways),
        transforms.KShots(dataset, k, replacement=replacement),
        transforms.LoadData(dataset),
        *([transforms.RemapLabels(dataset)] if remap else []),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TaskDataset is the older name of Taskset
        return l2l.data.TaskDataset(dataset, chain, num_tasks=num_tasks)


class Augmented(Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.labels[index])


def noise_of_all_kinds(image: torch.Tensor) -> torch.Tensor:
    """Draws from all three global generators, and through torchvision."""
    image = v2.RandomCrop(SIDE, padding=2)(image)
    return (image + random.random() / 9 + np.random.rand() / 9 + torch.rand(()) / 9).clamp(0, 1)


def global_states() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def same(one: Episode, other: Episode) -> bool:
    tensors = ("support", "support_labels", "query", "query_labels")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)


@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("shots", [1, 3])
def test_a_task_becomes_an_episode(l2l, shots, remap):
    """So many support images per class, all others query; different images; each label one class, 0..N-1,
    also where the task has the labels of the data set."""
    episodes = TasksetEpisodes(make_taskset(l2l, remap=remap), shots, n_episodes=5, source="numbered")
    for index, episode in enumerate(episodes):
        assert (episode.source, episode.index, episode.class_ids) == ("numbered", index, ())
        assert episode.support.dtype == episode.query.dtype == torch.float32
        assert episode.support_labels.dtype == episode.query_labels.dtype == torch.int64
        assert torch.bincount(episode.support_labels).tolist() == [shots] * 4
        assert torch.bincount(episode.query_labels).tolist() == [5 - shots] * 4
        support, query = number_of(episode.support), number_of(episode.query)
        assert len({*support, *query}) == 20
        labels = [*episode.support_labels.tolist(), *episode.query_labels.tolist()]
        pairs = {(number % N_CLASSES, label) for number, label in zip(support + query, labels, strict=True)}
        assert len(pairs) == 4 and {label for _, label in pairs} == {0, 1, 2, 3}
    assert index == 4


def test_labels_of_remap_labels_stay(l2l):
    """The numbers that learn2learn gave the classes of a task, as its collate function sees them."""
    taskset, seen = make_taskset(l2l), {}
    collate = taskset.task_collate

    def watch(rows):
        seen.update({number_of(image[None])[0]: label for image, label in rows})
        return collate(rows)

    taskset.task_collate = watch
    episode = TasksetEpisodes(taskset, 2, n_episodes=1)[0]
    for images, labels in ((episode.support, episode.support_labels), (episode.query, episode.query_labels)):
        assert [seen[number] for number in number_of(images)] == labels.tolist()


@pytest.mark.parametrize("num_tasks", [-1, 6])
def test_an_episode_depends_on_seed_and_number_only(l2l, num_tasks):
    """Not on the order of reading, on what was drawn before, by whom, or on the state of any generator."""

    def fresh(seed: int = 0) -> TasksetEpisodes:
        taskset = make_taskset(l2l, num_tasks=num_tasks, transform=noise_of_all_kinds)
        return TasksetEpisodes(taskset, 1, n_episodes=6, seed=seed)

    straight = list(fresh())
    used = fresh()
    for _ in range(3):
        used.taskset.sample()  # a finite taskset keeps these tasks
    random.seed(5), np.random.seed(5)
    backwards = [used[index] for index in reversed(range(6))]
    assert all(same(one, other) for one, other in zip(straight, reversed(backwards), strict=True))
    firsts = [*straight, *fresh(seed=1)]
    assert len({tuple(number_of(episode.support)) for episode in firsts}) == len(firsts)


def test_reading_leaves_global_generators_as_they_were(l2l):
    """Also where reading fails."""
    sound = make_taskset(l2l, transform=noise_of_all_kinds)
    broken = make_taskset(l2l, transform=lambda image: noise_of_all_kinds(image) / 0)
    failing = make_taskset(l2l, transform=noise_of_all_kinds)
    failing.task_transforms.append(lambda description: 1 / 0)
    before = global_states()
    TasksetEpisodes(sound, 1, n_episodes=1)[0]
    assert global_states() == before
    for taskset, error in ((broken, InputError), (failing, ZeroDivisionError)):
        with pytest.raises(error):
            TasksetEpisodes(taskset, 1, n_episodes=1)[0]
        assert global_states() == before


def test_workers_read_the_same_episodes(l2l):
    episodes = TasksetEpisodes(make_taskset(l2l, transform=noise_of_all_kinds), 1, n_episodes=3)
    loaded = episode_loader(episodes, num_workers=1)
    assert all(same(one, other) for one, other in zip(episodes, loaded, strict=True))


def test_a_finite_taskset_says_how_many_episodes(l2l):
    assert len(TasksetEpisodes(make_taskset(l2l, num_tasks=7), 1)) == 7
    assert len(TasksetEpisodes(make_taskset(l2l, num_tasks=7), 1, n_episodes=3)) == 3
    fails("n_episodes is needed", lambda: TasksetEpisodes(make_taskset(l2l), 1))
    episodes = TasksetEpisodes(make_taskset(l2l, num_tasks=7), 1)
    for beyond in (7, -1):
        with pytest.raises(IndexError):
            episodes[beyond]


@pytest.mark.parametrize("form", ["bytes", "grey", "hundreds"])
def test_other_pixels_become_rgb_in_the_unit_range(l2l, form):
    """8-bit images, one channel, and whatever `to_unit` undoes."""
    images, options = numbered_images(), {}
    if form == "bytes":
        images = (255 * images).round().to(torch.uint8)
    elif form == "grey":
        images = images[:, :1].double()
    else:
        images, options = 100 * images, {"to_unit": lambda images: images / 100}
    wanted = TasksetEpisodes(make_taskset(l2l), 1, n_episodes=1)[0]
    found = TasksetEpisodes(make_taskset(l2l, images), 1, n_episodes=1, **options)[0]
    assert found.support.shape == wanted.support.shape and found.support.dtype == torch.float32
    torch.testing.assert_close(found.support, wanted.support)
    torch.testing.assert_close(found.query, wanted.query)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": 1}, "1 images of a class, expected more than the 1"),
        ({"replacement": True, "k": 9}, "is both support and query"),
        ({"images": 255 * numbered_images()}, r"in \[\d+, \d+\], expected floats in \[0, 1\]; to_unit"),
        ({"images": numbered_images() - 1}, "expected floats in"),
        ({"images": numbered_images() + float("nan")}, r"in \[nan, nan\]"),
        ({"images": numbered_images().to(torch.int64)}, "torch.int64 images"),
        ({"images": numbered_images()[:, :2]}, r"images are \(20, 2, 8, 8\)"),
        ({"images": numbered_images().flatten(1)}, r"images are \(20, 192\)"),
    ],
)
def test_tasks_that_are_no_episodes_are_refused(l2l, change, match):
    """Each in one line that names the source and the task."""
    episodes = TasksetEpisodes(make_taskset(l2l, **change), 1, n_episodes=1, source="odd")
    assert str(fails(match, lambda: episodes[0])).startswith("odd: task 0: ")


def test_labels_must_be_whole_numbers_one_for_each_image(l2l):
    for collate in (
        lambda rows: [torch.stack([image for image, _ in rows]), [label for _, label in rows]],
        lambda rows: [torch.stack([image for image, _ in rows]), torch.rand(len(rows))],
        lambda rows: [torch.stack([image for image, _ in rows]), torch.zeros(3, dtype=torch.int64)],
    ):
        taskset = make_taskset(l2l)
        taskset.task_collate = collate
        fails("integer as label", lambda: TasksetEpisodes(taskset, 1, n_episodes=1)[0])  # noqa: B023


def test_bad_settings_are_refused(l2l):
    taskset = make_taskset(l2l)
    fails("taskset is a list", lambda: TasksetEpisodes([], 1))
    fails("shots is 0", lambda: TasksetEpisodes(taskset, 0, n_episodes=1))
    fails("seed is -1", lambda: TasksetEpisodes(taskset, 1, n_episodes=1, seed=-1))
    fails("n_episodes is -2", lambda: TasksetEpisodes(taskset, 1, n_episodes=-2))


def test_there_and_back_again(l2l):
    """A task that became an episode and a task again is split by learn2learn as the episode was."""
    episodes = TasksetEpisodes(make_taskset(l2l), shots=2, n_episodes=2)
    for episode, task in zip(episodes, EpisodeTaskset(episodes, "grouped"), strict=True):
        (support, labels), _ = l2l.data.partition_task(*task, shots=2)
        order = episode.support_labels.sort(stable=True).indices
        assert torch.equal(support, episode.support[order])
        assert torch.equal(labels, episode.support_labels[order])


# --- its tasks in our loops ------------------------------------------------------------------------------


def patterned_tasks(l2l) -> TasksetEpisodes:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(N_CLASSES * PER_CLASS) % N_CLASSES
    patterns = torch.rand(N_CLASSES, 3, SIDE, SIDE, generator=generator)[classes]
    noise = 0.2 * torch.randn(patterns.shape, generator=generator)
    return TasksetEpisodes(make_taskset(l2l, (patterns + noise).clamp(0, 1), ways=3), 1, n_episodes=3)


def test_meta_tuning_runs_on_tasks(l2l):
    """One adversarial step per task, and again the same from the same seeds."""
    network, episodes = random_backbone(ARCH), patterned_tasks(l2l)

    def tuned():
        pool = principal_pool(network.weights, 2, [Perturbation(8, 2, steps=2)])
        tuner = Tuner(network, pool, TuneSettings(epochs=1, episodes_per_epoch=3, lr=1e-3, warmup_epochs=0))
        records = []
        for task in episodes:
            records += tuner.step(task)
        result = tuner.pool
        assert tuner.finished and all(record.n_way == 3 and record.total > 0 for record in records)
        return pool, result

    pool, result = tuned()
    assert all((result.factors[name] != factor).any() for name, factor in pool.factors.items())
    again = tuned()[1]
    assert all(torch.equal(again.factors[name], factor) for name, factor in result.factors.items())


def test_evaluation_runs_on_tasks(l2l):
    """Clean and attacked; a random network tells noisy patterns apart better than chance."""
    predict = pretrained_predictor(random_backbone(ARCH))
    rows = list(evaluate(predict, patterned_tasks(l2l), [Attack("pgd", (2,), steps=2)]))
    assert [(row["source"], row["index"], row["ways"], row["support"], row["queries"]) for row in rows] == [
        ("learn2learn", index, 3, 3, 12) for index in range(3)
    ]
    assert all(row["pgd2@2"] <= row["clean"] for row in rows)
    assert np.mean([row["clean"] for row in rows]) > 0.5


# --- the recipe ------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    monkeypatch.setattr(sys, "argv", ["install_learn2learn"])
    return importlib.import_module("tools.install_learn2learn")


def test_the_recipe_does_nothing_where_learn2learn_works(recipe, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "complaint", lambda: None)
    monkeypatch.setattr(recipe, "build_and_install", lambda _: pytest.fail("it built"))
    assert recipe.main() == 0
    assert "already" in capsys.readouterr().out


def test_a_recipe_that_fails_says_so_in_one_line(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "complaint", lambda: "ImportError: no such thing")
    monkeypatch.setattr(recipe, "build_and_install", lambda _: None)
    fails("cannot be imported: ImportError: no such thing", recipe.main)
    fails("a C compiler", lambda: recipe.run([sys.executable, "-c", "raise SystemExit(1)"]))
