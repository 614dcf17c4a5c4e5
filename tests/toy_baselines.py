"""What the tests of complete networks share: a small network, and the same as a plain torch module."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_backbone
from torch import Tensor, nn

from amt.models.architectures import Arch
from amt.models.network import Network

ARCH = Arch(patch_size=4, dim=24, depth=2, heads=2, pretrained_size=16, image_size=16, mlp_ratio=2.0)


@pytest.fixture(scope="module")
def network() -> Network:
    return random_backbone(ARCH)


def identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


class Plain(nn.Module):
    """The network and its head as a module of its own: what is computed in another way."""

    def __init__(self, network: Network, weights: dict[str, Tensor] | None = None):
        super().__init__()
        self.network = copy.deepcopy(network.module).requires_grad_()
        if weights is not None:
            self.network.load_state_dict(weights)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def see(self, images: Tensor) -> Tensor:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return self.network((images - mean[:, None, None]) / std[:, None, None])

    def forward(self, support: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        seen = self.see(support)
        centres = torch.stack([seen[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
        return self.scale * F.cosine_similarity(self.see(images)[:, None], centres[None], dim=-1)

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.network.named_parameters()}
