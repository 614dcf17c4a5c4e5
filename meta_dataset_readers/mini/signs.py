"""mini_signs: invented traffic signs as a camera in a car sees them. Test only.

A sign is a pile of flat layers (plate, field, pictogram), each a figure and a colour. Knows the signs and how
they are photographed: perspective, bad light, shade, motion and focus blur, low resolution, clutter behind.
Does not know files or specifications.
"""

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image

from meta_dataset_readers.mini import canvas
from meta_dataset_readers.mini.canvas import Outline

Layer = tuple[Outline, str]  # a figure and the name of its colour

# Hue, saturation, value before light and wear.
PAINT = {
    "red": (0.99, 0.85, 0.8),
    "blue": (0.6, 0.85, 0.7),
    "yellow": (0.13, 0.9, 0.95),
    "white": (0.1, 0.03, 0.95),
    "black": (0.6, 0.1, 0.08),
    "green": (0.37, 0.8, 0.6),
    "grey": (0.6, 0.03, 0.5),
}


def polygon(corners: int, radius: float, turn: float = 0.0) -> Outline:
    """A regular polygon, a corner on top when `turn` (in corners) is 0."""
    angle = (np.arange(corners) + turn) * 2 * np.pi / corners
    return Outline((radius * np.stack([np.sin(angle), -np.cos(angle)], 1),))


def disc(radius: float, x: float = 0.0, y: float = 0.0) -> Outline:
    return polygon(48, radius).map(lambda points: points + (x, y))


def area(*xy: tuple[float, float]) -> Outline:
    return Outline((np.array(xy, float),))


def stroke(width: float, *lines) -> Outline:
    return Outline(lines=tuple(np.array(line, float) for line in lines), width=width)


def shrink(outline: Outline, factor: float, y: float = 0.0) -> Outline:
    """The figure at `factor` of its size, `y` lower."""
    smaller = outline.map(lambda points: points * factor + (0, y))
    return Outline(smaller.areas, smaller.holes, smaller.lines, outline.width * factor)


def turned(outline: Outline, degrees: float) -> Outline:
    return outline.map(lambda points: points @ canvas.rotation(degrees).T)


def curve(x: float, y: float, radius: float, start: float, end: float) -> np.ndarray:
    angle = np.deg2rad(np.linspace(start, end, 16))
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


# --- pictograms, each about one unit in radius -----------------------------------------------------------

ARROW = area((-0.16, 0.9), (-0.16, -0.1), (-0.55, -0.1), (0, -0.9), (0.55, -0.1), (0.16, -0.1), (0.16, 0.9))
BAR = area((-0.8, -0.22), (0.8, -0.22), (0.8, 0.22), (-0.8, 0.22))
SLASH = stroke(0.2, ((-0.7, -0.7), (0.7, 0.7)))
SALTIRE = stroke(0.24, ((-0.65, -0.65), (0.65, 0.65)), ((-0.65, 0.65), (0.65, -0.65)))
PLUS = stroke(0.4, ((-0.7, 0), (0.7, 0)), ((0, -0.7), (0, 0.7)))
EXCLAMATION = Outline(
    (area((-0.2, -0.9), (0.2, -0.9), (0.1, 0.3), (-0.1, 0.3)).areas[0], disc(0.19, 0, 0.7).areas[0])
)
BUMPS = Outline(
    (
        np.concatenate(
            [curve(-0.45, 0.4, 0.45, 180, 360), curve(0.45, 0.4, 0.45, 180, 360), [(0.9, 0.6), (-0.9, 0.6)]]
        ),
    )
)
SLIPPERY = stroke(
    0.2,
    *(
        np.stack([x + 0.22 * np.sin(np.linspace(0, 6.3, 20)), np.linspace(0.9, -0.6, 20)], 1)
        for x in (-0.42, 0.42)
    ),
)
NARROWS = stroke(
    0.24,
    ((-0.6, 0.9), (-0.6, 0.25), (-0.22, -0.2), (-0.22, -0.9)),
    ((0.6, 0.9), (0.6, 0.25), (0.22, -0.2), (0.22, -0.9)),
)
BEND = Outline(
    (area((-0.1, -0.5), (0.62, -0.95), (0.68, -0.1)).areas[0],),
    lines=(np.array([(-0.45, 0.9), (-0.45, 0.3), (0.4, -0.45)]),),
    width=0.28,
)
SNOW = stroke(0.15, *(np.outer((-0.85, 0.85), (np.cos(a), np.sin(a))) for a in np.arange(3) * np.pi / 3))
CAR = Outline(
    (
        area(
            (-0.95, 0.3),
            (-0.95, -0.05),
            (-0.65, -0.1),
            (-0.4, -0.5),
            (0.4, -0.5),
            (0.65, -0.1),
            (0.95, -0.05),
            (0.95, 0.3),
        ).areas[0],
        disc(0.22, -0.5, 0.35).areas[0],
        disc(0.22, 0.5, 0.35).areas[0],
    )
)
LORRY = Outline(
    (
        area((-1, 0.3), (-1, -0.65), (0.25, -0.65), (0.25, 0.3)).areas[0],
        area((0.33, 0.3), (0.33, -0.3), (0.7, -0.3), (0.98, 0.02), (0.98, 0.3)).areas[0],
        disc(0.2, -0.6, 0.38).areas[0],
        disc(0.2, 0.6, 0.38).areas[0],
    )
)
WALKER = Outline(
    (disc(0.2, 0.05, -0.75).areas[0],),
    lines=tuple(
        np.array(line, float)
        for line in (
            ((0, -0.45), (-0.05, 0.15), (-0.4, 0.9)),
            ((-0.05, 0.15), (0.3, 0.45), (0.35, 0.9)),
            ((-0.45, 0.05), (0, -0.4), (0.45, 0.0)),
        )
    ),
    width=0.2,
)
ROUNDABOUT = Outline(
    tuple(
        canvas.rotation(120 * k).dot(np.array([(0.98, 0.0), (0.36, 0.0), (0.66, 0.45)]).T).T for k in range(3)
    ),
    lines=tuple(curve(0, 0, 0.66, 120 * k - 72, 120 * k) for k in range(3)),
    width=0.24,
)
ROAD = Outline(
    (
        np.array([(-0.2, -0.9), (-0.05, -0.9), (-0.25, 0.9), (-0.85, 0.9)]),
        np.array([(0.2, -0.9), (0.05, -0.9), (0.25, 0.9), (0.85, 0.9)]),
    )
)
TURN = Outline(
    (np.array([(0.3, -0.95), (0.98, -0.45), (0.3, 0.05)]),),
    lines=(np.array([(-0.45, 0.9), (-0.45, -0.45), (0.4, -0.45)]),),
    width=0.3,
)


# --- plates ----------------------------------------------------------------------------------------------


def ban(*pictogram: Layer) -> list[Layer]:
    return [(disc(0.95), "red"), (disc(0.72), "white"), *pictogram]


def warning(*pictogram: Layer) -> list[Layer]:
    lower = 0.18
    inside = [(shrink(figure, 0.42, 0.3), paint) for figure, paint in pictogram]
    return [
        (shrink(polygon(3, 1.1), 1, lower), "red"),
        (shrink(polygon(3, 0.76), 1, lower), "white"),
        *inside,
    ]


def order(*pictogram: Layer) -> list[Layer]:
    return [
        (disc(0.95), "white"),
        (disc(0.88), "blue"),
        *((shrink(figure, 0.65), paint) for figure, paint in pictogram),
    ]


def notice(*pictogram: Layer) -> list[Layer]:
    return [
        (polygon(4, 1.25, 0.5), "white"),
        (polygon(4, 1.16, 0.5), "blue"),
        *((shrink(f, 0.7), p) for f, p in pictogram),
    ]


LIGHTS = [(disc(0.3, 0, y), paint) for y, paint in ((-0.65, "red"), (0.05, "yellow"), (0.75, "green"))]
HALT = [(polygon(8, 1.0, 0.5), "white"), (polygon(8, 0.92, 0.5), "red"), (shrink(SALTIRE, 0.75), "white")]
END = [
    (disc(0.95), "grey"),
    (disc(0.86), "white"),
    *((stroke(0.09, ((-0.6 + k, 0.6 + k), (0.6 + k, -0.6 + k))), "black") for k in (-0.16, 0.0, 0.16)),
]

SIGNS: dict[str, list[Layer]] = {
    "ahead only": order((ARROW, "white")),
    "bend": warning((BEND, "black")),
    "bumps": warning((BUMPS, "black")),
    "closed to all": ban(),
    "crossing": notice(
        (polygon(3, 1.2).map(lambda p: p + (0, 0.2)), "white"), (shrink(WALKER, 0.5, 0.25), "black")
    ),
    "crossroads": warning((SALTIRE, "black")),
    "danger": warning((EXCLAMATION, "black")),
    "dead end": notice(
        (stroke(0.4, ((0, 0.95), (0, -0.4))), "white"),
        (area((-0.7, -0.85), (0.7, -0.85), (0.7, -0.4), (-0.7, -0.4)), "red"),
    ),
    "end of restrictions": END,
    "first aid": notice((polygon(4, 1.2, 0.5), "white"), (PLUS, "red")),
    "footpath": order((shrink(WALKER, 1.1), "white")),
    "give way": [(turned(polygon(3, 1.1), 180), "red"), (turned(polygon(3, 0.72), 180), "white")],
    "halt": HALT,
    "lights ahead": warning(*LIGHTS),
    "motorway": notice((ROAD, "white")),
    "narrows": warning((NARROWS, "black")),
    "no cars": ban((shrink(CAR, 0.55), "black")),
    "no entry": [(disc(0.95), "white"), (disc(0.9), "red"), (shrink(BAR, 0.85), "white")],
    "no lorries": ban((shrink(LORRY, 0.55), "black")),
    "no parking": [(disc(0.95), "red"), (disc(0.74), "blue"), (shrink(SLASH, 0.85), "red")],
    "no stopping": [(disc(0.95), "red"), (disc(0.74), "blue"), (shrink(SALTIRE, 0.85), "red")],
    "no turning": ban((shrink(TURN, 0.5), "black"), (shrink(SLASH, 0.8), "red")),
    "no walking": ban((shrink(WALKER, 0.55), "black")),
    "priority": [(polygon(4, 1.05), "white"), (polygon(4, 0.8), "yellow")],
    "right only": order((turned(ARROW, 90), "white")),
    "roundabout": order((ROUNDABOUT, "white")),
    "slippery": warning((SLIPPERY, "black")),
    "snow": warning((SNOW, "blue")),
}


def perspective(rng: Generator, strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """A random projective map of the plane that keeps the middle in place."""
    tilt = rng.uniform(-strength, strength, 2)
    return lambda points: points / (1 + points @ tilt)[:, None]


def paint(rng: Generator, name: str) -> np.ndarray:
    """A colour of a sign, a little off, faded or dark."""
    hue, saturation, value = PAINT[name]
    hue, saturation = hue + rng.normal(0, 0.012), saturation * rng.uniform(0.75, 1.05)
    rgb = colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value * rng.uniform(0.85, 1.1), 1))
    return np.array(rgb, np.float32)


def street(rng: Generator, size: canvas.Size) -> np.ndarray:
    """A picture to stand behind a sign: sky, leaves, walls."""
    hue = rng.choice((0.1, 0.3, 0.57)) + rng.normal(0, 0.03)
    base = canvas.colour(rng, hue, (0.05, 0.5), (0.25, 0.9))
    weights = (0.1, 0.2, 0.2, 0.2, 0.3)
    return canvas.GROUNDS[rng.choice(len(weights), p=weights)](rng, size, base)


def motion(picture: np.ndarray, pixels: int) -> np.ndarray:
    """Sideways motion blur."""
    return np.mean([np.roll(picture, shift, 1) for shift in range(pixels)], axis=0)


def draw_sign(rng: Generator, name: str) -> Image.Image:
    """One photograph of the sign `name`: RGB, sides 48 to 88."""
    size = canvas.frame_size(rng)
    board = canvas.canvas_size(size)
    picture = street(rng, board)
    pose = canvas.random_pose(rng, board, turn=9, fill=(0.6, 0.95), shear=0.12, stretch=0.12)
    view = perspective(rng, 0.18)
    if rng.random() < 0.5:
        post = Outline((np.array([(-0.06, 0.5), (0.06, 0.5), (0.06, 4.0), (-0.06, 4.0)]),))
        picture = canvas.blend(picture, paint(rng, "grey"), canvas.mask(post, pose, board))
    for figure, colour in SIGNS[name]:
        picture = canvas.blend(picture, paint(rng, colour), canvas.mask(figure.map(view), pose, board))
    x, y = canvas.pixel_grid(board)
    slope = rng.uniform(-0.35, 0.35, 2)
    light = np.exp(rng.uniform(np.log(0.45), np.log(1.2))) * (
        1 + slope[0] * (x / board[0] - 0.5) + slope[1] * (y / board[1] - 0.5)
    )
    if rng.random() < 0.3:  # a shadow falls over it
        light = light * np.where(
            x * np.cos(slope[0] * 9) + y * np.sin(slope[0] * 9) < rng.uniform(0.2, 0.8) * board[0], 0.6, 1
        )
    cast = 1 + rng.uniform(-0.12, 0.12, 3)
    picture = (picture * light[..., None] * cast).astype(np.float32)
    if rng.random() < 0.25:
        picture = motion(picture, int(rng.integers(2, 8)))
    if rng.random() < 0.12:
        picture = canvas.occlude(rng, picture, 0.2)
    image = canvas.develop(rng, picture, size, light=0.15, blur=1.2, grain=0.04)
    if rng.random() < 0.3:  # far away: few pixels, enlarged
        share = rng.uniform(0.4, 0.75)
        image = image.resize([round(side * share) for side in size], Image.Resampling.BOX).resize(
            size, Image.Resampling.BILINEAR
        )
    return image
