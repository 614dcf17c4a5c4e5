"""The mini study at toy size: it runs what it says, goes on where it was, and its files become the page."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import ROOT, called
from conftest import fails
from PIL import Image
from toy_runs import write_run

import main as training
import test_meta_dataset
from amt import __main__ as program
from amt.attacks.kinds import Attack
from amt.cli import options
from amt.evaluation import leaderboard, seeds
from studies import mini_results, mini_study
from studies.mini_study import (
    GAMMAS,
    KNOB,
    ONE,
    ONE_LORA,
    ORACLE,
    POOL,
    RECIPE,
    RECIPES,
    REFERENCE,
    ROWS,
    Row,
    named,
)

MAINS = {"main.py": training.main, "test_meta_dataset.py": test_meta_dataset.main, "amt": program.main}
ATTACKS = (Attack("pgd", (1, 2, 4, 8)),)


@pytest.fixture
def study(tmp_path, world, monkeypatch):
    """`study(*flags)` runs two rows at toy size, in this process; the commands that it ran."""
    ran = []
    really = subprocess.run

    def run(command, stdout=None, **more):
        if command[0] != sys.executable:
            return really(command, stdout=stdout, **more)
        assert more["cwd"] == ROOT
        words = command[2:] if command[1] == "-m" else command[1:]
        if words[0] == "meta_dataset_readers.mini":
            return SimpleNamespace(returncode=0)
        ran.append(words)
        ended = called(MAINS[words[0]], words)
        stdout.write(ended.out + ended.err)
        stdout.flush()
        return SimpleNamespace(returncode=ended.code)

    quick = ("--attack_iters", "1", "--probe_episodes", "0", "--num_workers", "0")
    rows = (
        Row(REFERENCE, (), quick),
        Row("plain", ("small", "smaller"), (*quick, "--specified_expert", "0"), episodes=0.5),
    )
    recipe = tmp_path / "recipe.args"
    recipe.write_text(" ".join(map(str, world.train(tmp_path))))
    short = ("--epochs", "1", "--nEpisode", "1", "--nValEpisode", "1")
    short += ("--epsilon", "8", "--attack_iters", "1")
    patched = {"DOMAINS": ("tiny",), "SOURCE": "tiny", "SEEDS": (0,), "ROWS": rows}
    patched["TRAININGS"] = {"small": short, "smaller": (*short, "--lr", "0.001")}
    for name, value in patched.items():
        monkeypatch.setattr(mini_study, name, value)
    monkeypatch.setattr(subprocess, "run", run)
    # In the main thread, where the programs can take signals.
    monkeypatch.setattr(mini_study, "in_parallel", lambda _, work, cases: [work(*case) for case in cases])

    def start(*flags):
        ran.clear()
        words = ["mini_study", "--out", tmp_path / "out", "--results", tmp_path / "mini", "--jobs", 1]
        words += ["--recipe", recipe, "--data_path", world.data, "--episodes", 2, "--choosing", 1]
        monkeypatch.setattr(sys, "argv", [str(w) for w in [*words, "--shots", 5, "--seeds", 0, *flags]])
        mini_study.main()
        return [words[0] for words in ran]

    return start


def test_the_study_runs_goes_on_and_becomes_files(study, tmp_path, capsys):
    """Row by row; what is done is not run again; a stopped part is continued by the same command."""
    assert study("--rows", REFERENCE) == ["test_meta_dataset.py", "amt"]
    said = capsys.readouterr().out
    assert "python test_meta_dataset.py --data_path " in said and " s: " in said
    assert study() == ["main.py"] * 2 + ["test_meta_dataset.py"] * 3 + ["amt"] * 2
    assert study() == ["amt"] * 2
    scored = tmp_path / "out" / "scored" / "5-shot" / "plain" / "seed-0"
    rows = (scored / "rows.jsonl").read_bytes()
    (scored / "results.json").unlink()
    assert study("--rows", "plain") == ["test_meta_dataset.py", "amt"]
    assert (scored / "rows.jsonl").read_bytes() == rows
    kept = tmp_path / "out" / "training" / "small-0" / "last.json"
    about = json.loads(kept.read_text())
    kept.write_text(json.dumps({name: value for name, value in about.items() if name != "statistics"}))
    assert study("--rows", "plain") == ["main.py", "amt"]  # it was killed before the heads' statistics
    plain = leaderboard.read(tmp_path / "mini" / "5-shot" / "plain.json")
    assert plain.about["candidates"] == 2 and "1 VALID episodes of tiny by clean" in plain.about["tuned_on"]
    assert len(plain.every_row) == 1 and plain.columns[0] == "clean" and len(plain.columns) == 5
    first = leaderboard.read(tmp_path / "mini" / "5-shot" / "pretrained-prototypes.json")
    assert first.about["tuned_on"] == "nothing" and len(first.every_row) == 2


def test_a_part_that_fails_is_one_line(study, tmp_path):
    (tmp_path / "out" / "scored" / "5-shot" / "pretrained-prototypes").mkdir(parents=True)
    (tmp_path / "out" / "scored" / "5-shot" / "pretrained-prototypes" / "seed-0").write_text("no folder")
    fails("test_meta_dataset.py ended with code 2: error: ", lambda: study("--rows", REFERENCE))


def test_rows_are_known_by_name_and_by_slug():
    assert [row.name for row in named([ORACLE, "best-single"])] == ["best single", ORACLE]
    assert len({row.slug for row in ROWS}) == len(ROWS)
    fails("--rows orcale", lambda: named(["orcale"]))


def test_other_ways_to_train_are_rows_where_they_are_named():
    recipes = named(["recipe: *"])
    assert named([]) == [row for row in ROWS if row not in recipes]
    assert {training for row in recipes for training in row.trainings} == {f"{RECIPE}{r}" for r in RECIPES}
    assert [row.name for row in named(["recipe-gentle*"])] == [
        "recipe: gentle",
        "recipe: gentle + robust-lda",
    ]
    assert {row.against for row in recipes} < {row.name for row in ROWS}


@pytest.mark.parametrize("name", RECIPES)
def test_another_way_to_train_is_a_command_of_equal_cost(name, world, tmp_path):
    """Listed among the recipes; with as many episodes and levels as what it is compared with; run here at toy
    size."""
    listed = (ROOT / "recipes" / "README.md").read_text()
    assert re.search(
        rf"^python main.py .* --output_dir \S+ {re.escape(' '.join(RECIPES[name]))}$", listed, re.MULTILINE
    )

    def cost(flags) -> int:
        words = [f"@{ROOT / 'recipes' / 'mini_train.args'}", "--output_dir", str(tmp_path), *flags]
        args = options.training_parser().parse(words)
        options.check_training(args)
        return args.nEpisode * args.epochs * len(options.levels(args))

    (against, *_) = [row.against for row in named([f"{RECIPE}{name}*"])]
    assert cost(RECIPES[name]) == cost(ONE if against == ONE_LORA else POOL)
    short = ("--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0)
    short += ("--attack_iters", 1, "--statistics_episodes", 0)
    ended = called(training.main, ["main.py", *world.train(tmp_path / "run", *RECIPES[name], *short)])
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_every_row_knows_its_trainings():
    known = set(mini_study.TRAININGS)
    assert {training for row in ROWS for training in row.trainings} <= known
    assert known == {training for row in ROWS for training in row.trainings}


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_is_made_of_the_files_alone(tmp_path, capsys):
    """Paired differences with stars, the means of seeds, stamps, chance, the knob and the oracle; twice the
    same bytes."""
    names = {REFERENCE: 0.0, KNOB[0]: 0.4, KNOB[1]: 0.6, "mine": 0.9, ORACLE: 1.0}
    names |= {f"weight perturbation, gamma {gamma:g}": 0.5 + gamma for gamma in GAMMAS}
    names |= {
        "one LoRA": 0.5,
        f"{RECIPE}norms too": 0.9,
        f"{RECIPE}ridge": 0.1,
        f"{RECIPE}ridge + ridge": 0.9,
    }
    folder = tmp_path / "mini" / "5-shot"
    folder.mkdir(parents=True)
    for number, (name, strength) in enumerate(names.items()):
        stamp = "no method" if name == ORACLE else None
        places = [tmp_path / f"{number}-{seed}" for seed in (0, 1)]
        for seed, place in enumerate(places):
            write_run(
                place, strength=strength, seed=seed, samples=0, episodes=5, attacks=ATTACKS, stamp=stamp
            )
        row = seeds.read_row(",".join(map(str, places)))
        (folder / f"{number}.json").write_text(leaderboard.dump(leaderboard.content(row, name)))
    page = tmp_path / "docs" / "results.md"
    mini_results.write(tmp_path / "mini", page)
    text, picture = page.read_text(), (page.parent / "clean_robust_5_shot.png").read_bytes()
    assert Image.open(page.parent / "clean_robust_5_shot.png").width > 400
    assert "| minus pretrained + prototypes | clean | @1 | @2 | @4 | @8 | n |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| mine | +") or "| mine | -" in line]
    assert "*" in line and "±" in line and "[" in line
    assert "| minus weight perturbation, gamma 0 |" in text and "no method" in text and "Chance is 20" in text
    order = [text.index(f"\n| {name} | ") for name in (KNOB[0], KNOB[1], ORACLE, "mine")]
    assert order == sorted(order)
    shown, log = text.split("## What did not help")
    (table,) = re.findall(r"^\| minus one LoRA .*\n(?:\|.*\n)+", shown, re.MULTILINE)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        f"| {RECIPE}norms too",
        f"| {RECIPE}ridge",
        f"| {RECIPE}ridge + ridge",
    ]
    assert f"| 5-shot | {RECIPE}ridge | one LoRA | " in log and "norms too" not in log and ORACLE not in log
    mini_results.write(tmp_path / "mini", page)
    assert page.read_text() == text
    assert (page.parent / "clean_robust_5_shot.png").read_bytes() == picture


@pytest.mark.parametrize("content", [None, "", json.dumps({"protocol": 1})])
def test_a_page_of_nothing_is_one_line(tmp_path, content):
    folder = tmp_path / "mini" / "5-shot"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "a.json").write_text(content)
    fails(str(folder), lambda: mini_results.write(tmp_path / "mini", tmp_path / "page.md"))
    fails("no folder such as", lambda: mini_results.write(tmp_path / "none", tmp_path / "page.md"))
    assert not (tmp_path / "page.md").exists()
