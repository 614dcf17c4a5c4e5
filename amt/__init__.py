"""AMT: adversarial meta-tuning of vision transformers for robust few-shot classification.

    import amt
    network = amt.load_network("vit_mini")
    pool = amt.principal_pool(network.weights, rank=8, levels=[amt.Perturbation(epsilon=8, step_size=2)])

A name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amt.attacks.levels import Perturbation
    from amt.evaluation.evaluate import evaluate
    from amt.evaluation.settings import Deployment
    from amt.files.pretrained import load_network
    from amt.models.network import Network, features
    from amt.models.pool import FullPool, LoRAPool, principal_pool
    from amt.models.trim import Trim
    from amt.tasks.merge import route
    from amt.tasks.settings import Routing
    from amt.training.meta_tune import Tuner
    from amt.training.settings import TuneSettings
    from meta_dataset_readers.reader import EpisodeReader

_HOMES = {
    "Deployment": "amt.evaluation.settings",
    "EpisodeReader": "meta_dataset_readers.reader",
    "FullPool": "amt.models.pool",
    "LoRAPool": "amt.models.pool",
    "Network": "amt.models.network",
    "Perturbation": "amt.attacks.levels",
    "Routing": "amt.tasks.settings",
    "Trim": "amt.models.trim",
    "TuneSettings": "amt.training.settings",
    "Tuner": "amt.training.meta_tune",
    "evaluate": "amt.evaluation.evaluate",
    "features": "amt.models.network",
    "load_network": "amt.files.pretrained",
    "principal_pool": "amt.models.pool",
    "route": "amt.tasks.merge",
}

__all__ = [
    "Deployment",
    "EpisodeReader",
    "FullPool",
    "LoRAPool",
    "Network",
    "Perturbation",
    "Routing",
    "Trim",
    "TuneSettings",
    "Tuner",
    "evaluate",
    "features",
    "load_network",
    "principal_pool",
    "route",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
