"""Pictures of a shop and frames of clips without labels, for statistics."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import path as osp

from .folders import NOT_A_PICTURE, check_link, is_video_name, list_pictures, natural_key, picture_rows
from .parsing import read_json_lines, row_error
from .paths import MediaRoot
from .shop_clips.shop_clips import CLIP_FILES, GALLERY_FILE, frames_and_boxes, read_gallery, video_range
from .views import builder_of, load_dataset_view

FRAMES_OF_VIDEO = 32
"""Maximum number of frames from one video, evenly spread."""

_MEDIA_KEYS = ("frames", "video", "start", "end")
# Number of pictures that are read as one clip, because single frames are enough.
_FRAMES_AT_ONCE = 16


@dataclass
class Unlabelled:
    """
    Attributes:
        rows: for `RiceCollator.collate_gallery`, or for `collate_queries` with `FRAMES_OF_VIDEO` frames per clip.
        words: the number of pictures as text, such as "81 pictures".
        note: a sentence that names the entries left out, "" if there are none.
    """

    rows: Sequence[dict]
    words: str
    note: str = ""


def shop_pictures(folder: str | os.PathLike, limit: int) -> Unlabelled:
    """The pictures of a shop.

    Args:
        folder: a folder with gallery.jsonl, of which nothing else is read; a folder in the layout of another data set;
            or a folder of pictures, including its subfolders.
        limit: maximum number of pictures, evenly spread.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no pictures.
        ValueError: gallery.jsonl is malformed, or a link leads out of the folder.
    """
    folder = _existing(folder, "shop")
    note = ""
    if osp.isfile(osp.join(folder, GALLERY_FILE)):
        rows = list(read_gallery(folder).values())
    elif _is_data_set(folder):
        rows = load_dataset_view(folder, "gallery", "test")
    else:
        rows, note = picture_rows(folder)
    kept = spread(len(rows), limit)
    return Unlabelled([rows[i] for i in kept], _counted(len(kept), len(rows), "picture"), note)


def clip_frames(
    folder: str | os.PathLike, split: str, limit: int, shop: str | os.PathLike | None = None
) -> Unlabelled:
    """The frames of clips, whatever the clips show.

    Args:
        folder: a folder with a clip file such as clips_train.jsonl, of which only frames, video, start and end are
            read; a folder in the layout of another data set; or a folder of pictures and videos, including its
            subfolders.
        split: "train", "validation" or "test", if the folder has splits.
        limit: maximum number of frames, evenly spread.
        shop: folder of the shop; its pictures do not count as frames if they are inside ``folder``.

    Raises:
        FileNotFoundError: the folder, the clip file of the split, or every frame is missing.
        ValueError: a row is malformed, or a link leads out of the folder.
    """
    folder, note = _existing(folder, "clips"), ""
    present = [name for name in CLIP_FILES.values() if osp.isfile(osp.join(folder, name))]
    if present or osp.isfile(osp.join(folder, GALLERY_FILE)):
        wanted = CLIP_FILES[split]
        if wanted not in present:
            there = f"it has {', '.join(present)}, which --clips_split chooses" if present else "write the clips there"
            raise FileNotFoundError(f"{folder} has no {wanted}; {there}.")
        frames, videos = _listed(folder, wanted)
    elif _is_data_set(folder):
        rows = load_dataset_view(folder, "query" if split == "test" else "pairs", split)
        videos = [row for row in rows if row["video"]]
        frames = [frame for row in rows if not row["video"] for frame in row["frames"]]
    else:
        frames, videos, note = _found(folder, shop)
    return _thinned(frames, videos, folder, limit, note)


def _existing(folder: str | os.PathLike, argument: str) -> str:
    folder = os.fspath(folder)
    if not osp.isdir(folder):
        what = "is a file" if osp.exists(folder) else "does not exist"
        raise FileNotFoundError(f"--{argument} {folder} {what}; name a folder.")
    return folder


def _is_data_set(folder: str) -> bool:
    try:
        builder_of(folder, None)
    except ValueError:
        return False
    return True


def _listed(folder: str, name: str) -> tuple[list[dict], list[dict]]:
    """The frames and the video clips of a clip file."""
    file, media = osp.join(folder, name), MediaRoot(folder)
    frames: list[str] = []
    videos: list[tuple] = []
    for line, row in read_json_lines(file):
        shown = {key: row.get(key) for key in _MEDIA_KEYS}
        try:
            frames += frames_and_boxes(media, shown)[0]
            if shown["video"] is not None:
                videos.append(video_range(media, shown))
        except ValueError as error:
            raise row_error(file, line, f"{error}; repair the row.") from None
    # A frame that several clips share counts once.
    return (
        [{"path": path} for path in dict.fromkeys(frames)],
        [{"video": path, "start": start, "end": end} for path, start, end in dict.fromkeys(videos)],
    )


def _found(folder: str, shop: str | os.PathLike | None) -> tuple[list[dict], list[dict], str]:
    """Pictures and videos in a folder, without the pictures of a shop inside it."""
    listing = list_pictures(folder, below=True)
    others = listing.left_out.pop(NOT_A_PICTURE, [])
    videos = [name for name in others if is_video_name(name) and osp.isfile(osp.join(folder, name))]
    for name in videos:
        check_link(osp.join(folder, name), folder)
    rest = [name for name in others if name not in set(videos)]
    if rest:
        listing.left_out["no suffix of a picture or video"] = rest
    paths = [osp.join(folder, name) for name in sorted(videos, key=natural_key)]
    pictures = listing.pictures
    if shop is not None and _contains(folder, shop):
        pictures = [path for path in pictures if not _contains(shop, path)]
        if len(pictures) < len(listing.pictures):
            kept = set(pictures)
            own = [osp.relpath(path, folder) for path in listing.pictures if path not in kept]
            listing.left_out["a picture of the shop, no frame"] = own
    return (
        [{"path": path} for path in pictures],
        [{"video": path, "start": -1.0, "end": -1.0} for path in paths],
        listing.note(),
    )


def _contains(folder: str | os.PathLike, path: str | os.PathLike) -> bool:
    folder = osp.realpath(folder)
    return osp.commonpath([folder, osp.realpath(path)]) == folder


def _thinned(frames: list[dict], videos: list[dict], folder: str, limit: int, note: str) -> Unlabelled:
    """Choose about ``limit`` frames, from pictures and videos in proportion."""
    total = len(frames) + FRAMES_OF_VIDEO * len(videos)
    if not total:
        raise FileNotFoundError(f"{folder} holds no frame of a clip{f' ({note})' if note else ''}; add some.")
    share = min(1.0, limit / total)
    frames_kept = [frames[i] for i in spread(len(frames), round(share * len(frames)))]
    kept = spread(len(videos), max(1, round(share * len(videos))))
    rows = [
        {"clip_id": f"frames {start + 1} and more", "frames": frames_kept[start : start + _FRAMES_AT_ONCE]}
        for start in range(0, len(frames_kept), _FRAMES_AT_ONCE)
    ]
    rows += [{"clip_id": osp.basename(videos[i]["video"]), "frames": [], **videos[i]} for i in kept]
    words = [_counted(len(frames_kept), len(frames), "frame")] * bool(frames)
    if videos:
        words.append(f"at most {FRAMES_OF_VIDEO} frames of each of {_counted(len(kept), len(videos), 'video')}")
    return Unlabelled(rows, " and ".join(words), note)


def _counted(kept: int, total: int, what: str) -> str:
    plural = what + "s" * (total != 1)
    return f"{total:,} {plural}" if kept == total else f"{kept:,} of {total:,} {plural} (evenly spread)"


def spread(total: int, limit: int) -> list[int]:
    """At most ``limit`` of the numbers below ``total``, evenly spread."""
    return [i * total // limit for i in range(limit)] if total > limit else list(range(total))
