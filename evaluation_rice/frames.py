"""Pictures of a dataset row for methods that need no processor, and for the picture of matches."""

import io
import math
import os

import numpy as np
from PIL import Image, ImageOps


def open_image(entry: dict) -> Image.Image:
    """RGB image, upright, of an undecoded `datasets` image `{"path": ..., "bytes": ...}`; bytes go before the path.

    Raises whatever Pillow raises for a file that it cannot read, and `FileNotFoundError` for one that is not there.
    """
    source = io.BytesIO(entry["bytes"]) if entry.get("bytes") else entry.get("path")
    if not source:
        raise FileNotFoundError("the row holds neither a path nor bytes of an image")
    with Image.open(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def spaced(total: int, count: int) -> list[int]:
    """At most `count` positions of `total`, evenly spaced from the start; the end is left out, as at test time."""
    return list(range(total)) if total <= count else [i * total // count for i in range(count)]


def read_video(path: str, num_frames: int, start: float = -1.0, end: float = -1.0) -> list[Image.Image]:
    """Evenly spaced frames of a video file, or of its range in seconds; a negative bound is no bound.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the range holds no frame.
    """
    from transformers.utils import is_torchcodec_available
    from transformers.video_utils import load_video

    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no video file {path}")

    def choose(metadata, **_):
        first = int(start * metadata.fps) if start is not None and start > 0 else 0
        last = metadata.total_num_frames
        if end is not None and end >= 0:
            last = min(last, math.ceil(end * metadata.fps))
        if first >= last:
            raise ValueError(f"the range {start} to {end} s of {path} holds no frame")
        return np.array(spaced(last - first, num_frames)) + first

    backend = "torchcodec" if is_torchcodec_available() else "pyav"
    frames, _ = load_video(path, backend=backend, sample_indices_fn=choose)
    return [Image.fromarray(frame) for frame in np.asarray(frames)]


def clip_frames(row: dict, num_frames: int) -> list[tuple[Image.Image, list[float] | None]]:
    """At most `num_frames` evenly spaced frames of a query row, each with its box (ltrb, 0 to 1) or None.

    Raises `ValueError` for a clip without frames, and what `open_image` and `read_video` raise.
    """
    if row.get("video"):
        frames = read_video(row["video"], num_frames, row.get("start"), row.get("end"))
        return [(frame, None) for frame in frames]
    if not row["frames"]:
        raise ValueError("the clip has no frames")
    boxes = row.get("boxes") or [None] * len(row["frames"])
    return [(open_image(row["frames"][i]), boxes[i] or None) for i in spaced(len(row["frames"]), num_frames)]
