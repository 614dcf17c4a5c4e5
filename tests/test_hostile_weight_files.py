"""Files of weights whose pickles ask for code: refused in one line, and nothing of them is run.
Each is tried in both of torch's formats."""

import copyreg
import io
import pickle
import struct
from pathlib import Path

import pytest
import torch
from conftest import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from pickles_by_hand import (
    BUILD,
    EMPTY,
    MARK,
    NONE,
    REDUCE,
    TUPLE,
    call,
    dictionary,
    holding,
    name,
    number,
    numbers,
    old_file,
    reference,
    row,
    tensor,
    text,
    whole,
    zip_file,
)

from amt.files import pickles, weight_files
from meta_dataset_readers.errors import InputError


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
