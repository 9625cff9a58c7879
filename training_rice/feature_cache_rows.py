"""The rows whose pictures a run caches: their reading, their views, and their names."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from torch import Tensor

from data_rice.augmentation import ClipAugmentation, ClipChange
from data_rice.collator import Failure, RiceCollator

from .randomness import seeded

Loaded = tuple[dict[str, Tensor], list[int], list[Failure]]


def distinct_images(pairs: Dataset) -> tuple[Dataset, list[int]]:
    """The distinct shop images of pairs as gallery rows, and the number of each pair's image."""
    numbers: dict[str, int] = {}
    first: list[int] = []
    of_pair = []
    for row, entry in enumerate(pairs.select_columns(["image"])["image"]):
        name = _picture_name(entry)
        if name not in numbers:
            numbers[name] = len(first)
            first.append(row)
        of_pair.append(numbers[name])
    return pairs.select(first).select_columns(["image_id", "live_id", "image", "title"]), of_pair


@dataclass(frozen=True)
class ViewChanges:
    """The change of a row in a view, which depends only on the row and the view."""

    augmentation: ClipAugmentation
    seed: int

    @property
    def read_boxes(self) -> bool:
        """Whether views depend on boxes."""
        return self.augmentation.background > 0

    def __call__(self, name: str, view: int) -> ClipChange:
        digest = hashlib.blake2b(f"{self.seed}\0{view}\0{name}".encode(), digest_size=8).digest()
        with seeded(int.from_bytes(digest, "big") >> 1):
            return self.augmentation.draw()


@dataclass(frozen=True)
class CachedPart:
    """
    Rows of one kind.

    Args:
        kind: Clips with their frames, or shop images.
        rows: Rows of a pairs, queries or gallery view.
        collator: Reads them, with its `num_frames` frames per clip.
        changes: Changes of the pictures in each view; without it there is one view of the unchanged pictures.
        num_views: Number of views.
    """

    kind: Literal["clips", "images"]
    rows: Dataset
    collator: RiceCollator
    changes: ViewChanges | None = None
    num_views: int = 1

    def __post_init__(self):
        # Texts are read at each step.
        object.__setattr__(self, "collator", dataclasses.replace(self.collator, use_text=False, asr_noise=0.0))

    @property
    def id_column(self) -> str:
        """The id column by which failures name a row."""
        return "clip_id" if self.kind == "clips" else "image_id"

    @property
    def longest(self) -> int:
        """Maximum number of frames of a clip."""
        return self.collator.num_frames or self.collator.processor.video_processor.num_frames

    def num_pictures(self) -> int:
        """Maximum number of pictures of one view; the frames of a video are not counted before it is read."""
        if self.kind == "images":
            return len(self.rows)
        columns = self.rows.select_columns(["frames", "video"])
        return sum(self.longest if row["video"] else min(len(row["frames"]), self.longest) for row in columns)

    def load(self, view: int, rows: list[dict]) -> Loaded:
        """Loads rows in a loader worker; returns as `RiceCollator.collate_queries`."""
        changes = None if self.changes is None else [self.changes(row[self.id_column], view) for row in rows]
        collate = self.collator.collate_queries if self.kind == "clips" else self.collator.collate_gallery
        return collate(rows, changes)

    def about(self) -> dict[str, object]:
        """Everything that affects the rows' encodings, except the encoder."""
        processor = self.collator.processor
        settings = (processor.video_processor if self.kind == "clips" else processor.image_processor).to_dict()
        # For the frames that the collator has chosen.
        settings.pop("num_frames", None)
        return {
            "processor": _digest(json.dumps(settings, sort_keys=True, default=str).encode()),
            "decoding": f"{self.collator.decode} {self.collator.pixels}",
            "frames": self.longest if self.kind == "clips" else 1,
            "masks": self.kind == "clips" and self.collator.use_boxes,
            "views": repr(self.changes),
            "rows": self._rows_digest(),
        }

    def _rows_digest(self) -> str:
        names = [self.id_column, *(("frames", "video", "start", "end") if self.kind == "clips" else ("image",))]
        if self.kind == "clips" and (self.collator.use_boxes or (self.changes and self.changes.read_boxes)):
            names += ["boxes", "box_frames"]
        digest = hashlib.sha256()
        for row in self.rows.select_columns(names):
            pictures = [_picture_name(entry) for entry in row.pop("frames", None) or [row.pop("image", None)] if entry]
            video = _state_of(row.pop("video")) if row.get("video") else ""
            digest.update(json.dumps([pictures, video, row], sort_keys=True).encode())
        return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _picture_name(entry: dict) -> str:
    """Identifies a picture by its bytes, or by its file and the file's state."""
    return _digest(entry["bytes"]) if entry.get("bytes") is not None else _state_of(entry["path"])


def _state_of(path: str) -> str:
    try:
        state = os.stat(path)
    except OSError:
        # It is read later, and listed as a failure.
        return f"{path} missing"
    return f"{path} {state.st_size} {state.st_mtime_ns}"
