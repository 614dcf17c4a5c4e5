"""Ways out: what a pool has learnt, in the formats of other people's tools.

    timm        the merged network of one task as a state dict that timm's own model takes, in safetensors; or
                as a folder that `timm.create_model("local-dir:FOLDER")` takes
    peft        one LoRA, or a merge of several, as an adapter of Hugging Face's PEFT for the timm model
    torch       the merged feature extractor as a torch.export program (.pt2): pixels in, features out
    onnx        the same for ONNX runtimes
    published   the pool, or one LoRA, as the authors' code saves it (.pth)

Every file says what goes in, what comes out and how it was merged, in its own metadata (`amt_export`, JSON)
where the format has some, and in a README.txt beside it. Reads no file and chooses no coefficients; imports
neither PEFT nor, unless asked for it, ONNX. Each format has a module of its own here.
"""

import io
import os
import shutil
from pathlib import Path

import torch

from amt.files.digests import serialise
from amt.files.export.merged import (
    HEAD_FILES,
    METADATA,
    MergedNetwork,
    as_metadata,
    check_kind,
    check_single,
    describe,
    head_files,
    merged_network,
)
from amt.files.export.peft import adapter_files, peft_adapter
from amt.files.export.programs import exported_program, onnx_model, torch_program
from amt.files.export.published_layout import published_state
from amt.files.export.readme import export_readme, loading_lines, published_readme
from amt.files.export.timm_folder import timm_folder
from amt.files.export.timm_model import timm_call, timm_state
from amt.models.pool import Pool
from meta_dataset_readers.errors import InputError, damaged, strerror
from meta_dataset_readers.files import replace_file

FORMATS = ("timm", "peft", "onnx", "torch", "published")

_ENDINGS = {"timm": ".safetensors", "torch": ".pt2"}  # by which timm and torch know what they read


def save(path: Path, to: str, merged: MergedNetwork, pool: Pool | None = None) -> list[Path]:
    """Write `network` in the format `to` ("timm", "peft", "onnx" or "torch") with all that belongs to it.

    Beside a file PATH lie PATH.README.txt and, if the network has a task's head, PATH.prototypes.safetensors
    or PATH.head.safetensors; a PEFT adapter is a folder that holds both. Every file, and the folder as a
    whole, appears at once or not at all.

    Args:
        path: a file, which is replaced if it is there; for "peft", and for "timm" if the name has no ending,
            a folder that is empty or not there.
        pool: what `merged` was merged from, which only "peft" needs.

    Returns:
        The paths written, that of `path` first.

    Raises:
        InputError: `check_place`, `peft_adapter` or `onnx_model` complains, or the disk does.
    """
    check_place(path, to)
    about = describe(merged, to)
    if is_folder(path, to):
        if to == "peft":
            assert pool is not None, "an adapter holds the factors of a pool"
            files = adapter_files(path, merged, pool, about)
        else:
            files = timm_folder(path, merged, about)
        write_folder(path, files)
        return [path, *(path / name for name in files)]
    if to == "timm":
        content = serialise(timm_state(merged), as_metadata(about))
    else:
        content = onnx_model(merged) if to == "onnx" else torch_program(merged)
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
    replace_file(path, buffer.getvalue())
    readme = path.with_name(f"{path.name}.README.txt")
    replace_file(readme, published_readme(path, pool, adapter))
    return [path, readme]


def check_place(path: Path, to: str) -> None:
    """Raise an `InputError` if an export in this format cannot be written to `path`."""
    if is_folder(path, to):
        with damaged(f"{path}: cannot be read", OSError, strerror):
            taken = os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))
        if taken:
            raise InputError(f"{path}: is there already, expected a new or an empty folder")
    elif path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file")
    elif not path.name.endswith(ending := _ENDINGS.get(to, "")):
        folder = ", or a folder's, without ending" if to == "timm" else ""
        raise InputError(f"{path}: expected a name that ends in {ending}, as {to} reads no other{folder}")


def is_folder(path: Path, to: str) -> bool:
    """Whether an export in this format to `path` is a folder."""
    return to == "peft" or (to == "timm" and not path.suffix)


def _save_beside(path: Path, content: bytes, merged: MergedNetwork, about: dict) -> list[Path]:
    readme = path.with_name(f"{path.name}.README.txt")
    text = export_readme(merged, about, loading_lines(about["format"], merged, path), f"{path.name}.")
    heads = {path.with_name(f"{path.name}.{name}"): data for name, data in head_files(merged, about).items()}
    files = {path: content, readme: text.encode(), **heads}
    for file, data in files.items():
        replace_file(file, data)
    for name in HEAD_FILES:
        beside = path.with_name(f"{path.name}.{name}")
        if beside not in files:
            beside.unlink(missing_ok=True)  # of an earlier export to this name: another network's
    return list(files)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
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
