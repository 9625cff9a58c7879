"""Heat maps over the frames of a clip: which patches correspond to each patch of a shop image.

A model needs a method that returns weights `(1, P, T, P)` for one image and one clip: `alignment_maps(**inputs)`, the
cosines of patches from which the alignment score takes the best; or `reconstruction_maps(**inputs)` (PFR).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_rice.collator import failure_words
from processing_rice.video_processing_rice import frames_with_box

from ..frames import clip_frames

Region = tuple[float, float, float, float]
WARM = (255, 96, 0)
DIMMED = 0.4
"""Brightness where there is no heat."""


def reconstructs(model: Any) -> bool:
    """Whether a model has reconstruction maps."""
    return hasattr(model, "reconstruction_maps") and getattr(model, "reconstruction_head", True) is not None


def aligns(model: Any) -> bool:
    """Whether a model has alignment maps."""
    return getattr(model, "alignment", None) is not None and hasattr(model, "alignment_maps")


def has_maps(model: Any) -> bool:
    """Whether a model has heat maps."""
    return aligns(model) or reconstructs(model)


def seen_region(part: Any, size: tuple[int, int] = (1, 1)) -> Region:
    """
    The part of a picture that an image or video processor passes to the encoder: ltrb in 0..1 of the picture.

    Args:
        part: Image or video processor.
        size: Width and height of the picture; used if the processor resizes the short side and keeps the aspect ratio.
    """
    if not getattr(part, "do_center_crop", False):
        return (0.0, 0.0, 1.0, 1.0)
    edge = part.size.get("shortest_edge")
    resized = [edge * side / min(size) for side in size] if edge else [part.size["width"], part.size["height"]]
    width, height = (min(1.0, part.crop_size[name] / side) for name, side in zip(("width", "height"), resized))
    return ((1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2)


@dataclass
class PairMaps:
    """
    Weights between the patches of one image and of one clip.

    Attributes:
        weights: `(rows, columns, T, rows, columns)`, at least 0: the image's patches, then the clip's frames and
            patches.
        is_alignment: True for similarities of patches, False for weights of a reconstruction.
    """

    weights: np.ndarray
    is_alignment: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.weights.shape[:2]

    def heat(self, patch: tuple[int, int] | None = None) -> np.ndarray:
        """
        `(T, rows, columns)` from 0 (the clip's smallest weight) to 1 (its largest); all 0 if all weights are equal.

        Args:
            patch: Row and column of the image's patch. By default all patches: the mean of a reconstruction's weights,
                or the best match of an alignment.
        """
        together = self.weights.max if self.is_alignment else self.weights.mean
        weights = together(axis=(0, 1)) if patch is None else self.weights[patch]
        spread = weights.max() - weights.min()
        if spread <= 1e-6 * abs(weights.max()):
            return np.zeros_like(weights)
        return (weights - weights.min()) / spread


@torch.no_grad()
def pair_maps(model: Any, inputs: dict[str, Any]) -> PairMaps:
    """
    Args:
        model: A model with heat maps (`has_maps`), in eval mode; alignment is preferred.
        inputs: Model inputs of one image and one clip.

    Raises:
        ValueError: the model has no maps, or its patches are not a square grid.
    """
    if not has_maps(model):
        raise ValueError(
            "this model has no patch reconstruction and no alignment, so it has no heat maps; train it with PFR, or "
            "make one with `rice init`."
        )
    is_alignment = aligns(model)
    maps = model.alignment_maps(**inputs) if is_alignment else model.reconstruction_maps(**inputs)
    weights = maps[0].float().clamp(min=0).cpu().numpy()
    side = math.isqrt(weights.shape[0])
    if side * side != weights.shape[0]:
        raise ValueError(f"the model's {weights.shape[0]} patches are not a square grid, which heat maps need.")
    return PairMaps(weights.reshape(side, side, weights.shape[1], side, side), is_alignment)


def row_maps(model: Any, collator: Any, query: dict, image: dict) -> PairMaps:
    """
    The maps of a query row with a gallery row; errors as `pair_maps`, and `ValueError` for an unreadable row. Frames
    that the processor leaves out because they have no box get no weight.

    Args:
        model: As `pair_maps`.
        collator: A `RiceCollator` with the settings of the evaluation.
        query, image: Rows of the queries and gallery views.
    """
    clip, readable, failures = collator.collate_queries([query])
    picture, also_readable, more = collator.collate_gallery([image])
    if not readable or not also_readable:
        raise ValueError(failure_words((failures + more)[0]))
    maps = pair_maps(model, {**clip, **picture})
    part = collator.processor.video_processor
    if getattr(collator, "use_boxes", False) and getattr(part, "frames_without_box", "keep") == "drop":
        boxes = [box for _, box in clip_frames(query, collator.num_frames or part.num_frames)]
        weights = np.zeros_like(maps.weights, shape=(*maps.weights.shape[:2], len(boxes), *maps.weights.shape[3:]))
        weights[:, :, frames_with_box(boxes)] = maps.weights
        maps = PairMaps(weights, maps.is_alignment)
    return maps


def heat_pictures(model: Any, collator: Any, query: dict, image: dict) -> list[Image.Image]:
    """The frames of a query row that the model used, with the heat of a gallery row; errors as `row_maps`."""
    part = collator.processor.video_processor
    heat = row_maps(model, collator, query, image).heat()
    frames = clip_frames(query, collator.num_frames or part.num_frames)
    return [
        overlay(frame, values, seen_region(part, frame.size)) for (frame, _), values in zip(frames, heat, strict=True)
    ]


def overlay(picture: Image.Image, heat: np.ndarray, region: Region = (0.0, 0.0, 1.0, 1.0)) -> Image.Image:
    """
    The picture with heat: dark without heat, warm with much heat.

    Args:
        picture: RGB.
        heat: `(rows, columns)` in 0..1.
        region: The part of the picture with heat, ltrb in 0..1; there is no heat outside of it.
    """
    width, height = picture.size
    left, top, right, bottom = (round(v * side) for v, side in zip(region, (width, height) * 2))
    patches = Image.fromarray(np.asarray(heat, dtype=np.float32))
    smooth = patches.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR)
    full = Image.new("F", picture.size, 0.0)
    full.paste(smooth, (left, top))
    strength = np.asarray(full)[..., None]
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    lit = pixels * (DIMMED + (1 - DIMMED) * strength)
    mixed = lit + 0.35 * strength * (np.array(WARM, dtype=np.float32) - lit)
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def draw_grid(
    picture: Image.Image,
    grid: tuple[int, int],
    patch: tuple[int, int] | None = None,
    region: Region = (0.0, 0.0, 1.0, 1.0),
) -> Image.Image:
    """The picture with the grid of its patches; one patch has a frame."""
    result = picture.convert("RGB")
    shade = Image.new("L", result.size, 0)
    cells = {(i, j): patch_corners(result.size, grid, (i, j), region) for i in range(grid[0]) for j in range(grid[1])}
    draw = ImageDraw.Draw(shade)
    for corners in cells.values():
        draw.rectangle(corners, outline=150)
    result.paste((130, 130, 130), mask=shade)
    if patch is not None:
        ImageDraw.Draw(result).rectangle(cells[patch], outline=WARM, width=max(2, min(result.size) // 80))
    return result


def patch_corners(
    size: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int], region: Region = (0.0, 0.0, 1.0, 1.0)
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of a patch, for a picture of `size` (width, height)."""
    left, top, right, bottom = region
    (rows, columns), (row, column) = grid, patch
    x = [left + (right - left) * (column + i) / columns for i in (0, 1)]
    y = [top + (bottom - top) * (row + i) / rows for i in (0, 1)]
    return (
        *(round(v) for v in (x[0] * size[0], y[0] * size[1])),
        *(round(v) for v in (x[1] * size[0], y[1] * size[1])),
    )


def patch_at(
    size: tuple[int, int],
    grid: tuple[int, int],
    point: tuple[float, float],
    region: Region = (0.0, 0.0, 1.0, 1.0),
) -> tuple[int, int] | None:
    """Row and column of the patch at a point (x, y in pixels) of a picture; `None` outside the grid."""
    left, top, right, bottom = region
    x = (point[0] / size[0] - left) / (right - left)
    y = (point[1] / size[1] - top) / (bottom - top)
    if not (0 <= x < 1 and 0 <= y < 1):
        return None
    return int(y * grid[0]), int(x * grid[1])
