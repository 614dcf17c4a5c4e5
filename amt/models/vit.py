"""The plain vision transformer (Dosovitskiy et al. 2021, arxiv.org/abs/2010.11929), with timm's names.

    images -> patches, linear -> CLS token, positions -> blocks of attention and MLP -> LayerNorm -> CLS token

Any weight may have a leading P, of P networks: then the images are P times as many, one network's after the
other's, and go through all of them in one pass. Attention never looks from image to image, so it takes them
as they come.

A state dict of timm's VisionTransformer without a head fits, and gives the same features bit for bit; of one
seed both draw the same weights. timm itself takes seconds to import, as it brings every architecture that it
knows: this one is there at once. Any other ViT is timm's own, see `architectures.build_timm_network`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm


class Linear(nn.Linear):
    """A linear layer, or P of them side by side: weight (P, out, in), bias (out,) or (P, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, in) -> (N, tokens, out)."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(len(self.weight), -1, x.shape[-1])
        return torch.baddbmm(self.bias.unsqueeze(-2), rows, self.weight.mT).view(*x.shape[:-1], -1)


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

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D)."""
        count, tokens, dim = x.shape
        parts = self.qkv(x).reshape(count, tokens, 3, self.num_heads, dim // self.num_heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(found.transpose(1, 2).reshape(count, tokens, dim))


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

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A ViT with a CLS token and learned positions, without a head; random weights of torch's generator.

    Args:
        image_size: side in pixels that the position table is for.
        patch_size: side in pixels.
        dim: D, of tokens and features.
        depth: number of blocks.
        heads: of attention; D is a multiple of it.
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
        x = self.norm(self.blocks(x))
        return x[:, 0] if self.global_pool else x


def _rows(table: Tensor, count: int) -> Tensor:
    """A table (1, T, D) for every image (count, T, D), or P tables (P, 1, T, D) for count / P each."""
    if table.ndim == 3:
        return table.expand(count, -1, -1)
    return table.expand(-1, count // len(table), -1, -1).flatten(0, 1)


def _draw(weight: Tensor) -> None:
    """Fill a weight with normal numbers of standard deviation 0.02, by the inverse of their distribution."""
    with torch.no_grad():
        weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
