"""The flags of classification by texts, and of the number of shots, which they take down to 0."""

import argparse
from typing import TYPE_CHECKING

from amt.models.head_settings import WITH_TEXTS
from meta_dataset_readers.settings import Number, as_path

if TYPE_CHECKING:
    from amt.files.text_prototypes import TextPrototypes
    from meta_dataset_readers.reader import EpisodeReader

HELP = (
    "; with --text_prototypes also text, which is zero-shot, and mix other=text, where share=support chooses "
    "the share for every task"
)


def check_classes(found: "TextPrototypes", reader: "EpisodeReader") -> None:
    """Raise an `InputError` unless every class that a reader draws from has a text."""
    names = map(reader.spec.class_name, reader.spec.classes(reader.split))
    found.check(names, f", classes of {reader.source}, {reader.split}")


def add_texts(group: argparse._ActionsContainer, more: str = "") -> None:
    """The flag --text_prototypes; `more` ends its help."""
    group.add_argument(
        "--text_prototypes",
        type=as_path,
        metavar="FILE.npz",
        help="embeddings of the class names by the text tower of the same CLIP; the default head is then "
        f"{WITH_TEXTS.name} (docs/how-to/text-prototypes.md){more}",
    )


def add_shots(group: argparse._ActionsContainer) -> None:
    """The flag --shots."""
    group.add_argument(
        "--shots",
        type=Number(int, least=0, most=10**6),
        nargs="+",
        metavar="K",
        help="a run in OUTPUT_DIR/K-shot for each number of shots, and their curve in OUTPUT_DIR/shots.html; "
        "0: by texts alone",
    )
