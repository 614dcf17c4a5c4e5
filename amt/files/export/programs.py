"""torch.export and ONNX: pixels in, features (and the logits of a task) out. Imports ONNX only when asked."""

import importlib
import io
import json

import torch
from torch import Tensor, nn

from amt.files.export.merged import METADATA, MergedNetwork, as_metadata, at_image_size, describe
from amt.models.heads import mapped
from amt.models.network import features
from meta_dataset_readers.errors import InputError

_ONNX_PACKAGES = ("onnx", "onnxscript")
_ONNX_LIMIT = 2**31 - 2**24  # bytes of weights in one file, with some room for the graph


class _Extractor(nn.Module):
    """`features` of one network as a module, which is what torch.export takes."""

    def __init__(self, merged: MergedNetwork):
        super().__init__()
        self.network, self.head = merged.network, merged.head
        weights = at_image_size(merged.network, merged.weights)
        self.buffer_of = {name: name.replace(".", "/") for name in weights}  # their names must have no dots
        for name, buffer in self.buffer_of.items():
            self.register_buffer(buffer, weights[name])
        held: list[Tensor] = []
        if merged.head is not None:
            mapped(merged.head, lambda tensor: held.append(tensor) or tensor)
        self.of_head = [f"head/{number}" for number in range(len(held))]
        for buffer, tensor in zip(self.of_head, held, strict=True):
            self.register_buffer(buffer, tensor)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        weights = {name: getattr(self, buffer) for name, buffer in self.buffer_of.items()}
        found = features(self.network, weights, images)
        if self.head is None:
            return (found,)
        buffers = iter(self.of_head)
        return found, mapped(self.head, lambda _: getattr(self, next(buffers)))(found)


def exported_program(merged: MergedNetwork) -> torch.export.ExportedProgram:
    """The feature extractor, normalisation and position table included, as one program for any batch.

    Its input `images` is (N, 3, S, S) float32 in [0, 1] with S the network's image size and N at least 1; it
    returns a tuple of the features (N, D) and, if the network has a head, the logits (N, classes).
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


def torch_program(merged: MergedNetwork) -> bytes:
    """`exported_program` as a .pt2 file."""
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
        output_names=["features"] if merged.head is None else ["features", "logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model.model.metadata_props.update(as_metadata(describe(merged, "onnx")))
    return model.model_proto.SerializeToString()
