"""Augmentation of clips: one random draw per clip, applied to all its frames and their boxes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as tvF

Box = Sequence[float] | None


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


@dataclass(frozen=True)
class ClipChange:
    """
    The random change of one clip, or of one shop image.

    Args:
        crop: Part that is kept: left, top, right, bottom in 0..1.
        mirrored: Whether left and right are exchanged.
        factors: Factors of brightness, contrast and saturation.
        background: Colour, 0..255, for everything outside a frame's box; `None` changes nothing.
    """

    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mirrored: bool = False
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    background: tuple[int, int, int] | None = None

    def apply(
        self,
        frames: Sequence[torch.Tensor],
        boxes: Sequence[Box] | None = None,
        resize: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], list[Box] | None]:
        """
        Args:
            frames: `(3, H, W)` uint8 each; sizes may differ.
            boxes: Per frame, left, top, right, bottom in 0..1, or `None`.
            resize: Applied to each frame after cropping. Smaller frames make the later steps cheaper.

        Returns:
            The frames, cropped to whole pixels, and the boxes as fractions (0..1) of the cropped frames. A box that
            lies outside the crop becomes `None`.
        """
        changed, moved = [], []
        for frame, box in zip(frames, boxes or [None] * len(frames), strict=True):
            if self.background is not None and box is not None:
                frame = _keep_box(frame, box, self.background)
            height, width = frame.shape[-2:]
            left, top, right, bottom = _to_whole_pixels(self.crop, height, width)
            frame = frame[:, top:bottom, left:right]
            frame = frame if resize is None else resize(frame)
            changed.append(self._recolour(frame.flip(-1) if self.mirrored else frame))
            moved.append(_move_box(box, (left / width, top / height, right / width, bottom / height), self.mirrored))
        return changed, None if boxes is None else moved

    def _recolour(self, frame: torch.Tensor) -> torch.Tensor:
        changes = (tvF.adjust_brightness, tvF.adjust_contrast, tvF.adjust_saturation)
        for change, factor in zip(changes, self.factors, strict=True):
            if factor != 1:
                frame = change(frame, factor)
        return frame


@dataclass
class ClipAugmentation:
    """
    Draws one crop, one mirroring and one colour change for all frames of a clip, or for a shop image. It can also
    drop some frames of a clip.

    Randomness comes from torch's generator. The number of draws does not depend on the pictures.

    Args:
        crop_scale: Range of the crop's area, as shares of the picture.
        crop_ratio: Range of the crop's aspect ratio (width over height) relative to the picture's. With both ranges at
            (1, 1) nothing is cropped. With the whole area, a ratio r keeps the share r or 1/r of one side.
        flip: Probability of mirroring.
        jitter: Brightness, contrast and saturation are each multiplied by a factor in 1 +- this.
        background: Probability that everything outside the boxes becomes one random colour, in the frames of a clip
            that have a box. The model then learns early what a product looks like. Only training needs boxes for it.
        frame_drop: Probability that a sampled frame is dropped before it is decoded. One frame is always kept.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5
    jitter: float = 0.3
    background: float = 0.0
    frame_drop: float = 0.0

    def draw(self) -> ClipChange:
        """Draws the change of the next clip or image."""
        colour = tuple(torch.randint(256, (3,)).tolist())
        background = colour if torch.rand(()).item() < self.background else None
        crop = self._draw_crop()
        mirrored = torch.rand(()).item() < self.flip
        factors = tuple(_uniform(1 - self.jitter, 1 + self.jitter) for _ in range(3))
        return ClipChange(crop, mirrored, factors, background)

    def drop_frames(self, frames: Sequence[int]) -> list[int]:
        """Drops each frame number with probability `frame_drop`, but keeps at least one."""
        if not self.frame_drop:
            return list(frames)
        draws = torch.rand(len(frames))
        kept = [frame for frame, draw in zip(frames, draws.tolist(), strict=True) if draw >= self.frame_drop]
        # Every frame has the same chance of the largest draw.
        return kept or [frames[int(draws.argmax())]]

    def _draw_crop(self) -> tuple[float, float, float, float]:
        area, ratio = _uniform(*self.crop_scale), _uniform(*self.crop_ratio)
        width, height = min((area * ratio) ** 0.5, 1.0), min((area / ratio) ** 0.5, 1.0)
        left, top = _uniform(0, 1 - width), _uniform(0, 1 - height)
        return left, top, left + width, top + height


def _to_whole_pixels(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """The nearest left, top, right, bottom within the picture, at least one pixel wide and high."""
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    right, bottom = min(round(box[2] * width), width), min(round(box[3] * height), height)
    left, top = max(left, 0), max(top, 0)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _keep_box(frame: torch.Tensor, box: Sequence[float], colour: tuple[int, int, int]) -> torch.Tensor:
    left, top, right, bottom = _to_whole_pixels(box, *frame.shape[-2:])
    canvas = torch.empty_like(frame)
    canvas[:] = torch.tensor(colour, dtype=frame.dtype)[:, None, None]
    canvas[:, top:bottom, left:right] = frame[:, top:bottom, left:right]
    return canvas


def _move_box(box: Box, crop: tuple[float, float, float, float], mirrored: bool) -> list[float] | None:
    if box is None:
        return None
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    left, right = ((x - crop[0]) / width for x in (box[0], box[2]))
    top, bottom = ((y - crop[1]) / height for y in (box[1], box[3]))
    if mirrored:
        left, right = 1 - right, 1 - left
    moved = [min(max(value, 0.0), 1.0) for value in (left, top, right, bottom)]
    return moved if moved[2] > moved[0] and moved[3] > moved[1] else None
