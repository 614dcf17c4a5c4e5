"""Settings of how a pool is deployed on a domain, and the published search grid. Knows no tensors."""

import dataclasses

from amt.models.head_settings import Head
from amt.models.trim import Trim, read_trim
from amt.tasks.settings import Finetuning, Routing
from meta_dataset_readers.settings import setting

ROUTINGS = ("amt", "uniform", "soup", "best", "oracle")
CRITERIA = ("mean", "clean", "robust")
SELECTS = ("none", "valid", "support", "published")


@dataclasses.dataclass(frozen=True)
class Deployment:
    """How the pool is deployed on one domain.

    Args:
        routing: "amt": a router decides per task; "uniform": equal shares; "soup": the factors' averages
            (`merge.soup`); "best": the best single adapter, which has to be chosen;
            "oracle": no method, see `oracle.best_row`.
        oracle_parts: shares that the oracle tries are multiples of 1 / oracle_parts.
        coefficients: instead of `routing`, one number per adapter, of sum 1.
        experts: instead of either, the adapters to average.
        routings: the router's settings, or several to choose from; used with "amt" only.
        trims: trimmings of the merged weights.
        trim_candidates: trimmings of which selection may add one.
        select: "none"; "valid": on labelled VALID episodes; "support": for every task on its support set;
            "published": on labelled episodes of the scored split.
        select_on: the source whose VALID episodes "valid" uses; None: the domain's own.
        select_episodes: how many of them.
        select_by: the criterion, see `select.score_of`.
        support_epsilon: bound of the attack on the images that "support" leaves out, in 1/255; 0: none.
        split: the split that is scored.
        single: refuse a pool of several adapters.
        finetune: test-time fine-tuning of the one network that the settings above lead to.
        heads: what classifies, or several to choose from; None: prototypes.

    >>> Deployment(trims=(Trim("qkv", block=-1, keep=0.5),)).routing
    'amt'
    """

    routing: str = setting(
        "amt",
        "amt: the published scores; uniform: equal shares; soup: factors A and B averaged separately; "
        "best: the single adapter that --select finds best; oracle: the best shares for each task and "
        "column by its query labels, which is no method but shows what routing could gain",
        choices=ROUTINGS,
    )
    coefficients: tuple[float, ...] | None = setting(
        None, "one number per adapter, summing to 1", metavar="C", least=0
    )
    experts: tuple[int, ...] | None = setting(
        None, "plain average of these adapters", flag="specified_expert", metavar="P", least=0
    )
    routings: tuple[Routing, ...] = (Routing(),)
    trims: tuple[Trim, ...] = setting(
        (),
        "keep a fraction of the singular values of these layers; block -1 for all",
        flag="trim",
        read=read_trim,
        metavar="NAME:BLOCK:KEEP",
    )
    trim_candidates: tuple[Trim, ...] = setting(
        (), "trimmings of which --select may add one", read=read_trim, metavar="NAME:BLOCK:KEEP"
    )
    select: str = setting(
        "none",
        "choose beta, gamma and what has several values; valid: on labelled episodes of the domain's own "
        "VALID classes; support: for every task by leave-one-out on its support set; published: on 6 "
        "labelled episodes of the split that is scored, for comparison only",
        choices=SELECTS,
    )
    select_on: str | None = setting(
        None, "--select valid, but on VALID episodes of this source", metavar="SOURCE"
    )
    select_episodes: int = setting(
        40, "VALID episodes to choose on", flag="nSelectEpisode", least=1, most=10**7
    )
    select_by: str = setting(
        "mean",
        "criterion of --select valid; mean: of clean accuracy and those under attack; clean; or robust, the "
        "mean of those under attack",
        choices=CRITERIA,
    )
    oracle_parts: int = setting(
        4, "--routing oracle tries shares that are multiples of 1/N", least=1, most=20, metavar="N"
    )
    support_epsilon: float = 0.0
    split: str = setting("TEST", "classes to evaluate on", choices=("TRAIN", "VALID", "TEST"))
    single: bool = False
    finetune: Finetuning | None = None
    heads: tuple[Head, ...] | None = None

    @property
    def offered_heads(self) -> tuple[Head, ...]:
        """The heads to choose from; only one if there is no choice."""
        return self.heads or (Head(),)


def published_grid(
    scale: tuple[float, float], step: tuple[int, int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The published search: beta in 0.1 + i (s0 - 0.1) / n0 for i < n0, gamma in i s1 / n1 for i <= n1.

    Args:
        scale: (s0, s1), upper ends; beta's is left out.
        step: (n0, n1), numbers of steps.
    """
    (s0, s1), (n0, n1) = scale, step
    return tuple(0.1 + i * (s0 - 0.1) / n0 for i in range(n0)), tuple(i * s1 / n1 for i in range(n1 + 1))
