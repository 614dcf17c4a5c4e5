"""The plain vision transformer (Dosovitskiy et al. 2021, arxiv.org/abs/2010.11929), with timm's names.

    images -> patches, linear -> CLS token, positions -> blocks of attention and MLP -> LayerNorm -> CLS token

Any weight may have a leading P, of P networks: then the images are P times as many, one network's after the
other's, and go through all of them in one pass. Attention never looks from image to image, so it takes them
as they come.

The last block computes the CLS token alone, as nobody asks for the others: the same up to rounding, for one
part in fourteen less of a ViT-S.

A state dict of timm's VisionTransformer without a head fits. It gives the same tokens bit for bit, and the
same features up to rounding; of one seed both draw the same weights. timm itself takes seconds to import, as
it brings every architecture that it knows: this one is there at once. Any other ViT is timm's own, see
`architectures.build_timm_network`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amt.models.adapted import adapted_linear, linear

EPS = 1e-6  # of every LayerNorm


class Linear(nn.Linear):
    """A linear layer, or P of them side by side: weight (P, out, in), bias (out,) or (P, out).

    Beside its weight it may be given the factors that are merged in it, see `adapted_linear`.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, in) -> (N, tokens, out)."""
        return self.part(x, 0, 1, 1)

    def part(self, x: Tensor, first: int, last: int, of: int) -> Tensor:
        """The outputs from `first` to `last` of so many equal parts, which are as many groups of factors:
        (N, tokens, in) -> (N, tokens, out (last - first) / of)."""
        weight, bias, A, B = self.weight, self.bias, self.lora_A, self.lora_B
        if last - first < of:
            rows = slice(first * self.out_features // of, last * self.out_features // of)
            weight, bias = weight[..., rows, :], bias[..., rows]
        if A is None or B is None:
            return linear(x, weight, bias)
        if last - first < of:
            A, B = A[..., first:last, :, :], B[..., first:last, :, :]
        return adapted_linear(x, weight, bias, A, B)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm, or P of them side by side: weight and bias (P, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D)."""
        if self.weight.ndim == 1:
            return super().forward(x)
        rows = F.layer_norm(x, self.normalized_shape, eps=self.eps).view(len(self.weight), -1, x.shape[-1])
        return torch.addcmul(self.bias[:, None], rows, self.weight[:, None]).view_as(x)


class PatchEmbed(nn.Module):
    """Images (N, 3, H, W), whose sides are multiples of `patch_size`, to tokens (N, tokens, D)."""

    strict_img_size = False  # as timm calls it: images of any size

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def feat_ratio(self) -> int:
        """Side in pixels of the patch behind one token."""
        return self.patch_size[0]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, tokens, D), row after row."""
        if self.proj.weight.ndim == 4:
            return self.proj(x).flatten(2).transpose(1, 2)
        of_networks: Any = (self.proj.weight, self.proj.bias)
        parts = zip(x.chunk(len(self.proj.weight)), *of_networks, strict=True)
        found = [F.conv2d(part, weight, bias, self.patch_size) for part, weight, bias in parts]
        return torch.cat(found).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one layer for queries, keys and values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, first_alone: bool = False) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D), or (N, 1, D) of the first token alone, which sees all."""
        if first_alone:
            (queries,) = self._heads(self.qkv.part(x[:, :1], 0, 1, of=3), 1)
            keys, values = self._heads(self.qkv.part(x, 1, 3, of=3), 2)
        else:
            queries, keys, values = self._heads(self.qkv(x), 3)
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(found.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """So many parts side by side (N, tokens, parts D), each as (N, heads, tokens, D / heads)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two linear layers with exact GELU in between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to what comes in."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = LayerNorm(dim, EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, first_alone: bool = False) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D), or (N, 1, D) of the first token alone."""
        moves = self.attn(self.norm1(x), first_alone)
        x = (x[:, :1] if first_alone else x) + moves
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A ViT with a CLS token and learned positions, without a head; random weights of torch's generator.

    Args:
        image_size, patch_size: sides in pixels, the former of what the position table is for.
        dim: D, of tokens and features, a multiple of `heads`.
        mlp_ratio: the MLP's hidden layer has int(D mlp_ratio) units.
    """

    dynamic_img_size = False  # as timm calls it: `features` resizes the position table
    num_classes = 0
    num_prefix_tokens = 1

    def __init__(
        self, image_size: int, patch_size: int, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0
    ):
        super().__init__()
        self.num_features = self.embed_dim = dim
        self.global_pool = "token"  # "" returns every token
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, int(dim * mlp_ratio)) for _ in range(depth)))
        self.norm = LayerNorm(dim, EPS)
        _draw(self.pos_embed)
        nn.init.normal_(self.cls_token, std=1e-6)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                _draw(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W), of as many whole patches as the position table is for, to features
        (N, D), those of the CLS token."""
        x = self.patch_embed(x)
        x = torch.cat([_rows(self.cls_token, x.shape[0]), x], dim=1) + _rows(self.pos_embed, x.shape[0])
        if not self.global_pool:
            return self.norm(self.blocks(x))
        *others, last = self.blocks  # of what it makes of the patches nothing is left
        for block in others:
            x = block(x)
        return self.norm(last(x, first_alone=True)).squeeze(1)


def _rows(table: Tensor, count: int) -> Tensor:
    """A table (1, T, D) for every image (count, T, D), or P tables (P, 1, T, D) for count / P each."""
    if table.ndim == 3:
        return table.expand(count, -1, -1)
    return table.expand(-1, count // len(table), -1, -1).flatten(0, 1)


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position tables (P, 1 + N, D) or (P, 1, 1 + N, D) resized to 1 + grid[0] * grid[1] rows; the CLS row is
    kept.

    The rule of the official DINO code: bicubic, with 0.1 added to the target side so that the division
    cannot round down, and the scale factor used as given (so the 0.1 moves the sampling points, too).
    """
    *outer, rows, dim = table.shape
    side = math.isqrt(rows - 1)
    if grid == (side, side):
        return table
    patches = table[..., 1:, :].reshape(-1, side, side, dim).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    if patches.requires_grad and torch.are_deterministic_algorithms_enabled():
        patches = patches.cpu()  # a GPU has no gradient of this that repeats its bits
    patches = F.interpolate(
        patches, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False
    ).to(table.device)
    return torch.cat([table[..., :1, :], patches.permute(0, 2, 3, 1).reshape(*outer, -1, dim)], dim=-2)


def _draw(weight: Tensor) -> None:
    """Fill a weight with normal numbers of standard deviation 0.02, by the inverse of their distribution."""
    with torch.no_grad():
        weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
