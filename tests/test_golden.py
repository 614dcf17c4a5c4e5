"""Agreement with numbers recorded from an independent implementation of the method.

The folder comes from AMT_GOLDEN (default: shared/golden beside the project); every size and parameter is
read from its index or its arrays, so any set of the same kind can be put there. Tolerances are relative
Frobenius distances.
"""

import copy
import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_network import write_official
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.attacks.losses import kl_sum
from amt.attacks.perturb import Pyramid, ascend, input_gradient, perturb_weights
from amt.files.checkpoint import Checkpoint, check_architecture, load, save
from amt.files.pretrained import read_weights
from amt.files.published import pool_from_published, published_shapes
from amt.models.architectures import Arch, build_network
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features, resize_positions
from amt.models.pool import LoRAPool, Merged, split_principal
from amt.models.trim import Trim
from amt.models.weights import Coefficients, trim_singular_values, truncate
from amt.tasks import merge
from amt.tasks.classifier import prototype_classifier
from amt.tasks.merge import average_of, blend, compactness, support_cosines
from amt.tasks.settings import Routing
from amt.training import meta_tune
from amt.training.losses import robust_loss
from amt.training.meta_tune import Tuner, query_outcome
from amt.training.settings import TuneSettings
from meta_dataset_readers.episode import Episode

FOLDER = os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
ROOT = Path(FOLDER) / "amt" if (Path(FOLDER) / "amt").is_dir() else Path(FOLDER)
INDEX = json.loads((ROOT / "index.json").read_text()) if (ROOT / "weights_amt.npz").is_file() else None
ENTRIES = {(entry["file"], entry["name"]): entry for entry in INDEX["arrays"]} if INDEX else {}

pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(INDEX is None, reason=f"no reference numbers at {ROOT}"),
]

ANY_LEVEL = Perturbation(8, 2)  # where the level is not what is compared


# Reading the recorded numbers


def arrays(file: str) -> dict[str, Tensor]:
    with np.load(ROOT / file, allow_pickle=False) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files if data[name].dtype.kind in "fiub"}


def texts(file: str, name: str) -> list[str]:
    with np.load(ROOT / file, allow_pickle=False) as data:
        return [str(text) for text in data[name]]


def params(file: str, name: str) -> dict:
    return ENTRIES[file, name].get("params") or {}


def meaning(file: str, name: str) -> str:
    return ENTRIES[file, name].get("meaning") or ""


def pixels(u8: Tensor) -> Tensor:
    return u8.float() / 255


def statistics() -> tuple[Tensor, Tensor]:
    normalisation = INDEX["meta"]["normalisation"]
    return torch.tensor(normalisation["mean"]).view(3, 1, 1), torch.tensor(normalisation["std"]).view(3, 1, 1)


def normalised(u8: Tensor) -> Tensor:
    mean, std = statistics()
    return (pixels(u8) - mean) / std


class NormalisedLevel(Perturbation):
    """A level whose images are normalised, as they were when the numbers were recorded."""

    @property
    def pyramid(self) -> Pyramid:
        mean, std = statistics()
        return Pyramid(
            self.epsilon / 255 * (1 / std),
            self.step_size / 255 * (1 / std),
            self.grids,
            self.scalars,
            self.start,
            lower=(0 - mean) / std,
            upper=(1 - mean) / std,
        )

    @property
    def in_pixels(self) -> Perturbation:
        return Perturbation(**dataclasses.asdict(self))


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


def floor_of(file: str, name: str) -> float:
    """How far the recorded numbers themselves lie from a float64 evaluation of their formula.

    0 where rounding decided ties in one of the two runs (a difference that is not small): we round as the
    recorded run did, so that is no excuse.
    """
    entry = ENTRIES[file, name]
    floor, largest = (entry.get(key) or 0.0 for key in ("max_abs_diff_to_float64_run", "max_abs_float64"))
    return floor if floor < 1e-3 * largest else 0.0


def assert_close(
    found: Tensor, expected: Tensor, tolerance: float, about: str = "", floor: float = 0.0
) -> None:
    """Relative Frobenius distance below `tolerance`, or below twice the error known of what was recorded.

    The second never allows more than ten times the tolerance.
    """
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape, about
    size = expected.norm().clamp(min=1e-12)
    distance = (found - expected).norm() / size
    allowed = max(tolerance, min(2 * floor * expected.numel() ** 0.5 / float(size), 10 * tolerance))
    assert distance < allowed, f"{about}: relative distance {distance:.3g}, allowed {allowed:.3g}"


# The recorded models


@dataclasses.dataclass(frozen=True)
class Model:
    """A recorded pool, its backbone, and the same network fed with images that are normalised already."""

    pool: LoRAPool
    network: Network
    raw: Network


def model_of(state: dict[str, Tensor], heads: int) -> Model:
    """The model whose published state dict this is."""
    adapters = {int(found[1]) for name in state if (found := re.search(r"lora_A\.(\d+)$", name))}
    return model_around(pool_from_published(state, (ANY_LEVEL,) * max(len(adapters), 1)), heads)


def model_around(pool: LoRAPool, heads: int) -> Model:
    """The model of a pool, which tells all sizes but the number of heads."""
    dim, _, patch, _ = pool.residual["patch_embed.proj.weight"].shape
    side = patch * round((pool.residual["pos_embed"].shape[1] - 1) ** 0.5)
    hidden = len(pool.residual["blocks.0.mlp.fc1.weight"])
    depth = 1 + max(int(name.split(".")[1]) for name in pool.residual if name.startswith("blocks."))
    network = build_network(
        Arch(patch, dim, depth, heads, pretrained_size=side, image_size=side, mlp_ratio=(hidden + 0.5) / dim)
    )
    mean, std = (tuple(INDEX["meta"]["normalisation"][key]) for key in ("mean", "std"))
    raw = Network("golden", network, side, (0.0,) * 3, (1.0,) * 3)
    check_architecture(ROOT, pool, raw.weights, "golden")
    return Model(pool, dataclasses.replace(raw, mean=mean, std=std), raw)


@pytest.fixture(scope="module")
def single() -> Model:
    """The model of one LoRA."""
    return model_of(arrays("weights_amt.npz"), INDEX["meta"]["config"]["heads"])


@pytest.fixture(scope="module")
def several() -> Model:
    """The model of several LoRAs; everything but its factors is that of the model of one."""
    shared = {
        name.replace("backbone.", "backbone.model.", 1): tensor
        for name, tensor in arrays("weights_amt.npz").items()
        if "lora" not in name
    }
    model = model_of(shared | arrays("weights_merge.npz"), INDEX["meta"]["config"]["heads"])
    assert len(model.pool) == INDEX["meta"]["config"]["pool"]
    return model


@pytest.fixture(scope="module")
def attacked_models(single) -> dict[str, Model]:
    """By file of recorded attacks: the model attacked."""
    state = arrays("d_attack128.npz")
    state = {name.removeprefix("sd/"): tensor for name, tensor in state.items() if name.startswith("sd/")}
    large = model_of(state, INDEX["meta"]["config"]["d128"]["heads"])
    return {"d_attack.npz": single, "d_attack128.npz": large}


def as_published(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named and shaped like one adapter's factors, by their published names and shapes."""
    return {
        f"backbone.{name.replace('.weight.lora_', '.lora_')}": factor.reshape(-1, factor.shape[-1])
        for name, factor in factors.items()
    }


def trainable(pool: LoRAPool) -> LoRAPool:
    factors = {name: factor.clone().requires_grad_() for name, factor in pool.factors.items()}
    return dataclasses.replace(pool.with_factors(factors), scale=pool.scale.clone().requires_grad_())


# a: start


def test_svd_start():
    """The split of a weight into leading triplets and residual, plain and per block of a fused qkv."""
    file, data = "a_svd_init.npz", arrays("a_svd_init.npz")
    cases = sorted(name.removesuffix(".W") for name in data if name.endswith(".W"))
    assert cases
    for case in cases:
        weight, rank = data[f"{case}.W"], params(file, f"{case}.lora_A")["r"]
        groups = len(data[f"{case}.lora_A"]) // rank
        residual, A, B = split_principal(weight, rank, groups)
        product = (B @ A).reshape(weight.shape)
        assert_close(residual, data[f"{case}.W_res"], 5e-6, case)
        assert_close(product, data[f"{case}.BA" if f"{case}.BA" in data else f"{case}.delta"], 1e-5, case)
        published_A = data[f"{case}.lora_A"].reshape(A.shape)
        published_B = data[f"{case}.lora_B"].reshape(B.shape)
        signs = (A * published_A).sum(2).sign()
        assert_close(A * signs[:, :, None], published_A, 1e-4, case)
        assert_close(B * signs[:, None], published_B, 1e-4, case)
        if f"{case}.S" in data:
            values = data[f"{case}.S"]
            assert_close(A[0].norm(dim=1) ** 2, values[:rank], 2e-6, case)
            assert_close(torch.linalg.svdvals(residual)[: len(values) - rank], values[rank:], 1e-5, case)
        if f"{case}.x" in data:
            found = data[f"{case}.x"] @ (residual + product).T + data[f"{case}.b"]
            assert_close(found, data[f"{case}.y"], 1e-6, case)


# b, c: features, prototypes, logits


def test_backbone_features_at_every_image_size(single):
    """Position tables, features and patch tokens at square, oblong and ragged sizes."""
    data, weights = arrays("b_backbone.npz"), single.pool.merge([1.0])
    patch = single.network.module.patch_embed.patch_size[0]
    every_token = copy.copy(single.network.module)
    every_token.global_pool = ""
    tokens = dataclasses.replace(single.network, module=every_token)
    sizes = [name.removeprefix("feat_") for name in data if name.startswith("feat_")]
    assert sizes
    for size in sizes:
        images = pixels(data[f"x_{size}_u8"])
        assert_close(features(single.network, weights, images), data[f"feat_{size}"], 3e-6, size)
        rows, columns = (side // patch for side in images.shape[-2:])
        positions = resize_positions(weights["pos_embed"], (rows, columns))
        assert_close(positions, data[f"pos_{size}"], 1e-6, size)
        if f"tokens_{size}" in data:
            found = features(tokens, weights, images)
            assert_close(found[:, 1:], data[f"tokens_{size}"], 3e-6, size)


def test_prototypes_and_logits(single):
    """Raw mean prototypes of unbalanced classes, and cosine logits for any head."""
    file, data = "c_protonet.npz", arrays("c_protonet.npz")
    weights = single.pool.merge([1.0])
    support = features(single.network, weights, pixels(data["sx_u8"]))
    centres = prototypes(support, data["sy"])
    assert_close(support, data["supp_f"], 3e-6)
    assert_close(centres, data["prototypes"], 3e-6)
    query = features(single.network, weights, pixels(data["x_u8"]))
    heads = [name for name in data if name.startswith("logits_")]
    assert heads
    for name in heads:
        head = params(file, name)
        found = cosine_logits(query, centres, head["scale_cls"], head["bias"])
        assert_close(found, data[name], 2e-6, name)


# d: the attack


def attack_runs() -> list[tuple[str, str]]:
    """(file, run) of every recorded attack."""
    return sorted(
        (file, name.removesuffix("/x_adv"))
        for file, name in ENTRIES
        if file.startswith("d_attack") and name.endswith("/x_adv")
    )


def level_of(settings: dict, gamma: float = 0.0) -> NormalisedLevel:
    return NormalisedLevel(
        epsilon=settings["epsilon"],
        step_size=settings["alpha"],
        steps=settings["iters"],
        gamma=gamma,
        beta=settings.get("beta", 6.0),
        grids=tuple(settings["patch_sizes"]),
        scalars=tuple(float(scalar) for scalar in settings["patch_scalars"]),
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


# f: the training step


@dataclasses.dataclass(frozen=True)
class Step:
    """One recorded training step: its episode in normalised units, and what was recorded of it."""

    data: dict[str, Tensor]
    settings: dict
    episode: Episode

    @property
    def level(self) -> NormalisedLevel:
        return level_of(self.settings, gamma=self.settings["gamma"])

    @property
    def injection(self) -> tuple[Perturbation, list[Tensor]]:
        """A level of no steps and a start, whose attack gives the recorded images."""
        still = dataclasses.replace(self.level, steps=0, grids=(0,), scalars=(1.0,))
        return still, [self.data["x_adv"] - self.episode.query]


def steps() -> list[Step]:
    everything = arrays("f_step.npz")
    count = len({name.split("/")[0] for name in everything})
    found = []
    for number in range(count):
        prefix = f"step{number}/"
        data = {
            name.removeprefix(prefix): tensor
            for name, tensor in everything.items()
            if name.startswith(prefix)
        }
        episode = Episode(normalised(data["sx_u8"]), data["sy"], normalised(data["x_u8"]), data["y"])
        found.append(Step(data, params("f_step.npz", f"step{number}/loss"), episode))
    return found


def pool_before(number: int, all_steps: list[Step], start: LoRAPool) -> LoRAPool:
    """The recorded weights that step `number` began with."""
    if number == 0:
        return start
    after = all_steps[number - 1].data
    names = as_published(start.factors)
    factors = {
        name: after[f"w_after/{published}"].reshape(factor.shape)
        for (name, factor), published in zip(start.factors.items(), names, strict=True)
    }
    return dataclasses.replace(start.with_factors(factors), scale=after["w_after/scale_cls"])


def assert_gradients(pool: LoRAPool, data: dict[str, Tensor], kind: str, number: int) -> int:
    gradients = as_published({name: factor.grad for name, factor in pool.factors.items()})
    gradients["scale_cls"] = pool.scale.grad
    recorded = [name for name in gradients if f"{kind}/{name}" in data]
    for name in recorded:
        floor = floor_of("f_step.npz", f"step{number}/{kind}/{name}")
        assert_close(gradients[name], data[f"{kind}/{name}"], 1e-5, f"{kind} {name}", floor)
    return len(recorded)


def test_loss_of_recorded_logits():
    """Both parts and their sum, the divergence taken from the clean to the attacked logits."""
    for step in steps():
        beta = step.settings["beta"]
        loss = robust_loss(
            step.data["logits_clean"], step.data["logits_adv"], step.episode.query_labels, beta
        )
        assert_close(loss.total, step.data["loss"], 2e-6)
        assert_close(loss.natural, step.data["loss_natural"], 2e-6)
        assert_close(loss.robust, step.data["loss_robust"], 2e-6)


def test_training_step(single):
    """Logits, loss and gradients of every step, from its recorded weights and attacked images."""
    all_steps = steps()
    assert all_steps
    for number, step in enumerate(all_steps):
        pool = trainable(pool_before(number, all_steps, single.pool))
        level, start = step.injection
        outcome = query_outcome(single.raw, pool, step.episode, level, start)
        assert_close(outcome.clean, step.data["logits_clean"], 1e-5, f"step {number}")
        assert_close(outcome.attacked, step.data["logits_adv"], 1e-5, f"step {number}")
        for part in ("natural", "robust"):
            assert_close(getattr(outcome.loss, part), step.data[f"loss_{part}"], 1e-5, f"step {number}")
        assert_close(outcome.loss.total, step.data["loss"], 1e-5, f"step {number}")
        outcome.loss.total.backward()
        assert assert_gradients(pool, step.data, "grad", number) == len(pool.factors) + 1


def test_training_step_split_at_the_support(single, monkeypatch):
    """Query branch alone and support branch alone: the support is seen by the weights before their move."""
    all_steps = steps()
    compared = 0
    for number, step in enumerate(all_steps):
        pool = trainable(pool_before(number, all_steps, single.pool))
        seen = []

        def cut_at_support(network, weights, images, step=step, seen=seen):
            out = features(network, weights, images)
            if images is step.episode.support:
                seen.append(out.detach().requires_grad_())
                return seen[-1]
            return out

        with monkeypatch.context() as patch:
            patch.setattr(meta_tune, "features", cut_at_support)
            level, start = step.injection
            outcome = query_outcome(single.raw, pool, step.episode, level, start)
        outcome.loss.total.backward()
        assert len(seen) == 1
        assert_close(seen[0], step.data["supp_f"], 3e-6, f"step {number}")
        assert_close(seen[0].grad, step.data["grad_supp_f"], 2e-5, f"step {number}")
        compared += assert_gradients(pool, step.data, "grad_query_only", number)
    assert compared > 0


def test_attack_inside_the_training_step(single, monkeypatch):
    """Where the whole start was recorded, the step attacks its queries as recorded."""
    compared = 0
    all_steps = steps()
    for number, step in enumerate(all_steps):
        start = [step.data.get(f"delta0_L{grid}") for grid in range(len(step.level.grids))]
        if any(delta is None for delta in start):
            continue
        pool = trainable(pool_before(number, all_steps, single.pool))
        attacks = []

        def watched(*args, attacks=attacks, **keywords):
            attacks.append(ascend(*args, **keywords))
            return attacks[-1]

        with monkeypatch.context() as patch:
            patch.setattr(meta_tune, "ascend", watched)
            outcome = query_outcome(single.raw, pool, step.episode, step.level, start)
        different = (attacks[0] - step.data["x_adv"]).abs() > 1e-4
        assert different.float().mean() < 0.05, f"step {number}"
        assert_close(outcome.loss.total, step.data["loss"], 0.05, f"step {number}")
        compared += 1
    assert compared > 0


def test_optimiser_with_momentum(single, monkeypatch):
    """All steps in one run of the tuner, momentum carried over; the moved weights are only ever stood at.

    The published step adds gamma * diff before it and subtracts it after, which costs an ulp each time.
    """
    all_steps = steps()
    waiting = iter(all_steps)

    def injected(network, pool, episode, level, start, loss_scale):
        level, start = next(waiting).injection
        return query_outcome(network, pool, episode, level, start, loss_scale)

    monkeypatch.setitem(meta_tune.OUTCOMES, "adsv", injected)
    first = all_steps[0].settings
    settings = TuneSettings(
        epochs=2,
        episodes_per_epoch=len(all_steps),
        lr=first["lr"],
        momentum=first["momentum"],
        warmup_epochs=0,
    )
    tuner = Tuner(single.raw, single.pool, settings)
    for step in all_steps:
        tuner.step(step.episode)
        pool = tuner.pool
        found = as_published(pool.factors) | {"scale_cls": pool.scale, "bias": pool.bias}
        recorded = [name for name in found if f"w_after/{name}" in step.data]
        assert len(recorded) >= len(pool.factors) + 1
        for name in recorded:
            expected = step.data[f"w_after/{name}"]
            if expected.any() or found[name].any():
                assert_close(found[name], expected, 3e-6, name)
                before = as_published(single.pool.factors).get(name)
                if before is not None:
                    # What the steps changed, as far as float32 holds it beside the weight.
                    rest = 5e-7 * float(expected.norm() / (expected - before).norm())
                    assert_close(found[name] - before, expected - before, 2e-5 + rest, name)


# g: routing and merging


def routing_cases() -> list[tuple[str, str]]:
    """(episode, prefix) of every recorded routing decision, the augmented one included."""
    return sorted(
        (name.split("/")[0], name.removesuffix("/expw"))
        for file, name in ENTRIES
        if file == "g_merge.npz" and name.endswith("/expw")
    )


def routed_episode(data: dict[str, Tensor], name: str) -> Episode:
    """The episode of a routing case; the augmented case looks at the one whose support it augments."""
    if f"{name}/sx_u8" not in data:
        views = data[f"{name}/z"].shape
        others = [key.removesuffix("/sx_u8") for key in data if key.endswith("/sx_u8")]
        name = next(other for other in others if data[f"{other}/sx_u8"].shape == views)
    support, query = pixels(data[f"{name}/sx_u8"]), pixels(data[f"{name}/x_u8"])
    return Episode(support, data[f"{name}/sy"], query, data[f"{name}/y"])


def settings_of(entry: dict) -> Routing:
    return Routing(
        beta=entry["blend_beta"],
        gamma=entry["blend_gamma"],
        top_k=entry.get("top_k", INDEX["meta"]["architecture"]["top_k"]),
        augment_probability=entry.get("aug_prob", 0),
    )


def recorded_shares(data: dict[str, Tensor], case: str, adapters: int) -> Tensor:
    shares = torch.zeros(adapters)
    return shares.scatter(0, data[f"{case}/topk_i"], data[f"{case}/weights"])


def merged_logits(model: Model, coefficients: Coefficients, episode: Episode, trims=()) -> Tensor:
    weights = trim_singular_values(model.pool.merge(coefficients), trims)
    merged = Merged(weights, *model.pool.head(coefficients))
    return prototype_classifier(model.network, merged, episode).logits(episode.query)


def merged_layers() -> dict[str, str]:
    """Short names of recorded weights, and the weight each is, as their meanings say."""
    found = {}
    for file, name in ENTRIES:
        match = re.search(r"merged weight of model\.(\S+)", meaning(file, name))
        if match:
            found[name.split("/")[-1]] = f"{match[1]}.weight"
    return found


def normalised_shares(coefficients: Tensor) -> list[float]:
    """Float32 shares as a sum of exactly 1, which a merge asks for."""
    return (coefficients.double() / coefficients.double().sum()).tolist()


@pytest.mark.parametrize("name, case", routing_cases())
def test_routing(name, case, several, monkeypatch):
    """Cosines, scores and coefficients from the support set."""
    data = arrays("g_merge.npz")
    episode = routed_episode(data, name)
    routing = settings_of(params("g_merge.npz", f"{case}/expw"))
    if f"{name}/z" in data:
        # Only the augmentation's random draw is replaced; what is done with its result is ours.
        monkeypatch.setattr(merge, "augment", lambda images, generator: data[f"{name}/z"])
        assert routing.augment_probability == 1
    labels, generator = episode.support_labels, torch.Generator()
    cosines = support_cosines(several.network, several.pool, episode.support, labels, generator, routing)
    assert_close(cosines, data[f"{name}/expert_cos"], 3e-6, case)
    intra, inter = compactness(cosines, labels)
    assert_close(intra, data[f"{name}/intra"], 2e-6, case)
    assert_close(inter, data[f"{name}/inter"], 2e-6, case)

    everyone = dataclasses.replace(routing, top_k=len(several.pool))
    shares = torch.tensor(blend(intra, inter, everyone), dtype=torch.double)
    weights = data[f"{case}/expw"].double()
    assert_close(shares, weights / weights.sum(), 2e-6, case)
    assert_close(shares, (routing.beta * data[f"{case}/score"].double()).softmax(0), 2e-6, case)

    best = weights.sort(descending=True).values
    if routing.top_k < len(best) and best[routing.top_k - 1] - best[routing.top_k] < 3e-6 * best[0]:
        return  # equally good adapters: which of them is chosen means nothing
    found = torch.tensor(blend(intra, inter, routing))
    assert_close(found, recorded_shares(data, case, len(found)), 2e-6, case)
    generator.manual_seed(0)
    routed = merge.route(several.network, several.pool, episode.support, labels, generator, routing)
    assert torch.allclose(torch.tensor(routed), found, rtol=0, atol=1e-6)


def test_merged_weights_and_logits(several):
    """Merges by recorded coefficients, routed or specified: weights of single layers, and query logits."""
    file, data, layers = "g_merge.npz", arrays("g_merge.npz"), merged_layers()
    cases = {case: episode for episode, case in routing_cases()}
    specified = [
        name.split("/")[0]
        for known, name in ENTRIES
        if known == file and name.endswith("/logits") and "specified_expert" in params(file, name)
    ]
    cases |= dict.fromkeys(specified)
    logits = weights = 0
    for case, name in cases.items():
        if name is None:
            chosen = params(file, f"{case}/logits")["specified_expert"]
            coefficients = average_of(several.pool, chosen)
            name = first_unaugmented()[0]
        else:
            coefficients = normalised_shares(recorded_shares(data, case, len(several.pool)))
        if f"{case}/logits" in data:
            found = merged_logits(several, coefficients, routed_episode(data, name))
            assert_close(found, data[f"{case}/logits"], 3e-6, case)
            logits += 1
        merged = several.pool.merge(coefficients)
        for short, layer in layers.items():
            if f"{case}/merged/{short}" in data:
                assert_close(merged[layer], data[f"{case}/merged/{short}"], 1e-6, f"{case} {short}")
                weights += 1
    assert logits >= len(cases) > 0 and weights > 0


def first_unaugmented() -> tuple[str, str]:
    """The first recorded episode and blend: the one that specified experts and trimming look at."""
    names = [name for file, name in ENTRIES if file == "g_merge.npz" and name.endswith("/expw")]
    return names[0].split("/")[0], names[0].removesuffix("/expw")


# h: trimming


def trims_of(setting: dict) -> list[Trim]:
    """The published forms of a setting: one name or several, one block or several, or triples in step."""

    def listed(value) -> list:
        return value if isinstance(value, list) else [value]

    if "names" in setting:
        triples = zip(setting["names"], setting["layer"], setting["ps"], strict=True)
    else:
        triples = [(setting["name"], setting["layer"], setting["p"])]
    return [
        Trim(layer, block, keep)
        for layers, blocks, keep in triples
        for layer in listed(layers)
        for block in listed(blocks)
    ]


def test_truncation_of_merged_weights():
    """The exact best approximation of a recorded merged weight, and its singular values."""
    file, data, merged = "h_trim.npz", arrays("h_trim.npz"), arrays("g_merge.npz")
    _, case = first_unaugmented()
    exact = [name for name in data if name.endswith("/exact")]
    assert exact
    for name in exact:
        short, setting = name.split("/")[0], params(file, name)
        weight = merged[f"{case}/merged/{short}"]
        found = truncate(weight, setting["p"])
        assert_close(found, data[name], 2e-5, name)
        values = torch.linalg.svdvals(found)
        assert int((values > 1e-4 * values[0]).sum()) == setting["q"]
        assert_close(values[: setting["q"]], data[f"{short}/S"][: setting["q"]], 2e-6, name)


def test_trimmed_logits(several):
    """Logits of the merged and trimmed network, and which layers each published setting selects."""
    file, data = "h_trim.npz", arrays("h_trim.npz")
    episode_name, case = first_unaugmented()
    merged = arrays("g_merge.npz")
    episode = routed_episode(merged, episode_name)
    coefficients = normalised_shares(recorded_shares(merged, case, len(several.pool)))
    assert_close(merged_logits(several, coefficients, episode), data["logits_untrimmed"], 3e-6)
    names = [name for name in data if name.endswith("/logits_exact")]
    assert names
    for name in names:
        setting = params(file, name)
        trims = trims_of(setting["trim"])
        selected = {weight for weight in several.pool.residual if any(t.selects(weight) for t in trims)}
        assert selected == {f"{layer.removeprefix('model.')}.weight" for layer in setting["trimmed_modules"]}
        found = merged_logits(several, coefficients, episode, trims)
        assert_close(found, data[name], 2e-5, name)


# checkpoints


@pytest.fixture(scope="module")
def heads() -> int:
    return INDEX["meta"]["config"]["heads"]


@pytest.mark.parametrize("safe", [False, True], ids=["as_published", "converted"])
def test_training_checkpoint(heads, safe, tmp_path):
    """A file as main.py writes it, and what `python -m amt checkpoint --convert` makes of it: same logits."""
    saved = loaded("train_ckpt.pth", tmp_path if safe else None)
    model = model_around(saved.pool, heads)
    data, episode = arrays("ckpt_logits.npz"), arrays("c_protonet.npz")
    episode = Episode(pixels(episode["sx_u8"]), episode["sy"], pixels(episode["x_u8"]), episode["y"])
    assert_close(merged_logits(model, (1.0,), episode), data["train_logits"], 3e-6)
    assert len(saved.pool) == 1 and saved.about["levels_from"] == "the arguments"


@pytest.mark.parametrize("safe", [False, True], ids=["as_published", "converted"])
def test_pool_checkpoint(heads, safe, tmp_path):
    """The pool's file routes and classifies like the numbers recorded of it."""
    merged, data = arrays("g_merge.npz"), arrays("ckpt_logits.npz")
    saved = loaded("pool_ckpt.pth", tmp_path if safe else None)
    assert len(saved.pool) == INDEX["meta"]["config"]["pool"]
    model = model_around(saved.pool, heads)
    equal = re.search(r"equals g_merge (\S+)/logits", meaning("ckpt_logits.npz", "pool_logits"))
    case = equal[1] if equal else first_unaugmented()[1]
    episode = routed_episode(merged, case.split("/")[0])
    routing = settings_of(params("g_merge.npz", f"{case}/expw"))
    coefficients = merge.route(
        model.network, model.pool, episode.support, episode.support_labels, torch.Generator(), routing
    )
    assert_close(merged_logits(model, coefficients, episode), data["pool_logits"], 3e-6)


def loaded(name: str, folder: Path | None) -> Checkpoint:
    """A recorded file as `checkpoint.load` reads it, by way of one of our files if there is a `folder`."""
    saved = load(ROOT / name)
    if folder is None:
        return saved
    save(folder / "converted.safetensors", saved)
    return load(folder / "converted.safetensors")


def test_tables_of_keys():
    """The recorded lists of every published tensor: the names, their order, and their shapes."""
    files = sorted(ROOT.glob("keys_*.tsv"))
    assert files
    for file in files:
        lines = (line.split("\t") for line in file.read_text().splitlines()[1:])
        table = {name: tuple(map(int, shape.split("x"))) for name, shape, *_ in lines}
        prefix = "backbone.model." if any(".model." in name for name in table) else "backbone."
        blocks = {name.split("blocks.")[1].split(".")[0] for name in table if "blocks." in name}
        adapters = sum(name.startswith(f"{prefix}blocks.0.attn.proj.lora_A") for name in table)
        dim, _, patch, _ = table[f"{prefix}patch_embed.proj.weight"]
        found = published_shapes(
            patch=patch,
            dim=dim,
            depth=len(blocks),
            hidden=table[f"{prefix}blocks.0.mlp.fc1.weight"][0],
            tokens=table[f"{prefix}pos_embed"][1],
            rank=next(shape for name, shape in table.items() if "proj.lora_A" in name)[0],
            adapters=adapters if prefix == "backbone.model." else None,
        )
        assert list(found.items()) == list(table.items()), file


@pytest.mark.parametrize("form", ["plain", "dino_full", "ibot", "deit", "safetensors"])
def test_backbone_features_from_every_official_format(single, form, tmp_path):
    """The recorded network's weights, written as each project publishes them, give the recorded features."""
    weights = single.pool.merge([1.0])
    path = write_official(tmp_path / "weights.pth", form, weights)
    found = read_weights(path, single.network.module)
    data = arrays("b_backbone.npz")
    for size in (name.removeprefix("feat_") for name in data if name.startswith("feat_")):
        images = pixels(data[f"x_{size}_u8"])
        assert_close(features(single.network, found, images), data[f"feat_{size}"], 3e-6, size)
