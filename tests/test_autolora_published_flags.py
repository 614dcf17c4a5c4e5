"""Published command lines of AutoLoRa keep their meaning."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_autolora_runs import command

from amt.cli.options import autolora as options
from amt.training.autolora_settings import Adversary

pytestmark = pytest.mark.usefixtures("one_thread")

# --- published command lines -----------------------------------------------------------------------------


def parsed(line: str, mode: str = "AFF"):
    """The flags, and the settings of a mode."""
    args = options.parse(line.split())
    return args, options.settings(args, mode)


def test_the_published_low_resolution_command():
    """Of run_autolora.sh: 50 epochs of the automatic schedule from 0.1, PGD-20 and AutoAttack."""
    line = (
        "--experiment E --dataset stl10 --pretraining DynACL_RCS --model r18 --checkpoint F --mode ALL "
        "--eval-AA --autolora --gpu 0"
    )
    args, found = parsed(line)
    assert args.output == Path("checkpoints/E") and args.checkpoint == Path("F")
    assert (args.dataset, args.resize, args.arch, args.device) == ("stl10", 32, "r18", "cuda:0")
    assert options.modes(args) == ("SLF", "ALF", "AFF")
    assert (found.method, found.epochs, found.lr, found.rank, found.scale) == ("autolora", 50, 0.1, 8, 6)
    assert found.auto_lr and found.auto_weights and not found.high_resolution and not found.dual_norms
    assert (found.momentum, found.weight_decay, found.batch_size, found.divide) == (0.9, 2e-4, 128, 2)
    assert found.adversary == Adversary(8, 2, 10, "gaussian", "linf")
    assert parsed(line, "ALF")[1].adversary.start == "uniform"
    assert [parsed(line, mode)[1].batch_size for mode in ("SLF", "ALF")] == [128, 128]
    pgd, auto = options.attacks(args)
    assert (pgd.kind, pgd.steps, pgd.epsilons) == ("pgd", 20, (8.0,))
    assert (auto.kind, auto.epsilons) == ("autoattack", (8.0,))


LOW = (
    "--experiment E --model r34 --checkpoint F --dualBN 1 --data D --dataset cifar100 --resize 96 "
    "--batch-size 64 --test-batch-size 32 --epochs 7 --weight-decay 0.001 --lr 0.02 --momentum 0.8 "
    "--decreasing_lr 3,5 --epsilon 0.0156862745 --step-size 0.00392156863 --num-steps-train 5 "
    "--num-steps-test 6 --eval-AA --eval-OOD --pretraining A-InfoNCE --mode AFF --autolora --r_nat 4 "
    "--val 0.05 --scale 3 --autoLR 1 --divide 10 --seed 11 --test_frequency 2 --gpu 1"
)


def test_every_flag_of_the_published_low_resolution_parser_has_its_meaning(capsys):
    args, found = parsed(LOW)
    assert (args.arch, args.data, args.dataset, args.resize) == ("r34", Path("D"), "cifar100", 96)
    assert (found.batch_size, args.test_batch_size, found.epochs) == (64, 32, 7)
    assert (found.weight_decay, found.lr, found.momentum, found.milestones) == (0.001, 0.02, 0.8, (3, 5))
    assert found.adversary.epsilon == pytest.approx(4) and found.adversary.step_size == pytest.approx(1)
    assert (found.adversary.steps, options.examiner(args).steps) == (5, 6)
    assert args.pretraining == "A-InfoNCE" and options.modes(args) == ("AFF",)
    assert found.dual_norms and args.eval_OOD and len(options.attacks(args)) == 2
    assert (found.rank, args.val, found.scale, found.divide, found.seed) == (4, 0.05, 3, 10, 11)
    assert found.auto_lr and args.device == "cuda:1"
    assert "--test_frequency has no effect" in capsys.readouterr().err
    assert parsed(f"{LOW} --wd 0.5")[1].weight_decay == 0.5
    only = parsed(LOW.replace("--autolora", "--eval-only"))[0]
    assert only.eval_only


HIGH = "--adv_train --model_root R --dataset dtd --num_classes 57 --model_arch resnet18 --model-path F"


def test_the_published_high_resolution_command(capsys):
    args, found = parsed(HIGH)
    assert (args.output, args.checkpoint, args.num_classes) == (Path("R"), Path("F"), 57)
    assert (args.dataset, args.arch, args.resize) == ("dtd", "resnet18", 224)
    assert found.high_resolution and found.auto_lr and found.auto_weights
    assert (found.epochs, found.lr, found.weight_decay, found.batch_size) == (60, 0.01, 1e-4, 128)
    assert found.adversary == Adversary(8, 2, 10, "uniform_valid", "linf")
    assert options.examiner(args).steps == 10 and options.inside(args) is None
    assert "--adv_train has no effect" in capsys.readouterr().err


EVERY_HIGH = (
    f"{HIGH} --todo train --data_root D --data_name CIFAR10 --log_root L --load_checkpoint C --affix a "
    "-e 0.0157 --beta_unlabel 1.0 -a 0.00392 -k 7 -b 32 -m_e 9 -lr 0.02 -m 0.8 -w 0.001 -g 2 "
    "--n_eval_step 100 --n_checkpoint_step 4000 --n_store_image_step 4000 -p l2 --occupy --save_all "
    "--r_nat 4 --val 0.05 --seed 3"
)
LONG = {
    "-e": "--epsilon",
    "-a": "--alpha",
    "-k": "--k",
    "-b": "--batch_size",
    "-m_e": "--max_epoch",
    "-lr": "--learning_rate",
    "-m": "--momentum",
    "-w": "--weight_decay",
    "-g": "--gpu",
    "-p": "--perturbation_type",
}


@pytest.mark.parametrize("long", [False, True])
def test_every_flag_of_the_published_high_resolution_parser_has_its_meaning(long):
    words = [LONG.get(word, word) if long else word for word in EVERY_HIGH.split()]
    args, found = parsed(" ".join(words))
    assert args.data == Path("D") and args.checkpoint == Path("F")
    assert found.adversary.epsilon == pytest.approx(4, abs=0.01)
    assert found.adversary.step_size == pytest.approx(1, abs=0.01)
    assert (found.adversary.steps, found.adversary.norm) == (7, "l2")
    assert (found.batch_size, found.epochs, found.lr, found.momentum) == (32, 9, 0.02, 0.8)
    assert (found.weight_decay, found.rank, args.val, found.seed) == (0.001, 4, 0.05, 3)
    assert args.device == "cuda:2" and not args.eval_only


def test_the_published_high_resolution_script_tests_what_load_checkpoint_names():
    """With --todo test; the file that training started from then plays no part."""
    args, _ = parsed(f"{HIGH} --todo test --load_checkpoint C")
    assert args.eval_only and args.checkpoint == Path("C")


@pytest.mark.parametrize(
    ("dataset", "size", "enlarged"), [("cifar-10", 32, 224), ("cifar100", 32, 224), ("cub", 224, None)]
)
def test_the_published_high_resolution_script_attacks_cifar_at_its_own_size(dataset, size, enlarged):
    args, found = parsed(
        f"--adv_train --model_root R --dataset {dataset} --model_arch resnet50 --model-path F"
    )
    assert (args.resize, options.inside(args)) == (size, enlarged)
    assert found.high_resolution and found.epochs == 60


@pytest.mark.parametrize("method", ["vanilla", "twins"])
def test_baselines_have_either_schedule_where_it_is_asked_for(method):
    base = f"--data D --output O --checkpoint F --method {method}"
    for flags, expected in (
        ("", (False, False)),
        ("--autoLR 1", (True, False)),
        ("--auto_scalars 1", (False, True)),
        ("--autoLR 1 --auto_scalars 1", (True, True)),
    ):
        found = parsed(f"{base} {flags}")[1]
        assert (found.auto_lr, found.auto_weights) == expected, flags
    assert parsed(base)[1].milestones == (15, 20) and parsed(base)[1].epochs == 25


def test_a_head_may_be_wider_than_the_classes(cifar, tmp_path):
    ended = command(*cifar.flags(tmp_path, "--num_classes", 12, "--mode", "SLF", "--epochs", 1))
    assert ended.code == 0, ended.err
    assert load_file(tmp_path / "SLF" / "best.safetensors")["fc.weight"].shape[0] == 12


# --- what a reviewer found -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, epsilon, step",
    [
        ("", 8, 2),
        ("--epsilon 0.0314 --step_size 0.00784", 8, 2),
        ("--epsilon 0.0157 --step_size 0.00784", 4, 2),
        ("--epsilon 1 --step_size 0.25", 1, 0.25),
        ("-p l2 --epsilon 128 --step_size 15", 128, 15),
    ],
)
def test_training_validation_and_test_have_one_epsilon_and_one_step(flags, epsilon, step):
    args = options.parse(["--checkpoint", "f", "--output", "o", *flags.split()])
    for adversary in (options.settings(args, "AFF").adversary, options.examiner(args)):
        assert (adversary.epsilon, adversary.step_size) == (epsilon, step)
    (attack,) = options.attacks(args)
    assert attack.epsilons == (epsilon,) and attack.step_at(epsilon) == step


def test_the_mode_of_the_published_script():
    for flags, mode in (
        ("--output o", "AFF"),
        ("--experiment e", "ALL"),
        ("--experiment e --mode SLF", "SLF"),
    ):
        assert options.parse(["--checkpoint", "f", *flags.split()]).mode == mode


@pytest.mark.parametrize(
    ("arch", "resolution"),
    [
        ("resnet18", "low"),
        ("timm:resnet18", "low"),
        ("vit_small", "high"),
        ("timm:vit_tiny_patch16_224", "high"),
        ("timm:eva02_tiny_patch14_224", "high"),
        ("timm:beit_base_patch16_224", "high"),
    ],
)
def test_a_transformer_by_patches_sees_images_enlarged_unless_told_otherwise(arch, resolution):
    """32 px are two patches a side."""
    line = ["--output", "O", "--checkpoint", "F", "--dataset", "cifar10", "--arch", arch]
    assert options.parse(line).resolution == resolution
    assert options.parse([*line, "--resolution", "low"]).resolution == "low"


@pytest.mark.parametrize(
    ("line", "loss"),
    [
        ("--output O --checkpoint F", "ce+dlr"),
        ("--output O --checkpoint F --arch vit_small --resolution high", "ce+dlr"),
        ("--output O --checkpoint F --published", "ce"),
        ("--experiment E --checkpoint F", "ce"),
        ("--model_path F --model-arch deit_small --model_root O", "ce"),
        ("--experiment E --checkpoint F --attack pgd", "ce+dlr"),
        ("--output O --checkpoint F --attack pgd loss=ce", "ce"),
    ],
)
def test_the_worst_case_is_the_default_and_published_commands_keep_their_attack(line, loss):
    """PGD on the cross-entropy alone is the published test, which those who ask for it get."""
    (attack,) = options.attacks(options.parse(line.split()))
    assert (attack.kind, attack.loss) == ("pgd", loss)
