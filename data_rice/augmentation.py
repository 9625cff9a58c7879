"""Augmentation with the clip in mind: what is drawn is drawn once per clip, and boxes move along with the picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps

Box = Sequence[float] | None


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


@dataclass
class ClipAugmentation:
    """
    One crop, one mirroring and one change of light for all frames of a clip, or for a shop image.

    Randomness comes from torch's generator, which a DataLoader seeds in each worker.

    Args:
        crop_scale: Area of the crop, as shares of the picture; (1, 1) crops nothing.
        crop_ratio: Width over height of the crop relative to the picture's.
        flip: Probability of mirroring.
        jitter: Brightness, contrast and saturation are each multiplied by up to 1 +- this.
        background: Probability that everything outside the boxes becomes one random colour, in the frames of a clip
            that have one. The model then learns early what a product looks like; it needs training boxes only.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5
    jitter: float = 0.3
    background: float = 0.0

    def __call__(
        self, frames: list[Image.Image], boxes: list[Box] | None = None
    ) -> tuple[list[Image.Image], list[Box] | None]:
        """
        Args:
            frames: RGB pictures, sizes may differ.
            boxes: Left, top, right, bottom in 0..1 or `None`, per frame.

        Returns:
            Frames, and boxes in the new pictures' 0..1; a box that the crop leaves nothing of becomes `None`.
        """
        if boxes is not None and torch.rand(()).item() < self.background:
            colour = tuple(torch.randint(256, (3,)).tolist())
            frames = [_keep_box(frame, box, colour) for frame, box in zip(frames, boxes, strict=True)]
        crop = self._draw_crop()
        mirrored = torch.rand(()).item() < self.flip
        factors = [_uniform(1 - self.jitter, 1 + self.jitter) for _ in range(3)]
        frames = [self._change(frame, crop, mirrored, factors) for frame in frames]
        return frames, None if boxes is None else [_move_box(box, crop, mirrored) for box in boxes]

    def _draw_crop(self) -> tuple[float, float, float, float]:
        area, ratio = _uniform(*self.crop_scale), _uniform(*self.crop_ratio)
        width, height = min((area * ratio) ** 0.5, 1.0), min((area / ratio) ** 0.5, 1.0)
        left, top = _uniform(0, 1 - width), _uniform(0, 1 - height)
        return left, top, left + width, top + height

    @staticmethod
    def _change(frame: Image.Image, crop: tuple, mirrored: bool, factors: list[float]) -> Image.Image:
        if crop != (0.0, 0.0, 1.0, 1.0):
            frame = frame.resize(frame.size, Image.Resampling.BILINEAR, box=_scale(crop, *frame.size))
        if mirrored:
            frame = ImageOps.mirror(frame)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, factors, strict=True):
            if factor != 1:
                frame = enhancer(frame).enhance(factor)
        return frame


def _keep_box(frame: Image.Image, box: Box, colour: tuple[int, ...]) -> Image.Image:
    if box is None:
        return frame
    region = tuple(round(value) for value in _scale(box, *frame.size))
    canvas = Image.new("RGB", frame.size, colour)
    canvas.paste(frame.crop(region), region[:2])
    return canvas


def _scale(crop: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    return crop[0] * width, crop[1] * height, crop[2] * width, crop[3] * height


def _move_box(box: Box, crop: tuple, mirrored: bool) -> list[float] | None:
    if box is None:
        return None
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    left, right = ((x - crop[0]) / width for x in (box[0], box[2]))
    top, bottom = ((y - crop[1]) / height for y in (box[1], box[3]))
    if mirrored:
        left, right = 1 - right, 1 - left
    moved = [min(max(value, 0.0), 1.0) for value in (left, top, right, bottom)]
    return moved if moved[2] > moved[0] and moved[3] > moved[1] else None
