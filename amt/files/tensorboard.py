"""Events of a run for TensorBoard, written by the thread that does the work.

torch's SummaryWriter writes in another thread, where a full disk cannot be reported as an error.
"""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

# protobuf makes these classes when their modules are imported, and ships no stubs for them.
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoard:
    """An events file in `folder`, whose name ends in `suffix`; TensorBoard drops what earlier files hold from
    step `first` on, if that is not 0. Use it as a context manager, or `close` it. Raises OSError if the file
    cannot be written, here and in every method."""

    def __init__(self, folder: Path, first: int = 0, suffix: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names: that of time, within a second too.
        name = f"events.out.tfevents.{time.time_ns():019d}.{platform.node()}.{os.getpid()}{suffix}"
        self._writer = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115
        self._add(Event(file_version="brain.Event:2"))
        if first:
            self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write values by their names."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.add_summary(Summary(value=values), step)

    def add_summary(self, summary: Summary, step: int) -> None:
        """Write what torch.utils.tensorboard.summary makes, such as an image."""
        self._add(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Make the written values visible to other programs."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
