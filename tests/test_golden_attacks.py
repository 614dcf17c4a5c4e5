"""The attack and the perturbation of weights, by the recorded numbers."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from amt_golden import (
    ANY_LEVEL,
    ENTRIES,
    INDEX,
    ROOT,
    Model,
    arrays,
    as_published,
    assert_close,
    floor_of,
    golden,
    level_of,
    meaning,
    model_of,
    normalised,
    params,
    pixels,
    statistics,
)
from torch import Tensor
from toy_pools import trainable

from amt.attacks.losses import kl_sum
from amt.attacks.perturb import ascend, input_gradient, perturb_weights
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features
from amt.training.losses import robust_loss

pytestmark = golden


def texts(file: str, name: str) -> list[str]:
    with np.load(ROOT / file, allow_pickle=False) as data:
        return [str(text) for text in data[name]]


def cut(tensor: Tensor, text: str) -> Tensor:
    """`tensor` indexed by the slices that `text` names in brackets; all of it where it names none."""
    found = re.search(r"\[([-\d:, ]*:[-\d:, ]*)\]", text)
    if found is None:
        return tensor
    slices = [
        slice(*(int(number) if number else None for number in part.strip().split(":")))
        for part in found[1].split(",")
    ]
    return tensor[(..., *slices)]


@pytest.fixture(scope="module")
def attacked_models(single) -> dict[str, Model]:
    """By file of recorded attacks: the model attacked."""
    state = arrays("d_attack128.npz")
    state = {name.removeprefix("sd/"): tensor for name, tensor in state.items() if name.startswith("sd/")}
    large = model_of(state, INDEX["meta"]["config"]["d128"]["heads"])
    return {"d_attack.npz": single, "d_attack128.npz": large}


# d: the attack


def attack_runs() -> list[tuple[str, str]]:
    """(file, run) of every recorded attack."""
    return sorted(
        (file, name.removesuffix("/x_adv"))
        for file, name in ENTRIES
        if file.startswith("d_attack") and name.endswith("/x_adv")
    )


class Attack:
    """One recorded attack: images in normalised units, level, and all deltas that were ever stood at."""

    def __init__(self, file: str, run: str, models: dict[str, Model]):
        self.file, self.run, self.model = file, run, models[file]
        everything = arrays(file)
        self.data = {
            name.removeprefix(f"{run}/"): tensor
            for name, tensor in everything.items()
            if name.startswith(f"{run}/")
        }
        self.settings = params(file, f"{run}/x_adv")
        self.level = level_of(self.settings)
        self.u8 = everything["x_u8"]
        self.images = normalised(self.u8)
        self.weights = self.model.pool.merge([1.0])
        labels = everything.get("sy", everything["y"])
        support = features(self.model.raw, self.weights, normalised(everything["sx_u8"]))
        self.centres = prototypes(support, labels)
        self.clean = self.logits(self.images)
        _, std = statistics()
        self.alpha = everything.get("alpha", self.level.step_size / 255 / std)
        self.epsilon = everything.get("eps", self.level.epsilon / 255 / std)

    def logits(self, images: Tensor, network: Network | None = None) -> Tensor:
        query = features(network or self.model.raw, self.weights, images)
        return cosine_logits(query, self.centres, self.model.pool.scale, self.model.pool.bias)

    def divergence(self, images: Tensor) -> Tensor:
        return kl_sum(self.clean, self.logits(images))

    def trajectory(self) -> list[list[Tensor]]:
        """The recorded deltas before step 0, 1, ..., and after the last.

        Where only the signs of the gradient were recorded (2 and -2 where they are unsure) the deltas
        follow from them; where neither was, the start is zero.
        """
        n = len(self.images)
        deltas = [
            self.data.get(f"delta0_L{grid}", torch.zeros(n, 3, count, count))
            for grid, count in enumerate(self.level.grids)
        ]
        if any(f"delta0_L{grid}" not in self.data for grid in range(len(deltas))):
            assert self.settings["delta_init"].startswith("zero"), "an unknown start cannot be followed"
        path = [deltas]
        for step in range(self.level.steps):
            deltas = [self._after(step, grid, delta) for grid, delta in enumerate(deltas)]
            path.append(deltas)
        return path

    def _after(self, step: int, grid: int, delta: Tensor) -> Tensor:
        counted = self.data.get(f"step{step}_k_L{grid}")
        recorded = self.data.get(f"step{step}_delta_L{grid}")
        signs = self.data.get(f"step{step}_sign_L{grid}")
        if signs is not None:
            followed = (delta + self.alpha * signs.sign()).clamp(-self.epsilon, self.epsilon)
            for known in (recorded, None if counted is None else counted * self.alpha):
                if known is not None:
                    assert torch.allclose(followed, known, rtol=0, atol=1e-6), "misread deltas"
        return recorded if recorded is not None else followed

    def started(self, deltas: list[Tensor]) -> Tensor:
        """Images that left the clean point, (N,) bool: only there is the gradient more than rounding."""
        return torch.stack([(delta != 0).flatten(1).any(1) for delta in deltas]).any(0)

    def sure(self, step: int, grid: int) -> Tensor | None:
        """Where the recorded sign can be relied on, or None if that was not recorded."""
        signs = self.data.get(f"step{step}_sign_L{grid}")
        return self.data.get(f"step{step}_reliable_L{grid}") if signs is None else signs.abs() < 2


@pytest.mark.parametrize("file, run", attack_runs())
def test_pyramid_attack_step_by_step(file, run, attacked_models):
    """From the recorded deltas of every step: logits, KL, gradients, and the deltas after the step."""
    attack = Attack(file, run, attacked_models)
    data, level = attack.data, attack.level
    assert_close(attack.clean, data["logits_clean"], 2e-6)
    path = attack.trajectory()
    compared = 0
    for step, (before, after) in enumerate(itertools.pairwise(path)):
        deltas = [delta.clone().requires_grad_() for delta in before]
        logits = attack.logits(level.pyramid.apply(deltas, attack.images))
        divergence = kl_sum(attack.clean, logits)
        assert_close(logits, data[f"step{step}_logits_adv"], 2e-6, f"step {step}")
        kl = data[f"step{step}_kl"]
        assert abs(divergence - kl) < 1e-5 * kl + 5e-6, f"step {step}: {divergence} is not {kl}"
        gradients = torch.autograd.grad(divergence, deltas)
        moved = level.pyramid.step(before, gradients, attack.images)
        started = attack.started(before)
        for grid, gradient in enumerate(gradients):
            sure = attack.sure(step, grid)
            if not started.any() or sure is None or not sure[started].any():
                continue
            about = f"step {step}, grid {grid}"
            recorded = data.get(f"step{step}_grad_L{grid}")
            if recorded is not None:
                floor = floor_of(file, f"{run}/step{step}_grad_L{grid}")
                assert_close(gradient[started], recorded[started], 1e-4, about, floor)
            sure = sure & started[:, None, None, None]
            distance = (moved[grid] - after[grid])[sure].abs().max()
            assert distance < 1e-6, f"{about}: {distance}"
            compared += 1
    assert compared >= len(level.grids)
    found = level.pyramid.apply(path[-1], attack.images)
    assert_close(cut(found, meaning(file, f"{run}/x_adv")), data["x_adv"], 1e-6)


@pytest.mark.parametrize("file, run", attack_runs())
def test_pyramid_attack_to_the_end(file, run, attacked_models):
    """The whole attack from the recorded start; unsure signs may send a few cells another way."""
    attack = Attack(file, run, attacked_models)
    path = attack.trajectory()
    # An image at its clean point moves by rounding noise, if at all: begin where the first has left it, and
    # look at those that have.
    first = next((step for step, deltas in enumerate(path[:-1]) if attack.started(deltas).any()), None)
    if first is None:
        pytest.skip("the recorded attack never left the clean images")
    started = attack.started(path[first])
    rest = dataclasses.replace(attack.level, steps=attack.level.steps - first)
    found = ascend(attack.divergence, attack.images, path[first], rest.pyramid, rest.steps)[started]
    clean, crop = attack.images[started], meaning(file, f"{run}/x_adv")
    expected = attack.data["x_adv"][started]
    assert ((cut(found, crop) - expected).abs() > 1e-4).float().mean() < 0.05
    assert ((cut(clean, crop) - expected).abs() > 1e-4).float().mean() > 0.3


def cells_touching(pixel_mask: Tensor, count: tuple[int, int]) -> Tensor:
    """Cells (N, 3, rows, columns) of a grid that hold at least one marked pixel."""
    cells = torch.zeros(*pixel_mask.shape[:2], *count, requires_grad=True)
    spread = F.interpolate(cells, size=pixel_mask.shape[-2:], mode="nearest")
    (marked,) = torch.autograd.grad((spread * pixel_mask).sum(), cells)
    return marked > 0


def cells_with_ties(images: Tensor, deltas: list[Tensor], scalars: tuple[float, ...]) -> list[Tensor]:
    """For every grid, the cells whose gradient passes a clip of a pixel that sits at a limit of [0, 1]."""
    ties = []
    for delta, scalar in zip(deltas, scalars, strict=True):
        moved = images + scalar * F.interpolate(delta, size=images.shape[-2:], mode="nearest")
        ties.append(torch.minimum(moved.abs(), (moved - 1).abs()) < 1e-5)
        images = ANY_LEVEL.pyramid.clip(moved)
    return [
        cells_touching(torch.stack(ties[grid:]).any(0), delta.shape[-2:]) for grid, delta in enumerate(deltas)
    ]


@pytest.mark.parametrize("file, run", attack_runs())
def test_attack_in_pixels_agrees_but_for_ties(file, run, attacked_models):
    """From the same points, in [0, 1]: the same logits, and the same steps wherever they are decided."""
    attack = Attack(file, run, attacked_models)
    _, std = statistics()
    images = pixels(attack.u8)

    def divergence(moved: Tensor) -> Tensor:
        return kl_sum(attack.clean, attack.logits(moved, attack.model.network))

    path, pyramid = attack.trajectory(), attack.level.in_pixels.pyramid
    compared = 0
    for step, (before, after) in enumerate(itertools.pairwise(path)):
        deltas = [delta * std for delta in before]
        attacked = pyramid.apply(deltas, images)
        logits = attack.logits(attacked, attack.model.network)
        assert_close(logits, attack.data[f"step{step}_logits_adv"], 2e-6, f"step {step}")
        started = attack.started(before)[:, None, None, None]
        slopes = input_gradient(lambda at: divergence(pyramid.apply(at, images)), deltas)
        moved = pyramid.step(deltas, slopes, images)
        ties = cells_with_ties(images, deltas, attack.level.scalars)
        for grid in range(len(deltas)):
            sure = attack.sure(step, grid)
            if sure is None:
                continue
            decided = sure & started & ~ties[grid]
            assert torch.allclose(moved[grid][decided], (after[grid] * std)[decided], rtol=0, atol=1e-6), (
                f"step {step}, grid {grid}"
            )
            compared += int(decided.sum())
    assert compared > 1000
    final = pyramid.apply([delta * std for delta in path[-1]], images)
    final = cut(attack.model.network.normalise(final), meaning(file, f"{run}/x_adv"))
    assert_close(final, attack.data["x_adv"], 1e-6)


def test_gradient_of_the_pyramid_with_and_without_ties():
    """The pyramid alone under a linear functional; a pixel at a limit passes half its gradient per clip."""
    file, data = "d_attack.npz", arrays("d_attack.npz")
    pyramid = level_of(params(*attack_runs()[0][:1], f"{attack_runs()[0][1]}/x_adv")).pyramid
    images = normalised(data["x_u8"])[: len(data["jitter/x"])]
    compared = 0
    for case in sorted({name.split("/")[0] for name in data if re.match(r"jitter\d*/grad", name)}):
        deltas = [data[f"jitter/delta_L{grid}"] for grid in range(len(pyramid.scalars))]
        if case != "jitter":
            deltas = [torch.zeros_like(delta) for delta in deltas]
        deltas = [delta.clone().requires_grad_() for delta in deltas]
        moved = pyramid.apply(deltas, images)
        if f"{case}/x" in data:
            assert_close(moved, data[f"{case}/x"], 1e-6, case)
        gradients = torch.autograd.grad((data["jitter/w"] * moved).sum(), deltas)
        for grid, gradient in enumerate(gradients):
            if f"{case}/grad_L{grid}" in data:
                assert_close(gradient, data[f"{case}/grad_L{grid}"], 1e-6, f"{case}, grid {grid}")
                compared += 1
    assert compared > 0, file
    assert_close(pyramid.lower, data["lo"], 1e-6)
    assert_close(pyramid.upper, data["up"], 1e-6)


# e: the weight perturbation


def test_weight_perturbation(single):
    """Objective, gradient, direction and moved factors, for every recorded radius."""
    file, data, attacked = "e_awp.npz", arrays("e_awp.npz"), arrays("d_attack.npz")
    pool = trainable(single.pool)
    head = pool.scale.detach(), pool.bias
    with torch.no_grad():
        support = features(single.raw, pool.merge([1.0]), normalised(attacked["sx_u8"]))
    centres = prototypes(support, attacked["sy"])

    def objective() -> Tensor:
        weights = pool.merge([1.0])
        clean, moved = (
            cosine_logits(features(single.raw, weights, images), centres, *head)
            for images in (normalised(attacked["x_u8"]), data["x_adv"])
        )
        return robust_loss(clean, moved, attacked["y"], params(file, "objective")["beta"]).total

    assert_close(objective(), data["objective"], 3e-6)
    factors = pool.factors
    gradients = torch.autograd.grad(objective(), list(factors.values()))
    gradients = as_published(dict(zip(factors, gradients, strict=True)))
    plain = as_published(factors)
    whole = perturb_weights(objective(), factors, 1.0)
    direction = as_published({name: whole[name] - factors[name] for name in factors})
    order = texts(file, "lora_names")
    assert set(order) == set(gradients)
    for name in order:
        assert_close(gradients[name], data[f"grad/{name}"], 1e-5, name, floor_of(file, f"grad/{name}"))
    radii = sorted({name.split("/")[0] for name in data if name.startswith("gamma")})
    assert radii
    for radius in radii:
        gamma = float(radius.removeprefix("gamma"))
        moved = as_published(perturb_weights(objective(), factors, gamma))
        assert {f"{radius}/perturbed/{name}" for name in order} <= data.keys()
        for name in order:
            about = f"{radius} {name}"
            move = data[f"{radius}/perturbed/{name}"] - plain[name]
            assert_close(moved[name], data[f"{radius}/perturbed/{name}"], 1e-6, about)
            # The move itself, as far as float32 holds it beside the weight.
            assert_close(moved[name] - plain[name], move, 2e-6 / gamma, about)
            if f"{radius}/diff/{name}" in data:
                assert_close(direction[name], data[f"{radius}/diff/{name}"], 2e-5, about)
            if f"{radius}/restored/{name}" in data:
                restored = moved[name] - gamma * direction[name]
                assert_close(restored, data[f"{radius}/restored/{name}"], 1e-6, about)
        if f"{radius}/norm_w" in data:
            norms = torch.stack([plain[name].norm() for name in order])
            assert_close(norms, data[f"{radius}/norm_w"], 1e-6)
            assert_close(torch.stack([direction[name].norm() for name in order]), norms, 1e-5)
        if f"{radius}/norm_dw" in data:
            sizes = torch.stack([gamma * gradients[name].norm() for name in order])
            assert_close(sizes, data[f"{radius}/norm_dw"], 1e-5)
