"""mini_glyphs: letters and signs of twelve scripts from the fonts that matplotlib brings along.

Knows which characters are used and how one is drawn: a typeface that has it, a small affine change, a bent
sheet, a thinner or thicker pen; dark on light. Does not know files or specifications.

Within all scripts together no two characters look alike (no second case of the same form, no A of another
alphabet), so that each class can be told from every other.
"""

import functools
import unicodedata
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from meta_dataset_readers.mini import canvas

SCRIPTS: dict[str, dict[str, str]] = {
    "TRAIN": {
        "Latin": "ABEFGHJKLMQRSTXYZabdegr",
        "Cyrillic": "БДЖЗИЦЧШЪЫЭЮЯЂЉҨ",
        "Georgian": "აბგდეზთლნრსტფქღყცჯჰ",
        "Arabic": "بجدرسشطعفكمنهويءخث",
        "Canadian Syllabics": "ᐳᐸᑫᒣᒥᒧᓀᓂᓭᓯᓱᓴᔦᔨᔪᔭ",
    },
    "VALID": {"Armenian": "ԱԲԳԶԹԺԽԾԿՃՄՇՈՊՑՔՖ", "Lao": "ກຂຄງຈຍຖນບຜຟມຢຣວສຫອຮ"},
    "TEST": {
        "Greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζλμξσω",
        "Hebrew": "אבגדהזטלמנעפצקש",
        "Tifinagh": "ⴳⴹⴻⴼⴽⵀⵃⵄⵅⵇⵍⵎⵓⵖⵙⵛⵜⵢⵣ",
        "N'Ko": "ߌߎߏߐߓߔߕߖߗߘߙߛߝߞߟߢߤߥ",
        "Mathematics": "∀∂∇∈√∞∠∮∴≈≠≤⊂⊕⊗⊥⋈∬",
    },
}

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
UPRIGHT_SCRIPTS = ("CYRILLIC",)  # in italics some of their letters take another form
BITMAP = 160  # side of a glyph's picture before it is bent, in pixels
INK_EXTENT = 0.8  # share of that side which the longer side of the letter takes up


@functools.cache
def _font_file(face: str) -> Path:
    import matplotlib  # imported late: only this domain needs it

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@functools.cache
def _characters(face: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    with TTFont(_font_file(face)) as font:
        return frozenset(font.getBestCmap())


@functools.cache
def faces(character: str) -> tuple[str, ...]:
    """The typefaces that really have a glyph for `character`."""
    found = [face for face in FACES if ord(character) in _characters(face)]
    if unicodedata.name(character).split()[0] in UPRIGHT_SCRIPTS:
        found = [face for face in found if not face.endswith(("Italic", "Oblique"))]
    return tuple(found)


@functools.lru_cache(maxsize=64)
def glyph(face: str, character: str) -> np.ndarray:
    """The letter, 1 on 0, centred in a square field of `BITMAP` pixels."""
    font = ImageFont.truetype(_font_file(face), 200, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(image).text((-left, -top), character, font=font, fill=255)
    image = image.crop(image.getbbox())
    scale = INK_EXTENT * BITMAP / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    square = Image.new("L", (BITMAP, BITMAP), 0)
    square.paste(image, ((BITMAP - image.width) // 2, (BITMAP - image.height) // 2))
    return np.asarray(square, np.float32) / 255


def draw_glyph(rng: Generator, name: str) -> Image.Image:
    """One image of the character with the Unicode name `name`: RGB, sides 48 to 88."""
    character = unicodedata.lookup(name)
    bitmap = glyph(str(rng.choice(faces(character))), character)
    size = canvas.frame_size(rng)
    board = canvas.canvas_size(size)
    pose = canvas.random_pose(rng, board, turn=12, fill=(0.78, 1.05), shear=0.18, stretch=0.15)
    bend = 0.05
    u, v = (field + bend * canvas.noise(rng, board, 3) for field in pose.grid(board))
    column, row = (((field / 2 + 0.5) * BITMAP).astype(np.int32) for field in (u, v))
    inside = (column >= 0) & (column < BITMAP) & (row >= 0) & (row < BITMAP)
    letter = np.where(inside, bitmap[row.clip(0, BITMAP - 1), column.clip(0, BITMAP - 1)], 0)
    blurred = canvas.to_image(letter).filter(ImageFilter.GaussianBlur(1.8))
    pen = rng.uniform(0.25, 0.5)  # below one half the strokes swell, above they thin
    cover = np.clip((np.asarray(blurred, np.float32) / 255 - pen) * 6 + 0.5, 0, 1)
    ink, paper = (np.full(3, grey, np.float32) for grey in (rng.uniform(0, 0.25), rng.uniform(0.9, 1.0)))
    picture = canvas.blend(canvas.flat(board, paper), ink, cover)
    return canvas.develop(rng, picture, size, light=0.06, blur=0.6, grain=0.02)
