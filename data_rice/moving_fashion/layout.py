"""Strict reader of MovingFashion's annotation files, ``train.json`` and ``test.json``.

Source: "MovingFashion: a Benchmark for the Video-to-Shop Challenge" (WACV 2022). Both files hold
``{product id: {"video_paths": [...], "img_path": ..., "source": 1, 0 or 2, "tracklets": optional}}`` with paths
relative to their folder. docs/data.md describes them and the supported notations of ``tracklets``.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import path as osp

from .. import parsing
from ..paths import MediaRoot

ANNOTATIONS = {"train": "train.json", "test": "test.json"}
# Descriptions of the archive use different numbers for "hard".
SOURCES = {1: "regular", 0: "hard", 2: "hard"}

# Videos in the annotations but not in the published archive: 22 of the training list and 1 of the test list. MTEB
# found them in its audit of the archive for its retrieval task.
KNOWN_MISSING = frozenset(
    f"videos/{name}.mp4"
    for name in """
    0096903c8314b3870a7af2a425953536 0476509b035f59bfc009827ac4d8bafc 0580eb0b3128457511e09c4503391e64
    1242272_detail 154532233c6ad4de20f01bd51b0fc1d0 267e49a2051bbaedfe76d3ee2a20cd58 3360fdc695014ce440aff4cb97afadbb
    47780e36140c63e91131555823fef909 5330d0e23a7327d55685380893109692 57893f18394ef329b66e35c345608694
    583c1c541b19369daa6ab457c9239455 5f2fc22016a5e6935543dba09744032e 784d4f0f64ddca7ff8d7c30b4d356e07
    7a8f7e95a14ed9d5f61875592ccc052b 7ead8a1d0646890d2d509c91ce2e4872 97210917e5c1423fb977e1ad54a3434b
    b2d1b95537f74557b78636c417a409ce b959460caa57d3a0144f097756485106 c8ec36fdca477f3828313f91cbf2d370
    e1fa86dc926d29771ee89d8bc811487e e5e722166385f10fd462af377e3be7b5 f386b23468d1ffda850fef2f8aa438cb
    bd6186ecf66d1a5c2d65ff3c891c7e44
    """.split()
)

# People and trackers draw boxes slightly beyond the frame. Boxes beyond this limit are not fractions of the frame.
_BOX_TOLERANCE = 0.1
_FRAME_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)

Tracklet = dict[int, list[float]]


@dataclass(frozen=True)
class Product:
    """One entry of an annotation file.

    Attributes:
        key: the entry's key in the file.
        product_id: key of the first entry with the same picture, usually its own key.
        image: path of the shop's picture relative to the data folder; also the image id.
        videos: paths relative to the data folder.
        source: "regular" (videos of the shop) or "hard" (videos of users).
        tracklets: per video, frame number -> box as written, or None.
        tracklets_read: False if the entry has tracklets in an unknown notation.
    """

    key: str
    product_id: str
    image: str
    videos: tuple[str, ...]
    source: str
    tracklets: tuple[Tracklet | None, ...]
    tracklets_read: bool = True

    def clip_id(self, index: int) -> str:
        """The id of the product's video number ``index``, unique within a file."""
        return f"{self.key}#{index}"


def read_products(root: str, split: str, strict: bool = True) -> list[Product]:
    """Read the annotation file of ``split`` ("train" or "test") in file order.

    Args:
        root: the data folder.
        split: "train" or "test".
        strict: refuse tracklets in an unknown notation; if False, they are ignored.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged or an entry malformed; the message names the file and the product.
    """
    file = osp.join(root, ANNOTATIONS[split])
    products: list[Product] = []
    first_with_image: dict[str, str] = {}
    media = MediaRoot(root)
    for key, entry in parsing.read_json_object(file).items():
        try:
            product = _parse_product(key, entry, media, first_with_image, strict)
        except ValueError as error:
            raise ValueError(f"{file}, product {key!r}: {error}; repair the entry.") from None
        products.append(product)
    if not products:
        raise ValueError(f"{file} holds no product; restore the file.")
    return products


def _parse_product(
    key: str, entry: object, media: MediaRoot, first_with_image: dict[str, str], strict: bool
) -> Product:
    if not key.strip() or "\0" in key:
        raise ValueError("the product id is empty or holds a NUL character")
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found a {type(entry).__name__}")
    videos = entry.get("video_paths")
    if not isinstance(videos, list):
        raise ValueError("video_paths must be a list of paths")
    videos = tuple(_media_path(media, path, "video path") for path in videos)
    if len(set(videos)) != len(videos):
        raise ValueError("video_paths names a video twice")
    image = _media_path(media, entry.get("img_path"), "img_path")
    source = entry.get("source")
    if type(source) is not int or source not in SOURCES:
        raise ValueError(f"source must be 1 (regular), or 0 or 2 (hard), not {_short(source)}")
    product_id = first_with_image.setdefault(image, key)
    try:
        tracklets = parse_tracklets(
            entry.get("tracklets"), videos, lambda path: _media_path(media, path, "path in tracklets")
        )
        read = True
    except ValueError:
        if strict:
            raise
        tracklets, read = (None,) * len(videos), False
    return Product(key, product_id, image, videos, SOURCES[source], tracklets, read)


def _media_path(media: MediaRoot, value: object, what: str) -> str:
    path = osp.relpath(media.path(value, what), media.root).replace(osp.sep, "/")
    if path == ".":
        raise ValueError(f"the {what} names the data folder itself")
    return path


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def choose_products(product_ids: Sequence[str], count: int) -> frozenset[str]:
    """Choose ``count`` products by a hash of their ids, so the choice depends on the ids alone."""
    return frozenset(sorted(product_ids, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])


def parse_tracklets(
    value: object, videos: tuple[str, ...], normalise: Callable[[str], str] = osp.normpath
) -> tuple[Tracklet | None, ...]:
    """Read ``tracklets`` as one mapping from frame number to box, or None, per video.

    A tracklet is ``{frame number: box or null}``, or a list with one box or null per frame, from the first frame on.
    The value is a tracklet (for a product with one video), a list with one tracklet or null per video, or ``{video
    path: tracklet}``.

    Args:
        value: the value in the annotation file.
        videos: the product's videos.
        normalise: converts a written path to the form in ``videos``.

    Raises:
        ValueError: the value is anything else.
    """
    if value is None:
        return (None,) * len(videos)
    if isinstance(value, dict) and value and not any(_FRAME_NUMBER.fullmatch(key) for key in value):
        by_video = {normalise(path): tracklet for path, tracklet in value.items()}
        if unknown := set(by_video) - set(videos):
            raise ValueError(f"tracklets name {_short(min(unknown))}, which is not in video_paths")
        if len(by_video) != len(value):
            raise ValueError("tracklets name a video twice")
        return tuple(_parse_tracklet(by_video.get(video)) for video in videos)
    per_video = isinstance(value, list) and not all(item is None or _is_box(item) for item in value)
    if per_video and len(value) == len(videos):
        return tuple(_parse_tracklet(item) for item in value)
    if not per_video and len(videos) == 1:
        return (_parse_tracklet(value),)
    raise ValueError(f"tracklets must hold one tracklet per video ({len(videos)}), in order or by video path")


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(parsing.is_number(item) for item in value)


def _parse_tracklet(value: object) -> Tracklet | None:
    if value is None:
        return None
    if isinstance(value, list):
        frames = enumerate(value)
    elif isinstance(value, dict):
        if bad := [key for key in value if not _FRAME_NUMBER.fullmatch(key)]:
            raise ValueError(f"a tracklet's keys must be frame numbers, not {_short(bad[0])}")
        frames = ((int(key), box) for key, box in value.items())
    else:
        raise ValueError(f"a tracklet must be a list or an object of boxes, not a {type(value).__name__}")
    boxes = {}
    for frame, box in frames:
        if frame in boxes:
            raise ValueError(f"a tracklet names frame {frame} twice")
        boxes[frame] = None if box is None else _ordered(parsing.check_box(box))
    return {frame: boxes[frame] for frame in sorted(boxes) if boxes[frame] is not None} or None


def _ordered(box: list[float]) -> list[float]:
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"the box {box} has no area; write null where there is no box")
    return box


def in_fractions(box: list[float]) -> bool:
    """Return whether a box can be in fractions of the frame: no side exceeds 0 to 1 by more than 0.1."""
    return all(-_BOX_TOLERANCE <= item <= 1 + _BOX_TOLERANCE for item in box)


def normalise_tracklet(tracklet: Tracklet, frame_size: tuple[int, int] | None) -> Tracklet:
    """Convert boxes to fractions of the frame, cut at its border; boxes entirely outside are left out.

    Args:
        tracklet: boxes as written.
        frame_size: width and height of the video's frames if the boxes are in pixels, None if in fractions.

    Raises:
        ValueError: boxes in pixels and in fractions are mixed, or a box exceeds the frame by more than a tenth.
    """
    width, height = frame_size or (1, 1)
    slack = (width * _BOX_TOLERANCE, height * _BOX_TOLERANCE)
    result = {}
    for frame, box in tracklet.items():
        if frame_size and in_fractions(box):
            raise ValueError(f"the box {box} of frame {frame} is in fractions of the frame, but others are in pixels")
        left, top, right, bottom = box
        if min(left + slack[0], top + slack[1], width + slack[0] - right, height + slack[1] - bottom) < 0:
            raise ValueError(f"the box {box} of frame {frame} is outside the frame of {width} x {height} pixels")
        if clipped := parsing.clip_box(box, width, height):
            result[frame] = clipped
    return result
