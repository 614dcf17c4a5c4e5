"""Wide residual networks (Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146).

    images -> conv1 3x3 -> block1 (stride 1) -> block2 (2) -> block3 (2) -> bn1, ReLU -> mean -> fc

Every block is a row of (depth - 4) / 6 pre-activation units of two 3x3 convolutions, in widths of 16, 32 and
64 times `widen`; there is no dropout. Names of parameters are those that files of robust training have
(`block1.layer.0.convShortcut.weight`). Knows no weights and no normalisation.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class _Unit(nn.Module):
    """x + conv2(ReLU(bn2(conv1(a)))) for a = ReLU(bn1(x)); where the width changes, 1x1 of `a` for x."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        same = inside == out and stride == 1
        self.convShortcut = None if same else nn.Conv2d(inside, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


def _block(count: int, inside: int, out: int, stride: int) -> nn.Module:
    """A row of units, the first of which changes width and resolution."""
    units = [_Unit(inside, out, stride), *(_Unit(out, out, stride=1) for _ in range(count - 1))]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*units)))


class WideResNet(nn.Module):
    """A network of 6 n + 4 layers, and of K classes. Raises ValueError if no n >= 1 gives that depth."""

    def __init__(self, depth: int, widen: int, n_classes: int):
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"depth is {depth}, expected 6 n + 4")
        first, second, third = (width * widen for width in WIDTHS)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.block1 = _block(count, WIDTHS[0], first, stride=1)
        self.block2 = _block(count, first, second, stride=2)
        self.block3 = _block(count, second, third, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))
