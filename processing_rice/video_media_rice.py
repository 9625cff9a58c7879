"""The one reader of video: the frames of a file, their times and their images.

The list of frames is read without decoding. Requested frames are then decoded from the key frame before them.
"""

import math
import os
import reprlib
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .media_rice import MediaError, media_error, printable
from .sampling_rice import sample_frame_indices
from .video_container_rice import (
    BACK_S,
    LEAP_S,
    NO_TIME_STAMPS,
    Clock,
    clock_leaps,
    decoded_frames,
    frame_picture,
    import_av,
    open_container,
    start_of,
    video_stream,
)

# Containers round time stamps to their clock, often milliseconds.
_ROUNDING_S = 1e-3
# Up to this many packets are read instead of seeking over them.
_NEAR = 50
# How much earlier to search for a key frame, in seconds, tried in this order.
_STEPS_BACK = (0, 2, 10, 60)
_KEPT_TABLES = 16


class VideoInfo(NamedTuple):
    """Width and height in pixels of a video's first frame as displayed, and the length of the file in seconds."""

    width: int
    height: int
    seconds: float


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """
    Reads a video's header and its first frame. It also reads all packets to find the length, unless the file is an MP4
    whose header lists them.

    Raises:
        MediaError: as [`VideoReader`].
    """
    with open_container(path) as container:
        stream = video_stream(container, printable(path))
        first = next(decoded_frames(container.demux(stream), stream, lambda: None, lambda reason: None), None)
        if first is None:
            raise media_error("video", path, "cannot be decoded (not one of its frames)")
        size = frame_picture(first, stream).size
        if _lists_frames(container, stream) and container.duration:
            return VideoInfo(*size, container.duration / 1e6)
    with VideoReader(path) as video:
        return VideoInfo(*size, video.end_s)


def _lists_frames(container, stream) -> bool:
    """Whether the header lists all frames, as in an MP4 file; a fragmented MP4 may be several recordings."""
    return "mp4" in container.format.name and stream.frames > 0


class VideoFrame(NamedTuple):
    """A frame: its number in the clip, its time in seconds since the start of the file, its image (RGB, upright)."""

    number: int
    time_s: float
    picture: Image.Image


@dataclass
class _Table:
    """
    The packets of a file, or of a part that begins with a key frame, in file order, and those that are shown.

    Attributes:
        pts, is_key, part: Presentation time stamp, key frame or not, and recording of each packet (a file may be
            several recordings joined).
        shown: Indices of the shown packets in display order.
        times: Time of each shown packet in seconds.
        end_s: End of the last frame in seconds.
        is_decoded: Whether the file had to be decoded to identify its frames; `shown` then holds frame numbers.
    """

    pts: array = field(default_factory=lambda: array("q"))
    is_key: bytearray = field(default_factory=bytearray)
    part: array = field(default_factory=lambda: array("i"))
    shown: Sequence[int] = ()
    times: list[float] = field(default_factory=list)
    end_s: float = 0.0
    is_decoded: bool = False

    @property
    def is_joined(self) -> bool:
        """Whether recordings were joined, so that a time stamp may occur twice."""
        return bool(self.part) and self.part[-1] > 0

    def key_before(self, packet: int) -> int:
        """Index of the last key frame that is neither stored nor shown after a packet."""
        key = packet
        while key > 0 and self.part[key - 1] == self.part[packet]:
            if self.is_key[key] and self.pts[key] <= self.pts[packet]:
                break
            key -= 1
        return key


def _read_packets(container, stream, packets: Iterator, until_s: float) -> tuple[_Table, bytearray, int] | None:
    """The packets until `until_s`, which of them are shown, and the duration of the last one in the stream's unit."""
    table, visible, duration = _Table(), bytearray(), 0
    latest, part, begun = None, 0, False
    back, leap = (round(seconds / stream.time_base) for seconds in (BACK_S, LEAP_S))
    leaps, start_s = clock_leaps(container), start_of(container)
    for packet in packets:
        pts, is_key = packet.pts, packet.is_keyframe
        if pts is None:
            return None
        behind = 0 if latest is None else latest - pts
        # Packets that are shown before earlier-stored ones are behind too, but are not key frames.
        if (is_key and behind > back) or behind > leap or (leaps and behind < -leap):
            part, begun, latest = part + 1, False, None
        if packet.dts is not None and float(packet.dts * stream.time_base) - start_s > until_s and visible:
            break
        if latest is None or pts >= latest:
            latest, duration = pts, packet.duration or 0
        begun = begun or is_key
        visible.append(begun and not packet.is_discard)
        table.pts.append(pts)
        table.is_key.append(is_key)
        table.part.append(part)
    return table, visible, duration


def _scan(container, stream, packets: Iterator, until_s: float = math.inf) -> _Table | None:
    """The frames shown until `until_s`, without decoding; `None` if time stamps do not identify frames."""
    read = _read_packets(container, stream, packets, until_s)
    if read is None or not any(read[1]):
        return None
    table, visible, duration = read
    # Frames shown before the first key frame depend on frames that the file does not hold.
    first = table.is_key.find(1)
    places = ((table.part[i], table.pts[i], i) for i, is_visible in enumerate(visible) if is_visible)
    places = sorted(place for place in places if place >= (table.part[first], table.pts[first]))
    if any(one[:2] == other[:2] for one, other in pairwise(places)):
        return None
    clock = Clock(container, stream)
    table.shown = array("q", [i for _, _, i in places])
    table.times = [clock.time_of(float(pts * stream.time_base)) for _, pts, _ in places]
    # Without a frame rate the durations are unknown too.
    lasts_s = float(duration * stream.time_base) if stream.average_rate else 0.0
    table.end_s = table.times[-1] + (lasts_s or clock.step_s)
    return table


class _Tables:
    """Cache of the tables of the files that were last read completely; one recording often holds many clips."""

    def __init__(self):
        self.tables: OrderedDict[tuple, _Table] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple) -> _Table | None:
        with self.lock:
            if key in self.tables:
                self.tables.move_to_end(key)
            return self.tables.get(key)

    def put(self, key: tuple, table: _Table) -> None:
        with self.lock:
            self.tables[key] = table
            while len(self.tables) > _KEPT_TABLES:
                self.tables.popitem(last=False)


_TABLES = _Tables()


class VideoReader:
    """
    The frames of a video file, or of a time range of it, numbered in display order.

    A range holds the frame that is on screen at its start and the frames that appear before its end. In an MP4 or
    Matroska file only the range is read. In other containers, whose clock may restart, all packets from the start of
    the file are read once. Frames are decoded from the key frame before them. Use it in a `with` statement.

    Args:
        source: Path, or `{"path", "start", "end"}` in seconds; a missing or negative end means the end of the file.
        max_pixels: Maximum number of pixels of a frame, by default `MAX_PIXELS`.
        on_packet: Called for every packet read; an exception that it raises ends the reading.

    Attributes:
        times: Time of each frame in seconds since the start of the file, ascending.
        end_s: End of the last frame that was read, in seconds.
        num_missing: Frames that the header lists but a truncated file lacks; 0 if unknown.
        num_decoded: Packets given to the decoder so far.
        num_damaged: Packets that could not be decoded so far.

    Raises:
        MediaError: if the file is missing (`MissingMediaError`), holds no video, cannot be decoded or has too many
            pixels; if the range holds no frame.
    """

    def __init__(
        self,
        source: str | os.PathLike | Mapping[str, Any],
        max_pixels: int | None = None,
        on_packet: Callable[[], None] = lambda: None,
    ):
        self.path, self.start, self.end = _clip_range(source)
        self.name = printable(self.path)
        self.max_pixels, self.on_packet = max_pixels, on_packet
        self.num_decoded = self.num_damaged = 0
        self._container: Any = None
        # Time stamp to seek to for the table's first packet; None if that is the first packet of the file.
        self._origin: int | None = None
        self._position: int | None = None
        try:
            self._open()
            self._seeks = not self._container.format.flags & NO_TIME_STAMPS
            self._table = self._read_table()
            self._first, last = self._choose_range()
        except BaseException:
            self.close()
            raise
        self.times = self._table.times[self._first : last]
        self.end_s = self._table.end_s
        is_listed = _lists_frames(self._container, self._stream) and self.start is None and self.end is None
        self.num_missing = max(0, len(self._stream.index_entries) - len(self._table.pts)) if is_listed else 0

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.times)

    def close(self) -> None:
        """Closes the file. Further calls have no effect."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def frames(self, numbers: Iterable[int] | None = None) -> Iterator[VideoFrame]:
        """
        Decodes frames.

        Args:
            numbers: Frame numbers, counted from 0 within the range; by default all.

        Returns:
            The frames in display order. A frame that cannot be decoded is replaced by the last decoded frame since its
            key frame; without one it is left out.

        Raises:
            ValueError: for numbers outside the range.
        """
        wanted = sorted(set(range(len(self)) if numbers is None else numbers))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < len(self):
            raise ValueError(
                f"Frames {wanted[0]} to {wanted[-1]} of {self.name} were requested, but it has {len(self)} frames; "
                f"give numbers from 0 to {len(self) - 1}."
            )
        walk = self._count_to if self._table.is_decoded else self._jump_to
        for place, frame in walk([self._first + number for number in wanted]):
            yield VideoFrame(place - self._first, self._table.times[place], frame_picture(frame, self._stream))

    def affordable(self, numbers: Iterable[int], max_pixels: int) -> list[int]:
        """
        Frames within a budget of decoded pixels; decoding a frame also decodes all frames since its key frame.

        Args:
            numbers: Frame numbers, as in `frames`.
            max_pixels: Budget of decoded pixels.

        Returns:
            `numbers` in order. If they exceed the budget, frames far from their key frame are replaced by it.
        """
        wanted, table = sorted(set(numbers)), self._table
        context = self._stream.codec_context
        most = max(1, max_pixels // max(1, context.width * context.height))
        if table.is_decoded:
            return [number for number in wanted if self._first + number < most]
        packets = {number: table.shown[self._first + number] for number in wanted}
        keys = {number: table.key_before(packet) for number, packet in packets.items()}
        last = {keys[number]: packet for number, packet in packets.items()}
        if sum(packet - key + 1 for key, packet in last.items()) <= most:
            return wanted
        reach = most // len(last)
        shown = {packet: number for number, packet in enumerate(table.shown[self._first : self._first + len(self)])}
        near = {
            number if packets[number] - key < reach else shown[key]
            for number, key in keys.items()
            if packets[number] - key < reach or key in shown
        }
        return sorted(near)[:most]

    def _open(self) -> None:
        self.close()
        self._container = open_container(self.path)
        self._stream = video_stream(self._container, self.name, self.max_pixels)
        self._position = None

    def _packets(self) -> Iterator:
        """The packets that hold data; a truncated file ends where reading fails."""
        packets, errors = self._container.demux(self._stream), (import_av().FFmpegError, OSError)
        while True:
            try:
                packet = next(packets, None)
            except errors:
                return
            if packet is None:
                return
            self.on_packet()
            if packet.size:
                yield packet

    def _read_table(self) -> _Table:
        if self.start is not None or self.end is not None:
            if self._has_one_clock():
                self._seek_before(self.start or 0.0)
                until_s = math.inf if self.end is None else self.end
                table = _scan(self._container, self._stream, self._packets(), until_s)
                if table is not None:
                    return table
            self._origin = None
            self._open()
        status = os.stat(self.path)
        key = (os.path.realpath(self.path), status.st_size, status.st_mtime_ns)
        table = _TABLES.get(key)
        if table is None:
            kind = self._container.format.name
            # AVI stores no presentation times, so those of reordered frames are guesses. Key frames of a GIF depend on
            # earlier frames.
            is_vague = kind == "gif" or (kind == "avi" and self._stream.codec_context.has_b_frames)
            table = None if is_vague else _scan(self._container, self._stream, self._packets())
            table = table or self._decode_table()
            _TABLES.put(key, table)
        return table

    def _decode_table(self) -> _Table:
        self._open()
        clock = Clock(self._container, self._stream)
        times = []
        for frame in self._all_frames():
            times.append(clock.time_of(frame.time))
        if not times:
            raise media_error("video", self.name, "cannot be decoded (not one of its frames)")
        return _Table(shown=range(len(times)), times=times, end_s=times[-1] + clock.step_s, is_decoded=True)

    def _all_frames(self) -> Iterator:
        def count() -> None:
            self.num_damaged += 1

        packets = self._container.demux(self._stream)
        for frame in decoded_frames(packets, self._stream, count, lambda reason: None):
            self.on_packet()
            yield frame

    def _has_one_clock(self) -> bool:
        """Whether the index shows one continuous clock, so that a part of the file can be read on its own."""
        if _lists_frames(self._container, self._stream):
            return True
        is_matroska = "matroska" in self._container.format.name
        if is_matroska and len(self._stream.index_entries) and self._container.duration:
            # A joined recording starts behind the end of the first recording's index.
            end_s = self._container.duration / 1e6 + start_of(self._container)
            tail = self._seek(round(end_s / self._stream.time_base)) and _scan(
                self._container, self._stream, self._packets()
            )
            return bool(tail) and not tail.is_joined
        return False

    def _seek_before(self, start: float) -> None:
        """Seeks to a key frame that is shown no later than `start`, or to the start of the file."""
        stamp = round((start + start_of(self._container)) / self._stream.time_base)
        for back in _STEPS_BACK:
            earlier = stamp - round(back / self._stream.time_base)
            if start - back <= 0 or not self._seek(earlier):
                break
            packet = next(self._packets(), None)
            if packet is not None and packet.is_keyframe and packet.pts is not None and packet.pts <= stamp:
                self._origin = earlier
                self._seek(earlier)
                return
        self._origin = None
        self._open()

    def _seek(self, stamp: int) -> bool:
        try:
            self._container.seek(stamp, stream=self._stream)
        except (import_av().FFmpegError, OSError):
            return False
        return True

    def _choose_range(self) -> tuple[int, int]:
        times, start, end = self._table.times, self.start or 0.0, self.end
        first = max(0, bisect_right(times, start + _ROUNDING_S) - 1)
        last = len(times) if end is None else bisect_left(times, end - _ROUNDING_S)
        if first < last and start < self._table.end_s - _ROUNDING_S and (end is None or start < end):
            return first, last
        is_late = end is not None and start < end <= times[0] + _ROUNDING_S
        shown = f"begins at {times[0]:g} s" if is_late else f"ends at {self._table.end_s:g} s"
        asked = f"{self.start}..{self.end} s"
        raise MediaError.of(
            f"The range {asked} of {self.name} holds no frame, since its video {shown}; give another range.",
            f"holds no frame in the range {asked}; its video {shown}",
        )

    def _count_to(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """Decodes frames by their numbers in the file, including all frames before them."""
        self._open()
        chosen = set(wanted)
        for number, frame in enumerate(self._all_frames()):
            if number in chosen:
                yield number, frame
            if not wanted or number >= wanted[-1]:
                return

    def _jump_to(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """Decodes frames by their places in the table, from the key frames before them."""
        table, places, begin, end = self._table, [], 0, 0
        for place in wanted:
            packet = table.shown[place]
            key = table.key_before(packet)
            if places and (key > end + 1 or table.part[key] != table.part[begin]):
                yield from self._match(begin, end, places)
                places = []
            begin, end = (begin, max(end, packet)) if places else (key, packet)
            places.append(place)
        if places:
            yield from self._match(begin, end, places)

    def _match(self, begin: int, end: int, places: list[int]) -> Iterator[tuple[int, Any]]:
        """Decodes the packets from the key frame `begin` to `end` and yields the frames at `places`."""
        table, waiting, before = self._table, deque(places), None
        frames = self._decode(begin, end)
        first = next(frames, None)
        if first is None and self._seeks:
            # In some containers nothing can be decoded after a seek.
            self._seeks, self._position = False, None
            frames = self._decode(begin, end)
            first = next(frames, None)
        for frame in chain([] if first is None else [first], frames):
            if frame.pts is None:
                continue
            while waiting and table.pts[table.shown[waiting[0]]] < frame.pts:
                place = waiting.popleft()
                if before is not None:
                    yield place, before
            if waiting and table.pts[table.shown[waiting[0]]] == frame.pts:
                yield waiting.popleft(), frame
            before = frame
        if before is not None:
            yield from ((place, before) for place in waiting)

    def _decode(self, begin: int, end: int) -> Iterator:
        """The frames of the packets from `begin` to `end`, in display order."""
        packets, position = self._packets_from(begin)
        self._position = None
        for number, packet in enumerate(packets, position):
            if number >= begin:
                yield from self._decode_packet(packet)
            if number >= end:
                break
        else:
            number = position
        # The decoder still holds reordered frames.
        yield from self._decode_packet(None)
        self._stream.codec_context.flush_buffers()
        self._position = number + 1

    def _decode_packet(self, packet) -> list:
        self.num_decoded += packet is not None
        try:
            return self._stream.decode(packet)
        except EOFError:
            return []
        except (import_av().FFmpegError, OSError):
            self.num_damaged += 1
            return []

    def _packets_from(self, begin: int) -> tuple[Iterator, int]:
        """Packets from the key frame `begin` or a little earlier, and the number of the first packet."""
        if self._position is not None and 0 <= begin - self._position <= _NEAR:
            return self._packets(), self._position
        if self._seeks and not self._table.is_joined:
            keys = {pts: i for i, (pts, is_key) in enumerate(zip(self._table.pts, self._table.is_key)) if is_key}
            for back in _STEPS_BACK:
                if not self._seek(self._table.pts[begin] - round(back / self._stream.time_base)):
                    break
                packets = self._packets()
                first = next((packet for packet in packets if packet.is_keyframe and packet.pts in keys), None)
                if first is not None and keys[first.pts] <= begin:
                    return chain([first], packets), keys[first.pts]
        self._open()
        if self._origin is not None:
            self._seek(self._origin)
        return self._packets(), 0


def _clip_range(source: str | os.PathLike | Mapping[str, Any]) -> tuple[str, float | None, float | None]:
    """Path, start and end of a clip in seconds; `None` for no bound."""
    entry = source if isinstance(source, Mapping) else {"path": source}
    path = entry.get("path")
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise MediaError(f'A video is a path or {{"path", "start", "end"}} with seconds, got {reprlib.repr(source)}.')
    bounds = []
    for name in ("start", "end"):
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number, type(None))) or value != value:
            raise MediaError(f"`{name}` of the video {printable(path)} must be a number of seconds, got {value!r}.")
        bounds.append(None if value is None or value < 0 else float(value))
    return os.fspath(path), *bounds


def sample_video(
    source: str | os.PathLike | Mapping[str, Any],
    num_frames: int | None = None,
    sampling: str | Callable[[int, int], Sequence[int]] = "eval",
) -> dict[int, Image.Image]:
    """
    Samples frames of a video file or of a time range of it. Only the chosen frames are decoded, from the key frames
    before them.

    Args:
        source: As in [`VideoReader`].
        num_frames: Maximum number of frames; all by default.
        sampling: A mode of [`sample_frame_indices`], or a function of its first two arguments.

    Returns:
        Images by frame number, in order of time; for frames that cannot be decoded see [`VideoReader.frames`].

    Raises:
        MediaError: as [`VideoReader`], or if none of the chosen frames can be decoded.
    """
    with VideoReader(source) as video:
        limit = len(video) if num_frames is None else num_frames
        chosen = (
            sampling(len(video), limit) if callable(sampling) else sample_frame_indices(len(video), limit, sampling)
        )
        frames = {frame.number: frame.picture for frame in video.frames(int(number) for number in chosen)}
        if not frames:
            raise media_error("video", video.name, "cannot be decoded (none of the chosen frames)")
        return frames


def read_video(
    source: str | os.PathLike | Mapping[str, Any],
    num_frames: int | None = None,
    sampling: str | Callable[[int, int], Sequence[int]] = "eval",
) -> np.ndarray:
    """
    [`sample_video`] as one array.

    Returns:
        `(T, H, W, 3)` uint8, RGB, in order of time. Frames of another size are scaled to the size of the first.

    Raises:
        MediaError: as [`sample_video`].
    """
    frames = list(sample_video(source, num_frames, sampling).values())
    size = frames[0].size
    return np.stack(
        [frame if frame.size == size else frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
    )


__all__ = [
    "VideoFrame",
    "VideoInfo",
    "VideoReader",
    "probe_video",
    "read_video",
    "sample_video",
]
