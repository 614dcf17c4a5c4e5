"""The end of an evaluation: what a complete run leaves in its directory, and the table that is printed.

Computes nothing that the run does not hold, but for the time and memory it took.
"""

import json
import resource

import torch

from amt.evaluation import runs
from amt.evaluation.chance import chance_notes, is_below_chance
from amt.evaluation.dilution import dilution
from amt.evaluation.runs import Run
from amt.report.answer_files import write_answers
from amt.report.tables import corruption_table, table
from amt.report.tensorboard import write_events
from meta_dataset_readers.errors import say
from meta_dataset_readers.files import replace_file


def finish(run: Run, device: torch.device) -> None:
    """Write results.json, the tables of answers, the picture and the TensorBoard events of a complete run,
    and print its table.

    Args:
        device: that this process worked on.

    Raises:
        InputError: the directory cannot be written to, or a sample is damaged.
    """
    from amt.report.figures import (
        accuracy_picture,  # brings matplotlib, which nobody waits for before the end
    )

    more = cost(run, device)
    out = run.folder / "results.json"
    text = json.dumps(runs.summarise_run(run, more), indent=1)
    replace_file(out, text + "\n")
    write_events(run, run.folder / "tensorboard")
    tables = write_answers(run)
    names = [*run.sources, *run.averages]
    lines = [(name, [run.summaries[name, column] for column in run.columns]) for name in names]
    accuracy_picture(run.folder / "accuracy.png", run.columns, lines)
    decided = dict.fromkeys(about["how"] for about in run.merging.values())
    merging = f"; merging: {'; '.join(decided)}" if decided else ""
    say(f"accuracy on {run.about.get('split')} {run.unit}s in per cent, 95% intervals{merging}")
    for stamp in run.stamps:
        say(stamp)
    suspects = [[run.suspect(name, c) for c in run.columns] for name in names]
    low = [[is_below_chance(run, name, c) for c in run.columns] for name in names]
    say(table(run.columns, lines, suspects, low))
    for line in chance_notes(run):
        say(line)
    for source, warning in dilutions(run).items():
        say(f"warning: {source}: {warning}")
    for column, variants in run.variants.items():
        say(f"{column}: {'; or '.join(variants)}")
    if run.about["attacks"]:
        verdict = "; something is suspect, see above" if run.findings else "; nothing is suspect"
        checked = f"checked on {run.checked} images{verdict}" if run.checked else "not checked"
        say(f"the attacks were {checked}")
    if run.corruptions:
        say("accuracy under common corruptions in per cent, by severity and on average")
        say(corruption_table(run.corruptions))
    if more["skipped_records"]:
        say(f"{more['skipped_records']} damaged records were passed over")
    also = ", ".join(path.name for path in [*tables, run.folder / "accuracy.png"])
    say(f"wrote {out}; beside it {also}")


def dilutions(run: Run) -> dict[str, str]:
    """By attacked domain a warning about merges that lose most of their robustness, see `dilution`."""
    found = {}
    for source, about in run.merging.items():
        levels, tasks = about.get("epsilons"), [row["coefficients"] for row in run.rows.get(source, ())]
        if run.about["attacks"] and isinstance(levels, list) and all(len(t) == len(levels) for t in tasks):
            found[source] = dilution(tasks, levels)
    return {source: warning for source, warning in found.items() if warning}


def cost(run: Run, device: torch.device) -> dict:
    """What the run took, for results.json."""
    rows = run.every_row
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "episode_seconds": round(sum(row["seconds"] for row in rows), 1),
        # Whoever only shows a finished run has used less than the process that did the work.
        "peak_memory_mb": round(max(memory, run.about.get("peak_memory_mb", 0))),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "skipped_records": sum(row.get("skipped", 0) for row in rows),
    }
