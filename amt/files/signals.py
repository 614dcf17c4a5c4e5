"""Signals that end a program, held back until what it is doing can be kept."""

import signal


class Interrupts:
    """While active, the first Ctrl-C or SIGTERM only sets `caught`, so that a step can be finished."""

    def __init__(self):
        self.caught: int | None = None

    def __enter__(self) -> "Interrupts":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def pending(self) -> bool:
        """Whether a signal has arrived."""
        return self.caught is not None

    def _note(self, number: int, _frame) -> None:
        self.caught = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_exception) -> None:
        self._restore()
