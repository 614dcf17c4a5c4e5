"""Make a table of the paper: every training and evaluation that it takes, and its page.

    python -m amt recipe                                                  list the tables
    python -m amt recipe NAME --data_path DATA --output_dir OUT --dry-run   what would run, what is missing
    python -m amt recipe NAME --data_path DATA --output_dir OUT             run it, or go on with it

Stages that are done are passed over, a training goes on from its last checkpoint, an evaluation from its last
episode. A stage that fails ends the recipe with its exit code. Before anything runs, and with --dry-run
instead of it, everything the stages need is looked for; if something is missing the exit code is 1. Nothing
is downloaded here; main.py and test_meta_dataset.py fetch pretrained weights, where there is a way (but not
robustly pretrained ones for AutoLoRa).
"""

import argparse
import functools
import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from amt.cli import options
from amt.cli.options import Parser, place, recipes
from amt.cli.options import autolora as autolora_options
from amt.cli.options.recipes import AMT, AUTOLORA, TEST, TRAIN, Job, Recipe, follow
from amt.data.loading import open_splits
from amt.files.pretrained import CHECKPOINTS
from amt.models.architectures import base_arch
from amt.models.network import untrained
from meta_dataset_readers.domains import DOMAINS
from meta_dataset_readers.errors import InputError
from meta_dataset_readers.reader import EpisodeReader

ROOT = Path(__file__).resolve().parent.parent.parent
_PROGRAMS = {TRAIN: ("main.py",), TEST: ("test_meta_dataset.py",), AUTOLORA: ("main.py", "autolora")}


def main(argv: Sequence[str]) -> int:
    args = parser().parse(_joined(argv))
    if args.name is None:
        for name in recipes.known():
            print(f"{name:24} {recipes.load(name).table}")
        return 0
    recipe = recipes.load(args.name)
    for flag in ("data_path", "output_dir"):
        if getattr(args, flag) is None:
            raise InputError(
                f"--{flag} is missing: python -m amt recipe {args.name} --data_path DATA --output_dir OUT"
            )
    extra = {
        kind: [options.spelling(word) for word in recipes.split(text, f"--{kind}_flags")]
        for kind in _PROGRAMS
        for text in [getattr(args, f"{kind}_flags")]
    }
    jobs = recipes.plan(recipe, args.data_path, args.output_dir, args.checkpoints, extra, args.stages)
    for job in jobs:
        job.check_note()
    needed = needs(jobs, args)
    if args.dry_run:
        show(recipe, jobs, needed)
        return 1 if any(need.problem for need in needed) else 0
    missing = [need for need in needed if need.problem and not need.fetched]
    if missing:
        print(*(need.line() for need in missing), sep="\n", file=sys.stderr)
        return 1
    return run(jobs)


def parser() -> Parser:
    """The flags of the command."""
    parser = Parser(__doc__.partition("\n")[0])
    parser.prog = "python -m amt recipe"
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a recipe, or a .yaml file (default: list them)"
    )
    parser.add_argument("--data_path", type=place, help="folder with one folder per source or dataset")
    parser.add_argument("--output_dir", type=place, help="where all stages write; recipes may share it")
    parser.add_argument("--checkpoints", type=place, default=CHECKPOINTS, help="where released files are")
    parser.add_argument("--train_flags", default="", metavar="FLAGS", help="more flags for every main.py")
    parser.add_argument(
        "--test_flags", default="", metavar="FLAGS", help="more for every test_meta_dataset.py"
    )
    parser.add_argument(
        "--autolora_flags", default="", metavar="FLAGS", help="more for every main.py autolora"
    )
    parser.add_argument(
        "--stages", nargs="+", default=["*"], metavar="STAGE", help="only these, such as 'test/*'"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="run nothing, say what would be and what is missing"
    )
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """`--train_flags FLAGS` as one word: argparse would take a FLAGS such as --no_pretrain for our own."""
    words, joined = iter(argv), []
    for word in words:
        if options.spelling(word) in [f"--{kind}_flags" for kind in _PROGRAMS]:
            word = "=".join([word, *itertools.islice(words, 1)])
        joined.append(word)
    return joined


# --- what the stages need --------------------------------------------------------------------------------


class Need(NamedTuple):
    """Something that stages need.

    Args:
        what: for example "source omniglot".
        part: of several of one kind, such as its splits; or empty.
        found: what there is of it, in words; empty if it is missing.
        problem: what is wrong with it; empty if nothing is.
        hint: what it is and how it is had.
        fetched: whether a stage itself may get it.
    """

    what: str
    part: str = ""
    found: str = ""
    problem: str = ""
    hint: str = ""
    fetched: bool = False

    def line(self) -> str:
        what = f"{self.what} ({self.part})" if self.part else self.what
        if not self.problem:
            return f"there: {what}: {self.found}"
        return f"missing: {what}: {self.problem}" + (f"; {self.hint}" if self.hint else "")


def needs(jobs: Sequence[Job], args: argparse.Namespace) -> list[Need]:
    """What the stages that are left need, each once. Opens sources, reads no picture, downloads nothing."""
    found = [*_places(args)]
    for job in jobs:
        if not job.done() and not job.left_out():
            found += [*_needs_of_stages(job, jobs), *_needs_of_flags(job)]
    parts: dict[Need, list[str]] = {}
    for need in dict.fromkeys(found):
        parts.setdefault(need._replace(part=""), []).append(need.part)
    return [need._replace(part=", ".join(filter(None, names))) for need, names in parts.items()]


def _places(args: argparse.Namespace) -> Iterator[Need]:
    try:
        options.check_output(args.output_dir)
    except InputError as error:
        yield Need("folder for the output", problem=str(error))
    if not args.data_path.is_dir():
        yield Need(f"data path {args.data_path}", problem="no such directory")


def _needs_of_stages(job: Job, jobs: Sequence[Job]) -> Iterator[Need]:
    """What other stages should have made, and are not to make now."""
    for other in job.waits_for:
        if other not in jobs and not other.done():
            yield Need(f"{other.makes}, for {job.title}", problem=f"{other.title} is not done, nor to be run")


_untrained = functools.cache(untrained)


def _needs_of_flags(job: Job) -> Iterator[Need]:
    if job.stage.kind in (TRAIN, TEST):
        yield from _needs_of_episodes(job)
    elif job.stage.kind == AUTOLORA:
        args = parsed(job)
        if args.checkpoint is not None and not job.waits_for:
            problem = "" if args.checkpoint.is_file() else "no such file"
            yield Need(f"robustly pretrained network {args.checkpoint}", found="a file", problem=problem)
        yield _dataset(args.dataset, args.data, args.val, args.seed)


@functools.cache  # a small one is read as a whole to be opened, and dozens of stages ask for it
def _dataset(name: str, folder: Path, val: float, seed: int) -> Need:
    what = f"dataset {name}"
    try:
        splits = open_splits(name, folder, val, seed)
    except InputError as error:
        return Need(what, problem=str(error))
    sizes = "/".join(str(len(part)) for part in (splits.train, splits.validation, splits.test))
    classes = len(splits.class_names)
    return Need(what, found=f"{classes} classes, {sizes} images to train, validate and test, in {folder}")


def _needs_of_episodes(job: Job) -> Iterator[Need]:
    args = parsed(job)
    arch = base_arch(args.arch)
    if not args.no_pretrain and (args.resume is None or _on_untuned(job.stage.kind, args)):
        yield _weights(arch, args.pretrained_checkpoint)
    if args.resume is not None and not args.resume.is_file() and not job.waits_for:
        yield Need(f"checkpoint {args.resume}, for {job.title}", problem="no such file")
    image_size = args.image_size or _untrained(arch)[0].image_size
    for source, split in splits(job.stage.kind, args):
        yield _source(source, split, options.reading(args, image_size))


def _on_untuned(kind: str, args: argparse.Namespace) -> bool:
    """Whether an attack makes its images on the pretrained network."""
    return kind == TEST and any(attack.kind == "transfer" for attack in options.attacks(args))


def parsed(job: Job) -> argparse.Namespace:
    """The flags of any stage but one of `AMT`, as its own program reads them."""
    training = job.stage.kind == TRAIN
    try:
        if job.stage.kind == AUTOLORA:
            return autolora_options.parse(list(job.flags))
        parser = options.training_parser() if training else options.testing_parser()
        args = parser.parse_args(list(job.flags))
        (options.check_training if training else options.check_testing)(args)
        if not training:
            options.deployments(args)
    except InputError as error:
        raise InputError(f"{job.title}: {error}") from error
    return args


def splits(kind: str, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The sources that a stage reads, with their splits."""
    if kind == TRAIN:
        training = options.training_sources(args)
        yield from ((source, "TRAIN") for source in training)
        if args.nValEpisode and not args.val_episodes:
            yield from ((source, "VALID") for source in args.val_sources or training)
        return
    for source, deployment in options.deployments(args).items():
        yield source, args.split
        if deployment.select == "valid":
            yield deployment.select_on or source, "VALID"


def _source(name: str, split: str, reading: dict) -> Need:
    what = f"source {name}"
    if not reading["root"].is_dir():
        return Need(what, split, problem="no data path", hint=_described(name))
    try:
        spec = EpisodeReader(source=name, split=split, n_episodes=0, **reading).spec
    except InputError as error:
        return Need(what, split, problem=str(error), hint=_described(name))
    classes = spec.classes(split)
    n_images = sum(spec.images_per_class[class_id] for class_id in classes)
    return Need(f"{what}, {split}", found=f"{len(classes)} classes, {n_images} images in {spec.directory}")


def _described(name: str) -> str:
    """What is known about a published domain, for somebody who has yet to get it."""
    if name not in DOMAINS:
        return ""
    domain = DOMAINS[name]
    sizes = "/".join(map(str, domain.classes))
    images = "" if domain.images is None else f", {domain.images:,} images"
    return f"of {domain.benchmark}, {sizes} classes{images} ({domain.protocol}); licence: {domain.licence}"


def _weights(arch: str, file: Path | None) -> Need:
    """The pretrained weights of a network: a file that is named, or where load_network looks for one."""
    what = f"pretrained weights of {arch}"
    if file is not None:
        problem = "" if file.is_file() else f"{file}: no such file"
        return Need(what, found=str(file), problem=problem)
    origin = _untrained(arch)[1]
    candidates = [CHECKPOINTS / f"{arch}{ending}" for ending in (".safetensors", ".pth")]
    found = next((str(path) for path in candidates if path.is_file()), None)
    if found is None and origin.hub is not None:
        cached = huggingface_hub.try_to_load_from_cache(origin.hub, "model.safetensors")
        found = cached if isinstance(cached, str) else None
    if found is not None:
        return Need(what, found=found)
    ways = [f"a stage that needs them asks timm's hub for {origin.hub}"] if origin.hub else []
    ways += [f"{origin.url or 'their file'}, saved as {candidates[-1]}"]
    ways += ["a file named by --pretrained_checkpoint in --train_flags and --test_flags"]
    hint = "they are had in one of these ways: " + "; ".join(ways)
    return Need(what, problem="not on this machine", hint=hint, fetched=origin.hub is not None)


# --- showing and running ---------------------------------------------------------------------------------


def show(recipe: Recipe, jobs: Sequence[Job], needed: Sequence[Need]) -> None:
    """Print what would run, and what of its needs is there and what is not."""
    print(f"{recipe.name}: {recipe.table}")
    for what, words in recipe.needs.items():
        print(f"  {what}: {words}")
    for job in jobs:
        print(f"\n{job.title}: {_state(job)}")
        if not job.left_out():
            print(f"  {shlex.join(command(job))}")
    print()
    for need in needed:
        print(need.line())
    if any(job.stage.kind in (TRAIN, TEST) for job in jobs):
        print("whether every picture can be read: python -m meta_dataset_readers.check DATA_PATH")


def _state(job: Job) -> str:
    if job.left_out():
        return f"left out, {job.starts_from} is not there"
    if job.done():
        return f"done, {job.makes}"
    return f"to be continued from {job.makes}" if job.begun() else "to do"


def command(job: Job) -> list[str]:
    """The command line of a stage."""
    if job.stage.kind == AMT:
        return [sys.executable, "-m", "amt", job.stage.name, *job.flags]
    script, *words = _PROGRAMS[job.stage.kind]
    return [sys.executable, os.path.relpath(ROOT / script), *words, *job.flags]


def run(jobs: Sequence[Job]) -> int:
    """Run what is left to do, in order; the exit code of the first stage that fails, else 0."""
    for job in jobs:
        if job.left_out() or job.done():
            print(f"{job.title}: {_state(job)}", flush=True)
            continue
        job.note()
        words = command(job)
        print(f"{job.title}: {shlex.join(words)}", flush=True)
        code = follow(words)
        if code == 0 and not job.done():
            raise InputError(f"{job.title}: ended without an error, but {job.makes} is not complete")
        if code:
            print(f"error: stage {job.title} ended with exit code {code}", file=sys.stderr)
            return code
    return 0
