"""The recipes: every command of every one runs at toy size, says what it lacks, and has the paper's values.

A process of its own costs seconds of imports. Here the scripts run with an interpreter that only notes how it
is called; the commands are then called in this process, with the very flags of their command lines.
"""

import gzip
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import ROOT, Ended, called
from conftest import (
    REAL_SPECS,
    SPLITS,
    bilevel_spec,
    dag_spec,
    flat_spec,
    jpeg,
    write_classes,
    write_picture,
    write_spec,
)
from safetensors.torch import save_file

from amt.cli import options
from amt.cli.options import autolora as autolora_options
from amt.models.architectures import ARCHS, Arch, build_network
from amt.models.network import build_classifier
from amt.training.tuner import Tuner
from meta_dataset_readers.bscd import CHESTX_FINDINGS, CHESTX_IMAGES, CHESTX_LABELS, ISIC_IMAGES, ISIC_LABELS
from meta_dataset_readers.sampling import check_sampling
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.tfrecord import encode_example, write_records

RECIPES = ROOT / "recipes"
AUTOLORA_TABLES = ["autolora_high_resolution", "autolora_low_resolution"]
TABLES = ["bscd_fsl", "fine_grained", "meta_dataset_5w1s", "meta_dataset_5w5s"]


# --- a small world ---------------------------------------------------------------------------------------


def write_data(root: Path) -> None:
    """All sources of the recipes in the layouts they are published in, as small as their episodes allow."""
    leaves = {split: [f"{split}{i}" for i in range(6)] for split in SPLITS}
    graphs = {split: {f"all of {split}": names} for split, names in leaves.items()}
    images = {leaf: 21 for names in leaves.values() for leaf in names}
    write_source(root, dag_spec("ilsvrc_2012", graphs, images), 21)
    write_source(root, bilevel_spec("omniglot", (0, 0, 1), [5], [6] * 5), 6)
    for name in options.TEST_SOURCES:
        if not (root / name).exists():
            write_source(root, flat_spec(name, (0, 0, 5), [6] * 5), 6)
    few, enough = dict.fromkeys("abcde", 20), dict.fromkeys("vwxyz", 20)
    write_classes(root / "CropDiseases" / "dataset" / "train", **few)
    write_classes(root / "EuroSAT" / "2750", **few)
    numbered = [(label, index) for label in range(5) for index in range(20)]
    rows = [
        f"{label}_{index}," + ",".join(str(int(c == label)) for c in range(5)) for label, index in numbered
    ]
    write_table(root / "ISIC", ISIC_LABELS, ["image,MEL,NV,BCC,AKIEC,BKL", *rows])
    shown = [*numbered, *((label, index) for label in (5, 6) for index in range(20))]
    rows = [f"{label}_{index}.png,{CHESTX_FINDINGS[label]},1" for label, index in shown]
    write_table(root / "ChestX", CHESTX_LABELS, ["Image Index,Finding Labels,Follow-up #", *rows])
    for label, index in numbered:
        write_picture(root / "ISIC" / ISIC_IMAGES / f"{label}_{index}.jpg", index)
    for label, index in shown:
        write_picture(root / "ChestX" / CHESTX_IMAGES / f"{label}_{index}.png", index)
    for name in ("cub", "car", "places", "plantae"):
        write_classes(root / name / "images", a=1, b=1, **enough)
        for number, file in enumerate(("base.json", "val.json", "novel.json")):
            listed = [(c, i) for c in "vwxyz" for i in range(20)] if number == 2 else [("ab"[number], 0)]
            content = {
                "label_names": list("abvwxyz"),
                "image_names": [f"/far/{name}/images/{c}/{i}.png" for c, i in listed],
                "image_labels": ["abvwxyz".index(c) for c, _ in listed],
            }
            (root / name / file).write_text(json.dumps(content))


def write_source(root: Path, spec: dict, n_images: int) -> None:
    directory = write_spec(root / spec["name"], spec)
    for class_id in range(len(spec["class_names"])):
        payloads = (encode_example(jpeg(class_id, record), class_id) for record in range(n_images))
        write_records(directory / f"{class_id}.tfrecords", payloads)


def write_table(directory: Path, file: str, lines: list[str]) -> None:
    (directory / file).parent.mkdir(parents=True, exist_ok=True)
    (directory / file).write_text("\n".join([*lines, ""]))


class World(NamedTuple):
    """Toy sources, random weights, and a folder that all recipes share."""

    data: Path
    weights: Path
    out: Path

    def environment(self, train: str = "", test: str = "") -> dict[str, str]:
        """What makes the commands of a recipe small."""
        size = f"--arch vit_mini --pretrained_checkpoint {self.weights} --threads 1 --num_workers 0"
        small = "--epochs 1 --warmup_epochs 0 --nEpisode 1 --nValEpisode 1 --attack_iters 1 --max_num_query 1"
        small += " --statistics_episodes 1"
        few = "--nTestEpisode 1 --nSelectEpisode 1 --ada_steps 1 --probe_episodes 0 --num_query 1"
        return {"TRAIN_FLAGS": f"{size} {small} {train}", "TEST_FLAGS": f"{size} {few} {test}"}


def write_weights(file: Path, arch: Arch) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build_network(arch).state_dict(), file)
    return file


TINY = Arch(patch_size=16, dim=16, depth=1, heads=2, pretrained_size=32, image_size=32, mlp_ratio=1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With something tiny under the name of vit_mini."""
    root = tmp_path_factory.mktemp("world")
    write_data(root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_mini", TINY)
        yield World(root / "data", write_weights(root / "weights.safetensors", TINY), root / "out")


# --- scripts and their commands ----------------------------------------------------------------------------

NOTES_CALLS = """#!/bin/sh
for word; do printf '%s\\n' "$word" >> "$CALLS"; done
echo >> "$CALLS"
exit "${CODE:-0}"
"""


def script(
    name: str, folder: Path, *words, **environment
) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Run a recipe from another folder with an interpreter that only notes its calls; and these calls."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(NOTES_CALLS)
    python.chmod(0o755)
    calls.write_text("")
    own = {"PYTHON": str(python), "CALLS": str(calls)} | environment
    ended = subprocess.run(
        [RECIPES / f"{name}.sh", *map(str, words)],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended, [block.split("\n") for block in calls.read_text().split("\n\n") if block]


def planned(name: str, folder: Path, **environment) -> list[list[str]]:
    """The commands of a recipe with its own flags, in folders that are not there."""
    ended, calls = script(name, folder, "no_data", "no_out", **environment)
    assert ended.returncode == 0, ended.stderr
    return calls


def run(words: list[str]) -> Ended:
    """Run a noted command in this process, as the last line of its script does."""
    program, *flags = words
    if program == "-m":
        _amt, name, *flags = flags
        command = importlib.import_module(f"amt.cli.{name}")
        main, argv = (lambda: command.main(flags)), [name, *flags]
    else:
        spec = importlib.util.spec_from_file_location(Path(program).stem, program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        main, argv = module.main, [Path(program).name, *flags]
    return called(main, argv)


def value(words: list[str], flag: str) -> str:
    """What follows the last flag of this name."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def parsed(words: list[str]):
    """The flags of a command as its own program reads them."""
    program, *flags = words
    if flags[0] == "autolora":
        return autolora_options.parse(flags[1:])
    if Path(program).name == "main.py":
        args = options.training_parser().parse_args(flags)
        options.check_training(args)
        return args
    args = options.testing_parser().parse_args(flags)
    options.check_testing(args)
    assert options.deployments(args)
    return args


def of(calls: list[list[str]], program: str) -> list[list[str]]:
    """The calls of main.py, test_meta_dataset.py or report."""
    return [words for words in calls if program in (Path(words[0]).name, words[2])]


# --- the tables --------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_table():
    shared = {"common", "networks"}
    assert {file.stem for file in RECIPES.glob("*.sh")} - shared == {*TABLES, *AUTOLORA_TABLES}


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_values_arrive(name, tmp_path, capsys):
    """With the flags of the scripts, unabridged; none of them is without effect."""
    calls = planned(name, tmp_path)
    for words in of(calls, "test_meta_dataset.py"):
        args = parsed(words)
        assert (args.arch, args.nTestEpisode) == ("dino_small_patch16", 600), words
        (attack,) = options.attacks(args)
        assert attack.columns == ("pgd20-ce+dlr@8",) and attack.step_at(8) == 2, words
    for words in of(calls, "main.py"):
        args = parsed(words)
        settings = options.tune_settings(args)
        assert args.arch == "dino_small_patch16", words
        assert (settings.epochs, settings.warmup_epochs, settings.episodes_per_epoch) == (30, 5, 2000)
        if "/amt_" in value(words, "--output_dir"):
            assert settings.lr == 5e-4 and settings.method == "adsv" and args.rank == 8
            assert [level.epsilon for level in options.levels(args)] == [8, 6, 0.1, 0.01]
            assert {(level.beta, level.steps) for level in options.levels(args)} == {(6, 10)}
    assert "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_table_is_there(name, tmp_path):
    """Pretrained, fully tuned with and without an adversary, one LoRA, the pool; and each is on a page."""
    calls = planned(name, tmp_path)
    rows = {Path(value(words, "--output_dir")).name for words in of(calls, "test_meta_dataset.py")}
    for shots in ("_1shot", "_5shot") if name in ("bscd_fsl", "fine_grained") else ("",):
        assert rows >= {f"{row}{shots}" for row in ("pretrained", "pmf", "querying", "one_lora", "amt")}
    shown = {Path(word).name for words in of(calls, "report") for word in words}
    assert shown >= rows
    trained = {value(words, "--output_dir") for words in of(calls, "main.py")}
    resumed = {str(Path(value(words, "--resume")).parent) for words in calls if "--resume" in words}
    assert resumed == trained  # nothing is trained for nothing


@pytest.mark.benchmark_data
@pytest.mark.parametrize("name", ["meta_dataset_5w1s", "meta_dataset_5w5s"])
def test_the_protocols_suit_the_real_specifications(tmp_path, name):
    """Every class that an episode may draw has enough images, in training and in every domain."""
    if not REAL_SPECS.is_dir():
        pytest.skip(f"{REAL_SPECS} is not there (AMT_REAL_SPECS)")
    calls = planned(name, tmp_path)
    for words in [*of(calls, "main.py"), *of(calls, "test_meta_dataset.py")]:
        args = parsed(words)
        if Path(words[0]).name == "main.py":
            splits = [
                (source, split) for source in options.training_sources(args) for split in ("TRAIN", "VALID")
            ]
        else:
            splits = [(source, "TEST") for source in options.test_sources(args)]
        for source, split in splits:
            packed = REAL_SPECS / f"{source}_dataset_spec.json.gz"
            (tmp_path / source).mkdir(exist_ok=True)
            (tmp_path / source / "dataset_spec.json").write_bytes(gzip.decompress(packed.read_bytes()))
            check_sampling(load_spec(tmp_path / source), split, options.sampling(args))


# --- running -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_runs_to_its_end(world, name, tmp_path):
    """Before it a dry run finds everything there and writes nothing; on top of what other recipes left."""
    environment = world.environment() | {"CHECKPOINTS": str(tmp_path)}
    ended, calls = script(name, tmp_path, world.data, world.out, "--dry_run", **environment)
    assert ended.returncode == 0, ended.stderr
    before = sorted(world.out.rglob("*"))
    for words in calls:
        dry = run(words)
        assert dry.code == 0 and "missing: " not in dry.out and dry.out.startswith("would "), dry
    assert sorted(world.out.rglob("*")) == before
    ended, calls = script(name, tmp_path, world.data, world.out, **environment)
    for words in calls:
        if (
            Path(words[0]).name == "main.py"
            and Path(value(words, "--output_dir"), "best.safetensors").exists()
        ):
            continue  # another recipe has trained it
        ran = run(words)
        assert ran.code == 0, (words, ran)
    page = Path(value(calls[-1], "--out")).read_text()
    assert "one_lora" in page and "pretrained" in page


def test_a_recipe_called_twice_trains_nothing_and_keeps_its_results(world, tmp_path, monkeypatch):
    """The commands of one row of its table: the second time every file that they wrote stays as it is."""
    out = tmp_path / "out"

    def call() -> dict[Path, bytes]:
        _, calls = script("meta_dataset_5w1s", tmp_path, world.data, out, **world.environment())
        row = [
            words
            for words in [*of(calls, "main.py"), *of(calls, "test_meta_dataset.py")]
            if "/pmf" in value(words, "--output_dir")
        ]
        assert [Path(words[0]).name for words in row] == ["main.py", "test_meta_dataset.py"]
        for words in row:
            ended = run(words)
            assert ended.code == 0, (words, ended)
        kept = (".safetensors", ".jsonl", ".npz", ".json")  # TensorBoard's files are drawn anew
        return {file: file.read_bytes() for file in out.rglob("*") if file.suffix in kept}

    def no_work(*_arguments):
        raise AssertionError("the second call works again")

    before = call()
    assert {file.name for file in before} >= {"best.safetensors", "last.safetensors", "rows.jsonl"}
    monkeypatch.setattr(Tuner, "step", no_work)
    after = call()
    assert after.keys() == before.keys()
    for file in after:
        if file.name in ("run.json", "results.json"):  # when it was called last, and the memory that took
            found, expected = json.loads(after[file]), json.loads(before[file])
            assert found.keys() == expected.keys()
            assert {key for key in found if found[key] != expected[key]} <= {"started", "peak_memory_mb"}
        else:
            assert after[file] == before[file], file


def test_a_recipe_runs_as_a_user_starts_it(world, tmp_path):
    """In processes of its own, dry: everything is missing, all of it is named, nothing is written."""
    environment = {"PYTHON": sys.executable, "DATASETS": "cifar10", "ARCHS": "resnet18"}
    ended = subprocess.run(
        [RECIPES / "autolora_high_resolution.sh", "no data", tmp_path / "out", "--dry_run"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    missing = [line for line in ended.stdout.splitlines() if line.startswith("missing: ")]
    assert sum("resnet18_linf_eps4.0.ckpt: no such file" in line for line in missing) == 3
    assert sum("dataset cifar10: " in line for line in missing) == 3
    assert not any("run " in line for line in missing) and list(tmp_path.iterdir()) == []


def test_the_authors_pool_is_a_row_where_it_is_there(tmp_path):
    (tmp_path / "metadataset_imagenet_advmetatuned_5w1s.pth").touch()
    calls = planned("meta_dataset_5w1s", tmp_path, CHECKPOINTS=str(tmp_path))
    assert sum("no_out/meta_dataset_5w1s/released" in words for words in calls) == 2  # its row, the page


@pytest.mark.parametrize("code", ["2", "130"])
def test_a_failing_command_ends_the_recipe_with_its_code(tmp_path, code):
    ended, calls = script("meta_dataset_5w1s", tmp_path, "data", "out", CODE=code)
    assert ended.returncode == int(code) and len(calls) == 1
    ended, calls = script("meta_dataset_5w1s", tmp_path, "data", "out", "--dry_run", CODE=code)
    assert ended.returncode == int(code) and len(calls) == 10  # a dry run says all that is missing


@pytest.mark.parametrize(
    "words", [[], ["data"], ["data", "out", "--dry"], ["data", "out", "--dry_run", "more"]]
)
def test_a_wrong_call_is_one_line(tmp_path, words):
    ended, calls = script("bscd_fsl", tmp_path, *words)
    assert ended.returncode == 2 and not calls
    assert ended.stderr.startswith("usage: ") and ended.stderr.count("\n") == 1


# --- what is missing ---------------------------------------------------------------------------------------


def test_a_dry_run_names_what_is_missing(world, tmp_path):
    """Sources with what is known about them, a split without classes, weights; nothing is fetched."""
    write_source(tmp_path / "data", flat_spec("ilsvrc_2012", (5, 0, 5), [6] * 10), 6)
    (tmp_path / "file").touch()
    calls = planned("meta_dataset_5w1s", tmp_path)
    training, testing = of(calls, "main.py")[0], of(calls, "test_meta_dataset.py")[1]
    out = tmp_path / "file" / "out"
    places = ["--data_path", str(tmp_path / "data"), "--output_dir", str(out), "--dry_run"]
    ended = run([*training, *places])
    missing = [line for line in ended.out.splitlines() if line.startswith("missing: ")]
    assert ended.code == 2 and len(missing) == 3, ended
    assert "folder for the output" in missing[0] and str(out) in missing[0]
    assert "pretrained weights of dino_small_patch16: " in missing[1]
    assert "https://dl.fbaipublicfiles.com/dino/" in missing[1]
    assert "source ilsvrc_2012, VALID: " in missing[2]
    assert "there: source ilsvrc_2012, TRAIN: 5 classes" in ended.out
    ended = run([*testing, *places])
    assert ended.code == 2
    assert "missing: checkpoint no_out/train/pmf_5w1s/best.safetensors: no such file" in ended.out
    assert (
        "missing: source traffic_sign, TEST: " in ended.out and "0/0/43 classes, 39,209 images" in ended.out
    )


def test_a_dry_run_looks_into_the_checkpoint(world, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    flags = ["--arch", "vit_mini", "--test_sources", "dtd", "--num_ways", "5", "--num_support", "1"]
    places = ["--data_path", str(world.data), "--output_dir", str(tmp_path / "out")]
    file = ["--resume", str(tmp_path / "torn.safetensors"), "--dry_run"]
    ended = run([str(ROOT / "test_meta_dataset.py"), *flags, *places, *file])
    assert ended.code == 2 and "missing: checkpoint" in ended.out and "torn.safetensors" in ended.out
    assert not (tmp_path / "out").exists()


# --- AutoLoRa ----------------------------------------------------------------------------------------------


def test_the_values_of_the_autolora_tables_arrive(tmp_path):
    """With the flags of the scripts, unabridged."""
    for name, count, expected in (
        ("autolora_low_resolution", 162, {"epochs": 50, "lr": 0.1, "weight_decay": 2e-4, "pgd": "pgd20@8"}),
        ("autolora_high_resolution", 36, {"epochs": 60, "lr": 0.01, "weight_decay": 1e-4, "pgd": "pgd10@8"}),
    ):
        calls = of(planned(name, tmp_path), "main.py")
        assert len({value(words, "--output") for words in calls}) == len(calls) == count
        for words in calls:
            args = parsed(words)
            attacks = [attack.columns for attack in autolora_options.attacks(args)]
            assert attacks == [(expected["pgd"],), ("autoattack@8",)], words
            settings = autolora_options.settings(args, "AFF")
            assert (settings.adversary.epsilon, settings.adversary.steps) == (8, 10), words
            if args.method == "autolora":
                assert (settings.rank, settings.batch_size, settings.scale) == (8, 128, 6)
                assert settings.auto_lr and settings.auto_weights
                for field in ("epochs", "lr", "weight_decay"):
                    assert getattr(settings, field) == expected[field], words
            small = args.dataset.startswith("cifar") and "high" in name
            assert autolora_options.inside(args) == (224 if small else None)


@pytest.mark.parametrize("name", AUTOLORA_TABLES)
def test_every_method_is_on_the_page_of_its_pair(name, tmp_path):
    for words in of(planned(name, tmp_path), "report"):
        pair = Path(value(words, "--out")).stem
        shown = [Path(word).parts for word in words if word.endswith("test")]
        assert {parts[-3].removeprefix(f"{pair}.") for parts in shown} == {"vanilla", "twins", "autolora"}
        modes = {parts[-2] for parts in shown if parts[-3].endswith(".autolora")}
        assert modes == ({"SLF", "ALF", "AFF"} if "low" in name else {"AFF"})


PAIRS = {
    "autolora_low_resolution": {"PRETRAININGS": "DynACL++", "SOURCES": "cifar100", "TARGETS": "stl10"},
    "autolora_high_resolution": {"ARCHS": "resnet18", "DATASETS": "dtd"},
}


@pytest.mark.parametrize("name", AUTOLORA_TABLES)
def test_an_autolora_recipe_runs_to_its_end(tmp_path, name):
    """For one pair of a file and a dataset, without AutoAttack, which is slow; every run is on the page."""
    for split, n in (("train", 6), ("test", 2)):
        write_classes(tmp_path / "data" / split, x=n, y=n)
    network = build_classifier("resnet_mini", 2, 16)
    encoder = {key: tensor for key, tensor in network.start(0).items() if not network.is_head(key)}
    for file in ("DynACL++_cifar100.pth", "resnet18_linf_eps4.0.ckpt"):
        torch.save({"state_dict": encoder}, tmp_path / file)
    small = "--dataset imagefolder --arch resnet_mini --resize 16 --resolution low --epochs 1"
    few = "--num_steps_train 1 --num_steps_test 1 --num_workers 0 --threads 1"
    environment = PAIRS[name] | {"CHECKPOINTS": str(tmp_path), "AUTOLORA_FLAGS": f"{small} {few}"}
    for dry in (["--dry_run"], []):
        _, calls = script(name, tmp_path, tmp_path / "data", tmp_path / "out", *dry, **environment)
        for words in calls:
            ended = run([word for word in words if word != "--eval_AA"])
            assert ended.code == 0, (words, ended)
            if dry and words[1] == "autolora":
                assert "there: dataset imagefolder: 2 classes, 10/2/4 images" in ended.out
    page = Path(value(calls[-1], "--out")).read_text()
    runs = [word for word in calls[-1] if word.endswith("test")]
    assert len(calls) == 4 and len(runs) == {"low": 7, "high": 3}[name.split("_")[1]]
    assert all("/".join(Path(run).parts[-3:]).rpartition(".")[2] in page for run in runs)
