"""The one row that every dataset builder of the project yields, in its three views.

``pairs`` rows join a clip with one shop image and are what training reads; ``queries`` rows are clips with the list of
images that answer them; ``gallery`` rows are the shop's images. Images are kept as absolute paths
(``{"path": ..., "bytes": None}``) and decoded by whoever reads the row.
"""

from datasets import Features, Image, List, Value

VIEWS = ("pairs", "queries", "gallery")

_CLIP_TEXT = ("asr", "category", "product_scale", "visible_duration", "product_number")


def _clip_features() -> dict:
    return {
        "clip_id": Value("string"),
        "live_id": Value("string"),
        "product_id": Value("string"),
        "frames": List(Image(decode=False)),
        "boxes": List(List(Value("float32"))),
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
    """Columns of a ``queries`` row: a clip and the ids of the gallery images that answer it."""
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


def view_features(view: str) -> Features:
    """Return the columns of ``view``, one of ``pairs``, ``queries``, ``gallery``."""
    return {"pairs": pair_features, "queries": query_features, "gallery": gallery_features}[view]()


def clip_row(
    *,
    clip_id: str,
    live_id: str = "",
    product_id: str = "",
    frames: list[str],
    boxes: list[list[float] | None],
    video: str = "",
    start: float = -1.0,
    end: float = -1.0,
    **text: str,
) -> dict:
    """Assemble the columns that ``pairs`` and ``queries`` rows share.

    Args:
        frames: absolute paths of the frames, in time order; empty for a clip of a video file.
        boxes: one entry per frame, ``[left, top, right, bottom]`` as fractions of the frame (0 to 1) or None.
        video: absolute path of the video file, or "" for a clip of frames.
        start, end: the clip's time range in seconds within ``video``, -1 when absent.
        text: any of ``asr, category, product_scale, visible_duration, product_number``; the others become "".
    """
    return {
        "clip_id": clip_id,
        "live_id": live_id,
        "product_id": product_id,
        "frames": frames,
        "boxes": boxes,
        "video": video,
        "start": start,
        "end": end,
        **{name: text.pop(name, "") for name in _CLIP_TEXT},
        **text,
    }
