"""Shops of fine-grained products: the products of a room, and the picture of each product.

All products of one room share a palette of few colours and a few categories, so colour alone is not enough. They
differ in silhouette, pattern, emblem and the colours of their parts, all large enough to be visible at 64 pixels.
Every room uses the same vocabulary, so a model transfers from training rooms to unseen ones.
"""

import math
import random
import uuid
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .silhouettes import SILHOUETTES, Silhouette

COLORS = {
    "red": (206, 48, 52),
    "orange": (236, 134, 42),
    "yellow": (240, 210, 74),
    "green": (66, 150, 78),
    "teal": (62, 172, 176),
    "blue": (58, 106, 200),
    "navy": (38, 48, 104),
    "purple": (128, 72, 158),
    "pink": (238, 150, 178),
    "brown": (124, 84, 56),
    "white": (240, 238, 232),
    "black": (46, 44, 48),
}
PATTERNS = ("plain", "stripes", "pinstripes", "diagonals", "checks", "dots", "two-tone", "zigzag", "grid", "rings")
EMBLEMS = ("disc", "square", "triangle", "star", "cross", "heart", "ring", "moon", "bolt", "bars")

PALETTE_SIZE = 5
MAX_PRODUCTS = len(PATTERNS) * len(EMBLEMS)

ART_SIZE = 96
_SUPERSAMPLE = 2
_MARGIN = 0.04


@dataclass(frozen=True)
class Product:
    """One product of a shop: its id and all visible attributes (colour names are keys of ``COLORS``)."""

    product_id: str
    category_index: int
    body: str
    second: str
    emblem_color: str
    part: str
    pattern: str
    emblem: str
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def silhouette(self) -> Silhouette:
        return SILHOUETTES[self.category_index]

    def differences(self, other: "Product") -> int:
        """Number of attributes other than colour in which two products differ (0..3)."""
        return (
            (self.category_index != other.category_index)
            + (self.pattern != other.pattern)
            + (self.emblem != other.emblem)
        )


@dataclass(frozen=True)
class Room:
    """One livestream: its shop, its studio and its host."""

    live_id: str
    products: tuple[Product, ...]
    wall: tuple[int, int, int]
    table: tuple[int, int, int]
    skin: tuple[int, int, int]
    clothes: tuple[int, int, int]


def seeded_uuid(rng: random.Random) -> str:
    """A version-4 UUID from ``rng``, so that equal seeds give equal ids."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def color_distance(first: str, second: str) -> float:
    """Euclidean RGB distance of two named colours (0..441)."""
    return float(np.linalg.norm(np.subtract(COLORS[first], COLORS[second])))


def _draw_palette(rng: random.Random, size: int) -> list[str]:
    names = sorted(COLORS)
    while True:
        palette = rng.sample(names, size)
        if all(color_distance(a, b) > 80 for i, a in enumerate(palette) for b in palette[:i]):
            return palette


def _draw_colors(rng: random.Random, palette: list[str]) -> dict[str, str]:
    while True:
        body, second, emblem_color = rng.sample(palette, 3)
        if color_distance(body, second) > 110 and color_distance(body, emblem_color) > 110:
            break
    part = rng.choice([name for name in palette if name != body])
    return {"body": body, "second": second, "emblem_color": emblem_color, "part": part}


def draw_room(seed: int, split: str, index: int, num_products: int) -> Room:
    """Draw the room ``index`` of ``split`` ("train" or "test").

    Any two products of a room differ in at least two of category, pattern and emblem, so that colour alone never
    decides. At most ``MAX_PRODUCTS`` products fit into a room.
    """
    rng = random.Random(f"room/{seed}/{split}/{index}")
    live_id = seeded_uuid(rng)
    palette = _draw_palette(rng, PALETTE_SIZE)
    num_categories = max(rng.randint(6, 9), math.ceil(num_products / len(PATTERNS)))
    categories = rng.sample(range(len(SILHOUETTES)), num_categories)
    # A Latin square: one emblem per (category, pattern), never twice in a row or a column.
    shifts = rng.sample(range(len(EMBLEMS)), num_categories)
    emblems = rng.sample(EMBLEMS, len(EMBLEMS))
    cells = [(row, column) for row in range(num_categories) for column in range(len(PATTERNS))]
    products = []
    for row, column in rng.sample(cells, num_products):
        products.append(
            Product(
                product_id=seeded_uuid(rng),
                category_index=categories[row],
                pattern=PATTERNS[column],
                emblem=emblems[(column + shifts[row]) % len(EMBLEMS)],
                tint=tuple(rng.randint(-12, 12) for _ in range(3)),
                **_draw_colors(rng, palette),
            )
        )
    tone = rng.uniform(0.45, 1.0)
    skin = tuple(int(value * tone) for value in (244, 204, 176))
    wall = tuple(rng.randint(50, 235) for _ in range(3))
    table = tuple(rng.randint(40, 220) for _ in range(3))
    clothes = tuple(rng.randint(30, 225) for _ in range(3))
    return Room(live_id, tuple(products), wall, table, skin, clothes)


def _draw_primitive(draw: ImageDraw.ImageDraw, primitive: tuple, size: int) -> None:
    inner = size * (1 - 2 * _MARGIN)

    def place(values):
        return [size * _MARGIN + inner * value for value in values]

    kind, *values = primitive
    if kind == "poly":
        draw.polygon(place(values), fill=255)
    elif kind == "oval":
        draw.ellipse(place(values), fill=255)
    elif kind == "rect":
        draw.rounded_rectangle(place(values[:4]), radius=inner * values[4], fill=255)
    elif kind == "line":
        draw.line(place(values[1:]), width=round(inner * values[0]), fill=255, joint="curve")
    elif kind == "ring":
        draw.ellipse(place(values[1:]), outline=255, width=round(inner * values[0]))
    else:
        raise ValueError(f"Unknown primitive {kind!r} in a silhouette.")


@lru_cache(maxsize=256)
def _primitives_mask(primitives: tuple, size: int) -> Image.Image:
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    for primitive in primitives:
        _draw_primitive(draw, primitive, size)
    return mask


@lru_cache(maxsize=32)
def _pattern_mask(pattern: str, size: int) -> Image.Image:
    """Mask of the second colour, for a pattern with about four periods across the product."""
    y, x = np.mgrid[0:size, 0:size] / size
    if pattern == "plain":
        on = np.zeros((size, size), bool)
    elif pattern == "stripes":
        on = (y * 4.5) % 1 < 0.5
    elif pattern == "pinstripes":
        on = (x * 4.5 + 0.25) % 1 < 0.5
    elif pattern == "diagonals":
        on = ((x + y) * 3.4) % 1 < 0.5
    elif pattern == "checks":
        on = ((x * 4).astype(int) + (y * 4).astype(int)) % 2 == 0
    elif pattern == "dots":
        row = np.floor(y * 5)
        on = ((x * 5 + 0.5 * (row % 2)) % 1 - 0.5) ** 2 + ((y * 5) % 1 - 0.5) ** 2 < 0.33**2
    elif pattern == "two-tone":
        on = x > 0.5
    elif pattern == "zigzag":
        on = (y * 3.5 + 0.9 * np.abs((x * 3) % 1 - 0.5)) % 1 < 0.5
    elif pattern == "grid":
        on = ((x * 4 + 0.35) % 1 < 0.26) | ((y * 4 + 0.35) % 1 < 0.26)
    elif pattern == "rings":
        on = (np.hypot(x - 0.5, y - 0.5) * 6.5 + 0.1) % 1 < 0.5
    else:
        raise ValueError(f"Unknown pattern {pattern!r}.")
    return Image.fromarray(on.astype(np.uint8) * 255)


def _star(points: int, inner: float) -> tuple:
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 0.5, inner)
    return ("poly", *np.stack([0.5 + radii * np.cos(angles), 0.5 + radii * np.sin(angles)], 1).ravel().tolist())


_EMBLEM_SHAPES = {
    "disc": (("oval", 0.04, 0.04, 0.96, 0.96),),
    "square": (("rect", 0.08, 0.08, 0.92, 0.92, 0.0),),
    "triangle": (("poly", 0.50, 0.02, 1.0, 0.94, 0.0, 0.94),),
    "star": (_star(5, 0.21),),
    "cross": (("rect", 0.34, 0.0, 0.66, 1.0, 0.0), ("rect", 0.0, 0.34, 1.0, 0.66, 0.0)),
    "heart": (
        ("oval", 0.0, 0.06, 0.54, 0.58),
        ("oval", 0.46, 0.06, 1.0, 0.58),
        ("poly", 0.03, 0.42, 0.97, 0.42, 0.5, 1.0),
    ),
    "ring": (("ring", 0.22, 0.0, 0.0, 1.0, 1.0),),
    "bolt": (("poly", 0.66, 0.0, 0.12, 0.58, 0.44, 0.58, 0.30, 1.0, 0.90, 0.38, 0.56, 0.38),),
    "bars": (
        ("rect", 0.0, 0.04, 1.0, 0.28, 0.0),
        ("rect", 0.0, 0.40, 1.0, 0.62, 0.0),
        ("rect", 0.0, 0.74, 1.0, 0.98, 0.0),
    ),
}


@lru_cache(maxsize=64)
def _emblem_mask(emblem: str, size: int) -> Image.Image:
    if emblem == "moon":
        full = _primitives_mask((("oval", 0.0, 0.0, 1.0, 1.0),), size)
        bite = _primitives_mask((("oval", 0.36, -0.08, 1.16, 0.84),), size)
        return ImageChops.subtract(full, bite)
    return _primitives_mask(_EMBLEM_SHAPES[emblem], size)


def _shade(color: tuple[int, ...], tint: tuple[int, int, int], factor: float = 1.0) -> tuple[int, ...]:
    return tuple(int(min(255, max(0, value * factor + shift))) for value, shift in zip(color, tint))


def draw_product(product: Product) -> Image.Image:
    """The product seen from the front, without background.

    Returns:
        RGBA image of ``ART_SIZE`` x ``ART_SIZE`` pixels, transparent around the product.
    """
    size = ART_SIZE * _SUPERSAMPLE
    silhouette = product.silhouette
    body_color = _shade(COLORS[product.body], product.tint)
    part_color = _shade(COLORS[product.part], product.tint)
    body = _primitives_mask(silhouette.body, size)
    back = _primitives_mask(silhouette.back, size)
    front = _primitives_mask(silhouette.front, size)
    whole = ImageChops.lighter(ImageChops.lighter(body, back), front)

    art = Image.new("RGB", (size, size), part_color)
    art.paste(body_color, mask=body)
    printed = ImageChops.darker(_pattern_mask(product.pattern, size), body)
    art.paste(_shade(COLORS[product.second], product.tint), mask=printed)
    art.paste(part_color, mask=front)
    edge = ImageChops.subtract(front.filter(ImageFilter.MaxFilter(3)), front)
    art.paste(_shade(part_color, (0, 0, 0), 0.6), mask=ImageChops.darker(edge, whole))

    x, y, diameter = silhouette.mark
    inner = size * (1 - 2 * _MARGIN)
    side = round(diameter * inner)
    plate = _primitives_mask((("oval", -0.04, -0.04, 1.04, 1.04),), round(side * 1.3))
    corner = (
        round(size * _MARGIN + x * inner - plate.width / 2),
        round(size * _MARGIN + y * inner - plate.height / 2),
    )
    art.paste(body_color, corner, plate)
    corner = (round(size * _MARGIN + x * inner - side / 2), round(size * _MARGIN + y * inner - side / 2))
    art.paste(_shade(COLORS[product.emblem_color], product.tint), corner, _emblem_mask(product.emblem, side))

    outline = whole.filter(ImageFilter.MaxFilter(5))
    rim = ImageChops.subtract(outline, whole)
    art.paste(_shade(body_color, (0, 0, 0), 0.35), mask=rim)
    art.putalpha(outline)
    return art.resize((ART_SIZE, ART_SIZE), Image.Resampling.BOX)
