"""Contact sheets: a picture per source, a row per class, read back from the records as a reader would.

Knows dataset_spec.json as far as names and class ids go. Does not draw classes.
"""

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw

from meta_dataset_readers.mini.canvas import LARGEST_SIDE
from meta_dataset_readers.spec import SPEC_FILE
from meta_dataset_readers.tfrecord import open_records

COLUMNS = 12
LABEL_WIDTH = 230
GAP = 2
CELL = LARGEST_SIDE + GAP


def class_labels(spec: dict) -> dict[int, str]:
    """A readable name for each class id; leaves of a graph go by their words."""
    graphs = spec.get("split_subgraphs", {}).values()
    words = {node["wn_id"]: node["words"] for graph in graphs for node in graph}
    return {int(key): words.get(name, name) for key, name in spec["class_names"].items()}


def contact_sheet(directory: Path) -> Image.Image:
    """The first `COLUMNS` images of each class of the source in `directory`."""
    spec = json.loads((directory / SPEC_FILE).read_text(encoding="utf-8"))
    labels = sorted(class_labels(spec).items())
    sheet = Image.new("RGB", (LABEL_WIDTH + COLUMNS * CELL, len(labels) * CELL), (110, 110, 110))
    draw = ImageDraw.Draw(sheet)
    for row, (class_id, label) in enumerate(labels):
        draw.text((6, row * CELL + CELL // 2 - 6), f"{class_id}  {label}", fill=(255, 255, 255))
        records = open_records(directory / spec["file_pattern"].format(class_id))
        for column in range(min(COLUMNS, len(records))):
            encoded, _ = records.read_example(column)
            with Image.open(io.BytesIO(encoded)) as image:
                sheet.paste(image, (LABEL_WIDTH + column * CELL, row * CELL))
    return sheet


def write_contact_sheets(out: Path, sources: list[str]) -> list[Path]:
    """One PNG per source in `out`/contact_sheets; returns their paths."""
    folder = out / "contact_sheets"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png" for name in sources]
    for name, path in zip(sources, paths, strict=True):
        contact_sheet(out / name).save(path)
    return paths
