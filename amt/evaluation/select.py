"""Selection of how to merge a pool: the routing, the adapter, the trimming.

    select               once for a domain, on labelled episodes that are not scored (the published protocol
                         takes them from the split that is scored)
    support_predictor    anew for every task, from its support set alone

Candidates are routers' settings or fixed coefficients. What they share is computed once per episode: the
adapters' support features, the attacked or augmented views, and everything that follows from equal
coefficients. Knows no file, and does not know where episodes come from.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.kinds import WORST_CASE, Attack
from amt.evaluation.evaluate import measure
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.weights import Coefficients, Merged, stream
from amt.tasks.classifier import Classifier, Fitter, Predictor, head_classifier, merged_networks
from amt.tasks.leave_one_out import lowest_loss, new_trial
from amt.tasks.merge import Members, kept_members, route_each
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode

# The published protocol: the best accuracy on this many labelled episodes of the scored split.
PUBLISHED_EPISODES = 6
PUBLISHED_SEED = 1234

LEAST_EPISODES = 30  # that every candidate has seen before one is given up
_SELECTION_STEPS = 10  # of PGD, half as many as usually score

Candidate = Routing | Coefficients
Setting = tuple[Coefficients, tuple[Trim, ...], Fitter]
PROTOTYPES: Mapping[str, Fitter] = {"prototypes": head_classifier}


class Selection(NamedTuple):
    """The choice.

    Args:
        candidate: its number.
        head: the name of one of the offered heads.
        trims: one of the offered trimmings, or none.
        scores: every candidate's name and score in per cent, then those of the trimmings. The name says when
            a candidate was given up early; its score is then the mean until that episode.
        curve: of every candidate its name, clean and robust accuracy in per cent (the latter None where
            nothing was attacked) and the number of episodes: what each criterion would have chosen from.
    """

    candidate: int
    head: str
    trims: tuple[Trim, ...]
    scores: tuple[tuple[str, float], ...]
    curve: tuple[tuple[str, float, float | None, int], ...] = ()


class Score(NamedTuple):
    """What a candidate reached on one episode, in per cent.

    Args:
        value: by the criterion that chooses.
        clean: accuracy.
        robust: the mean over the columns under attack; None without one.
    """

    value: float
    clean: float
    robust: float | None


def score_of(row: Mapping, columns: Sequence[str], by: str = "mean") -> Score:
    """The score of an episode's row.

    Args:
        columns: accuracies of the row, clean the first.
        by: the criterion: "mean" of all columns, "clean" accuracy, or "robust", the mean of the others.

    Raises:
        ValueError: robust, and nothing was attacked.
    """
    clean, *attacked = (100 * row[column] for column in columns)
    robust = statistics.fmean(attacked) if attacked else None
    value = {"mean": statistics.fmean([clean, *attacked]), "clean": clean, "robust": robust}[by]
    if value is None:
        raise ValueError("the robust criterion needs an attack")
    return Score(value, clean, robust)


def candidate_names(candidates: Sequence[Candidate]) -> list[str]:
    """Names of candidates, as short as their differences allow."""
    routings = [candidate for candidate in candidates if isinstance(candidate, Routing)]
    vary = {name: len({getattr(r, name) for r in routings}) > 1 for name in ("top_k", "epsilon")}

    def name(candidate: Candidate) -> str:
        if isinstance(candidate, Routing):
            top = f", top {candidate.top_k}" if vary["top_k"] else ""
            attacked = f", route_epsilon {candidate.epsilon:g}" if vary["epsilon"] else ""
            return f"beta {candidate.beta:g}, gamma {candidate.gamma:g}{top}{attacked}"
        if max(candidate) == 1:
            return f"adapter {candidate.index(1)}"
        return f"coefficients {', '.join(f'{c:.3g}' for c in candidate)}"

    return [name(candidate) for candidate in candidates]


def candidate_coefficients(
    network: Network,
    pool: Pool,
    candidates: Sequence[Candidate],
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    members: Members | None = None,
) -> list[Coefficients]:
    """The coefficients that each candidate gives a task.

    Arguments as of `route`: support (S, 3, H, W), labels (S,).
    """
    routings = [candidate for candidate in candidates if isinstance(candidate, Routing)]
    routed = iter(())
    if routings:
        routed = iter(route_each(network, pool, support, labels, generator, routings, members))
    return [next(routed) if isinstance(each, Routing) else each for each in candidates]


def selection_attacks(attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """The attacks that candidates are compared under when `attacks` score: PGD at the same norms and radii,
    of at most 10 steps, on the losses of the default attack. More steps cost more and rank networks alike."""
    scoring = [attack for attack in attacks if attack.kind != "support"]
    steps = min(
        [_SELECTION_STEPS, *(attack.steps or _SELECTION_STEPS for attack in scoring if attack.kind == "pgd")]
    )
    radii: dict[str, set[float]] = {}
    for attack in scoring:
        radii.setdefault(attack.norm, set()).update(attack.epsilons)
    return tuple(
        Attack("pgd", tuple(sorted(found)), norm, steps, loss=WORST_CASE) for norm, found in radii.items()
    )


def select(
    network: Network,
    pool: Pool,
    candidates: Sequence[Candidate],
    episodes: Callable[[], Iterable[Episode]],
    attacks: Sequence[Attack] = (),
    trims: Sequence[Trim] = (),
    trim_candidates: Sequence[Trim] = (),
    seed: int = 0,
    halving: bool = True,
    heads: Mapping[str, Fitter] = PROTOTYPES,
    by: str = "mean",
) -> Selection:
    """Choose a candidate with a head, then whether one of the trimmings improves on none.

    The criterion is averaged over the episodes; of equally good candidates the first is taken. Shares that
    agree to a twentieth are evaluated once. With `halving`, those that lag behind are given up early
    (successive halving, Jamieson & Talwalkar 2016): after 30, 60, 120, ... episodes the better half of the
    distinct ones goes on, at least two to the end. Fewer than 30 would drop a good candidate for a few hard
    tasks. All that are compared have seen the same episodes.

    Args:
        episodes: gives labelled episodes on the network's device, the same at every call; none is kept, and
            they are asked for a second time if there are trimmings to choose from.
        attacks: on queries, tried in turn.
        trims: trimmings to apply in any case.
        trim_candidates: single trimmings to try, after `trims`, with the chosen candidate.
        seed: decides, with an episode's index, augmentation and the attacks' starts, as in evaluation.
        heads: by name; each is tried with each candidate.
        by: the criterion, see `score_of`.
    """
    merged, members = _networks(pool, candidates, trim_candidates), kept_members(pool)
    columns = ["clean", *(column for attack in attacks for column in attack.columns)]

    def score(episode: Episode, setting: Setting) -> Score:
        row = measure(lambda _: _classifier(network, merged, episode, setting), episode, attacks, seed).row
        return score_of(row, columns, by)

    def routed(episode: Episode) -> list[Setting]:
        generator = stream(seed, episode.index, 1)
        support, labels = episode.support, episode.support_labels
        found = candidate_coefficients(network, pool, candidates, support, labels, generator, members)
        return [(coefficients, tuple(trims), fitter) for coefficients in found for fitter in heads.values()]

    tried = _try(episodes(), routed, score, halving)
    best = _best(tried)
    candidate, head = best // len(heads), [*heads][best % len(heads)]
    names = _with_heads(candidate_names(candidates), heads)
    scores, curve = _named_scores(names, tried), _curve(names, tried)
    if not trim_candidates:
        return Selection(candidate, head, (), scores, curve)
    untrimmed = {index: setting for index, setting, _ in tried[best]}

    def trimmed(episode: Episode) -> list[Setting]:
        coefficients, always, fitter = untrimmed[episode.index]
        return [(coefficients, (*always, trim), fitter) for trim in trim_candidates]

    tried_trims = _try(episodes(), trimmed, score, halving)
    scores += _named_scores([f"trim {trim.name}" for trim in trim_candidates], tried_trims)
    best_trim = _best(tried_trims)
    improves = _mean(tried_trims[best_trim]) > _mean(tried[best])
    return Selection(candidate, head, (trim_candidates[best_trim],) if improves else (), scores, curve)


def support_predictor(
    network: Network,
    pool: Pool,
    candidates: Sequence[Candidate],
    trims: Sequence[Trim] = (),
    trim_candidates: Sequence[Trim] = (),
    epsilon: float = 0.0,
    seed: int = 0,
    fitter: Fitter = head_classifier,
) -> Predictor:
    """For every task: the candidate, then the trimming if it improves on none, of the least leave-one-out
    loss on the support set (amt/tasks/leave_one_out.py); merge, trim, prototypes.

    Each distinct merged network is compared once: shares that agree to a twentieth count as one.

    Args:
        trims, trim_candidates, seed: as for `select`.
        epsilon: bound, in 1/255, of an attack on the images left out; 0: they are clean.
        fitter: classifies under the chosen weights; they are compared by prototypes whatever it is.
    """
    merged, members = _networks(pool, candidates, trim_candidates), kept_members(pool)

    def predict(episode: Episode) -> Classifier:
        support, labels = episode.support, episode.support_labels
        trial = new_trial(network, support, labels, epsilon, stream(seed, episode.index, 4))

        def best(settings: Sequence[Setting]) -> Setting:
            if len(settings) == 1:
                return settings[0]
            return settings[lowest_loss(network, [partial(merged, *each[:2]) for each in settings], trial)[0]]

        generator = stream(seed, episode.index, 1)
        found = candidate_coefficients(network, pool, candidates, support, labels, generator, members)
        distinct: dict[Coefficients, Setting] = {}
        for coefficients in found:
            distinct.setdefault(_rounded(coefficients), (coefficients, tuple(trims), fitter))
        coefficients, always, _ = best(list(distinct.values()))
        offered = [always, *((*always, trim) for trim in trim_candidates)]
        chosen = best([(coefficients, each, fitter) for each in offered])
        return _classifier(network, merged, episode, chosen)

    return predict


def _networks(
    pool: Pool, candidates: Sequence[Candidate], trim_candidates: Sequence[Trim]
) -> Callable[..., Merged]:
    """Merged and trimmed networks; those of fixed coefficients are all kept, as every task needs them."""
    if any(isinstance(candidate, Routing) for candidate in candidates):
        return merged_networks(pool)
    return merged_networks(pool, kept=max(len(candidates), len(trim_candidates) + 1))


def _classifier(
    network: Network, merged: Callable[..., Merged], episode: Episode, setting: Setting
) -> Classifier:
    coefficients, trims, fitter = setting
    return fitter(network, merged(coefficients, trims), episode, coefficients)


def _with_heads(names: Sequence[str], heads: Mapping[str, Fitter]) -> list[str]:
    """A name for each candidate with each head, as short as their differences allow."""
    if len(heads) == 1:
        return list(names)
    return [f"{name}, {head}" if len(names) > 1 else head for name in names for head in heads]


def _rounded(coefficients: Coefficients) -> Coefficients:
    """Mixtures whose shares agree to a twentieth count as one."""
    return tuple(round(20 * c) / 20 for c in coefficients)


_Tried = list[tuple[int, Setting, Score]]  # of one candidate: an episode's index, and what it was there


def _mean(tried: _Tried) -> float:
    return statistics.fmean(score.value for *_, score in tried)


def _history(tried: _Tried) -> tuple:
    """Candidates of the same history cannot be told apart so far."""
    return tuple((_rounded(coefficients), *rest) for _, (coefficients, *rest), _ in tried)


def _try(
    episodes: Iterable[Episode],
    settings_of: Callable[[Episode], list[Setting]],
    score: Callable[[Episode, Setting], Score],
    halving: bool,
) -> list[_Tried]:
    """Every candidate's settings and scores, until the last episode or until it is given up."""
    tried: list[_Tried] = []
    running: list[int] = []
    for number, episode in enumerate(episodes, 1):
        settings = settings_of(episode)
        if number == 1:
            tried = [[] for _ in settings]
            running = list(range(len(settings)))
        known: dict[tuple, Score] = {}
        for k in running:
            key = _rounded(settings[k][0]), *settings[k][1:]
            if key not in known:
                known[key] = score(episode, settings[k])
            tried[k].append((episode.index, settings[k], known[key]))
        rounds, between = divmod(number, LEAST_EPISODES)
        if halving and between == 0 and rounds & (rounds - 1) == 0:
            running = _better_half(tried, running)
    return tried


def _better_half(tried: Sequence[_Tried], running: Sequence[int]) -> list[int]:
    """The better half, rounded up and two at least, of the different histories; the first of equals."""
    by_history: dict[tuple, list[int]] = {}
    for k in running:
        by_history.setdefault(_history(tried[k]), []).append(k)
    ranked = sorted(by_history.values(), key=lambda group: -_mean(tried[group[0]]))
    return sorted(k for group in ranked[: max(2, (len(ranked) + 1) // 2)] for k in group)


def _best(tried: Sequence[_Tried]) -> int:
    """The number of the best of those that were not given up, of equals the first."""
    most = max(map(len, tried))
    finished = [k for k, each in enumerate(tried) if len(each) == most]
    return max(finished, key=lambda k: _mean(tried[k]))


def _named_scores(names: Sequence[str], tried: Sequence[_Tried]) -> tuple[tuple[str, float], ...]:
    most = max(map(len, tried))
    given_up = ["" if len(each) == most else f" (given up after {len(each)} episodes)" for each in tried]
    return tuple((name + end, _mean(each)) for name, end, each in zip(names, given_up, tried, strict=True))


def _curve(names: Sequence[str], tried: Sequence[_Tried]) -> tuple[tuple[str, float, float | None, int], ...]:
    """Clean and robust accuracy of every candidate on the episodes that it has seen."""
    found = []
    for name, each in zip(names, tried, strict=True):
        robust = [score.robust for *_, score in each if score.robust is not None]
        clean = statistics.fmean(score.clean for *_, score in each)
        found.append((name, clean, statistics.fmean(robust) if robust else None, len(each)))
    return tuple(found)
