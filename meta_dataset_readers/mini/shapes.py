"""The figures of mini_objects: each function draws one kind of outline, a little different every time.

No letters, digits, pictograms or sketches of things: those are what the other domains are for.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from meta_dataset_readers.mini.canvas import Outline

TURN = 2 * np.pi


def polar(radius: Callable[[np.ndarray], np.ndarray], points: int = 96) -> np.ndarray:
    """The closed curve r(angle), angle from the top, clockwise."""
    angle = np.linspace(0, TURN, points, endpoint=False)
    return radius(angle)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], 1)


def points(*xy: tuple[float, float]) -> np.ndarray:
    return np.array(xy, float)


def spikes(outer: float, inner: float, count: int) -> np.ndarray:
    """A star polygon: `count` tips at radius `outer`, notches at `inner`."""
    angle = np.arange(2 * count) * TURN / (2 * count)
    radius = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return radius[:, None] * np.stack([np.sin(angle), -np.cos(angle)], 1)


def triangle(rng: Generator) -> Outline:
    return Outline((points((rng.uniform(-0.3, 0.3), -0.95), (0.95, 0.8), (-0.95, 0.8)),))


def rectangle(rng: Generator) -> Outline:
    height = rng.uniform(0.5, 0.8)
    return Outline((points((-0.9, -height), (0.9, -height), (0.9, height), (-0.9, height)),))


def hexagon(rng: Generator) -> Outline:
    return Outline((polar(lambda angle: np.full_like(angle, 0.95), 6),))


def trapezoid(rng: Generator) -> Outline:
    top, height = rng.uniform(0.25, 0.45), rng.uniform(0.5, 0.7)
    return Outline((points((-top, -height), (top, -height), (0.98, height), (-0.98, height)),))


def kite(rng: Generator) -> Outline:
    side, level = rng.uniform(0.5, 0.65), rng.uniform(-0.4, -0.25)
    return Outline((points((0, -1), (side, level), (0, 1), (-side, level)),))


def disc(rng: Generator) -> Outline:
    return Outline((polar(lambda angle: np.full_like(angle, 0.9)),))


def ring(rng: Generator) -> Outline:
    inner = rng.uniform(0.4, 0.6)
    return Outline((polar(lambda a: np.full_like(a, 0.95)),), (polar(lambda a: np.full_like(a, inner)),))


def heart(rng: Generator) -> Outline:
    t = np.linspace(0, TURN, 80, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return Outline((np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 16,))


def cloud(rng: Generator) -> Outline:
    lobes, depth = rng.integers(5, 8), rng.uniform(0.2, 0.3)
    curve = polar(lambda a: 0.95 - depth + depth * np.abs(np.sin(lobes * a / 2)), 120)
    return Outline((curve * (1.0, 0.7),))


def star(rng: Generator) -> Outline:
    return Outline((spikes(1.0, rng.uniform(0.36, 0.46), 5),))


def gear(rng: Generator) -> Outline:
    teeth, depth = rng.integers(8, 11), rng.uniform(0.2, 0.27)
    wheel = polar(lambda a: 0.95 - depth * (np.cos(teeth * a) < 0), 240)
    hub = rng.uniform(0.2, 0.3)
    return Outline((wheel,), (polar(lambda a: np.full_like(a, hub), 40),))


def flower(rng: Generator) -> Outline:
    petals = rng.integers(4, 7)
    return Outline((polar(lambda a: 0.35 + 0.62 * np.abs(np.cos(petals * a / 2)), 160),))


def bolt(rng: Generator) -> Outline:
    bend = rng.uniform(0.05, 0.2)
    return Outline(
        (
            points(
                (0.15, -1),
                (-0.65, bend),
                (-0.05, bend),
                (-0.3, 1),
                (0.65, -bend - 0.1),
                (0.08, -bend - 0.1),
                (0.55, -1),
            ),
        )
    )


def cross(rng: Generator) -> Outline:
    a = rng.uniform(0.22, 0.36)
    b = 0.95
    return Outline(
        (
            points(
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ),
        )
    )


def arrow(rng: Generator) -> Outline:
    shaft, neck, head = rng.uniform(0.16, 0.26), rng.uniform(0.0, 0.25), rng.uniform(0.55, 0.7)
    return Outline(
        (
            points(
                (-1, -shaft), (neck, -shaft), (neck, -head), (1, 0), (neck, head), (neck, shaft), (-1, shaft)
            ),
        )
    )


def comb(rng: Generator) -> Outline:
    teeth = int(rng.integers(4, 6))
    left = np.linspace(-0.95, 0.95, 2 * teeth)
    outline = [(-0.95, -0.7), (0.95, -0.7)]
    for k in range(2 * teeth - 1, 0, -2):
        outline += [(left[k], 0.75), (left[k - 1], 0.75)]
        if k > 1:
            outline += [(left[k - 1], -0.15), (left[k - 2], -0.15)]
    return Outline((points(*outline),))


def crescent(rng: Generator) -> Outline:
    offset = rng.uniform(0.35, 0.55)
    tip = np.arccos(offset / 2)  # where the two unit circles meet
    outer = np.linspace(tip, TURN - tip, 60)
    inner = np.linspace(np.pi + tip, np.pi - tip, 40)
    arcs = [np.stack([np.cos(outer), np.sin(outer)], 1), np.stack([offset + np.cos(inner), np.sin(inner)], 1)]
    return Outline((0.95 * np.concatenate(arcs) + (0.2, 0),))


def drop(rng: Generator) -> Outline:
    t = np.linspace(0, TURN, 80, endpoint=False)
    fullness = rng.uniform(1.3, 2.0)
    return Outline((np.stack([1.0 * np.sin(t) * np.sin(t / 2) ** fullness * 0.75, -np.cos(t)], 1),))


def chevron(rng: Generator) -> Outline:
    dip, arm = rng.uniform(0.5, 0.7), rng.uniform(0.4, 0.55)
    low = dip - arm / 2
    return Outline(
        (
            points(
                (-0.95, -low - arm / 2),
                (0, dip - low - arm / 2),
                (0.95, -low - arm / 2),
                (0.95, arm / 2 - low),
                (0, dip + arm / 2 - low),
                (-0.95, arm / 2 - low),
            ),
        )
    )


def burst(rng: Generator) -> Outline:
    return Outline((spikes(1.0, rng.uniform(0.62, 0.72), int(rng.integers(12, 17))),))


def bone(rng: Generator) -> Outline:
    waist, ball = rng.uniform(0.14, 0.22), rng.uniform(0.36, 0.44)
    t = np.linspace(0, TURN, 120, endpoint=False)
    x = np.cos(t)
    end = np.sqrt(np.clip(ball**2 - (np.abs(x) - (1 - ball)) ** 2, 0, None))
    half = np.maximum(end, waist * (np.abs(x) < 1 - ball))
    return Outline((np.stack([x, np.sign(np.sin(t)) * half], 1),))


def spiral(rng: Generator) -> Outline:
    turns = rng.uniform(2.0, 2.6)
    t = np.linspace(0.06, 1, 90)
    angle = TURN * turns * t
    return Outline(
        lines=(0.88 * t[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1),), width=rng.uniform(0.14, 0.2)
    )


def zigzag(rng: Generator) -> Outline:
    corners = int(rng.integers(6, 10))
    x = np.linspace(-0.9, 0.9, corners)
    y = rng.uniform(0.4, 0.6) * np.where(np.arange(corners) % 2, 1, -1)
    return Outline(lines=(np.stack([x, y], 1),), width=rng.uniform(0.16, 0.26))


def wave(rng: Generator) -> Outline:
    x = np.linspace(-0.9, 0.9, 70)
    y = rng.uniform(0.35, 0.55) * np.sin(rng.uniform(1.5, 2.1) * np.pi * (x + 0.9))
    return Outline(lines=(np.stack([x, y], 1),), width=rng.uniform(0.18, 0.28))


def loop(rng: Generator) -> Outline:
    """A ribbon that crosses itself once, ends spread at the bottom."""
    t = np.linspace(-1, 1, 70)
    curve = np.stack([0.85 * t * (1.6 * t**2 - 0.75) / 0.85, 0.95 * (2 * np.abs(t) ** 1.6 - 1) * 0.9], 1)
    return Outline(lines=(curve,), width=rng.uniform(0.16, 0.24))


def hook(rng: Generator) -> Outline:
    bend = np.linspace(0, np.pi * rng.uniform(1.1, 1.4), 40)
    bowl = np.stack([0.48 * np.cos(bend), 0.4 + 0.48 * np.sin(bend)], 1)
    return Outline(lines=(np.concatenate([points((0.48, -0.9)), bowl]),), width=rng.uniform(0.2, 0.3))


def knot(rng: Generator) -> Outline:
    """A Lissajous figure with three lobes."""
    t = np.linspace(0, TURN, 120)
    curve = np.stack([np.sin(2 * t + rng.uniform(0.6, 1.0)), np.sin(3 * t)], 1)
    return Outline(lines=(0.85 * curve,), width=rng.uniform(0.13, 0.19))


def coil(rng: Generator) -> Outline:
    """A spring: loops in a row."""
    loops = int(rng.integers(3, 5))
    t = np.linspace(0, TURN * loops, 40 * loops)
    x = np.linspace(-0.7, 0.7, len(t)) + 0.25 * np.cos(t)
    return Outline(lines=(np.stack([x, 0.55 * np.sin(t)], 1),), width=rng.uniform(0.13, 0.18))


def rays(rng: Generator) -> Outline:
    """Spokes around an empty middle."""
    count, inner = int(rng.integers(6, 10)), rng.uniform(0.28, 0.4)
    angle = TURN * np.arange(count) / count
    direction = np.stack([np.cos(angle), np.sin(angle)], 1)
    return Outline(
        lines=tuple(np.stack([inner * d, 0.92 * d]) for d in direction), width=rng.uniform(0.15, 0.22)
    )


def branch(rng: Generator) -> Outline:
    """A stem that forks twice, bare twigs at the top."""
    lines = [points((0, 0.95), (rng.uniform(-0.1, 0.1), 0.15))]
    for side in (-1, 0, 1):
        start = lines[0][1]
        end = start + (side * rng.uniform(0.4, 0.55), -rng.uniform(0.4, 0.55))
        lines.append(np.stack([start, end]))
        for twig in (-1, 1):
            lines.append(np.stack([end, end + (0.2 * twig + 0.15 * side, -rng.uniform(0.35, 0.5))]))
    return Outline(lines=tuple(lines), width=rng.uniform(0.13, 0.18))


def fork(rng: Generator) -> Outline:
    """Parallel prongs on a bow and a stem."""
    bow = np.linspace(0, np.pi, 30)
    spread = rng.uniform(0.55, 0.75)
    cup = np.stack([spread * np.cos(bow), -0.15 + 0.45 * np.sin(bow)], 1)
    prongs = np.concatenate([points((spread, -0.9)), cup, points((-spread, -0.9))])
    return Outline(lines=(prongs, points((0, -0.9), (0, 0.95))), width=rng.uniform(0.16, 0.22))


# The figures of each split, by family; a split has figures of its own, as it has classes of its own.
FAMILIES: dict[str, dict[str, tuple[Callable[[Generator], Outline], ...]]] = {
    "TRAIN": {
        "polygons": (triangle, rectangle, hexagon, trapezoid),
        "rounds": (disc, ring, heart, cloud),
        "pointed figures": (star, gear, flower, bolt),
        "barred figures": (cross, arrow, comb),
        "curves": (spiral, zigzag, loop, hook),
        "trees": (branch, fork),
    },
    "VALID": {"filled figures": (kite, crescent, drop), "line figures": (wave, knot)},
    "TEST": {"filled figures": (chevron, burst, bone), "line figures": (coil, rays)},
}
SHAPES = {
    draw.__name__: draw for families in FAMILIES.values() for draws in families.values() for draw in draws
}
