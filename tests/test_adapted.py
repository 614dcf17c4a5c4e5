"""No needless work in training: factors beside the merged weights get the gradient that autograd would send
through those, and mixed precision casts weights that stay once, to the same bits."""

import dataclasses

import pytest
import torch
from conftest import moved_apart
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toy_pools import LEVELS, make_episode, make_network, quick

from amt.models.network import Network, features, level_features
from amt.models.pool import Pool, pretrained_pool, principal_pool
from amt.tasks.classifier import fixed_predictor
from amt.training.tuner import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")


def found(network: Network, pool: Pool, apart: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of every member's own images, and the gradients of images and factors."""
    factors = {name: factor.clone().requires_grad_() for name, factor in pool.factors.items()}
    images = torch.rand(len(pool), 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = level_features(network, pool.with_factors(factors).stack(apart=apart), images)
    leaves = {"images": images} | factors
    slopes = torch.autograd.grad((seen * torch.linspace(-1, 2, seen.shape[-1])).sum(), leaves.values())
    return seen, dict(zip(leaves, slopes, strict=True))


@pytest.mark.parametrize("rank", [1, 3, 8])  # of the last, the gradient of the weight is the shorter way
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("autocast", "nearly"), [(None, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bf16"]
)
def test_factors_apart_get_the_gradients_of_factors_that_are_merged(rank, members, autocast, nearly):
    network = dataclasses.replace(make_network(), autocast=autocast)
    pool = moved_apart(principal_pool(network.weights, rank, LEVELS[:members]))
    (seen, slopes), (expected, wanted) = (found(network, pool, apart) for apart in (True, False))
    assert torch.equal(seen, expected)
    for name, slope in wanted.items():
        assert slopes[name].dtype == torch.float32
        assert (slopes[name] - slope).norm() <= nearly * slope.norm(), name
    swapped = slopes["blocks.0.attn.qkv.weight.lora_A"].flip(2)  # q, k and v, or the ranks
    assert rank == 1 or (swapped - wanted["blocks.0.attn.qkv.weight.lora_A"]).norm() > 0.1 * swapped.norm()


class Casts(TorchDispatchMode):
    """Counts the tensors of each shape that are cast."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") not in (
            None,
            args[0].dtype,
        ):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def casts_of_weights(run, network: Network) -> int:
    """How many tensors of the shape of a weight, alone or of several levels, `run` casts."""
    shapes = {tuple(weight.shape) for weight in network.weights.values()}
    with Casts() as seen:
        run()
    return sum(shape in shapes or shape[1:] in shapes for shape in seen.shapes)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("levels", [1, 2])
def test_an_attack_in_mixed_precision_casts_no_weight_twice(tune, levels):
    network = dataclasses.replace(make_network(), autocast=torch.bfloat16)
    some = LEVELS[:levels]
    start = (
        principal_pool(network.weights, 1, some) if tune == "lora" else pretrained_pool(network.weights, some)
    )

    def casts(steps: int) -> int:
        pool = dataclasses.replace(
            start, levels=tuple(dataclasses.replace(each, steps=steps) for each in some)
        )
        tuner = Tuner(network, pool, quick())
        return casts_of_weights(lambda: tuner.step(make_episode(0)), network)

    assert casts(1) == casts(4) > 10


def test_a_classifier_in_mixed_precision_casts_its_weights_once():
    """To the logits that casting in every pass gives."""
    network = dataclasses.replace(make_network(), autocast=torch.bfloat16)
    pool, episode = moved_apart(principal_pool(network.weights, 2, LEVELS[:1])), make_episode(0)
    merged = pool.merged((1.0,))
    logits = fixed_predictor(network, merged)(episode).logits
    assert casts_of_weights(lambda: logits(episode.query), network) == 0
    assert torch.equal(
        features(network, network.cast(merged.weights), episode.query),
        features(network, merged.weights, episode.query),
    )


class Standardised(nn.Conv2d):
    """A convolution that does something with its weight first, in float32."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight / weight.std(), self.bias)


def test_what_mixed_precision_does_not_cast_stays():
    module = nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())
    module.num_classes = 0
    network = Network("tiny", module, 8, autocast=torch.bfloat16)
    cast = {name for name, weight in network.cast(network.weights).items() if weight.dtype == torch.bfloat16}
    assert cast == {"1.weight", "1.bias"}
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = features(network, network.weights, images)
    assert torch.equal(features(network, network.cast(network.weights), images), expected)
    plain = dataclasses.replace(network, autocast=None)
    assert plain.cast(plain.weights)["1.weight"].dtype == torch.float32
