"""AutoLoRa as one would first write it; what `autolora.py` compares with.

    network         a copy whose adapted layers are LoRA layer classes, with a switch for the thread
    step            requires_grad is switched off and on between the two threads, torch.optim.SGD steps all
    validation      PGD works on every image to the last step (`baseline.pgd`)

The attack asks for the gradient of the images alone, as the published code does: a kindness, since a plain
`loss.backward()` would compute that of every weight as well. Losses are those of `amt`, which are arithmetic
rather than arrangement.
"""

import copy

import torch
import torch.nn.functional as F
from baseline import pgd
from torch import Tensor, nn

from amt.attacks.kinds import Attack
from amt.models.branch import Student
from amt.models.network import Network
from amt.models.weights import stream
from amt.training.accuracy import Accuracy
from amt.training.autolora_settings import Adversary
from amt.training.losses import RobustLoss, robust_loss
from amt.training.schedule import loss_weights


class LoRALayer(nn.Module):
    """A convolution or linear layer with factors A and B beside its weight, which `natural` switches on."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, A: Tensor, B: Tensor, rank: int):
        super().__init__()
        self.layer, self.rank, self.natural = layer, rank, False
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        if not self.natural:
            return self.layer(x)
        weight = self.layer.weight
        weight = weight + (self.lora_B @ self.lora_A).view(weight.shape) / self.rank
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


class Model(nn.Module):
    """Images (N, 3, S, S) in [0, 1] -> logits; weights and factors are those of a student."""

    def __init__(self, network: Network, student: Student, rank: int):
        super().__init__()
        self.net = copy.deepcopy(network.module).requires_grad_(True)
        self.net.load_state_dict(student.weights)
        self.head = network.classifier
        like = next(iter(student.weights.values()))
        self.register_buffer("mean", like.new_tensor(network.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", like.new_tensor(network.std).view(3, 1, 1), persistent=False)
        for name in network.adapted():
            where, _, last = name.removesuffix(".weight").rpartition(".")
            parent = self.net.get_submodule(where)
            factors = (student.factors[f"{name}.lora_{which}"].detach() for which in "AB")
            setattr(parent, last, LoRALayer(getattr(parent, last), *factors, rank))

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.mean) / self.std)

    def take_thread(self, natural: bool) -> None:
        """Switch to the natural thread, in which only factors and classifier are trained, or to the other, in
        which everything but the factors is."""
        for module in self.modules():
            if isinstance(module, LoRALayer):
                module.natural = natural
        for name, parameter in self.net.named_parameters():
            is_factor, is_head = ".lora_" in name, name.startswith(f"{self.head}.")
            parameter.requires_grad_(is_head or is_factor == natural)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names of `Student.tensors`."""
        found = {}
        for name, tensor in self.net.state_dict().items():
            room, plain = "weights", name.replace(".layer.", ".")
            if ".lora_" in name:
                room, plain = "factors", name.replace(".lora_", ".weight.lora_")
            found[f"{room}/{plain}"] = tensor
        return found


class Trainer:
    """A model, its optimiser, and the accuracy that weighs its loss: that of the batch before."""

    def __init__(self, model: Model, lr: float, momentum: float, weight_decay: float, scale: float):
        self.model, self.scale = model, scale
        self.optimiser = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        self.accuracy: float | None = None

    def step(
        self, images: Tensor, labels: Tensor, adversary: Adversary, generator: torch.Generator
    ) -> RobustLoss:
        """One batch, the attack's start from `generator`."""
        model = self.model
        model.eval()
        if self.accuracy is None:
            model.take_thread(natural=True)
            with torch.no_grad():
                self.accuracy = _accuracy(model(images), labels)
        weighing = loss_weights(self.accuracy, self.scale)
        model.take_thread(natural=False)
        attacked = attack(model, images, labels, adversary, generator)
        model.train()
        model.take_thread(natural=True)
        clean = model(images)
        model.take_thread(natural=False)
        moved = model(attacked)
        loss = robust_loss(clean, moved, labels, weighing.robust, weighing.natural)
        model.requires_grad_(True)
        self.optimiser.zero_grad()
        loss.total.backward()
        self.optimiser.step()
        self.accuracy = _accuracy(clean, labels)
        return loss


def attack(
    model: nn.Module, images: Tensor, labels: Tensor, adversary: Adversary, generator: torch.Generator
) -> Tensor:
    """L-infinity ascent of the cross-entropy."""
    epsilon, step_size = adversary.epsilon / 255, adversary.step_size / 255
    points = adversary.begin(images, generator)
    for _ in range(adversary.steps):
        points = points.detach().requires_grad_()
        loss = F.cross_entropy(model(points), labels)
        (gradient,) = torch.autograd.grad(loss, [points])
        points = points.detach() + step_size * gradient.sign()
        points = torch.minimum(torch.maximum(points, images - epsilon), images + epsilon).clamp(0, 1)
    return points.detach()


def validate(model: Model, images: Tensor, labels: Tensor, adversary: Adversary, seed: int) -> Accuracy:
    """Clean and robust accuracy in per cent; an image's start is that of `amt.training.accuracy.validate`."""
    model.eval()
    model.take_thread(natural=False)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    generators = [stream(seed, 2, index) for index in range(len(images))]
    plain = Attack("pgd", (adversary.epsilon,), steps=adversary.steps, step_size=adversary.step_size)
    fooled = pgd(model, images, labels, plain, generators)
    standing = right & ~fooled
    return Accuracy(*(100 * float(each.double().mean()) for each in (right, standing)))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
