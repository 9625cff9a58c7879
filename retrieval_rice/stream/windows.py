"""Overlapping windows of a stream."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .source import Frame

# After a pause longer than this many windows, such as a lost connection, the product may have changed.
_LONGEST_PAUSE = 3


@dataclass(frozen=True)
class Window:
    """
    Attributes:
        start_s, end_s: Seconds from the start of the stream.
        frames: Its frames, at least one.
        numbers: Numbers of the frames in the stream.
        is_first, is_last: Whether it is the first or last window of a part without long pauses.
        asr: Speech around the window, "" for none.
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
    Cuts a stream into overlapping windows, and yields each window when it is complete.

    A pause of more than three windows ends a part of the stream. The last window of a part ends with the last frame;
    it has full length if the part is long enough. Frames are kept only as long as windows need them.

    Args:
        frames: Frames in order of time.
        window_s, hop_s: Length of a window, and distance between starts, in seconds; hop_s <= window_s.
        step_s: Duration of a last frame, in seconds; longer at a lower frame rate.
        length_s: End of the whole stream if known, which limits the last frame.

    Raises:
        ValueError: a length is not above 0, or the hop would leave gaps.
    """
    if not 0 < hop_s <= window_s:
        raise ValueError(f"Windows need 0 < hop <= window, got a hop of {hop_s} s and a window of {window_s} s.")
    kept: deque[tuple[int, Frame]] = deque()
    start_s = first_s = last_s = interval_s = 0.0
    is_first = True

    def window(begin_s: float, end_s: float, is_last: bool) -> Window | None:
        # Frames have rounded time stamps.
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
        # The last window may start up to one hop before the next one.
        while kept[0][1].time_s < start_s - hop_s - 2e-3:
            kept.popleft()
    if kept:
        yield last_window(is_whole=True)
