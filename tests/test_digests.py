"""Digests in checkpoints: a changed byte is refused in one line, or changes nothing that is read."""

import json
import random
from pathlib import Path

import pytest
import torch
from commands import called
from conftest import fails
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toy_pools import assert_identical, few

from amt.cli.checkpoint import main as describe
from amt.files import checkpoint, digests, weight_files
from amt.files.checkpoint import Checkpoint
from amt.files.digests import serialise
from meta_dataset_readers.errors import InputError

SAMPLE = 400  # positions of single-byte changes


def two_tensors() -> dict[str, torch.Tensor]:
    return {"head/scale": torch.arange(6.0).reshape(2, 3), "head/bias": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, two_tensors(), {"kind": "a fine-tuning", "tuner": {"epoch": 3}})
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pool) -> Path:
    path = tmp_path_factory.mktemp("digests") / "pool.safetensors"
    checkpoint.save(path, Checkpoint(pool, {"arch": "tiny", "seed": 3}, {"0.scale": torch.ones(1)}))
    return path


def is_refused_or_harmless(path: Path, sound: weight_files.Content) -> str:
    """What became of a damaged copy; raises for anything but one line or equal contents."""
    try:
        found = weight_files.read(path, "checkpoint")
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "refused"
    assert_identical(found.data, sound.data)
    assert found.header["amt"] == sound.header["amt"]
    return "harmless"


@pytest.fixture
def damaged(saved, tmp_path):
    """`damaged(position, value)`: what became of the pool's file with that byte there."""
    content, sound = saved.read_bytes(), weight_files.read(saved)

    def read(position: int, value: int) -> str:
        copy = tmp_path / "copy.safetensors"
        changed = bytearray(content)
        changed[position] = value
        copy.write_bytes(changed)
        return is_refused_or_harmless(copy, sound)

    return read


def test_a_changed_byte_is_refused_or_harmless(saved, damaged):
    content, draw = saved.read_bytes(), random.Random(5)
    length = int.from_bytes(content[:8], "little")
    places = draw.choices(range(8 + length), k=SAMPLE // 2)
    places += draw.choices(range(8 + length, len(content)), k=SAMPLE // 2)
    ends = [damaged(place, content[place] ^ 1 << draw.randrange(8)) for place in places]
    assert set(ends[SAMPLE // 2 :]) == {"refused"}  # no number can change
    assert ends.count("refused") > 0.95 * SAMPLE


@few
@given(share=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@example(share=0.0, value=0)
def test_any_byte_at_any_place_is_refused_or_harmless(saved, share, value):
    content, sound = bytearray(saved.read_bytes()), weight_files.read(saved)
    content[int(share * len(content))] = value
    copy = saved.with_name("other.safetensors")
    copy.write_bytes(content)
    is_refused_or_harmless(copy, sound)


def resigned(path: Path, tensors, listed=lambda found: found) -> None:
    """Write the file with these tensors, and the digests that `listed` makes of the sound ones."""
    sound = weight_files.read(path).header
    save_file(
        tensors, path, metadata=sound | {digests.FIELD: json.dumps(listed(json.loads(sound["digests"])))}
    )


def without(name: str):
    return lambda found: found | {"tensors": {k: v for k, v in found["tensors"].items() if k != name}}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            two_tensors() | {"head/bias": torch.zeros(3, dtype=torch.bfloat16)},
            "tensor head/bias is not as it",
        ),
        (two_tensors() | {"head/bias": torch.ones(3)}, "tensor head/bias is not as it was written"),
        (two_tensors() | {"head/scale": torch.arange(6.0)}, "tensor head/scale is not as it was written"),
        ({"head/scale": two_tensors()["head/scale"]}, "tensor head/bias is not there"),
        (two_tensors() | {"stray": torch.ones(1)}, "tensor stray is not as it was written"),
    ],
    ids=["numbers", "type", "shape", "missing", "new"],
)
def test_the_line_names_the_tensor(small, tensors, words):
    resigned(small, tensors)
    fails(f"last.safetensors: damaged: {words}.*; take another copy", lambda: weight_files.read(small))


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (lambda found: [], "field 'digests': expected an object, found a list"),
        (lambda found: {"fields": {}}, "field 'tensors' is missing"),
        (lambda found: found | {"fields": 5}, "field 'fields': expected an object, found 5"),
        (lambda found: found | {"tensors": {"a": 1}}, "field 'tensors.a': expected a string, found 1"),
        (without("head/bias"), "tensor head/bias is not as it was written"),
        (lambda found: found | {"fields": {"amt": "0" * 32}}, "header field amt is not as it was written"),
    ],
    ids=["list", "half", "number", "digest", "unlisted", "text"],
)
def test_damaged_digests_are_one_line(small, listed, words):
    resigned(small, two_tensors(), listed)
    fails(f"last.safetensors: damaged.*{words}", lambda: weight_files.read(small))


def test_a_file_without_digests_is_read_and_named_as_such(small, saved, tmp_path):
    """Files of older versions, of others, and what `--convert` makes of them."""
    older, new = tmp_path / "older.safetensors", tmp_path / "new.safetensors"
    sound = weight_files.read(saved)
    save_file(sound.data, older, metadata={"amt": sound.header["amt"]})
    assert_identical(checkpoint.load(older).pool.factors, checkpoint.load(saved).pool.factors)
    lines = {path: called(lambda at=path: describe([str(at)]), ["x"]).out for path in (older, saved)}
    assert "checksums    none in a file of this kind" in lines[older]
    assert "checksums    SHA-256 of every tensor, compared" in lines[saved]
    assert called(lambda: describe([str(older), "--convert", str(new)]), ["x"]).code == 0
    assert weight_files.read(new).verified == "SHA-256"
    torch.save({"a": torch.ones(3)}, tmp_path / "zip.pth")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert weight_files.read(tmp_path / "zip.pth").verified == "CRC-32"
    assert weight_files.read(tmp_path / "old.pth").verified == ""


def test_others_read_our_files(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialise(two_tensors(), {"format": "pt"}))
    assert_identical(load_file(path), two_tensors())


@pytest.mark.parametrize("text", ['{"kind": "another"}', "[" * 100_000, ""])
def test_a_contradicting_description_is_named(saved, tmp_path, text):
    path = tmp_path / "pool.safetensors"
    path.write_bytes(saved.read_bytes())
    path.with_suffix(".json").write_text(saved.with_suffix(".json").read_text())
    assert "beside it" not in called(lambda: describe([str(path)]), ["x"]).out
    path.with_suffix(".json").write_text(text)
    ended = called(lambda: describe([str(path)]), ["x"])
    assert ended.code == 0 and "pool.json beside it says something else" in ended.out
