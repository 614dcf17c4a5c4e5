"""What the benchmarks share: how figures are written, and on which machine they were taken.

Knows nothing of what is measured.
"""

import os
import platform
import resource
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20


def peak_resident() -> float:
    """Greatest resident set of this process so far, in MiB."""
    kilobytes = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / MIB


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest, to three digits."""
    return f"{digits(statistics.median(values))} ({digits(min(values))}-{digits(max(values))})"


def ratio(ours: Sequence[float], baseline: Sequence[float]) -> str:
    """Of the medians, baseline to ours, with the least and greatest of turns that were taken side by side."""
    whole = statistics.median(baseline) / statistics.median(ours)
    turns = [theirs / mine for mine, theirs in zip(ours, baseline, strict=True)]
    return f"{whole:.2f} ({min(turns):.2f}-{max(turns):.2f})"


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, str | int]:
    """Processor, interpreter and system: what every figure depends on."""
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
