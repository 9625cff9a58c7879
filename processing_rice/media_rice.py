"""The one reader of images: files, bytes, opened PIL images, arrays and tensors, all with the same rules.

Two inputs that look the same to a person give the same pixels. `video_media_rice` reads video; its frames follow the
same rules. docs/data.md describes the rules.
"""

import io
import math
import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tvF
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .color_rice import to_srgb

# The formats of shops and livestreams. Some other formats of PIL run external programs or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")

MAX_PIXELS = 100_000_000
"""Images and frames with more pixels than this after reduction are refused; they would need gigabytes."""

MAX_ASPECT = 500
"""Images and frames with one side more than this many times the other are refused. Resized by their shorter side, they
would need gigabytes."""

REDUCTION_MARGIN = 1.2
"""A reduced image keeps this many times the target's sides. With less, the mean difference to full decoding can exceed
2 of 255 grey levels (docs/LOG.md has the measurements)."""

# Tolerance for floats that leave 0..1 by rounding.
_FLOAT_SLACK = 1e-3
_TAR_MEMBER = re.compile(r"(?P<file>.+\.tar)#(?P<offset>[0-9]{1,15}),(?P<size>[0-9]{1,12})", re.DOTALL)


class MediaError(ValueError):
    """
    An image or video that cannot be read. The message names it and says what to do.

    Attributes:
        reason: The problem without the name of the file, such as "cannot be decoded (...)".
    """

    reason = ""

    @classmethod
    def of(cls, message: str, reason: str) -> "MediaError":
        """An error with a reason. It is not a second argument of the class, since an OSError would interpret it."""
        error = cls(message)
        error.reason = reason
        return error


class MissingMediaError(MediaError, FileNotFoundError):
    """The error for a missing image or video file."""


def printable(name: object) -> str:
    """A path as printable text, also if its bytes are not valid text."""
    return str(name).encode(errors="replace").decode()


def media_error(kind: str, name: object, reason: str) -> MediaError:
    """The error for an existing file that cannot be read for a `reason`; `kind` is "image" or "video"."""
    return MediaError.of(f"The {kind} file {printable(name)} {reason}; replace it or leave it out.", reason)


def missing_media_error(kind: str, name: object) -> MediaError:
    """The `MissingMediaError` for a file that does not exist; `kind` is "image" or "video"."""
    return MissingMediaError.of(f"There is no {kind} file {printable(name)}.", "there is no such file")


def tar_member_path(tar_file: str, offset: int, size: int) -> str:
    """The path `FILE.tar#OFFSET,SIZE` of a member of an uncompressed tar file, by its offset and size in bytes."""
    return f"{tar_file}#{offset},{size}"


def split_tar_member(path: str) -> tuple[str, int, int] | None:
    """`(tar file, offset, size)` of a path made by [`tar_member_path`], or `None` for any other path."""
    match = _TAR_MEMBER.fullmatch(path)
    return (match["file"], int(match["offset"]), int(match["size"])) if match else None


def check_is_file(path: str | os.PathLike) -> None:
    """
    Raises:
        OSError: for a pipe or a device, which might never end.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError("it is not a file")


def read_media(entry: Mapping[str, Any]) -> bytes:
    """
    The encoded bytes of an image entry of `datasets`.

    Args:
        entry: With `bytes`, or with `path`: a file or a member of a tar file, see [`tar_member_path`].

    Raises:
        FileNotFoundError: if the file does not exist.
        OSError: if it cannot be read, or the tar file ends before the member does.
        ValueError: if the entry has neither bytes nor a path.
    """
    if entry.get("bytes") is not None:
        return entry["bytes"]
    path = path_of(entry)
    if not path:
        raise ValueError("The image entry has neither bytes nor a path; give it one of them.")
    member = split_tar_member(path)
    if member is None or os.path.isfile(path):
        check_is_file(path)
        with open(path, "rb") as file:
            return file.read()
    tar_file, offset, size = member
    check_is_file(tar_file)
    # The file size is checked first, so that a damaged path cannot make `read` allocate too much memory.
    with open(tar_file, "rb") as file:
        if offset + size > os.fstat(file.fileno()).st_size:
            raise OSError(f"{path}: the tar file ends before this member does; fetch the shard again")
        file.seek(offset)
        return file.read(size)


def is_file_source(source: object) -> bool:
    """Whether an image is given as path, bytes, PIL image or `{"path", "bytes"}`, and not as numbers."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, Mapping, Image.Image))


def is_picture_entry(source: object) -> bool:
    """Whether this is a `{"path", "bytes"}` entry of `datasets` with an image, judged by its path if it has one."""
    if not isinstance(source, Mapping) or "bytes" not in source:
        return False
    suffix = os.path.splitext(path_of(source))[1].lower()
    return not suffix or Image.registered_extensions().get(suffix) in FORMATS


def path_of(source: object) -> str:
    """The path of an image given by a path or by an entry of `datasets`; "" for any other image."""
    path = source.get("path") if isinstance(source, Mapping) else source
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""


def open_image(
    source: str | os.PathLike | bytes | Image.Image | Mapping[str, Any],
    name: str | None = None,
    target: tuple[float, float] | None = None,
    copy: bool = True,
) -> Image.Image:
    """
    Reads an image as an upright 8-bit RGB image. The format of a file is detected by its content.

    Orientation (EXIF, XMP) is applied. Transparent images are laid over white. 16-bit values are scaled from
    0..65,535, and floats from 0..1. Colours are converted to sRGB by the colour profile, or the gamma of a PNG. Other
    colour modes are converted as in PIL.

    Args:
        source: Path, member of a tar file (see [`tar_member_path`]), encoded bytes, PIL image, or `{"path", "bytes"}`
            of `datasets`.
        name: Name for error messages; by default the path.
        target: Height and width in pixels that the image will be resized to. A JPEG is then decoded at 1/2, 1/4 or 1/8
            of its size if that leaves at least `REDUCTION_MARGIN` times the target. This is much faster, but the
            pixels differ slightly from those of full decoding. By default, and in other formats, the full image is
            decoded.
        copy: Whether to copy a PIL image that is upright RGB already. `False` returns the image itself; do not change
            it.

    Raises:
        MediaError: if it is missing (`MissingMediaError`), empty, no image, damaged, larger than `MAX_PIXELS`, longer
            than `MAX_ASPECT`, or has floats outside 0..1.
    """
    if isinstance(source, Image.Image):
        with _named(name or getattr(source, "filename", "") or "<picture>"):
            image = _upright_rgb(source)
            return image.copy() if copy and image is source else image
    with _opened(source, name) as image:
        if target is not None and image.format in ("JPEG", "MPO"):
            _reduce_scale(image, target)
        return _upright_rgb(image)


class ImageHeader(NamedTuple):
    """Header of an image file: PIL's name of the format, and width and height in pixels of the upright image."""

    format: str
    width: int
    height: int


def image_header(source: str | os.PathLike | bytes | Mapping[str, Any]) -> ImageHeader:
    """
    Reads the header of an image file, without its pixels.

    Raises:
        MediaError: as [`open_image`], except for errors in the pixels.
    """
    with _opened(source) as image:
        width, height = image.size
        return ImageHeader(image.format, *((height, width) if _lies_on_its_side(image) else (width, height)))


@contextmanager
def _opened(source: str | os.PathLike | bytes | Mapping[str, Any], name: str | None = None):
    """Opens an image file and reads its header. Errors here and in the block become a `MediaError`."""
    if not is_file_source(source):
        kind = type(source).__name__
        raise MediaError(f'An image must be a path, bytes, a PIL image or {{"path", "bytes"}}, got a {kind}.')
    if not isinstance(source, Mapping):
        source = {"bytes" if isinstance(source, (bytes, bytearray)) else "path": source}
    if source.get("bytes") is None and not path_of(source):
        entry = name or f"with the keys {', '.join(map(repr, source))}" if source else "without keys"
        reason = "has neither bytes nor a path"
        raise MediaError.of(f"The image entry {entry} {reason}; give it one of them.", reason)
    name = name or path_of(source) or "<bytes>"
    try:
        data = read_media(source)
    except FileNotFoundError:
        raise missing_media_error("image", name) from None
    except (OSError, ValueError) as error:
        raise media_error("image", name, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    with _named(name), Image.open(io.BytesIO(data), formats=readable_formats()) as image:
        yield image


@contextmanager
def _named(name: str):
    """Turns errors of the block into a `MediaError`."""
    try:
        yield
    except UnidentifiedImageError as error:
        kinds = ", ".join(readable_formats())
        raise media_error("image", name, f"cannot be decoded (it is none of {kinds}, or damaged)") from error
    # PIL's readers raise many kinds of errors for damaged bytes.
    except Exception as error:
        kind = "" if type(error) is ValueError else type(error).__name__
        reason = ": ".join(filter(None, (kind, str(error))))
        raise media_error("image", name, f"cannot be decoded ({reason})") from error


@cache
def readable_formats() -> tuple[str, ...]:
    """The `FORMATS` that the installed PIL supports."""
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """1 to 8; a value of another kind means nothing."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return int(value) if value in range(1, 9) else 1


def _lies_on_its_side(image: Image.Image) -> bool:
    # PIL returns the upright size of a TIFF with this tag before its pixels are turned.
    is_upright = image.format == "TIFF" and ExifTags.Base.Orientation in image.tag_v2
    return not is_upright and _orientation(image) >= 5


def _reduce_scale(image: Image.Image, target: tuple[float, float]) -> None:
    """Chooses libjpeg's decoding scale; it must be set before the pixels are read."""
    height, width = (math.ceil(side * REDUCTION_MARGIN) for side in target)
    if _lies_on_its_side(image):
        height, width = width, height
    image.draft(None, (width, height))


def _upright_rgb(image: Image.Image) -> Image.Image:
    check_pixels(*image.size)
    _rescale_transparent_level(image)
    image.load()
    if image.format == "GIF":
        image = _clear_around_first_frame(image)
    # `exif_transpose` would copy an image that is already upright.
    return _to_rgb(image if _orientation(image) == 1 else ImageOps.exif_transpose(image))


def _rescale_transparent_level(image: Image.Image) -> None:
    """Scales the transparent grey level of a PNG of 2 or 4 bits to 8 bits, as PIL will scale its pixels."""
    transparent = image.info.get("transparency")
    is_stored = image.format == "PNG" and image.mode == "L" and isinstance(transparent, int) and image.tile
    scale = {"L;2": 85, "L;4": 17}.get(image.tile[0][3]) if is_stored else None
    if scale is not None:
        image.info["transparency"] = transparent * scale


def _clear_around_first_frame(image: Image.Image) -> Image.Image:
    """A GIF whose first frame is smaller than the whole, which PIL fills with colour 0, is transparent around it."""
    box = getattr(image, "dispose_extent", None)
    if box in (None, (0, 0, *image.size)) or image.tell() or image.has_transparency_data:
        return image
    cleared = Image.new("RGBA", image.size)
    cleared.paste(image.convert("RGB").crop(box), box)
    return cleared


def check_pixels(width: int, height: int, max_pixels: int | None = None) -> None:
    """
    Raises:
        ValueError: for more than `max_pixels` pixels, by default `MAX_PIXELS`, and for a strip, see `MAX_ASPECT`.
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > limit:
        raise ValueError(f"{width} x {height} pixels, more than the {limit:,} that are read")
    if _is_strip(width, height):
        raise ValueError(f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other")


def _is_strip(width: int, height: int) -> bool:
    return max(width, height) > MAX_ASPECT * max(1, min(width, height))


def _to_rgb(image: Image.Image) -> Image.Image:
    info = image.info
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        image = _from_floats(image)
    elif image.has_transparency_data:
        image = _with_alpha(image)
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    image = to_srgb(image, info)
    return flatten(image) if image.has_transparency_data else image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its integers are not all in 0..65,535, so black and white are unknown")
    if _is_signed_16(image):
        raise ValueError("its 16-bit integers are signed, so black and white are unknown")
    # Rounded to the nearest of 256 levels.
    levels = ((values * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return _grey(levels, image)


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not in_unit_range(torch.from_numpy(values.copy())):
        raise ValueError("its floats are not all in 0..1, so black and white are unknown")
    levels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return _grey(levels, image)


def _grey(levels: np.ndarray, image: Image.Image) -> Image.Image:
    """An image of mode L of the grey levels of an image. If 0 is white in a TIFF, PIL inverts 8 bits only."""
    is_white_zero = _tiff_tag(image, ExifTags.Base.PhotometricInterpretation) == 0
    return Image.fromarray(255 - levels if is_white_zero else levels)


def _is_signed_16(image: Image.Image) -> bool:
    tags = (ExifTags.Base.SampleFormat, ExifTags.Base.BitsPerSample)
    return [_tiff_tag(image, tag) for tag in tags] == [2, 16]


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def _with_alpha(image: Image.Image) -> Image.Image:
    """An image with transparency as LA or RGBA."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # PIL reduces 16-bit pixels to their upper eight bits, but not the colour that marks transparent pixels.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    mode = "LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"
    return image if image.mode == mode else image.convert(mode)


def flatten(image: Image.Image) -> Image.Image:
    """An image with transparency as RGB over white; the colour of transparent pixels is ignored."""
    image = _with_alpha(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def in_unit_range(values: torch.Tensor) -> bool:
    """Whether all numbers are in 0..1, up to rounding; NaN is not."""
    return bool(((values >= -_FLOAT_SLACK) & (values <= 1 + _FLOAT_SLACK)).all())


def picture_tensor(
    picture: Any, name: str = "A picture", any_range: bool = False, layout: str | None = None
) -> torch.Tensor:
    """
    One image of any kind as a `(3, H, W)` tensor: uint8, or float32 in 0..1 for floats.

    Args:
        picture: As [`open_image`] takes it, or an array or tensor `(H, W)`, `(H, W, 3)` or `(3, H, W)` of uint8 or of
            floats in 0..1.
        name: Name of an array or tensor in error messages; files are named by their path.
        any_range: Accept floats in any range, for a caller that does not rescale.
        layout: `"channels_first"` or `"channels_last"`, for ambiguous shapes. By default the channel axis is the one
            with three entries; if both have three, the first.

    Raises:
        MediaError: for a file that cannot be read, see [`open_image`].
        ValueError: for numbers of another type, range or shape.
    """
    if is_file_source(picture):
        return tvF.pil_to_tensor(open_image(picture, copy=False))
    try:
        # Arrays may have negative strides or be read-only; tensors cannot.
        values = torch.as_tensor(
            np.require(picture, requirements="CW") if isinstance(picture, np.ndarray) else picture
        )
    except (TypeError, ValueError, RuntimeError):
        kind = getattr(picture, "dtype", type(picture).__name__)
        raise ValueError(f"{name} must be an image, a path, or hold uint8 or floats in 0..1, got {kind}.") from None
    if values.is_meta or values.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor that holds values; it is sparse, or on the device `meta`.")
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise ValueError(f"{name} must hold uint8 or floats in 0..1, got {values.dtype}; convert it to uint8.")
    if values.dim() == 2:
        values, layout = values[None].expand(3, -1, -1), "channels_first"
    if values.dim() != 3 or 3 not in (values.shape[0], values.shape[-1]) or not values.numel():
        raise ValueError(f"{name} must be (H, W, 3) or (3, H, W), got shape {tuple(values.shape)}.")
    channels = -1 if layout == "channels_last" or (layout is None and values.shape[0] != 3) else 0
    if values.shape[channels] != 3:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, which does not fit `input_data_format` {str(layout)!r}."
        )
    height, width = values.movedim(channels, 0).shape[1:]
    if _is_strip(width, height):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, one side more than {MAX_ASPECT} times the other.")
    if values.is_floating_point() and not any_range and not in_unit_range(values):
        low, high = values.min().item(), values.max().item()
        raise ValueError(
            f"{name} must hold uint8 or floats in 0..1, got floats from {low:g} to {high:g}; give 0..255 as uint8, or "
            f"set `do_rescale=False`."
        )
    if values.is_floating_point() and any_range and not values.isfinite().all():
        raise ValueError(f"{name} must hold finite numbers, but some are NaN or infinite; replace them.")
    values = values.float() if values.is_floating_point() else values
    return values.movedim(channels, 0)


__all__ = [
    "FORMATS",
    "MAX_ASPECT",
    "MAX_PIXELS",
    "MediaError",
    "MissingMediaError",
    "check_is_file",
    "check_pixels",
    "flatten",
    "image_header",
    "is_file_source",
    "is_picture_entry",
    "media_error",
    "missing_media_error",
    "open_image",
    "path_of",
    "picture_tensor",
    "printable",
    "read_media",
    "split_tar_member",
    "tar_member_path",
]
