"""mini_objects, the training source: figures with a surface and colours, on all kinds of grounds.

A class is a combination of shape, surface ("texture") and palette. Knows how one object looks; does not know
the graph of classes (`sources.py`) or files.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image

from meta_dataset_readers.mini import canvas
from meta_dataset_readers.mini.shapes import FAMILIES, SHAPES
from meta_dataset_readers.mini.textures import step

LEAVES_PER_SHAPE = 4
TAU = np.float32(2 * np.pi)

Surface = Callable[[Generator, np.ndarray, np.ndarray, canvas.Size], np.ndarray]


def _axes(rng: Generator, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The figure's coordinates turned by any angle and shifted."""
    turned = canvas.rotation(rng.uniform(0, 360)).astype(np.float32)
    du, dv = rng.uniform(-1, 1, 2).astype(np.float32)
    return turned[0, 0] * u + turned[0, 1] * v + du, turned[1, 0] * u + turned[1, 1] * v + dv


def solid(rng, u, v, size):
    return np.ones((size[1], size[0]), np.float32)


def shaded(rng, u, v, size):
    a, _ = _axes(rng, u, v)
    return np.clip(0.5 + 0.55 * (a - a.mean()), 0, 1)


def striped(rng, u, v, size):
    a, _ = _axes(rng, u, v)
    return step(np.sin(a * (TAU / np.float32(rng.uniform(0.32, 0.55)))), 2)


def hatched(rng, u, v, size):
    """Two sets of thin crossing lines."""
    a, b = _axes(rng, u, v)
    period, thin = np.float32(rng.uniform(0.25, 0.38)), np.float32(rng.uniform(0.72, 0.84))
    lean = np.float32(rng.uniform(-0.4, 0.4))
    lines = np.maximum(np.cos(a * (TAU / period)), np.cos((b + lean * a) * (TAU / period)))
    return step(lines - thin, 4)


def ringed(rng, u, v, size):
    centre = rng.uniform(-0.35, 0.35, 2).astype(np.float32)
    return step(np.sin(np.hypot(u - centre[0], v - centre[1]) * TAU / np.float32(rng.uniform(0.32, 0.5))), 2)


def dotted(rng, u, v, size):
    a, b = _axes(rng, u, v)
    period = np.float32(rng.uniform(0.32, 0.48))
    row = np.floor(b / period)
    du = np.mod(a / period + 0.5 * np.mod(row, 2), 1) - 0.5
    dv = np.mod(b / period, 1) - 0.5
    return step(np.float32(rng.uniform(0.26, 0.36)) - np.hypot(du, dv), 10)


def checkered(rng, u, v, size):
    a, b = _axes(rng, u, v)
    rate = np.float32(np.pi / rng.uniform(0.26, 0.4))
    return step(np.sin(a * rate) * np.sin(b * rate), 6)


def grainy(rng, u, v, size):
    return step(canvas.noise(rng, size, rng.uniform(45, 70)), 1.2)


def blotchy(rng, u, v, size):
    return step(canvas.noise(rng, size, rng.uniform(9, 14)), 3)


OUTLINED = "outlined"  # the one surface that is a way of drawing the figure, not a field
SURFACES: dict[str, Surface] = {
    draw.__name__: draw
    for draw in (solid, shaded, striped, hatched, ringed, dotted, checkered, grainy, blotchy)
}
SURFACE_GROUPS = {
    "even surfaces": ("solid", OUTLINED, "shaded"),
    "lined surfaces": ("striped", "hatched", "ringed"),
    "spotted surfaces": ("dotted", "checkered", "grainy", "blotchy"),
}
TEXTURES = tuple(name for group in SURFACE_GROUPS.values() for name in group)

# Hue ranges in turns; the monochrome palettes are listed apart because they also rule the ground.
HUES = {"ember": (-0.06, 0.13), "moss": (0.2, 0.42), "ocean": (0.5, 0.78), "motley": (0.0, 1.0)}
INK, CHALK = "ink", "chalk"  # dark on light, light on dark
PALETTES = (*HUES, INK, CHALK)


def combinations(split: str) -> list[tuple[str, str, str]]:
    """(shape, texture, palette) of each class of a split, in class order.

    Textures and palettes step through their lists at different strides, so that each shape gets
    `LEAVES_PER_SHAPE` different ones and each texture occurs with many shapes and palettes.
    """
    shapes = [draw.__name__ for draws in FAMILIES[split].values() for draw in draws]
    chosen = []
    for number, shape in enumerate(shapes):
        for leaf in range(LEAVES_PER_SHAPE):
            at = number * LEAVES_PER_SHAPE + leaf
            texture, palette = at * 3 % len(TEXTURES), (5 * at + 3 * number) % len(PALETTES)
            chosen.append((shape, TEXTURES[texture], PALETTES[palette]))
    return chosen


def object_words(shape: str, texture: str, palette: str) -> str:
    """The human name of a class, e.g. "star, striped, ember"."""
    return f"{shape}, {texture}, {palette}"


def object_attributes(words: str) -> tuple[str, str, str]:
    """Shape, texture and palette from the `words` of a leaf of mini_objects (inverse of `object_words`).

    Raises ValueError if `words` does not name a leaf.
    """
    parts = tuple(words.split(", "))
    if len(parts) != 3 or parts[0] not in SHAPES or parts[1] not in TEXTURES or parts[2] not in PALETTES:
        raise ValueError(f"words {words!r}: expected 'shape, texture, palette' of a mini_objects class")
    return parts


def _inks(rng: Generator, palette: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Main colour, second colour and ground of one object."""
    if palette in (INK, CHALK):
        dark, middle, light = rng.uniform(0, 0.2), rng.uniform(0.4, 0.62), rng.uniform(0.82, 1.0)
        first, ground = (dark, light) if palette == INK else (light, dark)
        second = ground if rng.random() < 0.4 else middle
        return tuple(np.full(3, grey, np.float32) for grey in (first, second, ground))
    low, high = HUES[palette]
    bright = rng.random() < 0.6
    strong, weak = ((0.75, 1.0), (0.2, 0.5)) if bright else ((0.3, 0.6), (0.75, 1.0))
    first = canvas.colour(rng, rng.uniform(low, high), (0.55, 1.0), strong)
    second = canvas.colour(rng, rng.uniform(low, high), (0.25, 0.9), weak)
    # Any ground that can be told from the main colour in brightness too: hue alone is lost in a dark picture.
    grounds = [canvas.any_colour(rng) for _ in range(6)]
    apart = [abs(canvas.luminance(ground) - canvas.luminance(first)) for ground in grounds]
    ground = next(
        (g for g, gap in zip(grounds, apart, strict=True) if gap > 0.2), grounds[int(np.argmax(apart))]
    )
    return first, second, ground


def draw_object(rng: Generator, words: str) -> Image.Image:
    """One image of the class `words`: RGB, sides 48 to 88."""
    shape, texture, palette = object_attributes(words)
    size = canvas.frame_size(rng)
    board = canvas.canvas_size(size)
    first, second, ground = _inks(rng, palette)
    weights = (0.3, 0.2, 0.15, 0.15, 0.2)
    picture = canvas.GROUNDS[rng.choice(len(weights), p=weights)](rng, board, ground)
    outline = SHAPES[shape](rng).map(canvas.wobble(rng, rng.uniform(0, 0.06)))
    pose = canvas.random_pose(rng, board, turn=35, fill=(0.5, 0.92))
    if texture == OUTLINED:
        cover = canvas.mask(outline, pose, board, rim=rng.uniform(0.06, 0.11) if outline.areas else 0.045)
        picture = canvas.blend(picture, first, cover)
    else:
        cover = canvas.mask(outline, pose, board)
        field = SURFACES[texture](rng, *pose.grid(board), board)
        picture = canvas.blend(picture, canvas.blend(second, first, field), cover)
        if np.abs(second - ground).sum() < 0.5 or rng.random() < 0.2:  # else the figure would dissolve
            picture = canvas.blend(picture, first, canvas.mask(outline, pose, board, rim=0.05))
    if rng.random() < 0.15:
        picture = canvas.occlude(rng, picture)
    if palette in (INK, CHALK):
        picture = picture.mean(2, keepdims=True).repeat(3, 2)
    return canvas.develop(rng, picture, size)
