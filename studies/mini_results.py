"""docs/results/mini-study.md and its figures, from the committed files of the mini study.

    python -m studies.mini_results                 (from results/mini/*-shot/*.json alone, in seconds)

Nothing is measured here: tables are paired differences and means of the rows in the files, with intervals
that know the training seeds. The same files give the same bytes.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from amt.evaluation import leaderboard
from amt.evaluation.comparison import Comparison, compare
from amt.evaluation.runs import Run
from amt.evaluation.statistics import Summary
from amt.report import figures, ranking
from amt.report.shown import label
from meta_dataset_readers.errors import InputError, exit_on_bad_input, say
from meta_dataset_readers.files import replace_file
from studies.mini_study import BEST, GAMMA_ROWS, KNOB, LONG_KNOB, ORACLE, RECIPE, REFERENCE, ROWS

AVERAGE = "average"
# What is compared with the best single adapter: the same pools otherwise, and what is ours.
BESIDE_BEST = [
    row.name
    for row in ROWS
    if row.name != BEST and (row.trainings == ("pool",) or row.name.startswith(("ours", "features")))
]
HEAD = """# Results of the mini study

Made by `python -m studies.mini_results` from the files in {results}; `make results SHOTS="1 5"` measures
them anew, without SHOTS those at 5 shots.
Meta-tuned on mini_objects TRAIN, every setting chosen on its VALID classes, scored on five domains that
nothing was trained or chosen on, 5-way, 15 queries a task. Per cent, averages over the five domains; `@4` is
the worst case of the default attack within 4/255. Chance is {chance:.0f}: a classifier that always gives the
same answer has it at every epsilon, and `<` marks what is below.

Intervals are 95% and know that there are only a few training seeds: ± is a t-interval with Satterthwaite's
degrees of freedom, the brackets are the hierarchical bootstrap (seeds, then tasks). A star marks a difference
both of whose intervals leave out zero.
"""
NOT_HELPING = """## What did not help

Paired differences that are decided in favour of the row in no column.
"""


def read(folder: Path) -> dict[str, Run]:
    """The rows of a folder by name, in the order of the study, others after them.

    Raises:
        InputError: there is none, or two have the same name.
    """
    found: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json")):
        run = leaderboard.read(path)
        if run.folder.name in found:
            raise InputError(f"{path}: another file has a row {run.folder.name!r} as well")
        found[run.folder.name] = run
    if not found:
        raise InputError(f"{folder}: no .json of a row is there; make results measures them")
    order = [row.name for row in ROWS]
    return dict(sorted(found.items(), key=lambda pair: (pair[0] not in order, _place(order, pair[0]))))


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def columns(run: Run) -> list[tuple[str, str]]:
    """The columns and how they are headed: clean, @1, @2 ..."""
    return [(column, column[column.rfind("@") :] if "@" in column else column) for column in run.columns]


def markdown(heads: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    heads = list(heads)
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*rows, *(f"| {' | '.join(line)} |" for line in lines)])


def _apart(name: str) -> bool:
    """Whether a row is another training, which has tables of its own and no point in the plane."""
    return name in GAMMA_ROWS or name.startswith(RECIPE)


def _shown(name: str) -> bool:
    """Whether a row has a point in the plane, which has room for one knob."""
    return not _apart(name) and name not in LONG_KNOB


class Compared(NamedTuple):
    """Rows and what they are compared with.

    Args:
        intro: what the table shows.
        reference: the row that is subtracted.
        found: the comparisons by the names of the rows.
    """

    intro: str
    reference: str
    found: dict[str, Comparison]


def comparisons(rows: dict[str, Run]) -> list[Compared]:
    """The comparisons that the rows allow, in the order of the page."""
    recipes: dict[str, list[str]] = {}
    for row in ROWS:
        if row.against:
            recipes.setdefault(row.against, []).append(row.name)
    main = {name for name in rows if not _apart(name)}
    groups = [
        ("Paired differences from the pretrained network, in points:", *(REFERENCE, main - {REFERENCE})),
        (
            "Paired differences from the best single adapter of the pool with prototypes:",
            *(BEST, {*BESIDE_BEST}),
        ),
        (
            f"Does the weight perturbation help? Paired differences from {GAMMA_ROWS[0]}:",
            *(GAMMA_ROWS[0], {*GAMMA_ROWS[1:]}),
        ),
        *(
            (f"Other ways to train: paired differences from {reference}:", reference, {*names})
            for reference, names in recipes.items()
        ),
    ]
    found = []
    for intro, reference, names in groups:
        if reference in rows and any(name in rows for name in names):
            own = {name: compare(rows[name], rows[reference]) for name in rows if name in names}
            found.append(Compared(intro, reference, own))
    return found


def differences(rows: dict[str, Run], compared: Compared) -> str:
    """The table of paired differences of some rows from one of them."""
    base, lines = rows[compared.reference], []
    for name, found in compared.found.items():
        cells = [_difference(found.differences.get((AVERAGE, column))) for column, _ in columns(base)]
        n = next((each.n for each in found.differences.values()), 0)
        lines.append([name, *cells, str(n), "; ".join(found.refusals)])
    heads = [f"minus {compared.reference}", *(head for _, head in columns(base)), "n", "not compared"]
    return markdown(heads, lines)


def not_helping(shots: str, rows: dict[str, Run], compared: Iterable[Compared]) -> list[list[str]]:
    """Lines of the log: rows that are decidedly better than what they are compared with in no column."""
    lines = []
    for each in compared:
        for name, found in each.found.items():
            own = [found.differences.get((AVERAGE, column)) for column, _ in columns(rows[each.reference])]
            if name != ORACLE and any(own) and not any(one and one.decided > 0 for one in own):
                lines.append([shots, name, each.reference, *map(_difference, own)])
    return lines


def _difference(found: Summary | None) -> str:
    if found is None:
        return "–"
    star = "*" * abs(found.decided)
    return f"{found.mean:+.1f} ±{found.interval:.1f} [{found.low:+.1f}, {found.high:+.1f}]{star}"


def means(rows: dict[str, Run]) -> str:
    """The means of rows, those of each seed, what they were tuned on, and their stamps."""
    first, lines = next(iter(rows.values())), []
    for name, run in rows.items():
        cells = [_mean(run, column) for column, _ in columns(first)]
        known = run.about
        tuned = f"{known['tuned_on']} ({known['candidates']})"
        doubts = [f"suspect: {domain} {column}" for domain, column, _ in known["suspect"]]
        lines.append([name, *cells, str(len(run.seeds)), tuned, "; ".join([*known["stamps"], *doubts])])
    heads = ["row", *(head for _, head in columns(first)), "seeds", "tuned on (candidates)", "stamps"]
    return markdown(heads, lines)


def _mean(run: Run, column: str) -> str:
    found = run.summary(AVERAGE, column)
    if found is None:
        return "–"
    below = "<" if column != "clean" and found.mean < run.chance(AVERAGE) else ""
    by_seed = " ".join(f"{s.mean:.1f}" for part in run.seeds if (s := part.summary(AVERAGE, column)))
    return f"{found.mean:.1f}{below} ±{found.interval:.1f} ({by_seed})"


def section(title: str, rows: dict[str, Run], compared: Iterable[Compared], picture: str) -> str:
    """What one number of shots shows."""
    parts = [f"## {title}\n"]
    for each in compared:
        parts += [f"{each.intro}\n", differences(rows, each), ""]
    parts += ["Means, in brackets those of each seed:\n", means(rows), ""]
    parts += [f"![clean and robust accuracy, {title}]({picture})\n"]
    parts += ["Joined points are the knob from clean to robust; the oracle is no method.", ""]
    return "\n".join(parts)


def write(results: Path, page: Path) -> None:
    """Write the page and its figures.

    Raises:
        InputError: there are no rows, or a file is damaged.
    """
    folders = sorted(results.glob("*-shot"), key=lambda path: path.name)
    if not folders:
        raise InputError(f"{results}: no folder such as 5-shot is there; make results measures the rows")
    sections, log, heads, chance = [], [], [], 0.0
    for folder in folders:
        rows = read(folder)
        chance = next(iter(rows.values())).chance(AVERAGE)
        shown = label([run for name, run in rows.items() if _shown(name)])
        plane = ranking.plane(shown, joined=[name for name in KNOB if name in rows])
        if plane is not None:
            slug = f"clean_robust_{folder.name.replace('-', '_')}"
            figures.write([plane._replace(slug=slug)], page.parent)
            compared = comparisons(rows)
            sections.append(section(folder.name, rows, compared, f"{slug}.png"))
            log += not_helping(folder.name, rows, compared)
            heads = [head for _, head in columns(next(iter(rows.values())))]
    head = HEAD.format(results=results, chance=chance)
    notes = f"The oracle (`{ORACLE}`) chooses by the query labels and only bounds what routing could gain.\n"
    if log:
        notes += f"\n{NOT_HELPING}\n{markdown(['shots', 'row', 'minus', *heads], log)}\n"
    replace_file(page, "\n".join([head, *sections, notes]))
    say(f"wrote {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/mini"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/mini-study.md"))
    args = parser.parse_args()
    write(args.results, args.out)


if __name__ == "__main__":
    exit_on_bad_input(main)
