"""Paired comparison of two runs on the same episodes.

Episodes and the starts of attacks depend on seed, split and sampling alone. Runs that agree in these are
compared episode by episode, which takes the spread between episodes out of the interval; runs on whole test
sets are compared image by image. The name of an attack's column carries its settings; a worst case over
attacks is compared only where the attacks are the same.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from amt.evaluation.runs import UNITS, Run, common_rows
from amt.evaluation.statistics import Summary, over_seeds


class Comparison(NamedTuple):
    """Ours minus theirs, in points.

    Args:
        differences: by domain or average, and column; over the episodes that both runs have finished.
        refusals: why domains, or the runs as a whole, could not be paired.
    """

    differences: dict[tuple[str, str], Summary]
    refusals: tuple[str, ...]


def compare(ours: Run, theirs: Run) -> Comparison:
    """Paired differences of all columns that both runs have, by domain and by average.

    Of rows of several training seeds, seed by seed: those of one --seed belong together, and where all have
    the same --seed those of one place.
    """
    reason = _other_seeds(ours, theirs)
    if reason is not None:
        return Comparison({}, (reason,))
    both = [source for source in theirs.sources if source in ours.sources]
    pairs = {source: _paired_seeds(ours, theirs, source) for source in both}
    refusals = [f"they share no {theirs.unit} of {source}" for source in both if pairs[source] is None]
    refusals += [] if both else ["they share no domain"]
    pairs = {source: pair for source, pair in pairs.items() if pair is not None}
    names = {source: (source,) for source in pairs} | _shared_averages(ours, theirs, pairs)
    columns, unions = _shared_columns(ours, theirs)
    refusals += [f"{column}, which is over other attacks" for column in unions]
    same = theirs.same_episodes
    seeds = [{source: pair[k] for source, pair in pairs.items()} for k in range(len(theirs.seeds))]
    found = {
        (name, column): over_seeds(_differences(seeds, members, column), same)
        for column in columns
        for name, members in names.items()
    }
    return Comparison(found, tuple(refusals))


def _differences(
    seeds: Sequence[Mapping[str, list[dict]]], sources: Sequence[str], column: str
) -> list[dict[str, list[float]]]:
    """By seed and domain the differences of one column in points."""
    return [
        {s: [100 * (pair["ours"][column] - pair["theirs"][column]) for pair in seed[s]] for s in sources}
        for seed in seeds
    ]


def _other_seeds(ours: Run, theirs: Run) -> str | None:
    """Why two rows cannot be compared seed by seed; None if they can."""
    counts = len(ours.seeds), len(theirs.seeds)
    if counts[0] != counts[1]:
        return f"it has {counts[0]} training seeds, not {counts[1]}"
    reasons = (other_episodes(a.about, b.about) for a, b in seed_by_seed(ours, theirs))
    return next((reason for reason in reasons if reason is not None), None)


def seed_by_seed(ours: Run, theirs: Run) -> list[tuple[Run, Run]]:
    """The runs that belong together, in the order of `theirs`."""
    by_seed = {each.about["seed"]: each for each in ours.seeds}
    wanted = [each.about["seed"] for each in theirs.seeds]
    if len(by_seed) == len(wanted) and set(wanted) == by_seed.keys():
        return [(by_seed[seed], run) for seed, run in zip(wanted, theirs.seeds, strict=True)]
    return list(zip(ours.seeds, theirs.seeds, strict=True))


def _paired_seeds(ours: Run, theirs: Run, source: str) -> list[list[dict]] | None:
    """By seed the pairs of rows of a domain, see `common_rows`; None if a seed has none."""
    found = []
    for run, other in seed_by_seed(ours, theirs):
        pairs = same_episodes(run.rows[source], other.rows[source])
        if pairs is None:
            return None
        found.append([{"index": a["index"], "ours": a, "theirs": b} for a, b in zip(*pairs, strict=True)])
    found = common_rows(found, theirs.same_episodes)
    return found if all(found) else None


def _shared_averages(ours: Run, theirs: Run, sources: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The averages over the same domains in both runs, all among `sources`: over other domains the same name
    would mean another number."""
    return {
        name: members
        for name, members in theirs.averages.items()
        if len(members) > 1 and set(members) == set(ours.averages.get(name, ())) <= set(sources)
    }


def _shared_columns(ours: Run, theirs: Run) -> tuple[list[str], list[str]]:
    """The columns of both runs that can be compared, and the worst cases over different attacks, which
    cannot."""
    columns = [column for column in theirs.columns if column in ours.columns]
    if ours.about["attacks"] == theirs.about["attacks"]:
        return columns, []
    unions = [column for column in columns if column.startswith("union")]
    return [column for column in columns if column not in unions], unions


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
