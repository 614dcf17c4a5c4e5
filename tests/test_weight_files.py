"""Files of weights in torch's two formats: harmless ones are read, damaged ones refused in one line."""

import argparse
import io
import os
import pickle
import struct
import tarfile
import types
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from conftest import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from pickles_by_hand import (
    FOUR,
    INFO,
    MAGIC,
    MARK,
    REDUCE,
    SOUND,
    call,
    holding,
    name,
    numbers,
    old_file,
    reference,
    row,
    tensor,
    whole,
    zip_file,
)

from amt.files import pickles, weight_files
from meta_dataset_readers.errors import InputError

# dill's pickler is Python's own pickler in Python, with ways to write functions beside it.
LIKE_DILL = types.SimpleNamespace(Pickler=pickle._Pickler, dump=pickle._dump, __name__="pickler")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "pytorch_model.bin.index.json"])
def test_a_part_of_a_network_is_refused_by_its_name(tmp_path, name):
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    fails(
        "a network in several files, expected one: .* max_shard_size",
        lambda: weight_files.read(tmp_path / name),
    )
    torch.save({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.bin")
    assert weight_files.read(tmp_path / "model-00001-of-00001.bin").data.keys() == {"a"}


def training() -> dict:
    """What the robustness library saves of a training, and more of what state dicts may hold."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimiser.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [30, 60])
    whole = torch.arange(12.0)
    return {
        "model": network.state_dict(),
        "optimizer": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
        "epoch": 90,
        "amp": None,
        "args": argparse.Namespace(epsilon=np.float64(8), name="ä", big=2**80, layers=[1, (2, 3)]),
        "views": [whole[2:5], whole.view(3, 4).t(), torch.zeros(0, 5), torch.tensor(3.0)],
        "sizes": whole.view(3, 4).shape,
        "weight": network[0].weight,
        "types": [torch.ones(3, dtype=dtype) for dtype in DTYPES],
    }


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8)
DTYPES += (torch.uint8, torch.bool)


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, argparse.Namespace):
        return same(vars(left), vars(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("module", [pickle, LIKE_DILL])
@pytest.mark.parametrize("zipped", [False, True])
def test_harmless_files_of_both_formats_are_read(module, zipped, tmp_path):
    """All of it comes back, metadata and shared storages included; a scheduler's Counter, too."""
    saved = training()
    file = tmp_path / "a.pt"
    torch.save(saved, file, pickle_module=module, _use_new_zipfile_serialization=zipped)
    content = weight_files.read(file)
    assert content.container == "torch" and same(content.data, saved)
    assert type(content.data["schedule"]["milestones"]) is Counter
    assert content.data["model"]._metadata == saved["model"]._metadata
    first, second, *_ = content.data["views"]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_an_old_file_of_nothing_but_a_dictionary_is_read(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert weight_files.read(tmp_path / "a.pt").data == {"a": 1}


# files by hand


def test_files_by_hand_are_as_torch_writes_them(tmp_path):
    """The refusals below are of what differs from this, not of this."""
    for content in old_file(), zip_file(holding(tensor(reference(old=False)))):
        (tmp_path / "a.pt").write_bytes(content)
        data = weight_files.read(tmp_path / "a.pt").data
        assert same(data, {"a": torch.arange(4.0)})
        assert same(data, torch.load(tmp_path / "a.pt", weights_only=True))


def test_python_2_files_are_read(tmp_path):
    """Their texts are bytes, and their OrderedDict is called with a list of pairs."""
    pair = b"]" + b"U\x06weight" + b"a" + tensor(reference(key="0")) + b"a"
    saved = whole(name("collections.OrderedDict") + row(b"]" + MARK + pair + b"e") + REDUCE)
    (tmp_path / "a.pt").write_bytes(old_file(saved, keys=b"\x80\x02]U\x010a."))
    data = weight_files.read(tmp_path / "a.pt").data
    assert same(data, OrderedDict(weight=torch.arange(4.0)))


def test_a_number_for_the_memo_takes_no_memory(tmp_path):
    """Python's reader in C would make room for 2**32 things."""
    (tmp_path / "a.pt").write_bytes(old_file(holding(tensor(reference()) + b"r\xff\xff\xff\xff")))
    assert same(weight_files.read(tmp_path / "a.pt").data, {"a": torch.arange(4.0)})


THREE = struct.pack("<q", 3) + bytes(12)
MISFITS = {
    "cut": (old_file()[:-1], "truncated or damaged"),
    "no_storages": (old_file(storages=b""), "truncated or damaged"),
    "more": (old_file() + b"\0", "truncated or damaged"),
    "another_pickle": (old_file() + SOUND, "truncated or damaged"),
    "another_file": (old_file() + old_file(), "truncated or damaged"),
    "huge": (old_file(holding(tensor(reference(2**40)))), "truncated or damaged"),
    "huger": (old_file(holding(tensor(reference(2**62)))), "truncated or damaged"),
    "many_large": (
        old_file(
            holding(row(*(tensor(reference(2**33, str(i))) for i in range(9)))),
            pickle.dumps([str(i) for i in range(9)], 2),
        ),
        "truncated or damaged",
    ),
    "other_count": (old_file(storages=THREE + bytes(4)), "wrong|damaged torch file"),
    "negative_count": (old_file(storages=struct.pack("<q", -4) + bytes(16)), "damaged torch file"),
    "unlisted": (old_file(keys=pickle.dumps([], 2), storages=b""), "list of storages"),
    "unlisted_but_there": (old_file(keys=pickle.dumps([], 2)), "list of storages"),
    "listed_alone": (old_file(keys=pickle.dumps(["0", "1"], 2), storages=FOUR + FOUR), "list of storages"),
    "listed_twice": (old_file(keys=pickle.dumps(["0", "0"], 2), storages=FOUR + FOUR), "list of storages"),
    "no_list": (old_file(keys=pickle.dumps("0", 2)), "list of storages"),
    "other_version": (old_file(version=pickle.dumps(1002, 2)), "damaged torch file"),
    "reference_elsewhere": (old_file(info=whole(reference())), "damaged torch file"),
    "dictionary_missing": (old_file(whole(tensor(reference()))), "holds a Tensor, expected a dictionary"),
    "protocol_4": (
        MAGIC + b"".join(pickle.dumps(part, 4) for part in (1001, INFO, {}, [])),
        "asks for the instruction FRAME",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_old_files_that_do_not_add_up_are_refused(case, tmp_path):
    """Above all, a storage that is claimed and not there: torch would show what was in the memory before."""
    content, words = MISFITS[case]
    (tmp_path / "a.pt").write_bytes(content)
    fails(words, lambda: weight_files.read(tmp_path / "a.pt"))


def test_every_cut_of_an_old_file_is_refused(tmp_path):
    content = old_file()
    for length in range(1, len(content)):
        (tmp_path / "a.pt").write_bytes(content[:length])
        fails("truncated or damaged|a bare pickle", lambda: weight_files.read(tmp_path / "a.pt"))


def test_a_tar_archive_in_disguise_is_refused(tmp_path):
    """torch first tries an old file as a tar archive, and unpacks it: a link in it could lead anywhere."""
    member = tarfile.TarInfo("storages")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    header = member.tobuf()
    header = MAGIC.ljust(100, b"\0") + header[100:]  # the member's name; none of it is looked at
    header = header[:148] + b" " * 8 + header[156:]
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    # After the number, a text that covers the rest of the header.
    cover = b"\x80\x02X" + struct.pack("<I", 1024)
    assert header[len(MAGIC) : 100] == bytes(100 - len(MAGIC))
    header = MAGIC + cover + header[len(MAGIC) + len(cover) :]
    header = header[:148] + b" " * 8 + header[156:]
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    filling = bytes(len(MAGIC) + len(cover) + 1024 - len(header))
    file = tmp_path / "a.pt"
    file.write_bytes(header + filling + b".")  # a version that is a text
    file.write_bytes(file.read_bytes() + pickle.dumps(INFO, 2) + SOUND + pickle.dumps(["0"], 2) + FOUR)
    assert tarfile.is_tarfile(file)
    fails("a tar archive", lambda: weight_files.read(file))


@pytest.mark.filterwarnings("ignore:.*escape")
@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_of_an_old_file_ends_otherwise_than_in_a_line(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    content = bytearray(old_file(holding(row(tensor(reference()), call("torch.Size", numbers(4))))))
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        place = data.draw(st.integers(len(MAGIC), len(content) - 1), label="place")
        content[place] = data.draw(st.integers(0, 255), label="byte")
    path.write_bytes(content)
    try:
        weight_files.read(path)
    except InputError as error:
        assert "\n" not in str(error)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40)
TENSORS = st.builds(
    lambda sizes, dtype: torch.arange(torch.Size(sizes).numel()).view(sizes).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(DTYPES),
)
VALUES = st.recursive(
    PLAIN | TENSORS | TENSORS.map(lambda tensor: tensor.shape) | st.binary(min_size=1, max_size=40),
    lambda values: (
        st.lists(values)
        | st.lists(values).map(tuple)
        | st.dictionaries(PLAIN, values)
        | st.dictionaries(PLAIN, values).map(OrderedDict)
        | st.dictionaries(PLAIN, st.integers()).map(Counter)
        | st.dictionaries(st.sampled_from(["lr", "name", "ä b"]), values).map(
            lambda items: argparse.Namespace(**items)
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100)
@given(values=st.dictionaries(st.text(), VALUES, max_size=4), zipped=st.booleans())
def test_whatever_is_harmless_comes_back_from_either_format(values, zipped, tmp_path_factory):
    """The refusals meet nothing that torch.save writes of tensors and plain values."""
    path = tmp_path_factory.getbasetemp() / "values.pt"
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    assert same(weight_files.read(path).data, values)


def test_rehearsing_makes_and_runs_nothing(monkeypatch):
    """The pickle of a whole training is gone through while what it could make is out of reach."""
    stream = io.BytesIO()
    torch.save(training(), stream)
    with zipfile.ZipFile(stream) as archive:
        saved = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for place in ("torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "torch.Size", "os.mkdir"):
        monkeypatch.setattr(place, None)
    content, storages = pickles.rehearse(io.BytesIO(saved))
    assert content.keys() == training_keys() and len(storages) > 10
    assert os.mkdir is None


def training_keys() -> set[str]:
    return {"model", "optimizer", "schedule", "epoch", "amp", "args", "views", "sizes", "weight", "types"}
