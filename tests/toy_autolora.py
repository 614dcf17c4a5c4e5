"""Small networks, batches and tuners of AutoLoRa."""

import dataclasses
import functools

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from amt.models.branch import Student, natural_weights
from amt.models.network import Network
from amt.models.resnet import ResNet
from amt.training.accuracy import accuracy
from amt.training.autolora import FineTuner, new_student
from amt.training.autolora_settings import Adversary, Settings
from amt.training.objectives import Outcome, two_threads

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


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


KINDS = pytest.mark.parametrize("kind", MAKERS)


def autolora(net: Network, student: Student, images, attacked, labels, weighing, rank: int) -> Outcome:
    """AutoLoRa's loss on a batch."""
    natural = natural_weights(net, student, rank)
    return two_threads(net, natural, student.weights, images, attacked, labels, weighing)


def vanilla(net: Network, student: Student, images, attacked, labels, weighing) -> Outcome:
    """The loss of TRADES on a batch."""
    natural = student.weights | student.norms
    return two_threads(net, natural, student.weights, images, attacked, labels, weighing)
