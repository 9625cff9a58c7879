"""Frames of a query row as pictures, for methods without a processor and for the picture of matches."""

from PIL import Image

from data_rice.decoding import read_frames
from processing_rice import sample_frame_indices
from processing_rice.video_media_rice import sample_video


def clip_frames(
    row: dict, num_frames: int, failures: list[dict] | None = None
) -> list[tuple[Image.Image, list[float] | None]]:
    """At most `num_frames` frames of a query row, chosen as at test time, each with its box (ltrb, 0 to 1) or None.

    An unreadable frame is replaced or left out as in the collator, and appended to `failures`.

    Raises:
        ValueError: the clip has no readable frame.
        FileNotFoundError: its video file does not exist.
    """
    if row.get("video"):
        video = {"path": row["video"], "start": row.get("start"), "end": row.get("end")}
        known = dict(zip(row.get("box_frames") or [], row.get("boxes") or [], strict=False))
        return [(frame, known.get(number)) for number, frame in sample_video(video, num_frames).items()]
    if not row["frames"]:
        raise ValueError("the clip has no frames")
    boxes = row.get("boxes") or [None] * len(row["frames"])
    chosen = sample_frame_indices(len(row["frames"]), num_frames)
    frames, unreadable = read_frames(row["frames"], chosen)
    if not frames:
        raise unreadable[0][1]
    if failures is not None:
        failures += [
            {
                "id": row["clip_id"],
                "file": row["frames"][i].get("path") or "",
                "reason": str(error),
                "outcome": outcome,
            }
            for i, error, outcome in unreadable
        ]
    return [(frame, boxes[i] or None) for i, frame in frames.items()]
