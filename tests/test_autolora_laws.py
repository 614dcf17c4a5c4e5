"""The laws of AutoLoRa's fine-tuning, on networks that are as small as can be: what the branch, the attack,
BatchNorm and a step may touch, and that a run is a function of its seed, however often it is stopped."""

import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from amt.cli.fine_tune import contents, fine_tune, restore
from amt.data.labelled import ArrayImages
from amt.data.loading import batches, transforms
from amt.files.signals import Interrupted
from amt.models.network import Network, logits
from amt.models.pool import Student, factor_shapes, natural_weights, new_factors
from amt.models.resnet import ResNet
from amt.models.weights import stream
from amt.training.autolora import FineTuner, Settings, accuracy, new_student, validate
from amt.training.keeper import Keeper
from amt.training.objectives import Adversary, attack, autolora, twins, vanilla
from amt.training.optimiser import NonFiniteLoss
from amt.training.schedule import LossWeights, loss_weights

SIDE, CLASSES, RANK = 8, 3, 2
SHORT = Adversary(steps=2)
MAKERS = {
    "resnet": functools.partial(ResNet, BasicBlock, (1, 1), (4, 6), CLASSES, True),
    "vit": functools.partial(
        VisionTransformer,
        img_size=SIDE,
        patch_size=4,
        embed_dim=12,
        depth=1,
        num_heads=2,
        mlp_ratio=2,
        num_classes=CLASSES,
    ),
}
METHODS = {
    "autolora": {"method": "autolora"},
    "autolora, two sets": {"method": "autolora", "dual_norms": True},
    "vanilla": {"method": "vanilla", "auto_weights": False},
    "vanilla, two sets": {"method": "vanilla", "dual_norms": True},
    "twins": {"method": "twins", "auto_weights": False},
    "twins, weighed": {"method": "twins", "auto_weights": True},
    "SLF": {"mode": "SLF"},
    "ALF": {"mode": "ALF", "adversary": dataclasses.replace(SHORT, start="uniform")},
}


pytestmark = pytest.mark.usefixtures("one_thread")


NETWORKS = {kind: Network(kind, make(), SIDE, make=make) for kind, make in MAKERS.items()}


def network(kind: str = "resnet") -> Network:
    return NETWORKS[kind]


def start_of(net: Network, seed: int = 1) -> dict[str, Tensor]:
    """Random weights whose BatchNorm is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    weights = net.start(seed)
    for name in net.norms:
        if weights[name].is_floating_point():
            weights[name] = weights[name] + 0.5 * torch.rand(weights[name].shape, generator=generator)
    return weights


def data(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images, each with a lighter channel that tells its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = 0.7 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    images[torch.arange(n), labels] += 0.3
    return images, labels


def chosen(**changes) -> Settings:
    """Settings of a short run."""
    return Settings(**{"epochs": 2, "adversary": SHORT, "rank": RANK, "seed": 1, "lr": 0.05, **changes})


def tuner_of(how: Settings, kind: str = "resnet", n_batches: int = 3) -> FineTuner:
    net = network(kind)
    weights = start_of(net)
    other = start_of(net, seed=5)
    student = new_student(net, weights, how, {name: other[name] for name in net.norms})
    images, labels = data(12, seed=9)

    def training_accuracy(weights: dict[str, Tensor]) -> float:
        return accuracy(net, weights, [(images, labels, labels)])

    return FineTuner(net, student, how, n_batches, training_accuracy)


def moved(student: Student, seed: int = 3) -> Student:
    """With a branch that has left zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: factor + 0.1 * torch.randn(factor.shape, generator=generator)
        for name, factor in student.factors.items()
    }
    return dataclasses.replace(student, factors=factors)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


KINDS = pytest.mark.parametrize("kind", MAKERS)


# --- the branch ------------------------------------------------------------------------------------------


@st.composite
def layers(draw) -> tuple[nn.Module, int]:
    """A convolution of any groups, stride and kernel, or a linear layer, in double precision; and a rank."""
    rank = draw(st.integers(1, 4))
    if draw(st.booleans()):
        return nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6))).double(), rank
    groups = draw(st.integers(1, 3))
    inside, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 3))
    return nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups).double(), rank


@given(layers(), st.integers(0, 2**16))
@settings(max_examples=60)
def test_the_update_is_the_methods_definition(layer_and_rank, seed):
    """dW[o, i, a, b] is the entry of B A / r that has the same place in memory, and the layer with W + dW
    gives what the layer and, beside it, the same layer with dW alone give together."""
    layer, rank = layer_and_rank
    module = nn.Sequential(nn.Identity(), layer, nn.Linear(1, CLASSES).double())
    net = Network("one layer", module, SIDE)
    generator = torch.Generator().manual_seed(seed)
    A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in factor_shapes(net, "1.weight", rank)
    )
    W = layer.weight.detach()
    kernel = W.shape[2] if W.ndim == 4 else 1
    groups = getattr(layer, "groups", 1)
    assert A.shape == (rank * kernel, W.shape[1] * groups * kernel)
    assert B.shape == (W.shape[0] // groups * kernel, rank * kernel)
    update = torch.empty_like(W)
    for place, index in enumerate(np.ndindex(*W.shape)):
        row, column = divmod(place, A.shape[1])
        update[index] = sum(B[row, m] * A[m, column] for m in range(rank * kernel)) / rank

    factors = {"1.weight.lora_A": A, "1.weight.lora_B": B}
    weights = natural_weights(net, Student(dict(module.state_dict()), factors), rank)
    torch.testing.assert_close(weights["1.weight"], W + update)
    shape = (2, W.shape[1]) if W.ndim == 2 else (2, W.shape[1] * groups, 7, 7)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    beside = torch.func.functional_call(layer, {"weight": update, "bias": torch.zeros_like(layer.bias)}, x)
    whole = torch.func.functional_call(layer, {"weight": weights["1.weight"]}, x)
    torch.testing.assert_close(whole, layer(x).detach() + beside)


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_with_B_zero_the_two_threads_are_one(kind, training):
    net = network(kind)
    student = new_student(net, start_of(net), chosen(), {})
    assert student.factors
    images, labels = data()
    natural = logits(net, natural_weights(net, student, RANK), images, training)
    deployed = logits(net, student.weights, images, training)
    assert torch.equal(natural, deployed)
    outcome = autolora(net, student, images, images, labels, LossWeights(0.3, 6.0), RANK)
    assert outcome.loss.robust == 0


@KINDS
def test_a_branch_changes_the_natural_thread_and_not_the_deployed_network(kind):
    net = network(kind)
    fresh = new_student(net, start_of(net), chosen(), {})
    student = moved(fresh)
    assert student.weights.keys() == net.names
    images, labels = data()
    natural = natural_weights(net, student, RANK)
    assert changed(fresh.weights, natural) == set(net.adapted())
    assert not torch.allclose(logits(net, natural, images), logits(net, fresh.weights, images))
    for look in (
        lambda which: logits(net, which.weights, images),
        lambda which: attack(net, which.weights, images, labels, SHORT, stream(0)),
        lambda which: torch.tensor(validate(net, which.weights, [(images, labels, labels)], SHORT, 0)),
    ):
        assert torch.equal(look(student), look(fresh))


TERMS = {"CE(nat)": (1.0, 0.0), "CE(adv)": (0.0, 0.0), "KL": (1.0, 1.0)}


@KINDS
@pytest.mark.parametrize("term", TERMS)
def test_each_term_of_the_loss_reaches_what_it_is_to_reach(kind, term):
    """W from the attacked images only, A and B from the clean ones only, the classifier from both."""
    net = network(kind)
    student = moved(new_student(net, start_of(net), chosen(), {}))
    trained = {
        name: tensor.requires_grad_()
        for name, tensor in student.tensors.items()
        if tensor.is_floating_point() and not is_statistic(name)
    }
    images, labels = data()
    outcome = autolora(net, student, images, data(8, seed=1)[0], labels, LossWeights(*TERMS[term]), RANK)
    loss = outcome.loss.robust if term == "KL" else outcome.loss.total
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    reached = {
        name for name, gradient in zip(trained, found, strict=True) if gradient is not None and gradient.any()
    }
    head = {name for name in trained if name.startswith(f"weights/{net.classifier}.")}
    factors = {name for name in trained if name.startswith("factors/")}
    rest = {name for name in trained if name.startswith("weights/")} - head
    assert reached == {"CE(nat)": factors | head, "CE(adv)": rest | head, "KL": rest | head | factors}[term]


# --- attacks ---------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("divergence", [False, True])
def test_an_attack_touches_nothing_and_runs_in_eval_mode(kind, divergence):
    """No tensor changes a bit, none gets a gradient, none has a graph; every pass is in eval mode."""
    how = chosen()
    tuner = tuner_of(how, kind)
    net, student = tuner.network, tuner.student
    seen = []

    def look(module: nn.Module, _inputs) -> None:
        own = module.state_dict(keep_vars=True).values()
        seen.append(module.training or any(tensor.requires_grad for tensor in own))

    before, images = copies(student.tensors), data()[0]
    hooks = [part.register_forward_pre_hook(look) for part in net.module.modules()]
    try:
        found = attack(
            net, student.weights, images, data()[1], SHORT, stream(0), student.weights if divergence else None
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert seen and not any(seen)
    assert not changed(before, student.tensors)
    assert all(tensor.grad is None for tensor in student.tensors.values())
    assert not found.requires_grad


@given(
    st.sampled_from(["gaussian", "uniform", "uniform_valid", "none"]),
    st.sampled_from(["linf", "l2"]),
    st.floats(0, 300),
    st.floats(0, 100),
    st.integers(1, 3),
)
@settings(max_examples=40)
def test_attacked_images_are_in_the_ball_and_in_the_pixel_range(start, norm, epsilon, step, steps):
    net = network()
    images, labels = data(3)
    images[0], images[1] = images[0].round(), 1 - images[1].round()  # some at the limits
    adversary = Adversary(epsilon, step, steps, start, norm)
    found = attack(net, start_of(net), images, labels, adversary, stream(2))
    move = (found - images).flatten(1)
    length = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
    assert (length <= epsilon / 255 + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("start", ["uniform", "uniform_valid", "none"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_ball_of_radius_zero_is_the_clean_image(start, steps):
    net = network()
    images, labels = data()
    adversary = Adversary(0, 2, steps, start)
    assert torch.equal(attack(net, start_of(net), images, labels, adversary, stream(0)), images)
    found = validate(net, start_of(net), [(images, labels, labels)], adversary, 0)
    assert found.clean == found.robust


def test_an_attack_of_training_raises_the_loss():
    net, weights = network(), start_of(network())
    images, labels = data()
    found = attack(net, weights, images, labels, Adversary(steps=5), stream(0))
    losses = [F.cross_entropy(logits(net, weights, each), labels) for each in (images, found)]
    assert losses[1] > losses[0]


def test_robust_accuracy_of_an_image_does_not_depend_on_its_batch():
    """Only on the seed: here on its start alone, for there are no steps."""
    net, weights = network(), start_of(network())
    images, _ = data(12)
    labels, indices = logits(net, weights, images).argmax(1), torch.arange(12)
    pieces = list(zip(images.split(5), labels.split(5), indices.split(5), strict=True))
    adversary = Adversary(epsilon=200, steps=0)
    found = []
    for seed in range(6):
        found.append(validate(net, weights, [(images, labels, indices)], adversary, seed))
        assert validate(net, weights, pieces[::-1], adversary, seed) == found[-1]
    assert len(set(found)) > 1


def test_every_batch_of_every_epoch_is_attacked_from_a_start_of_its_own():
    images, labels = data()
    still = Adversary(steps=0, start="uniform")

    def starts(seed: int) -> list[Tensor]:
        tuner = tuner_of(chosen(seed=seed, adversary=still), n_batches=2)
        found = []
        for _ in range(2):
            for _ in range(2):
                found.append(tuner._attacked(images, labels))
                tuner.step(images, labels)
            tuner.end_epoch(50, 40)
        return found

    one, other = starts(1), starts(2)
    assert all(torch.equal(a, b) for a, b in zip(one, starts(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*one, *other], 2))


# --- BatchNorm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SLF", "ALF"])
@KINDS
def test_linear_modes_train_the_classifier_alone(mode, kind):
    tuner = tuner_of(chosen(**METHODS[mode], weight_decay=0.1), kind)
    before = copies(tuner.student.tensors)
    head = {"weights/" + name for name in network(kind).parameters if network(kind).is_head(name)}
    assert tuner.trained.keys() == head and not tuner.student.factors and not tuner.student.norms
    for seed in range(2):
        tuner.step(*data(5, seed))
    assert changed(before, tuner.student.tensors) == head


@pytest.mark.parametrize("objective", [autolora, vanilla])
def test_of_two_sets_clean_images_have_one_and_attacked_images_the_other(objective):
    """Statistics after a pass are a function of the images that the set is for."""
    how = chosen(method=objective.__name__, dual_norms=True)
    (one, labels), (other, _) = data(seed=1), data(seed=2)
    rank = (RANK,) if objective is autolora else ()

    def after(clean: Tensor, attacked: Tensor) -> Student:
        student = tuner_of(how).student
        objective(network(), student, clean, attacked, labels, LossWeights(0.5, 3.0), *rank)
        return student

    first = after(one, one)
    statistics = {name for name in network().norms if is_statistic(name)}
    moving = {name for name in statistics if not name.endswith("num_batches_tracked")}
    other_clean, other_attacked = after(other, one), after(one, other)
    assert changed(first.weights, other_clean.weights) == set()
    assert changed(first.norms, other_attacked.norms) == set()
    assert changed(first.norms, other_clean.norms) == moving
    assert changed(first.weights, other_attacked.weights) == moving
    started = tuner_of(how).student
    assert changed(started.norms, first.norms) == changed(started.weights, first.weights) == statistics


def test_with_one_set_statistics_are_updated_by_the_clean_and_then_by_the_attacked_images():
    """Momentum 0.1 and unbiased variance, of the first BatchNorm, whose input the branch does not reach."""
    how = chosen()
    student = moved(tuner_of(how).student)
    mean, variance = (student.weights[f"bn1.running_{what}"].clone() for what in ("mean", "var"))
    count = int(student.weights["bn1.num_batches_tracked"])
    (clean, labels), (attacked, _) = data(seed=1), data(seed=2)
    autolora(network(), student, clean, attacked, labels, LossWeights(0.5, 3.0), RANK)
    for images in (clean, attacked):
        pixels = torch.tensor(network().mean).view(3, 1, 1), torch.tensor(network().std).view(3, 1, 1)
        out = F.conv2d((images - pixels[0]) / pixels[1], student.weights["conv1.weight"], padding=1)
        out = out.transpose(0, 1).flatten(1).detach()
        mean, variance = 0.9 * mean + 0.1 * out.mean(1), 0.9 * variance + 0.1 * out.var(1)
    torch.testing.assert_close(student.weights["bn1.running_mean"], mean)
    torch.testing.assert_close(student.weights["bn1.running_var"], variance)
    assert int(student.weights["bn1.num_batches_tracked"]) == count + 2


def test_autolora_leaves_the_parameters_of_the_second_set_alone():
    tuner = tuner_of(chosen(dual_norms=True, weight_decay=0.1))
    before = copies(tuner.student.tensors)
    for seed in range(3):
        tuner.step(*data(5, seed))
    moves = changed(before, tuner.student.tensors)
    assert {name for name in moves if name.startswith("norms/")} == {
        f"norms/{name}" for name in network().norms if is_statistic(name)
    }
    assert {f"weights/{name}" for name in network().names} <= moves
    assert not any(name.startswith("norms/") for name in tuner.trained)


def test_vanilla_trains_the_parameters_of_both_sets():
    tuner = tuner_of(chosen(**METHODS["vanilla, two sets"]))
    before = copies(tuner.student.tensors)
    for seed in range(2):
        tuner.step(*data(5, seed))
    assert changed(before, tuner.student.tensors) == tuner.student.tensors.keys()


def test_the_frozen_half_of_twins_keeps_the_statistics_it_started_with():
    """To the bit, over batches of even and odd size and of a single image; its parameters are trained, and
    the adaptive half's statistics are updated by every batch."""
    tuner = tuner_of(chosen(method="twins"))
    weights = start_of(network())
    for size in (6, 5, 1, 2):
        before = copies(tuner.student.weights)
        record = tuner.step(*data(size))
        assert math.isfinite(record.total)
        moves = changed(before, tuner.student.weights)
        assert {name for name in network().norms if is_statistic(name)} <= moves
    frozen = tuner.student.norms
    assert frozen.keys() == set(network().norms)
    for name in network().norms:
        assert torch.equal(frozen[name], weights[name]) == is_statistic(name), name


def test_twins_is_trades_on_each_half():
    """Computed anew from the definition, in double precision."""
    net = Network("double", MAKERS["resnet"]().double(), SIDE, make=MAKERS["resnet"])
    weights = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in start_of(net).items()
    }
    student = new_student(net, weights, chosen(method="twins"), {})
    (clean, labels), (attacked, _) = data(7, seed=1), data(7, seed=2)
    clean, attacked = clean.double(), attacked.double()
    outcome = twins(net, student, clean, attacked, labels, LossWeights(1.0, 6.0), 0.3)
    losses = []
    for part, training in ((slice(0, 3), False), (slice(3, 7), True)):
        z, z_adv = (logits(net, copies(weights), x[part], training=training) for x in (clean, attacked))
        log_p, log_q = z.log_softmax(1), z_adv.log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        losses.append(F.cross_entropy(z, labels[part]) + 6 * divergence / 7)
    torch.testing.assert_close(outcome.loss.total, 0.3 * losses[0] + losses[1])
    assert outcome.clean.shape == outcome.attacked.shape == (7, CLASSES)


# --- steps -----------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n_batches", [1, 2, 3])
def test_every_method_takes_batches_of_any_size_in_epochs_of_any_length(kind, name, n_batches):
    """A transformer has no BatchNorm, so that no method has a second set of it; the published code fails
    with fewer than four batches or epochs."""
    tuner = tuner_of(chosen(**METHODS[name]), kind, n_batches)
    assert (not tuner.student.norms) == (kind == "vit" or name in ("SLF", "ALF", "autolora", "vanilla"))

    def training(_epoch: int, first: int):
        return [(*data(size), torch.arange(size)) for size in (4, 3, 1)[-n_batches:][first:]]

    records = run(tuner, training=training)
    assert len(records) == 2 * n_batches and tuner.finished and len(tuner.history) == 2
    assert all(math.isfinite(record["training/total"]) for record in records)
    assert all(tensor.isfinite().all() for tensor in tuner.student.tensors.values())
    assert tuner.best.tensors.keys() == tuner.student.tensors.keys()


def passes_of(step) -> list[bool]:
    """Whether each pass through the network that `step()` takes is in training mode."""
    seen = []
    hook = network().module.register_forward_hook(lambda module, *_: seen.append(module.training))
    try:
        step()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_takes_one_pass_per_attack_step_and_two_more(steps):
    """Only the very first batch has one more, for want of an accuracy to weigh its loss by."""
    tuner = tuner_of(chosen(adversary=Adversary(steps=steps)))
    expected = [False] * steps + [True, True]
    assert passes_of(lambda: tuner.step(*data())) == [False, *expected]
    for _ in range(2):
        assert passes_of(lambda: tuner.step(*data())) == expected


@pytest.mark.parametrize("n_batches", [1, 2, 3, 4, 7, 8, 10])
def test_running_weights_are_those_of_the_batches_as_they_come(n_batches):
    """By hand: from the accuracy of the natural thread on the latest quarter of an epoch, at the batches that
    the published code looks at; at first, of the very first batch before it is trained on."""
    tuner = tuner_of(chosen(), n_batches=n_batches)
    images, labels = data(6)
    with torch.no_grad():
        guesses = logits(tuner.network, tuner.natural(), images).argmax(1)
    expected = float((guesses == labels).double().mean())
    quarter = max(n_batches // 4, 1)
    rights = []
    for epoch in range(2):
        for batch in range(n_batches):
            size = 6 if not rights else 2 + (epoch + batch) % 4
            record = tuner.step(*data(size, seed=0 if not rights else 10 * epoch + batch))
            assert (record.lambda1, record.lambda2) == pytest.approx(loss_weights(expected))
            assert record.lambda1 == pytest.approx(1 - record.lambda2 / 6)
            rights.append((round(record.clean_accuracy * size), size))
            if batch % quarter == 0:
                latest = rights[-quarter:]
                expected = sum(right for right, _ in latest) / sum(count for _, count in latest)
        tuner.end_epoch(50, 40)


@pytest.mark.parametrize("n_batches", [1, 2, 3, 5, 8, 40])
def test_whole_passes_are_as_many_as_published(n_batches):
    """1 + ceil(n / floor(n / 4)); with fewer than four batches, one after each."""
    tuner = tuner_of(chosen(whole_passes=True), n_batches=n_batches)
    given_out = []

    def look(weights: dict[str, Tensor]) -> float:
        given_out.append(len(given_out) / 100)
        return given_out[-1]

    tuner.training_accuracy = look
    tuner._attacked = lambda images, labels: images  # the attack plays no part in it
    quarter = max(n_batches // 4, 1)
    current = 0.0
    for batch in range(n_batches):
        record = tuner.step(*data(2))
        assert record.lambda1 == 1 - current
        if batch % quarter == 0:
            current = given_out[-1]
    assert len(given_out) == 1 + math.ceil(n_batches / quarter)


@pytest.mark.parametrize("whole", [False, True])
def test_at_high_resolution_the_weights_are_set_once_an_epoch(whole):
    tuner = tuner_of(chosen(high_resolution=True, whole_passes=whole), n_batches=3)
    for _ in range(2):
        found = {tuner.step(*data(5, seed))[5:8] for seed in range(3)}
        assert len(found) == 1
        tuner.end_epoch(50, 40)


@KINDS
def test_a_loss_that_is_no_number_changes_no_parameter(kind):
    tuner = tuner_of(chosen(), kind)
    before = copies(tuner.student.tensors)
    images, labels = data()
    with pytest.raises(NonFiniteLoss, match="epoch 1, batch 1, learning rate"):
        tuner.step(images * math.nan, labels)
    assert all(is_statistic(name) for name in changed(before, tuner.student.tensors))


@pytest.mark.parametrize("stop_after", [None, 1])
def test_weights_that_a_step_has_spoilt_never_reach_a_file(stop_after):
    """Its loss was a number: no epoch has ended, nor is the run stopped as if it could go on."""
    tuner = tuner_of(chosen(lr=1e38, weight_decay=1e3), n_batches=1)
    keeper = Quiet(stop_after)
    with pytest.raises(NonFiniteLoss, match="no longer finite at epoch 1, batch 1, learning rate"):
        run(tuner, keeper=keeper, training=lambda _epoch, first: [(*data(), torch.arange(8))][first:])
    (record,) = keeper.records
    assert math.isfinite(record["training/total"]) and not keeper.saved


# --- epochs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [False, True])
def test_the_best_epoch_comes_back_whole_and_the_momentum_stays(dual):
    """Every tensor: parameters, statistics, counters, factors; what the optimiser remembers is not among
    them."""
    tuner = tuner_of(chosen(epochs=50, high_resolution=True, dual_norms=dual), n_batches=1)
    accuracies = [10.0, 30.0, 20.0, 20.0, 20.0]
    for epoch, robust in enumerate(accuracies, 1):
        tuner.step(*data(5, epoch))
        if epoch == 2:
            best = copies(tuner.student.tensors)
        momentum = copies({n: t for n, t in tuner.state()[0].items() if n.startswith("momentum/")})
        note = tuner.end_epoch(robust, robust)
        assert (note["condition"], note["best"]) == ((1, 2) if epoch == 5 else (0, min(epoch, 2)))
        if epoch in (3, 4):
            assert len(changed(best, tuner.student.tensors)) > len(network().parameters)
    assert changed(best, tuner.student.tensors) == set()
    state = tuner.state()[0]
    assert momentum and not changed(momentum, {name: state[name] for name in momentum})
    assert tuner.rate == 0.05 / 2
    tuner.step(*data(5))
    assert changed(best, tuner.best.tensors) == set()  # a copy: training goes on without it


EPOCHS, BATCHES = 3, 3
RUNS = {
    "running": chosen(epochs=EPOCHS, divide=3.0),
    "whole passes": chosen(epochs=EPOCHS, whole_passes=True),
    "published": chosen(epochs=EPOCHS, published=True, whole_passes=True, dual_norms=True),
    "high": chosen(epochs=6, high_resolution=True),  # the best epoch comes back after the fifth
    "dual": chosen(epochs=EPOCHS, dual_norms=True),
    "twins": chosen(epochs=EPOCHS, method="twins", auto_lr=False, milestones=(1, 2)),
    "ALF": chosen(epochs=EPOCHS, **METHODS["ALF"]),
}


def training(epoch: int, first: int):
    """Three batches of an epoch's own, the last one short."""
    return [(*data(size, seed=10 * epoch + b), torch.arange(size)) for b, size in enumerate((4, 4, 1))][
        first:
    ]


class Quiet:
    """A keeper that remembers what the loop tells it, and stops it once so many steps are done."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after
        self.records: list[dict[str, float]] = []
        self.saved: list[str] = []

    @property
    def interrupted(self) -> bool:
        return len(self.records) == self.stop_after

    def watch(self, items):
        for item in items:
            if self.interrupted:
                return
            yield item

    def whole(self, items):
        if self.interrupted:
            raise Interrupted
        return items

    def log_step(self, _step: int, scalars: dict[str, float], _brief: str) -> None:
        self.records.append({name: value for name, value in scalars.items() if name != "training/seconds"})

    def is_due(self) -> bool:
        return False

    def save_best(self, *_content) -> None:
        self.saved.append("best")

    def save_last(self, *_content) -> None:
        self.saved.append("last")

    def begin(self, *_) -> None: ...

    def log(self, *_) -> None: ...

    def say(self, *_) -> None: ...


def run(
    tuner: FineTuner, stop_after: int | None = None, keeper: Quiet | None = None, training=training
) -> list[dict[str, float]]:
    """Go on with a run, perhaps until so many steps are done; what was shown of them, without their times."""
    keeper = keeper or Quiet(stop_after)
    images, labels = data(6, seed=99)
    held_out = [(images, labels, torch.arange(6))]
    fine_tune(keeper, tuner, training, held_out, SHORT, {})
    return keeper.records


def sent(tuner: FineTuner) -> tuple[dict[str, Tensor], dict]:
    """A state as it comes back from a file."""
    tensors, numbers = tuner.state()
    return copies(tensors), json.loads(json.dumps(numbers))


def assert_same_state(one: FineTuner, other: FineTuner) -> None:
    (tensors, numbers), (others, other_numbers) = sent(one), sent(other)
    assert numbers == other_numbers
    assert changed(tensors, others) == set()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(name):
    whole = tuner_of(RUNS[name], n_batches=BATCHES)
    records = run(whole)
    assert len(records) == RUNS[name].epochs * BATCHES and whole.finished
    assert name != "high" or whole.history[4]["condition"]
    for stop in range(1, len(records) + 1):
        first = tuner_of(RUNS[name], n_batches=BATCHES)
        begun = run(first, stop)
        second = tuner_of(RUNS[name], n_batches=BATCHES)
        second.restore(*sent(first))
        assert [*begun, *run(second)] == records, stop
        assert_same_state(second, whole)
        assert changed(second.best.tensors, whole.best.tensors) == set()


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
@settings(max_examples=8)
def test_a_run_may_be_stopped_any_number_of_times(stops):
    how = dataclasses.replace(RUNS["running"], adversary=Adversary(steps=1))
    whole = tuner_of(how, n_batches=BATCHES)
    records = run(whole)
    tuner, found = tuner_of(how, n_batches=BATCHES), []
    for stop in (*stops, None):
        found += run(tuner, stop)
        later = tuner_of(how, n_batches=BATCHES)
        later.restore(*sent(tuner))
        tuner = later
    assert found == records
    assert_same_state(tuner, whole)


def test_the_files_of_a_run_hold_all_that_it_is_continued_from(tmp_path):
    how = RUNS["running"]
    protocol = json.loads(json.dumps(dataclasses.asdict(how)))
    whole = tuner_of(how, n_batches=BATCHES)
    run(whole)
    for stop in (2, 2, 3, None):
        tuner = tuner_of(how, n_batches=BATCHES)
        with Keeper(tmp_path, "a fine-tuning", protocol) as kept:
            if kept.last.exists():
                restore(tuner, kept.last, protocol)
            run(tuner, stop)
            kept.begin("AFF", "batch", EPOCHS * BATCHES, tuner.steps)
            kept.save_last(*contents({"format": 1, "protocol": protocol}, tuner))
    assert_same_state(tuner, whole)


def test_the_number_of_workers_and_the_moment_do_not_matter():
    """Real batches, shuffled and augmented; torch's global generator plays no part."""
    rng = np.random.default_rng(0)
    part = ArrayImages(rng.integers(0, 256, (11, SIDE, SIDE, 3), dtype=np.uint8), np.arange(11) % 3, "noise")
    augmented, plain = transforms(SIDE, False)

    def ended(workers: int, seed: int) -> dict[str, Tensor]:
        torch.rand(workers + 1)
        how = chosen(seed=seed)
        tuner = tuner_of(how, n_batches=3)

        def training(epoch: int, first: int):
            return batches(
                part, augmented, 4, seed=seed, epoch=epoch, shuffle=True, workers=workers, start=first
            )

        held_out = batches(part, plain, 5, seed=0, workers=workers)
        fine_tune(Quiet(), tuner, training, held_out, SHORT, {})
        return sent(tuner)[0]

    alone = ended(0, seed=1)
    assert changed(alone, ended(2, seed=1)) == set()
    assert "weights/conv1.weight" in changed(alone, ended(0, seed=2))


def test_a_branch_starts_as_a_function_of_the_seed():
    net = network()
    one, same, other = (new_factors(net, net.adapted(), RANK, stream(seed)) for seed in (1, 1, 2))
    assert changed(one, same) == set()
    assert changed(one, other) == {name for name in one if name.endswith("lora_A")}
    assert not any(one[name].any() for name in one if name.endswith("lora_B"))


def test_trades_moves_away_from_the_prediction_that_its_loss_is_about():
    """With two BatchNorm sets clean images have their own, in the attack as in the loss."""
    tuner = tuner_of(chosen(method="vanilla", dual_norms=True))
    student, (images, labels) = tuner.student, data()
    moved = []
    for shift in (0, 0.5):
        norms = {n: norm.detach() + shift * n.endswith(".bias") for n, norm in student.norms.items()}
        other = FineTuner(tuner.network, dataclasses.replace(student, norms=norms), tuner.settings, 1)
        moved.append(other._attacked(images, labels))
    assert not torch.equal(*moved)
