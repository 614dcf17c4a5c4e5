"""The model card of a classifier: the README.md beside its weights, with the fields that a hub reads."""

from collections.abc import Mapping
from typing import Any

from amt.few_shot.task import Task
from meta_dataset_readers.errors import printable


def card(name: str, about: Mapping[str, Any], task: Task | None) -> str:
    """A model card: what it is, how to load it, and what its reader still has to be told.

    Args:
        name: of the repository, or of the folder.
        about: of the weights' file.
        task: what was fitted; None: a pool.
    """
    shown = printable(name)
    if task is None:
        levels = ", ".join(f"{level['epsilon']:g}" for level in about["levels"])
        what = [
            f"A pool of {len(about['levels'])} adversarial LoRAs on `{about['arch']}`, trained for "
            f"perturbations of {levels} (of 255).",
            "It is merged for a few labelled pictures of any classes, without training.",
        ]
        use = ['clf.fit("FOLDER OF CLASS FOLDERS")', 'clf.predict("PICTURES")']
    else:
        classes = ", ".join(f"`{printable(str(each)).replace('`', '')}`" for each in task.classes)
        what = [
            f"A classifier of {len(task.classes)} classes on `{about['arch']}`: {classes}.",
            f"It was fitted to {sum(task.shots)} labelled pictures, with the head `{task.head.name}`."
            if any(task.shots)
            else "It knows them by their texts alone (zero-shot), and was fitted to no picture.",
        ]
        use = ['clf.predict("PICTURES")']
    lines = [
        *("---", "library_name: adversarial-meta-tuning", "pipeline_tag: image-classification"),
        *("tags:", "- adversarial-robustness", "- few-shot-classification", "- image-classification", "---"),
        *("", f"# {shown}", "", *what, ""),
        *(
            "```python",
            "import amt",
            "",
            f'clf = amt.FewShotClassifier.from_pretrained("{shown}")',
            *use,
            "```",
        ),
        *("", f"Images of the network's own size; written by `{about.get('command', 'amt')}`."),
        *("", "Not said yet: on what data accuracy was measured, clean and attacked, and on how many tasks."),
    ]
    return "\n".join(lines) + "\n"
