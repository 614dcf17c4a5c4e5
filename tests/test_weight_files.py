"""Files of torch.save in the format before version 1.6: harmless ones are read, and no other file gets to
run anything, to fill the memory or to show what is in it. Hostile pickles are tried in both of torch's
formats."""

import argparse
import copyreg
import io
import os
import pickle
import struct
import tarfile
import types
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from amt.files import pickles, weight_files
from meta_dataset_readers.errors import InputError

# dill's pickler is Python's own pickler in Python, with ways to write functions beside it.
LIKE_DILL = types.SimpleNamespace(Pickler=pickle._Pickler, dump=pickle._dump, __name__="pickler")


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

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
MARK, TUPLE, REDUCE, BUILD, EMPTY, NONE, STOP = b"(", b"t", b"R", b"b", b")", b"N", b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(dotted: str) -> bytes:
    return b"c" + "\n".join(dotted.rsplit(".", 1)).encode() + b"\n"


def row(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def numbers(*values: int) -> bytes:
    return row(*map(number, values))


def call(dotted: str, *arguments: bytes) -> bytes:
    return name(dotted) + row(*arguments) + REDUCE


def dictionary(*items: bytes) -> bytes:
    return b"}" + MARK + b"".join(items) + b"u"


def reference(count: int = 4, key: str = "0", kind: str = "Float", old: bool = True) -> bytes:
    items = text("storage"), name(f"torch.{kind}Storage"), text(key), text("cpu"), number(count)
    return row(*items, *[NONE] * old) + b"Q"


def tensor(
    storage: bytes, sizes: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), offset: int = 0
) -> bytes:
    hooks = name("collections.OrderedDict") + EMPTY + REDUCE
    places = number(offset), numbers(*sizes), numbers(*strides), b"\x89", hooks
    return call("torch._utils._rebuild_tensor_v2", storage, *places)


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + STOP


def holding(value: bytes) -> bytes:
    return whole(dictionary(text("a"), value))


INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
FOUR = struct.pack("<q", 4) + np.arange(4, dtype="<f4").tobytes()
SOUND = holding(tensor(reference()))


def old_file(
    saved: bytes = SOUND,
    keys: bytes = pickle.dumps(["0"], 2),
    storages: bytes = FOUR,
    version: bytes = pickle.dumps(1001, 2),
    info: bytes = pickle.dumps(INFO, 2),
) -> bytes:
    return MAGIC + version + info + saved + keys + storages


def zip_file(saved: bytes) -> bytes:
    """The same in the format of today, in which references have no sixth part."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(4.0)}, stream)
    target = io.BytesIO()
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            data = source.read(entry)
            archive.writestr(entry.filename, saved if entry.filename.endswith("data.pkl") else data)
    return target.getvalue()


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


def mkdir(folder: Path) -> bytes:
    return call("posix.mkdir", text(str(folder / "ran")))


# Pickles that no reader may follow: (what is saved, what the refusal says).
ROWS = tensor(reference(), (2**40,), (0,))  # 16 bytes that claim to be 2**40 rows
HEX = call("_codecs.encode", text("a" * 100), text("latin1"))
for _ in range(40):
    HEX = call("_codecs.encode", HEX, text("hex"))
NEST = text("a")
for _ in range(60):
    NEST = NEST + b"q\x01h\x01\x86"
MEGABYTE = (
    text("a" * 2**20)
    + b"q\x010"
    + b"".join(call("_codecs.encode", b"h\x01", text("latin1")) + b"0" for _ in range(1000))
)
HOSTILE = {
    # names put together while a pickle runs: plainly, out of the memo, and behind the back of a listing
    "joined": (text("posix") + text("mkdir") + b"\x93", "posix.mkdir"),
    "from_the_memo": (
        row(text("posix") + b"\x94", text("mkdir") + b"\x94", text("a"), text("b"), b"h\x00h\x01\x93"),
        "posix.mkdir",
    ),
    "dropped_texts": (
        text("posix") + text("mkdir") + text("collections") + b"0" + text("OrderedDict") + b"0\x93",
        "the instruction (POP|STACK_GLOBAL)",
    ),
    "hidden_texts": (
        row(text("posix") + text("mkdir"), MARK, text("torch"), text("Size"), b"1", b"\x93"),
        "the instruction (POP_MARK|STACK_GLOBAL)",
    ),
    "harmless_joined": (text("torch") + text("Size") + b"\x93", "the instruction STACK_GLOBAL"),
    "duplicated": (text("a") + b"2", "the instruction DUP"),
    # other ways to a name
    "extension_1": (b"\x82\xf0", "extension 240"),
    "extension_2": (b"\x83\xf0\x00", "extension 240"),
    "extension_4": (b"\x84\xf0\x00\x00\x00", "extension 240"),
    "instance": (MARK + text("x") + b"iposix\nmkdir\n", "posix.mkdir"),
    "object": (MARK + name("torch.Size") + b"o", "the instruction OBJ"),
    "new_with_keywords": (name("argparse.Namespace") + EMPTY + b"}\x92", "the instruction NEWOBJ_EX"),
    "new_harmless": (name("torch.Size") + EMPTY + b"\x81", "a new object of torch.Size"),
    "escaped": (b"cposix\\x2e\nmkdir\n", "posix"),
    "python_2": (name("__builtin__.eval"), "builtins.eval"),
    "not_a_name": (text("torch.Size") + EMPTY + REDUCE, "an unusual call of str"),
    "made": (call("torch.Size", numbers(1)) + EMPTY + REDUCE, "an unusual call of torch.Size"),
    # references
    "text_reference": (b"Pstorage\n", "the instruction PERSID"),
    "bare_reference": (text("storage") + b"Q", "a reference to something else"),
    "number_reference": (number(0) + b"Q", "a reference to something else"),
    "module": (
        row(text("module"), name("torch.Size"), text("a"), text("b")) + b"Q",
        "a reference to something",
    ),
    "view": (
        row(
            *(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4)),
            row(text("1"), number(0), number(4)),
        )
        + b"Q",
        "a reference to something else",
    ),
    "called_count": (
        row(
            *(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu")),
            *(call("torch.Size", numbers(4)), NONE),
        )
        + b"Q",
        "a reference to something else",
    ),
    # harmless names, with what makes them dangerous
    "rows_counted": (call("collections.Counter", ROWS), "an unusual call of collections.Counter"),
    "rows_as_sizes": (call("torch.Size", ROWS), "an unusual call of torch.Size"),
    "rows_as_pairs": (call("collections.OrderedDict", ROWS), "an unusual call of collections.OrderedDict"),
    "rows_in_pairs": (
        call("collections.OrderedDict", b"]" + ROWS + b"a"),
        "an unusual call of collections.OrderedDict",
    ),
    "hex_of_hex": (HEX, "an unusual call of _codecs.encode"),
    "megabytes": (MEGABYTE, "copies of the same thing|the instruction POP"),
    "sizes_of_sizes": (
        numbers(*range(5000)) + b"q\x01" + b"".join(b"ctorch\nSize\nh\x01\x85R" for _ in range(200)),
        "copies of the same thing",
    ),
    "texts_as_sizes": (call("torch.Size", row(text("a"))), "an unusual call of torch.Size"),
    "nested_key": (dictionary(NEST, NONE), "a nested tuple as a key"),
    "item_in_a_tensor": (tensor(reference()) + number(0) + number(1) + b"s", "an item in torch._utils"),
    "added_to_a_dictionary": (b"}" + number(0) + b"a", "an item in dict"),
    "state_of_a_tensor": (
        tensor(reference()) + row(reference(), number(0), numbers(2**40), numbers(1)) + BUILD,
        "an unusual state of torch._utils._rebuild_tensor_v2",
    ),
    "hidden_method": (
        name("collections.OrderedDict") + EMPTY + REDUCE + dictionary(text("items"), NONE) + BUILD,
        "an unusual state of collections.OrderedDict",
    ),
    "hidden_counter": (
        call("collections.Counter", b"}") + dictionary(text("keys"), NONE) + BUILD,
        "an unusual state of collections.Counter",
    ),
    # numbers that are too large, too small or none
    "beyond": (tensor(reference(), (5,)), "a tensor needs 5 numbers"),
    "far_beyond": (tensor(reference(), (2**60,), (2**60,)), "a tensor needs"),
    "after": (tensor(reference(), offset=1), "a tensor needs 5 numbers"),
    "before": (tensor(reference(), offset=-1), "sizes that are none"),
    "negative_size": (tensor(reference(), (-4,)), "sizes that are none"),
    "negative_stride": (tensor(reference(), strides=(-1,), offset=3), "sizes that are none"),
    "axes": (tensor(reference(), (2, 2), (1,)), "sizes that are none"),
    "negative_storage": (tensor(reference(-4), (0,)), "with -4 numbers"),
    "two_counts": (row(tensor(reference(4)), tensor(reference(3), (3,))), "is claimed twice"),
    "two_types": (row(tensor(reference(4)), tensor(reference(4, kind="Double"))), "is claimed twice"),
    # damage
    "no_mark": (TUPLE, "damaged torch file"),
    "empty_stack": (b"\x85", "damaged torch file"),
    "unknown_memo": (b"h\x07", "damaged torch file"),
    "unhashable": (dictionary(b"]", NONE), "damaged torch file"),
    "odd_items": (dictionary(text("a"), text("b"), text("c")), "damaged torch file"),
    "no_instruction": (b"\xff", "truncated or damaged"),
    "long_text": (b"X\xff\xff\xff\xff", "truncated or damaged"),
    "longer_text": (b"\x8d" + b"\xff" * 7 + b"\x0f", "truncated or damaged"),
    "longer_bytes": (b"\x8e" + b"\xff" * 7 + b"\x0f", "truncated or damaged"),
    "negative_long": (b"\x8b\xff\xff\xff\xff", "truncated or damaged"),
    "not_utf8": (b"X\x01\x00\x00\x00\xff", "truncated or damaged"),
    "frame": (b"\x95" + b"\xff" * 8, "the instruction FRAME|truncated or damaged"),
}


@pytest.mark.parametrize("kind", ["old", "zip"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line(case, kind, tmp_path):
    value, words = HOSTILE[case]
    content = old_file(holding(value)) if kind == "old" else zip_file(holding(value))
    (tmp_path / "a.pt").write_bytes(content)
    fails(words, lambda: weight_files.read(tmp_path / "a.pt"))


@pytest.mark.parametrize("part", ["version", "info", "saved", "keys"])
def test_code_in_any_of_an_old_files_pickles_is_refused(part, tmp_path):
    (tmp_path / "a.pt").write_bytes(old_file(**{part: whole(mkdir(tmp_path))}))
    fails("asks for posix.mkdir is not read here", lambda: weight_files.read(tmp_path / "a.pt"))
    assert not (tmp_path / "ran").exists()
    weight_files.pickle.loads(whole(mkdir(tmp_path)))  # it is a true one
    assert (tmp_path / "ran").exists()


def test_a_registered_extension_is_no_way_around(tmp_path):
    copyreg.add_extension("posix", "mkdir", 240)
    try:
        (tmp_path / "a.pt").write_bytes(old_file(holding(b"\x82\xf0" + row(text("ran")) + REDUCE)))
        fails("extension 240", lambda: weight_files.read(tmp_path / "a.pt"))
    finally:
        copyreg.remove_extension("posix", "mkdir", 240)


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


# Pieces of pickles: what leaves one thing on the stack, and what works on the things before it.
LEAVES = (EMPTY, NONE, b"}", b"]", number(0), number(4), text("a"), text("latin1"), ROWS, tensor(reference()))
LEAVES += (reference(3, "1"), b"h\x01", *map(name, sorted(pickles.HARMLESS)))
WORKS = (REDUCE, REDUCE, BUILD, b"a", b"s", b"Q", b"\x81", b"\x85", b"\x86", b"\x87", b"q\x01")
PIECES = st.sampled_from(LEAVES) | st.sampled_from(WORKS)
PIECES |= st.lists(st.sampled_from(LEAVES), max_size=4).map(lambda items: row(*items))
PIECES |= st.builds(
    lambda called, items: call(called, *items),
    st.sampled_from(sorted(pickles.HARMLESS)),
    st.lists(st.sampled_from(LEAVES), max_size=3),
)


@settings(max_examples=300)
@given(body=st.lists(PIECES, max_size=6))
def test_harmless_pieces_are_harmless_however_they_are_put_together(body, tmp_path_factory):
    """With every storage that the rehearsal found, full of zeros: torch reads zeros, or refuses in a line."""
    saved = whole(dictionary(text("a") + b"q\x01", row(*body)))
    try:
        _, storages = pickles.rehearse(io.BytesIO(saved))
    except (pickles.Foreign, pickles.Damaged):
        return
    keys = sorted(storages)
    data = b"".join(
        struct.pack("<q", storages[key].count) + bytes(storages[key].count * storages[key].size)
        for key in keys
    )
    path = tmp_path_factory.getbasetemp() / "pieces.pt"
    path.write_bytes(old_file(saved, pickle.dumps(keys, 2), data))
    try:
        content = weight_files.read(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        tensors = [each for each in content.data["a"] if isinstance(each, torch.Tensor)]
        assert not any(bytes(each.untyped_storage()).strip(b"\0") for each in tensors)


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
