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

from meta_dataset_readers.lazy import imported_when_used

if TYPE_CHECKING:
    from amt.attacks.evaluation import attack_queries as attack_queries
    from amt.attacks.evaluation import attack_support as attack_support
    from amt.attacks.kinds import Attack as Attack
    from amt.attacks.kinds import parse_attack as parse_attack
    from amt.attacks.levels import Perturbation as Perturbation
    from amt.attacks.perturb import pgd as pgd
    from amt.evaluation.evaluate import evaluate as evaluate
    from amt.evaluation.settings import Deployment as Deployment
    from amt.few_shot.classifier import FewShotClassifier as FewShotClassifier
    from amt.files.pretrained import load_network as load_network
    from amt.models.network import Network as Network
    from amt.models.network import features as features
    from amt.models.pool import Pool as Pool
    from amt.models.pool import principal_pool as principal_pool
    from amt.models.trim import Trim as Trim
    from amt.tasks.merge import route as route
    from amt.tasks.settings import Routing as Routing
    from amt.training.settings import TuneSettings as TuneSettings
    from amt.training.tuner import Tuner as Tuner
    from amt.training.tuner import meta_tune as meta_tune
    from meta_dataset_readers.protocol import EpisodeSampling as EpisodeSampling
    from meta_dataset_readers.reader import EpisodeReader as EpisodeReader

__all__, __getattr__, __dir__ = imported_when_used(
    __name__,
    {
        "amt.attacks.evaluation": ("attack_queries", "attack_support"),
        "amt.attacks.kinds": ("Attack", "parse_attack"),
        "amt.attacks.levels": ("Perturbation",),
        "amt.attacks.perturb": ("pgd",),
        "amt.evaluation.evaluate": ("evaluate",),
        "amt.evaluation.settings": ("Deployment",),
        "amt.few_shot.classifier": ("FewShotClassifier",),
        "amt.files.pretrained": ("load_network",),
        "amt.models.network": ("Network", "features"),
        "amt.models.pool": ("Pool", "principal_pool"),
        "amt.models.trim": ("Trim",),
        "amt.tasks.merge": ("route",),
        "amt.tasks.settings": ("Routing",),
        "amt.training.tuner": ("Tuner", "meta_tune"),
        "amt.training.settings": ("TuneSettings",),
        "meta_dataset_readers.protocol": ("EpisodeSampling",),
        "meta_dataset_readers.reader": ("EpisodeReader",),
    },
)
