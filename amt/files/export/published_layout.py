"""The layouts of the published code, written; `amt.files.published` reads them."""

from amt.files.export.merged import check_kind
from amt.files.published import published_shapes
from amt.models.pool import Pool
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError


def published_state(pool: Pool, adapter: int | None = None) -> Weights:
    """The state dict of the published code: of a pool, or with `adapter` that of a training of one LoRA.

    The published layouts have one scale and one bias: a pool gets the mean over its adapters. No prediction
    depends on them, as they move the logits of all classes alike; in everything else the way back through
    `published.pool_from_published` is exact.

    Raises:
        InputError: the pool is none of LoRAs, or its network or its adapted layers are not those of the
            published code.
    """
    check_kind(pool, "published")
    weights, loras = pool.residual, pool.factors
    if pool.whole:
        if adapter is None:
            raise InputError(
                "each LoRA of the pool has LayerNorms of its own, the published layout one set; name one "
                "LoRA by --adapter"
            )
        weights = weights | {name: norm[adapter] for name, norm in pool.whole.items()}
        loras = {name: factor for name, factor in loras.items() if name not in pool.whole}
    try:
        dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
        shapes = published_shapes(
            patch=patch,
            dim=dim,
            depth=sum(name.endswith(".attn.qkv.weight") for name in weights),
            hidden=len(weights["blocks.0.mlp.fc1.weight"]),
            tokens=weights["pos_embed"].shape[1],
            rank=pool.rank,
            adapters=len(pool) if adapter is None else None,
        )
    except KeyError as error:
        raise InputError(f"the published code has no networks without {error.args[0]}") from error
    # Published names count adapters where a pool is saved, and leave the number out for a single one.
    numbers = {f".{p}": p for p in range(len(pool))} if adapter is None else {"": adapter}
    prefix = "backbone.model." if adapter is None else "backbone."
    chosen = list(numbers.values())
    state = {
        "scale_cls": pool.scale[chosen].double().mean().float().reshape(1),
        "bias": pool.bias[chosen].double().mean().float().reshape(1),
        **{f"{prefix}{name}": weight for name, weight in weights.items()},
    }
    for name, factor in loras.items():
        layer = f"{prefix}{name.replace('.weight.lora_', '.lora_')}"
        state |= {f"{layer}{number}": factor[p].flatten(0, 1) for number, p in numbers.items()}
    for name in sorted(state.keys() | shapes.keys()):
        found = tuple(state[name].shape) if name in state else "absent"
        expected = shapes.get(name, "absent")
        if found != expected:
            raise InputError(
                f"tensor {name} is {found}, the published code has it {expected}: it has no such network; "
                "expected timm, peft, onnx or torch"
            )
    # Tensors that are views would be saved with all that they are views of.
    return {name: state[name].detach().float().clone() for name in shapes}
