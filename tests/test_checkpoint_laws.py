"""Laws of checkpoints: what was saved comes back, and what is wrong is said in one line."""

import json
import math
import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from conftest import moved_apart
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from toy_pools import ARCH, RANK, assert_identical, few, tensors

from amt.files import checkpoint as checkpoints
from amt.files import digests
from amt.files.checkpoint import Checkpoint
from amt.files.digests import serialise
from meta_dataset_readers import files
from meta_dataset_readers.errors import InputError


@pytest.fixture
def saved(tmp_path, pool):
    path = tmp_path / "pool.safetensors"
    checkpoints.save(path, Checkpoint(pool, {"arch": "tiny", "seed": 3}, {"0.scale": torch.ones(1)}))
    return path


def rewritten(path: Path, header=None, **changes: Tensor | None) -> None:
    """Write the file again with another header, or with tensors changed or (None) left out.

    The header is a text, all metadata as a dictionary, or a function of what was there.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        contents = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    contents = {name: tensor for name, tensor in (contents | changes).items() if tensor is not None}
    if callable(header):
        metadata = {"amt": json.dumps(header(json.loads(metadata["amt"])))}
    elif isinstance(header, str):
        metadata = {"amt": header}
    elif header is not None:
        metadata = header
    metadata = {field: text for field, text in metadata.items() if field != digests.FIELD}
    path.write_bytes(serialise(contents, metadata))


def test_a_checkpoint_gives_back_what_was_saved(saved, pool):
    found = checkpoints.load(saved)
    assert_identical(tensors(found.pool), tensors(pool))
    assert_identical(found.pool.residual, pool.residual)
    assert found.pool.levels == pool.levels
    assert found.about == {"arch": "tiny", "seed": 3}
    assert_identical(found.momentum, {"0.scale": torch.ones(1)})
    assert json.loads(saved.with_suffix(".json").read_text())["arch"] == "tiny"


def test_one_adapter_of_a_pool_can_be_saved(tmp_path, pool):
    path = tmp_path / "deep" / "er" / "one.safetensors"
    checkpoints.save(path, Checkpoint(pool[1], {}))
    assert_identical(tensors(checkpoints.load(path).pool), tensors(pool[1]))


def assert_one_line(path, *words: str) -> None:
    with pytest.raises(InputError) as raised:
        checkpoints.load(path)
    text = str(raised.value)
    assert str(path) in text and "\n" not in text
    for word in words:
        assert word in text


def test_a_missing_checkpoint_is_said_in_one_line(tmp_path):
    assert_one_line(tmp_path / "none.safetensors", "no such")
    assert_one_line(tmp_path, "is a folder, expected a regular file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n" * 20,
        b"\x00" * 64,
        b"\x80\x02}q.",
    ],
    ids=["empty", "one byte", "html", "zeros", "pickle"],
)
def test_a_file_of_another_kind_is_said_in_one_line(tmp_path, content):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    assert_one_line(path, "safetensors")


@few
@given(share=st.floats(0, 0.999))
def test_a_truncated_checkpoint_is_said_in_one_line(pool, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "pool.safetensors"
    checkpoints.save(path, Checkpoint(pool, {}))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_one_line(path, "safetensors")


def level_with(**changes):
    def change(about: dict) -> dict:
        return about | {"levels": [about["levels"][0] | changes, *about["levels"][1:]]}

    return change


@pytest.mark.parametrize(
    "header",
    [
        {"other": "{}"},
        "no json",
        "[]",
        "{}",
        lambda about: about | {"format": 99},
        lambda about: {key: value for key, value in about.items() if key != "levels"},
        lambda about: about | {"levels": 3},
        lambda about: about | {"levels": [1, 2, 3]},
        lambda about: about | {"levels": about["levels"][:2]},
        level_with(nonsense=1),
        level_with(epsilon="eight"),
        level_with(steps=None),
        level_with(grids=[4, "x", 0]),
    ],
    ids=[
        "other field",
        "no json",
        "list",
        "empty",
        "format",
        "no levels",
        "levels 3",
        "levels of numbers",
        "too few levels",
        "unknown setting",
        "epsilon in words",
        "no steps",
        "grids in words",
    ],
)
def test_a_wrong_header_is_said_in_one_line(saved, header):
    rewritten(saved, header)
    assert_one_line(saved)


QKV = "factors/blocks.0.attn.qkv.weight.lora_"


@pytest.mark.parametrize(
    "changes",
    [
        {QKV + "A": None},
        {QKV + "B": None},
        {QKV + "A": torch.ones(3, 3, RANK, ARCH.dim + 1)},
        {QKV + "A": torch.ones(3, 3, RANK + 1, ARCH.dim)},
        {QKV + "A": torch.ones(2, 3, RANK, ARCH.dim)},
        {QKV + "A": torch.ones(RANK, ARCH.dim)},
        {QKV + "B": torch.ones(3, 2, ARCH.dim, RANK)},
        {"residual/blocks.0.attn.qkv.weight": None},
        {"residual/blocks.0.attn.qkv.weight": torch.ones(5, 5)},
        {"residual/blocks.0.attn.qkv.weight": torch.tensor(1.0)},
        {"head/scale": None},
        {"head/scale": torch.ones(2)},
        {"head/bias": torch.ones(3, 1)},
        {"stray": torch.ones(1)},
        {"factors/blocks.9.attn.qkv.weight.lora_A": torch.ones(3, 3, RANK, ARCH.dim)},
    ],
    ids=lambda changes: ", ".join(
        f"{k}: {None if v is None else tuple(v.shape)}" for k, v in changes.items()
    ),
)
def test_tensors_that_form_no_pool_are_said_in_one_line(saved, changes):
    rewritten(saved, **changes)
    assert_one_line(saved)


@pytest.mark.parametrize("name", [QKV + "A", "residual/cls_token", "head/scale", "momentum/0.scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_said_in_one_line(saved, pool, name, value):
    room, _, rest = name.partition("/")
    tensor = {"head": pool.scale, "momentum": torch.ones(1)}.get(room)
    tensor = (pool.factors | pool.residual)[rest] if tensor is None else tensor
    broken = tensor.clone()
    broken.view(-1)[0] = value
    rewritten(saved, **{name: broken})
    assert_one_line(saved, name, "finite")


def disk_full_half_way(file: BinaryIO) -> None:
    file.truncate(file.tell() // 2)
    raise OSError(28, "No space left on device")


def no_replacing(source, target) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "owner, name, broken", [(files, "to_disk", disk_full_half_way), (os, "replace", no_replacing)]
)
def test_a_failed_write_leaves_the_old_file(saved, pool, monkeypatch, owner, name, broken):
    """And nothing beside it."""
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(InputError, match="No space left"):
        checkpoints.save(saved, Checkpoint(moved_apart(pool, 9), {}))
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_place_that_cannot_hold_files_is_said_in_one_line(saved, pool):
    with pytest.raises(InputError, match="cannot be written"):
        checkpoints.save(saved / "below.safetensors", Checkpoint(pool, {}))
