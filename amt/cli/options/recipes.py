"""Recipes: a table of a paper as a list of command lines, in a YAML file (recipes/README.md has the format).

Knows how such a file is read and checked, how its flags become command lines, by which files a stage is known
to be done, and how a command is run to its end. Knows no data, and of flags no more than what a stage starts
from and, of AutoLoRa, `--mode`.
"""

import dataclasses
import itertools
import json
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors
import yaml

from meta_dataset_readers.errors import InputError, nearest

FOLDER = Path(__file__).resolve().parents[3] / "recipes"

# What stages run: the two scripts, `main.py autolora`, and `python -m amt`.
TRAIN, TEST, AUTOLORA, AMT = KINDS = ("train", "test", "autolora", "amt")
NOTE = "stage.json"  # in the folder of a stage of the first three kinds: the flags it was begun with

PLACES = ("data", "out", "checkpoints", "train", "here", "makes", "runs")  # words in braces

# Flags with one value that say on what a stage runs and not what it computes.
_MACHINE = {"--device", "--num_workers", "--threads", "--shard"}

_DATA_AND_OUTPUT = {  # flags that every stage gets
    TRAIN: ("--data_path", "--output_dir"),
    TEST: ("--data_path", "--output_dir"),
    AUTOLORA: ("--data", "--output"),
}
_STARTS_FROM = {TRAIN: "--resume", TEST: "--resume", AUTOLORA: "--checkpoint"}
_ALL_MODES = ("SLF", "ALF", "AFF")  # of AutoLoRa, in the order in which `--mode ALL` goes through them


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Args:
        kind: one of `KINDS`.
        name: of its folder; for `AMT` the command.
        flags: with places still in braces; the common ones of the kind first.
        makes: for `AMT` the file that it writes, its place in braces; else empty.
        optional: it is left out where what it starts from is missing.
    """

    kind: str
    name: str
    flags: tuple[str, ...]
    makes: str = ""
    optional: bool = False

    @property
    def title(self) -> str:
        """What the stage is called on the command line: its kind and name, or `report/table`."""
        return f"{self.name}/{Path(self.makes).stem}" if self.kind == AMT else f"{self.kind}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A table: its name, what it is in one line, what it needs in words, and its stages in order."""

    name: str
    table: str
    needs: Mapping[str, str]
    stages: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage with every place filled in.

    Args:
        stage: what it is.
        flags: of its program, complete.
        folder: what it writes into.
        makes: the file that is there when it is done.
        noted: flags that decide its results, as they are noted in its folder.
        waits_for: the earlier stages whose output it reads.
    """

    stage: Stage
    flags: tuple[str, ...]
    folder: Path
    makes: Path
    noted: tuple[str, ...]
    waits_for: tuple["Job", ...]

    @property
    def title(self) -> str:
        return self.stage.title

    @property
    def starts_from(self) -> Path | None:
        """The checkpoint that its flags name, if there is one."""
        named = _value(self.flags, _STARTS_FROM[self.stage.kind]) if self.stage.kind != AMT else None
        return Path(named) if named is not None else None

    @property
    def runs(self) -> tuple[Path, ...]:
        """The run directories that it makes."""
        if self.stage.kind == TEST:
            return (self.folder,)
        if self.stage.kind == AUTOLORA:
            return tuple(self.folder / mode / "test" for mode in _modes(self.flags))
        return ()

    def done(self) -> bool:
        """Whether its output is complete and, but for a training, not older than what it was made from."""
        if not self.makes.is_file():
            return False
        if self.stage.kind == TRAIN:
            return _says_finished(self.makes)
        made = self.makes.stat().st_mtime_ns
        return all(job.done() and job.makes.stat().st_mtime_ns <= made for job in self.waits_for)

    def left_out(self) -> bool:
        """Whether it is optional, and what it starts from is not there and made by no stage."""
        start = self.starts_from
        return self.stage.optional and start is not None and not start.is_file() and not self.waits_for

    def begun(self) -> bool:
        """Whether it is a training of which a part is done and saved."""
        return self.stage.kind == TRAIN and self.makes.is_file() and not self.done()

    def check_note(self) -> None:
        """Raise an `InputError` if the stage's folder holds results of other flags, or of something else."""
        if self.stage.kind == AMT or not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        elsewhere = "remove it, or choose another --output_dir"
        try:
            before = [str(word) for word in json.loads((self.folder / NOTE).read_text())["flags"]]
        except FileNotFoundError:
            raise InputError(f"{self.folder}: was not made by a recipe; {elsewhere}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.folder / NOTE}: cannot be read ({error!r}); {elsewhere}") from error
        if before != list(self.noted):
            then, now = (
                shlex.join(_beyond(*both)) or "no more"
                for both in ((before, self.noted), (self.noted, before))
            )
            raise InputError(
                f"{self.folder}: was made with other flags (then {then}; now {now}); {elsewhere}"
            )

    def note(self) -> None:
        """Note the flags in the stage's folder, which is made if missing.

        Raises:
            InputError: it cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.stage.kind != AMT:
                part = self.folder / f"{NOTE}.part"
                part.write_text(json.dumps({"stage": self.title, "flags": list(self.noted)}, indent=1))
                part.replace(self.folder / NOTE)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written to ({error.strerror})") from error


# --- files -----------------------------------------------------------------------------------------------


def known() -> list[str]:
    """The names of the recipes that come with the project."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load(name: str, within: Sequence[str] = ()) -> Recipe:
    """The recipe called `name`, or that in the file `name` ending in .yaml.

    Args:
        within: the recipes that it is read for, the outermost first.

    Raises:
        InputError: there is none, or the file is no recipe; it names the field and what was expected.
    """
    file = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not file.is_file():
        hint = "no such file" if name.endswith(".yaml") else nearest(name, known())
        raise InputError(f"no recipe {name!r}; {hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    fields = _Fields(file, "recipe", content, {"table", "needs", "training", *_DATA_AND_OUTPUT, "stages"})
    common = {kind: fields.flags(kind) for kind in _DATA_AND_OUTPUT}
    trainings = (
        stage
        for other in fields.get("training", list, [])
        for stage in _load_other(file, other, (*within, file.stem)).stages
        if stage.kind == TRAIN
    )
    stages = list(dict.fromkeys(trainings))  # two recipes may have a third one's in common
    entries = [variant for entry in fields.get("stages", list) for variant in _variants(file, entry)]
    stages += [_stage(file, entry, common) for entry in entries]
    titles = [stage.title for stage in stages]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice:
        raise InputError(f"{file}: two stages are called {twice}")
    needs = {str(what): str(words) for what, words in fields.get("needs", dict).items()}
    return Recipe(file.stem, fields.get("table", str), needs, tuple(stages))


def _load_other(file: Path, name: Any, within: Sequence[str]) -> Recipe:
    if not isinstance(name, str) or Path(name).stem in within:
        raise InputError(f"{file}: field 'training' names {name!r}, expected other recipes")
    return load(name, within)


def _variants(file: Path, entry: Any) -> list[Any]:
    """An entry of `stages` once for every combination of the values in its field `each`, which stand where
    their names are in braces."""
    if not isinstance(entry, dict) or "each" not in entry:
        return [entry]
    each = entry["each"]
    if not isinstance(each, dict) or not all(
        isinstance(name, str) and isinstance(values, list) and values for name, values in each.items()
    ):
        raise InputError(f"{file}: field 'each' is {each!r}, expected a list of values for each name")
    taken = next((name for name in each if name in PLACES), None)
    if taken:
        raise InputError(f"{file}: field 'each' has the name {taken!r}, which is a place")
    variants = []
    for values in itertools.product(*each.values()):
        texts = {name: value for name, value in entry.items() if name != "each"}
        for name, value in zip(each, values, strict=True):
            texts = {
                field: text.replace(f"{{{name}}}", str(value)) if isinstance(text, str) else text
                for field, text in texts.items()
            }
        variants.append(texts)
    return variants


def _stage(file: Path, entry: Any, common: Mapping[str, tuple[str, ...]]) -> Stage:
    kinds = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1:
        raise InputError(f"{file}: stage {entry!r}, expected one of {', '.join(KINDS)} with a name")
    (kind,) = kinds
    expected = {kind, "flags", "optional"} | ({"makes"} if kind == AMT else set())
    fields = _Fields(file, f"stage {kind} {entry[kind]}", entry, expected)
    name, flags = fields.get(kind, str), common.get(kind, ()) + fields.flags("flags")
    if not re.fullmatch(r"[\w.+-]+", name):
        raise InputError(f"{file}: stage {kind} {name!r}: expected a name of letters, digits, _, ., + and -")
    makes = fields.get("makes", str) if kind == AMT else ""
    return Stage(kind, name, flags, makes, fields.get("optional", bool, False))


class _Fields:
    """A mapping from a file whose fields have known names and types."""

    def __init__(self, file: Path, what: str, content: Any, expected: set[str]):
        self._where, self._content = f"{file}: {what}", content
        if not isinstance(content, dict):
            raise InputError(f"{self._where}: found {type(content).__name__}, expected fields by name")
        for name in content:
            if name not in expected:
                raise InputError(f"{self._where}: no field {name!r}; {nearest(str(name), expected)}")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._content.get(name, default)
        if not isinstance(value, kind):
            raise InputError(f"{self._where}: field {name!r} is {value!r}, expected {_KINDS[kind]}")
        return value

    def flags(self, name: str) -> tuple[str, ...]:
        return split(self.get(name, str, ""), f"{self._where}: field {name!r}")


_KINDS = {str: "a text", list: "a list", dict: "fields by name", bool: "true or false"}


def split(text: str, where: str) -> tuple[str, ...]:
    """The words of flags as in a shell; # starts a comment.

    Raises:
        InputError: a quotation mark has no partner; it begins with `where`.
    """
    try:
        return tuple(shlex.split(text, comments=True))
    except ValueError as error:
        raise InputError(f"{where}: {text!r} cannot be split into flags: {error}") from error


# --- command lines ---------------------------------------------------------------------------------------


def plan(
    recipe: Recipe,
    data: Path,
    out: Path,
    checkpoints: Path,
    extra: Mapping[str, Sequence[str]],
    chosen: Sequence[str] = ("*",),
) -> list[Job]:
    """The stages to go through, in order, with their places filled in.

    Args:
        data, out, checkpoints: what these words in braces stand for.
        extra: further flags for every stage of a kind, spelt with underscores; of two the last counts.
        chosen: titles of stages, or patterns of such; `{runs}` holds the chosen and the finished ones.

    Raises:
        InputError: a title that no stage has, or an unknown place in braces.
    """
    titles = [stage.title for stage in recipe.stages]
    for pattern in chosen:
        if not any(fnmatch(title, pattern) for title in titles):
            raise InputError(
                f"--stages {pattern}: recipe {recipe.name} has no such stage; {nearest(pattern, titles)}"
            )
    places = {
        "data": data,
        "out": out,
        "checkpoints": checkpoints,
        "train": out / TRAIN,
        "here": out / recipe.name,
    }
    jobs, earlier = [], {}
    runs: list[tuple[str, Path]] = []
    for stage in recipe.stages:
        words = (*stage.flags, *extra.get(stage.kind, ()))
        folder, makes = _output(recipe, stage, words, places)
        flags = [
            filled
            for word in words
            for filled in _filled(recipe, stage, word, places | {"makes": makes}, runs)
        ]
        noted = _without_machine(words)
        if stage.kind != AMT:
            for_data, for_output = _DATA_AND_OUTPUT[stage.kind]
            flags += [for_data, str(data), for_output, str(folder)]
            noted += (for_data, str(data.absolute()))
        named = {place for word in flags for place in (Path(word), *Path(word).parents)}
        waits_for = tuple(job for path, job in earlier.items() if path in named)
        job = Job(stage, tuple(flags), folder, makes, noted, waits_for)
        earlier[makes if stage.kind == AMT else folder] = job
        is_chosen = any(fnmatch(stage.title, pattern) for pattern in chosen)
        if not job.left_out() and (is_chosen or job.done()):
            runs += [(stage.name, run) for run in job.runs]
        if is_chosen:
            jobs.append(job)
    return jobs


def _output(
    recipe: Recipe, stage: Stage, words: Sequence[str], places: Mapping[str, Path]
) -> tuple[Path, Path]:
    """The folder of a stage, and the file that is there when it is done."""
    if stage.kind == AMT:
        (filled,) = _filled(recipe, stage, stage.makes, places, [])
        return Path(filled).parent, Path(filled)
    folder = places["train" if stage.kind == TRAIN else "here"] / stage.name
    if stage.kind == TRAIN:
        return folder, folder / "last.safetensors"
    if stage.kind == TEST:
        return folder, folder / "results.json"
    return folder, folder / _modes(words)[-1] / "test" / "results.json"


def _modes(words: Sequence[str]) -> tuple[str, ...]:
    """What a stage of AutoLoRa fine-tunes, one after another."""
    mode = _value(words, "--mode") or _ALL_MODES[-1]
    return _ALL_MODES if mode == "ALL" else (mode,)


def _value(words: Sequence[str], flag: str) -> str | None:
    """What follows the last `flag`."""
    where = [number for number, word in enumerate(words[:-1]) if word == flag]
    return words[where[-1] + 1] if where else None


_PLACE = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


def _filled(
    recipe: Recipe, stage: Stage, word: str, places: Mapping[str, Path], runs: Sequence[tuple[str, Path]]
) -> list[str]:
    """A word with its place filled in: one word, or as many as there are runs, which come with the names of
    their stages."""
    match = _PLACE.fullmatch(word)
    if match and match[1] == "runs":
        return [str(run) for name, run in runs if fnmatch(name, match[2] or "*")]

    def value(match: re.Match) -> str:
        if match[1] not in places or match[2]:
            known = nearest(match[1], PLACES)
            raise InputError(f"recipe {recipe.name}, stage {stage.title}: no place {match[0]}; {known}")
        return str(places[match[1]])

    return [_PLACE.sub(value, word)]


def _without_machine(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        word
        for before, word in zip(("", *words), words, strict=False)
        if word not in _MACHINE and before not in _MACHINE
    )


def _beyond(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """The flags among `words`, each with its values, that `others` do not have alike."""
    theirs = _by_flag(others)
    return [word for flag in _by_flag(words) if flag not in theirs for word in flag]


def _by_flag(words: Sequence[str]) -> list[tuple[str, ...]]:
    grouped: list[tuple[str, ...]] = []
    for word in words:
        if word.startswith("--") or not grouped:
            grouped.append((word,))
        else:
            grouped[-1] += (word,)
    return grouped


def _says_finished(file: Path) -> bool:
    """Whether a checkpoint of ours is one of a training that has come to its end."""
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            return json.loads(opened.metadata()["amt"])["finished"] is True
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return False  # for main.py to say what is wrong with it


# --- running ---------------------------------------------------------------------------------------------


def follow(words: Sequence[str]) -> int:
    """Run a command to its end; its exit code, as a shell gives it.

    Ctrl-C reaches the command from the terminal, like every process there, and SIGTERM is handed on: what it
    does about them, such as saving a checkpoint, is waited for.
    """
    caught: list[int] = []
    child: subprocess.Popen | None = None

    def note(number: int, _frame) -> None:
        caught.append(number)
        if number == signal.SIGTERM and child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(words)
        for number in caught:  # before there was a child to be told
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:
        return 128 - code
    return code or (128 + caught[0] if caught else 0)
