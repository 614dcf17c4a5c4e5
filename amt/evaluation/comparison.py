"""Paired comparison of two runs on the same episodes.

Episodes and the starts of attacks depend on seed, split and sampling alone. Runs that agree in these are
compared episode by episode, which takes the spread between episodes out of the interval; runs on whole test
sets are compared image by image. The name of an attack's column carries its settings; a worst case over
attacks is compared only where the attacks are the same.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from amt.evaluation.runs import UNITS, Run
from amt.evaluation.statistics import Summary, paired_difference, with_averages


class Comparison(NamedTuple):
    """Ours minus theirs, in points.

    Args:
        differences: by domain or average, and column; over the episodes that both runs have finished.
        refusals: why domains, or the runs as a whole, could not be paired.
    """

    differences: dict[tuple[str, str], Summary]
    refusals: tuple[str, ...]


def compare(ours: Run, theirs: Run) -> Comparison:
    """Paired differences of all columns that both runs have, by domain and by average."""
    reason = other_episodes(ours.about, theirs.about)
    if reason is not None:
        return Comparison({}, (reason,))
    both = [source for source in theirs.sources if source in ours.sources]
    pairs = {source: same_episodes(ours.rows[source], theirs.rows[source]) for source in both}
    refusals = [f"they share no {theirs.unit} of {source}" for source in both if pairs[source] is None]
    refusals += [] if both else ["they share no domain"]
    pairs = {source: pair for source, pair in pairs.items() if pair is not None}
    # An average over other domains would be another number under the same name.
    averages = {
        name: members
        for name, members in theirs.averages.items()
        if len(members) > 1 and set(members) == set(ours.averages.get(name, ())) <= pairs.keys()
    }
    columns = [column for column in theirs.columns if column in ours.columns]
    if ours.about["attacks"] != theirs.about["attacks"]:
        unions = [column for column in columns if column.startswith("union")]
        columns = [column for column in columns if column not in unions]
        refusals += [f"{column}, which is over other attacks" for column in unions]
    found: dict[tuple[str, str], Summary] = {}
    for column in columns:
        by_source = {source: paired_difference(*pair, column) for source, pair in pairs.items()}
        summaries = with_averages(by_source, averages)
        found |= {(name, column): difference for name, difference in summaries.items()}
    return Comparison(found, tuple(refusals))


def other_episodes(ours: Mapping, theirs: Mapping) -> str | None:
    """Why two runs, by what their run.json says, did not draw the same episodes; None if they did.

    A whole test set is not drawn: there the seed decides only where attacks start.
    """
    units = [about.get("unit", UNITS[0]) for about in (ours, theirs)]
    if units[0] != units[1]:
        return f"its rows are of one {units[0]} each, not of one {units[1]}"
    for name in ("split",) if units[0] == "image" else ("seed", "split", "sampling"):
        if ours.get(name) != theirs.get(name):
            return f"its {name} is {in_words(ours.get(name))}, not {in_words(theirs.get(name))}"
    return None


def in_words(value: object) -> str:
    """A setting in a sentence."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def same_episodes(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> tuple[list, list] | None:
    """The rows of the episodes that both runs finished, in one order; None if there is none, or if shapes or
    labels show that they are other episodes."""
    by_index = {row["index"]: row for row in theirs}
    pairs = [(row, by_index[row["index"]]) for row in ours if row["index"] in by_index]
    shape = ("ways", "support", "queries", "label")
    if not pairs or any(a.get(name) != b.get(name) for a, b in pairs for name in shape):
        return None
    return [a for a, _ in pairs], [b for _, b in pairs]
