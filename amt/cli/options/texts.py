"""The flags of classification by texts, and of the number of shots, which they take down to 0."""

import argparse

from amt.models.head_settings import MIX, ON_SUPPORT, TEXT
from meta_dataset_readers.settings import Number, as_path

DEFAULT_HEAD = (MIX, "of=prototypes", f"other={TEXT}", f"share={ON_SUPPORT}")  # with --text_prototypes
HELP = (
    "; with --text_prototypes also text, which is zero-shot, and mix other=text, where share=support chooses "
    "the share for every task"
)


def add_texts(group: argparse._ActionsContainer) -> None:
    """The flags --text_prototypes and --shots."""
    group.add_argument(
        "--text_prototypes",
        type=as_path,
        metavar="FILE.npz",
        help="embeddings of the class names by the text tower of the same CLIP; the default head is then "
        f"{' '.join(DEFAULT_HEAD)} (docs/how-to/text-prototypes.md)",
    )
    group.add_argument(
        "--shots",
        type=Number(int, least=0, most=10**6),
        nargs="+",
        metavar="K",
        help="a run in OUTPUT_DIR/K-shot for each number of shots, and their curve in OUTPUT_DIR/shots.html; "
        "0: by texts alone",
    )
