"""Overlapping windows of a stream, and what a window's frames are together once each of them is encoded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .source import Frame

# A pause longer than this many windows, such as a lost connection, says nothing of what was on screen meanwhile.
_LONGEST_PAUSE = 3


@dataclass(frozen=True)
class Window:
    """
    Attributes:
        start_s, end_s: Seconds from the start of the stream.
        frames: Those within, at least one.
        numbers: Their numbers in the stream.
        is_first, is_last: Whether it begins, or ends, a stretch without long pauses.
    """

    start_s: float
    end_s: float
    frames: list[Frame]
    numbers: list[int]
    is_first: bool
    is_last: bool


def cut_windows(
    frames: Iterable[Frame], window_s: float = 4.0, hop_s: float = 1.0, step_s: float = 0.4, length_s: float = 0.0
) -> Iterator[Window]:
    """
    Cuts a stream into overlapping windows, each given as soon as it is complete.

    The last window of a stretch ends with its last frame, and is as long as the others where there is as much. A pause
    of more than three windows ends a stretch. Frames are kept no longer than windows need them.

    Args:
        frames: In order of time.
        window_s, hop_s: Length of a window, and from one start to the next, in seconds; hop_s <= window_s.
        step_s: What a last frame lasts, in seconds; longer where frames come more slowly.
        length_s: Where the whole stream ends, if known, so that its last frame lasts no longer.

    Raises:
        ValueError: for lengths that are not above 0, or a hop that would leave gaps.
    """
    if not 0 < hop_s <= window_s:
        raise ValueError(f"Windows need 0 < hop <= window, got a hop of {hop_s} s and a window of {window_s} s.")
    kept: deque[tuple[int, Frame]] = deque()
    start_s = first_s = last_s = interval_s = 0.0
    is_first = True

    def window(begin_s: float, end_s: float, is_last: bool) -> Window | None:
        # Frames carry rounded time stamps.
        members = [(i, f) for i, f in kept if begin_s - 2e-3 <= f.time_s and (is_last or f.time_s < end_s - 2e-3)]
        if not members:
            return None
        numbers, pictures = zip(*members)
        return Window(begin_s, end_s, list(pictures), list(numbers), is_first, is_last)

    def last_window(is_whole: bool) -> Window | None:
        end_s = last_s + max(step_s, min(interval_s, window_s))
        if is_whole and length_s > last_s:
            end_s = min(end_s, length_s)
        return window(max(end_s - window_s, first_s), end_s, is_last=True)

    for number, frame in enumerate(frames):
        if kept and frame.time_s - last_s > _LONGEST_PAUSE * window_s:
            yield last_window(is_whole=False)
            kept.clear()
        if not kept:
            start_s = first_s = last_s = frame.time_s
            is_first = True
        while frame.time_s >= start_s + window_s - 2e-3:
            complete = window(start_s, start_s + window_s, is_last=False)
            if complete is not None:
                yield complete
                is_first = False
            start_s += hop_s
        kept.append((number, frame))
        interval_s, last_s = frame.time_s - last_s, frame.time_s
        # The last window may begin up to one hop before the next one.
        while kept[0][1].time_s < start_s - hop_s - 2e-3:
            kept.popleft()
    if kept:
        yield last_window(is_whole=True)


def shares_frames(model) -> bool:
    """
    Whether a window's encoding can be joined from those of its frames, see [`join_frames`].

    With `normalize_frames=False` a clip's embedding is made of features whose lengths an encoded frame no longer has;
    the poolings `"lstm"` and `"transformer"` change a frame by those beside it; and a model that does not tell how it
    pools may do anything. Their windows are to be encoded whole.
    """
    config = getattr(model, "config", None)
    pooling = getattr(config, "temporal_pooling", "mean")
    return getattr(config, "normalize_frames", None) is True and pooling in ("mean", "attention")


def join_frames(frames, pooling: Callable[[Tensor, Tensor], Tensor] | None = None):
    """
    Frames, each encoded as a clip of one frame, as one clip; equal to encoding them together where
    [`shares_frames`] holds: the frames' embeddings are pooled, their tokens stand one after the other.

    Args:
        frames (`RiceClips` with one row per frame): Encoded without ASR.
        pooling: The model's `temporal_pooling`, by default the mean.

    Returns:
        `RiceClips` with one row.
    """
    features = frames.embeds[None]
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    pooled = features.mean(dim=1) if pooling is None else pooling(features, mask)
    tensors = {"embeds": nn.functional.normalize(pooled, dim=-1)}
    for name in ("keys", "values", "mask"):
        tokens: Tensor | None = getattr(frames, name)
        if tokens is not None:
            tensors[name] = tokens.flatten(0, 1)[None]
    return type(frames)(model_fingerprint=frames.model_fingerprint, **tensors)
