"""How a video file is opened, when its frames are shown, and what they look like; PyAV reads it.

Time counts in seconds from the start of the file, sound included, by the frames' time stamps.
"""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator

from PIL import Image

from .media_rice import (
    MAX_PIXELS,
    MediaError,
    check_is_file,
    check_pixels,
    flatten,
    media_error,
    missing_media_error,
    printable,
)

# A clock that goes back further than this has begun anew.
BACK_S = 0.1
# As has one that leaps further in a container whose clock may leap: FFmpeg's own limit.
LEAP_S = 10.0
_LEAPING_FORMATS = 0x0200  # AVFMT_TS_DISCONT
NO_TIME_STAMPS = 0x0080  # AVFMT_NOTIMESTAMPS
_UNTIMED_FORMATS = {"image2", "image2pipe", "rawvideo", "yuv4mpegpipe"}
_WIDEST_PIXEL = 4
_PLAYLIST = re.compile(
    rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat\s|v=0\s|\[playlist\]|\[reference\]|"
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(\w+:)?(MPD|SmoothStreamingMedia|CompositionPlaylist|AssetMap|asx|smil)\b)",
    re.IGNORECASE | re.DOTALL,
)


def import_av():
    """PyAV; MediaError where it is not installed."""
    try:
        import av
    except ImportError:
        raise MediaError("Video is read with PyAV; install it: pip install av.") from None
    return av


class _Bare:
    """A file without its name: the content alone tells the format, and no name is taken for a protocol."""

    def __init__(self, file, seekable: bool):
        self.read, self.close = file.read, file.close
        if seekable:
            self.seek, self.tell = file.seek, file.tell


def is_playlist(path: str | os.PathLike) -> bool:
    """Whether a file is a text that names the places of media, by its first bytes."""
    with open(path, "rb") as file:
        return _PLAYLIST.match(file.read(4096)) is not None


def open_container(path: str | os.PathLike):
    """
    Opens a video file by PyAV. No other file and no address is opened on its behalf.

    Raises:
        MediaError: it is missing (`MissingMediaError`), a playlist, a picture, or no media; or PyAV is not installed.
    """
    import_av()
    name = printable(path)
    try:
        check_is_file(path)
        if is_playlist(path):
            reason = "is a playlist, which only names other media"
            hint = "give the video file itself, or follow the playlist with `rice recognise`"
            raise MediaError.of(f"{name} {reason}; {hint}.", reason)
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise missing_media_error("video", name) from None
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise media_error("video", name, f"cannot be read ({_reason(error)})") from error
    container = _open_media(file, name)
    if container.format.name.endswith("_pipe"):
        container.close()
        raise media_error("video", name, "is a picture and holds no video")
    return container


def open_pipe(path: str | os.PathLike | int):
    """
    Opens what can only be read from its start to its end, such as a named pipe, or standard input by its number.

    Raises:
        MediaError: it cannot be read, or holds no media; or PyAV is not installed.
    """
    import_av()
    name = "standard input" if isinstance(path, int) else printable(path)
    try:
        file = open(path, "rb", buffering=0, closefd=not isinstance(path, int))
    except (OSError, ValueError) as error:
        raise media_error("video", name, f"cannot be read ({_reason(error)})") from error
    return _open_media(file, name, seekable=False)


def _open_media(file, name: str, seekable: bool = True):
    av = import_av()
    try:
        return av.open(_Bare(file, seekable), container_options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as error:
        file.close()
        raise media_error("video", name, f"cannot be decoded ({_reason(error)})") from error


def video_stream(container, name: object, max_pixels: int | None = None):
    """
    The picture of a container: its first video stream that is more than a cover.

    Args:
        container: Of PyAV.
        name: What an error calls it.
        max_pixels: Of a frame, by default `MAX_PIXELS`; larger ones that come later are not decoded.

    Raises:
        MediaError: there is none, nothing decodes it, or its frames have too many pixels.
    """
    flags = import_av().stream.Disposition
    covers = flags.attached_pic | flags.timed_thumbnails
    stream = next((stream for stream in container.streams.video if not stream.disposition & covers), None)
    if stream is None:
        beside = " but a cover picture" if container.streams.video else ""
        raise media_error("video", name, f"holds no video{beside}")
    context = stream.codec_context
    if context is None:
        raise media_error("video", name, "cannot be decoded (no decoder for its picture)")
    try:
        check_pixels(context.width, context.height, max_pixels)
    except ValueError as error:
        raise media_error("video", name, f"has frames of {error}") from None
    if not context.is_open:
        context.options = {"max_pixels": str(max_pixels or MAX_PIXELS)}
    return stream


def sound_stream(container):
    """The sound of a container of PyAV, its first one that can be decoded; `None` where there is none."""
    return next((stream for stream in container.streams.audio if stream.codec_context is not None), None)


def start_of(container) -> float:
    """Time stamp at which a player starts, in seconds: the first of all streams, sound included."""
    return container.start_time / 1e6 if container.start_time is not None else 0.0


def clock_leaps(container) -> bool:
    """Whether time stamps of this kind of container may leap from one recording to the next."""
    return bool(container.format.flags & _LEAPING_FORMATS)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def has_time_stamps(container) -> bool:
    """
    Whether a container says when its frames are shown. Raw streams, MJPEG over HTTP and rows of pictures do not;
    FFmpeg counts their frames by a rate that it assumes.
    """
    name = container.format.name
    return not (container.format.flags & NO_TIME_STAMPS or name in _UNTIMED_FORMATS or name.endswith("_pipe"))


class Clock:
    """
    Time stamps of frames, in the order in which they are shown, to seconds since the start.

    A frame without a time stamp follows the last one by a frame's duration, and so does one whose stamp is the last
    one's or a little earlier. Where a stamp goes back further or, in a container whose clock may leap, leaps by more
    than ten seconds, recordings were joined: time goes on by a frame's duration.

    Args:
        container: Of PyAV.
        stream: Its video stream.
        on_leap: Called with the seconds by which the stamps leap.

    Attributes:
        shift_s: Seconds to add to the container's time stamps, of any of its streams; `None` before the first stamp
            of a container that has no start of its own.
        last_s: The last frame's time.
        step_s: What a frame lasts.
    """

    def __init__(self, container, stream, on_leap: Callable[[float], None] = lambda leap_s: None):
        rate = float(stream.average_rate or 0)
        self.step_s = 1 / rate if 1e-3 < rate < 1e3 else 0.04
        self.leaps = clock_leaps(container)
        self.on_leap = on_leap
        # What has no start of its own starts with its first frame.
        self.shift_s = None if container.start_time is None else -start_of(container)
        self.last_s: float | None = None
        self._stamp_s = -math.inf

    def time_of(self, stamp_s: float | None) -> float:
        """Seconds since the start of the frame that is shown next, whose time stamp is `stamp_s` seconds."""
        known = stamp_s is not None and math.isfinite(stamp_s)
        if known and self.shift_s is None:
            self.last_s = 0.0 if self.last_s is None else self.last_s + self._gap_s()
            self.shift_s = self.last_s - stamp_s
        elif self.last_s is None:
            self.last_s = stamp_s + self.shift_s if known else 0.0
        elif not known or self._stamp_s - BACK_S <= stamp_s <= self._stamp_s:
            self.last_s += self._unstamped_s()
        else:
            self._follow(stamp_s)
        if known:
            self._stamp_s = stamp_s
        return self.last_s

    def _follow(self, stamp_s: float) -> None:
        passed_s = stamp_s + self.shift_s - self.last_s
        if not -BACK_S <= passed_s <= self._longest_s():
            gap_s = self._gap_s()
            self.on_leap(passed_s)
            self.shift_s += gap_s - passed_s
            self.last_s += gap_s
        elif passed_s > 0:
            self.step_s = passed_s
            self.last_s += passed_s

    def _longest_s(self) -> float:
        """By how much a stamp may be later than the last one."""
        return LEAP_S if self.leaps else math.inf

    def _gap_s(self) -> float:
        """Time from the last frame to one whose stamp leaps."""
        return self.step_s

    def _unstamped_s(self) -> float:
        """Time from the last frame to one without a stamp."""
        return self.step_s


def frame_picture(frame, stream) -> Image.Image:
    """A decoded frame as a player shows it: upright, with square pixels, over white, RGB."""
    size = {}
    ratio = stream.sample_aspect_ratio
    if ratio and ratio != 1 and 1 / _WIDEST_PIXEL <= ratio <= _WIDEST_PIXEL:
        size = {"width": max(1, round(frame.width * ratio)), "height": frame.height}
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        picture = flatten(Image.fromarray(frame.to_ndarray(format="rgba", **size)))
    else:
        picture = frame.to_image(**size)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # Rows (a, b, .) and (c, d, .): a point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack_from("<5i", bytes(matrix))
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else picture


def decoded_frames(
    packets: Iterator, stream, on_damage: Callable[[], None], on_break: Callable[[str], None]
) -> Iterator:
    """
    The frames of a stream's packets, in the order in which they are shown.

    Args:
        packets: Of `container.demux(stream)`.
        on_damage: Called for each packet that cannot be decoded.
        on_break: Called with the reason when the container ends before its end.
    """
    errors = (import_av().FFmpegError, OSError)
    ended = False
    while not ended:
        try:
            packet = next(packets, None)
        except errors as error:
            on_break(_reason(error))
            packet = None
        # At a break the decoder still holds a few frames; at an ordinary end the last, empty packet brings them.
        ended = packet is None
        try:
            frames = stream.decode(None) if ended else packet.decode()
        except EOFError:
            frames = []
        except errors:
            on_damage()
            frames = []
        yield from frames


__all__ = [
    "BACK_S",
    "LEAP_S",
    "NO_TIME_STAMPS",
    "Clock",
    "clock_leaps",
    "decoded_frames",
    "frame_picture",
    "has_time_stamps",
    "import_av",
    "is_playlist",
    "open_container",
    "open_pipe",
    "sound_stream",
    "start_of",
    "video_stream",
]
