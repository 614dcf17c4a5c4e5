"""Classify your own pictures by a few labelled examples, and say how robust each answer is.

    python -m amt predict POOL --support FOLDER IMAGES...            classes, probabilities, a verdict
    python -m amt predict POOL --support FOLDER IMAGES... --out answers.csv
    python -m amt predict POOL --support FOLDER --save task.safetensors
    python -m amt predict task.safetensors IMAGES...                 a saved task needs no examples
    python -m amt predict POOL --text_prototypes FILE.npz IMAGES...  nor do texts of the classes (zero-shot)

POOL is the name of a pool in the box, a file, or the folder of a training. FOLDER has one folder of image
files per class. IMAGES are image files, and folders of them. An answer "stands up to 4/255" if the attack
does not change it at 4/255 nor at any smaller epsilon asked for.
"""

import argparse
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amt.attacks.kinds import Attack, parse_attack
from amt.cli import options
from amt.cli.options import Parser, check_output, texts
from amt.models.head_settings import Head
from meta_dataset_readers.errors import DamagedRecord, InputError, one_line, printable, say
from meta_dataset_readers.files import replace_file
from meta_dataset_readers.lazy import imported
from meta_dataset_readers.settings import Number, as_path, nonnegative, nonnegative_int

if TYPE_CHECKING:
    from torch import Tensor

    from amt.few_shot.task import Merging, Task

BATCH = 16  # images in one go: a line of progress after each
EPSILONS = (2.0, 4.0, 8.0)
ENDINGS = (".csv", ".json")
MOST_NAMED = 20  # classes of a file of texts, which may have thousands


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is said about one image.

    Args:
        image: its path.
        probabilities: of all classes, in their order.
        order: the classes' numbers, the likeliest first.
        until: the largest epsilon that the answer stands, in 1/255; None: not attacked.
    """

    image: Path
    probabilities: tuple[float, ...]
    order: tuple[int, ...]
    until: float | None


class MixedParser(Parser):
    """A parser whose IMAGES may follow any flag."""

    def parse_args(self, args=None, namespace=None):
        return self.parse_intermixed_args(args, namespace)


def parser() -> Parser:
    """The flags of the command."""
    parser = MixedParser(__doc__.partition("\n")[0], "python -m amt predict")
    parser.add_argument("pool", help="a pool in the box, a file or a folder of one, or a saved task")
    parser.add_argument(
        "images", type=as_path, nargs="*", metavar="IMAGES", help="image files, or folders of them"
    )
    parser.add_argument(
        "--support",
        type=as_path,
        metavar="FOLDER",
        help="the examples, in one folder of image files per class",
    )
    parser.add_argument(
        "--epsilon",
        type=nonnegative,
        nargs="*",
        default=list(EPSILONS),
        help="attack every answer at these, in 1/255 of the pixel range, increasing; none: no attack",
    )
    parser.add_argument(
        "--attack",
        nargs="+",
        default=["pgd"],
        metavar=("NAME", "OPTION=VALUE"),
        help="as of test_meta_dataset.py, for example autoattack, or pgd restarts=5",
    )
    parser.add_argument(
        "--out", type=as_path, metavar="FILE", help="also write the answers, as .csv or .json"
    )
    parser.add_argument(
        "--save", "--save_task", type=as_path, metavar="FILE", help="write the task, a .safetensors"
    )
    texts.add_texts(parser, "; without --support they alone classify (zero-shot), and their classes are all")
    options.add_compile(add_model(parser))
    return parser


def add_model(parser: Parser) -> argparse._ArgumentGroup:
    """The flags that say how a pool becomes a classifier, and where it answers; their group."""
    model = parser.add_argument_group("model")
    model.add_argument("--arch", help="backbone (default: what the pool's file says)")
    model.add_argument(
        "--image_size", type=Number(int, least=1, most=4096), help="side in pixels (default: the backbone's)"
    )
    options.add_merging(model)
    options.add_head(model, "", "what the pool's file recommends, else prototypes")
    model.add_argument(
        "--pretrained_checkpoint",
        type=as_path,
        metavar="FILE",
        help="the weights the pool was trained from, which only --head mix other=pretrained needs (default: "
        "shipped, or from timm's hub)",
    )
    options.add_weights_key(model)
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda if there is one")
    model.add_argument("--threads", type=Number(int, least=1, most=1024), help="CPU threads")
    model.add_argument("--seed", type=nonnegative_int, default=0, help="decides everything random")
    return model


def main(argv: Sequence[str]) -> int:
    args = parser().parse(argv)
    check(args)
    imported("amt.few_shot.fitting")  # and with it torch: nobody waits for it who mistyped a flag
    from amt.few_shot import task_file

    found = list(files(args.images))
    options.use_machine(args)
    task = compiled(task_of(args)) if args.compile else task_of(args)
    describe(task)
    if args.save is not None:
        task_file.save(args.save, task)
        say(f"wrote {args.save}")
    answers, failed = [], 0
    for answer in answered(args, task, found):
        if isinstance(answer, Answer):
            answers.append(answer)
            say(line(task, answer, args.epsilon))
        else:
            failed += 1
            say(one_line(answer), file=sys.stderr)
    if args.out is not None and (answers or not found):
        replace_file(args.out, written(args.out, task, answers))
        say(f"wrote {args.out}")
    if failed:
        say(f"{failed} of {len(found)} images could not be read", file=sys.stderr)
    return 0 if not failed else 1 if answers else 2


def check(args: argparse.Namespace) -> None:
    """Raise an `InputError` for flags that are wrong alone or together, and for impossible places."""
    if not args.images and args.save is None:
        raise InputError("no IMAGES: give image files or folders of them, or --save FILE for the task alone")
    if args.out is not None:
        if args.out.suffix.lower() not in ENDINGS:
            raise InputError(f"--out {args.out}: expected a name that ends in {' or '.join(ENDINGS)}")
        if not args.images:
            raise InputError("--out is for answers: give image files or folders of them")
    if args.save is not None and args.save.suffix != ".safetensors":
        raise InputError(f"--save {args.save}: expected a name that ends in .safetensors")
    for flag, file in (("--out", args.out), ("--save", args.save)):
        if file is not None and file.is_dir():
            raise InputError(f"{flag} {file}: is a folder, expected the name of a file")
        if file is not None:
            check_output(file.parent, flag)
    options.single_head(args)
    options.check_increasing(args)
    args.epsilon = [epsilon for epsilon in args.epsilon if epsilon > 0]
    if args.epsilon and attack_of(args).kind in ("support", "transfer"):
        raise InputError(f"--attack {args.attack[0]} is none of a single image; expected for example pgd")


def attack_of(args: argparse.Namespace) -> Attack:
    """The attack on the answers."""
    return parse_attack(args.attack, epsilon=list(args.epsilon))


def files(given: Sequence[Path]) -> Iterator[Path]:
    """The image files that are given, and those in the folders that are, in order.

    Raises:
        InputError: a folder without pictures.
    """
    from amt.few_shot.pictures import listed

    for path in given:
        yield from listed(path)


def task_of(args: argparse.Namespace) -> "Task":
    """The task of --support, or the saved one, on the device.

    Raises:
        InputError: the pool, the support or the device is at fault.
    """
    from amt.few_shot import pictures, task_file
    from amt.few_shot.fitting import fit_pictures, fit_texts
    from amt.few_shot.pools import find_pool, open_pool
    from amt.files import checkpoint
    from amt.models.network import find_device

    file = find_pool(args.pool)
    if task_file.is_task(file):
        for flag, what in (("support", "classes"), ("text_prototypes", "classes"), ("head", "head")):
            if getattr(args, flag) is not None:
                raise InputError(
                    f"{file}: is a saved task, which has its {what}; expected a pool, or no --{flag}"
                )
        return task_file.load(file).to(find_device(args.device))
    if args.support is None and args.text_prototypes is None:
        checkpoint.load(file)  # says what is wrong with a file that is neither
        raise InputError(
            f"{file}: is a pool, which knows no classes yet; give --support FOLDER with one folder of image "
            "files per class, or texts of the classes by --text_prototypes FILE.npz"
        )
    labelled = None if args.support is None else pictures.in_class_folders(args.support)
    wanted = merging(args)
    opened = open_pool(file, args.arch, args.image_size, args.device)
    if labelled is None:
        return fit_texts(opened, wanted)[0]
    return fit_pictures(opened, *labelled, wanted, where=f"--support {args.support}: ")[0]


def compiled(task: "Task") -> "Task":
    """The same with programs for its passes.

    Raises:
        InputError: torch.compile does not work here.
    """
    from amt.models.compiled import compiler_for

    network = dataclasses.replace(task.merged.network, compiler=compiler_for(task.device))
    return dataclasses.replace(task, merged=dataclasses.replace(task.merged, network=network))


def merging(args: argparse.Namespace) -> "Merging":
    """How the flags of `add_model` merge the pool."""
    from amt.few_shot.task import Merging
    from amt.files import text_prototypes

    said = text_prototypes.given(vars(args).get("text_prototypes"))  # which the page does not have
    head = None if args.head is None else options.single_head(args)
    trims = tuple(args.trim)
    routing = options.routing(args) if options.routed(args) else None
    weights, key = args.pretrained_checkpoint, args.weights_key
    return Merging(routing, args.coefficients, trims, args.seed, head, weights, said, key)


def describe(task: "Task") -> None:
    """Say what the classes are and what was merged."""
    names = ", ".join(f"{name} ({shots})" for name, shots in zip(task.classes, task.shots, strict=True))
    more = len(task.classes) - MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    by_texts = f"classes, by their texts alone: {', '.join(map(str, task.classes[:MOST_NAMED]))}{rest}"
    say(printable(f"classes, and how many examples: {names}" if any(task.shots) else by_texts))
    single = [str(name) for name, shots in zip(task.classes, task.shots, strict=True) if shots == 1]
    if single:
        say(f"note: one example only of {', '.join(map(printable, single))}; more make better answers")
    say(f"adapters merged: {adapters(task)}")
    if task.head != Head():
        say(f"head: {task.head.name}")
        if task.head.one_shot_note and max(task.shots) == 1:
            say(f"note: {task.head.one_shot_note}")


def adapters(task: "Task") -> str:
    """For example `0.62 for 8/255, 0.38 for 0.1/255`; `0.62 of number 0` where the levels are not known."""
    shares = [(p, share) for p, share in enumerate(task.merged.coefficients) if share]
    if not task.epsilons:
        return ", ".join(f"{share:.2f} of number {p}" for p, share in shares)
    return ", ".join(f"{share:.2f} for {task.epsilons[p]:g}/255" for p, share in shares)


def answered(
    args: argparse.Namespace, task: "Task", found: Sequence[Path]
) -> Iterator[Answer | DamagedRecord]:
    """The answer for each file in order, or why it has none; with progress on stderr."""
    from tqdm import tqdm

    from amt.few_shot import pictures

    with tqdm(total=len(found), unit="image", leave=False, disable=None) as progress:
        for begin in range(0, len(found), BATCH):
            said: dict[int, Answer | DamagedRecord] = {}
            sound: dict[int, Tensor] = {}
            for number, file in enumerate(found[begin : begin + BATCH], begin):
                try:
                    sound[number] = pictures.image(file, task.image_size)
                except DamagedRecord as error:
                    said[number] = error
            said |= classified(args, task, found, sound) if sound else {}
            progress.update(len(said))
            yield from (said[number] for number in sorted(said))


def classified(
    args: argparse.Namespace, task: "Task", found: Sequence[Path], images: "dict[int, Tensor]"
) -> dict[int, Answer]:
    """The answers for images (3, S, S) of some of the files, by their numbers."""
    import torch

    from amt.few_shot.task import logits_of, standing

    stacked, numbers = torch.stack(list(images.values())), list(images)
    probabilities = task.probabilities(logits_of(task, stacked))
    order = probabilities.sort(dim=1, descending=True, stable=True).indices
    until: list[float | None] = [None] * len(stacked)
    if args.epsilon:
        until = standing(task, stacked, order[:, 0], attack_of(args), args.seed, numbers).until.tolist()
    rows = zip(numbers, probabilities.tolist(), order.tolist(), until, strict=True)
    return {n: Answer(found[n], tuple(shares), tuple(ranks), stands) for n, shares, ranks, stands in rows}


def line(task: "Task", answer: Answer, epsilons: Sequence[float]) -> str:
    """What is said about one image on the terminal."""
    named = [f"{printable(task.classes[k])} {100 * answer.probabilities[k]:.1f}%" for k in answer.order[:2]]
    return f"{printable(answer.image)}: {', next '.join(named)}{verdict(answer.until, epsilons)}"


def verdict(until: float | None, epsilons: Sequence[float]) -> str:
    """For example `; stands up to 4/255`; empty for an answer that was not attacked."""
    if until is None:
        return ""
    if until == 0:
        return f"; falls at {epsilons[0]:g}/255"
    most = ", the largest tried" if until == epsilons[-1] else ""
    return f"; stands up to {until:g}/255{most}"


def written(out: Path, task: "Task", answers: Sequence[Answer]) -> bytes:
    """The answers as a file with this ending; names that are not UTF-8 are escaped."""
    if out.suffix.lower() == ".json":
        about = {
            "classes": list(task.classes),
            "coefficients": list(task.merged.coefficients),
            "head": task.head.name,
            "epsilons": list(task.epsilons),
            "answers": [record(task, answer) for answer in answers],
        }
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    else:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer)
        columns = ["image", "class", "probability", "next_class", "next_probability", "stands_up_to"]
        writer.writerow([*columns, "adapters", *(f"p({name})" for name in task.classes)])
        for answer in answers:
            said = record(task, answer)
            cells = [said[name] for name in columns]
            writer.writerow([*cells, adapters(task), *said["probabilities"].values()])
        text = buffer.getvalue()
    return text.encode("utf-8", "backslashreplace")


def record(task: "Task", answer: Answer) -> dict:
    """What is said about one image in a file."""
    first, second = answer.order[:2]
    return {
        "image": str(answer.image),
        "class": task.classes[first],
        "probability": answer.probabilities[first],
        "next_class": task.classes[second],
        "next_probability": answer.probabilities[second],
        "stands_up_to": answer.until,
        "probabilities": dict(zip(map(str, task.classes), answer.probabilities, strict=True)),
    }
