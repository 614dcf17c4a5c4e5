"""Numbers recorded from an independent implementation of the method, where they are.

The folder comes from AMT_GOLDEN (default: shared/golden beside the project); every size and parameter is
read from its index or its arrays, so any set of the same kind can be put there. Tolerances are relative
Frobenius distances.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from amt.attacks.levels import Perturbation
from amt.attacks.perturb import Pyramid
from amt.files.checkpoint import check_architecture
from amt.files.published import pool_from_published
from amt.models.architectures import Arch, build_network
from amt.models.network import Network
from amt.models.pool import Pool

FOLDER = os.environ.get("AMT_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
ROOT = Path(FOLDER) / "amt" if (Path(FOLDER) / "amt").is_dir() else Path(FOLDER)
INDEX = json.loads((ROOT / "index.json").read_text()) if (ROOT / "weights_amt.npz").is_file() else None
ENTRIES = {(entry["file"], entry["name"]): entry for entry in INDEX["arrays"]} if INDEX else {}

golden = [
    pytest.mark.golden,
    pytest.mark.skipif(INDEX is None, reason=f"no reference numbers at {ROOT}"),
]

ANY_LEVEL = Perturbation(8, 2)  # where the level is not what is compared


def arrays(file: str) -> dict[str, Tensor]:
    with np.load(ROOT / file, allow_pickle=False) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files if data[name].dtype.kind in "fiub"}


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


@dataclasses.dataclass(frozen=True)
class NormalisedPyramid(Pyramid):
    """Perturbations of images that are normalised: black and white are other values in each channel."""

    lower: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    upper: Tensor = dataclasses.field(default_factory=lambda: torch.ones(()))

    def clip(self, images: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(images, self.upper.to(images)), self.lower.to(images))


class NormalisedLevel(Perturbation):
    """A level whose images are normalised, as they were when the numbers were recorded."""

    @property
    def pyramid(self) -> NormalisedPyramid:
        mean, std = statistics()
        return NormalisedPyramid(
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


@dataclasses.dataclass(frozen=True)
class Model:
    """A recorded pool, its backbone, and the same network fed with images that are normalised already."""

    pool: Pool
    network: Network
    raw: Network


def model_of(state: dict[str, Tensor], heads: int) -> Model:
    """The model whose published state dict this is."""
    adapters = {int(found[1]) for name in state if (found := re.search(r"lora_A\.(\d+)$", name))}
    return model_around(pool_from_published(state, (ANY_LEVEL,) * max(len(adapters), 1)), heads)


def model_around(pool: Pool, heads: int) -> Model:
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


@pytest.fixture(scope="session")
def single() -> Model:
    """The model of one LoRA."""
    return model_of(arrays("weights_amt.npz"), INDEX["meta"]["config"]["heads"])


def as_published(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named and shaped like one adapter's factors, by their published names and shapes."""
    return {
        f"backbone.{name.replace('.weight.lora_', '.lora_')}": factor.reshape(-1, factor.shape[-1])
        for name, factor in factors.items()
    }


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
