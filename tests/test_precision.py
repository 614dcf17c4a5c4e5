"""Every command says what it computes in: TF32 and determinism are set before it begins, and noted."""

import json
import os

import pytest
import torch
from commands import about, called, same_tensors
from toy_autolora_runs import command as autolora
from toy_training import assert_refused, command

from amt.models.network import find_device
from amt.models.precision import PRECISIONS, Arithmetic, in_use
from meta_dataset_readers.errors import InputError

SHORT = ("--epochs", 1, "--nEpisode", 1, "--epsilon", 8, "--nValEpisode", 0)
FLOAT32 = {"matrix_products": "float32", "convolutions": "float32", "deterministic": False}
REPEATING = FLOAT32 | {"deterministic": True}
TF32 = FLOAT32 | {"matrix_products": "tf32", "convolutions": "tf32"}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a command sets holds for the whole process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    Arithmetic().use()


def noted(run) -> list[dict]:
    return json.loads((run / "run.json").read_text())["arithmetic"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tf32_is_on_where_it_is_asked_for_and_off_elsewhere(precision):
    """Whatever was set before, by the newer names of PyTorch too; without a warning."""
    for before in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = before
        torch.backends.cudnn.conv.fp32_precision = before
        Arithmetic(precision).use()
        assert in_use() == (TF32 if precision == "tf32" else FLOAT32)
        # The older names can still be read, as torch.compile does.
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32


def test_deterministic_leaves_no_kernel_whose_bits_differ():
    Arithmetic(deterministic=True).use()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    cuda = torch.backends.cuda
    assert not cuda.mem_efficient_sdp_enabled() and not cuda.cudnn_sdp_enabled()
    assert cuda.math_sdp_enabled() and cuda.flash_sdp_enabled()
    Arithmetic().use()
    assert not torch.are_deterministic_algorithms_enabled() and cuda.mem_efficient_sdp_enabled()


def test_a_workspace_that_does_not_repeat_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    Arithmetic().use()
    with pytest.raises(InputError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.*expected :4096:8 or :16:8"):
        Arithmetic(deterministic=True).use()


def test_a_kernel_that_is_not_there_is_one_line():
    def fail(words: str):
        raise RuntimeError(words)

    words = "upsample_bicubic2d_backward does not have a deterministic implementation, but you set ..."
    ended = called(lambda: fail(words), ["amt"])
    assert ended.code == 2 and ended.err.startswith(
        "error: --deterministic: upsample_bicubic2d_backward does"
    )
    assert ended.err.count("\n") == 1
    with pytest.raises(RuntimeError, match="another fault"):
        called(lambda: fail("another fault"), ["amt"])


def test_a_full_gpu_is_one_line_with_the_flags_that_help():
    def fail():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
            "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.9 GiB in use. Of"
        )

    ended = called(fail, ["amt"])
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert ended.err.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert "1.20 GiB is free; less is needed with --micro_batch" in ended.err


@pytest.mark.parametrize(
    ("program", "flags", "words"),
    [
        ("train", ("--fp16", "--precision", "bf16"), ["--fp16", "--precision bf16", "exclude each other"]),
        ("train", ("--bf16", "--precision", "float32"), ["--bf16", "--precision float32"]),
        ("train", ("--precision", "half"), ["--precision", "'half'", "tf32"]),
        ("test", ("--precision", "bf16"), ["--precision bf16", "attacks", "float32"]),
        ("test", ("--precision", "fp16"), ["--precision fp16", "tf32"]),
    ],
)
def test_precisions_that_contradict_or_do_not_fit_are_refused(world, tmp_path, program, flags, words):
    script = {"train": "main", "test": "test_meta_dataset"}[program]
    ended = command(script, *getattr(world, program)(tmp_path / "out", *flags))
    assert_refused(ended, tmp_path / "out", *words)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autolora_has_no_mixed_precision(cifar, tmp_path, precision):
    ended = autolora(*cifar.flags(tmp_path / "out", "--precision", precision))
    assert ended.code == 2 and f"--precision {precision}" in ended.err and not (tmp_path / "out").exists()


def test_a_training_in_tf32_measures_its_statistics_in_float32(world, tmp_path, monkeypatch):
    from amt.cli import head_statistics, train

    seen = []
    step, measure = train.Tuner.step, head_statistics.measure_statistics
    monkeypatch.setattr(
        train.Tuner, "step", lambda *given: (seen.append(("step", in_use())), step(*given))[1]
    )
    monkeypatch.setattr(
        head_statistics,
        "measure_statistics",
        lambda *given: (seen.append(("statistics", in_use())), measure(*given))[1],
    )
    ended = command("main", *world.train(tmp_path, *SHORT, "--precision", "tf32"))
    assert ended.code == 0, ended.err
    assert seen == [("step", TF32), ("statistics", FLOAT32)]
    assert noted(tmp_path) == [TF32]
    assert about(tmp_path / "last.safetensors")["protocol"]["autocast"] == "tf32"
    other = command("main", *world.train(tmp_path, *SHORT))
    assert other.code == 2 and "tf32" in other.err


@pytest.mark.parametrize(
    ("flag", "same"), [("--fp16", ("--precision", "fp16")), ("--bf16", ("--precision", "bf16", "--bf16"))]
)
def test_the_published_flag_is_the_precision_of_that_name(world, tmp_path, flag, same):
    for name, flags in {"one": (flag,), "other": same}.items():
        assert command("main", *world.train(tmp_path / name, *SHORT, *flags)).code == 0
    assert same_tensors(*(tmp_path / name / "last.safetensors" for name in ("one", "other")))


def test_evaluation_is_in_float32_and_says_so(world, tmp_path):
    """After a command of another precision in this process, too. A run goes on with --deterministic, which
    is no other setting, and notes it; on the CPU its rows are the same."""
    Arithmetic("tf32").use()
    flags = world.test(tmp_path / "out", "--nTestEpisode", 2, "--epsilon", 8)
    assert command("test_meta_dataset", *flags, "--shard", "0/2").code == 0
    assert command("test_meta_dataset", *flags, "--shard", "1/2", "--deterministic").code == 0
    assert noted(tmp_path / "out") == [FLOAT32, REPEATING]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arithmetic"] == [FLOAT32, REPEATING]
    refused = command("test_meta_dataset", *flags, "--precision", "tf32")
    assert refused.code == 2 and "precision" in refused.err


def test_autolora_trains_in_tf32_and_tests_in_float32(cifar, tmp_path):
    ended = autolora(*cifar.flags(tmp_path, "--precision", "tf32", "--epochs", 1, "--epsilon", 0))
    assert ended.code == 0, ended.err
    assert noted(tmp_path / "AFF") == [TF32] and noted(tmp_path / "AFF" / "test") == [FLOAT32]
    other = autolora(*cifar.flags(tmp_path, "--epochs", 1, "--epsilon", 0))
    assert other.code == 2 and "precision" in other.err


@pytest.mark.parametrize(
    ("name", "rank", "found"),
    [("cuda", "1", "cuda:1"), ("auto", "1", "cuda:1"), ("cuda", "5", "cuda:1"), ("cuda", None, "cuda:0"),
     ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu")],
)  # fmt: skip
def test_torchruns_processes_take_a_device_each(name, rank, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)  # there is no such device here
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert find_device(name) == torch.device(found)
