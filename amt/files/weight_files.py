"""Tensors out of files that others wrote: safetensors and torch.save, told apart by what is in them.

A file never gets to run anything. Of a pickle all names are read first, and unless every one of them is in a
short list (tensors, dictionaries, argparse.Namespace, numbers, arrays of them and the like) the file is
refused. Then the pickle is rehearsed, which makes nothing (see `pickles`), and only then torch reads it with
weights_only. No number in a file is believed before it has been compared with the file's size. Knows no
network and no name of a tensor.
"""

import argparse
import dataclasses
import io
import pickle
import re
import shlex
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

import safetensors
import torch
from torch import Tensor

from amt.data import numpy_pickles
from amt.files import digests, pickles
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, blaming, damaged, printable, strerror
from meta_dataset_readers.files import reading, size_of

# The only kinds of numbers a weight may have; the smaller ones are widened, which is exact.
_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)

# How the Hugging Face Hub names what a large network is cut into, and the list of it.
_ONE_OF_SEVERAL = re.compile(r".+-\d{5}-of-(?!00001)\d{5}\..+|.+\.index\.json")

_LARGEST_HEADER = 100_000_000  # of a safetensors file, in bytes

# torch's format until version 1.5: pickles of this number, of the format's version, of the writing machine,
# of what was saved and of the keys of its storages; then the storages in that order, each after its count.
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_PICKLES = 5
_OLD_COUNT = 8  # bytes


@dataclasses.dataclass(frozen=True)
class Content:
    """What a file holds.

    Args:
        container: "safetensors", or "torch" for a file of torch.save.
        data: its tensors by name; of a torch file the dictionary that was saved, nested as it was.
        header: the texts in the header of a safetensors file.
        verified: the checksums that were compared with all of the file's tensors; "" where it has none.
    """

    container: str
    data: dict[str, Any]
    header: dict[str, str]
    verified: str = ""


def read(path: Path, what: str = "file", trust: bool = False) -> Content:
    """Everything in a safetensors or torch file, on the CPU; its name's ending is not looked at.

    Args:
        what: what a missing file is called, such as "checkpoint".
        trust: let the file run what it likes while it is read: for files of one's own, in a place where
            nothing can be lost.

    Raises:
        InputError: the file is missing, empty, truncated, damaged, of another kind, or asks for more than
            tensors and plain values.
    """
    size = size_of(path, what=what)
    if _ONE_OF_SEVERAL.fullmatch(path.name):
        raise InputError(
            f"{path}: a network in several files, expected one: load it by transformers, and save it by "
            'save_pretrained(FOLDER, max_shard_size="999GB")'
        )
    with blaming(f"{path}: cannot be read", OSError, strerror):
        with reading(path) as file:
            start = file.read(512)
        kind = _kind(path, size, start)
        if kind == "safetensors":
            return _read_safetensors(path)
        if trust:
            return Content("torch", _as_dictionary(path, _unpickle_anything(path)), {})
        verified = ""
        if kind == "zip":
            _check_archive(path)
            verified = "CRC-32"
        elif start.startswith(_OLD_TORCH):
            _check_old(path)
        else:
            with path.open("rb") as file:
                _refuse(path, "a bare pickle", _names(path, file))
        return Content("torch", _as_dictionary(path, _read_torch(path)), {}, verified)


def _kind(path: Path, size: int, start: bytes) -> str:
    """Of which kind a file is that starts with these bytes: "safetensors", "zip" or "pickle"."""
    if size == 0:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "pickle"
    shown = start.lstrip()[:40].splitlines()[0].decode("latin-1") if start.strip() else ""
    if start.lstrip().startswith(b"<"):
        raise InputError(f"{path}: starts with {shown[:14]!r}, a web page, not weights")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: starts with {shown[:23]!r}, a Git LFS pointer in place of the weights")
    raise InputError(f"{path}: starts with {shown[:16]!r}, expected a safetensors or torch file")


def _read_safetensors(path: Path) -> Content:
    kinds = (safetensors.SafetensorError, AttributeError, TypeError, ValueError)  # for types that it lacks
    with (
        damaged(f"{path}: truncated or damaged safetensors file", kinds),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
    return Content("safetensors", data, header, "SHA-256" if digests.check(path, data, header) else "")


def _check_archive(path: Path) -> None:
    """Raise an `InputError` unless `path` is an archive as torch.save writes them: whole, nothing compressed,
    and its pickle harmless."""
    size = path.stat().st_size
    with damaged(f"{path}: truncated or damaged torch file"), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch finds entries whatever their case: there must not be a second one for it to find.
        found = [entry for entry in entries if re.fullmatch(r"(?i)[^/]+/data\.pkl", entry.filename)]
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise InputError(f"{path}: a TorchScript program, expected weights")
        if len(found) != 1:
            raise InputError(f"{path}: a zip archive without a data.pkl, expected a file of torch.save")
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise InputError(f"{path}: its entry {packed[0]!r} is compressed, torch.save never does that")
        claimed = sum(max(entry.file_size, entry.compress_size) for entry in entries)
        if claimed > size:
            raise InputError(f"{path}: its entries claim {claimed} bytes, the file has {size}")
        wrong = archive.testzip()
        if wrong is not None:
            raise InputError(f"{path}: damaged, the checksum of its entry {wrong!r} is wrong")
        stream = io.BytesIO(archive.read(found[0]))
    _check_names(path, "a torch file", _names(path, stream))
    stream.seek(0)
    _rehearse(path, "a torch file", stream)


def _check_old(path: Path) -> None:
    """Raise an `InputError` unless `path` is a file as torch.save wrote them before version 1.6: its pickles
    harmless, and all storages that they claim there, whole and nothing else."""
    what = "a torch file of the old format (before version 1.6)"
    with path.open("rb") as file:
        _check_names(path, what, set().union(*(_names(path, file) for _ in range(_OLD_PICKLES))))
        file.seek(0)
        *_, (_, storages), (keys, _) = [_rehearse(path, what, file) for _ in range(_OLD_PICKLES)]
        claimed = file.tell() + sum(_OLD_COUNT + each.count * each.size for each in storages.values())
    # torch would leave a storage that is not listed as it finds it in memory.
    if keys != sorted(storages):
        raise InputError(f"{path}: damaged torch file (its list of storages is not that of its tensors)")
    size = path.stat().st_size
    if claimed != size:
        raise InputError(f"{path}: truncated or damaged torch file ({claimed} bytes it says, not {size})")
    # A file can be this and a tar archive at a time, and torch would rather read the archive.
    with damaged(f"{path}: damaged torch file"):
        if tarfile.is_tarfile(path):
            raise InputError(f"{path}: a tar archive, expected a file of torch.save")


def _names(path: Path, stream: BinaryIO) -> set[str]:
    with damaged(f"{path}: truncated or damaged pickle", pickles.Damaged, said=printable):
        return pickles.names(stream)


def _check_names(path: Path, what: str, names: set[str]) -> None:
    if not names <= pickles.HARMLESS:
        _refuse(path, what, names)


def _rehearse(path: Path, what: str, stream: BinaryIO) -> tuple[Any, dict[str, pickles.Storage]]:
    try:
        with damaged(f"{path}: damaged torch file", pickles.Damaged, said=printable):
            return pickles.rehearse(stream)
    except pickles.Foreign as step:
        _refuse(path, what, {str(step)})


def _refuse(path: Path, what: str, names: set[str]) -> NoReturn:
    foreign = sorted(names - pickles.HARMLESS)
    shown = ", ".join(map(printable, foreign[:3])) + (" and more" if len(foreign) > 3 else "")
    raise InputError(
        f"{path}: {what}{' that asks for ' * bool(foreign)}{shown} is not read here, because such a file can "
        f"run any code; if you trust it, convert it in a safe place: "
        f"python -m amt checkpoint {shlex.quote(str(path))} --convert OUT.safetensors --trust"
    )


def _read_torch(path: Path) -> object:
    stand_ins = [
        argparse.Namespace,
        (set, "builtins.set"),
        (bytes, "builtins.bytes"),
        *numpy_pickles.STAND_INS,
    ]
    stand_ins += [(_path_as_text, name) for name in pickles.PATHS]
    with (
        damaged(f"{path}: damaged torch file"),
        path.open("rb") as file,
        torch.serialization.safe_globals(stand_ins),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a damaged file is told of once, as an error
        return torch.load(file, map_location="cpu", weights_only=True)


def _path_as_text(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _unpickle_anything(path: Path) -> object:
    with damaged(f"{path}: cannot be read even when trusted"), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=False)  # the file's own code runs here


def _as_dictionary(path: Path, found: object) -> dict[str, Any]:
    """What was saved, with networks that were saved whole replaced by their weights."""
    if isinstance(found, torch.nn.Module):
        found = {"state_dict": found}
    if not isinstance(found, Mapping):
        raise InputError(f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors")
    networks = {name: value for name, value in found.items() if isinstance(value, torch.nn.Module)}
    return dict(found) | {name: network.state_dict() for name, network in networks.items()}


def check_fit(
    path: Path | str, found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Weights:
    """`found` as contiguous float32 copies, if it is exactly what `shapes` says.

    Raises:
        InputError: tensors are missing, unexpected or of another shape (all such are listed), or a tensor
            is no dense one of floating-point numbers that float32 holds exactly, or holds NaN or infinity.
    """
    faults = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("lacks tensor", [name for name in shapes if name not in found]),
            ("holds unexpected tensor", [name for name in found if name not in shapes]),
        )
        if names
    ]
    faults += [
        f"tensor {printable(name)} has shape {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    if faults:
        more = f"; and {len(faults) - 5} more tensors of another shape" if len(faults) > 5 else ""
        raise InputError(f"{path}: {'; '.join(faults[:5])}{more}")
    return {name: _sound(path, name, found[name]) for name in shapes}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(printable, names[:10])) + more


def _sound(path: Path | str, name: str, tensor: Tensor) -> Tensor:
    name = printable(name)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in _EXACT_IN_FLOAT32:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{path}: tensor {name} is {kind}, expected float32 (or float16, bfloat16)")
    # A view can repeat its numbers: a handful of bytes would then fill any memory once it is copied.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{path}: tensor {name} claims {tensor.numel()} numbers, "
            f"the file holds {tensor.untyped_storage().nbytes()} bytes of it"
        )
    # A copy: names may share memory in a file, which must not reach what is written or trained.
    tensor = tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path}: tensor {name} holds values that are not finite")
    return tensor
