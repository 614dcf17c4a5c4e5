"""From typed settings to a predictor: how the pool becomes a classifier on one domain, and who decided that.

    coefficients         given, or uniform, or a router's (amt/tasks/merge.py), or of the best single adapter
    weights              merged and trimmed (amt/models/lora.py), or the soup of the factors
    settings in between  as given, or chosen (amt/evaluation/select.py)
    test-time tuning     amt/tasks/finetune.py

Knows no flags and no files; where episodes to choose on come from is an argument.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from amt.attacks.evaluation import Attack
from amt.evaluation.select import (
    PUBLISHED_EPISODES,
    PUBLISHED_SEED,
    Candidate,
    merged_networks,
    names,
    select,
    selection_attacks,
    support_predictor,
    trim_name,
)
from amt.evaluation.settings import Deployment
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.weights import Coefficients
from amt.tasks.classifier import Predictor, merged_predictor, pretrained_predictor
from amt.tasks.finetune import finetuned_predictor
from amt.tasks.merge import average_of, kept_members, route, soup, uniform
from amt.tasks.settings import Finetuning, Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError

STAMP = (
    "settings chosen on labelled episodes of the split that is scored (published protocol, for comparison "
    "only): the accuracies flatter the method"
)

# (source, split, number of episodes, seed or None for that of the run) -> episodes, as often as iterated
OpenEpisodes = Callable[[str, str, int, int | None], Iterable[Episode]]
# (episodes, title) -> the same, on the backbone's device, with a progress line if wanted
Progress = Callable[[Iterable[Episode], str], Iterable[Episode]]


def check_deployment(
    deployment: Deployment,
    pool: Pool | None,
    source: str,
    open_episodes: OpenEpisodes,
    where: str = "the pretrained network",
) -> None:
    """Raise an `InputError` for settings that do not fit the pool or the domain; reads no episode.

    Args:
        where: what holds the pool, for the message.
    """
    if pool is None:
        return
    if deployment.single and len(pool) > 1:
        raise InputError(f"--deploy vanilla takes a single adapter, {where} holds {len(pool)}: merge-vanilla")
    beyond = [p for p in deployment.experts or () if p >= len(pool)]
    if beyond:
        raise InputError(f"--specified_expert {beyond[0]}: {where} holds adapters 0 to {len(pool) - 1}")
    if deployment.coefficients is not None and len(deployment.coefficients) != len(pool):
        raise InputError(
            f"--coefficients has {len(deployment.coefficients)} values, {where} holds {len(pool)} adapters"
        )
    check_trims((*deployment.trims, *deployment.trim_candidates), pool)
    if deployment.finetune is not None:
        one = not any(isinstance(each, Routing) for each in _candidates(deployment, pool))
        if not one or deployment.select == "support":
            raise InputError(
                "--deploy finetune starts every task from one network: choose it by --specified_expert, "
                "--coefficients, --routing uniform or soup, or --routing best with --select valid"
            )
    if _chooses(deployment, pool) and deployment.select == "valid":
        on = deployment.select_on or source
        try:
            open_episodes(on, "VALID", deployment.select_episodes, None)
        except InputError as error:
            if deployment.select_on is not None:
                raise
            raise InputError(
                f"--select valid has nothing to choose on for {source}: {error}; --select_on SOURCE takes "
                "another source's VALID, --select support needs none"
            ) from error


def check_trims(trims: Iterable[Trim], pool: Pool) -> None:
    """Raise an `InputError` unless every trimming selects some layers, and such as members differ in."""
    matrices = {name for name, shape in pool.shapes.items() if len(shape) == 2 and name in pool.adapted}
    for trim in trims:
        selected = {name for name in pool.shapes if trim.selects(name)}
        if not selected or not selected <= matrices:
            raise InputError(
                f"--trim {trim_name(trim)}: no such layer with adapters; "
                "expected for example qkv, proj, fc1 or fc2, and the number of a block or -1 for all"
            )


def deploy(
    network: Network,
    pool: Pool | None,
    deployment: Deployment,
    source: str,
    open_episodes: OpenEpisodes,
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    progress: Progress = lambda episodes, title: episodes,
) -> tuple[Predictor, dict]:
    """The predictor for one domain, and in plain values how it came about.

    Whatever is chosen beforehand is chosen here, so this may read and attack episodes. `check_deployment` has
    passed.

    Args:
        pool: on the backbone's device; None: the pretrained network.
        source: the domain.
        attacks: of the evaluation; choosing on VALID episodes uses `select.selection_attacks` of them.
        seed: of the evaluation.

    Returns:
        The predictor, and a dictionary of "how" in words, and where there is such a thing "epsilons",
        "coefficients", "routing", "trims", "candidates" with their scores, and "stamp": what has to be
        printed beside every result.
    """
    if pool is None:
        return _pretrained(network, deployment, seed)
    candidates, trims = _candidates(deployment, pool), deployment.trims
    served = soup(pool) if _stewed(deployment, pool) else pool
    about: dict = {"epsilons": [level.epsilon for level in pool.levels]}
    by, by_trim = "as given", "as given"
    if _chooses(deployment, pool) and deployment.select != "support":
        split, n, own_seed = _choosing_on(deployment)
        on = source if deployment.select == "published" else deployment.select_on or source
        tried = () if deployment.select == "published" else selection_attacks(attacks)
        found = select(
            network,
            served,
            candidates,
            lambda: progress(open_episodes(on, split, n, own_seed), f"choosing on {on} {split}"),
            tried,
            trims,
            deployment.trim_candidates,
            seed if own_seed is None else own_seed,
            halving=deployment.select == "valid",
        )
        by = _chosen_on(deployment, on, tried)
        by_trim = f"(the last one {by})" if found.trims else by_trim
        candidates, trims = candidates[found.candidate : found.candidate + 1], (*trims, *found.trims)
        about["candidates"] = [list(score) for score in found.scores]
        about |= {"stamp": STAMP} if deployment.select == "published" else {}
    about["trims"] = [dataclasses.asdict(trim) for trim in trims]
    if _chooses(deployment, pool) and deployment.select == "support":
        epsilon, offered = deployment.support_epsilon, deployment.trim_candidates
        predict = support_predictor(network, served, candidates, trims, offered, epsilon, seed=seed)
        how = _chosen_by_support(deployment, candidates)
        about["candidates"] = [[name, None] for name in names(candidates)]
    else:
        (candidate,) = candidates
        predict = _settled(network, served, candidate, trims, deployment.finetune, seed)
        how = _how(deployment, pool, candidate, by)
        if isinstance(candidate, Routing):
            about["routing"] = dataclasses.asdict(candidate)
        else:
            about["coefficients"] = list(candidate)
    if _stewed(deployment, pool):
        about["coefficients"], predict = list(uniform(pool)), _sharing(predict, uniform(pool))
    how += f"; trimmed {', '.join(map(trim_name, trims))} {by_trim}" if trims else ""
    return predict, {"how": how + _tuned(deployment), **about}


def as_decided(deployment: Deployment, about: Mapping) -> Deployment:
    """The deployment that makes the predictor of an earlier `deploy` again, without choosing once more.

    Args:
        about: what `deploy` said of the predictor, as read back from JSON.

    Raises:
        InputError: it says nothing of the kind.
    """
    if deployment.select not in ("valid", "published") or "candidates" not in about:
        return deployment
    try:
        trims = tuple(Trim(**trim) for trim in about["trims"])
        settled = dataclasses.replace(deployment, select="none", trims=trims, trim_candidates=())
        if "routing" in about:
            return dataclasses.replace(settled, routings=(Routing(**about["routing"]),))
        if deployment.routing == "best":
            return dataclasses.replace(settled, coefficients=tuple(about["coefficients"]))
        return settled
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"merging.json is damaged: it does not say what was chosen ({error!r})") from error


def _pretrained(network: Network, deployment: Deployment, seed: int) -> tuple[Predictor, dict]:
    """The pretrained network, tuned to each task if asked for."""
    predict = pretrained_predictor(network)
    if deployment.finetune is not None:
        predict = finetuned_predictor(network, network.weights, 10.0, 0.0, deployment.finetune, seed)
    return predict, {"how": "none, the pretrained network" + _tuned(deployment)}


def _settled(
    network: Network,
    pool: Pool,
    candidate: Candidate,
    trims: Sequence[Trim],
    finetune: Finetuning | None,
    seed: int,
) -> Predictor:
    """The predictor when nothing is left to choose."""
    if finetune is not None:  # from one network, see `check_deployment`
        start = merged_networks(pool, [candidate])((candidate, tuple(trims)))
        return _sharing(finetuned_predictor(network, *start, finetune, seed), candidate)
    if isinstance(candidate, Routing):
        choose = partial(route, network, pool, routing=candidate, members=kept_members(pool))
        return merged_predictor(network, pool, choose, trims, seed)
    return merged_predictor(network, pool, lambda *_: candidate, trims, seed)


def _sharing(predict: Predictor, coefficients: Coefficients) -> Predictor:
    """The same predictor, whose tasks say that the adapters have these shares."""
    return lambda episode: predict(episode)._replace(coefficients=coefficients)


def _candidates(deployment: Deployment, pool: Pool) -> tuple[Candidate, ...]:
    """What there is to choose from: several, or the one thing that is settled."""
    if deployment.experts is not None:
        return (average_of(pool, deployment.experts),)
    if deployment.coefficients is not None:
        return (deployment.coefficients,)
    if len(pool) == 1 or deployment.routing == "soup":
        return ((1.0,),)
    if deployment.routing == "uniform":
        return (uniform(pool),)
    if deployment.routing == "best":
        return tuple(average_of(pool, [p]) for p in range(len(pool)))
    return deployment.routings


def _stewed(deployment: Deployment, pool: Pool) -> bool:
    given = deployment.experts is not None or deployment.coefficients is not None
    return deployment.routing == "soup" and not given and len(pool) > 1


def _chooses(deployment: Deployment, pool: Pool) -> bool:
    """Whether there is something to choose, and a way to."""
    several = len(_candidates(deployment, pool)) > 1 or deployment.trim_candidates
    return deployment.select != "none" and bool(several)


def _choosing_on(deployment: Deployment) -> tuple[str, int, int | None]:
    """Split, number and seed of the episodes that `select` is shown."""
    if deployment.select == "published":
        return deployment.split, PUBLISHED_EPISODES, PUBLISHED_SEED
    return "VALID", deployment.select_episodes, None


def _chosen_on(deployment: Deployment, on: str, tried: Sequence[Attack]) -> str:
    if deployment.select == "published":
        return "chosen on labelled test episodes (published protocol)"
    columns = [column for attack in tried for column in attack.columns]
    under = f" under {', '.join(columns)}" if columns else ""
    return f"chosen on {deployment.select_episodes} VALID episodes of {on}{under}"


def _chosen_by_support(deployment: Deployment, candidates: Sequence[Candidate]) -> str:
    what = "single adapters" if deployment.routing == "best" else "settings"
    offered = [f"one of {len(candidates)} {what}"] if len(candidates) > 1 else []
    trimmings = len(deployment.trim_candidates)
    offered += [f"at most one of {trimmings} trimmings"] if trimmings else []
    epsilon = deployment.support_epsilon
    attacked = f", its images attacked within {epsilon:g}/255" if epsilon > 0 else ""
    return (
        f"{deployment.routing}, {' and '.join(offered)} chosen for every task by leave-one-out on its "
        f"support set{attacked}"
    )


def _how(deployment: Deployment, pool: Pool, candidate: Candidate, by: str) -> str:
    """In words: what merges, and how that was decided."""
    if isinstance(candidate, Routing):
        top = f", top {candidate.top_k}" if candidate.top_k != Routing.top_k else ""
        knob = f", route_epsilon {candidate.epsilon:g}" if candidate.epsilon > 0 else ""
        return f"amt, beta {candidate.beta:g} and gamma {candidate.gamma:g}{top}{knob} {by}"
    if _stewed(deployment, pool):
        return f"soup of the factors of {len(pool)} adapters"
    if deployment.routing == "best" and len(pool) > 1:
        return f"best single adapter, {names([candidate])[0]} {by}"
    return f"fixed coefficients {', '.join(f'{c:.3g}' for c in candidate)}"


def _tuned(deployment: Deployment) -> str:
    tuning = deployment.finetune
    return "" if tuning is None else f"; tuned to every task in {tuning.steps} steps of {tuning.lr:g}"
