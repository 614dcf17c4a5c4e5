"""Settings per domain from a YAML file: `default` and one entry for each source that differs from it.

    default:                              what holds for every domain, over the flags
      beta: 1                             one value, or a list for --select to choose from
      gamma: [0.4, 0.6]
      top_k: 2
      route_epsilon: 0
      trim: ["qkv:-1:0.5"]                what is trimmed in any case
    traffic_sign:
      search_scale: [100, 1]              instead of beta and gamma: the published grid,
      search_step: [10, 10]               see select.published_grid
      candidate_pool: ["fc1:-1:0.9"]      trimmings for --select to choose from

Knows the fields and their types; not what they are for.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from amt.models.trim import Trim, parse_trim
from amt.tasks.settings import Routing
from meta_dataset_readers.errors import InputError, nearest
from meta_dataset_readers.files import read_yaml
from meta_dataset_readers.settings import Number, nonnegative, positive_int, reader

DEFAULT = "default"
MOST_STEPS = 10_000  # of a search: each is a candidate


@dataclasses.dataclass(frozen=True)
class DomainSettings:
    """What the file says of one domain; None where it says nothing.

    Args:
        beta, gamma, top_k, route_epsilon: one value or several.
        trim, candidate_pool: trimmings, maybe none.
        search_scale, search_step: both or neither, and then neither beta nor gamma.
    """

    beta: tuple[float, ...] | None = None
    gamma: tuple[float, ...] | None = None
    top_k: tuple[int, ...] | None = None
    route_epsilon: tuple[float, ...] | None = None
    trim: tuple[Trim, ...] | None = None
    search_scale: tuple[float, float] | None = None
    search_step: tuple[int, int] | None = None
    candidate_pool: tuple[Trim, ...] | None = None


def read_domain_config(path: Path, sources: Collection[str]) -> dict[str, DomainSettings]:
    """The settings of every source in `sources`, those of `default` filled in.

    Raises:
        InputError: the file cannot be read, is not such YAML, or has an entry for something that is no test
            source, an unknown field, or a value of the wrong kind.
    """
    where = f"--domain_config {path}"
    document = read_yaml(path, "--domain_config")
    if not isinstance(document, dict):
        raise InputError(
            f"{where}: found {_shown(document)}, expected entries such as {DEFAULT}: and a source's"
        )
    for name in document:
        if name != DEFAULT and name not in sources:
            raise InputError(f"{where}: entry {name!r} is no test source; {nearest(str(name), sources)}")
    entries = {name: _settings(f"{where}: {name}", fields) for name, fields in document.items()}
    default = entries.get(DEFAULT, {})
    found = {}
    for source in sources:
        own = entries.get(source, {})
        inherited = {name: value for name, value in default.items() if not _replaced(name, own)}
        found[source] = DomainSettings(**inherited | own)
    return found


def _settings(where: str, fields: object) -> dict[str, Any]:
    """The checked fields of one entry."""
    if fields is None:  # an entry whose fields are all commented out
        return {}
    if not isinstance(fields, dict):
        raise InputError(f"{where}: found {_shown(fields)}, expected fields such as beta: 1")
    found = {}
    for name, value in fields.items():
        if name not in _READ:
            raise InputError(f"{where}: no field {name!r}; {nearest(str(name), _READ)}")
        read, expected = _READ[name]
        try:
            found[name] = read(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: {name} is {_shown(value)}, expected {expected}") from error
    if ("search_scale" in found) != ("search_step" in found):
        raise InputError(f"{where}: search_scale and search_step go together, found one of them")
    if "search_scale" in found and found.keys() & {"beta", "gamma"}:
        raise InputError(f"{where}: search_scale says what beta and gamma to try, expected it without them")
    if "search_step" in found and math.prod(found["search_step"]) > MOST_STEPS:
        raise InputError(
            f"{where}: search_step is {list(found['search_step'])}, expected {MOST_STEPS} candidates at most"
        )
    return found


def _replaced(name: str, own: dict[str, Any]) -> bool:
    """Whether a domain's own fields leave a field of the default without meaning."""
    if name in ("search_scale", "search_step"):
        return bool(own.keys() & {"beta", "gamma"})
    return name in ("beta", "gamma") and "search_scale" in own


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())  # a few aliases can stand for gigabytes


def _number(number: Number, value: Any) -> int | float:
    if value not in number:
        raise ValueError
    return number.kind(value)


def _some(name: str) -> tuple[Callable, str]:
    """What reads one value of a field of `Routing`, or a list of different ones; and what is expected."""
    number = reader(Routing, name)

    def several(value: object) -> tuple:
        found = tuple(_number(number, each) for each in (value if isinstance(value, list) else [value]))
        if not found or len(set(found)) < len(found):
            raise ValueError
        return found

    return several, f"{number.describe()}, or a list of different ones"


def _trims(value: object) -> tuple[Trim, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError
    return tuple(parse_trim(text) for text in value)


def _pair(number: Number) -> Callable:
    def both(value: object) -> tuple:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError
        return _number(number, value[0]), _number(number, value[1])

    return both


_TRIMS = "a list such as [qkv:-1:0.5] of NAME:BLOCK:KEEP with a fraction KEEP in (0, 1]"
_READ = {
    "beta": _some("beta"),
    "gamma": _some("gamma"),
    "top_k": _some("top_k"),
    "route_epsilon": _some("epsilon"),
    "trim": (_trims, _TRIMS),
    "search_scale": (_pair(nonnegative), "[largest beta, largest gamma], numbers of at least 0"),
    "search_step": (_pair(positive_int), "[steps of beta, steps of gamma], positive integers"),
    "candidate_pool": (_trims, _TRIMS),
}
