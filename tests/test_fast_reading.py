"""What makes reading fast changes nothing, except `fast_decode`, and that by no more than it says."""

import io

import numpy as np
import pytest
import torch
from conftest import flat_spec, write_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

from meta_dataset_readers.errors import DamagedRecord
from meta_dataset_readers.pictures import UnreadableImage, decode_image
from meta_dataset_readers.protocol import EpisodeSampling
from meta_dataset_readers.reader import EpisodeReader, SourceMixture, episode_loader
from meta_dataset_readers.tfrecord import encode_example, open_records, write_records
from meta_dataset_readers.transforms import (
    RESIZES,
    eval_crop,
    reduced_eval_crop,
    reduced_train_crop,
    train_crop,
    unit_range,
)

SMALL = EpisodeSampling(num_ways=5, num_support=2, num_query=1)


def smooth_picture(width, height, seed=0):
    """Colours that change slowly, and differently across, down and along the diagonal."""
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    x, y = np.linspace(0, 5, width)[None], np.linspace(0, 4, height)[:, None]
    waves = (np.sin(x + phases[0] + 0 * y), np.sin(y + phases[1] + 0 * x), np.sin(x + y + phases[2]))
    return Image.fromarray((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))


def encoded(image, format="JPEG", **settings):
    stream = io.BytesIO()
    image.save(stream, format, **settings)
    return stream.getvalue()


def difference(first, second):
    """In grey levels, (H, W, 3)."""
    return abs(np.asarray(first).astype(int) - np.asarray(second))


@pytest.fixture
def large_source(tmp_path):
    """The directory of a source of 5 classes of 3 JPEGs of 120 x 90 pixels each."""
    directory = write_spec(tmp_path / "large", flat_spec("large", (5, 0, 0), [3] * 5))
    for class_id in range(5):
        pictures = (encoded(smooth_picture(120, 90, 10 * class_id + record)) for record in range(3))
        payloads = (encode_example(picture, class_id) for picture in pictures)
        write_records(directory / f"{class_id}.tfrecords", payloads)
    return directory


def reader(directory, n_episodes=3, **options):
    return EpisodeReader(
        directory.parent, directory.name, "TRAIN", SMALL, 20, n_episodes=n_episodes, **options
    )


def same(a, b):
    return torch.equal(a.support, b.support) and torch.equal(a.query, b.query)


# --- on the way from a worker ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("wrap", ["reader", "subset", "mixture", "subset of a mixture"])
def test_images_travel_as_bytes_and_arrive_as_they_were(large_source, wrap, num_workers):
    whole = reader(large_source, augment=True)
    dataset = SourceMixture([whole], 3) if "mixture" in wrap else whole
    dataset = Subset(dataset, [2, 0]) if "subset" in wrap else dataset
    for index, episode in enumerate(episode_loader(dataset, num_workers)):
        assert episode.support.dtype == torch.float32
        assert same(episode, dataset[index])
    assert whole.raw(0).support.dtype == torch.uint8


def test_other_data_sets_pass_through_the_loader_as_they_are(large_source):
    class Half(torch.utils.data.Dataset):
        """Episodes whose values are no multiples of 1/255."""

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return type(episode)(
                episode.support / 3, episode.support_labels, episode.query, episode.query_labels
            )

    episode = reader(large_source)[0]
    assert torch.equal(next(iter(episode_loader(Half()))).support, episode.support / 3)


@pytest.mark.parametrize("shape", [(4, 30, 17, 3), (1, 5, 5, 3)])
def test_a_view_of_pixels_becomes_a_contiguous_tensor_in_the_unit_range(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).transpose(0, 3, 1, 2)
    found = unit_range(pixels)
    assert torch.equal(found, torch.from_numpy(pixels.copy()).float() / 255)
    assert found.is_contiguous() and found.dtype == torch.float32


# --- decoding at a reduced scale ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 333), (257, 640), (101, 97)])
@pytest.mark.parametrize("image_size", [24, 84])
def test_a_reduced_picture_shows_the_same_at_the_same_place(size, image_size):
    """A shift by a tenth of a pixel would show."""
    image = smooth_picture(*size)
    data = encoded(image, quality=95)
    exact = decode_image(data)
    pairs = [
        (eval_crop(exact, image_size, resize), reduced_eval_crop(data, image_size, resize))
        for resize in sorted(RESIZES)
    ]
    pairs += [
        (
            train_crop(exact, image_size, np.random.default_rng(seed)),
            reduced_train_crop(data, image_size, np.random.default_rng(seed)),
        )
        for seed in range(4)
    ]
    for expected, found in pairs:
        assert found.mode == "RGB" and found.size == (image_size, image_size)
        assert difference(expected, found).mean() < 1 and difference(expected, found).max() <= 8


def test_a_photograph_like_picture_changes_by_a_few_grey_levels():
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 8, (375, 500, 1)) + np.asarray(smooth_picture(500, 375))
    data = encoded(Image.fromarray(grain.clip(0, 255).astype(np.uint8)), quality=90)
    changed = difference(eval_crop(decode_image(data), 84), reduced_eval_crop(data, 84))
    assert 0 < changed.mean() < 3 and np.percentile(changed, 99) <= 20


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF"])
def test_nothing_is_decoded_at_a_reduced_scale_that_is_small_or_no_jpeg(format):
    """Only the resizing is done for the crop alone then, which rounds otherwise now and then."""
    size = (50, 40) if format == "JPEG" else (200, 160)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    changed = difference(eval_crop(decode_image(data), 24), reduced_eval_crop(data, 24))
    assert changed.max() <= 1 and (changed > 0).mean() < 0.05


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_reduced_pictures_of_other_modes_become_rgb(mode):
    data = encoded(smooth_picture(200, 160).convert(mode), quality=95)
    found = reduced_eval_crop(data, 24)
    assert found.mode == "RGB" and difference(eval_crop(decode_image(data), 24), found).mean() < 1


@settings(max_examples=60)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    image_size=st.integers(1, 40),
    resize=st.sampled_from(sorted(RESIZES)),
    seed=st.integers(0, 2**32),
)
def test_reduction_works_for_every_size(width, height, image_size, resize, seed):
    if max(width, height) > 100 * min(width, height):
        return
    data = encoded(smooth_picture(width, height))
    rng = np.random.default_rng(seed)
    for found in (reduced_eval_crop(data, image_size, resize), reduced_train_crop(data, image_size, rng)):
        assert found.size == (image_size, image_size)


@pytest.mark.parametrize("data", [b"", b"some text", encoded(smooth_picture(90, 70))[:300]])
def test_what_is_no_whole_picture_is_refused(data):
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        reduced_eval_crop(data, 20)


@pytest.mark.parametrize("augment", [False, True])
def test_fast_decode_is_an_option_that_changes_pixels_a_little_and_nothing_else(large_source, augment):
    exact, fast = (reader(large_source, augment=augment, fast_decode=on) for on in (False, True))
    assert same(reader(large_source, augment=augment)[0], exact[0])
    for index in range(3):
        a, b = exact[index], fast[index]
        assert (a.class_ids, a.support_origin, a.query_origin) == (
            b.class_ids,
            b.support_origin,
            b.query_origin,
        )
        assert not same(a, b)
        assert (a.support - b.support).abs().mean() < 1 / 255
    assert all(same(a, b) for a, b in zip(episode_loader(fast, 1), fast, strict=False))


def test_fast_decode_names_and_passes_over_damaged_records_as_ever(large_source):
    victim = reader(large_source)[0].support_origin[0]
    file = open_records(large_source.parent / victim.file)
    payloads = [file.read(index) for index in range(3)]
    class_id = int(file.path.stem)
    picture, _ = file.read_example(victim.record)
    payloads[victim.record] = encode_example(picture[:400], class_id)
    write_records(file.path, payloads)
    messages = []
    for fast in (False, True):
        with pytest.raises(
            DamagedRecord, match=f"record {victim.record} at byte .*cannot be decoded"
        ) as caught:
            reader(large_source, fast_decode=fast)[0]
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_fast_decode_leaves_alone_a_store_that_has_no_picture_files(large_source):
    """It would have to write a PNG of every picture first."""
    directory = large_source.with_name("arrays")
    directory.mkdir()
    (directory / "dataset_spec.json").write_bytes((large_source / "dataset_spec.json").read_bytes())
    h5py = pytest.importorskip("h5py")
    for class_id in range(5):
        with h5py.File(directory / f"{class_id}.h5", "w") as file:
            for record in range(3):
                pixels = np.asarray(smooth_picture(120, 90, 10 * class_id + record))
                file.create_group(str(record))["image"] = pixels
    assert same(reader(directory)[0], reader(directory, fast_decode=True)[0])
