"""Checks of the attacks themselves: whether a robust accuracy deserves belief.

Gradient masking, randomness and weak attacks make a network look robust (Athalye et al. 2018; Carlini et al.
2019; the automatic checks of Croce & Hein 2020). `probe` runs small experiments on an episode and counts;
`judge` reads the counts of a whole run, and its rows, and says which results are suspect and why.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amt.attacks.evaluation import attack_queries
from amt.attacks.kinds import BLACK_BOX, NORMS, WHITE_BOX, Attack, on_queries
from amt.attacks.perturb import Ball, ascend, input_gradient, pgd
from amt.evaluation.evaluate import Measurement, library_seed, union_column
from amt.evaluation.statistics import paired_difference
from amt.models.network import CHUNK
from amt.models.weights import stream
from amt.tasks.classifier import Logits, Predictor
from meta_dataset_readers.episode import Episode

FROM_SCRATCH = ("pgd", "apgd")  # attacks that are cheap enough to be run again without what they know
BLACK_BOX_QUERIES = 100
WITHOUT_LIMIT = 255.0  # of 255, per pixel: such an image can become any other

MOST_ZERO_GRADIENTS = 0.01
MOST_STANDING = 0.05
MOST_ESCAPED = 0.05


class Finding(NamedTuple):
    """One reason not to believe one result."""

    source: str
    column: str
    reason: str


def probe(
    predict: Predictor, episode: Episode, measured: Measurement, attacks: Sequence[Attack], seed: int = 0
) -> dict:
    """Small experiments on an episode that was measured under `attacks`; counts of images, for `judge`.

    images: how many were classified correctly; all other counts are of these.
    changed: how many queries become right or wrong when the task is set up anew and epsilon is 0.
    zero_gradients: how many have an input gradient of exactly zero.
    from_scratch: by attack, how many images broken at its smallest radius withstand it when it is run afresh
        at its largest (with a single radius: at twice that), and how many were broken.
    norms: for each norm attacked: how many withstand a perturbation without limit (`standing`); the mean
        loss before and after PGD at the largest radius; how many images only a small Square Attack breaks
        there and how many only the white-box attacks.
    """
    logits, labels = measured.task.logits, episode.query_labels
    correct = measured.standing["clean"].clone()
    correct[CHUNK:] = False  # a sample of the largest episodes is enough
    images, own = episode.query[correct], labels[correct]
    again = predict(episode).logits
    with torch.no_grad():
        right = again(episode.query[:CHUNK]).argmax(1) == labels[:CHUNK]
    changed = int((right != measured.standing["clean"][:CHUNK]).sum())
    counts: dict = {"images": len(images), "changed": changed}
    if len(images) == 0 or episode.n_way == 1:
        return counts
    _, fell = pgd(again, images, own, Ball("linf", 0, 0), steps=1, generator=stream(seed, 0))
    counts["changed"] += int(fell.sum())

    def loss_of(moved: Tensor) -> Tensor:
        return F.cross_entropy(logits(moved), own, reduction="sum")

    slopes = input_gradient(loss_of, images).flatten(1)
    counts["zero_gradients"] = int((slopes.abs().amax(1) == 0).sum())

    def broken_by(attack: Attack, epsilon: float, which: Tensor) -> Tensor:
        generators = [stream(seed, episode.index, 3, k) for k in which.nonzero().squeeze(1).tolist()]
        found = attack_queries(
            attack,
            epsilon,
            logits,
            episode.query[which],
            labels[which],
            episode.n_way,
            generators,
            seed=library_seed(episode, seed),
        )
        broken = torch.zeros_like(which)
        broken[which] = found.fooled
        return broken

    counts["from_scratch"] = {}
    for attack in attacks:
        if attack.kind in FROM_SCRATCH:
            small, large = attack.epsilons[0], max(attack.epsilons[-1], 2 * attack.epsilons[0])
            before = correct & ~measured.standing[attack.column(small)]
            escaped = before & ~broken_by(attack, large, before)
            counts["from_scratch"][attack.name] = [int(escaped.sum()), int(before.sum())]

    counts["norms"] = {}
    for norm in NORMS:
        concerned = on_queries(attacks, norm)
        if not concerned:
            continue
        radius = max(attack.epsilons[-1] for attack in concerned)
        limit = WITHOUT_LIMIT * (1 if norm == "linf" else images[0].numel() ** 0.5)
        unlimited = Attack("pgd", (limit,), norm)
        ball = Ball(norm, radius / 255, radius / 255 / 4)
        start = ball.start(images, stream(seed, episode.index, 3))
        climbed = ascend(loss_of, images, start, ball, steps=10)
        by_white, by_black = torch.zeros_like(correct), torch.zeros_like(correct)
        white = [attack for attack in concerned if attack.kind in WHITE_BOX]
        for attack in white:
            by_white |= correct & ~measured.standing[attack.columns[-1]]
        if white:
            square = Attack("square", (radius,), norm, queries=BLACK_BOX_QUERIES)
            by_black = broken_by(square, radius, correct)
        counts["norms"][norm] = {
            "standing": int((correct & ~broken_by(unlimited, limit, correct)).sum()),
            "loss_before": _loss(logits, images, own),
            "loss_after": _loss(logits, climbed, own),
            "only_black_box": int((by_black & ~by_white).sum()),
            "only_white_box": int((by_white & ~by_black).sum()),
        }
    return counts


def _loss(logits: Logits, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(logits(images), labels))


def judge(rows: Sequence[dict], attacks: Sequence[Attack]) -> list[Finding]:
    """What is suspect about one domain's results, in the order of its columns.

    Suspect are: any image whose class changes with nothing perturbed; more than 1% of images with a zero
    gradient; more than 5% that withstand a perturbation without limit, or that withstand an attack at a
    radius above the one that broke them; a loss that does not rise; and images that black-box attacks break
    and white-box ones do not, in excess of twice the standard error.

    Args:
        rows: of one domain; those that were probed carry the counts under "checks".
        attacks: that they were measured under.
    """
    if not rows:
        return []
    source = rows[0]["source"]
    probes = [row["checks"] for row in rows if "checks" in row]
    images = sum(counts["images"] for counts in probes)
    reasons: list[tuple[Iterable[str], str]] = []

    changed = sum(counts["changed"] for counts in probes)
    if changed:
        everything = ["clean", *(column for attack in attacks for column in attack.columns)]
        reasons.append(
            (everything, f"{changed} predictions change with nothing perturbed; is the network random?")
        )
    zero = sum(counts.get("zero_gradients", 0) for counts in probes)
    if zero > MOST_ZERO_GRADIENTS * images:
        reasons.append((_of(attacks), f"{zero} of {images} images have an exactly zero gradient"))
    for attack in attacks:
        pairs = [counts.get("from_scratch", {}).get(attack.name, (0, 0)) for counts in probes]
        escaped, broken = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
        if escaped > 1 + MOST_ESCAPED * broken:
            reasons.append((attack.columns, f"{escaped} of {broken} broken images withstand a larger radius"))
    for norm in NORMS:
        found = [counts["norms"][norm] for counts in probes if norm in counts.get("norms", {})]
        white = [a for a in attacks if a.norm == norm and a.kind in WHITE_BOX]
        if found:
            reasons += [(_of(on_queries(attacks, norm)), reason) for reason in _doubts(found, images)]
        reasons += _outdone(rows, attacks, white, norm)
    return [found for found in _per_column(source, attacks, reasons) if found.column in rows[0]]


def _doubts(found: Sequence[dict], images: int) -> list[str]:
    """Reasons to doubt the white-box attacks of one norm."""
    total = {name: sum(counts[name] for counts in found) for name in found[0]}
    reasons = []
    if total["standing"] > MOST_STANDING * images:
        reasons.append(f"{total['standing']} of {images} images withstand a perturbation without limit")
    if not total["loss_after"] > total["loss_before"]:
        reasons.append("the loss does not rise under attack")
    only_black, only_white = total["only_black_box"], total["only_white_box"]
    if only_black - only_white > 2 * (only_black + only_white) ** 0.5:
        reasons.append(
            f"{BLACK_BOX_QUERIES} queries of Square Attack break {only_black} images that white-box attacks "
            f"do not, {only_white} the other way"
        )
    return reasons


def _outdone(
    rows: Sequence[dict], attacks: Sequence[Attack], white: Sequence[Attack], norm: str
) -> list[tuple[Iterable[str], str]]:
    """Reasons from black-box attacks that were asked for, over all episodes."""
    reasons = []
    for attack in attacks:
        if attack.norm != norm or attack.kind not in BLACK_BOX:
            continue
        for epsilon in attack.epsilons:
            within = [a.column(e) for a in white for e in a.epsilons if e <= epsilon]
            if not within:
                continue
            ours = [row | {"": min(row[column] for column in within)} for row in rows]
            theirs = [row | {"": row[attack.column(epsilon)]} for row in rows]
            excess = paired_difference(ours, theirs, "")
            if excess.mean > excess.interval:
                reasons.append(
                    (within, f"{attack.column(epsilon)} breaks {excess.mean:.1f} points more images")
                )
    return reasons


def _of(attacks: Iterable[Attack]) -> list[str]:
    return [column for attack in attacks for column in attack.columns]


def _per_column(
    source: str, attacks: Sequence[Attack], reasons: Sequence[tuple[Iterable[str], str]]
) -> list[Finding]:
    """One finding per column and reason; a worst case over attacks is as doubtful as they are."""
    findings = []
    for columns, reason in reasons:
        concerned = list(columns)
        for attack in attacks:
            for epsilon in attack.epsilons:
                if attack.column(epsilon) in concerned and attack.kind != "support":
                    concerned += [union_column(attack.norm, epsilon), "union"]
        findings += [Finding(source, column, reason) for column in dict.fromkeys(concerned)]
    return findings
