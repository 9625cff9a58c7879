"""Frames of a query row as pictures, for methods that need no processor and for the picture of matches."""

from PIL import Image

from data_rice.collator import decode_image
from processing_rice import read_video, sample_frame_indices


def clip_frames(row: dict, num_frames: int) -> list[tuple[Image.Image, list[float] | None]]:
    """At most `num_frames` frames of a query row, chosen as at test time, each with its box (ltrb, 0 to 1) or None.

    Raises:
        ValueError: the clip has no frames, or one that cannot be read.
        FileNotFoundError: its video file is not there.
    """
    if row.get("video"):
        video = {"path": row["video"], "start": row.get("start"), "end": row.get("end")}
        return [(Image.fromarray(frame), None) for frame in read_video(video, num_frames)]
    if not row["frames"]:
        raise ValueError("the clip has no frames")
    boxes = row.get("boxes") or [None] * len(row["frames"])
    chosen = sample_frame_indices(len(row["frames"]), num_frames)
    return [(decode_image(row["frames"][i]), boxes[i] or None) for i in chosen]
