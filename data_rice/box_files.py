"""Box files: boxes from a product detector or another source, and rows that take their boxes from such a file.

A box file is JSON lines. The first line says where the boxes come from:

    {"format": "rice-boxes", "version": 1, "dataset": "mini_lpr4m", "detector": "runs/detector", ...}

Each further line is one clip. It gives the numbers of the frames that the detector read and, for each of them, a box
(left, top, right, bottom as fractions of the frame) with its score, or null where there is no box:

    {"split": "test", "clip_id": "c1", "num_frames": 5, "frames": [0, 1], "boxes": [[0.1, 0.2, 0.5, 1], null],
     "scores": [0.9, null], "fingerprint": "53ed2e0e8f2c4b4f"}

`num_frames` is the number of the clip's frames. It is null for a clip of a video file, whose frames are counted from 0
at the start of its time range. `fingerprint` distinguishes clips that have the same id in two data sets, see
`clip_fingerprint`. It is optional.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import datasets

from processing_rice.media_rice import read_media

from .parsing import check_box, clip_box, fingerprint, is_number, read_json_lines, row_error

logger = logging.getLogger(__name__)

FORMAT = {"format": "rice-boxes", "version": 1}
_NAMED_CLIPS = 10
# Other data differ in most clips, so a sample is enough. Reading all pictures would take a large part of an epoch.
_COMPARED_CLIPS = 100
_VIDEO_ENDS = 64 * 1024
_HEADER_TEXTS = ("dataset", "detector", "detector_sha256")
# `processing_rice` has the same tolerance: boxes of detectors may exceed the frame by a little.
_TOLERANCE = 0.05


def box_line(
    split: str,
    clip_id: str,
    num_frames: int | None,
    frames: Sequence[int],
    boxes: Sequence[Sequence[float] | None],
    scores: Sequence[float | None],
    fingerprint: str | None = None,
) -> str:
    """Return one clip's line of a box file; the module's docstring explains the arguments."""
    entry = {"split": split, "clip_id": clip_id, "num_frames": num_frames, "frames": list(frames)}
    entry["boxes"] = [None if box is None else [round(value, 5) for value in box] for box in boxes]
    entry["scores"] = [None if score is None else round(score, 5) for score in scores]
    if fingerprint is not None:
        entry["fingerprint"] = fingerprint
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def clip_fingerprint(row: Mapping, numbers: Sequence[int]) -> str | None:
    """Hash the pictures of a clip, independent of the names and places of its files.

    Args:
        row: a ``pairs`` or ``query`` row.
        numbers: the frames whose encoded pictures are hashed. For a clip of a video file the numbers are ignored; the
            time range and the size, the beginning and the end of the file are hashed.

    Returns:
        16 hexadecimal digits, or None when there is nothing to hash or a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if row["video"]:
            with open(row["video"], "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{row['start']} {row['end']} {size}\n".encode())
                digest.update(file.read(_VIDEO_ENDS))
                file.seek(max(0, size - _VIDEO_ENDS))
                digest.update(file.read(_VIDEO_ENDS))
        for number in () if row["video"] else numbers:
            digest.update(hashlib.sha256(read_media(row["frames"][number])).digest())
    except (OSError, ValueError):
        return None
    return digest.hexdigest()[:16] if row["video"] or len(numbers) else None


class _Clip(NamedTuple):
    """A clip's line: its boxes by frame, and the frames that were read (kept only with a fingerprint)."""

    num_frames: int | None
    boxes: dict[int, list[float]]
    frames: list[int]
    fingerprint: str | None


class BoxFile:
    """The boxes of a file, by split and clip.

    Args:
        path: a box file.

    Attributes:
        header: the file's first line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a box file, or a line is malformed; the message names the line.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._clips: dict[tuple[str, str], _Clip] = {}
        if not os.path.isfile(self.path):
            raise FileNotFoundError(
                f"{self.path} does not exist; write it with python -m retrieval_rice.detector run."
            )
        lines = read_json_lines(self.path)
        _, self.header = next(lines, (0, {}))
        if {name: self.header.get(name) for name in FORMAT} != FORMAT:
            raise ValueError(
                f"{self.path} does not begin like a box file ({json.dumps(FORMAT)}); write it with "
                "python -m retrieval_rice.detector run."
            )
        try:
            _check_header(self.header)
        except ValueError as error:
            raise row_error(self.path, 1, f"{error}.") from None
        for number, entry in lines:
            try:
                key, clip = _parse_clip(entry)
            except ValueError as error:
                raise row_error(self.path, number, f"{error}.") from None
            if key in self._clips:
                raise row_error(self.path, number, f"the clip {key[1]!r} of {key[0]} appears twice; keep one line.")
            self._clips[key] = clip

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._clips

    def __len__(self) -> int:
        return len(self._clips)

    def keys(self) -> set[tuple[str, str]]:
        """Return the `(split, clip id)` of every clip."""
        return set(self._clips)

    def columns(self, split: str, clip_id: str, num_frames: int | None) -> tuple[list[list[float] | None], list[int]]:
        """Return a row's ``boxes`` and ``box_frames``.

        Args:
            num_frames: how many frames the row has; None for a clip of a video file.

        Raises:
            ValueError: the boxes belong to another number of frames.
        """
        expected, boxes, _, _ = self._clips[split, clip_id]
        if expected != num_frames:
            raise ValueError(
                f"{self.path} has boxes for {_frames(expected)} of the clip {clip_id!r}, but the data set has "
                f"{_frames(num_frames)}; write the box file from these data."
            )
        if num_frames is None:
            return list(boxes.values()), list(boxes)
        return [boxes.get(number) for number in range(num_frames)], []

    def check_pictures(self, rows: datasets.Dataset, split: str) -> None:
        """Refuse rows whose pictures differ from those in which the boxes were found.

        At most 100 clips, evenly spread over the rows, are read. Clips without a fingerprint and clips with an
        unreadable picture are not compared.

        Args:
            rows: ``pairs`` or ``query`` rows of the split.
            split: the split's name in the file.

        Raises:
            ValueError: the pictures of a clip differ (the message names the first such clip), or a clip has another
                number of frames.
        """
        places: dict[str, int] = {}
        for place, clip_id in enumerate(rows["clip_id"]):
            clip = self._clips.get((split, clip_id))
            if clip is not None and clip.fingerprint is not None:
                places.setdefault(clip_id, place)
        found, count = list(places.values()), min(len(places), _COMPARED_CLIPS)
        columns = rows.select_columns(["clip_id", "frames", "video", "start", "end"])
        for row in columns.select([found[i * len(found) // count] for i in range(count)]):
            clip_id = row["clip_id"]
            clip = self._clips[split, clip_id]
            self.columns(split, clip_id, None if row["video"] else len(row["frames"]))
            if clip_fingerprint(row, clip.frames) not in (clip.fingerprint, None):
                raise ValueError(
                    f"{self.path} has boxes of other pictures than those of the clip {clip_id!r} of "
                    f"the {split} split; name another box file, or remove this one and write it from these data."
                )


def _frames(number: int | None) -> str:
    return "a video" if number is None else f"{number} frames"


def _check_header(header: dict) -> None:
    """Raises `ValueError` for a known field of the wrong kind. All may be missing or null."""
    frames, labels = header.get("frames_per_clip"), header.get("labels")
    is_count = frames in (None, "all") or (type(frames) is int and frames > 0)
    is_list = labels is None or (isinstance(labels, list) and all(isinstance(label, str) for label in labels))
    checks = {name: (isinstance(header.get(name, ""), str | None), "text") for name in _HEADER_TEXTS}
    checks["threshold"] = header.get("threshold") is None or is_number(header["threshold"]), "a number"
    checks["labels"] = is_list, "a list of texts"
    checks["frames_per_clip"] = is_count, 'a whole number above 0 or "all"'
    for name, (fits, kind) in checks.items():
        if not fits:
            raise ValueError(f"{name!r} is not {kind}; correct it, or leave it out")


def _parse_clip(entry: dict) -> tuple[tuple[str, str], _Clip]:
    for name in ("split", "clip_id"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{name!r} is missing or is not text")
    total, frames, boxes, scores = (entry.get(name) for name in ("num_frames", "frames", "boxes", "scores"))
    if total is not None and type(total) is not int:
        raise ValueError("'num_frames' is neither a whole number nor null")
    if not all(isinstance(value, list) for value in (frames, boxes, scores)) or not (
        len(frames) == len(boxes) == len(scores)
    ):
        raise ValueError("'frames', 'boxes' and 'scores' are not three lists of equal length")
    mark = entry.get("fingerprint")
    if mark is not None and not isinstance(mark, str):
        raise ValueError("'fingerprint' is neither text nor null")
    found = {}
    for frame, box, score in zip(frames, boxes, scores):
        if type(frame) is not int or frame < 0 or (total is not None and frame >= total):
            raise ValueError(f"{frame!r} in 'frames' is not the number of a frame of the clip")
        if score is not None and not is_number(score):
            raise ValueError(f"the score {score!r} is not a number")
        if box is None:
            continue
        written = check_box(box)
        if min(written) < -_TOLERANCE or max(written) > 1 + _TOLERANCE:
            raise ValueError(
                f"the box {box} of frame {frame} reaches out of the frame; write fractions of its width and height, "
                "from 0 to 1, not pixels"
            )
        box = clip_box(written)
        if box is None:
            raise ValueError(f"the box of frame {frame} has no area in the frame; write null for no box")
        found[frame] = box
    clip = _Clip(total, dict(sorted(found.items())), [] if mark is None else frames, mark)
    return (entry["split"], entry["clip_id"]), clip


class _ReplaceBoxes:
    """For `datasets.Dataset.map`. It is pickled as path and state of the file, which its cache hashes."""

    def __init__(self, path: str, split: str):
        self.path = os.path.abspath(path)
        self.split = split
        self.state = fingerprint([self.path])
        self._file: BoxFile | None = None

    def __getstate__(self):
        return self.__dict__ | {"_file": None}

    @property
    def file(self) -> BoxFile:
        if self._file is None:
            self._file = BoxFile(self.path)
        return self._file

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        columns = [
            self.file.columns(self.split, clip_id, None if video else len(frames))
            for clip_id, video, frames in zip(batch["clip_id"], batch["video"], batch["frames"], strict=True)
        ]
        return {"boxes": [boxes for boxes, _ in columns], "box_frames": [numbers for _, numbers in columns]}


def with_boxes_of(rows: datasets.Dataset, path: str | os.PathLike, split: str) -> datasets.Dataset:
    """Return ``pairs`` or ``query`` rows with the boxes of a box file in place of their own.

    A frame without a box in the file has no box, even if the rows had one. The number of boxes is logged.

    Args:
        rows: rows of one split.
        path: the box file.
        split: the split's name in the file: "train", "validation" or "test".

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is malformed, lacks clips of the rows (the message lists them), or belongs to other data
            (see `BoxFile.check_pictures`).
    """
    replace = _ReplaceBoxes(os.fspath(path), split)
    missing = [clip_id for clip_id in dict.fromkeys(rows["clip_id"]) if (split, clip_id) not in replace.file]
    if missing:
        more = f" and {len(missing) - _NAMED_CLIPS} more" if len(missing) > _NAMED_CLIPS else ""
        raise ValueError(
            f"{path} has no boxes for {len(missing)} clips of the {split} split: "
            f"{', '.join(missing[:_NAMED_CLIPS])}{more}; run the detector on this split."
        )
    replace.file.check_pictures(rows, split)
    new = {name: rows.features[name] for name in ("boxes", "box_frames")}
    columns = rows.map(
        replace,
        batched=True,
        batch_size=100,
        remove_columns=rows.column_names,
        features=datasets.Features(new),
        desc=f"Boxes of the {split} split",
    )
    # Joining columns avoids writing the pictures inside the rows to the cache again.
    replaced = datasets.concatenate_datasets([rows.remove_columns(list(new)), columns], axis=1)
    replaced = replaced.select_columns(rows.column_names)
    counts = count_boxes(replaced)
    logger.info("%s: %d frames of the %s split have a box of %s", path, counts["boxes"], split, counts["frames"])
    return replaced


def count_boxes(rows: datasets.Dataset) -> dict[str, int]:
    """Count the ``boxes`` and the ``frames`` of ``pairs`` or ``query`` rows; clips of video files count 0 frames."""
    columns = rows.select_columns(["boxes", "frames"]).with_format("arrow")
    boxes = frames = 0
    for batch in columns.iter(batch_size=10_000):
        boxes += sum(box is not None for clip in batch["boxes"].to_pylist() for box in clip or [])
        frames += sum(length.as_py() or 0 for length in batch["frames"].combine_chunks().value_lengths())
    return {"boxes": boxes, "frames": frames}
