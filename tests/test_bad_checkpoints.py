"""Files from elsewhere that are no checkpoint, or a damaged one: what is wrong with them is said in one line,
and nothing in them is ever run. Every bad file here is a real one."""

import argparse
import dataclasses
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_backbone
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_published import ARCH, as_published, same, trained

from amt.attacks.levels import Perturbation
from amt.cli import checkpoint as describing
from amt.files import checkpoint
from amt.files.pretrained import load_network
from amt.models.pool import Pool, principal_pool
from meta_dataset_readers.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def network():
    return random_backbone(ARCH)


class Runs:
    """Unpickled carelessly, this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Legacy:
    """A class of somebody's code, inside a checkpoint."""


def zipped(path: Path, change) -> None:
    """Rewrite a torch file's entries: `change(name, data) -> data`."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def larger(name: str, data: bytes) -> bytes:
    """The pickle of a tensor of 4 numbers, claiming 2**37 of them."""
    return data.replace(b"K\x04\x85q", b"\x8a\x05\0\0\0\0\x20\x85q") if name.endswith("data.pkl") else data


def longer(name: str, data: bytes) -> bytes:
    """The pickle of a storage of 4 numbers, claiming 200 of them."""
    place = data.rfind(b"K\x04", 0, data.find(b"tq\x07Q"))
    return data[:place] + b"K\xc8" + data[place + 2 :] if name.endswith("data.pkl") else data


def bad_files(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Files of every bad kind, and what must be said of each."""
    whole = io.BytesIO()
    torch.save({"model": {"norm.bias": torch.arange(4.0)}}, whole)
    data = whole.getvalue()
    numbers = data.index(torch.arange(4.0).numpy().tobytes())
    convert = "--convert OUT.safetensors --trust"
    files: dict[str, tuple[bytes, list[str]]] = {
        "empty": (b"", ["empty"]),
        "byte": (b"\x80", ["damaged pickle"]),
        "html": (b"<!DOCTYPE html>\n<html>not found</html>", ["starts with '<!DOCTYPE html', a web page"]),
        "xml": (b"\n <?xml version='1.0'?><Error/>", ["starts with '<?xml version=", "a web page"]),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", ["a Git LFS pointer"]),
        "text": (b"see the README", ["starts with 'see the README'", "expected a safetensors or torch file"]),
        "cut_short": (data[:-30], ["truncated or damaged torch file"]),
        "cut_early": (data[:100], ["truncated or damaged torch file"]),
        "flipped": (data[:numbers] + b"\x55" + data[numbers + 1 :], ["damaged", "checksum", "data/0"]),
        "bare_pickle": (pickle.dumps(Runs(folder / "ran")), ["a bare pickle", "mkdir", convert]),
        "bare_pickle_2": (pickle.dumps(Runs(folder / "ran"), 2), ["a bare pickle", "mkdir", convert]),
        "cut_pickle": (pickle.dumps(Runs(folder / "ran"))[:-5], ["truncated or damaged pickle"]),
        "safetensors_cut": (_safetensors()[:-2], ["truncated or damaged safetensors"]),
        "safetensors_cut_early": (_safetensors()[:20], ["truncated or damaged safetensors"]),
        "safetensors_huge": (
            _safetensors()
            .replace(b'"shape":[4]', b'"shape":[4000000000000]')
            .replace(len(_header()).to_bytes(8, "little"), (len(_header()) + 12).to_bytes(8, "little")),
            ["truncated or damaged safetensors"],
        ),
    }
    found = {}
    for name, (content, words) in files.items():
        (folder / f"{name}.pth").write_bytes(content)
        found[name] = folder / f"{name}.pth", words
    for name, content, words in (
        ("runs", {"model": Runs(folder / "ran")}, ["mkdir", convert]),
        ("foreign", {"model": Legacy()}, ["test_bad_checkpoints.Legacy", convert]),
        ("path", {"out": Path("x")}, []),
        ("network", torch.nn.Linear(1, 1), ["torch.nn.modules.linear.Linear", convert]),
        ("list", [torch.ones(1)], ["holds a list", "dictionary"]),
        ("nothing", {}, ["LoRAs"]),
    ):
        torch.save(content, folder / f"{name}.pth")
        found[name] = folder / f"{name}.pth", words
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"a": Runs(folder / "ran")}, folder / "old_runs.pth", **old)
    found["old_runs"] = folder / "old_runs.pth", ["old format (before version 1.6)", "mkdir", convert]
    torch.save({"a": Runs(folder / "ran")}, folder / "runs_4.pth", pickle_protocol=4)
    found["runs_4"] = folder / "runs_4.pth", ["mkdir", convert]
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), folder / "script.pth")
    found["script"] = folder / "script.pth", ["a TorchScript program"]
    for name, change, words in (
        ("huge", larger, ["damaged torch file"]),
        ("long", longer, ["damaged torch file"]),
    ):
        torch.save({"model": {"norm.bias": torch.arange(4.0)}}, folder / f"{name}.pth")
        before = (folder / f"{name}.pth").read_bytes()
        zipped(folder / f"{name}.pth", change)
        assert (folder / f"{name}.pth").read_bytes() != before
        found[name] = folder / f"{name}.pth", words
    with zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(10_000_000))
    found["bomb"] = folder / "bomb.pth", ["is compressed"]
    with zipfile.ZipFile(folder / "twice.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/DATA.PKL", pickle.dumps(Runs(folder / "ran"), 2))
    found["twice"] = folder / "twice.pth", ["without a data.pkl"]
    with zipfile.ZipFile(folder / "photos.pth", "w") as archive:
        archive.writestr("photos/1.jpg", b"")
    found["photos"] = folder / "photos.pth", ["without a data.pkl"]
    found["missing"] = folder / "missing.pth", ["no such"]
    found["folder"] = folder, ["is a folder, expected a regular file"]
    return found


def _safetensors() -> bytes:
    stream = io.BytesIO()
    header = _header()
    stream.write(len(header).to_bytes(8, "little") + header + torch.ones(4).numpy().tobytes())
    return stream.getvalue()


def _header() -> bytes:
    return b'{"norm.bias":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    return bad_files(tmp_path_factory.mktemp("bad"))


BAD = (
    *(
        "empty",
        "byte",
        "html",
        "xml",
        "lfs",
        "text",
        "cut_short",
        "cut_early",
        "flipped",
        "missing",
        "folder",
    ),
    *("bare_pickle", "bare_pickle_2", "cut_pickle", "runs", "runs_4", "old_runs", "foreign", "path"),
    *("network", "list", "nothing", "script", "huge", "long", "bomb", "twice", "photos"),
    *("safetensors_cut", "safetensors_cut_early", "safetensors_huge"),
)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_bad_files_are_refused_in_one_line_and_run_nothing(bad, name):
    """By the reader of checkpoints, of backbones, and of the command that describes files alike."""
    path, words = bad[name]
    for use in (
        checkpoint.load,
        lambda file: load_network("vit_mini", file),
        lambda file: describing.main([str(file)]),
    ):
        with pytest.raises(InputError) as refused:
            use(path)
        message = str(refused.value)
        assert "\n" not in message and str(path) in message
        assert name == "nothing" or all(word in message for word in words), message
    assert not (path.parent / "ran").exists()


def test_every_bad_file_is_tested(bad):
    assert bad.keys() == set(BAD)


def test_a_name_says_nothing_about_a_files_kind(network, tmp_path):
    """safetensors called .pth, and a torch file called .safetensors."""
    pool = trained(network, 1)
    torch.save({"model": as_published(pool)}, tmp_path / "a.safetensors")
    save_file(as_published(pool), tmp_path / "b.pth")
    assert same(checkpoint.load(tmp_path / "a.safetensors").pool, checkpoint.load(tmp_path / "b.pth").pool)


@settings(max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["torch", "pickle", "safetensors"]))
def test_no_damage_ends_otherwise_than_in_a_line(data, kind, tmp_path_factory):
    """Any cut and any changed bytes: the file is refused, or still read; there is no other error.

    Of kind "pickle" only the pickle inside is damaged, and the archive around it is sound.
    """
    path = tmp_path_factory.getbasetemp() / "damaged"
    state = as_published(_small(), single=True)

    def damaged(content: bytes) -> bytes:
        content = bytearray(content)
        for _ in range(data.draw(st.integers(0, 3), label="changes")):
            # Many of the changes are to hit the beginning, which describes the rest.
            place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 2000), label="place")
            content[place % len(content)] = data.draw(st.integers(0, 255), label="byte")
        return bytes(content[: data.draw(st.just(None) | st.integers(0, len(content)), label="length")])

    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "args": argparse.Namespace(epsilon=np.float64(8))}, path)
    if kind == "pickle":
        zipped(path, lambda name, entry: damaged(entry) if name.endswith("data.pkl") else entry)
    else:
        path.write_bytes(damaged(path.read_bytes()))
    try:
        checkpoint.load(path)
    except InputError as error:
        assert "\n" not in str(error)


def _small() -> Pool:
    arch = dataclasses.replace(ARCH, dim=6, depth=1, pretrained_size=4)
    return principal_pool(random_backbone(arch).weights, 1, (Perturbation(8, 2),))


def test_the_command_is_started_by_python_m_amt(bad):
    """Exit code 2 and one line for what is no checkpoint."""
    words = [sys.executable, "-m", "amt", "checkpoint", str(bad["html"][0])]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stdout == ""
    assert re.fullmatch(r"error: .*web page.*\n", ended.stderr)
