"""How a signal ends a program: Ctrl-C, what batch systems send, a terminal that is closed.

    begin     the first call of every program, before its other imports: from then on a signal ends it with
              one line and exit code 128 + its number, and never with a traceback
    raised    while a command works, a signal is an exception, so that files are closed and processes stopped
    held      for as long as processes are started: a signal arrives when they have been

A program that keeps results holds signals back meanwhile, see amt/files/signals.py. Imports nothing large.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = "interrupted"


class Ended(KeyboardInterrupt):
    """A signal of `ENDING` has arrived.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def code_of(error: KeyboardInterrupt) -> int:
    """The exit code of a program that `error` ends: what a shell shows, 128 + the signal's number."""
    return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


def begin() -> None:
    """End by the first signal, with one line. One that is ignored, as SIGHUP under nohup, stays so.

    Also has torch's threads sleep where they wait for each other, unless OMP_WAIT_POLICY says otherwise: on
    cores that other programs use, too, threads that spin keep those they wait for from running.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """While active, a signal raises `Ended` where the program is; outside of the main thread it does nothing.

    Within an import it ends the program instead, since a module written in C may not survive an exception
    there.
    """
    process, previous, hook = os.getpid(), {}, sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child that was just forked, and has not said yet what it does then
            return
        if _imports(frame):
            _leave(number, frame)
        raise Ended(number)

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, Ended):  # raised where nothing can catch it, such as in a destructor
            _leave(lost.exc_value.number, None)
        hook(lost)

    try:
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """While active no signal arrives, and processes that are started will never see one: that the program
    ends is for this process to tell them."""
    arrived, previous = [], {}

    def keep(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        # The mask is of this thread alone: a signal may reach one of torch's, and Python handles it here.
        with contextlib.suppress(ValueError):  # not the main thread, in which Python handles none
            for number in ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, keep)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if arrived:
            signal.raise_signal(arrived[0])


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave(number: int, _frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)
