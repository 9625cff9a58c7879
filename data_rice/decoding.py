"""The frames of a clip that can be read, and pixels of 8 bits per channel up to the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvF
from PIL import Image
from transformers.image_utils import PILImageResampling

from processing_rice import MediaError, open_image


def read_frames(
    entries: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    decode: Callable[[Mapping[str, Any]], Any] = open_image,
) -> tuple[dict[int, Any], list[tuple[int, MediaError, str]]]:
    """
    Decodes some frames of a clip. One that cannot be read is replaced by the nearest frame, the earlier of two, that
    was not chosen and can be read.

    Args:
        entries: All frames of the clip.
        chosen: Numbers of the frames that are wanted.
        decode: Raises `MediaError` for an unreadable entry.

    Returns:
        What `decode` gave, by the frame's number in ascending order; and the unreadable frames, each with its number,
        the error, and `"replaced"` or, when no other frame was left, `"left out"`.
    """
    spare = sorted(set(range(len(entries))) - set(chosen))
    read: dict[int, Any] = {}
    unreadable: list[tuple[int, MediaError, str]] = []
    for wanted in chosen:
        errors: list[tuple[int, MediaError]] = []
        candidate: int | None = wanted
        while candidate is not None and candidate not in read:
            try:
                read[candidate] = decode(entries[candidate])
            except MediaError as error:
                errors.append((candidate, error))
                candidate = min(spare, key=lambda i: abs(i - wanted), default=None)
                if candidate is not None:
                    spare.remove(candidate)
        outcome = "left out" if candidate is None else "replaced"
        unreadable += [(i, error, outcome) for i, error in errors]
    return dict(sorted(read.items())), unreadable


def to_pixels(picture: Image.Image | np.ndarray) -> torch.Tensor:
    """A PIL image or `(H, W, 3)` uint8 array as a `(3, H, W)` uint8 tensor whose channels lie together in memory."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def resize_pixels(
    pixels: torch.Tensor, size: tuple[int, int], resample: int = PILImageResampling.BICUBIC
) -> torch.Tensor:
    """
    Resizes pictures in 8 bits with antialiasing, within one grey level of PIL.

    Args:
        pixels (`(..., 3, H, W)` uint8): As `to_pixels` gives them; this layout is what makes it fast.
        size: Height and width.
        resample: PIL's number of the filter.
    """
    interpolation = tvF.InterpolationMode(PILImageResampling(resample).name.lower())
    return tvF.resize(pixels, list(size), interpolation=interpolation, antialias=True)


def normalize_pixels(inputs: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    """
    Does on a batch's device what the processor left undone in 8 bits: rescaling, normalisation, zeros where padded.

    Args:
        inputs: A batch. `pixel_values` and `pixel_values_videos` are changed where they are uint8; everything else is
            handed through.
        processor: The `RiceProcessor` whose rescaling, mean and standard deviation to use.

    Returns:
        The batch with float32 pictures, equal to those of the processor itself to float32 rounding.
    """
    result = dict(inputs)
    for name, part in (
        ("pixel_values", processor.image_processor),
        ("pixel_values_videos", processor.video_processor),
    ):
        pixels = result.get(name)
        if pixels is None or pixels.dtype != torch.uint8:
            continue
        pixels = pixels.float()
        if part.do_rescale:
            pixels *= part.rescale_factor or 1 / 255
        if part.do_normalize:
            pixels = tvF.normalize(pixels, _floats(part.image_mean), _floats(part.image_std), inplace=True)
        if name == "pixel_values_videos" and result.get("frame_mask") is not None:
            pixels.masked_fill_(~result["frame_mask"][:, :, None, None, None], 0)
        result[name] = pixels
    return result


def _floats(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values]


def target_size(part: Any, shape: Sequence[int]) -> tuple[int, int] | None:
    """
    Height and width to which an image or video processor resizes a picture of the height and width `shape`; `None`
    when it does not resize it, or by a rule of its own.
    """
    if not part.do_resize:
        return None
    size = {"height": part.size, "width": part.size} if isinstance(part.size, int) else part.size
    if size.get("height") and size.get("width"):
        return (size["height"], size["width"])
    short = size.get("shortest_edge")
    if not short or size.get("longest_edge"):
        return None
    # Rounded down, as transformers does it.
    height, width = (int(short * side / min(shape)) for side in shape)
    return height, width
