"""Few-shot episodes from Meta-Dataset's files, without TensorFlow."""

from meta_dataset_readers.episode import Episode, ImageOrigin
from meta_dataset_readers.errors import DamagedRecord, InputError, exit_on_bad_input, nearest
from meta_dataset_readers.layouts import open_source, sources
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader
from meta_dataset_readers.sampling import EpisodeDescription, check_sampling, sample_episode
from meta_dataset_readers.spec import SPLITS, DatasetSpec, load_spec
from meta_dataset_readers.store import ImageStore, Source
from meta_dataset_readers.stored_episodes import dump_episode, open_episodes
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
