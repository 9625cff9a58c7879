"""The ``detection`` view of any data set whose clips are frames with boxes: one row per frame that has a box."""

from collections.abc import Mapping

import datasets

from .features import detection_features


def detection_row(
    *, frame_id: str, clip_id: str, live_id: str, image, boxes: list[list[float]], category: str, split: str
) -> dict:
    """Assemble a ``detection`` row; ``image`` is a path or an entry, ``boxes`` are fractions of the frame."""
    return {
        "frame_id": frame_id,
        "clip_id": clip_id,
        "live_id": live_id,
        "image": image,
        "boxes": boxes,
        "category": category,
        "split": split,
    }


def frames_with_boxes(clips: datasets.Dataset, split: str) -> datasets.Dataset:
    """Turn pair or query rows into ``detection`` rows.

    Args:
        clips: rows of the ``pairs`` or ``query`` view. Clips of video files give no rows, because their frames are not
            extracted.
        split: the value of the column ``split``.

    Returns:
        One row per frame with a box; ``frame_id`` is the clip's id and the frame's number in the clip.
    """

    def explode(batch: Mapping[str, list]) -> dict[str, list]:
        rows = [
            detection_row(
                frame_id=f"{clip_id}-{number:04d}",
                clip_id=clip_id,
                live_id=live_id,
                image=frame,
                boxes=[box],
                category=category,
                split=split,
            )
            for clip_id, live_id, category, frames, boxes in zip(
                *(batch[name] for name in ("clip_id", "live_id", "category", "frames", "boxes")), strict=True
            )
            for number, (frame, box) in enumerate(zip(frames, boxes))
            if box is not None
        ]
        return {name: [row[name] for row in rows] for name in detection_features()}

    return clips.map(
        explode, batched=True, batch_size=100, remove_columns=clips.column_names, features=detection_features()
    )
