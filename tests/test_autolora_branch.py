"""Laws of AutoLoRa's branch, attacks and BatchNorm, on small random networks."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_autolora import (
    CLASSES,
    KINDS,
    MAKERS,
    METHODS,
    RANK,
    SHORT,
    SIDE,
    autolora,
    changed,
    chosen,
    copies,
    data,
    is_statistic,
    network,
    start_of,
    tuner_of,
    vanilla,
)

from amt.models.branch import Student, factor_shapes, natural_weights
from amt.models.network import Network, logits
from amt.models.weights import stream
from amt.training.accuracy import validate
from amt.training.autolora import new_student
from amt.training.autolora_settings import Adversary
from amt.training.objectives import attack, twins
from amt.training.schedule import LossWeights

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(student: Student, seed: int = 3) -> Student:
    """With a branch that has left zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: factor + 0.1 * torch.randn(factor.shape, generator=generator)
        for name, factor in student.factors.items()
    }
    return dataclasses.replace(student, factors=factors)


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
