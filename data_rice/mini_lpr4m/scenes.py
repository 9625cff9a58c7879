"""Pictures of a product: the shop's own photographs and the frames of a livestream clip.

The studio, host and shelf of a clip stay the same. The hand moves from frame to frame, so scale, position, viewpoint
and light change. Some frames do not show the intended product, and the host may hold another product of the shop.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .products import ART_SIZE, Product, Room


@dataclass
class Clip:
    """Rendered frames of one clip.

    Args:
        frames: RGB images, all of one size.
        boxes: one entry per frame, [left, top, right, bottom] of the intended product in whole pixels of the frame
            (right and bottom exclusive), or None where it is not shown.
        products_on_screen: number of products visible in each frame, the intended one included.
    """

    frames: list[Image.Image]
    boxes: list[list[int] | None]
    products_on_screen: list[int]


@dataclass(frozen=True)
class Pose:
    """Where a product is drawn: centre and side in units of the frame, rotation in radians, horizontal and vertical
    foreshortening (1 = seen from the front) and shear."""

    x: float
    y: float
    side: float
    angle: float = 0.0
    squeeze_x: float = 1.0
    squeeze_y: float = 1.0
    shear: float = 0.0


def _reduced(art: Image.Image, side: float, cache: dict) -> Image.Image:
    """``art`` reduced to the smallest of a few sizes with at least ``side`` pixels, so resampling does not alias."""
    for size in (ART_SIZE // 4, ART_SIZE // 2, ART_SIZE * 3 // 4):
        if size >= side:
            key = (id(art), size)
            if key not in cache:
                cache[key] = art.resize((size, size), Image.Resampling.BOX)
            return cache[key]
    return art


def place(canvas: Image.Image, art: Image.Image, pose: Pose, cache: dict) -> list[int] | None:
    """Draw ``art`` on ``canvas`` (in place) and return its pixel box, None if nothing is visible."""
    size = canvas.width
    side = pose.side * size
    art = _reduced(art, side, cache)
    scale = side / art.width
    cos, sin = math.cos(pose.angle) * scale, math.sin(pose.angle) * scale
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[pose.squeeze_x, pose.shear], [0.0, pose.squeeze_y]])
    (a, b), (d, e) = np.linalg.inv(forward).tolist()
    x, y, half = pose.x * size, pose.y * size, art.width / 2
    layer = art.transform(
        canvas.size,
        Image.Transform.AFFINE,
        (a, b, half - a * x - b * y, d, e, half - d * x - e * y),
        resample=Image.Resampling.BILINEAR,
    )
    alpha = layer.getchannel("A")
    canvas.paste(layer, mask=alpha)
    box = alpha.point(lambda value: 255 if value > 96 else 0).getbbox()
    return list(box) if box else None


def _relight(image: Image.Image, gains: np.ndarray, slope: tuple[float, float], noise: np.ndarray) -> Image.Image:
    size = image.width
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + slope[0] * ramp[None, :, None] + slope[1] * ramp[:, None, None]
    pixels = np.asarray(image, np.float32) * (gains * light) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _noise(rng: random.Random, size: int, strength: float) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    return (generator.random((size, size, 1), dtype=np.float32) - 0.5) * (3.4 * strength)


def draw_shop_image(art: Image.Image, rng: random.Random, image_size: int, detail: bool = False) -> Image.Image:
    """The shop's picture of a product on a plain background: the main shot, or a closer one from the side."""
    shade = rng.randint(222, 250)
    canvas = Image.new("RGB", (image_size, image_size), tuple(min(255, shade + rng.randint(-5, 5)) for _ in range(3)))
    pose = Pose(
        x=0.5 + rng.uniform(-0.03, 0.03),
        y=0.5 + rng.uniform(-0.03, 0.03),
        side=rng.uniform(1.1, 1.25) if detail else rng.uniform(0.82, 0.96),
        angle=math.radians(rng.uniform(-14, 14) if detail else rng.uniform(-4, 4)),
        squeeze_x=rng.uniform(0.75, 0.9) if detail else 1.0,
    )
    place(canvas, art, pose, {})
    gains = np.float32([rng.uniform(0.95, 1.05) for _ in range(3)])
    return _relight(canvas, gains, (rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)), _noise(rng, image_size, 1.0))


def _draw_studio(room: Room, rng: random.Random, size: int) -> Image.Image:
    """Wall, shelf, clutter and host on a canvas a quarter larger than a frame, so that the camera can move."""
    wide = round(size * 1.25)
    canvas = Image.new("RGB", (wide, wide), room.wall)
    draw = ImageDraw.Draw(canvas)
    dark = tuple(int(value * 0.82) for value in room.wall)
    style = rng.randrange(3)
    for step in range(0, wide, wide // 6):
        if style == 0:
            draw.rectangle((step, 0, step + wide // 12, wide), fill=dark)
        elif style == 1:
            draw.line((0, step, wide, step), fill=dark, width=2)
    for _ in range(rng.randint(2, 5)):
        left, top = rng.uniform(0, wide * 0.9), rng.uniform(0, wide * 0.8)
        side = wide * rng.uniform(0.08, 0.22)
        color = tuple(rng.randint(30, 230) for _ in range(3))
        box = (left, top, left + side, top + side * rng.uniform(0.5, 1.4))
        (draw.rectangle if rng.random() < 0.6 else draw.ellipse)(box, fill=color)

    middle = wide * rng.uniform(0.3, 0.7)
    head = wide * rng.uniform(0.10, 0.14)
    chin = wide * rng.uniform(0.24, 0.34)
    clothes = tuple(min(255, max(0, value + rng.randint(-25, 25))) for value in room.clothes)
    hair = tuple(rng.randint(20, 70) for _ in range(3))
    draw.rounded_rectangle((middle - head * 2.1, chin, middle + head * 2.1, wide * 1.2), radius=head, fill=clothes)
    draw.ellipse((middle - head * 1.15, chin - head * 2.5, middle + head * 1.15, chin + head * 0.1), fill=hair)
    draw.ellipse((middle - head * 0.9, chin - head * 2.0, middle + head * 0.9, chin + head * 0.25), fill=room.skin)
    draw.rectangle((0, wide * rng.uniform(0.84, 0.9), wide, wide), fill=room.table)
    return canvas


def _draw_hand(canvas: Image.Image, room: Room, rng: random.Random, box: list[int]) -> None:
    """A forearm from below and a few fingers over the lower edge of what the host holds."""
    left, top, right, bottom = box
    size = canvas.width
    draw = ImageDraw.Draw(canvas)
    x = left + (right - left) * rng.uniform(0.15, 0.85)
    y = min(bottom - (bottom - top) * rng.uniform(0.02, 0.12), size - 2)
    width = size * rng.uniform(0.035, 0.05)
    dark = tuple(int(value * 0.7) for value in room.skin)
    draw.line(
        (x + rng.uniform(-0.2, 0.2) * size, size * 1.05, x, y + width * 2), fill=room.skin, width=round(width * 3)
    )
    for finger in (-1.1, 0.0, 1.1):
        center = x + finger * width * 1.3
        draw.ellipse(
            (center - width * 0.7, y - width * 1.3, center + width * 0.7, y + width * 2), fill=room.skin, outline=dark
        )


def _draw_occluder(canvas: Image.Image, room: Room, rng: random.Random, box: list[int]) -> None:
    """A sleeve or a box in front of one side of the product, covering at most about a fifth of it."""
    left, top, right, bottom = box
    draw = ImageDraw.Draw(canvas)
    width, height = right - left, bottom - top
    color = room.clothes if rng.random() < 0.5 else tuple(rng.randint(30, 230) for _ in range(3))
    share = rng.uniform(0.08, 0.24)
    side = rng.randrange(3)
    if side == 0:
        draw.rectangle((left - width, top - 4, left + width * share, bottom + 4), fill=color)
    elif side == 1:
        draw.rectangle((right - width * share, top - 4, right + width, bottom + 4), fill=color)
    else:
        draw.rectangle((left - 4, bottom - height * share, right + 4, bottom + height), fill=color)


def _draw_overlay(canvas: Image.Image, rng: random.Random) -> None:
    """The chat lines that a livestream app draws over the lower left corner."""
    size = canvas.width
    draw = ImageDraw.Draw(canvas)
    for line in range(rng.randint(1, 3)):
        top = size * (0.95 - 0.055 * line)
        draw.rectangle((1, top, size * rng.uniform(0.15, 0.4), top + size * 0.025), fill=(245, 245, 245))


def _absent_frames(rng: random.Random, num_frames: int) -> set[int]:
    """Frames without the intended product: 20 % of all on average, never the whole clip."""
    share = rng.choices((0.0, 0.2, 0.4, 0.6), weights=(4, 3, 2, 1))[0]
    return set(rng.sample(range(num_frames), min(round(share * num_frames), num_frames - 1)))


def _hand_pose(rng: random.Random, base: Pose) -> Pose:
    turn = rng.uniform(0, 1) ** 2
    return Pose(
        x=base.x + rng.uniform(-0.07, 0.07),
        y=base.y + rng.uniform(-0.06, 0.06),
        side=base.side * rng.uniform(0.84, 1.12),
        angle=base.angle + math.radians(rng.uniform(-12, 12)),
        squeeze_x=1 - 0.30 * turn,
        squeeze_y=rng.uniform(0.9, 1.0),
        shear=rng.uniform(-0.14, 0.14),
    )


def draw_clip(
    room: Room, product: Product, arts: dict[str, Image.Image], rng: random.Random, num_frames: int, image_size: int
) -> Clip:
    """Render one clip in which the host of ``room`` presents ``product``.

    Args:
        arts: product id -> picture without background, for every product of the room.
        rng: the only source of randomness.
        image_size: side of the square frames, in pixels.
    """
    cache: dict = {}
    studio = _draw_studio(room, rng, image_size)
    others = [other for other in room.products if other.product_id != product.product_id]
    shelf = rng.sample(others, min(rng.randint(1, 3), len(others)))
    slots = rng.sample((0.15, 0.38, 0.62, 0.85), len(shelf))
    shelf_poses = [
        Pose(x=slot, y=rng.choice((0.16, 0.84)) + rng.uniform(-0.04, 0.04), side=rng.uniform(0.22, 0.34))
        for slot in slots
    ]
    side = rng.uniform(0.62, 1.0)
    reach = (1 - side) / 2 + 0.09  # a large product stays closer to the centre
    base = Pose(
        x=0.5 + rng.uniform(-reach, reach),
        y=0.5 + rng.uniform(-reach, reach),
        side=side,
        angle=math.radians(rng.uniform(-25, 25)),
    )
    absent = _absent_frames(rng, num_frames)
    swapped = rng.choice(others) if others else None
    brightness = rng.uniform(0.7, 1.12)
    cast = [rng.uniform(0.78, 1.2) for _ in range(3)]
    occluded = rng.random() < 0.5
    chat = rng.random() < 0.4

    frames, boxes, on_screen = [], [], []
    for index in range(num_frames):
        shift_x, shift_y = (rng.randint(0, studio.width - image_size) for _ in range(2))
        canvas = studio.crop((shift_x, shift_y, shift_x + image_size, shift_y + image_size))
        count = 0
        for other, pose in zip(shelf, shelf_poses):
            moved = Pose(pose.x + rng.uniform(-0.03, 0.03), pose.y + rng.uniform(-0.03, 0.03), pose.side)
            count += place(canvas, arts[other.product_id], moved, cache) is not None
        pose = _hand_pose(rng, base)
        held = product if index not in absent else swapped if rng.random() < 0.4 else None
        box = None
        if held is not None:
            box = place(canvas, arts[held.product_id], pose, cache)
            count += box is not None
        if box is not None:
            if occluded and rng.random() < 0.5:
                _draw_occluder(canvas, room, rng, box)
            _draw_hand(canvas, room, rng, box)
        if chat:
            _draw_overlay(canvas, rng)
        if rng.random() < 0.08:
            canvas = canvas.filter(ImageFilter.BoxBlur(0.5))
        gains = np.float32([brightness * rng.uniform(0.88, 1.12) * value * rng.uniform(0.93, 1.07) for value in cast])
        slope = (rng.uniform(-0.22, 0.22), rng.uniform(-0.22, 0.22))
        frames.append(_relight(canvas, gains, slope, _noise(rng, image_size, 3.0)))
        boxes.append(box if held is product else None)
        on_screen.append(count)
    return Clip(frames, boxes, on_screen)
