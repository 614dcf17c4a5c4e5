"""How many cores this process may use: fewer than the machine has, in a container or a batch job."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

MOST_WORKERS = 8


def available_cores(root: Path = Path("/")) -> int:
    """The cores that this process may run on, or as many as the quota of its control group pays for, at least
    1; `root` is where /proc and /sys lie.

    A quota (`docker run --cpus`, Kubernetes, Slurm) does not show in the number of cores. Threads beyond it
    are stopped in turn while the others wait for them, which makes small networks many times slower.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *(math.ceil(quota) for quota in _quotas(root))]))


def default_workers() -> int:
    """How many processes read ahead if nobody says: a core less than there are for this process and those
    that torchrun started beside it, at least 1 and at most `MOST_WORKERS`, which keep a GPU busy."""
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    share = available_cores() // max(1, int(beside) if beside.isdecimal() else 1)
    return max(1, min(MOST_WORKERS, share - 1))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups and of those around them; version 2, then 1."""
    for line in _words(root / "proc/self/cgroup", separator="\n"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        version_2 = controllers == ""
        if not version_2 and "cpu" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup" if version_2 else "sys/fs/cgroup/cpu")
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            folder = top / group
            if version_2:
                yield from _ratio(_words(folder / "cpu.max"))
            else:
                yield from _ratio(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _ratio(words: list[str]) -> list[float]:
    """[quota / period], or nothing where there is no quota: "max", and -1 in version 1."""
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return []
    return [int(words[0]) / int(words[1])]


def _words(file: Path, separator: str | None = None) -> list[str]:
    """What a file of the kernel's says; nothing where it is not there."""
    try:
        return file.read_text(errors="replace").split(separator)  # of the kernel, whose files have no size
    except OSError:
        return []
