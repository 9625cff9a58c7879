"""`datasets` builder for your own data: ``gallery.jsonl``, ``clips_{train,val,test}.jsonl``, media files.

docs/data.md describes the format with an example. Keys that are not listed there are ignored.
"""

from dataclasses import dataclass
from os import path as osp

import datasets
import numpy as np

from .. import parsing
from ..builder import ProblemLog, ViewBuilder, ViewConfig
from ..features import clip_row
from ..paths import MediaRoot

GALLERY_FILE = "gallery.jsonl"
CLIP_FILES = {"train": "clips_train.jsonl", "validation": "clips_val.jsonl", "test": "clips_test.jsonl"}
GALLERY_KEYS = ("gallery_id", "image", "title", "name", "category", "live_id")
CLIP_TEXT_KEYS = ("asr", "category", "product_scale", "visible_duration", "product_number")
CLIP_KEYS = ("query_id", "frames", "boxes", "video", "start", "end", "gt_gallery_ids", "live_id", *CLIP_TEXT_KEYS)
SPLITS = {"train": datasets.Split.TRAIN, "validation": datasets.Split.VALIDATION, "test": datasets.Split.TEST}

# People and tools draw boxes slightly beyond the frame. Boxes beyond this limit are in another unit.
_BOX_TOLERANCE = 0.1
_LONGEST_VIDEO = 1e6


@dataclass(eq=False)
class ShopClipsConfig(ViewConfig):
    """Config of `ShopClips`; it has no further options."""

    def source_paths(self) -> list[str]:
        """See `ViewConfig.source_paths`."""
        return [osp.join(self.data_dir, name) for name in (GALLERY_FILE, *CLIP_FILES.values())]


class ShopClips(ViewBuilder):
    """A shop's images and clips of its products as pairs, queries and gallery (train, validation, test).

    The gallery is the same in all splits. A clip's product is the first of its ``gt_gallery_ids``. If gallery rows
    have a ``live_id``, every row must have one, and a clip is searched among the images of its own livestream.

    Example:
        >>> builder = ShopClips("query", data_dir="data/grocerystore")
        >>> builder.download_and_prepare()
        >>> test = builder.as_dataset(split="test")
    """

    BUILDER_CONFIG_CLASS = ShopClipsConfig
    BUILDER_CONFIGS = [ShopClipsConfig(name=view) for view in ("pairs", "query", "gallery")]

    def _split_generators(self, dl_manager):
        root = self.config.data_dir
        splits = [split for split, name in CLIP_FILES.items() if osp.isfile(osp.join(root, name))]
        if self.view == "gallery":
            splits = list(CLIP_FILES)
        if not splits:
            raise FileNotFoundError(
                f"{root} has none of {', '.join(CLIP_FILES.values())}; write the clips of each split there."
            )
        gallery = read_gallery(root)
        return [
            datasets.SplitGenerator(name=SPLITS[split], gen_kwargs={"split": split, "gallery": gallery})
            for split in splits
        ]

    def missing_split_reason(self, split: str) -> str:
        """See `ViewBuilder.missing_split_reason`."""
        file = osp.join(self.config.data_dir, CLIP_FILES[split])
        return f"{file} does not exist, so there is no {split} split; write its clips there."

    def generate_rows(self, split: str, problems: ProblemLog, gallery: dict[str, dict]):
        """See `ViewBuilder.generate_rows`."""
        if self.view == "gallery":
            for image in gallery.values():
                yield {name: image[name] for name in ("image_id", "live_id", "image", "title")}
            return
        file = osp.join(self.config.data_dir, CLIP_FILES[split])
        for line, clip, relevant in _read_clips(self.config.data_dir, file, gallery):
            empty = not clip["frames"] and not clip["video"]
            if self.view == "query":
                if empty:
                    problems.add(clip["clip_id"], file, line, "kept without frames, so they count as misses")
                if not relevant:
                    problems.add(clip["clip_id"], file, line, "kept without a relevant image, so they count as misses")
                yield {**clip, "relevant": relevant}
            elif empty:
                problems.add(clip["clip_id"], file, line, "left out because they have no frames")
            elif not relevant:
                problems.add(clip["clip_id"], file, line, "left out because gt_gallery_ids is empty")
            else:
                image = gallery[relevant[0]]
                yield {**clip, "image_id": relevant[0], "image": image["image"], "title": image["title"]}


def carries_live_ids(root: str) -> bool:
    """Return whether the first row of ``gallery.jsonl`` has a ``live_id``; then all rows must have one."""
    return any(bool(row.get("live_id")) for _, row in _first(parsing.read_json_lines(osp.join(root, GALLERY_FILE))))


def _first(items):
    for item in items:
        yield item
        return


def text_value(row: dict, name: str) -> str:
    """Return a text value: "" if absent or null, numbers as written."""
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if parsing.is_number(value):
        return str(value)
    raise ValueError(f"{name} must be text, found a {type(value).__name__}")


def id_value(row: dict, name: str) -> str:
    """Return an id; raises ValueError if it is absent, empty or not a valid id."""
    value = optional_id(row, name)
    if not value:
        raise ValueError(f"{name} is missing or empty")
    return value


def optional_id(row: dict, name: str) -> str:
    """Return an id, "" if it is absent or empty."""
    value = row.get(name)
    if value in (None, ""):
        return ""
    try:
        return parsing.id_text(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def read_gallery(root: str) -> dict[str, dict]:
    """Read ``gallery.jsonl`` as image id -> row (image_id, live_id, image, title, category), in file order.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a row is malformed, an id appears twice, or the gallery is empty.
    """
    file = osp.join(root, GALLERY_FILE)
    gallery: dict[str, dict] = {}
    with_live_ids = None
    media = MediaRoot(root)
    for line, row in parsing.read_json_lines(file):
        try:
            image_id = id_value(row, "gallery_id")
            if image_id in gallery:
                raise ValueError(f"the gallery_id {image_id!r} appears a second time")
            live_id = optional_id(row, "live_id")
            if with_live_ids is None:
                with_live_ids = bool(live_id)
            if bool(live_id) != with_live_ids:
                raise ValueError("some gallery rows have a live_id and some have none; give one to all or to none")
            gallery[image_id] = {
                "image_id": image_id,
                "live_id": live_id,
                "image": media.path(row.get("image"), "image path"),
                "title": text_value(row, "title") or text_value(row, "name"),
                "category": text_value(row, "category"),
            }
        except ValueError as error:
            raise parsing.row_error(file, line, f"{error}; repair the row.") from None
    if not gallery:
        raise ValueError(f"{file} holds no image; write one JSON object per shop image.")
    return gallery


def _read_clips(root: str, file: str, gallery: dict[str, dict]):
    """Yield ``(line, clip columns, relevant image ids)`` of a clip file."""
    lives = {image["live_id"] for image in gallery.values()}
    seen: set[str] = set()
    media = MediaRoot(root)
    for line, row in parsing.read_json_lines(file):
        try:
            clip_id = id_value(row, "query_id")
            if clip_id in seen:
                raise ValueError(f"the query_id {clip_id!r} appears a second time")
            seen.add(clip_id)
            live_id = check_live_id(optional_id(row, "live_id"), lives)
            relevant = check_relevant(row.get("gt_gallery_ids"), live_id, gallery)
            frames, boxes = frames_and_boxes(media, row)
            video, start, end = video_range(media, row)
            text = {name: text_value(row, name) for name in CLIP_TEXT_KEYS}
            text["category"] = text["category"] or (gallery[relevant[0]]["category"] if relevant else "")
            clip = clip_row(
                clip_id=clip_id,
                live_id=live_id,
                product_id=relevant[0] if relevant else "",
                frames=frames,
                boxes=boxes,
                video=video,
                start=start,
                end=end,
                **text,
            )
        except ValueError as error:
            raise parsing.row_error(file, line, f"{error}; repair the row.") from None
        yield line, clip, relevant


def check_live_id(live_id: str, lives: set[str]) -> str:
    if lives == {""}:
        return live_id
    if not live_id:
        raise ValueError("live_id is missing, but the gallery's images belong to livestreams")
    if live_id not in lives:
        raise ValueError(f"the livestream {live_id!r} has an empty gallery")
    return live_id


def check_relevant(value: object, live_id: str, gallery: dict[str, dict]) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("gt_gallery_ids must be a list of gallery ids")
    relevant = [parsing.id_text(item) if parsing.is_number(item) else item for item in value]
    for image_id in relevant:
        if not isinstance(image_id, str) or image_id not in gallery:
            raise ValueError(f"the relevant image {image_id!r} is not in {GALLERY_FILE}")
        if gallery[image_id]["live_id"] not in ("", live_id):
            raise ValueError(f"the relevant image {image_id!r} is not in the gallery of the livestream {live_id!r}")
    return relevant


def frames_and_boxes(media: MediaRoot, row: dict) -> tuple[list[str], list[list[float] | None]]:
    """Return a clip's absolute frame paths and one box or None per frame; raises ValueError for a wrong row."""
    frames, boxes = row.get("frames"), row.get("boxes")
    if frames is None and row.get("video") is None:
        raise ValueError("the clip has neither frames nor a video")
    frames = [] if frames is None else frames
    if not isinstance(frames, list):
        raise ValueError("frames must be a list of paths")
    if frames and row.get("video") is not None:
        raise ValueError("the clip has both frames and a video; keep one")
    paths = [media.path(frame, "frame path") for frame in frames]
    if boxes is None:
        return paths, [None] * len(paths)
    if row.get("video") is not None:
        raise ValueError("boxes belong to frames, but the clip is a video; extract its frames or remove the boxes")
    if not isinstance(boxes, list) or len(boxes) != len(paths):
        raise ValueError(f"boxes must be a list with one entry per frame ({len(paths)})")
    return paths, [None if box is None else _fraction_box(box) for box in boxes]


def _fraction_box(value: object) -> list[float]:
    box = parsing.check_box(value)
    if not all(-_BOX_TOLERANCE <= item <= 1 + _BOX_TOLERANCE for item in box):
        raise ValueError(f"the box {value} is not in fractions of the frame (0 to 1)")
    clipped = parsing.clip_box(box)
    if clipped is None:
        raise ValueError(f"the box {value} has no area; write null where there is no box")
    return clipped


def video_range(media: MediaRoot, row: dict) -> tuple[str, float, float]:
    """Return a clip's absolute video path and time range in seconds; ("", -1, -1) for a clip of frames.

    Raises:
        ValueError: the path or the range is wrong (without file and line, which the caller adds).
    """
    start, end = row.get("start"), row.get("end")
    if row.get("video") is None:
        return "", -1.0, -1.0
    video = media.path(row["video"], "video path")
    if start is None and end is None:
        return video, -1.0, -1.0
    # A larger number is not a time in seconds. The columns are 32-bit floats, in which near numbers may be equal.
    is_range = parsing.is_number(start) and parsing.is_number(end) and 0 <= start < end <= _LONGEST_VIDEO
    if not is_range or np.float32(start) == np.float32(end):
        raise ValueError("start and end must be seconds with 0 <= start < end, and end at most a million")
    return video, float(start), float(end)
