"""Runs a detector over the clips of a data set and writes a box file (`data_rice.box_files`)."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from data_rice import load_dataset_view
from data_rice.box_files import FORMAT, BoxFile, box_line, clip_fingerprint
from data_rice.files import cut_torn_line
from hub_rice.checkpoint import weights_fingerprint
from processing_rice import MediaError, open_image, sample_frame_indices
from processing_rice.video_media_rice import sample_video

from .product_detector import ProductDetector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Clip:
    """One clip's pictures: `num_frames` and `fingerprint` as in a box file, the numbers of the chosen frames, and None
    for unreadable ones."""

    clip_id: str
    num_frames: int | None
    numbers: list[int]
    pictures: list[Image.Image | None]
    fingerprint: str | None


def write_boxes(
    detector: ProductDetector,
    path: str | os.PathLike,
    *,
    dataset: str,
    splits: Sequence[str],
    detector_name: str,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    num_frames: int = 0,
    clips_per_batch: int = 8,
    num_workers: int = 0,
    **options,
) -> dict[str, int]:
    """
    Writes the box file of some splits. Repeating the call adds the missing clips.

    Args:
        detector: The detector.
        path: The file.
        dataset, data_dir, cache_dir, options: As `data_rice.load_dataset_view`.
        splits: "train" (its pairs), "validation", "test" (their queries).
        detector_name: Folder or id, for the header.
        num_frames: Maximum number of frames per clip, sampled as in evaluation; 0 uses all frames.
        clips_per_batch: Number of clips decoded together.
        num_workers: Number of processes that decode.

    Returns:
        Counts of this call: `clips`, `frames` read, `boxes` found and `unreadable` frames (a clip of an unreadable
        video counts as one); and `earlier`, the clips that the file already had.

    Raises:
        FileNotFoundError, ValueError: as `data_rice.load_dataset_view`; ValueError also if the file belongs to another
            detector or other data.
    """
    header = {
        **FORMAT,
        "dataset": os.fspath(dataset),
        "detector": detector_name,
        "detector_sha256": weights_fingerprint(detector_name),
        "threshold": detector.threshold,
        "labels": detector.labels,
        "frames_per_clip": num_frames or "all",
    }
    path = Path(path)
    earlier = _begin(path, header)
    done = set() if earlier is None else earlier.keys()
    views = {"train": "pairs"}
    settings = {"data_dir": data_dir, "cache_dir": cache_dir, **options}
    counts = {"clips": 0, "frames": 0, "boxes": 0, "unreadable": 0, "earlier": len(done)}
    for split in splits:
        rows = load_dataset_view(dataset, views.get(split, "query"), split, **settings)
        if earlier is not None:
            earlier.check_pictures(rows, split)
        places = {clip_id: place for place, clip_id in enumerate(rows["clip_id"]) if (split, clip_id) not in done}
        loader = DataLoader(
            Subset(rows, list(places.values())),
            clips_per_batch,
            num_workers=num_workers,
            collate_fn=_Decoder(num_frames),
        )
        with open(path, "a", encoding="utf-8") as file, tqdm(total=len(places), desc=f"Boxes of {split}") as progress:
            for clips in loader:
                file.writelines(_find(detector, clips, split, counts))
                file.flush()
                progress.update(len(clips))
    return counts


def _begin(path: Path, header: dict) -> BoxFile | None:
    """Starts the file, or reads it without the unfinished last line of an interrupted run."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        return None
    if b"\n" not in path.read_bytes():
        raise ValueError(f"{path} is not a box file; name another file, or remove it.")
    cut_torn_line(path)
    file = BoxFile(path)
    for name, value in header.items():
        if file.header.get(name) != value:
            raise ValueError(
                f"{path} was begun with {name}={file.header.get(name)!r}, not {value!r}; name another file, or remove "
                f"it."
            )
    return file


def _find(detector: ProductDetector, clips: list[_Clip], split: str, counts: dict[str, int]) -> list[str]:
    pictures = [picture for clip in clips for picture in clip.pictures if picture is not None]
    found = iter(detector.predict(pictures))
    lines = []
    for clip in clips:
        best = [None if picture is None else next(found).best(detector.threshold) for picture in clip.pictures]
        boxes, scores = zip(*((None, None) if answer is None else answer for answer in best)) if best else ((), ())
        lines.append(box_line(split, clip.clip_id, clip.num_frames, clip.numbers, boxes, scores, clip.fingerprint))
        counts["clips"] += 1
        counts["frames"] += len(clip.pictures)
        counts["boxes"] += sum(box is not None for box in boxes)
        counts["unreadable"] += sum(picture is None for picture in clip.pictures)
        # An unreadable video gives no picture.
        counts["unreadable"] += not clip.pictures and clip.num_frames is None
    return lines


@dataclass
class _Decoder:
    """Converts rows to clips, in a loader's workers."""

    num_frames: int

    def __call__(self, rows: list[dict]) -> list[_Clip]:
        return [self._read_video(row) if row["video"] else self._read_frames(row) for row in rows]

    def _choose(self, total: int) -> list[int]:
        return sample_frame_indices(total, self.num_frames or total, "eval") if total else []

    def _read_frames(self, row: dict) -> _Clip:
        numbers = self._choose(len(row["frames"]))
        pictures = [_decode(row["frames"][i]) for i in numbers]
        return _Clip(row["clip_id"], len(row["frames"]), numbers, pictures, clip_fingerprint(row, numbers))

    def _read_video(self, row: dict) -> _Clip:
        video = {"path": row["video"], "start": row["start"], "end": row["end"]}
        try:
            frames = sample_video(video, self.num_frames or None)
        except MediaError as error:
            logger.warning("The clip %s gets no boxes: %s", row["clip_id"], error)
            return _Clip(row["clip_id"], None, [], [], clip_fingerprint(row, []))
        numbers = list(frames)
        return _Clip(row["clip_id"], None, numbers, list(frames.values()), clip_fingerprint(row, numbers))


def _decode(entry: dict) -> Image.Image | None:
    try:
        return open_image(entry)
    except MediaError as error:
        logger.warning("A frame gets no box: %s", error)
        return None
