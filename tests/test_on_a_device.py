"""Both programs on a pretended device, see pretended_device.py: all is moved to it, nothing mixes it with the
CPU, and the results are the CPU's."""

import pytest
from commands import same_tensors
from pretended_device import machine
from safetensors.torch import save_file
from toy_autolora_runs import command as autolora
from toy_autolora_runs import rows
from toy_training import command

from amt.attacks.kinds import KINDS
from amt.models.architectures import ARCHS, Arch, build_network
from amt.models.pool import Pool

pytestmark = pytest.mark.usefixtures("one_thread", "weights")

ATTACKS = {
    **dict.fromkeys(("pgd", "apgd", "pyramid", "transfer", "support"), "steps=2"),
    "autoattack": "targets=1 epsilon=99",  # or its Square goes on for 5000 queries
    "fab": "steps=2 targets=1",
    "square": "queries=5",
    "strong": "steps=2 queries=5",
}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The file of a network that is smaller than vit_mini, and called so."""
    monkeypatch.setitem(ARCHS, "vit_mini", Arch(8, 24, 2, 2, pretrained_size=16, image_size=16))
    save_file(build_network(ARCHS["vit_mini"]).state_dict(), tmp_path / "weights.safetensors")
    return "--pretrained_checkpoint", tmp_path / "weights.safetensors"


def train(world, out, *flags):
    short = ("--epochs", 1, "--nEpisode", 2, "--nValEpisode", 1, "--statistics_episodes", 1)
    return command("main", *world.train(out, *short, *flags))


@pytest.mark.parametrize(
    "flags",
    [(), ("--precision", "bf16"), ("--precision", "fp16"), ("--tune", "full", "--pgd_method", "adsv")],
)
def test_meta_training(world, tmp_path, weights, flags):
    assert train(world, tmp_path / "cpu", *weights, *flags).code == 0
    with machine() as seen:
        ended = train(world, tmp_path / "cuda", *weights, *flags, "--device", "cuda")
    assert ended.code == 0, ended.err
    assert seen.kernels > 1000
    assert same_tensors(tmp_path / "cpu" / "last.safetensors", tmp_path / "cuda" / "last.safetensors")


def test_every_attack_of_an_evaluation(world, tmp_path, weights):
    assert set(ATTACKS) == set(KINDS)
    assert train(world, tmp_path / "pool", *weights).code == 0
    attacks = [word for kind, options in ATTACKS.items() for word in ("--attack", kind, *options.split())]
    short = ("--nTestEpisode", 1, "--probe_episodes", 0, "--epsilon", 8)
    flags = (*weights, "--resume", tmp_path / "pool" / "last.safetensors", *short, *attacks)
    assert command("test_meta_dataset", *world.test(tmp_path / "cpu", *flags)).code == 0
    with machine() as seen:
        ended = command("test_meta_dataset", *world.test(tmp_path / "cuda", *flags, "--device", "cuda"))
    assert ended.code == 0, ended.err
    assert seen.kernels > 1000
    assert rows(tmp_path / "cuda") == rows(tmp_path / "cpu")


def test_autolora(cifar, tmp_path):
    short = ("--epochs", 1, "--epsilon", 0)
    assert autolora(*cifar.flags(tmp_path / "cpu", *short)).code == 0
    with machine() as seen:
        ended = autolora(*cifar.flags(tmp_path / "cuda", *short, "--device", "cuda"))
    assert ended.code == 0, ended.err
    assert seen.kernels > 1000
    one, other = (tmp_path / device / "AFF" for device in ("cpu", "cuda"))
    assert same_tensors(one / "last.safetensors", other / "last.safetensors")
    assert rows(one / "test") == rows(other / "test")


def test_what_stays_on_the_cpu_is_told(world, tmp_path, weights, monkeypatch):
    assert train(world, tmp_path / "pool", *weights).code == 0
    monkeypatch.setattr(Pool, "to", lambda self, _device: self)
    flags = (*weights, "--resume", tmp_path / "pool" / "last.safetensors", "--device", "cuda")
    with machine(), pytest.raises(RuntimeError, match="mixes cuda:0 and cpu"):
        command("test_meta_dataset", *world.test(tmp_path / "out", *flags))
