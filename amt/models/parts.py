"""Less memory for the same result: passes in parts, and blocks that are computed again on the way back.

What a gradient needs of a pass is not kept, but made again when the gradient comes through: one more forward
pass, and the memory of one part, or one block (Chen et al. 2016, arxiv.org/abs/1604.06174). What is made
again has the bits it had. Knows no network.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def in_parts(pass_of: Callable[[Tensor], Tensor], images: Tensor, most: int | None) -> Tensor:
    """`pass_of` of images (P, N, ...), each of which goes its own way, `most` of the N at once; None for all.
    Gradients add up over the parts."""
    if most is None or images.shape[1] <= most:
        return pass_of(images)
    return torch.cat([_again(pass_of, part) for part in images.split(most, dim=1)], dim=1)


def with_blocks_made_again(module: nn.Module) -> nn.Module:
    """A copy of a ViT, whose tokens of any shape go from block to block, that keeps of each block's pass what
    comes in, and makes the rest anew."""
    module = copy.deepcopy(module)
    blocks: Any = module.blocks
    for block in blocks:
        # The shallow copy has the same parts, and the forward that the block had.
        block.forward = functools.partial(_made_again, copy.copy(block))
    return module


def _made_again(block: nn.Module, *given: Any, **named: Any) -> Tensor:
    """A block's output. Its weights are those of this pass: when the gradient comes, the module, which never
    is written to, has its own again."""
    weights = dict(block.named_parameters()) | dict(block.named_buffers())
    for name, part in block.named_modules():  # factors that a pass was given beside the weights
        weights |= {f"{name}.{own}": held for own, held in vars(part).items() if isinstance(held, Tensor)}
    return _again(torch.func.functional_call, block, weights, given, named)
