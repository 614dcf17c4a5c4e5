"""Two runs on the same episodes: by how much one is better, and how sure that is.

Episodes depend on seed, split and sampling alone, and so do the starts of attacks, image by image; so runs
that agree in these are compared episode by episode, which takes the spread between episodes out of the
interval. Runs on whole test sets are compared image by image.
An attack's columns carry its settings in their names; a worst case over attacks is compared only where the
attacks are the same.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from amt.evaluation.runs import UNITS, Run
from amt.evaluation.statistics import Summary, average_summary, paired_difference


class Comparison(NamedTuple):
    """Ours minus theirs, in points.

    Args:
        differences: by domain or average, and column; over the episodes that both have finished.
        refusals: why domains, or the runs as a whole, could not be paired.
    """

    differences: dict[tuple[str, str], Summary]
    refusals: tuple[str, ...]


def compare(ours: Run, theirs: Run) -> Comparison:
    """Paired differences of all columns that both runs have, by domain and by average."""
    if (reason := other_episodes(ours.about, theirs.about)) is not None:
        return Comparison({}, (reason,))
    pairs, refusals = {}, []
    for source in [source for source in theirs.sources if source in ours.sources]:
        pair = same_episodes(ours.rows[source], theirs.rows[source])
        if pair is None:
            refusals.append(f"they share no {theirs.unit} of {source}")
        else:
            pairs[source] = pair
    if not pairs and not refusals:
        refusals.append("they share no domain")
    found: dict[tuple[str, str], Summary] = {}
    columns = [column for column in theirs.columns if column in ours.columns]
    if ours.about["attacks"] != theirs.about["attacks"]:
        unions = [column for column in columns if column.startswith("union")]
        columns = [column for column in columns if column not in unions]
        refusals += [f"{column}, which is that of other attacks" for column in unions]
    for column in columns:
        for source, pair in pairs.items():
            found[source, column] = paired_difference(*pair, column)
        for name, members in theirs.averages.items():
            shared = [found[source, column] for source in members if source in pairs]
            # Of other domains an average would be another number under the same name.
            if set(members) == set(ours.averages.get(name, ())) and len(shared) == len(members) > 1:
                found[name, column] = average_summary(shared)
    return Comparison(found, tuple(refusals))


def other_episodes(ours: Mapping, theirs: Mapping) -> str | None:
    """Why two runs, by what their run.json says, did not draw the same episodes; None if they did. Of a whole
    test set nothing is drawn: there the seed decides the attacks' starts alone."""
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
    """The rows of the episodes that both runs finished; None if there is none, or the shapes or labels of
    some differ, which are then others."""
    by_index = {row["index"]: row for row in theirs}
    pairs = [(row, by_index[row["index"]]) for row in ours if row["index"] in by_index]
    shape = ("ways", "support", "queries", "label")
    if not pairs or any(a.get(name) != b.get(name) for a, b in pairs for name in shape):
        return None
    return [a for a, _ in pairs], [b for _, b in pairs]
