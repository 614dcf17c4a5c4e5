"""Sanity checks of the attacks: whether a robust accuracy can be trusted.

Gradient masking, randomness and weak attacks make a network look robust (Athalye et al. 2018; Carlini et al.
2019; the automatic checks of Croce & Hein 2020). `probe` runs small experiments on an episode and counts;
`judge` reads the counts of a whole run, and its rows, and says which results are suspect and why.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amt.attacks.kinds import BLACK_BOX, NORMS, WHITE_BOX, Attack, on_queries
from amt.attacks.losses import loss_sum, misclassified
from amt.attacks.perturb import Ball, ascend, input_gradient, pgd
from amt.evaluation.evaluate import Measurement, attack_some, query_generators, union_column
from amt.evaluation.noted import NormChecks
from amt.evaluation.other_losses import missed, missing, own_losses
from amt.evaluation.statistics import paired_difference
from amt.models.network import CHUNK
from amt.models.weights import stream
from amt.tasks.classifier import Logits, Predictor
from meta_dataset_readers.episode import Episode

FROM_SCRATCH = ("pgd", "apgd")  # attacks that are cheap enough to be run afresh at a larger radius
BLACK_BOX_QUERIES = 100
WITHOUT_LIMIT = 255.0  # in 1/255, per pixel: an image can become any other

Reason = tuple[Iterable[str], str]  # the columns it concerns, and in words

MOST_ZERO_GRADIENTS = 0.01
MOST_STANDING = 0.05
MOST_ESCAPED = 0.05


class Finding(NamedTuple):
    """One reason to doubt one result."""

    source: str
    column: str
    reason: str


def probe(
    predict: Predictor, episode: Episode, measured: Measurement, attacks: Sequence[Attack], seed: int = 0
) -> dict:
    """Small experiments on an episode that was measured under `attacks`; counts of images, for `judge`.

    images: how many were classified correctly; all other counts are of these.
    queries: how many queries were looked at, right or wrong.
    changed: how many of these become right or wrong when the task is set up anew and epsilon is 0.
    no_gradient: by attack, how many have an input gradient of exactly zero in all its losses.
    missed: by column and loss, how many that stand fall to PGD on that loss, see `other_losses.missed`.
    from_scratch: by attack, how many images broken at its smallest radius withstand it when it is run afresh
        at its largest (with a single radius: at twice that), and how many were broken.
    norms: for each norm attacked: how many withstand a perturbation without limit (`standing`); the mean
        loss before and after PGD at the largest radius, of the first of the attacks' losses that rises, else
        of the last; how many images only a small Square Attack breaks
        there and how many only the white-box attacks.
    """
    logits, labels = measured.classifier.logits, episode.query_labels
    correct = measured.correct["clean"].clone()
    correct[CHUNK:] = False  # a sample of the largest episodes is enough
    images, own = episode.query[correct], labels[correct]
    again = predict(episode).logits
    with torch.no_grad():
        right = ~misclassified(again(episode.query[:CHUNK]), labels[:CHUNK])
    changed = int((right != measured.correct["clean"][:CHUNK]).sum())
    counts: dict = {"images": len(images), "queries": len(right), "changed": changed}
    if len(images) == 0 or episode.n_way == 1:
        return counts
    _, fell, _ = pgd(again, images, own, Ball("linf", 0, 0), steps=1, generator=stream(seed, 0))
    counts["changed"] += int(fell.sum())

    counts["no_gradient"] = _flat(logits, images, own, attacks, episode.n_way)

    def broken_by(attack: Attack, epsilon: float, which: Tensor) -> Tensor:
        """Which (Q,) bool of the queries `which` (Q,) bool the attack breaks when it is run afresh."""
        generators = query_generators(episode, seed, purpose=3)
        numbers = which.nonzero().squeeze(1)
        broken = torch.zeros_like(which)
        broken[which] = attack_some(attack, epsilon, logits, episode, numbers, generators, seed).fooled
        return broken

    counts["from_scratch"] = {}
    for attack in attacks:
        if attack.kind in FROM_SCRATCH:
            small, large = attack.epsilons[0], max(attack.epsilons[-1], 2 * attack.epsilons[0])
            before = correct & ~measured.correct[attack.column(small)]
            escaped = before & ~broken_by(attack, large, before)
            counts["from_scratch"][attack.name] = [int(escaped.sum()), int(before.sum())]
    counts["missed"] = missed(measured.correct, attacks, correct, episode.n_way, broken_by)
    counts["norms"] = {}
    for norm in NORMS:
        if concerned := on_queries(attacks, norm):
            generator = stream(seed, episode.index, 3)
            increased = own_losses(concerned, episode.n_way)
            losses = _losses(logits, images, own, norm, concerned, increased, generator)
            outdone = _outdone_by_black_box(measured, correct, norm, concerned, broken_by)
            limit = WITHOUT_LIMIT * (1 if norm == "linf" else images[0].numel() ** 0.5)
            standing = correct & ~broken_by(
                Attack("pgd", (limit,), norm, loss="+".join(increased)), limit, correct
            )
            counts["norms"][norm] = {"standing": int(standing.sum()), **losses, **outdone}
    return counts


def _flat(
    logits: Logits, images: Tensor, own: Tensor, attacks: Sequence[Attack], n_way: int
) -> dict[str, int]:
    """By attack, how many of the images with labels `own` have a gradient of exactly zero in all its
    losses."""

    def flat(loss: str) -> Tensor:
        slopes = input_gradient(lambda moved: loss_sum(loss, logits(moved), own), images)
        return slopes.flatten(1).abs().amax(1) == 0

    found = {loss: flat(loss) for loss in own_losses(attacks, n_way)}
    return {
        attack.name: int(torch.stack([found[loss] for loss in own_losses([attack], n_way)]).all(0).sum())
        for attack in attacks
    }


def _losses(
    logits: Logits,
    images: Tensor,
    own: Tensor,
    norm: str,
    attacks: Sequence[Attack],
    increased: Sequence[str],
    generator: torch.Generator,
) -> dict[str, float]:
    """The mean loss of images with labels `own` before and after 10 steps at the largest radius of a norm: of
    the first of the losses `increased` that rises, else of the last."""
    radius = max(attack.epsilons[-1] for attack in attacks)
    ball = Ball(norm, radius / 255, radius / 255 / 4)
    start, found = ball.start(images, generator), {"loss_before": 0.0, "loss_after": 0.0}
    for loss in increased:

        def total(moved: Tensor, loss: str = loss) -> Tensor:
            return loss_sum(loss, logits(moved), own)

        climbed = ascend(total, images, start, ball, steps=10)
        with torch.no_grad():
            before, after = (float(total(each)) / len(images) for each in (images, climbed))
        found = {"loss_before": before, "loss_after": after}
        if after > before:
            break
    return found


def _outdone_by_black_box(
    measured: Measurement,
    correct: Tensor,
    norm: str,
    attacks: Sequence[Attack],
    broken_by: Callable[[Attack, float, Tensor], Tensor],
) -> dict[str, int]:
    """How many images only a small Square Attack breaks, and how many only the white-box ones."""
    by_white, by_black = torch.zeros_like(correct), torch.zeros_like(correct)
    white = [attack for attack in attacks if attack.kind in WHITE_BOX]
    for attack in white:
        by_white |= correct & ~measured.correct[attack.columns[-1]]
    if white:
        radius = max(attack.epsilons[-1] for attack in attacks)
        square = Attack("square", (radius,), norm, queries=BLACK_BOX_QUERIES)
        by_black = broken_by(square, radius, correct)
    return {
        "only_black_box": int((by_black & ~by_white).sum()),
        "only_white_box": int((by_white & ~by_black).sum()),
    }


def judge(rows: Sequence[dict], attacks: Sequence[Attack]) -> list[Finding]:
    """The suspect results of one domain, in the order of its columns.

    Suspect are: any image with NaN logits; any whose class changes with nothing perturbed; more than 1% of
    images with a zero gradient; more than 5% that withstand a perturbation without limit, or that withstand
    an attack at a radius above the one that broke them; a loss that does not rise; images that black-box
    attacks break and white-box ones do not, in excess of twice the standard error; and more than 3 points
    that PGD on another loss finds.

    Args:
        rows: of one domain; those of probed episodes hold the counts under "checks".
        attacks: the attacks of the rows.
    """
    if not rows:
        return []
    probes = [row["checks"] for row in rows if "checks" in row]
    images = sum(counts["images"] for counts in probes)
    reasons = [*_not_numbers(rows, attacks), *_random(probes, attacks)]
    reasons += [*_masked(probes, attacks, images), *_escaped(probes, attacks)]
    for norm in NORMS:
        found = [counts["norms"][norm] for counts in probes if norm in counts.get("norms", {})]
        if found:
            reasons += [(_columns(on_queries(attacks, norm)), reason) for reason in _doubts(found, images)]
        reasons += _outdone(rows, attacks, norm)
    source = rows[0]["source"]
    findings = _per_column(source, attacks, reasons)
    findings += [Finding(source, column, reason) for column, reason in missing(rows, attacks)]
    return [finding for finding in findings if finding.column in rows[0]]


def _not_numbers(rows: Sequence[dict], attacks: Sequence[Attack]) -> Iterator[Reason]:
    if images := sum(row.get("nan_images", 0) for row in rows):
        text = f"{images} images with NaN logits, which count as wrong; the network is damaged or overflows"
        yield ["clean", *_columns(attacks)], text


def _random(probes: Sequence[dict], attacks: Sequence[Attack]) -> Iterator[Reason]:
    changed = sum(counts["changed"] for counts in probes)
    if changed:
        text = f"{changed} predictions change with nothing perturbed; is the network random?"
        yield ["clean", *_columns(attacks)], text


def _masked(probes: Sequence[dict], attacks: Sequence[Attack], images: int) -> Iterator[Reason]:
    for attack in attacks:
        # Older runs counted once for all attacks, in the cross-entropy.
        zero = sum(
            counts.get("no_gradient", {}).get(attack.name, counts.get("zero_gradients", 0))
            for counts in probes
        )
        if zero > MOST_ZERO_GRADIENTS * images:
            yield attack.columns, f"{zero} of {images} images have an exactly zero gradient"


def _escaped(probes: Sequence[dict], attacks: Sequence[Attack]) -> Iterator[Reason]:
    for attack in attacks:
        pairs = [counts.get("from_scratch", {}).get(attack.name, (0, 0)) for counts in probes]
        escaped, broken = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        if escaped > 1 + MOST_ESCAPED * broken:
            yield attack.columns, f"{escaped} of {broken} broken images withstand a larger radius"


def _doubts(found: Sequence[dict], images: int) -> list[str]:
    """Reasons to doubt the white-box attacks of one norm."""
    total = {name: sum(counts[name] for counts in found) for name in NormChecks.__annotations__}
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


def _outdone(rows: Sequence[dict], attacks: Sequence[Attack], norm: str) -> Iterator[Reason]:
    """Reasons from black-box attacks that were asked for, over all episodes."""
    white = [attack for attack in attacks if attack.norm == norm and attack.kind in WHITE_BOX]
    black = [attack for attack in attacks if attack.norm == norm and attack.kind in BLACK_BOX]
    for attack in black:
        for epsilon in attack.epsilons:
            within = [a.column(e) for a in white for e in a.epsilons if e <= epsilon]
            if not within:
                continue
            ours = [row | {"": min(row[column] for column in within)} for row in rows]
            theirs = [row | {"": row[attack.column(epsilon)]} for row in rows]
            excess = paired_difference(ours, theirs, "")
            if excess.mean > excess.interval:
                yield within, f"{attack.column(epsilon)} breaks {excess.mean:.1f} points more images"


def _columns(attacks: Iterable[Attack]) -> list[str]:
    return [column for attack in attacks for column in attack.columns]


def _per_column(source: str, attacks: Sequence[Attack], reasons: Sequence[Reason]) -> list[Finding]:
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
