"""Locks between processes, on files that stay where they are."""

import contextlib
import errno
import fcntl
import os
import sys
import weakref
from pathlib import Path

from meta_dataset_readers.errors import InputError, say

_UNKNOWN = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # no locks on this disk


class Lock:
    """Holds a lock until `release`, or until this process ends in any way.

    A file system without locks is warned of, and the program goes on. Forked children hold nothing, so that
    a process that reads for one that was killed does not keep its lock. The file is created if missing.

    Args:
        shared: any number of processes may hold it, while none holds it alone.
        wait: until it is free; otherwise that is an error.

    Raises:
        InputError: another process holds it, or the file cannot be opened.
    """

    def __init__(self, path: Path, shared: bool = False, wait: bool = False):
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if self._descriptor is None or error.errno not in _UNKNOWN:
                self.release()
                if error.errno == errno.EWOULDBLOCK:
                    raise InputError(
                        f"{path}: another process is writing here; wait for its end or name another directory"
                    ) from None
                raise InputError(f"{path}: cannot be opened and locked ({error.strerror})") from error
            say(
                f"warning: {path}: this file system has no locks ({error.strerror}); see that no other "
                "process writes here",
                file=sys.stderr,
            )
        itself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _release(itself))

    def release(self) -> None:
        """Give the lock up."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_exception) -> None:
        self.release()


def _release(reference: weakref.ref) -> None:
    lock = reference()
    if lock is not None:
        lock.release()
