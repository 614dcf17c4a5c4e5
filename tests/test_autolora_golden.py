"""Agreement with numbers recorded from the published AutoLoRa code, defects included: those that are not ours
are switched on by `published=True`, or stand in the tests."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from autolora_golden import INDEX, arrays, below, golden
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from toy_autolora import autolora, vanilla

from amt.attacks.perturb import Ball, ascend
from amt.models.branch import Student, factor_shapes, natural_weights, new_factors
from amt.models.network import Network, logits
from amt.models.pool import low_rank
from amt.models.resnet import ResNet
from amt.training.accuracy import accuracy
from amt.training.autolora import FineTuner
from amt.training.autolora_settings import Adversary, Settings
from amt.training.objectives import attack
from amt.training.schedule import LossWeights

pytestmark = golden

LOW = arrays("lowres.npz")
HIGH = arrays("highres.npz")
ABOUT = INDEX["lowres"] if INDEX else {}
CONFIG = ABOUT.get("config", {})
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def tensors(found: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in found.items()}


def ours(name: str) -> str:
    """Our name of a published tensor."""
    for published, plain in (
        ("downsample.conv.", "downsample.0."),
        ("downsample.bn.", "downsample.1."),
        (".lora_A_nat", ".weight.lora_A"),
        (".lora_B_nat", ".weight.lora_B"),
        (".conv.weight", ".weight"),
        ("fc_downstream", "fc"),
    ):
        name = name.replace(published, plain)
    return name


def student_of(state: dict[str, np.ndarray]) -> Student:
    """The published state as ours; of two BatchNorm sets number 1 is the adversarial one."""
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "factors": {}, "norms": {}}
    for published, tensor in tensors(state).items():
        if published.startswith("fc.") and "fc_downstream.weight" in state:
            continue  # an ImageNet head that nothing uses
        name = ours(published).replace(".bn_list.1", "")
        part = "factors" if ".lora_" in name else "norms" if ".bn_list.0" in name else "weights"
        if name.endswith("num_batches_tracked"):
            tensor = tensor.reshape(()).long()
        parts[part][name.replace(".bn_list.0", "")] = tensor
    return Student(**parts)


def leaves(student: Student) -> dict[str, Tensor]:
    """All of its parameters, which now require a gradient."""
    return {
        name: tensor.requires_grad_()
        for name, tensor in student.tensors.items()
        if tensor.is_floating_point() and ".running_" not in name
    }


def structure(make, **settings) -> Network:
    return Network("tiny", make(), make=make, **settings)


def low() -> Network:
    def make() -> nn.Module:
        return ResNet(BasicBlock, CONFIG["layers"], CONFIG["widths"], CONFIG["K"], small=True)

    return structure(make, image_size=CONFIG["S"])


class Recorded(Adversary):
    """An attack that starts at recorded draws, in order."""

    def __init__(self, noise: Tensor, scale: float, **settings):
        super().__init__(**settings)
        object.__setattr__(self, "_left", [noise, scale])

    def begin(self, images: Tensor, generator) -> Tensor:
        noise, scale = self._left
        self._left[0] = noise[len(images) :]
        return images + scale * noise[: len(images)]


def data() -> tuple[Tensor, Tensor]:
    return torch.tensor(LOW["x"]), torch.tensor(LOW["y"])


def assert_close(found, expected, what="", **tolerance):
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert np.allclose(found, expected, **(EXACT | tolerance)), what


# --- the low-rank branch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("about", ABOUT.get("conv", [None]), ids=str)
def test_a_convolution_with_its_branch(about):
    """Update, output and every gradient, with groups, strides and kernels of several sizes."""
    found = tensors(below(about["prefix"], LOW))
    W, A, B, x = (found[name].requires_grad_() for name in ("W", "A", "B", "x"))
    update = low_rank(A, B, W) / about["rank"]
    assert_close(update, found["delta_W"])
    shape = {"stride": about["stride"], "padding": about["padding"], "groups": about["groups"]}
    out = F.conv2d(x, W + update, **shape)
    assert_close(out, found["out_nat"])
    assert_close(F.conv2d(x, W, **shape), found["out_adv"])
    gradients = torch.autograd.grad((out * found["upstream"]).sum(), (x, W, A, B))
    for name, gradient in zip("xWAB", gradients, strict=True):
        assert_close(gradient, found[f"g_{name}"], name)


@pytest.mark.parametrize("about", ABOUT.get("conv", [None]), ids=str)
def test_the_shapes_of_the_factors(about):
    out, inside, kernel = (about[name] for name in ("out_channels", "in_channels", "kernel"))

    def make() -> nn.Module:
        convolution = nn.Conv2d(inside, out, kernel, groups=about["groups"])
        return nn.Sequential(convolution, nn.Flatten(), nn.Linear(1, 1))

    network = structure(make, image_size=8)
    found = factor_shapes(network, "0.weight", about["rank"])
    assert [list(shape) for shape in found] == [about["shapes"]["A"], about["shapes"]["B"]]


def test_threads_in_eval_mode():
    network, student = low(), student_of(below("state_lora/", LOW))
    assert {*network.adapted()} == {name.rsplit(".lora_", 1)[0] for name in student.factors}
    x, _ = data()
    assert_close(logits(network, student.weights, x), LOW["eval_logits_fe"])
    natural = natural_weights(network, student, CONFIG["r"])
    assert_close(logits(network, natural, x), LOW["eval_logits_nat_branch"])


# --- attacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd10", "pgd20"])
def test_ascent_of_linear_training_and_evaluation(name):
    network, student = low(), student_of(below("state_lora/", LOW))
    x, y = data()
    epsilon = 8 / 255
    start = x + 2 * epsilon * torch.tensor(LOW[f"{name}/uniform"]) - epsilon

    def loss_of(moved: Tensor) -> Tensor:
        return F.cross_entropy(logits(network, student.weights, moved), y, reduction="sum")

    ball = Ball("linf", epsilon, 2 / 255)
    moved = ascend(loss_of, x, start, ball, int(name.removeprefix("pgd")))
    assert_close(moved, LOW[f"{name}/x_adv"])
    assert_close(logits(network, student.weights, moved), LOW[f"{name}/logits"])


# --- the loss --------------------------------------------------------------------------------------------

CASES = ("autolora_generic", "autolora_Bzero", "autolora_fresh", "dualbn_generic")


def case(name: str) -> tuple[Network, Student]:
    dual = name.startswith("dual")
    network = low().with_published_shortcuts() if dual else low()
    student = student_of(below("state_dual/" if dual else "state_lora/", LOW))
    zero = [n for n in student.factors if n.endswith("lora_B")] if name != CASES[0] and not dual else []
    factors = student.factors | {n: torch.zeros_like(student.factors[n]) for n in zero}
    weights = student.weights
    if name == "autolora_fresh":
        weights = weights | {n: torch.zeros_like(weights[n]) for n in ("fc.weight", "fc.bias")}
    return network, dataclasses.replace(student, weights=weights, factors=factors)


def moved_images(network: Network, student: Student, divergence: bool = False) -> Tensor:
    x, y = data()
    recorded = Recorded(torch.tensor(LOW["noise"]), 0.001)
    return attack(network, student.weights, x, y, recorded, None, student.weights if divergence else None)


@pytest.mark.parametrize("name", CASES)
def test_autoloras_attack_loss_and_statistics(name):
    network, student = case(name)
    found, about = below(f"{name}/", LOW), ABOUT[name]
    moved = moved_images(network, student)
    assert_close(moved, found["x_adv"])
    weighing = LossWeights(about["lambda1"], about["lambda2"])
    outcome = autolora(network, student, data()[0], moved, data()[1], weighing, CONFIG["r"])
    assert_close(outcome.clean, found["nat_logits"])
    assert_close(outcome.attacked, found["adv_logits"])
    assert_close(outcome.loss.total, found["total"][0])
    assert_close(outcome.loss.robust, found["kl"][0])
    for published, value in below("bn_after/", found).items():
        room = student.norms if ".bn_list.0" in published else student.weights
        plain = ours(published).replace(".bn_list.0", "").replace(".bn_list.1", "")
        assert_close(room[plain], value.reshape(room[plain].shape), published)


TERMS = {"ce_nat": (1, 0), "kl": (None, 1), "ce_adv": (0, 0), "total": None}


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("generic")])
@pytest.mark.parametrize("term", TERMS)
def test_every_gradient_goes_where_it_is_to_go(name, term):
    """Of each term of the loss alone, for every parameter; the others get none, or zero."""
    network, student = case(name)
    about, trained = ABOUT[name], leaves(student)
    moved = moved_images(network, student)
    x, y = data()

    def gradients(weighing: LossWeights) -> dict[str, Tensor]:
        loss = autolora(network, student, x, moved, y, weighing, CONFIG["r"]).loss.total
        names = [n for n in trained if "running" not in n]
        found = torch.autograd.grad(loss, [trained[n] for n in names], allow_unused=True)
        return {
            n: torch.zeros_like(trained[n]) if g is None else g for n, g in zip(names, found, strict=True)
        }

    if term == "total":
        found = gradients(LossWeights(about["lambda1"], about["lambda2"]))
    elif term == "kl":
        with_it, without = gradients(LossWeights(1, 1)), gradients(LossWeights(1, 0))
        found = {n: with_it[n] - without[n] for n in with_it}
    else:
        found = gradients(LossWeights(*TERMS[term]))
    expected = below(f"{name}/grad_{term}/", LOW)
    assert len(expected) == len(found)
    for published, value in expected.items():
        plain = ours(published)
        part = "factors" if ".lora_" in plain else "norms" if ".bn_list.0" in plain else "weights"
        plain = f"{part}/{plain}".replace(".bn_list.0", "").replace(".bn_list.1", "")
        assert_close(found[plain], value, f"{published}: {term}", atol=1e-7)


def test_vanilla():
    """TRADES on the plain network with the same weights."""
    student = dataclasses.replace(case(CASES[0])[1], factors={})
    network, found = low(), below("vanilla/", LOW)
    trained = leaves(student)
    moved = moved_images(network, student, divergence=True)
    assert_close(moved, found["x_adv"])
    outcome = vanilla(network, student, data()[0], moved, data()[1], LossWeights(1, 6))
    for mine, recorded in (
        (outcome.clean, "nat_logits"),
        (outcome.attacked, "adv_logits"),
        (outcome.loss.natural, "ce_nat"),
        (outcome.loss.robust, "kl"),
        (outcome.loss.total, "total"),
    ):
        assert_close(mine, found[recorded].reshape(mine.shape), recorded)
    outcome.loss.total.backward()
    for published, value in below("grad_total/", found).items():
        assert_close(trained[f"weights/{ours(published)}"].grad, value, published, atol=1e-7)


def test_the_published_fault_of_dual_batchnorm_is_not_ours():
    """Published logits depend on the first image of a batch; ours are the published ones of single images."""
    student, (x, _) = student_of(below("state_dual/", LOW)), data()
    found = below("dualbn_shortcut/", LOW)
    assert_close(logits(low().with_published_shortcuts(), student.weights, x), found["logits_batch"])
    assert_close(logits(low(), student.weights, x), found["logits_one_by_one"])
    natural = natural_weights(low(), student, CONFIG["r"])
    assert all(natural[name].data_ptr() == norm.data_ptr() for name, norm in student.norms.items())


# --- an epoch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SLF", "ALF", "AFF"])
def test_an_epoch_of_training(mode):
    """From the first batch to the last: attack, loss, weights of the loss, SGD and running statistics. The
    published lambdas follow the network without its branch."""
    about = ABOUT["epoch"][mode]
    x, y = torch.tensor(LOW["epoch/x"]), torch.tensor(LOW["epoch/y"])
    size = about["batch"]
    batches = list(zip(x.split(size), y.split(size), y.split(size), strict=True))
    noise = torch.tensor(LOW[f"epoch_{mode}/noise"]) if about["noise"] else None
    epsilon = 8 / 255
    if mode == "ALF":  # the recorded draws are uniform in [0, 1)
        noise = 2 * epsilon * noise - epsilon
    network = low()
    looks: list[float] = []

    def training_accuracy(weights) -> float:
        looks.append(accuracy(network, weights, batches))
        return looks[-1]

    student = student_of(below("state_lora/", LOW))
    settings = Settings(
        mode=mode,
        batch_size=size,
        lr=about["lr"],
        momentum=about["momentum"],
        weight_decay=about["weight_decay"],
        adversary=Adversary() if noise is None else Recorded(noise, 1.0 if mode == "ALF" else 0.001),
        scale=about["scale"],
        rank=CONFIG["r"],
        whole_passes=True,
        published=True,
    )
    tuner = FineTuner(network, student, settings, len(batches), training_accuracy)
    for images, labels, _ in batches:
        tuner.step(images, labels)
    assert looks == pytest.approx(about["accuracy_used_for_lambda"])
    after = student_of(below(f"epoch_{mode}/state_after/", LOW))
    for name, tensor in after.tensors.items():
        assert_close(tuner.student.tensors[name], tensor.numpy(), name, atol=1e-7)


# --- high resolution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["basic", "bottle"])
class TestHighResolution:
    def network(self, kind: str) -> Network:
        about = INDEX["highres"][kind]
        block = BasicBlock if kind == "basic" else Bottleneck
        classes = len(HIGH[f"{kind}/state/fc_downstream.bias"])

        def make() -> nn.Module:
            return ResNet(block, about["layers"], about["widths"], classes, small=False)

        return structure(make, image_size=HIGH["x"].shape[-1], resize=224)

    def student(self, kind: str, network: Network) -> Student:
        """Without the branches that the published forward pass does not reach."""
        found = student_of(below(f"{kind}/state/", HIGH))
        reached = network.adapted(published=True)
        factors = {n: f for n, f in found.factors.items() if n.rsplit(".lora_", 1)[0] in reached}
        return dataclasses.replace(found, factors=factors)

    def settings(self, kind: str) -> Settings:
        config = INDEX["highres"]["config"]
        noise = torch.tensor(HIGH["attack_start_noise"]).double()
        x = torch.tensor(HIGH["x"])
        start = (x + noise).clamp(0, 1) - x
        return Settings(
            batch_size=INDEX["highres"][kind]["kl_divisor"],
            lr=0.01,
            weight_decay=1e-4,
            rank=config["r"],
            adversary=Recorded(start, 1.0, epsilon=0.0314 * 255, step_size=0.00784 * 255),
            high_resolution=True,
            published=True,
            whole_passes=True,
        )

    def test_coverage(self, kind):
        network, about = self.network(kind), INDEX["highres"][kind]
        expected = {ours(name).rsplit(".lora_", 1)[0] for name in about["lora_with_gradient"]}
        assert {*network.adapted(published=True)} == expected
        every = expected | {ours(name).rsplit(".lora_", 1)[0] for name in about["lora_without_gradient"]}
        assert {*network.adapted()} == every

    def test_threads_and_attack(self, kind):
        network = self.network(kind)
        student, found = self.student(kind, network), below(f"{kind}/", HIGH)
        x, y = torch.tensor(HIGH["x"]), torch.tensor(HIGH["y"])
        assert_close(logits(network, student.weights, x), found["eval_logits_adv"])
        natural = natural_weights(network, student, INDEX["highres"]["config"]["r"])
        assert_close(logits(network, natural, x), found["eval_logits_nat"])
        inner = dataclasses.replace(network, image_size=224, resize=None)

        def loss_of(moved: Tensor) -> Tensor:
            """The published network clips its input, which stops the gradient of white and black pixels."""
            large = F.interpolate(moved, size=(224, 224), mode="nearest").clamp(0, 1)
            return F.cross_entropy(logits(inner, student.weights, large), y, reduction="sum")

        still = Adversary(epsilon=0.0314 * 255, step_size=0.00784 * 255, start="none")
        for adversary, recorded in (
            (self.settings(kind).adversary, "x_adv_random_start"),
            (still, "x_adv_no_random_start"),
        ):
            moved = ascend(loss_of, x, adversary.begin(x, None), adversary.ball, adversary.steps)
            assert_close(moved, found[recorded], recorded, atol=1e-6)

    def test_a_step(self, kind):
        network, about = self.network(kind), INDEX["highres"][kind]
        student, found = self.student(kind, network), below(f"{kind}/", HIGH)
        recorded = torch.tensor(found["x_adv_random_start"]) - torch.tensor(HIGH["x"])
        settings = dataclasses.replace(self.settings(kind), adversary=Recorded(recorded, 1.0, steps=0))
        tuner = FineTuner(network, student, settings, 1, lambda _weights: about["sa"])
        record = tuner.step(torch.tensor(HIGH["x"]), torch.tensor(HIGH["y"]))
        assert_close(record.total, found["total"][0], rtol=1e-6)
        assert (record.lambda1, record.lambda2) == pytest.approx((about["lambda1"], about["lambda2"]))
        after = student_of(below(f"{kind}/state_after_one_step/", HIGH))
        for name, tensor in tuner.student.tensors.items():
            assert_close(tensor, after.tensors[name].numpy(), name, atol=1e-6)


def test_a_fresh_branch():
    """Shapes, spread and scale of the factors of a convolution that is recorded."""
    about = ABOUT["conv_init"]
    _, columns = about["A_shape"]
    out, inside = about["B_shape"][0] // 3, columns // 3

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(inside, out, 3), nn.Flatten(), nn.Linear(1, 1))

    network = structure(make, image_size=8)
    rank = round(1 / about["scaling"])
    found = new_factors(network, ("0.weight",), rank, torch.Generator().manual_seed(0))
    assert list(found["0.weight.lora_A"].shape) == about["A_shape"]
    assert list(found["0.weight.lora_B"].shape) == about["B_shape"]
    assert (not found["0.weight.lora_B"].any()) == about["B_all_zero"]
    assert float(found["0.weight.lora_A"].std()) == pytest.approx(about["A_std"], abs=0.05)
