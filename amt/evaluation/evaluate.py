"""Few-shot evaluation, clean and under attack: a row per episode.

The attacks are fully adaptive and white-box: they differentiate through the very network that classifies the
query, which is fixed once the support set has been seen (or is attacked with it). Prints nothing and chooses
no setting.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.evaluation import attack_queries, attack_support
from amt.attacks.kinds import NORMS, Attack, on_queries
from amt.evaluation.statistics import summarise
from amt.models.network import CHUNK, Network
from amt.models.pool import Pool
from amt.models.weights import stream
from amt.tasks.classifier import Predictor, Task, merged_predictor
from meta_dataset_readers.episode import Episode


class Measurement(NamedTuple):
    """One episode's result.

    Args:
        row: plain values for JSON: what the episode was, an accuracy in [0, 1] per column, coefficients.
        task: the classifier.
        predicted: (Q,) int64, the classes of the queries as they are.
        standing: by column, which queries are classified correctly (Q,) bool.
        attacked: by column of an attack on queries at its largest radius, the query images (Q, 3, H, W) as
            it left them; those that were wrong before are unchanged.
    """

    row: dict
    task: Task
    predicted: Tensor
    standing: dict[str, Tensor]
    attacked: dict[str, Tensor]


def measure(
    predict: Predictor,
    episode: Episode,
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    surrogate: Predictor | None = None,
    numbers: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Measurement:
    """Classify one episode's queries, clean and under every attack at every radius.

    An image counts as robust at epsilon if it is classified correctly clean, under that attack, and under
    the same attack at every smaller epsilon, whose images lie within the larger ball as well: so each radius
    only has to be tried on what the smaller ones left. With several attacks the columns `union@epsilon` hold
    the worst case per image over those of one norm on the queries, and, where norms or targets differ,
    `union` that over all.

    Args:
        predict: sees the episode's support set; the attacks see what it returns, and the query labels.
        episode: on the device of the network.
        attacks: any number, of different names.
        seed: decides, with the episode's index and the queries' numbers, the attacks' random starts, image by
            image.
        surrogate: makes the network that "transfer" attacks.
        numbers: of the queries, see `query_generators`; None for 0..Q-1.
        chunk: images in one pass, which changes nothing but time and memory.
    """
    began = time.perf_counter()
    task = predict(episode)
    labels = episode.query_labels
    with torch.no_grad():
        logits = torch.cat([task.logits(part) for part in episode.query.split(chunk)])
    predicted = logits.argmax(1)
    correct = predicted == labels
    fitted = time.perf_counter()
    standing, attacked, variants = {"clean": correct}, {}, {}
    transfer = any(attack.kind == "transfer" for attack in attacks)
    other = surrogate(episode).logits if transfer else None
    for attack in attacks:
        left, images = correct, episode.query
        for epsilon, column in zip(attack.epsilons, attack.columns, strict=True):
            if attack.kind == "support":
                generator = stream(seed, episode.index, 2)
                left = _under_poison(predict, episode, attack, epsilon, correct, left, generator)
            else:
                left, images = left.clone(), images.clone()
                generators = query_generators(episode, seed, numbers)
                for which in left.nonzero().squeeze(1).split(chunk):
                    found = attack_queries(
                        attack,
                        epsilon,
                        task.logits,
                        episode.query[which],
                        labels[which],
                        episode.n_way,
                        [generators[k] for k in which.tolist()],
                        other,
                        library_seed(episode, seed),
                    )
                    left[which], images[which] = ~found.fooled, found.images
                    if found.variant:
                        variants[column] = found.variant
            standing[column] = left
        if attack.kind != "support":
            attacked[column] = images
    standing |= _unions(attacks, standing)
    row = {
        "source": episode.source,
        "index": episode.index,
        "ways": episode.n_way,
        "support": len(episode.support),
        "queries": len(labels),
        **{column: float(right.double().mean()) for column, right in standing.items()},
        "coefficients": [float(c) for c in task.coefficients],
        "fit_seconds": round(fitted - began, 4),
        "seconds": round(time.perf_counter() - began, 4),
        **({"variants": variants} if variants else {}),
    }
    return Measurement(row, task, predicted, standing, attacked)


def query_generators(
    episode: Episode, seed: int, numbers: Sequence[int] | None = None
) -> list[torch.Generator]:
    """The generator of each query's random starts: the same whatever network is attacked, and however many
    of the others it got right.

    Args:
        numbers: tell the queries from each other, and those of episodes that share an index, such as the
            batches of one large test set; None for 0..Q-1.
    """
    numbers = range(len(episode.query)) if numbers is None else numbers
    return [stream(seed, episode.index, 2, number) for number in numbers]


def library_seed(episode: Episode, seed: int) -> int:
    """What decides the random numbers of the library's attacks on an episode, see `attack_queries`."""
    return int(torch.randint(2**31, (), generator=stream(seed, episode.index, 2)))


def _under_poison(predict, episode, attack, epsilon, correct, left, generator) -> Tensor:
    """Which queries (Q,) bool are right clean and under the more harmful of two moves of the support: the one
    found here, and the one within a smaller radius that left `left`."""
    which = correct.nonzero().squeeze(1)
    found = attack_support(
        attack,
        epsilon,
        lambda support: predict(dataclasses.replace(episode, support=support.detach())).refit(support),
        episode.support,
        episode.query[which],
        episode.query_labels[which],
        generator,
    )
    harmed = correct.clone()
    harmed[which] = ~found.fooled
    return harmed if harmed.sum() < left.sum() else left


def _unions(attacks: Sequence[Attack], standing: dict[str, Tensor]) -> dict[str, Tensor]:
    """The worst case per image over several attacks, by the column it is reported in."""
    unions = {}
    for norm in NORMS:
        group = on_queries(attacks, norm)
        if len(group) < 2:
            continue
        for epsilon in sorted({epsilon for attack in group for epsilon in attack.epsilons}):
            within = [
                standing[attack.column(radius)]
                for attack in group
                for radius in attack.epsilons
                if radius <= epsilon
            ]
            unions[union_column(norm, epsilon)] = torch.stack(within).all(0)
    if len({(attack.norm, attack.kind == "support") for attack in attacks}) > 1:
        unions["union"] = torch.stack(list(standing.values())).all(0)
    return unions


def union_column(norm: str, epsilon: float) -> str:
    """The name of the worst case over attacks of one norm, for example `union@8`."""
    return f"union{'' if norm == 'linf' else f'-{norm}'}@{epsilon:g}"


def columns(attacks: Sequence[Attack]) -> tuple[str, ...]:
    """All accuracies that `measure` gives, in order."""
    one = torch.ones(1, dtype=torch.bool)
    standing = {"clean": one} | {column: one for attack in attacks for column in attack.columns}
    return (*standing, *_unions(attacks, standing))


def evaluate(
    predict: Predictor,
    episodes: Iterable[Episode],
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    surrogate: Predictor | None = None,
) -> Iterator[dict]:
    """Yield the row of every episode, see `measure`."""
    for episode in episodes:
        yield measure(predict, episode, attacks, seed, surrogate).row


def validate(
    network: Network, pool: Pool, episodes: Iterable[Episode], robust: bool, seed: int = 0
) -> list[dict[str, float]]:
    """Accuracy in per cent of every adapter alone: `clean`, and `robust` under PGD at its own epsilon and
    with its own steps if asked for; of an adapter trained at epsilon 0 the two are the same.

    The episodes are gone through once, and none is kept: those of Meta-Dataset fill gigabytes.
    """
    attacks = [
        [Attack("pgd", (level.epsilon,), steps=level.steps, step_size=level.step_size)]
        if robust and level.epsilon > 0
        else []
        for level in pool.levels
    ]
    predictors = [merged_predictor(network, pool[p], lambda *_: (1.0,)) for p in range(len(pool))]
    rows: list[list[dict]] = [[] for _ in attacks]
    for episode in episodes:
        for found, predict, attack in zip(rows, predictors, attacks, strict=True):
            found += evaluate(predict, [episode], attack, seed)
    scores = []
    for found, attack in zip(rows, attacks, strict=True):
        score = {"clean": summarise(found, "clean").mean}
        if robust:
            score["robust"] = summarise(found, attack[0].columns[0] if attack else "clean").mean
        scores.append(score)
    return scores
