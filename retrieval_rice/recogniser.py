"""Recognises the product of a clip, and the products of a stream with their times.

recogniser = Recogniser(model, processor, GalleryIndex.load("shop.index", model))
answer = recogniser.recognise("clip.mp4")
for segment in recogniser.stream("rtsp://camera/1"):
    print(table_row(segment))
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from processing_rice import open_image, sample_frame_indices
from processing_rice.media_rice import is_file_source, picture_tensor
from processing_rice.video_media_rice import VideoReader

from .stream.source import Frame, frames_of_folder, is_address, open_stream
from .stream.speech import ASR_AFTER_S, ASR_BEFORE_S, Hearing
from .stream.timeline import Hysteresis, Segment, Timeline
from .stream.windows import Window, cut_windows

logger = logging.getLogger(__name__)

BOXES = ("none", "detector", "ground_truth")
_FRAMES_AT_ONCE = 32


def candidates_of(index: Any) -> int:
    """Number of images per clip that get pair scores: that of the index's calibration, else 100."""
    calibrated = getattr(getattr(index, "calibration", None), "rerank", None)
    return 100 if calibrated is None else calibrated


class Recogniser:
    """
    Args:
        model: A `RiceModel` in eval mode, or an object with its `encode_clips` and, for streams, `encode_frames` and
            `pool_frames`.
        processor: The processor saved with the model.
        index: A `GalleryIndex` of the same model, or an object with its search methods.
        boxes: Source of the boxes of the intended product: `"none"` (the whole frame is used), `"detector"`, or
            `"ground_truth"` (passed to `recognise`).
        detector: An object with `detect(frames) -> boxes`: for each PIL picture a box, left-top-right-bottom in 0..1,
            or `None`. Required for `boxes="detector"`, and allowed only there.
        rerank: Number of images per clip that get matching or alignment scores; by default that of the index's
            calibration, else 100. 0: clips are ranked by embedding only.

    Raises:
        ValueError: `boxes` is unknown, `detector` is missing or not allowed, or the model does not support boxes.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        index: Any,
        boxes: str = "none",
        detector: Any = None,
        rerank: int | None = None,
    ):
        if getattr(model, "training", False):
            raise ValueError("The model is in training mode; call `model.eval()` first.")
        if boxes not in BOXES:
            raise ValueError(f"`boxes` must be one of {', '.join(map(repr, BOXES))}, got {boxes!r}.")
        if (boxes == "detector") != (detector is not None):
            raise ValueError('`boxes="detector"` and `detector` belong together; give both or neither.')
        if boxes != "none" and not getattr(model.config, "accepts_patch_mask", True):
            raise ValueError(
                f'The model\'s encoder ({model.config.vision_config.model_type}) cannot use boxes; use `boxes="none"`.'
            )
        self.model, self.processor, self.index = model, processor, index
        self.boxes, self.detector = boxes, detector
        self.rerank = candidates_of(index) if rerank is None else rerank

    @property
    def num_frames(self) -> int:
        """The model's number of frames per clip."""
        return self.processor.video_processor.num_frames

    @torch.no_grad()
    def recognise(
        self,
        frames: str | os.PathLike | Sequence,
        boxes: Sequence | None = None,
        asr: str = "",
        live_id: str | None = None,
        top_k: int = 10,
    ):
        """
        Recognises the product of one clip.

        Args:
            frames: Pictures (PIL, arrays, tensors, paths), a video file, or a folder of pictures. A longer clip is
                sampled to the processor's number of frames. An incomplete video file is used up to its end.
            boxes: With `boxes="ground_truth"`, one entry per picture: a box left-top-right-bottom in 0..1, several
                boxes, or `None`.
            asr: Speech of the clip, for models that read text.
            live_id: Search the images of this livestream only.
            top_k: Maximum number of hits.

        Returns:
            The index's `Answer`.

        Raises:
            ValueError, FileNotFoundError: the clip cannot be read, the boxes do not fit, or the index has no images of
                the livestream.
        """
        if (self.boxes == "ground_truth") != (boxes is not None):
            needed = "needs them for each clip" if boxes is None else "does not use them"
            raise ValueError(f"`boxes` of a clip: a recogniser with boxes={self.boxes!r} {needed}.")
        if isinstance(frames, (str, os.PathLike)):
            pictures: Sequence = self._read_clip(frames, sample=boxes is None)
        else:
            pictures = list(frames)
        if self.boxes == "detector":
            # Only the frames in use are read.
            pictures = [_to_picture(pictures[i]) for i in self._sample(len(pictures))] if pictures else []
            boxes = self.detector.detect(pictures)
        inputs = self._process([pictures], [boxes], [asr] if asr else None)
        answer = self.index.search(self.model.encode_clips(**inputs), live_id, top_k=top_k, rerank=self.rerank)[0]
        if not answer.hits:
            # Checked late, because a remote index reads all rows to list its livestreams.
            self._check_live(live_id)
        return answer

    def stream(
        self,
        source: str | os.PathLike | Iterable[Frame],
        *,
        live_id: str | None = None,
        window_s: float = 4.0,
        hop_s: float = 1.0,
        fps: float | None = None,
        top_k: int = 5,
        hysteresis: Hysteresis | None = None,
        speech: Iterable | None = None,
        asr_before_s: float | None = None,
        asr_after_s: float | None = None,
        on_start: Callable[[Any, float], None] | None = None,
        progress: bool = False,
    ) -> Iterator[Segment]:
        """
        Recognises the products of a stream. Overlapping windows are searched, and their answers are joined to
        segments. Each segment is yielded when it is closed. Memory does not grow with time.

        A frame is encoded once and shared by its windows.

        Args:
            source: A source for [`open_stream`], an open stream (which counts dropped frames and can be stopped), or
                any iterable of frames in order of time.
            live_id: Search the images of this livestream only.
            window_s, hop_s: Length of a window, and distance between the starts of windows, in seconds.
            fps: Frames per second of a source that is opened here; by default the model's number of frames per window.
            top_k: Maximum number of hits per window that are followed over time.
            hysteresis: Rules for a switch of products; by default those for the index.
            speech: Speech of the stream, for models that read text: an iterable of [`Word`]s or `(start_s, end_s,
                text)` in order of time, or a [`Hearing`] of one (which counts late words). The pictures of a live
                source never wait for words.
            asr_before_s, asr_after_s: A window gets the words from this many seconds before it to this many after it;
                by default 6 and 2.
            on_start: Called with the hit (`None`: no product) and the time in seconds when a new product is known to
                be on screen, long before its segment is closed.
            progress: Show a progress bar on a terminal.

        Raises:
            ValueError, FileNotFoundError: the source cannot be opened, the livestream is unknown, `boxes` is
                `"ground_truth"`, or there is `speech` for a model that reads no text.
        """
        if self.boxes == "ground_truth":
            raise ValueError('A stream has no ground-truth boxes; use `boxes="none"` or a detector.')
        self._check_live(live_id)
        if not 0 < hop_s <= window_s:
            raise ValueError(f"Windows need 0 < hop <= window, got a hop of {hop_s} s and a window of {window_s} s.")
        around_s = self._check_speech(speech, asr_before_s, asr_after_s)
        fps = fps or getattr(source, "fps", None) or self.num_frames / window_s
        if isinstance(source, (str, os.PathLike)):
            source = open_stream(source, fps)
        if getattr(self.index, "calibration", self) is None:
            logger.warning(
                "the index is not calibrated: a product is named at all times, and confidences are not probabilities"
            )
        length_s = getattr(source, "duration_s", None) or 0.0
        frames = _with_progress(source, length_s) if progress else source
        windows = cut_windows(frames, window_s, hop_s, 1 / fps, length_s)
        timeline = Timeline(hysteresis or Hysteresis.for_index(self.index))
        if speech is None:
            return self._segments(windows, timeline, live_id, top_k, on_start)
        if not isinstance(speech, Hearing):
            speech = Hearing(speech, waits=getattr(source, "is_recording", isinstance(source, Sequence)))
        windows = _with_words(windows, speech, *around_s)
        segments = self._segments(windows, timeline, live_id, top_k, on_start)
        return (replace(segment, said=speech.said(segment.start_s, segment.end_s)) for segment in segments)

    @property
    def reads_asr(self) -> bool:
        """Whether the model reads speech as text."""
        return getattr(self.model.config, "text_config", None) is not None

    def _check_speech(self, speech, before_s: float | None, after_s: float | None) -> tuple[float, float]:
        """Checks speech arguments; returns the seconds before and after a window whose words it gets."""
        for name, seconds in (("asr_before_s", before_s), ("asr_after_s", after_s)):
            if seconds is None:
                continue
            if speech is None:
                raise ValueError(f"`{name}` belongs to `speech`; give both, or leave it out.")
            if not 0 <= seconds < math.inf:
                raise ValueError(f"`{name}` must be a number of seconds of 0 or more, got {seconds}.")
        if speech is not None and not self.reads_asr:
            raise ValueError(
                "The model reads no text, so `speech` would have no effect; leave it out, or use a "
                "model with a `text_config`."
            )
        return ASR_BEFORE_S if before_s is None else before_s, ASR_AFTER_S if after_s is None else after_s

    def _segments(self, windows, timeline: Timeline, live_id, top_k: int, on_start) -> Iterator[Segment]:
        encoder = _WindowEncoder(self)
        for window in windows:
            if window.is_first:
                timeline.start(window.start_s)
            was = (timeline.is_decided, timeline.since_s)
            with torch.no_grad():
                answer = self.index.search(encoder.encode(window), live_id, top_k=top_k, rerank=self.rerank)[0]
            yield from timeline.add((window.start_s + window.end_s) / 2, answer)
            if on_start is not None and timeline.is_decided and was != (True, timeline.since_s):
                on_start(timeline.current, timeline.since_s)
            if window.is_last:
                yield from timeline.finish(window.end_s)

    def _check_live(self, live_id: str | None) -> None:
        if live_id is None or not hasattr(self.index, "live_ids"):
            return
        known = self.index.live_ids()
        if live_id not in known:
            shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
            raise ValueError(
                f"the index has no images of livestream {live_id!r} (it has: {shown or 'none'}); name another one."
            )

    def _process(self, clips: Sequence[Sequence], boxes: Sequence, asr: list[str] | None = None) -> dict:
        """Model inputs of clips and their boxes."""
        kwargs = {}
        if self.boxes != "none":
            kwargs["boxes"] = list(boxes)
        if asr is not None:
            kwargs["asr"] = asr
        return dict(self.processor(videos=list(clips), **kwargs))

    def _sample(self, count: int) -> list[int]:
        return sample_frame_indices(count, self.num_frames)

    def _read_clip(self, path: str | os.PathLike, sample: bool) -> list:
        if is_address(path):
            raise ValueError(f"{path} is not a file; use `stream` for addresses and cameras.")
        if os.path.isdir(path):
            listing = frames_of_folder(path)
            if listing.left_out:
                logger.warning("%s", listing.note())
            return listing.pictures
        with VideoReader(path) as video:
            frames = [frame.picture for frame in video.frames(self._sample(len(video)) if sample else None)]
            if video.num_missing:
                logger.warning(
                    "%s is cut short: %d of %d frames could be read and are used",
                    *(path, len(video), len(video) + video.num_missing),
                )
        return frames


def _with_progress(frames: Iterable[Frame], length_s: float) -> Iterator[Frame]:
    with tqdm(desc="recognising", total=round(length_s) or None, unit="s", disable=None) as bar:
        for frame in frames:
            bar.update(int(frame.time_s) - bar.n)
            yield frame


def _with_words(windows: Iterable[Window], hearing: Hearing, before_s: float, after_s: float) -> Iterator[Window]:
    """Windows with the words around them."""
    first_s = 0.0
    hearing.start()
    try:
        for window in windows:
            if window.is_first:
                first_s = window.start_s
            span = (window.start_s - before_s, window.end_s + after_s)
            yield replace(window, asr=hearing.text(*span, first_s=first_s - before_s, now_s=window.end_s))
    finally:
        hearing.stop()


def _to_picture(frame) -> Image.Image:
    """Detectors take PIL pictures."""
    if is_file_source(frame):
        return open_image(frame)
    from torchvision.transforms.v2.functional import to_pil_image

    return to_pil_image(picture_tensor(frame, "A frame"))


class _WindowEncoder:
    """Encodes each frame once, for all windows that share it."""

    def __init__(self, recogniser: Recogniser):
        self.recogniser, self.model = recogniser, recogniser.model
        # Frame number -> encodings.
        self.known: dict[int, Any] = {}
        # Frames without a box, if the processor leaves these out of a clip.
        self.empty: set[int] = set()
        video_processor = recogniser.processor.video_processor
        self.drops_empty = getattr(video_processor, "frames_without_box", "keep") == "drop"

    def encode(self, window: Window):
        """`RiceClips` with the window as its only row."""
        self.known = {number: self.known[number] for number in window.numbers if number in self.known}
        new = [(n, f.picture) for n, f in zip(window.numbers, window.frames) if n not in self.known]
        for start in range(0, len(new), _FRAMES_AT_ONCE):
            numbers, pictures = zip(*new[start : start + _FRAMES_AT_ONCE])
            encoded = self._encode_frames(numbers, pictures)
            self.known |= {number: encoded[row] for row, number in enumerate(numbers)}
        self.empty &= self.known.keys()
        shown = [number for number in window.numbers if number not in self.empty] or window.numbers
        parts = [self.known[number] for number in shown]
        frames = type(parts[0]).cat(parts)
        if not window.asr:
            return self.model.pool_frames(frames)
        tokens = self.recogniser.processor(asr=[window.asr])
        return self.model.pool_frames(
            frames, **{name: value.to(frames.features.device) for name, value in tokens.items()}
        )

    def _encode_frames(self, numbers: Sequence[int], pictures: Sequence):
        detector, boxes = self.recogniser.detector, [None] * len(pictures)
        if detector is not None:
            boxes = detector.detect(list(pictures))
        if detector is not None and self.drops_empty:
            self.empty |= {number for number, box in zip(numbers, boxes) if box is None}
        # Each picture is a separate clip here.
        inputs = self.recogniser._process([[picture] for picture in pictures], [[box] for box in boxes])
        frames = (inputs.get(name) for name in ("pixel_values_videos", "patch_mask"))
        device = getattr(self.model, "device", None)
        return self.model.encode_frames(*(None if part is None else part[:, 0].to(device) for part in frames))
