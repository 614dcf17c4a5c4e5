"""The one way in which this project tells its user that an input is at fault.

Everything a user hands over (a path, an option, a file) is checked where it enters; a fault raises
`InputError` with a single line that names the file, the field, the value and what was expected.
The commands turn it into that line on stderr and exit code 2. Any other exception is a bug of ours
and keeps its traceback.
"""

import difflib
import errno
import signal
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """A fault in what the user handed over; the message is one complete line."""


class DamagedRecord(InputError):
    """One picture is at fault (checksum, encoding, pixels or label); its neighbours may be sound."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name closest to `name`, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none is known"


def exit_on_bad_input(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; an `InputError` becomes one line on stderr and exit code 2, and so does a full
    disk, wherever it is noticed.

    Ctrl-C ends it with the shell's exit code for that, 130, and no traceback.
    """
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room and run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def first_line(error: Exception) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].strip()
