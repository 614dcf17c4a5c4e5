"""Residual networks (He et al. 2016, https://arxiv.org/abs/1512.03385), with torchvision's names.

    images -> conv1, bn1, ReLU, max-pool -> layer1 (stride 1) -> layer2 (2) -> ... -> mean -> fc

Knows no weights and no normalisation.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1


class ResNet(nn.Module):
    """A residual network of any widths and depths, of torchvision's blocks.

    Args:
        depths: number of blocks per stage.
        widths: planes per stage; every stage but the first halves the resolution.
        small: a stem of 3x3 that does not shrink the image, in place of 7x7 / 2 and a max-pool.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        n_classes: int,
        small: bool,
    ):
        super().__init__()
        wide = widths[0]
        if small:
            self.conv1 = nn.Conv2d(3, wide, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, wide, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self._stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        for name, depth, width in zip(self._stages, depths, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            self.add_module(name, _stage(block, wide, width, depth, stride))
            wide = width * block.expansion
        self.fc = nn.Linear(wide, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> logits (N, K)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self._stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean(dim=(2, 3)))


def _stage(block: type, inside: int, width: int, depth: int, stride: int) -> nn.Sequential:
    out = width * block.expansion
    shortcut = None
    if stride != 1 or inside != out:
        shortcut = nn.Sequential(conv1x1(inside, out, stride), nn.BatchNorm2d(out))
    return nn.Sequential(
        block(inside, width, stride, shortcut), *(block(out, width) for _ in range(depth - 1))
    )
