"""Files as training tools write them, into every reader of foreign weights: the network is found whatever was
put around it, what was taken and left is told, and names that belong to a network stay."""

import argparse
import copy
import re
from pathlib import Path

import pytest
import timm.utils
import torch
from commands import called
from conftest import fails
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from toy_pools import assert_identical, make_network

from amt.cli.checkpoint import main as describe
from amt.files import published, robust_weights, state_dicts
from amt.files.export.published_layout import published_state
from amt.files.pretrained import load_network, read_weights
from amt.models.network import build_classifier


class Holder(nn.Module):
    """A module whose children are these, as training code names them."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def head(width: int = 3) -> nn.Module:
    return Holder(mlp=nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)))


def blockwise(wrap):
    """The module with every block wrapped, as compiling or checkpointing by block does."""

    def wrapped(module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module)
        blocks = "blocks" if hasattr(module, "blocks") else "layer1"
        setattr(module, blocks, nn.Sequential(*map(wrap, getattr(module, blocks))))
        return module

    return wrapped


def averaged(module: nn.Module) -> nn.Module:
    return AveragedModel(module)


def together(**modules: nn.Module) -> dict:
    return Holder(**modules).state_dict()


# What a tool does to a module that is trained alone.
WRAPPERS = {
    "plain": lambda m: m,
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "averaged": averaged,
    "timm's average": timm.utils.ModelEmaV2,
    "timm's newer average": timm.utils.ModelEmaV3,
    "compiled by block": blockwise(torch.compile),
    "checkpointed by block": blockwise(checkpoint_wrapper),
    "compiled, then parallel": lambda m: nn.DataParallel(torch.compile(m)),
    "parallel, then compiled, then averaged": lambda m: averaged(torch.compile(nn.DataParallel(m))),
    "averaged twice": lambda m: averaged(nn.DataParallel(averaged(m))),
    "encoder": lambda m: Holder(encoder=m),
    "lightning's model": lambda m: Holder(model=Holder(backbone=m)),
    "twice in one module": lambda m: Holder(model=m, backbone=m),
}

# How the state dict is saved.
CONTAINERS = {
    "bare": lambda state: state,
    "lightning": lambda state: {"state_dict": state, "pytorch-lightning_version": "2.5", "epoch": 3},
    "net": lambda state: {"net": state, "acc": 91.0},
    "training": lambda state: {"model_state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
    "deepspeed": lambda state: {"module": state, "args": argparse.Namespace(lr=0.1)},
    "nested": lambda state: {"model": {"state_dict": {"encoder": state}}, "step": 5},
}

# Several networks in one file: (what is saved of the one to take and another, its key, the other's key).
SEVERAL = {
    "dino": (
        lambda one, other: {
            "student": nn.DataParallel(Holder(backbone=other, head=head())).state_dict(),
            "teacher": Holder(backbone=one, head=head()).state_dict(),
            "dino_loss": {"center": torch.zeros(1, 3)},
        },
        *("teacher", "student"),
    ),
    "dinov2 teacher alone": (
        lambda one, _: {"teacher": together(backbone=one, dino_head=head(), ibot_head=head())},
        *("teacher", None),
    ),
    "dinov2 training": (
        lambda one, other: {
            "model": {
                **Holder(student=Holder(backbone=other, dino_head=head())).state_dict(),
                **Holder(teacher=Holder(backbone=one, dino_head=head(), ibot_head=head())).state_dict(),
                "dino_loss.center": torch.zeros(1, 3),
            },
            "iteration": 9,
        },
        *("model.teacher", "model.student"),
    ),
    "moco v3": (
        lambda one, other: {
            "arch": "vit_small",
            "state_dict": nn.DataParallel(
                Holder(base_encoder=one, momentum_encoder=other, predictor=head())
            ).state_dict(),
        },
        *("state_dict.base_encoder", "state_dict.momentum_encoder"),
    ),
    "moco": (
        lambda one, other: {
            "state_dict": {
                **nn.DataParallel(Holder(encoder_q=one, encoder_k=other)).state_dict(),
                "module.queue": torch.zeros(3, 9),
                "module.queue_ptr": torch.zeros(1, dtype=torch.long),
            }
        },
        *("state_dict.encoder_q", "state_dict.encoder_k"),
    ),
    "average beside": (
        lambda one, other: {
            "model": other.state_dict(),
            "model_ema": timm.utils.ModelEmaV3(one).state_dict(),
        },
        *("model_ema", "model"),
    ),
    "timm's training": (
        lambda one, other: {"state_dict": other.state_dict(), "state_dict_ema": one.state_dict(), "epoch": 1},
        *("state_dict_ema", "state_dict"),
    ),
    "lightning with an average": (
        lambda one, other: {"state_dict": together(model=other, ema=averaged(one))},
        *("state_dict.ema", "state_dict"),
    ),
    "a teacher of another kind": (
        lambda one, _: {"teacher": nn.Linear(7, 7).state_dict(), "model": one.state_dict()},
        *("model", None),
    ),
}


def vit(seed: int) -> nn.Module:
    return make_network(seed=seed).module


def resnet(seed: int) -> nn.Module:
    network = build_classifier("resnet_mini", 5, 32)
    network.module.load_state_dict(network.start(seed))
    return network.module


def read_vit(path: Path, key: str | None = None) -> tuple[dict, str]:
    lines: list[str] = []
    return read_weights(path, vit(0), key, lines.append), "\n".join(lines)


def read_resnet(path: Path, key: str | None = None) -> tuple[dict, str]:
    network = build_classifier("resnet_mini", 5, 32)
    found = robust_weights.read(path, network, network.start(3), key=key)
    return found.weights, found.kind


READERS = {"ViT": (vit, read_vit), "ResNet": (resnet, read_resnet)}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("wrapper", "container"),
    [
        *((name, "nested") for name in WRAPPERS),
        *(("parallel, then compiled, then averaged", n) for n in CONTAINERS),
    ],
)
def test_a_network_is_found_whatever_is_around_it(tmp_path, wrapper, container, reader):
    make, read = READERS[reader]
    torch.save(CONTAINERS[container](WRAPPERS[wrapper](make(1)).state_dict()), tmp_path / "x.pth")
    found, notes = read(tmp_path / "x.pth")
    assert_identical(found, dict(make(1).state_dict()))
    assert ("counters left out" in notes) == ("averaged" in wrapper)
    assert ("second copies left out" in notes) == ("twice in" in wrapper)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("several", SEVERAL)
def test_of_several_networks_one_is_taken_and_the_others_are_named(tmp_path, several, reader):
    make, read = READERS[reader]
    save, key, other = SEVERAL[several]
    torch.save(save(make(1), make(2)), tmp_path / "x.pth")
    found, notes = read(tmp_path / "x.pth")
    assert_identical(found, dict(make(1).state_dict()))
    if other is not None:
        assert f"took {key!r} (--weights_key takes another network, of {other!r})" in notes
        for name in (other, other.rpartition(".")[2]):
            assert_identical(read(tmp_path / "x.pth", name)[0], dict(make(2).state_dict()))
    assert_identical(read(tmp_path / "x.pth", key)[0], found)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("key", ["studnet", "", "teacher.backbone", "\x1b[2J"])
def test_a_wrong_key_lists_those_there_are(tmp_path, reader, key):
    make, read = READERS[reader]
    torch.save({"teacher": make(1).state_dict(), "student": make(2).state_dict()}, tmp_path / "x.pth")
    error = fails("there is no this name|no network", lambda: read(tmp_path / "x.pth", key))
    assert "expected one of 'teacher', 'student'" in str(error) and "\x1b" not in str(error)


def test_a_file_of_one_network_needs_no_key(tmp_path):
    torch.save(vit(1).state_dict(), tmp_path / "x.pth")
    fails(
        "holds one network, which has no key; leave it out", lambda: read_vit(tmp_path / "x.pth", "teacher")
    )


def test_what_is_left_out_is_counted(tmp_path):
    torch.save(SEVERAL["dinov2 training"][0](vit(1), vit(2)), tmp_path / "x.pth")
    _, notes = read_vit(tmp_path / "x.pth")
    heads = 2 * len(head().state_dict())
    assert f"x.pth: {heads} tensors left out: classification or projection head" in notes
    assert "x.pth: 1 tensors beside the networks left out" in notes


def test_foreign_tensors_are_still_refused(tmp_path):
    torch.save({"model": together(model=vit(1), criterion=nn.Linear(2, 2))}, tmp_path / "x.pth")
    fails(r"unexpected tensor criterion.weight, criterion.bias", lambda: read_vit(tmp_path / "x.pth"))


def test_blocks_in_chunks(tmp_path):
    """As DINOv2 saves them: blocks.CHUNK.BLOCK."""
    weights = vit(1).state_dict()
    state = {re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", name): tensor for name, tensor in weights.items()}
    assert any(name.startswith("blocks.1.1.") for name in state)
    torch.save(
        {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "x.pth"
    )
    assert_identical(read_vit(tmp_path / "x.pth")[0], dict(vit(1).state_dict()))


@pytest.mark.parametrize("own", ["model", "encoder", "backbone", "teacher", "module.encoder"])
@pytest.mark.parametrize("around", ["", "module.", "model.", "_orig_mod.", "encoder.module."])
def test_a_networks_own_names_are_not_shortened(own, around):
    """Whatever its modules are called: the names that it has decide."""
    weights = {f"{own}.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = state_dicts.unwrap(Path("x"), {f"{around}{name}": t for name, t in weights.items()}, shapes)
    assert_identical(found.weights, weights)


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "averaged", "module._orig_mod.module."])
@pytest.mark.parametrize("container", ["model", "state_dict", None])
def test_published_pools_too(pool, wrapper, container):
    """Their own `backbone.model.` says which layout it is, and stays."""
    state = published_state(pool)
    before = "module." if wrapper == "averaged" else wrapper
    named = {f"{before}{name}": tensor for name, tensor in state.items()}
    named |= {"n_averaged": torch.tensor(5)} if wrapper == "averaged" else {}
    found = published.find_state({container: named, "epoch": 3} if container else named)
    assert found is not None
    assert_identical(dict(found), dict(state))


def test_the_commands_take_a_key(tmp_path):
    torch.save({"teacher": vit(1).state_dict(), "student": vit(2).state_dict()}, tmp_path / "x.pth")

    def told(*flags):
        return called(lambda: describe([str(tmp_path / "x.pth"), *flags]), ["x"])

    assert "took 'teacher' (--weights_key takes another network, of 'student')" in told().out
    assert "took 'student'" in told("--weights_key", "student").out
    wrong = told("--weights_key", "no")
    assert wrong.code == 2 and "expected one of 'teacher', 'student'" in wrong.err


def test_the_shipped_network_is_told_of_in_no_line():
    lines: list[str] = []
    load_network("vit_mini", tell=lines.append)
    assert lines == []
