"""Drawing for Mini-Meta-Dataset: outlines, poses, masks, noise, backgrounds and what a camera does.

Knows numpy and Pillow. Does not know classes, domains or files. Everything is drawn at `OVERSAMPLE` times the
final size and averaged down, and every random choice comes from the generator handed in.

Colours are float32 RGB in [0, 1]. A "field" is a float32 array (H, W), a "picture" a float32 array (H, W, 3).
Outlines live in the square [-1, 1] x [-1, 1] with y pointing down, as in an image.
"""

import colorsys
import dataclasses

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

OVERSAMPLE = 2
SMALLEST_SIDE, LARGEST_SIDE = 48, 88

Size = tuple[int, int]  # width, height in pixels


@dataclasses.dataclass(frozen=True)
class Outline:
    """A figure: closed `areas` are filled, `holes` cut out of them, open `lines` drawn `width` thick.

    Every polygon or line is a float array (n, 2) of x, y.
    """

    areas: tuple[np.ndarray, ...] = ()
    holes: tuple[np.ndarray, ...] = ()
    lines: tuple[np.ndarray, ...] = ()
    width: float = 0.2

    def map(self, move) -> "Outline":
        """The same figure with every point array passed through `move`."""
        moved = {
            name: tuple(move(points) for points in getattr(self, name))
            for name in ("areas", "holes", "lines")
        }
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where a figure stands on a canvas: pixel = matrix @ point + centre."""

    matrix: np.ndarray  # (2, 2)
    centre: np.ndarray  # (2,)

    @property
    def scale(self) -> float:
        """Pixels per unit of the outline."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix))))

    def place(self, points: np.ndarray) -> np.ndarray:
        return points @ self.matrix.T + self.centre

    def grid(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """The figure's own coordinates u, v at every pixel: two fields."""
        x, y = pixel_grid(size)
        inverse = np.linalg.inv(self.matrix).astype(np.float32)
        x, y = x - np.float32(self.centre[0]), y - np.float32(self.centre[1])
        return inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y


def pixel_grid(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, broadcastable fields (1, W) and (H, 1)."""
    width, height = size
    return np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]


def frame_size(rng: Generator) -> Size:
    """A final image size: sides of about 64 pixels, 48 to 88, aspect ratios from about 2:3 to 3:2."""
    side, aspect = rng.uniform(54, 76), np.exp(rng.uniform(-0.2, 0.2))
    width, height = np.clip([side * aspect, side / aspect], SMALLEST_SIDE, LARGEST_SIDE).tolist()
    return round(width), round(height)


def canvas_size(size: Size) -> Size:
    """The working size of a picture that ends up `size` large."""
    return size[0] * OVERSAMPLE, size[1] * OVERSAMPLE


def rotation(degrees: float) -> np.ndarray:
    """The (2, 2) matrix that turns by `degrees`."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def random_pose(
    rng: Generator,
    size: Size,
    *,
    turn: float,
    fill: tuple[float, float],
    shear: float = 0.2,
    stretch: float = 0.2,
) -> Pose:
    """A pose on a canvas of `size`: turned by up to `turn` degrees, taking up `fill` of the shorter side.

    The centre wanders further the smaller the figure is, so that it mostly stays inside.
    """
    extent = rng.uniform(*fill)
    half = extent * min(size) / 2
    aspect = np.exp(rng.uniform(-stretch, stretch))
    skew = np.array([[aspect, rng.uniform(-shear, shear)], [0.0, 1 / aspect]])
    slack = max(0.04, 0.5 - extent / 2) * 0.8
    centre = np.array(size) * (0.5 + rng.uniform(-slack, slack, 2))
    return Pose(half * rotation(rng.uniform(-turn, turn)) @ skew, centre)


def wobble(rng: Generator, amount: float):
    """A smooth random deformation of the plane, as a function on points: no two drawings are the same."""
    waves = rng.uniform(1.0, 3.0, (2, 2)) * rng.choice([-1, 1], (2, 2))
    phases = rng.uniform(0, 2 * np.pi, 2)
    return lambda points: points + amount * np.sin(points @ waves.T + phases)


def polyline(draw: ImageDraw.ImageDraw, points: np.ndarray, width: float, fill: int) -> None:
    """An open line with round joints and ends; pixels."""
    flat = [tuple(point) for point in points.tolist()]
    draw.line(flat, fill=fill, width=max(1, round(width)), joint="curve")
    radius = width / 2
    if radius >= 1:
        for x, y in (flat[0], flat[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def close(points: np.ndarray) -> np.ndarray:
    """A polygon as a line that returns to its start."""
    return np.concatenate([points, points[:2]])


def mask(outline: Outline, pose: Pose, size: Size, rim: float | None = None) -> np.ndarray:
    """How much of each pixel the figure covers: a field in [0, 1].

    With `rim` (in units of the outline) only a rim of that thickness is drawn, along areas, holes and lines.
    """
    fine = 2  # masks are drawn finer still: Pillow's polygons have hard edges
    image = Image.new("L", (size[0] * fine, size[1] * fine), 0)
    draw = ImageDraw.Draw(image)
    placed, unit = outline.map(lambda points: pose.place(points) * fine), pose.scale * fine
    if rim is None:
        for fill, polygons in ((255, placed.areas), (0, placed.holes)):
            for polygon in polygons:
                draw.polygon([tuple(point) for point in polygon.tolist()], fill=fill)
        for line in placed.lines:
            polyline(draw, line, outline.width * unit, 255)
    else:
        for polygon in placed.areas + placed.holes:
            polyline(draw, close(polygon), rim * unit, 255)
        for line in placed.lines:
            polyline(draw, line, outline.width * unit, 255)
        for line in placed.lines:
            polyline(draw, line, (outline.width - 2 * rim) * unit, 0)
    return np.asarray(image.reduce(fine), np.float32) / 255


def noise(rng: Generator, size: Size, cells: float) -> np.ndarray:
    """Smooth noise with about `cells` bumps along the longer side: a field of mean 0 and deviation near 1."""
    step = max(size) / cells
    coarse = rng.standard_normal((max(2, round(size[1] / step) + 1), max(2, round(size[0] / step) + 1)))
    field = Image.fromarray(coarse.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(field, np.float32)


def colour(
    rng: Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """An RGB colour of the given hue (turns) with saturation and value drawn from their ranges."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def any_colour(rng: Generator) -> np.ndarray:
    """An RGB colour of any hue, pale or strong, dark or light."""
    return colour(rng, rng.random(), (0.0, 0.9), (0.1, 1.0))


def luminance(rgb: np.ndarray) -> float:
    """Brightness of a colour, 0 to 1."""
    return float(np.dot(rgb, np.array([0.299, 0.587, 0.114], np.float32)))


def blend(below: np.ndarray, above: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """`above` (a picture or a colour) over `below` (likewise), where `cover` (a field) says."""
    return below + cover[..., None] * (above - below)


def flat(size: Size, rgb: np.ndarray) -> np.ndarray:
    """A picture of one colour."""
    return np.broadcast_to(rgb, (size[1], size[0], 3)).astype(np.float32)


def to_picture(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32) / 255


def to_image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def plain_ground(rng: Generator, size: Size, base: np.ndarray) -> np.ndarray:
    return flat(size, base)


def gradient_ground(rng: Generator, size: Size, base: np.ndarray) -> np.ndarray:
    x, y = pixel_grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * (x / size[0] - 0.5) + np.sin(angle) * (y / size[1] - 0.5)).astype(np.float32)
    return base + ramp[..., None] * rng.uniform(-0.45, 0.45, 3).astype(np.float32)


def noise_ground(rng: Generator, size: Size, base: np.ndarray) -> np.ndarray:
    tint = base + rng.uniform(-0.25, 0.25, 3).astype(np.float32)
    return blend(base, tint, 0.7 * noise(rng, size, np.exp(rng.uniform(np.log(4), np.log(60)))))


def blob_ground(rng: Generator, size: Size, base: np.ndarray) -> np.ndarray:
    image = to_image(flat(size, base))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(4, 9)):
        x, y = rng.uniform(0, 1, 2) * size
        radius = rng.uniform(0.1, 0.35) * min(size)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_near(rng, base, 0.3))
    return to_picture(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.05, 0.12) * min(size))))


def clutter_ground(rng: Generator, size: Size, base: np.ndarray) -> np.ndarray:
    """Bits and pieces: random polygons and lines, none of them a class of ours."""
    image = to_image(flat(size, base))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(5, 14)):
        centre, reach = rng.uniform(0, 1, 2) * size, rng.uniform(0.06, 0.3) * min(size)
        points = [
            tuple(point) for point in (centre + rng.uniform(-reach, reach, (rng.integers(2, 6), 2))).tolist()
        ]
        tint = _near(rng, base, 0.35)
        if len(points) > 2 and rng.random() < 0.6:
            draw.polygon(points, fill=tint)
        else:
            draw.line(points, fill=tint, width=int(rng.integers(1, 7)))
    return to_picture(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.5))))


def _near(rng: Generator, base: np.ndarray, spread: float) -> tuple[int, ...]:
    moved = np.clip(base + rng.uniform(-spread, spread, 3), 0, 1) * 255
    return tuple(int(channel) for channel in moved)


GROUNDS = (plain_ground, gradient_ground, noise_ground, blob_ground, clutter_ground)


def occlude(rng: Generator, picture: np.ndarray, most: float = 0.25) -> np.ndarray:
    """Cover part of a picture by a bar or a disc that enters from a side, at most `most` of it wide."""
    height, width = picture.shape[:2]
    x, y = pixel_grid((width, height))
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, most)
    if rng.random() < 0.5:
        along = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
        offset = rng.uniform(-0.25, 0.25)
        cover = (np.abs(along - offset) < depth / 4).astype(np.float32)
    else:
        centre = 0.5 + 0.5 * np.array([np.cos(angle), np.sin(angle)])
        cover = (np.hypot(x / width - centre[0], y / height - centre[1]) < 1.4 * depth).astype(np.float32)
    return blend(picture, any_colour(rng), cover)


def develop(
    rng: Generator,
    picture: np.ndarray,
    size: Size,
    *,
    light: float = 0.25,
    blur: float = 0.9,
    grain: float = 0.035,
) -> Image.Image:
    """The final image of `size` from a picture on the canvas: averaging, light, contrast, blur, sensor noise.

    `light` bounds the change of brightness and contrast, `blur` the radius in final pixels, `grain` the
    standard deviation of the noise.
    """
    image = to_image(picture).resize(size, Image.Resampling.BOX)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, blur)))
    pixels = to_picture(image)
    contrast, brightness = 1 + rng.uniform(-light, light), rng.uniform(-light, light) / 2
    pixels = (pixels - 0.5) * contrast + 0.5 + brightness
    if rng.random() < 0.5:
        pixels = pixels + rng.uniform(0, grain) * rng.standard_normal(pixels.shape, np.float32)
    return to_image(pixels)
