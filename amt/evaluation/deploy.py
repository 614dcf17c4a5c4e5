"""From settings to a predictor: how a pool is deployed on one domain, and a note of how that was decided.

    coefficients         given, or uniform, or a router's (amt/tasks/merge.py), or of the best single adapter
    weights              merged and trimmed (amt/models/pool.py), or the soup of the factors
    settings in between  as given, or chosen (amt/evaluation/select.py)
    test-time tuning     amt/tasks/finetune.py
    head                 amt/models/heads.py, fitted to each task

Knows no flags and no files; a function that opens episodes to choose on is an argument.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from amt.attacks.kinds import Attack
from amt.evaluation.needs import check_trims
from amt.evaluation.oracle import STAMP as ORACLE_STAMP
from amt.evaluation.oracle import simplex_grid
from amt.evaluation.select import (
    PUBLISHED_EPISODES,
    PUBLISHED_SEED,
    Candidate,
    Selection,
    candidate_names,
    select,
    selection_attacks,
    support_predictor,
)
from amt.evaluation.settings import Deployment
from amt.files import text_prototypes
from amt.models.head_settings import Head
from amt.models.heads import PoolStatistics
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.weights import Coefficients
from amt.tasks.classifier import (
    Fitter,
    Predictor,
    fixed_predictor,
    head_classifier,
    merged_networks,
    merged_predictor,
    mixed_in,
    pretrained,
)
from amt.tasks.finetune import finetuned_predictor
from amt.tasks.merge import average_of, kept_members, route, soup, uniform
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode
from meta_dataset_readers.errors import InputError, damaged

STAMP = (
    "settings chosen on labelled episodes of the split that is scored (published protocol, for comparison "
    "only): the accuracies flatter the method"
)

# (source, split, number of episodes, seed or None for that of the run) -> episodes, as often as iterated
OpenEpisodes = Callable[[str, str, int, int | None], Iterable[Episode]]
# (episodes, title) -> the same, on the network's device, with a progress line if wanted
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
    check_fit(deployment, pool, where)
    if deployment.select != "valid" or (on := chosen_on(deployment, pool, source)) is None:
        return
    try:
        open_episodes(*on, deployment.select_episodes, None)
    except InputError as error:
        if deployment.select_on is not None:
            raise
        raise InputError(
            f"--select valid has nothing to choose on for {source}: {error}; --select_on SOURCE takes "
            "another source's VALID, --select support needs none"
        ) from error


def chosen_on(deployment: Deployment, pool: Pool | None, source: str) -> tuple[str, str] | None:
    """The source and the split of the labelled episodes that settings for a domain are chosen on, if any."""
    return labelled(deployment, source) if pool is not None and _chooses_once(deployment, pool) else None


def labelled(deployment: Deployment, source: str) -> tuple[str, str]:
    """The source and the split whose labels a domain may choose settings by."""
    if deployment.select == "published":
        return source, deployment.split
    return deployment.select_on or source, "VALID"


def check_fit(deployment: Deployment, pool: Pool, where: str) -> None:
    """Raise an `InputError` for settings that do not fit the pool that `where` holds."""
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
    routings = [each for each in candidates_of(deployment, pool) if isinstance(each, Routing)]
    for routing in routings:
        if routing.top_k > len(pool):
            raise InputError(f"--top_k {routing.top_k}: {where} holds {len(pool)} adapters")
    if deployment.finetune is not None and (routings or deployment.select == "support"):
        raise InputError(
            "--deploy finetune starts every task from one network: choose it by --specified_expert, "
            "--coefficients, --routing uniform or soup, or --routing best with --select valid"
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
    note: Mapping | None = None,
    statistics: PoolStatistics | None = None,
    texts: text_prototypes.TextPrototypes | None = None,
) -> tuple[Predictor | tuple[Predictor, ...], dict]:
    """The predictor for one domain, and the note of how its settings were decided, in plain values.

    `check_deployment` has passed. Without `note` this may read and attack episodes to choose settings.

    Args:
        pool: on the network's device; None: the pretrained network.
        source: the domain.
        attacks: of the evaluation; choosing on VALID episodes uses `select.selection_attacks` of them.
        seed: of the evaluation.
        note: of an earlier call, as read back from JSON: what it chose is not chosen again.
        statistics: of the pool, for heads that need them, on the network's device.
        texts: of the classes, for heads that mix those in.

    Returns:
        The predictor, or for routing "oracle" one for each mixture, and a dictionary of "how" in words, and
        where they apply "epsilons", "coefficients", "routing", "trims", "candidates" with their scores,
        "curve" with their clean and robust accuracies, "tuned_on", and "stamp": a warning to print beside
        every result.

    Raises:
        InputError: `note` does not say what was chosen.
    """
    fitters = _fitters(network, pool, deployment, statistics, seed=seed, texts=texts)
    if note is None and pool is not None:
        choose = partial(
            _choose, network, pool, deployment, source, open_episodes, attacks, seed, progress, fitters
        )
        note = _decide(pool, deployment, choose)
    note = _pretrained_note(deployment) if note is None else note
    if pool is not None and _chooses_once(deployment, pool):
        deployment = _settled(deployment, note)
    (head,) = deployment.offered_heads
    if pool is not None and deployment.routing == "oracle":
        return _oracle(network, pool, deployment, fitters[head.name]), dict(note)
    return _predictor(network, pool, deployment, seed, fitters[head.name]), dict(note)


def _fitters(
    network: Network, pool: Pool | None, deployment: Deployment, statistics: PoolStatistics | None, **known
) -> dict[str, Fitter]:
    """What fits each offered head, by the head's name."""
    if statistics is not None and pool is not None and _averages_factors(deployment, pool):
        statistics = statistics.averaged()

    def fitter(head: Head) -> Fitter:
        if head == Head():
            return head_classifier
        second = mixed_in(network, pool, head)
        return partial(head_classifier, head=head, statistics=statistics, second=second, **known)

    return {head.name: fitter(head) for head in deployment.offered_heads}


def earlier_note(
    source: str, deployments: Mapping[str, Deployment], notes: Mapping[str, dict]
) -> dict | None:
    """The earlier note that applies to a domain: its own, or that of another domain with the same deployment
    that chooses on the same VALID episodes.

    Args:
        deployments: by domain.
        notes: of `deploy`, by domain, so far.
    """
    same = [
        other
        for other, each in deployments.items()
        if each == deployments[source] and each.select == "valid" and each.select_on is not None
    ]
    return next((notes[each] for each in (source, *same) if each in notes), None)


def candidates_of(deployment: Deployment, pool: Pool) -> tuple[Candidate, ...]:
    """The candidates to choose from; only one if there is no choice."""
    if deployment.experts is not None:
        return (average_of(pool, deployment.experts),)
    if deployment.coefficients is not None:
        return (deployment.coefficients,)
    if len(pool) == 1 or deployment.routing == "soup":
        return ((1.0,),)
    if deployment.routing == "uniform":
        return (uniform(pool),)
    if deployment.routing == "oracle":
        return simplex_grid(len(pool), deployment.oracle_parts)
    if deployment.routing == "best":
        return tuple(average_of(pool, [p]) for p in range(len(pool)))
    return deployment.routings


def _oracle(network: Network, pool: Pool, deployment: Deployment, fitter: Fitter) -> tuple[Predictor, ...]:
    """A predictor for each mixture of the grid; the merged networks are not kept."""
    merged = merged_networks(pool)

    def predictor(coefficients: Coefficients) -> Predictor:
        return lambda episode: fitter(network, merged(coefficients, deployment.trims), episode, coefficients)

    return tuple(predictor(each) for each in candidates_of(deployment, pool) if not isinstance(each, Routing))


def _averages_factors(deployment: Deployment, pool: Pool) -> bool:
    given = deployment.experts is not None or deployment.coefficients is not None
    return deployment.routing == "soup" and not given and len(pool) > 1


def _chooses(deployment: Deployment, pool: Pool) -> bool:
    """Whether there are several candidates, and a way to choose."""
    several = len(candidates_of(deployment, pool)) > 1 or deployment.trim_candidates
    several = several or len(deployment.offered_heads) > 1
    return deployment.select != "none" and bool(several)


def _chooses_once(deployment: Deployment, pool: Pool) -> bool:
    """Whether settings are chosen for the domain as a whole, and not by every task's support set."""
    return deployment.select != "support" and _chooses(deployment, pool)


def _predictor(
    network: Network, pool: Pool | None, deployment: Deployment, seed: int, fitter: Fitter
) -> Predictor:
    """The predictor when nothing is left to choose, or every task chooses."""
    merged, shares = pretrained(network), ()
    if pool is not None:
        candidates, trims = candidates_of(deployment, pool), deployment.trims
        soup_shares = uniform(pool) if _averages_factors(deployment, pool) else None
        members = soup(pool) if soup_shares else pool
        if deployment.select == "support" and _chooses(deployment, pool):
            offered, epsilon = deployment.trim_candidates, deployment.support_epsilon
            predict = support_predictor(network, members, candidates, trims, offered, epsilon, seed, fitter)
            if soup_shares is None:
                return predict
            return lambda episode: predict(episode)._replace(coefficients=soup_shares)
        (candidate,) = candidates
        if isinstance(candidate, Routing):
            choose = partial(route, network, pool, routing=candidate, members=kept_members(pool))
            return merged_predictor(network, pool, choose, trims, seed, fitter)
        merged, shares = merged_networks(members)(candidate, trims), soup_shares or candidate
    if deployment.finetune is not None:
        return finetuned_predictor(network, merged, deployment.finetune, seed, shares, fitter)
    return fixed_predictor(network, merged, shares, fitter)


def _settled(deployment: Deployment, note: Mapping) -> Deployment:
    """The deployment with what a note says was chosen, so that nothing is left to choose."""
    fault = "merging.json is damaged: it does not say what was chosen"
    with damaged(fault, (KeyError, TypeError, ValueError), said=repr):
        trims = tuple(Trim(**trim) for trim in note["trims"])
        settled = dataclasses.replace(deployment, select="none", trims=trims, trim_candidates=())
        if len(deployment.offered_heads) > 1:
            settled = dataclasses.replace(settled, heads=(Head(**note["head"]),))
        if "routing" in note:
            return dataclasses.replace(settled, routings=(Routing(**note["routing"]),))
        if deployment.routing == "best":
            return dataclasses.replace(settled, coefficients=tuple(note["coefficients"]))
        return settled


def _pretrained_note(deployment: Deployment) -> dict:
    """The note of the pretrained network, where nothing is to choose."""
    (head,) = deployment.offered_heads
    how = f"none, the pretrained network{_tuning_words(deployment)}"
    return {"how": how + _head_words(head, "as given")} | _head_note(deployment, head)


def _decide(pool: Pool, deployment: Deployment, choose: Callable[[], tuple[Selection, str]]) -> dict:
    """Choose what there is to choose for a domain; the note that `deploy` returns."""
    candidates, trims = candidates_of(deployment, pool), deployment.trims
    note: dict = {"epsilons": [level.epsilon for level in pool.levels]}
    by = by_trim = by_head = "as given"
    heads = {head.name: head for head in deployment.offered_heads}
    head = next(iter(heads.values()))
    if _chooses_once(deployment, pool):
        found, by = choose()
        candidates, trims = (candidates[found.candidate],), (*trims, *found.trims)
        by_trim = f"(the last one {by})" if found.trims else by_trim
        head, by_head = heads[found.head], by if len(heads) > 1 else by_head
        note["candidates"] = [list(score) for score in found.scores]
        note |= {"curve": [list(point) for point in found.curve], "tuned_on": by.removeprefix("chosen on ")}
        note |= {"stamp": STAMP} if deployment.select == "published" else {}
    note["trims"] = [dataclasses.asdict(trim) for trim in trims]
    if _chooses(deployment, pool) and deployment.select == "support":
        how = _support_words(deployment, candidates)
        note["candidates"] = [[name, None] for name in candidate_names(candidates)]
    elif deployment.routing == "oracle" and candidates[1:]:
        how = f"oracle, the best of {len(candidates)} mixtures for every task and column by its query labels"
        note |= {"stamp": ORACLE_STAMP, "tuned_on": "the query labels of every scored task"}
        note["candidates"] = [[name, None] for name in candidate_names(candidates)]
    else:
        (candidate,) = candidates
        how = _merging_words(deployment, pool, candidate, by)
        if isinstance(candidate, Routing):
            note["routing"] = dataclasses.asdict(candidate)
        else:
            note["coefficients"] = list(candidate)
    if _averages_factors(deployment, pool):
        note["coefficients"] = list(uniform(pool))
    how += f"; trimmed {', '.join(trim.name for trim in trims)} {by_trim}" if trims else ""
    return {
        "how": how + _tuning_words(deployment) + _head_words(head, by_head),
        **note,
        **_head_note(deployment, head),
    }


def _head_words(head: Head, by: str) -> str:
    return "" if head == Head() else f"; head {head.name} {by}"


def _head_note(deployment: Deployment, head: Head) -> dict:
    """The head, if one was asked for, and what it does without at one shot."""
    if deployment.heads is None:
        return {}
    at_one_shot = {"head_at_one_shot": head.one_shot_note} if head.one_shot_note else {}
    return {"head": dataclasses.asdict(head), **at_one_shot}


def _choose(
    network: Network,
    pool: Pool,
    deployment: Deployment,
    source: str,
    open_episodes: OpenEpisodes,
    attacks: Sequence[Attack],
    seed: int,
    progress: Progress,
    fitters: Mapping[str, Fitter],
) -> tuple[Selection, str]:
    """What is best on labelled episodes, and in words how it was chosen."""
    on, split = labelled(deployment, source)
    if deployment.select == "published":
        n, own_seed = PUBLISHED_EPISODES, PUBLISHED_SEED
        tried, by = (), "chosen on labelled test episodes (published protocol)"
    else:
        n, own_seed = deployment.select_episodes, None
        tried = selection_attacks(attacks)
        columns = [column for attack in tried for column in attack.columns]
        by = f"chosen on {n} VALID episodes of {on}" + (f" under {', '.join(columns)}" if columns else "")
        by += f" by {deployment.select_by} accuracy" if deployment.select_by != "mean" else ""
    found = select(
        network,
        soup(pool) if _averages_factors(deployment, pool) else pool,
        candidates_of(deployment, pool),
        lambda: progress(open_episodes(on, split, n, own_seed), f"choosing on {on} {split}"),
        tried,
        deployment.trims,
        deployment.trim_candidates,
        seed if own_seed is None else own_seed,
        halving=deployment.select == "valid",
        heads=fitters,
        by=deployment.select_by,
    )
    return found, by


def _support_words(deployment: Deployment, candidates: Sequence[Candidate]) -> str:
    what = "single adapters" if deployment.routing == "best" else "settings"
    offered = [f"one of {len(candidates)} {what}"] if len(candidates) > 1 else []
    if trimmings := len(deployment.trim_candidates):
        offered.append(f"at most one of {trimmings} trimmings")
    epsilon = deployment.support_epsilon
    attacked = f", its images attacked within {epsilon:g}/255" if epsilon > 0 else ""
    return (
        f"{deployment.routing}, {' and '.join(offered)} chosen for every task by leave-one-out on its "
        f"support set{attacked}"
    )


def _merging_words(deployment: Deployment, pool: Pool, candidate: Candidate, by: str) -> str:
    """What merges, and how that was decided."""
    if isinstance(candidate, Routing):
        top = f", top {candidate.top_k}" if candidate.top_k != Routing.top_k else ""
        attacked = f", route_epsilon {candidate.epsilon:g}" if candidate.epsilon > 0 else ""
        return f"amt, beta {candidate.beta:g} and gamma {candidate.gamma:g}{top}{attacked} {by}"
    if _averages_factors(deployment, pool):
        return f"soup of the factors of {len(pool)} adapters"
    if deployment.routing == "best" and len(pool) > 1:
        return f"best single adapter, {candidate_names([candidate])[0]} {by}"
    return f"fixed coefficients {', '.join(f'{c:.3g}' for c in candidate)}"


def _tuning_words(deployment: Deployment) -> str:
    tuning = deployment.finetune
    return "" if tuning is None else f"; tuned to every task in {tuning.steps} steps of {tuning.lr:g}"
