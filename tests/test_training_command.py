"""main.py from the flags to the files it leaves."""

import dataclasses
import math
import re

import pytest
import torch
from commands import ROOT, about, process, same_tensors
from safetensors.torch import load_file, save_file
from toy_training import command, error_line, scalars

from amt.cli import options
from amt.files import checkpoint
from amt.training.tuner import Tuner
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, SourceMixture

# --- training --------------------------------------------------------------------------------------------


def test_a_run_leaves_its_checkpoints_and_says_where(trained):
    ended, out = trained
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"done: {out / 'last.safetensors'}"
    assert {path.name for path in out.iterdir()} == {
        *("last.safetensors", "last.json", "best.safetensors", "best.json", "tensorboard"),
        *("run.json", ".lock"),
    }


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_says_how_it_came_about(world, trained, name):
    _, out = trained
    file = out / f"{name}.safetensors"
    told = about(file)
    assert told["command"].startswith("main.py --arch vit_mini_amt") and str(world.data) in told["command"]
    assert {"python", "torch", "timm", "numpy"} <= told["versions"].keys()
    assert told["arch"] == "vit_mini"
    assert told["settings"]["epochs"] == 2 and told["settings"]["seed"] == 0
    assert [level["epsilon"] for level in told["levels"]] == [8.0, 0.1]
    assert all(level["steps"] == 2 for level in told["levels"])
    for number, note in enumerate(told["history"], start=1):
        assert (note["epoch"], note["episodes"]) == (number, 2 * number)
        assert [set(level) for level in note["validation"]] == [{"clean", "robust"}] * 2
    saved = checkpoint.load(file)
    assert bool(saved.momentum) == (name == "last") == ("tuner" in told)


def test_best_is_the_epoch_that_validates_best(trained):
    _, out = trained
    scores = [note["score"] for note in about(out / "last.safetensors")["history"]]
    assert len(scores) == 2
    assert len(about(out / "best.safetensors")["history"]) == 1 + scores.index(max(scores))


def test_training_moves_every_adapter_its_own_way(trained):
    """They started alike."""
    factors = checkpoint.load(trained[1] / "last.safetensors").pool.factors
    assert all(not torch.equal(factor[0], factor[1]) for factor in factors.values())


def test_tensorboard_shows_every_level(trained):
    shown = scalars(trained[1])
    per_step = ("total", "natural", "robust", "clean_accuracy", "robust_accuracy", "lr", "seconds_per_step")
    for level in (0, 1):
        for name in per_step:
            assert set(shown[f"level{level}/{name}"]) == {1, 2, 3, 4}
        for name in ("validation_clean", "validation_robust"):
            assert set(shown[f"level{level}/{name}"]) == {2, 4}
    rates = shown["level0/lr"]
    assert rates[1] == rates[2] > rates[3] == rates[4] > 0


def test_another_process_with_another_number_of_workers_gives_the_same_weights(world, trained, tmp_path):
    """As a user starts it, elsewhere: the same bits, momentum included."""
    flags = world.train(tmp_path / "run", "--num_workers", 1)
    ended = process(ROOT / "main.py", *flags, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"done: {tmp_path / 'run' / 'last.safetensors'}"
    assert "error" not in ended.err and "Warning" not in ended.err
    for name in ("last", "best"):
        assert same_tensors(tmp_path / "run" / f"{name}.safetensors", trained[1] / f"{name}.safetensors")


def test_another_seed_gives_other_weights(world, trained, tmp_path):
    command("main", *world.train(tmp_path, "--seed", 1, "--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0))
    assert not same_tensors(tmp_path / "last.safetensors", trained[1] / "last.safetensors")


@pytest.mark.parametrize(
    ("flags", "scores", "precision"),
    [
        (("--pgd_method", "standard"), {"clean"}, "None"),
        (("--bf16",), {"clean", "robust"}, "torch.bfloat16"),
        (("--fp16",), {"clean", "robust"}, "torch.float16"),
    ],
)
def test_other_ways_to_train(world, tmp_path, flags, scores, precision):
    short = ("--epochs", 1, "--nEpisode", 1, "--epsilon", 8, "--nValEpisode", 1)
    ended = command("main", *world.train(tmp_path, *short, *flags))
    assert ended.code == 0, ended.err
    told = about(tmp_path / "last.safetensors")
    assert set(told["history"][0]["validation"][0]) == scores
    assert told["protocol"]["autocast"] == precision
    checkpoint.load(tmp_path / "last.safetensors")  # refuses what is not finite


def test_without_validation_the_last_epoch_is_the_best(world, tmp_path):
    """And a source without a VALID split can be trained on."""
    flags = ("--base_sources", "no_valid", "--nValEpisode", 0, "--nEpisode", 1)
    ended = command("main", *world.train(tmp_path, *flags))
    assert ended.code == 0, ended.err
    last, best = load_file(tmp_path / "last.safetensors"), load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(last[name], best[name]) for name in best)


def test_several_sources_are_mixed(world, tmp_path):
    flags = ("--base_sources", "tiny", "no_valid", "--val_sources", "tiny", "--epochs", 1, "--nEpisode", 1)
    ended = command("main", *world.train(tmp_path, *flags))
    assert ended.code == 0, ended.err
    assert about(tmp_path / "last.safetensors")["tuner"]["episodes_done"] == 2


def test_a_collapse_is_said_and_noted(world, tmp_path):
    """A network whose features are all zero stays at ln(5) with no divergence."""
    dead = tmp_path / "dead.safetensors"
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(world.weights).items()}, dead)
    flags = ("--pretrained_checkpoint", dead, "--epochs", 1, "--epsilon", 8)
    ended = command("main", *world.train(tmp_path / "run", *flags))
    assert ended.code == 0, ended.err
    assert "warning: level 0 has collapsed: its loss stayed at ln(ways) = 1.609" in ended.out
    assert about(tmp_path / "run" / "last.safetensors")["history"][0]["collapsed"] == [0]


@pytest.mark.parametrize(("per_epoch", "kept"), [(1, True), (4, False)])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(
    world, tmp_path, monkeypatch, per_epoch, kept
):
    step = Tuner.step

    def spoilt_from_the_second_on(tuner: Tuner, episode: Episode, *more, **named):
        nan = episode.query * math.nan if tuner.episodes_done else episode.query
        return step(tuner, dataclasses.replace(episode, query=nan), *more, **named)

    monkeypatch.setattr(Tuner, "step", spoilt_from_the_second_on)
    ended = command("main", *world.train(tmp_path, "--nValEpisode", 0, "--nEpisode", per_epoch))
    assert ended.code == 2
    message = error_line(ended)
    assert re.search(r"loss is nan at episode 1, level 0 \(epsilon 8/255\)", message)
    last = tmp_path / "last.safetensors"
    assert last.exists() == kept and (f"the last good state is kept in {last}" in message) == kept
    if kept:
        checkpoint.load(last)  # refuses what is not finite


# --- damaged records -------------------------------------------------------------------------------------


def test_training_passes_over_damaged_records_and_counts_them(world, tmp_path):
    flags = ("--base_sources", "damaged", "--skip_bad_records")
    ended = command("main", *world.train(tmp_path, *flags))
    assert ended.code == 0, ended.err

    def reader(split: str, n: int) -> EpisodeReader:
        sampling = EpisodeSampling(num_ways=5, num_support=1, num_query=1)
        options = {"n_episodes": n, "skip_bad_records": True}
        return EpisodeReader(world.data, "damaged", split, sampling, 32, **options)

    episodes = [*SourceMixture([reader("TRAIN", 4)], 4), *reader("VALID", 2)]
    expected = len({line for episode in episodes for line in episode.skipped})  # validated on twice
    assert expected > 0 and f"{expected} damaged records were passed over" in ended.out


# --- recipes ---------------------------------------------------------------------------------------------


RECIPES = sorted((ROOT / "recipes").glob("*.args"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_shipped_recipe_is_understood(recipe, tmp_path):
    """As flags of main.py or of test_meta_dataset.py, with nothing to add but where the output goes."""
    flags = [f"@{recipe}", "--output_dir", str(tmp_path)]
    if "training" in recipe.read_text().partition("\n")[0].lower():
        args = options.training_parser().parse(flags)
        options.check_training(args)
        assert options.tune_settings(args) and options.levels(args)
    else:
        args = options.testing_parser().parse(flags)
        options.check_testing(args)
        assert options.attacks(args) and options.routing(args)
    assert options.sampling(args).images_needed > 0
