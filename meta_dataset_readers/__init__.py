"""Few-shot episodes from Meta-Dataset's files, without TensorFlow. Names are imported when first used."""

from typing import TYPE_CHECKING

from meta_dataset_readers.lazy import imported_when_used

if TYPE_CHECKING:
    from meta_dataset_readers.dump import dump_episode as dump_episode
    from meta_dataset_readers.episode import Episode as Episode
    from meta_dataset_readers.episode import ImageOrigin as ImageOrigin
    from meta_dataset_readers.errors import DamagedRecord as DamagedRecord
    from meta_dataset_readers.errors import InputError as InputError
    from meta_dataset_readers.errors import exit_on_bad_input as exit_on_bad_input
    from meta_dataset_readers.errors import nearest as nearest
    from meta_dataset_readers.layouts import open_source as open_source
    from meta_dataset_readers.layouts import sources as sources
    from meta_dataset_readers.protocol import EpisodeSampling as EpisodeSampling
    from meta_dataset_readers.reader import EpisodeReader as EpisodeReader
    from meta_dataset_readers.reader import SourceMixture as SourceMixture
    from meta_dataset_readers.reader import episode_loader as episode_loader
    from meta_dataset_readers.sampling import EpisodeDescription as EpisodeDescription
    from meta_dataset_readers.sampling import check_sampling as check_sampling
    from meta_dataset_readers.sampling import sample_episode as sample_episode
    from meta_dataset_readers.spec import SPLITS as SPLITS
    from meta_dataset_readers.spec import DatasetSpec as DatasetSpec
    from meta_dataset_readers.spec import load_spec as load_spec
    from meta_dataset_readers.store import ImageStore as ImageStore
    from meta_dataset_readers.store import Source as Source
    from meta_dataset_readers.stored_episodes import open_episodes as open_episodes
    from meta_dataset_readers.tfrecord import RecordFile as RecordFile
    from meta_dataset_readers.tfrecord import encode_example as encode_example
    from meta_dataset_readers.tfrecord import open_records as open_records
    from meta_dataset_readers.tfrecord import write_records as write_records

__all__, __getattr__, __dir__ = imported_when_used(
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
