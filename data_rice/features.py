"""Columns of the rows that every dataset builder yields, per view.

``pairs`` rows, for training, hold a clip and one shop image. ``query`` rows hold a clip and its relevant images.
``gallery`` rows are the shop's images. ``detection`` rows are single frames with their boxes. Images stay encoded
(``{"path": ..., "bytes": ...}``, see `processing_rice.media_rice.read_media`); the reader of a row decodes them.
"""

from collections.abc import Sequence

from datasets import Features, Image, List, Value

VIEWS = ("pairs", "query", "gallery", "detection")


def view_name(view: str) -> str:
    """Return the name of a view, which is also a part's name in a published data set; accepts "queries" too."""
    return "query" if view == "queries" else view


_CLIP_TEXT = ("asr", "category", "product_scale", "visible_duration", "product_number", "source")


def _clip_features() -> dict:
    return {
        "clip_id": Value("string"),
        "live_id": Value("string"),
        "product_id": Value("string"),
        "frames": List(Image(decode=False)),
        "boxes": List(List(Value("float32"))),
        "box_frames": List(Value("int32")),
        "video": Value("string"),
        "start": Value("float32"),
        "end": Value("float32"),
        **{name: Value("string") for name in _CLIP_TEXT},
    }


def pair_features() -> Features:
    """Columns of a ``pairs`` row: a clip, the shop image of its product, and that image's id and title."""
    return Features(
        {
            **_clip_features(),
            "image_id": Value("string"),
            "image": Image(decode=False),
            "title": Value("string"),
        }
    )


def query_features() -> Features:
    """Columns of a ``query`` row: a clip and the ids of its relevant gallery images."""
    return Features({**_clip_features(), "relevant": List(Value("string"))})


def gallery_features() -> Features:
    """Columns of a ``gallery`` row: one shop image; ``live_id`` is "" where there are no livestreams."""
    return Features(
        {
            "image_id": Value("string"),
            "live_id": Value("string"),
            "image": Image(decode=False),
            "title": Value("string"),
        }
    )


def detection_features() -> Features:
    """Columns of a ``detection`` row: one frame and all its product boxes, as fractions of the frame."""
    return Features(
        {
            "frame_id": Value("string"),
            "clip_id": Value("string"),
            "live_id": Value("string"),
            "image": Image(decode=False),
            "boxes": List(List(Value("float32"))),
            "category": Value("string"),
            "split": Value("string"),
        }
    )


def view_features(view: str) -> Features:
    """Return the columns of ``view``, one of ``pairs``, ``query``, ``gallery``, ``detection``."""
    return {
        "pairs": pair_features,
        "query": query_features,
        "gallery": gallery_features,
        "detection": detection_features,
    }[view]()


def clip_row(
    *,
    clip_id: str,
    live_id: str = "",
    product_id: str = "",
    frames: list[str],
    boxes: list[list[float] | None],
    box_frames: Sequence[int] = (),
    video: str = "",
    start: float = -1.0,
    end: float = -1.0,
    **text: str,
) -> dict:
    """Assemble the columns that ``pairs`` and ``query`` rows share.

    Args:
        frames: absolute paths of the frames, in time order; empty for a clip of a video file.
        boxes: one entry per frame: ``[left, top, right, bottom]`` as fractions of the frame (0 to 1), or None. For a
            clip of a video file, one entry per number in ``box_frames``.
        box_frames: numbers of the video frames to which ``boxes`` belong, counted from 0 at the start of the clip's
            time range. Other frames have no box. Empty for a clip of frames.
        video: absolute path of the video file, or "" for a clip of frames.
        start, end: the clip's time range in seconds within ``video``, -1 when absent.
        text: any of ``asr, category, product_scale, visible_duration, product_number, source``; "" by default.
    """
    return {
        "clip_id": clip_id,
        "live_id": live_id,
        "product_id": product_id,
        "frames": frames,
        "boxes": boxes,
        "box_frames": list(box_frames),
        "video": video,
        "start": start,
        "end": end,
        **{name: text.pop(name, "") for name in _CLIP_TEXT},
        **text,
    }
