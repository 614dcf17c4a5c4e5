"""Few-shot evaluation, clean and under attack: a row per episode.

The attacks are fully adaptive and white-box: they differentiate through the very network that classifies the
query, which is fixed once the support set has been seen (or is attacked with it). Prints nothing and chooses
no setting.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.evaluation import Attacked, attack_queries, attack_support
from amt.attacks.kinds import NORMS, ON_OTHERS, Attack, on_queries
from amt.attacks.losses import misclassified
from amt.evaluation.answers import Answers, answered, first_wrong, replaced, row_answers
from amt.evaluation.statistics import summarise
from amt.models.head_settings import Head
from amt.models.network import CHUNK, Network
from amt.models.pool import Pool
from amt.models.weights import stream
from amt.tasks.classifier import Classifier, Logits, Predictor, head_classifier, merged_predictor
from meta_dataset_readers.episode import Episode


class Measurement(NamedTuple):
    """One episode's result.

    Args:
        row: plain values for JSON: what the episode was, an accuracy in [0, 1] per column, coefficients.
        classifier: of the episode.
        predicted: (Q,) int64, the classes of the queries as they are.
        correct: by column, which queries are classified correctly (Q,) bool.
        answers: by column, what the queries are taken for.
        attacked: by column of an attack on queries at its largest radius, the query images (Q, 3, H, W) as
            it left them; those that were wrong before are unchanged.
    """

    row: dict
    classifier: Classifier
    predicted: Tensor
    correct: dict[str, Tensor]
    answers: dict[str, Answers]
    attacked: dict[str, Tensor]


def measure(
    predict: Predictor,
    episode: Episode,
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    others: Sequence[Predictor] = (),
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
        others: give the networks that "transfer" and "strong" make images on, see `attack_queries`.
        numbers: of the queries, see `query_generators`; None for 0..Q-1.
        chunk: images in one pass, which changes nothing but time and memory.
    """
    began = time.perf_counter()
    classifier = predict(episode)
    with torch.no_grad():
        logits = torch.cat([classifier.logits(part) for part in episode.query.split(chunk)])
    predicted = logits.argmax(1)
    clean = ~misclassified(logits, episode.query_labels)
    without_number = int(logits.isnan().any(1).sum())
    fitted = time.perf_counter()
    answer = partial(answered, temperature=classifier.temperature())
    found = {"clean": _Column(clean, answer(logits, episode.query_labels, clean))}
    attacked, variants = {}, {}
    shown = any(attack.kind in ON_OTHERS for attack in attacks)
    surrogates = [each(episode).logits for each in others] if shown else []
    for attack in attacks:
        if attack.kind == "support":
            found |= _under_support_attack(predict, episode, attack, found["clean"], answer, seed)
            continue
        left, images, ran = _under_query_attack(
            classifier.logits, episode, attack, found["clean"], answer, surrogates, seed, numbers, chunk
        )
        found, variants = found | left, variants | ran
        attacked[attack.columns[-1]] = images
    for column, members in _union_members(attacks).items():
        correct, answers = zip(*(found[member] for member in members), strict=True)
        found[column] = _Column(torch.stack(correct).all(0), first_wrong(correct, answers))
    answers = {column: each.answers for column, each in found.items()}
    row = {
        "source": episode.source,
        "index": episode.index,
        "ways": episode.n_way,
        "support": len(episode.support),
        "queries": len(predicted),
        **{column: float(each.correct.double().mean()) for column, each in found.items()},
        "coefficients": [float(c) for c in classifier.coefficients],
        "fit_seconds": round(fitted - began, 4),
        "seconds": round(time.perf_counter() - began, 4),
        **({"nan_images": without_number} if without_number else {}),
        **({"variants": variants} if variants else {}),
        "answers": row_answers(episode, answers),
    }
    correct = {column: each.correct for column, each in found.items()}
    return Measurement(row, classifier, predicted, correct, answers, attacked)


class _Column(NamedTuple):
    """Which queries (Q,) bool are classified correctly in a column, and what all are taken for."""

    correct: Tensor
    answers: Answers


def attack_some(
    attack: Attack,
    epsilon: float,
    logits: Logits,
    episode: Episode,
    which: Tensor,
    generators: Sequence[torch.Generator],
    seed: int,
    surrogates: Sequence[Logits] = (),
) -> Attacked:
    """`attack_queries` on some queries of an episode.

    Args:
        which: (n,) int64, the queries that are attacked.
        generators: one for each of all queries.
        seed: of the evaluation.
    """
    return attack_queries(
        attack,
        epsilon,
        logits,
        episode.query[which],
        episode.query_labels[which],
        episode.n_way,
        [generators[k] for k in which.tolist()],
        surrogates,
        library_seed(episode, seed),
    )


def query_generators(
    episode: Episode, seed: int, numbers: Sequence[int] | None = None, purpose: int = 2
) -> list[torch.Generator]:
    """The generator of each query's random starts: the same whatever network is attacked, and however many
    of the others it got right.

    Args:
        numbers: tell the queries from each other, and those of episodes that share an index, such as the
            batches of one large test set; None for 0..Q-1.
        purpose: 2 for the attacks that are reported, 3 for checks of them.
    """
    numbers = range(len(episode.query)) if numbers is None else numbers
    return [stream(seed, episode.index, purpose, number) for number in numbers]


def library_seed(episode: Episode, seed: int) -> int:
    """What decides the random numbers of the library's attacks on an episode, see `attack_queries`."""
    return int(torch.randint(2**31, (), generator=stream(seed, episode.index, 2)))


def _under_query_attack(
    logits: Logits,
    episode: Episode,
    attack: Attack,
    clean: _Column,
    answer: Callable[..., Answers],
    surrogates: Sequence[Logits],
    seed: int,
    numbers: Sequence[int] | None,
    chunk: int,
) -> tuple[dict[str, _Column], Tensor, dict[str, str]]:
    """By column, which queries are classified correctly, clean and within every radius up to its own; the
    query images at the largest radius; by column what was run, where the episode decides it."""
    left, answers = clean
    images, columns, variants = episode.query, {}, {}
    for epsilon, column in zip(attack.epsilons, attack.columns, strict=True):
        left, images = left.clone(), images.clone()
        generators = query_generators(episode, seed, numbers)
        for which in filter(len, left.nonzero().squeeze(1).split(chunk)):
            found = attack_some(attack, epsilon, logits, episode, which, generators, seed, surrogates)
            left[which], images[which] = ~found.fooled, found.images
            variants |= {column: found.variant} if found.variant else {}
            seen = answer(found.logits, episode.query_labels[which], ~found.fooled)
            answers = replaced(answers, which, seen)
        columns[column] = _Column(left, answers)
    return columns, images, variants


def _under_support_attack(
    predict: Predictor,
    episode: Episode,
    attack: Attack,
    clean: _Column,
    answer: Callable[..., Answers],
    seed: int,
) -> dict[str, _Column]:
    """By column, which queries are classified correctly, clean and under the most harmful move of the support
    that was found within its radius: the one found there, or within a smaller radius."""
    which, columns, left = clean.correct.nonzero().squeeze(1), {}, clean

    def fit(support: Tensor) -> Logits:
        return predict(dataclasses.replace(episode, support=support.detach())).refit(support)

    for epsilon, column in zip(attack.epsilons, attack.columns, strict=True):
        query, labels = episode.query[which], episode.query_labels[which]
        start = stream(seed, episode.index, 2)
        found = attack_support(attack, epsilon, fit, episode.support, query, labels, start)
        harmed = clean.correct.clone()
        harmed[which] = ~found.fooled
        if harmed.sum() < left.correct.sum():
            seen = answer(found.logits, labels, ~found.fooled)
            left = _Column(harmed, replaced(clean.answers, which, seen))
        columns[column] = left
    return columns


def _union_members(attacks: Sequence[Attack]) -> dict[str, list[str]]:
    """By the column that a worst case over several attacks is reported in, the columns that it is over."""
    unions = {}
    for norm in NORMS:
        group = on_queries(attacks, norm)
        if len(group) < 2:
            continue
        for epsilon in sorted({epsilon for attack in group for epsilon in attack.epsilons}):
            unions[union_column(norm, epsilon)] = [
                attack.column(radius) for attack in group for radius in attack.epsilons if radius <= epsilon
            ]
    if len({(attack.norm, attack.kind == "support") for attack in attacks}) > 1:
        unions["union"] = ["clean", *(column for attack in attacks for column in attack.columns)]
    return unions


def union_column(norm: str, epsilon: float) -> str:
    """The name of the worst case over attacks of one norm, for example `union@8`."""
    return f"union{'' if norm == 'linf' else f'-{norm}'}@{epsilon:g}"


def columns(attacks: Sequence[Attack]) -> tuple[str, ...]:
    """All accuracies that `measure` gives, in order."""
    found = dict.fromkeys(["clean", *(column for attack in attacks for column in attack.columns)])
    return (*found, *_union_members(attacks))


def evaluate(
    predict: Predictor,
    episodes: Iterable[Episode],
    attacks: Sequence[Attack] = (),
    seed: int = 0,
    others: Sequence[Predictor] = (),
) -> Iterator[dict]:
    """Yield the row of every episode, see `measure`.

    >>> from amt.tasks.classifier import pretrained_predictor
    >>> rows = evaluate(pretrained_predictor(network), [episode], [Attack("pgd", (8,), steps=2)])
    >>> sorted(next(rows))[:3]
    ['answers', 'clean', 'coefficients']
    """
    for episode in episodes:
        yield measure(predict, episode, attacks, seed, others).row


def validate(
    network: Network,
    pool: Pool,
    episodes: Iterable[Episode],
    robust: bool,
    seed: int = 0,
    head: Head = Head(),  # noqa: B008  frozen
) -> list[dict[str, float]]:
    """Accuracy in per cent of every adapter alone, by `head`: `clean`, and `robust` under PGD at its own
    epsilon and with its own steps if asked for; of an adapter trained at epsilon 0 the two are the same.

    The episodes are gone through once, and none is kept: those of Meta-Dataset fill gigabytes.
    """
    attacks = [
        [Attack("pgd", (level.epsilon,), steps=level.steps, step_size=level.step_size)]
        if robust and level.epsilon > 0
        else []
        for level in pool.levels
    ]
    fitter = partial(head_classifier, head=head)
    predictors = [
        merged_predictor(network, pool[p], lambda *_: (1.0,), fitter=fitter) for p in range(len(pool))
    ]
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
