"""The trained baselines by their flags: trained by main.py, resumed, evaluated by test_meta_dataset.py."""

import json
import signal
from pathlib import Path

import pytest
from commands import about, same_tensors
from conftest import fails
from toy_training import World, command, error_line, signal_after

from amt.attacks.levels import Perturbation
from amt.cli import options
from amt.tasks.settings import Finetuning
from meta_dataset_readers.errors import InputError

# --- the flags -------------------------------------------------------------------------------------------


def levels_of(*flags: str) -> tuple[str, tuple[Perturbation, ...]]:
    paths = ("--data_path", "data", "--output_dir", "out", "--arch", "vit_mini_amt")
    args = options.training_parser().parse([*paths, *flags])
    options.check_training(args)
    return options.tune_settings(args).method, options.levels(args)


def test_one_flag_is_one_baseline():
    """Each brings the method, the levels and the attack of its paper, and says so in --help."""
    assert levels_of()[0] == "adsv" and len(levels_of()[1]) == 4
    method, (level,) = levels_of("--tune", "full")
    assert (method, level.epsilon) == ("standard", 0.0)
    for tune in ("lora", "full"):
        method, (level,) = levels_of("--tune", tune, "--pgd_method", "querying")
        assert (method, level.epsilon, level.step_size, level.grids, level.scalars, level.start) == (
            *("querying", 8.0, 2.0, (0,), (1.0,), "random1"),
        )
        assert (level.gamma, level.beta) == (0.0, 0.0)
    method, found = levels_of("--tune", "full", "--pgd_method", "adsv", "--epsilon", "8")
    assert (method, len(found), found[0].grids, found[0].gamma) == ("adsv", 1, (4, 8, 0), 0.005)
    assert levels_of("--pgd_method", "standard")[1][0].epsilon == 0.0


def test_what_is_given_counts_more_than_what_a_baseline_brings():
    flags = ("--attack_iters", "7", "--epsilon", "4", "2", "--alpha", "1", "--delta_init", "random")
    _, found = levels_of("--pgd_method", "querying", *flags, "--pyramid_grids", "2", "--pyramid_scalars", "3")
    assert [(level.epsilon, level.step_size, level.steps) for level in found] == [(4, 1, 7), (2, 1, 7)]
    assert {(level.grids, level.scalars, level.start) for level in found} == {((2,), (3.0,), "random2")}
    with pytest.raises(InputError, match="--pyramid_grids has 2 values and --pyramid_scalars 1"):
        levels_of("--pgd_method", "querying", "--pyramid_grids", "2", "0")


def test_the_flags_of_fine_tuning():
    paths = ("--data_path", "data", "--output_dir", "out", "--arch", "vit_mini_amt", "--deploy", "finetune")

    def settings(*flags: str) -> Finetuning:
        return options.finetuning(options.testing_parser().parse([*paths, *flags]))

    assert settings() == Finetuning()
    given = ("--ada-steps", "50", "--ada_lr", "0.01", "--aug_prob", "0.5", "--aug_types", "color")
    assert settings(*given) == Finetuning(50, 0.01, 0.5, ("color",))
    for wrong in (("--ada_steps", "-1"), ("--ada_lr", "nan"), ("--aug_types", "transition")):
        fails(wrong[0], lambda wrong=wrong: settings(*wrong))


# --- the commands ----------------------------------------------------------------------------------------


BASELINES = {
    "P>M": ("--tune", "full", "--epsilon", 0),
    "adversarial querying": ("--pgd_method", "querying", "--epsilon", 8),
    "adversarial querying, full": ("--tune", "full", "--pgd_method", "querying", "--epsilon", 8, 2),
    "one LoRA": ("--epsilon", 8),
    "plain": ("--pgd_method", "standard", "--epsilon", 0),
}


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory) -> dict[str, Path]:
    """The folder of every baseline, trained by main.py."""
    folder = tmp_path_factory.mktemp("baselines")
    runs = {name: folder / str(number) for number, name in enumerate(BASELINES)}
    for name, out in runs.items():
        ended = command("main", *world.train(out, *BASELINES[name]))
        assert ended.code == 0, ended.err
        assert ended.out.splitlines()[-1].startswith("done: ")
    return runs


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_trained_and_evaluated_by_the_same_commands(world, trained, tmp_path, name):
    flags = BASELINES[name]
    told = about(trained[name] / "last.safetensors")
    assert told["tune"] == ("full" if "full" in flags else "lora")
    scores = {"clean", "robust"} if told["settings"]["method"] != "standard" else {"clean"}
    assert all(set(each) == scores for note in told["history"] for each in note["validation"])
    resume = ("--resume", trained[name] / "best.safetensors")
    ended = command("test_meta_dataset", *world.test(tmp_path / "run", *resume))
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["summary"]["tiny"]["clean"]["n"] == 2


@pytest.mark.parametrize("name", ["P>M", "adversarial querying", "adversarial querying, full"])
def test_a_stopped_and_resumed_baseline_equals_an_uninterrupted_one(
    world, trained, tmp_path, monkeypatch, name
):
    flags = world.train(tmp_path, *BASELINES[name])
    with monkeypatch.context() as patch:
        signal_after(patch, 3, signal.SIGTERM)
        assert command("main", *flags).code == 128 + signal.SIGTERM
    last = tmp_path / "last.safetensors"
    other = "full" if about(last)["tune"] == "lora" else "lora"
    method = about(last)["settings"]["method"]
    refused = command("main", *flags, "--resume", last, "--tune", other, "--pgd_method", method)
    assert refused.code == 2 and f'with tune "{about(last)["tune"]}", not "{other}"' in error_line(refused)
    ended = command("main", *flags, "--resume", last)
    assert ended.code == 0, ended.err
    for file in ("last.safetensors", "best.safetensors"):
        assert same_tensors(tmp_path / file, trained[name] / file)


def test_fine_tuning_per_task_from_the_command_line(world, trained, tmp_path):
    """P>M>F: the rows differ from those without it, and a rate of 0 gives those."""
    resume = ("--resume", trained["P>M"] / "last.safetensors", "--epsilon", 2)

    def rows(out: str, *flags) -> list[dict]:
        ended = command("test_meta_dataset", *world.test(tmp_path / out, *resume, *flags))
        assert ended.code == 0, ended.err
        lines = (tmp_path / out / "rows.jsonl").read_text().splitlines()
        kept = ("clean", "pgd2-ce+dlr@2")
        return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]

    vanilla = rows("vanilla", "--deploy", "vanilla")
    finetune_it = ("--deploy", "finetune", "--ada_steps", 3)
    assert rows("still", *finetune_it, "--ada_lr", 0) == vanilla
    assert rows("tuned", *finetune_it, "--ada_lr", 0.03) != vanilla


def test_fine_tuning_starts_from_one_network(world, trained, tmp_path):
    resume = ("--resume", trained["adversarial querying, full"] / "last.safetensors", "--deploy", "finetune")
    ended = command("test_meta_dataset", *world.test(tmp_path / "out", *resume))
    assert ended.code == 2 and "finetune" in error_line(ended)
