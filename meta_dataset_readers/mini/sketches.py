"""mini_sketches: things drawn with a few strokes by an unsteady hand, black on white.

Each function of `SKETCHES` returns the strokes of one drawing, as open lines in [-1, 1] x [-1, 1] (y down),
with proportions and details that vary. Does not know files or specifications.
"""

import itertools

import numpy as np
from numpy.random import Generator
from PIL import Image

from meta_dataset_readers.mini import canvas

Stroke = np.ndarray  # (n, 2)
Strokes = list[Stroke]


def path(*xy: tuple[float, float]) -> Stroke:
    return np.array(xy, float)


def ring(*xy: tuple[float, float]) -> Stroke:
    """A closed path."""
    return np.array([*xy, xy[0]], float)


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> Stroke:
    """Part of an ellipse, angles in degrees from the right, clockwise on the page."""
    angle = np.deg2rad(np.linspace(start, end, max(8, int(abs(end - start) / 10))))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def box(left: float, top: float, right: float, bottom: float) -> Stroke:
    return ring((left, top), (right, top), (right, bottom), (left, bottom))


def anchor(r: Generator) -> Strokes:
    bar = r.uniform(0.3, 0.45)
    hooks = [path((-0.85, 0.2), (-0.75, 0.45), (-0.55, 0.3)), path((0.85, 0.2), (0.75, 0.45), (0.55, 0.3))]
    return [
        arc(0, -0.75, 0.17, 0.17),
        path((0, -0.58), (0, 0.9)),
        path((-bar, -0.35), (bar, -0.35)),
        arc(0, 0.25, 0.75, 0.65, 15, 165),
        *hooks,
    ]


def bicycle(r: Generator) -> Strokes:
    wheel = r.uniform(0.36, 0.43)
    y = 0.35
    frame = [
        path((-0.55, y), (-0.25, -0.3), (0.35, -0.3), (0.0, y), (-0.55, y)),
        path((-0.32, -0.45), (0.0, y)),
        path((0.55, y), (0.3, -0.5), (0.5, -0.58)),
        path((-0.45, -0.45), (-0.18, -0.45)),
    ]
    return [arc(-0.55, y, wheel, wheel), arc(0.55, y, wheel, wheel), *frame]


def boat(r: Generator) -> Strokes:
    mast = r.uniform(-0.15, 0.1)
    hull = ring((-0.9, 0.35), (0.9, 0.35), (0.55, 0.8), (-0.6, 0.8))
    sails = [ring((mast + 0.06, -0.9), (mast + 0.7, 0.2), (mast + 0.06, 0.2))]
    if r.random() < 0.7:
        sails.append(ring((mast - 0.06, -0.6), (mast - 0.5, 0.2), (mast - 0.06, 0.2)))
    return [hull, path((mast, 0.35), (mast, -0.95)), *sails]


def butterfly(r: Generator) -> Strokes:
    upper, lower = r.uniform(0.4, 0.48), r.uniform(0.26, 0.34)
    wings = [arc(side * 0.48, -0.3, 0.42, upper) for side in (-1, 1)]
    wings += [arc(side * 0.36, 0.45, 0.3, lower) for side in (-1, 1)]
    feelers = [path((0, -0.5), (side * 0.12, -0.8), (side * 0.25, -0.92)) for side in (-1, 1)]
    return [*wings, arc(0, 0.05, 0.07, 0.6), *feelers]


def cactus(r: Generator) -> Strokes:
    left, right = r.uniform(-0.1, 0.3, 2)
    stem = np.concatenate([path((-0.2, 0.6)), arc(0, -0.65, 0.2, 0.25, 180, 360), path((0.2, 0.6))])
    arms = [
        path((-0.2, left + 0.15), (-0.6, left + 0.15), (-0.6, left - 0.4)),
        path((-0.2, left - 0.05), (-0.42, left - 0.05), (-0.42, left - 0.4), (-0.6, left - 0.4)),
        path((0.2, right + 0.15), (0.6, right + 0.15), (0.6, right - 0.4)),
        path((0.2, right - 0.05), (0.42, right - 0.05), (0.42, right - 0.4), (0.6, right - 0.4)),
    ]
    return [stem, *arms, ring((-0.4, 0.6), (0.4, 0.6), (0.3, 0.95), (-0.3, 0.95))]


def candle(r: Generator) -> Strokes:
    width, top = r.uniform(0.16, 0.28), r.uniform(-0.35, -0.1)
    flame = ring((0, top - 0.6), (0.15, top - 0.3), (0, top - 0.12), (-0.15, top - 0.3))
    holder = arc(0, 0.75, 0.65, 0.16)
    return [box(-width, top, width, 0.7), path((0, top), (0, top - 0.12)), flame, holder]


def car(r: Generator) -> Strokes:
    roof, wheel = r.uniform(-0.5, -0.35), r.uniform(0.17, 0.23)
    body = ring(
        (-0.95, 0.35),
        (-0.95, 0.0),
        (-0.6, -0.05),
        (-0.35, roof),
        (0.3, roof),
        (0.6, -0.05),
        (0.95, 0.05),
        (0.95, 0.35),
    )
    return [
        body,
        path((-0.6, -0.05), (0.6, -0.05)),
        path((0, roof), (0, -0.05)),
        arc(-0.5, 0.38, wheel, wheel),
        arc(0.5, 0.38, wheel, wheel),
    ]


def cat(r: Generator) -> Strokes:
    ear = r.uniform(0.3, 0.4)
    ears = [path((side * 0.65, -0.15), (side * 0.62, -0.5 - ear), (side * 0.2, -0.5)) for side in (-1, 1)]
    eyes = [arc(side * 0.28, -0.05, 0.09, 0.11) for side in (-1, 1)]
    whiskers = [path((side * 0.25, 0.25), (side * 0.95, y)) for side in (-1, 1) for y in (0.12, 0.3, 0.48)]
    return [arc(0, 0.1, 0.68, 0.65), *ears, *eyes, ring((-0.07, 0.15), (0.07, 0.15), (0, 0.25)), *whiskers]


def chair(r: Generator) -> Strokes:
    seat, back = r.uniform(0.05, 0.2), r.uniform(-0.95, -0.75)
    legs = [
        path((-0.5, back), (-0.5, 0.95)),
        path((0.35, seat), (0.35, 0.95)),
        path((0.65, seat - 0.22), (0.65, 0.6)),
        path((-0.2, back - 0.02), (-0.2, seat - 0.22)),
    ]
    slats = [path((-0.5, back + 0.25 * k), (-0.2, back - 0.02 + 0.25 * k)) for k in range(3)]
    return [*legs, ring((-0.5, seat), (0.35, seat), (0.65, seat - 0.22), (-0.2, seat - 0.22)), *slats]


def clock(r: Generator) -> Strokes:
    hour, minute = r.uniform(0, 2 * np.pi, 2)
    hands = [
        path((0, 0), (long * np.sin(at), -long * np.cos(at))) for long, at in ((0.4, hour), (0.62, minute))
    ]
    every = np.arange(12 if r.random() < 0.6 else 4)
    angle = every * 2 * np.pi / len(every)
    ticks = [np.array([[0.74, 0.74], [0.88, 0.88]]) * (np.sin(a), np.cos(a)) for a in angle]
    return [arc(0, 0, 0.92, 0.92), *hands, *ticks]


def cup(r: Generator) -> Strokes:
    taper = r.uniform(0.05, 0.2)
    sides = [path((-0.65, -0.45), (-0.65 + taper, 0.65), (0.35 - taper, 0.65), (0.35, -0.45))]
    steam = [path((x, -0.68), (x + 0.1, -0.78), (x, -0.88), (x + 0.08, -0.98)) for x in (-0.35, -0.1)]
    return [
        arc(-0.15, -0.45, 0.5, 0.13),
        *sides,
        arc(0.4, 0.0, 0.38, 0.32, -85, 100),
        *(steam if r.random() < 0.6 else []),
    ]


def envelope(r: Generator) -> Strokes:
    height = r.uniform(0.5, 0.65)
    fold = [path((-0.9, -height), (0, r.uniform(0.0, 0.2)), (0.9, -height))]
    if r.random() < 0.5:
        fold += [path((-0.9, height), (-0.2, 0.0)), path((0.9, height), (0.2, 0.0))]
    return [box(-0.9, -height, 0.9, height), *fold]


def face(r: Generator) -> Strokes:
    mood = r.uniform(0.1, 0.3) * r.choice((-1, 1))
    eyes = [arc(side * 0.32, -0.25, 0.1, 0.13) for side in (-1, 1)]
    x = np.linspace(-0.4, 0.4, 12)
    mouth = np.stack([x, 0.45 + mood * (1 - (x / 0.4) ** 2) - mood / 2], 1)
    nose = [path((0, -0.1), (-0.08, 0.15), (0.06, 0.15))] if r.random() < 0.6 else []
    return [arc(0, 0, r.uniform(0.75, 0.85), 0.92), *eyes, mouth, *nose]


def fish(r: Generator) -> Strokes:
    height = r.uniform(0.38, 0.52)
    tail = ring((0.45, 0), (0.95, -0.42), (0.85, 0), (0.95, 0.42))
    scales = [arc(-0.05 + 0.2 * k, 0, 0.1, 0.2, -80, 80) for k in range(2)] if r.random() < 0.6 else []
    return [
        arc(-0.2, 0, 0.7, height),
        tail,
        arc(-0.58, -0.12, 0.06, 0.06),
        arc(-0.42, 0.05, 0.1, 0.28, -70, 70),
        *scales,
    ]


def flower(r: Generator) -> Strokes:
    petals = int(r.integers(5, 8))
    y, reach = -0.4, 0.33
    bloom = [
        arc(reach * np.cos(a), y + reach * np.sin(a), 0.19, 0.19)
        for a in np.arange(petals) * 2 * np.pi / petals
    ]
    leaf = arc(0.2, 0.5, 0.2, 0.1)
    leaves = [leaf] if r.random() < 0.5 else [leaf, arc(-0.2, 0.6, 0.2, 0.1)]
    return [arc(0, y, 0.15, 0.15), *bloom, path((0, 0.1), (0.02, 0.95)), *leaves]


def hammer(r: Generator) -> Strokes:
    width = r.uniform(0.08, 0.13)
    head = ring((-0.55, -0.85), (0.3, -0.85), (0.75, -0.6), (0.3, -0.5), (-0.55, -0.45))
    return [head, box(-0.15 - width, -0.48, -0.15 + width, 0.95)]


def hourglass(r: Generator) -> Strokes:
    width = r.uniform(0.5, 0.62)
    glass = [path((-width, -0.8), (-0.05, 0), (-width, 0.8)), path((width, -0.8), (0.05, 0), (width, 0.8))]
    sand = [ring((-0.35, 0.78), (0, 0.4), (0.35, 0.78)), path((0, 0), (0, 0.4))]
    return [path((-0.75, -0.85), (0.75, -0.85)), path((-0.75, 0.85), (0.75, 0.85)), *glass, *sand]


def house(r: Generator) -> Strokes:
    eaves, door = r.uniform(-0.25, -0.05), r.uniform(-0.45, 0.1)
    parts = [
        box(-0.7, eaves, 0.7, 0.85),
        path((-0.9, eaves), (0, -0.92), (0.9, eaves)),
        box(door, 0.3, door + 0.32, 0.85),
    ]
    parts.append(box(0.25, eaves + 0.2, 0.55, eaves + 0.5))
    if r.random() < 0.6:
        parts.append(path((0.4, -0.6), (0.4, -0.9), (0.6, -0.9), (0.6, -0.4)))
    return parts


def key(r: Generator) -> Strokes:
    bow, teeth = r.uniform(0.3, 0.38), int(r.integers(2, 4))
    bits = [path((0.85 - 0.2 * k, 0.0), (0.85 - 0.2 * k, r.uniform(0.22, 0.32))) for k in range(teeth)]
    return [arc(-0.55, 0, bow, bow), arc(-0.55, 0, 0.14, 0.14), path((bow - 0.55, 0), (0.9, 0)), *bits]


def ladder(r: Generator) -> Strokes:
    rungs, lean = int(r.integers(4, 7)), r.uniform(0.0, 0.15)
    levels = np.linspace(-0.7, 0.7, rungs)
    rails = [path((side * (0.4 - lean), -0.95), (side * 0.42, 0.95)) for side in (-1, 1)]
    return [*rails, *(path((-0.41 + lean / 2, y), (0.41 - lean / 2, y)) for y in levels)]


def lamp(r: Generator) -> Strokes:
    """A light bulb."""
    rays = [
        np.array([[0.72, 0.72], [0.95, 0.95]]) * (np.cos(a), np.sin(a)) + (0, -0.25)
        for a in np.deg2rad((-150, -90, -30, 180, 0))
    ]
    bulb = np.concatenate([path((-0.2, 0.45)), arc(0, -0.25, 0.5, 0.5, 125, 415), path((0.2, 0.45))])
    base = [box(-0.2, 0.45, 0.2, 0.8), path((-0.2, 0.57), (0.2, 0.57)), path((-0.2, 0.69), (0.2, 0.69))]
    wire = path(
        (-0.12, 0.42), (-0.2, -0.15), (-0.06, -0.02), (0, -0.2), (0.06, -0.02), (0.2, -0.15), (0.12, 0.42)
    )
    return [bulb, *base, wire, *(rays if r.random() < 0.5 else [])]


def mushroom(r: Generator) -> Strokes:
    cap = np.concatenate([arc(0, 0, 0.85, r.uniform(0.65, 0.85), 180, 360), path((-0.85, 0))])
    dots = [arc(x, y, 0.1, 0.09) for x, y in ((-0.4, -0.25), (0.05, -0.45), (0.42, -0.2))]
    stem = path((-0.22, 0), (-0.28, 0.8), (0.28, 0.8), (0.22, 0))
    return [cap, stem, *(dots if r.random() < 0.75 else [])]


def snowman(r: Generator) -> Strokes:
    head = r.uniform(0.22, 0.28)
    hat = [path((-0.35, -0.85 + 0.1), (0.35, -0.75)), box(-0.2, -1.0, 0.2, -0.75)]
    arms = [path((side * 0.33, 0.0), (side * 0.85, -0.25)) for side in (-1, 1)]
    eyes = [arc(side * 0.09, -0.55, 0.02, 0.02) for side in (-1, 1)]
    return [
        arc(0, -0.5, head, head),
        arc(0, 0.05, 0.36, 0.33),
        arc(0, 0.65, 0.48, 0.36),
        *arms,
        *eyes,
        *(hat if r.random() < 0.8 else []),
    ]


def spectacles(r: Generator) -> Strokes:
    lens = r.uniform(0.3, 0.38)
    sides = [path((side * (0.46 + lens), -0.1), (side * 0.98, -0.35)) for side in (-1, 1)]
    shape = [arc(side * 0.46, 0, lens, lens * r.uniform(0.75, 1.0)) for side in (-1, 1)]
    return [*shape, arc(0, 0.0, 0.46 - lens, 0.12, 180, 360), *sides]


def sun(r: Generator) -> Strokes:
    rays, inner = int(r.integers(8, 13)), r.uniform(0.42, 0.5)
    turn = r.uniform(0, 2 * np.pi)
    directions = [(np.cos(turn + a), np.sin(turn + a)) for a in np.arange(rays) * 2 * np.pi / rays]
    return [arc(0, 0, inner, inner), *(np.outer((inner + 0.15, 0.95), d) for d in directions)]


def table(r: Generator) -> Strokes:
    y, splay = r.uniform(-0.35, -0.15), r.uniform(0.0, 0.12)
    top = ring((-0.6, y - 0.25), (0.95, y - 0.25), (0.65, y), (-0.95, y))
    legs = [
        path((-0.9, y), (-0.9 - splay, 0.85)),
        path((0.6, y), (0.6 + splay, 0.85)),
        path((0.9, y - 0.2), (0.9 + splay, 0.6)),
        path((-0.5, y), (-0.5, 0.6)),
    ]
    return [top, *legs]


def tree(r: Generator) -> Strokes:
    angle = np.linspace(0, 2 * np.pi, 80)
    lobes = int(r.integers(6, 9))
    radius = 0.5 + 0.09 * np.abs(np.sin(lobes * angle / 2))
    crown = np.stack([1.1 * radius * np.cos(angle), -0.35 + radius * np.sin(angle)], 1)
    return [
        crown,
        path((-0.13, 0.2), (-0.15, 0.95)),
        path((0.13, 0.2), (0.15, 0.95)),
        path((-0.4, 0.95), (0.4, 0.95)),
    ]


def umbrella(r: Generator) -> Strokes:
    scallops = int(r.integers(3, 6))
    edges = np.linspace(-0.9, 0.9, scallops + 1)
    hem = [arc((a + b) / 2, 0, (b - a) / 2, 0.12, 180, 360) for a, b in itertools.pairwise(edges)]
    handle = np.concatenate([path((0, -0.1), (0, 0.75)), arc(-0.14, 0.75, 0.14, 0.17, 0, 180)])
    return [arc(0, 0, 0.9, r.uniform(0.7, 0.85), 180, 360), *hem, handle, path((0, -0.8), (0, -0.95))]


SKETCHES = {
    "TRAIN": (boat, candle, cat, cup, flower, hammer, lamp, mushroom, spectacles, table),
    "VALID": (anchor, butterfly, envelope, snowman, sun),
    "TEST": (bicycle, cactus, car, chair, clock, face, fish, hourglass, house, key, ladder, tree, umbrella),
}
DRAW = {sketch.__name__: sketch for split in SKETCHES.values() for sketch in split}


def unsteady(rng: Generator, stroke: Stroke, shake: float) -> Stroke:
    """A stroke as a hand draws it: shifted a little, trembling, its end missed or overshot."""
    gaps = np.hypot(*np.diff(stroke, axis=0).T)
    along = np.concatenate([[0], np.cumsum(gaps)])
    length = along[-1]
    overshoot = rng.normal(0, 0.03)
    at = np.linspace(0, max(length + min(overshoot, 0), 0.5 * length), max(4, int(length / 0.06)))
    smooth = np.stack([np.interp(at, along, stroke[:, axis]) for axis in (0, 1)], 1)
    knots = max(2, int(length / 0.35) + 1)
    tremble = rng.normal(0, shake, (knots, 2))
    place = np.linspace(0, at[-1], knots)
    return (
        smooth
        + np.stack([np.interp(at, place, tremble[:, axis]) for axis in (0, 1)], 1)
        + rng.normal(0, shake / 2, 2)
    )


def draw_sketch(rng: Generator, name: str) -> Image.Image:
    """One drawing of `name`: RGB, sides 48 to 88."""
    size = canvas.frame_size(rng)
    board = canvas.canvas_size(size)
    shake = rng.uniform(0.01, 0.035)
    strokes = DRAW[name](rng)
    mirror = (rng.choice((-1, 1)), 1)
    bend = canvas.wobble(rng, rng.uniform(0, 0.07))
    lines = tuple(bend(unsteady(rng, stroke, shake)) * mirror for stroke in strokes)
    pose = canvas.random_pose(rng, board, turn=12, fill=(0.68, 0.92), shear=0.12, stretch=0.15)
    pen = (
        rng.uniform(1.1, 2.4) * canvas.OVERSAMPLE / pose.scale
    )  # in final pixels, whatever the drawing's size
    cover = canvas.mask(canvas.Outline(lines=lines, width=pen), pose, board)
    ink, paper = (np.full(3, grey, np.float32) for grey in (rng.uniform(0, 0.15), rng.uniform(0.96, 1.0)))
    picture = canvas.blend(canvas.flat(board, paper), ink, cover)
    return canvas.develop(rng, picture, size, light=0.03, blur=0.4, grain=0.01)
