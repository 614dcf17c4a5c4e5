"""What a report says first: who is ahead where along the whole curve, in sentences and on cards.

A run is named as ahead only where both 95% intervals of its paired difference from every other run exclude
zero, and its accuracy is above chance: a classifier that gives one answer has the rest for nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from amt.evaluation.chance import is_below_chance
from amt.evaluation.comparison import compare
from amt.evaluation.statistics import Summary
from amt.report import panels
from amt.report.shown import (
    NORMS,
    Shown,
    attack_of,
    curve_columns,
    domains,
    half,
    norm_of,
    robust_columns,
    row_counts,
)
from amt.report.tables import number

Differences = Mapping[tuple[str, str], Summary]


class Verdict(NamedTuple):
    """What one column of the curve says about the runs.

    Args:
        leader: the run that is ahead of every other one; None if there is none.
        means: leader or highest first, in per cent.
        at_chance: whether no run is above chance.
    """

    column: str
    leader: Shown | None
    means: tuple[float, ...]
    at_chance: bool


class Said(NamedTuple):
    """A sentence, about a run or about none, whose name begins it."""

    about: Shown | None
    text: str


def headline(shown: Sequence[Shown]) -> tuple[str, list[Said]]:
    """What was run in one line, and what came out in sentences."""
    names = domains(shown)
    over = f"{len(names)} domains, {row_counts(shown)}"
    if len(names) == 1:
        over = f"{row_counts(shown).removesuffix(' each')} of {names[0]}"
    if len(shown) == 1:
        return f"One run on {over}.", [Said(shown[0], _alone(shown[0]))]
    if len({frozenset(each.run.rows) for each in shown}) > 1 or len(set(robust_columns(shown))) > 1:
        told = "They do not all cover the same domains and attacks, so none is called ahead."
        return f"{len(shown)} runs on {over}.", [Said(None, told)]
    found = verdicts(shown)
    return f"{len(shown)} runs on {over}.", _sentences(shown, found)


def _alone(each: Shown) -> str:
    clean, *attacked = curve_columns([each])
    text = f"classifies {_percent(each, clean)} of clean images correctly"
    if attacked:
        rest = ", ".join(f"{_percent(each, column)} {_at([column])}" for column in attacked)
        text += f"; under attack {rest}"
    low = [column for column in attacked if is_below_chance(each.run, each.run.whole, column)]
    if low:
        text += f". Not above chance ({each.run.chance(each.run.whole):.1f}%) {_at(low)}"
    return f"{text}."


def _percent(each: Shown, column: str) -> str:
    found = each.run.summaries[each.run.whole, column]
    return f"{found.mean:.1f}% {half(found)}"


def verdicts(shown: Sequence[Shown]) -> list[Verdict]:
    """Of runs on the same domains, who is ahead in each column of their curve."""
    cache: dict[tuple[int, int], Differences] = {}

    def between(a: Shown, b: Shown) -> Differences:
        if (a.place, b.place) not in cache:
            cache[a.place, b.place] = compare(a.run, b.run).differences
        return cache[a.place, b.place]

    return [_verdict(shown, column, between) for column in curve_columns(shown)]


def _verdict(shown: Sequence[Shown], column: str, between: Callable[[Shown, Shown], Differences]) -> Verdict:
    order = sorted(shown, key=lambda each: -each.run.summaries[each.run.whole, column].mean)
    best, *others = order
    at_chance = is_below_chance(best.run, best.run.whole, column)
    ahead = not at_chance and all(decided(between(best, e).get((best.run.whole, column))) > 0 for e in others)
    means = tuple(each.run.summaries[each.run.whole, column].mean for each in order)
    return Verdict(column, best if ahead else None, means, at_chance)


def decided(difference: Summary | None) -> int:
    """`Summary.decided`; 0 where there is no difference."""
    return 0 if difference is None else difference.decided


def _sentences(shown: Sequence[Shown], found: Sequence[Verdict]) -> list[Said]:
    said = []
    for each in shown:
        won = [verdict for verdict in found if verdict.leader is each]
        if won:
            top = max(won, key=lambda verdict: verdict.means[0] - verdict.means[1])
            most = f", most {_at([top.column])}" * (len(won) > 1)
            against = f"{top.means[0]:.1f} against {top.means[1]:.1f} per cent"
            said.append((each, won, f"is ahead {_at([v.column for v in won])}{most}: {against}."))
    said.sort(key=lambda entry: max(v.means[0] - v.means[1] for v in entry[1]), reverse=True)
    sentences = [Said(each, text) for each, _, text in said]
    open_ = [verdict.column for verdict in found if verdict.leader is None and not verdict.at_chance]
    if open_:
        why = "no interval of a paired difference excludes zero"
        sentences.append(Said(None, f"No run is ahead {_at(open_)}: {why}, or there are no pairs."))
    if chance := [verdict.column for verdict in found if verdict.at_chance]:
        level = shown[0].run.chance(shown[0].run.whole)
        sentences.append(Said(None, f"No run is above chance ({level:.1f}%) {_at(chance)}."))
    return sentences


def _at(names: Sequence[str]) -> str:
    """Some columns in a sentence: `on clean images and at epsilon 2 and 4`."""
    radii = [f"{parts[1]:g}" for name in names if (parts := attack_of(name)) is not None]
    words = ["on clean images"] * ("clean" in names)
    words += [f"at epsilon {_listed(radii)}"] if radii else []
    words += [f"under {n}" for n in names if n != "clean" and attack_of(n) is None]
    return _listed(words)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# --- cards -----------------------------------------------------------------------------------------------


def cards(shown: Sequence[Shown]) -> list[dict]:
    """A card for each run, all laid out alike: its whole curve in numbers, and its differences from the
    first run (of two runs, from each other)."""
    names = curve_columns(shown)
    alike = len(names) > 1 or len(set(robust_columns(shown))) == 1
    return [_card(each, shown, names if alike else curve_columns([each])) for each in shown]


def _card(each: Shown, shown: Sequence[Shown], names: Sequence[str]) -> dict:
    other = shown[0] if each.place else shown[1] if len(shown) == 2 else None
    found = compare(each.run, other.run).differences if other is not None else {}
    about = each.run.about
    over = f"average over {len(each.run.rows)} domains" if each.run.average else each.run.whole
    tiles = [_tile(each, column, found) for column in names]
    known = [f"seed {about['seed']}", *(f"{k} {about[k]}" for k in ("split", "commit") if about.get(k))]
    return {
        "label": each.label,
        "style": panels.distinct(each.place),
        "over": f"{over}, {each.run.summaries[each.run.whole, 'clean'].n} {each.run.unit}s",
        "attack": attack_line(names),
        "from": f"points from {other.label}" if other and found else "",
        "tiles": tiles,
        "low": any(tile["low"] for tile in tiles),
        "doubts": list(dict.fromkeys(filter(None, (each.run.suspect(each.run.whole, c) for c in names)))),
        "known": ", ".join(known),
    }


def attack_line(names: Sequence[str]) -> str:
    """What ε on a card stands for."""
    attacks = dict.fromkeys(parts[0] for name in names if (parts := attack_of(name)) is not None)
    return "; ".join(f"ε: {attack}, {NORMS[norm_of(attack)]}, in 1/255" for attack in attacks)


def _tile(each: Shown, column: str, found: Differences) -> dict:
    summary, versus = each.run.summaries[each.run.whole, column], found.get((each.run.whole, column))
    parts, low = attack_of(column), is_below_chance(each.run, each.run.whole, column)
    return {
        "what": column if parts is None else f"ε {parts[1]:g}",
        "mean": f"{summary.mean:.1f}",
        "low": low,
        "half": half(summary),
        "versus": f"{number(versus.mean, '+.1f')} {half(versus)}" if versus else "",
        "sign": {1: "better", -1: "worse", 0: "open"}[decided(versus)],
        "doubt": bool(each.run.suspect(each.run.whole, column)),
    }
