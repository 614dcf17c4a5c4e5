"""Ways out: what a pool has learnt, in the formats of other people's tools.

    timm        the merged network of one task as a state dict that timm's own model takes, in safetensors
    peft        one LoRA, or a merge of several, as an adapter of Hugging Face's PEFT for the timm model
    torch       the merged feature extractor as a torch.export program (.pt2): pixels in, features out
    onnx        the same for ONNX runtimes
    published   the pool, or one LoRA, as the authors' code saves it (.pth)

    ours, one adapted layer:   W_res + sum_p c_p B_p A_p           W_res = W - B_0 A_0
    PEFT, the same layer:      W + (sum_p c_p B_p A_p - B_0 A_0)   a LoRA of rank (k + 1) r for k adapters

Every file says what goes in, what comes out and how it was merged, in its own metadata (`amt_export`, JSON)
where the format has some, and in a README.txt beside it. Reads no file and chooses no coefficients; imports
neither PEFT nor, unless asked for it, ONNX.
"""

import dataclasses
import importlib
import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from amt.files.checkpoint import provenance
from amt.files.published import published_shapes
from amt.files.writing import replace_file
from amt.models.architectures import TIMM
from amt.models.heads import cosine_logits, prototypes
from amt.models.network import Network, features, resize_positions
from amt.models.pool import LoRAPool, Pool
from amt.models.weights import Coefficients, Trim, Weights
from meta_dataset_readers.errors import InputError

FORMATS = ("timm", "peft", "onnx", "torch", "published")
METADATA = "amt_export"  # the field that describes an exported file, as JSON

_ENDINGS = {"timm": ".safetensors", "torch": ".pt2"}  # by which timm and torch know what they read
_SELF_CONTAINED = ("onnx", "torch")  # formats that normalise pixels themselves, and classify

_ONNX_PACKAGES = ("onnx", "onnxscript")
_ONNX_LIMIT = 2**31 - 2**24  # bytes of weights in one file, with some room for the graph
_SAME_NETWORK = 1e-5  # largest distance, relative to W, of W - W_res from rank r: far above float32 rounding


@dataclasses.dataclass(frozen=True)
class Support:
    """The labelled images of one task.

    Args:
        images: (S, 3, H, W) float32 in [0, 1].
        labels: (S,) int64 in 0..N-1.
        classes: the N names.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MergedNetwork:
    """The network of one task; `merged_network` makes it.

    Args:
        network: on the CPU; its image size is the one the export is made for.
        weights: complete weights by timm's names, the position table as pretrained.
        coefficients: one per adapter of the pool, summing to 1.
        trims: what was trimmed after merging.
        scale, bias: of the logits scale * (cosine + bias).
        classes, prototypes: the task's N names, and (N, D) mean features of its support images; or () and
            None for a network without a task.
    """

    network: Network
    weights: Weights
    coefficients: Coefficients
    trims: tuple[Trim, ...]
    scale: float
    bias: float
    classes: tuple[str, ...] = ()
    prototypes: Tensor | None = None


def merged_network(
    network: Network,
    pool: Pool,
    coefficients: Sequence[float],
    trims: Sequence[Trim] = (),
    support: Support | None = None,
) -> MergedNetwork:
    """The pool merged and trimmed as evaluation does it, with the prototypes of `support` if there is one.

    Args:
        network: the network of the pool; only its structure is used, not its weights.

    Raises:
        ValueError: another number of coefficients than adapters, or a sum other than 1.
    """
    network = dataclasses.replace(network, autocast=None)
    merged = pool.merged(coefficients, trims)
    weights = {name: tensor.detach() for name, tensor in merged.weights.items()}
    classes, centres = (), None
    if support is not None:
        classes = support.classes
        with torch.no_grad():
            centres = prototypes(features(network, weights, support.images), support.labels, len(classes))
    shares = tuple(float(c) for c in coefficients)
    return MergedNetwork(
        network, weights, shares, tuple(trims), float(merged.scale), float(merged.bias), classes, centres
    )


def save(path: Path, to: str, merged: MergedNetwork, pool: Pool) -> list[Path]:
    """Write `network` in the format `to` ("timm", "peft", "onnx" or "torch") with all that belongs to it.

    Beside a file PATH lie PATH.README.txt and, if the network has prototypes, PATH.prototypes.safetensors; a
    PEFT adapter is a folder that holds both. Every file, and the folder as a whole, appears at once or not
    at all.

    Args:
        path: a file, which is replaced if it is there; for "peft" a folder that is empty or not there.
        pool: what `network` was merged from.

    Returns:
        The paths written, that of `path` first.

    Raises:
        InputError: `check_place`, `peft_adapter` or `onnx_model` complains, or the disk does.
    """
    check_place(path, to)
    about = describe(merged, to)
    if to == "peft":
        return _save_peft(path, merged, pool, about)
    if to == "timm":
        content = serialise(timm_state(merged), metadata=_metadata(about))
    elif to == "onnx":
        content = onnx_model(merged)
    else:
        content = _torch_bytes(merged)
    return _save_beside(path, content, merged, about)


def save_published(path: Path, pool: Pool, adapter: int | None = None) -> list[Path]:
    """Write `published_state` as the published code does, under the key `model`, with a README.txt beside it.

    Returns:
        The paths written, that of `path` first.

    Raises:
        InputError: `check_place` or `published_state` complains, or the disk does.
    """
    check_place(path, "published")
    buffer = io.BytesIO()
    torch.save({"model": published_state(pool, adapter)}, buffer)
    replace_file(path, lambda part: part.write_bytes(buffer.getvalue()))
    readme = path.with_name(f"{path.name}.README.txt")
    replace_file(readme, lambda part: part.write_text(_published_readme(path, pool, adapter)))
    return [path, readme]


def check_kind(pool: Pool, to: str, where: str = "the pool") -> None:
    """Raise an `InputError`, which begins with `where`, if this kind of pool has no place in the format."""
    if to in ("peft", "published") and not isinstance(pool, LoRAPool):
        raise InputError(
            f"{where} holds complete networks, and --to {to} takes LoRAs only; expected timm, onnx or torch"
        )


def check_place(path: Path, to: str) -> None:
    """Raise an `InputError` if `path` is no place for an export in this format."""
    if to == "peft":
        try:
            taken = os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if taken:
            raise InputError(f"{path}: is there already, expected a new or an empty folder for the adapter")
    elif path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file")
    elif not path.name.endswith(ending := _ENDINGS.get(to, "")):
        raise InputError(f"{path}: expected a name that ends in {ending}, as {to} reads no other")


# timm


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


def timm_call(network: Network, image_size: int) -> TimmCall:
    """How timm makes the network for images of this size.

    Networks of our own table resize their position table by DINO's rule, which timm does not know: they are
    made for one image size, and their table is resized beforehand. timm's own take images of any size.
    """
    if network.arch.startswith(TIMM):
        return TimmCall(network.arch.removeprefix(TIMM), {"num_classes": 0, "dynamic_img_size": True})
    block, dim, depth = network.module.blocks[0], network.module.embed_dim, len(network.module.blocks)
    hidden = block.mlp.fc1.out_features
    # timm rounds dim * ratio down, and the quotient may have been rounded down before.
    ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim
    shape = network.patch_size, dim, depth, block.attn.num_heads, ratio
    options = {"num_classes": 0, "img_size": image_size}
    for name, known in _TIMM_SHAPES.items():
        if shape == known:
            return TimmCall(name, options)
    return TimmCall(next(iter(_TIMM_SHAPES)), options | dict(zip(_TIMM_OPTIONS, shape, strict=True)))


def timm_state(merged: MergedNetwork) -> Weights:
    """The merged network as the complete state dict of the model that `timm_call` names.

    In timm's order, float32; the position table is already resized where timm would do it by another rule.
    """
    weights = _at_image_size(merged.network, merged.weights)
    return {
        name: weights.get(name, tensor).contiguous()
        for name, tensor in merged.network.module.state_dict().items()
    }


def _at_image_size(network: Network, weights: Weights) -> Weights:
    """The weights with the position table that `features` would use, so that nothing is left to resize."""
    if network.module.dynamic_img_size:
        return weights
    grid = network.image_size // network.patch_size
    return weights | {"pos_embed": resize_positions(weights["pos_embed"], (grid, grid))}


# PEFT


def peft_adapter(network: Network, pool: Pool, coefficients: Sequence[float]) -> tuple[dict, Weights]:
    """An adapter that makes the pretrained network into the merged one: PEFT's config and tensors.

    PEFT adds to the pretrained W, our factors to the residual W_res = W - B_0 A_0 that all adapters share. So
    the adapter holds the k merged pairs and minus the pair B_0 A_0, which is found again as W - W_res. A
    fused qkv has three groups of rank r; they become one LoRA of three times the rank, B block-diagonal.

        A (g R, in),  B (out, g R),  R = (k + 1) r;   scaling alpha / rank = 1 in every layer

    Such adapters of one pool may be mixed in PEFT, by weights that sum to 1 (`combination_type="cat"`).

    Args:
        network: the network with the pretrained weights that the pool was trained from.
        coefficients: one per adapter, summing to 1; those that are 0 take no rank.

    Returns:
        What adapter_config.json holds, and the tensors of adapter_model.safetensors, float32.

    Raises:
        InputError: the pool is none of LoRAs, or was not trained from these pretrained weights.
        ValueError: another number of coefficients than adapters.
    """
    check_kind(pool, "peft")
    chosen = [(p, float(c)) for p, c in zip(range(len(pool)), coefficients, strict=True) if c != 0]
    pretrained, tensors, ranks = network.weights, {}, {}
    for name, weight in pretrained.items():
        if name not in pool.A:
            if not torch.allclose(pool.residual[name], weight, rtol=_SAME_NETWORK, atol=_SAME_NETWORK):
                raise _other_network(name)
            continue
        A0, B0 = _removed(name, weight, pool)
        A = torch.cat([*(pool.A[name][p].double() for p, _ in chosen), A0], dim=1)
        B = torch.cat([*(c * pool.B[name][p].double() for p, c in chosen), -B0], dim=2)
        layer = name.removesuffix(".weight")
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A.flatten(0, 1).float()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.block_diag(*B).float()
        ranks[layer] = A.shape[0] * A.shape[1]
    usual = min(ranks.values())
    unusual = {layer: rank for layer, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": list(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return config, tensors


def _removed(name: str, weight: Tensor, pool: LoRAPool) -> tuple[Tensor, Tensor]:
    """A_0 (g, r, in) and B_0 (g, out/g, r) with B_0 A_0 = W - W_res, in double precision."""
    groups, rank = pool.A[name].shape[1:3]
    difference = (weight.double() - pool.residual[name].double()).reshape(groups, len(weight) // groups, -1)
    U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
    if S[:, rank:].norm() > _SAME_NETWORK * weight.norm():
        raise _other_network(name)
    return Vh[:, :rank], U[:, :, :rank] * S[:, None, :rank]


def _other_network(name: str) -> InputError:
    return InputError(
        f"{name}: the pool was not trained from these pretrained weights, so no adapter for them equals it; "
        "name its own by --pretrained_checkpoint"
    )


# torch.export and ONNX


class _Extractor(nn.Module):
    """`features` of one network as a module, which is what torch.export takes."""

    def __init__(self, merged: MergedNetwork):
        super().__init__()
        self.network, self.head = merged.network, (merged.scale, merged.bias)
        weights = _at_image_size(merged.network, merged.weights)
        self.buffer_of = {name: name.replace(".", "/") for name in weights}  # their names must have no dots
        for name, buffer in self.buffer_of.items():
            self.register_buffer(buffer, weights[name])
        self.register_buffer("prototypes", merged.prototypes)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        weights = {name: getattr(self, buffer) for name, buffer in self.buffer_of.items()}
        found = features(self.network, weights, images)
        if self.prototypes is None:
            return (found,)
        return found, cosine_logits(found, self.prototypes, *self.head)


def exported_program(merged: MergedNetwork) -> torch.export.ExportedProgram:
    """The feature extractor, normalisation and position table included, as one program for any batch.

    Its input `images` is (N, 3, S, S) float32 in [0, 1] with S the backbone's image size and N at least 1; it
    returns a tuple of the features (N, D) and, if the network has prototypes, the logits (N, classes).
    """
    side = merged.network.image_size
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(
            _Extractor(merged).eval(), (torch.zeros(2, 3, side, side),), dynamic_shapes=({0: batch},)
        )
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names files of the machine that exported
    return program


def _torch_bytes(merged: MergedNetwork) -> bytes:
    buffer = io.BytesIO()
    extra = {f"{METADATA}.json": json.dumps(describe(merged, "torch"))}
    torch.export.save(exported_program(merged), buffer, extra_files=extra)
    return buffer.getvalue()


def onnx_model(merged: MergedNetwork) -> bytes:
    """`exported_program` as an ONNX file: input `images`, outputs `features` and, if any, `logits`.

    Raises:
        InputError: the packages for it are not installed, or the network exceeds what one file may hold.
    """
    try:
        for package in _ONNX_PACKAGES:
            importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"ONNX cannot be written without {error.name}: pip install {' '.join(_ONNX_PACKAGES)}"
        ) from error
    size = sum(tensor.nbytes for tensor in merged.weights.values())
    if size > _ONNX_LIMIT:
        raise InputError(f"{size} bytes of weights exceed the 2 GiB of an ONNX file; export to torch instead")
    model = torch.onnx.export(
        exported_program(merged),
        input_names=["images"],
        output_names=["features"] if merged.prototypes is None else ["features", "logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model.model.metadata_props.update(_metadata(describe(merged, "onnx")))
    return model.model_proto.SerializeToString()


# The published layouts


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
    weights = pool.residual
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
    for name, factor in pool.factors.items():
        layer = f"{prefix}{name.replace('.weight.lora_', '.lora_')}"
        state |= {f"{layer}{number}": factor[p].flatten(0, 1) for number, p in numbers.items()}
    for name in sorted(state.keys() | shapes.keys()):
        found = tuple(state[name].shape) if name in state else "absent"
        expected = shapes.get(name, "absent")
        if found != expected:
            raise InputError(f"tensor {name} is {found}, the published code has it {expected}")
    # Tensors that are views would be saved with all that they are views of.
    return {name: state[name].detach().float().clone() for name in shapes}


# What is said about an export


def describe(merged: MergedNetwork, to: str) -> dict:
    """What somebody needs to use the export, as plain JSON values; `amt_export` in its metadata."""
    network = merged.network
    return {
        "format": to,
        "arch": network.arch,
        "input": "RGB in [0, 1]" if to in _SELF_CONTAINED else "normalised: (RGB in [0, 1] - mean) / std",
        "image_size": network.image_size,
        "mean": list(network.mean),
        "std": list(network.std),
        "features": network.module.num_features,
        "coefficients": list(merged.coefficients),
        "trims": [dataclasses.asdict(trim) for trim in merged.trims],
        "scale": merged.scale,
        "bias": merged.bias,
        "classes": list(merged.classes),
        **provenance(),
    }


def _metadata(about: dict) -> dict[str, str]:
    return {METADATA: json.dumps(about)}


def _readme(merged: MergedNetwork, about: dict, loading: Sequence[str], prototypes_file: str) -> str:
    """The text beside an export: what goes in, how to load it, how to classify."""
    inside = about["format"] in _SELF_CONTAINED
    side = about["image_size"]
    seen = side if inside else _whole_patches(merged.network)
    task = merged.prototypes is not None
    output = f"features (N, {about['features']})"
    if inside and task:
        output += f" and logits (N, {len(merged.classes)})"
    lines = [
        f"A network of the kind {about['arch']}, merged from a meta-tuned pool.",
        "",
        f"input         float32 (N, 3, {seen}, {seen}), {about['input']}",
        f"mean, std     {_numbers(about['mean'])}; {_numbers(about['std'])}{' (applied inside)' * inside}",
        f"output        {output}",
        f"coefficients  {_numbers(about['coefficients'])} (one for each member of the pool)",
        f"scale, bias   {_numbers([about['scale'], about['bias']])}",
    ]
    if merged.trims:
        shown = (f"{trim.layer}:{trim.block}:{trim.keep:g}" for trim in merged.trims)
        lines.append(f"trimmed       {', '.join(shown)}")
    if merged.classes:
        lines.append(f"classes       {json.dumps(merged.classes, ensure_ascii=False)}")
    lines += [
        "",
        f"Pictures were resized to {side * 256 // 224} px on the shorter side (bilinear), then their centre.",
    ]
    if seen < side:
        lines.append(f"Of its {side} rows and columns the first {seen} are taken, which are whole patches.")
    lines += [
        "",
        "Load it:",
        "",
        *(f"    {line}" for line in loading),
        "",
        "Classify: the largest logit wins,",
        "",
        f"    logits = {about['scale']!r} * (cosine(features, prototypes) + {about['bias']!r})",
        "",
        "where the prototype of a class is the mean feature of its support images.",
    ]
    if task:
        lines.append(
            f"Those of the classes above, in this order, are the tensor prototypes of {prototypes_file}."
        )
    return "\n".join(lines) + "\n"


def _whole_patches(network: Network) -> int:
    """The image side that the network sees of the side that pictures have."""
    return network.image_size - network.image_size % network.patch_size


def _loading(to: str, merged: MergedNetwork, path: Path) -> list[str]:
    """Lines of Python that load an export and compute features."""
    if to == "timm":
        return [
            "import timm",
            "from safetensors.torch import load_file",
            f"network = {timm_call(merged.network, _whole_patches(merged.network))}.eval()",
            f"network.load_state_dict(load_file({path.name!r}))",
            "features = network(images)",
        ]
    names = "features," if merged.prototypes is None else "features, logits"
    if to == "torch":
        return [
            "import torch",
            f"network = torch.export.load({path.name!r}).module()",
            f"{names} = network(images)",
        ]
    return [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({path.name!r})",
        f'{names} = session.run(None, {{"images": images}})',
    ]


def _loading_peft(merged: MergedNetwork, path: Path, pretrained_size: int, resized: bool) -> list[str]:
    network = merged.network
    lines = [
        "import timm",
        "from peft import PeftModel",
        *(["from safetensors.torch import load_file"] if resized else []),
        f"network = {timm_call(network, pretrained_size)}",
        f"network.load_state_dict(...)  # the pretrained weights of {network.arch}, as they are",
    ]
    if resized:  # timm's rule, and then DINO's in its place
        lines += [
            f"network.set_input_size(img_size={_whole_patches(network)})",
            f"network.load_state_dict(load_file('{path.name}/positions.safetensors'), strict=False)",
        ]
    return lines + [
        f"network = PeftModel.from_pretrained(network, {path.name!r}).eval()",
        "features = network(images)",
    ]


def _published_readme(path: Path, pool: LoRAPool, adapter: int | None) -> str:
    what = "a pool" if adapter is None else f"LoRA {adapter} of a pool, as a training of a single LoRA"
    chosen = range(len(pool)) if adapter is None else [adapter]
    lines = [
        f"{path.name}: {what}, in the layout of the published AMT code (xyang583/AMT).",
        "",
        f"LoRAs         {len(chosen)} of rank {pool.rank}, trained for epsilon "
        f"{_numbers([pool.levels[p].epsilon for p in chosen])} (of 255)",
        f"scale         {_numbers([float(pool.scale[p]) for p in chosen])}; "
        f"bias {_numbers([float(pool.bias[p]) for p in chosen])}",
    ]
    if len(chosen) > 1:
        lines.append("              The file has one of each, their mean. No prediction depends on it.")
    lines += ["", "The published code itself is written for rank 8, and for pools of four LoRAs."]
    return "\n".join(lines) + "\n"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


# Writing


def _prototypes_bytes(merged: MergedNetwork, about: dict) -> bytes:
    """The task's classifier: `prototypes` (N, D), `scale` (1,) and `bias` (1,), class names in the header."""
    tensors = {
        "prototypes": merged.prototypes.contiguous(),
        "scale": torch.tensor([merged.scale]),
        "bias": torch.tensor([merged.bias]),
    }
    return serialise(tensors, metadata=_metadata(about))


def _save_beside(path: Path, content: bytes, merged: MergedNetwork, about: dict) -> list[Path]:
    readme, beside = (
        path.with_name(f"{path.name}.{kind}") for kind in ("README.txt", "prototypes.safetensors")
    )
    text = _readme(merged, about, _loading(about["format"], merged, path), beside.name)
    files = {path: content, readme: text.encode()}
    if merged.prototypes is not None:
        files[beside] = _prototypes_bytes(merged, about)
    for file, data in files.items():
        replace_file(file, lambda part, data=data: part.write_bytes(data))
    if beside not in files:
        beside.unlink(missing_ok=True)  # of an earlier export to this name: another network's
    return list(files)


def _save_peft(path: Path, merged: MergedNetwork, pool: Pool, about: dict) -> list[Path]:
    if merged.trims:
        raise InputError("a trimmed network is no low-rank change of the pretrained one: PEFT cannot hold it")
    config, tensors = peft_adapter(merged.network, pool, merged.coefficients)
    network, table = merged.network, merged.weights.get("pos_embed")
    positions = _at_image_size(network, merged.weights).get("pos_embed")
    resized = positions is not table
    tokens_per_side = math.isqrt(table.shape[1] - 1) if resized else network.image_size // network.patch_size
    pretrained_size = tokens_per_side * network.patch_size
    text = _readme(
        merged,
        about,
        _loading_peft(merged, path, pretrained_size, resized),
        f"{path.name}/prototypes.safetensors",
    )
    files = {
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "adapter_model.safetensors": serialise(tensors, metadata={"format": "pt", **_metadata(about)}),
        "README.txt": text.encode(),
    }
    if resized:
        files["positions.safetensors"] = serialise({"pos_embed": positions.contiguous()})
    if merged.prototypes is not None:
        files["prototypes.safetensors"] = _prototypes_bytes(merged, about)
    _write_folder(path, files)
    return [path, *(path / name for name in files)]


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` with these files in one step; one that holds anything is left as it is.

    Raises:
        InputError: the place cannot be written to.
    """
    part = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        for name, content in files.items():
            (part / name).write_bytes(content)
        os.replace(part, folder)  # which takes the place of an empty folder, but not of any other
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
