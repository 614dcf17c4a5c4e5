"""How much memory the training on an episode needs, estimated from the sizes of network and episode.

    kept of a pass      levels x images x tokens x sum over the linear layers of (inputs + outputs)

A linear layer of a transformer keeps what comes in for its weight's gradient, and what goes out is kept by
the next: attention, GELU, or the residual stream. With `--grad_checkpointing` only what goes from block to
block is kept, and one block at a time is made again. A pass of more than `micro_batch` images keeps one part
at a time. To this come the weights of every level and their gradients, and the images. Attack steps come one
after the other and keep less than the passes around them, so their number does not matter.

tests/test_memory.py compares with what training really keeps: the estimate is within a factor of 1.5.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from amt.models.network import Network
from amt.models.pool import adapted_layers

FLOAT = 4  # bytes
_HALF = 2.4  # of a value kept in mixed precision, where some stay float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the memory of a step of training, besides the network: the flags of main.py, the members
    of the pool, how many levels go in one pass (`at_once`), and the images of an episode."""

    method: str
    tune: str
    members: int
    at_once: int
    support: int
    query: int
    micro_batch: int | None = None
    grad_checkpointing: bool = False


def needed(network: Network, plan: Plan) -> int:
    """Bytes that a step of training needs at its peak, the network and the pool included."""
    return int(_of_weights(network, plan) + _of_images(network, plan) + _of_passes(network, plan))


def _of_passes(network: Network, plan: Plan) -> float:
    """What passes keep for the gradient."""
    module: Any = network.module
    blocks = list(module.blocks)
    linear = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    whole = sum(part.in_features + part.out_features for part in linear)
    block = whole / len(blocks)
    tokens = (network.image_size // network.patch_size) ** 2 + getattr(module, "num_prefix_tokens", 1)
    unit = plan.at_once * tokens * (FLOAT if network.autocast is None else _HALF)
    between = module.num_features * len(blocks)
    kept, moving = (between, 1.5 * block) if plan.grad_checkpointing else (whole, block / 2)
    most = plan.micro_batch or plan.support + 2 * plan.query
    # The moments when most is kept: images of the passes that wait, and of those a gradient goes through.
    moments = {
        "adsv": [
            ((plan.support, plan.query, plan.query), (plan.query,)),
            ((plan.support, 2 * plan.query), (plan.support, 2 * plan.query)),
        ],
        "querying": [((plan.support, plan.query), (plan.support, plan.query))],
        "standard": [((plan.support + plan.query,), (plan.support + plan.query,))],
    }[plan.method]

    def at(waiting: Sequence[int], gone_through: Sequence[int]) -> float:
        """Passes of up to `most` images are kept whole, of larger ones a part at a time."""
        whole_ones = sum(images for images in waiting if images <= most)
        part = most if max(gone_through) > most else 0
        return kept * (whole_ones + part) + moving * min(max(gone_through), most)

    return unit * max(at(*moment) for moment in moments)


def _of_weights(network: Network, plan: Plan) -> float:
    """The network, the pool, its gradients and momentum, and the weights of passes."""
    weights = network.weights
    total = sum(weight.numel() for weight in weights.values())
    if network.takes_factors:  # merged weights have no graph: those of support and queries, and moved ones
        copies = 2 if plan.method == "adsv" else 1
    else:  # each with its own, and gradients, which wait for the last part
        parted = plan.micro_batch is not None and plan.micro_batch < max(plan.support, plan.query)
        copies = {"adsv": 3, "querying": 2, "standard": 1}[plan.method] + (2 if parted else 1)
    if plan.tune == "full":  # members, gradients, momentum; weights that have moved, and their gradient
        moved = 2 if plan.method == "adsv" else 0
        return FLOAT * total * (1 + 3 * plan.members + moved * plan.at_once)
    adapted = sum(weights[name].numel() for name in adapted_layers(weights))
    return FLOAT * (total + adapted * (1 + copies * plan.at_once))


def _of_images(network: Network, plan: Plan) -> float:
    """Queries, their start, as they are attacked, and what one attack step keeps of them."""
    part = min(plan.micro_batch or plan.query, plan.query)
    attacked = 0 if plan.method == "standard" else 4 * plan.query + 8 * part
    pixels = 3 * network.image_size**2
    return FLOAT * pixels * (plan.support + plan.query + plan.at_once * (plan.support + attacked))
