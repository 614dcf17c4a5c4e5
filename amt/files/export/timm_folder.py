"""timm's folder: what `timm.create_model("local-dir:FOLDER")` takes, or "hf-hub:ORG/NAME" once it is pushed.

config.json          timm's architecture, its arguments, and how pictures are prepared
model.safetensors    the merged network
README.md            the model card
"""

import json
from pathlib import Path

from amt.files.digests import serialise
from amt.files.export.merged import MergedNetwork, as_metadata, head_files, whole_patches
from amt.files.export.readme import export_readme
from amt.files.export.timm_model import timm_call, timm_state

_CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- adversarial-robustness
- image-classification
- timm
---

# {name}

"""


def timm_config(merged: MergedNetwork) -> dict:
    """What timm's config.json says, as plain JSON values."""
    network, side = merged.network, whole_patches(merged.network)
    classes = 0 if merged.linear is None else len(merged.classes)
    call = timm_call(network, side, classes)
    preparation = {
        "input_size": [3, side, side],
        "fixed_input_size": "img_size" in call.options,
        "interpolation": "bilinear",
        "crop_pct": 224 / 256,
        "crop_mode": "center",
        "mean": list(network.mean),
        "std": list(network.std),
    }
    options = {name: value for name, value in call.options.items() if name != "num_classes"}
    if "img_size" not in options:  # the table of a network that takes any size is not resized by loading it
        options["img_size"] = list(network.module.patch_embed.img_size)
    layers = {"first_conv": "patch_embed.proj", "classifier": "head"}
    outputs = call.options["num_classes"]  # of a projection, where there are no classes
    named = {"label_names": list(merged.classes)} if classes else {}
    return {
        "architecture": call.name,
        "num_classes": outputs,
        "num_features": network.module.num_features,
        "model_args": options,
        "pretrained_cfg": {"custom_load": False, "num_classes": outputs, **preparation, **layers},
        **named,
    }


def timm_folder(folder: Path, merged: MergedNetwork, about: dict) -> dict[str, bytes]:
    """The files that are to lie in `folder`, by name; `about` describes them."""
    name = folder.absolute().name
    outputs = "features" if merged.linear is None else "logits"
    loading = [
        "import timm",
        f"network = timm.create_model({f'local-dir:{folder.name}'!r}, pretrained=True).eval()",
        f"{outputs} = network(images)",
    ]
    card = _CARD.format(name=name) + export_readme(merged, about, loading, f"{folder.name}/")
    files = {
        "config.json": (json.dumps(timm_config(merged), indent=2) + "\n").encode(),
        "model.safetensors": serialise(timm_state(merged), {"format": "pt", **as_metadata(about)}),
        "README.md": card.encode(),
    }
    return files | head_files(merged, about)
