"""Small pictures for people to look at: a perturbation made visible, and pixels as a PNG in a data URI."""

import base64
import io

import numpy as np
from PIL import Image


def amplify(perturbation: np.ndarray) -> tuple[np.ndarray, float | None]:
    """A perturbation (H, W, 3) as pixels in uint8 around grey, its largest value at an end of their range.

    Args:
        perturbation: in 1/255 of the pixel range; values that are not finite count as none.

    Returns:
        The pixels, and the factor; None where nothing is perturbed.
    """
    values = np.where(np.isfinite(perturbation), perturbation, 0).astype(np.float64)
    largest = np.abs(values).max(initial=0)
    if largest == 0:
        return np.full(values.shape, 128, np.uint8), None
    factor = 127.5 / largest
    return np.rint(127.5 + factor * values).clip(0, 255).astype(np.uint8), float(factor)


def data_uri(pixels: np.ndarray, side: int, resampling: Image.Resampling) -> str:
    """Pixels (H, W, 3) uint8 as a PNG, reduced to `side` pixels if they are larger."""
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        scale = side / max(image.size)
        image = image.resize([max(1, round(scale * length)) for length in image.size], resampling)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
