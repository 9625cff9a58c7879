"""Makes a row self-contained: chooses frames, reads pictures, reduces large ones and keeps them encoded."""

import io
from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image

from processing_rice import MediaError, open_image, sample_frame_indices
from processing_rice.media_rice import image_header, read_media

_SUFFIX_OF_FORMAT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


class Sampling(NamedTuple):
    """Frames per clip, short side in pixels (0 keeps all frames or sizes) and JPEG quality."""

    num_frames: int
    short_side: int
    quality: int


def reduce_picture(data: bytes, short_side: int, quality: int) -> tuple[bytes, str]:
    """Reduce an encoded picture to a short side.

    Args:
        data: the encoded picture.
        short_side: in pixels; a picture that is not larger is returned byte for byte. 0 keeps every size.
        quality: JPEG quality of a reduced picture, 1 to 100.

    Returns:
        The encoded picture and its file suffix.

    Raises:
        ValueError: the picture cannot be decoded completely.
    """
    try:
        header = image_header(data)
        scale = short_side / min(header[1:]) if short_side else 1.0
        picture = open_image(data, target=(header.height * scale, header.width * scale) if scale < 1 else None)
    except MediaError as error:
        raise ValueError(error.reason) from None
    suffix = _SUFFIX_OF_FORMAT.get(header.format)
    if suffix and scale >= 1:
        return data, suffix
    if short_side and min(picture.size) > short_side:
        scale = short_side / min(picture.size)
        picture = picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), ".jpg"


def _read(entry: Mapping, name: str, sampling: Sampling) -> dict:
    try:
        data = read_media(entry)
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from None
    data, suffix = reduce_picture(data, sampling.short_side, sampling.quality)
    return {"bytes": data, "path": name + suffix}


def _lost(lost: list[dict], row_id: str, entry: Mapping | None, reason: object, what: str, row: str = "kept") -> None:
    file = (entry or {}).get("path") or ""
    lost.append({"id": row_id, "file": file, "reason": str(reason), "what": what, "row": row})


def prepare_row(row: dict, view: str, sampling: Sampling, lost: list[dict]) -> dict | None:
    """Return the row with its pictures inside, or None if it is useless for training.

    An unreadable frame is replaced by the nearest readable one of its clip. A training row without a readable frame or
    image is dropped. A query without frames and a gallery image without a picture stay and count as misses.

    Args:
        row: a row of the view, not changed.
        view: "pairs", "query", "gallery" or "detection".
        sampling: frames and sizes.
        lost: receives one entry per unreadable picture, ``{"id", "file", "reason", "what", "row"}``.

    Raises:
        ValueError: the clip is part of a video file.
    """
    row = dict(row)
    if "frames" in row:
        if row["video"]:
            raise ValueError(f"The clip {row['clip_id']} is part of a video; extract its frames before preparing it.")
        row["frames"], row["boxes"] = _prepare_frames(row, sampling, lost)
        if not row["frames"]:
            stays = view == "query"
            what = "clips in all their frames"
            _lost(lost, row["clip_id"], None, what, what, "kept" if stays else "dropped")
            if not stays:
                return None
    if "image" not in row:
        return row
    row_id = row.get("frame_id") or row["image_id"]
    try:
        row["image"] = _read(row["image"], row_id, sampling)
    except ValueError as error:
        stays = view == "gallery"
        _lost(lost, row.get("clip_id") or row_id, row["image"], error, "images", "kept" if stays else "dropped")
        if not stays:
            return None
        row["image"] = {"bytes": None, "path": row_id}
    return row


def _prepare_frames(row: dict, sampling: Sampling, lost: list[dict]) -> tuple[list[dict], list]:
    entries = row["frames"]
    boxes = row["boxes"] or [None] * len(entries)
    wanted = len(entries) if not sampling.num_frames else min(sampling.num_frames, len(entries))
    chosen = sample_frame_indices(len(entries), wanted, "eval") if wanted else []
    read: dict[int, dict] = {}
    tried: set[int] = set(chosen)
    for index in chosen:
        candidates = [index]
        while candidates:
            candidate = candidates.pop(0)
            try:
                read[candidate] = _read(entries[candidate], f"{row['clip_id']}-{candidate:04d}", sampling)
            except ValueError as error:
                _lost(lost, row["clip_id"], entries[candidate], error, "frames")
                others = (other for other in range(len(entries)) if other not in tried)
                nearest = min(others, key=lambda other: abs(other - index), default=None)
                if nearest is not None:
                    tried.add(nearest)
                    candidates.append(nearest)
    order = sorted(read)
    return [read[index] for index in order], [boxes[index] for index in order]
