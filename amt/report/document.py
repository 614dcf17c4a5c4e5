"""Runs as one HTML page: everything about them that a reader needs to believe them, or not.

The page is a single file that asks the network for nothing, which its own content security policy holds it
to. It shows summaries only, so its size does not grow with the number of episodes; its images have a budget.
Decides what is said; page.html.j2 says where, and escapes all of it. The figures come from `charts`.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from PIL import Image

from amt.attacks.kinds import KINDS
from amt.evaluation.chance import MARK, is_below_chance
from amt.evaluation.comparison import in_words
from amt.evaluation.runs import SEVERITIES, Run, Sample, attack_from
from amt.evaluation.statistics import Summary
from amt.report import charts, figures, panels
from amt.report.charts import Differences
from amt.report.pictures import amplify, data_uri
from amt.report.shown import (
    NORMS,
    Shown,
    between,
    columns,
    domains,
    has_interval,
    label,
    robust_columns,
    row_counts,
    union,
    units,
)
from amt.report.tables import Cell, Table, corruption_rows, number

SAMPLE_SIDE = 128  # pixels; larger samples are shown smaller
SAMPLE_BUDGET = 2_000_000  # characters of images in a page
MOST_IMAGES = 4  # of one episode
MISSING = Cell("–", missing=True)
ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.globals |= {"drawings": figures.drawings, "legend": panels.legend, "swatch": figures.swatch}


def page(runs: Sequence[Run]) -> str:
    """The report on some runs, the first of which the others are compared with.

    Raises:
        InputError: a sample file is damaged.
    """
    shown = label(runs)
    compared = charts.differences(shown) if len(shown) > 1 else None
    return rendered(
        shown,
        lead=summary_line(shown),
        notices=list(notices(shown, compared)),
        cards=[card(each, shown, compared) for each in shown],
        results=results(shown),
        doubts=doubts(shown),
        below_chance=below_chance(shown),
        scatter=charts.scatter(shown),
        curves=charts.curves(shown),
        compared=compared,
        refusals=[sentence(refusal) for refusal in compared.refusals] if compared else [],
        heat_maps=charts.heat_maps(shown),
        corruptions=corruptions(shown),
        samples=samples(shown),
        cost=cost(shown),
        seconds=charts.seconds(shown),
    )


def rendered(shown: Sequence[Shown], **parts) -> str:
    """The page of the `parts` that there are."""
    style, script, template = (_file(name) for name in ("page.css", "page.js", "page.html.j2"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    names = ("rankings", "doubts", "scatter", "curves", "compared", "refusals", "heat_maps", "corruptions")
    absent = dict.fromkeys((*names, "samples", "cost", "seconds", "cards", "notices"))
    text = ENVIRONMENT.from_string(template).render(
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        shown=shown,
        few_shot=any(each.run.unit == "episode" for each in shown),
        units=units(shown),
        stamps=stamps(shown),
        sample_side=SAMPLE_SIDE,
        about=[(each.label, about(each)) for each in shown],
        **(absent | {"cards": [], "notices": []} | parts),
    )
    return text.strip() + "\n"


def _file(name: str) -> str:
    return resources.files("amt.report").joinpath(name).read_text("utf-8")


# --- the top ---------------------------------------------------------------------------------------------


def summary_line(shown: Sequence[Shown]) -> str:
    """A few sentences in plain words."""
    names = domains(shown)
    if len(names) == 1 and units(shown) == "images":
        over = f"{row_counts(shown)} of {names[0]}"
    else:
        over = f"{len(names)} domain{'s' * (len(names) != 1)}, {row_counts(shown)}"
    robust = robust_columns(shown)
    if len(shown) == 1:
        (each,), (column,) = shown, robust
        line = f"{each.label} classifies {_percent(each, 'clean')} of clean images correctly"
        if column:
            line += f" and {_percent(each, column)} of attacked ones ({column})"
        return f"{line}, over {over}."
    if len({frozenset(each.run.rows) for each in shown}) > 1 or len(set(robust)) > 1:
        return f"{len(shown)} runs on {over}; they do not all cover the same domains and attacks."
    sentences = [f"{len(shown)} runs on {over}", _highest(shown, "clean", "On clean images")]
    if robust[0]:
        sentences.append(_highest(shown, robust[0], f"Under {robust[0]}"))
    return ". ".join(sentences) + "."


def _percent(each: Shown, column: str) -> str:
    found = each.summary(each.whole, column)
    return f"{found.mean:.1f}% {half(found)}"


def half(summary: Summary) -> str:
    return f"±{summary.interval:.1f}" if has_interval(summary) else "(no interval)"


def _highest(shown: Sequence[Shown], column: str, where: str) -> str:
    """Who is best, or that nobody is."""
    means = [round(each.summary(each.whole, column).mean, 1) for each in shown]
    best = [each for each, mean in zip(shown, means, strict=True) if mean == max(means)]
    if len(best) == len(shown):
        return f"{where} all reach {_percent(best[0], column)}"
    names = " and ".join(each.label for each in best)
    return f"{where} the highest accuracy is that of {names}, {_percent(best[0], column)}"


def stamps(shown: Sequence[Shown]) -> list[str]:
    """How settings were chosen where that was not honest, loudly."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in shown:
        for domain, how in each.run.merging.items():
            if how.get("stamp"):
                found.setdefault((each.label, str(how["stamp"])), []).append(domain)
    return [f"{name}: {stamp} ({', '.join(where)})" for (name, stamp), where in found.items()]


def notices(shown: Sequence[Shown], compared: Differences | None) -> Iterable[str]:
    """What speaks against the results."""
    for each in shown:
        if not each.run.complete:
            asked = each.run.about["episodes"]
            have = ", ".join(f"{s} {len(each.run.rows.get(s, ()))}" for s in each.run.about["sources"])
            yield f"{each.label} is unfinished: of {asked} {each.run.unit}s per domain it has {have}."
    suspects = union([f"{each.label} on {f.source}" for f in each.run.findings] for each in shown)
    if suspects:
        yield f"Automatic checks doubt some results, marked suspect: {', '.join(suspects)}."
    members: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for each in shown:
        for name, covered in each.run.averages.items():
            members.setdefault(name, {}).setdefault(covered, []).append(each.label)
    for name, kinds in members.items():
        if len(kinds) > 1:
            parts = (f"{', '.join(who)} over {', '.join(covered)}" for covered, who in kinds.items())
            yield f"“{name}” covers other domains by run, so it is not to be compared: {'; '.join(parts)}."
    if compared is not None:
        yield from map(sentence, compared.refusals)


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def card(each: Shown, shown: Sequence[Shown], compared: Differences | None) -> dict:
    """The run's averages in large print; `versus` is the difference from the first run."""
    name, tiles = each.whole, []
    robust = robust_columns(shown)[each.place]
    for column in ("clean", *([robust] if robust else [])):
        summary, versus = each.summary(name, column), None
        if compared is not None and (found := compared.by_run.get(each.label, {}).get((name, column))):
            versus = f"{number(found.mean, '+.1f')} {half(found)} points from {shown[0].label}"
        numbers = {"mean": f"{summary.mean:.1f}", "half": half(summary), "versus": versus}
        tiles.append({"column": column, **numbers, "doubt": each.run.suspect(name, column)})
    over = f"average over {len(each.run.rows)} domains" if each.average else name
    over = f"{over}, {each.summary(name, 'clean').n} {each.run.unit}s, per cent"
    about = each.run.about
    known = [f"seed {about['seed']}", *(f"{k} {about[k]}" for k in ("split", "commit") if about.get(k))]
    style = panels.distinct(each.place)
    return {"label": each.label, "style": style, "over": over, "tiles": tiles, "known": ", ".join(known)}


# --- tables ----------------------------------------------------------------------------------------------


def results(shown: Sequence[Shown]) -> Table:
    """Every accuracy by domain and run, then the averages."""
    averages = union(each.run.averages for each in shown if each.average)
    several = len(shown) > 1
    bodies = [
        [
            _result(each, name, columns(shown), several)
            for name in names
            for each in shown
            if name in each.run.rows or name in each.run.averages
        ]
        for names in (domains(shown), averages)
    ]
    return Table(("domain", *(["run"] if several else []), "n", "chance", *columns(shown)), *bodies)


def _result(each: Shown, name: str, among: Sequence[str], several: bool) -> list[Cell]:
    members = each.run.averages.get(name)
    note = f" of {len(members)}" if members and name not in each.run.rows else ""
    summaries = [each.summary(name, column) for column in among]
    n = next(summary.n for summary in summaries if summary is not None)
    chance = each.run.chance(name)
    return [
        Cell(name, note=note),
        *([Cell(each.label)] if several else []),
        Cell(str(n), n),
        Cell(f"{chance:.1f}", chance),
        *(accuracy(each, name, column, s) for column, s in zip(among, summaries, strict=True)),
    ]


def accuracy(each: Shown, name: str, column: str, summary: Summary | None) -> Cell:
    if summary is None:
        return MISSING
    ends = f"[{summary.low:.1f}, {summary.high:.1f}]" if has_interval(summary) else "n = 1"
    doubt = each.run.suspect(name, column)
    below = MARK if is_below_chance(each.run, name, column) else ""
    return Cell(f"{summary.mean:.1f}{below}", summary.mean, f" {half(summary)}", ends, doubt=doubt)


def below_chance(shown: Sequence[Shown]) -> bool:
    """Whether any number on the page is."""
    return any(
        is_below_chance(each.run, name, column)
        for each in shown
        for name in (*each.run.rows, *each.run.averages)
        for column in each.run.columns
    )


def doubts(shown: Sequence[Shown]) -> list[str]:
    """What the automatic checks found, in which columns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for each in shown:
        for finding in each.run.findings:
            found.setdefault((each.label, finding.source, finding.reason), []).append(finding.column)
    return [f"{name}, {domain}: {why} ({', '.join(named)})" for (name, domain, why), named in found.items()]


def corruptions(shown: Sequence[Shown]) -> Table | None:
    """Accuracy by corruption and severity, and the means that papers report."""
    found = {each.label: corruption_rows(each.run.corruptions) for each in shown if each.run.corruptions}
    if not found:
        return None
    several = len(shown) > 1
    names = [name for name in union(found.values()) if name != "mean"]
    bodies = [
        [
            (Cell(name), *([Cell(run)] if several else []), *(Cell(f"{v:.1f}", v) for v in rows[name]))
            for name in body
            for run, rows in found.items()
            if name in rows
        ]
        for body in (names, ["mean"])
    ]
    severities = map(str, range(1, SEVERITIES + 1))
    return Table(("corruption", *(["run"] if several else []), *severities, "mean"), *bodies)


def cost(shown: Sequence[Shown]) -> Table:
    """Time and memory that the complete runs took."""
    rows = []
    for each in shown:
        run, known = each.run, each.run.about
        count = len(run.every_row)
        measured = [
            Cell(shape(known[name]), known[name])
            if run.complete and isinstance(known.get(name), int | float)
            else Cell("unfinished", missing=True)
            for name, shape in (("episode_seconds", _duration), ("peak_memory_mb", _memory))
        ]
        rows.append(
            (Cell(each.label), Cell(str(count), count), *measured, Cell(str(known.get("device") or "–")))
        )
    return Table(("run", units(shown), "time", "peak memory", "device"), rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:.1f} GB"


# --- samples ---------------------------------------------------------------------------------------------


class Trio(NamedTuple):
    """One image of a sample: as it was, what was done to it, and the result, as data URIs.

    Args:
        factor: of amplification; None where nothing was done.
        label, before, after: names of its class, and of the classes predicted for clean and attacked.
    """

    clean: str
    perturbation: str
    attacked: str
    factor: float | None
    label: str
    before: str
    after: str


def samples(shown: Sequence[Shown]) -> dict | None:
    """The first images of every sample episode, round by round until the budget is spent.

    Returns:
        blocks: by episode, which it is and its images.
        count, total: how many images are shown, and how many were kept with the runs.
        shrunk: whether some have more than `SAMPLE_SIDE` pixels.
    """
    found = [(each, sample) for each in shown for sample in each.run.samples()]
    order = {domain: k for k, domain in enumerate(domains(shown))}
    found.sort(key=lambda pair: (order.get(pair[1].source, len(order)), pair[1].index, pair[0].place))
    trios: list[list[Trio]] = [[] for _ in found]
    spent = 0
    for k in range(MOST_IMAGES):
        for taken, (_, sample) in zip(trios, found, strict=True):
            if k < len(sample.clean) and spent < SAMPLE_BUDGET:
                taken.append(trio(sample, k))
                spent += sum(map(len, taken[-1][:3]))
    blocks = []
    for (each, sample), taken in zip(found, trios, strict=True):
        place = f", episode {sample.index}" * (each.run.unit == "episode")
        where = f"{sample.source}{place}, {sample.column}" + f": {each.label}" * (len(shown) > 1)
        blocks += [(where, taken)] if taken else []
    if not blocks:
        return None
    shrunk = any(max(sample.clean.shape[1:3]) > SAMPLE_SIDE for _, sample in found)
    total = sum(len(sample.clean) for _, sample in found)
    return {"blocks": blocks, "count": sum(map(len, trios)), "total": total, "shrunk": shrunk}


def trio(sample: Sample, k: int) -> Trio:
    clean, attacked = (
        data_uri(images[k], SAMPLE_SIDE, Image.Resampling.LANCZOS)
        for images in (sample.clean, sample.attacked)
    )
    # An average of neighbours would show a smaller perturbation than there is: every value stays one of it.
    pixels, factor = amplify(sample.perturbation[k])
    shown = data_uri(pixels, SAMPLE_SIDE, Image.Resampling.NEAREST)
    labels = (sample.labels, sample.predicted_clean, sample.predicted_attacked)
    return Trio(clean, shown, attacked, factor, *(sample.class_names[each[k]] for each in labels))


# --- what was run ----------------------------------------------------------------------------------------


def about(each: Shown) -> dict[str, str | list[str]]:
    """What somebody needs to do it again, by name; lists are a line each. Without what is not known."""
    known, run = each.run.about, each.run
    how: dict[str, list[str]] = {}
    for domain, found in run.merging.items():
        how.setdefault(str(found.get("how", "not noted")), []).append(domain)
    merging = [text if len(how) == 1 else f"{', '.join(covered)}: {text}" for text, covered in how.items()]
    variants = {f"{column} ran as {variant}" for column, found in run.variants.items() for variant in found}
    versions = known.get("versions")
    settings = {name: known.get(name) for name in ("settings", "sampling", "deployments")}
    told = {
        "folder": str(run.folder),
        "command": str(known.get("command", "not noted")),
        "commit": known.get("commit"),
        "versions": in_words(versions) if isinstance(versions, Mapping) else None,
        "started": known.get("started"),
        "network": known.get("arch"),
        "checkpoint": known.get("checkpoint") or "none, the pretrained network",
        "seed": str(known["seed"]),
        "split": known.get("split"),
        f"{run.unit}s": shapes(run),
        "attacks": [attack_words(attack) for attack in known["attacks"]] or "none",
        "variants": sorted(variants),
        "merging": merging,
        "settings": json.dumps(settings, indent=1, ensure_ascii=False),
    }
    return {name: value for name, value in told.items() if value}


def shapes(run: Run) -> str:
    """How many rows there are in a domain, and how large the episodes were."""
    rows = run.every_row
    if run.unit == "image":
        return f"{run.about['episodes']}, of {between(row['ways'] for row in rows)} classes"
    parts = [f"{run.about['episodes']} per domain"]
    for name, what in (("ways", "ways"), ("support", "support images"), ("queries", "query images")):
        counts = {row[name] for row in rows if name in row}
        if counts:
            parts.append(f"{between(counts)} {what}")
    return ", ".join(parts)


def attack_words(values: Mapping) -> str:
    """An entry of run.json's "attacks"."""
    attack = attack_from(values)
    rest = {name: values.get(name) for name in KINDS[attack.kind].options}
    epsilons = in_words(attack.epsilons)
    words = f"{attack.name}: {NORMS[attack.norm]}, epsilon {epsilons} of 255"
    return "; ".join(filter(None, (words, in_words(rest))))
