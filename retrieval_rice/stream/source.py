"""Frames of a video file, a folder of pictures, a network stream or a camera, at a low rate and as they come.

A reader decodes in a thread of its own. A file waits for whoever takes the frames; a live source does not, so that the
oldest frames are dropped, and counted, when recognition falls behind. A live source that breaks off is opened again.
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
    Clock,
    clock_leaps,
    decoded_frames,
    frame_picture,
    import_av,
    is_playlist,
    open_container,
    sound_stream,
    video_stream,
)

logger = logging.getLogger(__name__)

_CAMERA_FORMATS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
_TIMEOUT_S = 10.0
# Time stamps of a live source that jump further than this begin anew.
_LONGEST_JUMP_S = 60.0
_LONGEST_WAIT_S = 30.0
_SECONDS_BETWEEN_NOTICES = 10.0
# Frames at their full size: 4K takes 25 MB each.
_QUEUE_SIZE = 16


@dataclass(frozen=True)
class Frame:
    """
    A frame of a stream.

    Attributes:
        time_s: Seconds from the start of the stream, sound included.
        picture: RGB, upright.
    """

    time_s: float
    picture: Image.Image


@dataclass
class Counts:
    """
    What became of a stream's frames so far.

    Attributes:
        frames: Handed out.
        dropped: Left out since recognition fell behind a live source.
        damaged: Packets of a video, or pictures of a folder, that could not be decoded.
        reconnects: Times that a live source was opened again.
    """

    frames: int = 0
    dropped: int = 0
    damaged: int = 0
    reconnects: int = 0


def is_address(source: str | os.PathLike) -> bool:
    """Whether a source is a web address or a camera, and no file or folder."""
    is_named = isinstance(source, str) and ("://" in source or source.startswith("camera:"))
    return is_named and not os.path.exists(source)


def open_stream(source: str | os.PathLike, fps: float = 2.5, folder_fps: float = 1.0, **settings):
    """
    Opens a source, so that what is wrong with it is known at once.

    Args:
        source: A video file, a playlist, a folder of pictures in the order of their names, an address
            (`rtsp://...`, `https://.../live.m3u8`), or a camera (`camera:0`).
        fps: Frames per second to hand out at most.
        folder_fps: Pictures of a folder per second.
        settings: Of [`VideoStream`].

    Returns:
        An iterable of [`Frame`]s with `counts`, `duration_s` (`None` where not known), `live`, `error` and `stop()`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no video, no pictures, an address that does not answer, or PyAV is not installed.
    """
    if not fps > 0 or not folder_fps > 0:
        raise ValueError(f"Frames per second must be above 0, got {fps if not fps > 0 else folder_fps}.")
    if not is_address(source) and os.path.isdir(source):
        return FolderStream(source, fps, folder_fps, notify=settings.get("notify", logger.warning))
    return VideoStream(source, fps, **settings)


def frames_of_folder(folder: str | os.PathLike) -> Listing:
    """
    A folder's pictures in the order of their names, where 2 comes before 10, and what else lies there.

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
        # Time stamps are rounded to the container's clock, often milliseconds.
        if time_s < self.next_s - 2e-3:
            return False
        self.next_s = (math.floor((time_s + 2e-3) * self.fps) + 1) / self.fps
        return True


class FolderStream:
    """The pictures of a folder; see [`open_stream`]. One that cannot be decoded is counted, told, and left out."""

    live = False
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
            if not grid.takes(number / self.folder_fps):
                continue
            try:
                picture = open_image({"path": path})
            except MediaError as failure:
                error = failure
                self.counts.damaged += 1
                self.notify(f"{failure}; this frame is left out")
                continue
            self.counts.frames += 1
            yield Frame(number / self.folder_fps, picture)
        if self.listing.left_out:
            self.notify(self.listing.note())
        if not self.counts.frames and error is not None:
            raise ValueError(f"None of the pictures can be used: {error}.")

    def stop(self) -> None:
        """Ends the iteration after the frame in work."""
        self._stopped = True


def open_source(source: str | os.PathLike):
    """
    Opens a video file, a playlist, an address or a camera by PyAV. Playlists and addresses may name further media.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, holds no video, or PyAV is not installed.
    """
    av, name, settings = import_av(), os.fspath(source), {}
    if not is_address(source):
        if not os.path.exists(name):
            raise MissingMediaError(f"There is no video file or folder {printable(name)}.")
        if not os.path.isfile(name) or not is_playlist(name):
            return open_container(name)
        # Named as a file, since a name may look like an address to FFmpeg.
        name = "file:" + os.path.abspath(name)
    elif name.startswith("camera:"):
        system, device = _CAMERA_FORMATS.get(sys.platform, _CAMERA_FORMATS["linux"])
        name, settings = device.format(name.removeprefix("camera:")), {"format": system}
    else:
        settings = {"timeout": _TIMEOUT_S}
        if name.startswith("rtsp"):
            # Over UDP lost packets show as smeared pictures.
            settings["options"] = {"rtsp_transport": "tcp"}
    try:
        return av.open(name, **settings)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{source} cannot be read as a video ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class VideoStream:
    """
    Frames of a video file, an address or a camera; see [`open_stream`]. To be iterated once.

    Args:
        source: What to open.
        fps: Frames per second to hand out at most.
        max_reconnects: How often in a row a live source is opened again, after 1, 2, 4, ... seconds, 30 at most.
        backoff_s: The first of these pauses.
        queue_size: Frames that may wait to be taken.
        notify: Is told in one sentence what happens: frames dropped, connection lost, file cut short.
        opener: Opens a container, see [`open_source`].

    Attributes:
        live: Whether the source does not wait: an address or camera without a known length.
        duration_s: Length in seconds by the header, or `None`.
        error: Why a live source ended before its time, or `None`.
        sound: What is handed the packets of a live source's sound, a `LiveSound`; `None` leaves the sound out.
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
    ):
        self.source, self.fps, self.notify = source, fps, notify
        self.max_reconnects, self.backoff_s, self.queue_size = max_reconnects, backoff_s, queue_size
        self.opener = opener or open_source
        self.counts = Counts()
        self.error: str | None = None
        self.sound = None
        self._container = self.opener(source)
        # Told at once, and not when frames are asked for.
        video_stream(self._container, source)
        self.duration_s = _duration(self._container)
        self.live = is_address(source) and self.duration_s is None
        if not is_address(source) and clock_leaps(self._container):
            # By its first and last time stamp, which says little where recordings were joined.
            self.duration_s = None
        self._queue: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._grid = _Grid(fps)
        # From time stamps to times.
        self._shift_s: float | None = None
        self._started_s: float | None = None
        self._last_s: float | None = None
        self._failed_in_a_row = 0
        self._told_s = -math.inf

    def __iter__(self) -> Iterator[Frame]:
        # A daemon, since a read that hangs in a driver must not keep the program from ending.
        thread = threading.Thread(target=self._run, name=f"reader of {self.source}", daemon=True)
        thread.start()
        try:
            while True:
                with self._changed:
                    # The main thread answers to signals only between waits.
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
        """Ends the iteration after the frame in work; may be called from any thread or signal handler."""
        # No lock here: a signal may come while this very thread holds it.
        self._stopping.set()

    @property
    def has_sound(self) -> bool:
        """Whether there is sound beside the pictures, to be asked before frames are taken."""
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
            # Raised again where the frames are taken.
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
        """Hands out a container's frames; returns why it ended early, `None` at its end."""
        container = self._container
        stream = video_stream(container, self.source)
        stream.thread_type = "AUTO"
        times = _LiveTimes(self, stream) if self.live else Clock(container, stream)
        problems: list[str] = []
        self._shift_s = None
        listening = (None, None) if self.sound is None else (sound_stream(container), self._hand_on)
        for frame in decoded_frames(container, stream, self._count_damage, problems.append, *listening):
            if self._stopping.is_set():
                return None
            time_s = times.time_of(frame.time)
            if frame.time is not None:
                self._shift_s = time_s - frame.time
            self._hand_out(frame, stream, time_s)
        return problems[0] if problems else None

    def _hand_on(self, packet) -> None:
        """Sound goes by the clock of the pictures, which begins with the first of them."""
        if self._shift_s is not None:
            self.sound.take(packet, self._shift_s)

    def _count_damage(self) -> None:
        self.counts.damaged += 1

    def _hand_out(self, frame, stream, time_s: float) -> None:
        self._last_s = time_s
        self._failed_in_a_row = 0
        if self._grid.takes(time_s):
            self._put(Frame(time_s, frame_picture(frame, stream)))

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
        if time.monotonic() - self._told_s >= _SECONDS_BETWEEN_NOTICES:
            self._told_s = time.monotonic()
            self.notify(
                f"recognition is slower than the stream: {self.counts.dropped} frames dropped so far; lower the "
                f"frames per second or lengthen the hop"
            )

    def _report_length(self, problem: str | None) -> None:
        if self._last_s is None:
            raise ValueError(f"{self.source} holds no frame that can be decoded{f' ({problem})' if problem else ''}.")
        length = self.duration_s
        # Sound often goes on a little longer than the picture.
        if problem or (length is not None and self._last_s < length - max(2.0, 0.02 * length)):
            of = f" of {length:.1f} s" if length is not None else ""
            why = f" ({problem})" if problem else ""
            self.notify(f"{self.source} is cut short{why}: {self._last_s:.1f} s{of} could be read and are used")
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
                container = self.opener(self.source)
            except (OSError, ValueError) as error:
                problem = _reason(error)
                continue
            if _duration(container) is not None:
                # What was live is a recording now, whose start was seen already.
                container.close()
                return None
            self.counts.reconnects += 1
            return container
        self.error = f"{self.source} did not come back after {self.max_reconnects} attempts ({problem})"
        return None


def _duration(container) -> float | None:
    """Seconds by a container's header; PyAV counts microseconds."""
    return container.duration / 1e6 if container.duration else None


class _LiveTimes:
    """Seconds from the start of a live source for the frames of one of its containers."""

    def __init__(self, source: VideoStream, stream):
        self.source, self.step_s = source, 1 / (float(stream.average_rate or 0) or 25.0)
        self.first_s: float | None = None
        self.base_s = 0.0
        self.latest_s: float | None = None

    def time_of(self, stamp_s: float | None) -> float:
        """
        Time stamps go on from where the last container ended, but for the time that passed in between. Those that go
        back or leap begin anew in the same way.
        """
        # What a decoder gives up at a break has lost its clock.
        if stamp_s is None or not math.isfinite(stamp_s):
            stamp_s = 0.0 if self.latest_s is None else self.latest_s + self.step_s
        jumps = self.latest_s is not None and not -1.0 <= stamp_s - self.latest_s <= _LONGEST_JUMP_S
        if self.first_s is None or jumps:
            self.first_s, self.base_s = stamp_s, self._now()
        self.latest_s = stamp_s
        return self.base_s + stamp_s - self.first_s

    def _now(self) -> float:
        source, now = self.source, time.monotonic()
        if source._started_s is None:
            source._started_s = now
            return 0.0
        return max(now - source._started_s, (source._last_s or 0.0) + self.step_s)
