"""`--dry_run` finds in the files that are named what the command itself would refuse, and writes nothing."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_autolora_runs import command as autolora
from toy_photos import LEVELS
from toy_training import command

from amt.files import checkpoint
from amt.models.network import build_classifier
from amt.models.pool import principal_pool

pytestmark = pytest.mark.usefixtures("one_thread")


def torn(file, whole):
    file.write_bytes(whole.read_bytes()[:-9])


def not_finite(file, whole):
    save_file({name: tensor * float("nan") for name, tensor in load_file(whole).items()}, file)


def of_texts(file, _):
    torch.save({"token_embedding.weight": torch.ones(9, 3)}, file)


WEIGHTS = {
    "a folder": (lambda file, _: file.mkdir(), "is a folder"),
    "torn": (torn, "truncated or damaged"),
    "not finite": (not_finite, "holds values that are not finite"),
    "texts": (of_texts, "holds a text tower and no image tower"),
    "another network": (
        lambda file, _: save_file(build_classifier("resnet_mini", 2, 32).start(0), file),
        "lacks tensor cls_token",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_files_of_weights_are_read(world, tmp_path, case):
    write, words = WEIGHTS[case]
    write(tmp_path / "x.pt", world.weights)
    flags = ("--pretrained_checkpoint", tmp_path / "x.pt", "--dry_run")
    for ended in (
        command("main", *world.train(tmp_path / "out", *flags)),
        command("test_meta_dataset", *world.test(tmp_path / "out", *flags)),
    ):
        assert ended.code == 2 and ended.err == ""
        (missing,) = (line for line in ended.out.splitlines() if line.startswith("missing: "))
        assert missing.startswith("missing: pretrained weights of vit_mini: ") and words in missing
    assert not (tmp_path / "out").exists()


def test_files_to_be_fine_tuned_are_read(world, cifar, tmp_path):
    own = cifar.flags(tmp_path / "out", "--dry_run")
    ended = autolora(*own)
    assert ended.code == 0 and f"network {cifar.weights}: plain tensors" in ended.out, ended
    ended = autolora(*own, "--num_classes", 1)
    assert ended.code == 2 and "label" in ended.out and "expected 0 to 0" in ended.out, ended
    ended = autolora(*own, "--checkpoint", world.weights)
    said = (
        f"missing: robustly pretrained network {world.weights}: {world.weights} for --arch resnet_mini: lacks"
    )
    assert ended.code == 2 and said in ended.out, ended
    assert not (tmp_path / "out").exists()


def test_what_heads_need_is_looked_for(world, tmp_path):
    weights = load_file(world.weights)
    pool = checkpoint.Checkpoint(principal_pool(weights, 1, LEVELS), {"arch": "vit_mini"})
    checkpoint.save(tmp_path / "pool.safetensors", pool)
    names = np.array([f"class {k}" for k in range(16)])
    np.savez(tmp_path / "x.npz", names=names, embeddings=np.eye(16))
    texts = ("--text_prototypes", tmp_path / "x.npz")
    pooled = ("--resume", tmp_path / "pool.safetensors")
    for flags, words in (
        ((*pooled, "--head", "robust-lda"), "holds no statistics for --head robust-lda; add them"),
        (("--head", "robust-lda"), "needs a pool"),
        ((*pooled, "--head", "mix", "of=lda", "other=2"), "holds adapters 0 to 1"),
        (("--head", "text"), "needs --text_prototypes"),
        (texts, "embeddings of 16 numbers, the network has 96 features"),
        ((*pooled, *texts), "embeddings of 16 numbers, the network has 96 features"),
    ):
        ended = command("test_meta_dataset", *world.test(tmp_path / "out", *flags, "--dry_run"))
        assert ended.code == 2 and "missing: what the heads need: " in ended.out, ended
        assert words in ended.out
    assert not (tmp_path / "out").exists()


def test_stored_episodes_are_opened(world, tmp_path):
    (tmp_path / "dumped").mkdir()
    flags = ("--val_episodes", tmp_path / "dumped", "--dry_run")
    ended = command("main", *world.train(tmp_path / "out", *flags))
    said = f"missing: stored episodes {tmp_path / 'dumped'}: {tmp_path / 'dumped'}: no images_per_class.json"
    assert ended.code == 2 and said in ended.out, ended
    assert not (tmp_path / "out").exists()
