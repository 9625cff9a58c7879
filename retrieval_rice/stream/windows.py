"""Overlapping windows of a stream."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
        asr: What is said around it, "" for nothing.
    """

    start_s: float
    end_s: float
    frames: list[Frame]
    numbers: list[int]
    is_first: bool
    is_last: bool
    asr: str = ""


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
