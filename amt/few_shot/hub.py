"""Classifiers on Hugging Face's hub, and in folders of the same layout, by the conventions of its mixins.

    config.json          the parameters of the constructor
    model.safetensors    a pool, or what was fitted
    README.md            the model card

Files come from the hub's own cache. Nothing waits for long where there is no network: what the cache has is
taken then, and otherwise one line says what to do.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from amt.evaluation.noted import NotedTrim
from amt.files import checkpoint
from amt.models.head_settings import Head
from amt.models.trim import Trim
from amt.models.weights import Weights
from meta_dataset_readers.errors import InputError, blaming, damaged, first_line, strerror
from meta_dataset_readers.files import read_json, replace_file
from meta_dataset_readers.json_fields import conform

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MESSAGE = "Push model using huggingface_hub."  # as its mixins have it
TIMEOUT = 10  # seconds, for the hub to say whether it is there
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_name(name: str) -> bool:
    """Whether a text has the form of a repository's name, ORG/NAME."""
    return _NAME.fullmatch(name) is not None


def fetch(
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **given: Any,
) -> Path:
    """The weights of a repository, in the cache; its config.json, if there is one, lies beside them.

    Args:
        name: ORG/NAME.
        revision, token, local_files_only, given: as of `huggingface_hub.hf_hub_download`.

    Raises:
        InputError: there is no such repository or revision, it holds no model.safetensors, or there is no
            network and no copy in the cache.
    """
    offline = "local_files_only is set" if local_files_only else _unreachable(name, revision, token)
    given |= {"revision": revision, "token": token}
    if offline:
        given |= {"local_files_only": True, "force_download": False}
    _cached(name, CONFIG, given)  # a repository need not have one
    found = _cached(name, WEIGHTS, given)
    if found is not None:
        return found
    if offline:
        raise InputError(
            f"{name}: no folder here, {offline}, and its cache has no copy; copy the repository's files into "
            "a folder, and name that"
        )
    raise InputError(f"{name}: that repository holds no {WEIGHTS}, which save_pretrained writes")


def _unreachable(name: str, revision: str | None, token: str | bool | None) -> str:
    """Why the hub does not answer, "" if it does. Raises InputError if it has no such repository."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:  # a download would try for minutes
        huggingface_hub.HfApi(token=token).model_info(name, revision=revision, timeout=TIMEOUT)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            at = "" if revision is None else f" at revision {revision!r}"
            raise InputError(f"{name}: no folder here, and nothing on the hub{at}: {_said(error)}") from error
        return f"the hub fails ({_said(error)})"
    except Exception as error:  # of the hub's HTTP library, which has been exchanged more than once
        return f"the hub cannot be reached ({first_line(error)})"
    return ""


def _cached(name: str, file: str, given: dict) -> Path | None:
    """A file of a repository in the cache; None where there is none.

    Raises:
        InputError: the download fails.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(name, file, **given))
    except EntryNotFoundError:  # in the repository, or in the cache
        return None
    except Exception as error:  # of the hub's HTTP library, which has been exchanged more than once
        raise InputError(f"{name}: its {file} does not come from the hub: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What the hub says, in one line."""
    response = getattr(error, "response", None)
    known = "" if response is None else f"{response.status_code} "
    return known + (getattr(error, "server_message", None) or first_line(error))


class _Config(TypedDict, total=False):
    """The parameters of a classifier that config.json holds; other fields are left alone."""

    beta: float
    gamma: float
    top_k: int
    route_epsilon: float
    augment_probability: float
    coefficients: list[float] | str | None
    trims: list[NotedTrim]
    head: str | dict[str, Any] | None
    seed: int
    image_size: int | None
    arch: str | None


def parameters_beside(file: Path) -> dict[str, Any]:
    """The parameters in the config.json beside a file called model.safetensors; none where there is none.

    Raises:
        InputError: it cannot be read, or a parameter is of another kind.
    """
    config = file.with_name(CONFIG)
    if file.name != WEIGHTS or not config.is_file():
        return {}
    found = conform(str(config), read_json(config), _Config)
    known = {name: value for name, value in found.items() if name in _Config.__annotations__}
    if "trims" in known:
        known["trims"] = tuple(Trim(**trim) for trim in known["trims"])
    if isinstance(known.get("coefficients"), list):
        known["coefficients"] = tuple(known["coefficients"])
    if isinstance(known.get("head"), dict):
        with blaming(f"{config}: field 'head'", (TypeError, ValueError)):
            known["head"] = Head(**known["head"])
    return known


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a constructor that config.json has a place for, as JSON has them."""
    held = {name: parameters[name] for name in _Config.__annotations__ if name in parameters}
    held["trims"] = [dataclasses.asdict(trim) for trim in held.get("trims", ())]
    if not isinstance(held.get("coefficients"), str | None):
        held["coefficients"] = [float(share) for share in held["coefficients"]]
    if isinstance(held.get("head"), Head):
        held["head"] = dataclasses.asdict(held["head"])
    return held


def save(folder: Path, parameters: Mapping[str, Any], tensors: Weights, about: dict, card: str) -> None:
    """Write the three files into a folder, each in one step; a model card that is there stays.

    Args:
        parameters: of the constructor; those that config.json has a place for are written.
        tensors, about: of the weights' file, see `checkpoint.write`.
        card: the model card.

    Raises:
        InputError: the place cannot be written to.
    """
    with damaged(f"{folder}: no folder can be made there", OSError, strerror):
        folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, checkpoint.content(tensors, about))
    replace_file(folder / CONFIG, json.dumps(plain(parameters), indent=2, sort_keys=True) + "\n")
    if not (folder / CARD).exists():
        replace_file(folder / CARD, card)


def push(
    repo_id: str,
    folder: Path,
    commit_message: str = MESSAGE,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Put a folder into a repository, which is made if it is not there; the address of the commit.

    Raises:
        InputError: the hub cannot be reached, or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    except Exception as error:  # of the hub's HTTP library, which has been exchanged more than once
        raise InputError(f"{repo_id}: cannot be pushed to the hub: {_said(error)}") from error
