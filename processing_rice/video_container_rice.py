"""How a video file is opened, when its frames are shown, and what they look like; PyAV reads it.

Time counts in seconds from the start of the file, sound included, by the frames' time stamps.
"""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator

from PIL import Image

from .media_rice import MAX_PIXELS, MediaError, check_pixels, flatten, media_error, missing_media_error, printable

# A clock that goes back further than this has begun anew.
BACK_S = 0.1
# As has one that leaps further in a container whose clock may leap: FFmpeg's own limit.
LEAP_S = 10.0
_LEAPING_FORMATS = 0x0200  # AVFMT_TS_DISCONT
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

    def __init__(self, file):
        self.read, self.seek, self.tell, self.close = file.read, file.seek, file.tell, file.close


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
    av, name = import_av(), printable(path)
    try:
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
    try:
        container = av.open(_Bare(file), container_options={"protocol_whitelist": "none"})
    except (av.FFmpegError, OSError, ValueError) as error:
        file.close()
        raise media_error("video", name, f"cannot be decoded ({_reason(error)})") from error
    if container.format.name.endswith("_pipe"):
        container.close()
        raise media_error("video", name, "is a picture and holds no video")
    return container


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


class Clock:
    """
    Time stamps of frames, in the order in which they are shown, to seconds since the start.

    A frame without a time stamp follows the last one by a frame's duration. So does one whose stamp goes back or,
    where the container's clock may leap, leaps by more than ten seconds: there recordings were joined.

    Args:
        container: Of PyAV.
        stream: Its video stream.
    """

    def __init__(self, container, stream):
        rate = float(stream.average_rate or 0)
        self.step_s = 1 / rate if 1e-3 < rate < 1e3 else 0.04
        self.leaps = clock_leaps(container)
        # What has no start of its own starts with its first frame.
        self.shift_s = None if container.start_time is None else -start_of(container)
        self.last_s: float | None = None

    def time_of(self, stamp_s: float | None) -> float:
        """Seconds since the start of the frame that is shown next, whose time stamp is `stamp_s` seconds."""
        if self.shift_s is None:
            self.shift_s = -(stamp_s or 0.0)
        if self.last_s is None:
            self.last_s = 0.0 if stamp_s is None else stamp_s + self.shift_s
            return self.last_s
        if stamp_s is None or not math.isfinite(stamp_s):
            time_s = self.last_s + self.step_s
        else:
            time_s = stamp_s + self.shift_s
            if time_s < self.last_s - BACK_S or (self.leaps and time_s > self.last_s + LEAP_S):
                self.shift_s += self.last_s + self.step_s - time_s
                time_s = self.last_s + self.step_s
        if time_s > self.last_s:
            self.step_s = time_s - self.last_s
        self.last_s = max(time_s, self.last_s)
        return self.last_s


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
    container,
    stream,
    on_damage: Callable[[], None],
    on_break: Callable[[str], None],
    beside=None,
    on_packet: Callable | None = None,
) -> Iterator:
    """
    A container's frames from where it stands, in the order in which they are shown.

    Args:
        on_damage: Called for each packet that cannot be decoded.
        on_break: Called with the reason when the container ends before its end.
        beside, on_packet: Another stream, and what is called with its packets as they come, undecoded.
    """
    errors = (import_av().FFmpegError, OSError)
    packets, ended = container.demux(*(one for one in (stream, beside) if one is not None)), False
    while not ended:
        try:
            packet = next(packets, None)
        except errors as error:
            on_break(_reason(error))
            packet = None
        if beside is not None and packet is not None and packet.stream is beside:
            on_packet(packet)
            continue
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
    "Clock",
    "clock_leaps",
    "decoded_frames",
    "frame_picture",
    "import_av",
    "is_playlist",
    "open_container",
    "sound_stream",
    "start_of",
    "video_stream",
]
