"""Augmentation with the clip in mind: what is drawn is drawn once per clip, and boxes move along with the picture."""

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
    What was drawn for one clip, or for one shop image.

    Args:
        crop: Left, top, right, bottom of the part that is kept, in 0..1.
        mirrored: Left and right change places.
        factors: Of brightness, contrast and saturation.
        background: Colour, 0..255, of everything outside a frame's box; `None` leaves it as it is.
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
            frames: `(3, H, W)` uint8 each, sizes may differ.
            boxes: Left, top, right, bottom in 0..1 or `None`, per frame.
            resize: Applied to each frame after cropping; smaller frames make what comes after it cheaper.

        Returns:
            The frames, cropped to whole pixels, and boxes in 0..1 of what is left of them; a box that the crop leaves
            nothing of becomes `None`.
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
    One crop, one mirroring and one change of light for all frames of a clip, or for a shop image; and some frames of a
    clip left out.

    Randomness comes from torch's generator, and how much is drawn does not depend on the pictures.

    Args:
        crop_scale: Area of the crop, as shares of the picture.
        crop_ratio: Width over height of the crop relative to the picture's. With both at (1, 1) nothing is cropped; a
            ratio r crops the whole picture to the share r or 1/r of one side.
        flip: Probability of mirroring.
        jitter: Brightness, contrast and saturation are each multiplied by up to 1 +- this.
        background: Probability that everything outside the boxes becomes one random colour, in the frames of a clip
            that have one. The model then learns early what a product looks like; it needs training boxes only.
        frame_drop: Probability of each sampled frame to be left out, before it is decoded; one is always kept.
    """

    crop_scale: tuple[float, float] = (0.6, 1.0)
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5
    jitter: float = 0.3
    background: float = 0.0
    frame_drop: float = 0.0

    def draw(self) -> ClipChange:
        """Draws what happens to the next clip or image."""
        colour = tuple(torch.randint(256, (3,)).tolist())
        background = colour if torch.rand(()).item() < self.background else None
        crop = self._draw_crop()
        mirrored = torch.rand(()).item() < self.flip
        factors = tuple(_uniform(1 - self.jitter, 1 + self.jitter) for _ in range(3))
        return ClipChange(crop, mirrored, factors, background)

    def drop_frames(self, frames: Sequence[int]) -> list[int]:
        """Leaves out each of the frames' numbers with probability `frame_drop`; when all would go, one stays."""
        if not self.frame_drop:
            return list(frames)
        draws = torch.rand(len(frames))
        kept = [frame for frame, draw in zip(frames, draws.tolist(), strict=True) if draw >= self.frame_drop]
        # The largest draw is as likely to be one frame's as another's.
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
