"""Signals that end a program, held back until what it is doing can be kept.

watch     items up to the first signal: the work on an item is finished, then there are no more
whole     all items, or `Interrupted`
check     `Interrupted` once a signal has arrived: called where work may be given up
passes    every pass through a network calls `check`: between the steps of an attack, too
"""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from meta_dataset_readers.endings import ENDING

if TYPE_CHECKING:
    from torch import nn

Item = TypeVar("Item")
PATIENCE = 2.0  # seconds that data may take to arrive after a signal


class Interrupts:
    """While active, the first Ctrl-C, SIGTERM or SIGHUP sets `caught`, so that a step can be finished.

    A second one ends the program at once. A signal that is ignored, as SIGHUP under nohup, stays so.

    Args:
        once: further signals change nothing: a batch system and torchrun may both send one to a rank.
    """

    def __init__(self, once: bool = False):
        self.caught: int | None = None
        self._once = once
        self._previous: dict = {}
        self._waits = False
        self._process = os.getpid()

    def __enter__(self) -> "Interrupts":
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def pending(self) -> bool:
        """Whether a signal has arrived."""
        return self.caught is not None

    @property
    def code(self) -> int:
        """The exit code of a program that the signal has ended."""
        return 128 + (self.caught or 0)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items up to the first signal, which also ends the wait for the next one, within seconds."""
        iterator, end = iter(items), object()
        try:
            while not self.pending():
                self._waits = True
                item = next(iterator, end)
                self._waits = False
                if item is end or self.pending():
                    return
                yield item
        except _WaitedLongEnough:
            return
        finally:
            self._waits = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def whole(self, items: Iterable[Item]) -> Iterator[Item]:
        """All items, or `Interrupted` once a signal has arrived: half a validation is none."""
        yield from self.watch(items)
        self.check()

    def check(self, *_arguments: object) -> None:
        """Raise `Interrupted` if a signal has arrived; whatever it is called with, as it may be a hook."""
        if self.pending():
            raise Interrupted

    @contextlib.contextmanager
    def passes(self, module: "nn.Module") -> Iterator[None]:
        """While active every pass through `module` begins with `check`."""
        hook = module.register_forward_pre_hook(self.check)
        try:
            yield
        finally:
            hook.remove()

    def _note(self, number: int, _frame) -> None:
        if self._once and self.pending():
            return
        self.caught = number
        if not self._once:
            self._restore()
        if self._waits and os.getpid() == self._process:  # not in a child, forked while this one waits
            # Whoever prepares the next item is sending it, as a rule: cut short, it would complain.
            signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def _give_up(self, _number: int, _frame) -> None:
        if self._waits:
            self._waits = False
            raise _WaitedLongEnough

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_exception) -> None:
        self._restore()


class Interrupted(Exception):
    """A signal arrived before something was complete."""


class _WaitedLongEnough(BaseException):
    """A signal has arrived, and the data that the program waits for has not."""
