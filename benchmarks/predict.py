"""Seconds to a first answer, and images per second of the few-shot classifier beside a hand-written one.

    python benchmarks/predict.py                              vit_mini and a ViT-S/16 at 128 px, a few minutes
    python benchmarks/predict.py --quick                      vit_mini alone, to see that it works

A task is 5-way: 25 support images to fit and 100 queries to classify, arrays of the network's own size, so
reading and resizing are no part of it. Three sides take turns in one process, once the first and the last
give the same answers; figures are medians with least and greatest:

    ours, one adapter     FewShotClassifier of a pool of one, so nothing is routed: 125 images go through
    ours, routed          of a pool of four, scored on the clean and the augmented support: 325 images
    prototypical network  written by hand on timm's model: features, means, cosine, and nothing else

"Bare" is the time of the same number of forward passes of timm's own model, in the same chunks. A first
answer is that of `python -m amt predict` with pictures in files, in fresh processes: wall time, CPU time, and
how much of it `import torch` alone takes. Weights are random; the rate of one large product says how fast the
machine is at the time.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from harness import machine, spread
from PIL import Image
from side_by_side import RANK, Machine, gemm_rate, random_backbone, random_pool
from torch import Tensor

from amt.cli.options import Parser
from amt.few_shot.classifier import FewShotClassifier
from amt.files import checkpoint
from amt.files.export.merged import at_image_size
from amt.files.export.timm_model import timm_call
from amt.models.network import CHUNK, Network
from amt.models.weights import stream
from meta_dataset_readers.errors import exit_on_bad_input
from meta_dataset_readers.settings import positive_int

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("vit_mini", "dino_small_patch16")
N_WAY, SHOTS, QUERIES, POOL = 5, 5, 100, 4
Images = np.ndarray


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="networks")
    parser.add_argument("--turns", type=positive_int, default=7, help="turns of every side")
    parser.add_argument("--starts", type=positive_int, default=3, help="cold processes")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="vit_mini alone, one turn, one start")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    args = parser.parse(argv)
    if args.quick:
        args.arch, args.turns, args.starts = args.arch[:1], 1, 1
    return args


def write_pool(file: Path, network: Network, members: int) -> Path:
    """A pool of random adapters on a random network; a single one changes nothing, so that the network by
    hand must give the same answers."""
    pool = random_pool(network, members, RANK, stream(0))
    if members == 1:
        pool = pool.with_factors({name: 0 * factor for name, factor in pool.factors.items()})
    checkpoint.save(file, checkpoint.Checkpoint(pool, {"arch": network.arch}))
    return file


def pictures(side: int) -> tuple[Images, np.ndarray, Images]:
    """Support (25, 3, S, S), labels (25,) and queries (100, 3, S, S), random in [0, 1]."""
    rng = np.random.default_rng(0)
    support = rng.random((N_WAY * SHOTS, 3, side, side), dtype=np.float32)
    return support, np.arange(N_WAY).repeat(SHOTS), rng.random((QUERIES, 3, side, side), dtype=np.float32)


def by_hand(network: Network, support: Images, labels: np.ndarray, queries: Images) -> Tensor:
    """Prototypes and cosine on timm's model, as anybody would write them."""
    with torch.no_grad():
        found = chunked(network, support)
        own = torch.from_numpy(labels)
        centres = torch.stack([found[own == label].mean(0) for label in range(N_WAY)])
        logits = F.normalize(chunked(network, queries), dim=1) @ F.normalize(centres, dim=1).T
        return logits.argmax(1)


def chunked(network: Network, images: Images) -> Tensor:
    """Features (n, D) by timm's own forward pass, in chunks; the module is `of_timm`."""
    normal = network.normalise(torch.from_numpy(images))
    with torch.no_grad():
        return torch.cat([network.module(part) for part in normal.split(CHUNK)])


def of_timm(network: Network) -> Network:
    """timm's own model with the same weights, made for the network's image size."""
    call = timm_call(network, network.image_size)
    module = timm.create_model(call.name, **call.options)
    module.load_state_dict(at_image_size(network, network.weights))
    return dataclasses.replace(network, module=module)


def sides(arch: str, folder: Path) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What takes turns, and how many images go through the network in it."""
    network = random_backbone(arch, Machine("cpu", torch.get_num_threads(), None, 0))
    support, labels, queries = pictures(network.image_size)
    one, four = (
        FewShotClassifier(write_pool(folder / f"{arch}-{n}.safetensors", network, n), augment_probability=1.0)
        for n in (1, POOL)
    )
    network = of_timm(network)
    check_alike(one.fit(support, labels).predict(queries), by_hand(network, support, labels, queries))
    routed = len(support) * 2 * POOL

    def bare(count: int) -> Callable[[], object]:
        everything = np.resize(np.concatenate([support, queries]), (count, *support.shape[1:]))
        return lambda: chunked(network, everything)

    plain = len(support) + len(queries)
    runs = {
        "ours, one adapter": lambda: one.fit(support, labels).predict(queries),
        "ours, routed": lambda: four.fit(support, labels).predict(queries),
        "prototypical network by hand": lambda: by_hand(network, support, labels, queries),
        "bare, 125 images": bare(plain),
        f"bare, {plain + routed} images": bare(plain + routed),
    }
    images = [plain, plain + routed, plain, plain, plain + routed]
    return runs, dict(zip(runs, images, strict=True))


def check_alike(ours: np.ndarray, theirs: Tensor) -> None:
    """Raise a RuntimeError unless both give the same answers; a tie may differ by rounding."""
    if (different := int((ours != theirs.numpy()).sum())) > len(ours) // 50:
        raise RuntimeError(f"the two sides give other answers to {different} of {len(ours)} images")


def take_turns(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of every turn of every side, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            began = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


class Cold(NamedTuple):
    """Seconds of fresh processes: wall and CPU time of a first answer, CPU time of `import torch` alone."""

    wall: list[float]
    cpu: list[float]
    torch: list[float]


def cold_starts(arch: str, folder: Path, starts: int, threads: int) -> Cold:
    """`amt predict` in fresh processes, 25 examples, one picture, no attack; in turns with `import torch`."""
    rng = np.random.default_rng(0)
    for label in range(N_WAY):
        (folder / "support" / f"class {label}").mkdir(parents=True, exist_ok=True)
        for shot in range(SHOTS):
            pixels = rng.integers(0, 256, (120, 160, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "support" / f"class {label}" / f"{shot}.jpg")
    Image.fromarray(pixels).save(folder / "query.jpg")
    words = [folder / f"{arch}-{POOL}.safetensors", "--support", folder / "support", folder / "query.jpg"]
    command = [
        sys.executable,
        "-m",
        "amt",
        "predict",
        *map(str, words),
        "--threads",
        str(threads),
        "--epsilon",
    ]
    found = Cold([], [], [])
    for _ in range(starts):
        wall, cpu = process_seconds(command)
        found.wall.append(wall)
        found.cpu.append(cpu)
        found.torch.append(process_seconds([sys.executable, "-c", "import torch"])[1])
    return found


def process_seconds(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(seconds: dict[str, list[float]], images: dict[str, int]) -> list[str]:
    """The lines of a table: times, rates, and the share of bare passes of as many images."""
    bare = {images[name]: statistics.median(seconds[name]) for name in seconds if name.startswith("bare")}
    lines = [
        "| 25 support, 100 query images | seconds | queries/s | of as many bare passes |",
        "|---|---|---|---|",
    ]
    for name, turns in seconds.items():
        middle = statistics.median(turns)
        rate = "" if name.startswith("bare") else f"{QUERIES / middle:.0f}"
        lines.append(f"| {name} | {spread(turns)} | {rate} | {middle / bare[images[name]]:.2f} |")
    return lines


def main() -> int:
    args = parse(sys.argv[1:])
    torch.set_num_threads(args.threads or torch.get_num_threads())
    threads, results = torch.get_num_threads(), {}
    rate = gemm_rate(Machine("cpu", threads, None, 512 if args.quick else 2048)) / 1e9
    about = machine() | {"threads": threads, "torch": torch.__version__, "GFLOP/s": round(rate)}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        for arch in args.arch:
            runs, images = sides(arch, Path(name))
            seconds = take_turns(runs, args.turns)
            cold = cold_starts(arch, Path(name), args.starts, threads)
            print("", arch, "", *table(seconds, images), sep="\n")
            torch_alone = f"`import torch` alone {spread(cold.torch)}"
            print(f"\nfirst answer of a cold process: {spread(cold.wall)} s, {spread(cold.cpu)} s of CPU")
            print(f"of these {torch_alone}", flush=True)
            results[arch] = {"seconds": seconds, "cold": cold._asdict()}
    if args.json:
        args.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    exit_on_bad_input(main)
