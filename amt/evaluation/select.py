"""Choosing how a pool is merged: which routing, which adapter, which trimming.

    select               once for a domain, on labelled episodes that are not scored (or, under the published
                         protocol, on such as are like the scored ones)
    support_predictor    anew for every task, from its support set alone

Candidates are routers' settings or fixed coefficients. What they share is computed once per episode: the
adapters' support features, the attacked or augmented views, and everything that follows from equal
coefficients. Knows no file, and does not know where episodes come from.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.evaluation import Attack
from amt.evaluation.evaluate import measure
from amt.models.lora import trim_singular_values
from amt.models.network import Network
from amt.models.pool import Pool
from amt.models.trim import Trim
from amt.models.weights import Coefficients, stream
from amt.tasks.classifier import Predictor, Task, prototype_task
from amt.tasks.leave_one_out import Merged, lowest_loss, new_trial
from amt.tasks.merge import Members, kept_members, route_each
from amt.tasks.settings import Routing
from meta_dataset_readers.episode import Episode

# The published protocol: the best accuracy on this many labelled episodes of the scored split.
PUBLISHED_EPISODES = 6
PUBLISHED_SEED = 1234

_SELECTION_STEPS = 10  # of PGD, half as many as usually score

Candidate = Routing | Coefficients
Setting = tuple[Coefficients, tuple[Trim, ...]]


class Selection(NamedTuple):
    """What was chosen.

    Args:
        candidate: by number.
        trims: of the trimmings offered none or one.
        scores: every candidate's name and score in per cent, then those of the trimmings; one that was given
            up before the last episode says so, and its score is that of the episodes until then.
    """

    candidate: int
    trims: tuple[Trim, ...]
    scores: tuple[tuple[str, float], ...]


def names(candidates: Sequence[Candidate]) -> list[str]:
    """What candidates are called, as briefly as their differences allow."""
    routings = [candidate for candidate in candidates if isinstance(candidate, Routing)]
    vary = {name: len({getattr(r, name) for r in routings}) > 1 for name in ("top_k", "epsilon")}
    found = []
    for candidate in candidates:
        if isinstance(candidate, Routing):
            words = [f"beta {candidate.beta:g}, gamma {candidate.gamma:g}"]
            words += [f"top {candidate.top_k}"] if vary["top_k"] else []
            words += [f"route_epsilon {candidate.epsilon:g}"] if vary["epsilon"] else []
            found.append(", ".join(words))
        elif max(candidate) == 1:
            found.append(f"adapter {candidate.index(1)}")
        else:
            found.append("coefficients " + ", ".join(f"{c:.3g}" for c in candidate))
    return found


def trim_name(trim: Trim) -> str:
    """As --trim takes it."""
    return f"{trim.layer}:{trim.block}:{trim.keep:g}"


def choices(
    network: Network,
    pool: Pool,
    candidates: Sequence[Candidate],
    support: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    members: Members | None = None,
) -> list[Coefficients]:
    """The coefficients that each candidate gives a task; arguments as of `route`."""
    routings = [candidate for candidate in candidates if isinstance(candidate, Routing)]
    routed = iter(())
    if routings:
        routed = iter(route_each(network, pool, support, labels, generator, routings, members))
    return [next(routed) if isinstance(each, Routing) else each for each in candidates]


def selection_attacks(attacks: Sequence[Attack]) -> tuple[Attack, ...]:
    """What candidates are tried against when `attacks` on queries are to score: PGD at their norms and radii,
    of at most 10 steps, because the stronger and dearer attacks rank networks alike."""
    scoring = [attack for attack in attacks if attack.kind != "support"]
    steps = min([_SELECTION_STEPS, *(attack.steps for attack in scoring if attack.kind == "pgd")])
    radii: dict[str, set[float]] = {}
    for attack in scoring:
        radii.setdefault(attack.norm, set()).update(attack.epsilons)
    return tuple(Attack("pgd", tuple(sorted(found)), norm, steps) for norm, found in radii.items())


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
) -> Selection:
    """Choose a candidate, then whether one of the trimmings improves on none.

    The criterion is the mean of clean accuracy and the accuracies under `attacks`, averaged over the
    episodes; of equally good candidates the first is taken. Shares that agree to a twentieth are evaluated
    once. With `halving`, those that lag behind are given up early: after 2, 4, 8, ... episodes the
    better half of what differs goes on, and two at least go to the end. So ten distinct mixtures cost as
    much as 2.6 on each of 40 episodes, and what is compared has always seen the same episodes.

    Args:
        episodes: gives labelled episodes on the backbone's device, the same at every call; none is kept, and
            they are asked for a second time if there are trimmings to choose from.
        attacks: on queries, tried in turn.
        trims: what is trimmed whatever is chosen.
        trim_candidates: single trimmings to try, after `trims`, with the chosen candidate.
        seed: decides, with an episode's index, augmentation and the attacks' starts, as in evaluation.
    """
    merged, members = merged_networks(pool, candidates, trim_candidates), kept_members(pool)
    columns = ["clean", *(column for attack in attacks for column in attack.columns)]

    def quality(episode: Episode, setting: Setting) -> float:
        row = measure(lambda _: _task(network, merged, episode, setting), episode, attacks, seed).row
        return 100 * statistics.fmean(row[column] for column in columns)

    def routed(episode: Episode) -> list[Setting]:
        generator = stream(seed, episode.index, 1)
        support, labels = episode.support, episode.support_labels
        found = choices(network, pool, candidates, support, labels, generator, members)
        return [(coefficients, tuple(trims)) for coefficients in found]

    entrants = _race(episodes(), routed, quality, halving)
    best = _winner(entrants)
    scores = _scores(names(candidates), entrants)
    if not trim_candidates:
        return Selection(best, (), scores)
    chosen = dict(zip(entrants[best].episodes, entrants[best].settings, strict=True))

    def trimmed(episode: Episode) -> list[Setting]:
        coefficients, always = chosen[episode.index]
        return [(coefficients, (*always, candidate)) for candidate in trim_candidates]

    tried = _race(episodes(), trimmed, quality, halving)
    scores += _scores([f"trim {trim_name(candidate)}" for candidate in trim_candidates], tried)
    first = _winner(tried)
    improves = statistics.fmean(tried[first].scores) > statistics.fmean(entrants[best].scores)
    return Selection(best, (trim_candidates[first],) if improves else (), scores)


def support_predictor(
    network: Network,
    pool: Pool,
    candidates: Sequence[Candidate],
    trims: Sequence[Trim] = (),
    trim_candidates: Sequence[Trim] = (),
    epsilon: float = 0.0,
    seed: int = 0,
) -> Predictor:
    """For every task: the candidate, then the trimming if it improves on none, of the least leave-one-out
    loss on the support set (amt/tasks/leave_one_out.py); merge, trim, prototypes.

    Each distinct merged network is compared once: shares that agree to a twentieth count as one.

    Args:
        trims, trim_candidates, seed: as for `select`.
        epsilon: bound, in 1/255, of an attack on the images left out; 0: they are clean.
    """
    merged, members = merged_networks(pool, candidates, trim_candidates), kept_members(pool)

    def predict(episode: Episode) -> Task:
        support, labels = episode.support, episode.support_labels
        trial = new_trial(network, support, labels, epsilon, stream(seed, episode.index, 4))

        def least(settings: Sequence[Setting]) -> Setting:
            if len(settings) == 1:
                return settings[0]
            return settings[lowest_loss(network, [partial(merged, each) for each in settings], trial)[0]]

        generator = stream(seed, episode.index, 1)
        found = choices(network, pool, candidates, support, labels, generator, members)
        distinct: dict[tuple, Setting] = {}
        for coefficients in found:
            distinct.setdefault(_rounded(coefficients), (coefficients, tuple(trims)))
        coefficients, always = least(list(distinct.values()))
        options = [(coefficients, (*always, candidate)) for candidate in trim_candidates]
        return _task(network, merged, episode, least([(coefficients, always), *options]))

    return predict


def merged_networks(
    pool: Pool, candidates: Sequence[Candidate], trim_candidates: Sequence[Trim] = ()
) -> Callable[[Setting], Merged]:
    """Merged and trimmed networks; those of fixed coefficients are made once, whatever the tasks."""
    fixed = not any(isinstance(candidate, Routing) for candidate in candidates)

    @functools.lru_cache(maxsize=max(len(candidates), len(trim_candidates) + 1) if fixed else 2)
    def merged(setting: Setting) -> Merged:
        coefficients, trims = setting
        return Merged(
            trim_singular_values(pool.merge(coefficients), trims),
            *pool.head(coefficients),
        )

    return merged


def _task(network: Network, merged: Callable[[Setting], Merged], episode: Episode, setting: Setting) -> Task:
    weights, scale, bias = merged(setting)
    return prototype_task(network, weights, episode, scale, bias, coefficients=setting[0])


def _rounded(coefficients: Coefficients) -> Coefficients:
    """Mixtures whose shares agree to a twentieth count as one."""
    return tuple(round(20 * c) / 20 for c in coefficients)


@dataclasses.dataclass
class _Entrant:
    """What one candidate was on each episode, by the episode's index, and its quality there."""

    episodes: list[int] = dataclasses.field(default_factory=list)
    settings: list[Setting] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)

    @property
    def course(self) -> tuple:
        """Entrants of the same course cannot be told apart so far."""
        return tuple((_rounded(coefficients), trims) for coefficients, trims in self.settings)


def _race(
    episodes: Iterable[Episode],
    settings_of: Callable[[Episode], list[Setting]],
    quality: Callable[[Episode, Setting], float],
    halving: bool,
) -> list[_Entrant]:
    """Every candidate's settings and qualities, as far as it got; `select` says who goes on."""
    entrants: list[_Entrant] = []
    running: list[int] = []
    for number, episode in enumerate(episodes, 1):
        settings = settings_of(episode)
        if number == 1:
            entrants = [_Entrant() for _ in settings]
            running = list(range(len(settings)))
        known: dict[tuple, float] = {}
        for k in running:
            key = _rounded(settings[k][0]), settings[k][1]
            if key not in known:
                known[key] = quality(episode, settings[k])
            entrants[k].episodes.append(episode.index)
            entrants[k].settings.append(settings[k])
            entrants[k].scores.append(known[key])
        if halving and number > 1 and number & (number - 1) == 0:
            running = _better_half(entrants, running)
    return entrants


def _better_half(entrants: Sequence[_Entrant], running: Sequence[int]) -> list[int]:
    """The better half, rounded up and two at least, of the different courses; the first of equals."""
    courses: dict[tuple, list[int]] = {}
    for k in running:
        courses.setdefault(entrants[k].course, []).append(k)
    ranked = sorted(courses.values(), key=lambda group: -statistics.fmean(entrants[group[0]].scores))
    return sorted(k for group in ranked[: max(2, (len(ranked) + 1) // 2)] for k in group)


def _winner(entrants: Sequence[_Entrant]) -> int:
    length = max(len(entrant.scores) for entrant in entrants)
    means = {
        k: statistics.fmean(each.scores) for k, each in enumerate(entrants) if len(each.scores) == length
    }
    return max(means, key=means.__getitem__)  # of equals the first


def _scores(called: Sequence[str], entrants: Sequence[_Entrant]) -> tuple[tuple[str, float], ...]:
    length = max(len(entrant.scores) for entrant in entrants)
    found = []
    for name, entrant in zip(called, entrants, strict=True):
        seen = len(entrant.scores)
        given_up = "" if seen == length else f" (given up after {seen} episodes)"
        found.append((name + given_up, statistics.fmean(entrant.scores)))
    return tuple(found)
