"""The one way in which this project speaks to its user, and tells that an input is at fault.

Everything a user hands over (a path, an option, a file) is checked where it enters; a fault raises
`InputError` with a single line that names the file, the field, the value and what was expected.
The commands turn it into that line on stderr and exit code 2. So they do with what the system says about a
file. Any other exception is a bug of ours and keeps its traceback.

Whatever is shown goes through `say` or `printable`: names of files and texts in them may hold anything.
"""

import contextlib
import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from meta_dataset_readers.endings import INTERRUPTED, code_of, raised

_LONGEST = 2000  # letters of the line that tells of an error
_LESS_MEMORY = (
    "less is needed with --micro_batch, --levels_at_once 1 and --grad_checkpointing (amt train), with "
    "--batch_size and --test_batch_size (amt autolora), with a smaller --image_size, or with --device cpu"
)


class InputError(ValueError):
    """A fault in what the user handed over; the message is one complete line."""


class DamagedRecord(InputError):
    """One picture is at fault (checksum, encoding, pixels or label); its neighbours may be sound."""


def printable(text: object) -> str:
    """A text on one line, without power over a terminal: what cannot be shown is written as an escape, such
    as \\x1b, a byte of a name that is not UTF-8 included."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in str(text))


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, `printable` each, to `file` (default: stdout); a line break within one is kept."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    for line in (part for whole in lines for part in str(whole).split("\n")):
        shown = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        print(shown, file=file, flush=True)


def _short(text: str) -> str:
    """A text without its middle where it would fill the screen: what a file holds may be of any length."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that Python could not decode
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name closest to `name`, or the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none is known"


def exit_on_bad_input(main: Callable[[], int | None]) -> None:
    """Run a command's `main`; an `InputError` becomes one line on stderr and exit code 2, and so does what
    the system says about a file: that it cannot be read, or that the disk is full; and what torch says where
    --deterministic asks for a kernel that it does not have, or where a GPU's memory is full.

    Ctrl-C ends it with the shell's exit code for that, 130, and no traceback; SIGTERM and SIGHUP likewise.
    """
    try:
        with raised():
            code = main()
        sys.exit(code)
    except (InputError, OSError, RuntimeError) as error:
        if not (line := one_line(error)):
            raise
        say(line, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        say(INTERRUPTED, file=sys.stderr)
        sys.exit(code_of(error))


def one_line(error: Exception) -> str:
    """The line that tells of an error; empty for one that is no fault of an input."""
    if isinstance(error, InputError):
        return f"error: {_short(printable(error))}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; torch may not be there
        told = printable(str(error).partition(" Including")[0]).rstrip(".")
        return f"error: {told}; {_LESS_MEMORY}"
    if not isinstance(error, OSError):
        kernel, found, _ = str(error).partition(" does not have a deterministic implementation")
        return f"error: --deterministic: {printable(kernel)}{found}; this command runs without it" * bool(
            found
        )
    named = _short(printable(error.filename)) if error.filename else ""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # the last by `ulimit -f`
        return f"error: {named}: {error.strerror}" if named else ""
    where = f"{named}: " if named else ""
    return f"error: {where}{error.strerror}; make room and run the same command again"


def first_line(error: Exception) -> str:
    """An exception on one line."""
    return printable(f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].strip())


def strerror(error: OSError) -> str:
    """What the system says of an error, without the file."""
    return error.strerror or str(error)


@contextlib.contextmanager
def blaming(
    where: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = ValueError,
    said: Callable[[Any], str] = str,
) -> Iterator[None]:
    """An error of these kinds becomes an `InputError`: `where`, and what is `said` of the error."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{where}: {said(error)}") from error


@contextlib.contextmanager
def damaged(
    message: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    said: Callable[[Any], str] = first_line,
) -> Iterator[None]:
    """What foreign bytes bring a library to raise, which is almost anything, becomes an `InputError`: the
    message, and in brackets what is `said` of the error. An `InputError` stays as it is.

    Args:
        message: what is at fault.
        kinds: of errors; the others are bugs.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{message} ({said(error)})") from error
