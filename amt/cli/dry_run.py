"""What a command would do, and all that it lacks: `--dry_run`.

Settings have been checked before; here the output folder, weights, checkpoints and data are looked for. Opens
sources, reads checkpoints and the files of weights that are named as the command itself does, reads no
picture, downloads nothing and writes nothing.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from amt.cli import options
from amt.cli.options.texts import check_classes
from meta_dataset_readers.errors import InputError, say

if TYPE_CHECKING:
    from amt.files.checkpoint import Checkpoint
    from amt.files.text_prototypes import TextPrototypes
    from amt.models.network import Network
    from meta_dataset_readers.reader import EpisodeReader


class Need(NamedTuple):
    """Something that a command needs.

    Args:
        what: for example "source omniglot".
        found: what there is of it, in words; empty if it is missing.
        problem: what is wrong with it; empty if nothing is.
        hint: where it comes from.
    """

    what: str
    found: str = ""
    problem: str = ""
    hint: str = ""

    def line(self) -> str:
        if not self.problem:
            return f"there: {self.what}: {self.found}"
        return f"missing: {self.what}: {self.problem}" + (f"; {self.hint}" if self.hint else "")


class Files:
    """What a command with these flags reads: once for all that is looked for.

    Each raises an `InputError` where a file is missing or at fault.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.untrained = functools.cache(self._untrained)  # built in seconds, and asked for by every source
        self.reader = functools.cache(self._reader)

    @functools.cached_property
    def checkpoint(self) -> "Checkpoint | None":
        """The pool of --resume, which fits the network; None without."""
        from amt.files import checkpoint
        from amt.models.architectures import base_arch, stated

        file = self.args.resume
        if file is None:
            return None
        saved = checkpoint.load(file)
        network = self.untrained(stated(base_arch(self.args.arch), saved.pool.shapes))
        checkpoint.check_architecture(file, saved.pool, network.weights, network.arch)
        return saved

    @functools.cached_property
    def texts(self) -> "TextPrototypes | None":
        """Those of --text_prototypes."""
        from amt.files import text_prototypes

        return text_prototypes.given(self.args.text_prototypes)

    @functools.cached_property
    def features(self) -> int:
        """How many the network of --pretrained_checkpoint has."""
        from amt.files.pretrained import load_network

        args = self.args
        file, size = args.pretrained_checkpoint, args.image_size
        return load_network(args.arch, file, image_size=size, key=args.weights_key).module.num_features

    @property
    def image_size(self) -> int:
        from amt.models.architectures import base_arch

        return self.args.image_size or self.untrained(base_arch(self.args.arch)).image_size

    def _untrained(self, arch: str) -> "Network":
        from amt.models.network import untrained

        return untrained(arch)[0]

    def _reader(self, source: str, split: str) -> "EpisodeReader":
        from meta_dataset_readers.reader import EpisodeReader

        reading = options.reading(self.args, self.image_size)
        return EpisodeReader(source=source, split=split, n_episodes=0, **reading)


def training(args: argparse.Namespace) -> int:
    """What main.py would do, said; 0, or 2 if something is missing."""
    settings = options.tune_settings(args)
    tuned = f"{len(options.levels(args))} {'networks' if args.tune == 'full' else 'LoRAs'} of {args.arch}"
    say(f"would meta-tune {tuned}, {settings.epochs} epochs of {settings.episodes_per_epoch} episodes")
    return _say(_training_needs(args, Files(args)))


def testing(args: argparse.Namespace) -> int:
    """What test_meta_dataset.py would do, said; 0, or 2 if something is missing."""
    deployments, attacks = options.deployments(args), options.attacks(args)
    columns = ", ".join(["clean", *(name for attack in attacks for name in attack.columns)])
    say(f"would evaluate {args.nTestEpisode} episodes of each of {', '.join(deployments)}: {columns}")
    return _say(_testing_needs(args, Files(args)))


def fine_tuning(args: argparse.Namespace) -> int:
    """What main.py autolora would do, said; 0, or 2 if something is missing."""
    from amt.cli.options import autolora

    modes = "test" if args.eval_only else f"fine-tune {args.method} {' '.join(autolora.modes(args))} of"
    say(f"would {modes} {args.arch} on {args.dataset}")
    return _say(_fine_tuning_needs(args))


def page(args: argparse.Namespace) -> int:
    """What `amt report` would do, said; 0, or 2 if something is missing."""
    from amt.evaluation import leaderboard, runs, seeds

    say(f"would write {args.out}, of {len(args.runs)} runs")
    needs = [_output(args.out.parent, "--out")]
    for folder in (folder for word in args.runs for folder in seeds.named(word)[1]):
        load = leaderboard.read if folder.suffix == ".json" else runs.load
        look = functools.partial(_domains, load, folder)
        needs.append(_checked(f"run {folder}", folder, args, look))
    return _say(needs)


def _domains(load: Callable, folder: Path) -> str:
    return f"{len(load(folder).rows)} domains"


def _say(needs: Iterator[Need] | Sequence[Need]) -> int:
    needs = list(dict.fromkeys(needs))
    for need in needs:
        say(need.line())
    return 2 if any(need.problem for need in needs) else 0


def _training_needs(args: argparse.Namespace, files: Files) -> Iterator[Need]:
    yield from _places(args)
    if not args.no_pretrain:
        yield _weights(files)
    if args.resume is not None:
        yield _checkpoint(files)
    for file in args.val_episodes:
        yield _checked(f"stored episodes {file}", file, args, functools.partial(_stored, files, file))
    sources = options.training_sources(args)
    yield from (_source(files, source, "TRAIN") for source in sources)
    if args.nValEpisode and not args.val_episodes:
        yield from (_source(files, source, "VALID") for source in args.val_sources or sources)
    yield _memory(files, sources)


def _memory(files: Files, sources: Sequence[str]) -> Need:
    """The memory that the largest episode needs, of the sources that can be opened."""
    from amt.cli import memory
    from amt.files.ranks import place
    from amt.models.architectures import base_arch
    from amt.models.network import find_device

    args, specs = files.args, []
    for source in sources:
        with contextlib.suppress(InputError):  # said where the source is
            specs.append(files.reader(source, "TRAIN").spec)
    network = dataclasses.replace(
        files.untrained(base_arch(args.arch)),
        image_size=files.image_size,
        autocast=options.arithmetic(args).autocast,
    )
    device = find_device(args.device)
    known = memory.free(device)
    fits, words = memory.said(network, memory.plan_of(args, specs, place()[1]), known or memory.installed())
    return Need(f"memory of {device}", **{"found" if fits or known is None else "problem": words})


def _testing_needs(args: argparse.Namespace, files: Files) -> Iterator[Need]:
    yield from _places(args)
    if options.needs_pretrained(args):
        yield _weights(files)
    if args.resume is not None:
        yield _checkpoint(files)
    for source, split in _read(args):
        yield _source(files, source, split)
    if file := args.text_prototypes:
        yield _checked(f"text prototypes {file}", file, args, lambda: _texts(files))
    if args.resume not in args.dry_run:
        yield from _heads(files)


def _read(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The sources and splits that a test scores, and chooses settings on."""
    for source, deployment in options.deployments(args).items():
        yield source, args.split
        if deployment.select == "valid":
            yield deployment.select_on or source, "VALID"


def _texts(files: Files) -> str:
    """What texts there are, for all classes of the sources that can be opened."""
    found = files.texts
    for source, split in _read(files.args):
        reader = None
        with contextlib.suppress(InputError):  # said where the source is
            reader = files.reader(source, split)
        if reader is not None:
            check_classes(found, reader)
    return f"{len(found.names)} classes, {found.width} numbers each"


def _heads(files: Files) -> Iterator[Need]:
    """What the heads lack; nothing where a file is missing, which is said where the file is."""
    from amt.evaluation.needs import check_heads

    args = files.args
    offered = [head for each in options.deployments(args).values() for head in each.offered_heads]
    if not any(head.needs_statistics or head.other is not None for head in offered):
        return
    try:
        saved, texts = files.checkpoint, files.texts
        dim = _dim(files) or (texts.width if texts else 0)
    except InputError:
        return
    pool, statistics = (saved.pool, saved.statistics) if saved else (None, None)
    where = str(args.resume or "the pretrained network")
    try:
        check_heads(offered, pool, statistics, where, dim, texts)
    except InputError as error:
        yield Need("what the heads need", problem=str(error))


def _dim(files: Files) -> int:
    """How many features there are; 0 where a file of timm's hub decides."""
    from amt.models.architectures import TIMM, base_arch, stated

    args, arch = files.args, base_arch(files.args.arch)
    if files.checkpoint is not None:
        return files.untrained(stated(arch, files.checkpoint.pool.shapes)).module.num_features
    if args.pretrained_checkpoint is not None and not args.no_pretrain:
        return files.features
    return 0 if arch.startswith(TIMM) else files.untrained(arch).module.num_features


def _fine_tuning_needs(args: argparse.Namespace) -> Iterator[Need]:
    from amt.cli import fine_tune
    from amt.cli.options import autolora
    from amt.models.network import build_classifier

    @functools.cache
    def opened() -> fine_tune.Splits:
        return fine_tune.open_data(args)

    def start() -> str:
        try:
            classes = len(opened().class_names)
        except InputError:  # said where the data set is
            return "a file"
        network = build_classifier(args.arch, classes, args.resize, resize=autolora.inside(args))
        return fine_tune.open_network(args, network)[1].kind

    def sizes() -> str:
        splits = opened()
        counts = "/".join(str(len(part)) for part in (splits.train, splits.validation, splits.test))
        classes = f"{args.num_classes or len(splits.class_names)} classes"
        return f"{classes}, {counts} images to train, validate and test, in {args.data}"

    yield _output(args.output, "--output")
    if args.checkpoint is not None:
        what = f"robustly pretrained network {args.checkpoint}"
        yield _checked(what, args.checkpoint, args, start)
    yield _checked(f"dataset {args.dataset}", args.data, args, sizes)


def _checked(what: str, path: Path, args: argparse.Namespace, look: Callable[[], str]) -> Need:
    """A file or folder that is going to be made, or is there and sound, as `look` says of it."""
    if path in args.dry_run:
        return Need(what, found="an earlier command makes it")
    if not path.exists():
        return Need(what, problem="no such file or folder")
    try:
        return Need(what, found=look())
    except InputError as error:
        return Need(what, problem=str(error))


def _places(args: argparse.Namespace) -> Iterator[Need]:
    yield _output(args.output_dir, "--output_dir")
    found = {"found": "a folder"} if args.data_path.is_dir() else {"problem": "no such folder"}
    yield Need(f"data path {args.data_path}", **found)


def _output(folder: Path, flag: str) -> Need:
    try:
        options.check_output(folder, flag)
    except InputError as error:
        return Need("folder for the output", problem=str(error))
    return Need("folder for the output", found=str(folder))


def _checkpoint(files: Files) -> Need:
    file = files.args.resume
    return _checked(f"checkpoint {file}", file, files.args, lambda: f"{len(files.checkpoint.pool)} adapters")


def _stored(files: Files, file: Path) -> str:
    from meta_dataset_readers.stored_episodes import open_episodes

    return f"{len(open_episodes(file, files.image_size))} episodes"


def _weights(files: Files) -> Need:
    """The pretrained weights of a network: a file that is named, or where load_network looks for one."""
    import huggingface_hub

    from amt.files import shipped
    from amt.models.architectures import HUB_FILE, base_arch
    from amt.models.network import untrained

    args, arch = files.args, base_arch(files.args.arch)
    what = f"pretrained weights of {arch}"
    if args.pretrained_checkpoint is not None:
        file = args.pretrained_checkpoint
        return _checked(what, file, args, lambda: f"{file}, {files.features} features")
    origin = untrained(arch)[1]
    found = None if (file := shipped.boxed(arch)) is None else str(file)
    if found is None and origin.hub is not None:
        cached = huggingface_hub.try_to_load_from_cache(origin.hub, HUB_FILE)
        found = cached if isinstance(cached, str) else None
    if found is not None:
        return Need(what, found=found)
    ways = [f"timm's hub, which a run asks for {origin.hub}"] if origin.hub else []
    ways += [
        f"{origin.url or 'their file'}, saved as {shipped.BOX / arch}.pth",
        "--pretrained_checkpoint FILE",
    ]
    return Need(what, problem="not on this machine", hint=f"they come from {', or '.join(ways)}")


def _source(files: Files, name: str, split: str) -> Need:
    what = f"source {name}, {split}"
    if not files.args.data_path.is_dir():
        return Need(what, problem="no data path", hint=_described(name))
    try:
        spec = files.reader(name, split).spec
    except InputError as error:
        return Need(what, problem=str(error), hint=_described(name))
    classes = spec.classes(split)
    n_images = sum(spec.images_per_class[class_id] for class_id in classes)
    return Need(what, found=f"{len(classes)} classes, {n_images} images in {spec.directory}")


def _described(name: str) -> str:
    """What is known about a published domain, for somebody who has yet to get it."""
    from meta_dataset_readers.domains import DOMAINS

    if name not in DOMAINS:
        return ""
    domain = DOMAINS[name]
    sizes = "/".join(map(str, domain.classes))
    images = "" if domain.images is None else f", {domain.images:,} images"
    return f"of {domain.benchmark}, {sizes} classes{images} ({domain.protocol}); licence: {domain.licence}"
