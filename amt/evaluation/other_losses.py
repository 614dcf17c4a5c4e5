"""Whether PGD on another loss finds what a column's own attack misses: a check of amt/evaluation/sanity.py.

A loss can fail for its own reasons: the gradient of the cross-entropy vanishes where the softmax saturates,
the margin's looks at one wrong class at a time. `missed` counts on an episode, `missing` reads the counts of
a run.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from amt.attacks.kinds import DLR_WAYS, NORMS, WHITE_BOX, WORST_CASE, Attack, on_queries
from amt.evaluation.evaluate import union_column

TRIED = ("ce", "dlr", "margin")
_OF_BOTH = ("strong", "autoattack")  # increase both losses of the worst case
MOST_MISSED = 0.03  # of the queries: 3 points of accuracy

# (attack, epsilon, which (Q,) bool) -> which of those queries it breaks (Q,) bool
BrokenBy = Callable[[Attack, float, Tensor], Tensor]


def own_losses(attacks: Sequence[Attack], n_way: int) -> tuple[str, ...]:
    """The losses of labels that attacks increase among N ways; of the other attacks, the cross-entropy."""
    both = [
        dataclasses.replace(attack, kind="apgd", loss=WORST_CASE) if attack.kind in _OF_BOTH else attack
        for attack in attacks
    ]
    losses = [loss for attack in both for loss in attack.losses_among(n_way)]
    return tuple(dict.fromkeys("ce" if loss == "kl" else loss for loss in losses))


def missed(
    correct: Mapping[str, Tensor], attacks: Sequence[Attack], sample: Tensor, n_way: int, broken_by: BrokenBy
) -> dict[str, dict[str, int]]:
    """By column of a white-box attack, or of a worst case over attacks, and by loss: how many images that
    stand there fall to PGD on that loss, at the same radius and with the same steps.

    Args:
        correct: by column which queries are classified correctly (Q,) bool.
        sample: which queries are looked at (Q,) bool.
        n_way: number of classes N.
    """
    losses = [loss for loss in TRIED if loss != "dlr" or n_way >= DLR_WAYS]
    counts: dict[str, dict[str, int]] = {}
    for column, attack, epsilon in _columns(attacks):
        standing = sample & correct[column]
        counts[column] = {
            loss: int(broken_by(_as_pgd(attack, epsilon, loss), epsilon, standing).sum()) for loss in losses
        }
    return counts


def missing(rows: Sequence[Mapping], attacks: Sequence[Attack]) -> Iterator[tuple[str, str]]:
    """Columns whose own attack misses more than 3 points, and more than a single image, that another loss
    finds; with the reason in words, and what to type.

    Args:
        rows: of one domain; those of probed episodes hold the counts under "checks".
    """
    probes = [row["checks"] for row in rows if row.get("checks", {}).get("missed")]
    queries = sum(counts["queries"] for counts in probes)
    for column, attack, epsilon in _columns(attacks):
        totals = {
            loss: sum(counts["missed"].get(column, {}).get(loss, 0) for counts in probes) for loss in TRIED
        }
        own = attack.loss.split("+")
        loss, most = max(totals.items(), key=lambda pair: (pair[1], pair[0] not in own))
        if most <= max(1, MOST_MISSED * queries):
            continue
        text = (
            f"PGD with loss {loss} breaks {most} of {queries} images that this leaves standing "
            f"({100 * most / queries:.1f} points); type {_remedy(attack, loss)}"
        )
        yield column, text
        alone = len(on_queries(attacks, attack.norm)) == 1
        if alone or column == union_column(attack.norm, epsilon):
            yield "union", text


def _columns(attacks: Sequence[Attack]) -> Iterator[tuple[str, Attack, float]]:
    """The columns to check, each with its attack (of a worst case the first white-box one) and radius."""
    for norm in NORMS:
        group = on_queries(attacks, norm)
        white = [attack for attack in group if attack.kind in WHITE_BOX]
        yield from ((attack.column(e), attack, e) for attack in white for e in attack.epsilons)
        if white and len(group) > 1:
            radii = sorted({epsilon for attack in group for epsilon in attack.epsilons})
            yield from ((union_column(norm, epsilon), white[0], epsilon) for epsilon in radii)


def _as_pgd(attack: Attack, epsilon: float, loss: str) -> Attack:
    """PGD on one loss, with the steps of an attack that is PGD, else with the usual ones."""
    pgd = attack.kind == "pgd"
    steps, step_size = (attack.steps, attack.step_size) if pgd else (None, None)
    return Attack("pgd", (epsilon,), attack.norm, steps, step_size=step_size, loss=loss)


def _remedy(attack: Attack, loss: str) -> str:
    """The flags of an attack that does not miss what PGD on a loss finds."""
    own = attack.loss.split("+")
    if loss not in own and (attack.kind == "pgd" or (attack.kind == "apgd" and loss != "margin")):
        return f"--attack {attack.kind} loss={'+'.join([*own, loss])}"
    return "--attack strong" if attack.kind != "strong" else f"--attack strong restarts={attack.restarts + 3}"
