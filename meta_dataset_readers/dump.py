"""Episodes written to files, from any layout that a reader reads: Meta-Dataset's dumped episodes.

`stored_episodes` reads them.
"""

import dataclasses
import json
from pathlib import Path

from meta_dataset_readers.episode import Episode, ImageOrigin
from meta_dataset_readers.errors import InputError, blaming, strerror
from meta_dataset_readers.files import LARGEST_LIST, read_bytes, replace_file
from meta_dataset_readers.reader import EpisodeReader
from meta_dataset_readers.store import ImageStore
from meta_dataset_readers.stored_episodes import COUNTS_FILE, read_counts, record_files
from meta_dataset_readers.tfrecord import encode_example, write_records


def dump_episode(folder: str | Path, number: int, episode: Episode, reader: EpisodeReader) -> None:
    """Write `episode`, which `reader` gave, as episode `number` of `folder`, for `open_episodes` to read.

    The files are those of Meta-Dataset's dumped episodes, with the encoded pictures as the source has them
    (a PNG where it has only pixels), and beside them `episode-%04d.json`: source, split, seed, index,
    evaluation transform, class ids and names, file and record of every image. What is read back equals
    `episode`, except that an augmented one comes back without its augmentation.

    Every file appears at once or not at all, and `images_per_class.json` last. Writing the same episode again
    completes or repeats it. Only one process at a time may write to a folder. Raises InputError if another
    episode has this number already, if the folder cannot be written, and as the source does for its images.
    """
    folder, stem = Path(folder), f"episode-{number:04d}"
    if episode.source != reader.source or not episode.class_ids:
        raise ValueError(f"an episode of {episode.source!r} is not one of a reader of {reader.source!r}")
    told = {"split": reader.split, "seed": reader.seed, "source": episode.source, "index": episode.index}
    names = ("class_ids", "class_names", "support_origin", "query_origin", "skipped")
    text = _json({**told, "resize": reader.resize, **{name: getattr(episode, name) for name in names}})
    parts = (
        (episode.support_labels.tolist(), episode.support_origin),
        (episode.query_labels.tolist(), episode.query_origin),
    )
    with blaming(f"{folder}: episode {number} cannot be written", OSError, strerror):
        folder.mkdir(parents=True, exist_ok=True)
        counts = read_counts(folder) if (folder / COUNTS_FILE).exists() else {}
        _claim(folder, stem, text, counts)
        for name, (labels, origins) in zip(record_files(stem), parts, strict=True):
            write_records(
                folder / name,
                (
                    encode_example(_encoded(reader.store, episode.class_ids[label], origin), label)
                    for label, origin in zip(labels, origins, strict=True)
                ),
            )
            counts[name] = tuple(labels.count(label) for label in range(len(episode.class_ids)))
        by_label = {name: {str(i): n for i, n in enumerate(sizes)} for name, sizes in counts.items()}
        replace_file(folder / COUNTS_FILE, _json(by_label))


def _encoded(store: ImageStore, class_id: int, origin: ImageOrigin) -> bytes:
    """The picture that `store` says comes from `origin`."""
    index = origin.record - store.origin(class_id, 0).record  # the records of a class follow one another
    if store.origin(class_id, index) != origin:
        raise ValueError(f"{origin} is not a picture of class {class_id} of this source")
    return store.encoded(class_id, index)


def _claim(folder: Path, stem: str, description: bytes, counts: dict[str, tuple[int, ...]]) -> None:
    """Make sure that `stem` is this episode's and no other's, also if writing it is interrupted."""
    file = folder / f"{stem}.json"
    if file.exists():
        if read_bytes(file, LARGEST_LIST) != description:
            raise InputError(f"{file}: describes another episode, which is not overwritten")
        return
    for name in record_files(stem):
        if name in counts or (folder / name).exists():
            raise InputError(f"{folder / name}: belongs to another episode, which is not overwritten")
    replace_file(file, description)


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=2, default=dataclasses.asdict).encode() + b"\n"
