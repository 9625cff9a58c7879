"""From rows to model inputs, in the DataLoader's workers: choose frames, decode, process, count unreadable media."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision.transforms.v2.functional as tvF
from PIL import Image

from processing_rice import MediaError, open_image, sample_frame_indices
from processing_rice.media_rice import is_file_source, path_of, picture_tensor
from processing_rice.video_media_rice import sample_video

from .augmentation import Box, ClipAugmentation, ClipChange
from .decoding import read_frames, resize_pixels, target_size, to_pixels
from .parsing import read_json_lines
from .paths import path_to_text

logger = logging.getLogger(__name__)

Failure = dict[str, str]
Picture = Image.Image | torch.Tensor


def product_id_hash(product_id: str) -> int:
    """A product's string id as a 63-bit number that is the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(product_id.encode(), digest_size=8).digest(), "big") >> 1


def _open(entry: Any, target: tuple[float, float] | None = None) -> Image.Image:
    """A picture of a row, in any form that the processor takes; raises `MediaError` if it cannot be read."""
    if is_file_source(entry):
        return open_image(entry, target=target)
    try:
        pixels = picture_tensor(entry)
    except ValueError as error:
        raise MediaError.of(str(error), str(error)) from None
    return tvF.to_pil_image(tvF.to_dtype(pixels, torch.uint8, scale=True))


@dataclass
class RiceCollator:
    """
    Turns rows of any builder into model inputs.

    A call with pair rows returns a training batch. An unreadable frame is replaced by the nearest other frame of its
    clip, or left out if there is none. A pair without a readable frame or image is replaced by a copy of another pair
    of the batch, so every process keeps its batch size (equal `product_ids` keep the copy from being a negative). All
    failures are logged and listed in `failure_log`. Randomness comes from torch's generator.

    Args:
        processor: A `RiceProcessor`.
        use_boxes: Pass the rows' boxes to the processor (intended product detection).
        num_frames: Maximum number of frames per clip; the processor's own number by default.
        sampling: A mode of `sample_frame_indices`, such as `"train"` or `"eval"`; `"random"`, which draws new frames
            each time; or `"visible"`, which does the same but prefers frames with a box.
        augmentation: Applied to the frames and the image of training pairs.
        use_text: Tokenise titles and ASR.
        asr_noise: With `use_text`, probability that a training pair's ASR is replaced: half of the time by "", half of
            the time by the ASR of a row of the batch with another product. A training batch then has one more key,
            `asr_is_noise` `(B,)` bool, which is True for rows with the ASR of another row.
        failure_log: File to which one JSON line per unreadable file is appended.
        decode: `"exact"` decodes whole pictures, and the processor resizes them. `"fast"` decodes large JPEGs at
            reduced scale and resizes in 8 bits, see `processing_rice.open_image`.
        pixels: `"float"` gives the model's input. `"uint8"` takes a quarter of the bytes and needs
            `data_rice.decoding.normalize_pixels` on the device.

    Raises:
        ValueError: `decode` or `pixels` is unknown, or `asr_noise` is not a probability.
    """

    processor: Any
    use_boxes: bool = False
    num_frames: int | None = None
    sampling: str = "eval"
    augmentation: ClipAugmentation | None = None
    use_text: bool = False
    failure_log: str | Path | None = None
    decode: Literal["exact", "fast"] = "exact"
    pixels: Literal["float", "uint8"] = "float"
    asr_noise: float = 0.0

    def __post_init__(self):
        if self.decode not in ("exact", "fast"):
            raise ValueError(f'`decode` must be "exact" or "fast", got {self.decode!r}.')
        if self.pixels not in ("float", "uint8"):
            raise ValueError(f'`pixels` must be "float" or "uint8", got {self.pixels!r}.')
        if not 0 <= self.asr_noise <= 1:
            raise ValueError(f"`asr_noise` must lie in 0..1, got {self.asr_noise}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            The processor's keys for images, clips and text, and `product_ids` `(B,)` int64.

        Raises:
            MediaError: no pair of the batch can be read.
        """
        loaded = [self._load_pair(row) for row in rows]
        good = [pair for pair in loaded if pair is not None]
        if not good:
            raise MediaError(
                f"None of the {len(rows)} pairs of a batch could be read (first: {rows[0]['clip_id']}); "
                f"check the data folder with the files listed in {self.failure_log or 'the log'}."
            )
        filled = [pair or good[i % len(good)] for i, pair in enumerate(loaded)]
        rows, clips, images = zip(*filled, strict=True)
        noise = {}
        if self.use_text and self.asr_noise > 0:
            rows, noise["asr_is_noise"] = self._with_noisy_asr(rows)
        batch = self._process_clips(rows, clips, padding="max_length")
        batch |= self._process_images(rows, images) | noise
        batch["product_ids"] = torch.tensor([product_id_hash(_product(row)) for row in rows])
        return batch

    def collate_queries(
        self, rows: list[dict[str, Any]], changes: Sequence[ClipChange] | None = None
    ) -> tuple[dict[str, torch.Tensor], list[int], list[Failure]]:
        """
        Query rows for evaluation, unchanged or with one change per clip.

        Returns:
            The processor's keys for the readable clips (empty if there is none), their positions in `rows`, and the
            failures as `{"id", "file", "reason", "outcome"}`. The outcome is `"replaced"` (by another frame), `"left
            out"` (no other frame, so the clip has fewer frames) or `"skipped"` (no frame of the clip can be read).
        """
        failures: list[Failure] = []
        changes = changes or [None] * len(rows)
        clips = [self._load_clip(row, failures, change) for row, change in zip(rows, changes, strict=True)]
        readable = [i for i, clip in enumerate(clips) if clip is not None]
        inputs = {}
        if readable:
            inputs = self._process_clips([rows[i] for i in readable], [clips[i] for i in readable], padding="longest")
        return inputs, readable, failures

    def collate_gallery(
        self, rows: list[dict[str, Any]], changes: Sequence[ClipChange] | None = None
    ) -> tuple[dict[str, torch.Tensor], list[int], list[Failure]]:
        """Gallery rows for evaluation; returns as `collate_queries`. An unreadable image is `"skipped"`."""
        failures: list[Failure] = []
        changes = changes or [None] * len(rows)
        images = [
            self._load_image(row["image_id"], row["image"], failures, change)
            for row, change in zip(rows, changes, strict=True)
        ]
        readable = [i for i, image in enumerate(images) if image is not None]
        inputs = {}
        if readable:
            inputs = self._process_images([rows[i] for i in readable], [images[i] for i in readable])
        return inputs, readable, failures

    def _with_noisy_asr(self, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], torch.Tensor]:
        # The number of draws is fixed, so that the draw of one row does not change those of other rows.
        noisy, missing, place = torch.rand(3, len(rows)).tolist()
        result, is_wrong = list(rows), torch.zeros(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            if noisy[i] >= self.asr_noise:
                continue
            others = [other["asr"] for other in rows if _product(other) != _product(row)]
            is_wrong[i] = missing[i] >= 0.5 and len(others) > 0
            result[i] = row | {"asr": others[int(place[i] * len(others))] if is_wrong[i] else ""}
        return result, is_wrong

    @property
    def _max_frames(self) -> int:
        return self.num_frames or self.processor.video_processor.num_frames

    def _load_pair(self, row: dict[str, Any]) -> tuple[dict, tuple, Picture] | None:
        failures: list[Failure] = []
        # The draws come first and their number is fixed, so that an unreadable pair does not change those of others.
        changes = (None, None) if self.augmentation is None else (self.augmentation.draw(), self.augmentation.draw())
        clip = self._load_clip(row, failures, changes[0])
        image = self._load_image(row["clip_id"], row["image"], failures, changes[1])
        self._report(failures)
        return None if clip is None or image is None else (row, clip, image)

    def _load_image(
        self, row_id: str, entry: Any, failures: list[Failure], change: ClipChange | None = None
    ) -> Picture | None:
        try:
            picture = self._decode(entry, self.processor.image_processor, change)
        except MediaError as error:
            failures.append(_failure(row_id, path_of(entry), error))
            return None
        return self._finish([picture], None, self.processor.image_processor, change)[0][0]

    def _load_clip(
        self, row: dict[str, Any], failures: list[Failure], change: ClipChange | None = None
    ) -> tuple[list[Picture], list[Box] | None] | None:
        """Frames and their boxes, or `None` if no frame of the clip can be read."""
        frames, boxes = (self._read_video if row.get("video") else self._read_frames)(row, failures, change)
        return self._finish(frames, boxes, self.processor.video_processor, change) if frames else None

    def _read_video(self, row: dict[str, Any], failures: list[Failure], change: ClipChange | None) -> tuple:
        """`boxes` belong to the frames in `box_frames`, counted within the clip's time range; others have no box."""
        boxes = dict(zip(row.get("box_frames") or [], row.get("boxes") or [], strict=False))
        chosen: list[int] = []

        def choose(total: int, max_frames: int) -> list[int]:
            listed = [boxes.get(i) for i in range(total)] if boxes else None
            chosen[:] = self._choose(total, max_frames, listed, augment=change is not None)
            return chosen

        video = {"path": row["video"], "start": row.get("start"), "end": row.get("end")}
        try:
            frames = sample_video(video, self._max_frames, choose)
        except MediaError as error:
            failures.append(_failure(row["clip_id"], row["video"], error))
            return [], None
        for i in set(chosen) - set(frames):
            failures.append(_failure(row["clip_id"], row["video"], f"frame {i} cannot be decoded", "left out"))
        return list(frames.values()), [boxes.get(i) for i in frames] if boxes else None

    def _read_frames(self, row: dict[str, Any], failures: list[Failure], change: ClipChange | None) -> tuple:
        entries = row["frames"]
        if entries is None or len(entries) == 0:
            failures.append(_failure(row["clip_id"], None, "the clip has no frames"))
            return [], None
        boxes = row.get("boxes") or [None] * len(entries)
        chosen = self._choose(len(entries), self._max_frames, boxes, augment=change is not None)
        read, unreadable = read_frames(
            entries, chosen, lambda entry: self._decode(entry, self.processor.video_processor, change)
        )
        if not read:
            # Unreadable substitutes are not listed, because they would only lengthen the list.
            unreadable = [(i, error, "skipped") for i, error, _ in unreadable if i in chosen]
        for i, error, outcome in unreadable:
            failures.append(_failure(row["clip_id"], path_of(entries[i]), error, outcome))
        return list(read.values()), [boxes[i] for i in read]

    def _decode(self, entry: Any, part: Any, change: ClipChange | None) -> Picture:
        """Decodes for the image or video processor `part`, which resizes the picture after the crop."""
        # A picture that is not square stays larger on one side; the reduced scale keeps at least this size.
        size = target_size(part, (1, 1)) if self.decode == "fast" else None
        if size is None:
            return _open(entry)
        left, top, right, bottom = (0.0, 0.0, 1.0, 1.0) if change is None else change.crop
        return _open(entry, target=(size[0] / (bottom - top), size[1] / (right - left)))

    def _finish(
        self, pictures: Sequence[Any], boxes: list[Box] | None, part: Any, change: ClipChange | None
    ) -> tuple[list[Picture], list[Box] | None]:
        """
        Applies the change. With `decode="fast"` it also resizes, before the colours change, because that costs less on
        small pictures. With `decode="exact"` a picture without a change stays as it was read.
        """
        if self.decode == "exact" and change is None:
            return list(pictures), boxes

        def resize(picture: torch.Tensor) -> torch.Tensor:
            size = target_size(part, picture.shape[-2:])
            return picture if size is None else resize_pixels(picture, size, part.resample)

        pixels = [to_pixels(picture) for picture in pictures]
        if change is None:
            return [resize(picture) for picture in pixels], boxes
        return change.apply(pixels, boxes, resize)

    def _choose(self, total: int, num_frames: int, boxes: Sequence[Box] | None, augment: bool) -> list[int]:
        if self.sampling in ("random", "visible"):
            chosen = torch.randperm(total).tolist()
            if self.sampling == "visible" and boxes:
                chosen.sort(key=lambda i: boxes[i] is None)
            chosen = sorted(chosen[:num_frames])
        else:
            chosen = sample_frame_indices(total, num_frames, self.sampling)
        return self.augmentation.drop_frames(chosen) if augment else chosen

    def _process_clips(self, rows: Iterable[dict], clips: Iterable[tuple], padding: str) -> dict[str, torch.Tensor]:
        ready = [clip[0] for clip in clips]
        boxes = [clip[1] or [None] * len(clip[0]) for clip in clips] if self.use_boxes else None
        settings = {"num_frames": self._max_frames, "do_sample_frames": False, "padding": padding}
        inputs = dict(self.processor(videos=ready, boxes=boxes, **settings, **self._settings))
        inputs["pixel_values_videos"] = self._as_asked(inputs["pixel_values_videos"])
        if self.use_text:
            inputs |= self.processor(asr=[row["asr"] for row in rows])
        return inputs

    def _process_images(self, rows: Iterable[dict], images: Iterable[Picture]) -> dict[str, torch.Tensor]:
        inputs = dict(self.processor(images=list(images), images_kwargs=self._settings))
        inputs["pixel_values"] = self._as_asked(inputs["pixel_values"])
        if self.use_text:
            inputs |= self.processor(titles=[row["title"] for row in rows])
        return inputs

    @property
    def _settings(self) -> dict[str, bool]:
        """The steps that the processor leaves to `normalize_pixels`."""
        return {"do_rescale": False, "do_normalize": False} if self.pixels == "uint8" else {}

    def _as_asked(self, pixels: torch.Tensor) -> torch.Tensor:
        # Without rescaling, the processor returns the whole numbers of its resizing.
        return pixels.to(torch.uint8) if self.pixels == "uint8" else pixels

    def _report(self, failures: list[Failure]) -> None:
        for failure in failures:
            logger.warning(
                "Unreadable media in %s (%s): %s", failure["id"], failure["outcome"], failure_words(failure)
            )
        if failures and self.failure_log is not None:
            # One write per line: appends of this size do not mix between workers and processes.
            with open(self.failure_log, "a", encoding="utf-8") as file:
                for failure in failures:
                    file.write(json.dumps(failure, ensure_ascii=False) + "\n")
                    file.flush()


def read_failure_log(path: str | Path) -> list[Failure]:
    """The distinct failures in a log of [`RiceCollator`]."""
    if not os.path.isfile(path):
        return []
    return list({tuple(failure.items()): failure for _, failure in read_json_lines(path)}.values())


def count_failures(failures: Iterable[Failure]) -> dict[str, int]:
    """
    Counts the failures of `read_failure_log`: `unreadable_media` (different files), `replaced_frames` and
    `left_out_frames` (of clips that were used), and `skipped_pairs` (not used).
    """
    failures = list(failures)
    outcomes = {
        outcome: {(failure["id"], failure["file"]) for failure in failures if failure["outcome"] == outcome}
        for outcome in ("replaced", "left out", "skipped")
    }
    return {
        # An image that several clips share is listed once per clip.
        "unreadable_media": len({failure["file"] or failure["id"] for failure in failures}),
        "replaced_frames": len(outcomes["replaced"]),
        "left_out_frames": len(outcomes["left out"]),
        "skipped_pairs": len({row_id for row_id, _ in outcomes["skipped"]}),
    }


def _product(row: dict[str, Any]) -> str:
    return row["product_id"] or row["clip_id"]


def _failure(row_id: str, file: str | None, reason: object, outcome: str = "skipped") -> Failure:
    # The file has its own key. Logs are UTF-8, but a file name may hold any bytes.
    words = getattr(reason, "reason", "") or str(reason)
    words = words.encode("utf-8", "backslashreplace").decode()
    return {"id": row_id, "file": path_to_text(file or ""), "reason": words, "outcome": outcome}


def failure_words(failure: Failure) -> str:
    """The file of a failure, if it is known, and the reason."""
    return ": ".join(filter(None, (failure.get("file"), failure["reason"])))


__all__ = ["RiceCollator", "count_failures", "failure_words", "product_id_hash", "read_failure_log"]
