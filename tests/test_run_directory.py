"""The guard of a run's directory, its lock, files written whole, and signals: laws of amt/files."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import fails

from amt.files import locks, signals
from amt.files.checkpoint import replace_described
from amt.files.locks import Lock
from amt.files.run_directory import RunDirectory
from amt.files.signals import Interrupted, Interrupts
from amt.files.tensorboard import TensorBoard
from meta_dataset_readers.errors import InputError, exit_on_bad_input
from meta_dataset_readers.files import replace_file

ABOUT = {"kind": "a toy", "settings": {"lr": 0.01, "levels": [1, 2]}}


def guard(folder: Path, about: dict = ABOUT, **how) -> RunDirectory:
    return RunDirectory(folder, about, results=["last.*", "logs/*.txt", "logs"], **how)


def begin(folder: Path, about: dict = ABOUT, **how) -> None:
    with guard(folder, about, **how):
        pass


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- settings --------------------------------------------------------------------------------------------


def test_the_same_settings_continue_and_leave_every_file_as_it_is(tmp_path):
    begin(tmp_path / "run")
    (tmp_path / "run" / "last.bin").write_text("work")
    before = content(tmp_path / "run")
    begin(tmp_path / "run", ABOUT | {"command": "another spelling of the same"})
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": 0.02}, "begun with lr 0.01, not 0.02"),
        ({"levels": [1]}, r"begun with levels \[1, 2\], not \[1\]"),
        ({"new": "x"}, 'begun with new null, not "x"'),
        ({"autocast": "x"}, r"begun with autocast \(--precision\) null, not"),
    ],
)
def test_other_settings_are_refused_by_their_first_difference(tmp_path, settings, named):
    begin(tmp_path)
    before = content(tmp_path)
    other = ABOUT | {"settings": ABOUT["settings"] | settings}
    error = fails(named, lambda: begin(tmp_path, other, flag="--output"))
    assert str(error).startswith(str(tmp_path / "run.json"))
    assert "name another --output, use the same settings to continue, or --overwrite" in str(error)
    assert content(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_another_kind_is_refused_even_to_be_overwritten(tmp_path, overwrite):
    begin(tmp_path)
    before = content(tmp_path)
    other = ABOUT | {"kind": "an evaluation"}
    fails("holds a toy, not an evaluation", lambda: begin(tmp_path, other, overwrite=overwrite))
    assert content(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"settings": []}', "[" * 100_000])
def test_a_damaged_run_file_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    fails("run.json: damaged", lambda: begin(tmp_path))
    assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize("overwrite", [False, True])
def test_results_without_their_settings_belong_to_somebody_else(tmp_path, overwrite):
    (tmp_path / "last.bin").write_text("theirs")
    fails("has last.bin but no run.json", lambda: begin(tmp_path, overwrite=overwrite))
    assert (tmp_path / "last.bin").read_text() == "theirs"
    begin(tmp_path, overwrite=overwrite, resumable=["last.bin"])  # a run of an older version
    assert (tmp_path / "last.bin").exists() is not overwrite


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    begin(tmp_path)
    (tmp_path / "logs").mkdir()
    for name in ("last.bin", "logs/1.txt", "notes.md", "logs/mine.csv"):
        (tmp_path / name).write_text(name)
    begin(tmp_path, ABOUT | {"settings": {"lr": 3}}, overwrite=True)
    assert content(tmp_path).keys() == {"run.json", ".lock", "notes.md", "logs/mine.csv"}
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"lr": 3}


# --- locks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_process_at_a_time_writes_a_directory(tmp_path, overwrite):
    with guard(tmp_path):
        before = content(tmp_path)
        other = ABOUT | {"settings": {}}  # compared under the lock alone: busy comes first
        fails("another process is writing", lambda: begin(tmp_path, other, overwrite=overwrite))
        assert content(tmp_path) == before
    begin(tmp_path)


def test_parts_share_a_directory_and_each_is_written_once(tmp_path):
    with guard(tmp_path, part="last.0"), guard(tmp_path, part="last.1"):
        fails("last.1: another process is writing", lambda: begin(tmp_path, part="last.1"))
        fails("another process is writing", lambda: begin(tmp_path))
        fails("another process is writing", lambda: begin(tmp_path, part="last.2", overwrite=True))
    begin(tmp_path, part="last.1")


HOLDER = """
import os, sys
from pathlib import Path
from amt.files.locks import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork() == 0:  # as a process that reads for this one
    print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_holds_nothing_though_its_readers_live_on(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"ready\n"
        fails("another process is writing", lambda: Lock(tmp_path / "lock"))
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        Lock(tmp_path / "lock").release()
        holder.stdin.close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys, number):
    def without(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", without)
    begin(tmp_path)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "no locks" in warning and warning.count("\n") == 1
    assert (tmp_path / "run.json").exists()


def test_another_fault_is_not_taken_for_a_busy_directory(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    fails("cannot be opened and locked .Input/output error", lambda: begin(tmp_path))


# --- files that are written whole ------------------------------------------------------------------------


def recorded(monkeypatch) -> list[str]:
    """What is synchronised and what is renamed, by name, in its order."""
    seen, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(descriptor):
        seen.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noting_replace(source, target):
        seen.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return seen


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    seen = recorded(monkeypatch)
    replace_file(tmp_path / "a.txt", "x")
    part = f".a.txt.{platform.node().replace('.', '-')}.{os.getpid()}.part"
    assert seen == [f"fsync {part}", "replace a.txt", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_a_description_never_belongs_to_another_file(tmp_path, monkeypatch, fails_at):
    """Killed before any change of a name."""
    path, calls, replace = tmp_path / "last.bin", [], os.replace
    replace_described(path, b"1", "1")

    class Killed(BaseException):
        pass

    def dying(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with contextlib.suppress(Killed):
        replace_described(path, b"2", "2")
    readable = path.with_suffix(".json")
    assert path.read_bytes() in (b"1", b"2")
    assert not readable.exists() or readable.read_bytes() == path.read_bytes()
    monkeypatch.undo()
    replace_described(path, b"3", "3")
    assert readable.read_text() == "3" and not list(tmp_path.glob(".last.json.part"))


def test_what_dead_processes_left_is_removed_and_that_of_live_ones_stays(tmp_path):
    here = platform.node().replace(".", "-")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {"dead": f".a.txt.{here}.{gone.pid}.part", "alive": f".a.txt.{here}.{os.getppid()}.part"}
    names |= {"elsewhere": f".a.txt.other-host.{gone.pid}.part"}
    for name in names.values():
        (tmp_path / name).write_text("half")
    replace_file(tmp_path / "a.txt", "x")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.txt", names["alive"], names["elsewhere"]}
    begin(tmp_path)  # alone in the directory: whatever is left is a dead process's
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_wherever_it_is_noticed(capsys, number):
    def full():
        raise OSError(number, os.strerror(number), "runs/x/rows.jsonl")

    with pytest.raises(SystemExit) as ended:
        exit_on_bad_input(full)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: runs/x/rows.jsonl: ") and "same command again" in err


def test_tensorboards_events_are_written_by_this_thread(tmp_path):
    """So that a full disk is an error here, and not the traceback of another thread."""
    board = TensorBoard(tmp_path, first=1)
    board._writer._writer.close()
    board._writer._writer = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        board.add({"loss": 1.0}, 1)
    board._writer._writer.close()


# --- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_a_step_be_finished_and_ends_the_wait_for_the_next(number):
    before, done = signal.getsignal(number), []

    def items():
        yield 1
        yield 2
        signal.raise_signal(number)  # while the loop waits for the third
        yield 3

    with Interrupts() as interrupts:
        for item in interrupts.watch(items()):
            done.append(item)
    assert done == [1, 2] and interrupts.code == 128 + number
    assert signal.getsignal(number) is before

    with Interrupts() as interrupts:
        for item in interrupts.watch([1, 2]):
            signal.raise_signal(number)  # within a step
            done.append(item)
    assert done == [1, 2, 1] and interrupts.pending()


def test_data_that_never_arrives_does_not_keep_a_program_alive(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.1)

    def items():
        yield 1
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1000)

    with Interrupts() as interrupts:
        assert list(interrupts.watch(items())) == [1]
    assert interrupts.code == 128 + signal.SIGTERM


def test_half_a_validation_is_none():
    with Interrupts() as interrupts:
        assert list(interrupts.whole([1, 2])) == [1, 2]
        with pytest.raises(Interrupted):
            for _ in interrupts.whole([1, 2]):
                signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """As nohup arranges it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
        assert not interrupts.pending()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_faults_in_writing_name_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        replace_file(tmp_path / "file" / "below", "x")
