"""The Slurm scripts of docs/how-to/clusters.md, run as they stand there, where Slurm's commands only note
that they were called."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, about

PAGE = ROOT / "docs/how-to/clusters.md"
PATIENCE = 240  # seconds
SRUN = 'echo "srun $*" >> "$NOTES"; [[ $1 == --* ]] && shift; exec "$@"'
SCONTROL = 'echo "scontrol $*" >> "$NOTES"; [ "$1" = requeue ] || echo localhost'


class Cluster:
    """A machine that takes itself for a node of a Slurm cluster with two GPUs.

    Args:
        folder: for scripts, commands and notes.
    """

    def __init__(self, folder: Path):
        self.folder, self.notes = folder, folder / "notes"
        names = re.findall(r"`(\w+\.slurm)`", PAGE.read_text())
        blocks = re.findall(r"^```slurm\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
        for name, text in zip(names, blocks, strict=True):
            (folder / name).write_text(text)
        self.provide("srun", SRUN)
        self.provide("scontrol", SCONTROL)
        self.provide("python", f'exec "{sys.executable}" "$@"')
        self.provide("torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')

    def provide(self, name: str, text: str) -> None:
        """Put a command first on the path."""
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def start(self, script: str, *flags, **variables) -> subprocess.Popen:
        """A job as Slurm starts it, which prints into `log`."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[1]"}
        slurm |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8", "PORT": "0"}
        own = {"PATH": path, "NOTES": str(self.notes), "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                ["bash", self.folder / script, *map(str, flags)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | slurm | own | variables,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def called(self) -> list[str]:
        """The commands of Slurm that were called."""
        return self.notes.read_text().splitlines() if self.notes.exists() else []


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def test_a_preempted_training_saves_and_queues_again(cluster, world):
    """By two real processes of torchrun; the script is signalled as Slurm does it."""
    out = cluster.folder / "run"
    flags = world.train(out, "--nEpisode", 10_000, "--rank_timeout", 100, "--statistics_episodes", 0)
    job = cluster.start("train.slurm", *flags)
    end = time.monotonic() + PATIENCE
    try:
        while not re.search(r" [1-9]\d*/20000 ", cluster.log):
            assert time.monotonic() < end and job.poll() is None, cluster.log
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        code = job.wait(PATIENCE)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert code != 0 and cluster.called[-1] == "scontrol requeue 7", cluster.log
    assert len(re.findall("stopped after .* the same command continues", cluster.log)) == 1
    assert about(out / "last.safetensors")["tuner"]["episodes_done"] > 0


@pytest.mark.parametrize("code", [0, 2])
def test_a_training_that_ends_by_itself_does_not_queue_again(cluster, code):
    cluster.provide("torchrun", f"exit {code}")
    assert cluster.start("train.slurm", "--epochs", "1").wait(PATIENCE) == code
    *_, run = cluster.called
    assert run.startswith("srun --cpus-per-task=8 torchrun --nnodes=1 --nproc_per_node=2 ")
    assert "localhost:0" in run and run.endswith(" main.py --epochs 1")


def test_an_array_shares_an_evaluation_out(cluster):
    """What its tasks are given, `test_parts_share_a_folder_and_the_last_one_sums_up` runs."""
    cluster.provide("python", 'echo "$@"')
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    assert cluster.start("test.slurm", "@a.args", **array).wait(PATIENCE) == 0
    assert cluster.log == "test_meta_dataset.py @a.args --shard 3/8\n"
