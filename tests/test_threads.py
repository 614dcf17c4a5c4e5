"""Threads: by default no more than the job has cores for; and what their number changes in a result."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from commands import same_tensors
from toy_autolora_runs import rows
from toy_training import command

from amt.cli.options import use_machine
from amt.files.run_directory import RunDirectory
from amt.models.precision import Arithmetic
from meta_dataset_readers.cores import available_cores

# What the kernel's files say, and how many cores that is where the machine has 64.
GROUPS = {
    "no control groups": ({}, 64),
    "no quota": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "half a core": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "two and a half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
    "a step of a job": (
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "sys/fs/cgroup/slurm/job_7/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000\n",
        },
        4,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/a:b\n1:cpu,cpuacct:/box\n0::/\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "more than there are": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 64),
    "nonsense": ({"proc/self/cgroup": "x\n\xff::\n0::/\n", "sys/fs/cgroup/cpu.max": "1 0\n"}, 64),
}


@pytest.mark.parametrize(("files", "cores"), GROUPS.values(), ids=GROUPS)
def test_a_quota_counts_as_cores(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert available_cores(tmp_path) == cores


@pytest.mark.parametrize(("threads", "cores", "used"), [(None, 1, 1), (None, 64, 2), (3, 1, 3)])
def test_the_default_is_within_the_cores_and_a_flag_is_taken_as_it_is(threads, cores, used, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("amt.cli.options.common.available_cores", lambda: cores)
    try:
        torch.set_num_threads(2)
        use_machine(argparse.Namespace(threads=threads))
        assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)


SHORT = ("--epochs", 1, "--nEpisode", 1, "--nValEpisode", 0, "--statistics_episodes", 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_number_of_threads_gives_the_same_bits(threads, world, tmp_path):
    """Training and evaluation by the commands; with another number sums are rounded differently."""
    before = torch.get_num_threads()
    try:
        for name in ("one", "other"):
            run, machine = tmp_path / name, ("--threads", threads)
            assert command("main", *world.train(run / "pool", *SHORT, *machine)).code == 0
            pool = ("--resume", run / "pool" / "last.safetensors")
            assert (
                command(
                    "test_meta_dataset", *world.test(run / "test", *pool, "--nTestEpisode", 1, *machine)
                ).code
                == 0
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, other = tmp_path / "one", tmp_path / "other"
    assert same_tensors(one / "pool" / "last.safetensors", other / "pool" / "last.safetensors")
    assert rows(one / "test") == rows(other / "test")
    assert noted(one / "pool") == noted(one / "test") == [threads]


def noted(run: Path) -> list[int]:
    return json.loads((run / "run.json").read_text())["threads"]


@pytest.mark.parametrize("about", [{"kind": "a training"}, {}], ids=["training", "evaluation"])
def test_a_run_goes_on_with_other_threads_and_says_so(about, tmp_path, monkeypatch, capsys):
    """The default of another machine is no other setting; what is promised of bits no longer holds."""
    told = []
    for threads in (2, 2, 4, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        with RunDirectory(tmp_path, {"settings": {}, **about}, results=[]):
            told.append(capsys.readouterr().err)
    assert told[:2] == ["", ""] and told[3] == ""
    assert "ran with 2 CPU threads so far, and goes on with 4" in told[2] and "--threads 2" in told[2]
    assert noted(tmp_path) == [2, 4]


def test_a_run_that_goes_on_with_other_kernels_says_so(tmp_path, capsys):
    """Once for each way; --precision is a setting, and refused."""
    told = []
    try:
        for deterministic in (False, False, True, False):
            Arithmetic(deterministic=deterministic).use()
            with RunDirectory(tmp_path, {"settings": {}}, results=[]):
                told.append(capsys.readouterr().err)
    finally:
        Arithmetic().use()
    assert told[:2] == ["", ""] and told[3] == "" and told[2].count("\n") == 1
    assert "ran without --deterministic so far, and goes on with it" in told[2]
