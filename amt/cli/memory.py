"""Whether an episode fits into memory, and with which flags it does: said by `--dry_run`, and by training."""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterable

import torch

from amt.cli import options
from amt.models.network import Network
from amt.training.memory import Plan, needed
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.spec import DatasetSpec

_PARTS = (64, 32, 16, 8, 4, 2, 1)  # what --micro_batch is advised to be, of more than that


def plan_of(args: argparse.Namespace, specs: Iterable[DatasetSpec], ranks: int) -> Plan:
    """The largest step of training that the flags ask for, on sources of these specifications, of the rank
    with most levels."""
    levels = -(-len(options.levels(args)) // ranks)
    classes = [len(spec.classes("TRAIN")) for spec in specs]
    support, query = largest_episode(options.sampling(args), max(classes, default=None))
    return Plan(
        options.method(args),
        args.tune,
        levels,
        min(args.levels_at_once or levels, levels),
        support,
        query,
        args.micro_batch,
        args.grad_checkpointing,
    )


def largest_episode(sampling: EpisodeSampling, classes: int | None = None) -> tuple[int, int]:
    """How many support and query images an episode has at most, of a source with so many classes."""
    ways = sampling.num_ways or min(sampling.max_ways_upper_bound, classes or sampling.max_ways_upper_bound)
    query = ways * (sampling.max_num_query if sampling.num_query is None else sampling.num_query)
    if sampling.support_range is not None:
        return ways * sampling.support_range[1], query
    each = sampling.max_support_size_contrib_per_class
    return max(ways, min(sampling.max_support_set_size, ways * each)), query


def free(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; None for the CPU, whose memory is shared and may be swapped."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def installed() -> int | None:
    """Bytes that this machine has; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def said(network: Network, plan: Plan, room: int | None) -> tuple[bool, str]:
    """Whether a step is estimated to fit into `room` bytes, which it does if nobody knows them; and the
    estimate in words, with the flags that make it fit."""
    need = needed(network, plan)
    levels = f"{plan.at_once} of {plan.members} levels at once" if plan.members > 1 else "one level"
    words = (
        f"about {_size(need)} for {plan.support} support and {plan.query} query images, the most there are, "
        f"and {levels}"
    )
    if room is None or need <= room:
        return True, words
    return False, f"{words}, of {_size(room)}; {_advice(network, plan, room)}"


def check_fits(network: Network, plan: Plan) -> None:
    """Raise an `InputError` if a step of training will not fit into what is known to be free."""
    fits, words = said(network, plan, free(network.device))
    if not fits:
        raise InputError(f"an episode does not fit into the memory of {network.device}: {words}")


def _advice(network: Network, plan: Plan, room: int) -> str:
    """The first of the flags, from those that cost least, with which a step fits into `room` bytes."""
    least = plan.micro_batch or max(plan.support, plan.query)
    parts = [None, *(part for part in _PARTS if part < least)]
    for again, at_once, part in itertools.product((False, True), (plan.at_once, 1), parts):
        tried = dataclasses.replace(
            plan,
            grad_checkpointing=plan.grad_checkpointing or again,
            at_once=at_once,
            micro_batch=part or plan.micro_batch,
        )
        need = needed(network, tried)
        if need <= room:
            flags = [
                *([f"--micro_batch {tried.micro_batch}"] if part else []),
                *([f"--levels_at_once {at_once}"] if at_once < plan.at_once else []),
                *(["--grad_checkpointing"] if tried.grad_checkpointing > plan.grad_checkpointing else []),
            ]
            return f"{' '.join(flags)} needs {_size(need)}"
    return "no flag makes it fit: take a smaller --arch or --image_size"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
