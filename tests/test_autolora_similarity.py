"""The cosine per layer between the gradients of two objectives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amt.training.similarity import gradient_similarity


def gradients(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv1.weight": (4, 3, 3, 3),
        "bn1.weight": (4,),
        "bn1.bias": (4,),
        "layer1.0.conv.weight": (2, 4),
    }
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_cosine_by_hand():
    """(3, 4) and (4, 3) have the product 24 and lengths 5; weight and bias of a layer are one vector."""
    one = {
        "a.weight": torch.tensor([[3.0]]),
        "a.bias": torch.tensor([4.0]),
        "token": torch.tensor([1.0, 0.0]),
    }
    other = {
        "a.weight": torch.tensor([[4.0]]),
        "a.bias": torch.tensor([3.0]),
        "token": torch.tensor([0.0, 2.0]),
    }
    found = gradient_similarity(one, other)
    assert list(found) == ["a", "token"]
    assert found["a"] == pytest.approx(24 / 25) and found["token"] == 0


@given(st.integers(0, 100), st.floats(1e-18, 1e18), st.floats(1e-18, 1e18))
def test_only_directions_count(seed, natural, adversarial):
    """Also where a product of the two would leave float32; layers are those of the names, in their order."""
    same = gradient_similarity(gradients(seed, natural), gradients(seed, adversarial))
    against = gradient_similarity(gradients(seed, natural), gradients(seed, -adversarial))
    assert list(same) == ["conv1", "bn1", "layer1.0.conv"]
    assert all(value == pytest.approx(1) for value in same.values())
    assert all(value == pytest.approx(-1) for value in against.values())


def test_it_is_symmetric_and_leaves_the_gradients_alone():
    one, other = gradients(1), gradients(2)
    before = {name: value.clone() for name, value in one.items()}
    assert gradient_similarity(one, other) == pytest.approx(gradient_similarity(other, one))
    assert all(torch.equal(one[name], before[name]) for name in one)


def test_a_gradient_of_zero_has_no_direction():
    still = gradients(1) | {"conv1.weight": torch.zeros(4, 3, 3, 3)}
    found = gradient_similarity(still, gradients(2))
    assert math.isnan(found["conv1"]) and -1 < found["bn1"] < 1


def test_gradients_of_two_objectives_on_one_network():
    """As training calls it: the gradients of a natural and an adversarial loss of the same weights."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))

    def gradient(images):
        loss = torch.nn.functional.cross_entropy(images @ weight.T, torch.zeros(7, dtype=torch.int64))
        return {"fc.weight": torch.autograd.grad(loss, weight)[0]}

    assert gradient_similarity(gradient(x), gradient(x)) == {"fc": pytest.approx(1)}
    assert gradient_similarity(gradient(x), gradient(x + 0.1))["fc"] < 1


def test_gradients_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="bn1"):
        gradient_similarity({k: v for k, v in gradients(1).items() if k != "bn1.bias"}, gradients(1))
    with pytest.raises(ValueError, match="conv1"):
        gradient_similarity(gradients(1) | {"conv1.weight": torch.zeros(3)}, gradients(1))
