"""Runs as one HTML page: everything about them that a reader needs to believe them, or not.

The page is a single file that asks the network for nothing, which its own content security policy holds it
to. It shows summaries only, so its size does not grow with the number of episodes; its images have a budget.
Text from files goes through `markup`, which escapes it. The figures come from `charts`.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from PIL import Image

from amt.attacks.kinds import KINDS
from amt.evaluation.comparison import in_words
from amt.evaluation.runs import SEVERITIES, Run, Sample, attack_from, corruption_summary
from amt.evaluation.statistics import Summary
from amt.report import charts
from amt.report.charts import Differences, Shown
from amt.report.drawing import Cell, Figure, HeatMap, Share, Table, number
from amt.report.markup import Child, Markup, element, join
from amt.report.pictures import amplify, data_uri
from amt.report.svg import figure_svg, strip_svg, swatch

SAMPLE_SIDE = 128  # pixels; larger samples are shown smaller
SAMPLE_BUDGET = 2_000_000  # characters of images in a page
MOST_IMAGES = 4  # of one episode
TEXT_COLUMNS = {"domain", "corruption", "run", "attack", "adapter", "column", "robust column", "device"}


def page(runs: Sequence[Run]) -> str:
    """The report on some runs, the first of which the others are compared with.

    Raises:
        InputError: a sample file is damaged.
    """
    shown = charts.label(runs)
    compared = charts.differences(shown) if len(shown) > 1 else None
    sections = [
        ("results", "Results", results(shown)),
        ("scatter", "Clean against robust", figure_block(charts.scatter(shown), titled=False)),
        ("curves", "Robustness curves", join(figure_block(figure) for figure in charts.curves(shown))),
        ("differences", "Differences between runs", compared and differences_block(compared)),
        ("merging", "Merged adapters", merging_block(charts.heat_maps(shown))),
        ("corruptions", "Common corruptions", corruptions_block(shown)),
        ("samples", f"Sample {charts.units(shown)}", samples_block(shown)),
        ("cost", "Time and memory", cost_block(shown)),
        ("about", "What was run", element("div", *map(about_block, shown), class_="runs")),
        ("reading", "How to read this page", element("ul", *map(_item, reading(shown)))),
    ]
    sections = [(name, title, content) for name, title, content in sections if content]
    body = [
        header(shown, compared, [(name, title) for name, title, _ in sections]),
        element(
            "main",
            *(
                element("section", element("h2", title), content, id=name, class_="section")
                for name, title, content in sections
            ),
        ),
    ]
    return _document("Evaluation of " + ", ".join(each.label for each in shown), body)


def _item(text: str) -> Markup:
    return element("li", text)


def reading(shown: Sequence[Shown]) -> list[str]:
    """What somebody who meets such a page for the first time has to be told."""
    units = charts.units(shown)
    found = [
        f"Accuracies are means over {units}, in per cent. ± is 1.96 standard errors; the interval in "
        "brackets is the 95% bootstrap interval, which follows the skew near 0 and 100. The interval of an "
        "average is what the independent errors of its domains add up to.",
        "pgd20@8 is 20 steps of PGD within epsilon 8/255; epsilon is in 1/255 of the pixel range in both "
        "norms, L∞ unless the name says l2.",
        "union is the worst case, image by image, over several attacks: union@8 over those of one norm "
        "within that epsilon, union alone over all.",
        "suspect marks a number that an automatic check of the attacks gives reason to doubt; in the figures "
        "its marker is hollow.",
        f"Differences are between runs on the same {units}, with the same starts of the attacks, so their "
        "intervals are narrower than those of the accuracies suggest.",
    ]
    if any(each.run.corruptions for each in shown):
        found.append(
            "Common corruptions are no attacks: noise, blur, weather and the like on the same images."
        )
    return found


def _document(title: str, body: Iterable[Child]) -> str:
    style, script = (
        resources.files("amt.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    content = element("body", *body, element("script", Markup(script)))
    return f"<!DOCTYPE html>\n{element('html', head, content, lang='en')}\n"


# --- the top ---------------------------------------------------------------------------------------------


def header(
    shown: Sequence[Shown], compared: Differences | None, sections: Sequence[tuple[str, str]]
) -> Markup:
    """What it comes to, in words and in a card per run, with everything that speaks against it."""
    few_shot = any(each.run.unit == "episode" for each in shown)
    links = (element("li", element("a", title, href=f"#{name}")) for name, title in sections)
    return element(
        "header",
        element("h1", f"{'Few-shot accuracy' if few_shot else 'Accuracy'}, clean and under attack"),
        element("p", summary_line(shown), class_="lead"),
        *(element("p", stamp, class_="stamp", role="note") for stamp in stamps(shown)),
        *(element("p", notice, class_="notice", role="note") for notice in notices(shown, compared)),
        element("div", *(card(each, shown, compared) for each in shown), class_="cards"),
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def summary_line(shown: Sequence[Shown]) -> str:
    """A few sentences in plain words."""
    domains = charts.domains(shown)
    if len(domains) == 1 and charts.units(shown) == "images":
        over = f"{charts.row_counts(shown)} of {domains[0]}"
    else:
        over = f"{len(domains)} domain{'s' * (len(domains) != 1)}, {charts.row_counts(shown)}"
    robust = charts.robust_columns(shown)
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
    return f"{found.mean:.1f}% {_half(found)}"


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
    for each in shown:
        if not each.run.complete:
            asked = each.run.about["episodes"]
            have = ", ".join(f"{s} {len(each.run.rows.get(s, ()))}" for s in each.run.about["sources"])
            yield f"{each.label} is unfinished: of {asked} {each.run.unit}s per domain it has {have}."
    doubts = [(each, finding) for each in shown for finding in each.run.findings]
    if doubts:
        names = ", ".join(dict.fromkeys(f"{each.label} on {finding.source}" for each, finding in doubts))
        yield f"Automatic checks doubt some results, marked suspect: {names}."
    members = {}
    for each in shown:
        for name, domains in each.run.averages.items():
            members.setdefault(name, {}).setdefault(domains, []).append(each.label)
    for name, kinds in members.items():
        if len(kinds) > 1:
            parts = (f"{', '.join(who)} over {', '.join(domains)}" for domains, who in kinds.items())
            yield f"“{name}” covers other domains by run, so it is not to be compared: {'; '.join(parts)}."
    if compared is not None:
        yield from map(_sentence, compared.refusals)


def card(each: Shown, shown: Sequence[Shown], compared: Differences | None) -> Markup:
    """The run's averages in large print."""
    robust = charts.robust_columns(shown)[each.place]
    name = each.whole
    over = f"average over {len(each.run.rows)} domains" if each.average else name
    tiles = []
    for column in ("clean", *([robust] if robust else [])):
        summary = each.summary(name, column)
        versus = None
        if compared is not None and (found := compared.by_run.get(each.label, {}).get((name, column))):
            text = f"{number(found.mean, '+.1f')} {_half(found)} points from {shown[0].label}"
            versus = element("span", text, class_="versus")
        tiles.append(
            element(
                "div",
                element("span", column, class_="what"),
                element(
                    "span", f"{summary.mean:.1f}", element("small", f" {_half(summary)}"), class_="number"
                ),
                versus,
                suspicion(each, name, column),
                class_="tile",
            )
        )
    count = each.summary(name, "clean").n
    about = each.run.about
    known = [f"seed {about['seed']}", *(f"{k} {about[k]}" for k in ("split", "commit") if about.get(k))]
    return element(
        "article",
        element("h3", swatch(each.style) if len(shown) > 1 else None, each.label),
        element("p", f"{over}, {count} {each.run.unit}s, per cent", class_="over"),
        element("div", *tiles, class_="tiles"),
        element("p", ", ".join(known), class_="over"),
        class_="card",
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _half(summary: Summary) -> str:
    return f"±{summary.interval:.1f}" if charts.has_interval(summary) else "(no interval)"


def suspicion(each: Shown, name: str, column: str) -> Markup | None:
    reason = each.run.suspect(name, column)
    return element("span", f"suspect: {reason}", class_="suspect") if reason else None


# --- tables ----------------------------------------------------------------------------------------------


def results(shown: Sequence[Shown]) -> Markup:
    """Every accuracy by domain and run, then the averages; and what is suspect."""
    columns = charts.columns(shown)
    several = len(shown) > 1
    bodies = []
    averages = charts.union(each.run.averages for each in shown if each.average)
    for names in (charts.domains(shown), averages):
        rows = []
        for name in names:
            for each in shown:
                if name not in each.run.rows and name not in each.run.averages:
                    continue
                members = each.run.averages.get(name)
                about = f" of {len(members)}" if members and name not in each.run.rows else None
                summaries = [each.summary(name, column) for column in columns]
                n = next(summary.n for summary in summaries if summary is not None)
                rows.append(
                    element(
                        "tr",
                        element("th", name_of(name), about and element("small", about), scope="row"),
                        element("td", name_of(each.label), class_="name") if several else None,
                        element("td", n, data_value=n),
                        *(accuracy_cell(each, name, c, s) for c, s in zip(columns, summaries, strict=True)),
                    )
                )
        bodies.append(rows)
    head = ["domain", *(["run"] if several else []), "n", *columns]
    found: dict[tuple[str, str, str], list[str]] = {}
    for each in shown:
        for finding in each.run.findings:
            found.setdefault((each.label, finding.source, finding.reason), []).append(finding.column)
    doubts = [
        element("li", f"{name}, {domain}: {reason} ({', '.join(named)})")
        for (name, domain, reason), named in found.items()
    ]
    return join(
        [
            *(element("p", stamp, class_="stamp", role="note") for stamp in stamps(shown)),
            table(head, bodies, "Accuracy by domain", "accuracies"),
            element(
                "p",
                "Accuracy in per cent, mean ± 1.96 standard errors, below it the 95% bootstrap interval; n "
                f"{charts.units(shown)}. Headings sort.",
                class_="caption",
            ),
            element("h3", "Suspect results") if doubts else None,
            element("ul", *doubts, class_="doubts") if doubts else None,
        ]
    )


def accuracy_cell(each: Shown, name: str, column: str, summary: Summary | None) -> Markup:
    if summary is None:
        return element("td", "–", class_="none", title="not measured")
    ends = f"[{summary.low:.1f}, {summary.high:.1f}]" if charts.has_interval(summary) else "n = 1"
    return element(
        "td",
        element("span", f"{summary.mean:.1f}", class_="mean"),
        element("span", f" {_half(summary)}", class_="half"),
        element("span", ends, class_="ends"),
        suspicion(each, name, column),
        data_value=f"{summary.mean:.4f}",
    )


def table(head: Sequence[str], bodies: Sequence[Sequence[Markup]], label: str, class_: str = "") -> Markup:
    """A table that sorts by its headings, each body by itself, and scrolls in a box of its own."""
    headings = (
        element(
            "th",
            element("button", name, type="button"),
            scope="col",
            aria_sort="none",
            class_="name" if name in TEXT_COLUMNS else None,
        )
        for name in head
    )
    content = element(
        "table",
        element("thead", element("tr", *headings)),
        *(element("tbody", *rows) for rows in bodies if rows),
        class_=f"sortable {class_}".strip(),
        aria_label=label,
    )
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def numbers_block(found: Table, label: str) -> Markup:
    """The numbers behind a figure, folded away."""
    rows = [element("tr", *(plain_cell(cell, k == 0) for k, cell in enumerate(row))) for row in found.rows]
    return element(
        "details",
        element("summary", "The numbers"),
        table(found.columns, [rows], f"{label}: the numbers", "numbers"),
    )


def plain_cell(cell: Cell, first: bool) -> Markup:
    if first:
        return element("th", name_of(cell.text), scope="row")
    if cell.value is None:
        return element("td", name_of(cell.text), class_="name")
    return element("td", cell.text, data_value=f"{cell.value:.6g}")


def name_of(text: str) -> Markup:
    """A name in a table: on one line if it is short, broken anywhere if not."""
    return element("span", text, class_="text")


def description(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """A list of names with what they stand for; those that stand for nothing are left out."""
    return element(
        "dl",
        *(
            join([element("dt", name), element("dd", value)])
            for name, value in pairs
            if value not in (None, "")
        ),
    )


# --- figures ---------------------------------------------------------------------------------------------


def figure_block(figure: Figure | None, titled: bool = True) -> Markup | None:
    if figure is None:
        return None
    return element(
        "figure",
        element("h3", figure.title) if titled else None,
        figure_svg(figure),
        element("figcaption", figure.caption),
        numbers_block(figure.table, figure.title),
    )


def differences_block(compared: Differences) -> Markup:
    refusals = [element("p", _sentence(refusal), class_="notice") for refusal in compared.refusals]
    return join([*refusals, figure_block(compared.figure)])


def merging_block(maps: Sequence[HeatMap]) -> Markup | None:
    if not maps:
        return None
    captions = {heat.caption for heat in maps}
    return join(
        [
            element("div", *(heat_block(heat, len(captions) > 1) for heat in maps), class_="maps"),
            element("p", captions.pop(), class_="caption") if len(captions) == 1 else None,
        ]
    )


def heat_block(heat: HeatMap, captioned: bool) -> Markup:
    """A table whose cells are shaded by the mean share and show how it is distributed."""
    rows = []
    for name, line in zip(heat.rows, heat.cells, strict=True):
        cells = (element("td", "–", class_="none") if share is None else heat_cell(share) for share in line)
        rows.append(element("tr", element("th", name_of(name), scope="row"), *cells))
    return element(
        "figure",
        element("h3", heat.title),
        table(("domain", *heat.columns), [rows], heat.title, "heat"),
        element("figcaption", heat.caption) if captioned else None,
        numbers_block(heat.table, heat.title),
    )


def heat_cell(share: Share) -> Markup:
    mean = share.summary.mean
    return element(
        "td",
        element("span", f"{mean:.1f}", class_="mean"),
        element("span", f" {_half(share.summary)}", class_="half"),
        strip_svg(share),
        style=f"--share:{mean / 100:.3f}",
        data_value=f"{mean:.3f}",
    )


# --- common corruptions ----------------------------------------------------------------------------------


def corruptions_block(shown: Sequence[Shown]) -> Markup | None:
    """Accuracy by corruption and severity, and the means that papers report."""
    having = [each for each in shown if each.run.corruptions]
    if not having:
        return None
    several = len(shown) > 1
    bodies = []
    for names in (charts.union(each.run.corruptions for each in having), ["mean"]):
        bodies.append(
            [
                element(
                    "tr",
                    element("th", name_of(name), scope="row"),
                    element("td", name_of(each.label), class_="name") if several else None,
                    *(element("td", f"{v:.1f}", data_value=f"{v:.4f}") for v in values),
                )
                for name in names
                for each in having
                if (values := _by_severity(each.run, name)) is not None
            ]
        )
    head = ("corruption", *(["run"] if several else []), *map(str, range(1, SEVERITIES + 1)), "mean")
    caption = "Accuracy in per cent at severities 1 to 5, and their mean; nothing is attacked. Headings sort."
    return join(
        [table(head, bodies, "Accuracy under common corruptions"), element("p", caption, class_="caption")]
    )


def _by_severity(run: Run, name: str) -> list[float] | None:
    """Per cent at each severity and on average, of a corruption or of the "mean" over them."""
    if name == "mean":
        found = corruption_summary(run.corruptions)
        return [*found["by_severity"], found["mean"]]
    if name not in run.corruptions:
        return None
    values = [100 * each for each in run.corruptions[name]]
    return [*values, sum(values) / len(values)]


# --- samples ---------------------------------------------------------------------------------------------


class Trio(NamedTuple):
    """One image of a sample: as it was, what was done to it, and the result, as data URIs."""

    clean: str
    perturbation: str
    attacked: str
    factor: float | None  # of amplification; None where nothing was done


def samples_block(shown: Sequence[Shown]) -> Markup | None:
    """The first images of every sample episode, round by round until the budget is spent."""
    found = [(each, sample) for each in shown for sample in each.run.samples()]
    order = {domain: k for k, domain in enumerate(charts.domains(shown))}
    found.sort(key=lambda pair: (order.get(pair[1].source, len(order)), pair[1].index, pair[0].place))
    trios: list[list[Trio]] = [[] for _ in found]
    spent = 0
    for k in range(MOST_IMAGES):
        for taken, (_, sample) in zip(trios, found, strict=True):
            if k < len(sample.clean) and spent < SAMPLE_BUDGET:
                taken.append(trio(sample, k))
                spent += sum(map(len, taken[-1][:3]))
    blocks = [
        sample_block(each, sample, taken, len(shown) > 1)
        for (each, sample), taken in zip(found, trios, strict=True)
        if taken
    ]
    if not blocks:
        return None
    total = sum(len(sample.clean) for _, sample in found)
    caption = (
        f"{sum(map(len, trios))} of the {total} images kept with the runs"
        + ("" if charts.units(shown) == "images" else ", the first of each episode")
        + ". The perturbation is amplified so that its largest value spans the range, by the factor below "
        "it; grey is no change. An image that is wrong already is not attacked. "
        + (f"Larger images are shown with {SAMPLE_SIDE} pixels a side." if _shrunk(found) else "")
    )
    return join([element("p", caption.strip(), class_="caption"), element("div", *blocks, class_="samples")])


def _shrunk(found: Sequence[tuple[Shown, Sample]]) -> bool:
    return any(max(sample.clean.shape[1:3]) > SAMPLE_SIDE for _, sample in found)


def sample_block(each: Shown, sample: Sample, trios: Sequence[Trio], several: bool) -> Markup:
    place = f", episode {sample.index}" * (each.run.unit == "episode")
    where = f"{sample.source}{place}, {sample.column}" + f": {each.label}" * several
    rows = []
    for k, taken in enumerate(trios):
        label, before, after = (
            sample.class_names[found[k]]
            for found in (sample.labels, sample.predicted_clean, sample.predicted_attacked)
        )
        done = "no change" if taken.factor is None else f"amplified ×{taken.factor:.3g}"
        rows.append(
            element(
                "div",
                element("p", element("b", label), class_="label"),
                tile(taken.clean, f"clean image of {label}", "clean", verdict(before, before == label)),
                tile(taken.perturbation, "what the attack added to it", "perturbation", done),
                tile(
                    taken.attacked, f"attacked image of {label}", "attacked", verdict(after, after == label)
                ),
                class_="trio",
            )
        )
    return element("figure", element("figcaption", where), *rows, class_="sample")


def tile(uri: str, alt: str, name: str, below: Child) -> Markup:
    return element(
        "div",
        element("img", src=uri, alt=alt, width=96, height=96, decoding="async"),
        element("span", name, class_="what"),
        element("span", below),
        class_="tile",
    )


def verdict(predicted: str, right: bool) -> Markup:
    """A prediction, and whether it is right."""
    mark = element("b", "✓ " if right else "✗ ", class_="right" if right else "wrong")
    return element("span", mark, predicted, title="right" if right else "wrong")


def trio(sample: Sample, k: int) -> Trio:
    clean, attacked = (
        data_uri(images[k], SAMPLE_SIDE, Image.Resampling.LANCZOS)
        for images in (sample.clean, sample.attacked)
    )
    # An average of neighbours would show a smaller perturbation than there is: every value stays one of it.
    pixels, factor = amplify(sample.perturbation[k])
    return Trio(clean, data_uri(pixels, SAMPLE_SIDE, Image.Resampling.NEAREST), attacked, factor)


# --- cost and provenance ---------------------------------------------------------------------------------


def cost_block(shown: Sequence[Shown]) -> Markup:
    rows = []
    for each in shown:
        about = each.run.about
        count = sum(map(len, each.run.rows.values()))
        rows.append(
            element(
                "tr",
                element("th", name_of(each.label), scope="row"),
                element("td", count, data_value=count),
                *(
                    element("td", shape(about[name]), data_value=about[name])
                    if each.run.complete and isinstance(about.get(name), int | float)
                    else element("td", "unfinished", class_="none")
                    for name, shape in (("episode_seconds", _duration), ("peak_memory_mb", _memory))
                ),
                element("td", name_of(str(about.get("device") or "–")), class_="name"),
            )
        )
    head = ("run", charts.units(shown), "time", "peak memory", "device")
    return join([table(head, [rows], "Time and memory", "numbers"), figure_block(charts.seconds(shown))])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 10_000 else f"{megabytes / 1000:.1f} GB"


def about_block(each: Shown) -> Markup:
    """What somebody needs to do it again."""
    about, run = each.run.about, each.run
    how: dict[str, list[str]] = {}
    for domain, found in run.merging.items():
        how.setdefault(str(found.get("how", "not noted")), []).append(domain)
    merging = [
        element("div", text if len(how) == 1 else f"{', '.join(domains)}: {text}")
        for text, domains in how.items()
    ]
    variants = {f"{column} ran as {variant}" for column, found in run.variants.items() for variant in found}
    versions = about.get("versions")
    settings = {name: about.get(name) for name in ("settings", "sampling", "deployments")}
    settings = json.dumps(settings, indent=1, ensure_ascii=False)
    return element(
        "article",
        element("h3", each.label),
        description(
            [
                ("folder", str(run.folder)),
                ("command", element("code", str(about.get("command", "not noted")))),
                ("commit", about.get("commit")),
                ("versions", in_words(versions) if isinstance(versions, Mapping) else None),
                ("started", about.get("started")),
                ("network", about.get("arch")),
                ("checkpoint", about.get("checkpoint") or "none, the pretrained network"),
                ("seed", str(about["seed"])),
                ("split", about.get("split")),
                (f"{run.unit}s", shapes(run)),
                (
                    "attacks",
                    join(element("div", attack_words(attack)) for attack in about["attacks"]) or "none",
                ),
                ("variants", join(element("div", line) for line in sorted(variants)) or None),
                ("merging", join(merging) or None),
                (
                    "settings",
                    element("details", element("summary", "All settings"), element("pre", settings)),
                ),
            ]
        ),
        class_="about",
    )


def shapes(run: Run) -> str:
    """How many rows there are in a domain, and how large the episodes were."""
    rows = run.every_row
    if run.unit == "image":
        return f"{run.about['episodes']}, of {charts.between(row['ways'] for row in rows)} classes"
    parts = [f"{run.about['episodes']} per domain"]
    for name, what in (("ways", "ways"), ("support", "support images"), ("queries", "query images")):
        counts = {row[name] for row in rows if name in row}
        if counts:
            parts.append(f"{charts.between(counts)} {what}")
    return ", ".join(parts)


def attack_words(values: Mapping) -> str:
    """An entry of run.json's "attacks"."""
    attack = attack_from(values)
    rest = {name: values.get(name) for name in KINDS[attack.kind].options}
    epsilons = in_words(attack.epsilons)
    words = f"{attack.name}: {charts.NORMS[attack.norm]}, epsilon {epsilons} of 255"
    return "; ".join(filter(None, (words, in_words(rest))))
