"""Converts the colours of an image to sRGB, by its colour profile or its gamma."""

import io
from collections.abc import Callable
from functools import lru_cache

from PIL import Image, ImageCms

# Colour space of a profile -> mode of the images that it describes.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# Profiles of sRGB differ in rounding, by at most this many of 255 levels; their images stay as they are.
_SRGB_SLACK = 2
# PNG decoders ignore a gamma that is this close to that of sRGB.
_GAMMA, _GAMMA_SLACK = 2.2, 0.05
# A larger one is an error of the file.
_MAX_GAMMA = 10.0


def to_srgb(image: Image.Image, info: dict) -> Image.Image:
    """
    Converts an image to sRGB.

    A profile that is damaged, or describes another kind of image, is ignored as viewers do.

    Args:
        image: Of mode L, LA, RGB, RGBA or CMYK; of another mode it is returned unchanged.
        info: `info` of the file's image, with `icc_profile`, or with `gamma` and `srgb` of a PNG.

    Returns:
        The image itself if its colours are sRGB; else of mode L, RGB, or with alpha LA, RGBA.
    """
    profile = info.get("icc_profile")
    gamma = info.get("gamma") or 0.0
    if profile:
        transform = _transform(bytes(profile), image.mode.removesuffix("A"))
        if transform is not None:
            return _colors(image, lambda opaque: ImageCms.applyTransform(opaque, transform))
    elif "srgb" not in info and 0 < gamma < _MAX_GAMMA and abs(gamma * _GAMMA - 1) > _GAMMA_SLACK:
        levels = [round(255 * (level / 255) ** (1 / (gamma * _GAMMA))) for level in range(256)]
        if image.mode in ("L", "LA", "RGB", "RGBA"):
            return _colors(image, lambda opaque: opaque.point(levels * len(opaque.getbands())))
    return image


def _colors(image: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """An image with changed colours and the same alpha."""
    if not image.mode.endswith("A"):
        changed = change(image)
    else:
        changed = change(image.convert(image.mode[:-1]))
        changed.putalpha(image.getchannel("A"))
    # So that they are not applied again to what is sRGB now.
    for name in ("icc_profile", "gamma"):
        changed.info.pop(name, None)
    return changed


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of images of a mode to sRGB; `None` if they are sRGB, or the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    if mode == "L":
        samples = Image.linear_gradient("L")
    else:
        samples = Image.new("RGB", (16, 256))
        samples.putdata([(17 * r, 17 * g, 17 * b) for r in range(16) for g in range(16) for b in range(16)])
    changed = ImageCms.applyTransform(samples, transform)
    pairs = zip(samples.convert("RGB").tobytes(), changed.tobytes())
    return transform if any(abs(one - other) > _SRGB_SLACK for one, other in pairs) else None


__all__ = ["to_srgb"]
