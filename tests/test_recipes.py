"""The recipes: every stage of every one runs at toy size, goes on where it stopped, and says what is missing.

A process of its own costs seconds of imports. One recipe is started as a user starts it; elsewhere a stage is
called in this process, with the very flags of its command line.
"""

import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import (
    REAL_SPECS,
    SPLITS,
    bilevel_spec,
    dag_spec,
    fails,
    flat_spec,
    jpeg,
    write_classes,
    write_picture,
    write_spec,
)
from safetensors.torch import save_file

from amt.cli import options, recipe
from amt.cli.options import autolora as autolora_options
from amt.cli.options import recipes
from amt.cli.options.recipes import AMT, TEST, TRAIN
from amt.files import checkpoint, export
from amt.models.architectures import ARCHS, Arch, build_network
from amt.models.network import build_classifier
from amt.training.keeper import Keeper
from meta_dataset_readers.bscd import CHESTX_FINDINGS, CHESTX_IMAGES, CHESTX_LABELS, ISIC_IMAGES, ISIC_LABELS
from meta_dataset_readers.errors import InputError, exit_on_bad_input
from meta_dataset_readers.sampling import check_sampling
from meta_dataset_readers.spec import load_spec
from meta_dataset_readers.tfrecord import encode_example, write_records

ROOT = Path(__file__).resolve().parent.parent
AUTOLORA_TABLES = ["autolora_high_resolution", "autolora_low_resolution"]
TABLES = [name for name in recipes.known() if name not in AUTOLORA_TABLES]


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

    @property
    def size(self) -> str:
        return f"--arch vit_mini --pretrained_checkpoint {shlex.quote(str(self.weights))} --threads 1"

    def flags(self, name: str, *more, out: Path | None = None) -> list[str]:
        """Of `python -m amt recipe` for a recipe at toy size."""
        train = "--epochs 1 --warmup_epochs 0 --nEpisode 1 --nValEpisode 1 --attack_iters 1 --num_workers 0"
        test = "--nTestEpisode 1 --nSelectEpisode 1 --ada_steps 1 --num_workers 0 --probe_episodes 0"
        return [
            *(name, "--data_path", str(self.data), "--output_dir", str(out or self.out)),
            *("--train_flags", f"{self.size} --max_num_query 1 {train}"),
            *("--test_flags", f"{self.size} --num_query 1 {test}", *map(str, more)),
        ]


def write_weights(file: Path, arch: Arch) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build_network(arch).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def roomy_world(tmp_path_factory) -> World:
    """With the real vit_mini, for commands in processes of their own."""
    root = tmp_path_factory.mktemp("world")
    write_data(root / "data")
    return World(root / "data", write_weights(root / "weights.safetensors", ARCHS["vit_mini"]), root / "out")


TINY = Arch(patch_size=16, dim=16, depth=1, heads=2, pretrained_size=32, image_size=32, mlp_ratio=1.0)


@pytest.fixture(scope="module")
def world(roomy_world, tmp_path_factory):
    """With something still smaller under the name of vit_mini, for commands in this process."""
    root = tmp_path_factory.mktemp("tiny_world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_mini", TINY)
        yield World(roomy_world.data, write_weights(root / "weights.safetensors", TINY), root / "out")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def called(main, *argv: str) -> Ended:
    """Call an entry point in this process, as the last line of its script does."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = list(argv)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_on_bad_input(main)
    except SystemExit as ended:
        return Ended(ended.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before


def asked(*flags: str) -> Ended:
    """Call `python -m amt recipe` in this process."""
    return called(lambda: recipe.main(list(flags)), "amt", "recipe", *flags)


def stage_here(words: list[str]) -> int:
    """Run a stage's command line in this process: its exit code."""
    _python, script, *flags = words
    if script == "-m":
        _amt, name, *flags = flags
        command = importlib.import_module(f"amt.cli.{name}")
        ended = called(lambda: command.main(flags), "amt", name, *flags)
    else:
        spec = importlib.util.spec_from_file_location(Path(script).stem, script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        ended = called(module.main, Path(script).name, *flags)
    print(ended.out, ended.err)
    return ended.code


@pytest.fixture
def here(monkeypatch):
    """Stages run in this process; the list of those that did."""
    run = []

    def follow(words):
        run.append(words)
        return stage_here(words)

    monkeypatch.setattr(recipe, "follow", follow)
    return run


def planned(name: str, *chosen: str, **extra: list[str]) -> list[recipes.Job]:
    """The jobs of a recipe with its own flags, in folders that are not there."""
    places = Path("no_data"), Path("no_out"), Path("no_checkpoints")
    return recipes.plan(recipes.load(name), *places, extra, chosen or ("*",))


# --- the tables ------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_table():
    assert TABLES == ["bscd_fsl", "fine_grained", "meta_dataset_5w1s", "meta_dataset_5w5s"]
    ended = asked()
    assert ended.code == 0
    assert [line.split()[0] for line in ended.out.splitlines()] == AUTOLORA_TABLES + TABLES


@pytest.mark.parametrize("name", TABLES)
def test_every_stage_is_understood_by_its_program(name):
    """With the flags of the file, unabridged; and the paper's values arrive."""
    jobs = planned(name)
    for job in jobs:
        if job.stage.kind == AMT:
            importlib.import_module(f"amt.cli.{job.stage.name}")
            continue
        args = recipe.parsed(job)
        assert args.arch == "dino_small_patch16" and "without_effect" not in args, job.title
        if job.stage.kind == TEST:
            assert args.nTestEpisode == 600, job.title
            (attack,) = options.attacks(args)
            assert attack.columns == ("pgd20@8",) and attack.step_at(8) == 2, job.title
            continue
        settings = options.tune_settings(args)
        assert (settings.epochs, settings.warmup_epochs, settings.episodes_per_epoch) == (30, 5, 2000)
        if job.stage.name.startswith("amt"):
            assert settings.lr == 5e-4 and settings.method == "adsv" and args.rank == 8
            assert [level.epsilon for level in options.levels(args)] == [8, 6, 0.1, 0.01]
            assert {(level.beta, level.steps) for level in options.levels(args)} == {(6, 10)}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_the_table_is_there(name):
    """Pretrained, fully tuned with and without an adversary, one LoRA, the pool; and each is on a page."""
    jobs = planned(name)
    rows = {job.stage.name for job in jobs if job.stage.kind == TEST}
    for shots in ("_1shot", "_5shot") if name in ("bscd_fsl", "fine_grained") else ("",):
        assert rows >= {f"{row}{shots}" for row in ("pretrained", "pmf", "querying", "one_lora", "amt")}
    pages = [job for job in jobs if job.stage.kind == AMT]
    shown = {Path(word).name for page in pages for word in page.flags}
    assert shown >= {row for row in rows if not row.startswith("released")}
    trained = [job.stage.name for job in jobs if job.stage.kind == TRAIN]
    resumed = {job.starts_from.parent.name for job in jobs if job.starts_from and not job.stage.optional}
    assert resumed == set(trained)  # nothing is trained for nothing


@pytest.mark.benchmark_data
@pytest.mark.parametrize("name", ["meta_dataset_5w1s", "meta_dataset_5w5s"])
def test_the_protocols_suit_the_real_specifications(tmp_path, name):
    """Every class that an episode may draw has enough images, in training and in every domain."""
    if not REAL_SPECS.is_dir():
        pytest.skip(f"{REAL_SPECS} is not there (AMT_REAL_SPECS)")
    for job in planned(name, "train/*", "test/*"):
        args = recipe.parsed(job)
        for source, split in recipe.splits(job.stage.kind, args):
            packed = REAL_SPECS / f"{source}_dataset_spec.json.gz"
            (tmp_path / source).mkdir(exist_ok=True)
            (tmp_path / source / "dataset_spec.json").write_bytes(gzip.decompress(packed.read_bytes()))
            check_sampling(load_spec(tmp_path / source), split, options.sampling(args))


# --- running ---------------------------------------------------------------------------------------------


def test_a_recipe_runs_as_a_user_starts_it(roomy_world, tmp_path):
    """In processes of its own and from another folder: training, an evaluation, a page."""
    chosen = ("train/amt_5w1s", "test/one_lora", "report/table")
    flags = roomy_world.flags("meta_dataset_5w1s", "--stages", *chosen)
    flags[flags.index("--test_flags") + 1] += " --test_sources traffic_sign omniglot"
    ended = subprocess.run(
        [sys.executable, "-m", "amt", "recipe", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert [title for title in chosen if f"{title}: " in ended.stdout] == [*chosen]
    assert (roomy_world.out / "train" / "amt_5w1s" / "best.safetensors").is_file()
    results = json.loads((roomy_world.out / "meta_dataset_5w1s" / "one_lora" / "results.json").read_text())
    assert {"traffic_sign", "omniglot", "average"} <= results["summary"].keys()
    assert set(results["summary"]["omniglot"]) >= {"clean", "pgd20@8"}
    page = (roomy_world.out / "meta_dataset_5w1s" / "table.html").read_text()
    assert "traffic_sign" in page and "one_lora" in page


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_runs_to_its_end_and_then_has_nothing_to_do(world, here, name):
    """All its stages, on top of what the other recipes left in the same folder."""
    flags = world.flags(name)
    ended = asked(*flags)
    assert ended.code == 0, ended.out + ended.err
    jobs = recipes.plan(recipes.load(name), world.data, world.out, Path("none"), {})
    assert all(job.done() or job.left_out() for job in jobs)
    here.clear()
    again = asked(*flags)
    assert again.code == 0 and not here
    assert again.out.count(": done, ") == sum(not job.stage.optional for job in jobs)
    dry = asked(*flags, "--dry-run")
    assert dry.code == 0, dry.out
    assert "missing" not in dry.out and "to do" not in dry.out


def test_the_authors_pool_is_a_row_where_it_is_there(world, here, tmp_path):
    """`optional` and `{checkpoints}`; and the page has it, too."""
    asked(*world.flags("meta_dataset_5w1s", "--stages", "train/amt_5w1s"))
    pool = checkpoint.load(world.out / "train" / "amt_5w1s" / "best.safetensors").pool
    export.save_published(tmp_path / "metadataset_imagenet_advmetatuned_5w1s.pth", pool, None)
    flags = world.flags("meta_dataset_5w1s", "--checkpoints", tmp_path, "--stages", "test/released")
    ended = asked(*flags)
    assert ended.code == 0, ended.out + ended.err
    assert (world.out / "meta_dataset_5w1s" / "released" / "results.json").is_file()
    jobs = recipes.plan(recipes.load("meta_dataset_5w1s"), world.data, world.out, tmp_path, {})
    assert str(world.out / "meta_dataset_5w1s" / "released") in jobs[-1].flags


# --- AutoLoRa --------------------------------------------------------------------------------------------


class Folders(NamedTuple):
    """A folder of pictures by class, files of a tiny network under the names that recipes look for."""

    data: Path
    checkpoints: Path
    out: Path

    def flags(self, name: str, *more) -> list[str]:
        """Of `python -m amt recipe` for a recipe at toy size; datasets are these pictures."""
        size = "--arch resnet_mini --resize 16 --resolution low --epochs 1"
        steps = "--num_steps_train 1 --num_steps_test 1"
        return [
            *(name, "--data_path", str(self.data), "--output_dir", str(self.out)),
            *("--checkpoints", str(self.checkpoints), *map(str, more)),
            *("--autolora_flags", f"--dataset imagefolder {size} {steps} --num_workers 0 --threads 1"),
        ]


@pytest.fixture
def folders(tmp_path) -> Folders:
    for split, n in (("train", 6), ("test", 2)):
        write_classes(tmp_path / "data" / split, x=n, y=n)
    network = build_classifier("resnet_mini", 2, 16)
    encoder = {key: tensor for key, tensor in network.start(0).items() if not network.is_head(key)}
    (tmp_path / "files").mkdir()
    for name in ("DynACL++_cifar100.pth", "resnet18_linf_eps4.0.ckpt"):
        torch.save({"state_dict": encoder}, tmp_path / "files" / name)
    return Folders(tmp_path / "data", tmp_path / "files", tmp_path / "out")


def without_autoattack(name: str, folder: Path) -> str:
    """A copy of a recipe for networks that need not wait for AutoAttack."""
    file = folder / f"{name}.yaml"
    file.write_text((recipes.FOLDER / file.name).read_text().replace(" --eval_AA", ""))
    return str(file)


def test_every_stage_of_the_autolora_tables_is_understood():
    """With the flags of the file, unabridged; and the paper's values arrive."""
    for name, expected in (
        ("autolora_low_resolution", {"epochs": 50, "lr": 0.1, "weight_decay": 2e-4, "steps": "pgd20@8"}),
        ("autolora_high_resolution", {"epochs": 60, "lr": 0.01, "weight_decay": 1e-4, "steps": "pgd10@8"}),
    ):
        jobs = planned(name, "autolora/*")
        assert len({job.title for job in jobs}) == len(jobs) == {"low": 162, "high": 36}[name.split("_")[1]]
        for job in jobs:
            args = recipe.parsed(job)
            attacks = [attack.columns for attack in autolora_options.attacks(args)]
            assert attacks == [(expected["steps"],), ("autoattack@8",)], job.title
            settings = autolora_options.settings(args, "AFF")
            assert (settings.adversary.epsilon, settings.adversary.steps) == (8, 10), job.title
            if args.method == "autolora":
                assert (settings.rank, settings.batch_size, settings.scale) == (8, 128, 6)
                assert settings.auto_lr and settings.auto_weights
                for field in ("epochs", "lr", "weight_decay"):
                    assert getattr(settings, field) == expected[field], job.title
            small = args.dataset.startswith("cifar") and "high" in name
            assert autolora_options.inside(args) == (224 if small else None)


@pytest.mark.parametrize("name", AUTOLORA_TABLES)
def test_every_method_is_on_the_page_of_its_pair(name):
    jobs = planned(name)
    for page in (job for job in jobs if job.stage.kind == AMT):
        shown = [Path(word).parts for word in page.flags if word.endswith("test")]
        found = {parts[-3].removeprefix(f"{page.makes.stem}.") for parts in shown}
        assert found == {"vanilla", "twins", "autolora"}, page.title
        modes = {parts[-2] for parts in shown if parts[-3].endswith(".autolora")}
        assert modes == ({"SLF", "ALF", "AFF"} if "low" in name else {"AFF"})


@pytest.mark.parametrize(
    ("name", "stages", "runs"),
    [
        (
            "autolora_low_resolution",
            ["autolora/DynACL++_cifar100_stl10.autolora", "report/DynACL++_cifar100_stl10"],
            ["autolora/SLF/test", "autolora/ALF/test", "autolora/AFF/test"],
        ),
        (
            "autolora_high_resolution",
            ["*/resnet18_dtd*"],
            ["vanilla/AFF/test", "twins/AFF/test", "autolora/AFF/test"],
        ),
    ],
)
def test_an_autolora_recipe_runs_to_its_end_and_then_has_nothing_to_do(
    folders, here, tmp_path, name, stages, runs
):
    """For one pair of a file and a dataset; every run is on the page."""
    flags = folders.flags(without_autoattack(name, tmp_path), "--stages", *stages)
    ended = asked(*flags)
    assert ended.code == 0, ended.out + ended.err
    assert all(words[1:3] == ["main.py", "autolora"] for words in here[:-1])
    shown = [word for word in here[-1] if word.endswith("test")]
    assert [word.rpartition(".")[2] for word in shown] == runs
    page = Path(here[-1][-1]).read_text()
    assert all(run in page for run in runs)
    n_stages = len(here)
    here.clear()
    again = asked(*flags)
    assert again.code == 0 and not here and again.out.count(": done, ") == n_stages
    dry = asked(*flags, "--dry-run")
    assert dry.code == 0 and "missing" not in dry.out and "to do" not in dry.out
    # What is asked for with other flags is not taken for the same.
    flags[-1] += " --scale 3"
    assert "was made with other flags (then no more; now --scale 3)" in asked(*flags).err


def test_a_dry_run_names_missing_datasets_and_networks(folders):
    """Each once, however many stages need it; and what is there."""
    (folders.checkpoints / "ACL_cifar10.pth").touch()
    ended = asked(*folders.flags("autolora_low_resolution", "--stages", "*ACL_cifar10_*", "--dry-run")[:-2])
    assert ended.code == 1
    lines = ended.out.splitlines()
    missing = [line for line in lines if line.startswith("missing: ")]
    network = f"robustly pretrained network {folders.checkpoints}/"
    assert f"missing: {network}DynACL_cifar10.pth: no such file" in missing
    assert f"there: {network}ACL_cifar10.pth: a file" in lines
    assert len([line for line in missing if "dataset stl10" in line and "stl10_binary" in line]) == 1
    assert "autolora/ACL_cifar10_stl10.twins: to do" in lines
    assert not any("check DATA_PATH" in line for line in lines)
    ended = asked(*folders.flags("autolora_high_resolution", "--stages", "*/resnet18_*", "--dry-run"))
    assert ended.code == 0, ended.out
    assert (
        f"there: dataset imagefolder: 2 classes, 10/2/4 images to train, validate and test, in {folders.data}"
        in ended.out
    )


# --- going on --------------------------------------------------------------------------------------------


def write_recipe(folder: Path, stages: str, head: str = "table: a table\nneeds: {}\n") -> str:
    file = folder / "mine.yaml"
    file.write_text(f"{head}stages:\n{stages}")
    return str(file)


SMALL = """
- train: one
  flags: --base_sources ilsvrc_2012 --num_ways 5 --num_support 1 --epsilon 8
- train: two
  flags: --base_sources ilsvrc_2012 --num_ways 5 --num_support 1 --epsilon 1
- amt: pool
  makes: "{out}/pool/both.safetensors"
  flags: "{train}/one/last.safetensors {train}/two/last.safetensors --out {makes}"
- test: both
  flags: --resume {out}/pool/both.safetensors --test_sources dtd --num_ways 5 --num_support 1
"""


def test_a_recipe_of_ones_own_assembles_a_pool_and_tests_it(world, here, tmp_path):
    """Any command of `python -m amt` can be a stage, and `--resume` may name what it makes."""
    mine = write_recipe(tmp_path, SMALL)
    ended = asked(*world.flags(mine, out=tmp_path / "out"))
    assert ended.code == 0, ended.out + ended.err
    assert len(checkpoint.load(tmp_path / "out" / "pool" / "both.safetensors").pool) == 2
    assert (tmp_path / "out" / "mine" / "both" / "results.json").is_file()
    # What is older than what it was made from is made anew, or gone on with.
    os.utime(tmp_path / "out" / "train" / "two" / "last.safetensors")
    here.clear()
    assert asked(*world.flags(mine, out=tmp_path / "out")).code == 0
    assert len(here) == 2 and here[0][3] == "pool" and "test_meta_dataset.py" in here[1][1]


def test_an_interrupted_training_ends_the_recipe_and_is_resumed_by_the_next(
    world, here, monkeypatch, tmp_path
):
    mine, out = write_recipe(tmp_path, SMALL), tmp_path / "out"
    flags = world.flags(mine, "--stages", "train/*", out=out)
    flags[flags.index("--train_flags") + 1] += " --nEpisode 2"
    log_step = Keeper.log_step

    def interrupting(self, *arguments):
        log_step(self, *arguments)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "log_step", interrupting)
        ended = asked(*flags)
    assert ended.code == 130 and len(here) == 1
    assert "stopped after 1 of 2 episodes" in ended.out
    last = out / "train" / "one" / "last.safetensors"
    dry = asked(*flags, "--dry-run")
    assert dry.code == 0
    assert f"train/one: to be continued from {last}" in dry.out
    assert asked(*flags).code == 0
    assert len(here) == 3 and here[0] == here[1]


def test_whether_a_training_is_finished_is_asked_of_the_checkpoint_itself(world, here, tmp_path):
    """The text beside it is written later, and so may be older."""
    mine, out = write_recipe(tmp_path, SMALL), tmp_path / "out"
    flags = world.flags(mine, "--stages", "train/one", out=out)
    assert asked(*flags).code == 0
    (out / "train" / "one" / "last.json").unlink()
    here.clear()
    assert asked(*flags).code == 0 and not here
    (out / "train" / "one" / "last.safetensors").write_bytes(b"torn")
    assert "to be continued" in asked(*flags, "--dry-run").out


def test_a_failing_stage_ends_the_recipe_with_its_code(world, monkeypatch, tmp_path):
    ran = []

    def follow(words):
        ran.append(words)
        return 7

    monkeypatch.setattr(recipe, "follow", follow)
    ended = asked(*world.flags(write_recipe(tmp_path, SMALL), out=tmp_path / "out"))
    assert ended.code == 7 and len(ran) == 1
    assert "error: stage train/one ended with exit code 7" in ended.err


def test_a_stage_that_leaves_nothing_is_an_error(world, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "follow", lambda words: 0)
    ended = asked(*world.flags(write_recipe(tmp_path, SMALL), out=tmp_path / "out"))
    assert ended.code == 2 and "last.safetensors is not complete" in ended.err


def test_other_flags_do_not_pass_for_the_same_results(world, monkeypatch, tmp_path):
    """A folder keeps the flags it was begun with; only those that choose the machine may change."""
    monkeypatch.setattr(recipe, "follow", lambda words: 130)
    mine, out = write_recipe(tmp_path, SMALL), tmp_path / "out"
    flags = ("--data_path", str(world.data), "--output_dir", str(out), "--stages", "train/*", "--train_flags")
    assert asked(mine, *flags, f"{world.size} --lr 1").code == 130
    assert asked(mine, *flags, f"{world.size} --lr 1 --num-workers 3").code == 130
    ended = asked(mine, *flags, f"{world.size} --lr 2")
    assert ended.code == 2
    assert "was made with other flags (then --lr 1; now --lr 2)" in ended.err
    (out / "train" / "one" / "stage.json").unlink()
    (out / "train" / "one" / "last.safetensors").touch()
    assert "was not made by a recipe" in asked(mine, *flags, world.size).err


def run_of(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("raise SystemExit(3)", 3)])
def test_exit_codes_pass_through(code, expected):
    assert recipes.follow(run_of(code)) == expected


def test_a_command_killed_by_a_signal_has_the_code_of_a_shell():
    assert recipes.follow(run_of("import os; os.kill(os.getpid(), 9)")) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_stage_may_finish_what_it_is_doing(tmp_path, number):
    """The signal reaches it once, and its end is waited for; then the recipe ends, too."""
    child = (
        "import os, pathlib, signal, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def note(*_):\n"
        "    with open(here / 'caught', 'a') as file: file.write('x')\n"
        "signal.signal(signal.SIGINT, note); signal.signal(signal.SIGTERM, note)\n"
        "(here / 'pid').write_text(str(os.getpid())); (here / 'ready').touch()\n"
        "while not (here / 'caught').exists(): time.sleep(0.01)\n"
        "time.sleep(0.3); (here / 'saved').touch()\n"
    )

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        if number == signal.SIGINT:  # which a terminal sends to every process
            os.kill(int((tmp_path / "pid").read_text()), number)

    sender = threading.Thread(target=send, daemon=True)
    before = signal.getsignal(number)
    sender.start()
    assert recipes.follow(run_of(child)) == 128 + number
    assert (tmp_path / "saved").exists() and (tmp_path / "caught").read_text() == "x"
    assert signal.getsignal(number) == before


# --- what is missing -------------------------------------------------------------------------------------


def test_a_dry_run_lists_commands_that_can_be_pasted(world):
    ended = asked(*world.flags("meta_dataset_5w5s", "--dry-run", out=world.out / "fresh"))
    assert ended.code == 0, ended.out
    assert not (world.out / "fresh").exists()
    lines = [line.strip() for line in ended.out.splitlines() if line.startswith("  ") and "python" in line]
    jobs = [job for job in planned("meta_dataset_5w5s") if not job.stage.optional]
    assert len(lines) == len(jobs)
    for line in lines:
        _python, script, *_flags = shlex.split(line)
        assert script == "-m" or Path(script).is_file()
    assert "there: source traffic_sign, TEST: 5 classes, 30 images" in ended.out
    assert f"there: pretrained weights of vit_mini: {world.weights}" in ended.out
    assert "left out" in ended.out and "disk: not measured" in ended.out


def test_a_dry_run_names_what_is_missing(world, tmp_path):
    """Sources with what is known about them, a split without classes, weights; nothing is fetched."""
    write_source(tmp_path / "data", flat_spec("ilsvrc_2012", (5, 0, 5), [6] * 10), 6)
    out = tmp_path / "file" / "out"
    (tmp_path / "file").touch()
    ended = asked(
        "meta_dataset_5w1s", "--data_path", str(tmp_path / "data"), "--output_dir", str(out), "--dry-run"
    )
    assert ended.code == 1
    missing = [line for line in ended.out.splitlines() if line.startswith("missing: ")]
    assert any("folder for the output" in line and str(out) in line for line in missing)
    assert any(
        "source traffic_sign (TEST): " in line and "0/0/43 classes, 39,209 images" in line for line in missing
    )
    assert any("source ilsvrc_2012 (VALID): " in line for line in missing)
    assert "there: source ilsvrc_2012, TRAIN: 5 classes" in ended.out
    weights = [line for line in missing if "pretrained weights of dino_small_patch16" in line]
    assert len(weights) == 1 and "https://dl.fbaipublicfiles.com/dino/" in weights[0]


def test_without_its_data_a_recipe_does_not_begin(world, here, tmp_path):
    ended = asked("bscd_fsl", "--data_path", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out"))
    assert ended.code == 1 and not here and not (tmp_path / "out").exists()
    assert f"missing: data path {tmp_path / 'none'}: no such directory" in ended.err


def test_a_stage_alone_needs_what_others_make(world, here, tmp_path):
    flags = world.flags("meta_dataset_5w1s", "--stages", "test/amt", out=tmp_path)
    ended = asked(*flags)
    assert ended.code == 1 and not here
    assert "last.safetensors, for test/amt: train/amt_5w1s is not done, nor to be run" in ended.err


def test_a_checkpoint_that_no_stage_makes_is_missing(world, tmp_path):
    mine = write_recipe(
        tmp_path, "- test: x\n  flags: --resume nowhere.pth --test_sources dtd --num_ways 5\n"
    )
    ended = asked(*world.flags(mine, "--dry-run", out=tmp_path / "out"))
    assert ended.code == 1 and "missing: checkpoint nowhere.pth, for test/x: no such file" in ended.out


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["bscd"], "no recipe 'bscd'; did you mean 'bscd_fsl'"),
        (["none.yaml"], "no recipe 'none.yaml'; no such file"),
        (["bscd_fsl"], "--data_path is missing"),
        (["bscd_fsl", "--data_path", "d"], "--output_dir is missing"),
        (["bscd_fsl", "--data_path", "d", "--output_dir", "o", "--train_flags", "'"], "--train_flags: "),
        (["bscd_fsl", "--data_path", "d", "--output_dir", "o", "--stages", "test/am"], "no such stage"),
        (
            ["bscd_fsl", "--data_path", "d", "--output_dir", "o", "--train_flags", "--lr x"],
            "train/amt_5w1s: ",
        ),
        (["bscd_fsl", "--data_path", "d", "--output_dir", "o", "--train_flags", "--nonsense"], "nonsense"),
    ],
)
def test_bad_flags_are_one_line(flags, complaint):
    ended = asked(*flags)
    assert ended.code == 2
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and complaint in ended.err


@pytest.mark.parametrize(
    ("head", "stages", "complaint"),
    [
        ("table: [", "", "cannot be read as YAML"),
        ("", "", "mine.yaml: recipe: field 'stages' is None, expected a list"),
        ("table: a\nneeds: {}\ntests: x\n", "- test: a", "no field 'tests'; did you mean 'test'"),
        ("table: 3\nneeds: {}\n", "- test: a", "field 'table' is 3, expected a text"),
        ("table: a\nneeds: no\n", "- test: a", "field 'needs' is False, expected fields by name"),
        ("table: a\nneeds: {}\n", "- flags: a", "expected one of train, test, autolora, amt"),
        ("table: a\nneeds: {}\n", "- x", "expected one of train, test, autolora, amt"),
        ("table: a\nneeds: {}\n", "- test: a\n  each: [x]", "field 'each' is ['x'], expected a list"),
        ("table: a\nneeds: {}\n", "- test: a\n  each: {x: y}", "field 'each' is {'x': 'y'}, expected a list"),
        ("table: a\nneeds: {}\n", "- test: a\n  each: {out: [1]}", "the name 'out', which is a place"),
        ("table: a\nneeds: {}\n", "- test: a\n  each: {x: [1, 2]}", "two stages are called test/a"),
        ("table: a\nneeds: {}\n", "- test: a\n- test: a", "two stages are called test/a"),
        ("table: a\nneeds: {}\n", "- test: a/b", "expected a name of letters"),
        ("table: a\nneeds: {}\n", "- test: a\n  flags: '\"x'", "field 'flags': '\"x' cannot be split"),
        ("table: a\nneeds: {}\n", "- test: a\n  makes: b", "no field 'makes'"),
        ("table: a\nneeds: {}\n", "- amt: pool", "field 'makes' is None, expected a text"),
        ("table: a\nneeds: {}\n", "- test: a\n  flags: --x {nowhere}", "stage test/a: no place {nowhere}"),
        ("table: a\nneeds: {}\ntraining: [mine]\n", "- test: a", "field 'training' names 'mine'"),
        ("table: a\nneeds: {}\ntraining: [mine.yaml]\n", "- test: a", "field 'training' names 'mine.yaml'"),
        ("table: a\nneeds: {}\ntraining: [nope]\n", "- test: a", "no recipe 'nope'"),
    ],
)
def test_a_file_that_is_no_recipe_is_said_so(tmp_path, head, stages, complaint):
    mine = write_recipe(tmp_path, stages, head)
    error = fails(None, lambda: recipes.plan(recipes.load(mine), Path("d"), Path("o"), Path("c"), {}))
    assert isinstance(error, InputError) and complaint in str(error)
