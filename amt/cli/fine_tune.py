"""What `main.py autolora` does: fine-tune a robustly pretrained network by AutoLoRa, and test it.

Read downward: the data set is split, the file read into a plain network, and each mode fine-tuned from it
(amt/training/autolora.py), its schedules following the validation part of the training images. The
classifier of the best validation epoch is RUN/MODE/best.safetensors; it alone sees the test set, once, and
RUN/MODE/test is a run directory as of test_meta_dataset.py. The same command continues what was stopped.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from amt.attacks.kinds import Attack
from amt.cli.options import arithmetic, use_machine
from amt.cli.options import autolora as options
from amt.data import corruptions
from amt.data.datasets import known
from amt.data.labelled import Labelled
from amt.data.loading import Splits, Transform, batches, open_splits, transforms
from amt.evaluation import runs
from amt.evaluation.test_set import TestSet, check_attacks, check_labels, test
from amt.evaluation.writer import WROTE
from amt.files import checkpoint, digests, version
from amt.files import robust_weights as pretrained
from amt.files.ranks import Ranks, together
from amt.files.robust_weights import CLASSIFIER, Pretrained
from amt.files.run_directory import RUN_FILE, check_same, settings_pairs
from amt.files.signals import Interrupted
from amt.models.network import Network, build_classifier, find_device
from amt.models.weights import Weights
from amt.report.finish import finish
from amt.training.accuracy import Batches, accuracy, validate
from amt.training.autolora import FineTuner, StepRecord, new_student
from amt.training.autolora_settings import Adversary, Settings
from amt.training.keeper import FINE_TUNING, Keeper, brief, fine_tuning_state, scalars
from amt.training.schedule import LOWEST_RATE
from meta_dataset_readers.errors import InputError, damaged, say

_PASSES = 1 << 20  # sets the seeds of passes over the training set apart from those of training


def main(args: argparse.Namespace, attacks: Sequence[Attack]) -> int:
    """Fine-tune and test as the flags say, or continue; the exit code.

    Args:
        attacks: of the tests.
    """
    with together(args.rank_timeout) as ranks:
        return run_of(args, attacks, ranks)


def run_of(args: argparse.Namespace, attacks: Sequence[Attack], ranks: Ranks) -> int:
    """Fine-tune as one of the ranks, and test as the first one; the exit code."""
    use_machine(args)
    device = find_device(args.device)
    splits = open_data(args)
    network = build_classifier(args.arch, len(splits.class_names), args.resize, resize=options.inside(args))
    network, found = open_network(args, network)
    say(f"{args.checkpoint or 'random weights'}: {found.kind}")
    check_norms(args, network)
    check_attacks(attacks, network.n_classes)  # before hours of training, not after
    corrupted = open_corrupted(args, splits)

    _, plain = transforms(args.resize, options.large_crops(args))
    # Pictures that are corrupted here have their final size before that.
    corrupted_transform = transforms(args.resize, False)[1] if args.corruptions is None else plain

    def test_set(images: Labelled, transform: Transform) -> TestSet:
        return TestSet(
            splits.name, images, splits.class_names, transform, args.test_batch_size, args.num_workers
        )

    def tested(folder: Path, weights: Weights, file: Path | None = None) -> int:
        arithmetic(args).exact.use()
        run, code = test(
            network,
            {name: weight.to(device) for name, weight in weights.items()},
            test_set(splits.test, plain),
            folder / "test",
            about={"checkpoint": str(file or folder / "best.safetensors"), "settings": data_protocol(args)},
            attacks=attacks,
            seed=args.seed,
            corrupted={
                name: [test_set(part, corrupted_transform) for part in severities]
                for name, severities in corrupted.items()
            },
            overwrite=args.overwrite,
        )
        if run.complete:
            finish(run, device)
        return code

    if args.eval_only:
        return tested(args.output, found.weights, args.checkpoint)
    waiting: list[tuple[Path, Weights]] = []  # several ranks train all modes before the first one tests
    for mode in options.modes(args):
        settings = options.settings(args, mode)
        code, weights = tuned(args, network, found, splits, settings, device, ranks)
        if ranks.world > 1:
            waiting.append((args.output / mode, weights))
        elif code == 0:
            code = tested(args.output / mode, weights)
        if code:
            return code
    ranks.leave()
    for folder, weights in waiting if ranks.first else ():
        if code := tested(folder, weights):
            return code
    if ranks.first and len(options.modes(args)) > 1:
        summarise(args)
    return 0


def check_norms(args: argparse.Namespace, network: Network) -> None:
    """Raise an `InputError` if two sets of BatchNorm are asked for where there is none."""
    if args.dualBN and not network.norms:
        raise InputError(f"--dualBN 1: {network.arch} has no BatchNorm of which there could be two sets")
    if args.method == "twins" and not network.norms:
        say(f"note: {network.arch} has no BatchNorm, so the two networks of TWINS are one")


def digest(splits: Splits) -> str:
    """What tells whether two ranks read the same data: the labels, and the first picture."""
    picture = torch.frombuffer(bytearray(splits.train.image(0).tobytes()), dtype=torch.uint8)
    labels = {"train": splits.train.labels, "validation": splits.validation.labels}
    return digests.of_tensors(labels | {"picture": picture})


def open_data(args: argparse.Namespace) -> Splits:
    """The data set, split; with a class name for every output of the head."""
    splits = open_splits(args.dataset, args.data, args.val, args.seed)
    if len(splits.validation) == 0:
        raise InputError(f"--val {args.val:g}: leaves no image of {args.data} to validate on")
    spare = (args.num_classes or len(splits.class_names)) - len(splits.class_names)
    names = splits.class_names[: args.num_classes] + tuple(f"unused {k}" for k in range(spare))
    for part in (splits.train, splits.validation, splits.test):
        check_labels(f"--num_classes: {args.data}", part.labels, len(names))
    return dataclasses.replace(splits, class_names=names)


def open_network(args: argparse.Namespace, network: Network) -> tuple[Network, Pretrained]:
    """The structure, normalising as the file's pre-training did, and the weights to start from.

    A new head starts at zero; at high resolution at random, as published.
    """
    start = network.start(args.seed)
    if not options.high(args):
        start |= {name: torch.zeros_like(start[name]) for name in start if network.is_head(name)}
    if args.checkpoint is None:
        return network, Pretrained(start, {}, False, None, f"{args.arch}, untrained")
    found = pretrained.read(args.checkpoint, network, start, args.pretraining, args.weights_key)
    if found.normalise is None:
        say("note: nothing tells whether its pre-training normalised images: they are; see --pretraining")
    if args.eval_only:
        check_classifier(args.checkpoint, found, network)
    else:  # a head that fits in shape is another data set's
        head = {name: tensor for name, tensor in start.items() if network.is_head(name)}
        found = found._replace(weights=found.weights | head)
    if found.normalise is False:
        network = dataclasses.replace(network, mean=(0.0,) * 3, std=(1.0,) * 3)
    elif found.statistics is not None:
        mean, std = found.statistics
        network = dataclasses.replace(network, mean=mean, std=std)
    return network, found


def check_classifier(file: Path, found: Pretrained, network: Network) -> None:
    """Raise an `InputError` if what `file` holds cannot be tested as it is."""
    if not found.head:
        raise InputError(f"{file}: holds no classifier of {network.n_classes} classes to be tested")
    for name in ("image_size", "resize"):
        if found.about and found.about.get(name) != getattr(network, name):
            raise InputError(
                f"{file}: was trained with {name} {found.about.get(name)}, not "
                f"{getattr(network, name)}; see --resize and --resolution"
            )


def tuned(
    args: argparse.Namespace,
    network: Network,
    found: Pretrained,
    splits: Splits,
    settings: Settings,
    device: torch.device,
    ranks: Ranks,
) -> tuple[int, Weights]:
    """Fine-tune one mode, or go on with it: an exit code, and the weights of the best validation epoch."""
    arithmetic(args).use()
    augmented, plain = transforms(args.resize, options.large_crops(args))
    read = partial(batches, workers=args.num_workers, device=device)
    of_training = partial(read, splits.train, augmented, settings.batch_size)

    def training(epoch: int, start: int):
        return of_training(seed=settings.seed, epoch=epoch, shuffle=True, start=start)

    def training_accuracy(weights: Weights) -> float:
        seen = of_training(seed=settings.seed + _PASSES, epoch=tuner.epoch)
        return accuracy(tuner.network, weights, run.whole(seen))

    weights = {name: weight.to(device) for name, weight in found.weights.items()}
    student = new_student(network, weights, settings, found.natural_norms)
    tuner = FineTuner(network, student, settings, len(training(0, 0)), training_accuracy, ranks)
    described_by = {**data_protocol(args), **dataclasses.asdict(settings)}
    if args.precision == "tf32":  # float32 goes without saying: older runs go on
        described_by["precision"] = args.precision
    protocol = json.loads(json.dumps(described_by, sort_keys=True))
    if ranks.world > 1:
        ranks.check_same(protocol | {"data of digest": digest(splits)})
    run = keeper(args, settings.mode, protocol, ranks)
    about = described_network(network, splits.class_names, protocol)
    with run:
        if ranks.first and run.last.exists():
            restore(tuner, run.last, protocol)
            say(f"{run.folder}: goes on after {tuner.epoch} epochs and {tuner.batch} batches")
        if ranks.world > 1:  # all go on from what rank 0 has
            tensors, numbers = tuner.state()
            tuner.restore(*ranks.shared(({name: each.cpu() for name, each in tensors.items()}, numbers)))
        if not tuner.finished:
            held_out = read(splits.validation, plain, args.test_batch_size, seed=0)
            fine_tune(run, tuner, training, held_out, options.examiner(args), about)
        if run.interrupted:  # perhaps in the very last step: what comes after is not begun
            say(f"stopped after {tuner.epoch} epochs and {tuner.batch} batches; the same command continues")
            return run.code, {}
    if tuner.best is None:
        raise InputError(f"--lr {settings.lr:g}: at high resolution training ends below {LOWEST_RATE:g}")
    return 0, tuner.best.weights


def keeper(args: argparse.Namespace, mode: str, protocol: dict, ranks: Ranks) -> Keeper:
    """Of the run of one mode, in a folder of its own below --output."""
    return Keeper(
        args.output / mode,
        "a fine-tuning",
        protocol,
        flag="--output",
        overwrite=args.overwrite,
        minutes=args.save_every_minutes,
        results=[f"test/{pattern}" for pattern in (*WROTE, RUN_FILE)],
        ranks=ranks,
    )


def described_network(network: Network, class_names: Sequence[str], protocol: dict) -> dict:
    """What both files of a run say of its network, and of how it is trained."""
    return {
        "format": checkpoint.FORMAT,
        "arch": network.arch,
        "class_names": class_names,
        "image_size": network.image_size,
        "resize": network.resize,
        "mean": network.mean,
        "std": network.std,
        "protocol": protocol,
        **checkpoint.provenance(),
    }


def fine_tune(
    run: Keeper,
    tuner: FineTuner,
    training: Callable[[int, int], Batches],
    held_out: Batches,
    examiner: Adversary,
    about: dict,
) -> None:
    """Train until the run is finished, or a signal has arrived.

    Args:
        training: (epoch from 0, first batch) -> the batches of that epoch from that one on.
        held_out: what is validated on.
        examiner: attacks in validation.
        about: what both files say of the run.
    """
    device = next(iter(tuner.student.weights.values())).device
    content = partial(contents, about, tuner)
    run.begin(tuner.settings.mode, "batch", tuner.settings.epochs * tuner.n_batches, tuner.steps)
    while not tuner.finished:
        for images, labels, _ in run.watch(training(tuner.epoch, tuner.batch)):
            try:
                record = tuner.step(images.to(device), labels.to(device))
            except Interrupted:  # within a pass over the training set: the last checkpoint is gone on with
                return
            run.log_step(tuner.steps, shown(record), brief(record))
            if run.is_due():
                tuner.check_finite()
                run.save_last(*content())
        tuner.check_finite()
        if tuner.batch < tuner.n_batches:
            break
        try:
            with run.passes(tuner.network.module):
                seen = run.whole(held_out)
                found = validate(tuner.network, tuner.student.weights, seen, examiner, tuner.settings.seed)
        except Interrupted:
            break
        note = tuner.end_epoch(*found)
        run.log(tuner.steps, {f"validation/{name}": note[name] for name in ("clean", "robust")})
        run.say(f"{tuner.settings.mode} {told(note, tuner.rate)}")
        if note["best"] == tuner.epoch:
            run.save_best(*classifier(about, tuner))
        run.save_last(*content())
    if not tuner.finished:
        run.save_last(*content())


def shown(record: StepRecord) -> dict[str, float]:
    """A batch for TensorBoard."""
    cosines = {f"gradient_similarity/{layer}": cosine for layer, cosine in (record.similarity or {}).items()}
    return scalars("training", record, without=["similarity"]) | cosines


def told(note: dict, rate: float) -> str:
    """What is printed of an epoch; `rate` is that of the next one."""
    weights = "".join(f", {name} {note[name]:.2f}" for name in ("lambda1", "lambda2") if name in note)
    why = f"; rate reduced to {rate:g} (condition {note['condition']})" if note["condition"] else ""
    best = " (best so far)" if note["best"] == note["epoch"] else ""
    return (
        f"epoch {note['epoch']}: lr {note['lr']:g}{weights}, validation "
        f"{note['clean']:.1f} clean, {note['robust']:.1f} robust{best}{why}"
    )


def contents(about: dict, tuner: FineTuner) -> tuple[Weights, dict]:
    """Tensors and text of last.safetensors, from which the run continues exactly."""
    tensors, numbers = tuner.state()
    return tensors, {**described(about, tuner), "kind": FINE_TUNING, "tuner": numbers}


def classifier(about: dict, tuner: FineTuner) -> tuple[Weights, dict]:
    """Tensors and text of best.safetensors: the weights without branch, by the architecture's names."""
    weights = {name: tensor.detach() for name, tensor in tuner.student.weights.items()}
    return weights, {**described(about, tuner), "kind": CLASSIFIER}


def described(about: dict, tuner: FineTuner) -> dict:
    """What both files say of the run."""
    return {**about, "finished": tuner.finished, "history": tuner.history}


def restore(tuner: FineTuner, path: Path, protocol: dict) -> None:
    """Give `tuner` the state in a last.safetensors.

    Raises:
        InputError: the file is damaged, or of a run with other settings.
    """
    tensors, about = fine_tuning_state(path)
    check_same(path, settings_pairs(about["protocol"], protocol), "--output")
    with damaged(f"{path}: damaged state", (KeyError, TypeError, ValueError, RuntimeError), said=str):
        tuner.restore(tensors, about["tuner"])


def data_protocol(args: argparse.Namespace) -> dict:
    """What results depend on besides the settings of training: data, split, the very file started from."""
    return {
        "dataset": known(args.dataset).name,
        "arch": args.arch,
        "val": args.val,
        "resize": args.resize,
        "resolution": args.resolution,
        "num_classes": args.num_classes,
        "pretraining": args.pretraining,
        "validation_steps": options.examiner(args).steps,
        "start": version.digest(args.checkpoint),
        "weights_key": args.weights_key,
    }


def open_corrupted(args: argparse.Namespace, splits: Splits) -> Mapping[str, Sequence[Labelled]]:
    """By common corruption the test set at each severity, if asked for."""
    if not args.eval_OOD:
        return {}
    if args.corruptions is not None:
        return corruptions.open_corrupted(args.corruptions, len(splits.class_names))
    return corruptions.corrupted(splits.test, args.resize, options.large_crops(args), args.seed)


def summarise(args: argparse.Namespace) -> None:
    """Print the mean over modes of every accuracy, as the published script does."""
    found = [runs.load(args.output / mode / "test") for mode in options.modes(args)]
    for column in found[0].columns:
        means = [run.summary(run.sources[0], column).mean for run in found]
        listed = ", ".join(
            f"{mode} {mean:.2f}" for mode, mean in zip(options.modes(args), means, strict=True)
        )
        say(f"{column}: {statistics.fmean(means):.2f} on average ({listed})")
