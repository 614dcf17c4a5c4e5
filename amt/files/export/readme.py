"""The text beside an export: what goes in, how to load it, how to classify."""

import json
from collections.abc import Sequence
from pathlib import Path

from amt.files.export.merged import SELF_CONTAINED, MergedNetwork, whole_patches
from amt.files.export.timm_model import timm_call
from amt.models.heads import Linear, WithTexts
from amt.models.pool import Pool


def export_readme(merged: MergedNetwork, about: dict, loading: Sequence[str], beside: str) -> str:
    """The text beside an export: what goes in, how to load it, how to classify.

    Args:
        beside: what the name of the file with the head begins with.
    """
    inside = about["format"] in SELF_CONTAINED
    side = about["image_size"]
    seen = side if inside else whole_patches(merged.network)
    task = merged.head is not None
    output = f"features (N, {about['features']})"
    if merged.linear is not None and about["format"] == "timm":
        output = f"logits (N, {len(merged.classes)})"
    elif inside and task:
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
        lines.append(f"trimmed       {', '.join(trim.name for trim in merged.trims)}")
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
        *_classifying(merged, about, beside),
    ]
    return "\n".join(lines) + "\n"


def _classifying(merged: MergedNetwork, about: dict, beside: str) -> list[str]:
    """How logits follow from features, and where the head's tensors are."""
    own, texts = merged.own, ""
    if isinstance(merged.head, WithTexts):
        texts = f" + {about['texts_scale']!r} * cosine(features, texts)"
    if isinstance(own, Linear):
        lines = [f"    logits = features @ weight.T + bias{texts}", ""]
        return [*lines, f"by the tensors of {beside}head.safetensors, classes in the order above."]
    centred = own is not None and own.origin is not None
    features = "features - origin" if centred else "features"
    also = ", less the origin" if centred else ", or the embedding of its text if it has none"
    lines = [
        f"    logits = {about['scale']!r} * (cosine({features}, prototypes) + {about['bias']!r}){texts}",
        "",
        f"where the prototype of a class is the mean feature of its support images{also}.",
    ]
    if merged.head is None:
        return lines
    file = f"{beside}prototypes.safetensors"
    what = "tensors prototypes and texts" if texts else "tensor prototypes"
    return [*lines, f"Those of the classes above, in this order, are the {what} of {file}."]


def loading_lines(to: str, merged: MergedNetwork, path: Path) -> list[str]:
    """Lines of Python that load an export and compute features."""
    if to == "timm":
        classes = 0 if merged.linear is None else len(merged.classes)
        call = timm_call(merged.network, whole_patches(merged.network), classes)
        return [
            "import timm",
            "from safetensors.torch import load_file",
            f"network = {call}.eval()",
            f"network.load_state_dict(load_file({path.name!r}))",
            f"{'logits' if classes else 'features'} = network(images)",
        ]
    names = "features," if merged.head is None else "features, logits"
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


def published_readme(path: Path, pool: Pool, adapter: int | None) -> str:
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
