"""`--compile`: passes and attack steps as one program each, made by torch.compile.

What differs from run to run of a program is an argument of it, or is looked at before: a tensor's shape is
fixed at first, and open from the second shape on, so few programs serve all episodes. Knows no network.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from meta_dataset_readers.errors import InputError, first_line

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Compiler:
    """What compiles functions of tensors, by a backend of torch.compile; with `graphs` steps without gradient
    are replayed as CUDA graphs."""

    backend: str | Callable[..., Any] = "inductor"
    graphs: bool = False

    def __call__(self, function: Function, repeated: bool = False) -> Function:
        """A function of tensors of any shape, compiled when it is first called; `repeated` if it is called
        again and again on what it returned, one tensor or a list, and nothing waits for its gradient."""
        replayed = self.graphs and repeated
        mode = "reduce-overhead" if replayed else None
        compiled: Any = torch.compile(function, backend=self.backend, mode=mode)
        return functools.partial(_copied, compiled) if replayed else compiled  # type: ignore[return-value]


def _copied(replayed: Callable[..., Any], *given: Any) -> Any:
    """What a CUDA graph returns, outside of its memory, which the next replay writes anew: it may neither be
    an argument of that replay nor be read after it."""
    found = replayed(*given)
    return found.clone() if isinstance(found, torch.Tensor) else [each.clone() for each in found]


def compiler_for(device: torch.device) -> Compiler:
    """The compiler for a device. Raises InputError where torch.compile does not work."""
    # The gradient of an attack's loss is part of its step; a program's variants are few, but not eight.
    torch._dynamo.config.trace_autograd_ops = True
    torch._dynamo.config.recompile_limit = 64
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each part of the tool chain raises something else, torch wraps most of it
        reason = getattr(error, "inner_exception", error)
        needs = "Triton" if device.type == "cuda" else "a C++ compiler, g++ or what CXX names"
        raise InputError(
            f"--compile: torch.compile fails on {device}, it needs {needs}, and a sound cache"
            f" (TORCHINDUCTOR_CACHE_DIR names another): {first_line(reason)}"
        ) from error
    return Compiler(graphs=device.type == "cuda")


def compiled_if_asked(forward: Function) -> Function:
    """A function of a network, and of tensors of any shape, compiled where the network has a compiler.

    Not with a `micro_batch`: a part must be made again by the very program that made it first, and which one
    serves a shape may change in between.
    """

    @functools.wraps(forward)
    def call(network: Any, *given: Any) -> Any:
        if network.compiler is None or torch.compiler.is_compiling():
            return forward(network, *given)
        _look_at(network)
        return (forward if network.micro_batch else network.compiler(forward))(network, *given)

    return call  # type: ignore[return-value]


def _look_at(network: Any) -> None:
    """Let a network find its cached properties, which cannot be done within a program."""
    for name, value in vars(type(network)).items():
        if isinstance(value, functools.cached_property):
            getattr(network, name)
