"""The one way to open a file that came from outside, and to write one as a whole.

A pipe would keep its reader waiting for ever and a device fills any memory, so only regular files are read,
each once and up to a size that the caller names. Whatever is wrong is one line that begins with the path.
Knows the syntax of JSON and YAML; what the values mean is known to `json_fields` and its callers.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from meta_dataset_readers.errors import InputError, first_line

if TYPE_CHECKING:
    import numpy as np

LARGEST_LIST = 64 * 2**20  # bytes of a JSON, CSV, text or MATLAB file; the longest real ones have 8 million
LARGEST_SETTINGS = 2**20  # bytes of a file that people write

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextlib.contextmanager
def reading(
    path: str | Path, error: type[InputError] = InputError, *, what: str = "file", buffering: int = -1
) -> Iterator[BinaryIO]:
    """The regular file at `path`, open for reading; it may grow or shrink while it is read.

    Args:
        error: the class of the error, DamagedRecord where the file is a single picture.
        what: what a missing file is called, such as "checkpoint".
        buffering: as for `open`; 0 reads no more than is asked for.

    Raises:
        InputError: the path leads to nothing or to something else than a regular file, or the disk complains.
    """
    _check_name(path, error)
    try:
        with open(path, "rb", buffering, opener=_without_waiting) as file:
            _check_regular(path, os.fstat(file.fileno()).st_mode, error)
            yield file
    except OSError as problem:
        raise _unreadable(path, problem, error, what) from problem


def size_of(path: str | Path, *, what: str = "file") -> int:
    """The size in bytes of the regular file at `path`, for libraries that open files by themselves.

    Raises InputError as `reading`.
    """
    _check_name(path, InputError)
    try:
        found = os.stat(path)
    except OSError as problem:
        raise _unreadable(path, problem, InputError, what) from problem
    _check_regular(path, found.st_mode, InputError)
    return found.st_size


def read_bytes(
    path: str | Path, most: int, error: type[InputError] = InputError, *, what: str = "file"
) -> bytes:
    """What the regular file at `path` holds. Raises InputError as `reading`, and above `most` bytes."""
    with reading(path, error, what=what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise error(f"{path}: {size} bytes, at most {most} are read")
        return file.read(size)


def map_array(path: Path, *, what: str = "file") -> "np.memmap":
    """The array in the .npy file `path`, mapped into memory and not read; Python objects in it are refused.

    Raises InputError as `reading`, and for a file that is no such array or not as long as its array.
    """
    import numpy as np  # here: whoever reads a list does not wait for it

    size = size_of(path, what=what)
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever numpy raises on foreign bytes
        raise InputError(f"{path}: not an array that can be mapped: {first_line(error)}") from error
    if found.offset + found.nbytes != size:
        raise InputError(f"{path}: {size} bytes, expected {found.offset + found.nbytes}")
    return found


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for its writer


def _check_name(path: str | Path, error: type[InputError]) -> None:
    if "\0" in os.fspath(path):  # a list may name it, and `open` raises another error
        raise error(f"{path}: no such file: the name holds a NUL")


def _check_regular(path: str | Path, mode: int, error: type[InputError]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise error(f"{path}: is {kind}, expected a regular file")


def _unreadable(path: str | Path, problem: OSError, error: type[InputError], what: str) -> InputError:
    if isinstance(problem, FileNotFoundError):
        return error(f"{path}: no such {what}")
    if isinstance(problem, IsADirectoryError):
        return error(f"{path}: is a folder, expected a regular file")
    return error(f"{path}: cannot be read: {problem.strerror or problem}")


# --- writing ---------------------------------------------------------------------------------------------


def replace_file(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write `content` (text as UTF-8, or bytes, also in parts): the file appears whole or not at all.

    Both the file and its folder, which is made where it is missing, are on the disk when this returns, so a
    power cut leaves the old file or the new one. Unfinished files that dead processes of this machine have
    left of `path` are removed. Of several processes that write the same path the last one wins.

    Raises:
        InputError: the place cannot be written to, or the disk is full; what was there stays as it was.
    """
    content = content.encode() if isinstance(content, str) else content
    prefix = f".{path.name}.{platform.node().replace('.', '-')}."
    part = path.with_name(f"{prefix}{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_parts(path.parent, prefix)
        with part.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            to_disk(file)
        os.replace(part, path)
        folder_to_disk(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def to_disk(file: BinaryIO) -> None:
    """Return when what was written to `file` survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(path: Path) -> None:
    """Return when the names of the files in the folder `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do this for folders
            raise
    finally:
        os.close(descriptor)


def _remove_dead_parts(folder: Path, prefix: str) -> None:
    for name in os.listdir(folder):
        pid = name.removeprefix(prefix).removesuffix(".part")
        if name == f"{prefix}{pid}.part" and pid.isdecimal() and not _is_alive(int(pid)):
            (folder / name).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# --- folders ---------------------------------------------------------------------------------------------


def listing(directory: Path, wanted: Callable[[os.DirEntry], bool], *, any_name: bool = False) -> list[str]:
    """The names of the wanted entries of `directory`, sorted, without hidden ones.

    Raises InputError if it cannot be listed, and unless `any_name` will do for a wanted name that
    is not UTF-8.
    """
    try:
        with os.scandir(directory) as entries:
            names = sorted(each.name for each in entries if not each.name.startswith(".") and wanted(each))
    except OSError as error:
        raise InputError(f"{error.filename or directory}: cannot be listed: {error.strerror}") from error
    if not any_name:
        check_utf8(directory, names)
    return names


def check_utf8(directory: Path, names: Iterable[str]) -> None:
    """Raise InputError for a name in `directory` that could not be written to a page or a list of results."""
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise InputError(f"{directory / name}: the name is not UTF-8; rename it")


def folder_names(directory: Path) -> list[str]:
    """The folders in `directory`, sorted, without hidden ones. Raises InputError as `listing`."""
    return listing(directory, os.DirEntry.is_dir)


def exists(_entry: os.DirEntry) -> bool:
    """Any entry will do."""
    return True


def is_no_folder(entry: os.DirEntry) -> bool:
    """Whether it is, or leads to, anything but a folder. What is no file is not passed over in silence:
    whoever reads it says what it is."""
    try:
        return not entry.is_dir()
    except OSError:  # a link to itself, or through a folder that is closed to us
        return True


def leads_nowhere(entry: os.DirEntry) -> bool:
    """Whether it is a link to what is not there, or to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


SPLIT_FOLDERS = {  # what their folders are called, in any case
    "TRAIN": ("train", "training"),
    "VALID": ("val", "valid", "validation"),
    "TEST": ("test", "testing"),
}


def split_folders(directory: Path) -> dict[str, str]:
    """The folders in `directory` that hold a split: by split, the name.

    Raises InputError as `folder_names`, and for two folders with classes of one split.
    """
    found: dict[str, str] = {}
    for folder in folder_names(directory):
        split = next((split for split, names in SPLIT_FOLDERS.items() if folder.lower() in names), None)
        if split is None or not folder_names(directory / folder):
            continue
        if split in found:
            both = f"both {found[split]}/ and {folder}/ hold classes"
            raise InputError(f"{directory}: {both}, expected one folder for {split}")
        found[split] = folder
    return found


ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


def still_packed(directory: Path, *names: str) -> str:
    """What to type where one of `names` lies in `directory` as an archive, led by "; "; else empty."""
    for name in names:
        for file in (f"{name}{ending}" for ending in ARCHIVES):
            if (directory / file).is_file():
                how = "unzip -d {1} {0}" if file.endswith(".zip") else "tar -C {1} -xf {0}"
                typed = how.format(shlex.quote(str(directory / file)), shlex.quote(str(directory)))
                return f"; {file} is still packed: {typed}"
    return ""


def path_parts(path: str) -> tuple[str, ...]:
    """The parts of a path in a list, of Windows where it has a drive, or backslashes alone."""
    if is_windows(path) or ("\\" in path and "/" not in path):
        path = path.replace("\\", "/")
    return tuple(part for part in path.split("/") if part not in ("", "."))


def is_windows(path: str) -> bool:
    """Whether a path begins as those of Windows do: with a drive, or the two backslashes of a share."""
    return re.match(r"[A-Za-z]:[\\/]|\\\\", path) is not None


def missing_files(root: Path, files: list[str]) -> list[str]:
    """Those of `files`, relative to `root` and with "/" between their parts, that are not there."""
    folders = {file.rpartition("/")[0] for file in files}
    # One listing per folder: asking for 100,000 files one by one takes minutes on a network disk.
    present = {folder: _file_names(root / folder) for folder in folders}
    parts = (file.rpartition("/") for file in files)
    return [folder + slash + name for folder, slash, name in parts if name not in present[folder]]


def _file_names(directory: Path) -> frozenset[str]:
    """The files in `directory`, and what reading them would say is none; nothing if the folder is missing."""
    try:
        with os.scandir(directory) as entries:
            return frozenset(each.name for each in entries if is_no_folder(each) and not leads_nowhere(each))
    except OSError:
        return frozenset()


# --- JSON and YAML ---------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """What the JSON file `path` holds. Raises InputError as `read_bytes` and `parse_json`."""
    return parse_json(str(path), read_bytes(path, LARGEST_LIST))


def parse_json(where: str, text: str | bytes) -> Any:
    """The value that a JSON text stands for; `where` begins the message.

    Raises:
        InputError: the text is not UTF-8 or not JSON, has a key twice in an object, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise InputError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error


def read_yaml(path: str | Path, flag: str) -> Any:
    """What a YAML file that people write holds: settings of two levels. `flag` named it and begins messages.

    Raises:
        InputError: the file cannot be read, is larger than 1 MiB, is not YAML of UTF-8, has a key twice or is
            nested too deeply.
    """
    import yaml  # here: whoever reads a list does not wait for it

    where = f"{flag} {path}"
    try:
        data = read_bytes(path, LARGEST_SETTINGS)
    except InputError as error:
        raise InputError(f"{flag} {error}") from error
    try:
        text = data.decode("utf-8")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return yaml.safe_load(text)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}: no YAML{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply, expected two levels") from error


def _check_keys(node: Any, where: str, levels: int = 2) -> None:
    """Of entries or fields given twice YAML would silently take the last."""
    import yaml

    if levels == 0 or not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"{where}: {key.value!r} is there twice, again in line {line}")
            seen.add(key.value)
        _check_keys(value, where, levels - 1)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return result
