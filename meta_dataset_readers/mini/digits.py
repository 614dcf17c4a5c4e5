"""digits: the 1797 real handwritten digits that scikit-learn brings along, enlarged. Test only.

Knows scikit-learn's `load_digits` (8 x 8 pixels, 0 to 16). Keeps its order within each class.
"""

import functools

import numpy as np
from numpy.random import Generator
from PIL import Image

from meta_dataset_readers.mini import canvas

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # as in the data set; known without loading it


@functools.cache
def digit_images() -> tuple[np.ndarray, ...]:
    """For each digit its images in the order of the data set, uint8 (n, 8, 8), white on black."""
    from sklearn.datasets import load_digits  # imported late: only this domain needs it

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    return tuple(pixels[data.target == digit] for digit in range(10))


def draw_digit(rng: Generator, name: str, number: int) -> Image.Image:
    """Image `number` of the digit called `name`, enlarged smoothly to sides of 48 to 88: RGB."""
    small = Image.fromarray(digit_images()[NAMES.index(name)][number])
    return small.resize(canvas.frame_size(rng), Image.Resampling.BICUBIC).convert("RGB")
