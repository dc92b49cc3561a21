"""Small pictures drawn to order, with captions: objects in colours on backgrounds, and toys of which five are subjects.

    image, caption = scene(rng)                       an object or a toy somewhere, and what it shows
    image = picture(SUBJECTS["robo"], "in the snow", rng)

Everything is drawn with Pillow at four times its size; the same generator gives the same pixels. `scripts/
build_diffusion_assets.py` trains the nano diffusion pipeline on them, the demo of `visionpeft personalise` measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visionpeft.errors import VisionPEFTError

SIDE, OVER = 32, 4
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (248, 215, 50), "green": (50, 160, 70),
    "blue": (45, 95, 210), "purple": (135, 65, 175), "pink": (245, 150, 190), "white": (242, 242, 242),
    "black": (30, 30, 34), "brown": (125, 80, 45),
}  # fmt: skip
OBJECTS = ("ball", "cube", "star", "heart", "house", "mushroom", "cup", "flower")
BACKGROUNDS = (
    "on grass", "in the snow", "on a beach", "at night", "in front of a brick wall", "on a chessboard", "in the water",
    "on a wooden floor",
)  # fmt: skip
PLAIN = tuple(f"on a {colour} background" for colour in ("red", "yellow", "green", "blue", "pink", "white"))
TEMPLATES = ("a photo of {}", "a picture of {}", "{}")


@dataclass(frozen=True)
class Toy:
    """A creature: `body` round, square, egg or cone; `ears` none, round, pointed, antenna or horn; `pattern` plain,
    stripes, spots or belly; the colours of body and pattern; its number of eyes."""

    body: str
    ears: str
    pattern: str
    colour: str
    second: str
    eyes: int = 2


BODIES, EARS = ("round", "square", "egg", "cone"), ("none", "round", "pointed", "antenna", "horn")
PATTERNS = ("plain", "stripes", "spots", "belly")
SUBJECTS: dict[str, Toy] = {
    "robo": Toy("square", "antenna", "belly", "blue", "orange"),
    "bee": Toy("round", "pointed", "stripes", "yellow", "black"),
    "frog": Toy("egg", "round", "belly", "green", "pink"),
    "imp": Toy("cone", "horn", "stripes", "red", "white", 1),
    "cow": Toy("egg", "horn", "spots", "white", "purple"),
}
_TAKEN = {frozenset((toy.colour, toy.second)) for toy in SUBJECTS.values()}
CLASS = "toy"


def article(words: str) -> str:
    """`words` with a or an."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def random_toy(rng: np.random.Generator) -> Toy:
    """Any toy but those in the colours of a subject."""
    while True:
        colour, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
        if frozenset((colour, second)) not in _TAKEN:
            break
    body, ears, pattern = (str(rng.choice(names)) for names in (BODIES, EARS, PATTERNS))
    return Toy(body, ears, pattern, colour, second, 1 if rng.random() < 0.15 else 2)


def scene(rng: np.random.Generator, toys: float = 0.5) -> tuple[Image.Image, str]:
    """A picture (32 x 32) and its caption; `toys` is the share of toys, which are called so or with their colour."""
    where = str(rng.choice(BACKGROUNDS if rng.random() < 0.65 else PLAIN))
    if rng.random() < toys:
        thing: Any = random_toy(rng)
        words = CLASS if rng.random() < 0.6 else f"{thing.colour} {CLASS}"
    else:
        colour = str(rng.choice(list(COLOURS)))
        thing = (str(rng.choice(OBJECTS)), colour)
        words = f"{colour} {thing[0]}"
    bare = rng.random() < 0.2
    caption = str(rng.choice(TEMPLATES)).format(article(words)) + ("" if bare else f" {where}")
    return picture(thing, where, rng), caption


def captions() -> list[str]:
    """All that `scene` can say."""
    words = [CLASS, *(f"{c} {w}" for c in COLOURS for w in (CLASS, *OBJECTS))]
    places = ["", *(f" {where}" for where in BACKGROUNDS + PLAIN)]
    return [t.format(article(w)) + place for w in words for t in TEMPLATES for place in places]


def picture(thing: Toy | tuple[str, str], where: str, rng: np.random.Generator, side: int = SIDE) -> Image.Image:
    """A toy, or (object, colour), in a random pose in front of a background.

    Raises:
        VisionPEFTError: no such object or background.
    """
    size = side * OVER
    image = background(where, rng, size)
    layer = Image.new("RGBA", (size, size))
    if isinstance(thing, Toy):
        _toy(layer, thing, rng)
    else:
        _object(ImageDraw.Draw(layer), *thing, size)
    angle, scale = rng.uniform(-22, 22), rng.uniform(0.8, 1.1)
    dx, dy = rng.uniform(-0.1, 0.1, 2) * size
    centre, c, s = size / 2, math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    x, y = centre + dx, centre + dy
    matrix = (c, s, centre - c * x - s * y, -s, c, centre + s * x - c * y)
    layer = layer.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    image.paste(layer, (0, 0), layer)
    return image.resize((side, side), Image.Resampling.BOX)


# ---- backgrounds -----------------------------------------------------------------------------------------------------


def background(where: str, rng: np.random.Generator, size: int) -> Image.Image:
    """An empty place (size x size)."""
    if where in PLAIN:
        field = np.full((size, size, 3), COLOURS[where.split()[2]], float)
        pixels = field * np.linspace(rng.uniform(0.8, 1), rng.uniform(0.8, 1), size)[:, None, None]
    elif where in _PLACES:
        pixels = _PLACES[where](rng, size)
    else:
        raise VisionPEFTError(f"no background is called {where!r}: choose one of {', '.join(BACKGROUNDS + PLAIN)}")
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _noise(rng: np.random.Generator, size: int, cells: int, height: int | None = None) -> np.ndarray:
    """(size, size, 1) of blocks, normal."""
    rows = height or cells
    small = rng.normal(size=(rows, cells))
    return np.kron(small, np.ones((-(-size // rows), -(-size // cells))))[:size, :size, None]


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.array([70, 140, 45.0]) + 22 * _noise(rng, size, 32, 12) * np.array([0.8, 1, 0.5])


def _snow(rng: np.random.Generator, size: int) -> np.ndarray:
    ground = np.array([228, 236, 246.0]) + 7 * _noise(rng, size, 8)
    flakes = np.kron(rng.random((32, 32)) < 0.05, np.ones((size // 32, size // 32)))[..., None]
    sky = (np.arange(size) < size * rng.uniform(0.25, 0.4))[:, None, None]
    return np.where(sky & (flakes == 0), np.array([150, 175, 205.0]), ground)


def _beach(rng: np.random.Generator, size: int) -> np.ndarray:
    rows = np.arange(size)[:, None, None] / size
    sky, sea = rng.uniform(0.15, 0.25), rng.uniform(0.4, 0.5)
    sand = np.array([228, 200, 140.0]) + 9 * _noise(rng, size, 32)
    return np.where(rows < sky, np.array([160, 210, 245.0]), np.where(rows < sea, np.array([40, 130, 190.0]), sand))


def _night(rng: np.random.Generator, size: int) -> np.ndarray:
    stars = np.kron(rng.random((32, 32)) < 0.04, np.ones((size // 32, size // 32)))[..., None]
    return np.where(stars > 0, np.array([240, 240, 200.0]), np.array([16, 18, 48.0]) + 4 * _noise(rng, size, 8))


def _bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    high, wide = size // 6, size // 4
    joint = (y % high < size // 32) | ((x + (y // high % 2) * wide // 2) % wide < size // 32)
    wall = np.array([165, 75, 55.0]) + 10 * _noise(rng, size, 8, 6)
    return np.where(joint[..., None], np.array([205, 195, 185.0]), wall)


def _chess(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] + rng.integers(0, size // 4, 2)[:, None, None]
    return np.where(((y // (size // 6) + x // (size // 6)) % 2 == 0)[..., None], 235.0, 35.0) * np.ones(3)


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (5 * y + 0.4 * np.sin(2 * np.pi * (1.5 * x + rng.random())) + rng.random()))
    return np.array([35, 125, 185.0]) + 28 * wave[..., None] * np.array([0.7, 1, 1])


def _wood(rng: np.random.Generator, size: int) -> np.ndarray:
    plank = np.arange(size)[None, :, None] % (size // 5) < size // 32
    return np.where(plank, np.array([80, 50, 25.0]), np.array([175, 125, 75.0]) + 11 * _noise(rng, size, 16, 2))


_PLACES = dict(zip(BACKGROUNDS, (_grass, _snow, _beach, _night, _bricks, _chess, _water, _wood), strict=True))


# ---- things ----------------------------------------------------------------------------------------------------------


def _dark(colour: Colour, by: float = 0.6) -> Colour:
    red, green, blue = colour
    return int(by * red), int(by * green), int(by * blue)


def _polygon(size: int, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(size * x, size * y) for x, y in points]


def _box(size: int, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
    return size * left, size * top, size * right, size * bottom


def _star(size: int, points: int, inner: float, outer: float = 0.36) -> list[tuple[float, float]]:
    radius = [outer if i % 2 == 0 else inner for i in range(2 * points)]
    turn = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return _polygon(size, [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in zip(radius, turn, strict=True)])


def _object(draw: ImageDraw.ImageDraw, name: str, colour: str, size: int) -> None:
    fill = COLOURS[colour]
    edge: dict[str, Any] = dict(outline=_dark(fill), width=max(1, size // 40))
    if name == "ball":
        draw.ellipse(_box(size, 0.2, 0.2, 0.8, 0.8), fill, **edge)
        draw.ellipse(_box(size, 0.32, 0.28, 0.46, 0.4), tuple((c + 510) // 3 for c in fill))
    elif name == "cube":
        draw.polygon(_polygon(size, [(0.2, 0.36), (0.38, 0.2), (0.82, 0.2), (0.64, 0.36)]), _dark(fill, 0.85))
        draw.polygon(_polygon(size, [(0.64, 0.36), (0.82, 0.2), (0.82, 0.64), (0.64, 0.8)]), _dark(fill))
        draw.rectangle(_box(size, 0.2, 0.36, 0.64, 0.8), fill)
    elif name == "star":
        draw.polygon(_star(size, 5, 0.15), fill, **edge)
    elif name == "heart":
        curve = [(16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                 for t in np.linspace(0, 2 * math.pi, 60)]
        draw.polygon(_polygon(size, [(0.5 + x / 50, 0.47 - y / 50) for x, y in curve]), fill, **edge)
    elif name == "house":
        draw.rectangle(_box(size, 0.25, 0.45, 0.75, 0.8), fill, **edge)
        draw.polygon(_polygon(size, [(0.17, 0.47), (0.5, 0.18), (0.83, 0.47)]), _dark(fill))
        draw.rectangle(_box(size, 0.43, 0.58, 0.57, 0.8), _dark(fill, 0.4))
    elif name == "mushroom":
        draw.rectangle(_box(size, 0.42, 0.48, 0.58, 0.8), (235, 225, 205))
        draw.pieslice(_box(size, 0.18, 0.2, 0.82, 0.84), 180, 360, fill, **edge)
        for x, y in ((0.34, 0.4), (0.52, 0.3), (0.66, 0.42)):
            draw.ellipse(_box(size, x - 0.05, y - 0.05, x + 0.05, y + 0.05), (245, 240, 230))
    elif name == "cup":
        draw.arc(_box(size, 0.58, 0.36, 0.86, 0.64), -100, 100, _dark(fill), size // 16)
        draw.polygon(_polygon(size, [(0.24, 0.28), (0.7, 0.28), (0.64, 0.78), (0.3, 0.78)]), fill, **edge)
    elif name == "flower":
        draw.line(_polygon(size, [(0.5, 0.5), (0.5, 0.86)]), (40, 120, 50), size // 20)
        for i in range(6):
            x, y = 0.5 + 0.17 * math.cos(i * math.pi / 3), 0.4 + 0.17 * math.sin(i * math.pi / 3)
            draw.ellipse(_box(size, x - 0.11, y - 0.11, x + 0.11, y + 0.11), fill, **edge)
        draw.ellipse(_box(size, 0.4, 0.3, 0.6, 0.5), (250, 220, 90))
    else:
        raise VisionPEFTError(f"no object is called {name!r}: choose one of {', '.join(OBJECTS)}")


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(0.26, 0.34), (0.74, 0.34), (0.74, 0.82), (0.26, 0.82)],
    "cone": [(0.5, 0.2), (0.8, 0.84), (0.2, 0.84)],
}


def _toy(layer: Image.Image, toy: Toy, rng: np.random.Generator) -> None:
    draw, size = ImageDraw.Draw(layer), layer.width
    fill, second = COLOURS[toy.colour], COLOURS[toy.second]
    _limbs(draw, _dark(fill, 0.75), size, rng.uniform(-0.08, 0.08, 2))
    _ears(draw, toy.ears, _dark(fill, 0.75), second, size)
    _body(draw, toy.body, fill, size)
    mask = Image.new("1", (size, size))
    _body(ImageDraw.Draw(mask), toy.body, 1, size)
    marks = Image.new("RGBA", (size, size))
    _marks(ImageDraw.Draw(marks), toy.pattern, second, size)
    layer.paste(marks, (0, 0), Image.composite(marks.getchannel("A"), Image.new("L", marks.size), mask))
    _face(draw, toy.eyes, size)


def _body(draw: ImageDraw.ImageDraw, body: str, fill: Any, size: int) -> None:
    if body == "round":
        draw.ellipse(_box(size, 0.24, 0.32, 0.76, 0.84), fill)
    elif body == "egg":
        draw.ellipse(_box(size, 0.3, 0.24, 0.7, 0.86), fill)
    else:
        draw.polygon(_polygon(size, _OUTLINES[body]), fill)


def _limbs(draw: ImageDraw.ImageDraw, fill: Colour, size: int, lift: np.ndarray) -> None:
    for x, y in zip((0.16, 0.84), lift, strict=True):
        draw.line(_polygon(size, [(0.5, 0.58), (x, 0.58 + y)]), fill, size // 12)
        draw.line(_polygon(size, [(0.5 + (x - 0.5) * 0.35, 0.75), (0.5 + (x - 0.5) * 0.45, 0.94)]), fill, size // 11)


def _ears(draw: ImageDraw.ImageDraw, ears: str, fill: Colour, tip: Colour, size: int) -> None:
    for side in (-1, 1):
        x = 0.5 + 0.15 * side
        if ears == "round":
            draw.ellipse(_box(size, x - 0.1, 0.16, x + 0.1, 0.36), fill)
        elif ears == "pointed":
            draw.polygon(_polygon(size, [(x - 0.1, 0.42), (x + 0.04 * side, 0.1), (x + 0.1, 0.42)]), fill)
        elif ears == "antenna":
            draw.line(_polygon(size, [(x, 0.4), (x + 0.04 * side, 0.14)]), fill, size // 28)
            draw.ellipse(_box(size, x + 0.04 * side - 0.05, 0.08, x + 0.04 * side + 0.05, 0.18), tip)
    if ears == "horn":
        draw.polygon(_polygon(size, [(0.42, 0.34), (0.5, 0.04), (0.58, 0.34)]), tip)


def _marks(draw: ImageDraw.ImageDraw, pattern: str, fill: Colour, size: int) -> None:
    if pattern == "stripes":
        for top in (0.5, 0.63, 0.76):
            draw.rectangle(_box(size, 0, top, 1, top + 0.065), fill)
    elif pattern == "spots":
        for x, y in ((0.38, 0.62), (0.58, 0.56), (0.5, 0.74), (0.66, 0.72), (0.4, 0.34), (0.62, 0.36)):
            draw.ellipse(_box(size, x - 0.065, y - 0.065, x + 0.065, y + 0.065), fill)
    elif pattern == "belly":
        draw.ellipse(_box(size, 0.37, 0.55, 0.63, 0.8), fill)


def _face(draw: ImageDraw.ImageDraw, eyes: int, size: int) -> None:
    for x in (0.5,) if eyes == 1 else (0.42, 0.58):
        r = 0.075 if eyes == 1 else 0.055
        draw.ellipse(_box(size, x - r, 0.44 - r, x + r, 0.44 + r), (255, 255, 255))
        draw.ellipse(_box(size, x - r / 2, 0.44 - r / 2, x + r / 2, 0.44 + r / 2), (10, 10, 10))


