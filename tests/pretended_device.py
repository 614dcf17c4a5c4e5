"""A pretended GPU on the CPU: tensors that claim to be on cuda:0, hold CPU values, and are counted.

    with pretended() as seen:
        step(on_device(network), on_device(episode))
    seen.kernels, seen.reads, seen.copies

    with machine():
        command("main", ..., "--device", "cuda")     whole programs, which find one such device

    kernels    operations that compute; views are free
    reads      values that the CPU asks for, each of which waits: item, tolist, nonzero, an index of bools
    copies     tensors that are sent to the device while the CPU waits, from memory that is not pinned
    sent       bytes that are sent, in any way

An operation that mixes the device with the CPU raises, as on a GPU; a CPU scalar may come along.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from amt.attacks import constants
from amt.models.network import Network

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


@dataclasses.dataclass
class Seen:
    kernels: int = 0
    reads: int = 0
    copies: int = 0
    sent: int = 0


SEEN = Seen()


class OnDevice(Tensor):
    """A tensor that claims to be on cuda:0; `held` has its values."""

    held: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cpu"),
        )
        made.held = held
        return made

    def __repr__(self):
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        places = func in INDEXING  # which may come from the CPU
        given = tree_leaves((args[:1], args[2:], kwargs) if places else (args, kwargs))
        if strangers := _on_cpu(given):
            raise RuntimeError(f"{func} mixes cuda:0 and cpu: {[tuple(x.shape) for x in strangers]}")
        SEEN.copies += len(_on_cpu(args[1])) if places else 0
        indexed_by_bools = places and any(x is not None and x.dtype == torch.bool for x in args[1])
        SEEN.reads += func in WAITING or indexed_by_bools
        SEEN.kernels += not func.is_view
        found = func(*tree_map(held, args), **tree_map(held, kwargs or {}))
        if func._schema.is_mutable:
            return args[0] if func._schema.returns else None
        return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)


def _on_cpu(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.ndim]


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


class _Pinned(Tensor):
    """Memory of the CPU that a device reads by itself."""


class _Moved(torch.autograd.Function):
    """To the device, with gradients on the way back."""

    @staticmethod
    def forward(_ctx, x):
        return OnDevice(x.detach())

    @staticmethod
    def backward(_ctx, gradient):
        return gradient.held


class _Placing(TorchFunctionMode):
    """Factories that are asked for the device, and what goes to and fro."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.__format__) and isinstance(args[0], OnDevice):
            SEEN.reads += 1
            return func(args[0].held, *args[1:])
        if func is Tensor.pin_memory:
            return _Pinned(args[0].clone())
        if func is Tensor.to or func is Tensor.cpu:
            return self._moved(*args, **kwargs | ({"device": "cpu"} if func is Tensor.cpu else {}))
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            SEEN.copies += 1
            return OnDevice(func(args[0].held, *args[1:], **kwargs))
        if func is nn.functional.one_hot and isinstance(args[0], OnDevice):  # C++ asks for the device itself
            SEEN.reads += len(args) + len(kwargs) == 1  # the largest label
            SEEN.kernels += 2
            return OnDevice(func(args[0].held, *args[1:], **kwargs))
        if _is_cuda(kwargs.get("device")) and not (isinstance(args[0], OnDevice) and args[0].ndim):
            SEEN.copies += func is torch.tensor
            SEEN.reads += isinstance(args[0], OnDevice)  # a size
            return OnDevice(func(*map(held, args), **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)

    def _moved(self, this, *where, **kwargs):
        waits = not (kwargs.pop("non_blocking", False) and isinstance(this, _Pinned))
        this = this.as_subclass(Tensor) if isinstance(this, _Pinned) else this
        target = kwargs.pop("device", None)
        like = [x.device for x in where if isinstance(x, Tensor)]
        named = [torch.device(x) for x in where if isinstance(x, str | torch.device)]
        target = next(iter([*like, *named]), target)
        dtypes = [x.dtype if isinstance(x, Tensor) else x for x in where]
        dtype = next((x for x in dtypes if isinstance(x, torch.dtype)), this.dtype)
        if _is_cuda(target) and not isinstance(this, OnDevice):
            SEEN.copies += waits
            SEEN.sent += this.numel() * this.element_size()
            this = _Moved.apply(this)
        elif target is not None and not _is_cuda(target) and isinstance(this, OnDevice):
            SEEN.reads += 1
            this = this.held
        return this if dtype == this.dtype else this.to(dtype, **kwargs)


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def on_device(value: Any) -> Any:
    """A network, a dataclass of tensors or a tensor, on the pretended device."""
    if isinstance(value, Network):
        with machine():
            return dataclasses.replace(value, module=copy.deepcopy(value.module).to(CUDA))
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{name: on_device(each) for name, each in vars(value).items()})
    if isinstance(value, dict):
        return {name: on_device(each) for name, each in value.items()}
    return OnDevice(value) if isinstance(value, Tensor) else value


@contextlib.contextmanager
def pretended() -> Iterator[Seen]:
    """Count from zero what is done on the device."""
    SEEN.__init__()
    constants._made.cache_clear()
    try:
        with _Placing():
            yield SEEN
    finally:
        constants._made.cache_clear()


class _Autocast(torch.autocast):
    """Mixed precision of the device, which is the CPU's here."""

    def __init__(self, device_type: str, *given, **named):
        super().__init__("cpu", *given, **named)


@contextlib.contextmanager
def machine() -> Iterator[Seen]:
    """A machine with one such device: programs find it, and move networks to it."""
    of_torch = {
        "is_autocast_enabled": lambda _, ask=torch.is_autocast_enabled: ask("cpu"),
        "get_autocast_dtype": lambda _, ask=torch.get_autocast_dtype: ask("cpu"),
        "autocast": _Autocast,
    }
    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda _: (2**40, 2**40),
        "max_memory_allocated": lambda _: 0,
        "get_device_name": lambda _: "pretended",
        "get_rng_state": lambda _: torch.zeros(8, dtype=torch.uint8),
        "set_rng_state": lambda _state, _device: None,
    }
    with (
        patch.multiple(torch, **of_torch),
        patch.multiple(torch.cuda, **of_cuda),
        patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        pretended() as seen,
    ):
        yield seen
