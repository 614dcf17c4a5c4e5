"""Settings of meta-tuning: its length, learning rate and method. Knows no tensors."""

import dataclasses

from amt.models.head_settings import TRAINED
from meta_dataset_readers.settings import setting

METHODS = ("adsv", "querying", "standard")
LOSSES = ("features",)
MOST_RATE = 1000


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """How the pool is trained; the robustness levels are the pool's own. The flags' help says the rest.

    Args:
        episodes_per_step: divides `episodes_per_epoch`.
        lr, warmup_lr, min_lr, warmup_epochs: cosine schedule, constant within an epoch, linear warm-up.
        method: see amt/training/meta_tune.py.
        clip_grad, epsilon_from, loss, head: None for none, the level's own, the method's own, prototypes.
        epsilon_warmup: the step size grows with it.
        loss: "features" needs an adversary.
        seed: decides the attacks' random starts, together with the episode's number and the level.

    >>> TuneSettings(method="standard").adversarial
    False
    """

    epochs: int = setting(30, "passes of nEpisode episodes per source", least=1, most=10**6)
    episodes_per_epoch: int = 2000
    episodes_per_step: int = setting(
        1,
        "episodes whose gradients a step averages; more than one lets more processes share the work (ours)",
        metavar="B",
        least=1,
        most=1000,
    )
    lr: float = setting(5e-4, "learning rate after the warm-up", least=0, most=MOST_RATE)
    warmup_epochs: int = setting(5, "epochs of linear warm-up", least=0, most=10**6)
    warmup_lr: float = setting(1e-6, "rate the warm-up starts from", least=0, most=MOST_RATE)
    min_lr: float = setting(1e-6, "rate the cosine ends at", least=0, most=MOST_RATE)
    momentum: float = setting(0.9, "momentum of SGD", least=0, most=1)
    method: str = setting(
        "adsv",
        "adsv: AMT's two perturbations; querying: adversarial querying, only the query images are attacked, "
        "by plain PGD (its authors: --epsilon 8 --alpha 2 --attack_iters 7); standard: plain meta-tuning, "
        "without an adversary (the published default, presumably a slip) "
        "(default: adsv; with --tune full standard)",
        flag="pgd_method",
        choices=METHODS,
    )
    clip_grad: float | None = setting(None, "largest gradient norm of a level (ours)", above=0, most=10**6)
    epsilon_warmup: int = setting(0, "episodes over which epsilon grows from 0 (ours)", least=0, most=10**9)
    epsilon_from: float | None = setting(
        None,
        "draw each episode's epsilon uniformly from this to the level's, the step size in proportion (ours) "
        "(default: always the level's)",
        least=0,
        most=10**6,
    )
    loss: str | None = setting(
        None,
        "features: unsupervised, attacked features stay near the clean ones of the pretrained network (FARE, "
        "Schlarmann et al. 2024), attacked as --pgd_method says, then querying by default; adsv moves the "
        "weights as well (default: that of the method, by labels)",
        choices=LOSSES,
    )
    head: str | None = setting(
        None,
        "what classifies the queries in training, with gradients, and in its validation, fitted to the "
        "support (default: prototypes)",
        choices=TRAINED,
    )
    seed: int = 0

    @property
    def adversarial(self) -> bool:
        """Whether anything is attacked in training."""
        return self.method != "standard"
