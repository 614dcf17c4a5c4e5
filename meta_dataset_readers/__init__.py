"""Few-shot episodes from Meta-Dataset's files, without TensorFlow. Names are imported when first used."""

from typing import TYPE_CHECKING

from meta_dataset_readers.lazy import imported_when_used

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

__getattr__, __dir__ = imported_when_used(
    __name__,
    {
        "meta_dataset_readers.dump": ("dump_episode",),
        "meta_dataset_readers.episode": ("Episode", "ImageOrigin"),
        "meta_dataset_readers.errors": ("DamagedRecord", "InputError", "exit_on_bad_input", "nearest"),
        "meta_dataset_readers.layouts": ("open_source", "sources"),
        "meta_dataset_readers.protocol": ("EpisodeSampling",),
        "meta_dataset_readers.reader": ("EpisodeReader", "SourceMixture", "episode_loader"),
        "meta_dataset_readers.sampling": ("EpisodeDescription", "check_sampling", "sample_episode"),
        "meta_dataset_readers.spec": ("SPLITS", "DatasetSpec", "load_spec"),
        "meta_dataset_readers.store": ("ImageStore", "Source"),
        "meta_dataset_readers.stored_episodes": ("open_episodes",),
        "meta_dataset_readers.tfrecord": ("RecordFile", "encode_example", "open_records", "write_records"),
    },
)
