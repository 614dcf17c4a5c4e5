"""The command line: spellings, files of flags, defaults, and errors that are one line."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amt.attacks.kinds import Attack
from amt.cli import options
from amt.cli.options.published_flags import is_published
from amt.models.trim import Trim
from amt.tasks.settings import BETAS, GAMMAS, Routing
from meta_dataset_readers.command import spelling
from meta_dataset_readers.errors import InputError

TRAIN = ["--data_path", "data", "--base_sources", "a", "--output_dir", "out", "--arch", "vit_mini_amt"]
TEST = ["--data_path", "data", "--test_sources", "a", "--output_dir", "out", "--arch", "vit_mini_amt_merge"]
POOL = [*TEST, "--resume", "pool.safetensors"]


def training(*flags: str):
    args = options.training_parser().parse([*TRAIN, *flags])
    options.check_training(args)
    return args


def evaluation(*flags: str, base: list[str] = POOL):
    args = options.testing_parser().parse([*base, *flags])
    options.check_testing(args)
    return args


def complaint(parse, *flags: str) -> str:
    """The message that `parse` refuses the flags with, which is one line."""
    with pytest.raises(InputError) as caught:
        parse(*flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- spelling --------------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_alike():
    underscores = training("--attack_iters", "3", "--num_support", "1", "5", "--skip_bad_records")
    assert underscores == training("--attack-iters", "3", "--num-support", "1", "5", "--skip-bad-records")
    assert underscores == training("--attack-iters=3", "--num_support", "1", "5", "--skip-bad_records")
    assert underscores.attack_iters == 3 and underscores.num_support == [1, 5]


def test_only_flags_are_respelt():
    assert training("--resume", "my-run/the-last.safetensors").resume == Path("my-run/the-last.safetensors")
    assert training("--val-sources=a-b").val_sources == ["a-b"]
    assert evaluation("--trim", "qkv:-1:0.5").trim == [Trim("qkv", -1, 0.5)]


@given(st.text(alphabet="abc-_=0", max_size=8), st.text(alphabet="ab-_", max_size=4))
def test_spelling_changes_dashes_of_the_name_alone(name, value):
    spelt = spelling(f"--x{name.replace('=', '')}={value}")
    assert spelt == f"--x{name.replace('=', '').replace('-', '_')}={value}"
    assert spelling(name.lstrip("-")) == name.lstrip("-")


def test_unambiguous_abbreviations_are_understood_and_others_refused():
    assert training("--attack-it", "3").attack_iters == 3
    assert "ambiguous" in complaint(training, "--max_s", "1")


def test_help_can_be_printed(capsys):
    for parser in (options.training_parser(), options.testing_parser()):
        with pytest.raises(SystemExit) as ended:
            parser.parse(["--help"])
        assert ended.value.code == 0 and "--epsilon" in capsys.readouterr().out


# --- files of flags --------------------------------------------------------------------------------------


def test_a_file_holds_flags_and_comments_and_later_flags_win(tmp_path):
    recipe = tmp_path / "a recipe.args"
    recipe.write_text(
        "# the paper's settings, don't change\n\n"
        "--attack-iters 3 --epsilon 8 6   # of 255\n"
        "--val_sources 'a b'\n   --lr 0.1\n"
    )
    args = training(f"@{recipe}", "--lr", "0.2")
    assert (args.attack_iters, args.epsilon, args.val_sources, args.lr) == (3, [8.0, 6.0], ["a b"], 0.2)


def test_a_file_may_name_another(tmp_path):
    (tmp_path / "inner.args").write_text("--rank 2\n")
    (tmp_path / "outer.args").write_text(f"'@{tmp_path / 'inner.args'}' --epochs 3\n")
    args = training(f"@{tmp_path / 'outer.args'}")
    assert (args.rank, args.epochs) == (2, 3)


def test_a_faulty_file_of_flags_is_refused(tmp_path):
    assert "nowhere.args" in complaint(training, f"@{tmp_path / 'nowhere.args'}")
    recipe = tmp_path / "recipe.args"
    recipe.write_text("--learning_speed 3\n")
    assert "--learning_speed" in complaint(training, f"@{recipe}")
    recipe.write_text("--resume 'half\n")
    assert "--resume 'half" in complaint(training, f"@{recipe}")


# --- what the flags mean ---------------------------------------------------------------------------------


def test_the_default_pool_has_the_papers_four_levels():
    levels = options.levels(training())
    assert [level.epsilon for level in levels] == [8.0, 6.0, 0.1, 0.01]
    assert {(level.steps, level.gamma, level.beta, level.start) for level in levels} == {
        (10, 0.005, 6.0, "random2")
    }
    assert {(level.grids, level.scalars) for level in levels} == {((4, 8, 0), (20.0, 10.0, 1.0))}


def test_the_step_is_a_quarter_of_each_epsilon_unless_given():
    assert [level.step_size for level in options.levels(training("--epsilon", "8", "0.1"))] == [2.0, 0.025]
    given_step = options.levels(training("--epsilon", "8", "0.1", "--alpha", "1"))
    assert [level.step_size for level in given_step] == [1.0, 1.0]
    assert options.attacks(evaluation("--epsilon", "4", "8")) == (Attack("pgd", (4, 8), loss="ce+dlr"),)
    assert options.attacks(evaluation("--epsilon", "4", "--alpha", "0.5")) == (
        Attack("pgd", (4,), step_size=0.5, loss="ce+dlr"),
    )


def test_no_attack_where_epsilon_is_zero_or_absent():
    assert options.attacks(evaluation("--epsilon")) == options.attacks(evaluation("--epsilon", "0")) == ()
    words = ("--attack", "pgd", "--attack", "pgd", "norm=l2", "epsilon=64", "--attack", "apgd")
    words += ("--alpha", "1", "--attack_iters", "7")
    pgd, l2, apgd = options.attacks(evaluation("--epsilon", "4", *words))
    assert pgd == Attack("pgd", (4,), steps=7, step_size=1.0, loss="ce+dlr")
    assert apgd == Attack("apgd", (4,), loss="ce+dlr")
    # --alpha is meant in the other norm
    assert l2 == Attack("pgd", (64,), "l2", steps=7, loss="ce+dlr")
    assert options.attacks(evaluation("--epsilon", "0", "2")) == (Attack("pgd", (2,), loss="ce+dlr"),)
    alone = evaluation("--attack", "pgd", "loss=ce")
    assert options.attacks(alone) == (Attack("pgd", (8,)),)  # as in the records of old runs


def test_random_is_another_name_of_random2():
    assert options.levels(training("--delta_init", "random")) == options.levels(training())
    assert {level.start for level in options.levels(training("--delta_init", "random1"))} == {"random1"}


def test_an_epoch_counts_every_base_source():
    args = training("--nEpisode", "10", "--base_sources", "a", "b", "c")
    assert options.tune_settings(args).episodes_per_epoch == 30


def test_support_sizes_are_fixed_or_a_range_or_variable():
    assert options.sampling(training()).num_support is None
    assert options.sampling(training("--num_support", "5")).num_support == 5
    assert options.sampling(training("--num_support", "1", "5")).num_support == (1, 5)


def test_precision_is_float32_unless_asked_for():
    assert options.arithmetic(training()).autocast is None
    assert options.arithmetic(training("--fp16")).autocast is torch.float16
    assert options.arithmetic(training("--bf16")).autocast is torch.bfloat16
    assert "not allowed with" in complaint(training, "--fp16", "--bf16")


def test_the_router_is_the_published_one_unless_asked_otherwise():
    assert options.routing(evaluation()) == Routing(beta=1, gamma=0.6, top_k=2, epsilon=0)
    robust = options.routing(evaluation("--route_epsilon", "8", "--top_k", "1", "--blend_beta", "10"))
    assert robust == Routing(beta=10, gamma=0.6, top_k=1, epsilon=8)


def test_beta_and_gamma_are_searched_unless_given():
    """And with them whatever has several values, in a product whose first setting wins ties."""
    (found,) = options.deployments(evaluation("--select", "support")).values()
    assert [(r.beta, r.gamma) for r in found.routings] == [(b, g) for b in BETAS for g in GAMMAS]
    flags = "--select support --blend_beta 10 --blend_gamma 0.4 1 --top_k 1 2 --route_epsilon 0 8"
    (found,) = options.deployments(evaluation(*flags.split())).values()
    settings = [(r.top_k, r.epsilon, r.beta, r.gamma) for r in found.routings]
    assert settings == [(k, e, 10, g) for k in (1, 2) for e in (0, 8) for g in (0.4, 1)]
    assert found.support_epsilon == 8 and {r.augment_probability for r in found.routings} == {0.9}


def test_without_a_selection_there_is_one_setting():
    (found,) = options.deployments(evaluation("--route_epsilon", "4")).values()
    assert found.routings == (Routing(epsilon=4),) and found.select == "none" and found.support_epsilon == 0


@pytest.mark.parametrize("flag", ["blend_beta", "blend_gamma", "top_k", "route_epsilon"])
def test_several_values_need_a_selection(flag):
    message = complaint(options.deployments, evaluation(f"--{flag}", "1", "2"))
    assert message.startswith(f"--{flag} has 2 values, expected one")


def test_another_sources_valid_split_is_a_way_of_selecting_on_valid():
    for flags in (["--select_on", "b"], ["--select_on", "b", "--select", "valid"]):
        (found,) = options.deployments(evaluation(*flags, "--nSelectEpisode", "7")).values()
        assert (found.select, found.select_on, found.select_episodes) == ("valid", "b", 7)


@pytest.mark.parametrize("flags", ["--routing uniform", "--specified_expert 0", "--coefficients 1"])
def test_a_selection_without_anything_to_choose_from_is_refused(flags):
    flags = ["--select_on", "b", *flags.split()]
    assert "nothing to choose from" in complaint(options.deployments, evaluation(*flags))
    trimmings = evaluation(*flags, "--trim_candidates", "qkv:-1:0.5")
    (found,) = options.deployments(trimmings).values()
    assert found.trim_candidates == (Trim("qkv", -1, 0.5),) and found.routings == ()


# --- the published command lines -------------------------------------------------------------------------

# Every flag of the published scripts, which share one parser, each with a value it takes there.
PUBLISHED = """
    --batch-size 1; --num_classes 1000; --epochs 100; --fp16; --output_dir out; --save_every_epoch True
    --device cuda:0; --seed 3; --data-path data; --pretrained-checkpoint-path .; --dataset meta_dataset
    --nClsEpisode 5; --nSupport 1; --nQuery 15; --nValEpisode 120; --nEpisode 2000; --nTestEpisode 600
    --image_size 128; --base_sources aircraft dtd; --val_sources aircraft; --test_sources mscoco dtd
    --shuffle True; --train_transforms jitter to_tensor; --test_transforms resize; --num_ways 5
    --num_support 5; --num_query 15; --min_ways 5; --max_ways_upper_bound 5; --max_num_query 10
    --max_support_set_size 500; --max_support_size_contrib_per_class 1; --min_examples_in_class 0
    --min_log_weight -0.69; --max_log_weight 0.69; --ignore_bilevel_ontology; --ignore_dag_ontology
    --ignore_hierarchy_probability 0.5; --test_n_way 5; --n_shot 5; --cdfsl_domains EuroSAT ISIC
    --arch dino_small_patch16_amt; --patch_size 16; --pretrained_weights file.pth; --checkpoint_key teacher
    --unused_params; --no-pretrain; --deploy merge-vanilla; --num_adapters 1; --ada_steps 40; --ada_lr 0.05
    --ada_wd 0; --aug_prob 0.9; --aug_types color translation; --img-size 224; --blend_beta 1.0
    --blend_gamma 0.6; --specified_expert 0 1; --drop 0; --drop-path 0.1; --model-ema; --no-model-ema
    --model-ema-decay 0.9; --model-ema-force-cpu; --opt adamw; --opt-eps 1e-8; --opt-betas 0.9 0.99
    --clip-grad 1; --momentum 0.9; --weight-decay 0.05; --sched cosine; --lr 5e-5; --lr-scale
    --lr-noise 0.1 0.2; --lr-noise-pct 0.67; --lr-noise-std 1; --warmup-lr 1e-6; --min-lr 1e-6
    --decay-epochs 30; --warmup-epochs 5; --cooldown-epochs 10; --patience-epochs 10; --decay-rate 0.1
    --dr 0.1; --color-jitter 0.4; --aa rand-m9-mstd0.5-inc1; --use_aa; --smoothing 0
    --train-interpolation bicubic; --repeated-aug; --reprob 0.25; --remode pixel; --recount 1; --resplit
    --mixup 0; --cutmix 0; --cutmix-minmax 0.1 0.2; --mixup-prob 1; --mixup-switch-prob 0.5
    --mixup-mode batch; --teacher-model regnety_160; --teacher-path file; --distillation-type none
    --distillation-alpha 0.5; --distillation-tau 1; --resume file.pth; --start_epoch 0; --dist-eval
    --num_workers 10; --pin-mem; --no-pin-mem; --logger; --world_size 1; --dist_url env://
    --pgd_method adsv; --attack_norm linf-pgd; --epsilon 8; --alpha 2; --attack_iters 10
    --delta_init random2; --beta 6; --eval_restarts 1; --eval_iters 20
"""


@pytest.mark.parametrize(
    "words", [part.split() for line in PUBLISHED.splitlines() for part in line.split(";") if part.strip()]
)
def test_every_published_flag_is_accepted_and_a_dead_one_says_so(words, capsys):
    name = words[0].lstrip("-").replace("-", "_")
    assert is_published(name)
    for make, base in ((options.training_parser, TRAIN), (options.testing_parser, TEST)):
        live = f"--{name}" in make()._option_string_actions and name in vars(make().parse([*base, *words]))
        make().parse([*base, *words])
        said = capsys.readouterr().err
        alias = name in ("pretrained_weights",)
        assert live or alias or f"--{name} has no effect: " in said
        assert not live or said == ""


def test_the_papers_command_lines_are_understood(tmp_path):
    """Those of its README, with the placeholders filled in."""
    line = (
        "--dataset meta_dataset --data-path path_to_data_files --base_sources ilsvrc_2012 "
        "--arch dino_small_patch16_amt --output experiment_name --fp16 --device cuda:0"
    )
    args = options.training_parser().parse(line.split())
    options.check_training(args)
    assert (args.output_dir, args.data_path) == (Path("experiment_name"), Path("path_to_data_files"))
    assert options.training_sources(args) == ("ilsvrc_2012",) and options.method(args) == "adsv"
    assert len(options.levels(args)) == 4 and options.arithmetic(args).autocast is torch.float16
    line = (
        "--dataset meta_dataset --data-path path_to_data_files --arch dino_small_patch16_amt_merge "
        "--deploy merge-vanilla --output experiment_name --resume checkpoint.pth --device cuda:0 "
        "--test_sources traffic_sign"
    )
    args = options.testing_parser().parse(line.split())
    options.check_testing(args)
    assert options.test_sources(args) == ("traffic_sign",) and args.resume == Path("checkpoint.pth")


def test_a_published_abbreviation_stays_one_beside_flags_of_ours():
    assert training("--eps", "4").epsilon == [4.0]  # and not ours, --epsilon_warmup
    assert training("--output", "there").output_dir == Path("there")
    assert "ambiguous" in complaint(training, "--warm", "3")  # as there: --warmup-lr, --warmup-epochs


def test_the_benchmarks_own_protocol_for_its_domains():
    args = evaluation("--cdfsl_domains", "EuroSAT", "cub", "--n_shot", "20", base=TEST[:2] + TEST[4:])
    assert options.test_sources(args) == ("EuroSAT", "cub")
    sampling = options.sampling(args)
    assert (sampling.num_ways, sampling.num_support, sampling.num_query) == (5, 20, 15)
    assert "exclude" in complaint(evaluation, "--cdfsl_domains", "EuroSAT")


def test_another_dataset_brings_its_source_and_protocol():
    without_sources = TRAIN[:2] + TRAIN[4:]
    args = options.training_parser().parse([*without_sources, "--dataset", "cifar_fs", "--nSupport", "5"])
    assert options.training_sources(args) == ("cifar_fs",)
    sampling = options.sampling(args)
    assert (sampling.num_ways, sampling.num_support, sampling.num_query) == (5, 5, 15)


def test_without_sources_the_published_ones_are_meant():
    training_args = options.training_parser().parse(TRAIN[:2] + TRAIN[4:])
    testing_args = options.testing_parser().parse(TEST[:2] + TEST[4:])
    assert len(options.training_sources(training_args)) == 8 and len(options.test_sources(testing_args)) == 10


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1", "-0.5", "nan", "inf", "eight"])
@pytest.mark.parametrize("parse", [training, evaluation])
def test_an_epsilon_that_is_no_amount_is_refused(parse, value):
    assert "--epsilon" in complaint(parse, "--epsilon", value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arch", "vit_mni_amt"], ["vit_mni", "did you mean 'vit_mini'"]),
        (["--rank", "0"], ["--rank", "expected a positive integer, got '0'"]),
        (["--epochs", "2.5"], ["--epochs", "2.5"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--eval"], ["--eval", "test_meta_dataset.py"]),
        (["--seed", "-1"], ["--seed", "negative"]),
        (["--pgd_method", "fgsm"], ["fgsm", "adsv", "standard"]),
        (["--pyramid_grids", "4", "0"], ["--pyramid_grids", "2", "3"]),
        (["--loss", "feature"], ["--loss", "features"]),
        (["--loss", "features", "--pgd_method", "standard"], ["--loss features", "adsv or querying"]),
        (["--epsilon_from", "-1"], ["--epsilon_from", "-1"]),
        (["--loss", "features", "--no_pretrain"], ["needs the pretrained network", "--no_pretrain"]),
        (["--epsilon_from", "4", "--epsilon", "8", "2"], ["--epsilon_from is 4", "at most --epsilon, 2"]),
        (["--num_support", "1", "2", "3"], ["--num_support", "3"]),
        (["--min_ways", "9", "--max_ways_upper_bound", "8"], ["--min_ways 9", "8"]),
        (["--base_sources", "a", "b", "a"], ["--base_sources", "twice"]),
        (["--data_path", ""], ["--data_path", "empty"]),
        (["--output_dir="], ["--output_dir", "empty"]),
        (["stray"], ["stray"]),
        (["--no_such_flag"], ["--no_such_flag"]),
    ],
)
def test_training_flags_that_are_refused(flags, words):
    message = complaint(training, *flags)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--specified_expert", "0", "--coefficients", "1"], ["exclude"]),
        (["--specified_expert", "-1"], ["--specified_expert"]),
        (["--coefficients", "0.5", "0.4"], ["0.9", "expected 1"]),
        (["--coefficients", "1.5", "-0.5"], ["--coefficients"]),
        (["--aug_prob", "1.5"], ["--aug_prob", "1.5"]),
        (["--epsilon", "4", "8", "4"], ["--epsilon 4 8 4", "increasing"]),
        (["--test_sources", "a", "a"], ["--test_sources", "twice"]),
        (["--trim_candidates", "qkv:-1:0.5"], ["--trim_candidates", "--select support"]),
        (["--select_on", "b", "--select", "support"], ["--select_on b", "--select support"]),
        (["--select", "valid", "--split", "VALID"], ["--select valid", "VALID episodes it then scores"]),
        (["--select_on", "a", "--split", "VALID"], ["--select_on a", "VALID episodes it then scores"]),
        (["--routing", "best"], ["--routing best", "--select valid"]),
        (["--routing", "soup", "--coefficients", "1"], ["--coefficients", "--routing soup", "exclude"]),
        (["--routing", "uniform", "--route_epsilon", "4"], ["--route_epsilon", "--routing amt"]),
        (["--top_k", "1", "2", "1", "--select", "support"], ["--top_k", "twice"]),
        (["--route_epsilon", "-1"], ["--route_epsilon", "-1"]),
        (["--select", "test"], ["--select", "'test'", "published"]),
        (["--trim", "qkv:-1"], ["'qkv:-1'", "NAME:BLOCK:KEEP"]),
        (["--trim", "qkv:all:0.5"], ["NAME:BLOCK:KEEP"]),
        (["--trim", "qkv:-1:0"], ["(0, 1]"]),
        (["--trim", "qkv:-1:nan"], ["(0, 1]"]),
        (["--split", "TRIAN"], ["TRIAN", "TRAIN"]),
    ],
)
def test_testing_flags_that_are_refused(flags, words):
    message = complaint(evaluation, *flags)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "flags",
    [
        ["--specified_expert", "0"],
        ["--coefficients", "1"],
        ["--select_on", "a"],
        ["--select", "support"],
        ["--domain_config", "domains.yaml"],
        ["--trim", "qkv:-1:0.5"],
    ],
)
def test_flags_about_a_pool_need_one(flags):
    assert "--resume" in complaint(lambda *words: evaluation(*words, base=TEST), *flags)


def test_what_is_required_is_named():
    assert "--output_dir" in complaint(options.training_parser().parse, ["--data_path", "x"])


def test_checking_the_output_makes_nothing(tmp_path):
    options.check_output(tmp_path / "a" / "b")
    options.check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        assert str(folder) in complaint(options.check_output, folder)


@pytest.mark.parametrize(
    ("parse", "flags", "words"),
    [
        (training, "--num_ways 1", ["--num_ways", "expected an integer of at least 2, got '1'"]),
        (training, "--clip_grad 0", ["--clip_grad", "expected a positive number, got '0'"]),
        (training, f"--epochs 1{'0' * 30}", ["--epochs", "a positive integer of at most 1000000"]),
        (training, f"--threads 1{'0' * 12}", ["--threads", "of at most 1024"]),
        (training, f"--image_size 1{'0' * 9}", ["--image_size", "of at most 4096"]),
        (training, "--pyramid_grids 999999 0 0", ["--pyramid_grids", "of at most 4096"]),
        (training, "--rank 0.5", ["--rank", "expected a positive integer, got '0.5'"]),
        (training, "--num_workers 100000", ["--num_workers", "of at most 1024"]),
        (training, f"--lr 1{'0' * 400}", ["--lr", "expected a number of at least 0"]),
        (evaluation, "--ada_steps -1", ["--ada_steps", "expected a nonnegative integer, got '-1'"]),
        (evaluation, "--test_n_way 1", ["--test_n_way", "at least 2"]),
        (evaluation, "--top_k 0", ["--top_k", "expected a positive integer, got '0'"]),
    ],
)
def test_meaningless_numbers_are_refused(parse, flags, words):
    message = complaint(parse, *flags.split())
    assert all(word in message for word in words), message


# --- paths and files of flags, wherever they are -----------------------------------------------------------


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.args").write_text("--resume ~/last.safetensors\n--image_prefix /old ~/new\n")
    args = training("@~/flags.args", "--output_dir=~/out")
    assert (args.resume, args.output_dir) == (tmp_path / "last.safetensors", tmp_path / "out")
    assert args.image_prefix == ["/old", str(tmp_path / "new")]


def test_a_file_of_flags_is_found_beside_the_one_that_names_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "outer.args").write_text("@b/inner.args\n")
    (tmp_path / "a" / "b" / "inner.args").write_text("@../last.args --rank 3\n")
    (tmp_path / "a" / "last.args").write_text("--epochs 2\n")
    args = training(f"@{tmp_path / 'a' / 'outer.args'}")
    assert (args.rank, args.epochs) == (3, 2)


def test_a_file_of_flags_that_is_none_is_one_line(tmp_path):
    loop, binary, folder = tmp_path / "loop.args", tmp_path / "binary.args", tmp_path / "folder.args"
    loop.write_text("@loop.args\n")
    binary.write_bytes(b"\x80\x00\xff")
    folder.mkdir()
    assert "the file names itself" in complaint(training, f"@{loop}")
    assert "not a text file" in complaint(training, f"@{binary}")
    assert "not a regular file" in complaint(training, f"@{folder}")


# --- flags without effect ----------------------------------------------------------------------------------


def test_flags_without_effect_have_a_help_of_their_own(capsys):
    for make in (options.training_parser, options.testing_parser):
        for flag, shown in (("--help", False), ("--help-published", True)):
            with pytest.raises(SystemExit) as ended:
                make().parse([flag])
            assert ended.value.code == 0
            assert ("--cooldown_epochs" in capsys.readouterr().out) == shown


def test_a_flag_without_effect_is_named_once(capsys):
    training("--drop", "0.1", "--drop", "0.2")
    assert capsys.readouterr().err.count("--drop has no effect") == 1
