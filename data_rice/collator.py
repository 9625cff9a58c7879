"""From rows to model inputs, in the DataLoader's workers: choose frames, decode, process; count what is unreadable."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps

from processing_rice import read_video, sample_frame_indices

logger = logging.getLogger(__name__)

Failure = dict[str, str]


class MediaError(ValueError):
    """An image or clip that cannot be read; the message names the file and the reason."""


def product_id_hash(product_id: str) -> int:
    """A product's string id as a 63-bit number, the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(product_id.encode(), digest_size=8).digest(), "big") >> 1


def decode_image(entry: dict[str, Any]) -> Image.Image:
    """
    Decodes a row's image entry `{"path", "bytes"}` to RGB.

    Raises:
        MediaError: when the file is missing, empty or no image.
    """
    name = entry.get("path") or "<bytes>"
    try:
        with Image.open(io.BytesIO(entry["bytes"]) if entry.get("bytes") else entry["path"]) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise MediaError(f"{name}: there is no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error


@dataclass
class RiceCollator:
    """
    Turns rows of any builder into model inputs.

    Called with pair rows it gives a training batch. A pair that cannot be read is replaced by a repeat of another of
    its batch, so that every process keeps its batch size (`product_ids` keep the repeat from being a negative); it is
    logged, and listed in `failure_log`.

    Args:
        processor: A `RiceProcessor`.
        use_boxes: Hand the rows' boxes to the processor (intended product detection).
        num_frames: Frames per clip at most; the processor's own number by default.
        sampling: `"train"` and `"eval"` as `sample_frame_indices`; `"random"` draws frames anew each time, `"visible"`
            likewise but frames with a box before others.
        augmentation: Applied to the frames and the image of training pairs, e.g. `ClipAugmentation`.
        use_text: Tokenise titles and ASR.
        failure_log: File to append one JSON line per unreadable file to.
    """

    processor: Any
    use_boxes: bool = False
    num_frames: int | None = None
    sampling: Literal["train", "eval", "random", "visible"] = "eval"
    augmentation: Callable | None = None
    use_text: bool = False
    failure_log: str | Path | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            The processor's keys for images, clips and text, and `product_ids` `(B,)` int64.

        Raises:
            MediaError: when no pair of the batch can be read.
        """
        loaded: list[tuple | None] = []
        for row in rows:
            failures: list[Failure] = []
            clip = self._load_clip(row, failures)
            image = self._load_image(row["clip_id"], row["image"], failures)
            self._report(failures)
            loaded.append(None if clip is None or image is None else (row, clip, image))
        good = [pair for pair in loaded if pair is not None]
        if not good:
            raise MediaError(
                f"None of the {len(rows)} pairs of a batch could be read (first: {rows[0]['clip_id']}); "
                f"check the data folder with the files listed in {self.failure_log or 'the log'}."
            )
        filled = [pair or good[i % len(good)] for i, pair in enumerate(loaded)]
        if self.augmentation is not None:
            filled = [(row, self._augment(*clip), self._augment([image])[0][0]) for row, clip, image in filled]
        rows, clips, images = zip(*filled, strict=True)
        batch = self._process_clips(rows, clips, padding="max_length")
        batch |= self._process_images(rows, images)
        batch["product_ids"] = torch.tensor([product_id_hash(row["product_id"] or row["clip_id"]) for row in rows])
        return batch

    def encode_queries(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[int], list[Failure]]:
        """
        Query rows for evaluation.

        Returns:
            The processor's keys for the readable clips (empty when there is none), their positions in `rows`, and the
            failures as `{"id", "file", "reason"}`.
        """
        failures: list[Failure] = []
        clips = [self._load_clip(row, failures) for row in rows]
        readable = [i for i, clip in enumerate(clips) if clip is not None]
        inputs = {}
        if readable:
            inputs = self._process_clips([rows[i] for i in readable], [clips[i] for i in readable], padding="longest")
        return inputs, readable, failures

    def encode_gallery(self, rows: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[int], list[Failure]]:
        """Gallery rows for evaluation; returns as `encode_queries`."""
        failures: list[Failure] = []
        images = [self._load_image(row["image_id"], row["image"], failures) for row in rows]
        readable = [i for i, image in enumerate(images) if image is not None]
        inputs = {}
        if readable:
            inputs = self._process_images([rows[i] for i in readable], [images[i] for i in readable])
        return inputs, readable, failures

    @property
    def _max_frames(self) -> int:
        return self.num_frames or self.processor.video_processor.num_frames

    def _load_image(self, row_id: str, entry: dict[str, Any], failures: list[Failure]) -> Image.Image | None:
        try:
            return decode_image(entry)
        except MediaError as error:
            failures.append(_failure(row_id, entry.get("path"), error))
            return None

    def _load_clip(self, row: dict[str, Any], failures: list[Failure]) -> tuple[list, list | None] | None:
        """Decoded frames and their boxes, or `None` when nothing of the clip can be read."""
        if row.get("video"):
            video = {"path": row["video"], "start": row.get("start"), "end": row.get("end")}
            try:
                return list(read_video(video, self._max_frames, self._choose)), None
            except (ValueError, OSError) as error:
                failures.append(_failure(row["clip_id"], row["video"], error))
                return None
        entries = row["frames"]
        if not entries:
            failures.append(_failure(row["clip_id"], None, "the clip has no frames"))
            return None
        frames, boxes = [], []
        for i in self._choose(len(entries), self._max_frames, row.get("boxes")):
            frame = self._load_image(row["clip_id"], entries[i], failures)
            if frame is not None:
                frames.append(frame)
                boxes.append(row["boxes"][i] if row.get("boxes") else None)
        return (frames, boxes) if frames else None

    def _augment(self, frames: list, boxes: list | None = None) -> tuple[list, list | None]:
        pictures = [frame if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
        return self.augmentation(pictures, boxes)

    def _choose(self, total: int, num_frames: int, boxes: list | None = None) -> list[int]:
        if self.sampling in ("train", "eval"):
            return sample_frame_indices(total, num_frames, self.sampling)
        order = torch.randperm(total).tolist()
        if self.sampling == "visible" and boxes:
            order.sort(key=lambda i: boxes[i] is None)
        return sorted(order[:num_frames])

    def _process_clips(self, rows: Iterable[dict], clips: Iterable[tuple], padding: str) -> dict[str, torch.Tensor]:
        ready = [clip[0] for clip in clips]
        boxes = [clip[1] or [None] * len(clip[0]) for clip in clips] if self.use_boxes else None
        inputs = dict(
            self.processor(
                videos=ready, boxes=boxes, num_frames=self._max_frames, do_sample_frames=False, padding=padding
            )
        )
        if self.use_text:
            inputs |= self.processor(asr=[row["asr"] for row in rows])
        return inputs

    def _process_images(self, rows: Iterable[dict], images: Iterable[Image.Image]) -> dict[str, torch.Tensor]:
        inputs = dict(self.processor(images=list(images)))
        if self.use_text:
            inputs |= self.processor(titles=[row["title"] for row in rows])
        return inputs

    def _report(self, failures: list[Failure]) -> None:
        for failure in failures:
            logger.warning("Unreadable media in %s: %s", failure["id"], failure["reason"])
        if failures and self.failure_log is not None:
            # One write per line: appends of this size do not interleave between workers and processes.
            with open(self.failure_log, "a", encoding="utf-8") as file:
                for failure in failures:
                    file.write(json.dumps(failure, ensure_ascii=False) + "\n")
                    file.flush()


def read_failure_log(path: str | Path) -> list[Failure]:
    """The distinct failures of a log written by [`RiceCollator`]."""
    if not os.path.isfile(path):
        return []
    lines = dict.fromkeys(Path(path).read_text(encoding="utf-8").splitlines())
    return [json.loads(line) for line in lines]


def _failure(row_id: str, file: str | None, reason: object) -> Failure:
    return {"id": row_id, "file": file or "", "reason": str(reason)}
