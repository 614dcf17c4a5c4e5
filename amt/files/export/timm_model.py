"""timm: the call that makes a network which takes our weights, and the state dict it takes."""

from typing import NamedTuple

from amt.files.export.merged import MergedNetwork, at_image_size
from amt.models.architectures import PROJECTION, TIMM, one_qkv, timm_name
from amt.models.network import Network
from amt.models.weights import Weights


class TimmCall(NamedTuple):
    """The arguments of `timm.create_model` for a network that takes our weights."""

    name: str
    options: dict[str, int | float | bool]

    def __str__(self) -> str:
        words = (f"{key}={value!r}" for key, value in self.options.items())
        return f"timm.create_model({', '.join([repr(self.name), *words])})"


_TIMM_SHAPES = {
    "vit_small_patch16_224": (16, 384, 12, 6, 4.0),
    "vit_base_patch16_224": (16, 768, 12, 12, 4.0),
}
_TIMM_OPTIONS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


def timm_call(network: Network, image_size: int, classes: int = 0) -> TimmCall:
    """How timm makes the network for images of this size.

    Networks of our own table resize their position table by DINO's rule, which timm does not know: they are
    made for one image size, and their table is resized beforehand. timm's own take images of any size. With
    `classes` the network ends in a linear layer, called head.
    """
    if network.arch.startswith(TIMM):
        name, width = timm_name(network.arch)
        options = {"num_classes": classes or width or 0, "dynamic_img_size": True}
        return TimmCall(name, options | one_qkv(network.module))
    block, dim, depth = network.module.blocks[0], network.module.embed_dim, len(network.module.blocks)
    hidden = block.mlp.fc1.out_features
    # timm rounds dim * ratio down, and the quotient may have been rounded down before.
    ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim
    shape = network.patch_size, dim, depth, block.attn.num_heads, ratio
    options = {"num_classes": classes, "img_size": image_size}
    for name, known in _TIMM_SHAPES.items():
        if shape == known:
            return TimmCall(name, options)
    return TimmCall(next(iter(_TIMM_SHAPES)), options | dict(zip(_TIMM_OPTIONS, shape, strict=True)))


def timm_state(merged: MergedNetwork) -> Weights:
    """The merged network as the complete state dict of the model that `timm_call` names.

    In timm's order, float32; the position table is already resized where timm would do it by another rule. A
    linear head is its last layer.
    """
    weights = at_image_size(merged.network, merged.weights)
    linear = merged.linear
    head = {} if linear is None else {"head.weight": linear.weight, "head.bias": linear.bias}
    if linear is not None and PROJECTION in weights:  # timm's network has one last layer: the product of both
        head = {
            "head.weight": linear.weight @ weights[PROJECTION],
            "head.bias": linear.weight @ weights["head.bias"] + linear.bias,
        }
    state = merged.network.module.state_dict()
    return {name: weights.get(name, tensor).contiguous() for name, tensor in state.items()} | head
