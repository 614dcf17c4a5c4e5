"""AMT: adversarial meta-tuning of vision transformers for robust few-shot classification.

A classifier of your own pictures, with labelled examples in one folder per class:

>>> import amt
>>> clf = amt.FewShotClassifier.from_pretrained("vit_mini_pool").fit("photos/support")
>>> clf.predict("photos/new").shape
(2,)

The method's own parts:

>>> network = amt.load_network("vit_mini")
>>> pool = amt.principal_pool(network.weights, rank=8, levels=[amt.Perturbation(epsilon=8, step_size=2)])

A name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from meta_dataset_readers.importing import imported

if TYPE_CHECKING:
    from amt.attacks.evaluation import attack_queries, attack_support
    from amt.attacks.kinds import Attack, parse_attack
    from amt.attacks.levels import Perturbation
    from amt.attacks.perturb import pgd
    from amt.evaluation.evaluate import evaluate
    from amt.evaluation.settings import Deployment
    from amt.few_shot.classifier import FewShotClassifier
    from amt.files.pretrained import load_network
    from amt.models.network import Network, features
    from amt.models.pool import LoRAPool, principal_pool
    from amt.models.trim import Trim
    from amt.tasks.merge import route
    from amt.tasks.settings import Routing
    from amt.training.meta_tune import Tuner, meta_tune
    from amt.training.settings import TuneSettings
    from meta_dataset_readers.protocol import EpisodeSampling
    from meta_dataset_readers.reader import EpisodeReader

_HOMES = {
    "Attack": "amt.attacks.kinds",
    "Deployment": "amt.evaluation.settings",
    "EpisodeReader": "meta_dataset_readers.reader",
    "EpisodeSampling": "meta_dataset_readers.protocol",
    "FewShotClassifier": "amt.few_shot.classifier",
    "LoRAPool": "amt.models.pool",
    "Network": "amt.models.network",
    "Perturbation": "amt.attacks.levels",
    "Routing": "amt.tasks.settings",
    "Trim": "amt.models.trim",
    "TuneSettings": "amt.training.settings",
    "Tuner": "amt.training.meta_tune",
    "attack_queries": "amt.attacks.evaluation",
    "attack_support": "amt.attacks.evaluation",
    "evaluate": "amt.evaluation.evaluate",
    "features": "amt.models.network",
    "load_network": "amt.files.pretrained",
    "meta_tune": "amt.training.meta_tune",
    "parse_attack": "amt.attacks.kinds",
    "pgd": "amt.attacks.perturb",
    "principal_pool": "amt.models.pool",
    "route": "amt.tasks.merge",
}

__all__ = [
    "Attack",
    "Deployment",
    "EpisodeReader",
    "EpisodeSampling",
    "FewShotClassifier",
    "LoRAPool",
    "Network",
    "Perturbation",
    "Routing",
    "Trim",
    "TuneSettings",
    "Tuner",
    "attack_queries",
    "attack_support",
    "evaluate",
    "features",
    "load_network",
    "meta_tune",
    "parse_attack",
    "pgd",
    "principal_pool",
    "route",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(imported(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
