"""Digests in the header of a safetensors file, so that a changed byte is noticed when the file is read.

    header    {"digests": '{"fields": {"amt": DIGEST}, "tensors": {"head/scale": DIGEST, ...}}', "amt": ...}
    DIGEST    the first 32 hexadecimal digits of SHA-256; a tensor's is of type, shape and numbers

Other readers of safetensors pass over the field. Files without it are read as before. Does not know what the
tensors are.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import TypedDict

from meta_dataset_readers.errors import InputError, printable
from meta_dataset_readers.files import parse_json
from meta_dataset_readers.json_fields import conform

FIELD = "digests"
_DIGITS = 32


class _Digests(TypedDict):
    fields: dict[str, str]
    tensors: dict[str, str]


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of contiguous tensors on the CPU, with `metadata` and the digests in its header."""
    text = json.dumps(_digests(tensors, metadata))
    return safetensors.torch.save(dict(tensors), metadata={**metadata, FIELD: text})


def check(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Compare what was read with the digests in the header; False if it has none. Raises InputError for the
    first tensor or field that differs, is missing or is not listed."""
    if FIELD not in metadata:
        return False
    where = f"{path}: damaged header field {FIELD!r}"
    listed = conform(where, parse_json(where, metadata[FIELD]), _Digests)
    found = _digests(tensors, {name: text for name, text in metadata.items() if name != FIELD})
    for what, group in (("header field", "fields"), ("tensor", "tensors")):
        for name in sorted(listed[group].keys() | found[group].keys()):
            if listed[group].get(name) != found[group].get(name):
                how = "is not there" if name not in found[group] else "is not as it was written"
                raise InputError(f"{path}: damaged: {what} {printable(name)} {how}; take another copy")
    return True


def _digests(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> _Digests:
    return {
        "fields": {name: _hashed(text.encode()) for name, text in metadata.items()},
        "tensors": {name: of_tensor(tensor) for name, tensor in tensors.items()},
    }


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """One digest of tensors of any shape and device, with their names."""
    found = {name: of_tensor(tensor.detach().cpu()) for name, tensor in sorted(tensors.items())}
    return _hashed(json.dumps(found).encode())


def of_tensor(tensor: Tensor) -> str:
    """The digest of a tensor on the CPU: of its type, shape and numbers."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return _hashed(kind, memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _hashed(*parts: bytes | memoryview) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:_DIGITS]
