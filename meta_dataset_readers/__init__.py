"""Few-shot episodes from Meta-Dataset's files, without TensorFlow. Names are imported when first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meta_dataset_readers.dump import dump_episode
    from meta_dataset_readers.episode import Episode, ImageOrigin
    from meta_dataset_readers.errors import DamagedRecord, InputError, exit_on_bad_input, nearest
    from meta_dataset_readers.layouts import open_source, sources
    from meta_dataset_readers.protocol import EpisodeSampling
    from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader
    from meta_dataset_readers.sampling import EpisodeDescription, check_sampling, sample_episode
    from meta_dataset_readers.spec import SPLITS, DatasetSpec, load_spec
    from meta_dataset_readers.store import ImageStore, Source
    from meta_dataset_readers.stored_episodes import open_episodes
    from meta_dataset_readers.tfrecord import RecordFile, encode_example, open_records, write_records

_MODULES = {
    "dump": ("dump_episode",),
    "episode": ("Episode", "ImageOrigin"),
    "errors": ("DamagedRecord", "InputError", "exit_on_bad_input", "nearest"),
    "layouts": ("open_source", "sources"),
    "protocol": ("EpisodeSampling",),
    "reader": ("EpisodeReader", "SourceMixture", "episode_loader"),
    "sampling": ("EpisodeDescription", "check_sampling", "sample_episode"),
    "spec": ("SPLITS", "DatasetSpec", "load_spec"),
    "store": ("ImageStore", "Source"),
    "stored_episodes": ("open_episodes",),
    "tfrecord": ("RecordFile", "encode_example", "open_records", "write_records"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "SPLITS",
    "DamagedRecord",
    "DatasetSpec",
    "Episode",
    "EpisodeDescription",
    "EpisodeReader",
    "EpisodeSampling",
    "ImageOrigin",
    "ImageStore",
    "InputError",
    "RecordFile",
    "Source",
    "SourceMixture",
    "check_sampling",
    "dump_episode",
    "encode_example",
    "episode_loader",
    "exit_on_bad_input",
    "load_spec",
    "nearest",
    "open_episodes",
    "open_records",
    "open_source",
    "sample_episode",
    "sources",
    "write_records",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
