"""Frames of a video file, a folder of pictures, a network stream or a camera, at a low frame rate.

A reader decodes in its own thread. The reader of a file waits for the consumer. The reader of a live source does not:
if recognition is too slow, the oldest frames are dropped and counted. A live source that breaks off is opened again.
"""

import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from data_rice.folders import Listing, list_pictures
from processing_rice import MediaError, open_image
from processing_rice.media_rice import MissingMediaError, printable
from processing_rice.video_container_rice import (
    clock_leaps,
    decoded_frames,
    frame_picture,
    has_time_stamps,
    import_av,
    is_playlist,
    open_container,
    open_pipe,
    sound_stream,
    start_of,
    video_stream,
)

from .clock import StreamClock

logger = logging.getLogger(__name__)

_CAMERA_FORMATS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
# For opening, which reads until frames of a slow camera can be decoded, and for waiting for more.
_TIMEOUTS_S = (30.0, 10.0)
_LONGEST_WAIT_S = 30.0
_SECONDS_BETWEEN_NOTICES = 10.0
# Frames at their full size: 4K takes 25 MB each.
_QUEUE_SIZE = 16


@dataclass(frozen=True)
class Frame:
    """
    A frame of a stream.

    Attributes:
        time_s: Seconds from the start of the stream, including its sound.
        picture: RGB, upright.
    """

    time_s: float
    picture: Image.Image


@dataclass
class Counts:
    """
    Counts of a stream so far.

    Attributes:
        frames: Frames that were used.
        dropped: Frames that were dropped because recognition was slower than a live source.
        damaged: Packets of a video, or pictures of a folder, that could not be decoded.
        reconnects: Number of times that a live source was opened again.
        available: Frames that could be decoded, used or not.
        leaps: Number of times that time stamps went back or jumped and were corrected.
    """

    frames: int = 0
    dropped: int = 0
    damaged: int = 0
    reconnects: int = 0
    available: int = 0
    leaps: int = 0


def is_address(source: str | os.PathLike) -> bool:
    """Whether a source is a web address or a camera, not a file or folder."""
    is_named = isinstance(source, str) and ("://" in source or source.startswith("camera:"))
    return is_named and not os.path.exists(source)


def open_stream(source: str | os.PathLike, fps: float = 2.5, folder_fps: float = 1.0, **settings):
    """
    Opens a source; errors are raised at once.

    Args:
        source: A video file, a playlist, a folder of pictures in the order of their names, an address
            (`rtsp://...`, `https://.../live.m3u8`), a camera (`camera:0`), a named pipe, or `-` for standard input.
        fps: Maximum frames per second.
        folder_fps: Pictures of a folder per second.
        settings: Arguments of [`VideoStream`].

    Returns:
        An iterable of [`Frame`]s with `counts`, `duration_s` (`None` if unknown), `live`, `error` and `stop()`.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: the source has no video or pictures, an address does not answer, or PyAV is not installed.
    """
    if not fps > 0 or not folder_fps > 0:
        raise ValueError(f"Frames per second must be above 0, got {fps if not fps > 0 else folder_fps}.")
    if settings.get("max_reconnects", 0) < 0:
        raise ValueError(f"`max_reconnects` must be at least 0, got {settings['max_reconnects']}.")
    if not is_address(source) and os.path.isdir(source):
        return FolderStream(source, fps, folder_fps, notify=settings.get("notify", logger.warning))
    return VideoStream(source, fps, **settings)


def frames_of_folder(folder: str | os.PathLike) -> Listing:
    """
    A folder's pictures in the natural order of their names (2 before 10), and the entries left out.

    Raises:
        ValueError: there is no picture, or one is a link that leads out of the folder.
    """
    listing = list_pictures(folder)
    if not listing.pictures:
        left_out = f" ({listing.note()})" if listing.left_out else ""
        raise ValueError(f"{folder} holds no pictures{left_out}; name a folder of frames, or a video file.")
    return listing


class _Grid:
    """Chooses the first frame at or after each multiple of 1 / fps seconds."""

    def __init__(self, fps: float):
        self.fps = fps
        self.next_s = -math.inf

    def takes(self, time_s: float) -> bool:
        # Time stamps are rounded to the container's clock, often to milliseconds.
        if time_s < self.next_s - 2e-3:
            return False
        self.next_s = (math.floor((time_s + 2e-3) * self.fps) + 1) / self.fps
        return True


class FolderStream:
    """The pictures of a folder; see [`open_stream`]. Unreadable pictures are counted, reported and left out."""

    live = False
    is_recording = True
    error = None

    def __init__(self, folder, fps: float, folder_fps: float, notify: Callable[[str], None] = logger.warning):
        self.listing = frames_of_folder(folder)
        self.fps, self.folder_fps, self.notify = fps, folder_fps, notify
        self.duration_s = len(self.listing.pictures) / folder_fps
        self.counts = Counts()
        self._stopped = False

    def __iter__(self) -> Iterator[Frame]:
        grid, error = _Grid(self.fps), None
        for number, path in enumerate(self.listing.pictures):
            if self._stopped:
                return
            self.counts.available += 1
            if not grid.takes(number / self.folder_fps):
                continue
            try:
                picture = open_image({"path": path})
            except MediaError as failure:
                error = failure
                self.counts.damaged += 1
                self.counts.available -= 1
                self.notify(f"{failure}; this frame is left out")
                continue
            self.counts.frames += 1
            yield Frame(number / self.folder_fps, picture)
        if self.listing.left_out:
            self.notify(self.listing.note())
        if not self.counts.frames and error is not None:
            raise ValueError(f"None of the pictures can be used: {error}.")

    def stop(self) -> None:
        """Ends the iteration after the current frame."""
        self._stopped = True


def open_source(source: str | os.PathLike):
    """
    Opens a video file, a playlist, an address, a camera, a named pipe or standard input (`-`) with PyAV. Playlists and
    addresses may name further media.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the source cannot be read, holds no video, or PyAV is not installed.
    """
    av, name, settings = import_av(), os.fspath(source), {}
    if not is_address(source):
        if name == "-" and not os.path.exists(name):
            return open_pipe(sys.stdin.fileno())
        if not os.path.exists(name):
            raise MissingMediaError(f"There is no video file or folder {printable(name)}.")
        if not os.path.isfile(name):
            return open_pipe(name)
        if not is_playlist(name):
            return open_container(name)
        # With the file protocol, because FFmpeg may take a name for an address.
        name = "file:" + os.path.abspath(name)
    elif name.startswith("camera:"):
        system, device = _CAMERA_FORMATS.get(sys.platform, _CAMERA_FORMATS["linux"])
        name, settings = device.format(name.removeprefix("camera:")), {"format": system}
    else:
        settings = {"timeout": _TIMEOUTS_S}
        if name.startswith("rtsp"):
            # Over UDP, lost packets give smeared pictures.
            settings["options"] = {"rtsp_transport": "tcp"}
    try:
        return av.open(name, **settings)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{source} cannot be read as a video ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class VideoStream:
    """
    Frames of a video file, an address or a camera; see [`open_stream`]. Iterate over it once.

    Args:
        source: The source.
        fps: Maximum frames per second.
        max_reconnects: Maximum number of attempts in a row to open a live source again, after 1, 2, 4, ... seconds, at
            most 30.
        backoff_s: The first of these pauses.
        queue_size: Maximum number of waiting frames.
        notify: Called with one sentence per event: frames dropped, connection lost, file incomplete.
        opener: Opens a container, see [`open_source`].
        now: A clock, in seconds, for sources without time stamps.

    Attributes:
        live: Whether the source does not wait: an address or camera without a known length.
        duration_s: Length in seconds from the header, or `None`.
        error: Reason of the early end of a live source, or `None`.
        sound: Receives the packets of sound while the video is read (a `LiveSound`); `None` ignores the sound.
        clock: The [`StreamClock`] of its times.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        fps: float = 2.5,
        max_reconnects: int = 5,
        backoff_s: float = 1.0,
        queue_size: int = _QUEUE_SIZE,
        notify: Callable[[str], None] = logger.warning,
        opener: Callable | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.source, self.fps, self.notify = source, fps, notify
        self.max_reconnects, self.backoff_s, self.queue_size = max_reconnects, backoff_s, queue_size
        self.opener = opener or open_source
        self.counts = Counts()
        self.error: str | None = None
        self.sound = None
        self.clock = StreamClock(source, now, notify, self._tell_leap)
        self._container = self._open()
        # Raised at once, not when frames are requested.
        stream = video_stream(self._container, source)
        self.duration_s = _duration(self._container)
        self.live = is_address(source) and not _is_recording(self._container)
        if not is_address(source) and clock_leaps(self._container):
            # From the first and last time stamp, which is unreliable for joined recordings.
            self.duration_s = None
        self._pictures_s = self.duration_s and _pictures_end(self._container, stream, self.duration_s)
        self._queue: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._grid = _Grid(fps)
        self._end_s = 0.0
        self._failed_in_a_row = 0
        self._told_s: dict[str, float] = {}

    def __iter__(self) -> Iterator[Frame]:
        # A daemon thread, because a read that hangs in a driver must not prevent the program from ending.
        thread = threading.Thread(target=self._run, name=f"reader of {self.source}", daemon=True)
        thread.start()
        try:
            while True:
                with self._changed:
                    # The main thread handles signals only between waits.
                    while not self._queue and not self._ended and not self._stopping.is_set():
                        self._changed.wait(0.5)
                    if self._stopping.is_set() or not self._queue:
                        break
                    frame = self._queue.popleft()
                    self._changed.notify_all()
                self.counts.frames += 1
                yield frame
        finally:
            self.stop()
            thread.join(timeout=2.0)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the iteration after the current frame; may be called from any thread or signal handler."""
        # No lock here, because a signal may arrive while this thread holds it.
        self._stopping.set()

    @property
    def is_recording(self) -> bool:
        """Whether the source is complete and can be read a second time."""
        return not self.live and (is_address(self.source) or os.path.isfile(self.source))

    @property
    def has_sound(self) -> bool:
        """Whether the source has sound; call this before reading frames."""
        return sound_stream(self._container) is not None

    def _run(self) -> None:
        try:
            while self._container is not None:
                problem = self._read()
                self._container.close()
                self._container = None
                if self._stopping.is_set():
                    return
                if self.live:
                    self._container = self._reconnect(problem or "the stream ended")
                else:
                    self._report_length(problem)
        except Exception as error:
            # Raised again in the consumer's thread.
            self._failure = error
        finally:
            if self._container is not None:
                self._container.close()
            if self.sound is not None:
                self.sound.stop()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read(self) -> str | None:
        """Passes on a container's frames; returns the reason of an early end, `None` at the regular end."""
        container = self._container
        stream = video_stream(container, self.source)
        stream.thread_type = "AUTO"
        self.clock.begin(container, stream, self.is_recording, self.live)
        packets = self.clock.arriving(self._pictures(container, stream))
        problems: list[str] = []
        for frame in decoded_frames(packets, stream, self._count_damage, problems.append):
            if self._stopping.is_set():
                return None
            self._hand_out(frame, stream, self.clock.time_of(frame.time))
        return problems[0] if problems else None

    def _pictures(self, container, stream) -> Iterator:
        """The packets of pictures; packets of sound use the same clock, which may start with the first picture."""
        sound = None if self.sound is None else sound_stream(container)
        if sound is None:
            yield from container.demux(stream)
            return
        for packet in container.demux(stream, sound):
            if packet.stream is stream:
                yield packet
            elif self.clock.shift_s is not None:
                self.sound.take(packet, self.clock.shift_s)

    def _open(self):
        self.clock.opening()
        return self.opener(self.source)

    def _count_damage(self) -> None:
        self.counts.damaged += 1
        self.clock.lost_packet()

    def _hand_out(self, frame, stream, time_s: float) -> None:
        self.counts.available += 1
        self._failed_in_a_row = 0
        # The last frame of a slide show may last for minutes.
        self._end_s = time_s + float((frame.duration or 0) * (frame.time_base or 0))
        if self._grid.takes(time_s):
            self._put(Frame(time_s, frame_picture(frame, stream, self.source)))

    def _put(self, frame: Frame) -> None:
        with self._changed:
            if self.live and len(self._queue) >= self.queue_size:
                self._queue.popleft()
                self.counts.dropped += 1
                self._tell_dropped()
            while len(self._queue) >= self.queue_size and not self._stopping.is_set():
                self._changed.wait(0.5)
            self._queue.append(frame)
            self._changed.notify_all()

    def _tell_dropped(self) -> None:
        self._tell_at_times(
            "dropped",
            f"recognition is slower than the stream: {self.counts.dropped} frames dropped so far; lower the frames "
            f"per second or lengthen the hop",
        )

    def _tell_leap(self, leap_s: float) -> None:
        self.counts.leaps += 1
        self._tell_at_times(
            "leaps",
            f"the time stamps of {self.source} jump by {leap_s:+.1f} s at {self.clock.last_s:.1f} s; times continue "
            f"from there",
        )

    def _tell_at_times(self, kind: str, text: str) -> None:
        if time.monotonic() - self._told_s.get(kind, -math.inf) >= _SECONDS_BETWEEN_NOTICES:
            self._told_s[kind] = time.monotonic()
            self.notify(text)

    def _report_length(self, problem: str | None) -> None:
        if self.clock.last_s is None:
            raise ValueError(f"{self.source} holds no frame that can be decoded{f' ({problem})' if problem else ''}.")
        length = self._pictures_s
        # Sound is often slightly longer than the pictures.
        if problem or (length is not None and self._end_s < length - max(2.0, 0.02 * length)):
            of = f" of {length:.1f} s" if length is not None else ""
            why = f" ({problem})" if problem else ""
            self.notify(f"{self.source} is cut short{why}: {self.clock.last_s:.1f} s{of} could be read and are used")
        if self.counts.damaged:
            self.notify(f"{self.source} is damaged: {self.counts.damaged} packets could not be decoded")

    def _reconnect(self, problem: str):
        while self._failed_in_a_row < self.max_reconnects:
            pause = min(self.backoff_s * 2**self._failed_in_a_row, _LONGEST_WAIT_S)
            self._failed_in_a_row += 1
            self.notify(
                f"{self.source} broke off ({problem}); opening it again in {pause:g} s "
                f"(attempt {self._failed_in_a_row} of {self.max_reconnects})"
            )
            if self._stopping.wait(pause):
                return None
            try:
                container = self._open()
            except (OSError, ValueError) as error:
                problem = _reason(error)
                continue
            if _is_recording(container):
                # The source is a recording now, and its start was already processed.
                container.close()
                return None
            self.counts.reconnects += 1
            return container
        self.error = f"{self.source} did not come back after {self.max_reconnects} attempts ({problem})"
        return None


def _duration(container) -> float | None:
    """Length in seconds from the header, or `None`; PyAV counts microseconds."""
    if not container.duration:
        return None
    length_s = container.duration / 1e6
    # FFmpeg writes the time stamp of the end into a Matroska file, others the length.
    start_s = start_of(container) if "matroska" in container.format.name else 0.0
    return length_s - start_s if length_s > start_s else length_s


def _pictures_end(container, stream, length_s: float) -> float:
    """Seconds at which the pictures end, by the header; the sound may go on until `length_s`."""
    if not stream.duration:
        return length_s
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - start_of(container)


def _is_recording(container) -> bool:
    """Whether the content of an address is complete, by its length in seconds or, without a clock, in bytes."""
    if container.duration:
        return True
    # Cameras may announce any length for their endless response.
    return not has_time_stamps(container) and container.format.name != "mpjpeg" and container.size > 0
