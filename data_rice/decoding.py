"""Encoded pictures to pixels: exactly, or fast (large JPEGs at reduced scale, 8 bits per channel up to the device)."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvF
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import PILImageResampling

from .media import read_media

# What shops and livestreams publish. Others that PIL knows run foreign programs or read further files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

MAX_PIXELS = 100_000_000
"""Pictures are refused that have more pixels than this after reduction; they would take gigabytes to decode."""

REDUCTION_MARGIN = 1.2
"""A reduced picture keeps this many times the target's sides: with less than that, the difference to the exact way can
pass 2 of 255 grey levels on average (docs/LOG.md has the measurements)."""


class MediaError(ValueError):
    """An image or clip that cannot be read; the message names the file and the reason."""


def decode_image(entry: Mapping[str, Any], target: tuple[float, float] | None = None) -> Image.Image:
    """
    Decodes a row's image entry `{"path", "bytes"}` to RGB, upright. The format is told by the content.

    Args:
        entry: As `data_rice.media.read_media` reads it.
        target: Height and width in pixels that the picture is to be reduced to. A JPEG is then decoded at 1/2, 1/4
            or 1/8 of its size where that leaves `REDUCTION_MARGIN` times as much; a fraction of the work, and not
            quite what decoding it whole gives. By default, and in other formats, the whole picture is decoded.

    Raises:
        MediaError: when the file is missing, empty, no image, damaged, or larger than `MAX_PIXELS`.
    """
    name = entry.get("path") or "<bytes>"
    try:
        data = read_media(entry)
    except FileNotFoundError:
        raise MediaError(f"{name}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: cannot be read ({error})") from error
    try:
        with Image.open(io.BytesIO(data), formats=_readable_formats()) as image:
            if target is not None and image.format in ("JPEG", "MPO"):
                _reduce_scale(image, target)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are read")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    # PIL's readers raise whatever their parsing of damaged bytes runs into.
    except Exception as error:
        raise MediaError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


@cache
def _readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed PIL was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reduce_scale(image: Image.Image, target: tuple[float, float]) -> None:
    """Chooses libjpeg's scale, which must happen before the pixels are read."""
    height, width = (math.ceil(side * REDUCTION_MARGIN) for side in target)
    # Orientations 5 to 8 lie on their side.
    if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
        height, width = width, height
    image.draft(None, (width, height))


def read_frames(
    entries: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    decode: Callable[[Mapping[str, Any]], Any] = decode_image,
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


def target_size(part: Any) -> tuple[int, int] | None:
    """Height and width to which an image or video processor resizes, or `None` when it does not or keeps the shape."""
    if not part.do_resize:
        return None
    size = part.size
    if isinstance(size, int):
        return (size, size)
    if not size.get("height") or not size.get("width"):
        return None
    return (size["height"], size["width"])
