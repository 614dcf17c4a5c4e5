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

from jinja2 import Environment, StrictUndefined

from amt.attacks.kinds import KINDS
from amt.evaluation.chance import MARK, is_below_chance
from amt.evaluation.comparison import in_words
from amt.evaluation.runs import Run, attack_from
from amt.evaluation.statistics import Summary
from amt.report import charts, figures, panels, shots
from amt.report.by_class import by_domain
from amt.report.certainty import certainty
from amt.report.charts import Differences
from amt.report.example_tasks import SAMPLE_SIDE, example_tasks
from amt.report.headline import cards, headline
from amt.report.shown import NORMS, Shown, between, columns, domains, half, has_interval, label, union, units
from amt.report.tables import MISSING, Cell, Table, corruption_rows, counted, rounded

ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.globals |= {"drawings": figures.drawings, "legend": panels.legend, "swatch": figures.swatch}


def page(runs: Sequence[Run]) -> str:
    """The report on some runs, the first of which the others are compared with.

    Raises:
        InputError: a sample file is damaged.
    """
    shown = label(runs)
    compared = charts.differences(shown) if len(shown) > 1 else None
    lead, said = headline(shown)
    return rendered(
        shown,
        lead=lead,
        said=said,
        notices=list(notices(shown, compared)),
        cards=cards(shown),
        tasks_are=tasks_are(shown),
        hero=charts.hero(shown),
        results=results(shown),
        doubts=doubts(shown),
        below_chance=below_chance(shown),
        scatter=charts.scatter(shown),
        curves=[*shots.curves(shown), *charts.curves(shown)],
        compared=compared,
        refusals=[sentence(refusal) for refusal in compared.refusals] if compared else [],
        heat_maps=charts.heat_maps(shown),
        corruptions=corruptions(shown),
        classes=by_domain(shown),
        certainty=certainty(shown),
        samples=example_tasks(shown),
        cost=cost(shown),
        seconds=charts.seconds(shown),
    )


def rendered(shown: Sequence[Shown], **parts) -> str:
    """The page of the `parts` that there are."""
    style, script, template = (_file(name) for name in ("page.css", "page.js", "page.html.j2"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    names = ("rankings", "doubts", "scatter", "curves", "compared", "refusals", "heat_maps", "corruptions")
    absent = dict.fromkeys(
        (*names, "samples", "cost", "seconds", "classes", "certainty", "hero", "tasks_are")
    )
    text = ENVIRONMENT.from_string(template).render(
        style=style,
        script=script,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        shown=shown,
        few_shot=any(each.run.unit == "episode" for each in shown),
        units=units(shown),
        stamps=stamps(shown),
        styles=[panels.distinct(each.place) for each in shown],
        sample_side=SAMPLE_SIDE,
        about=[(each.label, about(each)) for each in shown],
        **(absent | {"cards": [], "notices": [], "said": []} | parts),
    )
    return text.strip() + "\n"


def _file(name: str) -> str:
    return resources.files("amt.report").joinpath(name).read_text("utf-8")


# --- the top -------------------------------------------------------------------------------------------


def tasks_are(shown: Sequence[Shown]) -> str:
    """What had to be done, in words, where all runs had the same to do."""
    found = {f"{tasks(each.run)} {attacked(each.run)}" for each in shown}
    return found.pop() if len(found) == 1 else ""


def tasks(run: Run) -> str:
    """What the rows of a run are, in a sentence."""
    rows = run.every_row
    ways = between(row["ways"] for row in rows)
    if run.unit == "image":
        return f"Every image of a test set is put into one of {ways} classes."
    shots, queries = (between(row[name] for row in rows) for name in ("support", "queries"))
    return (
        f"Each task shows {shots} labelled images of {ways} classes and asks for the class of {queries} new "
        "images."
    )


def attacked(run: Run) -> str:
    """What was done to the images of a run, in a sentence."""
    words = [attack_from(values).name for values in run.about["attacks"]]
    if not words:
        return "Nothing is attacked."
    return f"Attacked by {', '.join(words)}; chance is {run.chance(run.whole):.1f} per cent."


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


# --- tables ----------------------------------------------------------------------------------------------


def results(shown: Sequence[Shown]) -> Table:
    """Every accuracy by domain and run, then the averages."""
    averages = union(each.run.averages for each in shown if each.run.average)
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
    heads = ("domain", *(["run"] if several else []), *columns(shown), "n", "chance")
    return Table(heads, *bodies)


def _result(each: Shown, name: str, among: Sequence[str], several: bool) -> list[Cell]:
    members = each.run.averages.get(name)
    note = f" of {len(members)}" if members and name not in each.run.rows else ""
    summaries = [each.run.summary(name, column) for column in among]
    n = next(summary.n for summary in summaries if summary is not None)
    return [
        Cell(name, note=note, run=each.label if several else ""),
        *([Cell(each.label)] if several else []),
        *(accuracy(each, name, column, s) for column, s in zip(among, summaries, strict=True)),
        counted(n),
        rounded(each.run.chance(name)),
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
            (Cell(name), *([Cell(run)] if several else []), *map(rounded, rows[name]))
            for name in body
            for run, rows in found.items()
            if name in rows
        ]
        for body in (names, ["mean"])
    ]
    severities = map(str, range(1, len(next(iter(found.values()))["mean"])))
    return Table(("corruption", *(["run"] if several else []), *severities, "mean"), *bodies)


def cost(shown: Sequence[Shown]) -> Table:
    """Time and memory that the complete runs took."""
    rows = []
    for each in shown:
        run, known = each.run, each.run.about
        measured = [
            Cell(shape(known[name]), known[name])
            if run.complete and isinstance(known.get(name), int | float)
            else Cell("unfinished", missing=True)
            for name, shape in (("episode_seconds", _duration), ("peak_memory_mb", _memory))
        ]
        device = Cell(str(known.get("device") or "–"))
        rows.append((Cell(each.label), counted(len(run.every_row)), *measured, device))
    return Table(("run", units(shown), "time", "peak memory", "device"), rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:.1f} GB"


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
