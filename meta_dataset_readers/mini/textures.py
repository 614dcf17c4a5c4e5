"""mini_textures: surfaces that fill the whole frame, in any colours: only the pattern tells them apart.

Each function of `TEXTURES` draws one pattern as a field in about [0, 1], from coordinates a, b that are
already turned, and scaled so that about four periods of length 1 fit the frame. Does not know files or
specifications.
"""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from meta_dataset_readers.mini import canvas

TAU = np.float32(2 * np.pi)
Field = np.ndarray


def step(field: Field, sharpness: float = 10.0) -> Field:
    """0 below zero, 1 above, with a soft edge."""
    return np.clip(field * np.float32(sharpness) + np.float32(0.5), 0, 1)


def wrapped(field: Field) -> Field:
    """Position within the period, -0.5 to 0.5."""
    return np.mod(field, 1) - 0.5


def size_of(field: Field) -> canvas.Size:
    return field.shape[1], field.shape[0]


def cells(rng: Generator, a: Field, b: Field, density: float) -> tuple[Field, Field, Field]:
    """A Voronoi diagram of random points: distances to the nearest two, index of the nearest."""
    low, high = (a.min(), b.min()), (a.max(), b.max())
    count = max(12, int(density * (high[0] - low[0]) * (high[1] - low[1])))
    x, y = rng.uniform(low, high, (count, 2)).astype(np.float32).T
    distance = np.hypot(a[..., None] - x, b[..., None] - y)
    nearest = distance.argmin(-1)
    two = np.partition(distance, 1, -1)
    return two[..., 0], two[..., 1], nearest


def strokes(rng: Generator, size: canvas.Size, count: int, length: float, width: int, spread: float) -> Field:
    """Many straight strokes of random grey, `length` (of the shorter side) long, `spread` turns apart."""
    image = Image.new("L", size, int(rng.integers(60, 190)))
    draw = ImageDraw.Draw(image)
    main = rng.uniform(0, TAU)
    for _ in range(count):
        angle = main + rng.normal() * spread * TAU
        reach = 0.5 * length * min(size) * np.array([np.cos(angle), np.sin(angle)])
        centre = rng.uniform(0, 1, 2) * size
        draw.line([tuple(centre - reach), tuple(centre + reach)], fill=int(rng.integers(0, 256)), width=width)
    return np.asarray(image, np.float32) / 255


def woven(rng, a, b):
    """A basket: squares of parallel strands, each across its neighbours."""
    a, b = 0.8 * a, 0.8 * b
    strands = np.float32(rng.integers(3, 5) * np.pi)
    lengthwise = np.mod(np.floor(a) + np.floor(b), 2) > 0
    across, along = np.where(lengthwise, a, b), np.where(lengthwise, b, a)
    return np.abs(np.sin(strands * across)) * (0.35 + 0.65 * np.cos(wrapped(along) * np.float32(2.4)))


def speckled(rng, a, b):
    return step(canvas.noise(rng, size_of(a), 48) - rng.uniform(1.0, 1.4), 3)


def marbled(rng, a, b):
    turbulence = sum(canvas.noise(rng, size_of(a), 4 * 2**k) / 2**k for k in range(3))
    return 1 - np.abs(np.sin(np.pi * (0.35 * a + 0.45 * turbulence))) ** 0.6


def wavy(rng, a, b):
    return 0.5 + 0.5 * np.sin(TAU * (b + rng.uniform(0.25, 0.45) * np.sin(TAU * a / rng.uniform(1.6, 2.4))))


def cracked(rng, a, b):
    nearest, second, _ = cells(rng, a, b, 1.0)
    return 0.85 * step(second - nearest - 0.07, 12) + 0.1 * canvas.noise(rng, size_of(a), 30)


def bricked(rng, a, b):
    row = np.floor(b * 1.6)
    column = a * 0.8 + 0.5 * np.mod(row, 2)
    shade = np.mod(np.sin(np.floor(column) * 12.9 + row * 78.2) * 437.5, 1)
    wall = np.minimum(0.5 - np.abs(wrapped(column)), (0.5 - np.abs(wrapped(b * 1.6))) * 0.5)
    return step(wall - 0.04, 20) * (0.6 + 0.4 * shade)


def scaly(rng, a, b):
    """Overlapping round scales with dark rims, each row half a step aside."""
    field = np.zeros_like(a)
    base = np.floor(b * 2)
    for row in (base + 1, base, base - 1):  # each row lies on the one before it
        x = wrapped(a + 0.5 * np.mod(row, 2))
        y = b - 0.5 * row
        radius = np.hypot(x, y) / 0.6
        field = np.where(radius < 1, step(0.86 - radius, 12) * (0.45 + 0.55 * (1 - radius)), field)
    return field


def gridded(rng, a, b):
    thin = rng.uniform(0.05, 0.09)
    return step(thin - np.minimum(np.abs(wrapped(a * 1.2)), np.abs(wrapped(b * 1.2))), 25)


def grained(rng, a, b):
    """Wood: long bent fibres around a knot."""
    bent = b + 0.25 * canvas.noise(rng, size_of(a), 2.5)
    knot = rng.uniform(-1.5, 1.5, 2)
    rings = np.hypot((a - knot[0]) * 0.3, bent - knot[1]) * rng.uniform(3.0, 4.0)
    return np.mod(rings, 1) * 0.8 + 0.06 * canvas.noise(rng, size_of(a), 60)


def bubbly(rng, a, b):
    field = np.zeros_like(a)
    low, high = (a.min(), b.min()), (a.max(), b.max())
    for _ in range(int(rng.integers(36, 56))):
        x, y = rng.uniform(low, high)
        radius = rng.uniform(0.16, 0.62)
        distance = np.hypot(a - x, b - y) / radius
        field = np.where(distance < 1, 0.12 + 0.88 * np.clip(distance, 0, 1) ** 6, field)
        field = np.maximum(
            field, step(0.16 - np.hypot(a - x + 0.35 * radius, b - y + 0.35 * radius) / radius, 10)
        )
    return field


def plaid(rng, a, b):
    """Bands of several widths crossing, both seen through each other."""
    edges = rng.uniform(0.1, 0.9, 3)
    bands = [
        sum(step(w - np.abs(wrapped(c * 0.6 + e)), 14) for e, w in zip(edges, (0.2, 0.08, 0.04), strict=True))
        for c in (a, b)
    ]
    return 0.33 * (bands[0] + bands[1])


def zigzagged(rng, a, b):
    return step(np.sin(TAU * (b * 1.1 + rng.uniform(0.9, 1.3) * np.abs(wrapped(a * 0.9)))), 2)


def polka_dotted(rng, a, b):
    row = np.floor(b * 1.1)
    x, y = wrapped(a * 1.1 + 0.5 * np.mod(row, 2)), wrapped(b * 1.1)
    return step(rng.uniform(0.2, 0.33) - np.hypot(x, y), 14)


def honeycombed(rng, a, b):
    """Distance to the wall of a hexagon."""
    height = np.float32(np.sqrt(3))
    u, v = a * 1.1, b * 1.1
    first = (wrapped(u), wrapped(v / height) * height)
    second = (wrapped(u + 0.5), wrapped(v / height + 0.5) * height)
    nearer = np.hypot(*first) < np.hypot(*second)
    x, y = (np.abs(np.where(nearer, one, other)) for one, other in zip(first, second, strict=True))
    return step(0.5 - np.maximum(x, 0.5 * x + 0.5 * height * y) - 0.06, 14)


def cobbled(rng, a, b):
    nearest, second, _ = cells(rng, a, b, 1.6)
    return np.clip((second - nearest) * 2.2, 0, 1) ** 0.6


def lozenged(rng, a, b):
    u, v = a + b * 0.6, a - b * 0.6
    shade = np.mod(np.floor(u) + np.floor(v), 2)
    seam = step(0.04 - np.minimum(np.abs(wrapped(u + 0.5)), np.abs(wrapped(v + 0.5))), 25)
    return np.maximum(0.75 * shade, seam * 0.4)


def fibrous(rng, a, b):
    return strokes(rng, size_of(a), 320, 0.6, 2, 0.025)


def swirled(rng, a, b):
    centre = rng.uniform(-0.7, 0.7, 2)
    u, v = a - centre[0], b - centre[1]
    arms = int(rng.integers(2, 5)) * rng.choice((-1, 1))
    return 0.5 + 0.5 * np.sin(arms * np.arctan2(v, u) + TAU * 0.85 * np.hypot(u, v))


def camouflaged(rng, a, b):
    size = size_of(a)
    patches = [step(canvas.noise(rng, size, 8) - 0.1, 12) for _ in range(2)]
    return np.maximum(0.5 * patches[0], patches[1])


def scratched(rng, a, b):
    return strokes(rng, size_of(a), 110, 0.5, 2, 1.0)


def striped(rng, a, b):
    """Straight bands of unequal widths."""
    phases = rng.uniform(0, 1, 2)
    return 0.5 * step(np.sin(TAU * (0.9 * a + phases[0])), 4) + 0.5 * step(
        np.sin(TAU * (0.37 * a + phases[1])), 4
    )


def rayed(rng, a, b):
    centre = rng.uniform(-1.2, 1.2, 2)
    return step(np.sin(int(rng.integers(9, 15)) * np.arctan2(b - centre[1], a - centre[0])), 2)


def terraced(rng, a, b):
    """Contour lines of a landscape."""
    height = canvas.noise(rng, size_of(a), 5) * rng.uniform(2.2, 3.0)
    return step(np.abs(wrapped(height)) - 0.38, 8)


def faceted(rng, a, b):
    """Flat polygons, each of its own shade."""
    _, _, index = cells(rng, a, b, 1.3)
    return rng.permutation(np.linspace(0, 1, int(index.max()) + 1))[index].astype(np.float32)


def knitted(rng, a, b):
    """Columns of V-shaped stitches."""
    x = wrapped(a * 1.1)
    stitch = wrapped(b * 2 + 1.1 * np.abs(x))
    return step(0.36 - np.abs(stitch), 6) * step(0.44 - np.abs(x), 12) * step(np.abs(x) - 0.04, 12)


TEXTURES = {
    "TRAIN": (bubbly, camouflaged, cobbled, gridded, grained, knitted, polka_dotted, rayed, striped, wavy),
    "VALID": (faceted, lozenged, plaid, scratched, speckled),
    "TEST": (bricked, cracked, fibrous, honeycombed, marbled, scaly, swirled, terraced, woven, zigzagged),
}
DRAW = {texture.__name__: texture for split in TEXTURES.values() for texture in split}


def colourise(rng: Generator, field: Field) -> np.ndarray:
    """A picture from a field: a ramp through two or three random colours whose ends differ in brightness."""
    while True:
        ends = canvas.any_colour(rng), canvas.any_colour(rng)
        if abs(canvas.luminance(ends[0]) - canvas.luminance(ends[1])) > 0.3:
            break
    stops = [ends[0], (ends[0] + ends[1]) / 2, ends[1]]
    if rng.random() < 0.5:
        stops[1] = stops[1] + rng.uniform(-0.2, 0.2, 3).astype(np.float32)
    value = np.clip(field, 0, 1)
    return np.stack([np.interp(value, (0, 0.5, 1), channel) for channel in np.transpose(stops)], -1).astype(
        np.float32
    )


def draw_texture(rng: Generator, name: str) -> Image.Image:
    """One image of the texture `name`: RGB, sides 48 to 88."""
    size = canvas.frame_size(rng)
    board = canvas.canvas_size(size)
    periods = np.exp(rng.uniform(np.log(3.4), np.log(6.0)))
    aspect = np.exp(rng.uniform(-0.12, 0.12))
    matrix = canvas.rotation(rng.uniform(0, 360)) @ np.diag([aspect, 1 / aspect]) * min(board) / periods
    pose = canvas.Pose(matrix, np.array(board) * rng.uniform(0.3, 0.7, 2))
    bend = rng.uniform(0, 0.12)
    a, b = (axis + bend * canvas.noise(rng, board, 2.5) for axis in pose.grid(board))
    picture = colourise(rng, DRAW[name](rng, a, b))
    x, y = canvas.pixel_grid(board)
    slope = rng.uniform(-0.25, 0.25, 2)
    lit = 1 + slope[0] * (x / board[0] - 0.5) + slope[1] * (y / board[1] - 0.5)
    return canvas.develop(rng, picture * lit[..., None].astype(np.float32), size)
