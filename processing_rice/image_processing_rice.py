"""The resizing of pictures as the official code does it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling


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


class RicePillowImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with [`resize_with_pillow`], for the grey levels of the official code."""

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """Picture `(3, H, W)` -> `(3, height, width)`; other than uint8 and named sides as transformers does it."""
        if image.dtype != np.uint8 or image.shape[0] != 3 or not (size.height and size.width):
            return super().resize(image, size, resample=resample, **kwargs)
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        resample = PILImageResampling.BICUBIC if resample is None else PILImageResampling(resample)
        return np.array(resize_with_pillow(picture, (size.height, size.width), resample)).transpose(2, 0, 1)


RicePillowImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["RicePillowImageProcessor", "resize_with_pillow"]
