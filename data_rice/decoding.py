"""Decoding of a clip's readable frames, and 8-bit pixels that are normalised on the device."""

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
    Decodes some frames of a clip. An unreadable frame is replaced by the nearest readable frame that was not chosen;
    of two equally near ones, by the earlier.

    Args:
        entries: All frames of the clip.
        chosen: Numbers of the frames to decode.
        decode: Raises `MediaError` for an unreadable entry.

    Returns:
        The results of `decode` by frame number, in ascending order; and the unreadable frames, each with its number,
        the error, and `"replaced"` or (if no other frame was left) `"left out"`.
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
    """A PIL image or `(H, W, 3)` uint8 array as a `(3, H, W)` uint8 tensor in channels-last memory layout."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


def resize_pixels(
    pixels: torch.Tensor, size: tuple[int, int], resample: int = PILImageResampling.BICUBIC
) -> torch.Tensor:
    """
    Resizes pictures in 8 bits with antialiasing, within one grey level of PIL.

    Args:
        pixels (`(..., 3, H, W)` uint8): Pictures as `to_pixels` returns them; their memory layout makes this fast.
        size: Height and width.
        resample: Filter, as PIL's number.
    """
    interpolation = tvF.InterpolationMode(PILImageResampling(resample).name.lower())
    return tvF.resize(pixels, list(size), interpolation=interpolation, antialias=True)


def normalize_pixels(inputs: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    """
    Finishes 8-bit pictures on their device: rescaling, normalisation, zeros in padded frames.

    Args:
        inputs: A batch. `pixel_values` and `pixel_values_videos` change if they are uint8. Everything else stays the
            same.
        processor: The `RiceProcessor` that gives rescaling, mean and standard deviation.

    Returns:
        The batch with float32 pictures, equal to the processor's own up to float32 rounding.
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
    Height and width to which an image or video processor resizes a picture of height and width `shape`; `None` if it
    does not resize, or resizes by another rule.
    """
    if not part.do_resize:
        return None
    size = {"height": part.size, "width": part.size} if isinstance(part.size, int) else part.size
    if size.get("height") and size.get("width"):
        return (size["height"], size["width"])
    short = size.get("shortest_edge")
    if not short or size.get("longest_edge"):
        return None
    # Rounded down, as in transformers.
    height, width = (int(short * side / min(shape)) for side in shape)
    return height, width
