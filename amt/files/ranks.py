"""Ranks: the processes of one run, as `torchrun` or `srun` start them; one process alone is rank 0 of 1.

    place        which rank this is, of how many, as the environment says
    one_voice    while flags are read: the first process of every machine speaks
    together     the ranks meet, work and part: rank 0 speaks, what ends one ends all, and one tells why
    Ranks        what they tell each other

Ranks that share work make the same calls of `Ranks` in the same order. Knows no method. By torch.distributed:
gloo for what lies on the CPU, NCCL where every rank of a machine has a GPU of its own.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from meta_dataset_readers.endings import code_of
from meta_dataset_readers.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import Tensor

Thing = TypeVar("Thing")
_TOLD = "told"  # how many ranks wanted to tell why all end
_LAST_WORDS = 5  # seconds that rank 0 waits for ranks that may be dead
_LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # of the ranks of a machine


class LostRank(InputError):
    """Another rank has ended, or does not answer."""


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks, by RANK and WORLD_SIZE. Raises InputError if they, or
    `_LOCAL`, make no sense."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = map(int, given)
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world:
        raise InputError(f"RANK/WORLD_SIZE is {'/'.join(given)}, expected for example 0/4; see torchrun")
    for name, default in _LOCAL.items():
        if not (local := os.environ.get(name, default)).isdecimal():
            raise InputError(f"{name} is {local!r}, expected a nonnegative integer; see torchrun")
    return rank, world


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """While flags are read, which are every rank's: only the first process of a machine prints."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0" or place()[1] == 1
    # A rank that is gone is told of in one line of ours, not in torch's many.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _spoken(speaks):
            yield
    except InputError as error:
        if speaks:
            raise
        raise SystemExit(2) from error


@contextlib.contextmanager
def _spoken(aloud: bool) -> Iterator[None]:
    """Print as usual, or nothing."""
    if aloud:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class Ranks:
    """The ranks that work together, as one of them sees it. Every method is called by all of them, in the
    same order; with one rank none waits for anything.

    Args:
        rank, world: this one's number from 0, and how many there are.
        seconds: that a rank may keep the others waiting.
        group: of torch.distributed; None for all ranks.
        by_nccl: tensors on GPUs are exchanged where they are, otherwise on the CPU.

    Raises:
        LostRank: a rank has ended or did not answer in time, in every method.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, seconds: float = 0, group: Any = None, by_nccl: bool = False
    ):
        self.rank, self.world = rank, world
        self._seconds, self._group, self._by_nccl = seconds, group, by_nccl

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def most(self, *numbers: int) -> list[int]:
        """The largest of every rank's, number by number."""
        if self.world == 1:
            return list(numbers)
        import torch

        sent = torch.tensor(numbers, dtype=torch.int64)
        self._call("all_reduce", sent, op=torch.distributed.ReduceOp.MAX)
        return sent.tolist()

    def total(self, tensor: "Tensor") -> "Tensor":
        """The sum of every rank's tensor, of one shape and any dtype: the same bits everywhere."""
        if self.world == 1:
            return tensor
        sent = self._to_send(tensor).clone()
        self._call("all_reduce", sent)
        return sent.to(tensor.device)

    def each(self, tensors: "Sequence[Tensor | None]") -> "list[list[Tensor | None]]":
        """Every rank's list of tensors, by rank; all have the same shapes, and None at the same places."""
        if self.world == 1:
            return [list(tensors)]
        import torch

        flat = _flat(tensors)
        sent = self._to_send(flat)
        found = [torch.empty_like(sent) for _ in range(self.world)]
        self._call("all_gather", found, sent)
        return [_parted(each.to(flat.device), tensors) for each in found]

    def added(self, tensors: "Sequence[Tensor | None]") -> "list[Tensor | None]":
        """The sums of every rank's tensors, one by one; all have the same shapes, and None at the same
        places."""
        return list(tensors) if self.world == 1 else _parted(self.total(_flat(tensors)), tensors)

    def gathered(self, thing: Thing) -> list[Thing]:
        """Every rank's thing, by rank; whatever can be pickled."""
        found: list[Any] = [thing] * self.world
        if self.world > 1:
            self._call("all_gather_object", found, thing)
        return found

    def collected(self, thing: Thing) -> list[Thing]:
        """The same for rank 0; the others get their own back alone."""
        found: list[Any] | None = [thing] * self.world if self.first else None
        if self.world > 1:
            self._call("gather_object", thing, found)
        return found or [thing]

    def shared(self, thing: Thing) -> Thing:
        """Rank 0's thing for all; what the others give counts for nothing."""
        sent: list[Any] = [thing]
        if self.world > 1:
            self._call("broadcast_object_list", sent)
        return sent[0]

    def split(self, parts: Sequence[Sequence[int]]) -> "Ranks":
        """Those of this rank's part, where every rank is in one of them."""
        if max(map(len, parts)) == 1:
            return ALONE
        import torch.distributed

        found = self
        for part in parts:
            group = torch.distributed.new_group(list(part), timeout=_span(self._seconds))
            if self.rank in part:
                found = Ranks(part.index(self.rank), len(part), self._seconds, group, self._by_nccl)
        return found

    def leave(self) -> None:
        """The last call of all, after which each goes on alone. By NCCL they part at once: who leaves first
        waits for the others, and gives up after `seconds`."""
        if self.world > 1:
            self._call("destroy_process_group")

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise an `InputError`, on all ranks, that names the first fact in which one differs from rank 0."""
        first, *others = self.gathered(facts)
        for rank, theirs in enumerate(others, 1):
            for name, value in first.items():
                if theirs.get(name) != value:
                    raise InputError(
                        f"rank {rank} was started with {name} {theirs.get(name)}, rank 0 with {value}; "
                        "start all ranks with the same command, on the same data"
                    )

    def _to_send(self, tensor: "Tensor") -> "Tensor":
        return tensor.detach() if self._by_nccl else tensor.detach().cpu()

    def _call(self, name: str, *args: Any, **named: Any) -> None:
        import torch.distributed

        try:
            getattr(torch.distributed, name)(*args, group=self._group, **named)
        except RuntimeError as error:  # gloo has no type of its own for a peer that is gone
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LostRank:
        import torch.distributed

        said = str(error).strip()
        if "timed out" in said.lower() or "timeout" in said.lower():
            return LostRank(f"another rank did not answer within {self._seconds:g} s; see --rank_timeout")
        if self._by_nccl and isinstance(error, torch.distributed.DistBackendError):
            reason = said.rpartition("Last error:")[2].strip().partition("\n")[0] or said.rpartition("\n")[2]
            return LostRank(f"NCCL fails: {reason}; NCCL_DEBUG=INFO tells more")
        return LostRank("another rank has ended")


def _flat(tensors: "Sequence[Tensor | None]") -> "Tensor":
    import torch

    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


def _parted(flat: "Tensor", like: "Sequence[Tensor | None]") -> "list[Tensor | None]":
    parts = iter(flat.split([tensor.numel() for tensor in like if tensor is not None]))
    return [None if tensor is None else next(parts).view(tensor.shape).to(tensor.dtype) for tensor in like]


ALONE = Ranks()


@contextlib.contextmanager
def together(seconds: float) -> Iterator[Ranks]:
    """The ranks while they work together; only rank 0 prints. An error in one ends all, and one tells it. A
    rank may keep the others waiting for `seconds`, here and later. Raises InputError if they do not meet."""
    rank, world = place()
    if world == 1:
        yield ALONE
        return
    store: Any = None
    by_nccl = False
    try:
        store = _meeting_place(rank, world, seconds)
        by_nccl = _meet(store, rank, world, seconds)
        with _spoken(rank == 0):
            yield Ranks(rank, world, seconds, by_nccl=by_nccl)
    except (InputError, OSError, RuntimeError) as error:
        if one_line(error) and not _tells(store, rank):
            raise SystemExit(2) from error
        raise
    except KeyboardInterrupt as error:
        if rank == 0:
            raise
        raise SystemExit(code_of(error)) from error
    finally:
        _part(store, rank, world, by_nccl and sys.exc_info()[0] is not None)


def _meeting_place(rank: int, world: int, seconds: float) -> Any:
    """The store that all ranks can reach: that of torchrun, else rank 0 has it."""
    from torch.distributed.rendezvous import rendezvous

    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        return next(iter(rendezvous("env://", rank, world, timeout=_span(seconds))))[0]
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].strip()
        raise InputError(
            f"rank {rank} of {world} cannot reach the others at MASTER_ADDR:MASTER_PORT {where} within "
            f"{seconds:g} s (--rank_timeout): {reason}"
        ) from error


def _meet(store: Any, rank: int, world: int, seconds: float) -> bool:
    """Join the others; whether NCCL connects the GPUs, of which then each has its own."""
    import torch
    import torch.distributed as dist

    local, size = (int(os.environ.get(name, default)) for name, default in _LOCAL.items())
    devices = torch.cuda.device_count() if dist.is_nccl_available() and torch.cuda.is_available() else 0
    for each in range(world):
        try:
            store.set(f"here/{rank}", "with a GPU of its own" if size <= devices else "")
            store.wait([f"here/{each}"], _span(seconds))
        except RuntimeError as error:
            raise InputError(
                f"rank {rank} of {world} has waited {seconds:g} s (--rank_timeout) for rank {each}; start "
                "them all at about the same time"
            ) from error
    by_nccl = all(store.get(f"here/{each}") for each in range(world))
    if by_nccl:
        torch.cuda.set_device(local % devices)  # as `find_device`: each may be shown its own alone
    backend = "cpu:gloo,cuda:nccl" if by_nccl else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_span(seconds))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].strip()
        raise InputError(
            f"rank {rank} of {world} cannot talk to the others within {seconds:g} s (--rank_timeout): "
            f"{reason}"
        ) from error
    return by_nccl


def _part(store: Any, rank: int, world: int, lost: bool) -> None:
    """Leave the others, who notice it; rank 0, which may have the store, goes last. What NCCL has begun is
    `lost` after an error: another rank may never answer, and would be waited for."""
    import torch.distributed

    with contextlib.suppress(RuntimeError):  # of those that are gone
        if torch.distributed.is_initialized() and lost:
            torch.distributed.distributed_c10d._abort_process_group()
        elif torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if store is not None:
            store.set(f"left/{rank}", "")
            if rank == 0:
                store.wait([f"left/{each}" for each in range(world)], _span(_LAST_WORDS))


def _tells(store: Any, rank: int) -> bool:
    """Whether this rank is the first that has something to tell; where rank 0 took the store with it, rank 1
    is."""
    try:
        return store is None or store.add(_TOLD, 1) == 1
    except RuntimeError:
        return rank == 1


def _span(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)
