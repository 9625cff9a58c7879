"""Checks of image settings, and an image processor that resizes as the official code does."""

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
    """The message of transformers about a setting of a wrong type, without its list of attempts per type."""
    match = _WRONG_TYPE.search(" ".join(str(error).split()))
    if match is None:
        return " ".join(str(error).split())
    types = re.sub(r"<(?:class|enum) '([\w.]+)'>|typing\.", r"\1", match["types"]).replace("NoneType", "None")
    return f"`{match['name']}` must be of one of the types {types}, got {match['value']}."


def check_picture_settings(settings: Mapping[str, Any], backend: str) -> None:
    """
    Refuses settings of transformers that would be ignored, would fail without being named, or would give inputs that
    RICE models do not take.

    Args:
        settings: Settings for images or for frames.
        backend: `"torchvision"`, or `"pil"` for images that Pillow resizes.

    Raises:
        ValueError: for such a setting; the message names it.
    """
    if settings.get("data_format") not in (None, "channels_first"):
        raise ValueError(
            f'`data_format` must be "channels_first", the format of the models, got {settings["data_format"]!r}.'
        )
    if settings.get("input_data_format") not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f'`input_data_format` must be "channels_first" or "channels_last", got {settings["input_data_format"]!r}.'
        )
    if settings.get("do_convert_rgb") is False:
        raise ValueError("`do_convert_rgb=False` is not supported, since all images are read as RGB; leave it out.")
    if settings.get("image_seq_length") is not None:
        raise ValueError("`image_seq_length` has no effect, since texts hold no images; leave it out.")
    resample = settings.get("resample")
    if resample is not None and (isinstance(resample, float) or resample not in _RESAMPLE[backend]):
        known = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in _RESAMPLE[backend])
        raise ValueError(f"`resample` must be one of {known}, got {resample!r}.")
    for name in ("image_mean", "image_std"):
        if isinstance(settings.get(name), (list, tuple)) and len(settings[name]) != 3:
            raise ValueError(f"`{name}` must be one number, or one per colour channel, got {settings[name]!r}.")
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
    Stretches an image to `(height, width)`, with the same result for all versions of Pillow.

    Pillow resizes one axis after the other and rounds to 8 bits in between. Up to version 12 it starts with the width.
    Version 13, with which the official preprocessing was recorded, starts with the height if that shrinks much more.
    """
    height, width = size
    vertical_first = picture.height > height and picture.height - height > 2 * (picture.width - width)
    between = (picture.width, height) if vertical_first else (width, picture.height)
    return picture.resize(between, resample).resize((width, height), resample)


def on_device(inputs: BatchFeature, device: str | torch.device | None) -> BatchFeature:
    """Moves outputs of Pillow, which ignores devices, to `device`; arrays are returned unchanged."""
    return inputs if device is None or not isinstance(inputs["pixel_values"], torch.Tensor) else inputs.to(device)


class RicePillowImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with [`resize_with_pillow`], for the exact grey levels of the official code."""

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """As CLIP's image processor. Raises `ValueError` as [`check_picture_settings`]."""
        check_picture_settings(kwargs, self.backend)
        return on_device(super().preprocess(images, **kwargs), kwargs.get("device"))

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """Image `(3, H, W)` -> `(3, height, width)`; types other than uint8 and other sizes as in transformers."""
        if image.dtype != np.uint8 or image.shape[0] != 3 or not (size.height and size.width):
            return super().resize(image, size, resample=resample, **kwargs)
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        resample = PILImageResampling.BICUBIC if resample is None else PILImageResampling(resample)
        return np.array(resize_with_pillow(picture, (size.height, size.width), resample)).transpose(2, 0, 1)


RicePillowImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RicePillowImageProcessor", "check_picture_settings", "on_device", "resize_with_pillow", "type_sentence"]
