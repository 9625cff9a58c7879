"""What settings pictures may have, and their resizing as the official code does it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling, SizeDict

_RESAMPLE = {"pil": tuple(PILImageResampling)}
_RESAMPLE["torchvision"] = tuple(filter for filter in PILImageResampling if filter.name not in ("BOX", "HAMMING"))
_SIZES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})
_WRONG_TYPE = re.compile(
    r"Field '(?P<name>\w+)' with value (?P<value>.*?) doesn't match any type in \((?P<types>.*?)\)\. Errors: "
)


def type_sentence(error: Exception) -> str:
    """What transformers says of a setting of a wrong type, without its account of every type that was tried."""
    match = _WRONG_TYPE.search(" ".join(str(error).split()))
    if match is None:
        return " ".join(str(error).split())
    types = re.sub(r"<(?:class|enum) '([\w.]+)'>|typing\.", r"\1", match["types"]).replace("NoneType", "None")
    return f"`{match['name']}` must be of one of the types {types}, got {match['value']}."


def check_picture_settings(settings: Mapping[str, Any], backend: str) -> None:
    """
    ValueError for settings of transformers that would be ignored, fail without being named, or give what no model of
    RICE takes.

    Args:
        settings: For images or for frames.
        backend: `"torchvision"`, or `"pil"` for pictures that are resized by Pillow.
    """
    if settings.get("data_format") not in (None, "channels_first"):
        raise ValueError(
            f'`data_format` must be "channels_first", as models take pictures, got {settings["data_format"]!r}.'
        )
    if settings.get("input_data_format") not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f'`input_data_format` must be "channels_first" or "channels_last", got {settings["input_data_format"]!r}.'
        )
    if settings.get("do_convert_rgb") is False:
        raise ValueError("`do_convert_rgb=False` is not possible: every picture is read as RGB; leave it out.")
    if settings.get("image_seq_length") is not None:
        raise ValueError("`image_seq_length` has no meaning here: no text holds pictures; leave it out.")
    resample = settings.get("resample")
    if resample is not None and (isinstance(resample, float) or resample not in _RESAMPLE[backend]):
        known = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in _RESAMPLE[backend])
        raise ValueError(f"`resample` must be one of {known}, got {resample!r}.")
    for name in ("image_mean", "image_std"):
        if isinstance(settings.get(name), (list, tuple)) and len(settings[name]) != 3:
            raise ValueError(f"`{name}` must be a number, or one for each of three colours, got {settings[name]!r}.")
    for name, lowest in (("image_mean", -np.inf), ("image_std", 0), ("rescale_factor", 0)):
        numbers = np.asarray(1.0 if settings.get(name) is None else settings[name])
        if np.issubdtype(numbers.dtype, np.number) and not ((numbers > lowest) & (numbers < np.inf)).all():
            wanted = "finite" if name == "image_mean" else "finite and above 0"
            raise ValueError(f"`{name}` must be {wanted}, got {settings[name]!r}.")
    size = settings.get("size")
    if size and isinstance(size, (Mapping, SizeDict)) and set(dict(size)) not in _SIZES:
        raise ValueError(
            f"`size` must be a number of pixels, or name height and width, or shortest_edge, got {dict(size)!r}."
        )
    for name in ("size", "crop_size", "pad_size"):
        sides = settings.get(name)
        sides = (
            dict(sides).values()
            if isinstance(sides, (Mapping, SizeDict))
            else np.atleast_1d(1 if sides is None else sides)
        )
        if min(sides, default=0) < 1:
            raise ValueError(f"`{name}` must be at least 1 pixel, got {settings[name]!r}.")
    try:
        torch.device(settings.get("device") or "cpu")
    except (RuntimeError, TypeError):
        raise ValueError(f"`device` must name a device of torch, got {settings['device']!r}.") from None


def resize_with_pillow(picture: Image.Image, size: Sequence[int], resample: PILImageResampling) -> Image.Image:
    """
    Stretches a picture to `(height, width)`, the same whichever version of Pillow is installed.

    Pillow resizes one axis after the other and rounds to 8 bits in between. Up to version 12 the width goes first;
    version 13, by which the official preprocessing was recorded, starts with the height where that shrinks much more.
    """
    height, width = size
    vertical_first = picture.height > height and picture.height - height > 2 * (picture.width - width)
    between = (picture.width, height) if vertical_first else (width, picture.height)
    return picture.resize(between, resample).resize((width, height), resample)


def on_device(inputs: BatchFeature, device: str | torch.device | None) -> BatchFeature:
    """What Pillow made, which knows no device, where `device` asks for it; arrays stay as they are."""
    return inputs if device is None or not isinstance(inputs["pixel_values"], torch.Tensor) else inputs.to(device)


class RicePillowImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with [`resize_with_pillow`], for the grey levels of the official code."""

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """As CLIP's; ValueError for settings that would be ignored, see [`check_picture_settings`]."""
        check_picture_settings(kwargs, self.backend)
        return on_device(super().preprocess(images, **kwargs), kwargs.get("device"))

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """Picture `(3, H, W)` -> `(3, height, width)`; other than uint8 and named sides as transformers does it."""
        if image.dtype != np.uint8 or image.shape[0] != 3 or not (size.height and size.width):
            return super().resize(image, size, resample=resample, **kwargs)
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        resample = PILImageResampling.BICUBIC if resample is None else PILImageResampling(resample)
        return np.array(resize_with_pillow(picture, (size.height, size.width), resample)).transpose(2, 0, 1)


RicePillowImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RicePillowImageProcessor", "check_picture_settings", "on_device", "resize_with_pillow", "type_sentence"]
